//! Tiny guests in the real binary: its life by command line and by API. They run on any KVM.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::thread;
use std::time::Duration;

use serde_json::json;
use vmm_tests::harness::{LIMIT, Scratch, SerialFile, Vmm, vm_arguments, vm_config, wait_until};
use vmm_tests::tiny::{self, Guest};

/// Starts `guest` by the command line with its serial port on standard output, and `more` arguments.
fn run(scratch: &Scratch, guest: Guest, more: &[&str]) -> Vmm {
    let mut arguments = vm_arguments(&scratch.guest(guest), "tty");
    arguments.extend(more.iter().map(|word| (*word).to_owned()));
    Vmm::spawn(arguments)
}

/// A VMM with an API and, created but not booted, a VM of `guest`, whose serial port is the file.
fn created(scratch: &Scratch, guest: Guest) -> (Vmm, SerialFile) {
    created_by(Vmm::with_api(scratch, [""; 0]), scratch, guest)
}

fn created_by(vmm: Vmm, scratch: &Scratch, guest: Guest) -> (Vmm, SerialFile) {
    let serial = SerialFile::new(scratch.path("serial"));
    vmm.api().create(&vm_config(&scratch.guest(guest), serial.path()));
    (vmm, serial)
}

#[test]
fn the_command_line_boots_a_guest_that_powers_off() {
    let scratch = Scratch::new();
    let mut vmm = run(&scratch, Guest::Hello, &["--cmdline", "from the command line"]);
    vmm.expect_exit(0);
    assert_eq!(vmm.stdout.text(), "hello from the command line\n");
    assert_eq!(vmm.stderr.text(), "", "nothing to warn of");
}

#[test]
fn the_command_line_boots_a_bzimage() {
    let scratch = Scratch::new();
    let mut arguments = vm_arguments(&scratch.write("bzImage", tiny::bzimage()), "tty");
    arguments.extend(["--cmdline", "a b"].map(str::to_owned));
    let mut vmm = Vmm::spawn(arguments);
    vmm.expect_exit(0);
    assert_eq!(vmm.stdout.text(), "linux a b\n");
}

#[test]
fn the_serial_port_and_the_debug_console_write_files() {
    let scratch = Scratch::new();
    let (serial, debug) = (scratch.path("serial"), scratch.path("debug"));
    let kernel = scratch.guest(Guest::Hello);
    let mut vmm = Vmm::spawn(vm_arguments(&kernel, &format!("file={}", serial.display())));
    vmm.expect_exit(0);
    assert_eq!(fs::read_to_string(&serial).unwrap(), "hello \n");

    let to_file = format!("file={}", debug.display());
    run(&scratch, Guest::DebugConsole, &["--debug-console", &to_file]).expect_exit(0);
    assert_eq!(fs::read_to_string(&debug).unwrap(), "debug console\n");
    // Without the device nobody is at the port.
    let mut vmm = run(&scratch, Guest::DebugConsole, &[]);
    vmm.expect_exit(0);
    assert_eq!(vmm.stdout.text(), "");
}

#[test]
fn one_vm_lives_its_whole_life_by_the_api_alone() {
    let scratch = Scratch::new();
    let (mut vmm, serial) = created(&scratch, Guest::Ticker);
    let mut api = vmm.api();
    let ping = api.get("vmm.ping").json();
    assert_eq!(ping["pid"], vmm.pid());
    assert!(ping["version"].as_str().is_some_and(|version| !version.is_empty()), "{ping}");

    assert_eq!(api.state(), "Created");
    api.puts(&["vm.boot"]);
    assert_eq!(api.state(), "Running");
    serial.wait_for("00000002\n");
    api.puts(&["vm.pause"]);
    assert_eq!(api.state(), "Paused");
    api.puts(&["vm.resume"]);
    serial.wait_longer_than(serial.text().len());

    api.puts(&["vm.reboot"]);
    assert_eq!(api.state(), "Running");
    wait_until(LIMIT, || (boots(&serial.text()) == 2).then_some(()), || "the second boot".to_owned());

    api.puts(&["vm.shutdown"]);
    assert_eq!(api.state(), "Shutdown");
    api.puts(&["vm.boot"]);
    wait_until(LIMIT, || (boots(&serial.text()) == 3).then_some(()), || "the third boot".to_owned());

    // A paused VM is resumed by vm.boot, too, and may be rebooted and switched off.
    api.puts(&["vm.pause", "vm.boot", "vm.pause", "vm.reboot"]);
    assert_eq!(api.state(), "Running");
    api.puts(&["vm.pause", "vm.shutdown", "vm.delete"]);
    assert_eq!(api.get("vm.info").status, 404);
    assert!(vmm.is_running());
    api.puts(&["vmm.shutdown"]);
    vmm.expect_exit(0);
    assert!(!vmm.socket().exists(), "the socket file goes with the process");
}

/// How often a ticker began to count. The end of a boot may have cut a line.
fn boots(ticks: &str) -> usize {
    ticks.matches("00000000\n").count()
}

#[test]
fn what_the_phase_does_not_allow_is_refused_and_changes_nothing() {
    let scratch = Scratch::new();
    let vmm = Vmm::with_api(&scratch, [""; 0]);
    let mut api = vmm.api();
    let mut refused = |phase: &str, status: u16, names: &[&str]| {
        for name in names {
            let answer = api.put(name);
            assert_eq!(answer.status, status, "{name} in {phase}: {answer:?}");
        }
    };
    refused("Empty", 404, &["vm.boot", "vm.shutdown", "vm.reboot", "vm.pause", "vm.resume"]);
    refused("Empty", 204, &["vm.delete"]);

    let serial = SerialFile::new(scratch.path("serial"));
    let config = vm_config(&scratch.guest(Guest::Ticker), serial.path());
    vmm.api().create(&config);
    refused("Created", 409, &["vm.shutdown", "vm.reboot", "vm.pause", "vm.resume"]);
    assert_eq!(vmm.api().try_create(&config).status, 409);
    vmm.api().puts(&["vm.boot"]);
    refused("Running", 409, &["vm.boot", "vm.resume"]);
    assert_eq!(vmm.api().state(), "Running");
    serial.wait_for("00000001\n");
    vmm.api().puts(&["vm.pause"]);
    refused("Paused", 409, &["vm.pause"]);
    vmm.api().puts(&["vm.resume"]);
    serial.wait_longer_than(serial.text().len());
    assert_eq!(boots(&serial.text()), 1, "one boot, and nothing else happened");
}

#[test]
fn info_tells_the_configuration_and_the_devices() {
    let scratch = Scratch::new();
    let vmm = Vmm::with_api(&scratch, [""; 0]);
    let serial = SerialFile::new(scratch.path("serial"));
    let mut config = vm_config(&scratch.guest(Guest::Halt), serial.path());
    config["disks"] = json!([{ "path": scratch.disk("disk", 1 << 20), "image_type": "Raw", "id": "data" }]);
    let mut api = vmm.api();
    api.create(&config);
    assert_eq!(api.info().device_tree, None, "there is no machine yet");
    api.puts(&["vm.boot"]);
    serial.wait_for("halted");
    let info = api.info();
    assert_eq!(info.memory_actual_size, 32 << 20);
    assert_eq!(info.config.disks.as_ref().map(Vec::len), Some(1));
    let tree = info.device_tree.unwrap();
    assert!(tree.contains_key("_serial"), "{:?}", tree.keys());
    assert!(tree["data"].pci_bdf.is_some(), "{:?}", tree["data"]);
    assert_eq!(api.info().config, info.config, "asking changes nothing");
}

#[test]
fn a_guest_that_powers_off_ends_the_vmm_with_0_whoever_booted_it() {
    let scratch = Scratch::new();
    let (mut vmm, serial) = created(&scratch, Guest::Hello);
    vmm.api().puts(&["vm.boot"]);
    vmm.expect_exit(0);
    assert_eq!(serial.text(), "hello \n");
    assert!(!vmm.socket().exists());
}

#[test]
fn a_guest_that_resets_boots_again() {
    for guest in [Guest::Reset, Guest::I8042Reset, Guest::BiosReset] {
        let scratch = Scratch::new();
        let mut vmm = run(&scratch, guest, &[]);
        vmm.stdout.wait_for("boot\nboot\nboot\n");
        assert!(vmm.is_running(), "{guest:?}");
    }
}

#[test]
fn a_guest_that_takes_a_triple_fault_boots_again() {
    let scratch = Scratch::new();
    let mut vmm = run(&scratch, Guest::TripleFault, &[]);
    vmm.stdout.wait_for("fault\nfault\nfault\n");
    vmm.stderr.wait_for("triple fault");
    assert!(vmm.is_running());
}

#[test]
fn a_guest_that_no_kvm_can_run_on_ends_the_vmm_with_10() {
    let scratch = Scratch::new();
    let mut vmm = run(&scratch, Guest::Crash, &[]);
    vmm.expect_exit(10);
    assert_eq!(vmm.stdout.text(), "crash\n");
    assert!(vmm.stderr.text().contains("vcpu0"), "{}", vmm.stderr.text());
}

#[test]
fn a_guest_reports_its_panic() {
    let scratch = Scratch::new();
    let vmm = run(&scratch, Guest::Panic, &["--pvpanic"]);
    vmm.stdout.wait_for("panicked\n");
    vmm.stderr.wait_for("kernel panic");
    let mut vmm = run(&scratch, Guest::Panic, &[]);
    vmm.expect_exit(0);
    assert_eq!(vmm.stdout.text(), "no pvpanic\n");
}

#[test]
fn standard_input_reaches_the_guest() {
    let scratch = Scratch::new();
    let mut vmm = run(&scratch, Guest::Echo, &[]);
    vmm.stdout.wait_for("ready\n");
    vmm.type_in("abc");
    vmm.stdout.wait_for("ready\nabc");
    vmm.type_in("defq");
    vmm.expect_exit(0);
    assert_eq!(vmm.stdout.text(), "ready\nabcdefq\n");
}

#[test]
fn the_end_of_standard_input_ends_nothing() {
    let scratch = Scratch::new();
    let mut vmm = run(&scratch, Guest::Ticker, &[]);
    vmm.close_stdin();
    let seen = vmm.stdout.text().len();
    wait_until(LIMIT, || (vmm.stdout.text().len() > seen + 100).then_some(()), || "ticks".to_owned());
    vmm.signal("TERM");
    vmm.expect_exit(0);
}

#[test]
fn more_input_than_the_port_holds_arrives_whole() {
    let scratch = Scratch::new();
    let mut vmm = run(&scratch, Guest::Echo, &[]);
    vmm.stdout.wait_for("ready\n");
    let text: String = (0..2000).map(|n| format!("{n:04};")).collect();
    vmm.type_in(&text);
    vmm.type_in("q");
    vmm.expect_exit(0);
    assert_eq!(vmm.stdout.text(), format!("ready\n{text}q\n"));
}

#[test]
fn a_pty_reaches_the_guest_and_survives_who_hangs_up() {
    let scratch = Scratch::new();
    let mut vmm = Vmm::with_api(&scratch, [""; 0]);
    let mut config = vm_config(&scratch.guest(Guest::Echo), &scratch.path("unused"));
    config["serial"] = json!({ "mode": "Pty" });
    let mut api = vmm.api();
    api.create(&config);
    api.puts(&["vm.boot"]);
    let info = api.get("vm.info").json();
    let path = info["config"]["serial"]["file"].as_str().unwrap().to_owned();
    assert!(path.starts_with("/dev/pts/"), "{path}");
    let attach = || OpenOptions::new().read(true).write(true).open(&path).unwrap();

    let mut terminal = attach();
    read_until(&mut terminal, "ready");
    terminal.write_all(b"abc").unwrap();
    read_until(&mut terminal, "abc");
    drop(terminal);
    let mut terminal = attach();
    terminal.write_all(b"def").unwrap();
    read_until(&mut terminal, "def");
    // The end of a pty takes with it what its reader has not read, so this is not waited for.
    terminal.write_all(b"q").unwrap();
    vmm.expect_exit(0);
}

/// Reads from a terminal, on a thread as it may never answer.
fn read_until(terminal: &mut File, text: &str) {
    let mut terminal = terminal.try_clone().unwrap();
    let wanted = text.to_owned();
    let (sender, receiver) = std::sync::mpsc::channel();
    thread::spawn(move || {
        let mut seen = Vec::new();
        let mut byte = [0];
        while !String::from_utf8_lossy(&seen).contains(&wanted) {
            match terminal.read(&mut byte) {
                Ok(1..) => seen.push(byte[0]),
                _ => return,
            }
        }
        let _ = sender.send(());
    });
    receiver.recv_timeout(LIMIT).unwrap_or_else(|error| panic!("waiting for {text:?}: {error}"));
}

#[test]
fn a_thousand_pauses_lose_nothing() {
    let scratch = Scratch::new();
    let (vmm, serial) = created(&scratch, Guest::Ticker);
    pauses(&vmm, &serial, 1000);
}

#[test]
fn two_hundred_saves_resets_and_restores_lose_nothing() {
    let scratch = Scratch::new();
    let vmm = Vmm::with_api(&scratch, ["--verify-state"]);
    let (vmm, serial) = created_by(vmm, &scratch, Guest::Ticker);
    pauses(&vmm, &serial, 200);
}

/// The guest's count goes on over all pauses.
fn pauses(vmm: &Vmm, serial: &SerialFile, rounds: u32) {
    let mut api = vmm.api();
    api.puts(&["vm.boot"]);
    for round in 0..rounds {
        api.puts(&["vm.pause"]);
        if round == rounds / 2 {
            assert_eq!(api.state(), "Paused");
            quiet(serial);
        }
        api.puts(&["vm.resume"]);
        if round % 100 == 0 {
            serial.wait_longer_than(serial.text().len());
        }
    }
    let seen = serial.text().lines().count();
    serial.wait_for(&format!("{:08x}\n", seen + 10));
    let text = serial.text();
    let (whole, _) = text.rsplit_once('\n').unwrap();
    for (count, line) in whole.lines().enumerate() {
        assert_eq!(line, format!("{count:08x}"), "line {count}");
    }
}

/// A paused guest prints nothing, once what it had printed is written out.
fn quiet(serial: &SerialFile) {
    let mut length = serial.text().len();
    let settled = || {
        thread::sleep(Duration::from_millis(50));
        let before = std::mem::replace(&mut length, serial.text().len());
        (before == length).then_some(())
    };
    wait_until(LIMIT, settled, || "the output of a paused guest to end".to_owned());
    let before = serial.text();
    thread::sleep(Duration::from_millis(100));
    assert_eq!(serial.text(), before);
}

#[test]
fn a_halted_and_a_spinning_guest_pause_and_resume_as_well() {
    for (guest, text) in [(Guest::Halt, "halted"), (Guest::Spin, ".")] {
        let scratch = Scratch::new();
        let (mut vmm, serial) = created(&scratch, guest);
        let mut api = vmm.api();
        api.puts(&["vm.boot"]);
        serial.wait_for(text);
        for _ in 0..50 {
            api.puts(&["vm.pause", "vm.resume"]);
        }
        api.puts(&["vm.pause", "vm.delete", "vmm.shutdown"]);
        vmm.expect_exit(0);
    }
}

#[test]
fn every_processor_starts_with_its_own_number() {
    for (count, more) in [(1, ""), (2, ""), (4, ""), (4, ",max=6"), (4, ",topology=2:2:1:1")] {
        let scratch = Scratch::new();
        let cpus = format!("boot={count}{more}");
        let mut vmm = run(&scratch, Guest::Smp, &["--cpus", &cpus, "--cmdline", &count.to_string()]);
        vmm.expect_exit(0);
        let expected: String = (0..count).map(|cpu| format!("cpu {cpu}\n")).collect();
        assert_eq!(vmm.stdout.text(), format!("{expected}all up\n"), "{cpus}");
    }
}

#[test]
fn ports_and_ecam_show_the_same_functions() {
    let scratch = Scratch::new();
    let disk = format!("path={},image_type=raw", scratch.disk("disk", 1 << 20).display());
    let mut vmm = run(&scratch, Guest::PciScan, &["--disk", &disk, "--rng", "src=/dev/urandom"]);
    vmm.expect_exit(0);
    let text = vmm.stdout.text();
    let by = |way: &str| -> Vec<_> { text.lines().filter_map(|line| line.strip_prefix(way)).collect() };
    let functions = by("ports ");
    assert_eq!(functions, by("ecam "), "{text}");
    assert_eq!(functions.first(), Some(&"00 1b36:0008"), "{text}");
    for (what, id) in [("disk", "1af4:1042"), ("rng", "1af4:1044")] {
        assert_eq!(functions.iter().filter(|line| line.ends_with(id)).count(), 1, "{what}: {text}");
    }
}

#[test]
fn two_vmms_run_side_by_side() {
    let scratch = Scratch::new();
    let other = Scratch::new();
    let (first, one) = created(&scratch, Guest::Ticker);
    let (mut second, two) = created(&other, Guest::Ticker);
    first.api().puts(&["vm.boot"]);
    second.api().puts(&["vm.boot"]);
    one.wait_for("00000003\n");
    two.wait_for("00000003\n");
    second.api().puts(&["vmm.shutdown"]);
    second.expect_exit(0);
    one.wait_longer_than(one.text().len());
    assert_eq!(first.api().state(), "Running");
}

#[test]
fn signals_end_it_cleanly_in_every_phase() {
    for (signal, names) in [
        ("TERM", [].as_slice()),
        ("INT", &["vm.boot"]),
        ("TERM", &["vm.boot"]),
        ("TERM", &["vm.boot", "vm.pause"]),
    ] {
        let scratch = Scratch::new();
        let (mut vmm, _) = created(&scratch, Guest::Spin);
        vmm.api().puts(names);
        vmm.signal(signal);
        vmm.expect_exit(0);
        assert!(!vmm.socket().exists(), "{signal} after {names:?}");
    }
}

#[test]
fn files_that_it_makes_are_the_users_own() {
    let scratch = Scratch::new();
    let (vmm, serial) = created(&scratch, Guest::Halt);
    vmm.api().puts(&["vm.boot"]);
    serial.wait_for("halted");
    for path in [vmm.socket(), serial.path()] {
        let mode = fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode & 0o077, 0, "{} has {mode:o}", path.display());
    }
}

#[test]
fn threads_have_the_names_that_clients_expect() {
    let scratch = Scratch::new();
    let (vmm, serial) = created(&scratch, Guest::Halt);
    vmm.api().puts(&["vm.boot"]);
    serial.wait_for("halted");
    let threads = vmm.threads();
    for name in ["vmm", "http-server", "vcpu0"] {
        assert_eq!(threads.iter().filter(|thread| *thread == name).count(), 1, "{name} in {threads:?}");
    }
}

#[test]
fn a_hundred_vms_leave_no_descriptor_and_no_thread() {
    let scratch = Scratch::new();
    let vmm = Vmm::with_api(&scratch, [""; 0]);
    let mut api = vmm.api();
    let serial = SerialFile::new(scratch.path("serial"));
    let mut config = vm_config(&scratch.guest(Guest::Halt), serial.path());
    config["cpus"] = json!({ "boot_vcpus": 2, "max_vcpus": 2 });
    config["disks"] = json!([{ "path": scratch.disk("disk", 1 << 20), "image_type": "Raw" }]);
    let cycle = |api: &mut vmm_tests::harness::Api| {
        fs::remove_file(serial.path()).ok();
        api.create(&config);
        api.puts(&["vm.boot"]);
        serial.wait_for("halted");
        api.puts(&["vm.pause", "vm.resume", "vm.delete"]);
    };
    // The first makes what a process makes once.
    cycle(&mut api);
    let before = vmm.holdings();
    for _ in 0..100 {
        cycle(&mut api);
    }
    vmm.expect_holdings(&before, "after a hundred");
}

#[test]
fn a_hundred_reboots_leave_no_descriptor_and_no_thread() {
    let scratch = Scratch::new();
    let (vmm, serial) = created(&scratch, Guest::Halt);
    let mut api = vmm.api();
    api.puts(&["vm.boot", "vm.reboot"]);
    let before = vmm.holdings();
    for _ in 0..100 {
        api.puts(&["vm.reboot"]);
    }
    vmm.expect_holdings(&before, "after a hundred");
    assert_eq!(api.state(), "Running");
    serial.wait_longer_than(0);
}
