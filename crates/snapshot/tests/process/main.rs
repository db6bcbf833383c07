//! A writer that is a process of its own: killed at each of its system calls on files, on full disks, under limits.
//!
//! Nothing is skipped: where a machine does not let a process be traced, or mounts be made, the test fails and says so.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]

use std::error::Error;
use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use fixture::{load, memory, same, set, state, write_on};
use libtest_mimic::{Arguments, Trial};
use vmm_snapshot::directory::{
    BytesMemory, Chain, Draft, HostStorage, Increment, ReadError, Work, WriteError,
};

#[path = "../fixture/mod.rs"]
mod fixture;
mod sys;

/// The first argument of a process that is a writer, or prepares for it first.
const WRITER: &str = "writer";
const FULL_DISK: &str = "full-disk";
const SMALL_FILES: &str = "small-files";

/// Status of a process whose machine does not allow what it needs.
const NOT_ALLOWED: i32 = 3;

const FILES: [&str; 5] = ["chunks.bin", "manifest.json", "memory-0.bin", "memory-1.bin", "state.cbor"];

fn main() -> std::process::ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let code = match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [WRITER, form, folder] => writer(form, Path::new(folder)),
        [FULL_DISK, folder] => full_disk(folder),
        [SMALL_FILES, bytes, is_error, folder] => small_files(bytes, is_error, Path::new(folder)),
        _ => {
            let kill = |form: &'static str| {
                Trial::test(format!("killed_at_every_call_{form}"), move || killed_at_every_call(form))
            };
            let trials = FORMS.map(kill).into_iter().chain([
                Trial::test("a_full_disk_leaves_nothing_behind", || expect_success(&[FULL_DISK])),
                Trial::test("a_limit_of_file_sizes_is_an_error", || files_are_limited(true)),
                Trial::test("a_limit_of_file_sizes_may_end_the_writer", || files_are_limited(false)),
            ]);
            return libtest_mimic::run(&Arguments::from_args(), trials.collect()).exit_code();
        }
    };
    u8::try_from(code).unwrap_or(1).into()
}

/// How a snapshot is written. `retry`: full, where a killed writer left files.
const FORMS: [&str; 4] = ["full", "incremental", "live", "retry"];

/// Memory at the end, and what changed since the parent.
fn scene() -> (BytesMemory, BytesMemory, [Vec<Range<u64>>; 2]) {
    let before = memory(600, &[(0, 1), (1, 1), (520, 2), (599, 3), (600, 4), (1100, 5)]);
    let (mut after, mut changed) = (before.clone(), [Vec::new(), Vec::new()]);
    for (page, byte) in [(1, 0), (550, 9), (602, 7)] {
        let (region, range) = set(&mut after, page, byte);
        changed[region].push(range);
    }
    (before, after, changed)
}

fn two() -> Work<'static> {
    Work::quiet(NonZeroUsize::MIN.saturating_add(1))
}

fn target(folder: &Path) -> PathBuf {
    folder.join("target")
}

fn write(form: &str, folder: &Path) -> Result<(), WriteError> {
    let ((before, after, changed), target) = (scene(), target(folder));
    let increment = Increment { parent: Path::new("../parent"), id: None, changed: &changed, packed: true };
    match form {
        "incremental" => write_on(&HostStorage, &target, &after, Some(&increment), &two()),
        "live" => {
            let filled = Draft::begin(&HostStorage, &target)?.memory(&before, None, &two())?;
            fixture::commit(filled.again(&after, &changed, &two())?)
        }
        _ => write_on(&HostStorage, &target, &after, None, &two()),
    }
}

fn writer(form: &str, folder: &Path) -> i32 {
    // From here on calls are counted.
    let _ = std::os::unix::process::parent_id();
    i32::from(write(form, folder).is_err())
}

/// Whether a whole snapshot is there; anything between that and none is a failure.
fn is_whole(folder: &Path, context: &str) -> bool {
    let path = target(folder);
    let chain = match Chain::open(&path) {
        Ok(chain) => chain,
        Err(ReadError::NoManifest { .. }) => return false,
        Err(ReadError::Missing { path: missing }) if missing == path => return false,
        Err(error) => panic!("{context}: {error}"),
    };
    chain.verify(&two()).unwrap();
    assert!(same(&load(&chain).unwrap(), &scene().1), "{context}");
    assert_eq!(chain.state().unwrap(), state(), "{context}");
    true
}

fn counted(call: u64) -> bool {
    let calls = [
        libc::SYS_open,
        libc::SYS_openat,
        libc::SYS_mkdir,
        libc::SYS_mkdirat,
        libc::SYS_rmdir,
        libc::SYS_flock,
        libc::SYS_getdents64,
        libc::SYS_ftruncate,
        libc::SYS_fallocate,
        libc::SYS_write,
        libc::SYS_pwrite64,
        libc::SYS_pread64,
        libc::SYS_fchmod,
        libc::SYS_fsync,
        libc::SYS_fdatasync,
        libc::SYS_rename,
        libc::SYS_renameat,
        libc::SYS_renameat2,
        libc::SYS_unlink,
        libc::SYS_unlinkat,
    ];
    calls.iter().any(|known| *known as u64 == call)
}

fn killed_at_every_call(form: &str) -> Result<(), libtest_mimic::Failed> {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    write_on(&HostStorage, &folder.join("parent"), &scene().0, None, &two())?;
    let mut points = 0;
    loop {
        if form == "retry" {
            leftovers(&target(folder));
        }
        let mut command = Command::new(std::env::current_exe()?);
        command.args([WRITER, form]).arg(folder);
        let run = sys::kill_at(&mut command, points, counted)
            .map_err(|error| format!("this machine does not let a process be traced: {error}"))?;
        let context = format!("{form}, killed at call {points}, after {:?}", run.calls);
        let whole = is_whole(folder, &context);
        if !run.killed() {
            assert_eq!((run.code(), whole), (Some(0), true), "{context}");
            break;
        }
        match write(if form == "retry" { "full" } else { form }, folder) {
            Ok(()) => assert!(!whole, "{context}"),
            Err(WriteError::Exists { .. }) => assert!(whole, "{context}"),
            Err(error) => panic!("{context}: {error}: {:?}", error.source()),
        }
        assert!(is_whole(folder, &context));
        let mut names: Vec<_> = std::fs::read_dir(target(folder))?
            .map(|entry| entry.map(|entry| entry.file_name()))
            .collect::<io::Result<_>>()?;
        names.sort();
        assert_eq!(names, FILES, "{context}");
        std::fs::remove_dir_all(target(folder))?;
        points += 1;
    }
    println!("{form}: killed at {points} calls");
    assert!(points >= 30, "{form}: only {points} calls");
    Ok(())
}

/// What a writer leaves that is killed when most is done.
fn leftovers(path: &Path) {
    std::fs::create_dir(path).unwrap();
    for name in ["manifest.json.partial", "memory-0.bin", "memory-1.bin.partial", "state.cbor"] {
        std::fs::write(path.join(name), "left").unwrap();
    }
}

/// Runs this program with `words` and a folder with a parent in it.
fn expect_success(words: &[&str]) -> Result<(), libtest_mimic::Failed> {
    let folder = tempfile::tempdir()?;
    let status = Command::new(std::env::current_exe()?).args(words).arg(folder.path()).status()?;
    match status.code() {
        Some(0) => Ok(()),
        Some(NOT_ALLOWED) => Err("this machine does not let file systems be mounted".into()),
        _ => Err(format!("{status}").into()),
    }
}

/// The error number that ended a writer.
fn number(error: &WriteError) -> Option<i32> {
    error.source().and_then(|cause| cause.downcast_ref::<io::Error>()).and_then(io::Error::raw_os_error)
}

/// Writes to file systems that are larger by a page each, until one is large enough.
fn full_disk(folder: &str) -> i32 {
    if let Err(error) = sys::own_mounts().and_then(|()| sys::mount_memory(folder, 4096)) {
        eprintln!("cannot mount: {error}");
        return NOT_ALLOWED;
    }
    let path = Path::new(folder);
    for (form, least) in [("full", 12), ("live", 12)] {
        let mut refused = 0;
        for pages in 1.. {
            sys::unmount(folder).unwrap();
            sys::mount_memory(folder, pages * 4096).unwrap();
            match write(form, path) {
                Ok(()) => break,
                Err(error) => {
                    assert_eq!(number(&error), Some(libc::ENOSPC), "{form}, {pages} pages: {error}");
                    assert!(!target(path).exists(), "{form}, {pages} pages");
                    refused += 1;
                }
            }
        }
        assert!(is_whole(path, form));
        // The pages that are not zero, and three files more.
        assert!(refused >= least - 4, "{form}: {refused} disks were too small");
    }
    0
}

fn files_are_limited(is_error: bool) -> Result<(), libtest_mimic::Failed> {
    // Memory files get their length at once.
    for bytes in ["0", "1000000"] {
        let folder = tempfile::tempdir()?;
        let mut command = Command::new(std::env::current_exe()?);
        command.args([SMALL_FILES, bytes, &is_error.to_string()]).arg(folder.path());
        let status = command.stdout(Stdio::null()).status()?;
        let context = format!("{bytes} bytes: {status}");
        if is_error {
            assert!(status.success(), "{context}");
            assert!(!target(folder.path()).exists(), "{context}");
        } else {
            assert_eq!(status.signal(), Some(libc::SIGXFSZ), "{context}");
            assert!(!is_whole(folder.path(), &context));
        }
        write("full", folder.path())?;
        assert!(is_whole(folder.path(), &context));
    }
    Ok(())
}

fn small_files(bytes: &str, is_error: &str, folder: &Path) -> i32 {
    sys::limit_files(bytes.parse().unwrap(), is_error == "true").unwrap();
    let error = write("full", folder).unwrap_err();
    assert_eq!(number(&error), Some(libc::EFBIG), "{error}");
    0
}
