//! Guest memory as a snapshot's writer reads it.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests fail by panicking")]

mod common;

use common::{MIB, PAGE, allocated, content, create, data, resident, restore, save, write, zone};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm_hypervisor::fake::Fake;
use vmm_memory_manager::restore::Fill;
use vmm_memory_manager::source::GuestMemorySource;
use vmm_memory_manager::userfault::{Features, Mode, Userfault};
use vmm_memory_manager::zone::{ZoneConfig, ZoneOptions};
use vmm_snapshot::directory::MemorySource;

const SIZE: u64 = 16 * MIB;

#[test]
fn every_backing_is_read_and_none_is_touched() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("ram");
    for (file, shared) in [
        (None, false),
        (None, true),
        (Some(file.clone()), true),
        (Some(file), false),
        (Some(dir.path().to_owned()), true),
        (Some(dir.path().to_owned()), false),
    ] {
        if let Some(file) = file.as_ref().filter(|path| !path.is_dir()) {
            std::fs::write(file, b"").unwrap();
        }
        let map = create(&[ZoneConfig { file: file.clone(), shared, ..zone(SIZE) }]);
        for page in [0, 1, 2, 600, 4095] {
            write(&map, page * PAGE + 7, &page.to_ne_bytes());
            write(&map, page * PAGE + 99, b"written");
        }
        // Read, not written: a hole that some page tables show.
        map.memory().read_obj::<u8>(GuestAddress(700 * PAGE)).unwrap();
        let before = (resident(&map), allocated(&map));
        assert!(before.0 <= 64 * PAGE, "{before:?}");
        let source = map.source().unwrap();
        let found = data(&source);
        let mut one_by_one = vec![0xee; found.len()];
        source.read(0, 0, &mut one_by_one).unwrap();
        let mut odd = [0xee; 9];
        source.read(0, PAGE * 600 + 97, &mut odd).unwrap();
        assert_eq!((resident(&map), allocated(&map)), before, "{file:?} {shared}");
        assert_eq!(&odd, b"\0\0written");
        let expected = content(&map);
        assert!(found == expected && one_by_one == expected, "{file:?} {shared}");
        assert!(source.read(0, SIZE - 1, &mut [0; 2]).is_err() && source.read(1, 0, &mut []).is_err());
        assert!(source.next_data(1, 0).is_err() && source.next_data(0, SIZE).unwrap().is_none());
        assert!(source.next_data(0, u64::MAX).unwrap().is_none());
    }
}

#[test]
fn a_zones_file_is_data_where_it_was_not_written_over() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("ram");
    let mut before = vec![0_u8; usize::try_from(SIZE).unwrap()];
    before[5 << 20..6 << 20].fill(0x11);
    std::fs::write(&file, &before).unwrap();
    let map = create(&[ZoneConfig { file: Some(file.clone()), ..zone(SIZE) }]);
    write(&map, 5 * MIB + 4096, &[0x22; 4096]);
    write(&map, 9 * MIB, b"beyond");
    let found = data(&map.source().unwrap());
    assert!(found[(5 << 20) + 4096..(5 << 20) + 8192].iter().all(|byte| *byte == 0x22));
    assert!(found == content(&map));
    assert!(std::fs::read(file).unwrap() == before, "private");
}

/// KSM puts it there (use_zero_pages) for a page that the guest has cleared; so can a userfaultfd, in a file of tmpfs.
#[test]
fn the_zero_page_over_a_files_page_is_what_was_written() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let file = dir.path().join("ram");
    std::fs::write(&file, vec![0x11; usize::try_from(SIZE).unwrap()]).unwrap();
    let map = create(&[ZoneConfig { file: Some(file), ..zone(SIZE) }]);
    let Ok(userfault) = Userfault::new(map.memory().clone(), Features::NONE) else {
        return eprintln!("not on this host: it gives this user no userfaultfd");
    };
    userfault.register(0, Mode::Missing).unwrap();
    userfault.zero(0, MIB..MIB + 4096).unwrap();
    drop(userfault);
    let found = data(&map.source().unwrap());
    let cleared = usize::try_from(MIB).unwrap();
    assert!(found[cleared..cleared + 4096].iter().all(|byte| *byte == 0));
    assert!(found == content(&map));
}

#[test]
fn a_restored_vm_is_read_without_mapping_its_file() {
    let dir = tempfile::tempdir().unwrap();
    let zones = [zone(SIZE)];
    let map = create(&zones);
    (0..1024).for_each(|page| write(&map, page * PAGE, &[0x77; 4096]));
    write(&map, 15 * MIB, b"far");
    save(&map, &dir.path().join("a"), None);
    let back = restore(&Fake::new(), &map, &zones, &dir.path().join("a"), Fill::Lazy).unwrap();
    write(&back, 3 * PAGE, &[0; 4096]);
    write(&back, 10 * MIB, b"new");
    let before = resident(&back);
    assert!(before <= 64 * PAGE, "{before}");
    let found = data(&back.source().unwrap());
    assert_eq!(resident(&back), before);
    assert!(found == content(&back));
}

#[test]
fn zones_share_files_across_the_hole() {
    let low = ZoneConfig { shared: true, ..zone((3 << 30) + 2 * MIB) };
    let high = ZoneConfig { id: "mem1".to_owned(), shared: true, ..zone(64 * MIB) };
    let map = create(&[low, high]);
    for (region, place) in map.places().iter().enumerate() {
        write(&map, place.gpa + PAGE, &[u8::try_from(region).unwrap() + 1; 4096]);
        write(&map, place.gpa + place.size - PAGE, &[u8::try_from(region).unwrap() + 1; 4096]);
    }
    let source = map.source().unwrap();
    assert_eq!(source.places().len(), 3);
    for (region, place) in source.places().iter().enumerate() {
        assert_eq!(source.next_data(region, 0).unwrap(), Some(PAGE..2 * PAGE), "{place:?}");
        let last = place.size - PAGE;
        assert_eq!(source.next_data(region, 2 * PAGE).unwrap(), Some(last..place.size));
        let mut byte = [0];
        source.read(region, last, &mut byte).unwrap();
        assert_eq!(usize::from(byte[0]), region + 1);
    }
}

#[test]
fn a_source_outlives_the_map_on_another_thread() {
    fn is_free<T: Send + Sync + 'static>(_: &T) {}
    let map = create(&[zone(SIZE)]);
    write(&map, 8 * MIB, b"still here");
    let source: GuestMemorySource = map.source().unwrap();
    is_free(&source);
    drop(map);
    let found = std::thread::spawn(move || data(&source)).join().unwrap();
    assert_eq!(&found[8 << 20..(8 << 20) + 10], b"still here");
}

#[test]
fn huge_runs_come_in_pieces_and_none_is_missing() {
    let thp = ZoneOptions { thp: true, prefault: true, ..ZoneOptions::default() };
    let map = create(&[ZoneConfig { options: thp, ..zone(SIZE) }]);
    let source = map.source().unwrap();
    let (mut at, mut pieces) = (0, 0);
    while let Some(data) = source.next_data(0, at).unwrap() {
        assert_eq!(data.start, at);
        (at, pieces) = (data.end, pieces + 1);
    }
    assert_eq!(at, SIZE, "all of it was allocated");
    assert_eq!(pieces, SIZE / PAGE / 64, "a look ends before it costs much");
}

#[test]
fn memory_that_was_only_read_is_no_data() {
    let map = create(&[zone(SIZE)]);
    assert!(content(&map).iter().all(|byte| *byte == 0));
    assert_eq!(map.memory().num_regions(), 1);
    assert_eq!(map.source().unwrap().next_data(0, 0).unwrap(), None);
}

#[test]
fn little_gaps_are_data_and_large_ones_are_not() {
    let map = create(&[zone(SIZE)]);
    for page in [3, 5, 22, 40, 100] {
        write(&map, page * PAGE, b"x");
    }
    let source = map.source().unwrap();
    assert_eq!(source.next_data(0, 0).unwrap(), Some(3 * PAGE..23 * PAGE));
    assert_eq!(source.next_data(0, 23 * PAGE).unwrap(), Some(40 * PAGE..41 * PAGE));
    assert_eq!(source.next_data(0, 4 * PAGE).unwrap(), Some(5 * PAGE..23 * PAGE));
    assert_eq!(source.next_data(0, 100 * PAGE + 5).unwrap(), Some(100 * PAGE + 5..101 * PAGE));
    assert!(data(&source) == content(&map));
}
