//! Dirty guest pages: one collector, any number of named trackers.
//!
//! A source forgets what it reports (KVM's log, the bitmap of this process's own writes, a device's log),
//! so there is one place that asks them, and every page that it learns of goes into the bitmap of every
//! tracker at once. An error in the middle loses nothing: what was fetched is in the bitmaps already.

use std::collections::BTreeMap;
use std::sync::Arc;

use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{GuestMemoryBackend, GuestRegionMmap};
use vmm_device_model::dirty::DirtySource;
use vmm_hypervisor::MemorySlot;

use crate::layout::{PAGE_SIZE, Range};
use crate::map::MemoryMap;
use crate::zone::ZoneError;

/// The collector of one VM's dirty pages.
#[derive(Default)]
pub struct DirtyCollector {
    trackers: BTreeMap<String, Tracker>,
    sources: Vec<Arc<dyn DirtySource>>,
}

impl std::fmt::Debug for DirtyCollector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DirtyCollector").field("trackers", &self.trackers.keys()).finish_non_exhaustive()
    }
}

/// Per region of [`MemoryMap::source`] the bytes that may have changed, in offsets in it.
pub type Changed = Vec<Vec<std::ops::Range<u64>>>;

/// One bit per page, one bitmap per slot.
#[derive(Debug, Clone)]
struct Tracker(Vec<Vec<u64>>);

const BITS: u64 = u64::BITS as u64;

impl DirtyCollector {
    /// Nobody tracks.
    pub fn new() -> Self {
        Self::default()
    }

    /// Asks `source`, too, from now on.
    pub fn add_source(&mut self, source: Arc<dyn DirtySource>) {
        self.sources.push(source);
    }

    /// Starts to track under `name`: pages written from now on. The first tracker turns logging on.
    ///
    /// # Errors
    /// The name is taken, or the hypervisor refuses; nothing has changed then.
    pub fn start(&mut self, map: &mut MemoryMap, name: &str) -> Result<(), DirtyError> {
        if self.trackers.contains_key(name) {
            return Err(DirtyError::Taken { name: name.to_owned() });
        }
        if self.trackers.is_empty() {
            map.log_dirty(true)?;
        }
        // What was written before belongs to the trackers that are there.
        if let Err(error) = self.collect(map) {
            if self.trackers.is_empty() {
                // The next start tries again; a log that nobody reads is slow, not wrong.
                let _ = map.log_dirty(false);
            }
            return Err(error);
        }
        let empty = map.slots().iter().map(|slot| vec![0; words(slot.size)]).collect();
        self.trackers.insert(name.to_owned(), Tracker(empty));
        Ok(())
    }

    /// Ends tracking under `name`. The last tracker turns logging off.
    ///
    /// # Errors
    /// No such tracker, or the hypervisor refuses; the tracker is gone all the same.
    pub fn stop(&mut self, map: &mut MemoryMap, name: &str) -> Result<(), DirtyError> {
        self.trackers.remove(name).ok_or_else(|| DirtyError::Unknown { name: name.to_owned() })?;
        if self.trackers.is_empty() {
            map.log_dirty(false)?;
        }
        Ok(())
    }

    /// The pages written since `name` started or took last, as ranges in order of address.
    ///
    /// # Errors
    /// No such tracker, or a source could not be asked; no page is lost, the next call reports it.
    pub fn take(&mut self, map: &MemoryMap, name: &str) -> Result<Vec<Range>, DirtyError> {
        let mut ranges = Vec::new();
        self.drain(map, name, &mut |slot, bitmap| {
            each_run(bitmap, |run| push(slot.guest_address + run.start, run.end - run.start, &mut ranges));
        })?;
        Ok(ranges)
    }

    /// As [`take`](Self::take), per region of [`MemoryMap::source`] and in offsets in it: what an incremental
    /// snapshot wants. If that fails, [`give_back`](Self::give_back) what was taken.
    ///
    /// # Errors
    /// As [`take`](Self::take).
    pub fn take_changed(&mut self, map: &MemoryMap, name: &str) -> Result<Changed, DirtyError> {
        let mut changed = Vec::new();
        self.drain(map, name, &mut |_, bitmap| changed.push(ranges(bitmap)))?;
        Ok(changed)
    }

    /// Marks what was taken for `name` again, for the next call to report it with what was written since.
    ///
    /// # Errors
    /// No such tracker.
    pub fn give_back(&mut self, map: &MemoryMap, name: &str, changed: &Changed) -> Result<(), DirtyError> {
        let tracker = self.trackers.get_mut(name);
        let tracker = tracker.ok_or_else(|| DirtyError::Unknown { name: name.to_owned() })?;
        for (slot, ranges) in map.slots().iter().zip(changed) {
            for range in ranges {
                let len = range.end.saturating_sub(range.start);
                tracker.mark(map, slot.guest_address.saturating_add(range.start), len);
            }
        }
        Ok(())
    }

    /// Hands each slot's bitmap of `name` to `each` and clears it.
    fn drain(
        &mut self,
        map: &MemoryMap,
        name: &str,
        each: &mut dyn FnMut(&MemorySlot, &[u64]),
    ) -> Result<(), DirtyError> {
        if !self.trackers.contains_key(name) {
            return Err(DirtyError::Unknown { name: name.to_owned() });
        }
        self.collect(map)?;
        let Some(Tracker(bitmaps)) = self.trackers.get_mut(name) else { return Ok(()) };
        for (slot, bitmap) in map.slots().iter().zip(bitmaps) {
            each(slot, bitmap);
            bitmap.fill(0);
        }
        Ok(())
    }

    /// Fetches from every source into every tracker.
    fn collect(&mut self, map: &MemoryMap) -> Result<(), DirtyError> {
        for (index, (slot, region)) in map.slots().iter().zip(map.memory().iter()).enumerate() {
            self.merge(index, &own_writes(region));
            self.merge(index, &map.vm().dirty_log(slot).map_err(ZoneError::from)?);
        }
        let Self { trackers, sources } = self;
        for source in sources {
            let mut mark = |address, len| {
                trackers.values_mut().for_each(|tracker| tracker.mark(map, address, len));
            };
            source.take(&mut mark).map_err(DirtyError::Source)?;
        }
        Ok(())
    }

    fn merge(&mut self, slot: usize, bitmap: &[u64]) {
        for Tracker(bitmaps) in self.trackers.values_mut() {
            if let Some(words) = bitmaps.get_mut(slot) {
                words.iter_mut().zip(bitmap).for_each(|(to, from)| *to |= from);
            }
        }
    }
}

impl Tracker {
    /// Marks the pages of a range; what is outside RAM is nobody's.
    fn mark(&mut self, map: &MemoryMap, address: u64, len: u64) {
        let end = address.saturating_add(len);
        for (slot, bitmap) in map.slots().iter().zip(&mut self.0) {
            let start = address.max(slot.guest_address);
            let end = end.min(slot.guest_address + slot.size);
            if start >= end {
                continue;
            }
            let first = (start - slot.guest_address) / PAGE_SIZE;
            let last = (end - 1 - slot.guest_address) / PAGE_SIZE;
            for page in first..=last {
                if let Some(word) = usize::try_from(page / BITS).ok().and_then(|at| bitmap.get_mut(at)) {
                    *word |= 1 << (page % BITS);
                }
            }
        }
    }
}

/// Fetches and forgets the pages that this process wrote.
fn own_writes(region: &GuestRegionMmap<AtomicBitmap>) -> Vec<u64> {
    region.bitmap().get_and_reset()
}

fn words(bytes: u64) -> usize {
    usize::try_from(bytes.div_ceil(PAGE_SIZE * BITS)).unwrap_or(usize::MAX)
}

/// The bytes of the pages whose bits are set, from the first bit's page on, in order.
pub fn ranges(bitmap: &[u64]) -> Vec<std::ops::Range<u64>> {
    // To count first costs less than a list that grows. A run over two words counts twice.
    let count = bitmap.iter().map(|word| (word & !(word << 1)).count_ones() as usize);
    let mut ranges = Vec::with_capacity(count.sum());
    each_run(bitmap, |run| ranges.push(run));
    ranges
}

/// The runs of ones in `bitmap`, in bytes of the pages they stand for.
fn each_run(bitmap: &[u64], mut each: impl FnMut(std::ops::Range<u64>)) {
    // A run that goes on from the word before: where it began.
    let mut open = None;
    let at = |index: u64, bit: u32| (index * BITS + u64::from(bit)) * PAGE_SIZE;
    for (index, word) in (0_u64..).zip(bitmap.iter().copied()) {
        let (mut begins, mut ends) = (word & !(word << 1), !word & word << 1);
        if let Some(start) = open {
            if word & 1 == 0 {
                each(start..at(index, 0));
                open = None;
            } else if ends == 0 {
                continue;
            } else {
                each(start..at(index, ends.trailing_zeros()));
                (begins, ends, open) = (begins & (begins - 1), ends & (ends - 1), None);
            }
        }
        while ends != 0 {
            each(at(index, begins.trailing_zeros())..at(index, ends.trailing_zeros()));
            (begins, ends) = (begins & (begins - 1), ends & (ends - 1));
        }
        if begins != 0 {
            open = Some(at(index, begins.trailing_zeros()));
        }
    }
    if let Some(start) = open {
        each(start..at(bitmap.len() as u64, 0));
    }
}

fn push(start: u64, size: u64, ranges: &mut Vec<Range>) {
    match ranges.last_mut() {
        Some(last) if last.end() == start => last.size += size,
        _ => ranges.push(Range { start, size }),
    }
}

/// Dirty pages that cannot be tracked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DirtyError {
    /// The name has a tracker.
    #[error("dirty pages are tracked under {name:?} already")]
    Taken {
        /// The name.
        name: String,
    },
    /// The name has no tracker.
    #[error("no dirty pages are tracked under {name:?}")]
    Unknown {
        /// The name.
        name: String,
    },
    /// The hypervisor refused.
    #[error("cannot log dirty pages")]
    Log(#[from] ZoneError),
    /// A device could not be asked.
    #[error("cannot ask a device for the pages that it wrote")]
    Source(#[source] std::io::Error),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_become_ranges_across_words() {
        let found = ranges(&[1 | 3 << 62, 1, 0, u64::MAX, 1]);
        let pages: Vec<_> = found.iter().map(|r| (r.start / 4096, (r.end - r.start) / 4096)).collect();
        assert_eq!(pages, [(0, 1), (62, 3), (192, 65)]);
        assert_eq!(found.capacity(), 5, "counted");
        let whole = ranges(&[u64::MAX; 3]);
        assert_eq!(whole.first().map(|run| (whole.len(), run.end)), Some((1, 192 * 4096)));
    }

    proptest::proptest! {
        #[test]
        fn ranges_hold_the_set_bits_and_no_other(bitmap in proptest::collection::vec(proptest::num::u64::ANY, 0..6)) {
            let ranges = ranges(&bitmap);
            proptest::prop_assert!(ranges.capacity() <= ranges.len() + bitmap.len());
            let mut back = vec![0_u64; bitmap.len()];
            for range in &ranges {
                for page in range.start / 4096..range.end / 4096 {
                    back[(page / 64) as usize] |= 1 << (page % 64);
                }
            }
            proptest::prop_assert_eq!(back, bitmap);
            proptest::prop_assert!(ranges.windows(2).all(|w| w[0].end < w[1].start));
        }
    }
}
