//! A machine that a guest runs in: the one place where all parts meet.

mod adapters;
pub(crate) mod ahead;
mod counts;
mod kernel;
mod recipes;
mod saved;
pub mod stages;
pub(crate) mod trial;

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm_api::spec::{Backing, CpuSpec, Hugepages, MachineSpec, ZoneSpec};
use vmm_cpu_manager::affinity::CoreScheduling;
use vmm_cpu_manager::compat::Lacks;
use vmm_cpu_manager::cpuid::{Cpuid, CpuidOptions};
use vmm_cpu_manager::entry::Entry;
use vmm_cpu_manager::set::{Brake, ExitTargets, Unfinished, VcpuError, VcpuSet, VcpuSpec};
use vmm_cpu_manager::state::TimeBase;
use vmm_cpu_manager::topology::Topology;
use vmm_device_manager::machine::{Machine as DeviceResources, Parts};
use vmm_device_manager::node::DeviceNode;
use vmm_device_manager::set::{AddError, DeviceSet, RestoreError, StepError};
use vmm_device_manager::tree::DeviceTreeV1;
use vmm_device_model::bus::Bus;
use vmm_device_model::device::DeviceChange;
use vmm_device_model::recipe::BuildError;
use vmm_device_model::thread::ThreadHook;
use vmm_hypervisor::router::InterruptRouter;
use vmm_hypervisor::state::CpuidEntry;
use vmm_hypervisor::{Hypervisor, HypervisorError, Vm, VmOptions};
use vmm_memory_manager::layout;
use vmm_memory_manager::map::MemoryMap;
use vmm_memory_manager::zone::{ZoneConfig, ZoneError, ZoneOptions};
use vmm_pci::host_bridge::HostBridge;
use vmm_pci::windows::Windows;
use vmm_platform_devices::ged::GedEvent;
use vmm_platform_devices::ioapic::{IoApic, PINS};
use vmm_platform_devices::vm_generation::GenerationId;
use vmm_snapshot::{RecordError, SetError};
use vmm_virtio_devices::rng::RngError;

pub use adapters::{EventPost, MachineEvent, MachineMessage};
pub use kernel::BootError;
pub use recipes::{DiskError, Ports};
pub use saved::{ClockChoice, ClockV1, GetMemory, MachineV1, Saved, SavedMemory};

use crate::boot_trace::{BootTrace, Recorder};
use crate::exit::chain;
use crate::lost_memory;
use adapters::{IoApicLines, IoEvents, MsiBlocks, PinRoutes};
use recipes::Ways;
use stages::{Stage, Stages};

/// GSIs that KVM's routing table can hold (KVM_MAX_IRQ_ROUTES).
const GSI_CAPACITY: u32 = 4096;
/// How long devices may take to finish what is in flight when the guest is paused.
const QUIESCE_TIMEOUT: Duration = Duration::from_secs(10);

/// A guest's machine. Dropped, everything of it is gone.
#[derive(Debug)]
pub struct Machine {
    // In the order in which they must go: vCPUs use devices, devices use memory.
    vcpus: VcpuSet,
    devices: DeviceSet,
    memory: MemoryMap,
    ways: Ways,
    vm: Arc<dyn Vm>,
    /// What the guest knows of it.
    identity: MachineV1,
    /// Which guest it is.
    generation: GenerationId,
    number: u64,
    trace: BootTrace,
}

/// What a machine is made from.
#[derive(Clone, Copy)]
pub struct Plan<'a> {
    /// Who runs it.
    pub hypervisor: &'a dyn Hypervisor,
    /// What it is.
    pub spec: &'a MachineSpec,
    /// Where its consoles end.
    pub ports: &'a Ports,
    /// Where it tells what happens.
    pub post: &'a EventPost,
    /// What all its threads begin with.
    pub threads: &'a Arc<dyn ThreadHook>,
    /// When the images of its disks are locked.
    pub locks: Locks,
    /// The guest's generation ID, if it had a machine before that it was booted on; a restored one has its own.
    pub generation: Option<GenerationId>,
}

/// When the images of disks are locked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Locks {
    /// As they are opened.
    Now,
    /// By [`Machine::take_disks`]: another process has them still.
    Later,
}

impl fmt::Debug for Plan<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Plan").field("spec", self.spec).finish_non_exhaustive()
    }
}

/// A machine without vCPUs, or with such as are still being made.
struct Frame {
    // In the order in which they must go: vCPUs use devices, devices use memory.
    vcpus: Option<Unfinished>,
    board: Board,
    ways: Ways,
    memory: MemoryMap,
    recorder: Recorder,
}

/// A VM and the ways into and out of it, on which nobody stands yet.
struct Roads {
    vm: Arc<dyn Vm>,
    pio: Arc<Bus>,
    mmio: Arc<Bus>,
    router: Arc<InterruptRouter>,
    ioapic: Arc<IoApic>,
}

/// Who stands on the address spaces of a machine.
struct Board {
    roads: Roads,
    bridge: Arc<HostBridge>,
    devices: DeviceSet,
}

impl Machine {
    /// Builds a machine and loads what it boots; its vCPUs do not run yet. How long that takes is written into `stages`.
    ///
    /// # Errors
    /// A part cannot be had; nothing is left behind.
    pub fn build(plan: &Plan<'_>, stages: &mut Stages) -> Result<Self, MachineError> {
        let (roads, vcpu_spec, vcpus) = stages.time(Stage::Vm, || {
            let roads = Roads::new(plan.create_vm()?);
            let vcpu_spec = plan.vcpu_spec(None)?;
            // They arise beside all that follows.
            let vcpus = VcpuSet::begin(plan.hypervisor, &roads.vm, &vcpu_spec, &roads.targets(plan.post))?;
            Ok::<_, MachineError>((roads, vcpu_spec, vcpus))
        })?;
        let memory = stages.time(Stage::Memory, || {
            let phys_bits = vcpu_spec.cpuid.phys_bits();
            Ok::<_, MachineError>(MemoryMap::create(Arc::clone(&roads.vm), &plan.zones()?, phys_bits)?)
        })?;
        let frame = Frame::new(plan, roads, memory, Origin::PowerOn(vcpus), stages)?;
        let (entry, generation) = stages.time(Stage::Kernel, || {
            let entry = kernel::load(plan.spec, &frame.memory, &vcpu_spec.topology)?;
            let generation = plan.generation.map_or_else(new_generation, Ok)?;
            frame.ways.generation.begin(&generation).map_err(MachineError::GenerationId)?;
            Ok::<_, MachineError>((entry, generation))
        })?;
        Ok(Self { generation, ..frame.finish(plan, &vcpu_spec, Some(entry), stages)? })
    }

    /// Number of the machine, as in its events.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Guest memory in bytes.
    pub fn memory_size(&self) -> u64 {
        self.memory.size()
    }

    /// Guest memory.
    pub fn memory(&self) -> &MemoryMap {
        &self.memory
    }

    /// Guest memory, to track what changes in it.
    pub fn memory_mut(&mut self) -> &mut MemoryMap {
        &mut self.memory
    }

    /// What CPUID tells its first vCPU.
    pub fn cpuid(&self) -> &[CpuidEntry] {
        self.vcpus.cpuid()
    }

    /// What slows its vCPUs down.
    pub fn brake(&self) -> Brake {
        self.vcpus.brake()
    }

    /// The guest's generation ID.
    pub fn generation(&self) -> GenerationId {
        self.generation
    }

    /// The guest's memory that a restore has written to: where its generation ID is.
    pub fn renewed() -> std::ops::Range<u64> {
        kernel::GENERATION_ID.start..kernel::GENERATION_ID.end()
    }

    /// Bits of the guest's physical addresses.
    pub fn phys_bits(&self) -> u8 {
        self.identity.phys_bits
    }

    /// Gives up the locks of the disks, which stay open; the guest is paused.
    ///
    /// # Errors
    /// The kernel refuses; they are held as before, as far as that goes.
    pub fn release_disks(&mut self) -> Result<(), MachineError> {
        let released = self.ways.disks.iter().try_for_each(|disk| disk.release_lock());
        released.map_err(|error| {
            let _ = self.ways.disks.iter().try_for_each(|disk| disk.reacquire_lock());
            MachineError::Locks(error)
        })
    }

    /// Takes the locks of the disks; those that are held stay so.
    ///
    /// # Errors
    /// Another process has one: none is held then.
    pub fn take_disks(&mut self) -> Result<(), MachineError> {
        let taken = self.ways.disks.iter().try_for_each(|disk| disk.reacquire_lock());
        taken.map_err(|error| {
            for disk in &self.ways.disks {
                let _ = disk.release_lock();
            }
            MachineError::Locks(error)
        })
    }

    /// The device tree.
    pub fn nodes(&self) -> Vec<DeviceNode> {
        self.devices.nodes()
    }

    /// Runs the guest for the first time.
    pub fn start(&mut self) {
        let at = Instant::now();
        self.vcpus.run();
        self.trace.started(at);
    }

    /// What the boot did, and when.
    pub fn boot_trace(&self) -> &BootTrace {
        &self.trace
    }

    /// Stops the guest between two instructions, and devices with nothing in flight.
    ///
    /// # Errors
    /// A vCPU or device does not come to rest; the guest runs on.
    pub fn pause(&mut self) -> Result<(), MachineError> {
        self.vcpus.pause()?;
        self.devices.quiesce(Instant::now() + QUIESCE_TIMEOUT).map_err(|error| {
            self.vcpus.run();
            MachineError::Device(error)
        })
    }

    /// Undoes [`pause`](Self::pause).
    ///
    /// # Errors
    /// A device does not work any more; the guest stays paused.
    pub fn resume(&mut self) -> Result<(), MachineError> {
        if let Err(error) = self.devices.resume() {
            // Those that work would change what is saved of a guest that is paused.
            if let Err(error) = self.devices.quiesce(Instant::now() + QUIESCE_TIMEOUT) {
                log::error!("devices do not rest after a resume that failed: {}", chain(&error));
            }
            return Err(error.into());
        }
        self.vcpus.run();
        Ok(())
    }

    /// Keeps the guest from running, and waits for nobody: its memory may not be there. Devices go on with what they have.
    pub fn hold(&self) {
        self.vcpus.hold();
    }

    /// Undoes [`hold`](Self::hold).
    pub fn let_go(&mut self) {
        self.vcpus.run();
    }

    /// Takes it apart. Nothing waits for memory that is still to be filled from a snapshot, whose file may not answer any more:
    /// it is thrown away.
    pub fn end(mut self) {
        if !self.memory.is_filling() {
            return;
        }
        // A vCPU that waits for memory gets zeroes, and stops before it could use them. A device would carry them to a disk: none
        // is at work by then.
        self.vcpus.begin_end();
        match self.devices.quiesce(Instant::now() + QUIESCE_TIMEOUT) {
            Ok(()) => self.memory.abandon(),
            Err(error) if self.memory.is_awaited() => lost_memory::withheld(&error),
            Err(error) => log::warn!("{}", chain(&error)),
        }
    }

    /// Lets a device do what it asked for.
    ///
    /// # Errors
    /// The device's; the guest sees it in the device's status.
    pub fn service(&mut self, device: &str) -> Result<(), StepError> {
        self.devices.service(device)
    }

    /// What the guest made of its devices since the last call: each with its id.
    pub fn take_changes(&mut self) -> Vec<(String, DeviceChange)> {
        self.devices.take_changes()
    }

    /// Presses the power button. Returns whether the guest can see it.
    pub fn power_button(&self) -> bool {
        self.ways.ged.raise(GedEvent::PowerButton)
    }

    /// Raises a non-maskable interrupt on every vCPU. A paused guest takes it when it goes on; until then it is part of
    /// the saved state.
    ///
    /// # Errors
    /// A vCPU does not answer, or the hypervisor refuses; the others have theirs.
    pub fn nmi(&self) -> Result<(), MachineError> {
        Ok(self.vcpus.nmi()?)
    }

    /// Saves the state of every device and vCPU, resets the devices, restores all of it and compares. The
    /// guest is paused, and does not notice.
    ///
    /// # Errors
    /// Something cannot be saved or restored, or comes back changed. The machine is of no use then.
    pub fn save_reset_restore(&mut self) -> Result<(), MachineError> {
        let devices = self.devices.save()?;
        let vcpus = self.vcpus.save()?;
        self.devices.reset()?;
        self.devices.restore(devices.clone())?;
        self.vcpus.restore(vcpus, TimeBase::SameVm)?;
        if self.devices.save()? != devices {
            return Err(MachineError::Changed);
        }
        Ok(())
    }
}

impl Roads {
    fn new(vm: Arc<dyn Vm>) -> Self {
        let (pio, mmio) = (Arc::new(Bus::new()), Arc::new(Bus::new()));
        let router = InterruptRouter::new(Arc::clone(&vm), PINS.into(), GSI_CAPACITY);
        let ioapic = IoApic::new(Arc::new(PinRoutes(Arc::clone(&router))));
        Self { vm, pio, mmio, router, ioapic }
    }

    /// Where exits of vCPUs go.
    fn targets(&self, post: &EventPost) -> ExitTargets {
        let (events, ioapic) = (post.clone(), Arc::clone(&self.ioapic));
        ExitTargets {
            pio: Arc::clone(&self.pio),
            mmio: Arc::clone(&self.mmio),
            end_of_interrupt: Arc::new(move |vector| ioapic.end_of_interrupt(vector)),
            events: Arc::new(move |event| events.post(MachineEvent::Vcpu(event))),
        }
    }
}

impl Board {
    fn new(
        roads: Roads,
        memory: &MemoryMap,
        post: &EventPost,
        threads: &Arc<dyn ThreadHook>,
    ) -> Result<Self, MachineError> {
        let Roads { vm, pio, mmio, router, ioapic } = &roads;
        let windows = Windows {
            mmio32: layout::MMIO32.start..layout::MMIO32.end(),
            mmio64: memory.layout().mmio64.start..memory.layout().mmio64.end(),
        };
        let doorbells = Arc::new(IoEvents(Arc::clone(vm)));
        let bridge = HostBridge::new(0, Arc::clone(mmio), doorbells, windows.clone());
        let parts = Parts {
            pio: Arc::clone(pio),
            mmio: Arc::clone(mmio),
            memory: memory.dma(),
            lines: Box::new(IoApicLines(Arc::clone(ioapic))),
            msi: Arc::new(MsiBlocks(Arc::clone(router))),
            attentions: Box::new(post.clone()),
            threads: Arc::clone(threads),
            bridge: Arc::clone(&bridge),
            windows,
        };
        let devices = DeviceSet::new(DeviceResources::new(parts)?);
        Ok(Self { roads, bridge, devices })
    }
}

impl Plan<'_> {
    fn create_vm(&self) -> Result<Arc<dyn Vm>, MachineError> {
        let options = VmOptions { ioapic_pins: PINS.into(), tss_address: layout::TSS_ADDRESS };
        Ok(self.hypervisor.create_vm(&options)?)
    }

    /// What the vCPUs are made from; with what CPUID told a restored guest's.
    fn vcpu_spec(&self, saved: Option<Vec<Vec<CpuidEntry>>>) -> Result<VcpuSpec, MachineError> {
        let cpus = &self.spec.cpus;
        let most = self.hypervisor.max_vcpus();
        if cpus.max > most {
            return Err(MachineError::TooManyVcpus { wanted: cpus.max, most });
        }
        let topology = topology(cpus);
        let options = CpuidOptions { topology, max_phys_bits: Some(cpus.max_phys_bits), nested: cpus.nested };
        let cpuid = match saved {
            Some(leaves) => Cpuid::saved(leaves),
            None => Cpuid::new(&self.hypervisor.supported_cpuid()?, &options),
        };
        let affinity = cpus
            .affinity
            .iter()
            .map(|(vcpu, host)| (*vcpu, host.iter().filter_map(|cpu| usize::try_from(*cpu).ok()).collect()))
            .collect();
        let core_scheduling = match cpus.core_scheduling {
            vmm_api::spec::CoreScheduling::Off => CoreScheduling::Off,
            vmm_api::spec::CoreScheduling::Vm => CoreScheduling::Vm,
            vmm_api::spec::CoreScheduling::Vcpu => CoreScheduling::Vcpu,
        };
        let threads = Arc::clone(self.threads);
        Ok(VcpuSpec { boot: cpus.boot, topology, cpuid, msrs: None, affinity, core_scheduling, threads })
    }

    fn zones(&self) -> Result<Vec<ZoneConfig>, MachineError> {
        zones(self.spec)
    }
}

/// The zones of guest memory.
pub(crate) fn zones(spec: &MachineSpec) -> Result<Vec<ZoneConfig>, MachineError> {
    spec.memory.zones.iter().map(|zone| zone_config(zone, spec.memory.thp)).collect()
}

/// Where a machine comes from.
enum Origin<'a> {
    /// Nowhere: its vCPUs are being made meanwhile.
    PowerOn(Unfinished),
    /// Another one, with these devices, which get what they had there; then come the vCPUs.
    Saved(&'a DeviceTreeV1),
}

impl Frame {
    /// Devices around memory.
    fn new(
        plan: &Plan<'_>,
        roads: Roads,
        memory: MemoryMap,
        origin: Origin<'_>,
        stages: &mut Stages,
    ) -> Result<Self, MachineError> {
        let mut recorder = Recorder::default();
        let (board, ways) = stages.time(Stage::Devices, || {
            let mut board = Board::new(roads, &memory, plan.post, plan.threads)?;
            if let Origin::Saved(tree) = &origin {
                board.devices.keep(tree).map_err(MachineError::Tree)?;
            }
            let ways =
                recipes::add_all(&mut board, plan.spec, plan.ports, plan.post, plan.locks, &mut recorder)?;
            Ok::<_, MachineError>((board, ways))
        })?;
        let vcpus = match origin {
            Origin::PowerOn(vcpus) => Some(vcpus),
            Origin::Saved(_) => None,
        };
        Ok(Self { vcpus, board, ways, memory, recorder })
    }

    /// Adds the vCPUs, parked; `entry` is where the first begins, if its state is not to follow. Which guest it is, its maker
    /// says.
    fn finish(
        self,
        plan: &Plan<'_>,
        vcpu_spec: &VcpuSpec,
        entry: Option<Entry>,
        stages: &mut Stages,
    ) -> Result<Machine, MachineError> {
        let Self { vcpus, board, ways, memory, recorder } = self;
        let Board { roads, devices, .. } = board;
        let vcpus = stages.time(Stage::Vcpus, || match vcpus {
            Some(unfinished) => unfinished.finish(entry),
            None => VcpuSet::create(plan.hypervisor, &roads.vm, vcpu_spec, entry, &roads.targets(plan.post)),
        })?;
        let identity = MachineV1::of(plan.spec, vcpu_spec.cpuid.phys_bits(), vcpus.msrs());
        let trace = BootTrace::new(plan.post.machine, stages, recorder);
        let (number, generation) = (plan.post.machine, GenerationId::default());
        Ok(Machine { vcpus, devices, memory, ways, vm: roads.vm, identity, generation, number, trace })
    }
}

fn new_generation() -> Result<GenerationId, MachineError> {
    let mut id = GenerationId::default();
    getrandom::fill(&mut id).map_err(MachineError::Random)?;
    Ok(id)
}

fn topology(cpus: &CpuSpec) -> Topology {
    // At most 254 in all, says the spec.
    let part = |n: u32| u8::try_from(n).unwrap_or(u8::MAX);
    Topology {
        threads_per_core: part(cpus.topology.threads_per_core),
        cores_per_die: part(cpus.topology.cores_per_die),
        dies_per_package: part(cpus.topology.dies_per_package),
        packages: part(cpus.topology.packages),
    }
}

fn zone_config(zone: &ZoneSpec, thp: bool) -> Result<ZoneConfig, MachineError> {
    let huge_page = match zone.hugepages {
        Hugepages::Off => None,
        Hugepages::HostDefault => Some(default_huge_page()?),
        Hugepages::Of(size) => Some(size.get()),
    };
    let file = match &zone.backing {
        Backing::File(path) => Some(path.clone()),
        Backing::Anonymous | Backing::Memfd => None,
    };
    let options =
        ZoneOptions { mergeable: zone.mergeable, prefault: zone.prefault, thp, reserve: zone.reserve };
    let (id, size) = (zone.id.clone(), zone.size.get());
    Ok(ZoneConfig { id, size, file, shared: zone.shared, huge_page, options })
}

/// The host's default huge page size in bytes (`Hugepagesize` in /proc/meminfo).
fn default_huge_page() -> Result<u64, MachineError> {
    let info = std::fs::read_to_string("/proc/meminfo").map_err(MachineError::HugePages)?;
    let line = info.lines().find_map(|line| line.strip_prefix("Hugepagesize:"));
    let kib = line.and_then(|rest| rest.trim().strip_suffix(" kB")).and_then(|n| n.parse::<u64>().ok());
    kib.map(|kib| kib << 10).ok_or_else(|| MachineError::HugePages(std::io::ErrorKind::Unsupported.into()))
}

/// A machine could not be built, or a step of its life failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MachineError {
    /// The hypervisor refused.
    #[error("the hypervisor refuses")]
    Hypervisor(#[from] HypervisorError),
    /// More vCPUs than this host can give.
    #[error("{wanted} vCPUs are more than the {most} that this host can give")]
    TooManyVcpus {
        /// vCPUs asked for.
        wanted: u32,
        /// Most that can be.
        most: u32,
    },
    /// Guest memory cannot be had.
    #[error("cannot set guest memory up")]
    Memory(#[from] ZoneError),
    /// Guest memory cannot be had with what was in it.
    #[error("cannot restore guest memory")]
    SavedMemory(#[from] vmm_memory_manager::restore::RestoreError),
    /// Guest memory cannot be had with all that was in it.
    #[error("cannot restore guest memory")]
    NotFilled(#[source] vmm_memory_manager::fill::FillError),
    /// The host's default huge page size is not known.
    #[error("cannot tell the host's huge page size")]
    HugePages(#[source] std::io::Error),
    /// The books of resources cannot be opened.
    #[error("cannot set the devices' resources up")]
    Resources(#[from] BuildError),
    /// A device cannot be added.
    #[error("cannot add a device")]
    Add(#[from] AddError),
    /// A disk cannot be used.
    #[error("cannot use disk {id:?}")]
    Disk {
        /// Id of the disk.
        id: String,
        /// Why.
        #[source]
        source: DiskError,
    },
    /// The source of random bytes cannot be used.
    #[error("cannot use the source of random bytes")]
    Rng(#[from] RngError),
    /// virtio-console cannot be had.
    #[error("cannot set virtio-console up")]
    Console(#[source] std::io::Error),
    /// The kernel cannot be loaded.
    #[error("cannot load what the guest boots")]
    Boot(#[from] BootError),
    /// The vCPUs cannot be had, or do not obey.
    #[error("vCPUs")]
    Vcpu(#[from] VcpuError),
    /// A device failed.
    #[error("devices")]
    Device(#[from] StepError),
    /// Only a paused machine can be saved.
    #[error("the guest runs")]
    Running,
    /// A device stands against saving the machine.
    #[error("device {device:?} cannot be saved: {reason}")]
    Blocked {
        /// Id of the device.
        device: String,
        /// Why, in its words.
        reason: String,
    },
    /// State is missing, left over or not what it should be.
    #[error("saved state")]
    Records(#[from] SetError),
    /// The system has no random bytes.
    #[error("cannot draw a generation ID")]
    Random(#[source] getrandom::Error),
    /// There is no memory where the generation ID is.
    #[error("cannot write the generation ID")]
    GenerationId(#[source] vm_memory::GuestMemoryError),
    /// The guest knows another machine.
    #[error("the guest had {what} {saved}, this VM has {here}")]
    Differs {
        /// What differs.
        what: &'static str,
        /// What the guest had.
        saved: String,
        /// What it would have now.
        here: String,
    },
    /// The guest was given a processor that this host does not have.
    #[error("the processor")]
    Processor(#[from] Lacks),
    /// The guest's memory lay elsewhere.
    #[error("guest memory")]
    Layout(#[source] RecordError),
    /// Devices cannot be where they were.
    #[error("the places of the devices")]
    Tree(#[source] RecordError),
    /// The hypervisor does not take the interrupts' routes.
    #[error("cannot route interrupts")]
    Routes(#[source] std::io::Error),
    /// State cannot be taken over.
    #[error("cannot restore the devices' state")]
    Restore(#[from] RestoreError),
    /// The locks of disks cannot be given up, or not be had.
    #[error("the locks of the disks")]
    Locks(#[source] std::io::Error),
    /// State is not what it was after a restore.
    #[error("the devices' state changed by a reset and restore")]
    Changed,
}
