//! The newest events, encoded, for readers of any speed.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

/// How much a journal keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Events.
    pub events: usize,
    /// Bytes of all lines together.
    pub bytes: usize,
}

impl Default for Bounds {
    fn default() -> Self {
        Self { events: 4096, bytes: 512 << 10 }
    }
}

/// A bounded ring of encoded events, numbered from 1. Cloned freely: all clones are one journal.
///
/// Whoever tells an event never waits for a reader: what does not fit drives the oldest out. A reader says from
/// which number on it wants to read, so the journal knows nothing of its readers but whom to wake next.
#[derive(Clone)]
pub struct Journal {
    ring: Arc<Mutex<Ring>>,
}

struct Ring {
    bounds: Bounds,
    lines: VecDeque<Box<[u8]>>,
    bytes: usize,
    /// Number of the first of `lines`; of the next event if there are none.
    first: u64,
    /// Readers that found nothing.
    waiting: Vec<Arc<EventFd>>,
}

/// What a reader got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taken {
    /// Events that were gone before the reader came for them.
    pub lost: u64,
    /// Where to go on. As asked for: there was nothing.
    pub next: u64,
}

impl Journal {
    /// An empty one.
    #[must_use]
    pub fn new(bounds: Bounds) -> Self {
        let (lines, waiting) = (VecDeque::new(), Vec::new());
        Self { ring: Arc::new(Mutex::new(Ring { bounds, lines, bytes: 0, first: 1, waiting })) }
    }

    /// Adds the line that `encode` makes for the number it is given, and wakes who waits.
    ///
    /// The numbers are in the order of the calls, so `encode` runs under the journal's lock: it is short, and calls
    /// nothing of the journal.
    pub fn push(&self, encode: impl FnOnce(u64) -> Vec<u8>) {
        let woken = {
            let mut ring = self.ring();
            let line = encode(ring.next());
            ring.push(line);
            std::mem::take(&mut ring.waiting)
        };
        for reader in woken {
            // EAGAIN: its count is at its end, so it is awake.
            let _ = reader.write(1);
        }
    }

    /// Appends lines to `to`, those from number `from` on: as many as `room` bytes take, but at least one if there is any.
    ///
    /// If there is none, `waker` is written to at the next push, once. What was driven out before is counted; a
    /// reader that starts at the beginning asks from 1.
    pub fn read(&self, from: u64, room: usize, to: &mut Vec<u8>, waker: Option<&Arc<EventFd>>) -> Taken {
        let mut ring = self.ring();
        let start = from.max(ring.first);
        let lost = start.saturating_sub(from.max(1));
        let skip = usize::try_from(start.saturating_sub(ring.first)).unwrap_or(usize::MAX);
        let (mut next, mut left) = (start, room);
        for line in ring.lines.iter().skip(skip) {
            if line.len() > left && next > start {
                break;
            }
            to.extend_from_slice(line);
            left = left.saturating_sub(line.len());
            next = next.saturating_add(1);
        }
        if next == start
            && let Some(waker) = waker
            && !ring.waiting.iter().any(|known| Arc::ptr_eq(known, waker))
        {
            ring.waiting.push(Arc::clone(waker));
        }
        Taken { lost, next }
    }

    /// Number of the next event.
    #[must_use]
    pub fn next(&self) -> u64 {
        self.ring().next()
    }

    fn ring(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ring {
    fn next(&self) -> u64 {
        self.first.saturating_add(self.lines.len() as u64)
    }

    fn push(&mut self, line: Vec<u8>) {
        self.bytes = self.bytes.saturating_add(line.len());
        self.lines.push_back(line.into());
        while self.lines.len() > self.bounds.events || self.bytes > self.bounds.bytes {
            let Some(oldest) = self.lines.pop_front() else { break };
            self.bytes = self.bytes.saturating_sub(oldest.len());
            self.first = self.first.saturating_add(1);
        }
    }
}

impl Default for Journal {
    fn default() -> Self {
        Self::new(Bounds::default())
    }
}

impl fmt::Debug for Journal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Journal").field("next", &self.next()).finish_non_exhaustive()
    }
}
