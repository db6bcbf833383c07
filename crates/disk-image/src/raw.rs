//! The raw format: byte n of the file is byte n of the disk.

use std::error::Error;
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use log::Level;

use crate::bounce::BounceBudget;
use crate::buffers::{AlignedMemory, IoRange};
use crate::disk::{Disk, Topology};
use crate::engine::{Engine, EngineError, EngineKind, Op, SubmitError};
use crate::open::LockMode;
use crate::sync::SyncEngine;
use crate::sys::{self, Lock};
use crate::uring::UringEngine;

/// Most zeroes written by one system call where the file system cannot zero a range, in bytes.
const ZEROES_LEN: usize = 256 << 10;
/// The most that virtio-blk and io_uring take.
const MAX_DEPTH: u16 = 32768;

#[derive(Debug)]
pub(crate) struct RawDisk {
    raw: Arc<Raw>,
}

impl RawDisk {
    pub(crate) fn new(raw: Raw) -> Self {
        Self { raw: Arc::new(raw) }
    }
}

impl Disk for RawDisk {
    fn size(&self) -> u64 {
        self.raw.parts.size
    }

    fn topology(&self) -> Topology {
        self.raw.parts.topology
    }

    fn read_only(&self) -> bool {
        self.raw.read_only
    }

    fn supports_discard(&self) -> bool {
        !self.raw.read_only && (self.raw.block_device || self.raw.quirks.can_punch())
    }

    fn engine(&self, kind: EngineKind, depth: u16) -> Result<Box<dyn Engine>, EngineError> {
        if !(1..=MAX_DEPTH).contains(&depth) {
            return Err(EngineError::Depth(depth));
        }
        let path = &self.raw.parts.path;
        if kind != EngineKind::Sync {
            match UringEngine::new(self.raw.clone(), depth) {
                Ok(engine) => {
                    log::debug!(path:? = path; "io_uring engine of depth {depth}");
                    return Ok(Box::new(engine));
                }
                Err(error) if kind == EngineKind::IoUring => return Err(error),
                Err(error) => {
                    let cause = error.source().map(ToString::to_string).unwrap_or_default();
                    // Each reset by a guest's driver leads here again.
                    let again = self.raw.quirks.fell_back.swap(true, Ordering::Relaxed);
                    let level = if again { Level::Debug } else { Level::Info };
                    log::log!(level, path:? = path; "synchronous engine, for {error}: {cause}");
                }
            }
        }
        Ok(Box::new(SyncEngine::new(self.raw.clone(), depth)?))
    }

    fn release_lock(&self) -> io::Result<()> {
        self.raw.unlock()
    }

    fn reacquire_lock(&self) -> io::Result<()> {
        self.raw.lock()
    }

    fn check_lock(&self) -> io::Result<()> {
        self.raw.check_lock()
    }
}

/// An open raw image, shared by a disk and its engines.
#[derive(Debug)]
pub(crate) struct Raw {
    pub(crate) parts: RawParts,
    pub(crate) read_only: bool,
    pub(crate) block_device: bool,
    pub(crate) quirks: Quirks,
    pub(crate) bounced: BounceBudget,
    zeroes: OnceLock<AlignedMemory>,
}

/// What opening learned.
#[derive(Debug)]
pub(crate) struct RawParts {
    pub(crate) file: File,
    pub(crate) path: PathBuf,
    pub(crate) size: u64,
    pub(crate) topology: Topology,
    pub(crate) locking: Locking,
    pub(crate) dio: Option<DioAlign>,
}

/// Alignment that direct I/O asks for, in bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DioAlign {
    /// Of addresses.
    pub(crate) memory: u64,
    /// Of offsets and lengths.
    pub(crate) offset: u64,
}

/// The lock that an image was opened with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Locking {
    mode: LockMode,
    kind: Lock,
    len: u64,
}

impl Locking {
    pub(crate) fn new(mode: LockMode, read_only: bool, size: u64) -> Self {
        let kind = if read_only { Lock::Shared } else { Lock::Exclusive };
        Self { mode, kind, len: if mode == LockMode::ByteRange { size } else { 0 } }
    }
}

/// What the file turned out not to do, so that it is tried and reported once.
#[derive(Debug, Default)]
pub(crate) struct Quirks {
    no_punch: AtomicBool,
    no_zero_range: AtomicBool,
    no_block_discard: AtomicBool,
    /// It was logged that there is no io_uring.
    fell_back: AtomicBool,
}

/// A way to discard or zero a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Feature {
    /// `FALLOC_FL_PUNCH_HOLE`.
    Punch,
    /// `FALLOC_FL_ZERO_RANGE`.
    ZeroRange,
    /// `BLKDISCARD`.
    BlockDiscard,
}

impl Quirks {
    pub(crate) fn can_punch(&self) -> bool {
        self.can(Feature::Punch)
    }

    pub(crate) fn can(&self, feature: Feature) -> bool {
        !self.flag(feature).load(Ordering::Relaxed)
    }

    fn flag(&self, feature: Feature) -> &AtomicBool {
        match feature {
            Feature::Punch => &self.no_punch,
            Feature::ZeroRange => &self.no_zero_range,
            Feature::BlockDiscard => &self.no_block_discard,
        }
    }
}

impl Raw {
    pub(crate) fn new(parts: RawParts, read_only: bool, block_device: bool) -> Self {
        Self {
            parts,
            read_only,
            block_device,
            quirks: Quirks::default(),
            bounced: BounceBudget::default(),
            zeroes: OnceLock::new(),
        }
    }

    /// Looks whether the file can have holes. To be called with the lock held: it is a change of the file.
    pub(crate) fn probe(&self) {
        if !self.read_only && !self.block_device {
            // A hole past the end changes nothing that belongs to the disk.
            let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            if let Err(error) = sys::fallocate(&self.parts.file, mode, self.parts.size, 4096) {
                self.missing(Feature::Punch, &error);
            }
        }
    }

    /// Notes that a feature is missing, if that is what `error` says, and logs it the first time.
    pub(crate) fn missing(&self, feature: Feature, error: &io::Error) {
        let permanent = matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY));
        if permanent && !self.quirks.flag(feature).swap(true, Ordering::Relaxed) {
            log::warn!(path:? = self.parts.path; "the disk has no {feature:?}: {error}");
        }
    }

    /// Whether the disk takes this request.
    pub(crate) fn check(&self, op: &Op) -> Result<(), SubmitError> {
        let size = self.parts.size;
        let (offset, len, writes) = match op {
            Op::Read { offset, buffers } => (*offset, buffers.len(), false),
            Op::Write { offset, buffers } => (*offset, buffers.len(), true),
            Op::Discard { offset, len } | Op::WriteZeroes { offset, len, .. } => (*offset, *len, true),
            Op::Flush => return Ok(()),
        };
        if writes && self.read_only {
            return Err(SubmitError::ReadOnly);
        }
        if offset.checked_add(len).is_none_or(|end| end > size) {
            return Err(SubmitError::OutOfRange { offset, len, size });
        }
        let moves_data = matches!(op, Op::Read { .. } | Op::Write { .. });
        if moves_data && u32::try_from(len).is_err() {
            return Err(SubmitError::TooLong { len });
        }
        if let Some(block) = self.parts.dio.map(|dio| dio.offset)
            && matches!(op, Op::Write { .. } | Op::WriteZeroes { .. })
            && (!offset.is_multiple_of(block) || !len.is_multiple_of(block))
        {
            return Err(SubmitError::Unaligned { offset, len, block });
        }
        Ok(())
    }

    /// Zeroes to write, at most `len` bytes.
    pub(crate) fn zeroes(&self, len: u64) -> io::Result<IoRange> {
        let memory = match self.zeroes.get() {
            Some(memory) => memory,
            None => {
                let memory = AlignedMemory::zeroed(ZEROES_LEN)?;
                self.zeroes.get_or_init(|| memory)
            }
        };
        Ok(memory.io_range(usize::try_from(len).unwrap_or(ZEROES_LEN)))
    }

    pub(crate) fn lock(&self) -> io::Result<()> {
        let locking = &self.parts.locking;
        if locking.mode == LockMode::Off {
            return Ok(());
        }
        sys::set_lock(&self.parts.file, locking.kind, locking.len).map_err(|error| {
            match error.raw_os_error() {
                Some(libc::EAGAIN | libc::EACCES) => io::Error::from(io::ErrorKind::WouldBlock),
                _ => error,
            }
        })
    }

    pub(crate) fn check_lock(&self) -> io::Result<()> {
        let Locking { mode, kind, len } = self.parts.locking;
        if mode != LockMode::Off && sys::is_locked(&self.parts.file, kind, len)? {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(())
    }

    pub(crate) fn unlock(&self) -> io::Result<()> {
        let locking = &self.parts.locking;
        if locking.mode == LockMode::Off {
            return Ok(());
        }
        sys::set_lock(&self.parts.file, Lock::Unlocked, locking.len)
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // Closing would unlock too, but the kernel may hold the file a while for an io_uring that is going away.
        if let Err(error) = self.unlock() {
            log::warn!(path:? = self.parts.path; "cannot unlock the disk: {error}");
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A raw image on any file, as a regular file of `size` bytes would be.
    pub(crate) fn raw_on(file: File, size: u64, dio: Option<DioAlign>) -> Raw {
        let topology = Topology {
            logical_block: 512,
            physical_block: 4096,
            min_io: 4096,
            opt_io: 0,
            discard_granularity: 4096,
        };
        let locking = Locking::new(LockMode::Off, false, size);
        Raw::new(RawParts { file, path: "test.raw".into(), size, topology, locking, dio }, false, false)
    }

    #[test]
    fn only_a_permanent_error_marks_a_feature_missing() {
        let raw = raw_on(tempfile::tempfile().unwrap(), 4096, None);
        raw.missing(Feature::ZeroRange, &io::Error::from_raw_os_error(libc::EINVAL));
        assert!(raw.quirks.can(Feature::ZeroRange));
        raw.missing(Feature::ZeroRange, &io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        assert!(!raw.quirks.can(Feature::ZeroRange));
        assert!(raw.quirks.can(Feature::BlockDiscard));
    }

    #[test]
    fn a_file_that_cannot_have_holes_says_so() {
        let disk = RawDisk::new(raw_on(tempfile::tempfile().unwrap(), 4096, None));
        assert!(disk.supports_discard());
        disk.raw.missing(Feature::Punch, &io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        assert!(!disk.supports_discard());
    }
}
