//! The state of the boot vCPU at its first instruction, as plain numbers, and the tables that back it.

use crate::layout;

/// A segment register with its hidden part. Every segment used here is present and of privilege level 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Base address.
    pub base: u64,
    /// Limit in bytes (not in pages, whatever `g` says).
    pub limit: u32,
    /// Selector; indexes the GDT that was written to guest memory.
    pub selector: u16,
    /// Type field of the descriptor (Intel SDM volume 3, section 3.4.5.1).
    pub type_: u8,
    /// Code or data segment, as opposed to a system one.
    pub s: bool,
    /// Default operation size is 32 bits.
    pub db: bool,
    /// 64-bit code segment.
    pub l: bool,
    /// Granularity is 4 KiB.
    pub g: bool,
}

/// A descriptor table register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableRegister {
    /// Linear address of the table.
    pub base: u64,
    /// Its size in bytes less one.
    pub limit: u16,
}

/// The general registers that matter; all others are zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GeneralRegisters {
    /// First instruction.
    pub rip: u64,
    /// Top of the boot stack.
    pub rsp: u64,
    /// PVH: address of the start info.
    pub rbx: u64,
    /// Linux 64-bit boot protocol: address of the zero page.
    pub rsi: u64,
    /// Flags; interrupts are disabled.
    pub rflags: u64,
}

/// Control registers and EFER.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ControlRegisters {
    /// CR0.
    pub cr0: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// MSR IA32_EFER.
    pub efer: u64,
}

/// The state of the boot vCPU at its first instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BootRegisters {
    /// General registers.
    pub general: GeneralRegisters,
    /// Control registers.
    pub control: ControlRegisters,
    /// Code segment.
    pub cs: Segment,
    /// For DS, ES, FS, GS and SS alike.
    pub data: Segment,
    /// Task register.
    pub tr: Segment,
    /// GDTR.
    pub gdt: TableRegister,
    /// IDTR.
    pub idt: TableRegister,
}

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 of the flags is always set.
const RFLAGS: u64 = 2;

/// Linux's boot protocol asks for these selectors; PVH takes any.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TSS_SELECTOR: u16 = 0x20;

const TYPE_CODE: u8 = 0xb; // execute, read, accessed
const TYPE_DATA: u8 = 0x3; // read, write, accessed
const TYPE_TSS: u8 = 0xb; // busy TSS, 32 or 64 bits by mode

const PAGE_PRESENT_WRITABLE: u64 = 0x3;
const PAGE_LARGE: u64 = 1 << 7;
const ENTRIES_PER_TABLE: u64 = 512;
const LARGE_PAGE: u64 = 0x20_0000;

impl BootRegisters {
    /// 32-bit protected mode without paging, as the PVH ABI asks: flat segments, `ebx` to the start info.
    pub(crate) fn pvh(entry: u32) -> Self {
        Self {
            general: GeneralRegisters {
                rip: entry.into(),
                rsp: stack_top(),
                rbx: layout::START_INFO.start,
                rsi: 0,
                rflags: RFLAGS,
            },
            control: ControlRegisters { cr0: CR0_PE | CR0_ET, cr3: 0, cr4: 0, efer: 0 },
            cs: code_segment(false),
            data: data_segment(),
            tr: tss(),
            gdt: gdt_register(),
            idt: idt_register(),
        }
    }

    /// 64-bit mode with the first 4 GiB mapped one to one, as Linux's 64-bit boot protocol asks: `rsi` to the zero page.
    pub(crate) fn linux64(entry: u64) -> Self {
        Self {
            general: GeneralRegisters {
                rip: entry,
                rsp: stack_top(),
                rbx: 0,
                rsi: layout::ZERO_PAGE.start,
                rflags: RFLAGS,
            },
            control: ControlRegisters {
                cr0: CR0_PE | CR0_ET | CR0_PG,
                cr3: layout::PML4.start,
                cr4: CR4_PAE,
                efer: EFER_LME | EFER_LMA,
            },
            cs: code_segment(true),
            data: data_segment(),
            tr: tss(),
            gdt: gdt_register(),
            idt: idt_register(),
        }
    }

    /// The bytes of the GDT that the selectors index.
    pub(crate) fn gdt_bytes(&self) -> Vec<u8> {
        let tss_high = self.tr.base >> 32;
        let entries = [0, 0, descriptor(&self.cs), descriptor(&self.data), descriptor(&self.tr), tss_high];
        entries.iter().flat_map(|entry| entry.to_le_bytes()).collect()
    }
}

/// The page tables of the 64-bit protocol: PML4, PDPT and page directories, each with its address.
pub(crate) fn identity_page_tables() -> [(layout::Area, Vec<u8>); 3] {
    let directory_count = layout::PAGE_DIRECTORIES.size / 0x1000;
    let pml4 = vec![layout::PDPT.start | PAGE_PRESENT_WRITABLE];
    let pdpt = (0..directory_count)
        .map(|i| (layout::PAGE_DIRECTORIES.start + i * 0x1000) | PAGE_PRESENT_WRITABLE)
        .collect();
    let directories = (0..directory_count * ENTRIES_PER_TABLE)
        .map(|i| (i * LARGE_PAGE) | PAGE_PRESENT_WRITABLE | PAGE_LARGE)
        .collect();
    [(layout::PML4, pml4), (layout::PDPT, pdpt), (layout::PAGE_DIRECTORIES, directories)]
        .map(|(area, entries): (_, Vec<u64>)| (area, page_bytes(&entries, area.size)))
}

fn page_bytes(entries: &[u64], size: u64) -> Vec<u8> {
    let mut bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_le_bytes()).collect();
    bytes.resize(bytes.len().max(size as usize), 0);
    bytes
}

fn stack_top() -> u64 {
    layout::STACK.span().end() - 0x10
}

fn gdt_register() -> TableRegister {
    TableRegister { base: layout::GDT.start, limit: layout::GDT.size as u16 - 1 }
}

fn idt_register() -> TableRegister {
    TableRegister { base: layout::IDT.start, limit: layout::IDT.size as u16 - 1 }
}

fn code_segment(long: bool) -> Segment {
    Segment {
        base: 0,
        limit: u32::MAX,
        selector: CODE_SELECTOR,
        type_: TYPE_CODE,
        s: true,
        db: !long,
        l: long,
        g: true,
    }
}

fn data_segment() -> Segment {
    Segment {
        base: 0,
        limit: u32::MAX,
        selector: DATA_SELECTOR,
        type_: TYPE_DATA,
        s: true,
        db: true,
        l: false,
        g: true,
    }
}

fn tss() -> Segment {
    Segment {
        base: 0,
        limit: 0x67,
        selector: TSS_SELECTOR,
        type_: TYPE_TSS,
        s: false,
        db: false,
        l: false,
        g: false,
    }
}

/// Encodes the lower 8 bytes of a descriptor (Intel SDM volume 3, figure 3-8).
fn descriptor(segment: &Segment) -> u64 {
    const PRESENT: u64 = 1 << 47;
    let limit = u64::from(if segment.g { segment.limit >> 12 } else { segment.limit });
    let base = segment.base;
    (limit & 0xffff)
        | ((base & 0xff_ffff) << 16)
        | (u64::from(segment.type_) << 40)
        | (u64::from(segment.s) << 44)
        | PRESENT
        | (((limit >> 16) & 0xf) << 48)
        | (u64::from(segment.l) << 53)
        | (u64::from(segment.db) << 54)
        | (u64::from(segment.g) << 55)
        | (((base >> 24) & 0xff) << 56)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_the_well_known_flat_ones() {
        assert_eq!(descriptor(&code_segment(false)), 0x00cf_9b00_0000_ffff);
        assert_eq!(descriptor(&code_segment(true)), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&data_segment()), 0x00cf_9300_0000_ffff);
        assert_eq!(descriptor(&tss()), 0x0000_8b00_0000_0067);
    }

    #[test]
    fn selectors_index_their_own_descriptors() {
        for registers in [BootRegisters::pvh(0x10_0000), BootRegisters::linux64(0x100_0200)] {
            let gdt = registers.gdt_bytes();
            assert_eq!(gdt.len() as u64, layout::GDT.size);
            for segment in [registers.cs, registers.data, registers.tr] {
                let at = usize::from(segment.selector);
                assert_eq!(gdt[at..at + 8], descriptor(&segment).to_le_bytes());
            }
        }
    }

    #[test]
    fn pvh_entry_state_is_the_abi() {
        let registers = BootRegisters::pvh(0x1234_5678);
        assert_eq!(registers.general.rip, 0x1234_5678);
        assert_eq!(registers.general.rbx, 0x6000);
        assert_eq!(registers.general.rflags, 2);
        assert_eq!(registers.control, ControlRegisters { cr0: 0x11, cr3: 0, cr4: 0, efer: 0 });
        assert!(registers.cs.db && !registers.cs.l);
    }

    #[test]
    fn linux64_entry_state_is_long_mode() {
        let registers = BootRegisters::linux64(0x100_0200);
        assert_eq!(registers.general.rsi, 0x1_0000);
        assert_eq!(
            registers.control,
            ControlRegisters { cr0: 0x8000_0011, cr3: 0xa000, cr4: 0x20, efer: 0x500 }
        );
        assert!(!registers.cs.db && registers.cs.l);
        assert_eq!((registers.cs.selector, registers.data.selector), (0x10, 0x18));
    }

    /// Walks the tables as the processor does.
    #[test]
    fn page_tables_map_four_gib_one_to_one() {
        let tables = identity_page_tables();
        let entry = |table: u64, index: u64| {
            let (area, bytes) = tables
                .iter()
                .find(|(area, _)| area.span().start() <= table && table < area.span().end())
                .unwrap();
            let at = (table - area.start + index * 8) as usize;
            u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
        };
        for address in [0, 0x1f_ffff, 0x20_0000, 0x100_0200, 0x3fff_ffff, 0x4000_0000, 0xffff_ffff_u64] {
            let pml4e = entry(layout::PML4.start, address >> 39 & 511);
            let pdpte = entry(pml4e & !0xfff, address >> 30 & 511);
            let pde = entry(pdpte & !0xfff, address >> 21 & 511);
            assert_eq!((pml4e & 0xfff, pdpte & 0xfff, pde & 0xfff), (3, 3, 0x83));
            assert_eq!((pde & !0x1f_ffff) + (address & 0x1f_ffff), address);
        }
        assert_eq!(entry(layout::PDPT.start, 4), 0);
        assert_eq!(entry(layout::PML4.start, 1), 0);
    }
}
