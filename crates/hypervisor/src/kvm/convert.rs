//! Between KVM's structs and this crate's.

use kvm_bindings::{
    KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2, kvm_debugregs, kvm_dtable, kvm_regs, kvm_segment,
    kvm_sregs, kvm_vcpu_events,
};

use crate::state::{CpuidEntry, DebugRegs, DescriptorTable, Regs, Segment, Smi, Sregs, VcpuEvents};

pub(super) fn cpuid_entry(e: &kvm_cpuid_entry2) -> CpuidEntry {
    CpuidEntry {
        function: e.function,
        index: e.index,
        index_significant: e.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0,
        eax: e.eax,
        ebx: e.ebx,
        ecx: e.ecx,
        edx: e.edx,
    }
}

pub(super) fn to_cpuid_entry(e: &CpuidEntry) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 {
        function: e.function,
        index: e.index,
        flags: if e.index_significant { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 },
        eax: e.eax,
        ebx: e.ebx,
        ecx: e.ecx,
        edx: e.edx,
        ..Default::default()
    }
}

macro_rules! same_fields {
    ($from:ident => $to:ident { $($field:ident),* $(,)? }) => { $to { $($field: $from.$field),* } };
}

pub(super) fn regs(r: &kvm_regs) -> Regs {
    same_fields!(r => Regs {
        rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags
    })
}

pub(super) fn to_regs(r: &Regs) -> kvm_regs {
    same_fields!(r => kvm_regs {
        rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags
    })
}

fn segment(s: &kvm_segment) -> Segment {
    Segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        type_: s.type_,
        dpl: s.dpl,
        present: s.present != 0,
        db: s.db != 0,
        s: s.s != 0,
        l: s.l != 0,
        g: s.g != 0,
        avl: s.avl != 0,
        unusable: s.unusable != 0,
    }
}

fn to_segment(s: &Segment) -> kvm_segment {
    kvm_segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        type_: s.type_,
        dpl: s.dpl,
        present: s.present.into(),
        db: s.db.into(),
        s: s.s.into(),
        l: s.l.into(),
        g: s.g.into(),
        avl: s.avl.into(),
        unusable: s.unusable.into(),
        padding: 0,
    }
}

fn table(t: &kvm_dtable) -> DescriptorTable {
    DescriptorTable { base: t.base, limit: t.limit }
}

fn to_table(t: DescriptorTable) -> kvm_dtable {
    kvm_dtable { base: t.base, limit: t.limit, padding: [0; 3] }
}

pub(super) fn sregs(s: &kvm_sregs) -> Sregs {
    Sregs {
        cs: segment(&s.cs),
        ds: segment(&s.ds),
        es: segment(&s.es),
        fs: segment(&s.fs),
        gs: segment(&s.gs),
        ss: segment(&s.ss),
        tr: segment(&s.tr),
        ldt: segment(&s.ldt),
        gdt: table(&s.gdt),
        idt: table(&s.idt),
        cr0: s.cr0,
        cr2: s.cr2,
        cr3: s.cr3,
        cr4: s.cr4,
        cr8: s.cr8,
        efer: s.efer,
        apic_base: s.apic_base,
        interrupt_bitmap: s.interrupt_bitmap,
    }
}

pub(super) fn to_sregs(s: &Sregs) -> kvm_sregs {
    kvm_sregs {
        cs: to_segment(&s.cs),
        ds: to_segment(&s.ds),
        es: to_segment(&s.es),
        fs: to_segment(&s.fs),
        gs: to_segment(&s.gs),
        ss: to_segment(&s.ss),
        tr: to_segment(&s.tr),
        ldt: to_segment(&s.ldt),
        gdt: to_table(s.gdt),
        idt: to_table(s.idt),
        cr0: s.cr0,
        cr2: s.cr2,
        cr3: s.cr3,
        cr4: s.cr4,
        cr8: s.cr8,
        efer: s.efer,
        apic_base: s.apic_base,
        interrupt_bitmap: s.interrupt_bitmap,
    }
}

pub(super) fn events(e: &kvm_vcpu_events) -> VcpuEvents {
    VcpuEvents {
        exception_injected: e.exception.injected != 0,
        exception_nr: e.exception.nr,
        exception_has_error_code: e.exception.has_error_code != 0,
        exception_pending: e.exception.pending != 0,
        exception_error_code: e.exception.error_code,
        exception_payload: (e.exception_has_payload != 0).then_some(e.exception_payload),
        interrupt_injected: e.interrupt.injected != 0,
        interrupt_nr: e.interrupt.nr,
        interrupt_soft: e.interrupt.soft != 0,
        interrupt_shadow: e.interrupt.shadow,
        nmi_injected: e.nmi.injected != 0,
        nmi_pending: e.nmi.pending,
        nmi_masked: e.nmi.masked != 0,
        sipi_vector: e.sipi_vector,
        triple_fault_pending: e.triple_fault.pending != 0,
        smi: Smi {
            smm: e.smi.smm != 0,
            pending: e.smi.pending != 0,
            smm_inside_nmi: e.smi.smm_inside_nmi != 0,
            latched_init: e.smi.latched_init != 0,
        },
        flags: e.flags,
    }
}

pub(super) fn to_events(e: &VcpuEvents) -> kvm_vcpu_events {
    let mut out = kvm_vcpu_events::default();
    out.exception.injected = e.exception_injected.into();
    out.exception.nr = e.exception_nr;
    out.exception.has_error_code = e.exception_has_error_code.into();
    out.exception.pending = e.exception_pending.into();
    out.exception.error_code = e.exception_error_code;
    out.exception_has_payload = e.exception_payload.is_some().into();
    out.exception_payload = e.exception_payload.unwrap_or(0);
    out.interrupt.injected = e.interrupt_injected.into();
    out.interrupt.nr = e.interrupt_nr;
    out.interrupt.soft = e.interrupt_soft.into();
    out.interrupt.shadow = e.interrupt_shadow;
    out.nmi.injected = e.nmi_injected.into();
    out.nmi.pending = e.nmi_pending;
    out.nmi.masked = e.nmi_masked.into();
    out.sipi_vector = e.sipi_vector;
    out.triple_fault.pending = e.triple_fault_pending.into();
    out.smi.smm = e.smi.smm.into();
    out.smi.pending = e.smi.pending.into();
    out.smi.smm_inside_nmi = e.smi.smm_inside_nmi.into();
    out.smi.latched_init = e.smi.latched_init.into();
    out.flags = e.flags;
    out
}

pub(super) fn debug_regs(d: &kvm_debugregs) -> DebugRegs {
    DebugRegs { db: d.db, dr6: d.dr6, dr7: d.dr7, flags: d.flags }
}

pub(super) fn to_debug_regs(d: &DebugRegs) -> kvm_debugregs {
    kvm_debugregs { db: d.db, dr6: d.dr6, dr7: d.dr7, flags: d.flags, reserved: [0; 9] }
}
