//! Pages of a destination's memory are allocated ahead of what arrives, on a thread of their own: to clear them takes longer than to
//! receive them.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};

use vmm_device_model::dma::GuestRam;
use vmm_device_model::thread::{self, ThreadHook};
use vmm_memory_manager::straight::{prefault, slice};
use vmm_migration_protocol::{MemoryLayout, MemoryRange};

use super::THREAD;
use super::course::PORTION;
use super::turn::Turn;

/// Bytes ahead, at most.
const MOST: u64 = 8 << 20;

/// What is asked for at once, at least.
const LEAST: u64 = 512 << 10;

/// What the kernel is asked for at once: nobody else changes this process's mappings meanwhile, nor gets this processor if the kernel
/// does not preempt itself.
const STEP: u64 = 256 << 10;

/// The thread, and where memory arrives.
#[derive(Debug)]
pub(super) struct Ahead {
    asked: SyncSender<Range<u64>>,
    over: Arc<AtomicBool>,
    front: Mutex<Front>,
}

/// Where memory arrives.
#[derive(Debug, Default)]
struct Front {
    /// How far apart what arrives one after the other may be: connections overtake each other.
    reach: u64,
    /// Behind what has arrived furthest on.
    end: u64,
    /// Bytes that have arrived next to each other, about.
    arrived: u64,
    /// It has been asked for up to there.
    until: u64,
}

impl Ahead {
    /// Of this memory, which arrives over so many connections.
    ///
    /// # Errors
    /// There is no thread.
    pub(super) fn start(
        threads: &Arc<dyn ThreadHook>,
        memory: Arc<GuestRam>,
        connections: u16,
    ) -> std::io::Result<Self> {
        let (asked, ranges) = sync_channel(1);
        let over = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&over);
        thread::spawn(threads, THREAD, "migration-ahead", move || allocate(&memory, &ranges, &ended))?;
        let reach = 2 * PORTION * u64::from(connections.saturating_sub(1));
        Ok(Self { asked, over, front: Mutex::new(Front { reach, ..Front::default() }) })
    }

    /// `range` arrives.
    pub(super) fn note(&self, layout: &MemoryLayout, range: MemoryRange) {
        let mut front = self.front.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(next) = front.next(layout, range) {
            let until = next.end;
            // Where the thread is busy, it is no use to be further ahead.
            if self.asked.try_send(next).is_ok() {
                front.until = until;
            }
        }
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
    }
}

impl Front {
    /// What is to be allocated now that `range` arrives: no more than has arrived next to it.
    fn next(&mut self, layout: &MemoryLayout, range: MemoryRange) -> Option<Range<u64>> {
        if range.gpa().abs_diff(self.end) > self.reach {
            *self = Self { reach: self.reach, ..Self::default() };
        }
        self.end = self.end.max(range.end());
        self.arrived = self.arrived.saturating_add(range.length());
        let region = layout.regions().iter().find(|region| {
            let end = region.gpa.saturating_add(region.length);
            (region.gpa..end).contains(&range.gpa())
        })?;
        let wanted = self.end.saturating_add(self.arrived.min(MOST));
        let next = self.until.max(self.end)..wanted.min(region.gpa.saturating_add(region.length));
        (next.end.saturating_sub(next.start) >= LEAST).then_some(next)
    }
}

fn allocate(memory: &GuestRam, ranges: &Receiver<Range<u64>>, over: &AtomicBool) {
    let mut turn = Turn::new();
    while let Ok(mut range) = ranges.recv() {
        while !range.is_empty() && !over.load(Ordering::SeqCst) {
            let step = STEP.min(range.end - range.start);
            // What cannot be had here is an error where it arrives.
            let _ = slice(memory, range.start, step).and_then(|step| prefault(&step));
            range.start += step;
            turn.give_way();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use vm_memory::{GuestAddress, GuestMemoryBackend};
    use vmm_device_model::thread::Unconfined;
    use vmm_migration_protocol::Region;

    use super::*;

    const MIB: u64 = 1 << 20;

    /// What arrives at once.
    const CHUNK: u64 = 256 << 10;

    fn layout() -> MemoryLayout {
        let region = |gpa, length| Region { gpa, length, zone: "z".into() };
        MemoryLayout::new(vec![region(0, 32 * MIB), region(64 * MIB, 32 * MIB)]).unwrap()
    }

    fn range(from: u64, to: u64) -> MemoryRange {
        MemoryRange::new(from, to - from).unwrap()
    }

    /// What is allocated when chunks arrive at these multiples of their size, all of it.
    fn allocated(reach: u64, chunks: impl IntoIterator<Item = u64>) -> Vec<Range<u64>> {
        let mut front = Front { reach, ..Front::default() };
        let each = chunks.into_iter().filter_map(|chunk| {
            let next = front.next(&layout(), range(chunk * CHUNK, (chunk + 1) * CHUNK))?;
            front.until = next.end;
            Some(next)
        });
        each.collect()
    }

    fn bytes(ranges: &[Range<u64>]) -> u64 {
        ranges.iter().map(|range| range.end - range.start).sum()
    }

    #[test]
    fn no_more_is_allocated_ahead_than_has_arrived_and_nothing_in_gaps() {
        // 3 MiB, and nothing more.
        let ranges = allocated(0, 4..16);
        assert!(ranges.iter().all(|range| range.end <= 7 * MIB) && bytes(&ranges) <= 6 * MIB, "{ranges:?}");
        assert!(ranges.windows(2).all(|two| two[0].end <= two[1].start), "{ranges:?}");
        assert!(ranges.first().is_some_and(|range| range.start <= 2 * MIB), "{ranges:?}");
        // Up to the end of the region, at most so much ahead.
        let ranges = allocated(0, 0..128);
        assert_eq!(ranges.last().map(|range| range.end), Some(32 * MIB));
        assert!(bytes(&ranges) <= 32 * MIB && ranges.iter().all(|range| range.end - range.start <= MOST));
        // One page table in ten is in use.
        assert!(allocated(0, (0..128).step_by(10)).is_empty());
        // The other region.
        assert!(allocated(0, 256..264).iter().all(|range| range.start > 64 * MIB));
    }

    #[test]
    fn connections_that_overtake_each_other_are_one_stream() {
        let mixed = (0..32).flat_map(|four: u64| [2, 0, 3, 1].map(|at| four * 4 + at));
        assert!(bytes(&allocated(6 * CHUNK, mixed.clone())) > 16 * MIB);
        assert!(bytes(&allocated(0, mixed)) < MIB);
    }

    #[test]
    fn memory_is_there_before_it_arrives() {
        let memory = Arc::new(GuestRam::from_ranges(&[(GuestAddress(0), 32 << 20)]).unwrap());
        let threads: Arc<dyn ThreadHook> = Arc::new(Unconfined);
        let ahead = Ahead::start(&threads, Arc::clone(&memory), 1).unwrap();
        for chunk in 0..8 {
            ahead.note(&layout(), range(chunk * CHUNK, (chunk + 1) * CHUNK));
        }
        let host = memory.get_host_address(GuestAddress(0)).unwrap().addr();
        let resident = || {
            let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
            let mut lines = smaps.lines().skip_while(|line| !line.starts_with(&format!("{host:x}-")));
            let line = lines.find_map(|line| line.strip_prefix("Rss:")).unwrap();
            line.trim().trim_end_matches(" kB").parse::<u64>().unwrap()
        };
        let until = Instant::now() + Duration::from_secs(60);
        while resident() < 512 {
            assert!(Instant::now() < until, "it is not");
            std::thread::yield_now();
        }
        drop(ahead);
        while Arc::strong_count(&memory) > 1 {
            assert!(Instant::now() < until, "the thread has not ended");
            std::thread::yield_now();
        }
    }
}
