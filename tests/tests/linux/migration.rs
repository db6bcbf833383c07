//! A Debian that works while it moves to another VMM.

use std::thread;
use std::time::Duration;

use serde_json::json;
use vmm_tests::harness::migrating::free_port;
use vmm_tests::harness::{Answer, Pending, wait_until};

use crate::worker::Worker;
use crate::{Bench, SYSTEM_LIMIT};

/// Migrations of one guest, 30 in a soak (`VMM_DEBIAN_MIGRATIONS=30`).
fn migrations() -> u64 {
    std::env::var("VMM_DEBIAN_MIGRATIONS").ok().and_then(|n| n.parse().ok()).unwrap_or(1)
}

/// A guest under fio and stress-ng goes from process to process, over a UNIX socket and over TCP by turns.
pub(crate) fn migrations_survived(bench: &Bench) {
    let mut worker = Worker::boot(bench, "migrations");
    for number in 1..=migrations() {
        thread::sleep(Duration::from_millis(500 + 370 * number));
        let (vmm, api) = worker.another_vmm();
        let console = bench.disks.console(&format!("migrations-{number}"));
        let url = match number % 2 {
            0 => format!("tcp:127.0.0.1:{}", free_port()),
            _ => format!("unix:{}", worker.path(&format!("migration-{number}")).display()),
        };
        let serial = json!({ "mode": "File", "file": console.path() });
        let disk = |(number, path)| json!({ "id": format!("_disk{number}"), "path": path });
        let disks: Vec<_> = worker.disks.iter().enumerate().map(disk).collect();
        let body =
            json!({ "receiver_url": url, "paths": ["/"], "disks": disks, "serial": serial }).to_string();
        let mut received = Pending::send(vmm.socket(), "vm.receive-migration", body.as_bytes());
        // It changes memory faster than an emulated link carries it: after a while it is stopped for the rest.
        let body = json!({
            "destination_url": url, "downtime_ms": 2000, "timeout_s": 20, "timeout_strategy": "Ignore",
        });
        let begun =
            || Some(worker.api.put_json("vm.send-migration", &body)).filter(|answer| !nobody_there(answer));
        let sent = wait_until(SYSTEM_LIMIT, begun, || "a receiver".to_owned());
        assert_eq!((sent.status, received.answer().status), (204, 204), "{sent:?}");
        // Its console is still the old one: what it said there last is where it stood still.
        let stood = worker.ticks();
        worker.vmm.expect_exit(0);
        worker.goes_on(stood, (vmm, api), console);
    }
    worker.ends_well();
}

/// Whether nobody listens yet.
fn nobody_there(answer: &Answer) -> bool {
    ["refused", "No such file"].iter().any(|words| answer.body.contains(words))
}
