//! A terminal for the process under test: a pty whose far side the test has.
#![expect(unsafe_code, reason = "terminals are C's")]

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr;

/// A terminal.
#[derive(Debug)]
pub struct Terminal {
    /// The far side: what is written is typed, what is read was printed. Dropped, the terminal is closed.
    pub main: File,
    other: OwnedFd,
}

impl Terminal {
    /// A new one.
    ///
    /// # Panics
    /// When it cannot be made.
    #[must_use]
    #[expect(clippy::new_without_default, reason = "it opens a device")]
    pub fn new() -> Self {
        let (mut main, mut other) = (-1, -1);
        // SAFETY: two valid places to write to; nothing else is given.
        let result = unsafe {
            libc::openpty(&raw mut main, &raw mut other, ptr::null_mut(), ptr::null(), ptr::null())
        };
        assert_eq!(result, 0, "a terminal");
        // SAFETY: the call just made it, and nobody else has it.
        let main = unsafe { File::from_raw_fd(main) };
        // SAFETY: as above.
        let other = unsafe { OwnedFd::from_raw_fd(other) };
        for fd in [main.as_raw_fd(), other.as_raw_fd()] {
            // SAFETY: a valid descriptor. A child keeps what it was given, and no more.
            unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
        }
        Self { main, other }
    }

    /// The side that programs use.
    ///
    /// # Panics
    /// When no descriptor is left.
    #[must_use]
    pub fn program_side(&self) -> OwnedFd {
        self.other.try_clone().expect("a descriptor")
    }

    /// Whether programs get each key as it is typed.
    ///
    /// # Panics
    /// When the terminal does not tell.
    #[must_use]
    pub fn is_raw(&self) -> bool {
        // SAFETY: all zeroes is a valid termios.
        let mut termios: libc::termios = unsafe { std::mem::zeroed() };
        // SAFETY: a valid place to write to.
        let result = unsafe { libc::tcgetattr(self.other.as_raw_fd(), &raw mut termios) };
        assert_eq!(result, 0, "its attributes");
        termios.c_lflag & libc::ICANON == 0
    }

    /// Gives its window another size; the kernel tells the programs that it controls.
    ///
    /// # Panics
    /// When the terminal refuses.
    pub fn resize(&self, columns: u16, rows: u16) {
        resize(&self.main, columns, rows);
    }
}

/// Gives the window of the terminal behind `side` another size.
///
/// # Panics
/// When it is none, or refuses.
pub fn resize(side: &File, columns: u16, rows: u16) {
    let size = libc::winsize { ws_col: columns, ws_row: rows, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: a valid winsize.
    let result = unsafe { libc::ioctl(side.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
    assert_eq!(result, 0, "the window's size");
}
