//! Guest memory that is swapped out is data as any other: for a snapshot's writer, and frozen.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]
#![expect(unsafe_code, reason = "madvise is C's")]

mod common;

use std::fs;
use std::os::unix::fs::FileExt;

use common::{MIB, PAGE, create, data, write, zone};
use vm_memory::GuestMemoryBackend;
use vmm_memory_manager::map::MemoryMap;
use vmm_memory_manager::zone::ZoneConfig;

const SIZE: u64 = 16 * MIB;

/// Has the kernel swap out what it can of guest memory.
fn swap_out(map: &MemoryMap) {
    let host = map.memory().iter().next().unwrap().get_mmap().as_ptr();
    // SAFETY: a mapping of so many bytes; its content stays.
    let done = unsafe { libc::madvise(host.cast(), SIZE as usize, libc::MADV_PAGEOUT) };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
}

/// Pages of guest memory that are swapped out (proc_pid_pagemap(5), bit 62).
fn swapped(map: &MemoryMap) -> usize {
    let host = map.memory().iter().next().unwrap().get_mmap().as_ptr() as u64;
    let mut entries = vec![0; (SIZE / PAGE * 8) as usize];
    fs::File::open("/proc/self/pagemap").unwrap().read_exact_at(&mut entries, host / PAGE * 8).unwrap();
    let is_swapped = |entry: &&[u8; 8]| u64::from_ne_bytes(**entry) & 1 << 62 != 0;
    entries.as_chunks::<8>().0.iter().filter(is_swapped).count()
}

/// Whether this host can swap.
fn swaps() -> bool {
    let text = fs::read_to_string("/proc/meminfo").unwrap();
    let free = text.lines().find_map(|line| line.strip_prefix("SwapFree:")).unwrap();
    free.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10 > 2 * SIZE
}

/// On a host with swap; without, they stay in memory.
#[test]
fn swapped_pages_are_saved_and_frozen_as_others() {
    for shared in [false, true] {
        let mut expected = vec![0; SIZE as usize];
        let new = || {
            let map = create(&[ZoneConfig { shared, ..zone(SIZE) }]);
            for page in (0..SIZE / PAGE).filter(|page| page % 5 != 0) {
                write(&map, page * PAGE, &[page as u8 | 1; PAGE as usize]);
            }
            map
        };
        for page in (0..SIZE / PAGE).filter(|page| page % 5 != 0) {
            expected[(page * PAGE) as usize..((page + 1) * PAGE) as usize].fill(page as u8 | 1);
        }
        let about = |map: &MemoryMap| format!("shared: {shared}, {} pages are swapped out", swapped(map));

        let map = new();
        swap_out(&map);
        // What is swapped out of a file is not in the page tables.
        assert_eq!(swapped(&map) > 0, swaps() && !shared, "{}", about(&map));
        assert!(data(&map.source().unwrap()) == expected, "{}", about(&map));

        // Before and after.
        for early in [true, false] {
            let map = new();
            if early {
                swap_out(&map);
            }
            let frozen = map.freezer().unwrap().freeze(None).unwrap();
            if !early {
                swap_out(&map);
            }
            let about = about(&map);
            assert!(data(&frozen) == expected, "early: {early}, {about}");
        }
    }
}
