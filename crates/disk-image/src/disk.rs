//! What a disk is.

use std::fmt;
use std::io;

use crate::engine::{Engine, EngineError, EngineKind};

/// An open disk image.
///
/// Its size does not change: no request, not even one that ends past the end, makes it grow. The image stays open, and its lock
/// held, until the disk and all its engines are dropped.
pub trait Disk: Send + Sync + fmt::Debug {
    /// Size in bytes as the guest sees it, a multiple of 512 and not 0.
    fn size(&self) -> u64;

    /// Block sizes the guest should know.
    fn topology(&self) -> Topology;

    /// Whether writes, discards and write-zeroes are refused.
    fn read_only(&self) -> bool;

    /// Whether a discard can give storage back: false if read-only or if the filesystem under the image is known not to
    /// punch holes.
    fn supports_discard(&self) -> bool;

    /// Makes an engine that holds up to `depth` requests in flight. Each belongs to one thread; a disk may have many.
    ///
    /// # Errors
    ///
    /// The depth is out of range, or the engine asked for is not to be had.
    fn engine(&self, kind: EngineKind, depth: u16) -> Result<Box<dyn Engine>, EngineError>;

    /// Gives up the lock while the image stays open, for a migration that hands it to another process.
    ///
    /// # Errors
    ///
    /// The kernel refused.
    fn release_lock(&self) -> io::Result<()>;

    /// Takes the lock again as it was taken at opening; harmless if held, and nothing if the image was opened without.
    ///
    /// # Errors
    ///
    /// `WouldBlock` if another process has it, else what the kernel says.
    fn reacquire_lock(&self) -> io::Result<()>;

    /// Whether the lock could be taken. It is not, so that nobody meets it.
    ///
    /// # Errors
    ///
    /// `WouldBlock` if another open file has it, else what the kernel says.
    fn check_lock(&self) -> io::Result<()>;
}

/// Block sizes of a disk in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Topology {
    /// Smallest unit of I/O, at least 512.
    pub logical_block: u32,
    /// Unit below which the host reads to write, at least `logical_block`.
    pub physical_block: u32,
    /// Smallest efficient I/O, 0 if unknown.
    pub min_io: u32,
    /// Best I/O size, 0 if unknown.
    pub opt_io: u32,
    /// Unit in which storage is given back.
    pub discard_granularity: u32,
}
