//! Announced lengths do not allocate: memory grows with the bytes that are there.
#![expect(unsafe_code, reason = "a counting global allocator")]
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use vmm_snapshot::{RecordSet, Schema, minicbor, schema};

/// Largest single request since the last reset: what a hostile length would ask for at once.
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

#[derive(minicbor::Encode, minicbor::Decode)]
struct Hungry {
    #[cbor(n(0), with = "minicbor::bytes")]
    bytes: Vec<u8>,
    #[n(1)]
    text: String,
    #[n(2)]
    numbers: Vec<u64>,
}
schema!(Hungry: "hungry" v1);

#[test]
fn announced_lengths_do_not_allocate() {
    const HUGE: [u8; 8] = [0x00, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff];
    // Byte string, text string, array, map of 2^56 items, at each field.
    let good: [&[u8]; 3] = [&[0x40], &[0x60], &[0x80]];
    let mut inputs = Vec::new();
    for field in 0..good.len() {
        for major in [0x5b, 0x7b, 0x9b, 0xbb] {
            let mut input = vec![0x83];
            input.extend(good.iter().take(field).flat_map(|bytes| bytes.iter()));
            input.push(major);
            input.extend(HUGE);
            input.extend([0x01; 64]);
            inputs.push(input);
        }
    }
    for input in inputs {
        LARGEST.store(0, Ordering::Relaxed);
        let refused = Hungry::decode(&input).is_err() && RecordSet::decode(&input).is_err();
        let largest = LARGEST.load(Ordering::Relaxed);
        assert!(refused, "{input:02x?}");
        // Growing vectors double, and an element has 8 bytes where its encoding has one.
        assert!(largest <= 16 * input.len() + 1024, "{largest} bytes for {input:02x?}");
    }
}
