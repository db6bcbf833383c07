//! Memory that is put aside, to be sent with the next pass.

use std::sync::{Mutex, MutexGuard, PoisonError};

use vmm_memory_manager::dirty::Changed;
use vmm_memory_manager::pages::Pages;
use vmm_migration_protocol::MemoryRange;
use vmm_snapshot::directory::Place;

/// Pages of a guest's memory. The control thread and the driver put in, a pass takes out. However a destination asks for them, they
/// take a bit for each page there is.
#[derive(Debug)]
pub(crate) struct Aside {
    places: Vec<Place>,
    pages: Mutex<Pages>,
}

impl Aside {
    /// Of the memory at `places`.
    pub(crate) fn of(places: Vec<Place>) -> Self {
        let pages = Mutex::new(none(&places));
        Self { places, pages }
    }

    /// Adds what changed, and gives the bytes that are put aside by now.
    pub(crate) fn put(&self, changed: Changed) -> u64 {
        let mut pages = self.lock();
        for (place, ranges) in self.places.iter().zip(changed) {
            ranges.into_iter().for_each(|range| pages.insert(place.gpa + range.start..place.gpa + range.end));
        }
        pages.bytes()
    }

    /// Adds one range; what lies in no region is not the guest's.
    pub(crate) fn put_range(&self, range: MemoryRange) {
        self.lock().insert(range.gpa()..range.end());
    }

    /// All of it; then nothing is put aside.
    pub(crate) fn take(&self) -> Changed {
        let pages = std::mem::replace(&mut *self.lock(), none(&self.places));
        let of = |place: &Place| {
            let runs = pages.runs(place.gpa..place.gpa + place.size);
            runs.map(|run| run.start - place.gpa..run.end - place.gpa).collect()
        };
        self.places.iter().map(of).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Pages> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// No pages of what is at `places`.
fn none(places: &[Place]) -> Pages {
    let mut regions: Vec<(u64, u64)> = places.iter().map(|place| (place.gpa, place.size)).collect();
    regions.sort_unstable();
    Pages::none(regions)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_put_aside_twice_is_sent_once() {
        let place = |gpa, size| Place { zone: "z".into(), gpa, size };
        let aside = Aside::of(vec![place(0x10_0000, 0x10000), place(0, 0x10000)]);
        assert_eq!(aside.put(vec![vec![], vec![0x1000..0x3000, 0x8000..0x9000]]), 0x3000);
        assert_eq!(aside.put(vec![vec![0..0x1000], vec![0x2000..0x4000]]), 0x5000);
        aside.put_range(MemoryRange::new(0x10_1000, 0x1000).unwrap());
        aside.put_range(MemoryRange::new(0x50_0000, 0x1000).unwrap());
        let page = |page: u64| aside.put_range(MemoryRange::new(page << 12, 0x1000).unwrap());
        // In front, touching, between two, within one, and behind.
        [0, 4, 9, 7, 2, 12].into_iter().for_each(page);
        let taken = aside.take();
        assert_eq!(taken[1], [0..0x5000, 0x7000..0xa000, 0xc000..0xd000]);
        assert_eq!((taken[0].len(), taken[0][0].clone()), (1, 0..0x2000));
        assert_eq!(aside.put(Changed::new()), 0);
    }
}
