//! What a disk has done so far.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counts of a disk, kept across resets. Shared with its threads.
#[derive(Debug, Default)]
pub struct BlockCounters {
    read_bytes: AtomicU64,
    write_bytes: AtomicU64,
    read_ops: AtomicU64,
    write_ops: AtomicU64,
}

/// Counts at one moment; successful requests only.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BlockCounts {
    /// Bytes read by the guest.
    pub read_bytes: u64,
    /// Bytes written by the guest.
    pub write_bytes: u64,
    /// Read requests.
    pub read_ops: u64,
    /// Write requests.
    pub write_ops: u64,
}

impl BlockCounters {
    /// The counts now.
    pub fn get(&self) -> BlockCounts {
        let Self { read_bytes, write_bytes, read_ops, write_ops } = self;
        let now = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        BlockCounts {
            read_bytes: now(read_bytes),
            write_bytes: now(write_bytes),
            read_ops: now(read_ops),
            write_ops: now(write_ops),
        }
    }

    pub(super) fn count_read(&self, bytes: u32) {
        self.read_bytes.fetch_add(bytes.into(), Ordering::Relaxed);
        self.read_ops.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn count_write(&self, bytes: u32) {
        self.write_bytes.fetch_add(bytes.into(), Ordering::Relaxed);
        self.write_ops.fetch_add(1, Ordering::Relaxed);
    }
}
