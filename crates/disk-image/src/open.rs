//! Opening an image.

use std::fs::{File, FileType};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::Arc;

use thiserror::Error;

use crate::buffers::AlignedMemory;
use crate::disk::{Disk, Topology};
use crate::raw::{DioAlign, Locking, Raw, RawDisk, RawParts};
use crate::sys;

/// Unit of virtio-blk and of every size here, in bytes.
const SECTOR: u32 = 512;

/// How to open an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenOptions {
    /// A regular file or a block device.
    pub path: PathBuf,
    /// Open for reading only.
    pub read_only: bool,
    /// Pass by the page cache (`O_DIRECT`).
    pub direct: bool,
    /// What to lock.
    pub lock: LockMode,
    /// Leave that to [`Disk::reacquire_lock`](crate::Disk::reacquire_lock): another process has the lock still.
    pub lock_later: bool,
    /// The format of the image.
    pub image_type: ImageType,
}

impl OpenOptions {
    /// A raw image, to be opened for reading and writing, through the page cache, and locked.
    pub fn raw(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            read_only: false,
            direct: false,
            lock: LockMode::default(),
            lock_later: false,
            image_type: ImageType::Raw,
        }
    }
}

/// The format of an image. The user names it; it is never guessed from bytes that a guest can write, or a guest could turn its
/// raw disk into one that refers to other files of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ImageType {
    /// Byte n of the file is byte n of the disk.
    Raw,
}

/// Which part of the image is locked. Writers lock it for themselves alone, readers share it. The locks bind only those who
/// ask for them too, and they conflict within one process as well (open-file-description locks, fcntl(2)).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LockMode {
    /// No lock.
    Off,
    /// The bytes the image had when it was opened.
    #[default]
    ByteRange,
    /// The whole file however long, which some network filesystems handle better.
    Full,
}

/// Opens an image as `options` say.
///
/// # Errors
///
/// See [`OpenError`]; nothing stays open or locked.
pub fn open(options: &OpenOptions) -> Result<Arc<dyn Disk>, OpenError> {
    match options.image_type {
        ImageType::Raw => Ok(Arc::new(open_raw(options)?)),
    }
}

/// Why an image cannot be opened. Each names the image.
#[derive(Debug, Error)]
pub enum OpenError {
    /// There is no such file.
    #[error("disk image {path:?} does not exist")]
    NotFound {
        /// The image.
        path: PathBuf,
    },
    /// The path is not a regular file or block device.
    #[error("disk image {path:?} is {kind}, not a regular file or block device")]
    NotADisk {
        /// The image.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
    /// The file or its filesystem may not be accessed so.
    #[error("disk image {path:?} may not be opened for {access}")]
    Access {
        /// The image.
        path: PathBuf,
        /// "reading" or "reading and writing".
        access: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// Opening failed otherwise.
    #[error("cannot open disk image {path:?}")]
    Open {
        /// The image.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// Size, type or block sizes cannot be learned.
    #[error("cannot query disk image {path:?}")]
    Query {
        /// The image.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The image has no bytes.
    #[error("disk image {path:?} is empty")]
    Empty {
        /// The image.
        path: PathBuf,
    },
    /// The size is not a multiple of the sector, or of the block with direct I/O.
    #[error("disk image {path:?} has an odd size: {size} bytes is not a multiple of {unit}")]
    OddSize {
        /// The image.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
        /// 512, or the block size in bytes that direct I/O needs.
        unit: u32,
    },
    /// The filesystem does not do direct I/O.
    #[error("disk image {path:?} is on a filesystem without direct I/O (O_DIRECT)")]
    NoDirect {
        /// The image.
        path: PathBuf,
    },
    /// Somebody else holds a lock that conflicts.
    #[error("disk image {path:?} is locked: another process, or another disk of this one, holds it")]
    Locked {
        /// The image.
        path: PathBuf,
    },
    /// Locking failed otherwise; some filesystems cannot.
    #[error("cannot lock disk image {path:?}")]
    Lock {
        /// The image.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

fn open_raw(options: &OpenOptions) -> Result<RawDisk, OpenError> {
    let path = || options.path.clone();
    let query = |source| OpenError::Query { path: path(), source };
    let file = open_file(options)?;
    let metadata = file.metadata().map_err(query)?;
    let block_device = metadata.file_type().is_block_device();
    let size = if block_device { sys::block_size_bytes(&file).map_err(query)? } else { metadata.len() };
    let dio = if options.direct { Some(dio_align(&file, options)?) } else { None };
    let topology = if block_device {
        device_topology(&file).map_err(query)?
    } else {
        file_topology(metadata.blksize(), dio)
    };
    check_size(options, size, dio)?;

    let locking = Locking::new(options.lock, options.read_only, size);
    let parts = RawParts { file, path: path(), size, topology, locking, dio };
    let raw = Raw::new(parts, options.read_only, block_device);
    if !options.lock_later {
        raw.lock().map_err(|source| match source.kind() {
            io::ErrorKind::WouldBlock => OpenError::Locked { path: path() },
            _ => OpenError::Lock { path: path(), source },
        })?;
    }
    raw.probe();
    Ok(RawDisk::new(raw))
}

/// Opens without waiting (a FIFO would make an open wait for its other end) and checks what it is that was opened.
fn open_file(options: &OpenOptions) -> Result<File, OpenError> {
    let direct = if options.direct { libc::O_DIRECT } else { 0 };
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(!options.read_only)
        .custom_flags(direct | libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(&options.path)
        .map_err(|source| open_error(options, source))?;
    let query = |source| OpenError::Query { path: options.path.clone(), source };
    let file_type = file.metadata().map_err(query)?.file_type();
    if let Some(kind) = not_a_disk(file_type) {
        return Err(OpenError::NotADisk { path: options.path.clone(), kind });
    }
    sys::set_blocking(&file).map_err(query)?;
    Ok(file)
}

fn open_error(options: &OpenOptions, source: io::Error) -> OpenError {
    let path = options.path.clone();
    // A directory opened for writing, or a socket, is refused by open itself; its type says more than the errno.
    if let Some(kind) = std::fs::metadata(&path).ok().and_then(|found| not_a_disk(found.file_type())) {
        return OpenError::NotADisk { path, kind };
    }
    match source.raw_os_error() {
        Some(libc::ENOENT) => OpenError::NotFound { path },
        Some(libc::EACCES | libc::EPERM | libc::EROFS | libc::ETXTBSY) => {
            let access = if options.read_only { "reading" } else { "reading and writing" };
            OpenError::Access { path, access, source }
        }
        Some(libc::EINVAL) if options.direct => OpenError::NoDirect { path },
        _ => OpenError::Open { path, source },
    }
}

fn not_a_disk(file_type: FileType) -> Option<&'static str> {
    if file_type.is_file() || file_type.is_block_device() {
        None
    } else if file_type.is_dir() {
        Some("a directory")
    } else if file_type.is_char_device() {
        Some("a character device")
    } else if file_type.is_fifo() {
        Some("a FIFO")
    } else if file_type.is_socket() {
        Some("a socket")
    } else {
        Some("a special file")
    }
}

/// What direct I/O asks for: as statx says, or before Linux 6.1 the smallest block that can be read.
fn dio_align(file: &File, options: &OpenOptions) -> Result<DioAlign, OpenError> {
    if let Some((memory, offset)) = sys::dio_align(file) {
        return Ok(DioAlign { memory: memory.into(), offset: offset.max(SECTOR).into() });
    }
    let probe = AlignedMemory::zeroed(4096)
        .map_err(|source| OpenError::Query { path: options.path.clone(), source })?;
    [512_u32, 1024, 2048, 4096]
        .into_iter()
        .find(|&block| sys::preadv(file, &[probe.io_range(block as usize)], 0).is_ok())
        .map(|block| DioAlign { memory: block.into(), offset: block.into() })
        .ok_or_else(|| OpenError::NoDirect { path: options.path.clone() })
}

fn check_size(options: &OpenOptions, size: u64, dio: Option<DioAlign>) -> Result<(), OpenError> {
    let path = options.path.clone();
    let block = dio.and_then(|dio| u32::try_from(dio.offset).ok()).unwrap_or(SECTOR);
    if size == 0 {
        Err(OpenError::Empty { path })
    } else if let Some(unit) = [SECTOR, block].into_iter().find(|&unit| !size.is_multiple_of(unit.into())) {
        Err(OpenError::OddSize { path, size, unit })
    } else {
        Ok(())
    }
}

fn device_topology(file: &File) -> io::Result<Topology> {
    let logical_block = sys::logical_block_size(file)?.max(SECTOR);
    let physical_block = sys::physical_block_size(file)?.max(logical_block);
    Ok(Topology {
        logical_block,
        physical_block,
        min_io: sys::min_io_size(file)?,
        opt_io: sys::opt_io_size(file)?,
        discard_granularity: physical_block,
    })
}

fn file_topology(filesystem_block: u64, dio: Option<DioAlign>) -> Topology {
    let logical_block = dio.and_then(|dio| u32::try_from(dio.offset).ok()).unwrap_or(SECTOR);
    let filesystem_block =
        u32::try_from(filesystem_block).ok().filter(|block| block.is_power_of_two()).unwrap_or(4096);
    // Network filesystems report their transfer size here, which is no block of the guest's.
    let physical_block = filesystem_block.clamp(logical_block, logical_block.max(4096));
    Topology {
        logical_block,
        physical_block,
        min_io: physical_block,
        opt_io: 0,
        discard_granularity: filesystem_block.max(logical_block),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_locked_image_is_not_touched() {
        // Of the common filesystems, ext4 would not punch behind the end; tmpfs does.
        let file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
        file.as_file().set_len(4096).unwrap();
        // Storage behind the end, such as an owner has who is about to append.
        sys::fallocate(file.as_file(), libc::FALLOC_FL_KEEP_SIZE, 0, 64 << 10).unwrap();
        let blocks = || file.as_file().metadata().unwrap().blocks();
        let before = blocks();
        assert!(before * 512 >= 64 << 10, "{before}");
        sys::set_lock(file.as_file(), sys::Lock::Exclusive, 0).unwrap();
        let refused = open(&OpenOptions::raw(file.path()));
        assert!(matches!(refused, Err(OpenError::Locked { .. })), "{refused:?}");
        assert_eq!(blocks(), before);
    }
}
