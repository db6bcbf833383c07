//! The transition table and the two questions it answers.

use crate::{Phase, PhaseSet};
use std::fmt;

/// What a client may ask of the VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Action {
    /// `vmm.ping`
    Ping,
    /// `vmm.shutdown`: the process ends.
    VmmShutdown,
    /// `vm.create`
    Create,
    /// `vm.boot`; on a paused VM it resumes, as the contract has it.
    Boot,
    /// `vm.info`
    Info,
    /// `vm.shutdown`
    Shutdown,
    /// `vm.reboot`
    Reboot,
    /// `vm.delete`
    Delete,
    /// `vm.pause`
    Pause,
    /// `vm.resume`
    Resume,
}

/// What a guest may do to its machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum GuestEvent {
    /// The guest asked for a reset (ACPI reset register, keyboard controller).
    Reset,
    /// A vCPU took a triple fault. Hardware resets, and guests use it to reboot.
    TripleFault,
    /// The guest switched itself off (ACPI S5).
    Shutdown,
    /// A vCPU cannot go on: the hypervisor reported an internal error or a failed entry.
    Crash,
}

/// Why a request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// There is no VM to act on.
    NoVm,
    /// There is a VM already.
    AlreadyCreated,
    /// The VM has no machine: it was never booted, or has been shut down.
    NotBooted,
    /// The VM runs already.
    AlreadyRunning,
    /// The VM is paused already.
    AlreadyPaused,
}

impl Reason {
    /// The reason as a sentence without its full stop.
    #[must_use]
    pub const fn text(self) -> &'static str {
        match self {
            Self::NoVm => "there is no VM",
            Self::AlreadyCreated => "a VM exists already",
            Self::NotBooted => "the VM is not booted",
            Self::AlreadyRunning => "the VM is running already",
            Self::AlreadyPaused => "the VM is paused already",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.text())
    }
}

/// Where work leads: the phase after it succeeded, and the phase after it failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// Phase after success.
    pub done: Phase,
    /// Phase after failure.
    pub failed: Phase,
}

/// One cell of the action table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cell {
    /// The handler runs.
    Run(Step),
    /// Success without work: what is asked for is so already.
    Nothing,
    /// Refused.
    Refuse(Reason),
}

/// One cell of the guest-event table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventCell {
    /// Act on it now.
    Run(Step),
    /// Keep it, and act on it when the VM runs again.
    Defer,
    /// A late echo of a machine that is gone.
    Ignore,
}

/// A row of [`ACTIONS`].
#[derive(Clone, Copy, Debug)]
pub struct ActionRow {
    /// The action.
    pub action: Action,
    /// Its name on the wire.
    pub name: &'static str,
    /// One cell per phase, in the order of [`Phase::ALL`].
    pub cells: [Cell; 5],
}

/// A row of [`GUEST_EVENTS`].
#[derive(Clone, Copy, Debug)]
pub struct EventRow {
    /// The event.
    pub event: GuestEvent,
    /// Its name in documents and logs.
    pub name: &'static str,
    /// One cell per phase, in the order of [`Phase::ALL`].
    pub cells: [EventCell; 5],
}

/// A refusal, with all a client needs to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{} is not possible: {reason}", .action.name())]
pub struct Refusal {
    /// What was asked.
    pub action: Action,
    /// The phase the VM is in.
    pub phase: Phase,
    /// Why not.
    pub reason: Reason,
    /// The phases in which it would be accepted.
    pub allowed: PhaseSet,
}

/// The answer of [`admit`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// Run the handler; the step says which phase must hold afterwards.
    Run(Step),
    /// Answer success and do nothing.
    Nothing,
    /// Answer the refusal and do nothing.
    Refused(Refusal),
}

/// Short names for the table, which is read as a picture.
mod cells {
    use super::{Cell, EventCell, Reason, Step};
    use crate::Phase;

    pub(super) const CREATED: Phase = Phase::Created;
    pub(super) const RUNNING: Phase = Phase::Running;
    pub(super) const PAUSED: Phase = Phase::Paused;
    pub(super) const OFF: Phase = Phase::Shutdown;
    pub(super) const EMPTY: Phase = Phase::Empty;

    pub(super) const NO_VM: Cell = Cell::Refuse(Reason::NoVm);
    pub(super) const EXISTS: Cell = Cell::Refuse(Reason::AlreadyCreated);
    pub(super) const NOT_BOOTED: Cell = Cell::Refuse(Reason::NotBooted);
    pub(super) const IS_RUNNING: Cell = Cell::Refuse(Reason::AlreadyRunning);
    pub(super) const IS_PAUSED: Cell = Cell::Refuse(Reason::AlreadyPaused);

    pub(super) const fn go(done: Phase, failed: Phase) -> Cell {
        Cell::Run(Step { done, failed })
    }

    pub(super) const fn stay(phase: Phase) -> Cell {
        go(phase, phase)
    }

    pub(super) const fn event(done: Phase, failed: Phase) -> EventCell {
        EventCell::Run(Step { done, failed })
    }
}
use cells::{
    CREATED, EMPTY, EXISTS, IS_PAUSED, IS_RUNNING, NO_VM, NOT_BOOTED, OFF, PAUSED, RUNNING, event, go, stay,
};

/// Every action in every phase.
///
/// A failed boot changes nothing and can be retried. A failed reboot has lost the old machine, so it ends in Shutdown,
/// from where a boot can be retried. Shutdown and delete always get there: what fails on the way is reported, not kept.
#[rustfmt::skip]
pub const ACTIONS: [ActionRow; 10] = [
    //                                                             Empty              Created              Running                Paused               Shutdown
    ActionRow { action: Action::Ping,        name: "vmm.ping",     cells: [stay(EMPTY),       stay(CREATED),       stay(RUNNING),         stay(PAUSED),        stay(OFF)] },
    ActionRow { action: Action::VmmShutdown, name: "vmm.shutdown", cells: [stay(EMPTY),       stay(EMPTY),         stay(EMPTY),           stay(EMPTY),         stay(EMPTY)] },
    ActionRow { action: Action::Create,      name: "vm.create",    cells: [go(CREATED, EMPTY), EXISTS,             EXISTS,                EXISTS,              EXISTS] },
    ActionRow { action: Action::Boot,        name: "vm.boot",      cells: [NO_VM,             go(RUNNING, CREATED), IS_RUNNING,           go(RUNNING, PAUSED), go(RUNNING, OFF)] },
    ActionRow { action: Action::Info,        name: "vm.info",      cells: [NO_VM,             stay(CREATED),       stay(RUNNING),         stay(PAUSED),        stay(OFF)] },
    ActionRow { action: Action::Shutdown,    name: "vm.shutdown",  cells: [NO_VM,             NOT_BOOTED,          stay(OFF),             stay(OFF),           NOT_BOOTED] },
    ActionRow { action: Action::Reboot,      name: "vm.reboot",    cells: [NO_VM,             NOT_BOOTED,          go(RUNNING, OFF),      go(RUNNING, OFF),    NOT_BOOTED] },
    ActionRow { action: Action::Delete,      name: "vm.delete",    cells: [Cell::Nothing,     stay(EMPTY),         stay(EMPTY),           stay(EMPTY),         stay(EMPTY)] },
    ActionRow { action: Action::Pause,       name: "vm.pause",     cells: [NO_VM,             NOT_BOOTED,          go(PAUSED, RUNNING),   IS_PAUSED,           NOT_BOOTED] },
    ActionRow { action: Action::Resume,      name: "vm.resume",    cells: [NO_VM,             NOT_BOOTED,          IS_RUNNING,            go(RUNNING, PAUSED), NOT_BOOTED] },
];

const IGNORE: EventCell = EventCell::Ignore;
const DEFER: EventCell = EventCell::Defer;

/// Every guest event in every phase. An event that was on its way when the VM was paused waits for the resume.
#[rustfmt::skip]
pub const GUEST_EVENTS: [EventRow; 4] = [
    //                                                                       Empty   Created Running              Paused Shutdown
    EventRow { event: GuestEvent::Reset,       name: "guest reset",        cells: [IGNORE, IGNORE, event(RUNNING, OFF), DEFER, IGNORE] },
    EventRow { event: GuestEvent::TripleFault, name: "guest triple fault", cells: [IGNORE, IGNORE, event(RUNNING, OFF), DEFER, IGNORE] },
    EventRow { event: GuestEvent::Shutdown,    name: "guest shutdown",     cells: [IGNORE, IGNORE, event(OFF, OFF),     DEFER, IGNORE] },
    EventRow { event: GuestEvent::Crash,       name: "guest crash",        cells: [IGNORE, IGNORE, event(OFF, OFF),     DEFER, IGNORE] },
];

impl Action {
    /// The row of this action.
    #[must_use]
    pub fn row(self) -> &'static ActionRow {
        const ROWS: &[ActionRow; 10] = &ACTIONS;
        match self {
            Self::Ping => &ROWS[0],
            Self::VmmShutdown => &ROWS[1],
            Self::Create => &ROWS[2],
            Self::Boot => &ROWS[3],
            Self::Info => &ROWS[4],
            Self::Shutdown => &ROWS[5],
            Self::Reboot => &ROWS[6],
            Self::Delete => &ROWS[7],
            Self::Pause => &ROWS[8],
            Self::Resume => &ROWS[9],
        }
    }

    /// The action's name on the wire.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.row().name
    }

    /// The phases in which this action is accepted, with or without work.
    #[must_use]
    pub fn allowed(self) -> PhaseSet {
        Phase::ALL.into_iter().filter(|phase| !matches!(self.row().cell(*phase), Cell::Refuse(_))).collect()
    }
}

impl GuestEvent {
    /// The row of this event.
    #[must_use]
    pub fn row(self) -> &'static EventRow {
        const ROWS: &[EventRow; 4] = &GUEST_EVENTS;
        match self {
            Self::Reset => &ROWS[0],
            Self::TripleFault => &ROWS[1],
            Self::Shutdown => &ROWS[2],
            Self::Crash => &ROWS[3],
        }
    }
}

impl ActionRow {
    /// The cell of `phase`.
    #[must_use]
    pub const fn cell(&self, phase: Phase) -> Cell {
        let [empty, created, running, paused, shutdown] = self.cells;
        match phase {
            Phase::Empty => empty,
            Phase::Created => created,
            Phase::Running => running,
            Phase::Paused => paused,
            Phase::Shutdown => shutdown,
        }
    }
}

impl EventRow {
    /// The cell of `phase`.
    #[must_use]
    pub const fn cell(&self, phase: Phase) -> EventCell {
        let [empty, created, running, paused, shutdown] = self.cells;
        match phase {
            Phase::Empty => empty,
            Phase::Created => created,
            Phase::Running => running,
            Phase::Paused => paused,
            Phase::Shutdown => shutdown,
        }
    }
}

/// May `action` run in `phase`?
#[must_use]
pub fn admit(phase: Phase, action: Action) -> Admission {
    match action.row().cell(phase) {
        Cell::Run(step) => Admission::Run(step),
        Cell::Nothing => Admission::Nothing,
        Cell::Refuse(reason) => {
            Admission::Refused(Refusal { action, phase, reason, allowed: action.allowed() })
        }
    }
}

/// What is to be done about `event` in `phase`?
#[must_use]
pub fn on_guest_event(phase: Phase, event: GuestEvent) -> EventCell {
    event.row().cell(phase)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_is_found_by_its_own_key() {
        for row in &ACTIONS {
            assert_eq!(row.action.row().name, row.name);
        }
        for row in &GUEST_EVENTS {
            assert_eq!(row.event.row().name, row.name);
        }
    }

    #[test]
    fn a_refusal_says_what_why_and_where_it_would_be_allowed() {
        let Admission::Refused(refusal) = admit(Phase::Created, Action::Pause) else {
            panic!("must be refused")
        };
        assert_eq!(refusal.to_string(), "vm.pause is not possible: the VM is not booted");
        assert_eq!(refusal.allowed.to_string(), "Running");
        assert_eq!(refusal.phase, Phase::Created);
    }
}
