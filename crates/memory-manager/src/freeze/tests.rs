//! With threads that write all the while.

use std::sync::RwLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};
use vmm_device_model::dma::GuestRam;
use vmm_hypervisor::fake::Fake;
use vmm_hypervisor::{Hypervisor, VmOptions};

use super::*;
use crate::layout::PAGE_SIZE;
use crate::zone::{ZoneConfig, ZoneError, ZoneOptions};

const PAGES: u64 = 2048;
const SIZE: u64 = PAGES * PAGE_SIZE;

fn zone(shared: bool) -> ZoneConfig {
    let options = ZoneOptions::default();
    ZoneConfig { id: "mem0".to_owned(), size: SIZE, file: None, shared, huge_page: None, options }
}

fn memory(zone: ZoneConfig) -> MemoryMap {
    let vm = Fake::new().create_vm(&VmOptions { ioapic_pins: 24, tss_address: 0 }).unwrap();
    MemoryMap::create(vm, &[zone], 40).unwrap()
}

fn write(memory: &GuestRam, page: u64, value: u64) {
    memory.write_obj(value, GuestAddress(page * PAGE_SIZE + page % 500 * 8)).unwrap();
}

/// All of memory in parts of `most` bytes, through the file or the page tables: no page is made.
fn content(source: &dyn MemorySource, only: Option<&Changed>, most: u64) -> Vec<u8> {
    let all = std::iter::once(0..SIZE).collect();
    let mut bytes = vec![0; usize::try_from(SIZE).unwrap()];
    for range in only.map_or(&all, |changed| &changed[0]) {
        let mut at = range.start;
        while let Some(data) = source.next_data(0, at).unwrap().filter(|data| data.start < range.end) {
            let data = data.start..data.end.min(data.start + most).min(range.end);
            let part = usize::try_from(data.start).unwrap()..usize::try_from(data.end).unwrap();
            source.read(0, data.start, &mut bytes[part]).unwrap();
            at = data.end;
        }
    }
    bytes
}

/// Waits until `done`; an end of time is a failure.
fn until(mut done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < end, "it does not come");
        thread::sleep(Duration::from_millis(1));
    }
}

/// The end of a test, by success or failure: nobody waits, and nobody writes.
struct End<'a>(&'a Frozen, &'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.thaw();
        self.1.store(true, Ordering::Relaxed);
    }
}

/// Freezes memory that two threads write all the while, and compares what is read with what was there.
fn frozen_is_what_it_was(zone: &ZoneConfig, most_ahead: u64, changed: Option<&Changed>) {
    let map = memory(zone.clone());
    (0..PAGES).step_by(3).for_each(|page| write(map.memory(), page, page + 1));
    let paused = RwLock::new(());
    let over = AtomicBool::new(false);
    let most = zone.huge_page.unwrap_or(64 * PAGE_SIZE);
    let hammer = |seed: u64| {
        let (mut page, mut value) = (seed, 1);
        while !over.load(Ordering::Relaxed) {
            let _running = paused.read().unwrap();
            (page, value) = ((page * 1_103_515_245 + 12_345) % PAGES, value + 1);
            // Pages become zero, too.
            write(map.memory(), page, if value % 5 == 0 { 0 } else { seed << 32 | value });
        }
    };
    let running = || {
        thread::scope(|scope| {
            scope.spawn(|| hammer(1));
            scope.spawn(|| hammer(2));
            thread::sleep(Duration::from_millis(20));
            let freezer = map.freezer().unwrap();
            let mut changed = changed.cloned();
            changed.iter_mut().for_each(|changed| freezer.widen(changed));
            let changed = changed.as_ref();
            let blackout = paused.write().unwrap();
            let expected = content(&map.source().unwrap(), changed, most);
            let mut frozen = freezer.freeze(changed).unwrap();
            frozen.most_ahead = most_ahead;
            let found = thread::scope(|scope| {
                let _end = End(&frozen, &over);
                scope.spawn(|| frozen.serve());
                drop(blackout);
                // Some is copied out before anything is read.
                until(|| frozen.ahead() > 0);
                let found = content(&frozen, changed, most);
                assert_eq!(frozen.ahead(), 0, "all of it is read");
                found
            });
            (expected, found)
        })
    };
    let (expected, found) = running();
    let differs = expected.iter().zip(&found).position(|(a, b)| a != b);
    assert_eq!(differs.map(|at| at as u64 / PAGE_SIZE), None, "{zone:?}, {changed:?}");
}

#[test]
fn what_is_read_is_what_was_there_whoever_writes_meanwhile() {
    for shared in [false, true] {
        for most_ahead in [MOST_AHEAD, 4 * PAGE_SIZE] {
            frozen_is_what_it_was(&zone(shared), most_ahead, None);
        }
        let changed = vec![vec![3 * PAGE_SIZE..700 * PAGE_SIZE, 1500 * PAGE_SIZE..1501 * PAGE_SIZE]];
        frozen_is_what_it_was(&zone(shared), MOST_AHEAD, Some(&changed));
    }
}

/// With huge pages on the host; without, there is no such memory.
#[test]
fn huge_pages_are_frozen_as_a_whole() {
    const HUGE: u64 = 2 << 20;
    let spare = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
    let spare = spare.map_or(0, |text| text.trim().parse::<u64>().unwrap());
    for shared in [false, true] {
        let options = ZoneOptions { prefault: true, ..ZoneOptions::default() };
        let zone = ZoneConfig { huge_page: Some(HUGE), options, ..zone(shared) };
        let vm = Fake::new().create_vm(&VmOptions { ioapic_pins: 24, tss_address: 0 }).unwrap();
        let there = MemoryMap::create(vm, std::slice::from_ref(&zone), 40).is_ok();
        assert_eq!(there, spare >= SIZE / HUGE, "{spare} are free");
        if there {
            frozen_is_what_it_was(&zone, MOST_AHEAD, None);
            frozen_is_what_it_was(&zone, HUGE, None);
            let changed = vec![vec![3 * PAGE_SIZE..5 * PAGE_SIZE, 1500 * PAGE_SIZE..1501 * PAGE_SIZE]];
            frozen_is_what_it_was(&zone, MOST_AHEAD, Some(&changed));
        }
    }
}

#[test]
fn who_writes_too_much_waits_for_the_reader() {
    let map = memory(zone(false));
    (0..4).for_each(|page| write(map.memory(), page, 1));
    let mut frozen = map.freezer().unwrap().freeze(None).unwrap();
    frozen.most_ahead = PAGE_SIZE;
    let (frozen, written) = (&frozen, &AtomicBool::new(false));
    thread::scope(|scope| {
        scope.spawn(|| frozen.serve());
        scope.spawn(|| {
            write(map.memory(), 1, 2);
            write(map.memory(), 3, 2);
            written.store(true, Ordering::SeqCst);
        });
        until(|| frozen.ahead() == PAGE_SIZE);
        thread::sleep(Duration::from_millis(20));
        assert!(!written.load(Ordering::SeqCst), "there is no room for its second page");
        let mut page = [0; 4096];
        frozen.read(0, PAGE_SIZE, &mut page).unwrap();
        assert_eq!(page[8], 1, "as it was");
        until(|| written.load(Ordering::SeqCst));
        frozen.read(0, 3 * PAGE_SIZE, &mut page).unwrap();
        assert_eq!(page[24], 1);
        frozen.thaw();
    });
}

#[test]
fn thawed_memory_lets_everybody_go_on_and_cannot_be_read() {
    let map = memory(zone(true));
    write(map.memory(), 1, 1);
    let frozen = map.freezer().unwrap().freeze(None).unwrap();
    thread::scope(|scope| {
        // Nobody serves.
        let writer = scope.spawn(|| write(map.memory(), 1, 2));
        thread::sleep(Duration::from_millis(10));
        assert!(!writer.is_finished());
        frozen.thaw();
        writer.join().unwrap();
        frozen.serve();
    });
    let error = frozen.read(0, 0, &mut [0; 4096]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::Interrupted);
    frozen.next_data(0, 0).unwrap_err();
    // And it can be frozen again.
    let again = map.freezer().unwrap().freeze(None).unwrap();
    assert_eq!(again.read(0, 1, &mut [0; 4096]).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    let mut page = [0; 4096];
    again.read(0, PAGE_SIZE, &mut page).unwrap();
    assert_eq!(page[8], 2);
}

#[test]
fn what_cannot_be_frozen_is_told_by_name() {
    let mut map = memory(zone(true));
    map.share_with("vhost-user disk");
    assert_eq!(
        map.freezer().unwrap_err().to_string(),
        "another process has mapped guest memory, for vhost-user disk"
    );
    let file = tempfile::NamedTempFile::new().unwrap();
    let map = memory(ZoneConfig { file: Some(file.path().to_owned()), ..zone(false) });
    assert_eq!(map.freezer().unwrap_err().to_string(), "memory zone \"mem0\" is a private mapping of a file");
    let options = ZoneOptions { mergeable: true, ..ZoneOptions::default() };
    assert_eq!(
        memory(ZoneConfig { options, ..zone(false) }).freezer().unwrap_err().to_string(),
        "memory zone \"mem0\" may be merged with equal memory (mergeable)"
    );
    let larger = ZoneConfig { huge_page: Some(1 << 30), size: 1 << 30, ..zone(true) };
    let vm = Fake::new().create_vm(&VmOptions { ioapic_pins: 24, tss_address: 0 }).unwrap();
    match MemoryMap::create(vm, &[larger], 40) {
        Ok(map) => assert_eq!(
            map.freezer().unwrap_err().to_string(),
            "memory zone \"mem0\" is in huge pages of more than 2 MiB"
        ),
        // Not every host knows them.
        Err(error) => assert!(matches!(error, ZoneError::Backing { .. }), "{error}"),
    }
}
