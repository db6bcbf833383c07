//! Where boot data lies in guest memory: the one table of fixed addresses below 1 MiB.
//!
//! The addresses follow what other small VMMs use, so that a memory dump looks familiar.

use crate::span::Span;

/// A fixed place in low guest memory and what is written there.
#[derive(Clone, Copy, Debug)]
pub struct Area {
    /// What lies here, for error messages.
    pub name: &'static str,
    /// Guest-physical address.
    pub start: u64,
    /// Size in bytes.
    pub size: u64,
}

impl Area {
    const fn new(name: &'static str, start: u64, size: u64) -> Self {
        assert!(start.checked_add(size).is_some());
        Self { name, start, size }
    }

    /// The addresses of the area.
    pub const fn span(&self) -> Span {
        match Span::new(self.start, self.size) {
            Some(span) => span,
            // `new` has checked the sum; an empty span is the total answer.
            None => EMPTY,
        }
    }
}

const EMPTY: Span = match Span::new(0, 0) {
    Some(span) => span,
    None => unreachable!(),
};

/// Global descriptor table of the first instruction: null, unused, code, data, TSS (16 bytes).
pub const GDT: Area = Area::new("GDT", 0x500, 0x30);
/// Interrupt descriptor table of the first instruction: one empty gate.
pub const IDT: Area = Area::new("IDT", 0x540, 8);
/// PVH `hvm_start_info`.
pub const START_INFO: Area = Area::new("PVH start info", 0x6000, 56);
/// PVH module list; one entry, the initramfs.
pub const MODULE_LIST: Area = Area::new("PVH module list", 0x6040, 32);
/// PVH memory map, [`MAX_MAP_ENTRIES`] entries of 24 bytes.
pub const PVH_MEMORY_MAP: Area = Area::new("PVH memory map", 0x7000, MAX_MAP_ENTRIES as u64 * 24);
/// Stack, grows down from its end.
pub const STACK: Area = Area::new("boot stack", 0x8000, 0x1000);
/// Page-map level 4.
pub const PML4: Area = Area::new("PML4", 0xa000, 0x1000);
/// Page-directory pointers.
pub const PDPT: Area = Area::new("PDPT", 0xb000, 0x1000);
/// Four page directories, the first 4 GiB in 2 MiB pages.
pub const PAGE_DIRECTORIES: Area = Area::new("page directories", 0xc000, 0x4000);
/// Linux's `boot_params`.
pub const ZERO_PAGE: Area = Area::new("zero page", 0x1_0000, 0x1000);
/// The command line with its NUL.
pub const COMMAND_LINE: Area = Area::new("command line", 0x2_0000, 0x1_0000);

/// Everything above in one table.
pub const LAYOUT: [Area; 11] = [
    GDT,
    IDT,
    START_INFO,
    MODULE_LIST,
    PVH_MEMORY_MAP,
    STACK,
    PML4,
    PDPT,
    PAGE_DIRECTORIES,
    ZERO_PAGE,
    COMMAND_LINE,
];

/// Entries a memory map may have: what Linux's zero page can hold (`E820_MAX_ENTRIES_ZEROPAGE`).
pub const MAX_MAP_ENTRIES: usize = 128;

/// The PC's legacy hole, never told to the guest as RAM. It is backed by memory all the same, and is where the ACPI
/// tables go, the RSDP first.
pub const LEGACY_HOLE: Area = Area::new("legacy hole", 0xa_0000, 0x6_0000);

/// End of the addresses that the boot page tables map, and that the 32-bit fields of both protocols reach.
pub const FOUR_GIB: u64 = 1 << 32;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn areas_do_not_overlap_and_lie_below_the_legacy_hole() {
        for (i, a) in LAYOUT.iter().enumerate() {
            assert!(a.size > 0 && a.span().end() <= LEGACY_HOLE.start, "{} at {}", a.name, a.span());
            for b in &LAYOUT[i + 1..] {
                assert!(!a.span().overlaps(&b.span()), "{} overlaps {}", a.name, b.name);
            }
        }
    }

    #[test]
    fn tables_are_aligned() {
        for area in [PML4, PDPT, PAGE_DIRECTORIES, ZERO_PAGE] {
            assert_eq!(area.start % 0x1000, 0, "{}", area.name);
        }
        for area in [GDT, IDT, START_INFO, MODULE_LIST, PVH_MEMORY_MAP, STACK] {
            assert_eq!(area.start % 8, 0, "{}", area.name);
        }
    }
}
