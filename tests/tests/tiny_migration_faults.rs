//! Migrations of a tiny guest through a hostile middle, and with ends that die: at each kind of frame, in both directions.
//!
//! Without more only a part of all (frame, fault) is tried, by a fixed choice; `VMM_FAULTS=all` tries them all.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]

use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;
use vmm_state::Phase;
use vmm_tests::harness::counting::{counting_guest, counting_in, goes_on};
use vmm_tests::harness::migrating::{pending, receive, send_to, to, url};
use vmm_tests::harness::{LIMIT, Pending, Scratch, SerialFile, Vmm, wait_until};

/// Bytes of a frame's header; the length of its payload is in the second half (WIRE.md).
const HEADER: usize = 16;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// From the source.
    Down,
    Up,
}

/// A frame of a session: the so-manieth of its command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Point(Way, u16, u32);

/// Each kind of frame. Numbers are those of WIRE.md.
const POINTS: [Point; 17] = [
    Point(Way::Down, 64, 1), // Hello
    Point(Way::Up, 71, 1),   // Accept
    Point(Way::Down, 2, 1),  // Config
    Point(Way::Up, 65, 1),   // Ack(Config)
    Point(Way::Down, 1, 1),  // Start
    Point(Way::Up, 65, 2),   // Ack(Start)
    Point(Way::Down, 4, 1),  // Memory
    Point(Way::Down, 4, 5),
    Point(Way::Down, 73, 1), // Mark
    Point(Way::Up, 74, 1),   // Landed
    Point(Way::Down, 3, 1),  // State
    Point(Way::Down, 5, 1),  // Complete
    Point(Way::Up, 67, 1),   // Ready
    Point(Way::Down, 68, 1), // Commit
    Point(Way::Up, 80, 1),   // Committed
    Point(Way::Down, 65, 1), // Ack(Committed)
    Point(Way::Down, 82, 1), // Sums
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// The connection ends there.
    Reset,
    /// Half of the frame is the last that arrives.
    Half,
    /// A bit of the frame is another.
    Flip,
    /// The frame does not arrive.
    Swallow,
    /// It arrives twice.
    Twice,
    /// Nothing more comes until an operator has cancelled at the source, or at the destination.
    Stall(Way),
    /// The source, or the destination, is killed before the frame arrives.
    Kill(Way),
    /// After it has arrived.
    KillAfter(Way),
}

const FAULTS: [Fault; 11] = [
    Fault::Reset,
    Fault::Half,
    Fault::Flip,
    Fault::Swallow,
    Fault::Twice,
    Fault::Stall(Way::Down),
    Fault::Stall(Way::Up),
    Fault::Kill(Way::Down),
    Fault::Kill(Way::Up),
    Fault::KillAfter(Way::Down),
    Fault::KillAfter(Way::Up),
];

/// What stands between both ends of the first connection; others pass.
struct Middle {
    point: Point,
    /// The frame has come; go on when told.
    reached: Receiver<()>,
    go_on: Sender<()>,
}

#[derive(Clone)]
struct Plan {
    point: Point,
    fault: Fault,
    seen: Arc<AtomicU32>,
    reached: Sender<()>,
    go_on: Arc<Mutex<Receiver<()>>>,
}

impl Middle {
    fn new(at: &Path, to: &Path, point: Point, fault: Fault) -> Self {
        let listener = UnixListener::bind(at).unwrap();
        let ((reached_to, reached), (go_on, waits)) = (channel(), channel());
        let seen = Arc::new(AtomicU32::new(0));
        let plan = Plan { point, fault, seen, reached: reached_to, go_on: Arc::new(Mutex::new(waits)) };
        let to = to.to_owned();
        thread::spawn(move || {
            let mut plan = Some(plan);
            while let Ok((source, _)) = listener.accept() {
                let Ok(destination) = UnixStream::connect(&to) else { continue };
                let plan = plan.take();
                let (back, from, other) =
                    (source.try_clone().unwrap(), destination.try_clone().unwrap(), plan.clone());
                thread::spawn(move || copy(Way::Up, &from, &back, other.as_ref()));
                thread::spawn(move || copy(Way::Down, &source, &destination, plan.as_ref()));
            }
        });
        Self { point, reached, go_on }
    }
}

fn frame(mut from: &UnixStream) -> Option<Vec<u8>> {
    let mut frame = vec![0; HEADER];
    from.read_exact(&mut frame).ok()?;
    let length = u64::from_le_bytes(frame[8..].try_into().unwrap());
    frame.resize(HEADER + usize::try_from(length).unwrap(), 0);
    from.read_exact(&mut frame[HEADER..]).ok()?;
    Some(frame)
}

/// Passes frames on until one end closes or the plan ends it.
fn copy(way: Way, from: &UnixStream, mut to: &UnixStream, plan: Option<&Plan>) {
    while let Some(mut bytes) = frame(from) {
        let command = u16::from_le_bytes(bytes[..2].try_into().unwrap());
        let here = |plan: &&Plan| {
            let Point(at, number, nth) = plan.point;
            (at, number) == (way, command) && plan.seen.fetch_add(1, Ordering::SeqCst) + 1 == nth
        };
        let plan = plan.filter(here);
        let goes_on = match plan.map(|plan| plan.fault) {
            None => to.write_all(&bytes).is_ok(),
            Some(Fault::Reset) => false,
            Some(Fault::Half) => {
                let _ = to.write_all(&bytes[..bytes.len() / 2]);
                false
            }
            Some(Fault::Flip) => {
                // A place that differs from frame to frame, the same in each run; not the length, which would only stall.
                let at = bytes.len() * usize::from(command) % 97 % bytes.len();
                let at = if (8..HEADER).contains(&at) { 4 } else { at };
                bytes[at] ^= 1 << (command % 8);
                to.write_all(&bytes).is_ok()
            }
            Some(Fault::Swallow) => {
                // Where both then wait for each other, the link is lost in the end.
                let _ = from.set_read_timeout(Some(Duration::from_millis(300)));
                true
            }
            Some(Fault::Twice) => to.write_all(&[&bytes[..], &bytes[..]].concat()).is_ok(),
            Some(fault) => {
                let plan = plan.unwrap();
                if matches!(fault, Fault::KillAfter(_)) {
                    let _ = to.write_all(&bytes);
                }
                let _ = plan.reached.send(());
                let _ = plan.go_on.lock().unwrap().recv();
                matches!(fault, Fault::Stall(_)) && to.write_all(&bytes).is_ok()
            }
        };
        if !goes_on {
            let _ = from.shutdown(Shutdown::Both);
            break;
        }
    }
    // What is said the other way is passed on, unless this one broke.
    let _ = to.shutdown(Shutdown::Write);
}

/// Two VMMs, of which one has the guest.
struct Pair {
    source: Vmm,
    serial: SerialFile,
    destination: Vmm,
}

/// A test's surroundings.
struct Scene {
    scratch: Scratch,
    pair: Option<Pair>,
    number: u32,
}

impl Scene {
    fn new() -> Self {
        Self { scratch: Scratch::new(), pair: None, number: 0 }
    }

    fn path(&mut self, name: &str) -> PathBuf {
        self.number += 1;
        self.scratch.path(format!("{name}{}", self.number))
    }

    fn pair(&mut self) -> Pair {
        let scratch = &self.scratch;
        self.pair.take().unwrap_or_else(|| {
            let source = Vmm::with_api(scratch, [""; 0]);
            // Each guest's file is another.
            let _ = fs::remove_file(scratch.path("serial"));
            let booted = counting_in(&source, scratch);
            self.number += 1;
            let path = scratch.path(format!("first{}", self.number));
            fs::rename(booted.path(), &path).unwrap();
            Pair { source, serial: SerialFile::new(path), destination: Vmm::with_api(scratch, [""; 0]) }
        })
    }

    /// One migration with a fault at one frame: exactly one guest goes on, or the one that had it was killed.
    fn cell(&mut self, point: Point, fault: Fault) {
        let about = format!("{fault:?} at {point:?}");
        let mut pair = self.pair();
        let (other, between) = (SerialFile::new(self.path("side")), self.path("between"));
        let (mut received, path) = receive(&pair.destination, &self.scratch, &other);
        let middle = Middle::new(&between, &path, point, fault);
        let mut sent = pending(&pair.source, "vm.send-migration", &to(&between));
        let (mut source, mut destination) = (Some(pair.source), Some(pair.destination));
        let cancels = self.wait(&middle, fault, (&mut source, &mut destination), &mut sent);
        let answer = source.is_some().then(|| sent.answer());
        let heard = point != POINTS[0];
        let moved = destination.as_ref().is_some_and(|vmm| has_come(vmm, &mut received, heard, &about));
        drop(cancels);
        match (&answer, moved) {
            (Some(answer), true) => assert_eq!(answer.status, 204, "{about}: two guests: {answer:?}"),
            (Some(answer), false) if destination.is_some() || answer.status != 204 => {
                assert!([409, 500].contains(&answer.status), "{about}: {answer:?}");
                assert!(!answer.body.contains("doubt"), "{about}: {answer:?}");
                let api = source.as_ref().unwrap();
                assert_eq!(api.api().phase(), Phase::Running, "{about}: {answer:?}");
                pair.serial.wait_longer_than(pair.serial.text().len() + 20);
            }
            _ => {}
        }
        if answer.is_some_and(|answer| answer.status == 204) {
            source.take().unwrap().expect_exit(0);
        }
        if moved {
            goes_on(&pair.serial, &other);
            (source, pair.serial) = (destination.take(), other);
        }
        let fresh = || Vmm::with_api(&self.scratch, [""; 0]);
        self.pair = source.map(|source| Pair {
            source,
            serial: pair.serial,
            destination: destination.unwrap_or_else(fresh),
        });
    }

    /// Until the source has answered, or is dead. The cancels that were asked for.
    fn wait(
        &self,
        middle: &Middle,
        fault: Fault,
        (source, destination): (&mut Option<Vmm>, &mut Option<Vmm>),
        sent: &mut Pending,
    ) -> Vec<Pending> {
        let (end, mut cancels) = (Instant::now() + LIMIT, Vec::new());
        while source.is_some() && !sent.is_answered() {
            assert!(Instant::now() < end, "no answer, {fault:?} at {:?}", middle.point);
            if middle.reached.recv_timeout(Duration::from_millis(2)).is_err() {
                continue;
            }
            // Once it has heard that the guest runs there, the source ends; the answer to Commit is not held up.
            let passed = matches!(fault, Fault::KillAfter(_));
            let ends = middle.point == POINTS[15] || passed && POINTS[13..15].contains(&middle.point);
            let serves = source.as_ref().filter(|_| !ends);
            for vmm in [serves, destination.as_ref()].into_iter().flatten() {
                let ping = vmm.api().get("vmm.ping");
                assert_eq!(ping.status, 200, "{fault:?} at {:?}: {ping:?}", middle.point);
                assert!([200, 404].contains(&vmm.api().get("vm.info").status));
            }
            match fault {
                Fault::Stall(way) => {
                    let vmm = if way == Way::Down { &*source } else { &*destination };
                    cancels.push(vmm.as_ref().unwrap().begin("vm.cancel"));
                }
                Fault::Kill(Way::Down) | Fault::KillAfter(Way::Down) => *source = None,
                Fault::Kill(Way::Up) | Fault::KillAfter(Way::Up) => *destination = None,
                _ => {}
            }
            let _ = middle.go_on.send(());
        }
        cancels
    }

    /// The guest goes to its destination with nobody in between.
    fn plain(&mut self) {
        let mut pair = self.pair();
        let other = SerialFile::new(self.path("side"));
        let (mut received, path) = receive(&pair.destination, &self.scratch, &other);
        let answer = send_to(&pair.source, &url(&path), None);
        assert_eq!((answer.status, received.answer().status), (204, 204), "{answer:?}");
        pair.source.expect_exit(0);
        goes_on(&pair.serial, &other);
        let destination = Vmm::with_api(&self.scratch, [""; 0]);
        self.pair = Some(Pair { source: pair.destination, serial: other, destination });
    }
}

/// Whether the guest has come to the destination. One that has not `heard` of a source waits on, and is told not to.
fn has_come(vmm: &Vmm, received: &mut Pending, heard: bool, about: &str) -> bool {
    if !heard {
        let settled = || (received.is_answered() || vmm.api().put("vm.cancel").status == 409).then_some(());
        wait_until(LIMIT, settled, || format!("{about}: the receiver"));
    }
    let answer = received.answer();
    let phase = vmm.api().phase();
    let expected = if answer.status == 204 { Phase::Running } else { Phase::Empty };
    assert_eq!(phase, expected, "{about}: {answer:?}");
    answer.status == 204
}

/// Where nobody is left who knows whether Commit arrived: the guest is in doubt, for a minute and longer.
fn is_doubtful(Point(way, command, _): Point, fault: Fault) -> bool {
    match (way, command) {
        // Complete and its answer Ready, after which Commit is sent; Commit; its answer.
        (Way::Down, 5) | (Way::Up, 67) => fault == Fault::KillAfter(Way::Up),
        (Way::Down, 68) => fault == Fault::KillAfter(Way::Up) || fault == Fault::Kill(Way::Up),
        (Way::Up, 80) => fault == Fault::Kill(Way::Up),
        _ => false,
    }
}

#[test]
fn exactly_one_guest_goes_on_whatever_happens_at_any_frame() {
    let all = std::env::var("VMM_FAULTS").is_ok_and(|word| word == "all");
    let mut scene = Scene::new();
    for (number, point) in POINTS.into_iter().enumerate() {
        for (place, fault) in FAULTS.into_iter().enumerate() {
            // Every third, so that each fault and each point has its turn.
            if is_doubtful(point, fault) || !all && (number + place) % 3 != 0 {
                continue;
            }
            scene.cell(point, fault);
        }
        if all || number % 4 == 3 {
            scene.plain();
        }
    }
    scene.plain();
}

/// Passes bytes on in pieces of 1 to `most`, both ways.
fn crumble(at: &Path, to: &Path, most: usize) {
    let (listener, to) = (UnixListener::bind(at).unwrap(), to.to_owned());
    let pieces = move |mut from: UnixStream, mut to: UnixStream| {
        let (mut buffer, mut random) = (vec![0; most], 0x2545_f491_4f6c_dd1d_u64);
        while let Ok(count @ 1..) = {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let room = 1 + (random % most as u64) as usize;
            from.read(&mut buffer[..room])
        } {
            if to.write_all(&buffer[..count]).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Write);
    };
    thread::spawn(move || {
        let (source, _) = listener.accept().unwrap();
        let destination = UnixStream::connect(to).unwrap();
        let (back, from) = (source.try_clone().unwrap(), destination.try_clone().unwrap());
        thread::spawn(move || pieces(from, back));
        pieces(source, destination);
    });
}

#[test]
fn a_link_that_delivers_in_pieces_of_any_length_delivers_all() {
    let mut scene = Scene::new();
    for most in [7, 1000, 100_000] {
        let mut pair = scene.pair();
        let (other, between) = (SerialFile::new(scene.path("side")), scene.path("between"));
        let (mut received, path) = receive(&pair.destination, &scene.scratch, &other);
        crumble(&between, &path, most);
        // The guest is faster than such a link.
        let body = json!({ "destination_url": url(&between), "downtime_ms": 30_000 });
        let answer = pair.source.api().put_json("vm.send-migration", &body);
        assert_eq!((answer.status, received.answer().status), (204, 204), "{most}: {answer:?}");
        pair.source.expect_exit(0);
        goes_on(&pair.serial, &other);
        let destination = Vmm::with_api(&scene.scratch, [""; 0]);
        scene.pair = Some(Pair { source: pair.destination, serial: other, destination });
    }
}

/// How much address space a process has and may have, in KiB. `None`: as much as it wants.
fn limit_memory(vmm: &Vmm, more: Option<u64>) {
    let status = fs::read_to_string(format!("/proc/{}/status", vmm.pid())).unwrap();
    let size = status.lines().find_map(|line| line.strip_prefix("VmSize:")).unwrap();
    let size: u64 = size.trim().trim_end_matches(" kB").parse().unwrap();
    let limit = more.map_or("unlimited".to_owned(), |more| ((size + more) << 10).to_string());
    let (pid, limit) = (vmm.pid().to_string(), format!("--as={limit}:unlimited"));
    let status = Command::new("prlimit").args(["--pid", &pid, &limit]).status();
    assert!(status.unwrap().success(), "prlimit(1)");
}

#[test]
fn a_destination_without_memory_says_so_and_takes_the_guest_once_it_has_some() {
    let mut scene = Scene::new();
    let pair = scene.pair();
    for mib in [8, 16, 24, 31] {
        let other = SerialFile::new(scene.path("side"));
        let (mut received, path) = receive(&pair.destination, &scene.scratch, &other);
        limit_memory(&pair.destination, Some(mib << 10));
        let answer = pair.source.api().put_json("vm.send-migration", &to(&path));
        limit_memory(&pair.destination, None);
        assert_eq!(answer.status, 500, "{mib} MiB: {answer:?}");
        assert!(answer.body.contains("the other end") && answer.body.contains("os error 12"), "{answer:?}");
        assert!(received.answer().body.contains("os error 12"), "{mib} MiB");
        assert_eq!(pair.source.api().phase(), Phase::Running);
        assert_eq!(pair.destination.api().phase(), Phase::Empty);
        pair.serial.wait_longer_than(pair.serial.text().len() + 20);
    }
    scene.pair = Some(pair);
    scene.plain();
}

/// A guest that nobody knows the place of. The link is gone for longer than the source asks, and comes back.
fn doubt(deliver: bool) {
    let scratch = Scratch::new();
    let (mut source, serial) = counting_guest(&scratch);
    let destination = Vmm::with_api(&scratch, [""; 0]);
    let (other, between) = (SerialFile::new(scratch.path("other")), scratch.path("between"));
    let (mut received, path) = receive(&destination, &scratch, &other);
    // Nobody is killed, but that frame does not arrive.
    let point = if deliver { Point(Way::Up, 80, 1) } else { Point(Way::Down, 68, 1) };
    let middle = Middle::new(&between, &path, point, Fault::Kill(Way::Up));
    let mut sent = pending(&source, "vm.send-migration", &to(&between));
    middle.reached.recv_timeout(LIMIT).unwrap();
    if deliver {
        assert_eq!(received.answer().status, 204);
    }
    // Nobody is there any more.
    fs::rename(&between, scratch.path("away")).unwrap();
    middle.go_on.send(()).unwrap();
    if !deliver {
        assert_eq!(received.answer().status, 500);
    }
    let patience = Duration::from_secs(120);
    wait_until(patience, || sent.is_answered().then_some(()), || "the end of asking".to_owned());
    let answer = sent.answer();
    assert!(answer.status == 500 && answer.body.contains("in doubt"), "{answer:?}");
    // It stays paused, and nobody is let at it.
    assert_eq!(source.api().get("vmm.ping").status, 200);
    assert_eq!(source.api().phase(), Phase::Migrating);
    let still = serial.text();
    fs::rename(scratch.path("away"), &between).unwrap();
    let mut asked = source.begin("vm.cancel");
    let answer = asked.answer();
    if deliver {
        assert_eq!(answer.status, 409, "{answer:?}");
        source.expect_exit(0);
        assert_eq!(serial.text(), still, "two guests");
        goes_on(&serial, &other);
    } else {
        assert_eq!(answer.status, 204, "{answer:?}");
        assert_eq!(source.api().phase(), Phase::Running);
        serial.wait_longer_than(still.len() + 40);
        let (mut received, path) = receive(&destination, &scratch, &other);
        source.api().done("vm.send-migration", &to(&path));
        assert_eq!(received.answer().status, 204);
        source.expect_exit(0);
        goes_on(&serial, &other);
    }
}

#[test]
fn who_is_in_doubt_says_so_asks_again_and_has_the_guest_that_was_not_given() {
    doubt(false);
}

#[test]
fn who_is_in_doubt_says_so_asks_again_and_ends_when_the_guest_is_elsewhere() {
    doubt(true);
}
