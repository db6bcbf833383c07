//! A machine on this host's KVM with tiny guests: what its owner makes the guest notice, and what it counts.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]

use std::sync::Arc;

use serde_json::json;
use vmm::console::{Console, Consoles};
use vmm::machine::stages::Stages;
use vmm::machine::{EventPost, Locks, Machine, MachineEvent, MachineMessage, Plan, Ports};
use vmm_api::config::UnknownFields;
use vmm_api::spec::parse_and_check;
use vmm_device_model::metrics::{Sample, Value};
use vmm_device_model::thread::{ThreadHook, Unconfined};
use vmm_epoll::{Inbox, mailbox};
use vmm_hypervisor::kvm::Kvm;
use vmm_platform_devices::events::{Cause, SystemEvent};
use vmm_tests::harness::{LIMIT, Scratch, SerialFile, vm_config, wait_until};
use vmm_tests::tiny::Guest;

/// A guest whose serial port writes a file.
struct Running {
    machine: Machine,
    serial: SerialFile,
    inbox: Inbox<MachineMessage>,
    _consoles: Consoles,
}

fn run(scratch: &Scratch, guest: Guest) -> Running {
    let serial = SerialFile::new(scratch.path("serial"));
    let mut config = vm_config(&scratch.guest(guest), serial.path());
    config["pvpanic"] = json!(true);
    let spec = parse_and_check(config.to_string().as_bytes(), UnknownFields::Refuse).unwrap().spec;
    let threads: Arc<dyn ThreadHook> = Arc::new(Unconfined);
    let consoles = Consoles::open(&spec, &threads).unwrap();
    let ports = Ports { serial: consoles.serial.as_ref().map(Console::end), ..Ports::default() };
    let (mailbox, inbox) = mailbox().unwrap();
    let post = EventPost::new(1, mailbox);
    let plan = Plan {
        hypervisor: &Kvm::open().unwrap(),
        spec: &spec,
        ports: &ports,
        post: &post,
        threads: &threads,
        locks: Locks::Now,
        generation: None,
    };
    let mut machine = Machine::build(&plan, &mut Stages::default()).unwrap();
    machine.start();
    Running { machine, serial, inbox, _consoles: consoles }
}

impl Running {
    /// Waits for an event of the guest.
    fn says(&mut self, wanted: SystemEvent) {
        let inbox = &mut self.inbox;
        let says = |message: MachineMessage| match message.event {
            MachineEvent::System(event) => event == wanted,
            other => panic!("{other:?}"),
        };
        wait_until(LIMIT, || inbox.take_all().into_iter().any(says).then_some(()), || format!("{wanted:?}"));
    }

    /// Saves, resets and restores everything of a paused guest.
    fn verify(&mut self) {
        self.machine.save_reset_restore().unwrap();
    }
}

#[test]
fn an_nmi_reaches_a_halted_guest_and_waits_for_a_paused_one() {
    // One for each machine: the guest does not return from its handler.
    for paused in [false, true] {
        let scratch = Scratch::new();
        let mut guest = run(&scratch, Guest::Nmi);
        guest.serial.wait_for("ready\n");
        if paused {
            guest.machine.pause().unwrap();
        }
        guest.machine.nmi().unwrap();
        if paused {
            guest.verify();
            assert_eq!(guest.serial.text(), "ready\n", "it is paused");
            guest.machine.resume().unwrap();
        }
        guest.serial.wait_for("ready\nnmi\n");
        let told = guest.inbox.take_all();
        assert!(told.is_empty(), "the guest goes on: {told:?}");
    }
}

#[test]
fn a_power_button_reaches_the_guest_also_when_it_was_paused() {
    for paused in [false, true] {
        let scratch = Scratch::new();
        let mut guest = run(&scratch, Guest::PowerButton);
        guest.serial.wait_for("ready\n");
        if paused {
            guest.machine.pause().unwrap();
        }
        assert!(guest.machine.power_button());
        if paused {
            guest.verify();
            guest.machine.resume().unwrap();
        }
        guest.serial.wait_for("ready\nbutton\n");
        guest.says(SystemEvent::Shutdown(Cause::AcpiSleep));
    }
}

#[test]
fn a_panic_is_told_and_everything_is_counted() {
    let scratch = Scratch::new();
    let mut guest = run(&scratch, Guest::Panic);
    guest.says(SystemEvent::Panicked);
    guest.serial.wait_for("panicked\n");
    let count = |machine: &Machine, name: &str, label: (&'static str, &str)| {
        let label = (label.0, label.1.to_owned());
        let samples = machine.metrics();
        let of = |sample: &&Sample| sample.family.name == name && sample.labels.contains(&label);
        match samples.iter().find(of).unwrap().value {
            Value::Counter(count) => count,
            ref other => panic!("{other:?}"),
        }
    };
    guest.machine.pause().unwrap();
    guest.verify();
    let machine = &guest.machine;
    assert_eq!(count(machine, "vmm_console_output_bytes", ("device", "_serial")), 9);
    assert_eq!(count(machine, "vmm_console_lost_bytes", ("device", "_serial")), 0);
    assert_eq!(count(machine, "vmm_vcpu_exits", ("reason", "mmio_write")), 1, "the panic");
    // Nine characters, and configuration accesses.
    assert!(count(machine, "vmm_vcpu_exits", ("reason", "pio_write")) > 9);
    assert!(count(machine, "vmm_vcpu_exits", ("reason", "pio_read")) > 1);
}
