//! What a pass over memory sends, in portions that the threads of all connections take.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use vmm_memory_manager::dirty::Changed;
use vmm_memory_manager::source::GuestMemorySource;
use vmm_migration_protocol::{Fault, MemoryRange, PAGE};
use vmm_snapshot::directory::MemorySource;

/// Bytes of memory in a portion, at most. Small, so that frames come between, a checksum is of what is sent, the last pass is
/// spread over all connections, and what was looked at is in the processor's cache when it is sent.
pub(super) const PORTION: u64 = 512 << 10;

/// Ranges in a portion, at most.
const RANGES: usize = 32;

/// A part of a region.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) region: usize,
    /// Offsets in it; whole pages.
    pub(super) range: Range<u64>,
}

/// A pass over memory.
#[derive(Debug)]
pub(super) struct Course {
    pub(super) number: u32,
    pub(super) last: bool,
    /// All of it is to be sent: what never was is zero already.
    pub(super) all: bool,
    left: Mutex<Left>,
    /// What the destination is to be without.
    absent: Mutex<Vec<MemoryRange>>,
    /// Bytes of memory that all connections have said something of.
    described: AtomicU64,
    /// Why no connection goes on.
    stopped: OnceLock<Fault>,
}

/// What nobody has taken yet.
#[derive(Debug)]
struct Left {
    what: What,
    /// The range that portions are cut from.
    current: Option<Piece>,
}

#[derive(Debug)]
enum What {
    /// What counts as data from there on.
    All { region: usize, at: u64 },
    /// These ranges, the last one first.
    Changed(Vec<Piece>),
}

impl Course {
    /// Of what changed; `None`: of all memory.
    pub(super) fn new(number: u32, what: Option<Changed>, last: bool) -> Self {
        let all = what.is_none();
        let what = match what {
            None => What::All { region: 0, at: 0 },
            Some(changed) => {
                let of = |(region, ranges): (usize, Vec<Range<u64>>)| {
                    ranges.into_iter().map(move |range| Piece { region, range })
                };
                let mut pieces: Vec<Piece> = changed.into_iter().enumerate().flat_map(of).collect();
                pieces.reverse();
                What::Changed(pieces)
            }
        };
        let left = Mutex::new(Left { what, current: None });
        Self {
            number,
            last,
            all,
            left,
            absent: Mutex::default(),
            described: AtomicU64::new(0),
            stopped: OnceLock::new(),
        }
    }

    /// The last pass, which sends nothing, and leaves these out.
    pub(super) fn leaving(number: u32, absent: Vec<MemoryRange>) -> Self {
        Self { absent: Mutex::new(absent), ..Self::new(number, Some(Changed::new()), true) }
    }

    /// What the destination is to be without, for whoever asks first.
    pub(super) fn take_absent(&self) -> Vec<MemoryRange> {
        std::mem::take(&mut *self.absent.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The next portion, into `pieces`; none of it is empty. Nothing: all is taken.
    pub(super) fn take(&self, memory: &GuestMemorySource, pieces: &mut Vec<Piece>) -> io::Result<()> {
        pieces.clear();
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        let mut room = PORTION;
        while room > 0 && pieces.len() < RANGES {
            let Some(mut piece) = left.next(memory)? else { break };
            // Cut at multiples, so that a chunk is not sent in two portions.
            let whole = (piece.range.start + 1).next_multiple_of(PORTION);
            let end = piece.range.end.min(whole).min(piece.range.start + room);
            if end < piece.range.end {
                left.current = Some(Piece { region: piece.region, range: end..piece.range.end });
            }
            piece.range.end = end;
            room = room.saturating_sub(end - piece.range.start);
            pieces.push(piece);
        }
        Ok(())
    }

    /// A connection has said something of so many bytes of memory.
    pub(super) fn describe(&self, bytes: u64) {
        self.described.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes of memory that connections whose shares are done have said something of.
    pub(super) fn described(&self) -> u64 {
        self.described.load(Ordering::Relaxed)
    }

    /// One connection cannot go on, and so none shall.
    pub(super) fn stop(&self, fault: Fault) {
        // The first one is the cause.
        let _ = self.stopped.set(fault);
    }

    /// # Errors
    /// Why no connection goes on.
    pub(super) fn check(&self) -> Result<(), Fault> {
        self.stopped.get().map_or(Ok(()), |fault| Err(fault.clone()))
    }
}

impl Left {
    fn next(&mut self, memory: &GuestMemorySource) -> io::Result<Option<Piece>> {
        if let Some(piece) = self.current.take() {
            return Ok(Some(piece));
        }
        match &mut self.what {
            What::Changed(pieces) => Ok(pieces.pop()),
            What::All { region, at } => {
                while let Some(size) = memory.size(*region) {
                    if let Some(run) = memory.next_data(*region, *at)? {
                        let run = run.start / PAGE * PAGE..run.end.next_multiple_of(PAGE).min(size);
                        *at = run.end;
                        return Ok(Some(Piece { region: *region, range: run }));
                    }
                    (*region, *at) = (*region + 1, 0);
                }
                Ok(None)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vm_memory::{Bytes, GuestAddress};
    use vmm_hypervisor::fake::Fake;
    use vmm_hypervisor::{Hypervisor, VmOptions};
    use vmm_memory_manager::map::MemoryMap;
    use vmm_memory_manager::zone::{ZoneConfig, ZoneOptions};

    use super::*;

    const SIZE: u64 = 16 << 20;

    fn map() -> MemoryMap {
        let vm = Fake::new().create_vm(&VmOptions { ioapic_pins: 24, tss_address: 0 }).unwrap();
        let options = ZoneOptions::default();
        let zone =
            ZoneConfig { id: "z".into(), size: SIZE, file: None, shared: false, huge_page: None, options };
        MemoryMap::create(vm, &[zone], 40).unwrap()
    }

    /// All portions, taken by two who take turns.
    fn portions(course: &Course, memory: &GuestMemorySource) -> Vec<Vec<Range<u64>>> {
        let mut all = Vec::new();
        loop {
            let mut pieces = Vec::new();
            course.take(memory, &mut pieces).unwrap();
            if pieces.is_empty() {
                return all;
            }
            assert!(pieces.iter().all(|piece| piece.region == 0 && !piece.range.is_empty()));
            all.push(pieces.into_iter().map(|piece| piece.range).collect());
        }
    }

    #[test]
    fn each_page_is_in_one_portion_and_portions_are_small() {
        let map = map();
        let memory = map.source().unwrap();
        let scattered = (0..100).map(|page| page * 2 * PAGE..(page * 2 + 1) * PAGE);
        let changed: Vec<_> = scattered.chain([2 << 20..(3 << 20) + PAGE, (SIZE - PAGE)..SIZE]).collect();
        let found = portions(&Course::new(1, Some(vec![changed.clone()]), true), &memory);
        for portion in &found {
            let bytes: u64 = portion.iter().map(|range| range.end - range.start).sum();
            assert!(bytes <= PORTION && portion.len() <= RANGES, "{portion:?}");
        }
        assert!(found.len() >= 4 + 2, "{found:?}");
        let pages = |ranges: &[Range<u64>]| -> Vec<u64> {
            ranges.iter().flat_map(|range| range.clone().step_by(PAGE as usize)).collect()
        };
        assert_eq!(pages(&found.concat()), pages(&changed));
    }

    #[test]
    fn pages_that_nobody_wrote_are_in_no_portion() {
        let map = map();
        let written: Vec<_> = [3, 4, 700, 4095].map(|page| page * PAGE).to_vec();
        for at in &written {
            map.memory().write_obj(1_u8, GuestAddress(*at)).unwrap();
        }
        let course = Course::new(0, None, false);
        let found = portions(&course, &map.source().unwrap()).concat();
        assert!(written.iter().all(|at| found.iter().any(|range| range.contains(at))), "{found:?}");
        let bytes: u64 = found.iter().map(|range| range.end - range.start).sum();
        assert!(bytes <= 64 * PAGE, "{found:?}");
    }

    #[test]
    fn the_first_that_cannot_go_on_says_why_none_does() {
        let course = Arc::new(Course::new(0, None, false));
        course.check().unwrap();
        for text in ["first", "second"] {
            course.stop(Fault::new(vmm_migration_protocol::Reason::Failed, text));
        }
        assert_eq!(course.check().unwrap_err().text(), "first");
    }
}
