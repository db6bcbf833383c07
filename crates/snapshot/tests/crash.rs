//! A fault at every operation of the writer leaves no snapshot or a whole one, and the next attempt succeeds.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "tests fail by panicking")]

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use fixture::{load, memory, same, state, write_on};
use vmm_snapshot::directory::{
    BytesMemory, Chain, Draft, HostStorage, Increment, ReadError, Storage, Work, WriteError,
};

mod fixture;

/// What happens at the operation with the number [`Faults::at`].
#[derive(Debug, Clone, Copy, PartialEq)]
enum Fault {
    None,
    /// It fails, with this error number; others go on.
    Error(i32),
    /// It and all that follow do nothing: the process was killed before it.
    KillBefore,
    /// It is the last one that does something.
    KillAfter,
    /// There are no holes, which is no failure.
    NoHoles,
}

/// What a crash of the host can take back.
#[derive(Debug)]
enum Unsynced {
    Created(String),
    Renamed(String, String),
    Removed(String, Vec<u8>),
}

#[derive(Debug, Default)]
struct Journal {
    operations: usize,
    dead: bool,
    /// Files with content that is not synced.
    dirty: Vec<File>,
    entries: Vec<Unsynced>,
}

#[derive(Debug)]
struct Faults {
    at: usize,
    fault: Fault,
    /// Most bytes that a write takes.
    short: usize,
    journal: Mutex<Journal>,
}

impl Faults {
    fn new(at: usize, fault: Fault) -> Self {
        Self { at, fault, short: usize::MAX, journal: Mutex::default() }
    }

    fn step<T>(&self, operation: impl FnOnce(&mut Journal) -> io::Result<T>) -> io::Result<T> {
        let mut journal = self.journal.lock().unwrap();
        if journal.dead {
            return Err(io::ErrorKind::Other.into());
        }
        let hit = journal.operations == self.at;
        journal.operations += 1;
        match self.fault {
            Fault::Error(number) if hit => Err(io::Error::from_raw_os_error(number)),
            Fault::KillBefore if hit => {
                journal.dead = true;
                Err(io::ErrorKind::Other.into())
            }
            Fault::KillAfter if hit => {
                let _ = operation(&mut journal);
                journal.dead = true;
                Err(io::ErrorKind::Other.into())
            }
            _ => operation(&mut journal),
        }
    }

    /// Takes back what was not synced: content always, and of names and renamings those that `keep` does not
    /// keep, for a file system may write them in any order.
    fn lose_power(&self, path: &Path, keep: impl Fn(usize) -> bool) {
        let journal = self.journal.lock().unwrap();
        journal.dirty.iter().for_each(|file| file.set_len(0).unwrap());
        for (index, entry) in journal.entries.iter().enumerate().rev() {
            if keep(index) {
                continue;
            }
            match entry {
                Unsynced::Created(name) => std::fs::remove_file(path.join(name)).unwrap_or_default(),
                Unsynced::Renamed(from, to) => {
                    std::fs::rename(path.join(to), path.join(from)).unwrap_or_default();
                }
                Unsynced::Removed(name, content) => std::fs::write(path.join(name), content).unwrap(),
            }
        }
    }
}

impl Storage for Faults {
    fn make_dir(&self, path: &Path) -> io::Result<()> {
        self.step(|_| HostStorage.make_dir(path))
    }

    fn open_dir(&self, path: &Path) -> io::Result<File> {
        self.step(|_| HostStorage.open_dir(path))
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        self.step(|_| HostStorage.remove_dir(path))
    }

    fn list(&self, dir: &File) -> io::Result<Vec<OsString>> {
        self.step(|_| HostStorage.list(dir))
    }

    fn create(&self, dir: &File, name: &str) -> io::Result<File> {
        self.step(|journal| {
            let file = HostStorage.create(dir, name)?;
            journal.dirty.push(file.try_clone()?);
            journal.entries.push(Unsynced::Created(name.to_owned()));
            Ok(file)
        })
    }

    fn resize(&self, file: &File, bytes: u64) -> io::Result<()> {
        self.step(|journal| {
            journal.dirty.push(file.try_clone()?);
            HostStorage.resize(file, bytes)
        })
    }

    fn write_at(&self, file: &File, bytes: &[u8], offset: u64) -> io::Result<usize> {
        self.step(|journal| {
            journal.dirty.push(file.try_clone()?);
            HostStorage.write_at(file, &bytes[..bytes.len().min(self.short)], offset)
        })
    }

    fn punch(&self, file: &File, range: Range<u64>) -> io::Result<()> {
        if self.fault == Fault::NoHoles {
            return Err(io::Error::from_raw_os_error(95));
        }
        self.step(|journal| {
            journal.dirty.push(file.try_clone()?);
            HostStorage.punch(file, range)
        })
    }

    fn seal(&self, file: &File) -> io::Result<()> {
        self.step(|_| HostStorage.seal(file))
    }

    /// Believed, not done: the host does not crash here.
    fn sync(&self, file: &File) -> io::Result<()> {
        self.step(|journal| {
            let synced = file.metadata()?;
            if synced.is_dir() {
                journal.entries.clear();
            }
            journal.dirty.retain(|dirty| dirty.metadata().unwrap().ino() != synced.ino());
            Ok(())
        })
    }

    fn rename(&self, dir: &File, from: &str, to: &str) -> io::Result<()> {
        self.step(|journal| {
            journal.entries.push(Unsynced::Renamed(from.to_owned(), to.to_owned()));
            HostStorage.rename(dir, from, to)
        })
    }

    fn remove(&self, dir: &File, name: &str) -> io::Result<()> {
        self.step(|journal| {
            let path = format!("/proc/self/fd/{}/{name}", dir.as_raw_fd());
            journal.entries.push(Unsynced::Removed(name.to_owned(), std::fs::read(path)?));
            HostStorage.remove(dir, name)
        })
    }
}

/// How a snapshot is written.
#[derive(Debug, Clone, Copy)]
enum Form {
    Full,
    Incremental,
    /// Full, in three passes.
    Live,
}

/// A parent and what has changed since.
struct Scene {
    folder: tempfile::TempDir,
    memory: BytesMemory,
    changed: [Vec<Range<u64>>; 2],
}

impl Scene {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut memory = memory(4, &[(0, 1), (2, 2), (5, 3)]);
        write_on(&Faults::new(0, Fault::None), &folder.path().join("parent"), &memory, None, &one()).unwrap();
        let (_, first) = fixture::set(&mut memory, 3, 9);
        let (_, second) = fixture::set(&mut memory, 5, 0);
        Self { folder, memory, changed: [vec![first], vec![second]] }
    }

    fn target(&self) -> PathBuf {
        self.folder.path().join("target")
    }

    fn write(&self, storage: &Faults, form: Form) -> Result<(), WriteError> {
        let increment =
            Increment { parent: Path::new("../parent"), id: None, changed: &self.changed, packed: true };
        match form {
            Form::Full => write_on(storage, &self.target(), &self.memory, None, &one()),
            Form::Incremental => write_on(storage, &self.target(), &self.memory, Some(&increment), &one()),
            Form::Live => self.write_live(storage),
        }
    }

    /// What becomes zero, something else, or something at all comes in later passes.
    fn write_live(&self, storage: &Faults) -> Result<(), WriteError> {
        let mut earlier = self.memory.clone();
        let (_, first) = fixture::set(&mut earlier, 1, 5);
        let (_, second) = fixture::set(&mut earlier, 6, 5);
        let filled = Draft::begin(storage, &self.target())?.memory(&earlier, None, &one())?;
        let (_, third) = fixture::set(&mut earlier, 3, 0);
        let filled = filled.again(&earlier, &[vec![first.clone(), third.clone()], vec![]], &one())?;
        fixture::commit(filled.again(&self.memory, &[vec![first, third], vec![second]], &one())?)
    }

    /// Whether a whole snapshot is there; anything between that and none is a failure.
    fn is_whole(&self, context: &str) -> bool {
        let chain = match Chain::open(&self.target()) {
            Ok(chain) => chain,
            Err(ReadError::NoManifest { .. }) => return false,
            Err(ReadError::Missing { path }) if path == self.target() => return false,
            Err(error) => panic!("{context}: {error}"),
        };
        chain.verify(&one()).unwrap();
        assert!(same(&load(&chain).unwrap(), &self.memory), "{context}");
        assert_eq!(chain.state().unwrap(), state(), "{context}");
        true
    }

    fn retry(&self, was_whole: bool, form: Form, context: &str) {
        match self.write(&Faults::new(0, Fault::None), form) {
            Ok(()) => assert!(!was_whole, "{context}"),
            Err(WriteError::Exists { .. }) => assert!(was_whole, "{context}"),
            Err(error) => panic!("{context}: {error}: {:?}", std::error::Error::source(&error)),
        }
        assert!(self.is_whole(context));
        let _ = std::fs::remove_dir_all(self.target());
    }
}

fn one() -> Work<'static> {
    Work::quiet(std::num::NonZeroUsize::MIN)
}

/// Runs `each` with every operation's number, for each form of a snapshot.
fn at_every_operation(each: impl Fn(&Scene, Form, usize)) {
    let scene = Scene::new();
    for form in [Form::Full, Form::Incremental, Form::Live] {
        let count = Faults::new(0, Fault::None);
        scene.write(&count, form).unwrap();
        std::fs::remove_dir_all(scene.target()).unwrap();
        let operations = count.journal.lock().unwrap().operations;
        assert!(operations >= 30, "{operations} operations");
        (0..operations).for_each(|at| each(&scene, form, at));
    }
}

#[test]
fn an_error_leaves_nothing_behind() {
    // EIO, ENOSPC, EDQUOT.
    for number in [5, 28, 122] {
        at_every_operation(|scene, form, at| {
            let context = format!("error {number} at {at}");
            let error = scene.write(&Faults::new(at, Fault::Error(number)), form).unwrap_err();
            let cause = std::error::Error::source(&error).and_then(|cause| cause.downcast_ref::<io::Error>());
            assert_eq!(cause.and_then(io::Error::raw_os_error), Some(number), "{context}: {error}");
            if at > 0 {
                assert!(!scene.target().exists(), "{context}");
            }
            scene.retry(false, form, &context);
        });
    }
}

#[test]
fn a_kill_leaves_none_or_a_whole_one() {
    for fault in [Fault::KillBefore, Fault::KillAfter] {
        at_every_operation(|scene, form, at| {
            let context = format!("{fault:?} {at}");
            scene.write(&Faults::new(at, fault), form).unwrap_err();
            let whole = scene.is_whole(&context);
            scene.retry(whole, form, &context);
        });
    }
}

#[test]
fn a_power_loss_leaves_none_or_a_whole_one() {
    // Of what was not synced nothing survives, all, every second, or only the last.
    let keeps: [&dyn Fn(usize, usize) -> bool; 5] = [
        &|_, _| false,
        &|_, _| true,
        &|index, _| index % 2 == 0,
        &|index, _| index % 2 == 1,
        &|index, last| index == last,
    ];
    for (number, keep) in keeps.iter().enumerate() {
        at_every_operation(|scene, form, at| {
            let context = format!("power loss {number} after {at}");
            let faults = Faults::new(at, Fault::KillAfter);
            scene.write(&faults, form).unwrap_err();
            let last = faults.journal.lock().unwrap().entries.len().saturating_sub(1);
            faults.lose_power(&scene.target(), |index| keep(index, last));
            let whole = scene.is_whole(&context);
            scene.retry(whole, form, &context);
        });
    }
}

#[test]
fn a_retry_that_is_killed_is_no_worse() {
    let scene = Scene::new();
    let count = Faults::new(0, Fault::None);
    scene.write(&count, Form::Full).unwrap();
    let operations = count.journal.lock().unwrap().operations;
    std::fs::remove_dir_all(scene.target()).unwrap();
    for at in 0..operations + 10 {
        // Most files are there, finished.
        scene.write(&Faults::new(operations - 4, Fault::KillBefore), Form::Full).unwrap_err();
        let context = format!("retry killed at {at}");
        let whole = match scene.write(&Faults::new(at, Fault::KillAfter), Form::Full) {
            Ok(()) | Err(WriteError::Exists { .. }) => true,
            Err(_) => scene.is_whole(&context),
        };
        scene.retry(whole, Form::Full, &context);
    }
}

#[test]
fn a_power_loss_while_leftovers_are_removed_is_no_worse() {
    let scene = Scene::new();
    let count = Faults::new(0, Fault::None);
    scene.write(&count, Form::Full).unwrap();
    let operations = count.journal.lock().unwrap().operations;
    std::fs::remove_dir_all(scene.target()).unwrap();
    for at in 0..operations {
        for keep in [usize::MAX, 0, 1, 2, 3, 4] {
            scene.write(&Faults::new(operations - 4, Fault::KillBefore), Form::Full).unwrap_err();
            let context = format!("power loss after {at} of the retry, all but {keep} lost");
            let retry = Faults::new(at, Fault::KillAfter);
            scene.write(&retry, Form::Full).unwrap_err();
            retry.lose_power(&scene.target(), |index| index == keep);
            let whole = scene.is_whole(&context);
            scene.retry(whole, Form::Full, &context);
        }
    }
}

#[test]
fn a_file_system_without_holes_gets_zeros() {
    let scene = Scene::new();
    scene.write(&Faults::new(0, Fault::NoHoles), Form::Live).unwrap();
    assert!(scene.is_whole("without holes"));
}

#[test]
fn short_writes_are_completed() {
    let scene = Scene::new();
    scene.write(&Faults { short: 100, ..Faults::new(0, Fault::None) }, Form::Full).unwrap();
    assert!(scene.is_whole("short writes"));
}
