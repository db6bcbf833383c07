//! Who waits for the end of a VM that is given away.

use vmm_api::command::Replier;
use vmm_api::error::{ApiError, Code};
use vmm_state::Phase;

use super::saving;

/// Clients that are told of the end.
#[derive(Debug, Default)]
pub(super) struct Clients {
    /// Who asked for it; `None` where that one has been answered.
    pub(super) asker: Option<Replier<()>>,
    pub(super) cancels: Vec<Replier<()>>,
    /// Who decided where the VM is, and how.
    pub(super) deciders: Vec<(Verdict, Replier<()>)>,
}

/// An operator's word on where a VM is that is in doubt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    Here,
    Elsewhere,
}

impl Verdict {
    /// For the log.
    pub(super) const fn place(self) -> &'static str {
        match self {
            Self::Here => "here",
            Self::Elsewhere => "at the destination",
        }
    }
}

impl Clients {
    /// The VM is elsewhere, or would be taken there.
    pub(super) fn sent(self, phase: Phase) {
        self.cancels.into_iter().for_each(|cancel| cancel.reply(Err(saving::too_late(phase))));
        for (verdict, decider) in self.deciders {
            let elsewhere =
                || ApiError::new(Code::MigrationFailed, "the destination says that it has the VM");
            decider.reply(if verdict == Verdict::Elsewhere { Ok(()) } else { Err(elsewhere()) });
        }
        self.asker.into_iter().for_each(|asker| asker.reply(Ok(())));
    }

    /// The VM is here, and runs on if it ran; where it does not, `stuck`.
    pub(super) fn stays(self, error: &ApiError, stuck: bool) {
        self.cancels.into_iter().for_each(|cancel| cancel.reply(Ok(())));
        for (verdict, decider) in self.deciders {
            let kept = verdict == Verdict::Here && !stuck;
            decider.reply(if kept { Ok(()) } else { Err(error.clone()) });
        }
        self.asker.into_iter().for_each(|asker| asker.reply(Err(error.clone())));
    }

    /// It is in doubt where the VM is. That is no end, but all that there is to say.
    pub(super) fn doubt(&mut self, error: &ApiError) {
        let deciders = self.deciders.drain(..).map(|(_, decider)| decider);
        for waiting in self.cancels.drain(..).chain(deciders).chain(self.asker.take()) {
            waiting.reply(Err(error.clone()));
        }
    }

    /// The VM is elsewhere, and some of its memory is here: that cannot be cancelled. Who said that it is elsewhere is right.
    pub(super) fn elsewhere(&mut self, error: &ApiError) {
        self.cancels.drain(..).for_each(|cancel| cancel.reply(Err(error.clone())));
        for (verdict, decider) in self.deciders.drain(..) {
            decider.reply(if verdict == Verdict::Elsewhere { Ok(()) } else { Err(error.clone()) });
        }
    }

    /// The destination was found again, and takes memory that is here: who had it looked for is right, who gave it up is not.
    pub(super) fn restored(&mut self) {
        self.cancels.drain(..).for_each(|cancel| cancel.reply(Ok(())));
        let found = || ApiError::new(Code::MigrationFailed, "the destination is there, and takes the memory");
        self.deciders.drain(..).for_each(|(_, decider)| decider.reply(Err(found())));
    }

    /// The VM is elsewhere, and lost. Who said that nothing is needed here is right.
    pub(super) fn lost(self, error: &ApiError) {
        self.deciders.into_iter().for_each(|(_, decider)| decider.reply(Ok(())));
        self.cancels.into_iter().chain(self.asker).for_each(|waiting| waiting.reply(Err(error.clone())));
    }

    /// The VM is removed.
    pub(super) fn gone(self) {
        let gone = || ApiError::new(Code::Cancelled, "the VM was removed while it was given away");
        self.cancels.into_iter().for_each(|cancel| cancel.reply(Ok(())));
        let deciders = self.deciders.into_iter().map(|(_, decider)| decider);
        deciders.chain(self.asker).for_each(|waiting| waiting.reply(Err(gone())));
    }
}
