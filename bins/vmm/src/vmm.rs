//! The VMM: the state that the control thread owns, and what clients and guests make it do.

mod apart;
mod boot;
mod filling;
mod freezing;
mod guest;
mod handlers;
mod inputs;
mod moving;
mod receiving;
mod restore;
mod saving;
mod sending;
mod served;
mod teardown;
mod told;
mod tracks;
mod tree;
mod waiting;
pub(crate) mod writer;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use log::Level;
use vmm_api::command::Endpoint;
use vmm_api::commands::{self, COUNT};
use vmm_api::config::{ConsoleMode, VmConfig};
use vmm_api::error::{ApiError, Code};
use vmm_api::events::{Event, PanicEvent};
use vmm_api::info::{RestoredFrom, VmInfo, VmState};
use vmm_api::spec::{Checked, MachineSpec};
use vmm_cpu_manager::set::VcpuEventKind;
use vmm_epoll::{Control, Mailbox};
use vmm_hypervisor::Hypervisor;
use vmm_platform_devices::events::SystemEvent;
use vmm_platform_devices::vm_generation::GenerationId;
use vmm_state::{Action, GuestEvent, Phase, Reactions, Reason, Refusal, VmSlot};

use crate::console::{Console, ConsoleError, Consoles};
use crate::events::{Events, NO_MACHINE};
use crate::exit::ExitCode;
use crate::lost_memory;
use crate::machine::{Machine, MachineError, MachineEvent, MachineMessage};
use crate::migration::{ReceiveError, SendError};
use crate::sandbox::Sandbox;
use crate::sandbox::landlock::LandlockError;
pub(crate) use apart::PATIENCE;
use boot::Boot;
use inputs::Inputs;
pub use restore::{LoadError, Loaded};
use saving::Saving;
use served::Served;
pub use tracks::TrackError;
use tracks::Tracks;
pub use writer::{SaveError, SaveStep};

/// The commands that this VMM carries out.
pub static TABLE: [Endpoint<Vmm>; COUNT] = commands::table();

/// A VM's configuration, and what outlives its machine.
#[derive(Debug)]
pub struct Configured {
    wire: Arc<VmConfig>,
    spec: Arc<MachineSpec>,
    /// Open since the first boot that succeeded.
    consoles: Option<Consoles>,
    told: Told,
    /// How often a machine has started.
    boots: u64,
    /// What the guest did to its machine last.
    last_event: Option<GuestEvent>,
    /// Its generation ID, once it has one: it stays the same guest, whatever machine it runs on.
    generation: Option<GenerationId>,
    /// The snapshot that it was made of.
    restored_from: Option<RestoredFrom>,
}

/// What the log says of a guest's misbehaviour already: a guest cannot fill it.
#[derive(Debug, Default)]
struct Told(BTreeSet<String>);

impl Told {
    /// An error where nothing was said of `what` yet, else a level that is not shown by default.
    fn level(&mut self, what: &str) -> Level {
        if self.0.insert(what.to_owned()) { Level::Error } else { Level::Debug }
    }
}

/// The VMM's state, owned by the control thread.
#[derive(Debug)]
pub struct Vmm {
    means: Means,
    slot: VmSlot<Configured, Machine>,
    boot: Boot,
    jobs: Jobs,
    /// What the guest did while it was paused; its machine does not outlive that.
    deferred: Vec<GuestEvent>,
    inputs: Inputs,
    ending: Option<ExitCode>,
    policy: Policy,
    served: Served,
    events: Events,
}

/// What machines and threads are made with.
#[derive(Debug)]
struct Means {
    hypervisor: Arc<dyn Hypervisor>,
    /// Where they tell what happens.
    post: Mailbox<MachineMessage>,
    sandbox: Sandbox,
}

/// Work that goes on beside the control thread, and what it leaves behind.
#[derive(Debug, Default)]
struct Jobs {
    saving: Saving,
    send: Option<sending::Job>,
    receive: receiving::Receiving,
    moving: moving::Moving,
}

/// How the VMM behaves, for its whole life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Policy {
    /// Clients can reach it: a VM that does not come back from a reset of its own is theirs to look after, and they are
    /// served while a machine is built. Without clients the process ends.
    pub serves_clients: bool,
    /// Every pause saves, resets, restores and compares all state.
    pub verify_state: bool,
    /// What follows a guest event.
    pub reactions: Reactions,
}

impl Vmm {
    /// A VMM without a VM. Machines post their events to `post`; what happens is told to `events`.
    pub fn new(
        hypervisor: Arc<dyn Hypervisor>,
        post: Mailbox<MachineMessage>,
        policy: Policy,
        events: Events,
    ) -> Self {
        Self {
            means: Means { hypervisor, post, sandbox: Sandbox::default() },
            slot: VmSlot::Empty,
            boot: Boot::default(),
            jobs: Jobs::default(),
            deferred: Vec::new(),
            inputs: Inputs::default(),
            ending: None,
            policy,
            served: Served::default(),
            events,
        }
    }

    /// The same, in a sandbox.
    #[must_use]
    pub fn confined(self, sandbox: Sandbox) -> Self {
        Self { means: Means { sandbox, ..self.means }, ..self }
    }

    /// Why the process is to end, if it is.
    pub fn ending(&self) -> Option<ExitCode> {
        self.ending
    }

    /// Number of the machine that was built last; 0 before the first.
    pub fn machines(&self) -> u64 {
        self.boot.machines
    }

    /// Ends the process: the VM is switched off.
    pub fn end(&mut self, code: ExitCode) {
        let owes = self.owes();
        if let Some(bytes) = owes {
            let has_not = "it has not said that it has all of its memory";
            log::error!("the guest at the destination is lost: {has_not}, of which {bytes} bytes were here");
        }
        if self.jobs.receive.filling.is_none() {
            self.give_up_receive();
        }
        let lost = self.end_filling();
        // Of a boot under way nothing outlasts the process.
        drop(self.give_up_boot(VmmError::Removed));
        self.remove();
        self.boot.before.wait();
        // A guest's end may want memory that is to come.
        self.give_up_receive();
        let code = if lost || owes.is_some() { ExitCode::LostMemory } else { code };
        if self.ending.is_none() {
            self.events.tell(NO_MACHINE, &Event::VmmShutdown);
        }
        self.ending.get_or_insert(code);
    }

    /// Takes a configuration; there is no VM yet.
    pub fn create(&mut self, checked: Checked) {
        warn(&checked.spec);
        if self.slot.create(Configured::new(checked)).is_err() {
            return log::error!("a VM exists already");
        }
        self.events.tell(NO_MACHINE, &Event::Created);
    }

    /// Stops the guest; what it did meanwhile waits.
    fn pause(&mut self) -> Result<(), VmmError> {
        self.note(&Event::Pausing);
        let machine = self.slot.machine_mut().ok_or(VmmError::NoVm)?;
        machine.pause()?;
        if self.policy.verify_state
            && let Err(error) = machine.save_reset_restore()
        {
            // What is left of the machine is of no use.
            self.stop();
            return Err(error.into());
        }
        self.slot.pause().map_err(|_| VmmError::NoVm)?;
        self.note(&Event::Paused);
        Ok(())
    }

    fn resume(&mut self) -> Result<(), VmmError> {
        self.note(&Event::Resuming);
        let machine = self.slot.machine_mut().ok_or(VmmError::NoVm)?;
        // A migration that failed may not have got them back.
        machine.take_disks()?;
        let resumed = machine.resume();
        told::changes(&self.events, machine);
        resumed?;
        self.slot.resume().map_err(|_| VmmError::NoVm)?;
        self.note(&Event::Resumed);
        self.catch_up();
        Ok(())
    }

    fn raise_nmi(&self) -> Result<(), VmmError> {
        Ok(self.slot.machine().ok_or(VmmError::NoVm)?.nmi()?)
    }

    /// Tells what happens to the machine that is there.
    fn note(&self, event: &Event) {
        self.events.tell(self.slot.machine().map_or(NO_MACHINE, Machine::number), event);
    }

    fn press_power_button(&self) -> Result<(), VmmError> {
        match self.slot.machine() {
            Some(machine) if machine.power_button() => Ok(()),
            Some(_) => Err(VmmError::NoPowerButton),
            None => Err(VmmError::NoVm),
        }
    }

    /// Switches the machine off; the configuration and the consoles stay, the user's terminal is given back.
    fn stop(&mut self) {
        self.stop_then(|| ());
    }

    /// The same; `done` is called when nothing is left of the machine.
    fn stop_then(&mut self, done: impl FnOnce() + Send + 'static) {
        let number = self.slot.machine().map(Machine::number);
        self.drop_machine(done);
        if let Some(consoles) = self.slot.config_mut().and_then(|c| c.consoles.as_mut()) {
            consoles.detach();
        }
        if let Some(number) = number {
            self.events.tell(number, &Event::Shutdown);
        }
    }

    fn drop_machine(&mut self, done: impl FnOnce() + Send + 'static) {
        self.deferred.clear();
        self.jobs.saving.tracks = Tracks::default();
        lost_memory::watch(Vec::new());
        match self.slot.stop() {
            Some(machine) if self.policy.serves_clients => self.boot.before.begin(machine, done),
            machine => {
                machine.into_iter().for_each(Machine::end);
                done();
            }
        }
    }

    /// Removes the VM, consoles and all.
    fn remove(&mut self) {
        self.remove_then(|| ());
    }

    /// The same; `done` is called when nothing is left of the machine.
    fn remove_then(&mut self, done: impl FnOnce() + Send + 'static) {
        let left = self.give_up_boot(VmmError::Removed);
        // Requests that are dropped are answered with an error.
        self.boot.waiting.clear();
        self.give_up_save();
        self.give_up_send();
        match left {
            Some(left) => {
                self.stop();
                self.boot.before.outlast(left, done);
            }
            None => self.stop_then(done),
        }
        self.inputs.drop_all();
        if let (Some(_), _) = self.slot.clear() {
            self.events.tell(NO_MACHINE, &Event::Deleted);
        }
    }

    /// A machine's thread tells something.
    pub fn machine_says(&mut self, message: MachineMessage) {
        let MachineMessage { machine, event } = message;
        if matches!(event, MachineEvent::Made) {
            return self.made(machine);
        }
        if let MachineEvent::Receive(step) = event {
            return self.receive_says(machine, *step);
        }
        let Some((configured, current)) = self.slot.parts_mut() else { return };
        if current.number() != machine {
            return;
        }
        // While the VM is paused, what its guest does again is not told again.
        if let Some((_, exit)) = told::exit(&event).filter(|(what, _)| !self.deferred.contains(what)) {
            self.events.tell(machine, &exit);
        }
        match event {
            MachineEvent::Vcpu(event) => {
                if let Some(path) = lost_memory::shrunk() {
                    log::error!("guest memory is lost: the snapshot's file {} has shrunk", path.display());
                    return self.end(ExitCode::LostMemory);
                }
                let (what, level) = match &event.kind {
                    VcpuEventKind::TripleFault => {
                        (GuestEvent::TripleFault, configured.told.level("triple fault"))
                    }
                    _ => (GuestEvent::Crash, Level::Error),
                };
                log::log!(level, "vcpu{}: {}", event.vcpu, crate::exit::chain(&event.kind));
                self.guest_did(what);
            }
            MachineEvent::System(event) => {
                log::debug!("the guest asks: {event}");
                match event {
                    SystemEvent::Reset(_) => self.guest_did(GuestEvent::Reset),
                    SystemEvent::Shutdown(_) => self.guest_did(GuestEvent::Shutdown),
                    SystemEvent::Panicked => {
                        // A guest can say so again and again.
                        if configured.last_event != Some(GuestEvent::Panic) {
                            log::log!(configured.told.level("panic"), "the guest reports a {event}");
                            self.events.tell(machine, &Event::GuestPanic { event: PanicEvent::Panic });
                        }
                        self.guest_did(GuestEvent::Panic);
                    }
                    // Its crash kernel goes on; ending the guest would end that, too.
                    SystemEvent::CrashLoaded => {
                        let level = configured.told.level("crash kernel");
                        log::log!(level, "the guest reports a {event}");
                        if level == Level::Error {
                            self.events.tell(machine, &Event::GuestPanic { event: PanicEvent::CrashLoaded });
                        }
                    }
                    _ => {}
                }
            }
            MachineEvent::Attention { device, pending } => {
                pending.store(false, Ordering::SeqCst);
                let serviced = current.service(&device);
                told::changes(&self.events, current);
                if let Err(error) = serviced {
                    let level = configured.told.level(&device);
                    log::log!(level, "{}", crate::exit::chain(&error));
                }
            }
            MachineEvent::Save(step) => self.save_says(*step),
            MachineEvent::Send(step) => self.send_says(*step),
            MachineEvent::Made | MachineEvent::Receive(_) => {}
        }
    }

    /// Brings the control loop's sources in line with the state; after every handler.
    pub fn settle(&mut self, control: &mut Control<'_, Self>) {
        Inputs::settle(self, control);
        self.post_info();
        if self.ending.is_some() {
            control.stop();
        }
    }

    fn info(&self) -> Result<VmInfo, ApiError> {
        let configured = self.slot.config().ok_or_else(|| not_yet(self.slot.phase()))?;
        let state = VmState::from_phase(self.slot.shown()).ok_or_else(no_vm)?;
        let machine = self.slot.machine();
        Ok(VmInfo {
            config: configured.shown(),
            state,
            memory_actual_size: machine
                .map_or_else(|| configured.spec.memory.total().get(), Machine::memory_size),
            device_tree: machine.map(|machine| tree::wire(machine.nodes())),
            phase: self.slot.phase().to_string(),
            boots: configured.boots,
            last_guest_event: configured.last_event.map(|event| event.to_string()),
            restored_from: configured.restored_from.clone(),
        })
    }
}

fn no_vm() -> ApiError {
    ApiError::new(Code::NoVm, "there is no VM")
}

/// There is nothing to tell of the VM of a restore before its configuration is read.
fn not_yet(phase: Phase) -> ApiError {
    let action = Action::Info;
    let allowed = action.allowed().iter().filter(|other| *other != phase).collect();
    Refusal { action, phase, reason: Reason::NoVm, allowed }.into()
}

fn warn(spec: &MachineSpec) {
    for warning in &spec.warnings {
        log::warn!("{warning}");
    }
}

impl Configured {
    fn new(Checked { config, spec }: Checked) -> Self {
        Self {
            wire: Arc::new(config),
            spec: Arc::new(spec),
            consoles: None,
            told: Told::default(),
            boots: 0,
            last_event: None,
            generation: None,
            restored_from: None,
        }
    }

    /// Takes an edited configuration; there is no machine.
    fn edit(&mut self, Checked { config, spec }: Checked) {
        warn(&spec);
        self.wire = Arc::new(config);
        self.spec = Arc::new(spec);
    }

    /// The configuration with what only became known at boot: the paths of ptys.
    fn shown(&self) -> Arc<VmConfig> {
        let path = |console: &Option<Console>| {
            console.as_ref().and_then(Console::pty_path).map(|path| path.display().to_string().into())
        };
        let Some(consoles) = &self.consoles else { return Arc::clone(&self.wire) };
        let mut shown = Arc::clone(&self.wire);
        if self.wire.serial.mode == ConsoleMode::Pty {
            Arc::make_mut(&mut shown).serial.file = path(&consoles.serial);
        }
        if self.wire.console.mode == ConsoleMode::Pty {
            Arc::make_mut(&mut shown).console.file = path(&consoles.console);
        }
        if self.wire.debug_console.mode == ConsoleMode::Pty {
            Arc::make_mut(&mut shown).debug_console.file = path(&consoles.debug);
        }
        shown
    }
}

impl From<LoadError> for VmmError {
    fn from(error: LoadError) -> Self {
        Self::Load(Box::new(error))
    }
}

impl VmmError {
    /// The same, as the failure of a restore.
    fn restoring(self) -> Self {
        match self {
            Self::Load(_) | Self::Restore { .. } => self,
            other => Self::Restore { source: Box::new(other) },
        }
    }

    /// Whether a client wanted it to be so: it was cancelled, or the VM removed.
    fn is_wanted(&self) -> bool {
        match self {
            Self::Cancelled | Self::Removed => true,
            Self::Restore { source } => source.is_wanted(),
            _ => false,
        }
    }
}

/// A command failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VmmError {
    /// There is nothing to act on; admission keeps this from happening.
    #[error("there is no VM")]
    NoVm,
    /// The paths of the VM cannot be confined.
    #[error("cannot confine the VM's paths")]
    Landlock(#[from] LandlockError),
    /// A path was refused while Landlock is in force.
    #[error("landlock confines this process to the paths of its VM's first boot (see docs/security.md)")]
    Refused {
        /// What was refused.
        #[source]
        source: Box<VmmError>,
    },
    /// The consoles cannot be opened.
    #[error("consoles")]
    Console(#[from] ConsoleError),
    /// The machine.
    #[error("the VM's machine")]
    Machine(#[from] MachineError),
    /// The thread that builds a machine cannot be started.
    #[error("cannot start the boot thread")]
    Thread(#[source] std::io::Error),
    /// The snapshot.
    #[error("the snapshot was not taken")]
    Snapshot(#[source] Box<SaveError>),
    /// The snapshot cannot be read, or says what cannot be.
    #[error("no VM can be made of the snapshot")]
    Load(#[source] Box<LoadError>),
    /// The VM cannot be restored.
    #[error("the VM cannot be restored")]
    Restore {
        /// Why.
        #[source]
        source: Box<VmmError>,
    },
    /// The VM is not given away.
    #[error("the VM is not given away")]
    Send(#[source] Box<SendError>),
    /// No VM is received.
    #[error("no VM is received")]
    Receive(#[source] Box<ReceiveError>),
    /// A client did not want to wait for the end of a boot or restore.
    #[error("it was cancelled")]
    Cancelled,
    /// The VM was removed before that.
    #[error("the VM was removed while it was booting")]
    Removed,
    /// The VM that arrived stays where it was.
    #[error("the migration was given up")]
    GivenUp,
    /// The machine has no device to tell the guest by.
    #[error("the machine has no power button")]
    NoPowerButton,
}
