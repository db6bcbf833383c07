//! What an operator asks of a migration beside the VM's moving: checks, progress, limits, and a word where it is in doubt. Tiny
//! guests between real processes.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]

use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use vmm_state::Phase;
use vmm_tests::harness::counting::{counting_guest, counting_with, goes_on};
use vmm_tests::harness::migrating::{free_port, pending, progress, receive, receive_with, turn, until, url};
use vmm_tests::harness::{Answer, LIMIT, Scratch, SerialFile, Vmm, refused, vm_config, wait_until};
use vmm_tests::tiny::Guest;

#[test]
fn a_check_says_yes_and_the_same_receiver_then_takes_the_vm() {
    let _turn = turn();
    let scratch = Scratch::new();
    let (mut first, serial) = counting_guest(&scratch);
    let second = Vmm::with_api(&scratch, [""; 0]);
    assert_eq!(progress(&second)["status"], "None");
    let other = SerialFile::new(scratch.path("other"));
    let (mut received, path) = receive(&second, &scratch, &other);
    for _ in 0..3 {
        first.api().done("vm.send-migration", &json!({ "destination_url": url(&path), "check": true }));
        assert_eq!(first.api().phase(), Phase::Running);
        let checked = progress(&first);
        assert_eq!((&checked["status"], &checked["check"]), (&json!("Completed"), &json!(true)), "{checked}");
        assert!(!received.is_answered(), "it still waits");
    }
    serial.wait_longer_than(serial.text().len() + 20);
    first.api().done("vm.send-migration", &json!({ "destination_url": url(&path) }));
    assert_eq!(received.answer().status, 204);
    first.expect_exit(0);
    goes_on(&serial, &other);
    let arrived = progress(&second);
    assert_eq!(
        (&arrived["status"], &arrived["role"]),
        (&json!("Completed"), &json!("Destination")),
        "{arrived}"
    );
}

#[test]
fn a_check_names_what_is_missing_and_changes_nothing_at_either_end() {
    let _turn = turn();
    let scratch = Scratch::new();
    let first = Vmm::with_api(&scratch, [""; 0]);
    let image = json!({ "disks": [{ "path": scratch.disk("disk", 1 << 20), "image_type": "Raw" }] });
    let serial = counting_with(&first, &scratch, &image);
    let second = Vmm::with_api(&scratch, [""; 0]);
    let other = SerialFile::new(scratch.path("other"));
    let disks = json!({ "disks": [{ "id": "_disk0", "path": scratch.path("absent.raw") }] });
    let (mut received, path) = receive_with(&second, &scratch, &other, &disks);
    let body = json!({ "destination_url": url(&path), "check": true });
    let answer = first.api().put_json("vm.send-migration", &body);
    for words in ["the destination lacks what the VM needs", "Resource disks[0].path", "absent.raw"] {
        refused(&answer, 500, words);
    }
    let failed = progress(&first);
    assert_eq!((&failed["status"], &failed["sent_bytes"]), (&json!("Failed"), &json!(0)), "{failed}");
    assert!(failed["causes"].to_string().contains("absent.raw"), "{failed}");
    assert_eq!(first.api().phase(), Phase::Running);
    serial.wait_longer_than(serial.text().len() + 20);
    refused(&received.answer(), 500, "absent.raw");
    assert_eq!(second.api().phase(), Phase::Empty);
}

/// Whoever reaches the port can name files; this end's operator says which.
#[test]
fn a_tcp_receiver_opens_no_path_that_its_operator_has_not_named() {
    let _turn = turn();
    let scratch = Scratch::new();
    let (mut first, serial) = counting_guest(&scratch);
    let second = Vmm::with_api(&scratch, [""; 0]);
    let other = SerialFile::new(scratch.path("other"));
    let address = format!("tcp:127.0.0.1:{}", free_port());
    let send = |body: &Value| {
        let body = json!({ "destination_url": address, "check": body["check"] == json!(true) });
        // The receiver before may still be closing.
        let ends = ["refused", "reset", "has closed the connection"];
        let comes = |answer: &Answer| !ends.iter().any(|words| answer.body.contains(words));
        wait_until(
            LIMIT,
            || Some(first.api().put_json("vm.send-migration", &body)).filter(comes),
            || "a receiver".to_owned(),
        )
    };
    let serial_to = json!({ "mode": "File", "file": other.path() });
    for paths in [Value::Null, json!([]), json!(["/nowhere"])] {
        let mut body = json!({ "receiver_url": address, "serial": serial_to });
        if !paths.is_null() {
            body["paths"] = paths;
        }
        let mut received = pending(&second, "vm.receive-migration", &body);
        let answer = send(&json!({}));
        refused(&answer, 500, "payload.kernel");
        refused(&answer, 500, "is not among this receiver's paths");
        assert!(!answer.body.contains("serial.file"), "that is the operator's own: {answer:?}");
        refused(&received.answer(), 500, "payload.kernel");
        assert_eq!(second.api().phase(), Phase::Empty);
        assert_eq!(first.api().phase(), Phase::Running);
    }
    let body = json!({ "receiver_url": address, "serial": serial_to, "paths": [scratch.path("")] });
    let mut received = pending(&second, "vm.receive-migration", &body);
    assert_eq!(send(&json!({ "check": true })).status, 204);
    assert_eq!(send(&json!({})).status, 204);
    assert_eq!(received.answer().status, 204);
    first.expect_exit(0);
    goes_on(&serial, &other);
}

#[test]
fn who_does_not_wait_is_told_by_progress_and_the_source_can_stay() {
    let _turn = turn();
    let scratch = Scratch::new();
    let (first, serial) = counting_guest(&scratch);
    let nobody = json!({ "destination_url": url(&scratch.path("nobody")), "detach": true });
    first.api().done("vm.send-migration", &nobody);
    let failed = until(&first, "a failure", |now| now["status"] == "Failed");
    assert!(failed["causes"].to_string().contains("cannot connect to the receiver"), "{failed}");
    assert_eq!(first.api().phase(), Phase::Running);

    let second = Vmm::with_api(&scratch, [""; 0]);
    let other = SerialFile::new(scratch.path("other"));
    let (mut received, path) = receive(&second, &scratch, &other);
    let body = json!({ "destination_url": url(&path), "detach": true, "preserve_source": true });
    first.api().done("vm.send-migration", &body);
    assert_eq!(received.answer().status, 204);
    let done = until(&first, "the end", |now| now["status"] == "Completed");
    for name in ["elapsed_us", "memory_bytes", "sent_bytes", "passes", "blackout_us", "bandwidth"] {
        assert!(done[name].as_u64().unwrap() > 0, "{name} in {done}");
    }
    goes_on(&serial, &other);
    // It is here, without a VM, and of use.
    first.api().wait_for(Phase::Empty);
    let again = SerialFile::new(scratch.path("again"));
    first.api().create(&vm_config(&scratch.guest(Guest::Pages), again.path()));
    first.api().puts(&["vm.boot"]);
    again.wait_for("00000003\n");
    first.api().puts(&["vm.delete"]);
    // What was given away can come back.
    let back = SerialFile::new(scratch.path("back"));
    let (mut received, path) = receive(&first, &scratch, &back);
    second.api().done("vm.send-migration", &json!({ "destination_url": url(&path) }));
    assert_eq!(received.answer().status, 204);
    goes_on(&other, &back);
}

#[test]
fn a_receiver_that_nobody_waits_for_answers_when_a_source_can_come() {
    let _turn = turn();
    let scratch = Scratch::new();
    let (mut first, serial) = counting_guest(&scratch);
    let second = Vmm::with_api(&scratch, [""; 0]);
    let (path, other) = (scratch.path("m"), SerialFile::new(scratch.path("other")));
    // Where it cannot listen, it is no success.
    let away = scratch.path("no/such/folder");
    let answer =
        second.api().put_json("vm.receive-migration", &json!({ "receiver_url": url(&away), "detach": true }));
    assert_eq!(answer.status, 500, "{answer:?}");
    assert_eq!(second.api().phase(), Phase::Empty);

    let serial_to = json!({ "mode": "File", "file": other.path() });
    let body = json!({ "receiver_url": url(&path), "serial": serial_to, "detach": true });
    second.api().done("vm.receive-migration", &body);
    assert_eq!(second.api().phase(), Phase::Receiving);
    // The first attempt finds it.
    first.api().done("vm.send-migration", &json!({ "destination_url": url(&path) }));
    first.expect_exit(0);
    until(&second, "the VM", |now| now["status"] == "Completed");
    goes_on(&serial, &other);
}

/// With next to no bandwidth a migration lasts as long as it is let.
#[test]
fn a_limit_of_bandwidth_holds_and_vcpus_are_slowed_down_only_if_asked() {
    let _turn = turn();
    let scratch = Scratch::new();
    let (first, serial) = counting_guest(&scratch);
    let second = Vmm::with_api(&scratch, [""; 0]);
    let other = SerialFile::new(scratch.path("other"));
    let (mut received, path) = receive(&second, &scratch, &other);
    let body = json!({ "destination_url": url(&path), "max_bandwidth": 1, "detach": true });
    first.api().done("vm.send-migration", &body);
    until(&first, "a pass", |now| now["step"] == "Copying");
    // The silence of a whole chunk is no silence of the link.
    std::thread::sleep(Duration::from_secs(12));
    let slow = progress(&first);
    assert_eq!(slow["status"], "Active", "{slow}");
    assert!(slow["sent_bytes"].as_u64() < Some(1 << 20), "{slow}");
    assert_eq!(progress(&second)["step"], "Receiving");
    first.api().puts(&["vm.cancel"]);
    assert_eq!(progress(&first)["status"], "Cancelled");
    assert_ne!(received.answer().status, 204);

    // A guest that writes a MiB again and again, through a link that carries 4 MiB per second.
    let send = |path: &Path, slows: bool| {
        let body = json!({
            "destination_url": url(path), "max_bandwidth": 4 << 20, "downtime_ms": 100, "auto_converge": slows,
            "detach": true, "preserve_source": true,
        });
        first.api().done("vm.send-migration", &body);
    };
    let (mut received, path) = receive(&second, &scratch, &other);
    send(&path, false);
    let now = until(&first, "passes", |now| now["passes"].as_u64() >= Some(6));
    assert_eq!((&now["throttle"], &now["status"]), (&json!(0), &json!("Active")), "{now}");
    assert!(
        now["dirty_rate"].as_u64() > Some(0) && now["expected_blackout_ms"].as_u64() > Some(100),
        "{now}"
    );
    first.api().puts(&["vm.cancel"]);
    assert_ne!(received.answer().status, 204);
    assert_eq!(first.api().phase(), Phase::Running);
    serial.wait_longer_than(serial.text().len() + 40);

    let (mut received, path) = receive(&second, &scratch, &other);
    send(&path, true);
    let slowed = until(&first, "slower vCPUs", |now| {
        now["throttle"].as_u64() >= Some(30) || now["status"] != "Active"
    });
    assert!(slowed["throttle"].as_u64() >= Some(20), "{slowed}");
    // How far down they must go for the rest to fit depends on the host; it may be done by now.
    if first.api().put("vm.cancel").status == 204 {
        assert_ne!(received.answer().status, 204);
        assert_eq!(first.api().phase(), Phase::Running);
        serial.wait_longer_than(serial.text().len() + 40);
    } else {
        assert_eq!(received.answer().status, 204);
        goes_on(&serial, &other);
    }
}

/// Commit's number (WIRE.md).
const COMMIT: u16 = 68;

/// Passes frames on until the source sends Commit, which is passed on or not; then all is cut, and nobody is there any more.
fn cut_at_commit(at: &Path, to: &Path, passes: bool) {
    let listener = UnixListener::bind(at).unwrap();
    let (at, to) = (at.to_owned(), to.to_owned());
    std::thread::spawn(move || {
        let (mut source, _) = listener.accept().unwrap();
        fs::remove_file(at).unwrap();
        drop(listener);
        let mut destination = UnixStream::connect(to).unwrap();
        let (mut back, mut from) = (source.try_clone().unwrap(), destination.try_clone().unwrap());
        let answers = std::thread::spawn(move || {
            let mut byte = [0];
            while from.read_exact(&mut byte).is_ok() && back.write_all(&byte).is_ok() {}
        });
        let mut frame = vec![0; 16];
        while source.read_exact(&mut frame[..16]).is_ok() {
            let length = usize::try_from(u64::from_le_bytes(frame[8..16].try_into().unwrap())).unwrap();
            frame.resize(16 + length, 0);
            source.read_exact(&mut frame[16..]).unwrap();
            let commit = u16::from_le_bytes(frame[..2].try_into().unwrap()) == COMMIT;
            if commit {
                // The source hears no more.
                source.shutdown(Shutdown::Both).unwrap();
            }
            if !commit || passes {
                destination.write_all(&frame).unwrap();
            }
            if commit {
                break;
            }
        }
        let _ = destination.shutdown(Shutdown::Both);
        answers.join().unwrap();
    });
}

#[test]
fn in_doubt_the_operator_decides() {
    let _turn = turn();
    let scratch = Scratch::new();
    let mut pairs = Vec::new();
    for (number, passes) in [false, true, true].into_iter().enumerate() {
        let folder = Scratch::new();
        let first = Vmm::with_api(&folder, [""; 0]);
        let disks = json!([{ "path": folder.disk("disk", 1 << 20), "image_type": "Raw" }]);
        let serial = counting_with(&first, &folder, &json!({ "disks": disks }));
        for name in ["vm.migration-keep", "vm.migration-yield"] {
            refused(&first.api().put(name), 409, "no VM is being given away");
        }
        let second = Vmm::with_api(&folder, [""; 0]);
        let other = SerialFile::new(folder.path("other"));
        let (received, path) = receive(&second, &folder, &other);
        let between = scratch.path(format!("between{number}"));
        cut_at_commit(&between, &path, passes);
        let sent = pending(&first, "vm.send-migration", &json!({ "destination_url": url(&between) }));
        pairs.push((folder, first, serial, second, other, received, sent));
    }
    // It asks for a minute.
    for (_, first, ..) in &pairs {
        until(first, "an answer that does not come", |now| now["step"] == "Asking");
        for name in ["vm.migration-keep", "vm.migration-yield"] {
            refused(&first.api().put(name), 409, "not in doubt");
        }
    }
    std::thread::sleep(Duration::from_secs(55));
    for (_, first, ..) in &pairs {
        until(first, "the end of asking", |now| now["status"] == "InDoubt");
        assert_eq!((first.api().phase(), first.api().state().as_str()), (Phase::Migrating, "Running"));
        refused(&first.api().put("vm.resume"), 409, "a migration is under way");
    }
    // The destination has none, for it never heard of Commit.
    let (_folder, first, serial, second, _, mut received, mut sent) = pairs.remove(0);
    refused(&sent.answer(), 500, "in doubt");
    assert_ne!(received.answer().status, 204);
    assert_eq!(second.api().phase(), Phase::Empty);
    first.api().puts(&["vm.migration-keep"]);
    assert_eq!((first.api().phase(), &progress(&first)["status"]), (Phase::Running, &json!("Failed")));
    serial.wait_longer_than(serial.text().len() + 40);
    // The destination has it, and said so in vain.
    let (_folder, mut first, serial, second, other, mut received, mut sent) = pairs.remove(0);
    refused(&sent.answer(), 500, "in doubt");
    assert_eq!(received.answer().status, 204);
    assert_eq!(second.api().phase(), Phase::Running);
    first.api().puts(&["vm.migration-yield"]);
    first.expect_exit(0);
    goes_on(&serial, &other);
    // Likewise, but the operator takes it for dead.
    let (_folder, first, serial, second, _, mut received, mut sent) = pairs.remove(0);
    refused(&sent.answer(), 500, "in doubt");
    assert_eq!(received.answer().status, 204);
    refused(&first.api().put("vm.migration-keep"), 500, "TakeLocks");
    assert_eq!((first.api().phase(), first.api().state().as_str()), (Phase::Paused, "Paused"));
    for name in ["vm.resume", "vm.boot"] {
        refused(&first.api().put(name), 500, "the locks of the disks");
    }
    assert_eq!(first.api().phase(), Phase::Paused);
    drop(second);
    // The kernel closes what the rings of a process hold after its end.
    let runs = || (first.api().put("vm.resume").status == 204).then_some(());
    wait_until(LIMIT, runs, || "the locks".to_owned());
    serial.wait_longer_than(serial.text().len() + 40);
}
