//! All vCPUs of a VM and their threads.
//!
//! Owned by the thread that owns the VM. To pause, it sends every vCPU an order, kicks it, and then waits
//! for all the answers at once, holding no lock that a vCPU could want.

use std::fmt;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use vmm_device_model::bus::Bus;
use vmm_device_model::metrics::Sample;
use vmm_device_model::thread::{ThreadHook, ThreadKind};
use vmm_hypervisor::state::CpuidEntry;
use vmm_hypervisor::{Hypervisor, HypervisorError, Kick, Vm};

use crate::affinity::CoreScheduling;
use crate::birth::{Birth, End, Newborn, Turn};
use crate::cpuid::Cpuid;
use crate::entry::Entry;
use crate::exits::ExitCounter;
use crate::run::Order;
use crate::state::{StateError, TimeBase, Tsc, VcpuV1, saved_msrs};
use crate::topology::Topology;

/// How long vCPUs may take to obey. A vCPU leaves the guest within microseconds; only a device that
/// blocks in an access, or a host without CPU time, could hold it longer.
const OBEY_TIMEOUT: Duration = Duration::from_secs(10);

/// Longer than anybody waits.
const HOLD: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// What the threads of vCPUs are.
pub const THREAD: ThreadKind = ThreadKind("vcpu");

/// Where a vCPU's exits go. Cheap to clone.
#[derive(Clone)]
pub struct ExitTargets {
    /// Port I/O.
    pub pio: Arc<Bus>,
    /// Memory-mapped I/O.
    pub mmio: Arc<Bus>,
    /// A vCPU ended the interrupt with this vector.
    pub end_of_interrupt: Arc<dyn Fn(u8) + Send + Sync>,
    /// Something ended the guest; called on the vCPU's thread, which then parks.
    pub events: Arc<dyn Fn(VcpuEvent) + Send + Sync>,
}

impl fmt::Debug for ExitTargets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ExitTargets").finish_non_exhaustive()
    }
}

/// A vCPU's thread reports that its guest cannot go on.
#[derive(Debug)]
pub struct VcpuEvent {
    /// Which vCPU.
    pub vcpu: u32,
    /// Why.
    pub kind: VcpuEventKind,
}

/// Why a guest cannot go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VcpuEventKind {
    /// The guest has lost control of itself; on hardware, a reset.
    #[error("triple fault")]
    TripleFault,
    /// The hypervisor reports an event of the guest (KVM_SYSTEM_EVENT_*).
    #[error("system event {0}")]
    SystemEvent(u32),
    /// The hypervisor cannot emulate what the guest does.
    #[error("the hypervisor cannot emulate the guest's instruction (internal error {suberror})")]
    InternalError {
        /// KVM's suberror; 1 is a failed emulation.
        suberror: u32,
    },
    /// The processor refused to enter the guest.
    #[error("the processor refused to enter the guest (reason {reason:#x})")]
    FailedEntry {
        /// Hardware's reason.
        reason: u64,
    },
    /// An exit that this VMM does not know.
    #[error("unexpected exit {0}")]
    UnexpectedExit(String),
    /// The hypervisor failed.
    #[error("the vCPU cannot run")]
    Failed(#[from] HypervisorError),
}

/// What the vCPUs of a VM are made from.
#[derive(Debug, Clone)]
pub struct VcpuSpec {
    /// vCPUs present at boot.
    pub boot: u32,
    /// Their arrangement, up to the most there can be.
    pub topology: Topology,
    /// What CPUID tells them.
    pub cpuid: Cpuid,
    /// The MSRs that make up a vCPU's state; `None` for those that the host lists. A restored guest keeps its own.
    pub msrs: Option<Arc<[u32]>>,
    /// Host CPUs per vCPU; one that is not named runs anywhere.
    pub affinity: Vec<(u32, Vec<usize>)>,
    /// Which of their threads may share a core.
    pub core_scheduling: CoreScheduling,
    /// What their threads go through once their vCPU is set up, before it can run.
    pub threads: Arc<dyn ThreadHook>,
}

/// The vCPUs of a VM. Dropped, it stops them.
#[derive(Debug)]
pub struct VcpuSet {
    threads: Vec<VcpuThread>,
    apic_ids: Vec<u32>,
    msrs: Arc<[u32]>,
    /// What the first was given.
    cpuid: Vec<CpuidEntry>,
    running: bool,
}

#[derive(Debug)]
struct VcpuThread {
    orders: Sender<Order>,
    kick: Arc<dyn Kick>,
    exits: Arc<ExitCounter>,
    #[expect(dead_code, reason = "waits for the thread when it is dropped, after the orders")]
    end: End,
}

/// vCPUs that come into being on their threads. Dropped, it waits for them and lets go of them.
#[derive(Debug)]
pub struct Unfinished {
    threads: Vec<Newborn>,
    apic_ids: Vec<u32>,
    msrs: Arc<[u32]>,
    cpuid: Vec<CpuidEntry>,
}

impl Unfinished {
    /// Waits for the vCPUs, which are then parked. `entry` is where the boot processor starts; `None` where a restore
    /// follows.
    ///
    /// # Errors
    /// A vCPU could not be had; those that could are gone again.
    pub fn finish(self, entry: Option<Entry>) -> Result<VcpuSet, VcpuError> {
        let Self { threads: newborn, apic_ids, msrs, cpuid } = self;
        for (index, thread) in newborn.iter().enumerate() {
            thread.enter_at(entry.filter(|_| index == 0));
        }
        let mut set = VcpuSet { threads: Vec::new(), apic_ids, msrs, cpuid, running: false };
        for thread in newborn {
            let (orders, kick, exits, end) = thread.wait()?;
            set.threads.push(VcpuThread { orders, kick, exits, end });
        }
        Ok(set)
    }
}

/// Keeps vCPUs out of the guest for a while, from any thread. It may outlive them.
pub struct Brake(Vec<(Sender<Order>, Arc<dyn Kick>)>);

impl Brake {
    /// Keeps every vCPU that runs out of the guest for `time`, from now on. All else that is asked of it is done meanwhile.
    pub fn rest(&self, time: Duration) {
        for (orders, kick) in &self.0 {
            // A thread that has ended needs no rest.
            if orders.send(Order::Rest(time)).is_ok() {
                kick.kick();
            }
        }
    }
}

impl fmt::Debug for Brake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Brake of {} vCPUs", self.0.len())
    }
}

impl VcpuThread {
    fn order(&self, order: Order) {
        // A thread that has ended shows as missing in what the caller collects.
        let _ = self.orders.send(order);
        self.kick.kick();
    }
}

impl VcpuSet {
    /// Creates the vCPUs, each on its own thread, parked. `entry` is where the boot processor starts;
    /// `None` where a restore follows.
    ///
    /// # Errors
    /// A vCPU or its thread could not be had; those that could are gone again.
    pub fn create(
        hypervisor: &dyn Hypervisor,
        vm: &Arc<dyn Vm>,
        spec: &VcpuSpec,
        entry: Option<Entry>,
        targets: &ExitTargets,
    ) -> Result<Self, VcpuError> {
        Self::begin(hypervisor, vm, spec, targets)?.finish(entry)
    }

    /// Begins to create them; their threads do it beside what the caller does next.
    ///
    /// # Errors
    /// A thread could not be had; those that could are gone again.
    pub fn begin(
        hypervisor: &dyn Hypervisor,
        vm: &Arc<dyn Vm>,
        spec: &VcpuSpec,
        targets: &ExitTargets,
    ) -> Result<Unfinished, VcpuError> {
        let msrs: Arc<[u32]> = match &spec.msrs {
            Some(saved) => Arc::clone(saved),
            None => saved_msrs(hypervisor.msr_indices()?).into(),
        };
        let apic_ids = (0..spec.boot).map(|index| spec.topology.apic_id(index)).collect();
        let cpuid = spec.cpuid.of(0);
        let mut unfinished = Unfinished { threads: Vec::new(), apic_ids, msrs, cpuid };
        let mut turn = Turn::first();
        for index in 0..spec.boot {
            let (next, after) = turn.then();
            let birth = Birth::new(index, Arc::clone(vm), spec, turn, next);
            unfinished.threads.push(birth.spawn(targets.clone(), Arc::clone(&unfinished.msrs))?);
            turn = after;
        }
        Ok(unfinished)
    }

    /// How many vCPUs there are.
    pub fn len(&self) -> usize {
        self.threads.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.threads.is_empty()
    }

    /// Whether the guest runs.
    pub fn is_running(&self) -> bool {
        self.running
    }

    /// The MSRs that make up a vCPU's state.
    pub fn msrs(&self) -> &[u32] {
        &self.msrs
    }

    /// What CPUID tells the first vCPU. Others differ in what says which one they are.
    pub fn cpuid(&self) -> &[CpuidEntry] {
        &self.cpuid
    }

    /// What slows them down.
    pub fn brake(&self) -> Brake {
        let of = |thread: &VcpuThread| (thread.orders.clone(), Arc::clone(&thread.kick));
        Brake(self.threads.iter().map(of).collect())
    }

    /// Local APIC IDs, by vCPU.
    pub fn apic_ids(&self) -> &[u32] {
        &self.apic_ids
    }

    /// Runs the guest. No effect while it runs, unless it is [held](Self::hold).
    pub fn run(&mut self) {
        self.running = true;
        for thread in &self.threads {
            // Not kicked: whoever parks waits for orders, and who runs already need not stop to be told so.
            let _ = thread.orders.send(Order::Run);
        }
    }

    /// Keeps every vCPU out of the guest until it is told to [run](Self::run), and waits for none: one that waits for memory obeys
    /// when it has that. All else that is asked of them is done meanwhile. No effect on a guest that is paused.
    pub fn hold(&self) {
        for thread in &self.threads {
            thread.order(Order::Rest(HOLD));
        }
    }

    /// Stops running the guest and returns when no vCPU runs any more.
    ///
    /// # Errors
    /// A vCPU did not obey in time; those that did run again, if the guest ran.
    pub fn pause(&mut self) -> Result<(), VcpuError> {
        let (parked, answers) = channel();
        for thread in &self.threads {
            thread.order(Order::Park(parked.clone()));
        }
        drop(parked);
        match collect(&answers, self.threads.len(), |index| *index) {
            Ok(_) => {
                self.running = false;
                Ok(())
            }
            Err(missing) => {
                if self.running {
                    self.run();
                }
                Err(VcpuError::DoesNotObey { vcpu: missing })
            }
        }
    }

    /// The state of every vCPU, in order. The guest is paused.
    ///
    /// # Errors
    /// A vCPU's state could not be had.
    pub fn save(&self) -> Result<Vec<VcpuV1>, VcpuError> {
        let (reply, answers) = channel();
        for thread in &self.threads {
            thread.order(Order::Save(reply.clone()));
        }
        drop(reply);
        let mut states = collect(&answers, self.threads.len(), |answer| answer.0)
            .map_err(|vcpu| VcpuError::DoesNotObey { vcpu })?;
        states.sort_by_key(|(index, _)| *index);
        states
            .into_iter()
            .map(|(vcpu, state)| state.map_err(|source| VcpuError::State { vcpu, source }))
            .collect()
    }

    /// Gives every vCPU its state. The guest is paused, or has not run yet. vCPUs' TSCs differ as they did.
    ///
    /// # Errors
    /// The number of states is not that of vCPUs, or one was refused; the VM is of no use then.
    pub fn restore(&mut self, states: Vec<VcpuV1>, time: TimeBase) -> Result<(), VcpuError> {
        if states.len() != self.threads.len() {
            return Err(VcpuError::Count { states: states.len(), vcpus: self.threads.len() });
        }
        let mut states = states.into_iter();
        let Some(first) = states.next() else { return Ok(()) };
        let (was, tsc) = (first.tsc_offset, first.tsc(time));
        let (first_thread, others) = self.threads.split_at(1);
        let is = restore(0, first_thread, [(first, tsc)])?;
        let others_states = states.map(|state| {
            // The first one's offset has become another, so have the others'.
            let tsc = match (is, was, state.tsc_offset) {
                (Some(is), Some(was), Some(own)) => Tsc::Offset(is.wrapping_add(own.wrapping_sub(was))),
                _ => state.tsc(time),
            };
            (state, tsc)
        });
        restore(1, others, others_states).map(drop)
    }

    /// Raises a non-maskable interrupt on every vCPU. One that does not run takes it when it runs; until then it is part
    /// of its state ([`EventsV1`](crate::state::EventsV1)).
    ///
    /// # Errors
    /// A vCPU does not answer, or its hypervisor refuses; the others have theirs.
    pub fn nmi(&self) -> Result<(), VcpuError> {
        let (reply, answers) = channel();
        for thread in &self.threads {
            thread.order(Order::Nmi(reply.clone()));
        }
        drop(reply);
        let results = collect(&answers, self.threads.len(), |answer| answer.0)
            .map_err(|vcpu| VcpuError::DoesNotObey { vcpu })?;
        results
            .into_iter()
            .try_for_each(|(vcpu, result)| result.map_err(|source| VcpuError::Nmi { vcpu, source }))
    }

    /// Tells every vCPU to stop for good. Dropping does it as well, and waits for them.
    pub fn begin_end(&self) {
        for thread in &self.threads {
            thread.order(Order::Stop);
        }
    }

    /// How often each vCPU left the guest, by reason, since it was created.
    pub fn measure(&self) -> Vec<Sample> {
        (0..).zip(&self.threads).flat_map(|(vcpu, thread)| thread.exits.samples(vcpu)).collect()
    }
}

impl Drop for VcpuSet {
    fn drop(&mut self) {
        self.begin_end();
    }
}

/// Gives vCPUs their states, those from number `first` on. Returns the first one's offset of the TSC, where the host tells.
fn restore(
    first: u32,
    threads: &[VcpuThread],
    states: impl IntoIterator<Item = (VcpuV1, Tsc)>,
) -> Result<Option<u64>, VcpuError> {
    let (reply, answers) = channel();
    for (thread, (state, tsc)) in threads.iter().zip(states) {
        thread.order(Order::Restore(Box::new(state), tsc, reply.clone()));
    }
    drop(reply);
    let results = collect(&answers, threads.len(), |answer| answer.0 - first)
        .map_err(|missing| VcpuError::DoesNotObey { vcpu: first + missing })?;
    let mut offset = None;
    for (vcpu, result) in results {
        let told = result.map_err(|source| VcpuError::State { vcpu, source })?;
        if vcpu == first {
            offset = told;
        }
    }
    Ok(offset)
}

/// Waits for one answer of each vCPU; the error is the first that did not answer.
fn collect<T>(answers: &Receiver<T>, count: usize, index: impl Fn(&T) -> u32) -> Result<Vec<T>, u32> {
    let deadline = Instant::now() + OBEY_TIMEOUT;
    let mut got = Vec::with_capacity(count);
    while got.len() < count {
        match answers.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(answer) => got.push(answer),
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                let missing = (0..).find(|i| !got.iter().any(|g| index(g) == *i));
                return Err(missing.unwrap_or(0));
            }
        }
    }
    Ok(got)
}

/// Something went wrong with the vCPUs.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VcpuError {
    /// A call to the hypervisor failed.
    #[error("cannot create a vCPU")]
    Hypervisor(#[from] HypervisorError),
    /// The thread could not be created.
    #[error("cannot create the thread of vcpu{vcpu}")]
    Thread {
        /// Which vCPU.
        vcpu: u32,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The thread could not be restricted to its host CPUs.
    #[error("cannot set the affinity of vcpu{vcpu}")]
    Affinity {
        /// Which vCPU.
        vcpu: u32,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The thread could not be kept from sharing its core.
    #[error("cannot set core scheduling of vcpu{vcpu}")]
    CoreScheduling {
        /// Which vCPU.
        vcpu: u32,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The thread could not be confined.
    #[error("cannot confine the thread of vcpu{vcpu}")]
    Confine {
        /// Which vCPU.
        vcpu: u32,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// A vCPU did not answer in time.
    #[error("vcpu{vcpu} does not answer")]
    DoesNotObey {
        /// Which vCPU.
        vcpu: u32,
    },
    /// A vCPU's state could not be captured or restored.
    #[error("state of vcpu{vcpu}")]
    State {
        /// Which vCPU.
        vcpu: u32,
        /// Why.
        #[source]
        source: StateError,
    },
    /// A vCPU did not take a non-maskable interrupt.
    #[error("cannot raise an NMI on vcpu{vcpu}")]
    Nmi {
        /// Which vCPU.
        vcpu: u32,
        /// Why.
        #[source]
        source: HypervisorError,
    },
    /// Saved states of another number of vCPUs.
    #[error("{states} saved vCPU states for {vcpus} vCPUs")]
    Count {
        /// Saved states.
        states: usize,
        /// vCPUs of this VM.
        vcpus: usize,
    },
}
