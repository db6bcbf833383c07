//! A VMM whose user is not root: all ways to save and restore work, with a userfaultfd or without, and what other users' processes may not
//! do. And one whose host finds names in another way. By the real binary, on any KVM.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]

use std::fs;
use std::net::TcpStream;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use serde_json::{Value, json};
use vmm_tests::harness::counting::{counting_guest, counting_with, counts, goes_on};
use vmm_tests::harness::migrating::{free_port, pending, receive, to};
use vmm_tests::harness::saving::{from, passes, url};
use vmm_tests::harness::user::gets_userfaultfd;
use vmm_tests::harness::{LIMIT, Scratch, SerialFile, Vmm, refused, wait_until};

/// What the guest is saved to, and how: each is of a moment after the one before.
const SNAPSHOTS: [(&str, bool, bool); 4] = [
    ("plain", false, false),
    ("incremental", false, true),
    ("live", true, false),
    ("live-incremental", true, true),
];

/// Saves a running guest in each way.
fn save_all(vmm: &Vmm, scratch: &Scratch, serial: &SerialFile) {
    let mut api = vmm.api();
    for (name, live, incremental) in SNAPSHOTS {
        if !live {
            api.puts(&["vm.pause"]);
        }
        let folder = scratch.path(name);
        let body = json!({
            "destination_url": url(&folder), "live": live, "incremental": incremental, "track": true
        });
        api.done("vm.snapshot", &body);
        if !live {
            api.puts(&["vm.resume"]);
        }
        let manifest: Value =
            serde_json::from_slice(&fs::read(folder.join("manifest.json")).unwrap()).unwrap();
        assert_eq!(manifest["parent"].is_null(), !incremental, "{name}");
        let owner = fs::metadata(format!("/proc/{}", vmm.pid())).unwrap().uid();
        assert_eq!(fs::metadata(folder.join("memory-0.bin")).unwrap().uid(), owner, "{name}");
        serial.wait_longer_than(serial.text().len() + 40);
    }
}

/// A guest of `saved` goes on from where `first` was.
fn restore(scratch: &Scratch, saved: &Path, first: &SerialFile, given: bool, prefault: bool) -> String {
    let clone = Vmm::as_user(scratch, &["-v"], given);
    let serial = SerialFile::new(scratch.path(format!("serial-{}", clone.pid())));
    let mut body = from(saved, &serial);
    body["prefault"] = json!(prefault);
    clone.api().done("vm.restore", &body);
    serial.wait_longer_than(60);
    let ours = counts(&serial);
    assert!(ours.windows(2).all(|pair| pair[1] == pair[0] + 1), "{}: {ours:?}", saved.display());
    assert!(counts(first).contains(&ours[0]), "{}: it goes on from where the first was", saved.display());
    clone.stderr.text()
}

fn saves_and_restores(given: bool) {
    let userfaultfd = gets_userfaultfd(given);
    for shared in [false, true] {
        let about = format!("given: {given}, a userfaultfd: {userfaultfd}, shared: {shared}");
        let scratch = Scratch::new();
        let vmm = Vmm::as_user(&scratch, &["-v"], given);
        let memory = json!({ "size": 64 << 20, "shared": shared });
        let serial = counting_with(&vmm, &scratch, &json!({ "memory": memory }));
        save_all(&vmm, &scratch, &serial);
        let told = passes(&vmm);
        assert_eq!(told.len(), SNAPSHOTS.len(), "{about}");
        for ((name, live, _), why) in SNAPSHOTS.iter().zip(&told) {
            assert_eq!(why.is_some(), *live && !userfaultfd, "{about}: {name}: {why:?}");
            let refused =
                why.iter().all(|why| why.contains("gives no userfaultfd") && why.contains("(os error 1)"));
            assert!(refused, "{about}: {name}: {why:?}");
        }
        drop(vmm);
        for (name, ..) in SNAPSHOTS {
            for prefault in [false, true] {
                let log = restore(&scratch, &scratch.path(name), &serial, given, prefault);
                let first = log.contains("filled before the guest runs") && log.contains("(os error 1)");
                assert_eq!(first, shared && !prefault && !userfaultfd, "{about}: {name}: {log}");
            }
        }
    }
}

#[test]
fn a_user_without_a_userfaultfd_saves_and_restores_in_every_way() {
    saves_and_restores(false);
}

#[test]
fn a_user_of_the_device_saves_and_restores_in_every_way() {
    if !gets_userfaultfd(true) {
        eprintln!(
            "not on this host: a user who is not root and gets a userfaultfd; without one is what is tested"
        );
    }
    saves_and_restores(true);
}

/// Its socket's file would let them.
#[test]
fn a_receiver_takes_a_vm_of_its_own_users_process_and_of_no_other() {
    let scratch = Scratch::new();
    let stranger = Vmm::as_user(&scratch, &[], false);
    let theirs = counting_with(&stranger, &scratch, &json!({}));
    let receiver = Vmm::with_api(&scratch, [""; 0]);
    let arrived = SerialFile::new(scratch.path("arrived"));
    let (mut received, path) = receive(&receiver, &scratch, &arrived);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).unwrap();
    let uid = |vmm: &Vmm| fs::metadata(format!("/proc/{}", vmm.pid())).unwrap().uid();
    if uid(&stranger) == uid(&receiver) {
        eprintln!("not tested by this user: another one is root's to become; its own is taken");
        stranger.api().done("vm.send-migration", &to(&path));
        assert_eq!(received.answer().status, 204);
        return goes_on(&theirs, &arrived);
    }
    refused(&stranger.api().put_json("vm.send-migration", &to(&path)), 500, "migration");
    let log = receiver.stderr.text();
    assert!(log.contains("a process of another user has tried to connect"), "{log}");
    theirs.wait_longer_than(theirs.text().len() + 40);
    assert!(!received.is_answered());

    let inside = Scratch::new();
    let (mut ours, serial) = counting_guest(&inside);
    ours.api().done("vm.send-migration", &to(&path));
    assert_eq!(received.answer().status, 204);
    ours.expect_exit(0);
    goes_on(&serial, &arrived);
}

/// Such a module's code is loaded, and may do anything.
#[test]
fn a_host_whose_name_services_are_modules_costs_names_and_nothing_else() {
    let scratch = Scratch::new();
    let Some(vmm) = Vmm::among_name_services(&scratch) else {
        return eprintln!("not tested by this user: only root gives a process an nsswitch.conf of its own");
    };
    let body = |host: &str, port| json!({ "receiver_url": format!("tcp:{host}:{port}") });
    for _ in 0..2 {
        let answer = vmm.api().put_json("vm.receive-migration", &body("nowhere.invalid", 1));
        refused(&answer, 500, "only files and dns are asked");
    }
    let port = free_port();
    let mut received = pending(&vmm, "vm.receive-migration", &body("localhost", port));
    wait_until(LIMIT, || TcpStream::connect(("127.0.0.1", port)).ok(), || "a name in /etc/hosts".to_owned());
    vmm.api().puts(&["vm.cancel"]);
    refused(&received.answer(), 409, "cancelled");
}
