//! Memory that arrives while it is used, by real faults.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]

mod common;

use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use common::{MIB, PAGE, create, write, zone};
use vm_memory::{Bytes, GuestAddress};
use vmm_memory_manager::absent::{AbsentMemory, supported};
use vmm_memory_manager::map::MemoryMap;
use vmm_memory_manager::pages::Pages;
use vmm_memory_manager::zone::ZoneConfig;

const SIZE: u64 = 4 * MIB;
/// Long: only for what hangs.
const LIMIT: Duration = Duration::from_secs(60);

/// Memory whose pages 1 to 9 hold their number, of which these are to be absent, who serves it, and what it asks for.
fn watched(
    zone: &ZoneConfig,
    absent: &[u64],
) -> (MemoryMap, Arc<AbsentMemory>, JoinHandle<()>, Receiver<u64>) {
    let map = create(std::slice::from_ref(zone));
    (1..10).for_each(|page| write(&map, page * PAGE, &[page as u8; 4096]));
    let mut pages = Pages::none([(0, SIZE)]);
    absent.iter().for_each(|page| pages.insert(page * PAGE..(page + 1) * PAGE));
    let memory = Arc::new(AbsentMemory::watch(Arc::clone(map.memory()), pages).unwrap());
    let (wanted, wants) = channel();
    let serving = Arc::clone(&memory);
    let thread = thread::spawn(move || serving.serve(&|gpa| wanted.send(gpa).unwrap()).unwrap());
    (map, memory, thread, wants)
}

/// A thread that reads the first byte of a page.
fn reader(map: &MemoryMap, page: u64) -> (JoinHandle<()>, Receiver<u8>) {
    let (tell, told) = channel();
    let memory = Arc::clone(map.memory());
    let thread = thread::spawn(move || {
        let _ = tell.send(memory.read_obj(GuestAddress(page * PAGE)).unwrap());
    });
    (thread, told)
}

fn byte(map: &MemoryMap, page: u64) -> u8 {
    map.memory().read_obj(GuestAddress(page * PAGE)).unwrap()
}

fn zones() -> [ZoneConfig; 2] {
    [zone(SIZE), ZoneConfig { shared: true, ..zone(SIZE) }]
}

#[test]
fn who_touches_what_is_absent_waits_for_it_and_the_rest_is_as_it_was() {
    for zone in zones() {
        let (map, memory, serving, wants) = watched(&zone, &[2, 5, 600]);
        // Whoever restores the machine finds what was there before.
        assert_eq!((byte(&map, 2), byte(&map, 601), byte(&map, 600)), (2, 0, 0));
        memory.leave().unwrap();
        assert_eq!((byte(&map, 1), byte(&map, 3), byte(&map, 602)), (1, 3, 0));
        assert_eq!((memory.left(), memory.wanted()), (3 * PAGE, Vec::new()));

        let (first, told) = reader(&map, 5);
        let (second, told_too) = reader(&map, 5);
        assert_eq!(wants.recv_timeout(LIMIT).unwrap(), 5 * PAGE);
        assert!(told.try_recv().is_err());
        assert_eq!(memory.wanted(), [5 * PAGE]);
        // What is there is not written to.
        assert!(!memory.put(4 * PAGE, &[0x55; 3 * 4096]).unwrap());
        assert_eq!((told.recv_timeout(LIMIT).unwrap(), told_too.recv_timeout(LIMIT).unwrap()), (0x55, 0x55));
        assert_eq!((byte(&map, 4), byte(&map, 6)), (4, 6));
        assert!(memory.wanted().is_empty());
        assert_eq!(memory.absent(), [2 * PAGE..3 * PAGE, 600 * PAGE..601 * PAGE]);

        let (third, told) = reader(&map, 600);
        assert_eq!(wants.recv_timeout(LIMIT).unwrap(), 600 * PAGE);
        assert!(!memory.zero(590 * PAGE..SIZE).unwrap());
        assert_eq!(told.recv_timeout(LIMIT).unwrap(), 0);
        assert!(memory.put(2 * PAGE, &[0x22; 4096]).unwrap(), "it was the last");
        // Once more, and beyond the end of memory: nothing.
        assert!(memory.put(2 * PAGE, &[0x23; 4096]).unwrap() && memory.zero(SIZE..u64::MAX).unwrap());
        assert_eq!((byte(&map, 2), memory.left()), (0x22, 0));
        memory.end();
        [first, second, third, serving].into_iter().for_each(|thread| thread.join().unwrap());
        assert!(wants.try_recv().is_err(), "a page is wanted once");
        assert_eq!(byte(&map, 700), 0);
    }
}

#[test]
fn what_arrives_early_waits_and_the_end_lets_everybody_go() {
    for zone in zones() {
        let (map, memory, serving, wants) = watched(&zone, &[2, 5]);
        let early = Arc::clone(&memory);
        let early = thread::spawn(move || early.put(2 * PAGE, &[0x22; 4096]).unwrap());
        // The order of both does not matter: it is not dropped again.
        memory.leave().unwrap();
        assert!(!early.join().unwrap());
        assert_eq!((byte(&map, 2), memory.left()), (0x22, PAGE));
        let (reading, told) = reader(&map, 5);
        assert_eq!(wants.recv_timeout(LIMIT).unwrap(), 5 * PAGE);
        memory.end();
        assert_eq!(told.recv_timeout(LIMIT).unwrap(), 0);
        [reading, serving].into_iter().for_each(|thread| thread.join().unwrap());
        assert!(!memory.put(5 * PAGE, &[1; 4096]).unwrap());
        assert_eq!(byte(&map, 5), 0);

        // Nobody waits for memory that never gets its guest.
        let (_map, memory, serving, _wants) = watched(&zone, &[2]);
        let early = Arc::clone(&memory);
        let early = thread::spawn(move || early.put(2 * PAGE, &[1; 4096]).unwrap());
        memory.end();
        assert!(!early.join().unwrap());
        serving.join().unwrap();
    }
}

#[test]
fn memory_that_cannot_be_absent_is_refused_by_its_zone() {
    supported(&zones()).unwrap();
    for (zone, what) in [
        (ZoneConfig { huge_page: Some(2 << 20), ..zone(SIZE) }, "huge pages"),
        (ZoneConfig { file: Some("/f".into()), ..zone(SIZE) }, "is a file"),
    ] {
        let text = supported(&[zone]).unwrap_err().to_string();
        assert!(text.contains(what) && text.contains("memory zone"), "{text}");
    }
}
