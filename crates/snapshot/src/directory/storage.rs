//! What the writer asks of a file system; tests put faults here.

use std::ffi::OsString;
use std::fmt::Debug;
use std::fs::{DirBuilder, File};
use std::io;
use std::ops::Range;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{DirBuilderExt, FileExt};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Dir, FallocateFlags, Mode, OFlags};

/// Names that [`Storage::list`] returns at most: enough to see that a directory is not ours.
const MAX_NAMES: usize = 1024;

/// The operations of a writer, each one step that can fail or be the last before a crash.
///
/// `dir` is an open directory and `name` a single component, so nothing outside is reached and no symbolic link
/// inside is followed.
pub trait Storage: Debug + Sync {
    /// Makes a directory that does not exist (mode 0700).
    ///
    /// # Errors
    /// `AlreadyExists`, or what the host says; so for all others.
    fn make_dir(&self, path: &Path) -> io::Result<()>;
    /// Opens a directory.
    fn open_dir(&self, path: &Path) -> io::Result<File>;
    /// Removes an empty directory.
    fn remove_dir(&self, path: &Path) -> io::Result<()>;
    /// Names in a directory, a thousand at most.
    fn list(&self, dir: &File) -> io::Result<Vec<OsString>>;
    /// Creates a file that does not exist (mode 0600).
    fn create(&self, dir: &File, name: &str) -> io::Result<File>;
    /// Gives a file a length; what is new is a hole.
    fn resize(&self, file: &File, bytes: u64) -> io::Result<()>;
    /// Writes some of `bytes` and says how many.
    fn write_at(&self, file: &File, bytes: &[u8], offset: u64) -> io::Result<usize>;
    /// Makes a part of a file a hole, which reads as zero.
    ///
    /// # Errors
    /// `Unsupported` where a file system has no such operation.
    fn punch(&self, file: &File, range: Range<u64>) -> io::Result<()>;
    /// Makes a file read-only (mode 0400).
    fn seal(&self, file: &File) -> io::Result<()>;
    /// Waits until a file or directory is on stable storage.
    fn sync(&self, file: &File) -> io::Result<()>;
    /// Renames a file inside a directory.
    fn rename(&self, dir: &File, from: &str, to: &str) -> io::Result<()>;
    /// Removes a file.
    fn remove(&self, dir: &File, name: &str) -> io::Result<()>;
}

/// The host's file systems.
#[derive(Debug, Clone, Copy, Default)]
pub struct HostStorage;

impl Storage for HostStorage {
    fn make_dir(&self, path: &Path) -> io::Result<()> {
        DirBuilder::new().mode(0o700).create(path)
    }

    fn open_dir(&self, path: &Path) -> io::Result<File> {
        open_dir(path)
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        std::fs::remove_dir(path)
    }

    fn list(&self, dir: &File) -> io::Result<Vec<OsString>> {
        let mut names = Vec::new();
        for entry in Dir::read_from(dir)? {
            let name = entry?.file_name().to_bytes().to_vec();
            if name != b"." && name != b".." {
                names.push(OsString::from_vec(name));
            }
            if names.len() == MAX_NAMES {
                break;
            }
        }
        Ok(names)
    }

    fn create(&self, dir: &File, name: &str) -> io::Result<File> {
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(rustix::fs::openat(dir, name, flags, Mode::RUSR | Mode::WUSR)?.into())
    }

    fn resize(&self, file: &File, bytes: u64) -> io::Result<()> {
        file.set_len(bytes)
    }

    fn write_at(&self, file: &File, bytes: &[u8], offset: u64) -> io::Result<usize> {
        file.write_at(bytes, offset)
    }

    fn punch(&self, file: &File, range: Range<u64>) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(rustix::fs::fallocate(file, flags, range.start, range.end.saturating_sub(range.start))?)
    }

    fn seal(&self, file: &File) -> io::Result<()> {
        Ok(rustix::fs::fchmod(file, Mode::RUSR)?)
    }

    fn sync(&self, file: &File) -> io::Result<()> {
        file.sync_all()
    }

    fn rename(&self, dir: &File, from: &str, to: &str) -> io::Result<()> {
        Ok(rustix::fs::renameat(dir, from, dir, to)?)
    }

    fn remove(&self, dir: &File, name: &str) -> io::Result<()> {
        Ok(rustix::fs::unlinkat(dir, name, AtFlags::empty())?)
    }
}

pub(super) fn open_dir(path: &Path) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(CWD, path, flags, Mode::empty())?.into())
}

/// Opens a file of a snapshot for reading: `name` is one component, its last, and no symbolic link.
pub(super) fn open_file(dir: &File, name: &str) -> io::Result<File> {
    // Not to be held up by a pipe.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(dir, name, flags, Mode::empty())?.into())
}

/// The first byte from `offset` on that is not in a hole.
pub(super) fn next_data(file: &File, offset: u64) -> io::Result<Option<u64>> {
    match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(offset)) {
        Ok(at) => Ok(Some(at)),
        Err(rustix::io::Errno::NXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// The first byte from `offset` on that is in a hole or behind the end.
pub(super) fn next_hole(file: &File, offset: u64) -> io::Result<u64> {
    Ok(rustix::fs::seek(file, rustix::fs::SeekFrom::Hole(offset))?)
}
