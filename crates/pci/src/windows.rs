//! The address ranges in which BARs may lie, and where in them is room.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::config::BarKind;

/// The host bridge's windows: guest physical addresses that belong to PCI.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Windows {
    /// Below 4 GiB.
    pub mmio32: Range<u64>,
    /// Above RAM.
    pub mmio64: Range<u64>,
}

impl Windows {
    /// Whether all of `len` bytes at `base` lie in one of the windows.
    pub fn contain(&self, base: u64, len: u64) -> bool {
        let inside =
            |w: &Range<u64>| base >= w.start && base.checked_add(len).is_some_and(|end| end <= w.end);
        inside(&self.mmio32) || inside(&self.mmio64)
    }
}

/// Gives out addresses for BARs at power-on; where the guest moves them later is its own affair.
#[derive(Debug, Clone)]
pub struct BarAllocator {
    windows: Windows,
    /// First address to length.
    taken: BTreeMap<u64, u64>,
}

impl BarAllocator {
    /// Both windows free.
    pub fn new(windows: Windows) -> Self {
        Self { windows, taken: BTreeMap::new() }
    }

    /// The lowest free address for a BAR of `size` bytes, aligned to its size. 64-bit BARs
    /// go into the high window, and into the low one when that is full. `None`: no room.
    pub fn take(&mut self, kind: BarKind, size: u64) -> Option<u64> {
        if !size.is_power_of_two() {
            return None;
        }
        let (low, high) = (self.windows.mmio32.clone(), self.windows.mmio64.clone());
        let base = match kind {
            BarKind::Memory32 => self.find(&low, size),
            BarKind::Memory64 | BarKind::Memory64Prefetchable => {
                self.find(&high, size).or_else(|| self.find(&low, size))
            }
        }?;
        self.taken.insert(base, size);
        Some(base)
    }

    /// Takes the range of `size` bytes at `base`, aligned to its size. Returns whether it was free and inside the windows.
    pub fn take_at(&mut self, base: u64, size: u64) -> bool {
        let fits = size.is_power_of_two() && base.is_multiple_of(size) && self.windows.contain(base, size);
        // Inside a window, so this does not wrap.
        let free =
            fits && self.taken.range(..base + size).next_back().is_none_or(|(at, len)| at + len <= base);
        if free {
            self.taken.insert(base, size);
        }
        free
    }

    /// Gives an address back; returns whether it was taken.
    pub fn release(&mut self, base: u64) -> bool {
        self.taken.remove(&base).is_some()
    }

    fn find(&self, window: &Range<u64>, size: u64) -> Option<u64> {
        let mut base = window.start.checked_next_multiple_of(size)?;
        loop {
            let end = base.checked_add(size)?;
            if end > window.end {
                return None;
            }
            // The last range that starts below our end is the only one that can be in the way next.
            match self.taken.range(..end).next_back() {
                Some((start, len)) if start + len > base => {
                    base = (start + len).checked_next_multiple_of(size)?;
                }
                _ => return Some(base),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn windows() -> Windows {
        Windows { mmio32: 0xc000_0000..0xd000_0000, mmio64: 0x1_0000_1000..0x1_0010_0000 }
    }

    #[test]
    fn addresses_are_aligned_and_do_not_overlap() {
        let mut bars = BarAllocator::new(windows());
        let a = bars.take(BarKind::Memory64, 0x1000).unwrap();
        let b = bars.take(BarKind::Memory64, 0x8_0000).unwrap();
        let c = bars.take(BarKind::Memory64Prefetchable, 0x1000).unwrap();
        assert_eq!((a, b, c), (0x1_0000_1000, 0x1_0008_0000, 0x1_0000_2000));
        let low = bars.take(BarKind::Memory64, 0x8_0000).unwrap();
        assert_eq!(low, 0xc000_0000, "the high window is full for this size");
        assert!(bars.release(b) && !bars.release(b));
        assert_eq!(bars.take(BarKind::Memory64, 0x8_0000), Some(b));
        assert_eq!(bars.take(BarKind::Memory32, 0x1000), Some(0xc008_0000));
    }

    #[test]
    fn an_address_that_is_asked_for_is_given_if_it_is_free() {
        let mut bars = BarAllocator::new(windows());
        assert!(bars.take_at(0xc000_2000, 0x2000));
        for (base, size) in [(0xc000_2000, 0x2000), (0xc000_3000, 0x1000), (0xc000_0000, 0x4000)] {
            assert!(!bars.take_at(base, size), "{base:#x} is taken");
        }
        for (base, size) in [(0xc000_5000, 0x2000), (0xc000_4000, 0x1800), (0xc000_4000, 0)] {
            assert!(!bars.take_at(base, size), "{size:#x} bytes at {base:#x} are no BAR");
        }
        for (base, size) in [(0xbfff_f000, 0x1000), (0xd000_0000, 0x1000), (1 << 63, 1 << 63)] {
            assert!(!bars.take_at(base, size), "{base:#x} is outside");
        }
        assert!(bars.take_at(0xc000_4000, 0x4000) && bars.take_at(0xc000_0000, 0x2000));
        assert_eq!(bars.take(BarKind::Memory32, 0x1000), Some(0xc000_8000));
        assert!(bars.release(0xc000_2000) && bars.take_at(0xc000_3000, 0x1000));
    }

    #[test]
    fn no_room_and_bad_sizes_give_nothing() {
        let mut bars = BarAllocator::new(windows());
        assert_eq!(bars.take(BarKind::Memory32, 1 << 32), None);
        assert_eq!(bars.take(BarKind::Memory32, 0), None);
        assert_eq!(bars.take(BarKind::Memory32, 24), None);
        assert_eq!(bars.take(BarKind::Memory64, 1 << 63), None);
    }

    #[test]
    fn windows_contain_whole_ranges_only() {
        let windows = windows();
        assert!(windows.contain(0xc000_0000, 0x1000_0000));
        assert!(!windows.contain(0xc000_0000, 0x1000_0001));
        assert!(!windows.contain(0xbfff_ffff, 1) && !windows.contain(u64::MAX, 2));
    }
}
