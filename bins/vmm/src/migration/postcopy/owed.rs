//! What a source owes.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use vmm_memory_manager::dirty::Changed;
use vmm_memory_manager::pages::Pages;
use vmm_migration_protocol::{MemoryLayout, MemoryRange};

/// Pages that the destination has not, and nobody has begun to send.
#[derive(Debug)]
pub(in crate::migration) struct Owed {
    layout: MemoryLayout,
    pages: Mutex<Pages>,
}

impl Owed {
    /// Nothing, of memory that is laid out so.
    pub(in crate::migration) fn none(layout: MemoryLayout) -> Self {
        let pages = Mutex::new(pages_of(&layout));
        Self { layout, pages }
    }

    /// Owes these, and no others; gives them as ranges.
    pub(in crate::migration) fn set(&self, changed: &Changed) -> Vec<MemoryRange> {
        let mut pages = pages_of(&self.layout);
        for (region, ranges) in self.layout.regions().iter().zip(changed) {
            ranges.iter().for_each(|range| pages.insert(region.gpa + range.start..region.gpa + range.end));
        }
        let runs =
            pages.runs(0..u64::MAX).filter_map(|run| MemoryRange::new(run.start, run.end - run.start).ok());
        let runs = runs.collect();
        *self.lock() = pages;
        runs
    }

    /// None of the guest's memory is owed yet, of this layout.
    pub(super) fn pages(&self) -> Pages {
        pages_of(&self.layout)
    }

    /// Owes these, and no others.
    pub(super) fn replace(&self, pages: Pages) {
        *self.lock() = pages;
    }

    /// Whether it is the guest's memory.
    pub(super) fn covers(&self, range: &MemoryRange) -> bool {
        self.layout.contains(range)
    }

    /// The first that is owed in `within`, at most `most` bytes of it, which is not owed any more.
    pub(super) fn take(&self, within: Range<u64>, most: u64) -> Option<Range<u64>> {
        let mut pages = self.lock();
        let run = pages.first(within, most)?;
        pages.remove(&run);
        Some(run)
    }

    /// How much it is, in bytes.
    pub(super) fn bytes(&self) -> u64 {
        self.lock().bytes()
    }

    fn lock(&self) -> MutexGuard<'_, Pages> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// No pages of memory that is laid out so.
pub(in crate::migration) fn pages_of(layout: &MemoryLayout) -> Pages {
    Pages::none(layout.regions().iter().map(|region| (region.gpa, region.length)))
}

#[cfg(test)]
mod tests {
    use vmm_migration_protocol::{PAGE, Region};

    use super::*;

    #[test]
    fn what_is_taken_is_owed_no_more() {
        let region = |gpa, length| Region { gpa, length, zone: "z".into() };
        let layout = MemoryLayout::new(vec![region(0, 16 * PAGE), region(64 * PAGE, 16 * PAGE)]).unwrap();
        let owed = Owed::none(layout);
        let changed: Changed = vec![vec![0..3 * PAGE], std::iter::once(2 * PAGE..4 * PAGE).collect()];
        let ranges: Vec<_> = owed.set(&changed).iter().map(|range| (range.gpa(), range.length())).collect();
        assert_eq!(ranges, [(0, 3 * PAGE), (66 * PAGE, 2 * PAGE)]);
        assert_eq!(owed.take(67 * PAGE..68 * PAGE, u64::MAX), Some(67 * PAGE..68 * PAGE));
        assert_eq!(owed.take(67 * PAGE..68 * PAGE, u64::MAX), None);
        assert_eq!(owed.take(0..u64::MAX, 2 * PAGE), Some(0..2 * PAGE));
        assert_eq!(owed.bytes(), 2 * PAGE);
        owed.replace(owed.pages());
        assert_eq!((owed.bytes(), owed.take(0..u64::MAX, 1)), (0, None));
        assert!(owed.covers(&MemoryRange::new(15 * PAGE, PAGE).unwrap()));
        assert!(!owed.covers(&MemoryRange::new(15 * PAGE, 2 * PAGE).unwrap()));
    }
}
