//! A vCPU's state as owned types, independent of any hypervisor's structs.

/// General-purpose registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[expect(missing_docs, reason = "the field names are the registers' names")]
pub struct Regs {
    pub rax: u64,
    pub rbx: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub rsp: u64,
    pub rbp: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
    pub rip: u64,
    pub rflags: u64,
}

/// A segment register with its hidden part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Segment {
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes, granularity applied.
    pub limit: u32,
    /// Visible selector.
    pub selector: u16,
    /// Type field, 4 bits.
    pub type_: u8,
    /// Descriptor privilege level, 2 bits.
    pub dpl: u8,
    /// Present.
    pub present: bool,
    /// Default operation size is 32 bit.
    pub db: bool,
    /// Code or data, as opposed to system.
    pub s: bool,
    /// 64-bit code.
    pub l: bool,
    /// Granularity.
    pub g: bool,
    /// Available for software.
    pub avl: bool,
    /// Not loaded.
    pub unusable: bool,
}

/// GDTR or IDTR.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DescriptorTable {
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u16,
}

/// Segment and control registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[expect(missing_docs, reason = "the field names are the registers' names")]
pub struct Sregs {
    pub cs: Segment,
    pub ds: Segment,
    pub es: Segment,
    pub fs: Segment,
    pub gs: Segment,
    pub ss: Segment,
    pub tr: Segment,
    pub ldt: Segment,
    pub gdt: DescriptorTable,
    pub idt: DescriptorTable,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub cr8: u64,
    pub efer: u64,
    pub apic_base: u64,
    /// External interrupts injected but not yet taken, one bit per vector.
    pub interrupt_bitmap: [u64; 4],
}

/// An extended control register.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Xcr {
    /// Number; 0 is XCR0.
    pub index: u32,
    /// Value.
    pub value: u64,
}

/// A model-specific register.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MsrEntry {
    /// Index.
    pub index: u32,
    /// Value.
    pub value: u64,
}

/// One leaf of CPUID.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CpuidEntry {
    /// EAX on input.
    pub function: u32,
    /// ECX on input, where `index_significant`.
    pub index: u32,
    /// Whether ECX on input matters (KVM_CPUID_FLAG_SIGNIFCANT_INDEX).
    pub index_significant: bool,
    /// EAX on output.
    pub eax: u32,
    /// EBX on output.
    pub ebx: u32,
    /// ECX on output.
    pub ecx: u32,
    /// EDX on output.
    pub edx: u32,
}

/// Bytes of the local APIC's register page that matter (KVM_APIC_REG_SIZE).
pub const LAPIC_SIZE: usize = 1024;

/// The local APIC's register page.
#[derive(Clone, PartialEq, Eq)]
pub struct Lapic(pub Box<[u8; LAPIC_SIZE]>);

impl std::fmt::Debug for Lapic {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Lapic(..)")
    }
}

impl Default for Lapic {
    fn default() -> Self {
        Self(Box::new([0; LAPIC_SIZE]))
    }
}

impl Lapic {
    /// The 32-bit register at byte offset `offset` (Intel SDM volume 3, "Local APIC Register Address
    /// Map"), 0 past the end.
    pub fn register(&self, offset: usize) -> u32 {
        let bytes = self.0.get(offset..).and_then(|rest| rest.first_chunk::<4>());
        bytes.map_or(0, |b| u32::from_le_bytes(*b))
    }

    /// Sets the 32-bit register at byte offset `offset`; nothing past the end.
    pub fn set_register(&mut self, offset: usize, value: u32) {
        if let Some(bytes) = self.0.get_mut(offset..).and_then(|rest| rest.first_chunk_mut::<4>()) {
            *bytes = value.to_le_bytes();
        }
    }
}

/// What a vCPU does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MpState {
    /// It runs.
    #[default]
    Runnable,
    /// An application processor that nobody has started.
    Uninitialized,
    /// INIT came, SIPI has not.
    InitReceived,
    /// Halted until an interrupt.
    Halted,
    /// SIPI came.
    SipiReceived,
}

/// Pending exceptions, interrupts and NMIs (KVM_GET_VCPU_EVENTS).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct VcpuEvents {
    /// An exception is being injected.
    pub exception_injected: bool,
    /// Its vector.
    pub exception_nr: u8,
    /// It has an error code.
    pub exception_has_error_code: bool,
    /// It waits for its intercept or delivery.
    pub exception_pending: bool,
    /// The error code.
    pub exception_error_code: u32,
    /// The exception's payload (CR2 or DR6 value), where there is one.
    pub exception_payload: Option<u64>,
    /// An interrupt is being injected.
    pub interrupt_injected: bool,
    /// Its vector.
    pub interrupt_nr: u8,
    /// It came from `int n`.
    pub interrupt_soft: bool,
    /// Interrupt shadow (after STI or MOV SS), KVM's bits.
    pub interrupt_shadow: u8,
    /// An NMI is being injected.
    pub nmi_injected: bool,
    /// NMIs waiting.
    pub nmi_pending: u8,
    /// NMIs are blocked until IRET.
    pub nmi_masked: bool,
    /// Vector of a start-up IPI.
    pub sipi_vector: u32,
    /// A triple fault waits.
    pub triple_fault_pending: bool,
    /// System management mode.
    pub smi: Smi,
    /// Which parts the hypervisor says are valid (KVM_VCPUEVENT_VALID_*).
    pub flags: u32,
}

/// System management mode's part of [`VcpuEvents`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Smi {
    /// In system management mode.
    pub smm: bool,
    /// An SMI waits.
    pub pending: bool,
    /// In SMM with NMIs blocked.
    pub smm_inside_nmi: bool,
    /// An INIT is latched.
    pub latched_init: bool,
}

/// Debug registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DebugRegs {
    /// DR0 to DR3.
    pub db: [u64; 4],
    /// DR6.
    pub dr6: u64,
    /// DR7.
    pub dr7: u64,
    /// KVM's flags.
    pub flags: u64,
}
