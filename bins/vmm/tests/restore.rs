//! Saved machines go on in new ones, with tiny guests on this host's KVM.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]

use std::sync::Arc;

use serde_json::{Value, json};
use vm_memory::{Address, Bytes, GuestMemoryBackend, GuestMemoryRegion};
use vmm::console::{Console, Consoles};
use vmm::exit::chain;
use vmm::machine::stages::Stages;
use vmm::machine::{ClockChoice, EventPost, Machine, MachineError, MachineMessage, Plan, Ports, Saved};
use vmm_api::config::UnknownFields;
use vmm_api::spec::{MachineSpec, parse_and_check};
use vmm_device_model::thread::{ThreadHook, Unconfined};
use vmm_epoll::{Inbox, mailbox};
use vmm_hypervisor::kvm::Kvm;
use vmm_memory_manager::map::MemoryMap;
use vmm_snapshot::RecordSet;
use vmm_tests::harness::{Scratch, SerialFile, vm_config};
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
        let plan =
            Plan { hypervisor: &hypervisor, spec: &spec, ports: &ports, post: &self.post, threads: &threads };
        work(&plan)
    }

    fn start(&self) -> Machine {
        let mut machine = self.with_plan(|plan| {
            let Plan { hypervisor, spec, ports, post, threads } = *plan;
            Machine::build(hypervisor, spec, ports, post, threads, &mut Stages::default()).unwrap()
        });
        machine.start();
        machine
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

#[test]
fn a_guest_goes_on_counting_in_a_new_machine() {
    let mut place =
        Place::new(Guest::Ticker, |_, config| config["cpus"] = json!({ "boot_vcpus": 2, "max_vcpus": 2 }));
    let mut machine = place.start();
    for round in 0..50 {
        place.serial.wait_longer_than(20 * round);
        let snapshot = save(&mut machine);
        drop(machine);
        machine = place.restore(snapshot);
        machine.resume().unwrap();
    }
    place.serial.wait_longer_than(9 * 110);
    machine.pause().unwrap();
    assert_counts(&place.serial.text());
    assert!(place.inbox.take_all().is_empty());
    drop(place.scratch);
}

#[test]
fn a_machine_that_runs_is_not_saved() {
    let place = Place::new(Guest::Halt, |_, _| ());
    let machine = place.start();
    assert_eq!(chain(&machine.save().unwrap_err()), "the guest runs");
}
