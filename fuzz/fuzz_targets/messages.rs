//! Payloads of migration frames: a frame's command counts, its length and checksum do not.
#![no_main]

use vmm_migration_protocol::{Command, Frame, HEADER_LENGTH};

#[path = "../../crates/migration-protocol/tests/common/mod.rs"]
mod common;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Some((header, payload)) = bytes.split_first_chunk::<HEADER_LENGTH>() else { return };
    let Some(command) = Command::from_number(u16::from_le_bytes([header[0], header[1]])) else { return };
    if let Ok(frame) = Frame::new(command, payload.to_vec()) {
        common::message(frame);
    }
});
