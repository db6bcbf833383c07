//! A snapshot and its parent as directories, damaged by a script.
#![no_main]

#[path = "../../crates/snapshot/tests/fixture/mod.rs"]
mod fixture;

libfuzzer_sys::fuzz_target!(|script: &[u8]| {
    fixture::open_damaged(script);
});
