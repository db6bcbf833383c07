//! What both machines share: limits in time, a clock, cells of the tables, what a step gives, and who remembers
//! outcomes.

use std::collections::VecDeque;
use std::time::Duration;

use crate::{SessionId, SessionOutcome};

/// How long an end waits for what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// For the peer's next frame where the peer has little to do.
    pub answer: Duration,
    /// For the peer to check a configuration, build a VM, or map memory.
    pub prepare: Duration,
    /// Without any frame: then the link is lost.
    pub silence: Duration,
    /// Without sending anything: then a Keepalive is sent.
    pub keepalive: Duration,
    /// Between two tries to ask for an outcome.
    pub ask: Duration,
    /// For an outcome, in all; then the source is in doubt.
    pub doubt: Duration,
    /// Between two tries to take disk locks back.
    pub relock: Duration,
    /// For taking them back, in all; the destination may hold them until it has noticed.
    pub locks: Duration,
    /// For a whole session, at the destination.
    pub session: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            answer: Duration::from_secs(30),
            prepare: Duration::from_secs(300),
            silence: Duration::from_secs(10),
            keepalive: Duration::from_secs(1),
            ask: Duration::from_millis(500),
            doubt: Duration::from_secs(60),
            relock: Duration::from_millis(5),
            locks: Duration::from_secs(15),
            session: Duration::from_secs(24 * 3600),
        }
    }
}

/// A cell of a machine's table: what an input means in a state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cell<S: 'static> {
    /// It is expected, and leads to one of these states.
    Go(&'static [S]),
    /// The migration has failed: what was done is undone.
    GiveUp,
    /// It is not known whether the destination has the VM: it is asked. The source only.
    Ask,
    /// Nothing happens.
    Ignore,
}

/// What a step gave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// It is done.
    Nothing,
    /// Bytes found dirty.
    Bytes(u64),
    /// Memory was sent.
    Sent {
        /// Bytes on the link.
        link: u64,
        /// Bytes of memory that they stand for: what Mark says of all connections together, so without zeros in the first pass.
        memory: u64,
    },
    /// The saved state.
    State(Vec<u8>),
}

impl Output {
    pub(crate) fn bytes(&self) -> u64 {
        if let Self::Bytes(bytes) = self { *bytes } else { 0 }
    }

    pub(crate) fn sent(&self) -> (u64, u64) {
        if let Self::Sent { link, memory } = self { (*link, *memory) } else { (0, 0) }
    }

    pub(crate) fn into_state(self) -> Vec<u8> {
        if let Self::State(state) = self { state } else { Vec::new() }
    }
}

/// The one piece of work that the driver has been given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Work<S, U> {
    Step(S),
    Undo(U),
}

/// What is left of the link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Link {
    /// Frames can be sent.
    Up,
    /// They would not arrive.
    Lost,
    /// Neither, and all is closed.
    Closed,
}

/// A machine's clock: it stands still between inputs.
#[derive(Debug, Clone)]
pub(crate) struct Timer {
    pub(crate) began: Duration,
    pub(crate) now: Duration,
    /// When the state has lasted too long, or something is tried again.
    pub(crate) due: Option<Duration>,
    /// When the peer was heard last.
    heard: Duration,
    /// When something was sent last.
    said: Duration,
}

impl Timer {
    pub(crate) fn new(now: Duration) -> Self {
        Self { began: now, now, due: None, heard: now, said: now }
    }

    /// Time does not go back.
    pub(crate) fn advance(&mut self, now: Duration) {
        self.now = self.now.max(now);
    }

    pub(crate) fn elapsed(&self) -> Duration {
        self.now.saturating_sub(self.began)
    }

    pub(crate) fn heard(&mut self) {
        self.heard = self.now;
    }

    pub(crate) fn said(&mut self) {
        self.said = self.now;
    }

    pub(crate) fn due_in(&mut self, time: Duration) {
        self.due = Some(self.now.saturating_add(time));
    }

    pub(crate) fn is_due(&self) -> bool {
        self.due.is_some_and(|due| due <= self.now)
    }

    pub(crate) fn is_silent(&self, limits: &Limits) -> bool {
        self.now >= self.heard.saturating_add(limits.silence)
    }

    pub(crate) fn must_speak(&self, limits: &Limits) -> bool {
        self.now >= self.said.saturating_add(limits.keepalive)
    }

    /// When a Tick next changes something on a link that is up, but for `due`.
    pub(crate) fn link_wake(&self, limits: &Limits) -> Duration {
        self.heard.saturating_add(limits.silence).min(self.said.saturating_add(limits.keepalive))
    }
}

/// How long a destination remembers outcomes.
pub const REMEMBERED: Duration = Duration::from_secs(600);

/// How many it remembers; the oldest are forgotten first.
const MOST: usize = 1024;

/// Outcomes of sessions, for sources that lost the link: what a receiver's address answers Query with.
#[derive(Debug, Default)]
pub struct Outcomes {
    /// Oldest first.
    known: VecDeque<(SessionId, SessionOutcome, Duration)>,
}

impl Outcomes {
    /// None yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Remembers how `session` ended. An outcome never changes: the first stays.
    pub fn remember(&mut self, now: Duration, session: SessionId, outcome: SessionOutcome) {
        self.forget_old(now);
        if self.answer(now, session) == SessionOutcome::Unknown {
            if self.known.len() >= MOST {
                self.known.pop_front();
            }
            self.known.push_back((session, outcome, now));
        }
    }

    /// How `session` ended.
    #[must_use]
    pub fn answer(&self, now: Duration, session: SessionId) -> SessionOutcome {
        let found = self.known.iter().find(|(known, ..)| *known == session);
        let fresh = found.filter(|(_, _, since)| now.saturating_sub(*since) < REMEMBERED);
        fresh.map_or(SessionOutcome::Unknown, |(_, outcome, _)| *outcome)
    }

    /// The source knows: no need to remember `session` any longer.
    pub fn settle(&mut self, session: SessionId) {
        self.known.retain(|(known, ..)| *known != session);
    }

    /// The sessions whose outcomes are remembered.
    pub fn sessions(&self) -> impl Iterator<Item = SessionId> {
        self.known.iter().map(|(session, ..)| *session)
    }

    fn forget_old(&mut self, now: Duration) {
        while self.known.front().is_some_and(|(_, _, since)| now.saturating_sub(*since) >= REMEMBERED) {
            self.known.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn session(number: u64) -> SessionId {
        let mut id = [0; 16];
        id[..8].copy_from_slice(&number.to_le_bytes());
        SessionId(id)
    }

    #[test]
    fn outcomes_do_not_change_and_are_forgotten() {
        let mut outcomes = Outcomes::new();
        let at = Duration::from_secs;
        outcomes.remember(at(1), session(1), SessionOutcome::Aborted);
        outcomes.remember(at(2), session(1), SessionOutcome::Committed);
        assert_eq!(outcomes.answer(at(3), session(1)), SessionOutcome::Aborted);
        assert_eq!(outcomes.answer(at(600), session(1)), SessionOutcome::Aborted);
        assert_eq!(outcomes.answer(at(601), session(1)), SessionOutcome::Unknown);
        outcomes.remember(at(700), session(2), SessionOutcome::Committed);
        assert_eq!(outcomes.known.len(), 1);
        outcomes.settle(session(2));
        assert_eq!(outcomes.answer(at(700), session(2)), SessionOutcome::Unknown);
    }

    #[test]
    fn the_number_of_outcomes_is_bounded() {
        let mut outcomes = Outcomes::new();
        for number in 0..2000 {
            outcomes.remember(Duration::ZERO, session(number), SessionOutcome::Aborted);
        }
        assert_eq!(outcomes.known.len(), MOST);
        assert_eq!(outcomes.answer(Duration::ZERO, session(1999)), SessionOutcome::Aborted);
        assert_eq!(outcomes.answer(Duration::ZERO, session(0)), SessionOutcome::Unknown);
    }
}
