//! Shared memory that is filled from a snapshot while its guest runs, by real faults.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]

mod common;

use std::cell::RefCell;
use std::fs::{OpenOptions, Permissions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use common::{MIB, PAGE, allocated, content, create, save, vm, work, write, zone};
use vm_memory::{Bytes, GuestAddress};
use vmm_hypervisor::fake::Fake;
use vmm_memory_manager::fill::{Behind, FillError, FillWork};
use vmm_memory_manager::handover::HandoverError;
use vmm_memory_manager::map::MemoryMap;
use vmm_memory_manager::restore::{Fill, Saved};
use vmm_memory_manager::zone::ZoneConfig;
use vmm_snapshot::directory::{Chain, Increment, MemorySource};

const SIZE: u64 = 16 * MIB;

fn shared() -> ZoneConfig {
    ZoneConfig { shared: true, ..zone(SIZE) }
}

/// A snapshot at `dir/a` and a child of it at `dir/b`, of memory with something in some chunks; and what was in it.
fn saved(dir: &Path) -> (MemoryMap, Vec<u8>) {
    let map = create(&[shared()]);
    for page in [0, 1, 700, 2048, 3000, 4095] {
        write(&map, page * PAGE, &[page as u8 | 1; 4096]);
    }
    save(&map, &dir.join("a"), None);
    write(&map, 700 * PAGE, &[0; 4096]);
    write(&map, 1300 * PAGE, &[5; 8192]);
    let changed = vec![vec![700 * PAGE..701 * PAGE, 1300 * PAGE..1302 * PAGE]];
    save(
        &map,
        &dir.join("b"),
        Some(&Increment { parent: Path::new("../a"), id: None, changed: &changed, packed: true }),
    );
    let all = content(&map);
    (map, all)
}

/// A restored VM, the filler of which waits for a word, and what is lost.
struct Restored {
    map: MemoryMap,
    go: Sender<()>,
    lost: Arc<Mutex<Vec<String>>>,
    threads: usize,
}

fn restored(like: &MemoryMap, zone: &ZoneConfig, path: &Path) -> Restored {
    let (go, word): (Sender<()>, Receiver<()>) = channel();
    let (word, count) = (RefCell::new(Some(word)), RefCell::new(0));
    let start = |work: FillWork| {
        *count.borrow_mut() += 1;
        // The first one serves faults.
        let word = if *count.borrow() == 2 { word.borrow_mut().take() } else { None };
        Ok(thread::spawn(move || {
            if let Some(word) = word {
                let _ = word.recv();
            }
            work();
        }))
    };
    let lost = Arc::new(Mutex::new(Vec::new()));
    let told = Arc::clone(&lost);
    let lost_to = move |error: &FillError| {
        let source = std::error::Error::source(error).map(ToString::to_string);
        told.lock().unwrap().push(format!("{error}: {}", source.unwrap_or_default()));
    };
    let map = restored_by(like, zone, path, &start, Arc::new(lost_to));
    let threads = *count.borrow();
    Restored { map, go, lost, threads }
}

type Start<'a> = &'a dyn Fn(FillWork) -> std::io::Result<thread::JoinHandle<()>>;

/// The memory of a VM that is restored, filled by threads that `start` starts.
fn restored_by(
    like: &MemoryMap,
    zone: &ZoneConfig,
    path: &Path,
    start: Start<'_>,
    lost: Arc<dyn Fn(&FillError) + Send + Sync>,
) -> MemoryMap {
    let chain = Arc::new(Chain::open(path).unwrap());
    let behind = Behind { chain: Arc::clone(&chain), start, lost };
    let saved = Saved { layout: &like.save(), chain: &chain, fill: Fill::Lazy };
    MemoryMap::restore_behind(vm(&Fake::new()), std::slice::from_ref(zone), &saved, &work(), &behind).unwrap()
}

fn until(mut done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < end, "it does not come");
        thread::sleep(Duration::from_millis(1));
    }
}

fn byte(map: &MemoryMap, page: u64) -> u8 {
    map.memory().read_obj(GuestAddress(page * PAGE)).unwrap()
}

/// Changes a file of a snapshot, which nobody ought to do.
fn change(path: &Path, how: impl FnOnce(std::fs::File)) {
    std::fs::set_permissions(path, Permissions::from_mode(0o600)).unwrap();
    how(OpenOptions::new().write(true).open(path).unwrap());
}

#[test]
fn what_is_touched_is_there_first_and_all_is_there_in_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let (original, expected) = saved(dir.path());
    let Restored { map, go, lost, .. } = restored(&original, &shared(), &dir.path().join("b"));
    assert!(map.is_filling());
    assert_eq!(allocated(&map), 0, "nothing is there");
    // Pages of the base, of the child, of zeroes, and one that the child made so.
    assert_eq!([4095, 1301, 3500, 700].map(|page| byte(&map, page)), [255, 5, 0, 0]);
    // A guest that writes first has its own word.
    write(&map, 3000 * PAGE + 7, &[0xaa]);
    assert!(allocated(&map) < SIZE / 2, "the rest is not there yet");
    let busy = map.source().unwrap_err();
    assert!(busy.to_string().contains("still being read"), "{busy}");
    map.freezer().unwrap_err();
    assert!(matches!(map.share(), Err(HandoverError::Filling)), "what is not there cannot be handed over");
    map.settle().unwrap();

    go.send(()).unwrap();
    until(|| !map.is_filling());
    let mut expected = expected;
    expected[(3000 * PAGE + 7) as usize] = 0xaa;
    map.share().unwrap();
    let source = map.source().unwrap();
    assert!(allocated(&map) < 12 * PAGE, "what is zero takes no space, unless it was touched");
    let mut page = [1; 4096];
    source.read(0, 2048 * PAGE, &mut page).unwrap();
    assert_eq!(page, [1; 4096]);
    assert!(content(&map) == expected);
    assert!(lost.lock().unwrap().is_empty());
}

#[test]
fn what_is_lost_before_the_guest_is_there_fails_the_restore() {
    for shrinks in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let (original, _) = saved(dir.path());
        let Restored { map, lost, .. } = restored(&original, &shared(), &dir.path().join("a"));
        change(&dir.path().join("a/memory-0.bin"), |file| {
            if shrinks {
                file.set_len(8 * MIB).unwrap();
            } else {
                file.write_all_at(&[9], 3000 * PAGE).unwrap();
            }
        });
        // Who makes the guest is not left waiting.
        byte(&map, 3000);
        let error = map.settle().unwrap_err();
        let cause = std::error::Error::source(&error).unwrap().to_string();
        let words = if shrinks { "8388608 bytes" } else { "chunk 5" };
        assert!(cause.contains("memory-0.bin") && cause.contains(words), "{cause}");
        assert!(!map.is_filling() && lost.lock().unwrap().is_empty());
    }
}

#[test]
fn what_is_lost_later_is_told_and_who_needs_it_waits() {
    let dir = tempfile::tempdir().unwrap();
    let (original, _) = saved(dir.path());
    let Restored { map, go, lost, .. } = restored(&original, &shared(), &dir.path().join("a"));
    change(&dir.path().join("a/memory-0.bin"), |file| file.write_all_at(&[9], 3000 * PAGE).unwrap());
    map.settle().unwrap();
    let memory = Arc::clone(map.memory());
    let guest = thread::spawn(move || memory.read_obj::<u8>(GuestAddress(3000 * PAGE)).unwrap());
    until(|| !lost.lock().unwrap().is_empty());
    let told = lost.lock().unwrap()[0].clone();
    assert!(told.contains("memory-0.bin") && told.contains("chunk 5"), "{told}");
    assert!(!guest.is_finished());
    // All else is served.
    assert_eq!(byte(&map, 4095), 255);
    drop(go);
    until(|| lost.lock().unwrap().len() == 2);
    assert!(map.is_filling());
    drop(map);
    guest.join().unwrap();
}

#[test]
fn memory_that_others_may_map_is_filled_before_the_guest_runs() {
    let dir = tempfile::tempdir().unwrap();
    let (original, expected) = saved(dir.path());
    let file = tempfile::NamedTempFile::new().unwrap();
    let named = ZoneConfig { file: Some(file.path().to_owned()), ..shared() };
    let mut prefaulted = shared();
    prefaulted.options.prefault = true;
    for zone in [named, prefaulted, zone(SIZE)] {
        let Restored { map, threads, .. } = restored(&original, &zone, &dir.path().join("b"));
        assert_eq!((threads, map.is_filling()), (0, false), "{zone:?}");
        map.settle().unwrap();
        assert!(content(&map) == expected);
    }
}

#[test]
fn a_vm_that_goes_does_not_wait_for_its_memory() {
    let dir = tempfile::tempdir().unwrap();
    let (original, _) = saved(dir.path());
    let Restored { map, go, .. } = restored(&original, &shared(), &dir.path().join("a"));
    go.send(()).unwrap();
    drop(map);
}

/// Its threads do nothing, as where the snapshot's file does not answer.
#[test]
fn who_waits_for_memory_of_a_guest_that_is_over_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let (original, _) = saved(dir.path());
    let (go, word) = channel::<()>();
    let word = Arc::new(Mutex::new(word));
    let start = |work: FillWork| {
        let word = Arc::clone(&word);
        Ok(thread::spawn(move || {
            let _ = word.lock().unwrap().recv();
            work();
        }))
    };
    let map = restored_by(&original, &shared(), &dir.path().join("b"), &start, Arc::new(|_| ()));
    map.settle().unwrap();
    let memory = Arc::clone(map.memory());
    let guest = thread::spawn(move || memory.read_obj::<u8>(GuestAddress(4095 * PAGE)).unwrap());
    thread::sleep(Duration::from_millis(20));
    assert!(!guest.is_finished());
    map.abandon();
    assert_eq!(guest.join().unwrap(), 0);
    assert!(!map.is_filling());
    drop(map);
    drop(go);
}
