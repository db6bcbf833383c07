//! The end that runs a guest before all of its memory is there: [`Filler`].

use std::collections::VecDeque;
use std::time::Duration;

use crate::machine::Timer;
use crate::{
    Cell, Command, End, Failure, Fault, Frame, Limits, Message, Output, Progress, Reason, SessionId,
};

/// How far a filler is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FillerState {
    /// The guest goes on; memory arrives.
    Filling,
    /// The link is lost; holds the guest.
    Holding,
    /// The guest is held; waits for Rejoin.
    Severed,
    /// Says what is absent on the new connection.
    Answering,
    /// Lets the guest go on.
    Releasing,
    /// All is there, and Whole is sent; waits until the source knows.
    Settling,
    /// All is reported.
    Ended,
}

use FillerState as S;

impl FillerState {
    /// Every state.
    pub const ALL: [Self; 7] =
        [S::Filling, S::Holding, S::Severed, S::Answering, S::Releasing, S::Settling, S::Ended];

    /// Whether a step of the driver's is under way all the time.
    #[must_use]
    pub const fn is_step(self) -> bool {
        matches!(self, S::Holding | S::Answering | S::Releasing)
    }

    /// What `kind` means in this state.
    #[must_use]
    pub const fn cell(self, kind: FillerKind) -> Cell<Self> {
        const NEXT: &[S] =
            &[S::Filling, S::Holding, S::Severed, S::Answering, S::Releasing, S::Settling, S::Ended];
        Cell::Go(match (self, kind) {
            (S::Filling, K::Filled) => &[S::Settling],
            (S::Filling, K::Rejoin | K::Stray | K::Garbage | K::Lost | K::Failed) => &[S::Holding],
            (S::Holding, K::Done | K::Failed) => &[S::Severed, S::Answering, S::Releasing],
            (S::Severed, K::Rejoin) => &[S::Answering],
            (S::Severed, K::Filled) => &[S::Releasing],
            (S::Severed, K::Lost | K::Stray | K::Garbage) => &[S::Severed],
            (S::Severed, K::Cancel) => &[S::Ended],
            (S::Answering, K::Done | K::Failed) => &[S::Releasing, S::Answering, S::Severed],
            (S::Releasing, K::Done | K::Failed) => NEXT,
            (
                S::Holding | S::Answering | S::Releasing,
                K::Rejoin | K::Stray | K::Garbage | K::Lost | K::Filled,
            ) => &[S::Holding, S::Answering, S::Releasing],
            (S::Settling, K::Rejoin) => &[S::Settling],
            (S::Settling, K::Settled | K::Stray | K::Garbage | K::Lost | K::Late) => &[S::Ended],
            (S::Ended, K::Rejoin) => &[S::Ended],
            _ => return Cell::Ignore,
        })
    }
}

/// What an input is to a filler.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FillerKind {
    /// A new connection has said Rejoin.
    Rejoin,
    /// Ack of Whole.
    Settled,
    /// Keepalive.
    Keepalive,
    /// A frame that cannot be right.
    Stray,
    /// Bytes that are no frame, or memory that no peer may send.
    Garbage,
    /// The link is lost, or has been silent for too long.
    Lost,
    /// All of memory is there.
    Filled,
    /// The driver has done what it was given.
    Done,
    /// The driver could not, or memory could not land.
    Failed,
    /// The operator gives the guest up.
    Cancel,
    /// An answer has not come in time.
    Late,
    /// Time passes.
    Tick,
}

use FillerKind as K;

impl FillerKind {
    /// Every kind.
    pub const ALL: [Self; 12] = [
        K::Rejoin,
        K::Settled,
        K::Keepalive,
        K::Stray,
        K::Garbage,
        K::Lost,
        K::Filled,
        K::Done,
        K::Failed,
        K::Cancel,
        K::Late,
        K::Tick,
    ];
}

/// What happens to a filler.
#[derive(Debug, Clone)]
pub enum FillerInput {
    /// A frame on connection 0 that is not about memory.
    Frame(Frame),
    /// A new connection has said Rejoin for this session. What comes on those before it is not told any more.
    Rejoin,
    /// Bytes from the peer that are no frame, or memory that it must not send, on any connection.
    Garbage(String),
    /// A connection is gone, and how.
    Lost(String),
    /// No range is absent any more.
    Filled,
    /// The step under way is done.
    Done(Output),
    /// It could not be done; or memory could not land.
    Failed(Fault),
    /// The operator gives the guest up, which is possible while it is held only.
    Cancel(String),
    /// Time passes.
    Tick,
}

/// Something that the driver does, and answers with Done or Failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FillerStep {
    /// Let the guest not run, whatever its operator wants, until Release. A vCPU that waits for an absent page need not be
    /// waited for: it cannot go on.
    Hold,
    /// On the newest connection that said Rejoin send Lacks for every range that is absent.
    Answer,
    /// Let the guest go on, if its operator wants it to.
    Release,
}

/// What is told of a filler.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FillerOutcome {
    /// All of memory is there. The end.
    Complete {
        /// Why the guest could not go on after it was held.
        trouble: Option<Fault>,
    },
    /// The link is lost, and the guest is held. Not the end.
    Severed(Failure),
    /// The guest goes on. Not the end.
    Restored,
    /// The operator has given the guest up. The end: nobody can run it any more.
    Abandoned(Failure),
}

/// What the driver is to do, in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FillerAction {
    /// Send it on connection 0, which is the newest that has said Rejoin.
    Send(Frame),
    /// Do it, then answer with one Done or Failed.
    Run(FillerStep),
    /// Close all connections but one that has said Rejoin since, after everything that was to be sent.
    Close,
    /// Tell.
    Report(FillerOutcome),
}

/// What there is of a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Up,
    Down,
    /// A connection has said Rejoin.
    Offered,
    /// And is being told what is absent.
    Answered,
}

/// The end that runs a guest whose memory is not all there, as a machine: inputs in, actions out.
#[derive(Debug, Clone)]
pub struct Filler {
    session: SessionId,
    limits: Limits,
    state: FillerState,
    timer: Timer,
    way: Way,
    /// The guest does not run.
    held: bool,
    filled: bool,
    /// Why the link was lost last.
    failure: Option<Failure>,
    trouble: Option<Fault>,
    actions: VecDeque<FillerAction>,
}

impl Filler {
    /// After Commit of `session` was taken, and the guest was let go; over the connections of the migration if `link`.
    #[must_use]
    pub fn new(now: Duration, session: SessionId, limits: Limits, link: bool) -> Self {
        let mut filler = Self {
            session,
            limits,
            state: FillerState::Filling,
            timer: Timer::new(now),
            way: Way::Up,
            held: false,
            filled: false,
            failure: None,
            trouble: None,
            actions: VecDeque::new(),
        };
        if !link {
            filler.cut(Failure::new(End::Link, Reason::Lost, "during the hand-over"));
            filler.next();
        }
        filler
    }

    /// Takes one input that happened at `now`, on a clock that never goes back, and says what it was.
    pub fn handle(&mut self, now: Duration, input: FillerInput) -> FillerKind {
        self.timer.advance(now);
        let (kind, why) = self.read(input);
        if matches!(self.state.cell(kind), Cell::Go(_)) {
            self.go(kind, why);
        }
        if self.is_live() && self.timer.must_speak(&self.limits) {
            self.say(Message::Keepalive(Progress::default()));
        }
        kind
    }

    /// Something of memory has come: as [`Destination::note_heard`](crate::Destination::note_heard).
    pub fn note_heard(&mut self, now: Duration) {
        self.timer.advance(now);
        self.timer.heard();
    }

    /// The next action, if there is one. Take all of them after every input.
    pub fn poll(&mut self) -> Option<FillerAction> {
        self.actions.pop_front()
    }

    /// When a Tick changes something, if nothing else happens before.
    #[must_use]
    pub fn next_wake(&self) -> Option<Duration> {
        let link = self.is_live().then(|| self.timer.link_wake(&self.limits));
        [self.timer.due, link].into_iter().flatten().min()
    }

    /// Where it is.
    #[must_use]
    pub fn state(&self) -> FillerState {
        self.state
    }

    fn go(&mut self, kind: FillerKind, why: Option<Failure>) {
        match kind {
            K::Rejoin => self.offered(),
            K::Filled => self.filled = true,
            K::Cancel => return self.abandon(why),
            K::Settled | K::Late => return self.complete(),
            K::Done | K::Failed if self.state.is_step() => self.step_over(kind == K::Done, why),
            _ => self.cut(why.unwrap_or_else(|| Failure::new(End::Link, Reason::Lost, ""))),
        }
        match self.state {
            S::Settling if self.way == Way::Down => self.complete(),
            S::Settling | S::Ended => {}
            // What has happened counts when the step is over.
            state if state.is_step() && !matches!(kind, K::Done | K::Failed) => {}
            _ => self.next(),
        }
    }

    /// What follows from how things are, while no step is under way.
    fn next(&mut self) {
        if self.filled {
            return match (self.held, self.way) {
                (true, _) => self.run(FillerState::Releasing, FillerStep::Release),
                (false, Way::Down) => self.complete(),
                (false, _) => {
                    self.way = Way::Up;
                    self.whole();
                    self.state = FillerState::Settling;
                    self.timer.due_in(self.limits.answer);
                }
            };
        }
        match (self.way, self.held) {
            (Way::Down, true) => self.state = FillerState::Severed,
            (Way::Up | Way::Answered, false) => self.state = FillerState::Filling,
            (Way::Down | Way::Offered, false) => self.run(FillerState::Holding, FillerStep::Hold),
            (Way::Offered, true) => {
                self.way = Way::Answered;
                self.run(FillerState::Answering, FillerStep::Answer);
            }
            (Way::Up | Way::Answered, true) => self.run(FillerState::Releasing, FillerStep::Release),
        }
    }

    fn step_over(&mut self, done: bool, why: Option<Failure>) {
        match self.state {
            S::Holding => {
                // One that cannot be stopped waits at the first absent page.
                self.held = true;
                let failure = self.failure();
                self.actions.push_back(FillerAction::Report(FillerOutcome::Severed(failure)));
            }
            S::Answering if self.way == Way::Answered && done => {
                self.way = Way::Up;
                self.timer.heard();
                self.say(Message::Ack(Command::Rejoin));
            }
            S::Answering if self.way == Way::Answered => {
                self.cut(why.unwrap_or_else(|| Failure::new(End::Here, Reason::Failed, "")));
            }
            S::Releasing => {
                self.held = false;
                match why {
                    Some(failure) if !done => self.trouble = Some(failure.fault),
                    _ => self.actions.push_back(FillerAction::Report(FillerOutcome::Restored)),
                }
            }
            _ => {}
        }
    }

    /// A connection takes the place of those before it.
    fn offered(&mut self) {
        match self.state {
            // It only wants to know.
            S::Settling => {
                self.close();
                self.way = Way::Up;
                self.whole();
            }
            S::Ended => {
                if self.filled {
                    self.whole();
                } else {
                    let fault = Fault::new(Reason::Cancelled, "the guest was given up");
                    self.say(Message::Nack(Command::Rejoin, fault));
                }
                self.actions.push_back(FillerAction::Close);
            }
            _ => {
                let before =
                    || Failure::new(End::Link, Reason::Lost, "the source came on another connection");
                self.failure.get_or_insert_with(before);
                self.close();
                self.way = Way::Offered;
            }
        }
    }

    fn abandon(&mut self, why: Option<Failure>) {
        let failure = why.unwrap_or_else(|| self.failure());
        self.end(FillerOutcome::Abandoned(failure));
    }

    fn complete(&mut self) {
        self.close();
        let trouble = self.trouble.take();
        self.end(FillerOutcome::Complete { trouble });
    }

    fn whole(&mut self) {
        self.timer.heard();
        self.say(Message::Whole(self.session));
    }

    /// The link is of no use any more.
    fn cut(&mut self, failure: Failure) {
        self.failure = Some(failure);
        self.close();
        self.way = Way::Down;
    }

    fn close(&mut self) {
        if self.way != Way::Down {
            self.actions.push_back(FillerAction::Close);
        }
    }

    fn run(&mut self, state: FillerState, step: FillerStep) {
        self.timer.due = None;
        self.state = state;
        self.actions.push_back(FillerAction::Run(step));
    }

    fn end(&mut self, outcome: FillerOutcome) {
        self.timer.due = None;
        self.way = Way::Down;
        self.state = FillerState::Ended;
        self.actions.push_back(FillerAction::Report(outcome));
    }

    fn say(&mut self, message: Message) {
        if let Ok(frame) = message.encode() {
            self.timer.said();
            self.actions.push_back(FillerAction::Send(frame));
        }
    }

    /// Whether the link matters.
    fn is_live(&self) -> bool {
        self.way == Way::Up && self.state != S::Ended
    }

    fn failure(&self) -> Failure {
        self.failure.clone().unwrap_or_else(|| Failure::new(End::Link, Reason::Lost, ""))
    }

    /// What an input is, and why it is of no good.
    fn read(&mut self, input: FillerInput) -> (FillerKind, Option<Failure>) {
        let lost = |text: &str| (K::Lost, Some(Failure::new(End::Link, Reason::Lost, text)));
        match input {
            FillerInput::Frame(frame) => {
                self.timer.heard();
                self.read_frame(frame)
            }
            FillerInput::Rejoin => (K::Rejoin, None),
            FillerInput::Garbage(text) => {
                (K::Garbage, Some(Failure::new(End::Link, Reason::Violation, &text)))
            }
            FillerInput::Lost(text) => lost(&text),
            FillerInput::Filled => (K::Filled, None),
            FillerInput::Done(_) => (K::Done, None),
            FillerInput::Failed(fault) => (K::Failed, Some(Failure { end: End::Here, fault })),
            FillerInput::Cancel(text) => (K::Cancel, Some(Failure::new(End::Here, Reason::Cancelled, &text))),
            FillerInput::Tick if self.is_live() && self.timer.is_silent(&self.limits) => {
                lost("nothing was heard")
            }
            FillerInput::Tick if self.timer.is_due() => (K::Late, None),
            FillerInput::Tick => (K::Tick, None),
        }
    }

    fn read_frame(&self, frame: Frame) -> (FillerKind, Option<Failure>) {
        let stray = |text: &str| (K::Stray, Some(Failure::new(End::Peer, Reason::Violation, text)));
        match Message::decode(frame) {
            Ok(Message::Ack(Command::Whole)) => (K::Settled, None),
            Ok(Message::Keepalive(_) | Message::Ack(_)) => (K::Keepalive, None),
            Ok(other) => stray(&format!("{} frame while {:?}", other.command(), self.state)),
            Err(error) => stray(&error.to_string()),
        }
    }
}
