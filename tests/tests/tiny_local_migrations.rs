//! Migrations that hand guest memory over by its descriptors, between two real processes. They run on any KVM.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]

use std::fs::{self, File};
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Instant;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use serde_json::{Value, json};
use vmm_state::Phase;
use vmm_tests::harness::counting::{counting_with, goes_on};
use vmm_tests::harness::migrating::{arrives_paused, moves, receive, turn, url};
use vmm_tests::harness::{LIMIT, Pending, Scratch, SerialFile, Vmm, refused, wait_until};

/// Boots a guest that counts in memory such as this.
fn guest(scratch: &Scratch, memory: &Value) -> (Vmm, SerialFile) {
    let vmm = Vmm::with_api(scratch, [""; 0]);
    let serial = counting_with(&vmm, scratch, &json!({ "memory": memory }));
    (vmm, serial)
}

fn shared() -> Value {
    json!({ "size": 32 << 20, "shared": true })
}

fn to(path: &Path) -> Value {
    json!({ "destination_url": url(path), "local": true })
}

/// Where the guest's memory is: the process's mappings of files with this in their names.
fn mapped(vmm: &Vmm, name: &str) -> Vec<String> {
    let maps = fs::read_to_string(format!("/proc/{}/maps", vmm.pid())).unwrap();
    let inode = |line: &str| line.split_whitespace().nth(4).unwrap().to_owned();
    maps.lines().filter(|line| line.contains(name)).map(inode).collect()
}

#[test]
fn a_guest_goes_there_and_back_and_its_memory_stays_where_it_is() {
    let _turn = turn();
    let scratch = Scratch::new();
    let (first, serial) = guest(&scratch, &shared());
    let before = mapped(&first, "memfd:mem0");
    assert!(!before.is_empty());
    let (second, other) = moves(&scratch, first, to);
    assert_eq!(second.api().phase(), Phase::Running);
    assert_eq!(mapped(&second, "memfd:mem0"), before, "the same file");
    goes_on(&serial, &other);

    let (third, last) = moves(&scratch, second, to);
    assert_eq!(mapped(&third, "memfd:mem0"), before);
    goes_on(&other, &last);
    third.api().puts(&["vm.pause", "vm.resume", "vm.reboot"]);
}

#[test]
fn a_paused_guest_in_several_zones_arrives_paused() {
    let _turn = turn();
    let scratch = Scratch::new();
    let file = scratch.disk("memory", 8 << 20);
    let memory = json!({ "size": 0, "zones": [
        { "id": "low", "size": 32 << 20, "shared": true },
        { "id": "file", "size": 8 << 20, "shared": true, "file": file },
        { "id": "folder", "size": 8 << 20, "shared": true, "file": scratch.folder() },
    ] });
    let (first, serial) = guest(&scratch, &memory);
    arrives_paused(&scratch, first, &serial, to);
}

#[test]
fn what_cannot_be_handed_over_is_refused_by_name_and_before_anything_happens() {
    let _turn = turn();
    let scratch = Scratch::new();
    let memory = json!({ "size": 0, "zones": [
        { "id": "low", "size": 32 << 20, "shared": true }, { "id": "own", "size": 8 << 20 },
    ] });
    let (first, serial) = guest(&scratch, &memory);
    let nobody = scratch.path("nobody");
    refused(&first.api().put_json("vm.send-migration", &to(&nobody)), 500, "memory zone own is private");
    let tcp = json!({ "destination_url": "tcp:127.0.0.1:9", "local": true });
    refused(&first.api().put_json("vm.send-migration", &tcp), 422, "UNIX sockets only");
    assert_eq!(first.api().phase(), Phase::Running);

    let (plain, _) = guest(&scratch, &json!({ "size": 32 << 20 }));
    refused(&plain.api().put_json("vm.send-migration", &to(&nobody)), 500, "memory zone mem0 is private");
    serial.wait_longer_than(serial.text().len() + 20);
}

/// A frame on its way, with the descriptors beside it.
struct Passing {
    bytes: Vec<u8>,
    files: Vec<OwnedFd>,
}

const DESCRIPTORS: u16 = 77;
const COMMIT: u16 = 68;

impl Passing {
    fn command(&self) -> u16 {
        u16::from_le_bytes([self.bytes[0], self.bytes[1]])
    }

    /// The next frame; `None` at the end.
    fn read(from: &UnixStream) -> Option<Self> {
        let mut passing = Self { bytes: Vec::new(), files: Vec::new() };
        passing.fill(from, 16)?;
        let length = u64::from_le_bytes(passing.bytes[8..16].try_into().unwrap());
        passing.fill(from, 16 + usize::try_from(length).unwrap())?;
        Some(passing)
    }

    fn fill(&mut self, from: &UnixStream, size: usize) -> Option<()> {
        while self.bytes.len() < size {
            let mut bytes = vec![0; size - self.bytes.len()];
            let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
            let mut control = RecvAncillaryBuffer::new(&mut room);
            let iov = &mut [IoSliceMut::new(&mut bytes)];
            let count = rustix::net::recvmsg(from, iov, &mut control, RecvFlags::CMSG_CLOEXEC).ok()?.bytes;
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(files) = message {
                    self.files.extend(files);
                }
            }
            if count == 0 {
                return None;
            }
            self.bytes.extend(&bytes[..count]);
        }
        Some(())
    }

    fn write(&self, to: &UnixStream) -> Option<()> {
        let (mut sent, files): (usize, Vec<_>) = (0, self.files.iter().map(AsFd::as_fd).collect());
        while sent < self.bytes.len() {
            let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
            let mut control = SendAncillaryBuffer::new(&mut room);
            if sent == 0 && !files.is_empty() {
                assert!(control.push(SendAncillaryMessage::ScmRights(&files)));
            }
            let iov = &[IoSlice::new(&self.bytes[sent..])];
            sent += rustix::net::sendmsg(to, iov, &mut control, SendFlags::NOSIGNAL).ok()?;
        }
        Some(())
    }
}

/// What becomes of a frame between the two ends.
enum Fate {
    Pass,
    /// Both connections are closed.
    Cut,
}

type Judge = Box<dyn FnMut(&mut Passing) -> Fate + Send>;

/// Stands between two ends, and lets `down` judge the frames of the source, `up` those of the destination. Connections after
/// the first pass whole.
fn between(at: &Path, to: &Path, down: Judge, up: Judge) {
    let listener = UnixListener::bind(at).unwrap();
    let to = to.to_owned();
    std::thread::spawn(move || {
        let mut judges = Some((down, up));
        while let Ok((source, _)) = listener.accept() {
            let Ok(destination) = UnixStream::connect(&to) else { continue };
            let all = || {
                (
                    Box::new(|_: &mut Passing| Fate::Pass) as Judge,
                    Box::new(|_: &mut Passing| Fate::Pass) as Judge,
                )
            };
            let (down, up) = judges.take().unwrap_or_else(all);
            let (back, from) = (source.try_clone().unwrap(), destination.try_clone().unwrap());
            std::thread::spawn(move || pass(&from, &back, up));
            std::thread::spawn(move || pass(&source, &destination, down));
        }
    });
}

fn pass(from: &UnixStream, to: &UnixStream, mut judge: Judge) {
    while let Some(mut passing) = Passing::read(from) {
        if matches!(judge(&mut passing), Fate::Cut) {
            let _ = from.shutdown(Shutdown::Both);
            break;
        }
        if passing.write(to).is_none() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}

fn whole() -> Judge {
    Box::new(|_| Fate::Pass)
}

/// Lets so many frames pass.
fn first_frames(mut most: u32) -> Judge {
    Box::new(move |_| {
        let fate = if most == 0 { Fate::Cut } else { Fate::Pass };
        most = most.saturating_sub(1);
        fate
    })
}

/// Changes the descriptors on their way.
fn tampered(mut change: impl FnMut(&mut Passing) + Send + 'static) -> Judge {
    Box::new(move |passing| {
        if passing.command() == DESCRIPTORS {
            change(passing);
        }
        Fate::Pass
    })
}

/// Cuts the link after each frame of a direction, until a migration succeeds; nothing is left of those that did not.
fn cut_after_each_frame(judges: impl Fn(u32) -> (Judge, Judge)) {
    let scratch = Scratch::new();
    let (mut first, serial) = guest(&scratch, &shared());
    let second = Vmm::with_api(&scratch, [""; 0]);
    let other = SerialFile::new(scratch.path("other"));
    let holdings = [first.holdings_at_rest(), second.holdings_at_rest()];
    for frames in 1.. {
        let (mut received, path) = receive(&second, &scratch, &other);
        let middle = scratch.path(format!("between{frames}"));
        let (down, up) = judges(frames);
        between(&middle, &path, down, up);
        let answer = first.api().put_json("vm.send-migration", &to(&middle));
        if answer.status == 204 {
            assert!(frames > 4, "the link was not cut");
            assert_eq!(received.answer().status, 204, "after {frames}");
            break;
        }
        assert_eq!(answer.status, 500, "after {frames}: {answer:?}");
        assert!(!answer.body.contains("doubt"), "after {frames}: {answer:?}");
        assert_eq!(first.api().phase(), Phase::Running, "after {frames}: {answer:?}");
        assert_ne!(received.answer().status, 204, "after {frames}: two guests");
        assert_eq!(second.api().phase(), Phase::Empty, "after {frames}");
        first.expect_holdings(&holdings[0], "the source");
        // Who was told of the end may still hold the address for those who ask.
        let rested = || mapped(&second, "memfd:mem0").is_empty().then_some(());
        wait_until(LIMIT, rested, || format!("no memory at the destination, after {frames}"));
        serial.wait_longer_than(serial.text().len() + 20);
    }
    first.expect_exit(0);
    goes_on(&serial, &other);
    drop(holdings);
}

#[test]
fn exactly_one_guest_runs_whichever_frame_of_the_source_is_the_last() {
    let _turn = turn();
    cut_after_each_frame(|frames| (first_frames(frames), whole()));
}

#[test]
fn exactly_one_guest_runs_whichever_frame_of_the_destination_is_the_last() {
    let _turn = turn();
    cut_after_each_frame(|frames| (whole(), first_frames(frames)));
}

/// Says when so many frames have come, and then waits until it is told to go on.
fn held(most: u32) -> (Judge, Receiver<()>, Sender<()>) {
    let (tell, reached) = channel();
    let (go_on, wait) = channel::<()>();
    let mut left = most;
    let judge = move |_: &mut Passing| {
        if left == 0 {
            let _ = tell.send(());
            let _ = wait.recv();
            return Fate::Cut;
        }
        left -= 1;
        Fate::Pass
    };
    (Box::new(judge), reached, go_on)
}

#[test]
fn when_the_destination_dies_at_any_step_the_guest_goes_on_at_the_source() {
    let _turn = turn();
    let scratch = Scratch::new();
    let (first, serial) = guest(&scratch, &shared());
    // Hello, Config, Start, Descriptors, State. After Complete comes Commit, and who sent that must ask.
    for frames in 1..=5 {
        let second = Vmm::with_api(&scratch, [""; 0]);
        let other = SerialFile::new(scratch.path("other"));
        let (_received, path) = receive(&second, &scratch, &other);
        let middle = scratch.path(format!("between{frames}"));
        let (judge, reached, go_on) = held(frames);
        between(&middle, &path, judge, whole());
        let mut sent = Pending::send(first.socket(), "vm.send-migration", to(&middle).to_string().as_bytes());
        reached.recv_timeout(LIMIT).unwrap();
        drop(second);
        let _ = go_on.send(());
        assert_eq!(sent.answer().status, 500, "{frames}");
        assert_eq!(first.api().phase(), Phase::Running, "the destination died after {frames} frames");
        serial.wait_longer_than(serial.text().len() + 20);
    }
}

#[test]
fn when_the_source_dies_at_any_step_the_guest_is_the_destinations_or_gone() {
    let _turn = turn();
    let scratch = Scratch::new();
    for frames in 1..=7 {
        let (first, serial) = guest(&scratch, &shared());
        let second = Vmm::with_api(&scratch, [""; 0]);
        let other = SerialFile::new(scratch.path("other"));
        let (mut received, path) = receive(&second, &scratch, &other);
        let middle = scratch.path(format!("between{frames}"));
        let (judge, reached, go_on) = held(frames);
        between(&middle, &path, judge, whole());
        let _sent = Pending::send(first.socket(), "vm.send-migration", to(&middle).to_string().as_bytes());
        // Who has given the guest away may be gone before its last word.
        assert!(reached.recv_timeout(LIMIT).is_ok() || frames == 7, "{frames}");
        drop(first);
        let _ = go_on.send(());
        let answer = received.answer();
        // The seventh is Commit: what follows is only the word that it has arrived.
        if frames == 7 {
            assert_eq!(answer.status, 204, "{answer:?}");
            goes_on(&serial, &other);
        } else {
            assert_eq!(answer.status, 500, "{frames}: {answer:?}");
            assert_eq!(second.api().phase(), Phase::Empty, "{frames}");
            assert!(mapped(&second, "memfd:mem0").is_empty(), "{frames}");
        }
    }
}

fn memfd(size: u64, sealed: bool) -> OwnedFd {
    let flags = rustix::fs::MemfdFlags::ALLOW_SEALING | rustix::fs::MemfdFlags::CLOEXEC;
    let file = rustix::fs::memfd_create("other", flags).unwrap();
    rustix::fs::ftruncate(&file, size).unwrap();
    if sealed {
        rustix::fs::fcntl_add_seals(&file, rustix::fs::SealFlags::SHRINK).unwrap();
    }
    file
}

#[test]
fn a_peer_that_hands_over_something_else_is_refused_and_nothing_of_it_stays() {
    let _turn = turn();
    let scratch = Scratch::new();
    let (first, serial) = guest(&scratch, &shared());
    let second = Vmm::with_api(&scratch, [""; 0]);
    let other = SerialFile::new(scratch.path("other"));
    // The second makes some of its descriptors after its socket.
    assert_eq!(second.api().get("vmm.ping").status, 200);
    let before = (first.holdings_at_rest(), second.descriptors());
    let instead = |file: fn() -> OwnedFd| tampered(move |passing| passing.files = vec![file()]);
    let more = |count: usize| {
        tampered(move |passing| {
            let copy = passing.files[0].try_clone().unwrap();
            passing.files.extend((0..count).map(|_| copy.try_clone().unwrap()));
        })
    };
    let cases: Vec<(Judge, &str)> = vec![
        (tampered(|passing| passing.files.clear()), "0 files are handed over"),
        (more(1), "2 files are handed over"),
        (more(200), "201 files are handed over"),
        (instead(|| memfd(1 << 20, true)), "too small"),
        (instead(|| memfd(32 << 20, false)), "no such memory file"),
        (instead(|| File::open("/dev/zero").unwrap().into()), "is not a file"),
        (instead(|| File::open("/").unwrap().into()), "is not a file"),
    ];
    for (number, (judge, words)) in cases.into_iter().enumerate() {
        let (mut received, path) = receive(&second, &scratch, &other);
        let middle = scratch.path(format!("between{number}"));
        between(&middle, &path, judge, whole());
        let answer = first.api().put_json("vm.send-migration", &to(&middle));
        refused(&answer, 500, words);
        refused(&received.answer(), 500, words);
        assert_eq!(first.api().phase(), Phase::Running, "{words}");
        assert_eq!(second.api().phase(), Phase::Empty, "{words}");
        serial.wait_longer_than(serial.text().len() + 20);
    }
    first.expect_holdings(&before.0, "the source");
    // Its last receiver may still answer at its address.
    let files = |holdings: &[String]| holdings.iter().filter(|name| !name.starts_with("socket")).count();
    let gone = || (files(&second.descriptors()) == files(&before.1)).then_some(());
    wait_until(LIMIT, gone, || format!("{:?} to be held, not {:?}", before.1, second.descriptors()));
}

/// A destination that was ready, and was not given the guest, has changed nothing of its memory.
#[test]
fn the_destination_writes_nothing_before_commit() {
    let _turn = turn();
    let scratch = Scratch::new();
    let file = scratch.disk("memory", 32 << 20);
    let memory = json!({ "size": 0, "zones": [
        { "id": "z", "size": 32 << 20, "shared": true, "file": file },
    ] });
    let (mut first, serial) = guest(&scratch, &memory);
    first.api().puts(&["vm.pause"]);
    let before = fs::read(&file).unwrap();
    let second = Vmm::with_api(&scratch, [""; 0]);
    let other = SerialFile::new(scratch.path("other"));
    let (mut received, path) = receive(&second, &scratch, &other);
    let middle = scratch.path("between");
    let no_commit = |passing: &mut Passing| if passing.command() == COMMIT { Fate::Cut } else { Fate::Pass };
    between(&middle, &path, Box::new(no_commit), whole());
    let answer = first.api().put_json("vm.send-migration", &to(&middle));
    assert_eq!(answer.status, 500, "{answer:?}");
    assert_eq!(received.answer().status, 500);
    assert_eq!((first.api().phase(), second.api().phase()), (Phase::Paused, Phase::Empty));
    assert!(fs::read(&file).unwrap() == before, "the memory of a guest that stayed has changed");

    let (mut received, path) = receive(&second, &scratch, &other);
    first.api().done("vm.send-migration", &to(&path));
    assert_eq!(received.answer().status, 204);
    first.expect_exit(0);
    second.api().puts(&["vm.resume"]);
    goes_on(&serial, &other);
}

/// Memory that is there is neither sent nor counted: 1 GiB takes as long as nothing.
#[test]
fn the_size_of_memory_does_not_matter() {
    let _turn = turn();
    let scratch = Scratch::new();
    let file = scratch.disk("memory", 1 << 30);
    let memory = json!({ "size": 0, "zones": [
        { "id": "z", "size": 1 << 30, "shared": true, "file": file },
    ] });
    let (mut first, serial) = guest(&scratch, &memory);
    let second = Vmm::with_api(&scratch, [""; 0]);
    let other = SerialFile::new(scratch.path("other"));
    let (mut received, path) = receive(&second, &scratch, &other);
    let (count, middle) = (std::sync::Arc::new(AtomicU32::new(0)), scratch.path("between"));
    let bytes = std::sync::Arc::clone(&count);
    let counting = move |passing: &mut Passing| {
        bytes.fetch_add(u32::try_from(passing.bytes.len()).unwrap(), Ordering::Relaxed);
        Fate::Pass
    };
    between(&middle, &path, Box::new(counting), whole());
    let start = Instant::now();
    first.api().done("vm.send-migration", &to(&middle));
    println!("1 GiB was handed over in {:?}", start.elapsed());
    assert_eq!(received.answer().status, 204);
    first.expect_exit(0);
    goes_on(&serial, &other);
    assert!(count.load(Ordering::Relaxed) < 100_000, "{count:?} bytes went over the link");
}
