//! Saved-state records and sets of them.
#![no_main]

#[path = "../../crates/snapshot/tests/common/mod.rs"]
mod common;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| common::decode_all(bytes));
