//! The system calls of this crate.
#![expect(unsafe_code, reason = "memfd_create, madvise and sysinfo are C calls")]

use std::fs::File;
use std::io;
use std::os::fd::FromRawFd;

/// A memory file named `name`; with `huge_page` (bytes, a power of two) in huge pages of that size.
pub(crate) fn memfd(name: &str, huge_page: Option<u64>) -> io::Result<File> {
    let name = std::ffi::CString::new(name)?;
    let huge = match huge_page {
        Some(size) => libc::MFD_HUGETLB | size.trailing_zeros() << libc::MFD_HUGE_SHIFT,
        None => 0,
    };
    // SAFETY: `name` is a C string that outlives the call.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | huge) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call just returned the descriptor, and nobody else has it.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// What the host may do with memory: the advice of madvise(2) that keeps its content.
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
