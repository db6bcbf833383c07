//! A migration's receiver: the whole of one end but KVM.
#![no_main]

#[path = "../../bins/vmm/tests/peer/mod.rs"]
mod peer;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    peer::receiver(bytes);
});
