//! The migration's source under any inputs.
#![no_main]

#[path = "../../crates/migration-protocol/tests/common/mod.rs"]
mod common;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    common::drive::source(bytes);
});
