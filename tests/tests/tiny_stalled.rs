//! Snapshots, restores and receivers whose files or sockets do not answer, as those of a server that is gone: nobody waits for
//! them. By the real binary, on any KVM.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]

use std::io::Read;
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vmm_state::Phase;
use vmm_tests::harness::counting::{counting_guest, counting_in, counting_with};
use vmm_tests::harness::migrating::{free_port, pending, receive, receive_with, to, until};
use vmm_tests::harness::saving::{from, live, url};
use vmm_tests::harness::withheld::Withheld;
use vmm_tests::harness::{LIMIT, Pending, Scratch, SerialFile, Vmm, refused, vm_config, wait_until};

/// A guest with a disk, saved: the snapshot, and the disk that its restores are to have.
fn saved(scratch: &Scratch) -> (PathBuf, PathBuf) {
    let vmm = Vmm::with_api(scratch, [""; 0]);
    let disks = json!({ "disks": [{ "path": scratch.disk("disk", 1 << 20), "image_type": "Raw" }] });
    let _serial = counting_with(&vmm, scratch, &disks);
    let saved = scratch.path("saved");
    vmm.api().done("vm.snapshot", &live(&saved));
    (saved, scratch.disk("other-disk", 1 << 20))
}

/// The request whose restore does not come to its end, and what `vm.info` says meanwhile.
struct Stalled {
    body: Value,
    info: u16,
}

/// Whoever wants the end of a restore gets it, while `withhold` holds back a file that it needs.
fn ends_by_request(info: u16, more: &Value, withhold: impl Fn(&Path, &Path) -> Withheld) {
    let scratch = Scratch::new();
    let (saved, disk) = saved(&scratch);
    let mut body = from(&saved, &SerialFile::new(scratch.path("of-restored")));
    body["disks"] = json!([{ "id": "_disk0", "path": disk }]);
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let stalled = Stalled { body, info };
    for (end, status, words) in [
        ("vm.cancel", 409, "it was cancelled"),
        ("vm.delete", 500, "the VM was removed"),
        ("vmm.shutdown", 500, "the VM was removed"),
    ] {
        let mut vmm = Vmm::with_api(&scratch, [""; 0]);
        let fresh = vmm.holdings_at_rest();
        let file = withhold(&saved, &disk);
        let body = stalled.body.to_string();
        let mut restore = Pending::send(vmm.socket(), "vm.restore", body.as_bytes());
        file.wait();
        let mut api = vmm.api();
        assert_eq!(api.get("vmm.ping").status, 200);
        let told = api.get("vm.info");
        assert_eq!(told.status, stalled.info, "{told:?}");
        assert!(told.body.contains("Booting"), "{told:?}");
        assert!(!restore.is_answered(), "{end}");
        api.puts(&[end]);
        refused(&restore.answer(), status, words);
        if end == "vmm.shutdown" {
            vmm.expect_exit(0);
            continue;
        }
        assert_eq!(api.phase(), Phase::Empty, "{end}");
        // Another guest has nothing of it.
        drop(counting_in(&vmm, &scratch));
        api.puts(&["vm.delete"]);
        drop((api, restore));
        // Nor does anything stay when the file answers at last.
        drop(file);
        vmm.expect_holdings(&fresh, end);
        vmm.api().done("vm.restore", &stalled.body);
        vmm.api().puts(&["vmm.shutdown"]);
        vmm.expect_exit(0);
    }
}

fn held(path: &Path) -> Withheld {
    let file = Withheld::new(path);
    file.hold();
    file
}

#[test]
fn a_restore_ends_by_request_though_the_manifest_does_not_answer() {
    ends_by_request(404, &json!({}), |saved, _| held(&saved.join("manifest.json")));
}

#[test]
fn a_restore_ends_by_request_though_a_memory_file_does_not_answer() {
    ends_by_request(200, &json!({ "prefault": true }), |saved, _| held(&saved.join("memory-0.bin")));
}

#[test]
fn a_restore_ends_by_request_though_a_disk_does_not_answer() {
    ends_by_request(200, &json!({}), |_, disk| Withheld::closed(disk));
}

/// The first to touch it may be the VMM itself, which has to tell the guest of its generation.
#[test]
fn a_memory_file_that_is_gone_before_its_guest_runs_ends_the_vmm_with_a_word() {
    let scratch = Scratch::new();
    let (saved, disk) = saved(&scratch);
    let mut body = from(&saved, &SerialFile::new(scratch.path("of-restored")));
    body["disks"] = json!([{ "id": "_disk0", "path": disk }]);
    let mut vmm = Vmm::with_api(&scratch, [""; 0]);
    let file = Withheld::closed(&disk);
    let _restore = Pending::send(vmm.socket(), "vm.restore", body.to_string().as_bytes());
    file.wait();
    let memory = saved.join("memory-0.bin");
    std::fs::set_permissions(&memory, std::fs::Permissions::from_mode(0o600)).unwrap();
    std::fs::OpenOptions::new().write(true).open(&memory).unwrap().set_len(0).unwrap();
    drop(file);
    vmm.expect_exit(13);
    let told = vmm.stderr.text();
    assert!(told.contains("memory-0.bin has shrunk or cannot be read"), "{told}");
}

/// They hold memory, and places that the request needs which ends the wait.
#[test]
fn no_more_requests_wait_for_a_restore_than_there_is_room_for() {
    let scratch = Scratch::new();
    let (saved, _) = saved(&scratch);
    let vmm = Vmm::with_api(&scratch, [""; 0]);
    let file = held(&saved.join("manifest.json"));
    let body = from(&saved, &SerialFile::new(scratch.path("of-restored"))).to_string();
    let _restore = Pending::send(vmm.socket(), "vm.restore", body.as_bytes());
    file.wait();
    let mut pauses: Vec<_> = (0..70).map(|_| Pending::send(vmm.socket(), "vm.pause", b"")).collect();
    let told = wait_until(
        LIMIT,
        || {
            let answered: Vec<usize> = (0..70).filter(|at| pauses[*at].is_answered()).collect();
            (answered.len() == 6).then_some(answered)
        },
        || "those that are too many to be answered".to_owned(),
    );
    for at in told {
        refused(&pauses[at].answer(), 503, "requests wait for the end");
    }
    vmm.api().puts(&["vm.cancel"]);
    assert_eq!(vmm.api().phase(), Phase::Empty);
}

#[test]
fn no_more_configurations_are_looked_at_than_there_is_room_for() {
    let scratch = Scratch::new();
    let vmm = Vmm::with_api(&scratch, [""; 0]);
    let kernel = scratch.guest(vmm_tests::tiny::Guest::Hello);
    let config = vm_config(&kernel, &scratch.path("serial")).to_string();
    let file = Withheld::closed(&kernel);
    let mut asked: Vec<_> =
        (0..4).map(|_| Pending::send(vmm.socket(), "vm.validate", config.as_bytes())).collect();
    file.wait();
    let mut more = Pending::send(vmm.socket(), "vm.validate", config.as_bytes());
    refused(&more.answer(), 503, "4 configurations");
    assert!(asked.iter_mut().all(|one| !one.is_answered()));
    drop(file);
    asked.iter_mut().for_each(|one| assert_eq!(one.answer().status, 200));
    assert_eq!(vmm.api().put_json("vm.validate", &serde_json::from_str(&config).unwrap()).status, 200);
}

/// Under the filters of its threads.
#[test]
fn a_receiver_that_cannot_take_a_connection_takes_the_next() {
    let scratch = Scratch::new();
    let vmm = Vmm::with_api(&scratch, [""; 0]);
    let (mut received, path) = receive(&vmm, &scratch, &SerialFile::new(scratch.path("serial")));
    let mut api = vmm.api();
    assert_eq!(api.get("vmm.ping").status, 200);
    let limit = |descriptors: u64| {
        let (pid, files) = (vmm.pid().to_string(), format!("--nofile={descriptors}:4096"));
        assert!(Command::new("prlimit").args(["--pid", &pid, &files]).status().unwrap().success());
    };
    // It has more than that, and gets no other.
    limit(3);
    let first = UnixStream::connect(&path).unwrap();
    wait_until(LIMIT, || vmm.stderr.text().contains("cannot be taken").then_some(()), || vmm.stderr.text());
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(api.get("vmm.ping").status, 200);
    drop(first);
    limit(1024);
    let (source, _serial) = counting_guest(&scratch);
    source.api().done("vm.send-migration", &to(&path));
    assert_eq!(received.answer().status, 204);
}

/// A client does not want it any more; that is no failure of the process.
#[test]
fn a_restore_of_the_command_line_ends_by_request_and_the_vmm_stays() {
    let scratch = Scratch::new();
    let (saved, _) = saved(&scratch);
    let file = held(&saved.join("manifest.json"));
    let vmm = Vmm::with_api(&scratch, ["--restore", &format!("source_url={}", url(&saved))]);
    file.wait();
    vmm.api().puts(&["vm.cancel"]);
    assert_eq!(vmm.api().phase(), Phase::Empty);
    drop(counting_in(&vmm, &scratch));
    assert_eq!(vmm.api().phase(), Phase::Running);
}

#[test]
fn the_end_of_the_vmm_does_not_wait_for_a_snapshot_whose_parent_does_not_answer() {
    for is_live in [false, true] {
        let scratch = Scratch::new();
        let (mut vmm, _serial) = counting_guest(&scratch);
        let (parent, child) = (scratch.path("parent"), scratch.path("child"));
        let body = |folder: &Path, incremental: bool| json!({ "destination_url": url(folder), "live": is_live, "track": true, "incremental": incremental });
        if !is_live {
            vmm.api().puts(&["vm.pause"]);
        }
        vmm.api().done("vm.snapshot", &body(&parent, false));
        let file = held(&parent.join("manifest.json"));
        let text = body(&child, true).to_string();
        let mut snapshot = Pending::send(vmm.socket(), "vm.snapshot", text.as_bytes());
        file.wait();
        assert_eq!(vmm.api().phase(), Phase::Saving);
        vmm.api().puts(&["vmm.shutdown"]);
        refused(&snapshot.answer(), 409, "cancelled");
        vmm.expect_exit(0);
        assert!(!child.join("manifest.json").exists(), "none");
    }
}

#[test]
fn a_receiver_ends_though_a_disk_of_what_arrived_does_not_answer() {
    for end in ["vm.cancel", "vmm.shutdown", "the source's death"] {
        let scratch = Scratch::new();
        let disk = |name| json!({ "disks": [{ "path": scratch.disk(name, 1 << 20), "image_type": "Raw" }] });
        let source = Vmm::with_api(&scratch, [""; 0]);
        let _serial = counting_with(&source, &scratch, &disk("disk"));
        source.api().puts(&["vm.pause"]);
        let mut vmm = Vmm::with_api(&scratch, [""; 0]);
        let (other, serial) = (scratch.disk("other-disk", 1 << 20), SerialFile::new(scratch.path("there")));
        let more = json!({ "disks": [{ "id": "_disk0", "path": other }] });
        let (mut received, path) = receive_with(&vmm, &scratch, &serial, &more);
        // Slowly: whether there is such a disk is looked at before.
        let mut body = to(&path);
        body["max_bandwidth"] = json!(2 << 20);
        let mut sent = pending(&source, "vm.send-migration", &body);
        until(&vmm, "memory that comes", |now| now["step"] == "Receiving");
        let file = Withheld::closed(&other);
        file.wait();
        until(&vmm, "a machine that is made", |now| now["step"] == "Restoring");
        if end.starts_with("the") {
            source.signal("KILL");
            refused(&received.answer(), 500, "the link is lost");
            assert_eq!(vmm.api().phase(), Phase::Empty);
            vmm.api().puts(&["vmm.shutdown"]);
            vmm.expect_exit(0);
            continue;
        }
        vmm.api().puts(&[end]);
        refused(&received.answer(), 409, if end == "vm.cancel" { "cancelled" } else { "the VMM ends" });
        let told = sent.answer();
        refused(&told, 409, "the VM is not given away");
        refused(&told, 409, if end == "vm.cancel" { "cancelled" } else { "the destination's VMM has ended" });
        assert_eq!(source.api().phase(), Phase::Paused, "{end}");
        if end == "vm.cancel" {
            assert_eq!(vmm.api().phase(), Phase::Empty);
            // The file answers at last: what was made of the VM is gone, and the next takes it.
            drop(file);
            let (mut next, path) = receive_with(&vmm, &scratch, &serial, &more);
            source.api().done("vm.send-migration", &to(&path));
            assert_eq!(next.answer().status, 204);
            vmm.api().puts(&["vmm.shutdown"]);
        }
        vmm.expect_exit(0);
    }
}

/// A receiver's request that does not come to its address.
fn receiver_that_waits(scratch: &Scratch) -> Value {
    let tls_dir = scratch.path("tls");
    std::fs::create_dir(&tls_dir).unwrap();
    // Nobody writes to it: who opens it waits.
    assert!(Command::new("mkfifo").arg(tls_dir.join("server-cert.pem")).status().unwrap().success());
    json!({ "receiver_url": format!("tcp:127.0.0.1:{}", free_port()), "tls_dir": tls_dir })
}

#[test]
fn a_receiver_ends_by_request_though_its_certificates_do_not_answer() {
    let scratch = Scratch::new();
    let body = receiver_that_waits(&scratch);
    for end in ["vm.cancel", "vmm.shutdown"] {
        let mut vmm = Vmm::with_api(&scratch, [""; 0]);
        let mut receiver = pending(&vmm, "vm.receive-migration", &body);
        let api = &mut vmm.api();
        wait_until(LIMIT, || (api.phase() == Phase::Receiving).then_some(()), || "a receiver".to_owned());
        api.puts(&[end]);
        refused(&receiver.answer(), 409, if end == "vm.cancel" { "cancelled" } else { "the VMM ends" });
        if end == "vm.cancel" {
            assert_eq!(api.phase(), Phase::Empty);
            // The next has nothing of it.
            let serial = SerialFile::new(scratch.path("next"));
            let (mut next, _) = receive(&vmm, &scratch, &serial);
            api.puts(&["vm.cancel"]);
            refused(&next.answer(), 409, "cancelled");
            api.puts(&["vmm.shutdown"]);
        }
        vmm.expect_exit(0);
    }
}

#[test]
fn a_source_ends_by_request_though_its_certificates_do_not_answer() {
    let scratch = Scratch::new();
    let (mut vmm, serial) = counting_guest(&scratch);
    let tls_dir = scratch.path("tls");
    std::fs::create_dir(&tls_dir).unwrap();
    // Nobody writes to them: who opens one waits.
    for name in ["ca-cert.pem", "client-cert.pem", "client-key.pem"] {
        assert!(Command::new("mkfifo").arg(tls_dir.join(name)).status().unwrap().success());
    }
    let body = json!({ "destination_url": format!("tcp:127.0.0.1:{}", free_port()), "tls_dir": tls_dir });
    for end in ["vm.cancel", "vmm.shutdown"] {
        let mut sent = pending(&vmm, "vm.send-migration", &body);
        let api = &mut vmm.api();
        wait_until(LIMIT, || (api.phase() == Phase::Migrating).then_some(()), || "a migration".to_owned());
        serial.wait_longer_than(serial.text().len() + 40);
        api.puts(&[end]);
        refused(&sent.answer(), 409, if end == "vm.cancel" { "cancelled" } else { "the VM was removed" });
        if end == "vm.cancel" {
            assert_eq!(api.phase(), Phase::Running);
            api.puts(&["vm.pause", "vm.resume"]);
        }
    }
    vmm.expect_exit(0);
}

/// Passes on what connections at `at` say to `to`, and what is answered; what is said after the first 64 KiB slowly, for so long.
fn slow_link(at: &Path, to: &Path, time: Duration) {
    let listener = UnixListener::bind(at).unwrap();
    let to = to.to_owned();
    std::thread::spawn(move || {
        while let Ok((source, _)) = listener.accept() {
            let destination = UnixStream::connect(&to).unwrap();
            let (mut answers, mut back) = (destination.try_clone().unwrap(), source.try_clone().unwrap());
            std::thread::spawn(move || std::io::copy(&mut answers, &mut back));
            std::thread::spawn(move || {
                let (mut from, mut to) = (source, destination);
                std::io::copy(&mut (&mut from).take(64 << 10), &mut to).unwrap();
                let begun = Instant::now();
                while begun.elapsed() < time {
                    std::io::copy(&mut (&mut from).take(6 << 10), &mut to).unwrap();
                    std::thread::sleep(Duration::from_millis(100));
                }
                let _ = std::io::copy(&mut from, &mut to);
                let _ = to.shutdown(Shutdown::Write);
            });
        }
    });
}

#[test]
fn a_link_is_not_lost_whose_keepalives_wait_behind_much_memory() {
    let scratch = Scratch::new();
    let (mut source, destination) = (Vmm::with_api(&scratch, [""; 0]), Vmm::with_api(&scratch, [""; 0]));
    let _serial = counting_in(&source, &scratch);
    source.api().puts(&["vm.pause"]);
    let serial = SerialFile::new(scratch.path("there"));
    let (mut received, path) = receive(&destination, &scratch, &serial);
    let between = scratch.path("between");
    // Half as long again as a silence that is a lost link.
    slow_link(&between, &path, Duration::from_secs(15));
    source.api().done("vm.send-migration", &to(&between));
    assert_eq!(received.answer().status, 204);
    source.expect_exit(0);
    destination.api().puts(&["vm.resume"]);
}
