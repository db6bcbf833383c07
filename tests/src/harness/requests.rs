//! A request of each command, for tests that send every command in every phase.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::{Value, json};
use vmm_api::command::Method;
use vmm_state::Phase;

/// Devices that this build cannot boot: the command is admitted, and the device refused with 501.
pub const UNBOOTABLE: &[&str] = &[
    "vm.add-device",
    "vm.add-user-device",
    "vm.add-fs",
    "vm.add-generic-vhost-user",
    "vm.add-pmem",
    "vm.add-net",
    "vm.add-vdpa",
    "vm.add-vsock",
];

/// Name of the snapshot beside the disk that a restore is from; [`Requests::save`] is the request that makes it.
const SAVED: &str = "saved";

/// What the requests name.
#[derive(Debug)]
pub struct Requests {
    /// The configuration of the VM, with a disk that has no id.
    pub vm: Value,
    /// A disk to add.
    pub disk: PathBuf,
}

impl Requests {
    /// Requests for a VM of `kernel` with 16 MiB, one vCPU and `disk`; its serial port is of the mode `serial`.
    #[must_use]
    pub fn new(kernel: &Path, disk: PathBuf, serial: &str) -> Self {
        let vm = json!({
            "payload": { "kernel": kernel },
            "memory": { "size": 16 << 20 },
            "disks": [{ "path": disk, "image_type": "Raw" }],
            "serial": { "mode": serial },
            "console": { "mode": "Off" },
        });
        Self { vm, disk }
    }

    /// The body of a `vm.snapshot` that makes what `vm.restore` is from.
    #[must_use]
    pub fn save(&self) -> Vec<u8> {
        let folder = self.disk.with_file_name(SAVED);
        json!({ "destination_url": format!("file://{}", folder.display()) }).to_string().into_bytes()
    }

    /// A request that begins a migration which lasts: to `peer`, a socket that is listened at and says nothing, or from
    /// whoever connects to it.
    #[must_use]
    pub fn migration(phase: Phase, peer: &Path) -> (&'static str, Vec<u8>) {
        let url = format!("unix:{}", peer.display());
        let (name, body) = match phase {
            Phase::Receiving => ("vm.receive-migration", json!({ "receiver_url": url })),
            _ => ("vm.send-migration", json!({ "destination_url": url })),
        };
        (name, body.to_string().into_bytes())
    }

    /// The method of the command `name`.
    #[must_use]
    pub fn method(name: &str) -> Method {
        match name {
            "vmm.ping"
            | "vmm.openapi"
            | "vmm.metrics"
            | "vmm.events"
            | "vmm.log-level"
            | "vm.info"
            | "vm.counters"
            | "vm.boot-trace"
            | "vm.migration-progress" => Method::Get,
            _ => Method::Put,
        }
    }

    /// The body of a request `name` that is right in itself.
    #[must_use]
    pub fn body(&self, name: &str) -> Vec<u8> {
        let url = json!({ "destination_url": "file:///x" });
        let folder = |name: &str| format!("file://{}", self.disk.with_file_name(name).display());
        let body = match name {
            "vm.create" | "vm.validate" => self.vm.clone(),
            "vmm.set-log-level" => json!({ "level": "warn" }),
            "vm.add-disk" => json!({ "path": self.disk, "image_type": "Raw", "id": "d" }),
            "vm.remove-device" => json!({ "id": "_disk0" }),
            "vm.add-user-device" => json!({ "socket": "s" }),
            "vm.add-fs" => json!({ "tag": "t", "socket": "s" }),
            "vm.add-generic-vhost-user" => json!({ "socket": "s", "queue_sizes": [2], "device_type": 1 }),
            "vm.add-pmem" => json!({ "file": "f" }),
            "vm.add-vdpa" => json!({ "path": "p", "num_queues": 1 }),
            "vm.add-vsock" => json!({ "cid": 3, "socket": "s" }),
            "vm.resize-disk" => json!({ "id": "d", "desired_size": 1 }),
            "vm.resize-zone" => json!({ "id": "z", "desired_ram": 1 }),
            // A directory is a snapshot's for good.
            "vm.snapshot" => {
                static SNAPSHOTS: AtomicU64 = AtomicU64::new(0);
                let number = SNAPSHOTS.fetch_add(1, Ordering::Relaxed);
                json!({ "destination_url": folder(&format!("snapshot-{number}")), "live": true })
            }
            "vm.coredump" => url,
            // There is no such folder: nobody is there, and nobody can be waited for.
            "vm.send-migration" => json!({ "destination_url": "unix:/nowhere/x" }),
            "vm.restore" => json!({ "source_url": folder(SAVED) }),
            "vm.receive-migration" => json!({ "receiver_url": "unix:/nowhere/x" }),
            _ => json!({}),
        };
        body.to_string().into_bytes()
    }
}
