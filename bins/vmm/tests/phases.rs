//! The control thread's state against the table of `vmm-state`, on the scripted hypervisor.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]

use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use serde_json::Value;
use vmm::events::Events;
use vmm::machine::{MachineEvent, MachineMessage};
use vmm::vmm::{Policy, TABLE, Vmm};
use vmm_api::command::{Host, Incoming, Outcome, ReplySlot};
use vmm_api::error::Code;
use vmm_cpu_manager::set::{VcpuEvent, VcpuEventKind};
use vmm_epoll::{Inbox, mailbox};
use vmm_hypervisor::fake::{Exit, Fake, Live};
use vmm_platform_devices::events::{Cause, SystemEvent};
use vmm_platform_devices::serial::COM1_PORT;
use vmm_state::{
    ACTIONS, Action, Cell, EventCell, GUEST_EVENTS, GuestEvent, Phase, Reaction, Reactions, Reason,
};
use vmm_tests::harness::{LIMIT, Requests, UNBOOTABLE};
use vmm_tests::tiny::Guest;

struct Rig {
    folder: tempfile::TempDir,
    vmm: Vmm,
    /// Mode of the serial port.
    serial: &'static str,
    inbox: Inbox<MachineMessage>,
    /// The other end of a migration, which says nothing.
    peer: Option<UnixListener>,
}

impl Rig {
    fn new() -> Self {
        Self::with(Fake::new(), "Null", Reactions::default())
    }

    fn with(fake: Fake, serial: &'static str, reactions: Reactions) -> Self {
        let folder = tempfile::tempdir().unwrap();
        Guest::Halt.write(folder.path()).unwrap();
        std::fs::write(folder.path().join("disk"), [0; 4096]).unwrap();
        let (post, inbox) = mailbox().unwrap();
        let policy = Policy { serves_clients: true, verify_state: false, reactions };
        let vmm = Vmm::new(Arc::new(fake), post, policy, Events::new());
        Self { folder, vmm, serial, inbox, peer: None }
    }

    fn in_phase(phase: Phase) -> Self {
        Self::new().brought_to(phase)
    }

    fn brought_to(mut self, phase: Phase) -> Self {
        let way: &[&str] = match phase {
            Phase::Empty | Phase::Receiving => &[],
            Phase::Created | Phase::Booting => &["vm.create"],
            Phase::Running | Phase::Migrating => &["vm.create", "vm.boot"],
            Phase::Paused | Phase::Saving => &["vm.create", "vm.boot", "vm.pause"],
            Phase::Shutdown => &["vm.create", "vm.boot", "vm.shutdown"],
        };
        for name in way {
            self.ask(name).unwrap();
        }
        if phase == Phase::Booting {
            // Its end is not looked at.
            drop(self.begin("vm.boot"));
        }
        if phase == Phase::Saving {
            drop(self.begin("vm.snapshot"));
        }
        if phase == Phase::Migrating {
            self.peer = Some(UnixListener::bind(self.folder.path().join("peer")).unwrap());
        }
        if matches!(phase, Phase::Migrating | Phase::Receiving) {
            let (name, body) = Requests::migration(phase, &self.folder.path().join("peer"));
            drop(self.begin_with(name, body));
        }
        assert_eq!(self.vmm.phase(), phase);
        self
    }

    fn kernel(&self) -> PathBuf {
        self.folder.path().join(Guest::Halt.name())
    }

    /// Without it nothing boots.
    fn hide_kernel(&self) {
        std::fs::remove_file(self.kernel()).unwrap();
    }

    /// Sends a request; its outcome may come later.
    fn begin(&mut self, name: &str) -> mpsc::Receiver<Outcome> {
        let body = self.requests().body(name);
        self.begin_with(name, body)
    }

    fn requests(&self) -> Requests {
        Requests::new(&self.kernel(), self.folder.path().join("disk"), self.serial)
    }

    /// Makes the snapshot that a restore is from, and removes its VM.
    fn save(&mut self) {
        for name in ["vm.create", "vm.boot", "vm.pause"] {
            self.ask(name).unwrap();
        }
        let body = self.requests().save();
        let saved = self.begin_with("vm.snapshot", body);
        self.wait(&saved).unwrap();
        self.ask("vm.delete").unwrap();
    }

    fn begin_with(&mut self, name: &str, body: Vec<u8>) -> mpsc::Receiver<Outcome> {
        let (route, method) = (name.replace("set-log", "log"), Requests::method(name));
        let endpoint = TABLE.iter().find(|row| row.name() == route && row.method() == method).unwrap();
        let (sender, outcome) = mpsc::channel();
        let slot = ReplySlot::new(move |outcome| drop(sender.send(outcome)));
        let request = endpoint.prepare(Incoming { body, ..Incoming::default() }, slot).unwrap();
        request.dispatch(&mut self.vmm);
        outcome
    }

    /// Sends a request and does what the control thread does until it is answered.
    fn ask(&mut self, name: &str) -> Outcome {
        let outcome = self.begin(name);
        self.wait(&outcome)
    }

    fn wait(&mut self, outcome: &mpsc::Receiver<Outcome>) -> Outcome {
        let end = Instant::now() + LIMIT;
        loop {
            match outcome.recv_timeout(Duration::from_millis(1)) {
                Ok(outcome) => return outcome,
                Err(_) => assert!(Instant::now() < end, "no answer"),
            }
            self.pump();
        }
    }

    fn pump(&mut self) {
        for message in self.inbox.take_all() {
            self.vmm.machine_says(message);
        }
    }

    /// Waits for a boot that no client asked for.
    fn end_boot(&mut self) {
        let end = Instant::now() + LIMIT;
        while self.vmm.phase() == Phase::Booting {
            assert!(Instant::now() < end, "the boot does not end");
            std::thread::sleep(Duration::from_millis(1));
            self.pump();
        }
    }

    fn info(&mut self) -> Value {
        serde_json::from_slice(&self.ask("vm.info").unwrap().bytes).unwrap()
    }

    fn guest_does(&mut self, event: GuestEvent) {
        let machine = self.machine();
        self.machine_does(machine, event);
    }

    /// The number of the machine that was built last.
    fn machine(&self) -> u64 {
        self.vmm.machines()
    }

    fn machine_does(&mut self, machine: u64, event: GuestEvent) {
        let vcpu = |kind| MachineEvent::Vcpu(VcpuEvent { vcpu: 0, kind });
        let event = match event {
            GuestEvent::Reset => MachineEvent::System(SystemEvent::Reset(Cause::I8042)),
            GuestEvent::Shutdown => MachineEvent::System(SystemEvent::Shutdown(Cause::AcpiSleep)),
            GuestEvent::TripleFault => vcpu(VcpuEventKind::TripleFault),
            GuestEvent::Crash => vcpu(VcpuEventKind::InternalError { suberror: 1 }),
            GuestEvent::Panic => MachineEvent::System(SystemEvent::Panicked),
        };
        self.vmm.machine_says(MachineMessage { machine, event });
    }
}

#[test]
fn every_request_leads_where_the_table_says() {
    // The stream of events does not pass the control thread.
    for row in ACTIONS.iter().filter(|row| row.name != "vmm.events") {
        for phase in Phase::ALL {
            let mut rig = Rig::new();
            if row.action == Action::Restore {
                rig.save();
            }
            let mut rig = rig.brought_to(phase);
            let outcome = rig.begin(row.name);
            let cell = row.cell(phase);
            if cell == Cell::Wait {
                assert!(outcome.try_recv().is_err(), "{} waits in {phase}", row.name);
                assert_eq!(rig.vmm.phase(), phase, "{} in {phase}", row.name);
                rig.wait(&outcome).ok();
                assert_ne!(rig.vmm.phase(), phase, "{} waited for the end of {phase}", row.name);
                continue;
            }
            let outcome = rig.wait(&outcome);
            let (success, after) = match cell {
                Cell::Run(step) if UNBOOTABLE.contains(&row.name) => (false, step.failed),
                // There is nobody at the other end.
                Cell::Run(step) if fails_here(row.action) => (false, step.failed),
                Cell::Run(step) => (true, step.done),
                Cell::Nothing | Cell::Wait => (true, phase),
                Cell::Refuse(_) => (false, phase),
            };
            let now = rig.vmm.phase();
            // What does not wait may be overtaken by the end of the boot or snapshot.
            let overtaken = [(Phase::Booting, Phase::Running), (Phase::Saving, Phase::Paused)];
            let after = if overtaken.contains(&(phase, now)) { now } else { after };
            // It comes too late, or not.
            let success = if row.action == Action::Cancel { outcome.is_ok() } else { success };
            assert_eq!((outcome.is_ok(), now), (success, after), "{} in {phase}: {outcome:?}", row.name);
            if let Err(error) = outcome
                && cell == Cell::Refuse(Reason::NotBuilt)
            {
                assert_eq!(error.code, Code::NotBuilt);
            }
        }
    }
}

fn fails_here(action: Action) -> bool {
    matches!(action, Action::SendMigration | Action::ReceiveMigration)
}

#[test]
fn what_waits_for_a_boot_is_carried_out_in_order_after_it() {
    let mut rig = Rig::in_phase(Phase::Created);
    let outcomes: Vec<_> =
        ["vm.boot", "vm.pause", "vm.boot", "vm.boot", "vm.shutdown"].map(|name| rig.begin(name)).into();
    let outcomes: Vec<bool> = outcomes.iter().map(|outcome| rig.wait(outcome).is_ok()).collect();
    assert_eq!(outcomes, [true, true, true, false, true], "boot, pause, resume, refused, shutdown");
    assert_eq!(rig.vmm.phase(), Phase::Shutdown);
}

#[test]
fn what_waits_for_a_boot_that_fails_is_answered_by_the_phase_that_follows() {
    let mut rig = Rig::in_phase(Phase::Created);
    rig.hide_kernel();
    let boot = rig.begin("vm.boot");
    let pause = rig.begin("vm.pause");
    let delete = rig.begin("vm.delete");
    assert_eq!(rig.wait(&boot).unwrap_err().code, Code::BootFailed);
    assert_eq!(rig.wait(&pause).unwrap_err().code, Code::WrongPhase);
    rig.wait(&delete).unwrap();
    assert_eq!(rig.vmm.phase(), Phase::Empty);
}

#[test]
fn the_end_of_the_vmm_does_not_wait_for_a_boot() {
    let mut rig = Rig::in_phase(Phase::Created);
    let boot = rig.begin("vm.boot");
    let waiting = rig.begin("vm.pause");
    rig.ask("vmm.shutdown").unwrap();
    assert_eq!(rig.wait(&boot).unwrap_err().code, Code::BootFailed);
    rig.wait(&waiting).unwrap_err();
    assert_eq!(rig.vmm.phase(), Phase::Empty);
    assert!(rig.vmm.ending().is_some());
}

#[test]
fn a_boot_that_fails_leads_where_the_table_says() {
    for row in ACTIONS.iter().filter(|row| ["vm.boot", "vm.reboot"].contains(&row.name)) {
        for phase in [Phase::Created, Phase::Running, Phase::Paused, Phase::Shutdown] {
            let Cell::Run(step) = row.cell(phase) else { continue };
            if (row.name, phase) == ("vm.boot", Phase::Paused) {
                continue; // A resume, which needs no kernel.
            }
            let mut rig = Rig::in_phase(phase);
            rig.hide_kernel();
            rig.ask(row.name).unwrap_err();
            assert_eq!(rig.vmm.phase(), step.failed, "{} in {phase}", row.name);
            // A retry works.
            Guest::Halt.write(rig.folder.path()).unwrap();
            rig.ask("vm.boot").unwrap();
            assert_eq!(rig.vmm.phase(), Phase::Running);
        }
    }
}

/// Whatever call of the hypervisor fails on the way.
#[test]
fn switching_off_always_gets_there() {
    for (name, phase) in [
        ("vm.shutdown", Phase::Running),
        ("vm.shutdown", Phase::Paused),
        ("vm.delete", Phase::Running),
        ("vm.delete", Phase::Paused),
    ] {
        let (mut calls, mut nth) = (0, 1);
        while nth <= calls.max(1) {
            let fake = Fake::new();
            let mut rig = Rig::with(fake.clone(), "Null", Reactions::default()).brought_to(phase);
            let before = fake.calls().len();
            fake.fail_nth(nth);
            rig.ask(name).unwrap();
            fake.heal();
            calls = fake.calls().len() - before;
            let off = if name == "vm.delete" { Phase::Empty } else { Phase::Shutdown };
            assert_eq!(rig.vmm.phase(), off, "{name} in {phase}, call {nth} of {calls}");
            if off == Phase::Empty {
                rig.ask("vm.create").unwrap();
            }
            rig.ask("vm.boot").unwrap();
            nth += 1;
        }
        assert!(calls > 0, "{name} in {phase} makes calls that can fail");
    }
}

/// Its memory is needed.
#[test]
fn the_machine_before_has_gone_when_the_next_is_built() {
    let fake = Fake::new();
    let mut rig = Rig::with(fake.clone(), "Null", Reactions::default()).brought_to(Phase::Running);
    for _ in 0..50 {
        rig.ask("vm.reboot").unwrap();
        let off = rig.begin("vm.shutdown");
        let boot = rig.begin("vm.boot");
        rig.wait(&off).unwrap();
        rig.wait(&boot).unwrap();
    }
    let calls = fake.calls();
    let lives: Vec<_> = calls.split(|call| *call == "KVM_CREATE_VM").skip(1).collect();
    let slots = |life: &[&str]| life.iter().filter(|call| **call == "KVM_SET_USER_MEMORY_REGION").count();
    let (last, ended) = lives.split_last().unwrap();
    assert_eq!(ended.len(), 100);
    for (number, life) in ended.iter().enumerate() {
        assert_eq!(slots(life), 2 * slots(last), "machine {number} gives back the memory that it took");
    }
}

fn reactions(event: GuestEvent, reaction: Reaction) -> Reactions {
    let mut reactions = Reactions::default();
    match event {
        GuestEvent::Reset | GuestEvent::TripleFault => reactions.reboot = reaction,
        GuestEvent::Shutdown => reactions.shutdown = reaction,
        GuestEvent::Panic => reactions.panic = reaction,
        GuestEvent::Crash => reactions.crash = reaction,
    }
    reactions
}

#[test]
fn every_guest_event_leads_where_its_reaction_says() {
    for row in &GUEST_EVENTS {
        for reaction in row.reactions {
            for phase in Phase::ALL {
                let rig = Rig::with(Fake::new(), "Null", reactions(row.event, *reaction));
                let mut rig = rig.brought_to(phase);
                rig.guest_does(row.event);
                let react = row.cell(phase) == EventCell::React;
                if react {
                    rig.end_boot();
                }
                let after = if react { reaction.step().done } else { phase };
                assert_eq!(rig.vmm.phase(), after, "{}: {reaction} in {phase}", row.name);
                let ends = react && *reaction == Reaction::Exit;
                assert_eq!(rig.vmm.ending().is_some(), ends, "{}: {reaction} in {phase}", row.name);
            }
        }
    }
}

#[test]
fn the_guests_last_event_and_the_boots_are_told() {
    let mut rig = Rig::in_phase(Phase::Running);
    assert_eq!((&rig.info()["boots"], rig.info().get("last_guest_event")), (&1.into(), None));
    rig.guest_does(GuestEvent::TripleFault);
    rig.end_boot();
    let info = rig.info();
    assert_eq!((&info["boots"], &info["last_guest_event"]), (&2.into(), &"triple-fault".into()));
    rig.guest_does(GuestEvent::Panic);
    assert_eq!(rig.info()["last_guest_event"], "panic");
    assert_eq!(rig.info()["phase"], "Running");
}

#[test]
fn edits_before_the_boot_are_in_the_next_machine() {
    for phase in [Phase::Created, Phase::Shutdown] {
        let mut rig = Rig::in_phase(phase);
        let ids = |rig: &mut Rig| {
            let info = rig.info();
            let disks = info["config"]["disks"].as_array().cloned().unwrap_or_default();
            disks.iter().map(|disk| disk["id"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(ids(&mut rig), ["_disk0"]);
        rig.ask("vm.remove-device").unwrap();
        assert_eq!(rig.ask("vm.remove-device").unwrap_err().code, Code::NoDevice);
        assert!(rig.ask("vm.add-disk").unwrap().bytes.is_empty(), "204 for what is not on a bus yet");
        assert_eq!(rig.ask("vm.add-disk").unwrap_err().code, Code::DeviceExists);
        assert_eq!(ids(&mut rig), ["d"]);
        rig.ask("vm.boot").unwrap();
        let tree = rig.info()["device_tree"].clone();
        assert!(tree.get("d").is_some() && tree.get("_disk0").is_none(), "{tree}");
    }
}

#[test]
fn a_reset_that_fails_leads_where_the_table_says() {
    let mut rig = Rig::in_phase(Phase::Running);
    rig.hide_kernel();
    rig.guest_does(GuestEvent::Reset);
    rig.end_boot();
    assert_eq!((rig.vmm.phase(), rig.vmm.ending()), (Phase::Shutdown, None));
}

#[test]
fn what_waits_for_the_resume_happens_once_and_to_its_own_machine() {
    // The second and third event are of a machine that the first has ended.
    let mut rig = Rig::in_phase(Phase::Paused);
    for event in [GuestEvent::Reset, GuestEvent::Reset, GuestEvent::Shutdown] {
        rig.guest_does(event);
    }
    let old = rig.machine();
    rig.ask("vm.resume").unwrap();
    rig.end_boot();
    assert_eq!((rig.vmm.phase(), rig.vmm.ending()), (Phase::Running, None));
    // A message of the old machine is late; one of the new machine is not: the guest was reset once.
    rig.machine_does(old, GuestEvent::Shutdown);
    assert_eq!(rig.vmm.ending(), None);
    assert_eq!(rig.machine(), old + 1);
    rig.guest_does(GuestEvent::Shutdown);
    assert!(rig.vmm.ending().is_some());
}

#[test]
fn all_that_waits_for_the_resume_happens_while_its_machine_lives() {
    let mut rig = Rig::in_phase(Phase::Paused);
    for event in [GuestEvent::Panic, GuestEvent::Shutdown] {
        rig.guest_does(event);
    }
    rig.ask("vm.resume").unwrap();
    assert!(rig.vmm.ending().is_some(), "a panic is reported, and the power-off still happens");
}

#[test]
fn what_waits_is_forgotten_with_its_machine() {
    for way in [["vm.shutdown", "vm.boot"], ["vm.reboot", "vm.info"]] {
        let mut rig = Rig::in_phase(Phase::Paused);
        rig.guest_does(GuestEvent::Shutdown);
        for name in way.iter().chain(&["vm.pause", "vm.resume"]) {
            rig.ask(name).unwrap();
        }
        assert_eq!((rig.vmm.phase(), rig.vmm.ending()), (Phase::Running, None), "{way:?}");
    }
}

#[test]
fn a_pty_that_nobody_reads_holds_nobody() {
    let (done, ended) = mpsc::channel();
    std::thread::spawn(move || {
        let fake = Fake::new();
        // More than a terminal holds; the answer to the last tells that all is said.
        let output = (0..200_000).map(|_| Exit::PioWrite { port: COM1_PORT, data: vec![b'x'] });
        fake.script(0, output.chain([Exit::PioRead { port: COM1_PORT + 5, size: 1, count: 1 }]));
        let mut rig = Rig::with(fake.clone(), "Pty", Reactions::default());
        for name in ["vm.create", "vm.boot"] {
            rig.ask(name).unwrap();
        }
        while fake.answers().is_empty() {
            std::thread::yield_now();
        }
        for name in ["vm.reboot", "vm.pause", "vm.delete"] {
            rig.ask(name).unwrap();
        }
        done.send(()).unwrap();
    });
    ended.recv_timeout(LIMIT).unwrap();
}

/// Whatever call of the hypervisor fails on the way.
#[test]
fn a_snapshot_that_fails_changes_nothing() {
    for phase in [Phase::Paused, Phase::Running] {
        let (mut reached, mut nth, mut failed) = (true, 1, 0);
        while reached {
            let fake = Fake::new();
            let mut rig = Rig::with(fake.clone(), "Null", Reactions::default()).brought_to(phase);
            let before = fake.calls().len();
            fake.fail_nth(nth);
            let outcome = rig.ask("vm.snapshot");
            fake.heal();
            let calls = fake.calls();
            reached = calls.len() - before >= nth;
            nth += 1;
            if calls.get(before + nth - 2) == Some(&"KVM_RUN") {
                // The guest crashes, whether it is saved or not.
                continue;
            }
            if let Err(error) = outcome {
                assert_eq!(error.code, Code::SnapshotFailed, "call {nth}: {error}");
                assert!(error.causes.len() > 1, "it says why: {error}");
                let left = std::fs::read_dir(rig.folder.path()).unwrap().flatten();
                let left: Vec<_> = left
                    .map(|entry| entry.file_name())
                    .filter(|name| name.to_string_lossy().starts_with("snapshot-"))
                    .collect();
                assert!(left.is_empty(), "call {nth}: {left:?}");
                failed += 1;
            }
            assert_eq!(rig.vmm.phase(), phase, "call {nth}");
            rig.ask("vm.snapshot").unwrap();
            rig.ask(if phase == Phase::Paused { "vm.resume" } else { "vm.pause" }).unwrap();
        }
        assert!(failed > 3, "{failed} of {nth} calls in {phase} can fail");
    }
}

/// The same of a restore: there is no VM, and nothing of it.
#[test]
fn a_restore_that_fails_leaves_nothing() {
    let fake = Fake::new();
    let mut rig = Rig::with(fake.clone(), "Null", Reactions::default());
    rig.save();
    assert_eq!(fake.live(), Live::default());
    let (mut reached, mut nth, mut failed) = (true, 1, 0);
    while reached {
        let before = fake.calls().len();
        fake.fail_nth(nth);
        let outcome = rig.ask("vm.restore");
        fake.heal();
        reached = fake.calls().len() - before >= nth;
        if let Err(error) = outcome {
            assert_eq!(error.code, Code::RestoreFailed, "call {nth}: {error}");
            assert_eq!(rig.vmm.phase(), Phase::Empty, "call {nth}");
            assert_eq!(fake.live(), Live::default(), "call {nth}");
            failed += 1;
        } else {
            assert_eq!(rig.vmm.phase(), Phase::Paused, "call {nth}");
            rig.ask("vm.delete").unwrap();
        }
        nth += 1;
    }
    assert!(failed > 10, "{failed} of {nth} calls can fail");
    rig.ask("vm.restore").unwrap();
    rig.ask("vm.resume").unwrap();
}

#[test]
fn what_waits_for_a_snapshot_is_carried_out_in_order_after_it() {
    let mut rig = Rig::in_phase(Phase::Paused);
    let names = ["vm.snapshot", "vm.resume", "vm.snapshot", "vm.pause", "vm.resume", "vm.delete"];
    let outcomes = names.map(|name| rig.begin(name));
    assert_eq!(rig.vmm.phase(), Phase::Saving);
    for (name, outcome) in names.iter().zip(&outcomes) {
        rig.wait(outcome).unwrap_or_else(|error| panic!("{name}: {error}"));
    }
    assert_eq!(rig.vmm.phase(), Phase::Empty);
}

#[test]
fn the_end_of_the_vmm_does_not_wait_for_a_snapshot() {
    for phase in [Phase::Paused, Phase::Running] {
        let mut rig = Rig::in_phase(phase);
        let snapshot = rig.begin("vm.snapshot");
        let (waiting, cancel) = (rig.begin("vm.resume"), rig.begin("vm.cancel"));
        rig.ask("vmm.shutdown").unwrap();
        match rig.wait(&snapshot) {
            // It was written already.
            Ok(_) => assert_eq!(phase, Phase::Paused),
            Err(error) => assert_eq!(error.code, Code::Cancelled),
        }
        rig.wait(&cancel).unwrap();
        rig.wait(&waiting).unwrap_err();
        assert!(rig.vmm.ending().is_some());
    }
}

/// A snapshot of that moment would have nothing to go on with.
#[test]
fn a_guest_that_ends_while_it_is_saved_cancels_that_and_ends() {
    let reactions = reactions(GuestEvent::Reset, Reaction::Stop);
    let mut rig = Rig::with(Fake::new(), "Null", reactions).brought_to(Phase::Running);
    let snapshot = rig.begin("vm.snapshot");
    rig.guest_does(GuestEvent::Reset);
    assert_eq!(rig.vmm.phase(), Phase::Saving, "not before the snapshot's end");
    let error = rig.wait(&snapshot).unwrap_err();
    assert_eq!(error.code, Code::Cancelled);
    assert!(error.to_string().contains("the guest has ended: reset"), "{error}");
    assert_eq!(rig.vmm.phase(), Phase::Shutdown);

    // One that did so before it was paused is not saved.
    let mut rig = Rig::with(Fake::new(), "Null", reactions).brought_to(Phase::Paused);
    rig.guest_does(GuestEvent::Reset);
    assert_eq!(rig.ask("vm.snapshot").unwrap_err().code, Code::Cancelled);
    assert_eq!(rig.vmm.phase(), Phase::Paused);
    rig.ask("vm.resume").unwrap();
    assert_eq!(rig.vmm.phase(), Phase::Shutdown);
}
