//! Terminals, as a user has one.
#![expect(unsafe_code, reason = "terminals are C's")]

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr;

/// The far side of a new terminal, and the side that programs use.
pub(crate) fn open_terminal() -> (OwnedFd, OwnedFd) {
    let (mut main, mut other) = (-1, -1);
    // SAFETY: two valid places to write to; nothing else is given.
    let result =
        unsafe { libc::openpty(&raw mut main, &raw mut other, ptr::null_mut(), ptr::null(), ptr::null()) };
    assert_eq!(result, 0);
    // SAFETY: the call just made it, and nobody else has it.
    let main = unsafe { OwnedFd::from_raw_fd(main) };
    // SAFETY: as above.
    (main, unsafe { OwnedFd::from_raw_fd(other) })
}

/// Whether programs get its input as it is typed.
pub(crate) fn is_raw(terminal: &OwnedFd) -> bool {
    // SAFETY: all zeroes is a valid termios.
    let mut termios: libc::termios = unsafe { std::mem::zeroed() };
    // SAFETY: a valid place to write to.
    assert_eq!(unsafe { libc::tcgetattr(terminal.as_raw_fd(), &raw mut termios) }, 0);
    termios.c_lflag & libc::ICANON == 0
}
