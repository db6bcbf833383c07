//! Every kind of saved-state record.
#![no_main]

#[path = "../../bins/vmm/tests/fuzzing/mod.rs"]
mod fuzzing;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    fuzzing::decode(bytes);
});
