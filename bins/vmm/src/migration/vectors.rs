//! Guest memory to and from sockets, without a buffer in between.
#![expect(
    unsafe_code,
    reason = "no slice of Rust's may stand for memory that a guest writes to: vectors are made of addresses"
)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::bitmap::Bitmap;
use vmm_memory_manager::straight::GuestSlice;

/// Vectors of one call, at most (UIO_MAXIOV of uio.h).
const MOST: usize = 1024;

/// A part of what is sent.
#[derive(Debug)]
pub(super) enum Part<'a> {
    Own(&'a [u8]),
    Guest(GuestSlice<'a>),
}

impl Part<'_> {
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Own(bytes) => bytes.len(),
            Self::Guest(slice) => slice.len(),
        }
    }

    /// Leaves the first `count` bytes out.
    fn skip(&mut self, count: usize) {
        match self {
            Self::Own(bytes) => *bytes = bytes.get(count..).unwrap_or_default(),
            Self::Guest(slice) => {
                if let Ok(rest) = slice.offset(count) {
                    *slice = rest;
                }
            }
        }
    }

    fn vector(&self) -> libc::iovec {
        let address = match self {
            Self::Own(bytes) => bytes.as_ptr(),
            Self::Guest(slice) => slice.ptr_guard().as_ptr(),
        };
        libc::iovec { iov_base: address.cast_mut().cast(), iov_len: self.len() }
    }
}

/// Leaves the first `count` bytes of `parts` out.
pub(super) fn skip(parts: &mut [Part<'_>], mut count: usize) -> usize {
    for (number, part) in parts.iter_mut().enumerate() {
        if count < part.len() {
            part.skip(count);
            return number;
        }
        count -= part.len();
    }
    parts.len()
}

/// Sends as much of `parts` as goes.
pub(super) fn send(to: BorrowedFd<'_>, parts: &[Part<'_>]) -> io::Result<usize> {
    let mut vectors: Vec<libc::iovec> = parts.iter().take(MOST).map(Part::vector).collect();
    let message = message(&mut vectors);
    // SAFETY: the vectors are of memory that `parts` keeps, and the kernel only reads it.
    let sent = unsafe { libc::sendmsg(to.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

/// Receives what there is: into `guest`, and once that is full into `own`.
pub(super) fn receive(from: BorrowedFd<'_>, guest: &GuestSlice<'_>, own: &mut [u8]) -> io::Result<usize> {
    let memory = guest.ptr_guard_mut();
    let mut vectors = [
        libc::iovec { iov_base: memory.as_ptr().cast(), iov_len: guest.len() },
        libc::iovec { iov_base: own.as_mut_ptr().cast(), iov_len: own.len() },
    ];
    let mut message = message(&mut vectors);
    // SAFETY: the vectors are of memory that may be written, and that is borrowed for so long.
    let received = unsafe { libc::recvmsg(from.as_raw_fd(), &raw mut message, 0) };
    let received = usize::try_from(received).map_err(|_| io::Error::last_os_error())?;
    guest.bitmap().mark_dirty(0, received.min(guest.len()));
    Ok(received)
}

fn message(vectors: &mut [libc::iovec]) -> libc::msghdr {
    // SAFETY: all zeroes is a message without address, data and control.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = vectors.as_mut_ptr();
    message.msg_iovlen = vectors.len();
    message
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use vm_memory::{Bytes, GuestAddress};
    use vmm_device_model::dma::GuestRam;
    use vmm_memory_manager::straight::slice;

    use super::*;

    #[test]
    fn parts_go_in_order_and_on_from_where_they_stopped() {
        let memory = GuestRam::from_ranges(&[(GuestAddress(0), 8192)]).unwrap();
        memory.write_slice(b"guest", GuestAddress(4096)).unwrap();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let parts = || {
            [
                Part::Own(b"head"),
                Part::Guest(slice(&memory, 4096, 5).unwrap()),
                Part::Own(b""),
                Part::Own(b"tail"),
            ]
        };
        for gone in 0..=13 {
            let mut parts = parts();
            let first = skip(&mut parts, gone);
            let rest = parts.get(first..).unwrap();
            assert_eq!(send(ours.as_fd(), rest).unwrap(), 13 - gone);
            let mut bytes = vec![0; 13 - gone];
            theirs.read_exact(&mut bytes).unwrap();
            assert_eq!(bytes, &b"headguesttail"[gone..], "{gone}");
        }
    }

    #[test]
    fn what_follows_guest_memory_is_this_ends() {
        let memory = GuestRam::from_ranges(&[(GuestAddress(0), 8192)]).unwrap();
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        ours.write_all(b"guestnext").unwrap();
        let (part, mut own) = (slice(&memory, 4094, 5).unwrap(), [0; 8]);
        assert_eq!(receive(theirs.as_fd(), &part, &mut own).unwrap(), 9);
        let mut bytes = [0; 9];
        memory.read_slice(&mut bytes, GuestAddress(4092)).unwrap();
        assert_eq!((&bytes, &own), (b"\0\0guest\0\0", b"next\0\0\0\0"));
        assert!(part.bitmap().dirty_at(0));
        drop(ours);
        assert_eq!(receive(theirs.as_fd(), &part, &mut own).unwrap(), 0);
    }
}
