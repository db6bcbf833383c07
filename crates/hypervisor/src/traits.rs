//! What a VMM needs of a hypervisor.

use std::fmt;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use crate::Result;
use crate::state::{CpuidEntry, DebugRegs, Lapic, MpState, MsrEntry, Regs, Sregs, VcpuEvents, Xcr};

/// The system's hypervisor.
pub trait Hypervisor: Send + Sync + fmt::Debug {
    /// Its name for people, e.g. `KVM`.
    fn name(&self) -> &'static str;

    /// A VM without memory and vCPUs. It lives until the last clone and the last of its vCPUs are dropped.
    ///
    /// # Errors
    /// A call failed; nothing is left behind.
    fn create_vm(&self, options: &VmOptions) -> Result<Arc<dyn Vm>>;

    /// The CPUID leaves that guests can be given (KVM_GET_SUPPORTED_CPUID).
    ///
    /// # Errors
    /// The call failed.
    fn supported_cpuid(&self) -> Result<Vec<CpuidEntry>>;

    /// The MSRs that make up a vCPU's state here (KVM_GET_MSR_INDEX_LIST).
    ///
    /// # Errors
    /// The call failed.
    fn msr_indices(&self) -> Result<Vec<u32>>;

    /// Most vCPUs that a VM can have.
    fn max_vcpus(&self) -> u32;
}

/// How a VM is created.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VmOptions {
    /// Pins of the IOAPIC that this process emulates; their routes take the first GSIs. The local APICs
    /// are the hypervisor's.
    pub ioapic_pins: u32,
    /// Guest physical address of three pages that guests do not see (Intel's real mode needs them); the
    /// page before them is the hypervisor's, too.
    pub tss_address: u64,
}

/// A VM.
pub trait Vm: Send + Sync + fmt::Debug {
    /// Creates the vCPU with local APIC ID `id`.
    ///
    /// # Errors
    /// The call failed, or the vCPU exists.
    fn create_vcpu(&self, id: u32) -> Result<Box<dyn Vcpu>>;

    /// Maps host memory into the guest, or changes the flags of a slot (KVM_SET_USER_MEMORY_REGION).
    ///
    /// # Errors
    /// The call failed.
    ///
    /// # Safety
    /// `slot.host_address` to `+ slot.size` must stay mapped in this process until the slot is removed or
    /// the VM is gone, and be memory to which Rust holds no references: the guest writes it at any time.
    #[expect(unsafe_code, reason = "the guest gets host memory; only the caller knows what it is")]
    unsafe fn set_memory_slot(&self, slot: &MemorySlot) -> Result<()>;

    /// Unmaps a slot.
    ///
    /// # Errors
    /// The call failed.
    fn remove_memory_slot(&self, slot: &MemorySlot) -> Result<()>;

    /// Fetches and clears the pages of `slot` that vCPUs wrote, one bit per 4 KiB page, lowest first
    /// (KVM_GET_DIRTY_LOG).
    ///
    /// # Errors
    /// The call failed; no bit was lost.
    fn dirty_log(&self, slot: &MemorySlot) -> Result<Vec<u64>>;

    /// Raises a message-signalled interrupt (KVM_SIGNAL_MSI).
    ///
    /// # Errors
    /// The call failed. That no vCPU takes the interrupt is no failure.
    fn signal_msi(&self, msi: Msi) -> Result<()>;

    /// Replaces the whole table of routes (KVM_SET_GSI_ROUTING). For [`InterruptRouter`](crate::router)
    /// alone.
    ///
    /// # Errors
    /// The call failed; the table is as it was.
    fn set_routes(&self, routes: &[MsiRoute]) -> Result<()>;

    /// A write to `event` raises `gsi` (KVM_IRQFD).
    ///
    /// # Errors
    /// The call failed.
    fn attach_irqfd(&self, event: &EventFd, gsi: u32) -> Result<()>;

    /// Undoes [`attach_irqfd`](Self::attach_irqfd).
    ///
    /// # Errors
    /// The call failed.
    fn detach_irqfd(&self, event: &EventFd, gsi: u32) -> Result<()>;

    /// A guest write of any length at `address` signals `event` (KVM_IOEVENTFD).
    ///
    /// # Errors
    /// The call failed.
    fn attach_ioeventfd(&self, address: IoEventAddress, event: &EventFd) -> Result<()>;

    /// Undoes [`attach_ioeventfd`](Self::attach_ioeventfd).
    ///
    /// # Errors
    /// The call failed.
    fn detach_ioeventfd(&self, address: IoEventAddress, event: &EventFd) -> Result<()>;

    /// The paravirtual clock (KVM_GET_CLOCK).
    ///
    /// # Errors
    /// The call failed.
    fn clock(&self) -> Result<ClockData>;

    /// Sets the paravirtual clock (KVM_SET_CLOCK). With `realtime` given, the clock moves on by the time
    /// that has passed since.
    ///
    /// # Errors
    /// The call failed.
    fn set_clock(&self, clock: &ClockData) -> Result<()>;
}

/// Host memory that the guest sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemorySlot {
    /// Number of the slot; one per VM and use.
    pub slot: u32,
    /// First guest physical address, a multiple of 4 KiB.
    pub guest_address: u64,
    /// Bytes, a multiple of 4 KiB.
    pub size: u64,
    /// Where it is mapped in this process.
    pub host_address: u64,
    /// The guest may not write; writes exit as MMIO.
    pub read_only: bool,
    /// Pages that vCPUs write are logged.
    pub log_dirty: bool,
}

/// What a message-signalled interrupt says (Intel SDM volume 3, "Message Signalled Interrupts").
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Msi {
    /// Message address, both halves.
    pub address: u64,
    /// Message data.
    pub data: u32,
}

/// One route: interrupt number to message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MsiRoute {
    /// Interrupt number.
    pub gsi: u32,
    /// Where it goes.
    pub msi: Msi,
}

/// Where an ioeventfd listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum IoEventAddress {
    /// A port.
    Pio(u64),
    /// A guest physical address.
    Mmio(u64),
}

/// The paravirtual clock of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ClockData {
    /// Guest's nanoseconds since boot.
    pub clock: u64,
    /// Host's nanoseconds since 1970 at that moment, where the host tells.
    pub realtime: Option<u64>,
    /// Host's TSC at that moment, where the host tells.
    pub host_tsc: Option<u64>,
}

/// Makes a vCPU return from [`Vcpu::run`] with [`VcpuExit::Interrupted`].
pub trait Kick: Send + Sync + fmt::Debug {
    /// If the vCPU is not running, its next run returns at once. Never blocks.
    fn kick(&self);
}

/// A vCPU. It belongs to one thread, which makes all calls.
pub trait Vcpu: Send + fmt::Debug {
    /// Ties the vCPU to the calling thread and gives the handle by which other threads interrupt it.
    /// Once, by the thread that runs the vCPU and drops it.
    ///
    /// # Errors
    /// The vCPU has another thread or the thread another vCPU, or its signal could not be set up.
    fn bind(&mut self) -> Result<Arc<dyn Kick>>;

    /// Runs the guest until something has to be done. Data of a read exit are filled in before the next
    /// call, which first of all completes that access: after [`VcpuExit::Interrupted`] the state is whole.
    ///
    /// # Errors
    /// The guest cannot go on.
    fn run(&mut self) -> Result<VcpuExit<'_>>;

    /// Sets what CPUID tells the guest (KVM_SET_CPUID2). Once, before the first run.
    ///
    /// # Errors
    /// The call failed.
    fn set_cpuid(&mut self, entries: &[CpuidEntry]) -> Result<()>;

    /// What CPUID tells the guest (KVM_GET_CPUID2).
    ///
    /// # Errors
    /// The call failed.
    fn cpuid(&self) -> Result<Vec<CpuidEntry>>;

    /// General-purpose registers.
    ///
    /// # Errors
    /// The call failed.
    fn regs(&self) -> Result<Regs>;
    /// Sets [`regs`](Self::regs).
    ///
    /// # Errors
    /// The call failed.
    fn set_regs(&mut self, regs: &Regs) -> Result<()>;

    /// Segment and control registers.
    ///
    /// # Errors
    /// The call failed.
    fn sregs(&self) -> Result<Sregs>;
    /// Sets [`sregs`](Self::sregs).
    ///
    /// # Errors
    /// The call failed.
    fn set_sregs(&mut self, sregs: &Sregs) -> Result<()>;

    /// The XSAVE area: x87, SSE, AVX and later (KVM_GET_XSAVE).
    ///
    /// # Errors
    /// The call failed.
    fn xsave(&self) -> Result<Vec<u8>>;
    /// Sets [`xsave`](Self::xsave).
    ///
    /// # Errors
    /// The area has components that this host does not know, or the call failed.
    fn set_xsave(&mut self, area: &[u8]) -> Result<()>;

    /// Extended control registers (XCR0).
    ///
    /// # Errors
    /// The call failed.
    fn xcrs(&self) -> Result<Vec<Xcr>>;
    /// Sets [`xcrs`](Self::xcrs).
    ///
    /// # Errors
    /// More of them than the hypervisor has, or the call failed.
    fn set_xcrs(&mut self, xcrs: &[Xcr]) -> Result<()>;

    /// Reads MSRs; those that the vCPU does not have are left out.
    ///
    /// # Errors
    /// The call failed.
    fn msrs(&self, indices: &[u32]) -> Result<Vec<MsrEntry>>;
    /// Writes MSRs in order and returns the indices of those that were refused.
    ///
    /// # Errors
    /// The call failed.
    fn set_msrs(&mut self, entries: &[MsrEntry]) -> Result<Vec<u32>>;

    /// The local APIC's register page.
    ///
    /// # Errors
    /// The call failed.
    fn lapic(&self) -> Result<Lapic>;
    /// Sets [`lapic`](Self::lapic).
    ///
    /// # Errors
    /// The call failed.
    fn set_lapic(&mut self, lapic: &Lapic) -> Result<()>;

    /// Pending exceptions, interrupts, NMIs.
    ///
    /// # Errors
    /// The call failed.
    fn events(&self) -> Result<VcpuEvents>;
    /// Sets [`events`](Self::events).
    ///
    /// # Errors
    /// The call failed.
    fn set_events(&mut self, events: &VcpuEvents) -> Result<()>;

    /// Whether the vCPU runs, halts or waits for start-up.
    ///
    /// # Errors
    /// The call failed.
    fn mp_state(&self) -> Result<MpState>;
    /// Sets [`mp_state`](Self::mp_state).
    ///
    /// # Errors
    /// The call failed.
    fn set_mp_state(&mut self, state: MpState) -> Result<()>;

    /// Debug registers.
    ///
    /// # Errors
    /// The call failed.
    fn debug_regs(&self) -> Result<DebugRegs>;
    /// Sets [`debug_regs`](Self::debug_regs).
    ///
    /// # Errors
    /// The call failed.
    fn set_debug_regs(&mut self, regs: &DebugRegs) -> Result<()>;

    /// The guest's TSC rate in kHz.
    ///
    /// # Errors
    /// The call failed.
    fn tsc_khz(&self) -> Result<u32>;
    /// Sets [`tsc_khz`](Self::tsc_khz).
    ///
    /// # Errors
    /// The host cannot give that rate: it is more than 250 ppm from the host's own, and the processor does not scale. Or the
    /// call failed.
    fn set_tsc_khz(&mut self, khz: u32) -> Result<()>;

    /// What is added to the host's TSC, scaled to the guest's rate, to make the guest's (KVM_VCPU_TSC_OFFSET); it wraps.
    ///
    /// # Errors
    /// The call failed.
    fn tsc_offset(&self) -> Result<u64>;
    /// Sets [`tsc_offset`](Self::tsc_offset). Two vCPUs with one offset have one TSC.
    ///
    /// # Errors
    /// The call failed.
    fn set_tsc_offset(&mut self, offset: u64) -> Result<()>;

    /// What the vCPU has of guests of its own, in the hypervisor's form; `None` while it has none.
    ///
    /// # Errors
    /// The call failed.
    fn nested_state(&self) -> Result<Option<Vec<u8>>>;
    /// Sets [`nested_state`](Self::nested_state). After the control registers, which turn VMX or SVM on.
    ///
    /// # Errors
    /// The state is another processor's, or the call failed.
    fn set_nested_state(&mut self, state: &[u8]) -> Result<()>;

    /// Tells the guest's paravirtual clock that it was paused, so that its watchdogs keep still
    /// (KVM_KVMCLOCK_CTRL).
    ///
    /// # Errors
    /// The guest has no such clock (EINVAL), or the call failed.
    fn notify_paused(&self) -> Result<()>;

    /// Injects a non-maskable interrupt.
    ///
    /// # Errors
    /// The call failed.
    fn nmi(&self) -> Result<()>;
}

/// Why the guest stopped.
#[derive(Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum VcpuExit<'a> {
    /// The guest reads a port; `data` is one or, for string instructions, several accesses of `size`
    /// bytes each.
    PioRead {
        /// The port.
        port: u16,
        /// Bytes of one access: 1, 2 or 4.
        size: u8,
        /// To be filled in.
        data: &'a mut [u8],
    },
    /// The guest writes a port; as [`PioRead`](Self::PioRead).
    PioWrite {
        /// The port.
        port: u16,
        /// Bytes of one access: 1, 2 or 4.
        size: u8,
        /// What it writes.
        data: &'a [u8],
    },
    /// The guest reads where no memory is.
    MmioRead {
        /// Guest physical address.
        address: u64,
        /// To be filled in; 1 to 8 bytes.
        data: &'a mut [u8],
    },
    /// The guest writes where no memory is.
    MmioWrite {
        /// Guest physical address.
        address: u64,
        /// What it writes; 1 to 8 bytes.
        data: &'a [u8],
    },
    /// A vCPU ended the interrupt with this vector, and the IOAPIC wants to know.
    IoapicEoi(u8),
    /// The guest executed HLT and the hypervisor does not handle it.
    Halt,
    /// Triple fault.
    Shutdown,
    /// The guest asked the hypervisor for a reset or shutdown, or crashed (KVM_EXIT_SYSTEM_EVENT).
    SystemEvent(u32),
    /// Somebody kicked, or there is nothing to run yet.
    Interrupted,
    /// The hypervisor could not go on emulating.
    InternalError {
        /// KVM's suberror.
        suberror: u32,
    },
    /// The processor refused to enter the guest.
    FailedEntry {
        /// Hardware's reason.
        reason: u64,
    },
    /// Anything else, by the hypervisor's number.
    Other(u32),
}
