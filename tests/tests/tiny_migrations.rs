//! Migrations of tiny guests between two real processes. They run on any KVM.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]

#[path = "tiny_migrations/connections.rs"]
mod connections;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use serde_json::json;
use vmm_state::Phase;
use vmm_tests::harness::counting::{counting_guest, counting_with, goes_on};
use vmm_tests::harness::migrating::{arrives_paused, moves, pending, receive, receive_at, to, turn};
use vmm_tests::harness::{Answer, LIMIT, Scratch, SerialFile, Vmm, refused, vm_config, wait_until};
use vmm_tests::tiny::Guest;

#[test]
fn a_guest_goes_on_elsewhere_and_comes_to_a_third() {
    let _turn = turn();
    let scratch = Scratch::new();
    let (first, serial) = counting_guest(&scratch);
    let (second, other) = moves(&scratch, first, to);
    assert_eq!(second.api().phase(), Phase::Running);
    goes_on(&serial, &other);
    let (third, last) = moves(&scratch, second, to);
    goes_on(&other, &last);
    third.api().puts(&["vm.pause", "vm.resume", "vm.reboot"]);
}

#[test]
fn a_paused_guest_arrives_paused() {
    let _turn = turn();
    let scratch = Scratch::new();
    let (first, serial) = counting_guest(&scratch);
    arrives_paused(&scratch, first, &serial, to);
}

/// A source that nobody receives stays as it is, and can be sent again.
#[test]
fn nobody_there_is_told_and_changes_nothing() {
    let _turn = turn();
    let scratch = Scratch::new();
    let (first, serial) = counting_guest(&scratch);
    let answer = first.api().put_json("vm.send-migration", &to(&scratch.path("nobody")));
    refused(&answer, 500, "cannot connect to the receiver");
    assert_eq!(first.api().phase(), Phase::Running);
    serial.wait_longer_than(serial.text().len() + 40);
}

#[test]
fn a_receiver_is_cancelled_and_waits_again() {
    let _turn = turn();
    let scratch = Scratch::new();
    let vmm = Vmm::with_api(&scratch, [""; 0]);
    let serial = SerialFile::new(scratch.path("serial"));
    for _ in 0..2 {
        let (mut received, path) = receive(&vmm, &scratch, &serial);
        vmm.api().puts(&["vm.cancel"]);
        refused(&received.answer(), 409, "cancelled");
        assert_eq!(vmm.api().phase(), Phase::Empty);
        assert!(!path.exists(), "nothing is left");
    }
}

/// Stands between two ends, and lets so many bytes through to the destination before it closes both.
fn relay(at: &Path, to: &Path, most: usize) -> std::thread::JoinHandle<()> {
    let listener = UnixListener::bind(at).unwrap();
    let to = to.to_owned();
    std::thread::spawn(move || {
        let (mut source, _) = listener.accept().unwrap();
        let mut destination = UnixStream::connect(to).unwrap();
        let (mut back, mut from) = (source.try_clone().unwrap(), destination.try_clone().unwrap());
        let answers = std::thread::spawn(move || drop(std::io::copy(&mut from, &mut back)));
        let mut left = most;
        let mut buffer = [0; 4096];
        while left > 0 {
            let room = buffer.len().min(left);
            match source.read(&mut buffer[..room]) {
                Ok(0) | Err(_) => break,
                Ok(count) => {
                    left -= count;
                    if destination.write_all(&buffer[..count]).is_err() {
                        break;
                    }
                }
            }
        }
        let _ = destination.shutdown(std::net::Shutdown::Both);
        let _ = source.shutdown(std::net::Shutdown::Both);
        answers.join().unwrap();
    })
}

#[test]
fn a_link_that_is_cut_leaves_the_guest_where_it_was_and_the_next_migration_succeeds() {
    let _turn = turn();
    let scratch = Scratch::new();
    let (mut first, serial) = counting_guest(&scratch);
    let mut second = Vmm::with_api(&scratch, [""; 0]);
    let other = SerialFile::new(scratch.path("other"));
    for most in [1, 20, 300, 2000, 40_000, 300_000] {
        let (mut received, path) = receive(&second, &scratch, &other);
        let between = scratch.path("between");
        let _ = fs::remove_file(&between);
        let relay = relay(&between, &path, most);
        let answer = first.api().put_json("vm.send-migration", &to(&between));
        relay.join().unwrap();
        assert_eq!(answer.status, 500, "{most}: {answer:?}");
        assert_eq!(first.api().phase(), Phase::Running, "{most}");

        if most <= 300 && !received.is_answered() {
            // What never said Hello is not a source.
            second.api().puts(&["vm.cancel"]);
        }
        let answer = received.answer();
        assert!([409, 500].contains(&answer.status), "{most}: {answer:?}");
        assert_eq!(second.api().phase(), Phase::Empty, "{most}");
        serial.wait_longer_than(serial.text().len() + 20);
    }
    let (mut received, path) = receive(&second, &scratch, &other);
    first.api().done("vm.send-migration", &to(&path));
    assert_eq!(received.answer().status, 204);
    first.expect_exit(0);
    goes_on(&serial, &other);
    second.api().puts(&["vmm.shutdown"]);
    second.expect_exit(0);
}

/// The disk's image is locked by one of both at any time, and by the new one in the end.
#[test]
fn disks_go_along_with_their_locks() {
    let _turn = turn();
    let scratch = Scratch::new();
    let mut first = Vmm::with_api(&scratch, [""; 0]);
    let disks = json!([{ "path": scratch.disk("disk", 1 << 20), "image_type": "Raw" }]);
    let serial = counting_with(&first, &scratch, &json!({ "disks": disks }));
    let mut second = Vmm::with_api(&scratch, [""; 0]);
    let other = SerialFile::new(scratch.path("other"));

    // One that fails before the hand-over leaves the lock where it was.
    let (mut received, path) = receive(&second, &scratch, &other);
    let between = scratch.path("between");
    let relay = relay(&between, &path, 3000);
    assert_eq!(first.api().put_json("vm.send-migration", &to(&between)).status, 500);
    relay.join().unwrap();
    assert_eq!(received.answer().status, 500);
    let third = Vmm::with_api(&scratch, [""; 0]);
    let mut another = vm_config(&scratch.guest(Guest::Pages), &scratch.path("third"));
    another["disks"] = disks;
    third.api().create(&another);
    refused(&third.api().put("vm.boot"), 500, "locked");

    let (mut received, path) = receive(&second, &scratch, &other);
    first.api().done("vm.send-migration", &to(&path));
    assert_eq!(received.answer().status, 204);
    first.expect_exit(0);
    goes_on(&serial, &other);
    refused(&third.api().put("vm.boot"), 500, "locked");
    second.api().puts(&["vm.delete"]);
    third.api().puts(&["vm.boot"]);
    second.api().puts(&["vmm.shutdown"]);
    second.expect_exit(0);
}

/// Lets so many bytes through, then holds the link still until it is told to go on by being dropped.
struct Held {
    thread: Option<std::thread::JoinHandle<()>>,
    go_on: std::sync::mpsc::Sender<()>,
    reached: std::sync::mpsc::Receiver<()>,
}

fn hold(at: &Path, to: &Path, most: u64) -> Held {
    let listener = UnixListener::bind(at).unwrap();
    let to = to.to_owned();
    let (go_on, wait) = std::sync::mpsc::channel();
    let (tell, reached) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || {
        let (mut source, _) = listener.accept().unwrap();
        let mut destination = UnixStream::connect(to).unwrap();
        let (mut back, mut from) = (source.try_clone().unwrap(), destination.try_clone().unwrap());
        let answers = std::thread::spawn(move || drop(std::io::copy(&mut from, &mut back)));
        let let_through = std::io::copy(&mut (&mut source).take(most), &mut destination);
        assert_eq!(let_through.unwrap(), most, "there is less to be held");
        let _ = tell.send(());
        let _ = wait.recv();
        let _ = std::io::copy(&mut source, &mut destination);
        let _ = destination.shutdown(std::net::Shutdown::Both);
        let _ = source.shutdown(std::net::Shutdown::Both);
        answers.join().unwrap();
    });
    Held { thread: Some(thread), go_on, reached }
}

impl Held {
    fn end(mut self) {
        let _ = self.go_on.send(());
        self.thread.take().unwrap().join().unwrap();
    }
}

#[test]
fn clients_are_served_and_a_migration_is_cancelled_while_its_link_stalls() {
    let _turn = turn();
    let scratch = Scratch::new();
    let (first, serial) = counting_guest(&scratch);
    let second = Vmm::with_api(&scratch, [""; 0]);
    let other = SerialFile::new(scratch.path("other"));
    for (number, at_source) in [true, false].into_iter().enumerate() {
        let (mut received, path) = receive(&second, &scratch, &other);
        let between = scratch.path(format!("between{number}"));
        let held = hold(&between, &path, 20_000);
        let mut sent = pending(&first, "vm.send-migration", &to(&between));
        held.reached.recv_timeout(LIMIT).unwrap();
        for vmm in [&first, &second] {
            assert_eq!(vmm.api().get("vmm.ping").status, 200);
        }
        assert_eq!(first.api().state(), "Running");
        assert!(!sent.is_answered() && !received.is_answered());
        let vmm = if at_source { &first } else { &second };
        vmm.api().puts(&["vm.cancel"]);
        if at_source {
            refused(&sent.answer(), 409, "cancelled");
            held.end();
            // Whether it was told why depends on where in a frame the link stalled.
            assert_ne!(received.answer().status, 204);
        } else {
            refused(&received.answer(), 409, "cancelled");
            held.end();
            assert_ne!(sent.answer().status, 204);
        }
        assert_eq!(first.api().phase(), Phase::Running);
        assert_eq!(second.api().phase(), Phase::Empty);
        serial.wait_longer_than(serial.text().len() + 20);
    }
}

#[test]
fn when_one_end_dies_the_other_is_as_before() {
    let _turn = turn();
    let scratch = Scratch::new();
    let (first, serial) = counting_guest(&scratch);
    for (number, most) in [100, 20_000, 200_000].into_iter().enumerate() {
        let second = Vmm::with_api(&scratch, [""; 0]);
        let other = SerialFile::new(scratch.path("other"));
        let (_received, path) = receive(&second, &scratch, &other);
        let between = scratch.path(format!("between{number}"));
        let held = hold(&between, &path, most);
        let mut sent = pending(&first, "vm.send-migration", &to(&between));
        held.reached.recv_timeout(LIMIT).unwrap();
        drop(second);
        held.end();
        refused(&sent.answer(), 500, "link");
        assert_eq!(first.api().phase(), Phase::Running, "the destination died at {most}");
        serial.wait_longer_than(serial.text().len() + 20);
    }
    let mut second = Vmm::with_api(&scratch, [""; 0]);
    let other = SerialFile::new(scratch.path("other"));
    let (mut received, path) = receive(&second, &scratch, &other);
    let between = scratch.path("between");
    let held = hold(&between, &path, 20_000);
    let _sent = pending(&first, "vm.send-migration", &to(&between));
    held.reached.recv_timeout(LIMIT).unwrap();
    drop(first);
    held.end();
    refused(&received.answer(), 500, "link");
    assert_eq!(second.api().phase(), Phase::Empty, "the source died");
    second.api().puts(&["vmm.shutdown"]);
    second.expect_exit(0);
}

/// Passes on whole frames of the first connection, and cuts it after so many in one direction. Later ones pass whole.
fn relay_frames(at: &Path, to: &Path, down: u64, up: u64) {
    let listener = UnixListener::bind(at).unwrap();
    let to = to.to_owned();
    std::thread::spawn(move || {
        let mut limits = Some((down, up));
        while let Ok((source, _)) = listener.accept() {
            let Ok(destination) = UnixStream::connect(&to) else { continue };
            let (down, up) = limits.take().unwrap_or((u64::MAX, u64::MAX));
            let (back, from) = (source.try_clone().unwrap(), destination.try_clone().unwrap());
            std::thread::spawn(move || copy_frames(&from, &back, up));
            std::thread::spawn(move || copy_frames(&source, &destination, down));
        }
    });
}

fn copy_frames(mut from: &UnixStream, mut to: &UnixStream, most: u64) {
    let mut frame = Vec::new();
    for _ in 0..most {
        frame.resize(16, 0);
        if from.read_exact(&mut frame).is_err() {
            // What it still says the other way is passed on.
            let _ = to.shutdown(std::net::Shutdown::Write);
            return;
        }
        let length = u64::from_le_bytes(frame[8..].try_into().unwrap());
        frame.resize(16 + usize::try_from(length).unwrap(), 0);
        if from.read_exact(&mut frame[16..]).is_err() || to.write_all(&frame).is_err() {
            break;
        }
    }
    for end in [from, to] {
        let _ = end.shutdown(std::net::Shutdown::Both);
    }
}

/// Cuts the link after each frame of a direction, until one migration succeeds.
fn cut_after_each_frame(limits: impl Fn(u64) -> (u64, u64)) {
    let scratch = Scratch::new();
    let (mut first, serial) = counting_guest(&scratch);
    let second = Vmm::with_api(&scratch, [""; 0]);
    let other = SerialFile::new(scratch.path("other"));
    for frames in 0.. {
        let (mut received, path) = receive(&second, &scratch, &other);
        let between = scratch.path(format!("between{frames}"));
        let (down, up) = limits(frames);
        relay_frames(&between, &path, down, up);
        let answer = first.api().put_json("vm.send-migration", &to(&between));
        if answer.status == 204 {
            assert!(frames > 3, "the link was not cut");
            assert_eq!(received.answer().status, 204, "after {frames}");
            break;
        }
        assert_eq!(answer.status, 500, "after {frames}: {answer:?}");
        assert_eq!(first.api().phase(), Phase::Running, "after {frames}: {answer:?}");
        if down == 0 {
            second.api().puts(&["vm.cancel"]);
        }
        assert_ne!(received.answer().status, 204, "after {frames}: two guests");
        assert_eq!(second.api().phase(), Phase::Empty, "after {frames}");
        assert!(!answer.body.contains("doubt"), "after {frames}: {answer:?}");
    }
    first.expect_exit(0);
    goes_on(&serial, &other);
}

#[test]
fn exactly_one_guest_runs_whichever_frame_of_the_source_is_the_last() {
    let _turn = turn();
    cut_after_each_frame(|frames| (frames, u64::MAX));
}

#[test]
fn exactly_one_guest_runs_whichever_frame_of_the_destination_is_the_last() {
    let _turn = turn();
    cut_after_each_frame(|frames| (u64::MAX, frames + 1));
}

#[test]
fn a_guest_goes_over_tcp() {
    let _turn = turn();
    let scratch = Scratch::new();
    let (mut first, serial) = counting_guest(&scratch);
    let second = Vmm::with_api(&scratch, [""; 0]);
    let other = SerialFile::new(scratch.path("other"));
    // A port that was free a moment ago.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let address = format!("tcp:127.0.0.1:{port}");
    let mut received = receive_at(&second, &address, None, &other);
    let body = json!({ "destination_url": address, "connections": 4 });
    let refused = |answer: &Answer| answer.body.contains("refused");
    let answer = wait_until(
        LIMIT,
        || Some(first.api().put_json("vm.send-migration", &body)).filter(|answer| !refused(answer)),
        || "a receiver".to_owned(),
    );
    assert_eq!(answer.status, 204, "{answer:?}");
    assert_eq!(received.answer().status, 204);
    first.expect_exit(0);
    goes_on(&serial, &other);
}
