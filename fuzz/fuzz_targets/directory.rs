//! Manifest and chunk table of a snapshot directory.
#![no_main]

#[path = "../../crates/snapshot/tests/fixture/mod.rs"]
mod fixture;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fixture::decode_files(bytes));
