//! Where a device's bytes go without the guest waiting for them.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, Write};
use std::sync::{Arc, Mutex};

use vmm_sys_util::eventfd::EventFd;

use crate::registers::lock;

/// Takes bytes from a device. Called by vCPU threads under the device's lock: it never blocks, and keeps
/// a bounded number of bytes.
pub trait ByteSink: Send + Sync + fmt::Debug {
    /// Takes `bytes`, or loses some of what it has.
    fn put(&self, bytes: &[u8]);

    /// Bytes lost so far because nobody took them in time; not those that nobody wanted.
    fn lost(&self) -> u64;
}

/// Wakes somebody up. Never blocks; calls before the sleeper looks coalesce.
pub trait Notify: Send + Sync + fmt::Debug {
    /// Wakes the sleeper.
    fn notify(&self);
}

impl Notify for EventFd {
    fn notify(&self) {
        // Refused only when the counter is full, and then the sleeper is being woken already.
        let _ = self.write(1);
    }
}

/// Loses everything and wakes nobody: output `null`, input `off`.
#[derive(Debug, Clone, Copy, Default)]
pub struct Discard;

impl ByteSink for Discard {
    fn put(&self, _: &[u8]) {}

    fn lost(&self) -> u64 {
        0
    }
}

impl Notify for Discard {
    fn notify(&self) {}
}

/// A ring of bytes between a device and whoever writes them out. When it is full the oldest go.
#[derive(Debug)]
pub struct OutputRing {
    capacity: usize,
    ready: Arc<dyn Notify>,
    ring: Mutex<Ring>,
}

#[derive(Debug, Default)]
struct Ring {
    bytes: VecDeque<u8>,
    /// Position of the first of `bytes` in all that was ever put.
    start: u64,
    lost: u64,
}

/// How [`OutputRing::drain`] ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drained {
    /// Nothing is left; the next byte notifies.
    Empty,
    /// The writer would block: call again when it is writable.
    Blocked,
}

impl OutputRing {
    /// A ring of at most `capacity` bytes (at least 1) that notifies `ready` when it is no longer empty.
    pub fn new(capacity: usize, ready: Arc<dyn Notify>) -> Arc<Self> {
        Arc::new(Self { capacity: capacity.max(1), ready, ring: Mutex::default() })
    }

    /// Writes out what there is. Only one thread may do so at a time; the guest does not wait meanwhile.
    ///
    /// # Errors
    /// The writer's, other than that it would block. What was not written stays.
    pub fn drain(&self, out: &mut dyn Write) -> io::Result<Drained> {
        let mut chunk = Vec::with_capacity(CHUNK.min(self.capacity));
        loop {
            let start = {
                let ring = lock(&self.ring);
                chunk.clear();
                chunk.extend(ring.bytes.iter().take(CHUNK));
                ring.start
            };
            if chunk.is_empty() {
                return Ok(Drained::Empty);
            }
            match out.write(&chunk) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => lock(&self.ring).forget_until(start, written),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(Drained::Blocked),
                Err(e) => return Err(e),
            }
        }
    }
}

/// Most bytes written at once.
const CHUNK: usize = 4096;

impl Ring {
    /// `written` bytes from position `start` are out; some may be gone already to make room.
    fn forget_until(&mut self, start: u64, written: usize) {
        let end = start.wrapping_add(written as u64);
        let written = usize::try_from(end.saturating_sub(self.start)).unwrap_or(0);
        self.forget(written.min(self.bytes.len()));
    }

    /// Adds `bytes`; what is too much for `capacity` goes, the oldest first.
    fn put(&mut self, bytes: &[u8], capacity: usize) {
        let (skipped, kept) = bytes.split_at(bytes.len().saturating_sub(capacity));
        let oldest = (self.bytes.len() + kept.len()).saturating_sub(capacity);
        self.forget(oldest);
        // Where any are skipped, the ring is empty now.
        self.start = self.start.wrapping_add(skipped.len() as u64);
        self.lost = self.lost.saturating_add((oldest + skipped.len()) as u64);
        self.bytes.extend(kept);
    }

    fn forget(&mut self, count: usize) {
        self.bytes.drain(..count);
        self.start = self.start.wrapping_add(count as u64);
    }
}

impl ByteSink for OutputRing {
    fn put(&self, bytes: &[u8]) {
        let mut ring = lock(&self.ring);
        let was_empty = ring.bytes.is_empty();
        ring.put(bytes, self.capacity);
        drop(ring);
        if was_empty && !bytes.is_empty() {
            self.ready.notify();
        }
    }

    fn lost(&self) -> u64 {
        lock(&self.ring).lost
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TestNotify;

    /// Takes `room` bytes, three at a time, then would block.
    struct Slow {
        room: usize,
        got: Vec<u8>,
    }

    impl Write for Slow {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let count = bytes.len().min(3).min(self.room);
            if count == 0 {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            self.room -= count;
            self.got.extend(&bytes[..count]);
            Ok(count)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn bytes_come_out_in_order_and_wake_once() {
        let ready = Arc::new(TestNotify::default());
        let ring = OutputRing::new(100, ready.clone());
        ring.put(b"");
        assert_eq!(ready.take(), 0);
        ring.put(b"hello ");
        ring.put(b"world");
        assert_eq!(ready.take(), 1, "only the first byte wakes");
        let mut out = Slow { room: 8, got: Vec::new() };
        assert_eq!(ring.drain(&mut out).unwrap(), Drained::Blocked);
        out.room = 100;
        assert_eq!(ring.drain(&mut out).unwrap(), Drained::Empty);
        assert_eq!(out.got, b"hello world");
        assert_eq!(ring.lost(), 0);
        ring.put(b"!");
        assert_eq!(ready.take(), 1);
    }

    #[test]
    fn a_full_ring_loses_the_oldest_and_counts() {
        let ring = OutputRing::new(4, Arc::new(Discard));
        for _ in 0..1000 {
            ring.put(b"xyz");
        }
        ring.put(b"abcd");
        assert_eq!(ring.lost(), 3000);
        let mut out = Vec::new();
        ring.drain(&mut out).unwrap();
        assert_eq!(out, b"abcd");
        assert!(lock(&ring.ring).bytes.capacity() < 64, "memory is bounded");
    }

    #[test]
    fn of_more_than_the_ring_holds_the_end_stays() {
        let ring = OutputRing::new(4, Arc::new(Discard));
        ring.put(b"ab");
        ring.put(b"cdefghi");
        assert_eq!((ring.lost(), lock(&ring.ring).start), (5, 5));
        let mut out = Vec::new();
        ring.drain(&mut out).unwrap();
        assert_eq!(out, b"fghi");
    }

    #[test]
    fn bytes_lost_while_writing_are_not_taken_twice() {
        let mut ring = Ring { bytes: (0..10).collect(), start: 100, lost: 0 };
        // Written were 5 bytes from 98: positions 98 and 99 are gone already.
        ring.forget_until(98, 5);
        assert_eq!((ring.start, ring.bytes.front().copied()), (103, Some(3)));
        ring.forget_until(90, 5);
        assert_eq!(ring.start, 103);
    }

    #[test]
    fn a_broken_writer_keeps_the_bytes() {
        struct Broken;
        impl Write for Broken {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Ok(0)
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let ring = OutputRing::new(4, Arc::new(Discard));
        ring.put(b"ab");
        assert_eq!(ring.drain(&mut Broken).unwrap_err().kind(), io::ErrorKind::WriteZero);
        let mut out = Vec::new();
        ring.drain(&mut out).unwrap();
        assert_eq!(out, b"ab");
    }
}
