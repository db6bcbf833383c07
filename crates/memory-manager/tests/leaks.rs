//! Saving and restoring, again and again, leaves nothing behind. Alone in its process, for it counts what that has.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests fail by panicking")]

mod common;

use std::time::Duration;

use common::{MIB, PAGE, data, restore, save, write, zone};
use vmm_hypervisor::fake::{Fake, Live};
use vmm_memory_manager::restore::Fill;
use vmm_memory_manager::zone::ZoneConfig;

/// Descriptors, mappings and threads of this process.
fn held() -> [usize; 3] {
    let entries = |path| std::fs::read_dir(path).unwrap().count();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    // Neighbours without name are joined by the kernel as they come.
    let maps =
        maps.lines().filter(|line| line.split_whitespace().nth(5).is_some_and(|path| path.starts_with('/')));
    [entries("/proc/self/fd"), maps.count(), entries("/proc/self/task")]
}

/// As [`held`], once threads that are ending have ended: the least in a while, or `expected`.
fn settled(expected: Option<[usize; 3]>) -> [usize; 3] {
    let looks = (0..200).map(|_| {
        std::thread::sleep(Duration::from_millis(1));
        held()
    });
    let mut least = None::<[usize; 3]>;
    for look in looks {
        least = Some(least.map_or(look, |least| least.min(look)));
        if expected == least {
            break;
        }
    }
    least.unwrap()
}

fn resident() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    pages.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * PAGE
}

#[test]
fn a_hundred_cycles_leave_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let zones = [zone(8 * MIB), ZoneConfig { id: "mem1".to_owned(), shared: true, ..zone(MIB) }];
    let mut map = common::create(&zones);
    (0..64).for_each(|page| write(&map, page * PAGE, b"used"));
    save(&map, &dir.path().join("a"), None);
    let fake = Fake::new();
    let mut before = None;
    for cycle in 0..100 {
        let fill = [Fill::Lazy, Fill::Eager][cycle % 2];
        map = restore(&fake, &map, &zones, &dir.path().join("a"), fill).unwrap();
        assert_eq!(data(&map.source().unwrap())[..4], *b"used");
        assert_eq!(fake.live(), Live { vms: 1, slots: 2, ..Live::default() });
        if cycle % 10 == 5 {
            let (first, size) = *before.get_or_insert_with(|| (settled(None), resident()));
            assert_eq!(settled(Some(first)), first, "cycle {cycle}");
            let now = resident();
            assert!(now < size + 16 * MIB, "cycle {cycle}: {size} bytes became {now}");
        }
    }
}
