//! Memory that is put aside, to be sent with the next pass.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use vmm_memory_manager::dirty::Changed;
use vmm_migration_protocol::MemoryRange;
use vmm_snapshot::directory::Place;

/// Ranges of a guest's memory, by region. The control thread and the driver put in, a pass takes out.
#[derive(Debug)]
pub(crate) struct Aside {
    places: Vec<Place>,
    ranges: Mutex<Changed>,
}

impl Aside {
    /// Of the memory at `places`.
    pub(crate) fn of(places: Vec<Place>) -> Self {
        Self { places, ranges: Mutex::default() }
    }

    /// Adds what changed, and gives the bytes that are put aside by now.
    pub(crate) fn put(&self, changed: Changed) -> u64 {
        let mut ranges = self.ranges.lock().unwrap_or_else(PoisonError::into_inner);
        let regions = ranges.len().max(changed.len());
        ranges.resize(regions, Vec::new());
        for (all, more) in ranges.iter_mut().zip(changed) {
            all.extend(more);
            tidy(all);
        }
        ranges.iter().flatten().map(|range| range.end.saturating_sub(range.start)).sum()
    }

    /// Adds one range; what lies in no region is not the guest's.
    pub(crate) fn put_range(&self, range: MemoryRange) {
        for (number, place) in self.places.iter().enumerate() {
            let (start, end) = (range.gpa().max(place.gpa), range.end().min(place.gpa + place.size));
            if start < end {
                let mut all = self.ranges.lock().unwrap_or_else(PoisonError::into_inner);
                let regions = all.len().max(number + 1);
                all.resize(regions, Vec::new());
                if let Some(ranges) = all.get_mut(number) {
                    insert(ranges, start - place.gpa..end - place.gpa);
                }
            }
        }
    }

    /// All of it; then nothing is put aside.
    pub(crate) fn take(&self) -> Changed {
        std::mem::take(&mut *self.ranges.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Adds a range to those that are tidy, and keeps them so. A destination may ask for pages one by one.
fn insert(ranges: &mut Vec<Range<u64>>, mut new: Range<u64>) {
    let first = ranges.partition_point(|range| range.end < new.start);
    let after = ranges.partition_point(|range| range.start <= new.end).max(first);
    for range in ranges.get(first..after).unwrap_or_default() {
        new = new.start.min(range.start)..new.end.max(range.end);
    }
    ranges.splice(first..after, std::iter::once(new));
}

/// Sorts, and joins what overlaps or touches.
fn tidy(ranges: &mut Vec<Range<u64>>) {
    ranges.sort_unstable_by_key(|range| range.start);
    let mut joined: Vec<Range<u64>> = Vec::with_capacity(ranges.len());
    for range in ranges.drain(..) {
        match joined.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    *ranges = joined;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_put_aside_twice_is_sent_once() {
        let place = |gpa, size| Place { zone: "z".into(), gpa, size };
        let aside = Aside::of(vec![place(0, 0x10000), place(0x10_0000, 0x10000)]);
        assert_eq!(aside.put(vec![vec![0x1000..0x3000, 0x8000..0x9000]]), 0x3000);
        assert_eq!(aside.put(vec![vec![0x2000..0x4000], vec![0..0x1000]]), 0x5000);
        aside.put_range(MemoryRange::new(0x10_1000, 0x1000).unwrap());
        aside.put_range(MemoryRange::new(0x50_0000, 0x1000).unwrap());
        let page = |page: u64| aside.put_range(MemoryRange::new(page << 12, 0x1000).unwrap());
        // In front, touching, between two, within one, and behind.
        [0, 4, 9, 7, 2, 12].into_iter().for_each(page);
        let taken = aside.take();
        assert_eq!(taken[0], [0..0x5000, 0x7000..0xa000, 0xc000..0xd000]);
        assert_eq!((taken[1].len(), taken[1][0].clone()), (1, 0..0x2000));
        assert_eq!(aside.put(Changed::new()), 0);
    }
}
