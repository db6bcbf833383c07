//! A Debian that works while it is saved, and goes on in another process.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};
use vmm_api::command::Method;
use vmm_tests::harness::linux::Console;
use vmm_tests::harness::{Api, Scratch, Vmm, wait_until};
use vmm_tests::image::rootfs;

use crate::{BOOT_LIMIT, Bench, CLOCK_ERROR, SYSTEM_LIMIT, now, system};

/// Where on the data disk the host tells the guest to stop: behind what fio uses.
const STOP_AT: u64 = 60 << 20;

/// fio writes and verifies in passes of a few seconds; stress-ng verifies, too; a counter goes through the root disk's file
/// system, a line and a sync each. Whatever a snapshot loses or repeats shows in one of the three.
const WORK: &str = r#"
say() { echo "VMM-TEST: $*"; }
stop() { [ "$(dd if=/dev/vdb iflag=direct bs=4096 skip=15360 count=1 2>/dev/null | head -c 4)" = STOP ]; }
(while ! stop; do
    fio --name=check --filename=/dev/vdb --direct=1 --rw=randwrite --bsrange=4k-64k --size=8M --ioengine=libaio --iodepth=8 \
        --verify=crc32c --do_verify=1 --verify_fatal=1 --randrepeat=0 --eta=never --output=/run/fio || { say fio=bad; cat /run/fio; }
done; say fio=end) &
(while ! stop; do stress-ng --cpu 1 --vm 1 --vm-bytes 48m --verify --timeout 5s --quiet || say stress=bad; done; say stress=end) &
n=0
while ! stop; do
    n=$((n + 1))
    echo $n >>/var/count
    sync /var/count
    say tick=$n@$(date +%s)
    sleep 0.5
done
wait
[ "$(cat /var/count)" = "$(seq $n)" ] && say count=good || say count=bad
dmesg | grep -E 'Call Trace|lockup|stall|I/O error|EXT4-fs error' | sed 's/^/VMM-TEST: complaint=/'
"#;

/// Snapshots of one guest, 20 in a soak (`VMM_SNAPSHOTS=20`).
fn snapshots() -> u64 {
    std::env::var("VMM_SNAPSHOTS").ok().and_then(|n| n.parse().ok()).unwrap_or(5)
}

fn put(api: &mut Api, name: &str, body: &Value) {
    let answer = api.request(Method::Put, name, body.to_string().as_bytes());
    assert_eq!(answer.status, 204, "{name}: {answer:?}");
}

fn url(folder: &Path) -> String {
    format!("file://{}", folder.display())
}

/// The last of the guest's ticks on `console` and its clock then.
fn last_tick(console: &Console) -> Option<(u64, u64)> {
    let tick = console.facts("tick").pop()?;
    let (count, epoch) = tick.split_once('@').expect("a count and a time");
    Some((count.parse().expect("a count"), epoch.parse().expect("a time")))
}

/// Waits until the guest on `console` has ticked more often than `before`, and checks its clock.
fn ticks_on(console: &Console, before: u64) -> u64 {
    let further = || {
        console.check_alive();
        last_tick(console).filter(|(count, _)| *count > before)
    };
    let (count, epoch) = wait_until(SYSTEM_LIMIT, further, || format!("a tick after {before}"));
    let host = now();
    let good = host - CLOCK_ERROR - 10..=host + CLOCK_ERROR;
    assert!(good.contains(&epoch), "the guest's clock says {epoch}, the host's {host}");
    count
}

/// A guest under fio and stress-ng is paused and saved again and again, and each time goes on in a new process.
pub(crate) fn snapshots_survived(bench: &Bench) {
    let scratch = Scratch::new();
    let mut guest = system(bench, "snapshots", "true", "poweroff");
    guest.memory_mib = 512;
    guest.cmdline = "console=ttyS0 quiet root=/dev/vda vmm.action=poweroff".to_owned();
    let script = scratch.path("script");
    fs::write(&script, rootfs::script_disk(WORK)).unwrap();
    guest.disks.push(script);
    let mut console = bench.disks.console("snapshots");
    let mut vmm = Vmm::with_api(&scratch, [""; 0]);
    let mut api = vmm.api();
    api.patient(SYSTEM_LIMIT);
    api.create(&guest.document(console.path()));
    api.puts(&["vm.boot"]);
    let mut ticks = ticks_on(&console, 2);
    for number in 1..=snapshots() {
        thread::sleep(Duration::from_millis(500 + 370 * number));
        let folder = bench.disks.folder(&format!("snapshot-{number}"));
        api.puts(&["vm.pause"]);
        let (saved, _) = last_tick(&console).expect("it ticked");
        put(&mut api, "vm.snapshot", &json!({ "destination_url": url(&folder) }));
        api.puts(&["vmm.shutdown"]);
        vmm.expect_exit(0);

        vmm = Vmm::with_api(&scratch, [""; 0]);
        api = vmm.api();
        api.patient(SYSTEM_LIMIT);
        console = bench.disks.console(&format!("snapshots-{number}"));
        let serial = json!({ "mode": "File", "file": console.path() });
        put(&mut api, "vm.restore", &json!({ "source_url": url(&folder), "resume": true, "serial": serial }));
        assert_eq!(api.state(), "Running");
        let first =
            wait_until(SYSTEM_LIMIT, || console.facts("tick").into_iter().next(), || "a tick".to_owned());
        let first: u64 = first.split('@').next().unwrap().parse().unwrap();
        assert!((saved..=saved + 2).contains(&first), "it was saved at tick {saved} and went on at {first}");
        ticks = ticks_on(&console, ticks.max(saved) + 2);
        // Memory is mapped from it until all of it was read: the name may go, the files stay.
        fs::remove_dir_all(&folder).unwrap();
    }
    let data = OpenOptions::new().write(true).open(&guest.disks[1]).unwrap();
    data.write_all_at(b"STOP", STOP_AT).unwrap();
    data.sync_all().unwrap();
    console.wait_for_power_off(&mut vmm, SYSTEM_LIMIT + BOOT_LIMIT);
    for (name, good) in [("fio", "end"), ("stress", "end"), ("count", "good"), ("run-status", "0")] {
        assert_eq!(console.facts(name), [good], "{name}");
    }
    assert_eq!(console.facts("complaint"), [""; 0]);
    assert_eq!(console.facts("dmesg"), [""; 0]);
}
