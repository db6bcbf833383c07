//! A guest that counts, so that it shows when a moment of it is lost or comes twice.

use serde_json::{Value, json};

use super::{Scratch, SerialFile, Vmm, vm_config};
use crate::tiny::Guest;

/// Boots a guest that counts in memory, and lets it count a little.
///
/// # Panics
/// When it does not.
#[must_use]
pub fn counting_guest(scratch: &Scratch) -> (Vmm, SerialFile) {
    let vmm = Vmm::with_api(scratch, [""; 0]);
    let serial = counting_in(&vmm, scratch);
    (vmm, serial)
}

/// The same in `vmm`.
///
/// # Panics
/// When it does not.
#[must_use]
pub fn counting_in(vmm: &Vmm, scratch: &Scratch) -> SerialFile {
    counting_with(vmm, scratch, &json!({}))
}

/// The same with other fields in the configuration, as `{"memory": {...}}`.
///
/// # Panics
/// When it does not, or they are no object.
#[must_use]
pub fn counting_with(vmm: &Vmm, scratch: &Scratch, fields: &Value) -> SerialFile {
    let serial = SerialFile::new(scratch.path("serial"));
    let mut config = vm_config(&scratch.guest(Guest::Pages), serial.path());
    let config_fields = config.as_object_mut().expect("an object");
    config_fields.extend(fields.as_object().expect("an object").clone());
    vmm.api().create(&config);
    vmm.api().puts(&["vm.boot"]);
    serial.wait_for("00000003\n");
    serial
}

/// The numbers that the guest has counted; the first and the last line may have been cut.
///
/// # Panics
/// When its memory was not what it had written, or it said something else.
#[must_use]
pub fn counts(serial: &SerialFile) -> Vec<u32> {
    let text = serial.text();
    assert!(!text.contains("memory"), "{text}");
    let lines = text.lines().filter(|line| line.len() == 8);
    lines.map(|line| u32::from_str_radix(line, 16).expect("a number")).collect()
}

/// The guest goes on where it stood, and neither repeats nor leaves out a number.
///
/// # Panics
/// When it does.
pub fn goes_on(before: &SerialFile, after: &SerialFile) {
    after.wait_longer_than(after.text().len() + 40);
    let (before, after) = (counts(before), counts(after));
    let (last, first) = (before.last().expect("a number"), after.first().expect("a number"));
    assert!((last + 1..=last + 2).contains(first), "{first} after {last}, of which a line may be cut");
    assert!(after.windows(2).all(|pair| matches!(pair, [a, b] if *b == a + 1)), "{after:?}");
}
