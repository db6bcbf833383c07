//! A hypervisor without hardware: it plays scripted exits and fails calls on demand.
//!
//! Managers are tested against it. [`Fake::fail_each`] runs an operation once for every call that it makes, which then fails; compare
//! [`Fake::live`] with what it was before: nothing may be left behind.

use std::cell::Cell;
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use crate::state::{CpuidEntry, DebugRegs, Lapic, MpState, MsrEntry, Regs, Sregs, VcpuEvents, Xcr};
use crate::{
    ClockData, Hypervisor, HypervisorError, IoEventAddress, Kick, MemorySlot, Msi, MsiRoute, Result, Vcpu,
    VcpuExit, Vm, VmOptions,
};

const MSR_TSC: u32 = 0x10;

/// The scripted hypervisor. Clones share everything.
#[derive(Debug, Clone, Default)]
pub struct Fake {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    /// Signalled at every kick.
    kicked: Condvar,
}

#[derive(Debug, Default)]
struct State {
    calls: Vec<&'static str>,
    failures: Vec<Failure>,
    /// The last call that was made to fail.
    failed: Option<&'static str>,
    scripts: BTreeMap<u32, VecDeque<Exit>>,
    answers: Vec<Answer>,
    kicks: BTreeMap<u32, bool>,
    routes: Vec<MsiRoute>,
    signalled: Vec<Msi>,
    dirty: BTreeMap<u32, Vec<u64>>,
    /// Memory slots, by VM and number: a slot that is set again is no second one. Whether writes to it are logged.
    slots: BTreeMap<(usize, u32), bool>,
    clock: ClockData,
    host_tsc: u64,
    guesses_tsc: bool,
    vms_made: usize,
    live: Live,
}

#[derive(Debug)]
struct Failure {
    call: Option<&'static str>,
    /// Calls until it fails, counted down; 1 is the next.
    left: usize,
    errno: i32,
}

/// What exists at a moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Live {
    /// VMs.
    pub vms: usize,
    /// vCPUs.
    pub vcpus: usize,
    /// Memory slots.
    pub slots: usize,
    /// Those of them whose writes are logged.
    pub logged: usize,
    /// irqfds.
    pub irqfds: usize,
    /// ioeventfds.
    pub ioeventfds: usize,
}

/// One step of a vCPU's script.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exit {
    /// Reads a port; the answer is kept ([`Fake::answers`]).
    PioRead {
        /// The port.
        port: u16,
        /// Bytes of one access.
        size: u8,
        /// Accesses, more than one for a string instruction.
        count: u8,
    },
    /// Writes a port.
    PioWrite {
        /// The port.
        port: u16,
        /// What.
        data: Vec<u8>,
    },
    /// Reads where no memory is; the answer is kept.
    MmioRead {
        /// Guest physical address.
        address: u64,
        /// Bytes.
        size: u8,
    },
    /// Writes where no memory is.
    MmioWrite {
        /// Guest physical address.
        address: u64,
        /// What.
        data: Vec<u8>,
    },
    /// Ends an interrupt.
    IoapicEoi(u8),
    /// Triple fault.
    Shutdown,
    /// The hypervisor reports an event.
    SystemEvent(u32),
    /// The hypervisor cannot go on.
    InternalError(u32),
    /// KVM_RUN fails with this `errno`.
    RunFails(i32),
}

/// What the VMM answered to a scripted read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Which vCPU read.
    pub vcpu: u32,
    /// What it got.
    pub data: Vec<u8>,
}

impl Fake {
    /// A hypervisor in which nothing fails and vCPUs have nothing to do: they wait until kicked.
    pub fn new() -> Self {
        Self::default()
    }

    /// What vCPU `id` does, step by step; at the script's end it waits until kicked.
    pub fn script(&self, id: u32, exits: impl IntoIterator<Item = Exit>) {
        self.lock().scripts.entry(id).or_default().extend(exits);
        self.shared.kicked.notify_all();
    }

    /// Fails the `nth` call from now, whatever it is (1 is the next), with ENOMEM.
    pub fn fail_nth(&self, nth: usize) {
        self.lock().failures.push(Failure { call: None, left: nth, errno: libc::ENOMEM });
    }

    /// Does `work` once for each call that it makes, which then fails, and at last once more. `look` gets what failed, what `ready`
    /// made, and what came of it. Gives how many calls there are.
    pub fn fail_each<S, T>(
        &self,
        mut ready: impl FnMut() -> S,
        mut work: impl FnMut(&mut S) -> T,
        mut look: impl FnMut(Option<&'static str>, S, T),
    ) -> usize {
        let mut nth = 1;
        loop {
            let mut state = ready();
            self.lock().failed = None;
            self.fail_nth(nth);
            let result = work(&mut state);
            self.heal();
            // Not by its place among the calls: vCPUs make some meanwhile.
            let failed = self.lock().failed;
            look(failed, state, result);
            if failed.is_none() {
                return nth - 1;
            }
            nth += 1;
        }
    }

    /// Fails the `nth` call of `call` from now (1 is the next) with ENOMEM.
    pub fn fail_nth_of(&self, call: &'static str, nth: usize) {
        self.lock().failures.push(Failure { call: Some(call), left: nth, errno: libc::ENOMEM });
    }

    /// Every call of `call` answers EINVAL, as a host's that does not know it.
    pub fn unsupported(&self, call: &'static str) {
        self.lock().failures.push(Failure { call: Some(call), left: 0, errno: libc::EINVAL });
    }

    /// Forgets every planned failure.
    pub fn heal(&self) {
        self.lock().failures.clear();
    }

    /// All calls so far, in order, by the names that KVM's would have.
    pub fn calls(&self) -> Vec<&'static str> {
        self.lock().calls.clone()
    }

    /// How often `call` was made.
    pub fn count(&self, call: &str) -> usize {
        self.lock().calls.iter().filter(|c| **c == call).count()
    }

    /// What exists now.
    pub fn live(&self) -> Live {
        let state = self.lock();
        let logged = state.slots.values().filter(|logged| **logged).count();
        Live { slots: state.slots.len(), logged, ..state.live }
    }

    /// Answers to scripted reads so far.
    pub fn answers(&self) -> Vec<Answer> {
        self.lock().answers.clone()
    }

    /// The interrupt routes in force.
    pub fn routes(&self) -> Vec<MsiRoute> {
        self.lock().routes.clone()
    }

    /// Messages signalled so far.
    pub fn signalled(&self) -> Vec<Msi> {
        self.lock().signalled.clone()
    }

    /// From now on a write to a vCPU's TSC changes nothing, as in a KVM that takes the value for one that the vCPU has already.
    pub fn guess_tsc(&self) {
        self.lock().guesses_tsc = true;
    }

    /// The host's TSC, which stands still otherwise.
    pub fn set_host_tsc(&self, tsc: u64) {
        self.lock().host_tsc = tsc;
    }

    /// Marks 4 KiB pages of a slot as written by the guest: one bit per page, lowest first.
    pub fn set_dirty(&self, slot: u32, bitmap: Vec<u64>) {
        self.lock().dirty.insert(slot, bitmap);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records a call and lets it fail if that was planned.
    fn enter(&self, call: &'static str) -> Result<MutexGuard<'_, State>> {
        let mut state = self.lock();
        state.calls.push(call);
        let mut errno = None;
        state.failures.retain_mut(|failure| {
            if failure.call.is_some_and(|of| of != call) {
                return true;
            }
            match failure.left {
                0 => errno = Some(failure.errno),
                1 => {
                    errno = Some(failure.errno);
                    return false;
                }
                _ => failure.left -= 1,
            }
            true
        });
        match errno {
            Some(errno) => {
                state.failed = Some(call);
                Err(HypervisorError::from_errno(call, errno))
            }
            None => Ok(state),
        }
    }
}

impl Hypervisor for Fake {
    fn name(&self) -> &'static str {
        "fake"
    }

    fn create_vm(&self, _: &VmOptions) -> Result<Arc<dyn Vm>> {
        let mut state = self.enter("KVM_CREATE_VM")?;
        state.live.vms += 1;
        state.vms_made += 1;
        Ok(Arc::new(FakeVm { fake: self.clone(), number: state.vms_made }))
    }

    fn supported_cpuid(&self) -> Result<Vec<CpuidEntry>> {
        drop(self.enter("KVM_GET_SUPPORTED_CPUID")?);
        let leaf = |function, eax, ebx, ecx, edx| CpuidEntry {
            function,
            eax,
            ebx,
            ecx,
            edx,
            index_significant: matches!(function, 4 | 7 | 0xb | 0xd),
            ..CpuidEntry::default()
        };
        Ok(vec![
            leaf(0, 0x1f, 0x6874_7541, 0x444d_4163, 0x6974_6e65),
            leaf(1, 0x0080_0f12, 0, 0x8320_3203, 0x078b_fbff),
            leaf(4, 0x0000_4121, 0x01c0_003f, 0x3f, 0),
            leaf(0xb, 0, 0, 0, 0),
            leaf(0xd, 7, 0x340, 0x340, 0),
            leaf(0x4000_0000, 0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d),
            leaf(0x8000_0000, 0x8000_001e, 0x6874_7541, 0x444d_4163, 0x6974_6e65),
            leaf(0x8000_0001, 0x0080_0f12, 0, 0x0040_0001, 0x2c10_0800),
            leaf(0x8000_0008, 0x3030, 0, 0, 0),
            leaf(0x8000_001e, 0, 0, 0, 0),
        ])
    }

    fn msr_indices(&self) -> Result<Vec<u32>> {
        drop(self.enter("KVM_GET_MSR_INDEX_LIST")?);
        Ok(vec![0x10, 0x174, 0x175, 0x176, 0xc000_0081, 0x4b56_4d00, 0x4b56_4d01])
    }

    fn max_vcpus(&self) -> u32 {
        1024
    }
}

#[derive(Debug)]
struct FakeVm {
    fake: Fake,
    number: usize,
}

impl Drop for FakeVm {
    fn drop(&mut self) {
        // What a VM holds goes with it.
        let mut state = self.fake.lock();
        state.live.vms -= 1;
        state.slots.retain(|(vm, _), _| *vm != self.number);
        if state.live.vms == 0 {
            (state.live.irqfds, state.live.ioeventfds) = (0, 0);
            state.routes.clear();
        }
    }
}

impl Vm for FakeVm {
    fn create_vcpu(&self, id: u32) -> Result<Box<dyn Vcpu>> {
        let mut state = self.fake.enter("KVM_CREATE_VCPU")?;
        state.live.vcpus += 1;
        let mp_state = if id == 0 { MpState::Runnable } else { MpState::Uninitialized };
        let mut registers = Registers { mp_state, tsc_khz: 2_000_000, ..Registers::default() };
        registers.xcrs = vec![Xcr { index: 0, value: 7 }];
        Ok(Box::new(FakeVcpu {
            fake: self.fake.clone(),
            id,
            registers,
            pending_nmis: Cell::new(0),
            pending_read: false,
            buffer: Vec::new(),
        }))
    }

    #[expect(unsafe_code, reason = "the trait's; this one never touches the memory")]
    unsafe fn set_memory_slot(&self, slot: &MemorySlot) -> Result<()> {
        self.fake.enter("KVM_SET_USER_MEMORY_REGION")?.slots.insert((self.number, slot.slot), slot.log_dirty);
        Ok(())
    }

    fn remove_memory_slot(&self, slot: &MemorySlot) -> Result<()> {
        let mut state = self.fake.enter("KVM_SET_USER_MEMORY_REGION")?;
        state.slots.remove(&(self.number, slot.slot));
        state.dirty.remove(&slot.slot);
        Ok(())
    }

    fn dirty_log(&self, slot: &MemorySlot) -> Result<Vec<u64>> {
        let mut state = self.fake.enter("KVM_GET_DIRTY_LOG")?;
        let words = usize::try_from(slot.size.div_ceil(4096 * 64)).unwrap_or(0);
        let mut bitmap = state.dirty.remove(&slot.slot).unwrap_or_default();
        bitmap.resize(words, 0);
        Ok(bitmap)
    }

    fn signal_msi(&self, msi: Msi) -> Result<()> {
        self.fake.enter("KVM_SIGNAL_MSI")?.signalled.push(msi);
        Ok(())
    }

    fn set_routes(&self, routes: &[MsiRoute]) -> Result<()> {
        self.fake.enter("KVM_SET_GSI_ROUTING")?.routes = routes.to_vec();
        Ok(())
    }

    fn attach_irqfd(&self, _: &EventFd, _: u32) -> Result<()> {
        self.fake.enter("KVM_IRQFD")?.live.irqfds += 1;
        Ok(())
    }

    fn detach_irqfd(&self, _: &EventFd, _: u32) -> Result<()> {
        let mut state = self.fake.enter("KVM_IRQFD")?;
        state.live.irqfds = state.live.irqfds.saturating_sub(1);
        Ok(())
    }

    fn attach_ioeventfd(&self, _: IoEventAddress, _: &EventFd) -> Result<()> {
        self.fake.enter("KVM_IOEVENTFD")?.live.ioeventfds += 1;
        Ok(())
    }

    fn detach_ioeventfd(&self, _: IoEventAddress, _: &EventFd) -> Result<()> {
        let mut state = self.fake.enter("KVM_IOEVENTFD")?;
        state.live.ioeventfds = state.live.ioeventfds.saturating_sub(1);
        Ok(())
    }

    fn clock(&self) -> Result<ClockData> {
        Ok(self.fake.enter("KVM_GET_CLOCK")?.clock)
    }

    fn set_clock(&self, clock: &ClockData) -> Result<()> {
        self.fake.enter("KVM_SET_CLOCK")?.clock = *clock;
        Ok(())
    }
}

#[derive(Debug, Default)]
struct Registers {
    cpuid: Vec<CpuidEntry>,
    regs: Regs,
    sregs: Sregs,
    xsave: Vec<u8>,
    xcrs: Vec<Xcr>,
    msrs: BTreeMap<u32, u64>,
    lapic: Lapic,
    events: VcpuEvents,
    mp_state: MpState,
    debug_regs: DebugRegs,
    tsc_khz: u32,
    tsc_offset: u64,
    nested_state: Option<Vec<u8>>,
}

#[derive(Debug)]
struct FakeVcpu {
    fake: Fake,
    id: u32,
    registers: Registers,
    /// NMIs that the guest has not taken: it does when it runs. At most 2, as in KVM.
    pending_nmis: Cell<u8>,
    /// The last exit was a read whose answer is in `buffer`.
    pending_read: bool,
    buffer: Vec<u8>,
}

impl Drop for FakeVcpu {
    fn drop(&mut self) {
        self.fake.lock().live.vcpus -= 1;
    }
}

#[derive(Debug)]
struct FakeKick {
    fake: Fake,
    id: u32,
}

impl Kick for FakeKick {
    fn kick(&self) {
        self.fake.lock().kicks.insert(self.id, true);
        self.fake.shared.kicked.notify_all();
    }
}

impl FakeVcpu {
    fn keep_answer(&mut self) {
        if std::mem::take(&mut self.pending_read) {
            let data = std::mem::take(&mut self.buffer);
            self.fake.lock().answers.push(Answer { vcpu: self.id, data });
        }
    }

    /// Next step of the script; `None` when kicked first.
    fn next(&self) -> Result<Option<Exit>> {
        let mut state = self.fake.enter("KVM_RUN")?;
        loop {
            if state.kicks.insert(self.id, false).unwrap_or(false) {
                return Ok(None);
            }
            if let Some(exit) = state.scripts.get_mut(&self.id).and_then(VecDeque::pop_front) {
                return Ok(Some(exit));
            }
            state = self.fake.shared.kicked.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn read_buffer(&mut self, len: usize) -> &mut [u8] {
        self.pending_read = true;
        self.buffer = vec![0; len];
        &mut self.buffer
    }

    fn write_buffer(&mut self, data: Vec<u8>) -> &[u8] {
        self.buffer = data;
        &self.buffer
    }
}

/// One getter and setter pair that only keeps the value.
macro_rules! kept {
    ($get:ident, $set:ident, $type:ty, $get_call:literal, $set_call:literal) => {
        fn $get(&self) -> Result<$type> {
            drop(self.fake.enter($get_call)?);
            Ok(self.registers.$get.clone())
        }

        fn $set(&mut self, value: &$type) -> Result<()> {
            drop(self.fake.enter($set_call)?);
            self.registers.$get = value.clone();
            Ok(())
        }
    };
}

impl Vcpu for FakeVcpu {
    fn bind(&mut self) -> Result<Arc<dyn Kick>> {
        Ok(Arc::new(FakeKick { fake: self.fake.clone(), id: self.id }))
    }

    fn run(&mut self) -> Result<VcpuExit<'_>> {
        self.keep_answer();
        self.pending_nmis.set(0);
        Ok(match self.next()? {
            None => VcpuExit::Interrupted,
            Some(Exit::PioRead { port, size, count }) => {
                let len = usize::from(size) * usize::from(count);
                VcpuExit::PioRead { port, size, data: self.read_buffer(len) }
            }
            Some(Exit::PioWrite { port, data }) => {
                let size = u8::try_from(data.len()).unwrap_or(1);
                VcpuExit::PioWrite { port, size, data: self.write_buffer(data) }
            }
            Some(Exit::MmioRead { address, size }) => {
                VcpuExit::MmioRead { address, data: self.read_buffer(size.into()) }
            }
            Some(Exit::MmioWrite { address, data }) => {
                VcpuExit::MmioWrite { address, data: self.write_buffer(data) }
            }
            Some(Exit::IoapicEoi(vector)) => VcpuExit::IoapicEoi(vector),
            Some(Exit::Shutdown) => VcpuExit::Shutdown,
            Some(Exit::SystemEvent(kind)) => VcpuExit::SystemEvent(kind),
            Some(Exit::InternalError(suberror)) => VcpuExit::InternalError { suberror },
            Some(Exit::RunFails(errno)) => return Err(HypervisorError::from_errno("KVM_RUN", errno)),
        })
    }

    fn set_cpuid(&mut self, entries: &[CpuidEntry]) -> Result<()> {
        drop(self.fake.enter("KVM_SET_CPUID2")?);
        self.registers.cpuid = entries.to_vec();
        Ok(())
    }

    fn cpuid(&self) -> Result<Vec<CpuidEntry>> {
        drop(self.fake.enter("KVM_GET_CPUID2")?);
        Ok(self.registers.cpuid.clone())
    }

    kept!(regs, set_regs, Regs, "KVM_GET_REGS", "KVM_SET_REGS");
    kept!(sregs, set_sregs, Sregs, "KVM_GET_SREGS", "KVM_SET_SREGS");
    kept!(lapic, set_lapic, Lapic, "KVM_GET_LAPIC", "KVM_SET_LAPIC");
    kept!(debug_regs, set_debug_regs, DebugRegs, "KVM_GET_DEBUGREGS", "KVM_SET_DEBUGREGS");

    fn events(&self) -> Result<VcpuEvents> {
        drop(self.fake.enter("KVM_GET_VCPU_EVENTS")?);
        Ok(VcpuEvents { nmi_pending: self.pending_nmis.get(), ..self.registers.events })
    }

    fn set_events(&mut self, events: &VcpuEvents) -> Result<()> {
        drop(self.fake.enter("KVM_SET_VCPU_EVENTS")?);
        self.pending_nmis.set(events.nmi_pending);
        self.registers.events = *events;
        Ok(())
    }

    fn xsave(&self) -> Result<Vec<u8>> {
        drop(self.fake.enter("KVM_GET_XSAVE")?);
        let mut area = self.registers.xsave.clone();
        area.resize(4096, 0);
        Ok(area)
    }

    fn set_xsave(&mut self, area: &[u8]) -> Result<()> {
        drop(self.fake.enter("KVM_SET_XSAVE")?);
        if area.len() != 4096 {
            return Err(HypervisorError::from_errno("KVM_SET_XSAVE", libc::EINVAL));
        }
        self.registers.xsave = area.to_vec();
        Ok(())
    }

    fn xcrs(&self) -> Result<Vec<Xcr>> {
        drop(self.fake.enter("KVM_GET_XCRS")?);
        Ok(self.registers.xcrs.clone())
    }

    fn set_xcrs(&mut self, xcrs: &[Xcr]) -> Result<()> {
        drop(self.fake.enter("KVM_SET_XCRS")?);
        self.registers.xcrs = xcrs.to_vec();
        Ok(())
    }

    fn msrs(&self, indices: &[u32]) -> Result<Vec<MsrEntry>> {
        let tsc = self.fake.enter("KVM_GET_MSRS")?.host_tsc.wrapping_add(self.registers.tsc_offset);
        let value = |index: &u32| match *index {
            MSR_TSC => tsc,
            index => self.registers.msrs.get(&index).copied().unwrap_or(0),
        };
        Ok(indices.iter().map(|index| MsrEntry { index: *index, value: value(index) }).collect())
    }

    fn set_msrs(&mut self, entries: &[MsrEntry]) -> Result<Vec<u32>> {
        let state = self.fake.enter("KVM_SET_MSRS")?;
        let (host_tsc, guesses) = (state.host_tsc, state.guesses_tsc);
        drop(state);
        if let Some(tsc) = entries.iter().find(|e| e.index == MSR_TSC && !guesses) {
            self.registers.tsc_offset = tsc.value.wrapping_sub(host_tsc);
        }
        self.registers.msrs.extend(entries.iter().map(|e| (e.index, e.value)));
        Ok(Vec::new())
    }

    fn mp_state(&self) -> Result<MpState> {
        drop(self.fake.enter("KVM_GET_MP_STATE")?);
        Ok(self.registers.mp_state)
    }

    fn set_mp_state(&mut self, state: MpState) -> Result<()> {
        drop(self.fake.enter("KVM_SET_MP_STATE")?);
        self.registers.mp_state = state;
        Ok(())
    }

    fn tsc_khz(&self) -> Result<u32> {
        drop(self.fake.enter("KVM_GET_TSC_KHZ")?);
        Ok(self.registers.tsc_khz)
    }

    fn set_tsc_khz(&mut self, khz: u32) -> Result<()> {
        drop(self.fake.enter("KVM_SET_TSC_KHZ")?);
        self.registers.tsc_khz = khz;
        Ok(())
    }

    fn tsc_offset(&self) -> Result<u64> {
        drop(self.fake.enter("KVM_GET_DEVICE_ATTR")?);
        Ok(self.registers.tsc_offset)
    }

    fn set_tsc_offset(&mut self, offset: u64) -> Result<()> {
        drop(self.fake.enter("KVM_SET_DEVICE_ATTR")?);
        self.registers.tsc_offset = offset;
        Ok(())
    }

    fn nested_state(&self) -> Result<Option<Vec<u8>>> {
        drop(self.fake.enter("KVM_GET_NESTED_STATE")?);
        Ok(self.registers.nested_state.clone())
    }

    fn set_nested_state(&mut self, state: &[u8]) -> Result<()> {
        drop(self.fake.enter("KVM_SET_NESTED_STATE")?);
        self.registers.nested_state = Some(state.to_vec());
        Ok(())
    }

    fn notify_paused(&self) -> Result<()> {
        drop(self.fake.enter("KVM_KVMCLOCK_CTRL")?);
        Ok(())
    }

    fn nmi(&self) -> Result<()> {
        drop(self.fake.enter("KVM_NMI")?);
        self.pending_nmis.set(self.pending_nmis.get().saturating_add(1).min(2));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPTIONS: VmOptions = VmOptions { ioapic_pins: 24, tss_address: 0 };

    #[test]
    fn plays_the_script_and_keeps_answers() {
        let fake = Fake::new();
        fake.script(0, [Exit::PioRead { port: 0x60, size: 1, count: 2 }, Exit::IoapicEoi(9)]);
        let mut vcpu = fake.create_vm(&OPTIONS).unwrap().create_vcpu(0).unwrap();
        match vcpu.run().unwrap() {
            VcpuExit::PioRead { port: 0x60, size: 1, data } => data.copy_from_slice(&[1, 2]),
            other => panic!("{other:?}"),
        }
        assert_eq!(vcpu.run().unwrap(), VcpuExit::IoapicEoi(9));
        assert_eq!(fake.answers(), [Answer { vcpu: 0, data: vec![1, 2] }]);
    }

    #[test]
    fn a_kick_before_the_run_is_not_lost() {
        let fake = Fake::new();
        let mut vcpu = fake.create_vm(&OPTIONS).unwrap().create_vcpu(0).unwrap();
        vcpu.bind().unwrap().kick();
        assert_eq!(vcpu.run().unwrap(), VcpuExit::Interrupted);
    }

    #[test]
    #[expect(unsafe_code, reason = "memory that nobody touches")]
    fn a_slot_that_changes_is_still_one_slot() {
        let fake = Fake::new();
        let (first, second) = (fake.create_vm(&OPTIONS).unwrap(), fake.create_vm(&OPTIONS).unwrap());
        let slot = MemorySlot {
            slot: 0,
            guest_address: 0,
            size: 4096,
            host_address: 0,
            read_only: false,
            log_dirty: false,
        };
        for (vm, slots) in [(&first, 1), (&second, 2)] {
            for log_dirty in [false, true] {
                // SAFETY: the fake never touches the memory.
                unsafe { vm.set_memory_slot(&MemorySlot { log_dirty, ..slot }) }.unwrap();
                assert_eq!(fake.live().slots, slots);
                assert_eq!(fake.live().logged, slots - usize::from(!log_dirty));
            }
        }
        first.remove_memory_slot(&slot).unwrap();
        assert_eq!(fake.live().slots, 1);
        drop(second);
        assert_eq!(fake.live().slots, 0);
    }

    #[test]
    fn fails_the_nth_call_once() {
        let fake = Fake::new();
        fake.fail_nth(2);
        let vm = fake.create_vm(&OPTIONS).unwrap();
        assert_eq!(vm.create_vcpu(0).unwrap_err().call, "KVM_CREATE_VCPU");
        let vcpu = vm.create_vcpu(0).unwrap();
        fake.unsupported("KVM_GET_DEBUGREGS");
        assert!(vcpu.debug_regs().unwrap_err().is_unsupported());
        assert!(vcpu.debug_regs().unwrap_err().is_unsupported());
        drop((vm, vcpu));
        assert_eq!(fake.live(), Live::default());
    }
}
