//! A Debian that works while it is saved, and goes on in another process.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;

use serde_json::json;
use vmm_tests::harness::{Scratch, Vmm};

use crate::Bench;
use crate::worker::{Worker, patient};

/// Snapshots of one guest, 20 in a soak (`VMM_SNAPSHOTS=20`).
fn snapshots() -> u64 {
    std::env::var("VMM_SNAPSHOTS").ok().and_then(|n| n.parse().ok()).unwrap_or(5)
}

fn spawn(scratch: &Scratch) -> Vmm {
    Vmm::with_api(scratch, [""; 0])
}

fn url(folder: &Path) -> String {
    format!("file://{}", folder.display())
}

/// A guest under fio and stress-ng is saved again and again, and each time goes on in a new process: from a snapshot of the paused
/// guest, then from one that was taken while it ran and the changes after that, and so on; mapped, or read first.
pub(crate) fn snapshots_survived(bench: &Bench) {
    let mut worker = Worker::boot(bench, "snapshots", spawn);
    for number in 1..=snapshots() {
        let (base, folder) = (bench.disks.folder("base"), bench.disks.folder(&format!("snapshot-{number}")));
        let from_live = number % 2 == 0;
        if from_live {
            worker
                .api
                .done("vm.snapshot", &json!({ "destination_url": url(&base), "live": true, "track": true }));
        }
        thread::sleep(Duration::from_millis(500 + 370 * number));
        worker.api.puts(&["vm.pause"]);
        let stood = worker.ticks();
        worker.api.done("vm.snapshot", &json!({ "destination_url": url(&folder), "incremental": from_live }));
        worker.api.puts(&["vmm.shutdown"]);
        worker.vmm.expect_exit(0);

        let vmm = spawn(worker.scratch());
        let console = bench.disks.console(&format!("snapshots-{number}"));
        let serial = json!({ "mode": "File", "file": console.path() });
        let prefault = number % 3 == 0;
        patient(&vmm).done(
            "vm.restore",
            &json!({ "source_url": url(&folder), "resume": true, "prefault": prefault, "serial": serial }),
        );
        worker.goes_on(stood, vmm, console);
        // Memory is mapped from them until all of it was read: the names may go, the files stay.
        fs::remove_dir_all(&folder).unwrap();
    }
    worker.ends_well();
}
