//! Payloads of migration frames.
#![no_main]

use vmm_migration_protocol::{Command, Frame};

#[path = "../../crates/migration-protocol/tests/common/mod.rs"]
mod common;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Some((number, payload)) = bytes.split_first() else { return };
    let command = Command::ALL[usize::from(*number) % Command::COUNT];
    if let Ok(frame) = Frame::new(command, payload.to_vec()) {
        common::message(frame);
    }
});
