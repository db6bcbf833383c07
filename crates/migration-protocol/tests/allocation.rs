//! An announced length does not allocate: memory grows with the bytes that are there.
#![expect(unsafe_code, reason = "a counting global allocator")]
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use vmm_migration_protocol::{Command, Decoder, Frame, HEADER_LENGTH, Message};

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

/// Largest request while `work` runs, in bytes.
fn largest(work: impl FnOnce()) -> usize {
    LARGEST.store(0, Ordering::Relaxed);
    work();
    LARGEST.load(Ordering::Relaxed)
}

// One test, for the counter is everybody's.
#[test]
fn memory_follows_what_arrived() {
    let biggest = vec![0; 64 << 20];
    let header: [u8; HEADER_LENGTH] = Frame::new(Command::State, biggest.clone()).unwrap().header();
    for received in [0_usize, 1, 100, 4096] {
        let largest = largest(|| {
            let mut decoder = Decoder::new();
            assert_eq!(decoder.push(&mut &header[..]), Ok(None));
            let mut rest = biggest.get(..received).unwrap();
            assert_eq!(decoder.push(&mut rest), Ok(None));
        });
        assert!(largest <= 2 * received + 64, "{largest} bytes for {received}");
    }

    // CBOR that announces arrays, texts and bytes of 2^32 - 1 and has none of it.
    for announced in [0x9a, 0x7a, 0x5a, 0xba] {
        for before in [&[][..], &[0xbf, 0x06], &[0xbf, 0x07, 0x84, 1, 1, 1], &[0xbf, 0x08], &[0xbf, 0x03]] {
            let cbor = [before, &[announced, 0xff, 0xff, 0xff, 0xff]].concat();
            let hello = Frame::new(Command::Hello, [&b"VMMigrat"[..], &cbor].concat()).unwrap();
            let nack = Frame::new(Command::Nack, cbor).unwrap();
            let largest = largest(|| {
                assert!(Message::decode(hello).is_err());
                assert!(Message::decode(nack).is_err());
            });
            assert!(largest <= 1024, "{largest} bytes for {before:?} and {announced:#x}");
        }
    }
}
