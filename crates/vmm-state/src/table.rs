//! What clients may ask, in every phase, and the question that answers.

use crate::phase::COUNT;
use crate::{Phase, PhaseSet};
use std::fmt;

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
    /// The guest runs, which only a live snapshot allows.
    NotPaused,
    /// No job is under way.
    NoJob,
    /// A migration is under way, which this would disturb.
    Migrating,
    /// No VM is being given away.
    NotMigrating,
    /// It would be possible, but its work is not built yet.
    NotBuilt,
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
            Self::NotPaused => "the VM is not paused, and a live snapshot was not asked for",
            Self::NoJob => "there is nothing to cancel",
            Self::Migrating => "a migration is under way",
            Self::NotMigrating => "no VM is being given away",
            Self::NotBuilt => "this build does not support it yet",
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
    /// It waits until the boot or snapshot under way has ended, and is then looked at again.
    Wait,
    /// Refused.
    Refuse(Reason),
}

/// A row of [`ACTIONS`].
#[derive(Clone, Copy, Debug)]
pub struct ActionRow {
    /// The action.
    pub action: Action,
    /// Its name on the wire.
    pub name: &'static str,
    /// One cell per phase, in the order of [`Phase::ALL`].
    pub cells: [Cell; COUNT],
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
    /// Keep the request, and ask again when the phase is another.
    Wait,
    /// Answer the refusal and do nothing.
    Refused(Refusal),
}

/// Short names for the table, which is read as a picture.
mod cells {
    use super::{Cell, Reason, Step};
    use crate::Phase;
    use crate::phase::COUNT;

    pub(super) const CREATED: Phase = Phase::Created;
    pub(super) const BOOTING: Phase = Phase::Booting;
    pub(super) const RUNNING: Phase = Phase::Running;
    pub(super) const PAUSED: Phase = Phase::Paused;
    pub(super) const SAVING: Phase = Phase::Saving;
    pub(super) const MIGRATING: Phase = Phase::Migrating;
    pub(super) const RECEIVING: Phase = Phase::Receiving;
    pub(super) const OFF: Phase = Phase::Shutdown;
    pub(super) const EMPTY: Phase = Phase::Empty;

    pub(super) const NO_VM: Cell = Cell::Refuse(Reason::NoVm);
    pub(super) const EXISTS: Cell = Cell::Refuse(Reason::AlreadyCreated);
    pub(super) const NOT_BOOTED: Cell = Cell::Refuse(Reason::NotBooted);
    pub(super) const IS_RUNNING: Cell = Cell::Refuse(Reason::AlreadyRunning);
    pub(super) const IS_PAUSED: Cell = Cell::Refuse(Reason::AlreadyPaused);
    pub(super) const NO_JOB: Cell = Cell::Refuse(Reason::NoJob);
    pub(super) const MOVING: Cell = Cell::Refuse(Reason::Migrating);
    pub(super) const STAYS: Cell = Cell::Refuse(Reason::NotMigrating);
    pub(super) const LATER: Cell = Cell::Refuse(Reason::NotBuilt);

    pub(super) const fn go(done: Phase, failed: Phase) -> Cell {
        Cell::Run(Step { done, failed })
    }

    pub(super) const fn stay(phase: Phase) -> Cell {
        go(phase, phase)
    }

    pub(super) const WAIT: Cell = Cell::Wait;

    /// In every phase, without changing it.
    pub(super) const ALWAYS: [Cell; COUNT] = [
        stay(EMPTY),
        stay(CREATED),
        stay(BOOTING),
        stay(RUNNING),
        stay(PAUSED),
        stay(SAVING),
        stay(MIGRATING),
        stay(RECEIVING),
        stay(OFF),
    ];
    /// Without a VM.
    pub(super) const fn without_vm(cell: Cell) -> [Cell; COUNT] {
        [cell, EXISTS, EXISTS, EXISTS, EXISTS, EXISTS, EXISTS, MOVING, EXISTS]
    }
    /// While it is in doubt where the VM is.
    pub(super) const fn in_doubt(done: Phase) -> [Cell; COUNT] {
        [NO_VM, STAYS, STAYS, STAYS, STAYS, STAYS, go(done, MIGRATING), STAYS, STAYS]
    }
    /// With a VM, without changing it. One that arrives is nobody's to see yet.
    pub(super) const WITH_VM: [Cell; COUNT] = [
        NO_VM,
        stay(CREATED),
        stay(BOOTING),
        stay(RUNNING),
        stay(PAUSED),
        stay(SAVING),
        stay(MIGRATING),
        NO_VM,
        stay(OFF),
    ];
    /// With a machine, which is only looked at.
    pub(super) const LOOK: [Cell; COUNT] = [
        NO_VM,
        NOT_BOOTED,
        WAIT,
        stay(RUNNING),
        stay(PAUSED),
        stay(SAVING),
        stay(MIGRATING),
        NO_VM,
        NOT_BOOTED,
    ];
    /// With a machine, whose guest notices.
    pub(super) const BOOTED: [Cell; COUNT] =
        [NO_VM, NOT_BOOTED, WAIT, stay(RUNNING), stay(PAUSED), WAIT, MOVING, MOVING, NOT_BOOTED];
    /// Devices come and go as edits of the configuration while there is no machine.
    pub(super) const EDIT: [Cell; COUNT] =
        [NO_VM, stay(CREATED), WAIT, LATER, LATER, LATER, MOVING, MOVING, stay(OFF)];
    /// Not built yet, for any VM.
    pub(super) const LATER_WITH_VM: [Cell; COUNT] =
        [NO_VM, LATER, LATER, LATER, LATER, LATER, LATER, LATER, LATER];
    /// Not built yet, for a VM that has a machine.
    pub(super) const LATER_BOOTED: [Cell; COUNT] =
        [NO_VM, NOT_BOOTED, LATER, LATER, LATER, LATER, LATER, LATER, NOT_BOOTED];
}
use cells::{
    ALWAYS, BOOTED, CREATED, EDIT, EMPTY, IS_PAUSED, IS_RUNNING, LATER_BOOTED, LATER_WITH_VM, LOOK,
    MIGRATING, MOVING, NO_JOB, NO_VM, NOT_BOOTED, OFF, PAUSED, RECEIVING, RUNNING, WAIT, WITH_VM, go,
    in_doubt, stay, without_vm,
};

/// Declares the actions and their table in one go.
macro_rules! actions {
    ($($(#[doc = $doc:literal])+ $action:ident $name:literal $cells:expr;)+) => {
        /// What a client may ask of the VMM.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Action {
            $($(#[doc = $doc])+ $action,)+
        }

        impl Action {
            /// How many there are.
            pub const COUNT: usize = [$($name),+].len();

            /// The row of this action.
            #[must_use]
            pub const fn row(self) -> &'static ActionRow {
                match self {
                    $(Self::$action => const { &ActionRow { action: Self::$action, name: $name, cells: $cells } },)+
                }
            }
        }

        /// Every action in every phase.
        ///
        /// A boot leads through Booting, and requests that need its outcome wait for it. A failed boot changes nothing
        /// and can be retried. A failed reboot has lost the old machine, so it ends in
        /// Shutdown, from where a boot can be retried. Shutdown and delete always get there: what fails on the way is
        /// reported, not kept. A restore is a boot, and where it fails there is no VM. Files of a boot may not answer, so
        /// delete and cancel do not wait for its end: they give it up.
        ///
        /// A snapshot leads through Saving and ends where it began, whether it succeeds, fails or is cancelled. What would
        /// disturb the guest or end it waits for that, so that a snapshot once begun is not lost by a request that comes
        /// early; who does not want to wait cancels it. The end of the VMM waits for nothing.
        ///
        /// A migration may take long, so nothing waits for it: what would disturb it is refused. It leads through Migrating to
        /// the end of the VM here, or back; at the other end through Receiving to Running or Paused, or to no VM at all.
        pub const ACTIONS: [ActionRow; Action::COUNT] = [$(*Action::$action.row()),+];
    };
}

#[rustfmt::skip]
actions! {
    // Cells:                        Empty          Created               Booting      Running              Paused               Saving        Migrating               Receiving             Shutdown
    /// `vmm.ping`
    Ping "vmm.ping" ALWAYS;
    /// `vmm.shutdown`: the process ends.
    VmmShutdown "vmm.shutdown"      [stay(EMPTY),   stay(EMPTY),          stay(EMPTY), stay(EMPTY),         stay(EMPTY),         stay(EMPTY),  stay(EMPTY),            stay(EMPTY),          stay(EMPTY)];
    /// `vmm.openapi`
    OpenApi "vmm.openapi" ALWAYS;
    /// `vmm.metrics`
    Metrics "vmm.metrics" ALWAYS;
    /// `vmm.events`: the stream of events.
    Events "vmm.events" ALWAYS;
    /// `vmm.log-level`, asking and setting.
    LogLevel "vmm.log-level" ALWAYS;
    /// `vm.create`
    Create "vm.create" without_vm(go(CREATED, EMPTY));
    /// `vm.validate`
    Validate "vm.validate" ALWAYS;
    /// `vm.boot`; on a paused VM it resumes, as the contract has it.
    Boot "vm.boot"                  [NO_VM,         go(RUNNING, CREATED), WAIT,        IS_RUNNING,          go(RUNNING, PAUSED), WAIT,         MOVING,                 MOVING,               go(RUNNING, OFF)];
    /// `vm.info`
    Info "vm.info" WITH_VM;
    /// `vm.counters`
    Counters "vm.counters" LOOK;
    /// `vm.boot-trace`
    BootTrace "vm.boot-trace" LOOK;
    /// `vm.shutdown`
    Shutdown "vm.shutdown"          [NO_VM,         NOT_BOOTED,           WAIT,        stay(OFF),           stay(OFF),           WAIT,         MOVING,                 MOVING,               NOT_BOOTED];
    /// `vm.reboot`
    Reboot "vm.reboot"              [NO_VM,         NOT_BOOTED,           WAIT,        go(RUNNING, OFF),    go(RUNNING, OFF),    WAIT,         MOVING,                 MOVING,               NOT_BOOTED];
    /// `vm.delete`
    Delete "vm.delete"              [Cell::Nothing, stay(EMPTY),          stay(EMPTY), stay(EMPTY),         stay(EMPTY),         WAIT,         MOVING,                 MOVING,               stay(EMPTY)];
    /// `vm.pause`
    Pause "vm.pause"                [NO_VM,         NOT_BOOTED,           WAIT,        go(PAUSED, RUNNING), IS_PAUSED,           WAIT,         MOVING,                 MOVING,               NOT_BOOTED];
    /// `vm.resume`
    Resume "vm.resume"              [NO_VM,         NOT_BOOTED,           WAIT,        IS_RUNNING,          go(RUNNING, PAUSED), WAIT,         MOVING,                 MOVING,               NOT_BOOTED];
    /// `vm.snapshot`; of a VM that runs only the live form.
    Snapshot "vm.snapshot"          [NO_VM,         NOT_BOOTED,           WAIT,        stay(RUNNING),       stay(PAUSED),        WAIT,         MOVING,                 MOVING,               NOT_BOOTED];
    /// `vm.restore`; with `resume` the VM runs then.
    Restore "vm.restore" without_vm(go(PAUSED, EMPTY));
    /// `vm.cancel`: of a boot, restore, snapshot or migration; a VM that ran runs on, one that was off or not there is so again.
    Cancel "vm.cancel"              [NO_VM,         NO_JOB,               stay(CREATED), NO_JOB,              NO_JOB,              stay(PAUSED), go(RUNNING, MIGRATING), go(EMPTY, RECEIVING), NO_JOB];
    /// `vm.power-button`
    PowerButton "vm.power-button" BOOTED;
    /// `vm.nmi`
    Nmi "vm.nmi" BOOTED;
    /// `vm.add-device`
    AddDevice "vm.add-device" EDIT;
    /// `vm.add-user-device`
    AddUserDevice "vm.add-user-device" EDIT;
    /// `vm.add-disk`
    AddDisk "vm.add-disk" EDIT;
    /// `vm.add-fs`
    AddFs "vm.add-fs" EDIT;
    /// `vm.add-generic-vhost-user`
    AddGenericVhostUser "vm.add-generic-vhost-user" EDIT;
    /// `vm.add-pmem`
    AddPmem "vm.add-pmem" EDIT;
    /// `vm.add-net`
    AddNet "vm.add-net" EDIT;
    /// `vm.add-vdpa`
    AddVdpa "vm.add-vdpa" EDIT;
    /// `vm.add-vsock`
    AddVsock "vm.add-vsock" EDIT;
    /// `vm.remove-device`
    RemoveDevice "vm.remove-device" EDIT;
    /// `vm.resize`
    Resize "vm.resize" LATER_WITH_VM;
    /// `vm.resize-disk`
    ResizeDisk "vm.resize-disk" LATER_WITH_VM;
    /// `vm.resize-zone`
    ResizeZone "vm.resize-zone" LATER_WITH_VM;
    /// `vm.coredump`
    Coredump "vm.coredump" LATER_BOOTED;
    /// `vm.receive-migration`
    ReceiveMigration "vm.receive-migration" without_vm(go(RUNNING, EMPTY));
    /// `vm.send-migration`
    SendMigration "vm.send-migration" [NO_VM,         NOT_BOOTED,           WAIT,        go(EMPTY, RUNNING),  go(EMPTY, PAUSED),   WAIT,         MOVING,                 MOVING,               NOT_BOOTED];
    /// `vm.migration-progress`: of the migration under way, or of the last.
    MigrationProgress "vm.migration-progress" ALWAYS;
    /// `vm.migration-keep`: it is in doubt where the VM is, and the operator says that it is here.
    MigrationKeep "vm.migration-keep" in_doubt(RUNNING);
    /// `vm.migration-yield`: the same, and it is at the destination.
    MigrationYield "vm.migration-yield" in_doubt(EMPTY);
}

impl Action {
    /// The action's name on the wire.
    #[must_use]
    pub const fn name(self) -> &'static str {
        self.row().name
    }

    /// The phases in which this action is carried out, with or without work.
    #[must_use]
    pub fn allowed(self) -> PhaseSet {
        let is_allowed = |phase: &Phase| matches!(self.row().cell(*phase), Cell::Run(_) | Cell::Nothing);
        Phase::ALL.into_iter().filter(is_allowed).collect()
    }

    /// Whether its work is not built yet, in any phase.
    #[must_use]
    pub fn is_later(self) -> bool {
        self.allowed() == PhaseSet::EMPTY
    }
}

impl ActionRow {
    /// The cell of `phase`.
    #[must_use]
    pub const fn cell(&self, phase: Phase) -> Cell {
        *phase.of(&self.cells)
    }
}

/// May `action` run in `phase`?
#[must_use]
pub fn admit(phase: Phase, action: Action) -> Admission {
    match action.row().cell(phase) {
        Cell::Run(step) => Admission::Run(step),
        Cell::Nothing => Admission::Nothing,
        Cell::Wait => Admission::Wait,
        Cell::Refuse(reason) => {
            Admission::Refused(Refusal { action, phase, reason, allowed: action.allowed() })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_is_found_by_its_own_key() {
        for row in &ACTIONS {
            assert_eq!(row.action.row().name, row.name);
        }
    }

    #[test]
    fn what_is_not_built_is_allowed_nowhere_yet() {
        let later: Vec<_> = ACTIONS.iter().filter(|row| row.action.is_later()).map(|row| row.name).collect();
        assert_eq!(later, ["vm.resize", "vm.resize-disk", "vm.resize-zone", "vm.coredump"]);
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
