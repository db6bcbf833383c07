//! The control thread's state against the table of `vmm-state`, on the scripted hypervisor.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]

use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};

use serde_json::json;
use vmm::events::Events;
use vmm::machine::{MachineEvent, MachineMessage};
use vmm::vmm::{Policy, TABLE, Vmm};
use vmm_api::command::{Host, Incoming, Outcome, ReplySlot};
use vmm_cpu_manager::set::{VcpuEvent, VcpuEventKind};
use vmm_epoll::{Inbox, mailbox};
use vmm_hypervisor::fake::{Exit, Fake};
use vmm_platform_devices::events::{Cause, SystemEvent};
use vmm_platform_devices::serial::COM1_PORT;
use vmm_state::{ACTIONS, Cell, EventCell, GUEST_EVENTS, GuestEvent, Phase};
use vmm_tests::harness::LIMIT;
use vmm_tests::tiny::Guest;

struct Rig {
    folder: tempfile::TempDir,
    vmm: Vmm,
    /// Mode of the serial port.
    serial: &'static str,
    /// Machines built so far.
    machines: u64,
    _inbox: Inbox<MachineMessage>,
}

impl Rig {
    fn new() -> Self {
        Self::on(Fake::new(), "Null")
    }

    fn on(fake: Fake, serial: &'static str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        Guest::Halt.write(folder.path()).unwrap();
        let (post, inbox) = mailbox().unwrap();
        let policy = Policy { serves_clients: true, verify_state: false };
        let vmm = Vmm::new(Arc::new(fake), post, policy, Events::new());
        Self { folder, vmm, serial, machines: 0, _inbox: inbox }
    }

    fn in_phase(phase: Phase) -> Self {
        let mut rig = Self::new();
        let way: &[&str] = match phase {
            Phase::Empty => &[],
            Phase::Created => &["vm.create"],
            Phase::Running => &["vm.create", "vm.boot"],
            Phase::Paused => &["vm.create", "vm.boot", "vm.pause"],
            Phase::Shutdown => &["vm.create", "vm.boot", "vm.shutdown"],
        };
        for name in way {
            rig.ask(name).unwrap();
        }
        assert_eq!(rig.vmm.phase(), phase);
        rig
    }

    fn kernel(&self) -> PathBuf {
        self.folder.path().join(Guest::Halt.name())
    }

    /// Without it nothing boots.
    fn hide_kernel(&self) {
        std::fs::remove_file(self.kernel()).unwrap();
    }

    fn ask(&mut self, name: &str) -> Outcome {
        let body = if name == "vm.create" { create(&self.kernel(), self.serial) } else { Vec::new() };
        let endpoint = TABLE.iter().find(|endpoint| endpoint.name() == name).unwrap();
        let (sender, outcome) = mpsc::channel();
        let slot = ReplySlot::new(move |outcome| sender.send(outcome).unwrap());
        let paused = self.vmm.phase() == Phase::Paused;
        // Every one of these answers at once.
        let request = endpoint.prepare(Incoming { body, ..Incoming::default() }, slot).unwrap();
        request.dispatch(&mut self.vmm);
        if name == "vm.reboot" || (name == "vm.boot" && !paused) {
            self.machines += 1;
        }
        outcome.try_recv().unwrap()
    }

    fn guest_does(&mut self, event: GuestEvent) {
        let vcpu = |kind| MachineEvent::Vcpu(VcpuEvent { vcpu: 0, kind });
        let event = match event {
            GuestEvent::Reset => MachineEvent::System(SystemEvent::Reset(Cause::I8042)),
            GuestEvent::Shutdown => MachineEvent::System(SystemEvent::Shutdown(Cause::AcpiSleep)),
            GuestEvent::TripleFault => vcpu(VcpuEventKind::TripleFault),
            GuestEvent::Crash => vcpu(VcpuEventKind::InternalError { suberror: 1 }),
        };
        self.vmm.machine_says(MachineMessage { machine: self.machines, event });
    }
}

fn create(kernel: &Path, serial: &str) -> Vec<u8> {
    json!({
        "payload": { "kernel": kernel },
        "memory": { "size": 16 << 20 },
        "serial": { "mode": serial },
        "console": { "mode": "Off" },
    })
    .to_string()
    .into_bytes()
}

#[test]
fn every_request_leads_where_the_table_says() {
    for row in &ACTIONS {
        for phase in Phase::ALL {
            let mut rig = Rig::in_phase(phase);
            let outcome = rig.ask(row.name);
            let (success, after) = match row.cell(phase) {
                Cell::Run(step) => (true, step.done),
                Cell::Nothing => (true, phase),
                Cell::Refuse(_) => (false, phase),
            };
            assert_eq!((outcome.is_ok(), rig.vmm.phase()), (success, after), "{} in {phase}", row.name);
        }
    }
}

#[test]
fn a_boot_that_fails_leads_where_the_table_says() {
    for row in ACTIONS.iter().filter(|row| ["vm.boot", "vm.reboot"].contains(&row.name)) {
        for phase in [Phase::Created, Phase::Running, Phase::Paused, Phase::Shutdown] {
            let Cell::Run(step) = row.cell(phase) else { continue };
            if (row.name, phase) == ("vm.boot", Phase::Paused) {
                continue; // A resume, which needs no kernel.
            }
            let mut rig = Rig::in_phase(phase);
            rig.hide_kernel();
            rig.ask(row.name).unwrap_err();
            assert_eq!(rig.vmm.phase(), step.failed, "{} in {phase}", row.name);
        }
    }
}

#[test]
fn every_guest_event_leads_where_the_table_says() {
    for row in &GUEST_EVENTS {
        let ends = matches!(row.event, GuestEvent::Shutdown | GuestEvent::Crash);
        for phase in Phase::ALL {
            let mut rig = Rig::in_phase(phase);
            rig.guest_does(row.event);
            match row.cell(phase) {
                EventCell::Run(step) => {
                    // What ends the process removes the VM, too.
                    assert_eq!(rig.vmm.phase(), if ends { Phase::Empty } else { step.done }, "{}", row.name);
                    assert_eq!(rig.vmm.ending().is_some(), ends, "{}", row.name);
                }
                EventCell::Defer | EventCell::Ignore => {
                    assert_eq!((rig.vmm.phase(), rig.vmm.ending()), (phase, None), "{} in {phase}", row.name);
                }
            }
        }
    }
}

#[test]
fn a_reset_that_fails_leads_where_the_table_says() {
    let mut rig = Rig::in_phase(Phase::Running);
    rig.hide_kernel();
    rig.guest_does(GuestEvent::Reset);
    assert_eq!((rig.vmm.phase(), rig.vmm.ending()), (Phase::Shutdown, None));
}

#[test]
fn what_waits_for_the_resume_happens_once_and_to_its_own_machine() {
    // The second and third event are of a machine that the first has ended.
    let mut rig = Rig::in_phase(Phase::Paused);
    for event in [GuestEvent::Reset, GuestEvent::Reset, GuestEvent::Shutdown] {
        rig.guest_does(event);
    }
    rig.ask("vm.resume").unwrap();
    assert_eq!((rig.vmm.phase(), rig.vmm.ending()), (Phase::Running, None));
    // A message of the old machine is late; one of the new machine is not: the guest was reset once.
    rig.guest_does(GuestEvent::Shutdown);
    assert_eq!(rig.vmm.ending(), None);
    rig.machines += 1;
    rig.guest_does(GuestEvent::Shutdown);
    assert!(rig.vmm.ending().is_some());
}

#[test]
fn what_waits_is_forgotten_with_its_machine() {
    for way in [["vm.shutdown", "vm.boot"], ["vm.reboot", "vm.info"]] {
        let mut rig = Rig::in_phase(Phase::Paused);
        rig.guest_does(GuestEvent::Shutdown);
        for name in way.iter().chain(&["vm.pause", "vm.resume"]) {
            rig.ask(name).unwrap();
        }
        assert_eq!((rig.vmm.phase(), rig.vmm.ending()), (Phase::Running, None), "{way:?}");
    }
}

#[test]
fn a_pty_that_nobody_reads_holds_nobody() {
    let (done, ended) = mpsc::channel();
    std::thread::spawn(move || {
        let fake = Fake::new();
        // More than a terminal holds; the answer to the last tells that all is said.
        let output = (0..200_000).map(|_| Exit::PioWrite { port: COM1_PORT, data: vec![b'x'] });
        fake.script(0, output.chain([Exit::PioRead { port: COM1_PORT + 5, size: 1, count: 1 }]));
        let mut rig = Rig::on(fake.clone(), "Pty");
        for name in ["vm.create", "vm.boot"] {
            rig.ask(name).unwrap();
        }
        while fake.answers().is_empty() {
            std::thread::yield_now();
        }
        for name in ["vm.reboot", "vm.pause", "vm.delete"] {
            rig.ask(name).unwrap();
        }
        done.send(()).unwrap();
    });
    ended.recv_timeout(LIMIT).unwrap();
}
