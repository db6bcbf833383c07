//! The life cycle where several things happen at once, and what follows a guest's events, in the real binary.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]

use std::fs;
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};
use vmm_state::Phase;
use vmm_tests::harness::{
    Api, LIMIT, Pending, Scratch, SerialFile, Vmm, vm_arguments, vm_config, wait_until,
};
use vmm_tests::tiny::Guest;

/// MiB that are touched in a boot that lasts long enough to be met.
const SLOW_MIB: u64 = 512;

/// A VMM with `flags`, and a VM of `guest` that was created.
fn created_with(scratch: &Scratch, guest: Guest, flags: &[&str]) -> (Vmm, SerialFile) {
    let vmm = Vmm::with_api(scratch, flags);
    let serial = SerialFile::new(scratch.path("serial"));
    vmm.api().create(&vm_config(&scratch.guest(guest), serial.path()));
    (vmm, serial)
}

/// A VM whose boots last.
fn slow(scratch: &Scratch, guest: Guest) -> (Vmm, SerialFile) {
    let vmm = Vmm::with_api(scratch, [""; 0]);
    let serial = SerialFile::new(scratch.path("serial"));
    vmm.api().create(&slow_config(scratch, guest, &serial));
    (vmm, serial)
}

fn slow_config(scratch: &Scratch, guest: Guest, serial: &SerialFile) -> Value {
    let mut config = vm_config(&scratch.guest(guest), serial.path());
    config["memory"] = json!({ "size": SLOW_MIB << 20, "prefault": true });
    config
}

/// Sends a request and waits until the boot that it leads to is under way. On a machine that stops for long it may be over already:
/// what the tests expect holds then, too.
fn begin_boot(vmm: &Vmm, name: &str) -> Pending {
    let mut pending = vmm.begin(name);
    let mut api = vmm.api();
    let mut seen = |pending: &mut Pending| api.phase() == Phase::Booting || pending.is_answered();
    wait_until(LIMIT, || seen(&mut pending).then_some(()), || "a boot".to_owned());
    pending
}

/// The statuses of two answers, in order.
fn statuses(mut pending: [Pending; 2]) -> [u16; 2] {
    let mut statuses = pending.each_mut().map(|pending| pending.answer().status);
    statuses.sort_unstable();
    statuses
}

fn boots(api: &mut Api) -> u64 {
    api.get("vm.info").json()["boots"].as_u64().unwrap()
}

#[test]
fn of_two_clients_one_wins_and_the_other_is_told_why_not() {
    let scratch = Scratch::new();
    let vmm = Vmm::with_api(&scratch, [""; 0]);
    let serial = scratch.path("serial");
    let config = vm_config(&scratch.guest(Guest::Halt), &serial).to_string();
    let mut api = vmm.api();
    for round in 0..20 {
        let create = || Pending::send(vmm.socket(), "vm.create", config.as_bytes());
        assert_eq!(statuses([create(), create()]), [204, 409], "vm.create, round {round}");
        for (name, phase) in [
            ("vm.boot", Phase::Running),
            ("vm.pause", Phase::Paused),
            ("vm.resume", Phase::Running),
            ("vm.shutdown", Phase::Shutdown),
        ] {
            assert_eq!(statuses([vmm.begin(name), vmm.begin(name)]), [204, 409], "{name}, round {round}");
            assert_eq!(api.phase(), phase, "{name}, round {round}");
        }
        // It is done either way.
        assert_eq!(statuses([vmm.begin("vm.delete"), vmm.begin("vm.delete")]), [204, 204]);
    }
}

#[test]
fn of_two_clients_that_boot_slowly_one_wins() {
    let scratch = Scratch::new();
    let (vmm, serial) = slow(&scratch, Guest::Halt);
    let first = begin_boot(&vmm, "vm.boot");
    let second = vmm.begin("vm.boot");
    assert_eq!(statuses([first, second]), [204, 409]);
    assert_eq!(boots(&mut vmm.api()), 1);
    serial.wait_for("halted");
}

#[test]
fn a_client_that_leaves_in_the_middle_of_its_boot_changes_nothing() {
    let scratch = Scratch::new();
    let (vmm, serial) = slow(&scratch, Guest::Halt);
    let waiting = begin_boot(&vmm, "vm.boot");
    let pause = vmm.begin("vm.pause");
    drop((waiting, pause));
    // The pause that nobody waits for any more is carried out, too.
    vmm.api().wait_for(Phase::Paused);
    vmm.api().puts(&["vm.resume"]);
    serial.wait_for("halted");
}

#[test]
fn a_command_during_a_reboot_waits_and_is_served() {
    let scratch = Scratch::new();
    let (vmm, serial) = slow(&scratch, Guest::Halt);
    let mut api = vmm.api();
    api.puts(&["vm.boot"]);
    serial.wait_for("halted");
    let mut reboot = begin_boot(&vmm, "vm.reboot");
    let mut pause = vmm.begin("vm.pause");
    assert_eq!(api.get("vmm.ping").status, 200, "others are served meanwhile");
    assert_eq!((reboot.answer().status, pause.answer().status), (204, 204));
    assert_eq!((api.phase(), boots(&mut api)), (Phase::Paused, 2));
}

/// It looks at the image that the boot is about to lock.
#[test]
fn a_validation_stands_in_no_boots_way() {
    let scratch = Scratch::new();
    let vmm = Vmm::with_api(&scratch, [""; 0]);
    let serial = SerialFile::new(scratch.path("serial"));
    let mut config = vm_config(&scratch.guest(Guest::Halt), serial.path());
    config["disks"] = json!([{ "path": scratch.disk("disk", 1 << 20), "image_type": "Raw" }]);
    let mut api = vmm.api();
    api.create(&config);
    let body = config.to_string();
    for round in 0..100 {
        let mut looks: Vec<_> =
            (0..3).map(|_| Pending::send(vmm.socket(), "vm.validate", body.as_bytes())).collect();
        let booted = api.put("vm.boot");
        assert_eq!(booted.status, 204, "round {round}: {booted:?}");
        looks.iter_mut().for_each(|look| assert_eq!(look.answer().status, 200));
        api.puts(&["vm.shutdown"]);
    }
}

/// All memory was touched, so that it takes its time to go; how long is the host's, so it is tried until it is seen.
#[test]
fn clients_are_served_while_a_vm_is_switched_off() {
    let scratch = Scratch::new();
    let (vmm, serial) = slow(&scratch, Guest::Halt);
    let mut api = vmm.api();
    for (name, phase) in [("vm.shutdown", Phase::Shutdown), ("vm.delete", Phase::Empty)] {
        let seen = (0..20).any(|_| {
            if api.phase() == Phase::Empty {
                api.create(&slow_config(&scratch, Guest::Halt, &serial));
            }
            api.puts(&["vm.boot"]);
            let served = served_during(&mut api, vmm.begin(name));
            assert_eq!(api.phase(), phase);
            served > 0
        });
        assert!(seen, "no request was answered before {name}");
    }
    serial.wait_for("halted");
}

/// How many requests are answered before the one of `pending`, which succeeds.
fn served_during(api: &mut Api, mut pending: Pending) -> usize {
    let mut served = 0;
    loop {
        assert_eq!(api.get("vmm.ping").status, 200);
        if pending.is_answered() {
            assert_eq!(pending.answer().status, 204);
            return served;
        }
        served += 1;
    }
}

#[test]
fn what_waits_for_a_boot_that_fails_is_answered_and_a_retry_works() {
    let scratch = Scratch::new();
    let (vmm, serial) = slow(&scratch, Guest::Halt);
    let (kernel, hidden) = (scratch.path(Guest::Halt.name()), scratch.path("hidden"));
    fs::rename(&kernel, &hidden).unwrap();
    for _ in 0..2 {
        let mut boot = begin_boot(&vmm, "vm.boot");
        let mut pause = vmm.begin("vm.pause");
        assert_eq!((boot.answer().status, pause.answer().status), (500, 409));
        assert_eq!(vmm.api().phase(), Phase::Created);
    }
    fs::rename(&hidden, &kernel).unwrap();
    vmm.api().puts(&["vm.boot"]);
    serial.wait_for("halted");
    assert_eq!(boots(&mut vmm.api()), 1);
}

/// The guest resets all the time, so that pauses meet resets at every moment.
#[test]
fn a_reset_during_a_pause_happens_after_the_resume() {
    let scratch = Scratch::new();
    let (vmm, _) = created_with(&scratch, Guest::Reset, &[]);
    let mut api = vmm.api();
    api.puts(&["vm.boot"]);
    for round in 0..50 {
        api.puts(&["vm.pause"]);
        let before = boots(&mut api);
        thread::sleep(Duration::from_millis(10));
        assert_eq!((api.phase(), boots(&mut api)), (Phase::Paused, before), "round {round}");
        api.puts(&["vm.resume"]);
        wait_until(LIMIT, || (boots(&mut api) > before).then_some(()), || "a reset".to_owned());
    }
}

/// Boots `guest` under a VMM with `flags`; the VM is switched off, and the VMM stays.
fn stays(guest: Guest, flags: &[&str], text: &str, event: &str) {
    let scratch = Scratch::new();
    let (mut vmm, serial) = created_with(&scratch, guest, flags);
    let mut api = vmm.api();
    for boot in 1..=2 {
        api.puts(&["vm.boot"]);
        api.wait_for(Phase::Shutdown);
        let info = api.get("vm.info").json();
        assert_eq!((&info["last_guest_event"], &info["boots"]), (&event.into(), &boot.into()), "{flags:?}");
    }
    serial.wait_for(text);
    assert!(serial.text().starts_with(text), "{flags:?}: {}", serial.text());
    api.puts(&["vm.delete", "vmm.shutdown"]);
    vmm.expect_exit(0);
}

#[test]
fn a_vm_that_its_guest_has_ended_stays_where_the_flags_say_so() {
    stays(Guest::Reset, &["--on-reboot", "stop"], "boot\n", "reset");
    stays(Guest::TripleFault, &["--on-reboot", "stop"], "fault\n", "triple-fault");
    stays(Guest::Hello, &["--on-shutdown", "stop"], "hello \n", "shutdown");
    stays(Guest::Hello, &["--no-shutdown"], "hello \n", "shutdown");
    stays(Guest::Crash, &["--on-crash", "stop"], "crash\n", "crash");
}

#[test]
fn the_vmm_ends_where_the_flags_say_so_with_the_status_of_the_event() {
    for (guest, flags, code) in [
        (Guest::Reset, ["--on-reboot", "exit"], 0),
        (Guest::TripleFault, ["--on-reboot", "exit"], 0),
        (Guest::Hello, ["--on-shutdown", "exit"], 0),
        (Guest::Crash, ["--on-crash", "exit"], 10),
    ] {
        let scratch = Scratch::new();
        let (mut vmm, _) = created_with(&scratch, guest, &flags);
        // The guest may end the process before the answer is out.
        drop(vmm.begin("vm.boot"));
        vmm.expect_exit(code);
        let arguments = vm_arguments(&scratch.guest(guest), "null");
        let mut alone = Vmm::spawn(arguments.iter().map(String::as_str).chain(flags));
        alone.expect_exit(code);
    }
}

/// Reactions that are the default are not the only ones that restart.
#[test]
fn a_guest_boots_again_where_the_flags_say_so() {
    for guest in [Guest::Reset, Guest::TripleFault] {
        let scratch = Scratch::new();
        let (vmm, _) = created_with(&scratch, guest, &["--on-reboot", "restart"]);
        let mut api = vmm.api();
        api.puts(&["vm.boot"]);
        wait_until(LIMIT, || (boots(&mut api) >= 5).then_some(()), || format!("five boots of {guest:?}"));
    }
}

/// A VM that is switched off keeps the process, whoever could still ask it for something.
#[test]
fn without_clients_a_vm_that_stays_ends_by_a_signal() {
    let scratch = Scratch::new();
    let mut arguments = vm_arguments(&scratch.guest(Guest::Hello), "tty");
    arguments.push("--no-shutdown".to_owned());
    let mut vmm = Vmm::spawn(arguments);
    vmm.stdout.wait_for("hello \n");
    thread::sleep(Duration::from_millis(100));
    assert!(vmm.is_running());
    vmm.signal("TERM");
    vmm.expect_exit(0);
}
