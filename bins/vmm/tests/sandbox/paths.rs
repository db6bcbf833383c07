//! Paths under Landlock.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use vmm_tests::harness::{Api, LIMIT, Scratch, SerialFile, Vmm, vm_arguments, vm_config, wait_until};
use vmm_tests::tiny::Guest;

use crate::{Case, threads};

pub(crate) const ALL: &[Case] = &[
    ("a_vm_of_the_command_line_is_confined", a_vm_of_the_command_line_is_confined),
    ("it_need_not_be", it_need_not_be),
    ("a_vm_of_the_api_is_confined_if_it_asks_for_it", a_vm_of_the_api_is_confined_if_it_asks_for_it),
    ("a_second_vm_gets_the_first_ones_paths", a_second_vm_gets_the_first_ones_paths),
    ("granted_paths_can_be_reached", granted_paths_can_be_reached),
    ("a_boot_that_failed_for_a_path_can_be_tried_again", a_boot_that_failed_for_a_path_can_be_tried_again),
    (
        "a_restored_vm_wants_its_kernel_when_it_boots_again",
        a_restored_vm_wants_its_kernel_when_it_boots_again,
    ),
    ("all_devices_work_under_landlock", all_devices_work_under_landlock),
];

/// Asks the kernel what version it has, in a child that confines itself: nothing of this process changes.
pub(crate) fn kernel_has_landlock() -> bool {
    vmm::doctor::landlock_version().is_ok()
}

/// Puts another file in the place of the one at `path`, as an update of a kernel does.
fn replace(scratch: &Scratch, path: &Path) {
    let new = scratch.path("new");
    fs::copy(path, &new).unwrap();
    fs::rename(new, path).unwrap();
}

fn assert_refused(text: &str, path: &Path) {
    for words in
        ["landlock confines this process", &format!("cannot open {}", path.display()), "ermission denied"]
    {
        assert!(text.contains(words), "no {words:?} in {text}");
    }
}

/// Boots, resets again and again, writes its serial port's file; then its kernel is another file, out of reach.
fn a_vm_of_the_command_line_is_confined() {
    let scratch = Scratch::new();
    let kernel = scratch.guest(Guest::Reset);
    let serial = SerialFile::new(scratch.path("serial"));
    let mut arguments = vm_arguments(&kernel, &format!("file={}", serial.path().display()));
    arguments.push("-v".to_owned());
    let mut vmm = Vmm::spawn(arguments);
    serial.wait_for("boot\nboot\nboot\n");
    vmm.stderr.wait_for("landlock ABI");
    replace(&scratch, &kernel);
    vmm.expect_exit(1);
    assert_refused(&vmm.stderr.text(), &kernel);
}

fn it_need_not_be() {
    let scratch = Scratch::new();
    let kernel = scratch.guest(Guest::Reset);
    let serial = SerialFile::new(scratch.path("serial"));
    let to_file = format!("file={}", serial.path().display());
    let socket = format!("path={}", scratch.path("socket").display());
    for more in
        [&["--no-landlock"][..], &["--api-socket", &socket], &["--landlock-rules", "path=/,access=rw"]]
    {
        let mut arguments = vm_arguments(&kernel, &to_file);
        arguments.extend(more.iter().map(|word| (*word).to_owned()));
        let mut vmm = Vmm::spawn(arguments);
        serial.wait_for("boot\n");
        replace(&scratch, &kernel);
        serial.wait_longer_than(serial.text().len() + 50);
        assert!(vmm.is_running(), "{more:?}: {}", vmm.stderr.text());
    }
}

fn confined(kernel: &Path, serial: &Path) -> Value {
    let mut config = vm_config(kernel, serial);
    config["landlock_enable"] = json!(true);
    config
}

fn boot_is_refused(api: &mut Api, path: &Path) {
    let answer = api.put("vm.boot");
    assert_eq!(answer.status, 500, "{answer:?}");
    assert_refused(&answer.body, path);
}

fn a_vm_of_the_api_is_confined_if_it_asks_for_it() {
    let scratch = Scratch::new();
    let vmm = Vmm::with_api(&scratch, [""; 0]);
    let mut api = vmm.api();
    let (kernel, serial) = (scratch.guest(Guest::Halt), SerialFile::new(scratch.path("serial")));
    api.create(&confined(&kernel, serial.path()));
    api.puts(&["vm.boot"]);
    serial.wait_for("halted");
    let metrics = api.get("vmm.metrics").body;
    assert!(metrics.contains("process_open_fds") && metrics.contains("process_start_time"), "{metrics}");
    api.puts(&["vm.reboot", "vm.shutdown"]);
    replace(&scratch, &kernel);
    boot_is_refused(&mut api, &kernel);
    assert_eq!(api.state(), "Shutdown");
}

fn a_second_vm_gets_the_first_ones_paths() {
    let scratch = Scratch::new();
    let vmm = Vmm::with_api(&scratch, [""; 0]);
    let mut api = vmm.api();
    let (kernel, serial) = (scratch.guest(Guest::Halt), SerialFile::new(scratch.path("serial")));
    api.create(&confined(&kernel, serial.path()));
    api.puts(&["vm.boot", "vm.delete"]);
    let other = scratch.guest(Guest::Spin);
    api.create(&vm_config(&other, serial.path()));
    boot_is_refused(&mut api, &other);
    api.puts(&["vm.delete"]);
    // Neither can it make a file that the first did not have.
    let new = scratch.path("new");
    api.create(&vm_config(&kernel, &new));
    let answer = api.put("vm.boot");
    let named = answer.body.contains("landlock") && answer.body.contains(&new.display().to_string());
    assert!(answer.status == 500 && named, "{answer:?}");
    assert!(!new.exists());
    api.puts(&["vm.delete"]);
    api.create(&vm_config(&kernel, serial.path()));
    api.puts(&["vm.boot"]);
}

fn granted_paths_can_be_reached() {
    let scratch = Scratch::new();
    let vmm = Vmm::with_api(&scratch, [""; 0]);
    let mut api = vmm.api();
    let (kernel, serial) = (scratch.guest(Guest::Halt), SerialFile::new(scratch.path("serial")));
    let mut config = confined(&kernel, serial.path());
    config["landlock_rules"] = json!([{ "path": scratch.path("absent"), "access": "r" }]);
    api.create(&config);
    let answer = api.put("vm.boot");
    assert!(answer.status == 500 && answer.body.contains("absent"), "{answer:?}");
    api.puts(&["vm.delete"]);
    config["landlock_rules"] = json!([{ "path": scratch.folder(), "access": "r" }]);
    api.create(&config);
    api.puts(&["vm.boot", "vm.shutdown"]);
    // Another file at the same path can be read; another file to write cannot be made.
    replace(&scratch, &kernel);
    api.puts(&["vm.boot", "vm.delete"]);
    let new = scratch.path("new");
    api.create(&vm_config(&kernel, &new));
    assert_eq!(api.put("vm.boot").status, 500);
    assert!(!new.exists());
}

fn a_restored_vm_wants_its_kernel_when_it_boots_again() {
    let scratch = Scratch::new();
    let (kernel, serial) = (scratch.guest(Guest::Ticker), SerialFile::new(scratch.path("serial")));
    let saved = scratch.path("snapshots");
    fs::create_dir(&saved).unwrap();
    let url = format!("file://{}/one", saved.display());
    {
        let vmm = Vmm::with_api(&scratch, [""; 0]);
        let mut config = confined(&kernel, serial.path());
        config["landlock_rules"] = json!([{ "path": saved, "access": "rw" }]);
        vmm.api().create(&config);
        vmm.api().puts(&["vm.boot", "vm.pause"]);
        vmm.api().done("vm.snapshot", &json!({ "destination_url": url }));
    }
    let restored = || {
        let vmm = Vmm::with_api(&scratch, ["-v"]);
        vmm.api().done("vm.restore", &json!({ "source_url": url, "resume": true }));
        vmm.stderr.wait_for("landlock ABI");
        serial.wait_longer_than(serial.text().len() + 20);
        vmm
    };
    restored().api().puts(&["vm.reboot"]);

    fs::remove_file(&kernel).unwrap();
    let vmm = restored();
    let answer = vmm.api().put("vm.reboot");
    let named = answer.body.contains(&format!("cannot open {}", kernel.display()));
    assert!(answer.status == 500 && named && answer.body.contains("No such file"), "{answer:?}");
    // It came too late.
    let _ = scratch.guest(Guest::Ticker);
    boot_is_refused(&mut vmm.api(), &kernel);
    drop(vmm);

    fs::remove_file(&kernel).unwrap();
    let vmm = Vmm::spawn(["-v", "--restore", &format!("source_url={url},resume=on")]);
    vmm.stderr.wait_for("landlock ABI");
    serial.wait_longer_than(serial.text().len() + 20);
}

fn a_boot_that_failed_for_a_path_can_be_tried_again() {
    let scratch = Scratch::new();
    let vmm = Vmm::with_api(&scratch, [""; 0]);
    let mut api = vmm.api();
    let (kernel, serial) = (scratch.path("kernel"), SerialFile::new(scratch.path("serial")));
    api.create(&confined(&kernel, serial.path()));
    let answer = api.put("vm.boot");
    assert!(answer.status == 500 && !answer.body.contains("landlock"), "{answer:?}");
    fs::copy(scratch.guest(Guest::Halt), &kernel).unwrap();
    api.puts(&["vm.boot"]);
    serial.wait_for("halted");
}

fn all_devices_work_under_landlock() {
    let scratch = Scratch::new();
    let vmm = Vmm::with_api(&scratch, ["-v"]);
    let mut api = vmm.api();
    let serial = SerialFile::new(scratch.path("serial"));
    let mut config = threads::config(&scratch, serial.path());
    config["landlock_enable"] = json!(true);
    config["memory"] = json!({ "size": 0, "zones": [
        { "id": "folder", "size": 32 << 20, "file": scratch.folder() },
        { "id": "file", "size": 2 << 20, "file": scratch.disk("memory", 2 << 20), "shared": true },
    ]});
    config["console"] = json!({ "mode": "Socket", "socket": scratch.path("console") });
    config["debug_console"] = json!({ "mode": "File", "file": scratch.path("debug") });
    api.create(&config);
    for way in ["vm.boot", "vm.reboot"] {
        api.puts(&[way]);
        let driven = || serial.text().contains("driven\n").then_some(());
        wait_until(LIMIT, driven, || serial.text());
        fs::write(serial.path(), "").unwrap();
    }
    api.puts(&["vm.shutdown", "vm.delete"]);
    // Opened anew.
    api.create(&config);
    api.puts(&["vm.boot"]);
    serial.wait_for("driven\n");
    vmm.stderr.wait_for("landlock ABI");
    assert_eq!(vmm.stderr.text().matches("landlock ABI").count(), 1, "once is for good");
}
