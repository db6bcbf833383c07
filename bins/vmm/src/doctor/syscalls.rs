//! Tries system calls that have no safe wrapper here. What they open is closed at once.
#![expect(unsafe_code, reason = "system calls by number")]

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

/// Sets up a small ring (io_uring_setup(2)).
pub(super) fn io_uring() -> io::Result<OwnedFd> {
    // `struct io_uring_params` has 120 bytes, of which all may be zero; an array of u64 is aligned as it is.
    let mut params = [0_u64; 15];
    // SAFETY: the call reads and writes no more than the structure, which is ours and of that size.
    let result = unsafe { libc::syscall(libc::SYS_io_uring_setup, 2_u32, params.as_mut_ptr()) };
    owned(result)
}

/// Creates a userfaultfd that also handles faults of the kernel, as those of guests are (userfaultfd(2)).
pub(super) fn userfaultfd() -> io::Result<OwnedFd> {
    // SAFETY: the call takes flags only.
    let result = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
    owned(result)
}

/// Whether filters can trap system calls (SECCOMP_GET_ACTION_AVAIL of seccomp(2)).
pub(super) fn seccomp_trap() -> io::Result<()> {
    let action = libc::SECCOMP_RET_TRAP;
    // SAFETY: the call reads one `u32`.
    match unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_GET_ACTION_AVAIL, 0, &raw const action) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// `LANDLOCK_CREATE_RULESET_VERSION` of linux/landlock.h.
const LANDLOCK_VERSION: u32 = 1;

/// The version of Landlock that the kernel has (landlock_create_ruleset(2)).
///
/// # Errors
/// It has none (ENOSYS), or none that is switched on (EOPNOTSUPP).
pub fn landlock_version() -> io::Result<u32> {
    let nothing = std::ptr::null::<libc::c_void>();
    // SAFETY: without a structure the call only answers.
    let version =
        unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, nothing, 0_usize, LANDLOCK_VERSION) };
    u32::try_from(version).map_err(|_| io::Error::last_os_error())
}

/// The descriptor that a system call returned, or its error.
fn owned(result: libc::c_long) -> io::Result<OwnedFd> {
    match RawFd::try_from(result) {
        // SAFETY: the call just returned the descriptor, and nobody else has it.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}
