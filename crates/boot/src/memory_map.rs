//! The memory map that the guest is told: disjoint, sorted ranges of RAM, reserved and ACPI memory.

use thiserror::Error;

use crate::{
    layout::{self, LEGACY_HOLE, MAX_MAP_ENTRIES},
    span::Span,
};

/// Input ranges that [`MemoryMap::new`] takes at most.
pub const MAX_INPUT_RANGES: usize = 1024;

/// What a range of guest-physical addresses is. Where ranges overlap, the later variant wins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum MemoryKind {
    /// Usable memory.
    Ram,
    /// Not to be touched, e.g. ECAM.
    Reserved,
    /// ACPI tables, which the guest may reclaim once it has read them.
    Acpi,
}

impl MemoryKind {
    /// Type number, the same in e820 (ACPI 6.5, section 15) and in the PVH memory map.
    pub(crate) fn e820_type(self) -> u32 {
        match self {
            Self::Ram => 1,
            Self::Reserved => 2,
            Self::Acpi => 3,
        }
    }
}

/// One range of guest-physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryRange {
    /// First address.
    pub start: u64,
    /// Size in bytes.
    pub size: u64,
    /// What it is.
    pub kind: MemoryKind,
}

/// Why ranges do not make a memory map.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum MemoryMapError {
    /// A range goes beyond 64 bits.
    #[error("memory range of {size:#x} bytes at {start:#x} wraps around")]
    Wraps {
        /// First address.
        start: u64,
        /// Size in bytes.
        size: u64,
    },
    /// More ranges than a guest can be told.
    #[error("memory map has {count} ranges, the limit is {limit}")]
    TooMany {
        /// Their number.
        count: usize,
        /// The limit.
        limit: usize,
    },
    /// The low memory that boot data is written to is not RAM.
    #[error("no RAM at {span} for the {name}")]
    NoLowRam {
        /// What would lie there.
        name: &'static str,
        /// Where.
        span: Span,
    },
}

/// Disjoint ranges in ascending order; neighbours of one kind are merged, the legacy hole is never RAM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryMap {
    ranges: Vec<MemoryRange>,
}

impl MemoryMap {
    /// Builds the map from RAM and the holes in it, in any order. The legacy hole (640 KiB to 1 MiB) is added as
    /// reserved.
    ///
    /// # Errors
    /// [`MemoryMapError`] when a range wraps, when there are too many, or when boot data has no RAM to lie in.
    pub fn new(input: &[MemoryRange]) -> Result<Self, MemoryMapError> {
        if input.len() > MAX_INPUT_RANGES {
            return Err(MemoryMapError::TooMany { count: input.len(), limit: MAX_INPUT_RANGES });
        }
        let mut spans = vec![(LEGACY_HOLE.span(), MemoryKind::Reserved)];
        for range in input {
            let span = Span::new(range.start, range.size)
                .ok_or(MemoryMapError::Wraps { start: range.start, size: range.size })?;
            spans.push((span, range.kind));
        }
        let map = Self { ranges: flatten(&spans) };
        if map.ranges.len() > MAX_MAP_ENTRIES {
            return Err(MemoryMapError::TooMany { count: map.ranges.len(), limit: MAX_MAP_ENTRIES });
        }
        map.check_low_ram()?;
        Ok(map)
    }

    /// The ranges, disjoint and ascending.
    pub fn ranges(&self) -> &[MemoryRange] {
        &self.ranges
    }

    /// Whether all of `span` is RAM.
    pub fn is_ram(&self, span: &Span) -> bool {
        self.ram().any(|ram| ram.contains(span))
    }

    /// The RAM ranges, ascending.
    pub(crate) fn ram(&self) -> impl DoubleEndedIterator<Item = Span> + '_ {
        self.ranges
            .iter()
            .filter(|range| range.kind == MemoryKind::Ram)
            .filter_map(|range| Span::new(range.start, range.size))
    }

    fn check_low_ram(&self) -> Result<(), MemoryMapError> {
        match layout::LAYOUT.iter().find(|area| !self.is_ram(&area.span())) {
            Some(area) => Err(MemoryMapError::NoLowRam { name: area.name, span: area.span() }),
            None => Ok(()),
        }
    }
}

/// Cuts the address space at every border and asks for each piece which kind wins.
fn flatten(spans: &[(Span, MemoryKind)]) -> Vec<MemoryRange> {
    let mut borders: Vec<u64> = spans.iter().flat_map(|(span, _)| [span.start(), span.end()]).collect();
    borders.sort_unstable();
    borders.dedup();

    let mut ranges: Vec<MemoryRange> = Vec::new();
    for (&start, &end) in borders.iter().zip(borders.iter().skip(1)) {
        let inside = spans.iter().filter(|(span, _)| span.start() <= start && end <= span.end());
        let Some(kind) = inside.map(|(_, kind)| *kind).max() else { continue };
        match ranges.last_mut() {
            Some(last) if last.kind == kind && last.start + last.size == start => last.size += end - start,
            _ => ranges.push(MemoryRange { start, size: end - start, kind }),
        }
    }
    ranges
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn range(start: u64, size: u64, kind: MemoryKind) -> MemoryRange {
        MemoryRange { start, size, kind }
    }

    #[test]
    fn a_machine_with_high_memory() {
        let map = MemoryMap::new(&[
            range(0x1_0000_0000, 0x4000_0000, MemoryKind::Ram),
            range(0, 0xc000_0000, MemoryKind::Ram),
            range(0xe800_0000, 0x1000_0000, MemoryKind::Reserved),
            range(0xa_0000, 0x1_0000, MemoryKind::Acpi),
        ])
        .unwrap();
        assert_eq!(
            map.ranges(),
            [
                range(0, 0xa_0000, MemoryKind::Ram),
                range(0xa_0000, 0x1_0000, MemoryKind::Acpi),
                range(0xb_0000, 0x5_0000, MemoryKind::Reserved),
                range(0x10_0000, 0xbff0_0000, MemoryKind::Ram),
                range(0xe800_0000, 0x1000_0000, MemoryKind::Reserved),
                range(0x1_0000_0000, 0x4000_0000, MemoryKind::Ram),
            ]
        );
        assert!(map.is_ram(&Span::new(0x10_0000, 0xbff0_0000).unwrap()));
        assert!(!map.is_ram(&Span::new(0x9_ffff, 2).unwrap()));
    }

    #[test]
    fn bad_ranges_are_refused() {
        let ram = range(0, 0x20_0000, MemoryKind::Ram);
        assert_eq!(
            MemoryMap::new(&[ram, range(u64::MAX, 2, MemoryKind::Reserved)]),
            Err(MemoryMapError::Wraps { start: u64::MAX, size: 2 })
        );
        assert!(matches!(MemoryMap::new(&[]), Err(MemoryMapError::NoLowRam { name: "GDT", .. })));
        let many: Vec<_> =
            (0..200).map(|i| range(0x100_0000 + i * 0x2000, 0x1000, MemoryKind::Reserved)).collect();
        assert!(matches!(
            MemoryMap::new(&[many, vec![ram]].concat()),
            Err(MemoryMapError::TooMany { count: 203, limit: MAX_MAP_ENTRIES })
        ));
        assert!(matches!(MemoryMap::new(&[ram; 1025]), Err(MemoryMapError::TooMany { count: 1025, .. })));
    }

    fn any_range() -> impl Strategy<Value = MemoryRange> {
        let kind = prop_oneof![Just(MemoryKind::Ram), Just(MemoryKind::Reserved), Just(MemoryKind::Acpi)];
        (0u64..64, 0u64..16, kind)
            .prop_map(|(start, pages, kind)| range(0x10_0000 + start * 0x1000, pages * 0x1000, kind))
    }

    proptest! {
        #[test]
        fn every_page_is_told_as_the_strongest_kind_that_covers_it(input in prop::collection::vec(any_range(), 0..12)) {
            let mut all = vec![range(0, 0xa_0000, MemoryKind::Ram)];
            all.extend(&input);
            let map = MemoryMap::new(&all).unwrap();
            for pair in map.ranges().windows(2) {
                let end = pair[0].start + pair[0].size;
                prop_assert!(end <= pair[1].start);
                prop_assert!(end < pair[1].start || pair[0].kind != pair[1].kind, "neighbours not merged");
            }
            for page in (0x10_0000u64..0x16_0000).step_by(0x1000) {
                let covers = |r: &&MemoryRange| r.start <= page && page < r.start + r.size;
                let expected = input.iter().filter(covers).map(|r| r.kind).max();
                let told = map.ranges().iter().find(covers).map(|r| r.kind);
                prop_assert_eq!(told, expected);
            }
        }
    }
}
