//! What the control thread tells of a VM's life, on the scripted hypervisor.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]

use std::path::PathBuf;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vmm::events::Events;
use vmm::exit::ExitCode;
use vmm::machine::{MachineEvent, MachineMessage};
use vmm::vmm::{Policy, TABLE, Vmm};
use vmm_api::command::{Host, Incoming, Outcome, ReplySlot};
use vmm_api::events::{Journal, Received, StreamItem};
use vmm_cpu_manager::set::{VcpuEvent, VcpuEventKind};
use vmm_epoll::{Inbox, mailbox};
use vmm_hypervisor::fake::{Exit, Fake};
use vmm_platform_devices::events::{Cause, SystemEvent};
use vmm_state::Phase;
use vmm_tests::harness::LIMIT;
use vmm_tests::tiny::Guest;

struct Rig {
    folder: tempfile::TempDir,
    fake: Fake,
    vmm: Vmm,
    inbox: Inbox<MachineMessage>,
    stream: Journal,
    /// Number of the next event to look at.
    next: u64,
}

impl Rig {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        Guest::Halt.write(folder.path()).unwrap();
        let (post, inbox) = mailbox().unwrap();
        let policy = Policy { serves_clients: true, ..Policy::default() };
        let (fake, events) = (Fake::new(), Events::new());
        let stream = events.stream();
        let vmm = Vmm::new(Arc::new(fake.clone()), post, policy, events);
        Self { folder, fake, vmm, inbox, stream, next: 1 }
    }

    fn kernel(&self) -> PathBuf {
        self.folder.path().join(Guest::Halt.name())
    }

    /// Sends a request; its outcome may come later.
    fn begin(&mut self, name: &str) -> mpsc::Receiver<Outcome> {
        let body = match name {
            "vm.create" => json!({
                "payload": { "kernel": self.kernel() },
                "memory": { "size": 16 << 20 },
                "serial": { "mode": "Null" },
                "console": { "mode": "Off" },
            })
            .to_string()
            .into_bytes(),
            _ => Vec::new(),
        };
        let endpoint = TABLE.iter().find(|endpoint| endpoint.name() == name).unwrap();
        let (sender, outcome) = mpsc::channel();
        let slot = ReplySlot::new(move |outcome| drop(sender.send(outcome)));
        endpoint.prepare(Incoming { body, ..Incoming::default() }, slot).unwrap().dispatch(&mut self.vmm);
        outcome
    }

    /// Sends a request and waits for its outcome.
    fn ask(&mut self, name: &str) -> Outcome {
        let outcome = self.begin(name);
        let start = Instant::now();
        loop {
            match outcome.recv_timeout(Duration::from_millis(1)) {
                Ok(outcome) => return outcome,
                Err(_) => assert!(start.elapsed() < LIMIT, "no answer to {name}"),
            }
            self.pump();
        }
    }

    /// Does what the control thread does.
    fn pump(&mut self) {
        for message in self.inbox.take_all() {
            self.vmm.machine_says(message);
        }
    }

    fn asks(&mut self, names: &[&str]) {
        for name in names {
            self.ask(name).unwrap_or_else(|error| panic!("{name}: {error:?}"));
        }
    }

    fn guest(&mut self, machine: u64, event: MachineEvent) {
        self.vmm.machine_says(MachineMessage { machine, event });
        self.end_boot();
    }

    /// Waits for a boot that no client asked for.
    fn end_boot(&mut self) {
        let start = Instant::now();
        while self.vmm.phase() == Phase::Booting {
            assert!(start.elapsed() < LIMIT, "the boot does not end");
            std::thread::sleep(Duration::from_millis(1));
            self.pump();
        }
    }

    /// Events that were not looked at yet.
    fn fresh(&mut self) -> Vec<Received> {
        let mut lines = Vec::new();
        let taken = self.stream.read(self.next, usize::MAX, &mut lines, None);
        assert_eq!(taken.lost, 0);
        self.next = taken.next;
        let parse = |line: &[u8]| match StreamItem::parse(line).unwrap() {
            StreamItem::Event(event) => event,
            other => panic!("{other:?}"),
        };
        lines.split_inclusive(|byte| *byte == b'\n').map(parse).collect()
    }

    fn told(&mut self) -> Vec<String> {
        names(&self.fresh())
    }
}

/// Names and machines, `vm/booted 1`; not the stages of boots, which are looked at once.
fn names(events: &[Received]) -> Vec<String> {
    let name = |event: &Received| match event.machine {
        Some(machine) => format!("{} {machine}", event.name()),
        None => event.name(),
    };
    events.iter().filter(|event| event.event != "boot-stage").map(name).collect()
}

fn vcpu(kind: VcpuEventKind) -> MachineEvent {
    MachineEvent::Vcpu(VcpuEvent { vcpu: 3, kind })
}

fn properties(event: &Received) -> String {
    Value::from(event.properties.clone()).to_string()
}

#[test]
fn a_whole_life_by_a_client() {
    let mut rig = Rig::new();
    rig.asks(&["vm.create", "vm.boot", "vm.pause", "vm.resume", "vm.pause", "vm.boot", "vm.reboot"]);
    rig.asks(&["vm.shutdown", "vm.boot", "vm.delete", "vm.delete", "vmm.shutdown"]);
    let expected = "\
        vm/created, vm/booting 1, vm/booted 1, vm/pausing 1, vm/paused 1, vm/resuming 1, vm/resumed 1, \
        vm/pausing 1, vm/paused 1, vm/resuming 1, vm/resumed 1, \
        vm/rebooting 1, vm/booting 2, vm/booted 2, vm/rebooted 2, vm/shutdown 2, \
        vm/booting 3, vm/booted 3, vm/shutdown 3, vm/deleted, vmm/shutdown";
    assert_eq!(rig.told().join(", "), expected);
    rig.asks(&["vmm.shutdown"]);
    assert_eq!(rig.told(), [""; 0], "the VMM ends once");
}

#[test]
fn the_stages_of_a_boot_are_told_with_their_durations() {
    let mut rig = Rig::new();
    rig.asks(&["vm.create", "vm.boot"]);
    let boot = rig.fresh();
    let stages: Vec<&str> = boot.iter().filter_map(|event| event.properties.get("stage")?.as_str()).collect();
    assert_eq!(stages, ["console", "vm", "memory", "devices", "kernel", "vcpus"]);
    let durations: Vec<u64> =
        boot.iter().filter_map(|event| event.properties.get("duration_us")?.as_u64()).collect();
    let (booted, stages) = durations.split_last().unwrap();
    assert!(stages.iter().sum::<u64>() <= *booted, "{durations:?}");
    assert!(boot.is_sorted_by_key(|event| event.time), "{boot:?}");
}

#[test]
fn a_boot_that_fails_says_where_and_holds_no_path() {
    let mut rig = Rig::new();
    std::fs::remove_file(rig.kernel()).unwrap();
    rig.asks(&["vm.create"]);
    rig.ask("vm.boot").unwrap_err();
    let told = rig.fresh();
    let failed = told.last().unwrap();
    assert_eq!((failed.name().as_str(), failed.machine), ("vm/boot-failed", Some(1)));
    assert_eq!(properties(failed), r#"{"reason":"cannot load what the guest boots","stage":"kernel"}"#);
    let text = format!("{told:?}");
    assert!(!text.contains(&rig.folder.path().display().to_string()), "{text}");
}

#[test]
fn a_reboot_that_fails_leaves_the_vm_off() {
    for by_guest in [false, true] {
        let mut rig = Rig::new();
        rig.asks(&["vm.create", "vm.boot"]);
        rig.told();
        std::fs::remove_file(rig.kernel()).unwrap();
        if by_guest {
            rig.guest(1, MachineEvent::System(SystemEvent::Reset(Cause::AcpiReset)));
        } else {
            rig.ask("vm.reboot").unwrap_err();
        }
        let told = rig.fresh();
        let cause = told.iter().find(|event| event.event == "rebooting").unwrap().properties["cause"].clone();
        assert_eq!(cause, if by_guest { "guest" } else { "client" });
        let exit: &[&str] = if by_guest { &["guest/exit 1"] } else { &[] };
        let failed = ["vm/rebooting 1", "vm/booting 2", "vm/boot-failed 2", "vm/shutdown 1"];
        assert_eq!(names(&told), [exit, &failed].concat());
    }
}

#[test]
fn guests_end_with_their_cause() {
    let table = [
        (
            MachineEvent::System(SystemEvent::Shutdown(Cause::AcpiSleep)),
            r#"{"cause":"shutdown","via":"acpi-sleep"}"#,
        ),
        (
            MachineEvent::System(SystemEvent::Reset(Cause::AcpiReset)),
            r#"{"cause":"reset","via":"acpi-reset"}"#,
        ),
        (MachineEvent::System(SystemEvent::Reset(Cause::I8042)), r#"{"cause":"reset","via":"i8042"}"#),
        (vcpu(VcpuEventKind::TripleFault), r#"{"cause":"triple-fault","vcpu":3}"#),
        (
            vcpu(VcpuEventKind::InternalError { suberror: 1 }),
            r#"{"cause":"crash","code":1,"reason":"internal-error","vcpu":3}"#,
        ),
        (
            vcpu(VcpuEventKind::FailedEntry { reason: 7 }),
            r#"{"cause":"crash","code":7,"reason":"failed-entry","vcpu":3}"#,
        ),
        (
            vcpu(VcpuEventKind::SystemEvent(3)),
            r#"{"cause":"crash","code":3,"reason":"system-event","vcpu":3}"#,
        ),
        // The text of this one is made of what the guest wrote.
        (
            vcpu(VcpuEventKind::UnexpectedExit("secret".to_owned())),
            r#"{"cause":"crash","reason":"unexpected-exit","vcpu":3}"#,
        ),
    ];
    for (event, expected) in table {
        let mut rig = Rig::new();
        rig.asks(&["vm.create", "vm.boot"]);
        rig.fresh();
        rig.guest(1, event);
        let told = rig.fresh();
        assert_eq!((told[0].name().as_str(), properties(&told[0]).as_str()), ("guest/exit", expected));
        let names = names(&told[1..]);
        if expected.contains("reset") || expected.contains("triple") {
            assert_eq!(
                names,
                ["vm/rebooting 1", "vm/booting 2", "vm/booted 2", "vm/rebooted 2"],
                "{expected}"
            );
            assert_eq!(told[1].properties["cause"], "guest");
        } else {
            assert_eq!(names, ["vm/shutdown 1", "vm/deleted", "vmm/shutdown"], "{expected}");
        }
        // A late echo of the machine that has gone.
        rig.guest(1, vcpu(VcpuEventKind::TripleFault));
        assert_eq!(rig.told(), [""; 0]);
    }
}

#[test]
fn what_a_guest_did_during_a_pause_is_told_at_once_and_acted_on_later() {
    let mut rig = Rig::new();
    rig.asks(&["vm.create", "vm.boot", "vm.pause"]);
    rig.told();
    rig.guest(1, MachineEvent::System(SystemEvent::Reset(Cause::AcpiReset)));
    rig.guest(1, MachineEvent::System(SystemEvent::Reset(Cause::I8042)));
    assert_eq!(rig.told(), ["guest/exit 1"]);
    rig.asks(&["vm.resume"]);
    rig.end_boot();
    let resumed = "vm/resuming 1, vm/resumed 1, vm/rebooting 1, vm/booting 2, vm/booted 2, vm/rebooted 2";
    assert_eq!(rig.told().join(", "), resumed);
}

#[test]
fn a_boot_that_the_end_of_the_vmm_overtakes_has_failed() {
    for (name, told) in [
        ("vm.boot", "vm/booting 2, vm/boot-failed 2"),
        ("vm.reboot", "vm/rebooting 1, vm/booting 2, vm/boot-failed 2, vm/shutdown 1"),
    ] {
        let mut rig = Rig::new();
        rig.asks(&["vm.create", "vm.boot"]);
        if name == "vm.boot" {
            rig.asks(&["vm.shutdown"]);
        }
        rig.told();
        drop(rig.begin(name));
        rig.vmm.end(ExitCode::Success);
        assert_eq!(rig.told().join(", "), format!("{told}, vm/deleted, vmm/shutdown"));
    }
}

/// Offsets in the common configuration (virtio 1.3, section 4.1.4.3).
const DRIVER_FEATURE_SELECT: u64 = 8;
const DRIVER_FEATURE: u64 = 12;
const STATUS: u64 = 20;
const QUEUE_SELECT: u64 = 22;
const QUEUE_ENABLE: u64 = 28;
const QUEUE_DESC: u64 = 32;
const QUEUE_DRIVER: u64 = 40;
const QUEUE_DEVICE: u64 = 48;

/// A driver of `_rng` in the scripted guest.
struct Driver {
    bar: u64,
}

impl Driver {
    /// Finds the device and lets its memory be decoded.
    fn of(rig: &mut Rig) -> Self {
        let info: Value = serde_json::from_slice(&rig.ask("vm.info").unwrap().bytes).unwrap();
        let node = &info["device_tree"]["_rng"];
        let bars = node["resources"].as_array().unwrap().iter();
        let bar = bars.filter_map(|resource| resource["MmioAddressRange"]["base"].as_u64()).next().unwrap();
        let bdf = node["pci_bdf"].as_str().unwrap();
        let slot = u32::from_str_radix(bdf.rsplit([':', '.']).nth(1).unwrap(), 16).unwrap();
        let command = 0x8000_0000 | slot << 11 | 4;
        rig.fake.script(
            0,
            [
                Exit::PioWrite { port: 0xcf8, data: command.to_le_bytes().to_vec() },
                Exit::PioWrite { port: 0xcfc, data: vec![2, 0] },
            ],
        );
        Self { bar }
    }

    fn write(&self, rig: &Rig, writes: &[(u64, &[u8])]) {
        let exit = |(offset, data): &(u64, &[u8])| Exit::MmioWrite {
            address: self.bar + offset,
            data: data.to_vec(),
        };
        rig.fake.script(0, writes.iter().map(exit));
    }

    /// Brings the device up, its queue's descriptors at `descriptors`.
    fn start(&self, rig: &Rig, descriptors: u64) {
        self.write(rig, &[(STATUS, &[0]), (STATUS, &[1]), (STATUS, &[3])]);
        self.write(rig, &[(DRIVER_FEATURE_SELECT, &[1, 0, 0, 0]), (DRIVER_FEATURE, &[1, 0, 0, 0])]);
        self.write(rig, &[(STATUS, &[0xb]), (QUEUE_SELECT, &[0, 0])]);
        self.write(rig, &[(QUEUE_DESC, &descriptors.to_le_bytes())]);
        self.write(rig, &[(QUEUE_DRIVER, &0x21_0000_u64.to_le_bytes())]);
        self.write(rig, &[(QUEUE_DEVICE, &0x22_0000_u64.to_le_bytes())]);
        self.write(rig, &[(QUEUE_ENABLE, &[1, 0]), (STATUS, &[0xf])]);
    }
}

/// The next events, once the guest's requests have come through.
fn next_told(rig: &mut Rig) -> Vec<Received> {
    let start = Instant::now();
    loop {
        rig.pump();
        let told = rig.fresh();
        if !told.is_empty() {
            return told;
        }
        assert!(start.elapsed() < LIMIT, "nothing is told");
        std::thread::yield_now();
    }
}

#[test]
fn drivers_that_activate_and_reset_devices_are_told() {
    let mut rig = Rig::new();
    rig.asks(&["vm.create", "vm.boot"]);
    rig.fresh();
    let driver = Driver::of(&mut rig);
    let expect = |rig: &mut Rig, name: &str| {
        let told = next_told(rig);
        assert_eq!(told.iter().map(Received::name).collect::<Vec<_>>(), [name]);
        assert_eq!((properties(&told[0]).as_str(), told[0].machine), (r#"{"id":"_rng"}"#, Some(1)));
    };
    driver.start(&rig, 0x20_0000);
    expect(&mut rig, "virtio-device/activated");
    driver.write(&rig, &[(STATUS, &[0])]);
    expect(&mut rig, "virtio-device/reset");
    // Far outside of guest memory.
    driver.start(&rig, 1 << 40);
    expect(&mut rig, "virtio-device/needs-reset");
}
