//! A Debian that works all the time, so that it shows when a moment of it is lost or comes twice.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use vmm_tests::harness::linux::Console;
use vmm_tests::harness::{Api, Scratch, Vmm, wait_until};
use vmm_tests::image::rootfs;

use crate::{BOOT_LIMIT, Bench, CLOCK_ERROR, SYSTEM_LIMIT, now, system};

/// Where on the data disk the host tells the guest to stop: behind what fio uses.
const STOP_AT: u64 = 60 << 20;

/// fio writes and verifies in passes of a few seconds; stress-ng verifies, too; a counter goes through the root disk's file
/// system, a line and a sync each. What is lost or repeated shows in one of the three.
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

/// The guest, and the VMM that it is in at present.
pub(crate) struct Worker {
    pub(crate) vmm: Vmm,
    pub(crate) api: Api,
    console: Console,
    ticks: u64,
    /// Its images: root, data, and what it does.
    pub(crate) disks: Vec<PathBuf>,
    scratch: Scratch,
}

impl Worker {
    /// Boots it in the VMM that `spawn` starts; the folders and files of `name` are its own.
    pub(crate) fn boot(bench: &Bench, name: &str, spawn: impl Fn(&Scratch) -> Vmm) -> Self {
        let scratch = Scratch::new();
        let mut guest = system(bench, name, "true", "poweroff");
        guest.memory_mib = 512;
        guest.cmdline = "console=ttyS0 quiet root=/dev/vda vmm.action=poweroff".to_owned();
        let script = scratch.path("script");
        fs::write(&script, rootfs::script_disk(WORK)).unwrap();
        guest.disks.push(script);
        let console = bench.disks.console(name);
        let vmm = spawn(&scratch);
        let mut api = patient(&vmm);
        api.create(&guest.document(console.path()));
        api.puts(&["vm.boot"]);
        let mut worker = Self { vmm, api, console, ticks: 2, disks: guest.disks, scratch };
        worker.ticks_on();
        worker
    }

    /// Where files of its own may be.
    pub(crate) fn scratch(&self) -> &Scratch {
        &self.scratch
    }

    /// How often it has ticked.
    pub(crate) fn ticks(&self) -> u64 {
        self.last_tick().unwrap().0
    }

    /// The guest stood still at tick `stood` and runs on in `vmm`, on `console`: from there, and with a right clock.
    pub(crate) fn goes_on(&mut self, stood: u64, vmm: Vmm, console: Console) {
        (self.api, self.vmm, self.console) = (patient(&vmm), vmm, console);
        assert_eq!(self.api.state(), "Running");
        let first = || self.console.facts("tick").into_iter().next();
        let first = wait_until(SYSTEM_LIMIT, first, || "a tick".to_owned());
        let first: u64 = first.split('@').next().unwrap().parse().unwrap();
        assert!((stood..=stood + 2).contains(&first), "it stood at tick {stood} and went on at {first}");
        self.ticks = self.ticks.max(stood) + 2;
        self.ticks_on();
    }

    /// Tells it to end, and checks all that it did.
    pub(crate) fn ends_well(mut self) {
        let data = OpenOptions::new().write(true).open(&self.disks[1]).unwrap();
        data.write_all_at(b"STOP", STOP_AT).unwrap();
        data.sync_all().unwrap();
        self.console.wait_for_power_off(&mut self.vmm, SYSTEM_LIMIT + BOOT_LIMIT);
        for (name, good) in [("fio", "end"), ("stress", "end"), ("count", "good"), ("run-status", "0")] {
            assert_eq!(self.console.facts(name), [good], "{name}");
        }
        assert_eq!(self.console.facts("complaint"), [""; 0]);
        assert_eq!(self.console.facts("dmesg"), [""; 0]);
    }

    /// The last of its ticks and its clock then.
    fn last_tick(&self) -> Option<(u64, u64)> {
        let tick = self.console.facts("tick").pop()?;
        let (count, epoch) = tick.split_once('@').unwrap();
        Some((count.parse().unwrap(), epoch.parse().unwrap()))
    }

    /// Waits until it has ticked further, and checks its clock.
    fn ticks_on(&mut self) {
        let further = || {
            self.console.check_alive();
            self.last_tick().filter(|(count, _)| *count > self.ticks)
        };
        let (count, epoch) = wait_until(SYSTEM_LIMIT, further, || format!("a tick after {}", self.ticks));
        let host = now();
        let good = host - CLOCK_ERROR - 10..=host + CLOCK_ERROR;
        assert!(good.contains(&epoch), "the guest's clock says {epoch}, the host's {host}");
        self.ticks = count;
    }
}

/// A connection to its API, which may take as long as a system. One that is idle for long is closed.
pub(crate) fn patient(vmm: &Vmm) -> Api {
    let mut api = vmm.api();
    api.patient(SYSTEM_LIMIT);
    api
}
