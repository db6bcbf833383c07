//! Bytes and file descriptors off and onto a UNIX stream socket.
#![expect(
    unsafe_code,
    reason = "descriptors received by SCM_RIGHTS arrive as numbers and have to be owned; socket options are C's"
)]

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// The kernel's limit of descriptors in one message (`SCM_MAX_FD`): with room for all, none is cut off.
const MAX_PER_MESSAGE: usize = 253;

/// Receives once: the number of bytes, and the descriptors that came with the last of them.
///
/// The kernel ends a read on a stream socket after a message that carries descriptors, so they belong to the last byte.
pub(crate) fn receive(stream: &UnixStream, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut numbers: [RawFd; MAX_PER_MESSAGE] = [-1; MAX_PER_MESSAGE];
    let mut vector = [libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() }];
    // SAFETY: the one vector describes `buffer`, which is borrowed mutably and takes any bytes.
    let (bytes, count) =
        unsafe { stream.recv_with_fds(&mut vector, &mut numbers) }.map_err(io::Error::from)?;
    let fds = numbers.iter().take(count).map(|number| own(*number)).collect();
    Ok((bytes, fds))
}

fn own(number: RawFd) -> OwnedFd {
    // SAFETY: fcntl with integers. The receiving call has no close-on-exec flag to give; failure leaves it unset.
    let _ = unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) };
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows its number.
    unsafe { OwnedFd::from_raw_fd(number) }
}

/// Sends bytes, with `fds` at the first of them; never raises SIGPIPE. The number of bytes taken.
pub(crate) fn send(stream: &UnixStream, bytes: &[u8], fds: &[RawFd]) -> io::Result<usize> {
    stream.send_with_fds(&[bytes], fds).map_err(io::Error::from)
}

/// Whether a socket was put to listen (`SO_ACCEPTCONN`, socket(7)).
pub(crate) fn listens(socket: &impl AsRawFd) -> io::Result<bool> {
    let mut value: libc::c_int = 0;
    let mut size = size_of::<libc::c_int>() as libc::socklen_t;
    let place = (&raw mut value).cast();
    // SAFETY: `place` has room for the `size` bytes that the option has.
    let result = unsafe {
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_ACCEPTCONN, place, &raw mut size)
    };
    if result == 0 { Ok(value != 0) } else { Err(io::Error::last_os_error()) }
}

/// Descriptors that wait for the request they belong to.
#[derive(Debug)]
pub(crate) struct Waiting {
    queue: VecDeque<(u64, OwnedFd)>,
    most: usize,
}

/// More descriptors than one request may have.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct TooMany;

impl Waiting {
    /// For requests of at most `most` descriptors.
    pub(crate) const fn new(most: usize) -> Self {
        Self { queue: VecDeque::new(), most }
    }

    /// Keeps `fds`, which came with the byte before stream offset `received`. What arrives at one time may belong to
    /// several requests, so nothing is counted here; one message brings [`MAX_PER_MESSAGE`] at most.
    pub(crate) fn add(&mut self, fds: Vec<OwnedFd>, received: u64) {
        self.queue.extend(fds.into_iter().map(|fd| (received, fd)));
    }

    /// Those of the request that ends at stream offset `end`.
    pub(crate) fn take(&mut self, end: u64) -> Result<Vec<OwnedFd>, TooMany> {
        let count = self.queue.iter().take_while(|(received, _)| *received <= end).count();
        let fds = self.queue.drain(..count).map(|(_, fd)| fd).collect();
        if count > self.most { Err(TooMany) } else { Ok(fds) }
    }

    /// Whether the request of which only a part is there has more than it may; those of whole ones are taken.
    pub(crate) fn is_over(&self) -> bool {
        self.queue.len() > self.most
    }

    /// Closes all.
    pub(crate) fn clear(&mut self) {
        self.queue.clear();
    }
}
