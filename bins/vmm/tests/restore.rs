//! Saved machines go on in new ones, with tiny guests on this host's KVM.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]

use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde_json::{Value, json};
use vm_memory::{Address, Bytes, GuestMemoryBackend, GuestMemoryRegion};
use vmm::console::{Console, Consoles};
use vmm::exit::chain;
use vmm::machine::stages::Stages;
use vmm::machine::{
    ClockChoice, ClockV1, EventPost, Locks, Machine, MachineError, MachineEvent, MachineMessage, Plan, Ports,
    Saved,
};
use vmm_api::config::UnknownFields;
use vmm_api::spec::{MachineSpec, parse_and_check};
use vmm_device_model::thread::{ThreadHook, Unconfined};
use vmm_epoll::{Inbox, mailbox};
use vmm_hypervisor::kvm::Kvm;
use vmm_memory_manager::map::MemoryMap;
use vmm_snapshot::{RecordSet, Schema};
use vmm_tests::harness::{LIMIT, Scratch, SerialFile, vm_config, wait_until};
use vmm_tests::tiny::Guest;

/// The surroundings of one guest, which outlive its machines.
struct Place {
    scratch: Scratch,
    serial: SerialFile,
    config: Value,
    consoles: Consoles,
    inbox: Inbox<MachineMessage>,
    post: EventPost,
}

/// A machine as it was saved.
#[derive(Clone)]
struct Snapshot {
    records: RecordSet,
    /// By guest address.
    memory: Vec<(u64, Vec<u8>)>,
}

fn spec(config: &Value) -> MachineSpec {
    parse_and_check(config.to_string().as_bytes(), UnknownFields::Refuse).unwrap().spec
}

impl Place {
    fn new(guest: Guest, change: impl FnOnce(&Scratch, &mut Value)) -> Self {
        let scratch = Scratch::new();
        let serial = SerialFile::new(scratch.path("serial"));
        let mut config = vm_config(&scratch.guest(guest), serial.path());
        change(&scratch, &mut config);
        let threads: Arc<dyn ThreadHook> = Arc::new(Unconfined);
        let consoles = Consoles::open(&spec(&config), &threads).unwrap();
        let (mailbox, inbox) = mailbox().unwrap();
        Self { scratch, serial, config, consoles, inbox, post: EventPost::new(1, mailbox) }
    }

    fn with_plan<T>(&self, work: impl FnOnce(&Plan<'_>) -> T) -> T {
        let threads: Arc<dyn ThreadHook> = Arc::new(Unconfined);
        let ports = Ports {
            serial: self.consoles.serial.as_ref().map(Console::end),
            console: self.consoles.console.as_ref().map(Console::end),
            debug: self.consoles.debug.as_ref().map(Console::end),
        };
        let (hypervisor, spec) = (Kvm::open().unwrap(), spec(&self.config));
        let plan = Plan {
            hypervisor: &hypervisor,
            spec: &spec,
            ports: &ports,
            post: &self.post,
            threads: &threads,
            locks: Locks::Now,
            generation: None,
        };
        work(&plan)
    }

    fn start(&self) -> Machine {
        let mut machine = self.with_plan(|plan| Machine::build(plan, &mut Stages::default()).unwrap());
        machine.start();
        machine
    }

    /// Services devices until `done` with what the guest has printed.
    fn drive(&mut self, machine: &mut Machine, done: impl Fn(&str) -> bool) {
        let Self { serial, inbox, .. } = self;
        let step = || {
            for message in inbox.take_all() {
                match message.event {
                    MachineEvent::Attention { device, pending } => {
                        pending.store(false, Ordering::SeqCst);
                        machine.service(&device).unwrap();
                    }
                    other => panic!("{other:?}"),
                }
            }
            done(&serial.text()).then_some(())
        };
        wait_until(LIMIT, step, || format!("the guest does not go on: {:?}", serial.text()));
    }

    fn try_restore(&self, snapshot: Snapshot, clock: ClockChoice) -> Result<Machine, MachineError> {
        let Snapshot { records, memory: content } = snapshot;
        let memory = Box::new(move |saved: vmm::machine::SavedMemory| {
            let map = MemoryMap::create(saved.vm, &saved.zones, saved.phys_bits)?;
            for (address, bytes) in content {
                map.memory().write_slice(&bytes, vm_memory::GuestAddress(address)).unwrap();
            }
            Ok(map)
        });
        let saved = Saved { records, memory, clock, another: true };
        self.with_plan(|plan| Machine::restore(plan, saved, &mut Stages::default()))
    }

    fn restore(&self, snapshot: Snapshot) -> Machine {
        self.try_restore(snapshot, ClockChoice::MovedOn).unwrap()
    }
}

/// Pauses and saves a machine.
fn save(machine: &mut Machine) -> Snapshot {
    machine.pause().unwrap();
    let records = machine.save().unwrap();
    let region = |region: &vm_memory::GuestRegionMmap<_>| {
        let mut bytes = vec![0; region.len() as usize];
        region.read_slice(&mut bytes, vm_memory::MemoryRegionAddress(0)).unwrap();
        (region.start_addr().raw_value(), bytes)
    };
    Snapshot { records, memory: machine.memory().memory().iter().map(region).collect() }
}

/// The numbers that a ticker printed.
fn ticks(text: &str) -> Vec<u32> {
    text.lines().filter(|line| line.len() == 8).map(|line| u32::from_str_radix(line, 16).unwrap()).collect()
}

fn assert_counts(text: &str) {
    let ticks = ticks(text);
    assert!(ticks.iter().copied().eq(0..ticks.len() as u32), "{text}");
}

/// Descriptors that this process has.
fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// This process's resident memory in bytes.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() << 10
}

fn small(config: &mut Value) {
    config["memory"] = json!({ "size": 16 << 20 });
}

#[test]
fn a_guest_goes_on_counting_in_a_new_machine_again_and_again() {
    let mut place = Place::new(Guest::Ticker, |_, config| {
        small(config);
        config["cpus"] = json!({ "boot_vcpus": 2, "max_vcpus": 2 });
    });
    let mut machine = place.start();
    let (mut files, mut memory) = (0, 0);
    for round in 0..50 {
        place.serial.wait_longer_than(20 * round);
        let snapshot = save(&mut machine);
        drop(machine);
        machine = place.restore(snapshot);
        machine.resume().unwrap();
        if round == 10 {
            (files, memory) = (descriptors(), resident());
        }
    }
    // Other tests of this process come and go.
    assert!(descriptors() <= files + 60, "{files} descriptors became {}", descriptors());
    let grown = resident().saturating_sub(memory);
    assert!(grown < 200 << 20, "memory grew by {grown} bytes");
    place.serial.wait_longer_than(20 * 50 + 90);
    machine.pause().unwrap();
    assert_counts(&place.serial.text());
    let told = place.inbox.take_all();
    assert!(told.is_empty(), "{told:?}");
}

/// Two disks of one size, a random source and a console, with their drivers in the middle of something.
fn with_drivers() -> Place {
    Place::new(Guest::Drivers, |scratch, config| {
        small(config);
        let disk = |id: &str| json!({ "id": id, "path": scratch.disk(id, 1 << 20), "image_type": "Raw" });
        config["disks"] = json!([disk("a"), disk("b")]);
        config["console"] = json!({ "mode": "Null" });
        config["pvpanic"] = json!(true);
    })
}

#[test]
fn devices_are_where_they_were_in_whatever_order_they_are_configured() {
    let mut place = with_drivers();
    let mut machine = place.start();
    place.drive(&mut machine, |text| text.ends_with("driven\n"));
    let tree = |machine: &Machine| {
        let mut nodes: Vec<_> = machine.nodes().into_iter().map(|node| (node.id.clone(), node)).collect();
        nodes.sort_by(|a, b| a.0.cmp(&b.0));
        nodes
    };
    let before = tree(&machine);
    let snapshot = save(&mut machine);
    drop(machine);
    place.config["disks"].as_array_mut().unwrap().reverse();
    let mut machine = place.restore(snapshot.clone());
    assert_eq!(format!("{before:?}"), format!("{:?}", tree(&machine)));
    machine.resume().unwrap();
    machine.pause().unwrap();
    // Drivers' devices run again: what a restore gives is what it was given.
    let again = machine.save().unwrap();
    for owner in ["devices", "memory-layout", "machine"] {
        let of = |records: &RecordSet| records.clone().take_record(owner).unwrap();
        let (was, is) = (of(&snapshot.records), of(&again));
        assert!(was == is || owner == "devices", "{owner}");
    }
    drop(machine);
    // A device less, and one more.
    place.config["disks"].as_array_mut().unwrap().pop();
    let error = chain(&place.try_restore(snapshot.clone(), ClockChoice::MovedOn).unwrap_err());
    assert!(error.contains("records that nothing here restores: a"), "{error}");
    let disk = place.scratch.disk("c", 1 << 20);
    let disks = place.config["disks"].as_array_mut().unwrap();
    disks.push(json!({ "id": "c", "path": disk, "image_type": "Raw" }));
    let error = chain(&place.try_restore(snapshot, ClockChoice::MovedOn).unwrap_err());
    assert!(error.contains("no record of \"c\""), "{error}");
}

#[test]
fn drivers_go_on_from_wherever_their_machine_was_saved() {
    for cut in 0..9 {
        let mut place = with_drivers();
        let mut machine = place.start();
        // Somewhere between the first disk's requests and the last device's.
        place.drive(&mut machine, |text| text.len() >= cut * 5);
        let snapshot = save(&mut machine);
        drop(machine);
        let mut machine = place.restore(snapshot);
        machine.resume().unwrap();
        place.drive(&mut machine, |text| text.ends_with("driven\n"));
        let text = place.serial.text();
        let disks: Vec<_> = text.lines().filter(|line| line.starts_with("disk ")).collect();
        assert!(disks.len() == 2 && disks[0] == disks[1], "{text}");
    }
}

#[test]
fn an_interrupt_that_waits_is_not_lost() {
    // Raised on a paused guest, saved, and taken in the new machine.
    let place = Place::new(Guest::Nmi, |_, config| small(config));
    let mut machine = place.start();
    place.serial.wait_for("ready\n");
    machine.pause().unwrap();
    machine.nmi().unwrap();
    let snapshot = save(&mut machine);
    drop(machine);
    place.restore(snapshot).resume().unwrap();

    let place = Place::new(Guest::PowerButton, |_, config| small(config));
    let mut machine = place.start();
    place.serial.wait_for("ready\n");
    machine.pause().unwrap();
    assert!(machine.power_button());
    let snapshot = save(&mut machine);
    drop(machine);
    let mut machine = place.restore(snapshot);
    machine.resume().unwrap();
    place.serial.wait_for("ready\nbutton\n");
}

#[test]
fn clocks_go_on_from_their_record() {
    let place = Place::new(Guest::Halt, |_, config| small(config));
    let mut machine = place.start();
    place.serial.wait_for("halted\n");
    let snapshot = save(&mut machine);
    drop(machine);
    let clock = |records: &RecordSet| records.clone().take::<ClockV1>("clock").unwrap();
    let was = clock(&snapshot.records);
    let hour = 3_600_000_000_000;
    for (choice, ago) in [(ClockChoice::StoodStill, 0), (ClockChoice::MovedOn, hour)] {
        let mut earlier = snapshot.clone();
        earlier.records.take_record("clock").unwrap();
        earlier.records.put("clock", &ClockV1 { host: was.host - hour, ..was }).unwrap();
        let machine = place.try_restore(earlier, choice).unwrap();
        let is = clock(&machine.save().unwrap());
        assert!(
            (was.guest + ago..was.guest + ago + hour / 2).contains(&is.guest),
            "{choice:?}: {was:?} {is:?}"
        );
    }
}

/// Two vCPUs, two disks, a random source, a console, pvpanic and the serial port beside the platform's devices.
#[test]
fn records_are_small() {
    let mut place = with_drivers();
    place.config["cpus"] = json!({ "boot_vcpus": 2, "max_vcpus": 2 });
    let mut machine = place.start();
    place.drive(&mut machine, |text| text.ends_with("driven\n"));
    let records = save(&mut machine).records;
    let size = records.encode().len();
    assert!(size <= 48 << 10, "{size} bytes");
}

#[test]
fn a_machine_that_runs_is_not_saved() {
    let place = Place::new(Guest::Halt, |_, _| ());
    let machine = place.start();
    assert_eq!(chain(&machine.save().unwrap_err()), "the guest runs");
}
