//! A vCPU's saved state, and how it is captured and restored.
//!
//! What a host does not have is left out: a call that it does not know means "no such state". On restore
//! a register that the host refuses is an error, unless it reads as the wanted value all the same.
//!
//! # The order of the calls
//!
//! KVM's API does not say that its state calls depend on each other, but some do. Captured are
//!
//! 1. `KVM_GET_MP_STATE`: it makes KVM act on a pending INIT or SIPI, which resets the vCPU;
//! 2. `KVM_GET_VCPU_EVENTS`: of a pending page fault or debug exception it may write CR2 or DR6 (KVM_CAP_EXCEPTION_PAYLOAD);
//! 3. the rest, in any order.
//!
//! Restored are
//!
//! 1. CPUID and the MSRs about VMX, which say what the others may be and cannot change once VMX is on; the TSC's rate;
//! 2. control registers: EFER and CR4 turn on what the nested state and MSRs need, and the APIC base says how the local
//!    APIC's page is laid out;
//! 3. nested state: it makes the registers that follow those of the guest's guest;
//! 4. general registers, which forget a pending exception; XCR0 before the XSAVE area that it describes; debug registers;
//! 5. the local APIC, which starts its timer;
//! 6. MSRs, then the TSC, then the TSC deadline, which arms the timer if the local APIC is in that mode;
//! 7. events, for control and general registers change them;
//! 8. `KVM_SET_MP_STATE`, for an INIT among the events would change it;
//! 9. `KVM_KVMCLOCK_CTRL`: the guest's watchdogs are told that it was stopped.
//!
//! Some MSRs make KVM write to guest memory at once. They wait until the vCPU runs: before that the memory may be another
//! process's still, which hands it over.
//!
//! # Time
//!
//! The TSC of a vCPU is the host's, scaled, plus an offset. vCPUs whose offsets are equal have one TSC, and a restore keeps the
//! differences: the first vCPU's TSC is set by value, the others' by their offset from it. Written as values, one after the
//! other, they would depend on KVM's guess that writes within a second mean the same TSC; the same guess makes a
//! TSC of less than a second that of the new VM.

use std::time::Duration;

use minicbor::{Decode, Encode};
use vmm_hypervisor::state::{
    CpuidEntry, DebugRegs, DescriptorTable, LAPIC_SIZE, Lapic, MpState, MsrEntry, Regs, Segment, Smi, Sregs,
    VcpuEvents, Xcr,
};
use vmm_hypervisor::{HypervisorError, Vcpu};

/// A value other than 0 makes KVM write to guest memory: the wall clock (MSR_KVM_WALL_CLOCK, the old and the new one), Hyper-V's
/// hypercall page and its virtual processor assist page.
const WRITES_MEMORY: [u32; 4] = [0x11, 0x4b56_4d00, 0x4000_0001, 0x4000_0073];

/// Its deadline is armed by the write, so that it comes after the TSC and the local APIC.
const MSR_TSC_DEADLINE: u32 = 0x6e0;
const MSR_TSC: u32 = 0x10;

/// What KVM does not list, and a guest can change: the memory types of physical addresses (MTRRs: eight variable ranges, the
/// fixed ranges, the default). A host without one leaves it out.
const UNLISTED_MSRS: [u32; 28] = [
    0x200, 0x201, 0x202, 0x203, 0x204, 0x205, 0x206, 0x207, 0x208, 0x209, 0x20a, 0x20b, 0x20c, 0x20d, 0x20e,
    0x20f, 0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f, 0x2ff,
];

/// The MSRs that make up a vCPU's state on a host that lists these.
pub(crate) fn saved_msrs(listed: Vec<u32>) -> Vec<u32> {
    let unlisted = UNLISTED_MSRS.into_iter().filter(|index| !listed.contains(index));
    let unlisted: Vec<_> = unlisted.collect();
    listed.into_iter().chain(unlisted).collect()
}

/// Where the time of a restored guest goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TimeBase {
    /// In the VM that it was saved in, as if nothing had been.
    SameVm,
    /// In another VM: at the saved value, or so much later.
    After(Duration),
}

/// How a vCPU's TSC is set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tsc {
    /// Its value at the moment of the call.
    Value(u64),
    /// What it is beyond the host's.
    Offset(u64),
}

/// State of one vCPU, first version.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct VcpuV1 {
    /// What CPUID tells the guest, as it was given.
    #[n(0)]
    pub cpuid: Vec<CpuidV1>,
    /// TSC rate in kHz, where the host tells.
    #[n(1)]
    pub tsc_khz: Option<u32>,
    /// Whether it runs, halts or waits.
    #[n(2)]
    pub mp_state: MpStateV1,
    /// General-purpose registers.
    #[n(3)]
    pub regs: RegsV1,
    /// Segment and control registers.
    #[n(4)]
    pub sregs: SregsV1,
    /// XSAVE area; its size is the host's.
    #[cbor(n(5), with = "minicbor::bytes")]
    pub xsave: Vec<u8>,
    /// Extended control registers, where the host has them.
    #[n(6)]
    pub xcrs: Option<Vec<XcrV1>>,
    /// Debug registers, where the host gives them.
    #[n(7)]
    pub debug_regs: Option<DebugRegsV1>,
    /// The local APIC's register page.
    #[cbor(n(8), with = "minicbor::bytes")]
    pub lapic: Vec<u8>,
    /// Model-specific registers, those that the host lists.
    #[n(9)]
    pub msrs: Vec<MsrV1>,
    /// Pending exceptions, interrupts and NMIs, where the host gives them.
    #[n(10)]
    pub events: Option<EventsV1>,
    /// The TSC beyond the host's, where the host tells; it wraps. What differs between vCPUs is the guest's doing.
    #[n(11)]
    pub tsc_offset: Option<u64>,
    /// Guests of its own, in the hypervisor's form, while it has any.
    #[cbor(n(12), with = "minicbor::bytes")]
    pub nested: Option<Vec<u8>>,
}

vmm_snapshot::schema!(VcpuV1: "vcpu" v1);

impl VcpuV1 {
    /// Captures the state of a vCPU that does not run. `cpuid` is what it was given, for KVM_GET_CPUID2 tells what became of
    /// that by the guest's registers and, on some hosts, leaves of the host; `msrs` are the registers that count.
    ///
    /// # Errors
    /// A call failed that every host knows.
    pub fn capture(vcpu: &dyn Vcpu, cpuid: &[CpuidEntry], msrs: &[u32]) -> Result<Self, StateError> {
        let mp_state = vcpu.mp_state()?.into();
        let events = optional(vcpu.events())?.map(|events| (&events).into());
        Ok(Self {
            cpuid: cpuid.iter().map(Into::into).collect(),
            tsc_khz: optional(vcpu.tsc_khz())?,
            mp_state,
            regs: (&vcpu.regs()?).into(),
            sregs: (&vcpu.sregs()?).into(),
            xsave: vcpu.xsave()?,
            xcrs: optional(vcpu.xcrs())?.map(|xcrs| xcrs.iter().map(Into::into).collect()),
            debug_regs: optional(vcpu.debug_regs())?.map(|regs| (&regs).into()),
            lapic: vcpu.lapic()?.0.to_vec(),
            msrs: vcpu.msrs(msrs)?.iter().map(Into::into).collect(),
            events,
            tsc_offset: optional(vcpu.tsc_offset())?,
            nested: optional(vcpu.nested_state())?.flatten(),
        })
    }

    /// How the TSC of a vCPU in this state is set: the first vCPU's, or one whose offset nobody knows.
    pub(crate) fn tsc(&self, time: TimeBase) -> Tsc {
        let value = self.msrs.iter().find(|msr| msr.index == MSR_TSC).map_or(0, |msr| msr.value);
        match (time, self.tsc_offset) {
            (TimeBase::SameVm, Some(offset)) => Tsc::Offset(offset),
            (TimeBase::SameVm, None) => Tsc::Value(value),
            (TimeBase::After(duration), _) => {
                let khz = u128::from(self.tsc_khz.unwrap_or(0));
                // The counter wraps.
                let cycles = duration.as_nanos().saturating_mul(khz) / 1_000_000;
                Tsc::Value(value.wrapping_add(cycles as u64))
            }
        }
    }

    /// Takes the MSRs out that write to guest memory, for [`settle`] when the vCPU runs.
    pub(crate) fn take_owed(&mut self) -> Vec<MsrV1> {
        let (owed, msrs) =
            self.msrs.iter().partition(|msr| msr.value != 0 && WRITES_MEMORY.contains(&msr.index));
        self.msrs = msrs;
        owed
    }

    /// Puts MSRs that the vCPU has not got yet among those that it has.
    pub(crate) fn put_owed(&mut self, owed: &[MsrV1]) {
        for msr in &mut self.msrs {
            if let Some(owed) = owed.iter().find(|owed| owed.index == msr.index) {
                *msr = *owed;
            }
        }
    }

    /// What CPUID told the guest.
    pub fn given_cpuid(&self) -> Vec<CpuidEntry> {
        self.cpuid.iter().map(Into::into).collect()
    }

    /// Gives the state to a vCPU that was given its [CPUID](Self::given_cpuid). Returns the offset that its TSC has got, where the host tells.
    ///
    /// # Errors
    /// The state is impossible, or this host refuses a part of it. The vCPU is of no use then.
    pub(crate) fn apply(&self, vcpu: &mut dyn Vcpu, tsc: Tsc) -> Result<Option<u64>, StateError> {
        let Self { cpuid: _, tsc_khz, mp_state, regs, sregs, xsave, xcrs, .. } = self;
        let Self { debug_regs, lapic, msrs, events, tsc_offset: _, nested, .. } = self;
        if let Some(khz) = tsc_khz {
            set_tsc_rate(vcpu, *khz)?;
        }
        let (about_vmx, msrs): (Vec<MsrV1>, Vec<MsrV1>) =
            msrs.iter().partition(|msr| is_about_vmx(msr.index));
        write_msrs(vcpu, &about_vmx.iter().map(Into::into).collect::<Vec<_>>())?;
        vcpu.set_sregs(&sregs.into())?;
        if let Some(nested) = nested {
            vcpu.set_nested_state(nested)?;
        }
        vcpu.set_regs(&regs.into())?;
        if let Some(xcrs) = xcrs {
            vcpu.set_xcrs(&xcrs.iter().map(Into::into).collect::<Vec<_>>())?;
        }
        vcpu.set_xsave(xsave)?;
        if let Some(debug_regs) = debug_regs {
            vcpu.set_debug_regs(&debug_regs.into())?;
        }
        vcpu.set_lapic(&lapic_page(lapic)?)?;
        let offset = set_msrs(vcpu, &msrs, tsc)?;
        if let Some(events) = events {
            vcpu.set_events(&events.into())?;
        }
        vcpu.set_mp_state((*mp_state).into())?;
        // EINVAL: the guest has no such clock, or has not set it up yet.
        let _ = vcpu.notify_paused();
        Ok(offset)
    }
}

/// Gives a vCPU the MSRs that write to guest memory.
///
/// # Errors
/// The host refuses one.
pub(crate) fn settle(vcpu: &mut dyn Vcpu, owed: &[MsrV1]) -> Result<(), StateError> {
    write_msrs(vcpu, &owed.iter().map(Into::into).collect::<Vec<_>>())
}

/// A state call's answer; `None` where this host does not know the call.
fn optional<T>(answer: Result<T, HypervisorError>) -> Result<Option<T>, HypervisorError> {
    match answer {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.is_unsupported() => Ok(None),
        Err(error) => Err(error),
    }
}

fn set_tsc_rate(vcpu: &mut dyn Vcpu, khz: u32) -> Result<(), StateError> {
    match optional(vcpu.tsc_khz())? {
        Some(host) if host != khz => {
            vcpu.set_tsc_khz(khz).map_err(|source| StateError::TscRate { saved: khz, host, source })
        }
        _ => Ok(()),
    }
}

fn lapic_page(bytes: &[u8]) -> Result<Lapic, StateError> {
    let page: [u8; LAPIC_SIZE] =
        bytes.try_into().map_err(|_| StateError::LapicSize { found: bytes.len() })?;
    Ok(Lapic(Box::new(page)))
}

/// Sets MSRs, and the TSC among them as told; returns the TSC's offset, where the host tells.
fn set_msrs(vcpu: &mut dyn Vcpu, saved: &[MsrV1], tsc: Tsc) -> Result<Option<u64>, StateError> {
    let entries = saved.iter().map(MsrEntry::from).filter(|msr| msr.index != MSR_TSC);
    let (last, first): (Vec<_>, Vec<_>) = entries.partition(|msr| msr.index == MSR_TSC_DEADLINE);
    write_msrs(vcpu, &first)?;
    let offset = set_tsc(vcpu, tsc)?;
    write_msrs(vcpu, &last)?;
    Ok(offset)
}

/// IA32_FEATURE_CONTROL and the capabilities of VMX.
fn is_about_vmx(index: u32) -> bool {
    matches!(index, 0x3a | 0x480..=0x4ff)
}

fn write_msrs(vcpu: &mut dyn Vcpu, entries: &[MsrEntry]) -> Result<(), StateError> {
    if entries.is_empty() {
        return Ok(());
    }
    for index in vcpu.set_msrs(entries)? {
        // Read-only ones are refused even with the value that they have. What nobody wrote need not be there.
        let wanted = entries.iter().find(|msr| msr.index == index).map_or(0, |msr| msr.value);
        let found = vcpu.msrs(&[index])?.first().map_or(0, |msr| msr.value);
        if found != wanted {
            return Err(StateError::MsrRefused { index, wanted });
        }
    }
    Ok(())
}

fn set_tsc(vcpu: &mut dyn Vcpu, tsc: Tsc) -> Result<Option<u64>, StateError> {
    let wanted = match tsc {
        Tsc::Offset(offset) => {
            vcpu.set_tsc_offset(offset)?;
            return Ok(Some(offset));
        }
        Tsc::Value(value) => value,
    };
    write_msrs(vcpu, &[MsrEntry { index: MSR_TSC, value: wanted }])?;
    let Some(offset) = optional(vcpu.tsc_offset())? else { return Ok(None) };
    // KVM may have taken the value for one that it had already: what it reads as shows how far off it is.
    let reads = vcpu.msrs(&[MSR_TSC])?.first().map_or(wanted, |msr| msr.value);
    let offset = offset.wrapping_add(wanted.wrapping_sub(reads));
    vcpu.set_tsc_offset(offset)?;
    Ok(Some(offset))
}

/// Why a vCPU's state could not be captured or restored.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// A call failed.
    #[error("the hypervisor refuses")]
    Hypervisor(#[from] HypervisorError),
    /// The host's TSC runs at another rate and cannot be scaled.
    #[error("the guest's TSC runs at {saved} kHz, this host gives {host} kHz")]
    TscRate {
        /// Rate that the guest had.
        saved: u32,
        /// Rate of this host.
        host: u32,
        /// What the hypervisor said.
        #[source]
        source: HypervisorError,
    },
    /// Not the size of a local APIC's register page.
    #[error("local APIC state has {found} bytes, expected {LAPIC_SIZE}")]
    LapicSize {
        /// Bytes found.
        found: usize,
    },
    /// This host does not let the guest have the register's value.
    #[error("this host refuses MSR {index:#x} = {wanted:#x}")]
    MsrRefused {
        /// Index of the register.
        index: u32,
        /// Saved value.
        wanted: u64,
    },
}

/// Whether a vCPU runs, halts or waits for start-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(index_only)]
#[expect(missing_docs, reason = "as MpState's")]
pub enum MpStateV1 {
    #[n(0)]
    Runnable,
    #[n(1)]
    Uninitialized,
    #[n(2)]
    InitReceived,
    #[n(3)]
    Halted,
    #[n(4)]
    SipiReceived,
}

impl From<MpState> for MpStateV1 {
    fn from(state: MpState) -> Self {
        match state {
            MpState::Runnable => Self::Runnable,
            MpState::Uninitialized => Self::Uninitialized,
            MpState::InitReceived => Self::InitReceived,
            MpState::Halted => Self::Halted,
            MpState::SipiReceived => Self::SipiReceived,
        }
    }
}

impl From<MpStateV1> for MpState {
    fn from(state: MpStateV1) -> Self {
        match state {
            MpStateV1::Runnable => Self::Runnable,
            MpStateV1::Uninitialized => Self::Uninitialized,
            MpStateV1::InitReceived => Self::InitReceived,
            MpStateV1::Halted => Self::Halted,
            MpStateV1::SipiReceived => Self::SipiReceived,
        }
    }
}

/// A frozen copy of one of the hypervisor boundary's types, with numbered fields. Both ways are
/// exhaustive, so that a new field there does not compile until somebody decides about it here.
macro_rules! mirror {
    (
        $(#[$doc:meta])*
        $name:ident of $source:ident { $($n:literal $field:ident: $type:ty,)* }
    ) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
        #[expect(missing_docs, reason = "the fields are those of the type that is mirrored")]
        pub struct $name {
            $(#[n($n)] pub $field: $type,)*
        }

        impl From<&$source> for $name {
            fn from(source: &$source) -> Self {
                let $source { $($field),* } = source;
                Self { $($field: $field.mirrored()),* }
            }
        }

        impl From<&$name> for $source {
            fn from(saved: &$name) -> Self {
                let $name { $($field),* } = saved;
                Self { $($field: $field.mirrored()),* }
            }
        }

        impl Mirrored<$name> for $source {
            fn mirrored(&self) -> $name {
                self.into()
            }
        }

        impl Mirrored<$source> for $name {
            fn mirrored(&self) -> $source {
                self.into()
            }
        }
    };
}

/// A field of a mirror: itself, or a mirror again.
trait Mirrored<T> {
    fn mirrored(&self) -> T;
}

macro_rules! plain {
    ($($type:ty),*) => {
        $(impl Mirrored<$type> for $type {
            fn mirrored(&self) -> $type {
                *self
            }
        })*
    };
}

plain!(bool, u8, u16, u32, u64, Option<u64>, [u64; 4]);

mirror! {
    /// General-purpose registers.
    RegsV1 of Regs {
        0 rax: u64,
        1 rbx: u64,
        2 rcx: u64,
        3 rdx: u64,
        4 rsi: u64,
        5 rdi: u64,
        6 rsp: u64,
        7 rbp: u64,
        8 r8: u64,
        9 r9: u64,
        10 r10: u64,
        11 r11: u64,
        12 r12: u64,
        13 r13: u64,
        14 r14: u64,
        15 r15: u64,
        16 rip: u64,
        17 rflags: u64,
    }
}

mirror! {
    /// A segment register with its hidden part.
    SegmentV1 of Segment {
        0 base: u64,
        1 limit: u32,
        2 selector: u16,
        3 type_: u8,
        4 dpl: u8,
        5 present: bool,
        6 db: bool,
        7 s: bool,
        8 l: bool,
        9 g: bool,
        10 avl: bool,
        11 unusable: bool,
    }
}

mirror! {
    /// GDTR or IDTR.
    TableV1 of DescriptorTable {
        0 base: u64,
        1 limit: u16,
    }
}

mirror! {
    /// Segment and control registers.
    SregsV1 of Sregs {
        0 cs: SegmentV1,
        1 ds: SegmentV1,
        2 es: SegmentV1,
        3 fs: SegmentV1,
        4 gs: SegmentV1,
        5 ss: SegmentV1,
        6 tr: SegmentV1,
        7 ldt: SegmentV1,
        8 gdt: TableV1,
        9 idt: TableV1,
        10 cr0: u64,
        11 cr2: u64,
        12 cr3: u64,
        13 cr4: u64,
        14 cr8: u64,
        15 efer: u64,
        16 apic_base: u64,
        17 interrupt_bitmap: [u64; 4],
    }
}

mirror! {
    /// System management mode.
    SmiV1 of Smi {
        0 smm: bool,
        1 pending: bool,
        2 smm_inside_nmi: bool,
        3 latched_init: bool,
    }
}

mirror! {
    /// Pending exceptions, interrupts and NMIs.
    EventsV1 of VcpuEvents {
        0 exception_injected: bool,
        1 exception_nr: u8,
        2 exception_has_error_code: bool,
        3 exception_pending: bool,
        4 exception_error_code: u32,
        5 exception_payload: Option<u64>,
        6 interrupt_injected: bool,
        7 interrupt_nr: u8,
        8 interrupt_soft: bool,
        9 interrupt_shadow: u8,
        10 nmi_injected: bool,
        11 nmi_pending: u8,
        12 nmi_masked: bool,
        13 sipi_vector: u32,
        14 triple_fault_pending: bool,
        15 smi: SmiV1,
        16 flags: u32,
    }
}

mirror! {
    /// Debug registers.
    DebugRegsV1 of DebugRegs {
        0 db: [u64; 4],
        1 dr6: u64,
        2 dr7: u64,
        3 flags: u64,
    }
}

mirror! {
    /// A model-specific register.
    MsrV1 of MsrEntry {
        0 index: u32,
        1 value: u64,
    }
}

mirror! {
    /// An extended control register.
    XcrV1 of Xcr {
        0 index: u32,
        1 value: u64,
    }
}

mirror! {
    /// One leaf of CPUID.
    CpuidV1 of CpuidEntry {
        0 function: u32,
        1 index: u32,
        2 index_significant: bool,
        3 eax: u32,
        4 ebx: u32,
        5 ecx: u32,
        6 edx: u32,
    }
}

#[cfg(test)]
mod tests {
    use vmm_hypervisor::fake::Fake;
    use vmm_hypervisor::{Hypervisor, VmOptions};
    use vmm_snapshot::{Record, golden};

    use super::*;

    fn vcpu(fake: &Fake) -> Box<dyn Vcpu> {
        let mut vcpu =
            fake.create_vm(&VmOptions { ioapic_pins: 24, tss_address: 0 }).unwrap().create_vcpu(0).unwrap();
        vcpu.set_cpuid(&fake.supported_cpuid().unwrap()).unwrap();
        vcpu
    }

    #[test]
    fn state_survives_record_and_restore() {
        let fake = Fake::new();
        let mut first = vcpu(&fake);
        first.set_regs(&Regs { rip: 0x1234, r9: u64::MAX, ..Regs::default() }).unwrap();
        first.set_msrs(&[MsrEntry { index: 0x10, value: 77 }]).unwrap();
        let msrs = fake.msr_indices().unwrap();
        let state = VcpuV1::capture(&*first, &[], &msrs).unwrap();
        let state: VcpuV1 = Record::of(&state).parse().unwrap();
        let mut second = vcpu(&fake);
        state.apply(&mut *second, state.tsc(TimeBase::After(Duration::ZERO))).unwrap();
        assert_eq!(VcpuV1::capture(&*second, &[], &msrs).unwrap(), state);
        assert_eq!(second.regs().unwrap().rip, 0x1234);
    }

    fn golden_state() -> VcpuV1 {
        let segment = |selector| Segment {
            selector,
            base: 1 << 40,
            limit: 0xffff,
            present: true,
            ..Segment::default()
        };
        let sregs =
            Sregs { cs: segment(8), ds: segment(16), cr0: 0x8000_0001, efer: 0x500, ..Sregs::default() };
        let events = VcpuEvents {
            exception_pending: true,
            exception_payload: Some(7),
            flags: 0xd,
            ..VcpuEvents::default()
        };
        let leaf = CpuidEntry { function: 7, index_significant: true, ebx: 3, ..CpuidEntry::default() };
        VcpuV1 {
            cpuid: vec![(&leaf).into()],
            tsc_khz: Some(2_400_000),
            mp_state: MpStateV1::Halted,
            regs: (&Regs { rax: 1, rip: u64::MAX, rflags: 2, ..Regs::default() }).into(),
            sregs: (&sregs).into(),
            xsave: vec![0xa5; 576],
            xcrs: Some(vec![XcrV1 { index: 0, value: 7 }]),
            debug_regs: Some((&DebugRegs { db: [1, 2, 3, 4], dr6: 5, dr7: 6, flags: 0 }).into()),
            lapic: vec![0x5a; LAPIC_SIZE],
            msrs: vec![MsrV1 { index: MSR_TSC, value: 1 << 50 }],
            events: Some((&events).into()),
            tsc_offset: Some(u64::MAX),
            nested: Some(vec![1, 2, 3]),
        }
    }

    #[test]
    fn golden_record() {
        golden::check_state(&golden_state()).unwrap();
    }

    /// See the module's documentation.
    #[test]
    fn calls_are_made_in_their_order() {
        let fake = Fake::new();
        let mut vcpu = vcpu(&fake);
        let captured = fake.calls().len();
        let mut state = VcpuV1::capture(&*vcpu, &[], &[0x10, 0x174, 0x480, MSR_TSC_DEADLINE]).unwrap();
        let calls = fake.calls().split_off(captured);
        assert_eq!(calls[..2], ["KVM_GET_MP_STATE", "KVM_GET_VCPU_EVENTS"]);
        let applied = fake.calls().len();
        state.nested = Some(vec![1]);
        state.apply(&mut *vcpu, Tsc::Value(5)).unwrap();
        let calls = fake.calls().split_off(applied);
        let sets: Vec<_> = calls.into_iter().filter(|call| !call.starts_with("KVM_GET")).collect();
        let order = [
            "KVM_SET_MSRS",
            "KVM_SET_SREGS",
            "KVM_SET_NESTED_STATE",
            "KVM_SET_REGS",
            "KVM_SET_XCRS",
            "KVM_SET_XSAVE",
            "KVM_SET_DEBUGREGS",
            "KVM_SET_LAPIC",
            // All, the TSC, its offset, the deadline.
            "KVM_SET_MSRS",
            "KVM_SET_MSRS",
            "KVM_SET_DEVICE_ATTR",
            "KVM_SET_MSRS",
            "KVM_SET_VCPU_EVENTS",
            "KVM_SET_MP_STATE",
            "KVM_KVMCLOCK_CTRL",
        ];
        assert_eq!(sets, order);
    }

    #[test]
    fn msrs_that_kvm_does_not_list_are_saved_once() {
        let msrs = saved_msrs(vec![0x10, 0x2ff]);
        assert_eq!(msrs.iter().filter(|msr| **msr == 0x2ff).count(), 1);
        assert_eq!(msrs.len(), UNLISTED_MSRS.len() + 1);
    }

    #[test]
    fn what_a_host_does_not_know_is_left_out() {
        let fake = Fake::new();
        let vcpu = vcpu(&fake);
        fake.unsupported("KVM_GET_DEBUGREGS");
        fake.unsupported("KVM_GET_XCRS");
        let state = VcpuV1::capture(&*vcpu, &[], &[]).unwrap();
        assert_eq!((state.debug_regs, state.xcrs.is_some()), (None, false));
        fake.unsupported("KVM_GET_REGS");
        VcpuV1::capture(&*vcpu, &[], &[]).unwrap_err();
    }

    #[test]
    fn impossible_state_is_refused() {
        let fake = Fake::new();
        let mut vcpu = vcpu(&fake);
        let good = VcpuV1::capture(&*vcpu, &[], &[]).unwrap();
        let short = VcpuV1 { lapic: vec![0; 3], ..good.clone() };
        assert!(matches!(short.apply(&mut *vcpu, Tsc::Value(0)), Err(StateError::LapicSize { found: 3 })));
        let small = VcpuV1 { xsave: vec![0; 3], ..good.clone() };
        small.apply(&mut *vcpu, Tsc::Value(0)).unwrap_err();
        fake.unsupported("KVM_SET_TSC_KHZ");
        let fast = VcpuV1 { tsc_khz: Some(9), ..good };
        assert!(matches!(
            fast.apply(&mut *vcpu, Tsc::Value(0)),
            Err(StateError::TscRate { saved: 9, host: 2_000_000, .. })
        ));
    }

    #[test]
    fn the_deadline_is_written_last() {
        let fake = Fake::new();
        let mut vcpu = vcpu(&fake);
        let msrs = [MsrV1 { index: MSR_TSC_DEADLINE, value: 5 }, MsrV1 { index: 0x10, value: 1 }];
        set_msrs(&mut *vcpu, &msrs, Tsc::Value(1)).unwrap();
        assert_eq!(vcpu.msrs(&[0x10, MSR_TSC_DEADLINE]).unwrap().len(), 2);
    }

    #[test]
    fn every_call_that_fails_is_an_error_of_capture_or_of_restore() {
        let fake = Fake::new();
        let mut one = vcpu(&fake);
        let before = fake.calls().len();
        let state = VcpuV1::capture(&*one, &[], &[0x10]).unwrap();
        let captured = fake.calls().len();
        state.apply(&mut *one, Tsc::Value(0)).unwrap();
        let applied = fake.calls().len();
        for nth in 1..=captured - before {
            fake.fail_nth(nth);
            VcpuV1::capture(&*one, &[], &[0x10]).unwrap_err();
            fake.heal();
        }
        // The last one, telling the guest's clock of the pause, is a courtesy.
        for nth in 1..applied - captured {
            fake.fail_nth(nth);
            state.apply(&mut *one, Tsc::Value(0)).unwrap_err();
            fake.heal();
        }
    }
}
