//! What a restored tiny guest finds: its clocks, and its memory on the host. By the real binary, on any KVM.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]

use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vmm_tests::harness::counting::goes_on;
use vmm_tests::harness::saving::{from, to};
use vmm_tests::harness::{LIMIT, Scratch, SerialFile, Vmm, vm_config, wait_until};
use vmm_tests::tiny::Guest;

/// How long there is no guest.
const GAP: Duration = Duration::from_secs(2);

/// What a guest's clocks show, since each was at zero.
#[derive(Debug, Clone, Copy)]
struct Clocks {
    tsc: Duration,
    kvm_clock: Duration,
    pm_timer: Duration,
}

impl Clocks {
    /// A line of the guest (linux/Documentation/virt/kvm/x86/msr.rst, `pvclock_vcpu_time_info`).
    fn parse(line: &str) -> Self {
        let number = |from: usize, to: usize| u64::from_str_radix(&line[from..to], 16).unwrap();
        let (tsc, system_time, timestamp) = (number(0, 16), number(16, 32), number(32, 48));
        let (mul, shift) = (number(48, 56), number(56, 64).to_le_bytes()[0].cast_signed());
        let nanos = |ticks: u64| {
            let ticks = u128::from(ticks);
            let shifted = if shift < 0 { ticks >> -shift } else { ticks << shift };
            Duration::from_nanos(((shifted * u128::from(mul)) >> 32).try_into().unwrap())
        };
        // 3.579545 MHz: ACPI 6.5, 4.8.2.1.
        let pm_timer = Duration::from_nanos(number(64, 72) * 1_000_000_000 / 3_579_545);
        let kvm_clock = Duration::from_nanos(system_time) + nanos(tsc.saturating_sub(timestamp));
        Self { tsc: nanos(tsc), kvm_clock, pm_timer }
    }

    /// Whether the TSC began with the guest. Some KVMs, those that emulate guests' kernels, show the host's, which no restore can set.
    fn has_own_tsc(&self) -> bool {
        self.tsc < self.kvm_clock + Duration::from_secs(60)
    }

    /// How far each moved on since `before`, by name.
    fn since(&self, before: &Self) -> [(&'static str, Duration); 3] {
        // No clock goes back.
        let moved = |now: Duration, before: Duration| now.checked_sub(before).unwrap();
        [
            ("TSC", moved(self.tsc, before.tsc)),
            ("kvm-clock", moved(self.kvm_clock, before.kvm_clock)),
            ("PM timer", moved(self.pm_timer, before.pm_timer)),
        ]
    }
}

/// The clocks, line by line; the first and the last may have been cut.
fn clocks(serial: &SerialFile) -> Vec<Clocks> {
    serial.text().lines().filter(|line| line.len() == 72).map(Clocks::parse).collect()
}

#[test]
fn clocks_stand_still_or_move_on_as_a_client_wants() {
    let scratch = Scratch::new();
    let mut vmm = Vmm::with_api(&scratch, [""; 0]);
    let serial = SerialFile::new(scratch.path("serial"));
    vmm.api().create(&vm_config(&scratch.guest(Guest::Clocks), serial.path()));
    vmm.api().puts(&["vm.boot"]);
    wait_until(LIMIT, || (clocks(&serial).len() > 2).then_some(()), || "clocks".to_owned());
    let start = Instant::now();
    vmm.api().puts(&["vm.pause"]);
    let before = *clocks(&serial).last().unwrap();
    let saved = scratch.path("saved");
    vmm.api().done("vm.snapshot", &to(&saved));
    vmm.api().puts(&["vmm.shutdown"]);
    vmm.expect_exit(0);
    thread::sleep(GAP);

    for clock in [json!("StoodStill"), json!("MovedOn"), Value::Null] {
        let vmm = Vmm::with_api(&scratch, [""; 0]);
        let other = SerialFile::new(scratch.path(format!("of-{clock}")));
        let mut body = from(&saved, &other);
        if !clock.is_null() {
            body["clock"] = clock.clone();
        }
        vmm.api().done("vm.restore", &body);
        // What is said in the first line may have been read before.
        let seen = || clocks(&other).get(1).copied();
        let after = wait_until(LIMIT, seen, || "clocks".to_owned());
        let most = start.elapsed() + GAP / 2;
        for (name, moved) in after.since(&before) {
            let stands = clock == "StoodStill" && (name != "TSC" || before.has_own_tsc());
            assert_eq!(moved < GAP, stands, "{name} moved on by {moved:?}: {clock}, {before:?}");
            assert!(moved < most, "{name} moved on by {moved:?} of {most:?}: {clock}, {before:?}");
        }
    }
}

/// Guest memory that is in RAM, beyond the first 2 MiB, in KiB (proc_pid_smaps(5)).
fn resident(vmm: &Vmm, ram: u64) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{}/smaps", vmm.pid())).unwrap();
    let kib = |line: &str, key: &str| -> Option<u64> {
        line.strip_prefix(key).map(|rest| rest.trim().trim_end_matches(" kB").parse().unwrap())
    };
    let (mut is_memory, mut sum, mut mappings) = (false, 0, 0);
    for line in text.lines() {
        if let Some(size) = kib(line, "Size:") {
            is_memory = (ram - (2 << 20)..=ram).contains(&(size << 10));
            mappings += usize::from(is_memory);
        }
        sum += kib(line, "Rss:").filter(|_| is_memory).unwrap_or(0);
    }
    assert_eq!(mappings, 1, "guest memory is told by its size:\n{text}");
    sum
}

#[test]
fn memory_is_there_before_the_guest_where_that_is_wanted() {
    const RAM: u64 = 200 << 20;
    // What the guest has written beyond the first 2 MiB: 256 pages.
    let written = 1024;
    for shared in [false, true] {
        let scratch = Scratch::new();
        let mut vmm = Vmm::with_api(&scratch, [""; 0]);
        let serial = SerialFile::new(scratch.path("serial"));
        let mut config = vm_config(&scratch.guest(Guest::Pages), serial.path());
        config["memory"] = json!({ "size": RAM, "shared": shared });
        vmm.api().create(&config);
        vmm.api().puts(&["vm.boot"]);
        serial.wait_for("00000003\n");
        vmm.api().puts(&["vm.pause"]);
        let saved = scratch.path("saved");
        vmm.api().done("vm.snapshot", &to(&saved));
        vmm.api().puts(&["vmm.shutdown"]);
        vmm.expect_exit(0);

        let ways = [json!({ "prefault": true }), json!({ "memory_restore_mode": "Copy" }), json!({})];
        // Shared memory is filled at once, by threads.
        for way in ways.iter().filter(|way| !shared || **way != json!({})) {
            let vmm = Vmm::with_api(&scratch, [""; 0]);
            let other = SerialFile::new(scratch.path("other"));
            let mut body = from(&saved, &other);
            body["resume"] = json!(false);
            body.as_object_mut().unwrap().extend(way.as_object().unwrap().clone());
            vmm.api().done("vm.restore", &body);
            let found = resident(&vmm, RAM);
            assert_eq!(found >= written, *way != json!({}), "{found} KiB, shared: {shared}, {way}");
            assert!(found < 16 * written, "{found} KiB: what is zero takes no space");
            vmm.api().puts(&["vm.resume"]);
            goes_on(&serial, &other);
        }
    }
}
