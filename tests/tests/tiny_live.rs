//! Live snapshots of tiny guests, and shared memory that is filled while they run: what takes a userfaultfd. By the real binary, on
//! any KVM.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]

use std::fs::{self, OpenOptions, Permissions};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use vmm_state::Phase;
use vmm_tests::harness::counting::{counting_guest, counting_in, counting_with, counts};
use vmm_tests::harness::saving::{from, live, passes, url};
use vmm_tests::harness::withheld::Withheld;
use vmm_tests::harness::{LIMIT, Pending, Scratch, SerialFile, Vmm, refused, vm_config, wait_until};
use vmm_tests::tiny::Guest;

/// A guest that writes to all of its memory without a pause, in memory of this kind.
fn writing_guest(scratch: &Scratch, memory: &Value) -> (Vmm, SerialFile) {
    let vmm = Vmm::with_api(scratch, ["-v"]);
    let serial = counting_with(&vmm, scratch, &json!({ "memory": memory }));
    (vmm, serial)
}

/// Restores what is saved at `saved`: its guest counts on from where the one was that has counted on `first`.
fn restored(clone: &Vmm, scratch: &Scratch, saved: &Path, first: &SerialFile) -> SerialFile {
    let serial = SerialFile::new(scratch.path(format!("serial-{}", clone.pid())));
    clone.api().done("vm.restore", &from(saved, &serial));
    serial.wait_longer_than(60);
    let ours = counts(&serial);
    assert!(ours.windows(2).all(|pair| pair[1] == pair[0] + 1), "{ours:?}");
    assert!(counts(first).contains(&ours[0]), "it goes on from where the first was");
    serial
}

#[test]
fn a_live_snapshot_is_the_guest_at_one_moment() {
    for shared in [false, true] {
        let scratch = Scratch::new();
        let (vmm, serial) = writing_guest(&scratch, &json!({ "size": 64 << 20, "shared": shared }));
        let mut api = vmm.api();
        let name = |number: usize| scratch.path(format!("saved-{number}"));
        for number in 0..8 {
            let body = json!({
                "destination_url": url(&name(number)), "live": true, "track": true, "incremental": number > 0
            });
            api.done("vm.snapshot", &body);
            serial.wait_longer_than(serial.text().len() + 20);
        }
        assert_eq!(vmm.stderr.text().matches("its memory is saved as it was").count(), 8, "none in passes");
        for number in [0, 7] {
            restored(&Vmm::with_api(&scratch, [""; 0]), &scratch, &name(number), &serial);
        }
        assert!(counts(&serial).windows(2).all(|pair| pair[1] == pair[0] + 1), "the first counts on");
    }
}

/// With huge pages on the host; without, there is no such VM.
#[test]
fn huge_pages_are_the_guest_at_one_moment_too() {
    const HUGE: u64 = 2 << 20;
    let spare = fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
    let spare = spare.map_or(0, |text| text.trim().parse::<u64>().unwrap());
    for shared in [false, true] {
        let scratch = Scratch::new();
        let vmm = Vmm::with_api(&scratch, ["-v"]);
        let serial = SerialFile::new(scratch.path("serial"));
        let mut config = vm_config(&scratch.guest(Guest::Pages), serial.path());
        config["memory"] = json!({
            "size": 4 * HUGE, "shared": shared, "hugepages": true, "hugepage_size": HUGE, "prefault": true
        });
        vmm.api().create(&config);
        let boot = vmm.api().put_json("vm.boot", &json!({}));
        assert_eq!(boot.status == 204, spare >= 4, "{spare} are free: {boot:?}");
        if boot.status != 204 {
            continue;
        }
        serial.wait_for("00000003\n");
        let name = |number: usize| scratch.path(format!("saved-{number}"));
        for number in 0..3 {
            let body = json!({
                "destination_url": url(&name(number)), "live": true, "track": true, "incremental": number > 0
            });
            vmm.api().done("vm.snapshot", &body);
            serial.wait_longer_than(serial.text().len() + 20);
        }
        assert_eq!(passes(&vmm), [None, None, None]);
        drop(vmm);
        for number in [0, 2] {
            restored(&Vmm::with_api(&scratch, [""; 0]), &scratch, &name(number), &serial);
        }
    }
}

#[test]
fn shared_memory_is_filled_while_the_guest_runs() {
    let scratch = Scratch::new();
    let (vmm, serial) = writing_guest(&scratch, &json!({ "size": 256 << 20, "shared": true }));
    let (saved, again) = (scratch.path("saved"), scratch.path("again"));
    vmm.api().done("vm.snapshot", &live(&saved));
    serial.wait_longer_than(serial.text().len() + 20);
    drop(vmm);
    let clone = Vmm::with_api(&scratch, ["-v"]);
    let other = restored(&clone, &scratch, &saved, &serial);
    let log = clone.stderr.text();
    assert!(!log.contains("filled before the guest runs"), "{log}");
    // Nothing is saved of memory that is not all there yet.
    let done = || {
        let answer = clone.api().put_json("vm.snapshot", &live(&again));
        assert!(answer.status == 204 || answer.body.contains("still being read"), "{answer:?}");
        (answer.status == 204).then_some(())
    };
    wait_until(LIMIT, done, || "a snapshot".to_owned());
    let third = Vmm::with_api(&scratch, [""; 0]);
    let last = SerialFile::new(scratch.path("last"));
    third.api().done("vm.restore", &from(&again, &last));
    last.wait_longer_than(40);
    assert!(counts(&other).contains(&counts(&last)[0]), "and so does what is saved of it");
}

#[test]
fn shared_memory_that_is_damaged_is_told_by_name() {
    let scratch = Scratch::new();
    let (vmm, serial) = writing_guest(&scratch, &json!({ "size": 64 << 20, "shared": true }));
    let saved = scratch.path("saved");
    vmm.api().done("vm.snapshot", &live(&saved));
    serial.wait_longer_than(serial.text().len() + 20);
    drop(vmm);
    let memory = saved.join("memory-0.bin");
    fs::set_permissions(&memory, Permissions::from_mode(0o600)).unwrap();
    let file = OpenOptions::new().write(true).open(&memory).unwrap();
    let mut first = [0];
    let code = 1 << 20;
    OpenOptions::new().read(true).open(&memory).unwrap().read_exact_at(&mut first, code).unwrap();
    file.write_all_at(&[!first[0]], code).unwrap();
    // Its generation ID is written there before it runs.
    let vmm = Vmm::with_api(&scratch, [""; 0]);
    let body = from(&saved, &SerialFile::new(scratch.path("other")));
    refused(&vmm.api().put_json("vm.restore", &body), 500, "chunk 0 (byte 0x0)");
    assert_eq!(vmm.api().phase(), Phase::Empty, "as before");
    file.write_all_at(&first, code).unwrap();
    let other = SerialFile::new(scratch.path("another"));
    vmm.api().done("vm.restore", &from(&saved, &other));
    other.wait_longer_than(40);
    assert!(counts(&serial).contains(&counts(&other)[0]));
}

/// The guest waits for memory that nobody can read.
#[test]
fn the_end_of_a_vm_does_not_wait_for_a_file_that_does_not_answer() {
    let scratch = Scratch::new();
    let (vmm, serial) = writing_guest(&scratch, &json!({ "size": 64 << 20, "shared": true }));
    let saved = scratch.path("saved");
    vmm.api().done("vm.snapshot", &live(&saved));
    drop((vmm, serial));
    for end in ["vm.shutdown", "vm.delete", "vmm.shutdown"] {
        let mut vmm = Vmm::with_api(&scratch, [""; 0]);
        let other = SerialFile::new(scratch.path(format!("of-{end}")));
        let mut body = from(&saved, &other);
        body["resume"] = json!(false);
        let file = Withheld::new(&saved.join("memory-0.bin"));
        vmm.api().done("vm.restore", &body);
        file.hold();
        file.wait();
        vmm.api().puts(&["vm.resume"]);
        // It ends its line and comes to its 256 pages, which are not there.
        std::thread::sleep(Duration::from_millis(100));
        vmm.api().puts(&[end]);
        assert!(other.text().len() <= "00000000\n".len(), "{end}: the guest went on: {:?}", other.text());
        if end != "vmm.shutdown" {
            // Another guest has nothing of it.
            vmm.api().puts(&["vm.delete"]);
            let _serial = counting_in(&vmm, &scratch);
            vmm.api().puts(&["vmm.shutdown"]);
        }
        vmm.expect_exit(0);
    }
}

/// A disk's thread waits for memory that nobody can read.
#[test]
fn a_vmm_whose_device_waits_for_a_file_that_does_not_answer_ends() {
    let scratch = Scratch::new();
    let mut vmm = Vmm::with_api(&scratch, [""; 0]);
    let serial = SerialFile::new(scratch.path("serial"));
    let mut config = vm_config(&scratch.guest(Guest::Drivers), serial.path());
    config["disks"] = json!([{ "path": scratch.disk("disk", 1 << 20), "image_type": "Raw" }]);
    config["memory"]["shared"] = json!(true);
    vmm.api().create(&config);
    vmm.api().puts(&["vm.boot"]);
    serial.wait_for("driven\n");
    let saved = scratch.path("saved");
    vmm.api().done("vm.snapshot", &live(&saved));
    vmm.api().puts(&["vmm.shutdown"]);
    vmm.expect_exit(0);
    let mut vmm = Vmm::with_api(&scratch, [""; 0]);
    let mut body = from(&saved, &SerialFile::new(scratch.path("other")));
    body["resume"] = json!(false);
    let file = Withheld::new(&saved.join("memory-0.bin"));
    vmm.api().done("vm.restore", &body);
    file.hold();
    file.wait();
    let _resume = Pending::send(vmm.socket(), "vm.resume", b"");
    let _shutdown = Pending::send(vmm.socket(), "vm.shutdown", b"");
    vmm.expect_exit(13);
    let log = vmm.stderr.text();
    assert!(log.contains("guest memory is lost: the snapshot is not read to its end"), "{log}");
}

#[test]
fn memory_that_cannot_be_frozen_is_saved_in_passes_and_the_log_says_why() {
    let scratch = Scratch::new();
    let (vmm, serial) = counting_guest(&scratch);
    let (saved, later) = (scratch.path("saved"), scratch.path("later"));
    vmm.api().done("vm.snapshot", &live(&saved));
    let clone = Vmm::with_api(&scratch, ["-v"]);
    let other = SerialFile::new(scratch.path("other"));
    clone.api().done("vm.restore", &from(&saved, &other));
    other.wait_longer_than(20);
    clone.api().done("vm.snapshot", &live(&later));
    let log = clone.stderr.text();
    assert!(log.contains("saved in passes") && log.contains("a private mapping of a file"), "{log}");
    drop((vmm, serial));
    let third = Vmm::with_api(&scratch, [""; 0]);
    let last = SerialFile::new(scratch.path("last"));
    third.api().done("vm.restore", &from(&later, &last));
    last.wait_longer_than(40);
    assert!(counts(&other).contains(&counts(&last)[0]));
}

/// Whether who has no capabilities gets a userfaultfd for faults of guests.
fn is_given(hidden: bool) -> bool {
    let sysctl = fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd");
    let device = OpenOptions::new().read(true).write(true).open("/dev/userfaultfd");
    sysctl.is_ok_and(|text| text.trim() == "1") || !hidden && device.is_ok()
}

fn is_root() -> bool {
    fs::metadata("/proc/self").unwrap().uid() == 0
}

#[test]
fn a_user_without_a_userfaultfd_saves_in_passes_and_fills_first() {
    for (hidden, shared) in [(false, true), (true, true), (true, false)] {
        let (scratch, given) = (Scratch::new(), is_given(hidden));
        let about = format!("hidden: {hidden}, shared: {shared}, given: {given}");
        let vmm = Vmm::without_capabilities(&scratch, &["-v"], hidden);
        let memory = json!({ "size": 64 << 20, "shared": shared });
        let serial = counting_with(&vmm, &scratch, &json!({ "memory": memory }));
        let saved = scratch.path("saved");
        vmm.api().done("vm.snapshot", &live(&saved));
        let (log, told) = (vmm.stderr.text(), passes(&vmm));
        assert_eq!(log.contains("its memory is saved as it was"), given, "{about}: {log}");
        assert_eq!(told.len(), 1);
        if given {
            assert_eq!(told, [None], "{about}");
        } else {
            let why = told[0].as_deref().unwrap();
            assert!(why.contains("gives no userfaultfd") && why.contains("(os error 1)"), "{about}: {why}");
            assert!(log.contains("saved in passes") && log.contains(why), "{about}: {log}");
        }
        serial.wait_longer_than(serial.text().len() + 20);
        drop(vmm);

        let clone = Vmm::without_capabilities(&scratch, &["-v"], hidden);
        let other = SerialFile::new(scratch.path("other"));
        clone.api().done("vm.restore", &from(&saved, &other));
        other.wait_longer_than(60);
        let (ours, log) = (counts(&other), clone.stderr.text());
        assert!(ours.windows(2).all(|pair| pair[1] == pair[0] + 1), "{about}: {ours:?}");
        assert!(counts(&serial).contains(&ours[0]), "{about}: it goes on from where the first was");
        let first = log.contains("filled before the guest runs") && log.contains("(os error 1)");
        assert_eq!(first, shared && !given, "{about}: {log}");
    }
}

#[test]
fn a_confined_vm_is_saved_live_and_filled_behind() {
    // By the system call or by the device, whatever there is.
    for with_capabilities in [true, false] {
        let scratch = Scratch::new();
        let start = || match with_capabilities {
            true => Vmm::with_api(&scratch, ["-v"]),
            false => Vmm::without_capabilities(&scratch, &["-v"], false),
        };
        let vmm = start();
        let allowed = scratch.path("allowed");
        fs::create_dir(&allowed).unwrap();
        let fields = json!({
            "memory": { "size": 64 << 20, "shared": true },
            "landlock_enable": true,
            "landlock_rules": [{ "path": allowed, "access": "rw" }],
        });
        let serial = counting_with(&vmm, &scratch, &fields);
        let (saved, again) = (allowed.join("saved"), allowed.join("again"));
        vmm.api().done("vm.snapshot", &live(&saved));
        refused(&vmm.api().put_json("vm.snapshot", &live(&scratch.path("elsewhere"))), 500, "landlock");
        let frozen = with_capabilities && is_root() || is_given(false);
        assert_eq!(passes(&vmm).iter().all(Option::is_none), frozen, "{:?}", passes(&vmm));
        serial.wait_longer_than(serial.text().len() + 20);
        drop(vmm);

        let clone = start();
        let other = SerialFile::new(scratch.path("other"));
        clone.api().done("vm.restore", &from(&saved, &other));
        other.wait_longer_than(60);
        assert!(counts(&serial).contains(&counts(&other)[0]));
        let log = clone.stderr.text();
        assert_eq!(!log.contains("filled before the guest runs"), frozen, "{log}");
        let saved_again = || (clone.api().put_json("vm.snapshot", &live(&again)).status == 204).then_some(());
        wait_until(LIMIT, saved_again, || "all of memory, and a snapshot of it".to_owned());
        assert_eq!(passes(&clone).iter().all(Option::is_none), frozen, "{:?}", passes(&clone));
    }
}
