//! A VMM without its control thread, for tests over the scripted hypervisor.
#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code; each user takes a part"
)]

use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use serde_json::Value;
use vmm::events::Events;
use vmm::machine::{MachineEvent, MachineMessage};
use vmm::sandbox::Sandbox;
use vmm::vmm::{Policy, TABLE, Vmm};
use vmm_api::command::{Host, Incoming, Outcome, ReplySlot};
use vmm_api::events::{Journal, StreamItem};
use vmm_cpu_manager::set::{VcpuEvent, VcpuEventKind};
use vmm_epoll::{Inbox, mailbox};
use vmm_hypervisor::fake::Fake;
use vmm_platform_devices::events::{Cause, SystemEvent};
use vmm_state::{GuestEvent, Phase, Reactions};
use vmm_tests::harness::{LIMIT, Requests};
use vmm_tests::tiny::Guest;

mod disk;
pub(crate) mod doorman;

/// The control thread's state with a scripted hypervisor, and the control thread's work as far as a test does it.
pub(crate) struct Rig {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) vmm: Vmm,
    /// Mode of the serial port.
    serial: &'static str,
    inbox: Inbox<MachineMessage>,
    /// All that was told.
    events: Journal,
    /// The other end of a migration, which says nothing.
    peer: Option<UnixListener>,
}

impl Rig {
    pub(crate) fn new() -> Self {
        Self::with(Fake::new(), "Null", Reactions::default())
    }

    pub(crate) fn with(fake: Fake, serial: &'static str, reactions: Reactions) -> Self {
        let folder = tempfile::tempdir().unwrap();
        Guest::Halt.write(folder.path()).unwrap();
        std::fs::write(folder.path().join("disk"), [0; 4096]).unwrap();
        let (post, inbox) = mailbox().unwrap();
        let policy = Policy { serves_clients: true, verify_state: false, reactions };
        let events = Events::new();
        let stream = events.stream();
        let vmm = Vmm::new(Arc::new(fake), post, policy, events);
        Self { folder, vmm, serial, inbox, events: stream, peer: None }
    }

    /// The same in a sandbox.
    pub(crate) fn confined(self, sandbox: Sandbox) -> Self {
        Self { vmm: self.vmm.confined(sandbox), ..self }
    }

    pub(crate) fn in_phase(phase: Phase) -> Self {
        Self::new().brought_to(phase)
    }

    pub(crate) fn brought_to(mut self, phase: Phase) -> Self {
        let way: &[&str] = match phase {
            Phase::Empty | Phase::Receiving => &[],
            Phase::Created | Phase::Booting => &["vm.create"],
            Phase::Running | Phase::Migrating => &["vm.create", "vm.boot"],
            Phase::Paused | Phase::Saving => &["vm.create", "vm.boot", "vm.pause"],
            Phase::Shutdown => &["vm.create", "vm.boot", "vm.shutdown"],
        };
        for name in way {
            self.ask(name).unwrap();
        }
        if phase == Phase::Booting {
            // Its end is not looked at.
            drop(self.begin("vm.boot"));
        }
        if phase == Phase::Saving {
            drop(self.begin("vm.snapshot"));
        }
        if phase == Phase::Migrating {
            self.peer = Some(UnixListener::bind(self.folder.path().join("peer")).unwrap());
        }
        if matches!(phase, Phase::Migrating | Phase::Receiving) {
            let (name, body) = Requests::migration(phase, &self.folder.path().join("peer"));
            drop(self.begin_with(name, body));
        }
        assert_eq!(self.vmm.phase(), phase);
        self
    }

    pub(crate) fn kernel(&self) -> PathBuf {
        self.folder.path().join(Guest::Halt.name())
    }

    /// Without it nothing boots.
    pub(crate) fn hide_kernel(&self) {
        std::fs::remove_file(self.kernel()).unwrap();
    }

    /// Sends a request; its outcome may come later.
    pub(crate) fn begin(&mut self, name: &str) -> mpsc::Receiver<Outcome> {
        let body = self.requests().body(name);
        self.begin_with(name, body)
    }

    pub(crate) fn requests(&self) -> Requests {
        Requests::new(&self.kernel(), self.folder.path().join("disk"), self.serial)
    }

    /// Makes the snapshot that a restore is from, and removes its VM.
    pub(crate) fn save(&mut self) {
        for name in ["vm.create", "vm.boot", "vm.pause"] {
            self.ask(name).unwrap();
        }
        let body = self.requests().save();
        let saved = self.begin_with("vm.snapshot", body);
        self.wait(&saved).unwrap();
        self.ask("vm.delete").unwrap();
    }

    pub(crate) fn begin_with(&mut self, name: &str, body: Vec<u8>) -> mpsc::Receiver<Outcome> {
        let (route, method) = (name.replace("set-log", "log"), Requests::method(name));
        let endpoint = TABLE.iter().find(|row| row.name() == route && row.method() == method).unwrap();
        let (sender, outcome) = mpsc::channel();
        let slot = ReplySlot::new(move |outcome| drop(sender.send(outcome)));
        let request = endpoint.prepare(Incoming { body, ..Incoming::default() }, slot).unwrap();
        request.dispatch(&mut self.vmm);
        outcome
    }

    /// Sends a request and does what the control thread does until it is answered.
    pub(crate) fn ask(&mut self, name: &str) -> Outcome {
        let outcome = self.begin(name);
        self.wait(&outcome)
    }

    pub(crate) fn wait(&mut self, outcome: &mpsc::Receiver<Outcome>) -> Outcome {
        let end = Instant::now() + LIMIT;
        loop {
            match outcome.recv_timeout(Duration::from_millis(1)) {
                Ok(outcome) => return outcome,
                Err(_) => assert!(Instant::now() < end, "no answer"),
            }
            self.pump();
        }
    }

    pub(crate) fn pump(&mut self) {
        for message in self.inbox.take_all() {
            self.vmm.machine_says(message);
        }
    }

    /// Until the message that is `wanted` has been taken, and no further.
    pub(crate) fn pump_until(&mut self, wanted: impl Fn(&MachineEvent) -> bool) {
        let end = Instant::now() + LIMIT;
        loop {
            assert!(Instant::now() < end, "it does not come");
            for message in self.inbox.take_all() {
                let is_wanted = wanted(&message.event);
                self.vmm.machine_says(message);
                if is_wanted {
                    return;
                }
            }
        }
    }

    /// Waits for a boot that no client asked for.
    pub(crate) fn end_boot(&mut self) {
        let end = Instant::now() + LIMIT;
        while self.vmm.phase() == Phase::Booting {
            assert!(Instant::now() < end, "the boot does not end");
            std::thread::sleep(Duration::from_millis(1));
            self.pump();
        }
    }

    pub(crate) fn info(&mut self) -> Value {
        serde_json::from_slice(&self.ask("vm.info").unwrap().bytes).unwrap()
    }

    /// How often the event `name` was told.
    pub(crate) fn told(&self, name: &str) -> usize {
        let mut lines = Vec::new();
        self.events.read(1, usize::MAX, &mut lines, None);
        let is_it = |line: &&[u8]| matches!(StreamItem::parse(line).unwrap(), StreamItem::Event(event) if event.name() == name);
        lines.split_inclusive(|byte| *byte == b'\n').filter(is_it).count()
    }

    pub(crate) fn guest_does(&mut self, event: GuestEvent) {
        let machine = self.machine();
        self.machine_does(machine, event);
    }

    /// The number of the machine that was built last.
    pub(crate) fn machine(&self) -> u64 {
        self.vmm.machines()
    }

    pub(crate) fn machine_does(&mut self, machine: u64, event: GuestEvent) {
        let vcpu = |kind| MachineEvent::Vcpu(VcpuEvent { vcpu: 0, kind });
        let event = match event {
            GuestEvent::Reset => MachineEvent::System(SystemEvent::Reset(Cause::I8042)),
            GuestEvent::Shutdown => MachineEvent::System(SystemEvent::Shutdown(Cause::AcpiSleep)),
            GuestEvent::TripleFault => vcpu(VcpuEventKind::TripleFault),
            GuestEvent::Crash => vcpu(VcpuEventKind::InternalError { suberror: 1 }),
            GuestEvent::Panic => MachineEvent::System(SystemEvent::Panicked),
        };
        self.vmm.machine_says(MachineMessage { machine, event });
    }
}
