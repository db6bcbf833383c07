//! The system calls the standard library does not offer.
#![expect(unsafe_code, reason = "ioctl, fcntl, statx, eventfd and vectored positional I/O")]

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::buffers::IoRange;

/// `_IOR(0x12, 114, size_t)` of linux/fs.h: size of a block device in bytes.
const BLKGETSIZE64: libc::Ioctl = 0x8008_1272;
/// `_IO(0x12, 119)` of linux/fs.h: discard a byte range.
const BLKDISCARD: libc::Ioctl = 0x1277;

/// The kind of an advisory lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lock {
    Shared,
    Exclusive,
    Unlocked,
}

/// Reads at `offset` into `ranges` with one `preadv`; returns the bytes read.
pub(crate) fn preadv(file: &File, ranges: &[IoRange], offset: u64) -> io::Result<usize> {
    let offset = file_offset(offset)?;
    let count = libc::c_int::try_from(ranges.len()).map_err(|_| invalid())?;
    // SAFETY: `IoRange` is laid out as `iovec` and its memory is mapped while the range is held (see `IoRange`).
    let done = unsafe { libc::preadv(file.as_raw_fd(), ranges.as_ptr().cast(), count, offset) };
    usize::try_from(done).map_err(|_| io::Error::last_os_error())
}

/// Writes `ranges` at `offset` with one `pwritev`; returns the bytes written.
pub(crate) fn pwritev(file: &File, ranges: &[IoRange], offset: u64) -> io::Result<usize> {
    let offset = file_offset(offset)?;
    let count = libc::c_int::try_from(ranges.len()).map_err(|_| invalid())?;
    // SAFETY: as in `preadv`; the kernel only reads the memory.
    let done = unsafe { libc::pwritev(file.as_raw_fd(), ranges.as_ptr().cast(), count, offset) };
    usize::try_from(done).map_err(|_| io::Error::last_os_error())
}

/// `fallocate(2)` with the `FALLOC_FL_*` bits of `mode`.
pub(crate) fn fallocate(file: &File, mode: i32, offset: u64, len: u64) -> io::Result<()> {
    let (offset, len) = (file_offset(offset)?, file_offset(len)?);
    // SAFETY: takes no memory of ours.
    check(unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, len) })
}

/// Discards a byte range of a block device (`BLKDISCARD`).
pub(crate) fn block_discard(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let range: [u64; 2] = [offset, len];
    // SAFETY: BLKDISCARD reads two u64, which `range` is.
    check(unsafe { libc::ioctl(file.as_raw_fd(), BLKDISCARD, range.as_ptr()) })
}

/// Size of a block device in bytes (`BLKGETSIZE64`).
pub(crate) fn block_size_bytes(file: &File) -> io::Result<u64> {
    let mut size = 0_u64;
    // SAFETY: BLKGETSIZE64 writes one u64.
    check(unsafe { libc::ioctl(file.as_raw_fd(), BLKGETSIZE64, &raw mut size) })?;
    Ok(size)
}

/// Logical block size of a block device in bytes (`BLKSSZGET`).
pub(crate) fn logical_block_size(file: &File) -> io::Result<u32> {
    block_u32(file, libc::BLKSSZGET)
}

/// Physical block size of a block device in bytes (`BLKPBSZGET`).
pub(crate) fn physical_block_size(file: &File) -> io::Result<u32> {
    block_u32(file, libc::BLKPBSZGET)
}

/// Smallest efficient I/O of a block device in bytes (`BLKIOMIN`).
pub(crate) fn min_io_size(file: &File) -> io::Result<u32> {
    block_u32(file, libc::BLKIOMIN)
}

/// Best I/O size of a block device in bytes, 0 if it has none (`BLKIOOPT`).
pub(crate) fn opt_io_size(file: &File) -> io::Result<u32> {
    block_u32(file, libc::BLKIOOPT)
}

/// Memory and offset alignment that `O_DIRECT` asks for (statx `STATX_DIOALIGN`), in bytes; `None` if the kernel or the
/// filesystem does not say.
pub(crate) fn dio_align(file: &File) -> Option<(u32, u32)> {
    let mut stat = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the path is an empty C string and `stat` has room for one statx.
    let result = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            stat.as_mut_ptr(),
        )
    };
    check(result).ok()?;
    // SAFETY: all-zero is a valid statx, and the kernel has filled it in.
    let stat = unsafe { stat.assume_init() };
    let known = stat.stx_mask & libc::STATX_DIOALIGN != 0 && stat.stx_dio_offset_align != 0;
    known.then_some((stat.stx_dio_mem_align.max(1), stat.stx_dio_offset_align))
}

/// Sets or removes an open-file-description lock on `len` bytes from the start (0: the whole file, however it grows).
/// Never waits: a conflict is `EAGAIN` or `EACCES`.
pub(crate) fn set_lock(file: &File, lock: Lock, len: u64) -> io::Result<()> {
    let range = lock_range(lock, len)?;
    // SAFETY: F_OFD_SETLK reads one `struct flock`.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const range) })
}

/// Whether [`set_lock`] would find a lock of somebody else in its way; it sets none.
pub(crate) fn is_locked(file: &File, lock: Lock, len: u64) -> io::Result<bool> {
    let mut range = lock_range(lock, len)?;
    // SAFETY: F_OFD_GETLK reads and writes one `struct flock`.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut range) })?;
    Ok(libc::c_int::from(range.l_type) != libc::F_UNLCK)
}

fn lock_range(lock: Lock, len: u64) -> io::Result<libc::flock> {
    let kind = match lock {
        Lock::Shared => libc::F_RDLCK,
        Lock::Exclusive => libc::F_WRLCK,
        Lock::Unlocked => libc::F_UNLCK,
    };
    Ok(libc::flock {
        l_type: libc::c_short::try_from(kind).map_err(|_| invalid())?,
        l_whence: libc::c_short::try_from(libc::SEEK_SET).map_err(|_| invalid())?,
        l_start: 0,
        l_len: file_offset(len)?,
        l_pid: 0,
    })
}

/// Takes `O_NONBLOCK` off an open file: under it io_uring answers `EAGAIN` instead of waiting.
pub(crate) fn set_blocking(file: &File) -> io::Result<()> {
    // SAFETY: F_GETFL takes no memory of ours.
    let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
    check(flags)?;
    // SAFETY: F_SETFL takes no memory of ours.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags & !libc::O_NONBLOCK) })
}

/// A new eventfd that does not block.
pub(crate) fn eventfd() -> io::Result<File> {
    // SAFETY: takes no memory of ours.
    let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
    check(fd)?;
    // SAFETY: the kernel has just given us this descriptor; nobody else owns it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    Ok(File::from(fd))
}

fn block_u32(file: &File, request: libc::Ioctl) -> io::Result<u32> {
    let mut value = 0_u32;
    // SAFETY: each caller's request writes one 32-bit integer.
    check(unsafe { libc::ioctl(file.as_raw_fd(), request, &raw mut value) })?;
    Ok(value)
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn file_offset(value: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(value).map_err(|_| invalid())
}

fn invalid() -> io::Error {
    io::Error::from_raw_os_error(libc::EINVAL)
}
