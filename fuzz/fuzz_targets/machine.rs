//! A machine made of records that a script has damaged.
#![no_main]

#[path = "../../bins/vmm/tests/fuzzing/mod.rs"]
mod fuzzing;

use std::sync::LazyLock;

static RIG: LazyLock<fuzzing::Rig> = LazyLock::new(fuzzing::Rig::new);

libfuzzer_sys::fuzz_target!(|script: &[u8]| {
    RIG.restore(script);
});
