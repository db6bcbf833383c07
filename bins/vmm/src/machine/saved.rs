//! A machine's state as one tree of records, and a machine made of it.
//!
//! | owner | record | what |
//! |---|---|---|
//! | `machine` | [`MachineV1`] | what the guest knows of its machine: reproduced, never recomputed |
//! | `clock` | [`ClockV1`] | the paravirtual clock, and the host's time then |
//! | `memory-layout` | [`MemoryLayoutV1`] | where RAM and the 64-bit window lie |
//! | `device-tree` | [`DeviceTreeV1`] | which device has what |
//! | `devices` | a set | a record for each device, by its id |
//! | `vcpus` | a set | a [`VcpuV1`] for each vCPU, by its number |
//!
//! The bytes of guest memory are not among them.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use minicbor::{Decode, Encode};
use vmm_api::spec::MachineSpec;
use vmm_cpu_manager::compat;
use vmm_cpu_manager::state::{TimeBase, VcpuV1};
use vmm_cpu_manager::topology::Topology;
use vmm_device_manager::tree::DeviceTreeV1;
use vmm_device_model::device::Blocks;
use vmm_hypervisor::state::CpuidEntry;
use vmm_hypervisor::{ClockData, Vm};
use vmm_memory_manager::layout::{self, Range};
use vmm_memory_manager::map::{MemoryLayoutV1, MemoryMap};
use vmm_memory_manager::restore::RestoreError;
use vmm_memory_manager::zone::ZoneConfig;
use vmm_platform_devices::pm_timer::PmTimerV1;
use vmm_snapshot::RecordSet;

use super::recipes::PM_TIMER;
use super::stages::{Stage, Stages};
use super::{Frame, Machine, MachineError, Origin, Plan, QUIESCE_TIMEOUT, Roads, new_generation, topology};

const MACHINE: &str = "machine";
const CLOCK: &str = "clock";
const LAYOUT: &str = "memory-layout";
const TREE: &str = "device-tree";
const DEVICES: &str = "devices";
const VCPUS: &str = "vcpus";

/// What a machine is restored from.
pub struct Saved<'a> {
    /// What [`Machine::save`] gave.
    pub records: RecordSet,
    /// Gets the guest's memory, with its content. Where it lies is checked afterwards.
    pub memory: GetMemory<'a>,
    /// What the guest's clocks show.
    pub clock: ClockChoice,
    /// Whether the guest is told by a new generation ID that it is another than the one that was saved. Not where that one is
    /// gone, as after a migration.
    pub another: bool,
}

/// Gets the memory of a guest that is restored.
pub type GetMemory<'a> = Box<dyn FnOnce(SavedMemory) -> Result<MemoryMap, RestoreError> + Send + 'a>;

/// What [`Saved::memory`] is told.
#[derive(Debug)]
pub struct SavedMemory {
    /// Whose slots it goes into.
    pub vm: Arc<dyn Vm>,
    /// The zones of the configuration.
    pub zones: Vec<ZoneConfig>,
    /// Bits of the guest's physical addresses.
    pub phys_bits: u8,
    /// Where it lies: what [`MemoryMap::restore`] wants.
    pub layout: MemoryLayoutV1,
}

impl fmt::Debug for Saved<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Saved").field("clock", &self.clock).finish_non_exhaustive()
    }
}

/// What the clocks of a restored guest show. The CMOS clock shows the host's time in any case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ClockChoice {
    /// Time has passed meanwhile, as it does for a guest that is paused: the guest's idea of the time of day stays right, and
    /// what was to happen meanwhile happens at once.
    #[default]
    MovedOn,
    /// Time stood still: no timer runs out because of the snapshot, and the guest's time of day is wrong until it is set.
    StoodStill,
}

/// What a guest knows of its machine beside its memory, devices and vCPUs.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct MachineV1 {
    /// vCPUs present.
    #[n(0)]
    pub boot_vcpus: u32,
    /// vCPUs that there can be, as the ACPI tables tell.
    #[n(1)]
    pub max_vcpus: u32,
    /// Their arrangement: threads of a core, cores of a die, dies of a package, packages.
    #[n(2)]
    pub topology: [u8; 4],
    /// Bits of a guest physical address.
    #[n(3)]
    pub phys_bits: u8,
    /// Window for 32-bit PCI BARs.
    #[n(4)]
    pub mmio32: Range,
    /// PCI configuration space.
    #[n(5)]
    pub ecam: Range,
    /// The IOAPIC's registers.
    #[n(6)]
    pub ioapic: Range,
    /// The local APICs' registers.
    #[n(7)]
    pub lapic: Range,
    /// What the hypervisor keeps for itself.
    #[n(8)]
    pub hypervisor: Range,
    /// The MSRs that make up a vCPU's state: those that the host listed on which the guest booted.
    #[n(9)]
    pub msrs: Vec<u32>,
}

vmm_snapshot::schema!(MachineV1: "machine" v1);

/// The guest's clock. Where each vCPU's TSC is, its own record says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct ClockV1 {
    /// The paravirtual clock: the guest's nanoseconds since boot.
    #[n(0)]
    pub guest: u64,
    /// The host's nanoseconds since 1970 at that moment.
    #[n(1)]
    pub host: u64,
}

vmm_snapshot::schema!(ClockV1: "clock" v1);

impl Machine {
    /// The state of a paused machine but for the bytes of its memory. The machine is as before.
    ///
    /// # Errors
    /// The machine runs, a device stands against it, or state cannot be had.
    pub fn save(&self) -> Result<RecordSet, MachineError> {
        if self.vcpus.is_running() {
            return Err(MachineError::Running);
        }
        let blockers = self.devices.blockers();
        if let Some((device, blocker)) = blockers.into_iter().find(|(_, b)| b.blocks == Blocks::Snapshot) {
            return Err(MachineError::Blocked { device, reason: blocker.reason });
        }
        let mut records = RecordSet::new();
        records.put(CLOCK, &ClockV1::of(&self.vm.clock()?))?;
        let mut vcpus = RecordSet::new();
        for (number, state) in (0_u32..).zip(self.vcpus.save()?) {
            vcpus.put(&number.to_string(), &state)?;
        }
        records.put(VCPUS, &vcpus)?;
        records.put(DEVICES, &self.devices.save()?)?;
        records.put(TREE, &self.devices.tree())?;
        records.put(LAYOUT, &self.memory.save())?;
        records.put(MACHINE, &self.identity)?;
        Ok(records)
    }

    /// Makes a machine of saved state: paused, as [`save`](Self::save) found it; [`resume`](Self::resume) lets it go on.
    ///
    /// # Errors
    /// The state is not one of such a machine, or this host cannot give the guest what it had, or a part cannot be had.
    /// Nothing is left behind.
    pub fn restore(plan: &Plan<'_>, saved: Saved<'_>, stages: &mut Stages) -> Result<Self, MachineError> {
        let Saved { records, memory, clock: choice, another } = saved;
        let Parts { identity, clock, layout, tree, mut devices, vcpus } = Parts::take(records)?;
        identity.check(plan.spec, vcpus.len())?;
        let (vm, vcpu_spec) = stages.time(Stage::Vm, || {
            let cpuid: Vec<Vec<CpuidEntry>> = vcpus.iter().map(VcpuV1::given_cpuid).collect();
            let supported = plan.hypervisor.supported_cpuid()?;
            cpuid.iter().try_for_each(|given| compat::check(given, &supported))?;
            let mut vcpu_spec = plan.vcpu_spec(Some(cpuid))?;
            identity.check_address_space(vcpu_spec.cpuid.phys_bits(), &layout)?;
            vcpu_spec.msrs = Some(identity.msrs.as_slice().into());
            Ok::<_, MachineError>((plan.create_vm()?, vcpu_spec))
        })?;
        let memory = stages.time(Stage::Memory, || {
            let (vm, zones, phys_bits) = (Arc::clone(&vm), plan.zones()?, identity.phys_bits);
            let memory = memory(SavedMemory { vm, zones, phys_bits, layout: layout.clone() })?;
            memory.check(&layout).map_err(MachineError::Layout)?;
            Ok::<_, MachineError>(memory)
        })?;
        let mut frame = Frame::new(plan, Roads::new(vm), memory, Origin::Saved(&tree), stages)?;
        stages.time(Stage::State, || {
            let (router, board) = (Arc::clone(&frame.board.roads.router), &mut frame.board);
            let held = router.hold();
            board.devices.quiesce(Instant::now() + QUIESCE_TIMEOUT)?;
            let timer: PmTimerV1 = devices.take(PM_TIMER)?;
            devices.put(PM_TIMER, &timer.after(clock.moved_on(choice)))?;
            board.devices.restore(devices)?;
            held.commit().map_err(MachineError::Routes)?;
            board.devices.check(&tree).map_err(MachineError::Tree)
        })?;
        let mut machine = frame.finish(plan, &vcpu_spec, None, stages)?;
        stages.time(Stage::State, || {
            let moved_on = clock.moved_on(choice);
            let now = clock.after(moved_on);
            // Some of the vCPUs' state makes the hypervisor write the guest's wall clock, which it reckons from this one.
            machine.vm.set_clock(&now)?;
            machine.vcpus.restore(vcpus, TimeBase::After(moved_on))?;
            // And after the TSCs, on which the clock is based.
            machine.vm.set_clock(&now)?;
            let generation = &machine.ways.generation;
            if another {
                // The interrupt that tells is for the local APICs, which have their state now.
                generation.renew(&new_generation()?).map_err(MachineError::GenerationId)?;
            }
            machine.generation = generation.current().map_err(MachineError::GenerationId)?;
            Ok::<_, MachineError>(())
        })?;
        Ok(machine)
    }
}

/// The tree of records, taken apart.
struct Parts {
    identity: MachineV1,
    clock: ClockV1,
    layout: MemoryLayoutV1,
    tree: DeviceTreeV1,
    devices: RecordSet,
    vcpus: Vec<VcpuV1>,
}

impl Parts {
    fn take(mut records: RecordSet) -> Result<Self, MachineError> {
        let mut states: RecordSet = records.take(VCPUS)?;
        let count = u32::try_from(states.len()).unwrap_or(u32::MAX);
        let vcpus = (0..count).map(|number| states.take(&number.to_string())).collect::<Result<_, _>>()?;
        states.finish()?;
        let parts = Self {
            identity: records.take(MACHINE)?,
            clock: records.take(CLOCK)?,
            layout: records.take(LAYOUT)?,
            tree: records.take(TREE)?,
            devices: records.take(DEVICES)?,
            vcpus,
        };
        records.finish()?;
        Ok(parts)
    }
}

impl MachineV1 {
    /// Of a machine of this specification, on this build's layout.
    pub(super) fn of(spec: &MachineSpec, phys_bits: u8, msrs: &[u32]) -> Self {
        let Topology { threads_per_core, cores_per_die, dies_per_package, packages } = topology(&spec.cpus);
        Self {
            boot_vcpus: spec.cpus.boot,
            max_vcpus: spec.cpus.max,
            topology: [threads_per_core, cores_per_die, dies_per_package, packages],
            phys_bits,
            mmio32: layout::MMIO32,
            ecam: layout::ECAM,
            ioapic: layout::IOAPIC,
            lapic: layout::LAPIC,
            hypervisor: layout::HYPERVISOR,
            msrs: msrs.to_vec(),
        }
    }

    /// Checks that all of the guest's memory map is in its address space.
    fn check_address_space(&self, told: u8, layout: &MemoryLayoutV1) -> Result<(), MachineError> {
        let differs = |what, saved: String, here: String| Err(MachineError::Differs { what, saved, here });
        if told != self.phys_bits {
            return differs("bits of physical address", self.phys_bits.to_string(), told.to_string());
        }
        let end = 1_u64.checked_shl(told.into()).unwrap_or(u64::MAX);
        match layout.mmio64.end() <= end {
            true => Ok(()),
            false => differs("PCI windows up to", layout.mmio64.end().to_string(), end.to_string()),
        }
    }

    /// Checks that a machine of this specification is the guest's.
    fn check(&self, spec: &MachineSpec, states: usize) -> Result<(), MachineError> {
        let here = Self::of(spec, self.phys_bits, &self.msrs);
        let same = |what, saved: String, here: String| match saved == here {
            true => Ok(()),
            false => Err(MachineError::Differs { what, saved, here }),
        };
        same("vCPUs", self.boot_vcpus.to_string(), here.boot_vcpus.to_string())?;
        same("vCPU records", states.to_string(), here.boot_vcpus.to_string())?;
        same("vCPUs at most", self.max_vcpus.to_string(), here.max_vcpus.to_string())?;
        let topology = |machine: &Self| machine.topology.map(|n| n.to_string()).join(":");
        same("topology (threads:cores:dies:packages)", topology(self), topology(&here))?;
        let ranges = [
            ("32-bit PCI window at", self.mmio32, here.mmio32),
            ("PCI configuration space at", self.ecam, here.ecam),
            ("IOAPIC at", self.ioapic, here.ioapic),
            ("local APICs at", self.lapic, here.lapic),
            ("hypervisor's pages at", self.hypervisor, here.hypervisor),
        ];
        let show = |range: Range| format!("{:#x}, {:#x} bytes", range.start, range.size);
        ranges.into_iter().try_for_each(|(what, saved, here)| same(what, show(saved), show(here)))
    }
}

impl ClockV1 {
    fn of(clock: &ClockData) -> Self {
        Self { guest: clock.clock, host: clock.realtime.unwrap_or_else(|| nanos(since_1970())) }
    }

    /// How far the guest's clocks go on at once. Not back, where the host's own went back.
    fn moved_on(&self, choice: ClockChoice) -> Duration {
        match choice {
            ClockChoice::StoodStill => Duration::ZERO,
            ClockChoice::MovedOn => since_1970().saturating_sub(Duration::from_nanos(self.host)),
        }
    }

    fn after(&self, moved_on: Duration) -> ClockData {
        ClockData { clock: self.guest.saturating_add(nanos(moved_on)), realtime: None, host_tsc: None }
    }
}

fn since_1970() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO)
}

/// Enough for 584 years.
fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use vmm_snapshot::golden;

    use super::*;

    fn machine() -> MachineV1 {
        MachineV1 {
            boot_vcpus: 2,
            max_vcpus: 4,
            topology: [1, 2, 1, 2],
            phys_bits: 46,
            mmio32: layout::MMIO32,
            ecam: layout::ECAM,
            ioapic: layout::IOAPIC,
            lapic: layout::LAPIC,
            hypervisor: layout::HYPERVISOR,
            msrs: vec![0x10, 0x4b56_4d01],
        }
    }

    #[test]
    fn golden_records() {
        golden::check_state(&machine()).unwrap();
        golden::check_state(&ClockV1 { guest: 5_000_000_000, host: 1_790_000_000_000_000_000 }).unwrap();
    }

    #[test]
    fn clocks_stand_still_or_move_on_but_not_back() {
        let second = Duration::from_secs(1);
        let host = |ago: Duration| nanos(since_1970()) - nanos(ago);
        let clock = ClockV1 { guest: 7, host: host(100 * second) };
        assert_eq!(clock.moved_on(ClockChoice::StoodStill), Duration::ZERO);
        let moved_on = clock.moved_on(ClockChoice::MovedOn);
        assert!(moved_on >= 100 * second && moved_on < 10_000 * second, "{moved_on:?}");
        assert_eq!(clock.after(second).clock, 1_000_000_007);
        let future = ClockV1 { host: host(Duration::ZERO) + nanos(3600 * second), ..clock };
        assert_eq!(future.moved_on(ClockChoice::MovedOn), Duration::ZERO);
        assert_eq!(ClockV1 { guest: u64::MAX, ..clock }.after(second).clock, u64::MAX);
    }
}
