//! Aligned memory between direct I/O and a guest's unaligned buffers.
//!
//! A guest chooses how its buffers lie and how many requests are in flight, so what it can make a disk hold is bounded here.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::buffers::{AlignedMemory, IoRange};

/// Most bytes bounced at a time; a multiple of every block size.
pub(crate) const PIECE_MAX: u64 = 1 << 20;
/// What the requests of one disk hold in bytes before each gets only a block.
pub(crate) const BUDGET: u64 = 16 << 20;

/// What the requests of one disk hold.
#[derive(Debug, Default)]
pub(crate) struct BounceBudget(Arc<AtomicU64>);

impl BounceBudget {
    /// The most that a request should take now, in bytes; at least a block, so that every request gets on.
    pub(crate) fn piece(&self, block: u64) -> u64 {
        let held = self.0.load(Ordering::Relaxed);
        if held.saturating_add(PIECE_MAX) <= BUDGET { PIECE_MAX.max(block) } else { block }
    }

    /// Zeroed memory, counted until it is dropped.
    pub(crate) fn take(&self, len: usize) -> io::Result<Bounce> {
        let memory = AlignedMemory::zeroed(len)?;
        self.0.fetch_add(len as u64, Ordering::Relaxed);
        Ok(Bounce { memory, len: len as u64, held: Arc::clone(&self.0) })
    }

    #[cfg(test)]
    pub(crate) fn held(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Memory of one request.
#[derive(Debug)]
pub(crate) struct Bounce {
    memory: AlignedMemory,
    len: u64,
    held: Arc<AtomicU64>,
}

impl Bounce {
    pub(crate) fn as_slice(&self) -> &[u8] {
        self.memory.as_slice()
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        self.memory.as_mut_slice()
    }

    /// All of it.
    pub(crate) fn io_range(&self) -> IoRange {
        self.memory.io_range(usize::MAX)
    }
}

impl Drop for Bounce {
    fn drop(&mut self) {
        self.held.fetch_sub(self.len, Ordering::Relaxed);
    }
}
