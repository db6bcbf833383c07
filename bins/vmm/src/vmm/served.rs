//! What the control thread and the API thread share. What `vm.info` answers is posted, so that nobody who asks waits
//! for the control thread.

use std::sync::Arc;

use vmm_api::commands::vm;
use vmm_api::config::VmConfig;
use vmm_api::http::{Board, Counts};
use vmm_state::{GuestEvent, Phase};

use super::Vmm;

/// Shared with the API thread, where there is one.
#[derive(Debug, Default)]
pub(super) struct Served {
    /// Counts of the API's answers.
    pub(super) answers: Option<Arc<Counts>>,
    /// Held by each thread that looks at a configuration.
    pub(super) validating: Arc<()>,
    board: Option<Board<vm::Info>>,
    /// What the answer on the board was made of.
    of: Option<Of>,
}

/// What an answer changes with.
#[derive(Debug)]
struct Of {
    phase: Phase,
    /// As clients of the contract see it.
    shown: Phase,
    config: Arc<VmConfig>,
    /// Ptys have their paths since a boot.
    boots: u64,
    machine: u64,
    last_event: Option<GuestEvent>,
}

impl Of {
    fn is(&self, other: &Self) -> bool {
        let Self { phase, shown, config, boots, machine, last_event } = other;
        (self.phase, self.shown) == (*phase, *shown)
            && Arc::ptr_eq(&self.config, config)
            && (self.boots, self.machine, self.last_event) == (*boots, *machine, *last_event)
    }
}

impl Vmm {
    /// The API thread counts its answers there, of which metrics tell, and answers `vm.info` from `board`.
    pub fn serve(&mut self, answers: Arc<Counts>, board: Board<vm::Info>) {
        (self.served.answers, self.served.board) = (Some(answers), Some(board));
    }

    /// Posts what `vm.info` says now, if that has changed.
    pub(super) fn post_info(&mut self) {
        let Some(board) = &self.served.board else { return };
        let of = self.slot.config().map(|configured| Of {
            phase: self.slot.phase(),
            shown: self.slot.shown(),
            config: Arc::clone(&configured.wire),
            boots: configured.boots,
            machine: self.boot.machines,
            last_event: configured.last_event,
        });
        let same = match (&self.served.of, &of) {
            (Some(posted), Some(now)) => posted.is(now),
            (None, None) => true,
            _ => false,
        };
        if !same {
            board.post(self.info().ok());
            self.served.of = of;
        }
    }
}
