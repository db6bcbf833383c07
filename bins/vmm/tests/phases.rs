//! The control thread's state against the table of `vmm-state`, on the scripted hypervisor.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]

use std::cell::RefCell;
use std::sync::{Arc, mpsc};

use serde_json::{Value, json};
use tempfile::NamedTempFile;
use vmm::machine::MachineEvent;
use vmm::sandbox::{PathPolicy, Sandbox};
use vmm::vmm::SaveStep;
use vmm_api::command::Host;
use vmm_api::error::Code;
use vmm_device_model::thread::ThreadKind;
use vmm_hypervisor::fake::{Exit, Fake, Live};
use vmm_platform_devices::serial::COM1_PORT;
use vmm_state::{
    ACTIONS, Action, Cell, EventCell, GUEST_EVENTS, GuestEvent, Phase, Reaction, Reactions, Reason,
};
use vmm_tests::harness::{LIMIT, UNBOOTABLE, wait_until};
use vmm_tests::tiny::Guest;
use vmm_virtio_devices::block;

use rig::Rig;
use rig::doorman::Doorman;

mod rig;

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
        // It is not in doubt where the VM is.
        || matches!(action, Action::MigrationKeep | Action::MigrationYield)
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
    let edit = rig.begin("vm.add-disk");
    assert_eq!(rig.wait(&boot).unwrap_err().code, Code::BootFailed);
    assert_eq!(rig.wait(&pause).unwrap_err().code, Code::WrongPhase);
    rig.wait(&edit).unwrap();
    assert_eq!(rig.vmm.phase(), Phase::Created);
}

/// Who gives it up is answered when what it made is gone, and the VM is where it was.
#[test]
fn a_boot_is_given_up_by_a_client() {
    for (name, code) in [("vm.cancel", Code::Cancelled), ("vm.delete", Code::BootFailed)] {
        for from in [Phase::Created, Phase::Shutdown, Phase::Running] {
            let fake = Fake::new();
            let mut rig = Rig::with(fake.clone(), "Null", Reactions::default()).brought_to(from);
            let before = rig.told("vm/boot-failed");
            let boot = rig.begin(if from == Phase::Running { "vm.reboot" } else { "vm.boot" });
            let waiting = rig.begin("vm.resume");
            let giver = rig.begin(name);
            // At once: nothing of the thread is looked at.
            assert_eq!(boot.try_recv().unwrap().unwrap_err().code, code, "{name} from {from}");
            let off = if from == Phase::Running { Phase::Shutdown } else { from };
            let after = if name == "vm.delete" { Phase::Empty } else { off };
            assert_eq!(rig.vmm.phase(), after, "{name} from {from}");
            waiting.try_recv().unwrap().unwrap_err();
            rig.wait(&giver).unwrap();
            assert_eq!(fake.live(), Live::default(), "{name} from {from}");
            assert_eq!(rig.told("vm/boot-failed"), before + 1, "{name} from {from}");
            rig.pump();
            assert_eq!(rig.vmm.phase(), after, "{name} from {from}: what was made late is nobody's");
            if after == Phase::Empty {
                rig.ask("vm.create").unwrap();
            }
            rig.ask("vm.boot").unwrap();
        }
    }
}

/// The same of a restore, from which there is no VM.
#[test]
fn a_restore_is_given_up_by_a_client() {
    for (name, code) in [("vm.cancel", Code::Cancelled), ("vm.delete", Code::RestoreFailed)] {
        let fake = Fake::new();
        let mut rig = Rig::with(fake.clone(), "Null", Reactions::default());
        rig.save();
        let restore = rig.begin("vm.restore");
        let giver = rig.begin(name);
        assert_eq!(restore.try_recv().unwrap().unwrap_err().code, code, "{name}");
        assert_eq!(rig.vmm.phase(), Phase::Empty, "{name}");
        rig.wait(&giver).unwrap();
        assert_eq!((fake.live(), rig.told("vm/restore-failed")), (Live::default(), 1), "{name}");
        rig.ask("vm.restore").unwrap();
        assert_eq!(rig.vmm.phase(), Phase::Paused);
    }
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
        let fake = Fake::new();
        let ready = || Rig::with(fake.clone(), "Null", Reactions::default()).brought_to(phase);
        let calls = fake.fail_each(
            ready,
            |rig| rig.ask(name),
            |failed, mut rig, outcome| {
                outcome.unwrap();
                let off = if name == "vm.delete" { Phase::Empty } else { Phase::Shutdown };
                assert_eq!(rig.vmm.phase(), off, "{name} in {phase}, {failed:?} failed");
                if off == Phase::Empty {
                    rig.ask("vm.create").unwrap();
                }
                rig.ask("vm.boot").unwrap();
            },
        );
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
        let (fake, mut noticed) = (Fake::new(), 0);
        let ready = || Rig::with(fake.clone(), "Null", Reactions::default()).brought_to(phase);
        fake.fail_each(
            ready,
            |rig| rig.ask("vm.snapshot"),
            |failed, mut rig, outcome| {
                if failed == Some("KVM_RUN") {
                    // The guest crashes, whether it is saved or not.
                    return;
                }
                if let Err(error) = outcome {
                    assert_eq!(error.code, Code::SnapshotFailed, "{failed:?}: {error}");
                    assert!(error.causes.len() > 1, "it says why: {error}");
                    let left = std::fs::read_dir(rig.folder.path()).unwrap().flatten();
                    let left: Vec<_> = left
                        .map(|entry| entry.file_name())
                        .filter(|name| name.to_string_lossy().starts_with("snapshot-"))
                        .collect();
                    assert!(left.is_empty(), "{failed:?}: {left:?}");
                    noticed += 1;
                }
                assert_eq!(rig.vmm.phase(), phase, "{failed:?}");
                rig.ask("vm.snapshot").unwrap();
                rig.ask(if phase == Phase::Paused { "vm.resume" } else { "vm.pause" }).unwrap();
            },
        );
        assert!(noticed > 3, "{noticed} calls in {phase} can fail");
    }
}

/// The same of a restore: there is no VM, and nothing of it.
#[test]
fn a_restore_that_fails_leaves_nothing() {
    let fake = Fake::new();
    let mut rig = Rig::with(fake.clone(), "Null", Reactions::default());
    rig.save();
    assert_eq!(fake.live(), Live::default());
    let rig = RefCell::new(rig);
    let mut noticed = 0;
    fake.fail_each(
        || (),
        |()| rig.borrow_mut().ask("vm.restore"),
        |failed, (), outcome| {
            let mut rig = rig.borrow_mut();
            if let Err(error) = outcome {
                assert_eq!(error.code, Code::RestoreFailed, "{failed:?}: {error}");
                assert_eq!((rig.vmm.phase(), fake.live()), (Phase::Empty, Live::default()), "{failed:?}");
                noticed += 1;
            } else {
                assert_eq!(rig.vmm.phase(), Phase::Paused, "{failed:?}");
                rig.ask("vm.delete").unwrap();
            }
        },
    );
    assert!(noticed > 10, "{noticed} calls can fail");
    let mut rig = rig.into_inner();
    rig.ask("vm.restore").unwrap();
    rig.ask("vm.resume").unwrap();
}

/// A VM whose memory is a private mapping of a file, which cannot be frozen.
fn saved_in_passes(vm: &mut Value) -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(16 << 20).unwrap();
    vm["memory"] = json!({ "size": 0, "zones": [{ "id": "z", "size": 16 << 20, "file": file.path() }] });
    file
}

/// Whatever the thread that writes it waits for.
#[test]
fn a_snapshot_that_is_cancelled_while_the_guest_stands_still_lets_it_run_on() {
    let fake = Fake::new();
    let mut rig = Rig::with(fake.clone(), "Null", Reactions::default());
    let mut vm = rig.requests().vm;
    let _file = saved_in_passes(&mut vm);
    let created = rig.begin_with("vm.create", vm.to_string().into_bytes());
    rig.wait(&created).unwrap();
    rig.ask("vm.boot").unwrap();
    let outcome = rig.begin("vm.snapshot");
    rig.pump_until(|event| matches!(event, MachineEvent::Save(step) if matches!(**step, SaveStep::Still)));
    let before = fake.answers().len();
    fake.script(0, [Exit::PioRead { port: COM1_PORT, size: 1, count: 1 }]);
    assert_eq!(fake.answers().len(), before, "it stands still");
    let cancelled = rig.begin("vm.cancel");
    // Nothing that the thread says is heard meanwhile.
    wait_until(LIMIT, || (fake.answers().len() > before).then_some(()), || "the guest".to_owned());
    // It may have come too late.
    assert_eq!(rig.wait(&cancelled).is_ok(), rig.wait(&outcome).is_err());
    assert_eq!(rig.vmm.phase(), Phase::Running);
}

/// The guest is stopped for its snapshot, which fails, and then the thread of its disk cannot begin.
#[test]
fn a_guest_that_cannot_run_on_after_a_snapshot_that_fails_is_paused() {
    for (in_passes, fault) in
        [(false, "thread"), (false, "writer's thread"), (false, "state"), (true, "state")]
    {
        let (fake, doorman) = (Fake::new(), Arc::new(Doorman::default()));
        let sandbox = Sandbox::new(Arc::clone(&doorman) as _, PathPolicy::Never);
        let mut rig = Rig::with(fake.clone(), "Null", Reactions::default()).confined(sandbox);
        let mut vm = rig.requests().vm;
        let _file = in_passes.then(|| saved_in_passes(&mut vm));
        let created = rig.begin_with("vm.create", vm.to_string().into_bytes());
        rig.wait(&created).unwrap();
        rig.ask("vm.boot").unwrap();
        rig.drive_the_disk(&fake);

        match fault {
            "thread" => doorman.refuse(ThreadKind("snapshot"), 1),
            // The one before serves faults.
            "writer's thread" => doorman.refuse(ThreadKind("snapshot"), 2),
            _ => fake.fail_nth_of("KVM_GET_REGS", 1),
        }
        doorman.refuse(block::THREAD, 1);
        let error = rig.ask("vm.snapshot").unwrap_err();
        let about = format!("in passes: {in_passes}, {fault}: {error}");
        assert!(doorman.relent(), "{about}");
        assert_eq!(error.code, Code::SnapshotFailed, "{about}");
        let cause = if fault.ends_with("thread") { "the snapshot's thread" } else { "KVM_GET_REGS" };
        assert!(about.contains(cause) && about.contains("stays paused"), "{about}");
        assert!(about.contains("cannot resume device \"_disk0\""), "{about}");
        assert_eq!(rig.vmm.phase(), Phase::Paused, "{about}");
        assert_eq!((rig.info()["state"].as_str(), rig.told("vm/paused")), (Some("Paused"), 1), "{about}");

        rig.ask("vm.resume").unwrap();
        assert_eq!(rig.vmm.phase(), Phase::Running, "{about}");
        rig.ask("vm.snapshot").unwrap();
        assert_eq!(rig.vmm.phase(), Phase::Running, "{about}");
    }
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
