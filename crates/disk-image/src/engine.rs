//! What an engine is: requests in, completions out.

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;

use thiserror::Error;

use crate::buffers::Buffers;

/// Carries out requests on one disk, for one thread or virtqueue.
///
/// A round is: any number of [`submit`](Self::submit), one [`kick`](Self::kick), wait until
/// [`completion_fd`](Self::completion_fd) is readable, [`reap`](Self::reap). Requests complete in any order; a flush covers
/// the writes that had completed before it was submitted.
///
/// Dropping an engine waits for what the kernel still has in hand, so that no buffer is freed under it. Requests belong to
/// the thread that kicked them: the kernel cancels them if that thread ends before they complete.
pub trait Engine: Send + fmt::Debug {
    /// Which engine this is, [`EngineKind::IoUring`] or [`EngineKind::Sync`].
    fn kind(&self) -> EngineKind;

    /// Accepts one request, to be started by the next [`kick`](Self::kick) at the latest. Tokens are returned as given and
    /// need not be unique.
    ///
    /// # Errors
    ///
    /// [`Rejected`] gives the request back, with the reason; nothing has been done then.
    fn submit(&mut self, request: Request) -> Result<(), Rejected>;

    /// Starts everything submitted so far, with one system call.
    ///
    /// # Errors
    ///
    /// The engine is broken; drop it. Passing shortages are not errors: the engine tries again by itself.
    fn kick(&mut self) -> io::Result<()>;

    /// Readable while completions wait to be reaped. It may be readable once too often, never too seldom.
    fn completion_fd(&self) -> BorrowedFd<'_>;

    /// Says whether completions are announced by [`completion_fd`](Self::completion_fd), which they are at first. An owner that
    /// reaps again and again switches that off meanwhile: it costs system calls. Before it sleeps it switches it on, and does
    /// not sleep if that returns true: something may wait to be reaped that was not announced.
    fn announce(&mut self, on: bool) -> bool;

    /// Appends all waiting completions to `out`, and continues requests that the kernel did in part.
    ///
    /// # Errors
    ///
    /// As for [`kick`](Self::kick); what was appended is valid all the same.
    fn reap(&mut self, out: &mut Vec<Completion>) -> io::Result<()>;

    /// Requests submitted and not yet reaped.
    fn in_flight(&self) -> usize;
}

/// How I/O is done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EngineKind {
    /// io_uring if the kernel offers all it takes, else synchronous; the log says which.
    #[default]
    Auto,
    /// io_uring (Linux 5.11 or later), or an error.
    IoUring,
    /// `preadv` and `pwritev` on the calling thread, within `submit`.
    Sync,
}

impl fmt::Display for EngineKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::IoUring => "io_uring",
            Self::Sync => "sync",
        })
    }
}

/// One request.
#[derive(Debug)]
pub struct Request {
    /// The caller's mark, returned in the [`Completion`].
    pub token: u64,
    /// What to do.
    pub op: Op,
}

/// What to do. Offsets and lengths are in bytes.
#[derive(Debug)]
pub enum Op {
    /// Fills the buffers from the disk.
    Read {
        /// Where on the disk.
        offset: u64,
        /// Where in memory, and how much.
        buffers: Buffers,
    },
    /// Writes the buffers to the disk.
    Write {
        /// Where on the disk.
        offset: u64,
        /// Where in memory, and how much.
        buffers: Buffers,
    },
    /// Makes completed writes durable, as `fdatasync` does.
    Flush,
    /// Says that the range is no longer needed. Advice: success means nothing about its contents.
    Discard {
        /// Where on the disk.
        offset: u64,
        /// How much.
        len: u64,
    },
    /// Makes the range read as zeroes.
    WriteZeroes {
        /// Where on the disk.
        offset: u64,
        /// How much.
        len: u64,
        /// Whether the storage behind the range may be given back.
        may_unmap: bool,
    },
}

/// The end of one request.
#[derive(Debug)]
pub struct Completion {
    /// The request's token.
    pub token: u64,
    /// Bytes moved, all that were asked for; 0 for operations without data.
    pub result: io::Result<u32>,
    /// The buffers of a read or write, which the kernel no longer touches.
    pub buffers: Option<Buffers>,
}

/// A request that was not accepted, given back.
#[derive(Debug, Error)]
#[error("request refused")]
pub struct Rejected {
    /// The request as it was submitted.
    pub request: Request,
    /// Why.
    #[source]
    pub reason: SubmitError,
}

/// Why a request is not accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum SubmitError {
    /// As many requests are in flight as the engine's depth allows; reap first.
    #[error("engine is full")]
    Full,
    /// The range does not lie within the disk.
    #[error("{len} bytes at {offset} are not within the disk's {size}")]
    OutOfRange {
        /// Start of the range in bytes.
        offset: u64,
        /// Length of the range in bytes.
        len: u64,
        /// Size of the disk in bytes.
        size: u64,
    },
    /// The disk is open for reading only.
    #[error("disk is read-only")]
    ReadOnly,
    /// More bytes than a completion can count (`u32`).
    #[error("{len} bytes are too many for one request")]
    TooLong {
        /// Sum of the buffers in bytes.
        len: u64,
    },
    /// With direct I/O, a write must begin and end at a multiple of the logical block size.
    #[error("{len} bytes at {offset} are not whole blocks of {block} bytes, which direct I/O needs")]
    Unaligned {
        /// Start of the range in bytes.
        offset: u64,
        /// Length of the range in bytes.
        len: u64,
        /// Logical block size in bytes.
        block: u64,
    },
}

/// Why an engine cannot be made.
#[derive(Debug, Error)]
pub enum EngineError {
    /// The depth is 0 or above 32,768.
    #[error("engine depth {0} is not within 1 to 32768")]
    Depth(u16),
    /// The kernel, a seccomp filter or a limit does not let us have io_uring.
    #[error("io_uring is not available: {what}")]
    IoUring {
        /// The step that failed.
        what: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// No eventfd could be made.
    #[error("cannot create the completion eventfd")]
    EventFd(#[source] io::Error),
}
