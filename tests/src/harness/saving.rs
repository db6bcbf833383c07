//! Requests that save and restore VMs.

use std::path::Path;

use serde_json::{Value, json};

use super::SerialFile;

/// The URL of a snapshot.
#[must_use]
pub fn url(folder: &Path) -> String {
    format!("file://{}", folder.display())
}

/// The body of a plain `vm.snapshot`.
#[must_use]
pub fn to(folder: &Path) -> Value {
    json!({ "destination_url": url(folder) })
}

/// The body of a `vm.restore` that runs, with its serial port to another file.
#[must_use]
pub fn from(folder: &Path, serial: &SerialFile) -> Value {
    json!({ "source_url": url(folder), "resume": true, "serial": { "mode": "File", "file": serial.path() } })
}

/// The body of a `vm.snapshot` of a VM that may run.
#[must_use]
pub fn live(folder: &Path) -> Value {
    json!({ "destination_url": url(folder), "live": true })
}
