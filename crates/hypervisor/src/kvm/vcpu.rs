//! A vCPU in KVM.
#![expect(unsafe_code, reason = "the page that is shared with KVM, and the XSAVE area")]

use std::mem::ManuallyDrop;
use std::sync::Arc;

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE,
    KVM_MP_STATE_SIPI_RECEIVED, KVM_MP_STATE_UNINITIALIZED, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET,
    KVM_VCPUEVENT_VALID_TRIPLE_FAULT, KVMIO, Msrs, Xsave, kvm_device_attr, kvm_lapic_state, kvm_mp_state,
    kvm_msr_entry, kvm_xcr, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{VcpuExit as KvmExit, VcpuFd, VmFd};
use vmm_sys_util::ioctl::{_IOC_WRITE, ioctl_expr, ioctl_with_ref};

use super::kick::{Binding, bound_already};
use super::{convert, failed, nested};
use crate::state::{CpuidEntry, DebugRegs, Lapic, MpState, MsrEntry, Regs, Sregs, VcpuEvents, Xcr};
use crate::{HypervisorError, Kick, Result, Vcpu, VcpuExit};

/// Bytes of the XSAVE area that KVM_GET_XSAVE knows.
const XSAVE_SIZE: usize = 4096;
/// The legacy area and the header, which every XSAVE area has.
const XSAVE_HEADER_END: usize = 576;
/// KVM gives a rate within this of the host's without scaling (its parameter `tsc_tolerance_ppm`).
const TSC_TOLERANCE_PPM: u64 = 250;

const KVM_SET_DEVICE_ATTR: libc::c_ulong = ioctl_expr(_IOC_WRITE, KVMIO, 0xe1, ATTRIBUTE_SIZE);
const KVM_GET_DEVICE_ATTR: libc::c_ulong = ioctl_expr(_IOC_WRITE, KVMIO, 0xe2, ATTRIBUTE_SIZE);
const ATTRIBUTE_SIZE: libc::c_uint = size_of::<kvm_device_attr>() as libc::c_uint;

/// The attribute KVM_VCPU_TSC_OFFSET, whose value is in this process at `addr`.
fn tsc_offset_at(addr: u64) -> kvm_device_attr {
    kvm_device_attr { group: KVM_VCPU_TSC_CTRL, attr: KVM_VCPU_TSC_OFFSET.into(), addr, flags: 0 }
}

fn last(call: &'static str) -> HypervisorError {
    HypervisorError { call, source: std::io::Error::last_os_error() }
}

#[derive(Debug)]
pub(super) struct KvmVcpu {
    /// Points into the page that `fd` maps; dropped before it.
    binding: Option<Binding>,
    fd: ManuallyDrop<VcpuFd>,
    /// Bytes of the XSAVE area on this host (KVM_CAP_XSAVE2), at least `XSAVE_SIZE`.
    xsave_size: usize,
    /// KVM_CAP_TSC_CONTROL.
    scales_tsc: bool,
    /// KVM_CAP_X86_TRIPLE_FAULT_EVENT, enabled.
    tells_triple_fault: bool,
    /// The VM outlives its vCPUs.
    _vm: Arc<VmFd>,
}

/// What this host can do with a vCPU, by KVM's capabilities.
#[derive(Clone, Copy)]
pub(super) struct Can {
    /// KVM_CAP_XSAVE2, in bytes.
    pub(super) xsave_size: i32,
    /// KVM_CAP_TSC_CONTROL.
    pub(super) scale_tsc: bool,
    /// KVM_CAP_X86_TRIPLE_FAULT_EVENT.
    pub(super) tell_triple_fault: bool,
}

impl KvmVcpu {
    pub(super) fn new(fd: VcpuFd, vm: Arc<VmFd>, can: Can) -> Self {
        let xsave_size = usize::try_from(can.xsave_size).unwrap_or(0).max(XSAVE_SIZE);
        let (scales_tsc, tells_triple_fault) = (can.scale_tsc, can.tell_triple_fault);
        let fd = ManuallyDrop::new(fd);
        Self { binding: None, fd, xsave_size, scales_tsc, tells_triple_fault, _vm: vm }
    }

    fn xsave_buffer(&self) -> Result<Xsave> {
        let extra = (self.xsave_size - XSAVE_SIZE).div_ceil(size_of::<u32>());
        Xsave::new(extra).map_err(|_| HypervisorError::from_errno("KVM_GET_XSAVE2", libc::E2BIG))
    }

    /// Size of one access of the port I/O exit just taken; for a string instruction the data hold several.
    fn pio_size(&mut self) -> u8 {
        // SAFETY: the last exit was KVM_EXIT_IO, so `io` is the member that KVM filled in.
        unsafe { self.fd.get_kvm_run().__bindgen_anon_1.io.size }
    }

    fn internal_error(&mut self) -> u32 {
        // SAFETY: the last exit was KVM_EXIT_INTERNAL_ERROR, so `internal` is the member that KVM filled in.
        unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal.suberror }
    }
}

/// What kind of exit it was, without borrowing the vCPU.
enum Raw {
    PioRead { port: u16, data: *mut u8, len: usize },
    PioWrite { port: u16, data: *const u8, len: usize },
    MmioRead { address: u64, data: *mut u8, len: usize },
    MmioWrite { address: u64, data: *const u8, len: usize },
    Other(VcpuExit<'static>),
    InternalError,
}

impl From<KvmExit<'_>> for Raw {
    fn from(exit: KvmExit<'_>) -> Self {
        match exit {
            KvmExit::IoIn(port, data) => Self::PioRead { port, data: data.as_mut_ptr(), len: data.len() },
            KvmExit::IoOut(port, data) => Self::PioWrite { port, data: data.as_ptr(), len: data.len() },
            KvmExit::MmioRead(address, data) => {
                Self::MmioRead { address, data: data.as_mut_ptr(), len: data.len() }
            }
            KvmExit::MmioWrite(address, data) => {
                Self::MmioWrite { address, data: data.as_ptr(), len: data.len() }
            }
            KvmExit::IoapicEoi(vector) => Self::Other(VcpuExit::IoapicEoi(vector)),
            KvmExit::Hlt => Self::Other(VcpuExit::Halt),
            KvmExit::Shutdown => Self::Other(VcpuExit::Shutdown),
            KvmExit::SystemEvent(kind, _) => Self::Other(VcpuExit::SystemEvent(kind)),
            KvmExit::Intr => Self::Other(VcpuExit::Interrupted),
            KvmExit::InternalError => Self::InternalError,
            KvmExit::FailEntry(reason, _) => Self::Other(VcpuExit::FailedEntry { reason }),
            KvmExit::Unsupported(reason) => Self::Other(VcpuExit::Other(reason)),
            _ => Self::Other(VcpuExit::Other(0)),
        }
    }
}

impl KvmVcpu {
    /// Gives the exit just taken its data, for as long as the vCPU is borrowed.
    ///
    /// # Safety
    /// `raw` is the last exit of this vCPU's `fd`, and nobody has a reference to its data.
    unsafe fn exit(&mut self, raw: Raw) -> VcpuExit<'_> {
        use std::slice::{from_raw_parts, from_raw_parts_mut};
        match raw {
            Raw::PioRead { port, data, len } => {
                let size = self.pio_size().max(1);
                // SAFETY: data of the last exit, in the pages that `fd` keeps mapped, and not in the
                // fields that `pio_size` looks at; the result borrows the vCPU.
                VcpuExit::PioRead { port, size, data: unsafe { from_raw_parts_mut(data, len) } }
            }
            Raw::PioWrite { port, data, len } => {
                let size = self.pio_size().max(1);
                // SAFETY: as above.
                VcpuExit::PioWrite { port, size, data: unsafe { from_raw_parts(data, len) } }
            }
            Raw::MmioRead { address, data, len } => {
                // SAFETY: as above.
                VcpuExit::MmioRead { address, data: unsafe { from_raw_parts_mut(data, len) } }
            }
            Raw::MmioWrite { address, data, len } => {
                // SAFETY: as above.
                VcpuExit::MmioWrite { address, data: unsafe { from_raw_parts(data, len) } }
            }
            Raw::Other(exit) => exit,
            Raw::InternalError => VcpuExit::InternalError { suberror: self.internal_error() },
        }
    }
}

impl Drop for KvmVcpu {
    fn drop(&mut self) {
        let elsewhere = self.binding.as_ref().is_some_and(|binding| !binding.is_here());
        self.binding = None;
        if elsewhere {
            // A signal handler of the other thread may still write to the page.
            log::error!("a vCPU was dropped by another thread than its own; its descriptor stays open");
            return;
        }
        // SAFETY: `fd` is not used any more: this value is being dropped.
        unsafe { ManuallyDrop::drop(&mut self.fd) };
    }
}

impl Vcpu for KvmVcpu {
    fn bind(&mut self) -> Result<Arc<dyn Kick>> {
        if let Some(binding) = &self.binding {
            return if binding.is_here() { Ok(binding.kicker()) } else { Err(bound_already()) };
        }
        let byte = &raw mut self.fd.get_kvm_run().immediate_exit;
        // SAFETY: the page stays mapped as long as `fd`, which drop keeps for ever if this thread is not
        // the one that drops the binding.
        let binding = unsafe { Binding::new(byte) }?;
        Ok(self.binding.insert(binding).kicker())
    }

    fn run(&mut self) -> Result<VcpuExit<'_>> {
        let raw = match self.fd.run() {
            Ok(exit) => Raw::from(exit),
            Err(e) if e.errno() == libc::EINTR || e.errno() == libc::EAGAIN => {
                self.fd.set_kvm_immediate_exit(0);
                Raw::Other(VcpuExit::Interrupted)
            }
            Err(e) => return Err(failed("KVM_RUN")(e)),
        };
        // SAFETY: the exit that `fd` just took; the references in it ended with `Raw::from`.
        Ok(unsafe { self.exit(raw) })
    }

    fn set_cpuid(&mut self, entries: &[CpuidEntry]) -> Result<()> {
        let entries: Vec<_> = entries.iter().map(convert::to_cpuid_entry).collect();
        let list = CpuId::from_entries(&entries)
            .map_err(|_| HypervisorError::from_errno("KVM_SET_CPUID2", libc::E2BIG))?;
        self.fd.set_cpuid2(&list).map_err(failed("KVM_SET_CPUID2"))
    }

    fn cpuid(&self) -> Result<Vec<CpuidEntry>> {
        let list = self.fd.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(failed("KVM_GET_CPUID2"))?;
        Ok(list.as_slice().iter().map(convert::cpuid_entry).collect())
    }

    fn regs(&self) -> Result<Regs> {
        self.fd.get_regs().map(|r| convert::regs(&r)).map_err(failed("KVM_GET_REGS"))
    }

    fn set_regs(&mut self, regs: &Regs) -> Result<()> {
        self.fd.set_regs(&convert::to_regs(regs)).map_err(failed("KVM_SET_REGS"))
    }

    fn sregs(&self) -> Result<Sregs> {
        self.fd.get_sregs().map(|s| convert::sregs(&s)).map_err(failed("KVM_GET_SREGS"))
    }

    fn set_sregs(&mut self, sregs: &Sregs) -> Result<()> {
        self.fd.set_sregs(&convert::to_sregs(sregs)).map_err(failed("KVM_SET_SREGS"))
    }

    fn xsave(&self) -> Result<Vec<u8>> {
        let words: Vec<u32> = if self.xsave_size > XSAVE_SIZE {
            let mut area = self.xsave_buffer()?;
            // SAFETY: the buffer is as large as KVM_CAP_XSAVE2 says.
            unsafe { self.fd.get_xsave2(&mut area) }.map_err(failed("KVM_GET_XSAVE2"))?;
            let head = area.as_fam_struct_ref().xsave.region;
            head.iter().chain(area.as_slice()).copied().collect()
        } else {
            self.fd.get_xsave().map_err(failed("KVM_GET_XSAVE"))?.region.to_vec()
        };
        Ok(words.iter().flat_map(|word| word.to_le_bytes()).collect())
    }

    fn set_xsave(&mut self, area: &[u8]) -> Result<()> {
        // The offsets of components are the same on every host: of a smaller area the others are in their initial state,
        // of a larger one they must be.
        let (area, rest) = area.split_at(area.len().min(self.xsave_size));
        if area.len() < XSAVE_HEADER_END
            || !area.len().is_multiple_of(4)
            || rest.iter().any(|byte| *byte != 0)
        {
            return Err(HypervisorError::from_errno("KVM_SET_XSAVE", libc::EINVAL));
        }
        let mut words =
            area.chunks_exact(4).map(|c| c.iter().rev().fold(0, |word, byte| word << 8 | u32::from(*byte)));
        let mut head = kvm_xsave::default();
        head.region.iter_mut().zip(&mut words).for_each(|(to, from)| *to = from);
        if self.xsave_size <= XSAVE_SIZE {
            // SAFETY: this host's area is no larger than the struct.
            return unsafe { self.fd.set_xsave(&head) }.map_err(failed("KVM_SET_XSAVE"));
        }
        let mut buffer = self.xsave_buffer()?;
        buffer.as_mut_slice().iter_mut().zip(words).for_each(|(to, from)| *to = from);
        // SAFETY: only the head is replaced; the length of the flexible part stays as it is.
        unsafe { buffer.as_mut_fam_struct() }.xsave.region = head.region;
        // SAFETY: the buffer is as large as KVM_CAP_XSAVE2 says.
        unsafe { self.fd.set_xsave2(&buffer) }.map_err(failed("KVM_SET_XSAVE"))
    }

    fn xcrs(&self) -> Result<Vec<Xcr>> {
        let list = self.fd.get_xcrs().map_err(failed("KVM_GET_XCRS"))?;
        let count = list.nr_xcrs as usize;
        Ok(list.xcrs.iter().take(count).map(|x| Xcr { index: x.xcr, value: x.value }).collect())
    }

    fn set_xcrs(&mut self, xcrs: &[Xcr]) -> Result<()> {
        let mut list = kvm_xcrs::default();
        let count = u32::try_from(xcrs.len()).ok().filter(|_| xcrs.len() <= list.xcrs.len());
        list.nr_xcrs = count.ok_or_else(|| HypervisorError::from_errno("KVM_SET_XCRS", libc::E2BIG))?;
        for (to, from) in list.xcrs.iter_mut().zip(xcrs) {
            *to = kvm_xcr { xcr: from.index, value: from.value, ..Default::default() };
        }
        self.fd.set_xcrs(&list).map_err(failed("KVM_SET_XCRS"))
    }

    fn msrs(&self, indices: &[u32]) -> Result<Vec<MsrEntry>> {
        let mut found = Vec::with_capacity(indices.len());
        let mut rest = indices;
        while !rest.is_empty() {
            let entries: Vec<_> =
                rest.iter().map(|index| kvm_msr_entry { index: *index, ..Default::default() }).collect();
            let mut list = Msrs::from_entries(&entries)
                .map_err(|_| HypervisorError::from_errno("KVM_GET_MSRS", libc::E2BIG))?;
            let count = self.fd.get_msrs(&mut list).map_err(failed("KVM_GET_MSRS"))?;
            found.extend(
                list.as_slice().iter().take(count).map(|e| MsrEntry { index: e.index, value: e.data }),
            );
            // KVM stops at the first that it refuses.
            rest = rest.get(count + 1..).unwrap_or_default();
        }
        Ok(found)
    }

    fn set_msrs(&mut self, entries: &[MsrEntry]) -> Result<Vec<u32>> {
        let mut refused = Vec::new();
        let mut rest = entries;
        while !rest.is_empty() {
            let list: Vec<_> = rest
                .iter()
                .map(|e| kvm_msr_entry { index: e.index, data: e.value, ..Default::default() })
                .collect();
            let list = Msrs::from_entries(&list)
                .map_err(|_| HypervisorError::from_errno("KVM_SET_MSRS", libc::E2BIG))?;
            let count = self.fd.set_msrs(&list).map_err(failed("KVM_SET_MSRS"))?;
            refused.extend(rest.get(count).map(|e| e.index));
            rest = rest.get(count + 1..).unwrap_or_default();
        }
        Ok(refused)
    }

    fn lapic(&self) -> Result<Lapic> {
        let state = self.fd.get_lapic().map_err(failed("KVM_GET_LAPIC"))?;
        let mut lapic = Lapic::default();
        lapic.0.iter_mut().zip(state.regs).for_each(|(to, from)| *to = from.to_ne_bytes()[0]);
        Ok(lapic)
    }

    fn set_lapic(&mut self, lapic: &Lapic) -> Result<()> {
        let mut state = kvm_lapic_state::default();
        state
            .regs
            .iter_mut()
            .zip(lapic.0.iter())
            .for_each(|(to, from)| *to = std::ffi::c_char::from_ne_bytes([*from]));
        self.fd.set_lapic(&state).map_err(failed("KVM_SET_LAPIC"))
    }

    fn events(&self) -> Result<VcpuEvents> {
        self.fd.get_vcpu_events().map(|e| convert::events(&e)).map_err(failed("KVM_GET_VCPU_EVENTS"))
    }

    fn set_events(&mut self, events: &VcpuEvents) -> Result<()> {
        let mut events = convert::to_events(events);
        if !self.tells_triple_fault && events.triple_fault.pending == 0 {
            // Another host's KVM told that none waits; this one refuses to hear it.
            events.flags &= !KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
        }
        self.fd.set_vcpu_events(&events).map_err(failed("KVM_SET_VCPU_EVENTS"))
    }

    fn mp_state(&self) -> Result<MpState> {
        let state = self.fd.get_mp_state().map_err(failed("KVM_GET_MP_STATE"))?;
        match state.mp_state {
            KVM_MP_STATE_RUNNABLE => Ok(MpState::Runnable),
            KVM_MP_STATE_UNINITIALIZED => Ok(MpState::Uninitialized),
            KVM_MP_STATE_INIT_RECEIVED => Ok(MpState::InitReceived),
            KVM_MP_STATE_HALTED => Ok(MpState::Halted),
            KVM_MP_STATE_SIPI_RECEIVED => Ok(MpState::SipiReceived),
            _ => Err(HypervisorError::from_errno("KVM_GET_MP_STATE", libc::EPROTO)),
        }
    }

    fn set_mp_state(&mut self, state: MpState) -> Result<()> {
        let mp_state = match state {
            MpState::Runnable => KVM_MP_STATE_RUNNABLE,
            MpState::Uninitialized => KVM_MP_STATE_UNINITIALIZED,
            MpState::InitReceived => KVM_MP_STATE_INIT_RECEIVED,
            MpState::Halted => KVM_MP_STATE_HALTED,
            MpState::SipiReceived => KVM_MP_STATE_SIPI_RECEIVED,
        };
        self.fd.set_mp_state(kvm_mp_state { mp_state }).map_err(failed("KVM_SET_MP_STATE"))
    }

    fn debug_regs(&self) -> Result<DebugRegs> {
        self.fd.get_debug_regs().map(|d| convert::debug_regs(&d)).map_err(failed("KVM_GET_DEBUGREGS"))
    }

    fn set_debug_regs(&mut self, regs: &DebugRegs) -> Result<()> {
        self.fd.set_debug_regs(&convert::to_debug_regs(regs)).map_err(failed("KVM_SET_DEBUGREGS"))
    }

    fn tsc_khz(&self) -> Result<u32> {
        self.fd.get_tsc_khz().map_err(failed("KVM_GET_TSC_KHZ"))
    }

    fn set_tsc_khz(&mut self, khz: u32) -> Result<()> {
        let host = u64::from(self.tsc_khz()?);
        if !self.scales_tsc && host.abs_diff(khz.into()) > host * TSC_TOLERANCE_PPM / 1_000_000 {
            // KVM would take a higher rate, and only catch up with it whenever it enters the guest.
            return Err(HypervisorError::from_errno("KVM_SET_TSC_KHZ", libc::EOPNOTSUPP));
        }
        self.fd.set_tsc_khz(khz).map_err(failed("KVM_SET_TSC_KHZ"))
    }

    fn tsc_offset(&self) -> Result<u64> {
        let mut offset = 0_u64;
        let attribute = tsc_offset_at((&raw mut offset) as u64);
        // SAFETY: KVM writes the 8 bytes of this attribute to `addr`, which is `offset`.
        match unsafe { ioctl_with_ref(&*self.fd, KVM_GET_DEVICE_ATTR, &attribute) } {
            0 => Ok(offset),
            _ => Err(last("KVM_GET_DEVICE_ATTR")),
        }
    }

    fn set_tsc_offset(&mut self, offset: u64) -> Result<()> {
        let attribute = tsc_offset_at((&raw const offset) as u64);
        // SAFETY: KVM reads the 8 bytes of this attribute at `addr`, which is `offset`.
        match unsafe { ioctl_with_ref(&*self.fd, KVM_SET_DEVICE_ATTR, &attribute) } {
            0 => Ok(()),
            _ => Err(last("KVM_SET_DEVICE_ATTR")),
        }
    }

    fn nested_state(&self) -> Result<Option<Vec<u8>>> {
        nested::get(&self.fd)
    }

    fn set_nested_state(&mut self, state: &[u8]) -> Result<()> {
        nested::set(&self.fd, state)
    }

    fn notify_paused(&self) -> Result<()> {
        self.fd.kvmclock_ctrl().map_err(failed("KVM_KVMCLOCK_CTRL"))
    }

    fn nmi(&self) -> Result<()> {
        self.fd.nmi().map_err(failed("KVM_NMI"))
    }
}
