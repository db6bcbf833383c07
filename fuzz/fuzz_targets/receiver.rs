//! A migration's receiver: the whole of one end but KVM.
#![no_main]

#[path = "../../bins/vmm/tests/fuzzing/mod.rs"]
mod fuzzing;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    fuzzing::receiver(bytes);
});
