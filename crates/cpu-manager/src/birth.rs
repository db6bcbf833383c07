//! How a vCPU comes into being, on its own thread: KVM is fastest when the same thread makes all the calls.
//!
//! The threads begin at once. Each takes its turn to create its vCPU, in their order, and then goes on beside the others;
//! the entry point comes when it is known.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use vmm_device_model::thread::ThreadHook;
use vmm_hypervisor::state::CpuidEntry;
use vmm_hypervisor::{Kick, Vcpu, Vm};

use crate::affinity::{CoreScheduling, pin_current_thread, thread_id};
use crate::entry::{Entry, enter, set_up};
use crate::exits::ExitCounter;
use crate::run::{Order, Runner};
use crate::set::{ExitTargets, THREAD, VcpuError, VcpuSpec};

/// When a thread may create its vCPU: when the one before has, whose message names the first thread. Nobody is before
/// the first.
pub(crate) struct Turn(Option<Receiver<libc::pid_t>>);

impl Turn {
    pub(crate) fn first() -> Self {
        Self(None)
    }

    /// What ends this turn, and the turn that then begins.
    pub(crate) fn then(&self) -> (Sender<libc::pid_t>, Self) {
        let (next, turn) = channel();
        (next, Self(Some(turn)))
    }

    /// Waits for it; the first thread, if that is another. `None`: a vCPU before this one could not be had.
    fn wait(self) -> Option<Option<libc::pid_t>> {
        self.0.map_or(Some(None), |before| before.recv().ok().map(Some))
    }
}

/// What a vCPU is made from.
pub(crate) struct Birth {
    index: u32,
    vm: Arc<dyn Vm>,
    apic_id: u32,
    cpuid: Vec<CpuidEntry>,
    cpus: Option<Vec<usize>>,
    core_scheduling: CoreScheduling,
    hook: Arc<dyn ThreadHook>,
    turn: Turn,
    next: Sender<libc::pid_t>,
}

/// A vCPU that does not run yet, and its kick.
type Created = (Box<dyn Vcpu>, Arc<dyn Kick>);

impl Birth {
    pub(crate) fn new(
        index: u32,
        vm: Arc<dyn Vm>,
        spec: &VcpuSpec,
        turn: Turn,
        next: Sender<libc::pid_t>,
    ) -> Self {
        Self {
            index,
            vm,
            apic_id: spec.topology.apic_id(index),
            cpuid: spec.cpuid.of(index),
            cpus: spec.affinity.iter().find(|(vcpu, _)| *vcpu == index).map(|(_, cpus)| cpus.clone()),
            core_scheduling: spec.core_scheduling,
            hook: Arc::clone(&spec.threads),
            turn,
            next,
        }
    }

    pub(crate) fn spawn(self, targets: ExitTargets, msrs: Arc<[u32]>) -> Result<Newborn, VcpuError> {
        let vcpu = self.index;
        let (orders, inbox) = channel();
        let (entry, entered) = channel();
        let (ready, started) = channel();
        let exits = Arc::<ExitCounter>::default();
        let counted = Arc::clone(&exits);
        let main = move || {
            let (index, cpuid) = (self.index, self.cpuid.clone());
            match self.create(&entered) {
                Ok(Some((vcpu, kick))) => {
                    let _ = ready.send(Ok(kick));
                    drop(ready);
                    let owed = Vec::new();
                    Runner { index, vcpu, cpuid, targets, orders: inbox, msrs, exits: counted, owed }.main();
                }
                // Nobody wants it any more.
                Ok(None) => {}
                Err(error) => {
                    let _ = ready.send(Err(error));
                }
            }
        };
        let thread = std::thread::Builder::new().name(format!("vcpu{vcpu}"));
        let handle = thread.spawn(main).map_err(|source| VcpuError::Thread { vcpu, source })?;
        Ok(Newborn { vcpu, orders, entry, started, exits, end: End(Some(handle)) })
    }

    fn create(self, entered: &Receiver<Option<Entry>>) -> Result<Option<Created>, VcpuError> {
        let Self { index, vm, apic_id, cpuid, cpus, core_scheduling, hook, turn, next } = self;
        if let Some(cpus) = cpus {
            pin_current_thread(&cpus).map_err(|source| VcpuError::Affinity { vcpu: index, source })?;
        }
        let Some(first) = turn.wait() else { return Ok(None) };
        core_scheduling.join(first).map_err(|source| VcpuError::CoreScheduling { vcpu: index, source })?;
        let mut vcpu = vm.create_vcpu(apic_id)?;
        // There may be none.
        let _ = next.send(first.unwrap_or_else(thread_id));
        vcpu.set_cpuid(&cpuid)?;
        set_up(&mut *vcpu)?;
        let kick = vcpu.bind()?;
        hook.begin(THREAD).map_err(|source| VcpuError::Confine { vcpu: index, source })?;
        let Ok(entry) = entered.recv() else { return Ok(None) };
        if let Some(entry) = entry {
            enter(&mut *vcpu, &entry)?;
        }
        Ok(Some((vcpu, kick)))
    }
}

/// A thread that creates its vCPU. Dropped, it waits for it, whose vCPU is then gone.
#[derive(Debug)]
pub(crate) struct Newborn {
    vcpu: u32,
    orders: Sender<Order>,
    entry: Sender<Option<Entry>>,
    started: Receiver<Result<Arc<dyn Kick>, VcpuError>>,
    exits: Arc<ExitCounter>,
    // The last: a thread lives as long as it may be told something.
    end: End,
}

impl Newborn {
    /// Where it starts; `None` for a vCPU that is started by others.
    pub(crate) fn enter_at(&self, entry: Option<Entry>) {
        // A thread that has ended shows in what it tells.
        let _ = self.entry.send(entry);
    }

    /// Waits until the vCPU is there.
    #[expect(clippy::type_complexity, reason = "the parts of a thread of `VcpuSet`")]
    pub(crate) fn wait(self) -> Result<(Sender<Order>, Arc<dyn Kick>, Arc<ExitCounter>, End), VcpuError> {
        let Self { vcpu, orders, entry: _, started, exits, end } = self;
        let kick = started.recv().unwrap_or(Err(VcpuError::DoesNotObey { vcpu }))?;
        Ok((orders, kick, exits, end))
    }
}

/// The end of a thread: waited for when this is dropped.
#[derive(Debug)]
pub(crate) struct End(Option<JoinHandle<()>>);

impl Drop for End {
    fn drop(&mut self) {
        if let Some(thread) = self.0.take() {
            let _ = thread.join();
        }
    }
}
