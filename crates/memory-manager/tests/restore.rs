//! Guest memory restored from a snapshot, or not at all.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests fail by panicking")]

mod common;

use std::fs::{File, OpenOptions, Permissions};
use std::ops::Range;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::{
    MIB, PAGE, allocated, content, create, mappings, resident, restore, save, vm, work, write, zone,
};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_fuzzing::Random;
use vmm_hypervisor::fake::{Fake, Live};
use vmm_memory_manager::dirty::DirtyCollector;
use vmm_memory_manager::layout::Range as Gpas;
use vmm_memory_manager::map::{MemoryLayoutV1, MemoryMap, PieceV1};
use vmm_memory_manager::restore::{Fill, RestoreError, Saved};
use vmm_memory_manager::zone::{ZoneConfig, ZoneError, ZoneOptions};
use vmm_snapshot::Schema;
use vmm_snapshot::directory::{Chain, Increment, MemorySource, ReadError};

const SIZE: u64 = 8 * MIB;
const BOTH: [Fill; 2] = [Fill::Lazy, Fill::Eager];

/// A VM's memory with a base at `a`, changed twice, at `b` and `c`; a page became zero, one is in all three.
fn chain(dir: &Path, zones: &[ZoneConfig]) -> MemoryMap {
    let mut map = create(zones);
    let mut dirty = DirtyCollector::new();
    (0..300).for_each(|page| write(&map, page * PAGE, &[0x10; 4096]));
    dirty.start(&mut map, "snapshot").unwrap();
    save(&map, &dir.join("a"), None);
    for (name, parent, page) in [("b", "../a", 200_u64), ("c", "../b", 201)] {
        write(&map, 7 * PAGE + 5, name.as_bytes());
        write(&map, page * PAGE, &[0; 4096]);
        write(&map, page * 3 * PAGE, name.as_bytes());
        let changed = dirty.take_changed(&map, "snapshot").unwrap();
        assert_eq!(changed.iter().flatten().map(|r| r.end - r.start).sum::<u64>(), 3 * PAGE);
        save(
            &map,
            &dir.join(name),
            Some(&Increment { parent: Path::new(parent), id: None, changed: &changed, packed: true }),
        );
    }
    map
}

/// Opens a file of a snapshot as its owner could, against the format's rules.
fn reopen(path: &Path) -> File {
    std::fs::set_permissions(path, Permissions::from_mode(0o600)).unwrap();
    OpenOptions::new().write(true).open(path).unwrap()
}

#[test]
fn a_chain_comes_back_byte_for_byte_into_every_backing() {
    let dir = tempfile::tempdir().unwrap();
    let named = dir.path().join("ram");
    let backings: [(Option<PathBuf>, bool); 6] = [
        (None, false),
        (None, true),
        (Some(named.clone()), true),
        (Some(named.clone()), false),
        (Some(dir.path().into()), true),
        (Some(dir.path().into()), false),
    ];
    let zones = [zone(SIZE)];
    let map = chain(dir.path(), &zones);
    let expected = content(&map);
    for fill in BOTH {
        for prefault in [false, true] {
            for (file, shared) in backings.clone() {
                // What was in a zone's file is not what was saved.
                std::fs::write(&named, vec![0xff; 9 << 20]).unwrap();
                let options = ZoneOptions { prefault, thp: true, ..ZoneOptions::default() };
                let zones = [ZoneConfig { file: file.clone(), shared, options, ..zone(SIZE) }];
                let fake = Fake::new();
                let back = restore(&fake, &map, &zones, &dir.path().join("c"), fill).unwrap();
                assert!(content(&back) == expected, "{file:?} {shared} {fill:?} {prefault}");
                assert_eq!(back.save(), map.save());
                assert_eq!(fake.live().slots, 1);
                let lazy = fill == Fill::Lazy && !shared && !prefault;
                assert_eq!(back.mapped_files().len(), usize::from(lazy));
                drop(back);
                let left = std::fs::read(&named).unwrap();
                assert_eq!(left.len(), 9 << 20);
                assert!(left[8 << 20..].iter().all(|byte| *byte == 0xff), "beyond the zone");
                if !(shared && file.as_ref() == Some(&named)) {
                    assert!(left.iter().all(|byte| *byte == 0xff), "another's file");
                }
            }
        }
    }
}

#[test]
fn a_lazy_restore_reads_only_what_is_touched() {
    let dir = tempfile::tempdir().unwrap();
    let zones = [zone(SIZE)];
    let map = chain(dir.path(), &zones);
    let back = restore(&Fake::new(), &map, &zones, &dir.path().join("a"), Fill::Lazy).unwrap();
    assert_eq!(resident(&back), 0);
    let path = dir.path().join("a/memory-0.bin");
    assert_eq!(mappings(&back), [path.to_str().unwrap()]);
    let [mapped] = &back.mapped_files()[..] else { panic!("one region") };
    let region = back.memory().iter().next().unwrap();
    let start = region.get_mmap().as_ptr() as usize;
    let end = start + usize::try_from(SIZE).unwrap();
    assert_eq!((&mapped.path, mapped.addresses.clone()), (&path, start..end));

    let back = restore(&Fake::new(), &map, &zones, &dir.path().join("c"), Fill::Lazy).unwrap();
    assert!(resident(&back) <= 5 * 16 * PAGE, "no more than the overlay and what the kernel maps around it");
}

#[test]
fn an_eager_restore_allocates_no_zero_page() {
    let dir = tempfile::tempdir().unwrap();
    let map = create(&[zone(SIZE)]);
    let used = [0, 1, 5, 511, 512, 1025, 2047];
    used.iter().for_each(|page| write(&map, page * PAGE, b"x"));
    save(&map, &dir.path().join("a"), None);
    for shared in [false, true] {
        let zones = [ZoneConfig { shared, ..zone(SIZE) }];
        let back = restore(&Fake::new(), &map, &zones, &dir.path().join("a"), Fill::Eager).unwrap();
        assert_eq!(resident(&back), used.len() as u64 * PAGE);
        assert_eq!(allocated(&back), if shared { used.len() as u64 * PAGE } else { 0 });
        assert!(content(&back) == content(&map));
    }
}

#[test]
fn ten_per_cent_at_random_need_one_mapping_per_region() {
    let dir = tempfile::tempdir().unwrap();
    // Around the hole: two regions.
    let zones = [zone((3 << 30) + 16 * MIB)];
    let map = create(&zones);
    save(&map, &dir.path().join("0"), None);
    let mut random = Random::new(0x10);
    for layer in 1..=4_u64 {
        let places = map.places();
        let mut changed: Vec<Vec<Range<u64>>> = vec![Vec::new(); places.len()];
        for (place, changed) in places.iter().zip(&mut changed) {
            // 10 % of 16 MiB of each.
            for page in (0..4096).filter(|_| random.below(10) == 0).collect::<Vec<u64>>() {
                write(&map, place.gpa + page * PAGE, &(layer * page + 1).to_ne_bytes());
                changed.push(page * PAGE..(page + 1) * PAGE);
            }
        }
        let parent = format!("../{}", layer - 1);
        let increment = Increment { parent: Path::new(&parent), id: None, changed: &changed, packed: true };
        save(&map, &dir.path().join(layer.to_string()), Some(&increment));
    }
    let back = restore(&Fake::new(), &map, &zones, &dir.path().join("4"), Fill::Lazy).unwrap();
    assert_eq!(mappings(&back).len(), 2);
    for place in map.places() {
        for at in (0..16 * MIB).step_by(1 << 20) {
            let read = |map: &MemoryMap| {
                let mut bytes = vec![0; 1 << 20];
                let address = vm_memory::GuestAddress(place.gpa + at);
                vm_memory::Bytes::read_slice(&**map.memory(), &mut bytes, address).unwrap();
                bytes
            };
            assert!(read(&back) == read(&map), "{:#x}", place.gpa + at);
        }
    }
}

#[test]
fn a_mapped_vm_knows_what_it_changed() {
    let dir = tempfile::tempdir().unwrap();
    let zones = [zone(SIZE)];
    let map = chain(dir.path(), &zones);
    assert_eq!(map.changed_since_restore().unwrap(), None, "never restored");
    let eager = restore(&Fake::new(), &map, &zones, &dir.path().join("a"), Fill::Eager).unwrap();
    assert_eq!(eager.changed_since_restore().unwrap(), None, "copied");
    let back = restore(&Fake::new(), &map, &zones, &dir.path().join("a"), Fill::Lazy).unwrap();
    let before = content(&back);
    assert_eq!(back.changed_since_restore().unwrap().unwrap(), [[]], "all was read, nothing written");
    write(&back, 5 * PAGE - 1, b"xx");
    (1024..1536).for_each(|page| write(&back, page * PAGE, b"run"));
    let changed = back.changed_since_restore().unwrap().unwrap();
    assert_eq!(changed, [[4 * PAGE..6 * PAGE, 1024 * PAGE..1536 * PAGE]]);

    // What it knows makes the next snapshot.
    let increment = Increment { parent: Path::new("../a"), id: None, changed: &changed, packed: true };
    save(&back, &dir.path().join("d"), Some(&increment));
    let again = restore(&Fake::new(), &map, &zones, &dir.path().join("d"), Fill::Lazy).unwrap();
    assert!(content(&again) == content(&back) && content(&back) != before);
}

#[test]
fn a_damaged_snapshot_is_refused_with_nothing_mapped() {
    let zones = [zone(SIZE)];
    type Damage = (&'static str, fn(&File));
    let damage: [Damage; 3] = [
        ("a/memory-0.bin", |file| file.set_len(7 * PAGE).unwrap()),
        ("c/memory-0.bin", |file| file.set_len(2 * PAGE).unwrap()),
        ("c/memory-0.bin", |file| file.write_all_at(b"!", 100).unwrap()),
    ];
    for (number, (file, damage)) in damage.iter().enumerate() {
        for fill in BOTH {
            let dir = tempfile::tempdir().unwrap();
            let map = chain(dir.path(), &zones);
            // Opened while it was whole.
            let chain = Chain::open(&dir.path().join("c")).unwrap();
            damage(&reopen(&dir.path().join(file)));
            let (fake, layout) = (Fake::new(), map.save());
            let saved = Saved { layout: &layout, chain: &chain, fill };
            let error = MemoryMap::restore(vm(&fake), &zones, &saved, &work()).unwrap_err();
            let RestoreError::Read(read) = error else { panic!("{error:?}") };
            match number {
                2 => assert!(matches!(read, ReadError::Chunk { chunk: 0, .. }), "{read}"),
                _ => assert!(matches!(&read, ReadError::Size { path, .. } if path.ends_with(file)), "{read}"),
            }
            assert_eq!(fake.live(), Live::default());
            assert!(
                !std::fs::read_to_string("/proc/self/maps").unwrap().contains(dir.path().to_str().unwrap())
            );
        }
    }
}

#[test]
#[expect(clippy::single_range_in_vec_init, reason = "one range")]
fn zones_are_filled_each_in_its_way() {
    let dir = tempfile::tempdir().unwrap();
    let zones = [zone(SIZE), ZoneConfig { id: "mem1".to_owned(), shared: true, ..zone(SIZE) }];
    let map = create(&zones);
    for place in map.places() {
        write(&map, place.gpa + 3 * PAGE, place.zone.as_bytes());
    }
    save(&map, &dir.path().join("a"), None);
    write(&map, SIZE + PAGE, b"changed");
    write(&map, 2 * PAGE, b"changed");
    let changed = [vec![2 * PAGE..3 * PAGE], vec![PAGE..2 * PAGE]];
    save(
        &map,
        &dir.path().join("b"),
        Some(&Increment { parent: Path::new("../a"), id: None, changed: &changed, packed: true }),
    );
    let both = |fill| restore(&Fake::new(), &map, &zones, &dir.path().join("b"), fill);
    let back = both(Fill::Lazy).unwrap();
    assert_eq!(back.mapped_files().len(), 1);
    assert_eq!(back.changed_since_restore().unwrap(), None, "of a part only");
    assert!(content(&back) == content(&map));

    // What is mapped is not read: its damage goes unseen. What is copied is verified.
    reopen(&dir.path().join("a/memory-0.bin")).write_all_at(b"!", 5 * PAGE).unwrap();
    both(Fill::Lazy).unwrap();
    assert!(matches!(both(Fill::Eager), Err(RestoreError::Read(ReadError::Chunk { .. }))));
    reopen(&dir.path().join("a/memory-1.bin")).write_all_at(b"!", 5 * PAGE).unwrap();
    assert!(matches!(both(Fill::Lazy), Err(RestoreError::Read(ReadError::Chunk { .. }))));
}

#[test]
fn a_failure_of_any_call_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let zones = [zone(SIZE), ZoneConfig { id: "mem1".to_owned(), ..zone(2 * MIB) }];
    let map = chain(dir.path(), &zones);
    let chain = Chain::open(&dir.path().join("c")).unwrap();
    let layout = map.save();
    for fill in BOTH {
        let saved = Saved { layout: &layout, chain: &chain, fill };
        let fake = Fake::new();
        let calls = fake.fail_each(
            || vm(&fake),
            |vm| MemoryMap::restore(Arc::clone(vm), &zones, &saved, &work()),
            |failed, vm, restored| {
                drop(vm);
                assert_eq!(restored.is_err(), failed.is_some(), "{failed:?} failed unnoticed");
                let Err(error) = restored else { return };
                assert!(matches!(error, RestoreError::Memory(ZoneError::Slot(_))), "{error:?}");
                assert_eq!(fake.live(), Live::default());
                let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
                assert!(!maps.contains(dir.path().to_str().unwrap()));
            },
        );
        assert_eq!(calls, 2, "one call per slot failed once");
    }
    // Stopped on request, too.
    let stop = vmm_snapshot::directory::Work {
        watch: &|_| std::ops::ControlFlow::Break(()),
        threads: std::num::NonZeroUsize::MIN,
    };
    let (fake, saved) = (Fake::new(), Saved { layout: &layout, chain: &chain, fill: Fill::Eager });
    let stopped = MemoryMap::restore(vm(&fake), &zones, &saved, &stop).unwrap_err();
    assert!(matches!(stopped, RestoreError::Read(ReadError::Cancelled)));
    assert_eq!(fake.live(), Live::default());
}

#[test]
fn a_snapshot_of_other_zones_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let map = create(&[zone(SIZE)]);
    save(&map, &dir.path().join("a"), None);
    let refused = |zones: &[ZoneConfig]| {
        restore(&Fake::new(), &map, zones, &dir.path().join("a"), Fill::Lazy).unwrap_err().to_string()
    };
    let other = ZoneConfig { id: "ram".to_owned(), ..zone(SIZE) };
    assert_eq!(refused(std::slice::from_ref(&other)), "memory zone \"mem0\" is not configured");
    assert_eq!(refused(&[zone(2 * SIZE)]), "memory zone \"mem0\" was saved with another size");
    assert_eq!(refused(&[zone(SIZE), other]), "memory zone \"ram\" was saved with another size");
    assert_eq!(refused(&[zone(SIZE), zone(SIZE)]), "memory zone \"mem0\" was saved with another size");
    assert_eq!(refused(&[]), "memory zone \"mem0\" is not configured");
}

#[test]
fn a_layout_that_cannot_be_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let zones = [zone(SIZE)];
    let map = create(&zones);
    save(&map, &dir.path().join("a"), None);
    let chain = Chain::open(&dir.path().join("a")).unwrap();
    let window = map.layout().mmio64;
    let piece =
        |offset, start, size| PieceV1 { zone: "mem0".to_owned(), offset, range: Gpas { start, size } };
    let refused = |ram: Vec<PieceV1>, mmio64| {
        let fake = Fake::new();
        let saved = Saved { layout: &MemoryLayoutV1 { ram, mmio64 }, chain: &chain, fill: Fill::Lazy };
        let error = MemoryMap::restore(vm(&fake), &zones, &saved, &work()).unwrap_err();
        assert_eq!(fake.live(), Live::default());
        error
    };
    let half = SIZE / 2;
    for ram in [
        vec![piece(0, 1, SIZE)],
        vec![piece(0, 0, SIZE - 1)],
        vec![piece(0, 0, 0), piece(0, 0, SIZE)],
        vec![piece(0, 0, half), piece(half, half - PAGE, half)],
        vec![piece(half, 0, half), piece(0, half, half)],
        vec![piece(0, 0, half), piece(0, half, half)],
        vec![piece(0, half, half), piece(half, 0, half)],
        vec![piece(PAGE, 0, SIZE)],
        vec![piece(0, (3 << 30) - PAGE, SIZE)],
        vec![piece(0, 3 << 30, SIZE)],
        vec![piece(0, 1 << 52, SIZE)],
        vec![piece(0, u64::MAX - PAGE + 1, SIZE)],
        (0..257).map(|n| piece(n * PAGE, n * PAGE, PAGE)).collect(),
    ] {
        let error = refused(ram.clone(), window);
        assert!(matches!(error, RestoreError::Layout(_)), "{ram:?}: {error:?}");
    }
    let whole = || vec![piece(0, 0, SIZE)];
    for (start, size) in [(window.start, 0), (0, window.size), (window.start, 1 << 52), (u64::MAX, 1)] {
        let error = refused(whole(), Gpas { start, size });
        assert!(matches!(error, RestoreError::Layout(_)), "{error:?}");
    }
    // Possible, and another VM's.
    for ram in [vec![piece(0, PAGE, SIZE)], vec![piece(0, 0, half), piece(half, half, half)]] {
        let error = refused(ram, window);
        assert!(matches!(error, RestoreError::OtherMemory), "{error:?}");
    }
}

/// Every integer of the saved layout at its edges: another VM's, or none at all; never a panic.
#[test]
fn fuzz_saved_layouts() {
    let dir = tempfile::tempdir().unwrap();
    let zones = [zone(SIZE)];
    let map = create(&zones);
    save(&map, &dir.path().join("a"), None);
    let chain = Chain::open(&dir.path().join("a")).unwrap();
    for bytes in vmm_fuzzing::hostile_records(&map.save().encode()) {
        let Ok(layout) = MemoryLayoutV1::decode(&bytes) else { continue };
        let saved = Saved { layout: &layout, chain: &chain, fill: Fill::Lazy };
        let fake = Fake::new();
        match MemoryMap::restore(vm(&fake), &zones, &saved, &work()) {
            Ok(restored) => assert_eq!(restored.save(), layout, "as it was, never as it would be"),
            Err(_) => assert_eq!(fake.live(), Live::default()),
        }
    }
}

/// With huge pages on the host their content comes back; without, an error does, and no signal.
#[test]
fn huge_pages_are_filled_or_refused() {
    let dir = tempfile::tempdir().unwrap();
    let map = create(&[zone(SIZE)]);
    write(&map, 5 * MIB, b"huge");
    save(&map, &dir.path().join("a"), None);
    let spare = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
    let spare = spare.map_or(0, |pages| pages.trim().parse().unwrap());
    for shared in [false, true] {
        let zones = [ZoneConfig { shared, huge_page: Some(2 << 20), ..zone(SIZE) }];
        let empty = create(&zones).source().unwrap();
        assert_eq!(empty.next_data(0, 0).unwrap(), None, "{shared}");
        let fake = Fake::new();
        match restore(&fake, &map, &zones, &dir.path().join("a"), Fill::Lazy) {
            Ok(back) => {
                let mut read = vec![0xee; usize::try_from(SIZE).unwrap()];
                back.source().unwrap().read(0, 0, &mut read).unwrap();
                assert_eq!(resident(&back) + if shared { 0 } else { allocated(&back) }, 2 * MIB);
                assert!(common::data(&back.source().unwrap()) == read && read == content(&map));
            }
            Err(error) => {
                assert_eq!(spare, 0, "{error:?}");
                assert!(matches!(error, RestoreError::Read(ReadError::Sink { region: 0, .. })), "{error:?}");
                assert_eq!(fake.live(), Live::default());
            }
        }
    }
}

#[test]
fn regions_are_where_they_were() {
    let dir = tempfile::tempdir().unwrap();
    let map = create(&[zone(SIZE)]);
    save(&map, &dir.path().join("a"), None);
    let back = restore(&Fake::new(), &map, &[zone(SIZE)], &dir.path().join("a"), Fill::Lazy).unwrap();
    let starts = |map: &MemoryMap| map.memory().iter().map(|r| (r.start_addr(), r.len())).collect::<Vec<_>>();
    assert_eq!(starts(&back), starts(&map));
    back.check(&map.save()).unwrap();
}
