//! Contents of Packed frames.
#![no_main]

#[path = "../../crates/migration-protocol/tests/common/mod.rs"]
mod common;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    common::unpacked(bytes);
});
