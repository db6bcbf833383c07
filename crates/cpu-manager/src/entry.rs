//! The registers a vCPU starts with.

use vmm_hypervisor::state::{DescriptorTable, Lapic, MsrEntry, Regs, Segment};
use vmm_hypervisor::{Result, Vcpu};

/// Where and how the boot processor enters the guest. What is not named keeps its value after reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// General-purpose registers.
    pub regs: Regs,
    /// Code segment.
    pub code: Segment,
    /// Data, stack and extra segments.
    pub data: Segment,
    /// Task register.
    pub task: Segment,
    /// Global descriptor table.
    pub gdt: DescriptorTable,
    /// Interrupt descriptor table.
    pub idt: DescriptorTable,
    /// Control registers 0, 3 and 4, and EFER.
    pub control: Control,
}

/// Control registers of an [`Entry`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[expect(missing_docs, reason = "the field names are the registers' names")]
pub struct Control {
    pub cr0: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
}

const LAPIC_LVT0: usize = 0x350;
const LAPIC_LVT1: usize = 0x360;
const DELIVERY_MODE: u32 = 7 << 8;
const DELIVER_NMI: u32 = 4 << 8;
const DELIVER_EXTINT: u32 = 7 << 8;

const MSR_MISC_ENABLE: u32 = 0x1a0;
/// Fast string operations.
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs enabled, write-back everywhere: the hypervisor ignores them, and guests expect them sane.
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;

/// Brings a vCPU into its state at power-on.
pub(crate) fn set_up(vcpu: &mut dyn Vcpu) -> Result<()> {
    // A host that refuses one of these has it set already or does not know it: both harmless.
    vcpu.set_msrs(&[
        MsrEntry { index: MSR_MISC_ENABLE, value: MISC_ENABLE_FAST_STRING },
        MsrEntry { index: MSR_MTRR_DEF_TYPE, value: MTRR_ENABLED_WRITE_BACK },
    ])?;
    let mut lapic = vcpu.lapic()?;
    wire_local_interrupts(&mut lapic);
    vcpu.set_lapic(&lapic)
}

/// LINT0 takes the external interrupt, LINT1 the NMI, as firmware leaves them.
fn wire_local_interrupts(lapic: &mut Lapic) {
    for (register, mode) in [(LAPIC_LVT0, DELIVER_EXTINT), (LAPIC_LVT1, DELIVER_NMI)] {
        lapic.set_register(register, lapic.register(register) & !DELIVERY_MODE | mode);
    }
}

/// Lets a vCPU that was set up begin at `entry`.
pub(crate) fn enter(vcpu: &mut dyn Vcpu, entry: &Entry) -> Result<()> {
    let mut sregs = vcpu.sregs()?;
    sregs.cs = entry.code;
    for data in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
        *data = entry.data;
    }
    sregs.tr = entry.task;
    (sregs.gdt, sregs.idt) = (entry.gdt, entry.idt);
    let Control { cr0, cr3, cr4, efer } = entry.control;
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (cr0, cr3, cr4, efer);
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&entry.regs)
}
