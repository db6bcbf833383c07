//! An announced length does not allocate: memory grows with the bytes that are there.
#![expect(unsafe_code, reason = "a counting global allocator")]
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use vmm_migration_protocol::{Command, Decoder, HEADER_LENGTH, header};

/// Largest single request since the last reset.
static LARGEST: AtomicUsize = AtomicUsize::new(0);

struct Counting;

// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LARGEST.fetch_max(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller keeps `alloc`'s contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        LARGEST.fetch_max(size, Ordering::Relaxed);
        // SAFETY: the caller keeps `realloc`'s contract.
        unsafe { System.realloc(pointer, layout, size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps `dealloc`'s contract.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn memory_follows_what_arrived() {
    let biggest = vec![0; 64 << 20];
    let header: [u8; HEADER_LENGTH] = header(Command::State, &[&biggest]).unwrap();
    for received in [0_usize, 1, 100, 4096] {
        LARGEST.store(0, Ordering::Relaxed);
        let mut decoder = Decoder::new();
        assert_eq!(decoder.push(&mut &header[..]), Ok(None));
        let mut rest = biggest.get(..received).unwrap();
        assert_eq!(decoder.push(&mut rest), Ok(None));
        let largest = LARGEST.load(Ordering::Relaxed);
        assert!(largest <= 2 * received + 64, "{largest} bytes for {received}");
    }
}
