//! The directory while it is written: who owns it, what is removed when it fails, what commits it.

use std::fs::{File, TryLockError};
use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use super::manifest::{MANIFEST, PARTIAL, STATE, TABLE};
use super::{DataFile, Hash, Storage, WriteError};

/// The manifest before it is one: it is created first, marks the directory as a writer's, and becomes the
/// manifest by the renaming that commits.
const MARKER: &str = "manifest.json.partial";

/// What is written where holes cannot be made.
const ZEROS: &[u8] = &[0; 1 << 16];

/// A directory that a writer owns.
///
/// Dropped before [`commit`](Self::commit), it removes what it made.
#[derive(Debug)]
pub(super) struct Workplace<'s> {
    storage: &'s dyn Storage,
    path: PathBuf,
    dir: File,
    /// The directory was not there before.
    made: bool,
    step: Step,
}

#[derive(Debug)]
enum Step {
    /// Nothing in it is ours.
    Opened,
    /// The marker is there, and nothing that is not ours.
    Claimed(File),
    Committed,
}

impl<'s> Workplace<'s> {
    /// Takes the directory at `path`: absent, empty, or left by a writer that failed.
    pub(super) fn claim(storage: &'s dyn Storage, path: &Path) -> Result<Self, WriteError> {
        let failed = |what| move |source| WriteError::Io { what, path: path.to_owned(), source };
        let made = match storage.make_dir(path) {
            Ok(()) => true,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => false,
            Err(error) => return Err(failed("make directory")(error)),
        };
        let dir = storage.open_dir(path).map_err(failed("open directory"));
        let dir = match dir {
            Ok(dir) => dir,
            Err(error) => {
                if made {
                    // The first error is the one to tell.
                    let _ = storage.remove_dir(path);
                }
                return Err(error);
            }
        };
        let mut place = Self { storage, path: path.to_owned(), dir, made, step: Step::Opened };
        // A file system without locks has one writer by agreement.
        if let Err(TryLockError::WouldBlock) = place.dir.try_lock() {
            return Err(WriteError::Busy { path: place.path.clone() });
        }
        if made {
            place.sync_parent().map_err(failed("make directory"))?;
        }
        place.clear_leftovers()?;
        let marker = storage.create(&place.dir, MARKER).map_err(failed("write in"))?;
        place.step = Step::Claimed(marker);
        place.sync_dir()?;
        Ok(place)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    fn failed<'a>(&'a self, what: &'static str, name: &'a str) -> impl FnOnce(io::Error) -> WriteError + 'a {
        move |source| WriteError::Io { what, path: self.path.join(name), source }
    }

    fn sync_parent(&self) -> io::Result<()> {
        let parent = self.path.parent().filter(|parent| !parent.as_os_str().is_empty());
        let parent = self.storage.open_dir(parent.unwrap_or(Path::new(".")))?;
        self.storage.sync(&parent)
    }

    fn sync_dir(&self) -> Result<(), WriteError> {
        self.storage.sync(&self.dir).map_err(self.failed("sync", ""))
    }

    /// Refuses what is foreign and removes what a failed attempt left.
    fn clear_leftovers(&self) -> Result<(), WriteError> {
        let names = self.names().map_err(self.failed("list", ""))?;
        if names.iter().any(|name| name == MANIFEST) {
            return Err(WriteError::Exists { path: self.path.clone() });
        }
        let marked = names.iter().any(|name| name == MARKER);
        if let Some(name) = names.iter().find(|name| !(marked && is_own(name))) {
            return Err(WriteError::NotEmpty { path: self.path.clone(), name: name.clone() });
        }
        if marked { self.clear(&names).map_err(self.failed("remove leftovers in", "")) } else { Ok(()) }
    }

    /// Names that are not UTF-8 are nobody's, and print well enough.
    fn names(&self) -> io::Result<Vec<String>> {
        let names = self.storage.list(&self.dir)?;
        Ok(names.iter().map(|name| name.to_string_lossy().into_owned()).collect())
    }

    /// Removes what is ours; the marker goes last, when the rest is certain to be gone.
    fn clear(&self, names: &[String]) -> io::Result<()> {
        for name in names.iter().filter(|name| is_own(name) && *name != MARKER) {
            self.storage.remove(&self.dir, name)?;
        }
        self.storage.sync(&self.dir)?;
        self.storage.remove(&self.dir, MARKER)
    }

    /// Creates the file that is to be `name`.
    pub(super) fn create(&self, name: &str) -> Result<File, WriteError> {
        let partial = format!("{name}{PARTIAL}");
        self.storage.create(&self.dir, &partial).map_err(self.failed("create", name))
    }

    pub(super) fn resize(&self, file: &File, name: &str, size: u64) -> Result<(), WriteError> {
        self.storage.resize(file, size).map_err(self.failed("resize", name))
    }

    pub(super) fn write(&self, file: &File, name: &str, bytes: &[u8], at: u64) -> Result<(), WriteError> {
        write_all(self.storage, file, bytes, at).map_err(self.failed("write", name))
    }

    /// Makes a part of a file zero.
    pub(super) fn zero(&self, file: &File, name: &str, range: Range<u64>) -> Result<(), WriteError> {
        match self.storage.punch(file, range.clone()) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {}
            outcome => return outcome.map_err(self.failed("punch a hole in", name)),
        }
        for start in range.clone().step_by(ZEROS.len()) {
            let bytes = usize::try_from(range.end - start).map_or(ZEROS.len(), |left| left.min(ZEROS.len()));
            self.write(file, name, ZEROS.get(..bytes).unwrap_or_default(), start)?;
        }
        Ok(())
    }

    /// Reads what was written.
    pub(super) fn read_back(
        &self,
        file: &File,
        name: &str,
        bytes: &mut [u8],
        at: u64,
    ) -> Result<(), WriteError> {
        file.read_exact_at(bytes, at).map_err(self.failed("read", name))
    }

    /// Brings files to stable storage, read-only, under their own names. Up to `threads` of them are waited for at once.
    pub(super) fn finish(&self, files: &[(&str, &File)], threads: NonZeroUsize) -> Result<(), WriteError> {
        for (name, file) in files {
            self.storage.seal(file).map_err(self.failed("seal", name))?;
        }
        let next = AtomicUsize::new(0);
        let failure = Mutex::new(None);
        let sync = || {
            while let Some((name, file)) = files.get(next.fetch_add(1, Ordering::Relaxed)) {
                if let Err(error) = self.storage.sync(file) {
                    next.store(files.len(), Ordering::Relaxed);
                    *failure.lock().unwrap_or_else(PoisonError::into_inner) =
                        Some(self.failed("sync", name)(error));
                }
            }
        };
        thread::scope(|scope| {
            for _ in 1..threads.get().min(files.len()) {
                // A host that gives no more threads gets the work done by those that are.
                let _ = thread::Builder::new().name("snapshot".to_owned()).spawn_scoped(scope, sync);
            }
            sync();
        });
        if let Some(error) = failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
            return Err(error);
        }
        files.iter().try_for_each(|(name, _)| self.settle(name))
    }

    /// Gives a finished file its own name.
    fn settle(&self, name: &str) -> Result<(), WriteError> {
        let partial = format!("{name}{PARTIAL}");
        self.storage.rename(&self.dir, &partial, name).map_err(self.failed("rename", name))
    }

    /// Writes a whole file, which is to be finished.
    pub(super) fn file(&self, name: &str, bytes: &[u8]) -> Result<(File, DataFile), WriteError> {
        let file = self.create(name)?;
        self.write(&file, name, bytes, 0)?;
        Ok((file, DataFile { file: name.to_owned(), size: bytes.len() as u64, sha256: Hash::of(bytes) }))
    }

    /// Writes the manifest. Its renaming commits; before that all other files are in place for good.
    pub(super) fn commit(mut self, manifest: &[u8]) -> Result<(), WriteError> {
        self.sync_dir()?;
        if let Step::Claimed(marker) = &self.step {
            self.write(marker, MANIFEST, manifest, 0)?;
            self.finish(&[(MANIFEST, marker)], NonZeroUsize::MIN)?;
        }
        self.sync_dir()?;
        self.step = Step::Committed;
        Ok(())
    }

    fn abandon(&self) -> io::Result<()> {
        if matches!(self.step, Step::Committed) {
            return Ok(());
        }
        if matches!(self.step, Step::Claimed(_)) {
            let names = self.names()?;
            if names.iter().any(|name| name == MANIFEST) {
                // It was renamed, and then its directory did not reach the disk. Until that is undone nothing
                // is removed: there is a whole snapshot, or none.
                self.storage.rename(&self.dir, MANIFEST, MARKER)?;
                self.storage.sync(&self.dir)?;
            }
            self.clear(&names)?;
        }
        if self.made { self.storage.remove_dir(&self.path) } else { Ok(()) }
    }
}

impl Drop for Workplace<'_> {
    fn drop(&mut self) {
        // The failure that led here is told; what cannot be removed now, the next attempt removes.
        let _ = self.abandon();
    }
}

/// Whether a file of that name is a writer's, finished or not; the committed manifest is not.
fn is_own(name: &str) -> bool {
    let finished = name.strip_suffix(PARTIAL).unwrap_or(name);
    let number = finished.strip_prefix("memory-").and_then(|rest| rest.strip_suffix(".bin"));
    let count = |digits: &str| (1..=3).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_digit());
    let memory = number.is_some_and(count);
    name == MARKER || finished == STATE || finished == TABLE || memory
}

fn write_all(storage: &dyn Storage, file: &File, mut bytes: &[u8], mut offset: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        match storage.write_at(file, bytes, offset) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => {
                bytes = bytes.get(written..).unwrap_or_default();
                offset += written as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_names_are_the_writers_alone() {
        for own in [MARKER, STATE, "chunks.bin.partial", "memory-0.bin", "memory-255.bin.partial"] {
            assert!(is_own(own), "{own}");
        }
        for other in [MANIFEST, "memory-.bin", "memory-+1.bin", "memory-1000.bin", "x.partial", "state.cbor~"]
        {
            assert!(!is_own(other), "{other}");
        }
    }
}
