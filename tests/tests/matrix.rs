//! Every command in every phase, by HTTP to the real binary with a tiny guest: status and phase are what `vmm-state` says. The same
//! over the scripted hypervisor is `bins/vmm/tests/phases.rs`.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]

use std::cell::RefCell;
use std::os::unix::net::UnixListener;

use serde_json::json;
use vmm_state::{ACTIONS, Action, ActionRow, Cell, Phase, Reason};
use vmm_tests::harness::{
    Answer, Api, LIMIT, Pending, Requests, Scratch, SerialFile, UNBOOTABLE, Vmm, wait_until,
};
use vmm_tests::tiny::Guest;

/// Each row but the one that ends the process.
fn rows() -> impl Iterator<Item = &'static ActionRow> {
    ACTIONS.iter().filter(|row| row.action != Action::VmmShutdown)
}

/// What a request is answered in a phase: the status, and the phase afterwards.
fn expected(row: &ActionRow, phase: Phase) -> (u16, Phase) {
    match row.cell(phase) {
        Cell::Run(step) if UNBOOTABLE.contains(&row.name) => (501, step.failed),
        // There is nobody at the other end.
        Cell::Run(step) if [Action::SendMigration, Action::ReceiveMigration].contains(&row.action) => {
            (500, step.failed)
        }
        // It is not in doubt where the VM is.
        Cell::Run(step) if [Action::MigrationKeep, Action::MigrationYield].contains(&row.action) => {
            (409, step.failed)
        }
        Cell::Run(step) if has_body(row) => (200, step.done),
        Cell::Run(step) => (204, step.done),
        Cell::Nothing => (204, phase),
        // What waits finds a VM that is paused, or runs: the snapshots here are of a paused one, the boots succeed.
        Cell::Wait if phase == Phase::Saving => expected(row, Phase::Paused),
        Cell::Wait => expected(row, Phase::Running),
        Cell::Refuse(Reason::NoVm) => (404, phase),
        Cell::Refuse(Reason::NotBuilt) => (501, phase),
        Cell::Refuse(
            Reason::AlreadyCreated
            | Reason::NotBooted
            | Reason::AlreadyRunning
            | Reason::AlreadyPaused
            | Reason::NotPaused
            | Reason::NoJob
            | Reason::Migrating
            | Reason::NotMigrating,
        ) => (409, phase),
    }
}

/// Whether a success has something to tell.
fn has_body(row: &ActionRow) -> bool {
    use Action::{
        BootTrace, Counters, Events, Info, LogLevel, Metrics, MigrationProgress, OpenApi, Ping, Validate,
    };
    [BootTrace, Counters, Events, Info, LogLevel, Metrics, MigrationProgress, OpenApi, Ping, Validate]
        .contains(&row.action)
}

/// A VMM, and requests about a VM of one vCPU that halts and can take an NMI.
struct Rig {
    vmm: Vmm,
    serial: SerialFile,
    requests: Requests,
    /// The other end of a migration, which says nothing.
    peer: RefCell<Option<UnixListener>>,
    scratch: Scratch,
}

impl Rig {
    fn new() -> Self {
        let scratch = Scratch::new();
        // An NMI before the guest is ready for it resets the machine, which would be another boot.
        let vmm = Vmm::with_api(&scratch, ["--on-reboot", "stop"]);
        let serial = SerialFile::new(scratch.path("serial"));
        let mut requests = Requests::new(&scratch.guest(Guest::Nmi), scratch.disk("disk", 4096), "Null");
        requests.vm["serial"] = json!({ "mode": "File", "file": serial.path() });
        Self { vmm, serial, requests, peer: RefCell::default(), scratch }
    }

    fn api(&self) -> Api {
        self.vmm.api()
    }

    /// Sends a request.
    fn begin(&self, name: &str) -> Pending {
        Pending::send(self.vmm.socket(), name, &self.requests.body(name))
    }

    fn ask(&self, name: &str) -> Answer {
        self.begin(name).answer()
    }

    /// Makes a new VM and brings it to `phase`.
    fn bring_to(&self, phase: Phase) {
        if [Phase::Migrating, Phase::Receiving].contains(&self.api().phase()) {
            self.api().puts(&["vm.cancel"]);
        }
        let way: &[&str] = match phase {
            Phase::Empty | Phase::Receiving => &[],
            Phase::Created | Phase::Booting => &["vm.create"],
            Phase::Running | Phase::Migrating => &["vm.create", "vm.boot"],
            Phase::Paused | Phase::Saving => &["vm.create", "vm.boot", "vm.pause"],
            Phase::Shutdown => &["vm.create", "vm.boot", "vm.shutdown"],
        };
        for name in ["vm.delete"].iter().chain(way) {
            let answer = self.ask(name);
            assert_eq!(answer.status, 204, "{name} on the way to {phase}: {answer:?}");
            if *name == "vm.boot" {
                self.serial.wait_for("ready");
            }
        }
        if [Phase::Migrating, Phase::Receiving].contains(&phase) {
            let path = self.scratch.path("peer");
            let _ = std::fs::remove_file(&path);
            *self.peer.borrow_mut() = (phase == Phase::Migrating).then(|| UnixListener::bind(&path).unwrap());
            let (name, body) = Requests::migration(phase, &path);
            // Its answer comes when it ends.
            drop(Pending::send(self.vmm.socket(), name, &body));
            self.api().wait_for(phase);
        }
    }

    /// Makes the snapshot that restores are from.
    fn save(&self) {
        self.bring_to(Phase::Paused);
        let answer = Pending::send(self.vmm.socket(), "vm.snapshot", &self.requests.save()).answer();
        assert_eq!(answer.status, 204, "{answer:?}");
    }

    /// Sends a request in `phase` and compares.
    fn check(&self, row: &ActionRow, phase: Phase) {
        let answer = self.ask(row.name);
        let (status, after) = expected(row, phase);
        assert_eq!(answer.status, status, "{} in {phase}: {answer:?}", row.name);
        assert_eq!(answer.body.is_empty(), status == 204, "{} in {phase}: {answer:?}", row.name);
        assert_eq!(self.api().phase(), after, "after {} in {phase}", row.name);
    }
}

/// Each command in a phase that lasts.
fn every_command_in(phase: Phase) {
    let rig = Rig::new();
    rig.save();
    for row in rows() {
        rig.bring_to(phase);
        assert_eq!(rig.api().phase(), phase);
        rig.check(row, phase);
    }
}

#[test]
fn every_command_without_a_vm() {
    every_command_in(Phase::Empty);
}

#[test]
fn every_command_to_a_vm_that_was_created() {
    every_command_in(Phase::Created);
}

#[test]
fn every_command_to_a_vm_that_runs() {
    every_command_in(Phase::Running);
}

#[test]
fn every_command_to_a_vm_that_is_paused() {
    every_command_in(Phase::Paused);
}

#[test]
fn every_command_to_a_vm_that_was_shut_down() {
    every_command_in(Phase::Shutdown);
}

#[test]
fn every_command_to_a_vm_that_is_given_away() {
    every_command_in(Phase::Migrating);
}

#[test]
fn every_command_while_a_vm_is_waited_for() {
    every_command_in(Phase::Receiving);
}

/// A boot or a snapshot that lasts: all memory is touched. It grows until what is asked meanwhile is asked in time, most times.
struct Slow {
    rig: Rig,
    mib: u64,
    /// How often it was too fast.
    misses: u32,
    /// Booting or Saving.
    phase: Phase,
}

impl Slow {
    const FIRST_MIB: u64 = 128;
    const MOST_MIB: u64 = 2048;
    /// A machine of few processors has others to serve at times: so many that are too fast make it grow.
    const MISSES: u32 = 4;

    fn new(phase: Phase) -> Self {
        let mut new = Self { rig: Rig::new(), mib: Self::FIRST_MIB, misses: 0, phase };
        new.resize();
        new
    }

    fn resize(&mut self) {
        assert!(self.mib <= Self::MOST_MIB, "nothing is slow enough");
        self.rig.requests.vm["memory"] = json!({ "size": self.mib << 20, "prefault": true });
    }

    /// It was too fast for what was to be seen.
    fn missed(&mut self) {
        self.misses += 1;
        if self.misses.is_multiple_of(Self::MISSES) {
            self.mib *= 2;
            self.resize();
        }
    }

    /// What leads into the phase, from where, and where it leads.
    fn way(&self) -> (&'static str, Phase, Phase) {
        match self.phase {
            Phase::Saving => ("vm.snapshot", Phase::Paused, Phase::Paused),
            _ => ("vm.boot", Phase::Created, Phase::Running),
        }
    }

    /// Begins it; `None` if it is over already.
    fn begin(&self) -> Option<Pending> {
        let (name, from, _) = self.way();
        self.rig.bring_to(from);
        let mut pending = self.rig.begin(name);
        let mut api = self.rig.api();
        let mut seen = || {
            let (phase, answered) = (api.phase(), pending.is_answered());
            (phase == self.phase || answered).then_some(phase)
        };
        let phase = wait_until(LIMIT, &mut seen, || name.to_owned());
        (phase == self.phase).then_some(pending)
    }

    /// What does not wait is answered while it goes on. `None` if it was over before that could be seen.
    fn at_once(&self, row: &ActionRow) -> Option<()> {
        let mut pending = self.begin()?;
        let answer = self.rig.ask(row.name);
        let phase = self.rig.api().phase();
        let (status, after) = expected(row, self.phase);
        if [Action::Cancel, Action::Delete].contains(&row.action) {
            let ended = pending.answer().status;
            // It comes too late.
            (answer.status == 204 && ended != 204).then_some(())?;
            let told = if row.action == Action::Cancel { 409 } else { 500 };
            assert_eq!((ended, phase), (told, after), "{} in {}: {answer:?}", row.name, self.phase);
            return Some(());
        }
        let (name, _, over) = self.way();
        if phase == over {
            return None;
        }
        assert_eq!((answer.status, phase), (status, after), "{} in {}: {answer:?}", row.name, self.phase);
        assert_eq!(pending.answer().status, 204, "{name} goes on after {}", row.name);
        Some(())
    }

    /// What waits is answered when it has ended, by the table's cell of the phase that follows.
    fn later(&self, row: &ActionRow) -> Option<()> {
        let mut before = self.begin()?;
        let mut pending = self.rig.begin(row.name);
        let mut api = self.rig.api();
        if api.phase() != self.phase {
            return None;
        }
        // A reboot is a boot again, a snapshot one more, and is answered at its end. The guest that gets an NMI at once is
        // reset by it.
        loop {
            let answered = pending.is_answered();
            let phase = api.phase();
            assert!(!answered || phase != self.phase, "{} did not wait", row.name);
            if answered {
                break;
            }
        }
        let (status, after) = expected(row, self.phase);
        let answer = pending.answer();
        assert_eq!(answer.status, status, "{} in {}: {answer:?}", row.name, self.phase);
        if row.action != Action::Nmi {
            assert_eq!(api.phase(), after, "after {} in {}", row.name, self.phase);
        }
        assert_eq!(before.answer().status, 204, "what was there before {}", row.name);
        Some(())
    }
}

fn every_command_during(phase: Phase) {
    let mut slow = Slow::new(phase);
    for row in rows() {
        let waits = row.cell(phase) == Cell::Wait;
        while (if waits { slow.later(row) } else { slow.at_once(row) }).is_none() {
            slow.missed();
        }
    }
}

#[test]
fn every_command_to_a_vm_that_is_booting() {
    every_command_during(Phase::Booting);
}

#[test]
fn every_command_to_a_vm_that_is_saved() {
    every_command_during(Phase::Saving);
}

#[test]
fn the_vmm_ends_in_every_phase_and_says_so() {
    // While it is saved: see `a_snapshot_is_cancelled_by_a_client_and_by_the_end_of_the_vmm`.
    for phase in Phase::ALL.into_iter().filter(|phase| *phase != Phase::Saving) {
        let mut slow = Slow::new(Phase::Booting);
        let boot = (phase == Phase::Booting).then(|| {
            loop {
                match slow.begin() {
                    Some(boot) => break boot,
                    None => slow.missed(),
                }
            }
        });
        let mut rig = if boot.is_some() { slow.rig } else { Rig::new() };
        if boot.is_none() {
            rig.bring_to(phase);
        }
        let (status, _) = expected(Action::VmmShutdown.row(), phase);
        assert_eq!(rig.ask("vmm.shutdown").status, status, "in {phase}");
        if let Some(mut boot) = boot {
            let answer = boot.answer();
            assert!([204, 500].contains(&answer.status), "who waits for a boot is answered: {answer:?}");
        }
        assert_eq!(rig.vmm.wait().code(), Some(0), "in {phase}");
        assert!(!rig.vmm.socket().exists(), "in {phase}");
    }
}
