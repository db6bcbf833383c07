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
const PROTECTED: u64 = 1 << 57;

/// Which of a process's own pages are meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Own {
    /// All.
    All,
    /// All, in a private mapping of a file: the zero page, which is nobody's elsewhere, is there for what was written (KSM puts it
    /// there, see `use_zero_pages`).
    OverFile,
    /// Those that a userfaultfd protects from writes.
    Protected,
}

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

    /// Runs of pages in `range` (host addresses, whole pages) that belong to this process alone, in memory or
    /// swapped out, and where they end to be told: at the end of the range, or once there are `most` pages. In
    /// anonymous memory that is what was ever written, in a private mapping of a file what was written since it was
    /// mapped.
    ///
    /// More pages than that may be in it, never fewer.
    pub(crate) fn runs(
        &self,
        range: Range<u64>,
        most: u64,
        which: Own,
    ) -> io::Result<(Vec<Range<u64>>, u64)> {
        if range.is_empty() {
            return Ok((Vec::new(), range.end));
        }
        if self.scans.load(Ordering::Relaxed) {
            match sys::scan_pages(&self.file, range.clone(), most, which) {
                // An older kernel knows no ioctl here.
                Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => {
                    self.scans.store(false, Ordering::Relaxed);
                }
                found => return found,
            }
        }
        self.read(range, most, which)
    }

    /// As [`runs`](Self::runs), from the entries themselves.
    fn read(&self, range: Range<u64>, most: u64, which: Own) -> io::Result<(Vec<Range<u64>>, u64)> {
        let (mut bytes, mut runs, mut left) = (Vec::new(), Vec::<Range<u64>>::new(), most);
        let mut at = range.start;
        // Who walks from run to run looks at what is behind the last one again; the first slice is thus small.
        let mut slice = SLICE / 64;
        while at < range.end {
            let pages = ((range.end - at) / PAGE_SIZE).clamp(1, slice);
            slice = SLICE;
            bytes.resize(usize::try_from(pages * ENTRY).unwrap_or(0), 0);
            self.file.read_exact_at(&mut bytes, at / PAGE_SIZE * ENTRY)?;
            for entry in bytes.as_chunks::<8>().0 {
                let page = at..at + PAGE_SIZE;
                at = page.end;
                if !own(u64::from_ne_bytes(*entry), which) {
                    continue;
                }
                match runs.last_mut() {
                    Some(run) if run.end == page.start => run.end = page.end,
                    _ => runs.push(page),
                }
                left = left.saturating_sub(1);
                if left == 0 {
                    return Ok((runs, at));
                }
            }
        }
        Ok((runs, range.end))
    }
}

fn own(entry: u64, which: Own) -> bool {
    let meant = which != Own::Protected || entry & PROTECTED != 0;
    entry & (PRESENT | SWAPPED) != 0 && entry & FILE == 0 && meant
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
    use vmm_device_model::dma::GuestRam;

    use super::*;

    const PAGES: u64 = 40_000;

    fn memory() -> (GuestRam, u64) {
        let size = usize::try_from(PAGES * PAGE_SIZE).unwrap();
        let memory = GuestRam::from_ranges(&[(GuestAddress(0), size)]).unwrap();
        let host = memory.iter().next().unwrap().get_mmap().as_ptr() as u64;
        sys::advise(usize::try_from(host).unwrap(), size, sys::Advice::NoHugePage).unwrap();
        (memory, host)
    }

    /// All runs, and the most pages that were told at once.
    fn walk(pagemap: &Pagemap, host: u64, most: u64) -> (Vec<Range<u64>>, u64) {
        let (mut at, mut found, mut pages) = (host, Vec::<Range<u64>>::new(), 0);
        while at < host + PAGES * PAGE_SIZE {
            let (runs, end) = pagemap.runs(at..host + PAGES * PAGE_SIZE, most, Own::All).unwrap();
            assert!(end > at && runs.iter().all(|run| at <= run.start && run.end <= end), "{at:#x} {end:#x}");
            at = end;
            pages = pages.max(runs.iter().map(|run| (run.end - run.start) / PAGE_SIZE).sum());
            for run in runs.iter().map(|run| (run.start - host) / PAGE_SIZE..(run.end - host) / PAGE_SIZE) {
                match found.last_mut() {
                    Some(last) if last.end == run.start => last.end = run.end,
                    _ => found.push(run),
                }
            }
        }
        (found, pages)
    }

    #[test]
    fn scanned_and_read_page_tables_say_the_same() {
        let (memory, host) = memory();
        let scanned = Pagemap::open().unwrap();
        let read = Pagemap { scans: AtomicBool::new(false), ..Pagemap::open().unwrap() };
        for pagemap in [&scanned, &read] {
            assert_eq!(walk(pagemap, host, 512), (vec![], 0));
        }
        // At both ends, across slices of the reader, longer than what is asked for, and more than a scan's runs.
        let single = (30_000..30_400).step_by(2);
        let pages =
            [0, 1, 127, 128, 8319, 8320, 39_999].into_iter().chain(20_000..20_700).chain(single.clone());
        pages.for_each(|page| memory.write_obj(1_u8, GuestAddress(page * PAGE_SIZE)).unwrap());
        let mut expected = vec![0..2, 127..129, 8319..8321, 20_000..20_700];
        expected.extend(single.map(|page| page..page + 1));
        expected.push(39_999..40_000);
        for pagemap in [&scanned, &read] {
            let (found, most) = walk(pagemap, host, 512);
            assert_eq!(found, expected);
            assert_eq!(most, 512);
        }
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
        let mut numbers = release.split(['.', '-']).map(|number| number.parse::<u32>().unwrap_or(0));
        let linux = (numbers.next().unwrap(), numbers.next().unwrap());
        assert_eq!(scanned.scans.into_inner(), linux >= (6, 7), "{release}");
    }

    #[test]
    fn swapped_pages_are_there_and_files_are_not() {
        for (bit, which) in [(0, Own::All), (PROTECTED, Own::All), (PROTECTED, Own::Protected)] {
            let own = |entry| own(entry | bit, which);
            assert!(own(PRESENT) && own(SWAPPED) && own(SWAPPED | 0x1234));
            assert!(!own(0) && !own(PRESENT | FILE) && !own(SWAPPED | FILE) && !own(0x1234));
        }
        assert!(!own(PRESENT, Own::Protected) && !own(SWAPPED, Own::Protected), "written since");
    }
}
