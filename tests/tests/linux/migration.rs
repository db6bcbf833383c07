//! A Debian that works while it moves to another VMM.

use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;
use vmm_tests::certificates::Authority;
use vmm_tests::harness::Pending;
use vmm_tests::harness::migrating::{send_with, with_tls};
use vmm_tests::harness::places::{Link, Places};

use crate::worker::Worker;
use crate::{Bench, SYSTEM_LIMIT};

/// How it moves, by turns: each of them in a batch of a soak.
const ROUTES: [Route; 6] = [
    Route { link: Link::Unix, connections: 1, memory_mode: "Precopy" },
    Route { link: Link::Unix, connections: 1, memory_mode: "Postcopy" },
    Route { link: Link::Tls, connections: 4, memory_mode: "Precopy" },
    Route { link: Link::Tcp, connections: 4, memory_mode: "Postcopy" },
    Route { link: Link::Tcp, connections: 1, memory_mode: "Precopy" },
    Route { link: Link::Tls, connections: 1, memory_mode: "Postcopy" },
];

/// A way from one VMM to another, in words of `vm.send-migration`.
#[derive(Clone, Copy, Debug)]
struct Route {
    link: Link,
    connections: u16,
    memory_mode: &'static str,
}

/// Migrations of one guest, 30 in a soak (`VMM_DEBIAN_MIGRATIONS=30`).
fn migrations() -> usize {
    std::env::var("VMM_DEBIAN_MIGRATIONS").ok().and_then(|n| n.parse().ok()).unwrap_or(1)
}

/// A guest under fio and stress-ng goes from process to process on one route after the other.
pub(crate) fn migrations_survived(bench: &Bench) {
    let places = Places::new();
    let mut worker = Worker::boot(bench, "migrations", |scratch| places.spawn(scratch, 0));
    let certificates = Authority::new("ours").folder(worker.scratch().path("tls"), &Places::HOSTS);
    for (number, route) in (1..=migrations()).zip(ROUTES.into_iter().cycle()) {
        thread::sleep(Duration::from_millis(500 + 370 * number as u64 % 4000));
        let begun = Instant::now();
        let vmm = places.spawn(worker.scratch(), number);
        let console = bench.disks.console(&format!("migrations-{number}"));
        let url = places.address(worker.scratch(), number, route.link);
        let tls_dir = (route.link == Link::Tls).then_some(certificates.as_path());
        let serial = json!({ "mode": "File", "file": console.path() });
        let disk = |(number, path)| json!({ "id": format!("_disk{number}"), "path": path });
        let disks: Vec<_> = worker.disks.iter().enumerate().map(disk).collect();
        let body = json!({ "receiver_url": url, "paths": ["/"], "disks": disks, "serial": serial });
        let body = with_tls(body, tls_dir).to_string();
        let mut received = Pending::send(vmm.socket(), "vm.receive-migration", body.as_bytes());
        // It changes memory faster than an emulated link carries it: after a while it is stopped for the rest.
        let body = json!({
            "destination_url": url, "downtime_ms": 2000, "timeout_s": 20, "timeout_strategy": "Ignore",
            "connections": route.connections, "memory_mode": route.memory_mode,
        });
        let sent = send_with(&mut worker.api, &with_tls(body, tls_dir), SYSTEM_LIMIT);
        assert_eq!((sent.status, received.answer().status), (204, 204), "{number}, {route:?}: {sent:?}");
        // Its console is still the old one: what it said there last is where it stood still.
        let stood = worker.ticks();
        worker.vmm.expect_exit(0);
        println!("migration {number}: {route:?}, {:.0} s", begun.elapsed().as_secs_f64());
        worker.goes_on(stood, vmm, console);
    }
    worker.ends_well();
}
