//! Terminals: raw mode, ptys, polling.
#![expect(unsafe_code, reason = "termios, openpty and poll are C calls")]

use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::PathBuf;
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::time::Duration;

/// A descriptor of its own for an open file.
pub(super) fn duplicate(of: &impl AsFd) -> io::Result<File> {
    Ok(File::from(of.as_fd().try_clone_to_owned()?))
}

/// A descriptor of its own for writing to an open file. Where it can be, it does not block: a terminal or pipe is opened
/// once more, for the open file description that we were given is shared with the user's shell.
pub(crate) fn for_writing(of: &impl AsFd) -> io::Result<File> {
    let shared = duplicate(of)?;
    let about = shared.metadata()?;
    // Opening the multiplexer would make another terminal.
    let terminal = shared.is_terminal() && about.rdev() != libc::makedev(5, 2);
    if terminal || about.file_type().is_fifo() {
        let path = format!("/proc/self/fd/{}", shared.as_raw_fd());
        let mut options = OpenOptions::new();
        let own = options.write(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path);
        return Ok(own.unwrap_or(shared));
    }
    Ok(shared)
}

/// What standard input was like before raw mode; restored on every way out but SIGKILL.
/// A box that belongs to who takes it out; no lock, as a signal's handler may.
static SAVED: AtomicPtr<libc::termios> = AtomicPtr::new(ptr::null_mut());

/// Standard input's terminal in raw mode, until dropped.
#[derive(Debug)]
pub struct RawTerminal(());

impl RawTerminal {
    /// Enters raw mode; `None` where standard input is no terminal.
    #[must_use]
    pub fn enter() -> Option<Self> {
        let mut termios = MaybeUninit::uninit();
        // SAFETY: a valid place to write to; the call fails harmlessly where there is no terminal.
        if unsafe { libc::tcgetattr(0, termios.as_mut_ptr()) } != 0 {
            return None;
        }
        // SAFETY: the call succeeded, so it is initialised.
        let saved = unsafe { termios.assume_init() };
        let ours = Box::into_raw(Box::new(saved));
        if SAVED.compare_exchange(ptr::null_mut(), ours, Ordering::AcqRel, Ordering::Acquire).is_err() {
            // It is in raw mode already.
            // SAFETY: made from a box above, and nobody else has seen it.
            drop(unsafe { Box::from_raw(ours) });
        }
        let mut raw = saved;
        // SAFETY: `raw` is an initialised termios.
        unsafe { libc::cfmakeraw(&raw mut raw) };
        // Output keeps its newline handling: log lines share the terminal.
        raw.c_oflag = saved.c_oflag;
        // SAFETY: `raw` is an initialised termios.
        unsafe { libc::tcsetattr(0, libc::TCSANOW, &raw const raw) };
        Some(Self(()))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore_terminal();
    }
}

/// Brings standard input's terminal back to how it was. Any thread, any time, any number of times.
pub fn restore_terminal() {
    let saved = restore();
    if !saved.is_null() {
        // SAFETY: made from a box, and taken out by this thread alone.
        drop(unsafe { Box::from_raw(saved) });
    }
}

/// The same for a signal's handler, after which the process ends (signal-safety(7)): frees nothing.
pub(crate) fn restore_terminal_in_handler() {
    let _ = restore();
}

/// Returns what was saved, which is the caller's now; null if nothing was.
fn restore() -> *mut libc::termios {
    let saved = SAVED.swap(ptr::null_mut(), Ordering::AcqRel);
    if !saved.is_null() {
        // SAFETY: an initialised termios that nobody else has.
        unsafe { libc::tcsetattr(0, libc::TCSANOW, saved) };
    }
    saved
}

/// Columns and rows of a terminal's window, from either side of a pty; `None` where there is no terminal, or it has none.
pub(super) fn window_size(of: &impl AsRawFd) -> Option<(u16, u16)> {
    // SAFETY: all zeroes is a valid winsize.
    let mut size: libc::winsize = unsafe { std::mem::zeroed() };
    // SAFETY: a valid place to write to; the call fails harmlessly where there is no terminal.
    let result = unsafe { libc::ioctl(of.as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) };
    (result == 0 && size.ws_col > 0 && size.ws_row > 0).then_some((size.ws_col, size.ws_row))
}

/// A pseudo terminal.
pub(super) struct PtyPair {
    /// Our side.
    pub(super) main: File,
    /// The user's side.
    pub(super) other: File,
    /// The user's side, by name.
    pub(super) path: PathBuf,
}

/// Creates a pseudo terminal in raw mode. Our side does not block.
pub(super) fn open_pty() -> io::Result<PtyPair> {
    let (mut main, mut other): (RawFd, RawFd) = (-1, -1);
    // SAFETY: two valid places to write to; no name, attributes or size are given.
    let result =
        unsafe { libc::openpty(&raw mut main, &raw mut other, ptr::null_mut(), ptr::null(), ptr::null()) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call just returned the descriptor, and nobody else has it.
    let main = unsafe { File::from_raw_fd(main) };
    // SAFETY: as above.
    let other = unsafe { File::from_raw_fd(other) };
    for file in [&main, &other] {
        // SAFETY: a valid descriptor. No program that we start may inherit it.
        unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC) };
    }
    // SAFETY: a valid descriptor, whose open file description is ours alone.
    if unsafe { libc::fcntl(main.as_raw_fd(), libc::F_SETFL, libc::O_RDWR | libc::O_NONBLOCK) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let mut termios = MaybeUninit::uninit();
    // SAFETY: a valid place to write to.
    if unsafe { libc::tcgetattr(other.as_raw_fd(), termios.as_mut_ptr()) } == 0 {
        // SAFETY: the call succeeded, so it is initialised.
        let mut termios = unsafe { termios.assume_init() };
        // SAFETY: an initialised termios.
        unsafe { libc::cfmakeraw(&raw mut termios) };
        // SAFETY: an initialised termios.
        unsafe { libc::tcsetattr(other.as_raw_fd(), libc::TCSANOW, &raw const termios) };
    }
    let path = std::fs::read_link(format!("/proc/self/fd/{}", other.as_raw_fd()))?;
    Ok(PtyPair { main, other, path })
}

/// Closes a connection in both directions, whoever else has its descriptor. What has arrived can still be read.
pub(super) fn hang_up(socket: &File) {
    // SAFETY: a valid descriptor; the call fails harmlessly if nothing is connected.
    unsafe { libc::shutdown(socket.as_raw_fd(), libc::SHUT_RDWR) };
}

/// What a descriptor is waited for. An error or a hang-up always ends the wait, too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Interest {
    Readable,
    Writable,
    HangUp,
}

/// Waits until it has come to one of the descriptors' interests. Without a time limit if there is no `timeout`. Whether it
/// came to that.
pub(super) fn wait(descriptors: &[(RawFd, Interest)], timeout: Option<Duration>) -> io::Result<bool> {
    let entry = |(fd, interest): &(RawFd, Interest)| {
        let events = match interest {
            Interest::Readable => libc::POLLIN,
            Interest::Writable => libc::POLLOUT,
            Interest::HangUp => 0,
        };
        libc::pollfd { fd: *fd, events, revents: 0 }
    };
    let mut fds: Vec<_> = descriptors.iter().map(entry).collect();
    let timeout = timeout.map_or(-1, |t| i32::try_from(t.as_millis()).unwrap_or(i32::MAX));
    // SAFETY: a valid array of that length.
    match unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, timeout) } {
        -1 => Err(io::Error::last_os_error()),
        count => Ok(count > 0),
    }
}
