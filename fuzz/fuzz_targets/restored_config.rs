//! The configuration in a snapshot, and what is to replace parts of it.
#![no_main]

#[path = "../../crates/vmm-api/tests/fuzzing/mod.rs"]
mod fuzzing;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzzing::documents::restored(bytes));
