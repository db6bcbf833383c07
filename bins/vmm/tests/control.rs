//! The control thread: what it does when a boot fails, when nobody reads, when a path is a trap.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};
use vmm_tests::harness::terminal::Terminal;
use vmm_tests::harness::{Api, Scratch, SerialFile, Vmm, vm_arguments, vm_config, wait_until};
use vmm_tests::tiny::Guest;

/// As long as something that must not block may take on a busy machine.
const SOON: Duration = Duration::from_secs(20);

fn fifo(scratch: &Scratch) -> std::path::PathBuf {
    let path = scratch.path("fifo");
    assert!(Command::new("mkfifo").arg(&path).status().unwrap().success());
    path
}

fn api(vmm: &Vmm) -> Api {
    vmm.api()
}

fn with_serial(kernel: &Path, serial: Value) -> Value {
    let mut config = vm_config(kernel, Path::new("unused"));
    config["serial"] = serial;
    config
}

fn boot_fails(api: &mut Api, words: &str) {
    let answer = api.put("vm.boot");
    assert_eq!(answer.status, 500, "{answer:?}");
    assert!(answer.body.contains(words), "{answer:?}");
    assert_eq!(api.state(), "Created");
}

#[test]
fn a_fifo_is_refused_wherever_a_file_is_named_and_holds_nobody() {
    let scratch = Scratch::new();
    let fifo = fifo(&scratch);
    let kernel = scratch.guest(Guest::Halt);
    let null = || json!({ "mode": "Null" });
    let mut initramfs = with_serial(&kernel, null());
    initramfs["payload"]["initramfs"] = json!(fifo);
    let mut disk = with_serial(&kernel, null());
    disk["disks"] = json!([{ "path": fifo, "image_type": "Raw" }]);
    let configs = [
        ("is not a file", with_serial(&fifo, null())),
        ("is not a file", initramfs),
        ("is a FIFO", disk),
        ("open the file of serial", with_serial(&kernel, json!({ "mode": "File", "file": fifo }))),
    ];
    let vmm = Vmm::with_api(&scratch, [""; 0]);
    let mut api = api(&vmm);
    for (words, config) in configs {
        api.create(&config);
        boot_fails(&mut api, words);
        api.puts(&["vm.delete"]);
    }
}

#[test]
fn a_failed_boot_leaves_no_console_and_a_later_one_works() {
    let scratch = Scratch::new();
    let kernel = scratch.path("kernel");
    let vmm = Vmm::with_api(&scratch, [""; 0]);
    let mut api = api(&vmm);
    api.create(&with_serial(&kernel, json!({ "mode": "Pty" })));
    let before = (vmm.descriptors(), vmm.threads());
    for _ in 0..3 {
        boot_fails(&mut api, "No such file");
        assert_eq!((vmm.descriptors(), vmm.threads()), before);
        assert_eq!(api.get("vm.info").json()["config"]["serial"].get("file"), None);
    }
    fs::copy(scratch.guest(Guest::Halt), &kernel).unwrap();
    api.puts(&["vm.boot"]);
    let pty = |api: &mut Api| api.get("vm.info").json()["config"]["serial"]["file"].clone();
    let path = pty(&mut api);
    assert!(path.is_string(), "{path}");
    // A reboot that fails keeps it, for whoever is attached.
    fs::remove_file(&kernel).unwrap();
    assert_eq!(api.put("vm.reboot").status, 500);
    assert_eq!(api.state(), "Shutdown");
    assert_eq!(pty(&mut api), path);
    fs::copy(scratch.guest(Guest::Halt), &kernel).unwrap();
    api.puts(&["vm.boot"]);
    assert_eq!(pty(&mut api), path);
}

#[test]
fn a_guest_whose_reset_fails_leaves_the_vm_to_its_clients() {
    let scratch = Scratch::new();
    let kernel = scratch.path("kernel");
    fs::copy(scratch.guest(Guest::Reset), &kernel).unwrap();
    let vmm = Vmm::with_api(&scratch, [""; 0]);
    let mut api = api(&vmm);
    let serial = SerialFile::new(scratch.path("serial"));
    api.create(&vm_config(&kernel, serial.path()));
    api.puts(&["vm.boot"]);
    serial.wait_for("boot\nboot\n");
    fs::rename(&kernel, scratch.path("away")).unwrap();
    wait_until(SOON, || (api.state() == "Shutdown").then_some(()), || "the reset to fail".to_owned());
    fs::rename(scratch.path("away"), &kernel).unwrap();
    let seen = serial.text().len();
    api.puts(&["vm.boot"]);
    serial.wait_longer_than(seen);
}

#[test]
fn a_guest_cannot_fill_the_log_with_triple_faults() {
    let scratch = Scratch::new();
    let serial = SerialFile::new(scratch.path("serial"));
    let to_file = format!("file={}", serial.path().display());
    let mut vmm = Vmm::spawn(vm_arguments(&scratch.guest(Guest::TripleFault), &to_file));
    serial.wait_for(&"fault\n".repeat(10));
    vmm.signal("TERM");
    vmm.expect_exit(0);
    assert_eq!(vmm.stderr.text().matches("triple fault").count(), 1, "{}", vmm.stderr.text());
}

#[test]
fn only_descriptors_that_were_passed_are_taken_for_the_api() {
    // Among the numbers are those of what the process itself has open by then.
    for fd in 0..16 {
        let mut vmm = Vmm::spawn(["--api-socket", &format!("fd={fd}")]);
        let code = vmm.wait().code();
        assert!(matches!(code, Some(1 | 2)), "{fd}: {code:?} {}", vmm.stderr.text());
    }
    let mut vmm = Vmm::spawn(["--api-socket", "fd=3000"]);
    vmm.expect_exit(1);
    assert!(vmm.stderr.text().contains("descriptor 3000"), "{}", vmm.stderr.text());
}

#[test]
fn the_users_terminal_is_raw_only_while_a_guest_has_it() {
    let scratch = Scratch::new();
    let terminal = Terminal::new();
    let mut vmm = Vmm::on_terminal(&scratch, &terminal, false, &[]);
    let mut api = vmm.api();
    let kernel = scratch.path("kernel");
    api.create(&with_serial(&kernel, json!({ "mode": "Tty" })));
    boot_fails(&mut api, "No such file");
    assert!(!terminal.is_raw(), "after a boot that failed");
    fs::copy(scratch.guest(Guest::Halt), &kernel).unwrap();
    for (way, raw) in [
        ("vm.boot", true),
        ("vm.reboot", true),
        ("vm.shutdown", false),
        ("vm.boot", true),
        ("vm.delete", false),
    ] {
        api.puts(&[way]);
        assert_eq!(terminal.is_raw(), raw, "after {way}");
    }
    api.create(&with_serial(&kernel, json!({ "mode": "Tty" })));
    api.puts(&["vm.boot"]);
    assert!(terminal.is_raw());
    api.puts(&["vmm.shutdown"]);
    vmm.expect_exit(0);
    assert!(!terminal.is_raw(), "after the end");
}
