//! Post-copy migrations of tiny guests between two real processes: the guest goes on before all of its memory is there.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]

#[path = "tiny_postcopy/disks.rs"]
mod disks;
#[path = "tiny_postcopy/endings.rs"]
mod endings;
#[path = "tiny_postcopy/links.rs"]
mod links;

use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};
use vmm_state::Phase;
use vmm_tests::harness::counting::{counting_guest, counting_with, counts, goes_on};
use vmm_tests::harness::migrating::{arrives_paused, moves, pending, progress, receive, to, turn, until};
use vmm_tests::harness::{LIMIT, Pending, Scratch, SerialFile, Vmm, refused, wait_until};
use vmm_tests::tiny::Guest;

/// What `vm.send-migration` is told.
fn late(path: &Path) -> Value {
    let mut body = to(path);
    body["memory_mode"] = json!("Postcopy");
    body
}

/// Commands of frames that carry memory: Memory, Zero, Packed.
const DATA: [u16; 3] = [4, 75, 81];
const COMMIT: u16 = 68;
const CANCEL: u16 = 79;

/// Stands between two ends, passes frames on, and can lose the link.
#[derive(Clone)]
struct Relay(Arc<Mutex<Between>>);

/// What becomes of frames with memory.
#[derive(Clone, Copy, PartialEq)]
enum Data {
    Passes,
    /// So many of those that follow the guest pass; then the link is cut.
    CutAfter(u32),
    /// Those that follow the guest are lost, and nothing else.
    Lost,
    /// All wait, with what comes behind them.
    Waits,
    /// It passes, and nothing that follows Commit.
    EndsAtCommit,
}

struct Between {
    /// Commit has passed.
    committed: bool,
    data: Data,
    /// Nobody gets through.
    cut: bool,
    /// The destination does not see that its source closes.
    stays_open: bool,
    open: Vec<UnixStream>,
}

impl Relay {
    /// From `at` to `to`.
    fn start(at: &Path, to: &Path, data: Data) -> Self {
        let between = Between { committed: false, data, cut: false, stays_open: false, open: Vec::new() };
        let relay = Self(Arc::new(Mutex::new(between)));
        let listener = UnixListener::bind(at).unwrap();
        let (accepting, to) = (relay.clone(), to.to_owned());
        std::thread::spawn(move || {
            while let Ok((source, _)) = listener.accept() {
                let mut between = accepting.lock();
                let Some(destination) = UnixStream::connect(&to).ok().filter(|_| !between.cut) else {
                    continue;
                };
                for (from, to) in [(&source, &destination), (&destination, &source)] {
                    between.open.push(from.try_clone().unwrap());
                    let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                    let relay = accepting.clone();
                    std::thread::spawn(move || relay.pass(&from, &to));
                }
            }
        });
        relay
    }

    fn lock(&self) -> MutexGuard<'_, Between> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pass(&self, mut from: &UnixStream, mut to: &UnixStream) {
        let mut frame = vec![0; 16];
        while from.read_exact(&mut frame[..16]).is_ok() {
            let command = u16::from_le_bytes(frame[..2].try_into().unwrap());
            let length = u64::from_le_bytes(frame[8..16].try_into().unwrap());
            frame.resize(16 + usize::try_from(length).unwrap(), 0);
            if from.read_exact(&mut frame[16..]).is_err() {
                break;
            }
            if command == CANCEL {
                // Links are not equally fast: the ends of others overtake it.
                std::thread::sleep(Duration::from_millis(300));
            }
            let passes =
                wait_until(LIMIT, || self.lock().lets(command), || "memory that may pass".to_owned());
            if self.lock().cut || passes && to.write_all(&frame).is_err() {
                break;
            }
        }
        // What is still said the other way is passed on.
        if !self.lock().stays_open {
            let _ = to.shutdown(Shutdown::Write);
        }
    }

    /// From now on this becomes of memory.
    fn set(&self, data: Data) {
        self.lock().data = data;
    }

    fn cut(&self) {
        self.lock().cut();
    }

    /// From now on everybody does.
    fn mend(&self) {
        let mut between = self.lock();
        (between.data, between.cut) = (Data::Passes, false);
    }
}

impl Between {
    /// Whether a frame passes; `None` while it waits.
    fn lets(&mut self, command: u16) -> Option<bool> {
        self.committed |= command == COMMIT;
        let (is_data, committed) = (DATA.contains(&command), self.committed);
        match &mut self.data {
            Data::Waits if is_data && !self.cut => return None,
            Data::EndsAtCommit if committed && command != COMMIT && !self.cut => return None,
            Data::Lost if is_data && committed => return Some(false),
            Data::CutAfter(0) if is_data && committed => self.cut(),
            Data::CutAfter(left) if is_data && committed => *left -= 1,
            _ => {}
        }
        Some(!self.cut)
    }

    fn cut(&mut self) {
        self.cut = true;
        self.open.drain(..).for_each(|socket| drop(socket.shutdown(Shutdown::Both)));
    }
}

/// A guest that is at its destination, through a relay, and whose source has not ended.
struct Gone {
    first: Vmm,
    serial: SerialFile,
    second: Vmm,
    other: SerialFile,
    sent: Pending,
    relay: Relay,
}

impl Gone {
    fn through(scratch: &Scratch, data: Data) -> Self {
        for attempt in 0..10 {
            let (first, serial) = counting_guest(scratch);
            let second = Vmm::with_api(scratch, [""; 0]);
            let other = SerialFile::new(scratch.path("other"));
            let (mut received, path) = receive(&second, scratch, &other);
            let between = scratch.path(format!("between{attempt}"));
            let relay = Relay::start(&between, &path, data);
            let mut sent = pending(&first, "vm.send-migration", &late(&between));
            assert_eq!(received.answer().status, 204);
            let is_held = || {
                let is_held = data == Data::EndsAtCommit || relay.lock().cut;
                (is_held || sent.is_answered()).then_some(is_held)
            };
            if wait_until(LIMIT, is_held, || "a link that is cut".to_owned()) {
                return Self { first, serial, second, other, sent, relay };
            }
            // On a busy host a guest may do nothing between the last look at its memory and its end here: nothing is owed then.
        }
        panic!("no guest owed memory");
    }
}

#[test]
fn a_guest_goes_on_before_its_memory_is_there() {
    let _turn = turn();
    let scratch = Scratch::new();
    let (first, serial) = counting_guest(&scratch);
    let (second, other) = moves(&scratch, first, late);
    goes_on(&serial, &other);
    let end = progress(&second);
    assert_eq!((&end["status"], &end["owed_bytes"]), (&json!("Completed"), &Value::Null), "{end}");
    assert_eq!(second.api().phase(), Phase::Running);

    // And on, with all its memory.
    let (third, last) = moves(&scratch, second, late);
    goes_on(&other, &last);
    third.api().puts(&["vm.pause", "vm.resume", "vm.reboot"]);
}

#[test]
fn a_lost_link_holds_the_guest_at_both_ends_until_it_is_there_again() {
    let _turn = turn();
    for frames in [0, 1] {
        let scratch = Scratch::new();
        let gone = Gone::through(&scratch, Data::CutAfter(frames));
        let Gone { mut first, serial, second, other, mut sent, relay } = gone;
        for vmm in [&first, &second] {
            let now = until(vmm, "a lost link", |now| now["status"] == "Severed");
            let causes = now["causes"].to_string();
            assert!(causes.contains("the link is lost"), "{now}");
            let (phase, state) = (vmm.api().phase(), vmm.api().state());
            assert_eq!((phase, state.as_str()), (Phase::Migrating, "Paused"), "{now}");
            for name in ["vm.resume", "vm.pause", "vm.delete", "vm.reboot"] {
                refused(&vmm.api().put(name), 409, "a migration is under way");
            }
            let body = json!({ "destination_url": "file:///nowhere" });
            refused(&vmm.api().put_json("vm.snapshot", &body), 409, "a migration is under way");
        }
        // The source knows what it has not sent, which may be nothing.
        assert!(progress(&second)["owed_bytes"].as_u64().unwrap() > 0, "{}", progress(&second));
        refused(&second.api().put("vm.cancel"), 409, "nothing to cancel");
        refused(&first.api().put("vm.migration-keep"), 409, "the guest is the destination's");
        assert!(!sent.is_answered());
        let before = other.text();
        std::thread::sleep(Duration::from_millis(100));
        assert_eq!(other.text(), before, "it stands still");

        relay.mend();
        assert_eq!(sent.answer().status, 204);
        first.expect_exit(0);
        goes_on(&serial, &other);
        until(&second, "the end", |now| now["status"] == "Completed");
        assert_eq!(second.api().phase(), Phase::Running);
        second.api().puts(&["vm.pause", "vm.resume"]);
        // Its memory is whole: it checks what it wrote.
        let counted = counts(&other).len();
        wait_until(LIMIT, || (counts(&other).len() > counted + 300).then_some(()), || other.text());
    }
}

#[test]
fn a_paused_guest_arrives_whole_and_shared_memory_arrives_late() {
    let _turn = turn();
    let scratch = Scratch::new();
    let first = Vmm::with_api(&scratch, [""; 0]);
    let serial = counting_with(&first, &scratch, &json!({ "memory": { "size": 32 << 20, "shared": true } }));
    let (second, other) = moves(&scratch, first, |path| {
        let mut body = late(path);
        (body["connections"], body["compression"]) = (json!(3), json!("Lz4"));
        body
    });
    goes_on(&serial, &other);
    assert_eq!(second.api().phase(), Phase::Running);
    arrives_paused(&scratch, second, &other, late);
}

#[test]
fn a_destination_whose_memory_cannot_take_part_says_so_and_the_guest_stays() {
    let _turn = turn();
    let scratch = Scratch::new();
    let first = Vmm::with_api(&scratch, [""; 0]);
    let file = scratch.disk("memory", 32 << 20);
    let memory =
        json!({ "size": 0, "zones": [{ "id": "z", "size": 32 << 20, "file": file, "shared": true }] });
    let serial = counting_with(&first, &scratch, &json!({ "memory": memory }));
    let second = Vmm::with_api(&scratch, [""; 0]);
    let other = SerialFile::new(scratch.path("other"));
    for check in [true, false] {
        let (mut received, path) = receive(&second, &scratch, &other);
        let mut body = late(&path);
        body["check"] = json!(check);
        let answer = first.api().put_json("vm.send-migration", &body);
        refused(&answer, 500, "post-copy");
        refused(&answer, 500, "is a file");
        refused(&received.answer(), 500, "is a file");
        assert_eq!(first.api().phase(), Phase::Running);
    }
    let mut body = late(&scratch.path("nobody"));
    body["local"] = json!(true);
    refused(&first.api().put_json("vm.send-migration", &body), 422, "memory_mode");
    serial.wait_longer_than(serial.text().len() + 40);
}

/// A source that hangs keeps neither a thread nor the guest's memory.
#[test]
fn connections_of_a_link_that_was_taken_up_again_are_closed_though_the_source_keeps_them() {
    let _turn = turn();
    let scratch = Scratch::new();
    let Gone { mut first, second, mut sent, relay, .. } = Gone::through(&scratch, Data::CutAfter(1));
    for vmm in [&first, &second] {
        until(vmm, "a lost link", |now| now["status"] == "Severed");
    }
    relay.lock().stays_open = true;
    relay.mend();
    assert_eq!(sent.answer().status, 204);
    first.expect_exit(0);
    until(&second, "the end", |now| now["status"] == "Completed");
    let reads = || {
        let tasks = fs::read_dir(format!("/proc/{}/task", second.pid())).unwrap().flatten();
        let names = tasks.flat_map(|task| fs::read_to_string(task.path().join("comm")));
        names.filter(|name| name.trim() == "migration-in").count()
    };
    wait_until(LIMIT, || (reads() == 0).then_some(()), || format!("{} connections to be closed", reads()));
}

/// Cuts the link of a guest that lacks memory.
fn severed(scratch: &Scratch) -> (Vmm, Vmm, SerialFile, Pending) {
    let Gone { first, second, other, sent, .. } = Gone::through(scratch, Data::CutAfter(0));
    for vmm in [&first, &second] {
        until(vmm, "a lost link", |now| now["status"] == "Severed");
    }
    (first, second, other, sent)
}

#[test]
fn both_ends_can_be_shut_down_while_the_guest_is_held_and_say_what_is_lost() {
    let _turn = turn();
    let scratch = Scratch::new();
    let (mut first, mut second, _, mut sent) = severed(&scratch);
    second.api().puts(&["vmm.shutdown"]);
    second.expect_exit(13);
    assert!(second.stderr.text().contains("the guest is lost: "), "{}", second.stderr.text());
    // That does not reach the source, which goes on looking.
    until(&first, "a lost link", |now| now["status"] == "Severed");
    assert!(!sent.is_answered());
    first.api().puts(&["vmm.shutdown"]);
    first.expect_exit(13);
    let told = first.stderr.text();
    assert!(told.contains("the guest at the destination is lost: "), "{told}");
}

#[test]
fn a_source_that_ends_before_it_has_heard_of_the_hand_over_says_that_memory_is_lost() {
    let _turn = turn();
    let scratch = Scratch::new();
    let mut gone = Gone::through(&scratch, Data::EndsAtCommit);
    let first = &mut gone.first;
    first.api().puts(&["vmm.shutdown"]);
    first.expect_exit(13);
    let told = first.stderr.text();
    assert!(told.contains("the guest at the destination is lost: "), "{told}");
    gone.relay.cut();
}

#[test]
fn a_destination_that_dies_leaves_the_source_to_its_operator() {
    let _turn = turn();
    let scratch = Scratch::new();
    let (mut first, second, _, mut sent) = severed(&scratch);
    assert!(progress(&second)["owed_bytes"].as_u64().unwrap() > 0, "{}", progress(&second));
    drop(second);
    // It looks for a minute.
    std::thread::sleep(Duration::from_secs(55));
    refused(&sent.answer(), 500, "stands still there");
    let now = until(&first, "a lost link", |now| now["status"] == "Severed");
    // What it has not sent, which may be nothing: what the link had is lost all the same.
    assert!(now["owed_bytes"].is_u64(), "{now}");
    // Once more, in vain.
    let mut again = pending(&first, "vm.cancel", &json!({}));
    refused(&first.api().put("vm.migration-keep"), 409, "the guest is the destination's");
    first.api().puts(&["vm.migration-yield"]);
    assert_ne!(again.answer().status, 204);
    first.expect_exit(13);
    assert!(first.stderr.text().contains("the guest is lost"), "{}", first.stderr.text());
}
