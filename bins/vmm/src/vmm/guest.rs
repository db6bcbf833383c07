//! What guests do to their machine, and what then happens.

use vmm_state::{EventCell, GuestEvent, Phase, Reaction, on_guest_event};

use super::{Vmm, VmmError, told};
use crate::exit::{ExitCode, chain};
use crate::machine::Machine;

impl Vmm {
    /// The guest of the machine that is there did something.
    pub(super) fn guest_did(&mut self, event: GuestEvent) {
        let cell = on_guest_event(self.slot.phase(), event);
        if cell == EventCell::Ignore {
            return;
        }
        if let Some(configured) = self.slot.config_mut() {
            configured.last_event = Some(event);
        }
        match self.slot.phase() {
            Phase::Saving => self.ends_save(event),
            Phase::Migrating => self.ends_send(event),
            _ => {}
        }
        match cell {
            EventCell::Defer if !self.deferred.contains(&event) => self.deferred.push(event),
            EventCell::React => self.react(event),
            EventCell::Defer | EventCell::Ignore => {}
        }
    }

    /// Reacts to what the guest did before it was paused, as long as its machine lives.
    pub(super) fn catch_up(&mut self) {
        let machine = self.slot.machine().map(Machine::number);
        for event in std::mem::take(&mut self.deferred) {
            if self.slot.machine().map(Machine::number) == machine {
                self.guest_did(event);
            }
        }
    }

    fn react(&mut self, event: GuestEvent) {
        let reaction = self.policy.reactions.to(event);
        log::info!("guest {event}: {reaction}");
        let ends = !matches!(reaction, Reaction::Report | Reaction::Pause);
        if event == GuestEvent::Panic && ends {
            self.note(&told::ended_by_panic());
        }
        match reaction {
            Reaction::Report => {}
            Reaction::Pause => {
                if let Err(error) = self.pause() {
                    log::error!("the guest cannot be paused: {}", chain(&error));
                }
            }
            Reaction::Restart => self.restart(),
            Reaction::Stop => self.stop(),
            Reaction::Exit => self.end(exit_code(event)),
        }
    }

    /// A guest's own reset failed to bring a machine back.
    pub(super) fn lost(&mut self, error: &VmmError) {
        log::error!("the VM does not come back: {}", chain(error));
        if !self.policy.serves_clients {
            self.end(ExitCode::VmmError);
        }
    }
}

/// How the process ends by `event`.
const fn exit_code(event: GuestEvent) -> ExitCode {
    match event {
        GuestEvent::Reset | GuestEvent::TripleFault | GuestEvent::Shutdown => ExitCode::Success,
        GuestEvent::Panic | GuestEvent::Crash => ExitCode::GuestCrashed,
    }
}
