//! What guests do to their machine, and what is then done: the event's cell in each phase, and the operator's choice.

use crate::phase::COUNT;
use crate::{Phase, Step};
use std::fmt;

/// What is to be done about a guest event in a phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventCell {
    /// React to it now, as [`Reactions`] say.
    React,
    /// Keep it, and react when the VM runs again.
    Defer,
    /// A late echo of a machine that is gone.
    Ignore,
}

/// What follows a guest event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reaction {
    /// It is told (log, events); the guest goes on.
    Report,
    /// The guest is paused, for somebody to look at.
    Pause,
    /// The machine is built anew and booted.
    Restart,
    /// The machine is switched off; the VMM stays, and with it the configuration.
    Stop,
    /// The VMM ends.
    Exit,
}

impl Reaction {
    /// Every reaction.
    pub const ALL: [Self; 5] = [Self::Report, Self::Pause, Self::Restart, Self::Stop, Self::Exit];

    /// Its word on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Report => "report",
            Self::Pause => "pause",
            Self::Restart => "restart",
            Self::Stop => "stop",
            Self::Exit => "exit",
        }
    }

    /// Where it leads a running VM.
    #[must_use]
    pub const fn step(self) -> Step {
        let (done, failed) = match self {
            Self::Report => (Phase::Running, Phase::Running),
            Self::Pause => (Phase::Paused, Phase::Running),
            Self::Restart => (Phase::Running, Phase::Shutdown),
            Self::Stop => (Phase::Shutdown, Phase::Shutdown),
            Self::Exit => (Phase::Empty, Phase::Empty),
        };
        Step { done, failed }
    }
}

impl fmt::Display for Reaction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A row of [`GUEST_EVENTS`].
#[derive(Clone, Copy, Debug)]
pub struct EventRow {
    /// The event.
    pub event: GuestEvent,
    /// Its name in documents and logs.
    pub name: &'static str,
    /// One cell per phase, in the order of [`Phase::ALL`].
    pub cells: [EventCell; COUNT],
    /// What an operator may choose; the first is the default.
    pub reactions: &'static [Reaction],
}

impl EventRow {
    /// The cell of `phase`.
    #[must_use]
    pub const fn cell(&self, phase: Phase) -> EventCell {
        *phase.of(&self.cells)
    }

    /// What happens unless the operator chose otherwise.
    #[must_use]
    pub const fn default_reaction(&self) -> Reaction {
        match self.reactions.first() {
            Some(reaction) => *reaction,
            None => Reaction::Report,
        }
    }
}

/// Every event has the same cells: an event that was on its way when the VM was paused waits for the resume, and one of
/// a guest that runs while it is saved or given away for the end of that.
const CELLS: [EventCell; COUNT] = [
    EventCell::Ignore, // Empty
    EventCell::Ignore, // Created
    EventCell::Ignore, // Booting
    EventCell::React,  // Running
    EventCell::Defer,  // Paused
    EventCell::Defer,  // Saving
    EventCell::Defer,  // Migrating
    EventCell::Ignore, // Receiving
    EventCell::Ignore, // Shutdown
];

/// Declares the events and their table in one go.
macro_rules! events {
    ($($(#[doc = $doc:literal])+ $event:ident $name:literal [$($reaction:ident),+];)+) => {
        /// What a guest may do to its machine.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum GuestEvent {
            $($(#[doc = $doc])+ $event,)+
        }

        impl GuestEvent {
            /// How many there are.
            pub const COUNT: usize = [$($name),+].len();

            /// The row of this event.
            #[must_use]
            pub const fn row(self) -> &'static EventRow {
                match self {
                    $(Self::$event => &EventRow {
                        event: Self::$event,
                        name: $name,
                        cells: CELLS,
                        reactions: &[$(Reaction::$reaction),+],
                    },)+
                }
            }
        }

        /// Every guest event: what happens in each phase, and the reactions to choose from.
        pub const GUEST_EVENTS: [EventRow; GuestEvent::COUNT] = [$(*GuestEvent::$event.row()),+];
    };
}

events! {
    /// The guest asked for a reset (ACPI reset register, keyboard controller).
    Reset "reset" [Restart, Stop, Exit];
    /// A vCPU took a triple fault. Hardware resets, and guests use it to reboot.
    TripleFault "triple-fault" [Restart, Stop, Exit];
    /// The guest switched itself off (ACPI S5).
    Shutdown "shutdown" [Exit, Stop];
    /// The guest's kernel says that it has panicked (pvpanic). What it does next is up to it.
    Panic "panic" [Report, Pause, Restart, Stop, Exit];
    /// A vCPU cannot go on: the hypervisor reported an internal error or a failed entry.
    Crash "crash" [Exit, Stop];
}

impl fmt::Display for GuestEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.row().name)
    }
}

/// What is to be done about `event` in `phase`?
#[must_use]
pub fn on_guest_event(phase: Phase, event: GuestEvent) -> EventCell {
    event.row().cell(phase)
}

/// What the operator wants to follow each guest event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reactions {
    /// After a reset or a triple fault.
    pub reboot: Reaction,
    /// After the guest switched itself off.
    pub shutdown: Reaction,
    /// After a panic.
    pub panic: Reaction,
    /// After a crash.
    pub crash: Reaction,
}

impl Default for Reactions {
    fn default() -> Self {
        Self {
            reboot: GuestEvent::Reset.row().default_reaction(),
            shutdown: GuestEvent::Shutdown.row().default_reaction(),
            panic: GuestEvent::Panic.row().default_reaction(),
            crash: GuestEvent::Crash.row().default_reaction(),
        }
    }
}

impl Reactions {
    /// What follows `event`.
    #[must_use]
    pub const fn to(&self, event: GuestEvent) -> Reaction {
        match event {
            GuestEvent::Reset | GuestEvent::TripleFault => self.reboot,
            GuestEvent::Shutdown => self.shutdown,
            GuestEvent::Panic => self.panic,
            GuestEvent::Crash => self.crash,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_among_the_choices_of_every_event() {
        for row in &GUEST_EVENTS {
            assert_eq!(Reactions::default().to(row.event), row.default_reaction(), "{}", row.name);
            assert_eq!(row.event.row().name, row.name);
        }
    }

    #[test]
    fn a_choice_is_looked_up_by_its_event() {
        let reactions = Reactions { panic: Reaction::Pause, ..Reactions::default() };
        assert_eq!(reactions.to(GuestEvent::Panic), Reaction::Pause);
        assert_eq!(reactions.to(GuestEvent::TripleFault), Reaction::Restart);
    }
}
