//! What the page tables of this process say about guest memory, without touching it (proc_pid_pagemap(5)).

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::layout::PAGE_SIZE;
use crate::sys;

/// Bytes of one page's entry in pagemap.
const ENTRY: u64 = 8;
/// Pages whose entries are read at once where the kernel cannot scan.
const SLICE: u64 = 8192;

/// Bits of an entry in pagemap.
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const FILE: u64 = 1 << 61;

/// This process's pagemap.
#[derive(Debug)]
pub(crate) struct Pagemap {
    file: File,
    /// The kernel has the ioctl that scans (Linux 6.7).
    scans: AtomicBool,
}

impl Pagemap {
    pub(crate) fn open() -> io::Result<Self> {
        Ok(Self { file: File::open("/proc/self/pagemap")?, scans: AtomicBool::new(true) })
    }

    /// The first run of pages in `range` (host addresses) that belong to this process alone, in memory or
    /// swapped out; at most `most` pages of it. In anonymous memory that is what was ever written, in a private
    /// mapping of a file what was written since it was mapped.
    ///
    /// More pages than that may be in it, never fewer.
    pub(crate) fn next(&self, range: Range<u64>, most: u64) -> io::Result<Option<Range<u64>>> {
        if range.is_empty() {
            return Ok(None);
        }
        if self.scans.load(Ordering::Relaxed) {
            match sys::scan_pages(&self.file, range.clone(), most) {
                // An older kernel knows no ioctl here.
                Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => {
                    self.scans.store(false, Ordering::Relaxed);
                }
                found => return found,
            }
        }
        self.read(range, most)
    }

    /// As [`next`](Self::next), from the entries themselves.
    fn read(&self, range: Range<u64>, most: u64) -> io::Result<Option<Range<u64>>> {
        let mut bytes = Vec::new();
        let mut found: Option<Range<u64>> = None;
        let mut at = range.start;
        // A caller that walks from run to run looks at every entry once more; the first slice is thus small.
        let mut slice = SLICE / 64;
        while at < range.end {
            let pages = (range.end - at).div_ceil(PAGE_SIZE).min(slice);
            slice = SLICE;
            bytes.resize(usize::try_from(pages * ENTRY).unwrap_or(0), 0);
            self.file.read_exact_at(&mut bytes, at / PAGE_SIZE * ENTRY)?;
            for entry in bytes.as_chunks::<8>().0 {
                let end = at + PAGE_SIZE;
                match (own(u64::from_ne_bytes(*entry)), &mut found) {
                    (true, None) => found = Some(at..end),
                    (true, Some(run)) => run.end = end,
                    (false, None) => {}
                    (false, Some(_)) => return Ok(found),
                }
                if found.as_ref().is_some_and(|run| run.end - run.start >= most * PAGE_SIZE) {
                    return Ok(found);
                }
                at = end;
            }
        }
        Ok(found)
    }
}

fn own(entry: u64) -> bool {
    entry & (PRESENT | SWAPPED) != 0 && entry & FILE == 0
}
