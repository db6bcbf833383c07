//! Announced lengths do not allocate: memory grows with the bytes that are there.
#![expect(unsafe_code, reason = "a counting global allocator")]
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use vmm_snapshot::directory::{Hash, ReadError, Region, Snapshot, Table};
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
    announced_chunks_do_not_allocate();
}

/// Called by the one test: another would allocate meanwhile.
fn announced_chunks_do_not_allocate() {
    let region = Region { zone: String::new(), gpa: 0, size: 1 << 51, file: "m".to_owned() };
    let begin = [&b"VMMCHNKS"[..], &1u32.to_le_bytes(), &1u32.to_le_bytes()].concat();
    for (extents, chunks) in [(1u32 << 16, 0), (0, u32::MAX), (u32::MAX, u32::MAX)] {
        let input = [&begin[..], &extents.to_le_bytes(), &chunks.to_le_bytes(), &[1; 160]].concat();
        LARGEST.store(0, Ordering::Relaxed);
        let refused = Table::decode(&input, std::slice::from_ref(&region)).is_err();
        let largest = LARGEST.load(Ordering::Relaxed);
        assert!(refused && largest <= 1024, "{largest} bytes for {extents} extents, {chunks} chunks");
    }
    // Files that are one huge hole, and a manifest that says so.
    let (hole, few) = (1u64 << 40, 1);
    for (state, chunks) in [(hole, few), (few, hole)] {
        let folder = tempfile::tempdir().unwrap();
        let file =
            |bytes: u64| format!(r#"{{"file":"s{bytes}","size":{bytes},"sha256":"{}"}}"#, Hash::of(b""));
        let begin = r#"{"format":1,"vmm":"","architecture":"","created_ms":0,"config":["#;
        let (state, chunks) = (file(state), file(chunks));
        let config = "0,".repeat(10_000);
        let body =
            format!(r#"{begin}{config}0],"parent":null,"state":{state},"chunks":{chunks},"memory":[]"#);
        let manifest = format!("{body},\"id\":\"{}\"}}\n", Hash::of(body.as_bytes()));
        std::fs::write(folder.path().join("manifest.json"), &manifest).unwrap();
        std::fs::File::create(folder.path().join(format!("s{hole}"))).unwrap().set_len(hole).unwrap();
        LARGEST.store(0, Ordering::Relaxed);
        let error = Snapshot::open(folder.path()).unwrap_err();
        let largest = LARGEST.load(Ordering::Relaxed);
        assert!(matches!(error, ReadError::Absurd { .. }), "{error}");
        assert!(largest <= 2 * manifest.len() + 1024, "{largest} bytes for a manifest of {}", manifest.len());
    }
}
