//! Requests that save and restore VMs.

use std::path::Path;

use serde_json::{Value, json};
use vmm_api::client::Client;
use vmm_api::events::StreamItem;

use super::{SerialFile, Vmm};

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

/// Why memory was written in passes, for each snapshot that `vmm` has taken.
///
/// # Panics
/// When it has no API.
#[must_use]
pub fn passes(vmm: &Vmm) -> Vec<Option<String>> {
    let events = Client::connect(vmm.socket()).expect("the API").events_so_far(1).expect("events");
    let why = |item: StreamItem| match item {
        StreamItem::Event(event) if event.name() == "vm/snapshotted" => {
            Some(event.properties.get("in_passes").map(|why| why.as_str().expect("a text").to_owned()))
        }
        _ => None,
    };
    events.filter_map(|item| why(item.expect("an event"))).collect()
}
