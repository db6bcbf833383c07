//! Guest memory on the scripted hypervisor.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests fail by panicking")]

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use vm_memory::{Bytes, GuestAddress};
use vmm_device_model::dirty::DirtySource;
use vmm_hypervisor::fake::{Fake, Live};
use vmm_hypervisor::{Hypervisor, Vm, VmOptions};
use vmm_memory_manager::dirty::{DirtyCollector, DirtyError};
use vmm_memory_manager::map::{MemoryLayoutV1, MemoryMap};
use vmm_memory_manager::zone::{ZoneConfig, ZoneError, ZoneOptions};
use vmm_snapshot::{Record, Schema, golden};

fn zone(size: u64) -> ZoneConfig {
    let options = ZoneOptions { thp: true, ..ZoneOptions::default() };
    ZoneConfig { id: "mem0".to_owned(), size, file: None, shared: false, huge_page: None, options }
}

fn vm(fake: &Fake) -> Arc<dyn Vm> {
    fake.create_vm(&VmOptions { ioapic_pins: 24, tss_address: 0 }).unwrap()
}

#[test]
fn every_backing_can_be_written_and_read() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("ram");
    std::fs::write(&file, b"old").unwrap();
    let backings: [(Option<PathBuf>, bool); 5] = [
        (None, false),
        (None, true),
        (Some(file.clone()), true),
        (Some(file.clone()), false),
        (Some(dir.path().into()), true),
    ];
    for (path, shared) in backings {
        for prefault in [false, true] {
            let fake = Fake::new();
            let options = ZoneOptions { prefault, mergeable: true, thp: true, reserve: true };
            let config = ZoneConfig { file: path.clone(), shared, options, ..zone(4 << 20) };
            let map = MemoryMap::create(vm(&fake), &[config], 40).unwrap();
            map.dma().view().write_obj(0x1234_u32, GuestAddress(0x3ff_000)).unwrap();
            assert_eq!(map.memory().read_obj::<u32>(GuestAddress(0x3ff_000)).unwrap(), 0x1234);
            map.memory().write_obj(0_u8, GuestAddress(4 << 20)).unwrap_err();
        }
    }
    let content = std::fs::read(&file).unwrap();
    assert_eq!(content.len(), 4 << 20);
    assert_eq!(content[0x3ff_000..0x3ff_002], [0x34, 0x12], "shared memory reaches its file");
}

#[test]
fn what_the_host_does_not_have_is_refused_by_name() {
    let fake = Fake::new();
    let refused = |config: ZoneConfig| MemoryMap::create(vm(&fake), &[config], 52).unwrap_err();
    assert!(matches!(refused(zone(1 << 50)), ZoneError::HostTooSmall { wanted: 0x4_0000_0000_0000, .. }));
    assert!(matches!(refused(zone(0)), ZoneError::Layout(_)));
    assert!(matches!(refused(zone(4095)), ZoneError::Layout(_)));
    let missing = ZoneConfig { file: Some("/nonexistent/ram".into()), ..zone(4096) };
    assert_eq!(refused(missing).to_string(), "cannot open the file of memory zone \"mem0\"");
    let huge = ZoneConfig { huge_page: Some(1 << 33), ..zone(1 << 33) };
    assert!(matches!(refused(huge), ZoneError::Backing { .. } | ZoneError::HostTooSmall { .. }));
    for size in [0, 512, 3 << 20] {
        let odd = ZoneConfig { huge_page: Some(size), ..zone(6 << 20) };
        assert!(matches!(refused(odd), ZoneError::HugePage { .. }), "{size}");
    }
    assert_eq!(fake.live(), Live::default());
}

#[test]
fn a_refused_slot_leaves_nothing_behind() {
    let fake = Fake::new();
    for nth in 1..=2 {
        fake.fail_nth_of("KVM_SET_USER_MEMORY_REGION", nth);
        let vm = vm(&fake);
        let zones = [zone(3 << 30), ZoneConfig { id: "mem1".to_owned(), ..zone(1 << 30) }];
        MemoryMap::create(Arc::clone(&vm), &zones, 40).unwrap_err();
        assert_eq!(fake.live().slots, 0);
        MemoryMap::create(vm, &zones, 40).unwrap();
        assert_eq!(fake.live(), Live::default());
    }
}

#[test]
fn the_layout_is_recorded_and_compared() {
    let fake = Fake::new();
    let map = MemoryMap::create(vm(&fake), &[zone(1 << 20)], 40).unwrap();
    let saved: MemoryLayoutV1 = Record::of(&map.save()).parse().unwrap();
    map.check(&saved).unwrap();
    let other = MemoryMap::create(vm(&fake), &[zone(2 << 20)], 40).unwrap();
    other.check(&saved).unwrap_err();
    golden::check_state(&saved).unwrap();
}

/// Every integer of the saved layout at its edges: it is not this VM's.
#[test]
fn fuzz_layouts() {
    let fake = Fake::new();
    let map = MemoryMap::create(vm(&fake), &[zone(1 << 20)], 40).unwrap();
    for bytes in vmm_fuzzing::hostile_records(&map.save().encode()) {
        assert!(MemoryLayoutV1::decode(&bytes).and_then(|layout| map.check(&layout)).is_err());
    }
}

struct Device(Mutex<Vec<(u64, u64)>>);

impl DirtySource for Device {
    fn take(&self, mark: &mut dyn FnMut(u64, u64)) -> std::io::Result<()> {
        self.0.lock().unwrap().drain(..).for_each(|(address, len)| mark(address, len));
        Ok(())
    }
}

#[test]
fn every_tracker_sees_every_page_of_every_source_once() {
    let fake = Fake::new();
    let mut map = MemoryMap::create(vm(&fake), &[zone(1 << 20)], 40).unwrap();
    let device = Arc::new(Device(Mutex::default()));
    let mut dirty = DirtyCollector::new();
    dirty.add_source(device.clone());
    map.memory().write_obj(1_u8, GuestAddress(0)).unwrap();
    dirty.start(&mut map, "snapshot").unwrap();
    assert_eq!(dirty.take(&map, "snapshot").unwrap(), [], "what was written before the start does not count");
    dirty.start(&mut map, "migration").unwrap();
    assert!(matches!(dirty.start(&mut map, "migration"), Err(DirtyError::Taken { .. })));

    map.memory().write_obj(1_u8, GuestAddress(0x1000)).unwrap();
    fake.set_dirty(0, vec![1 << 3]);
    device.0.lock().unwrap().extend([(0x4fff, 2), (1 << 30, 4096)]);
    let pages = |ranges: Vec<vmm_memory_manager::layout::Range>| -> Vec<u64> {
        ranges.iter().flat_map(|r| (r.start / 4096)..(r.end() / 4096)).collect()
    };
    assert_eq!(pages(dirty.take(&map, "snapshot").unwrap()), [1, 3, 4, 5]);
    assert!(pages(dirty.take(&map, "snapshot").unwrap()).is_empty());
    assert_eq!(pages(dirty.take(&map, "migration").unwrap()), [1, 3, 4, 5]);

    // A source that fails in the middle loses nothing.
    map.memory().write_obj(1_u8, GuestAddress(0x7000)).unwrap();
    fake.fail_nth_of("KVM_GET_DIRTY_LOG", 1);
    dirty.take(&map, "snapshot").unwrap_err();
    assert_eq!(pages(dirty.take(&map, "snapshot").unwrap()), [7]);
    assert_eq!(pages(dirty.take(&map, "migration").unwrap()), [7]);

    dirty.stop(&mut map, "snapshot").unwrap();
    assert!(matches!(dirty.take(&map, "snapshot"), Err(DirtyError::Unknown { .. })));
    dirty.stop(&mut map, "migration").unwrap();
    assert!(matches!(dirty.stop(&mut map, "migration"), Err(DirtyError::Unknown { .. })));
}

#[test]
#[expect(clippy::single_range_in_vec_init, reason = "one range")]
fn a_tracker_that_could_not_start_or_stop_is_none() {
    let fake = Fake::new();
    let zones = [zone(1 << 20), ZoneConfig { id: "mem1".to_owned(), ..zone(1 << 20) }];
    let mut map = MemoryMap::create(vm(&fake), &zones, 40).unwrap();
    let mut dirty = DirtyCollector::new();
    for nth in 1.. {
        fake.fail_nth(nth);
        let started = dirty.start(&mut map, "snapshot");
        fake.heal();
        if started.is_ok() {
            assert_eq!(nth, 5, "two slots, two logs");
            break;
        }
        assert!(matches!(dirty.take(&map, "snapshot"), Err(DirtyError::Unknown { .. })));
        assert!(matches!(dirty.give_back(&map, "snapshot", &vec![]), Err(DirtyError::Unknown { .. })));
    }
    // In both regions, and a hole between what was told.
    fake.set_dirty(0, vec![1]);
    map.memory().write_obj(1_u8, GuestAddress((1 << 20) + 0x5000)).unwrap();
    let changed = dirty.take_changed(&map, "snapshot").unwrap();
    assert_eq!(changed, [vec![0..0x1000], vec![0x5000..0x6000]]);
    for nth in 1..=2 {
        fake.fail_nth(nth);
        assert!(matches!(dirty.stop(&mut map, "snapshot"), Err(DirtyError::Log(_))));
        assert!(matches!(dirty.take(&map, "snapshot"), Err(DirtyError::Unknown { .. })));
        dirty.start(&mut map, "snapshot").unwrap();
        map.memory().write_obj(1_u8, GuestAddress(0x7000)).unwrap();
        assert_eq!(dirty.take_changed(&map, "snapshot").unwrap(), [vec![0x7000..0x8000], vec![]]);
    }
}
