//! The guest's physical address space on x86-64.
//!
//! ```text
//! 0          RAM
//! 3 GiB      32-bit window for PCI BARs (640 MiB), then ECAM (256 MiB), platform devices,
//!            IOAPIC, local APICs, the TSS that Intel needs
//! 4 GiB      RAM, where there is more than 3 GiB
//! then       64-bit window for PCI BARs, to the end of the address space
//! ```

use minicbor::{Decode, Encode};

/// A range of guest physical addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct Range {
    /// First address.
    #[n(0)]
    pub start: u64,
    /// Bytes.
    #[n(1)]
    pub size: u64,
}

impl Range {
    const fn new(start: u64, size: u64) -> Self {
        Self { start, size }
    }

    /// First address past the range; saturates.
    pub const fn end(&self) -> u64 {
        self.start.saturating_add(self.size)
    }
}

/// RAM below the hole ends here at the latest.
pub const HOLE_START: u64 = 0xc000_0000;
/// RAM above the hole starts here.
pub const HIGH_RAM_START: u64 = 1 << 32;
/// Window for 32-bit PCI BARs.
pub const MMIO32: Range = Range::new(HOLE_START, 0x2800_0000);
/// PCI configuration space of segment 0 (PCI Express "Enhanced Configuration Access Mechanism").
pub const ECAM: Range = Range::new(0xe800_0000, 0x1000_0000);
/// Registers of platform devices.
pub const PLATFORM: Range = Range::new(0xf900_0000, 0x10_0000);
/// The IOAPIC's registers.
pub const IOAPIC: Range = Range::new(0xfec0_0000, 0x1000);
/// The local APICs' registers.
pub const LAPIC: Range = Range::new(0xfee0_0000, 0x10_0000);
/// Four pages that the hypervisor keeps for itself: the identity map's and the TSS's
/// (KVM_SET_IDENTITY_MAP_ADDR, KVM_SET_TSS_ADDR).
pub const HYPERVISOR: Range = Range::new(0xfffb_c000, 0x4000);
/// The TSS of [`HYPERVISOR`].
pub const TSS_ADDRESS: u64 = HYPERVISOR.start + 0x1000;

/// Guest page size.
pub const PAGE_SIZE: u64 = 4096;
/// The 64-bit window starts at a multiple of this, for large BARs to fit.
const MMIO64_ALIGN: u64 = 1 << 30;

/// A piece of a zone and where the guest sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placement {
    /// Index of the zone.
    pub zone: usize,
    /// Offset in the zone's backing, in bytes.
    pub offset: u64,
    /// Guest physical addresses.
    pub range: Range,
}

/// Where things lie in one VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// Pieces of RAM, in order of address.
    pub ram: Vec<Placement>,
    /// Window for 64-bit PCI BARs.
    pub mmio64: Range,
}

impl Layout {
    /// Lays zones of these sizes (bytes) out one after the other around the hole, in an address space of
    /// `phys_bits` bits.
    ///
    /// # Errors
    /// A size is 0 or no multiple of a page, or all of them do not fit.
    pub fn new(zones: &[u64], phys_bits: u8) -> Result<Self, LayoutError> {
        let space = 1_u64.checked_shl(phys_bits.into()).unwrap_or(u64::MAX);
        let mut ram = Vec::new();
        let mut next = 0_u64;
        for (zone, size) in zones.iter().copied().enumerate() {
            if size == 0 || size % PAGE_SIZE != 0 {
                return Err(LayoutError::Size { zone, size });
            }
            let mut offset = 0;
            while offset < size {
                if (HOLE_START..HIGH_RAM_START).contains(&next) {
                    next = HIGH_RAM_START;
                }
                let left = size - offset;
                let size = if next < HOLE_START { left.min(HOLE_START - next) } else { left };
                let end = next.checked_add(size).filter(|end| *end <= space);
                let end = end.ok_or(LayoutError::TooLarge { phys_bits })?;
                ram.push(Placement { zone, offset, range: Range::new(next, size) });
                offset += size;
                next = end;
            }
        }
        let start = next.max(HIGH_RAM_START).checked_next_multiple_of(MMIO64_ALIGN);
        let start = start.filter(|start| *start < space).ok_or(LayoutError::TooLarge { phys_bits })?;
        Ok(Self { ram, mmio64: Range::new(start, space - start) })
    }

    /// RAM in all, in bytes.
    pub fn ram_size(&self) -> u64 {
        self.ram.iter().map(|piece| piece.range.size).sum()
    }
}

/// RAM that cannot be laid out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// 0, or not whole pages.
    #[error("memory zone {zone} has {size} bytes; it must be a multiple of {PAGE_SIZE} and not 0")]
    Size {
        /// Index of the zone.
        zone: usize,
        /// Its size in bytes.
        size: u64,
    },
    /// More than the guest can address.
    #[error("memory and device windows do not fit into {phys_bits} bits of physical address")]
    TooLarge {
        /// Bits of a guest physical address.
        phys_bits: u8,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn windows_do_not_overlap() {
        let windows = [MMIO32, ECAM, PLATFORM, IOAPIC, LAPIC, HYPERVISOR];
        assert!(windows.windows(2).all(|w| w[0].end() <= w[1].start));
        assert!(HYPERVISOR.end() <= HIGH_RAM_START);
    }

    #[test]
    fn ram_is_split_around_the_hole() {
        let layout = Layout::new(&[2 * GIB, 2 * GIB, 4096], 40).unwrap();
        let pieces: Vec<_> =
            layout.ram.iter().map(|p| (p.zone, p.offset, p.range.start, p.range.size)).collect();
        assert_eq!(
            pieces,
            [(0, 0, 0, 2 * GIB), (1, 0, 2 * GIB, GIB), (1, GIB, 4 * GIB, GIB), (2, 0, 5 * GIB, 4096)]
        );
        assert_eq!(layout.mmio64, Range::new(6 * GIB, (1 << 40) - 6 * GIB));
        assert_eq!(layout.ram_size(), 4 * GIB + 4096);
    }

    #[test]
    fn small_ram_leaves_the_window_at_4_gib() {
        assert_eq!(Layout::new(&[4096], 36).unwrap().mmio64.start, 4 * GIB);
    }

    #[test]
    fn impossible_sizes_are_refused() {
        assert_eq!(Layout::new(&[4096, 0], 40), Err(LayoutError::Size { zone: 1, size: 0 }));
        assert_eq!(Layout::new(&[4097], 40), Err(LayoutError::Size { zone: 0, size: 4097 }));
        for size in [1 << 40, u64::MAX - 4095] {
            assert_eq!(Layout::new(&[size, size], 40), Err(LayoutError::TooLarge { phys_bits: 40 }));
        }
        Layout::new(&[4096], 32).unwrap_err();
    }

    proptest::proptest! {
        #[test]
        fn all_of_every_zone_is_placed_once(sizes in proptest::collection::vec(1_u64..2_000_000, 1..6)) {
            let sizes: Vec<_> = sizes.into_iter().map(|pages| pages * PAGE_SIZE).collect();
            let layout = Layout::new(&sizes, 46).unwrap();
            for (zone, size) in sizes.iter().enumerate() {
                let mut offset = 0;
                for piece in layout.ram.iter().filter(|p| p.zone == zone) {
                    proptest::prop_assert_eq!(piece.offset, offset);
                    offset += piece.range.size;
                }
                proptest::prop_assert_eq!(offset, *size);
            }
            let hole = Range::new(HOLE_START, HIGH_RAM_START - HOLE_START);
            let clear = |p: &Placement| p.range.end() <= hole.start || p.range.start >= hole.end();
            proptest::prop_assert!(layout.ram.iter().all(clear));
            proptest::prop_assert!(layout.ram.windows(2).all(|w| w[0].range.end() <= w[1].range.start));
            proptest::prop_assert!(layout.ram.iter().all(|p| p.range.end() <= layout.mmio64.start));
        }
    }
}
