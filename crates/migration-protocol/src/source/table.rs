//! States and inputs of a source, and what each input means in each state.

use crate::Cell;

/// How far a source is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SourceState {
    /// Hello is sent; waits for Accept.
    Greeting,
    /// Config is sent; waits for its answer.
    Offering,
    /// Start is sent; waits until the destination has built the VM.
    Starting,
    /// Opens the further connections.
    Joining,
    /// Descriptors of the memory are sent; waits until they are mapped.
    Sharing,
    /// Switches the dirty log on.
    Logging,
    /// Sends memory while the guest runs.
    Copying,
    /// The pass is sent; waits until it has landed.
    Landing,
    /// Takes what the guest wrote meanwhile.
    Measuring,
    /// Slows the vCPUs down.
    Throttling,
    /// Pauses the guest.
    Pausing,
    /// Takes what the guest wrote last.
    Collecting,
    /// Sends the last of the memory.
    Finishing,
    /// Saves the state.
    Saving,
    /// State is sent; releases the disk locks.
    Releasing,
    /// Complete is sent; waits for Ready.
    Completing,
    /// Marks the VM given away.
    Yielding,
    /// Commit is sent; waits for Committed.
    Committing,
    /// Asks how the session ended.
    Asking,
    /// Nobody answers: the operator decides, or lets it ask again.
    InDoubt,
    /// Has failed; waits for the end of the step under way.
    Stopping,
    /// Undoes what it did.
    Undoing,
    /// All is reported.
    Ended,
}

use SourceState as S;

impl SourceState {
    /// Every state.
    pub const ALL: [Self; 23] = [
        S::Greeting,
        S::Offering,
        S::Starting,
        S::Joining,
        S::Sharing,
        S::Logging,
        S::Copying,
        S::Landing,
        S::Measuring,
        S::Throttling,
        S::Pausing,
        S::Collecting,
        S::Finishing,
        S::Saving,
        S::Releasing,
        S::Completing,
        S::Yielding,
        S::Committing,
        S::Asking,
        S::InDoubt,
        S::Stopping,
        S::Undoing,
        S::Ended,
    ];

    /// Whether Commit has not been sent and nothing has failed yet: the source can still give up by itself.
    #[must_use]
    pub const fn is_before_commit(self) -> bool {
        !matches!(self, S::Committing | S::Asking | S::InDoubt | S::Stopping | S::Undoing | S::Ended)
    }

    /// Whether a step of the driver's is under way all the time.
    #[must_use]
    pub const fn is_step(self) -> bool {
        matches!(
            self,
            S::Joining
                | S::Logging
                | S::Copying
                | S::Measuring
                | S::Throttling
                | S::Pausing
                | S::Collecting
                | S::Finishing
                | S::Saving
                | S::Releasing
                | S::Yielding
        )
    }

    /// What `kind` means in this state.
    #[must_use]
    pub const fn cell(self, kind: SourceKind) -> Cell<Self> {
        if let Some(to) = self.expected(kind) {
            return Cell::Go(to);
        }
        match self {
            S::Committing => match kind {
                K::Keepalive | K::Done | K::Failed | K::Cancel | K::Timeout => Cell::Ignore,
                K::Ask | K::Keep | K::Yield | K::Tick => Cell::Ignore,
                _ => Cell::Ask,
            },
            _ if !self.is_before_commit() => Cell::Ignore,
            _ => match kind {
                K::Keepalive | K::Done | K::Ask | K::Keep | K::Yield | K::Tick => Cell::Ignore,
                K::Failed if !self.is_step() => Cell::Ignore,
                _ => Cell::GiveUp,
            },
        }
    }

    /// Where an input leads that is part of the way.
    const fn expected(self, kind: SourceKind) -> Option<&'static [Self]> {
        Some(match (self, kind) {
            (S::Greeting, K::Accept) => &[S::Offering],
            (S::Offering, K::Ack) => &[S::Starting, S::Ended],
            (S::Starting, K::Ack) => &[S::Joining, S::Sharing, S::Logging, S::Finishing],
            (S::Joining, K::Done) => &[S::Logging, S::Finishing],
            (S::Sharing, K::Ack) => &[S::Pausing, S::Saving],
            (S::Logging, K::Done) => &[S::Copying],
            (S::Copying, K::Done) => &[S::Landing, S::Measuring],
            (S::Copying, K::Landed | K::Again) => &[S::Copying],
            (S::Landing, K::Landed) => &[S::Measuring],
            (S::Landing, K::Again) => &[S::Landing],
            (S::Measuring, K::Done) => &[S::Copying, S::Throttling, S::Pausing, S::Undoing],
            (S::Throttling, K::Done) => &[S::Copying],
            (S::Pausing, K::Done) => &[S::Collecting, S::Saving],
            (S::Collecting, K::Done) => &[S::Finishing],
            (S::Finishing, K::Done) => &[S::Saving],
            (S::Saving, K::Done) => &[S::Releasing, S::Undoing, S::Ended],
            (S::Releasing, K::Done) => &[S::Completing],
            (S::Completing, K::Ready) => &[S::Yielding],
            (S::Yielding, K::Done) => &[S::Committing],
            (S::Committing, K::Committed) => &[S::Ended],
            (S::Asking, K::Outcome) => &[S::Ended, S::Undoing, S::InDoubt],
            (S::Asking, K::Done | K::Failed) => &[S::Asking, S::InDoubt],
            (S::Asking, K::Late) => &[S::Asking],
            (S::InDoubt, K::Ask) => &[S::Asking],
            (S::InDoubt, K::Keep) => &[S::Undoing],
            (S::InDoubt, K::Yield) => &[S::Ended],
            (S::Stopping, K::Done | K::Failed) => &[S::Undoing, S::Ended],
            (S::Stopping, K::Lost) => &[S::Stopping],
            (S::Undoing, K::Done | K::Failed) => &[S::Undoing, S::Ended],
            (S::Undoing, K::Late) => &[S::Undoing],
            _ => return None,
        })
    }
}

/// What an input is to a source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SourceKind {
    /// Accept that fits the Hello.
    Accept,
    /// Ack of what was sent last.
    Ack,
    /// Nack.
    Nack,
    /// Landed, of the pass that goes on, for the first time.
    Landed,
    /// Again.
    Again,
    /// Ready, of this session.
    Ready,
    /// Committed, of this session.
    Committed,
    /// Outcome, of this session.
    Outcome,
    /// Cancel, from the destination.
    Cancelled,
    /// Keepalive.
    Keepalive,
    /// A frame that cannot be right in any state, or not in this one, or whose payload is broken.
    Stray,
    /// Bytes that are no frame.
    Garbage,
    /// The link is lost, or has been silent for too long.
    Lost,
    /// The driver has done what it was given.
    Done,
    /// The driver could not, and has left nothing of it.
    Failed,
    /// This side's operator wants it to end.
    Cancel,
    /// An answer has not come in time, or it is time to try again.
    Late,
    /// All has taken too long, and the strategy is to cancel.
    Timeout,
    /// The operator wants it to ask again.
    Ask,
    /// The operator says that the VM is the source's.
    Keep,
    /// The operator says that the VM is the destination's.
    Yield,
    /// Time passes.
    Tick,
}

use SourceKind as K;

impl SourceKind {
    /// Every kind.
    pub const ALL: [Self; 22] = [
        K::Accept,
        K::Ack,
        K::Nack,
        K::Landed,
        K::Again,
        K::Ready,
        K::Committed,
        K::Outcome,
        K::Cancelled,
        K::Keepalive,
        K::Stray,
        K::Garbage,
        K::Lost,
        K::Done,
        K::Failed,
        K::Cancel,
        K::Late,
        K::Timeout,
        K::Ask,
        K::Keep,
        K::Yield,
        K::Tick,
    ];
}
