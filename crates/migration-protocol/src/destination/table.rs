//! States and inputs of a destination, and what each input means in each state.

use crate::Cell;

/// How far a destination is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DestinationState {
    /// Waits for Hello.
    Greeting,
    /// Accept is sent; waits for Config.
    Offered,
    /// Looks at the configuration.
    Checking,
    /// The configuration is fine; waits for Start.
    Willing,
    /// Builds the VM.
    Building,
    /// Memory arrives; waits for the end of the last pass, and for State.
    Receiving,
    /// Maps the memory whose descriptors came.
    Mapping,
    /// All memory is there; waits for State.
    Filled,
    /// State is there; waits for the end of the last pass.
    Draining,
    /// Restores the state.
    Restoring,
    /// Waits for Complete.
    Restored,
    /// Takes the disk locks.
    Locking,
    /// Ready is sent; waits for Commit.
    Ready,
    /// The VM is here; resumes it.
    Resuming,
    /// Has failed; waits for the end of the step under way.
    Stopping,
    /// Undoes what it did.
    Undoing,
    /// All is reported.
    Ended,
}

use DestinationState as S;

impl DestinationState {
    /// Every state.
    pub const ALL: [Self; 17] = [
        S::Greeting,
        S::Offered,
        S::Checking,
        S::Willing,
        S::Building,
        S::Receiving,
        S::Mapping,
        S::Filled,
        S::Draining,
        S::Restoring,
        S::Restored,
        S::Locking,
        S::Ready,
        S::Resuming,
        S::Stopping,
        S::Undoing,
        S::Ended,
    ];

    /// Whether Commit has not been taken and nothing has failed yet.
    #[must_use]
    pub const fn is_before_commit(self) -> bool {
        !matches!(self, S::Resuming | S::Stopping | S::Undoing | S::Ended)
    }

    /// Whether a step of the driver's is under way all the time.
    #[must_use]
    pub const fn is_step(self) -> bool {
        matches!(self, S::Checking | S::Building | S::Mapping | S::Restoring | S::Locking | S::Resuming)
    }

    /// Whether frames about memory may come.
    #[must_use]
    pub const fn takes_memory(self) -> bool {
        matches!(self, S::Receiving | S::Draining)
    }

    /// What `kind` means in this state.
    #[must_use]
    pub const fn cell(self, kind: DestinationKind) -> Cell<Self> {
        if let Some(to) = self.expected(kind) {
            return Cell::Go(to);
        }
        if !self.is_before_commit() {
            return Cell::Ignore;
        }
        match kind {
            K::Keepalive | K::Done | K::Tick => Cell::Ignore,
            K::Failed if !self.is_step() && !self.takes_memory() => Cell::Ignore,
            _ => Cell::GiveUp,
        }
    }

    /// Where an input leads that is part of the way.
    const fn expected(self, kind: DestinationKind) -> Option<&'static [Self]> {
        Some(match (self, kind) {
            (S::Greeting, K::Hello) => &[S::Offered, S::Ended],
            (S::Offered, K::Config) => &[S::Checking],
            (S::Checking, K::Done) => &[S::Willing, S::Ended],
            (S::Willing, K::Start) => &[S::Building],
            (S::Building, K::Done) => &[S::Receiving],
            (S::Receiving, K::Landed | K::Damaged) => &[S::Receiving],
            (S::Receiving, K::LandedLast) => &[S::Filled, S::Undoing],
            (S::Receiving, K::Descriptors) => &[S::Mapping],
            (S::Receiving, K::State) => &[S::Draining],
            (S::Mapping, K::Done) => &[S::Filled],
            (S::Filled, K::State) => &[S::Restoring],
            (S::Draining, K::LandedLast) => &[S::Restoring, S::Undoing],
            (S::Draining, K::Complete) => &[S::Draining],
            (S::Restoring, K::Complete) => &[S::Restoring],
            (S::Restoring, K::Done) => &[S::Restored, S::Locking],
            (S::Restored, K::Complete) => &[S::Locking],
            (S::Locking, K::Done) => &[S::Ready],
            (S::Ready, K::Commit) => &[S::Resuming, S::Ended],
            (S::Resuming, K::Done | K::Failed) => &[S::Ended],
            (S::Resuming, K::Settled) => &[S::Resuming],
            (S::Stopping, K::Done | K::Failed) => &[S::Undoing, S::Ended],
            (S::Stopping, K::Lost) => &[S::Stopping],
            (S::Undoing, K::Done | K::Failed) => &[S::Undoing, S::Ended],
            (S::Undoing, K::Lost) => &[S::Undoing],
            (S::Ended, K::Settled) => &[S::Ended],
            _ => return None,
        })
    }
}

/// What an input is to a destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DestinationKind {
    /// Hello.
    Hello,
    /// Config.
    Config,
    /// Start.
    Start,
    /// Descriptors, where memory goes that way.
    Descriptors,
    /// State, where memory does not go by descriptors that have not come.
    State,
    /// Complete, for the first time.
    Complete,
    /// Commit, of this session.
    Commit,
    /// Abandon.
    Abandon,
    /// Ack of Committed.
    Settled,
    /// Keepalive.
    Keepalive,
    /// A frame that cannot be right in any state, or not in this one, or whose payload is broken.
    Stray,
    /// Bytes that are no frame, or memory that no peer may send.
    Garbage,
    /// The link is lost, or has been silent for too long.
    Lost,
    /// A pass that is not the last has landed on all connections.
    Landed,
    /// The last pass has landed on all connections.
    LandedLast,
    /// Contents arrived damaged.
    Damaged,
    /// The driver has done what it was given.
    Done,
    /// The driver could not, and has left nothing of it; or memory could not land.
    Failed,
    /// Somebody asks for the outcome of this session.
    Query,
    /// This side's operator wants it to end.
    Cancel,
    /// A frame has not come in time.
    Late,
    /// Time passes.
    Tick,
}

use DestinationKind as K;

impl DestinationKind {
    /// Every kind.
    pub const ALL: [Self; 22] = [
        K::Hello,
        K::Config,
        K::Start,
        K::Descriptors,
        K::State,
        K::Complete,
        K::Commit,
        K::Abandon,
        K::Settled,
        K::Keepalive,
        K::Stray,
        K::Garbage,
        K::Lost,
        K::Landed,
        K::LandedLast,
        K::Damaged,
        K::Done,
        K::Failed,
        K::Query,
        K::Cancel,
        K::Late,
        K::Tick,
    ];
}
