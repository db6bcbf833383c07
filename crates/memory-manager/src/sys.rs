//! The system calls of this crate.
#![expect(unsafe_code, reason = "memfd_create, madvise, sysinfo and ioctl are C calls")]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd};

use crate::pagemap::Own;

/// A memory file named `name`, which can be sealed; with `huge_page` (bytes, a power of two) in huge pages of that size.
pub(crate) fn memfd(name: &str, huge_page: Option<u64>) -> io::Result<File> {
    let name = std::ffi::CString::new(name)?;
    let huge = match huge_page {
        Some(size) => libc::MFD_HUGETLB | size.trailing_zeros() << libc::MFD_HUGE_SHIFT,
        None => 0,
    };
    // SAFETY: `name` is a C string that outlives the call.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING | huge) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call just returned the descriptor, and nobody else has it.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// What the host may do with memory: the advice of madvise(2) that keeps its content. One that discards has to mind frozen memory
/// (see [`crate::freeze`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Advice {
    /// Huge pages may be used.
    HugePage,
    /// Huge pages may not be used.
    NoHugePage,
    /// Equal pages may be shared.
    Mergeable,
    /// All pages are allocated at once.
    Populate,
    /// A core dump leaves it out.
    DontDump,
}

/// madvise(2) on `len` bytes at address `start`.
pub(crate) fn advise(start: usize, len: usize, advice: Advice) -> io::Result<()> {
    let advice = match advice {
        Advice::HugePage => libc::MADV_HUGEPAGE,
        Advice::NoHugePage => libc::MADV_NOHUGEPAGE,
        Advice::Mergeable => libc::MADV_MERGEABLE,
        Advice::Populate => libc::MADV_POPULATE_WRITE,
        Advice::DontDump => libc::MADV_DONTDUMP,
    };
    // SAFETY: none of this advice changes what memory holds or whether it is mapped, wherever it points;
    // the kernel refuses what is not mapped.
    match unsafe { libc::madvise(start as *mut libc::c_void, len, advice) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Drops `len` bytes of guest memory at address `start`, whole pages, so that they are not there; of `shared` memory from its file.
pub(crate) fn discard(start: u64, len: u64, shared: bool) -> io::Result<()> {
    let advice = if shared { libc::MADV_REMOVE } else { libc::MADV_DONTNEED };
    let len = usize::try_from(len).map_err(io::Error::other)?;
    // SAFETY: the caller names guest memory that it keeps mapped, which is always accessed by volatile copies, and what it holds is
    // any bytes.
    match unsafe { libc::madvise(start as *mut libc::c_void, len, advice) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// RAM and swap of this host, in bytes.
pub(crate) fn host_memory() -> io::Result<u64> {
    // SAFETY: all zeroes is a valid sysinfo.
    let mut info: libc::sysinfo = unsafe { std::mem::zeroed() };
    // SAFETY: `info` is a valid place to write to.
    if unsafe { libc::sysinfo(&raw mut info) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((info.totalram + info.totalswap).saturating_mul(info.mem_unit.into()))
}

/// Argument of PAGEMAP_SCAN (`struct pm_scan_arg` of linux/fs.h).
#[repr(C)]
#[derive(Debug, Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// What PAGEMAP_SCAN finds (`struct page_region` of linux/fs.h).
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// Runs that one scan finds at most.
const MOST_RUNS: usize = 64;

/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::Ioctl = 0xc060_6610_u32 as libc::Ioctl;
const PAGE_IS_WRITTEN: u64 = 1 << 1;
const PAGE_IS_FILE: u64 = 1 << 2;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
const PAGE_IS_PFNZERO: u64 = 1 << 5;

/// The first runs of pages in `range` (addresses of this process) that are its own: in memory or swapped out, no
/// file's, and, but [over files](Own::OverFile), not the zero page; at most `most` pages. And where it stopped to look, or the end of the range.
///
/// `pagemap` is /proc/self/pagemap.
pub(crate) fn scan_pages(
    pagemap: &File,
    range: Range<u64>,
    most: u64,
    which: Own,
) -> io::Result<(Vec<Range<u64>>, u64)> {
    let without = match which {
        Own::All => PAGE_IS_FILE | PAGE_IS_PFNZERO,
        // Over a file's page the zero page is there for what was written.
        Own::OverFile => PAGE_IS_FILE,
        // What is protected counts as not written since.
        Own::Protected => PAGE_IS_FILE | PAGE_IS_PFNZERO | PAGE_IS_WRITTEN,
    };
    let mut found = [PageRegion::default(); MOST_RUNS];
    let mut arg = ScanArg {
        size: size_of::<ScanArg>() as u64,
        start: range.start,
        end: range.end,
        vec: found.as_mut_ptr() as u64,
        vec_len: found.len() as u64,
        max_pages: most,
        category_inverted: without,
        category_mask: without,
        category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
        // Any one: runs are split where it differs, and this one does not.
        return_mask: PAGE_IS_FILE,
        ..ScanArg::default()
    };
    // SAFETY: `arg` is as the kernel defines it, and `vec` is a place for the regions that `vec_len` allows.
    let count = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut arg) };
    let Ok(count) = usize::try_from(count) else { return Err(io::Error::last_os_error()) };
    Ok((found.iter().take(count).map(|run| run.start..run.end).collect(), arg.walk_end))
}
