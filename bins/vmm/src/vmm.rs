//! The VMM: the state that the control thread owns, and what clients and guests make it do.

mod inputs;
mod tree;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use log::Level;
use vmm_api::command::{Endpoint, Handle, Host, Replier};
use vmm_api::commands::{self, vm, vmm};
use vmm_api::config::{ConsoleMode, VmConfig};
use vmm_api::error::{ApiError, Code};
use vmm_api::info::{PingReply, VmInfo, VmState};
use vmm_api::spec::MachineSpec;
use vmm_cpu_manager::set::VcpuEventKind;
use vmm_device_model::thread::ThreadHook;
use vmm_epoll::{Control, Mailbox};
use vmm_hypervisor::Hypervisor;
use vmm_platform_devices::events::SystemEvent;
use vmm_state::{EventCell, GuestEvent, Phase, VmSlot, on_guest_event};

use crate::console::{Console, ConsoleError, Consoles};
use crate::exit::ExitCode;
use crate::machine::{EventPost, Machine, MachineError, MachineEvent, MachineMessage, Ports};
use crate::sandbox::Sandbox;
use crate::sandbox::landlock::LandlockError;
use inputs::Inputs;

/// The commands that this VMM carries out.
pub static TABLE: [Endpoint<Vmm>; 10] = commands::table();

/// A VM's configuration, and what outlives its machine.
#[derive(Debug)]
pub struct Configured {
    wire: VmConfig,
    spec: MachineSpec,
    /// Open since the first boot that succeeded.
    consoles: Option<Consoles>,
    told: Told,
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
    hypervisor: Arc<dyn Hypervisor>,
    slot: VmSlot<Configured, Machine>,
    post: Mailbox<MachineMessage>,
    /// Machines built so far.
    machines: u64,
    /// What the guest did first while it was being paused; its machine does not outlive that.
    deferred: Option<GuestEvent>,
    inputs: Inputs,
    ending: Option<ExitCode>,
    policy: Policy,
    sandbox: Sandbox,
}

/// How the VMM behaves, for its whole life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Policy {
    /// Clients can reach it: a VM that does not come back from a reset of its own is theirs to look after.
    /// Without clients the process ends.
    pub serves_clients: bool,
    /// Every pause saves, resets, restores and compares all state.
    pub verify_state: bool,
}

impl Vmm {
    /// A VMM without a VM. Machines post their events to `post`.
    pub fn new(hypervisor: Arc<dyn Hypervisor>, post: Mailbox<MachineMessage>, policy: Policy) -> Self {
        Self {
            hypervisor,
            slot: VmSlot::Empty,
            post,
            machines: 0,
            deferred: None,
            inputs: Inputs::default(),
            ending: None,
            policy,
            sandbox: Sandbox::default(),
        }
    }

    /// The same, in a sandbox.
    #[must_use]
    pub fn confined(self, sandbox: Sandbox) -> Self {
        Self { sandbox, ..self }
    }

    /// Why the process is to end, if it is.
    pub fn ending(&self) -> Option<ExitCode> {
        self.ending
    }

    /// Ends the process: the VM is switched off.
    pub fn end(&mut self, code: ExitCode) {
        self.remove();
        self.ending.get_or_insert(code);
    }

    /// Takes a configuration; there is no VM yet.
    pub fn create(&mut self, wire: VmConfig, spec: MachineSpec) {
        for warning in &spec.warnings {
            log::warn!("{warning}");
        }
        if self.slot.create(Configured { wire, spec, consoles: None, told: Told::default() }).is_err() {
            log::error!("a VM exists already");
        }
    }

    /// Boots the VM that is configured.
    ///
    /// # Errors
    /// The machine cannot be built; the VM is as it was.
    pub fn boot(&mut self) -> Result<(), VmmError> {
        self.try_boot().map_err(|error| match self.sandbox.may_have_refused(&error) {
            true => VmmError::Refused { source: Box::new(error) },
            false => error,
        })
    }

    fn try_boot(&mut self) -> Result<(), VmmError> {
        self.machines += 1;
        let post = EventPost { machine: self.machines, mailbox: self.post.clone() };
        let configured = self.slot.config_mut().ok_or(VmmError::NoVm)?;
        let confined = self.sandbox.confine_paths(&configured.spec);
        let threads = self.sandbox.threads();
        let (mut machine, consoles) = configured.build(&*self.hypervisor, &post, threads)?;
        // Without one of its paths the machine was not built, which said more of the reason.
        confined?;
        consoles.attach();
        machine.start();
        self.inputs.want(consoles);
        self.slot.start(machine).map_err(|_| VmmError::NoVm)?;
        log::info!("the VM runs");
        Ok(())
    }

    /// Stops the guest; what it did meanwhile waits.
    fn pause(&mut self) -> Result<(), VmmError> {
        let machine = self.slot.machine_mut().ok_or(VmmError::NoVm)?;
        machine.pause()?;
        if self.policy.verify_state
            && let Err(error) = machine.save_reset_restore()
        {
            // What is left of the machine is of no use.
            self.stop();
            return Err(error.into());
        }
        self.slot.pause().map_err(|_| VmmError::NoVm)
    }

    fn resume(&mut self) -> Result<(), VmmError> {
        self.slot.machine_mut().ok_or(VmmError::NoVm)?.resume()?;
        self.slot.resume().map_err(|_| VmmError::NoVm)?;
        if let Some(event) = self.deferred.take() {
            self.guest_did(event);
        }
        Ok(())
    }

    /// Switches the machine off; the configuration and the consoles stay, the user's terminal is given back.
    fn stop(&mut self) {
        self.drop_machine();
        if let Some(consoles) = self.slot.config_mut().and_then(|c| c.consoles.as_mut()) {
            consoles.detach();
        }
    }

    fn drop_machine(&mut self) {
        self.deferred = None;
        drop(self.slot.stop());
    }

    /// Removes the VM, consoles and all.
    fn remove(&mut self) {
        self.stop();
        self.inputs.drop_all();
        self.slot.clear();
    }

    /// The consoles go from one machine to the next; if there is no next one, they are given back.
    fn reboot(&mut self) -> Result<(), VmmError> {
        self.drop_machine();
        self.boot()
    }

    fn guest_did(&mut self, event: GuestEvent) {
        match on_guest_event(self.slot.phase(), event) {
            EventCell::Ignore => {}
            EventCell::Defer => {
                self.deferred.get_or_insert(event);
            }
            EventCell::Run(_) => match event {
                GuestEvent::Reset | GuestEvent::TripleFault => {
                    log::info!("the guest resets");
                    if let Err(error) = self.reboot() {
                        log::error!("the VM does not come back: {}", crate::exit::chain(&error));
                        if !self.policy.serves_clients {
                            self.end(ExitCode::VmmError);
                        }
                    }
                }
                GuestEvent::Shutdown => {
                    log::info!("the guest switched itself off");
                    self.stop();
                    self.end(ExitCode::Success);
                }
                GuestEvent::Crash => {
                    self.stop();
                    self.end(ExitCode::GuestCrashed);
                }
            },
        }
    }

    /// A machine's thread tells something.
    pub fn machine_says(&mut self, message: MachineMessage) {
        let MachineMessage { machine, event } = message;
        let Some((configured, current)) = self.slot.parts_mut() else { return };
        if current.number() != machine {
            return;
        }
        match event {
            MachineEvent::Vcpu(event) => {
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
                    _ => {}
                }
            }
            MachineEvent::Attention { device, pending } => {
                pending.store(false, Ordering::SeqCst);
                if let Err(error) = current.service(&device) {
                    let level = configured.told.level(&device);
                    log::log!(level, "{}", crate::exit::chain(&error));
                }
            }
        }
    }

    /// Brings the control loop's sources in line with the state; after every handler.
    pub fn settle(&mut self, control: &mut Control<'_, Self>) {
        Inputs::settle(self, control);
        if self.ending.is_some() {
            control.stop();
        }
    }

    fn info(&self) -> Result<VmInfo, ApiError> {
        let none = || ApiError::new(Code::NoVm, "there is no VM");
        let configured = self.slot.config().ok_or_else(none)?;
        let state = VmState::from_phase(self.slot.phase()).ok_or_else(none)?;
        let machine = self.slot.machine();
        Ok(VmInfo {
            config: configured.shown(),
            state,
            memory_actual_size: machine
                .map_or_else(|| configured.spec.memory.total().get(), Machine::memory_size),
            device_tree: machine.map(|machine| tree::wire(&machine.nodes())),
        })
    }
}

impl Configured {
    /// Builds a machine on the consoles, which are opened if they are not yet. If that fails they are as before.
    fn build(
        &mut self,
        hypervisor: &dyn Hypervisor,
        post: &EventPost,
        threads: &Arc<dyn ThreadHook>,
    ) -> Result<(Machine, &mut Consoles), VmmError> {
        let (mut consoles, fresh) = match self.consoles.take() {
            Some(consoles) => (consoles, false),
            None => (Consoles::open(&self.spec, threads)?, true),
        };
        let end = |console: &Option<Console>| console.as_ref().map(Console::end);
        let ports = Ports {
            serial: end(&consoles.serial),
            console: end(&consoles.console),
            debug: end(&consoles.debug),
        };
        match Machine::build(hypervisor, &self.spec, &ports, post, threads) {
            Ok(machine) => Ok((machine, self.consoles.insert(consoles))),
            Err(error) => {
                consoles.detach();
                self.consoles = (!fresh).then_some(consoles);
                Err(error.into())
            }
        }
    }

    /// The configuration with what only became known at boot: the paths of ptys.
    fn shown(&self) -> VmConfig {
        let mut config = self.wire.clone();
        let path = |console: &Option<Console>| {
            console.as_ref().and_then(Console::pty_path).map(|path| path.display().to_string().into())
        };
        if let Some(consoles) = &self.consoles {
            if config.serial.mode == ConsoleMode::Pty {
                config.serial.file = path(&consoles.serial);
            }
            if config.console.mode == ConsoleMode::Pty {
                config.console.file = path(&consoles.console);
            }
        }
        config
    }
}

impl Host for Vmm {
    fn phase(&self) -> Phase {
        self.slot.phase()
    }
}

/// A command whose work is one fallible step.
macro_rules! handle {
    ($command:ty, $code:ident, |$vmm:ident| $work:expr) => {
        impl Handle<$command> for Vmm {
            fn handle(&mut self, (): (), replier: Replier<()>) {
                let $vmm = self;
                let result: Result<(), VmmError> = $work;
                replier.reply(result.map_err(|error| ApiError::from_error(Code::$code, &error)));
            }
        }
    };
}

handle!(vm::Boot, BootFailed, |vmm| if vmm.phase() == Phase::Paused { vmm.resume() } else { vmm.boot() });
handle!(vm::Pause, Internal, |vmm| vmm.pause());
handle!(vm::Resume, Internal, |vmm| vmm.resume());
handle!(vm::Reboot, BootFailed, |vmm| vmm.reboot());
handle!(vm::Shutdown, Internal, |vmm| {
    vmm.stop();
    Ok(())
});
handle!(vm::Delete, Internal, |vmm| {
    vmm.remove();
    Ok(())
});
handle!(vmm::Shutdown, Internal, |vmm| {
    vmm.end(ExitCode::Success);
    Ok(())
});

impl Handle<vmm::Ping> for Vmm {
    fn handle(&mut self, (): (), replier: Replier<PingReply>) {
        let version = env!("CARGO_PKG_VERSION").to_owned();
        replier.reply(Ok(PingReply {
            build_version: format!("v{version}"),
            version,
            pid: std::process::id().into(),
            features: Vec::new(),
        }));
    }
}

impl Handle<vm::Create> for Vmm {
    fn handle(&mut self, request: vm::CreateRequest, replier: Replier<()>) {
        self.create(request.config, request.spec);
        replier.reply(Ok(()));
    }
}

impl Handle<vm::Info> for Vmm {
    fn handle(&mut self, (): (), replier: Replier<VmInfo>) {
        replier.reply(self.info());
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
}
