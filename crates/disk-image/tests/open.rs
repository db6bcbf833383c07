//! Opening: what is refused and how, sizes, locks.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use tempfile::TempDir;
use vmm_disk_image::{
    Buffers, EngineError, EngineKind, LockMode, Op, OpenError, OpenOptions, Request, SubmitError, open,
};

/// A folder on the filesystem of the build, which does direct I/O where `/tmp` may not.
fn folder() -> TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

fn image(dir: &TempDir, size: u64) -> PathBuf {
    let path = dir.path().join("disk.raw");
    File::create(&path).unwrap().set_len(size).unwrap();
    path
}

fn reading(path: &Path) -> OpenOptions {
    OpenOptions { read_only: true, ..OpenOptions::raw(path) }
}

/// The error, which must name the path.
fn refused(options: &OpenOptions) -> OpenError {
    let error = open(options).unwrap_err();
    let text = error.to_string();
    assert!(text.contains(options.path.to_str().unwrap()), "{text}");
    error
}

#[test]
fn a_missing_file_is_named() {
    let dir = folder();
    let path = dir.path().join("nowhere.raw");
    assert!(matches!(refused(&OpenOptions::raw(&path)), OpenError::NotFound { .. }));
    assert!(!path.exists());
}

#[test]
fn only_files_and_block_devices_are_disks() {
    let dir = folder();
    let socket = dir.path().join("socket");
    let _listener = UnixListener::bind(&socket).unwrap();
    let fifo = dir.path().join("fifo");
    assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let cases = [
        (dir.path(), "a directory"),
        (Path::new("/dev/null"), "a character device"),
        (&socket, "a socket"),
        (&fifo, "a FIFO"),
    ];
    for (path, expected) in cases {
        for options in [OpenOptions::raw(path), reading(path)] {
            let OpenError::NotADisk { kind, .. } = refused(&options) else { panic!("{path:?}") };
            assert_eq!(kind, expected);
        }
    }
}

#[test]
fn a_file_that_may_only_be_read_is_not_opened_for_writing() {
    // Not in the build's folder, which the thread below may have no way into.
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let path = image(&dir, 4096);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o444)).unwrap();
    std::thread::spawn(move || {
        drop_root();
        let OpenError::Access { access, .. } = refused(&OpenOptions::raw(&path)) else { panic!() };
        assert_eq!(access, "reading and writing");
        assert!(open(&reading(&path)).unwrap().read_only());
    })
    .join()
    .unwrap();
}

/// Makes this thread a nobody to the filesystem, for root may write anything.
fn drop_root() {
    #![expect(unsafe_code, reason = "no safe wrapper of setfsuid")]
    // SAFETY: changes only the filesystem identity of this thread, which ends soon.
    unsafe { libc::setfsuid(65534) };
}

#[test]
fn empty_and_odd_sizes_are_refused() {
    let dir = folder();
    assert!(matches!(refused(&OpenOptions::raw(image(&dir, 0))), OpenError::Empty { .. }));
    for size in [1, 511, 513, (1 << 20) + 100] {
        let error = refused(&OpenOptions::raw(image(&dir, size)));
        assert!(error.to_string().contains("odd size"), "{error}");
        assert!(matches!(error, OpenError::OddSize { unit: 512, size: found, .. } if found == size));
    }
    assert_eq!(open(&OpenOptions::raw(image(&dir, 512))).unwrap().size(), 512);
}

#[test]
fn a_filesystem_without_direct_io_is_named() {
    let dir = folder();
    let path = image(&dir, 4096);
    let direct = |path: &Path| open(&OpenOptions { direct: true, ..reading(path) });
    assert!(direct(&path).is_ok());
    // procfs has regular files and no O_DIRECT.
    assert!(matches!(direct(Path::new("/proc/self/status")), Err(OpenError::NoDirect { .. })));
}

#[test]
fn writers_lock_alone_and_readers_together() {
    let dir = folder();
    let path = image(&dir, 4096);
    let writer = open(&OpenOptions::raw(&path)).unwrap();
    for options in [OpenOptions::raw(&path), reading(&path)] {
        for lock in [LockMode::ByteRange, LockMode::Full] {
            let error = refused(&OpenOptions { lock, ..options.clone() });
            assert!(matches!(error, OpenError::Locked { .. }), "{error}");
            assert!(error.to_string().contains("another process"), "{error}");
        }
    }
    assert!(open(&OpenOptions { lock: LockMode::Off, ..OpenOptions::raw(&path) }).is_ok());
    drop(writer);

    let first = open(&reading(&path)).unwrap();
    let second = open(&reading(&path)).unwrap();
    assert!(matches!(refused(&OpenOptions::raw(&path)), OpenError::Locked { .. }));
    drop((first, second));
    assert!(open(&OpenOptions::raw(&path)).is_ok());
}

#[test]
fn a_lock_can_be_handed_over_and_taken_back() {
    let dir = folder();
    let path = image(&dir, 4096);
    for lock in [LockMode::ByteRange, LockMode::Full] {
        let options = OpenOptions { lock, ..OpenOptions::raw(&path) };
        let source = open(&options).unwrap();
        source.reacquire_lock().unwrap();
        source.release_lock().unwrap();
        source.check_lock().unwrap();
        let destination = open(&options).unwrap();
        assert_eq!(source.check_lock().unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
        destination.check_lock().unwrap();
        assert_eq!(source.reacquire_lock().unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
        drop(destination);
        source.reacquire_lock().unwrap();
        assert!(matches!(refused(&options), OpenError::Locked { .. }));
    }
}

#[test]
fn a_disk_and_its_engines_let_go_of_the_lock_at_once() {
    let dir = folder();
    let path = image(&dir, 1 << 20);
    for _ in 0..50 {
        let disk = open(&OpenOptions::raw(&path)).unwrap();
        let mut engine = disk.engine(EngineKind::Auto, 8).unwrap();
        drop(disk);
        let buffers = Buffers::zeroed(4096).unwrap();
        engine.submit(Request { token: 0, op: Op::Write { offset: 0, buffers } }).unwrap();
        engine.kick().unwrap();
        assert!(matches!(refused(&OpenOptions::raw(&path)), OpenError::Locked { .. }));
        drop(engine);
    }
}

#[test]
fn a_raw_disk_stays_raw_whatever_its_first_bytes_say() {
    let dir = folder();
    let path = image(&dir, 1 << 20);
    // A qcow2 header that names a backing file.
    fs::OpenOptions::new()
        .write(true)
        .open(&path)
        .unwrap()
        .write_all(b"QFI\xfb\0\0\0\x03/etc/passwd")
        .unwrap();
    let disk = open(&OpenOptions::raw(&path)).unwrap();
    assert_eq!(disk.size(), 1 << 20);
    let mut engine = disk.engine(EngineKind::Sync, 1).unwrap();
    let op = Op::Read { offset: 0, buffers: Buffers::zeroed(8).unwrap() };
    engine.submit(Request { token: 0, op }).unwrap();
    let mut done = Vec::new();
    engine.reap(&mut done).unwrap();
    let buffers = done.remove(0).buffers.unwrap();
    assert_eq!(buffers.as_slice().unwrap(), b"QFI\xfb\0\0\0\x03");
}

#[test]
fn a_read_only_disk_takes_no_writes() {
    let dir = folder();
    let path = image(&dir, 4096);
    let disk = open(&reading(&path)).unwrap();
    assert!(disk.read_only());
    assert!(!disk.supports_discard());
    for kind in [EngineKind::Sync, EngineKind::Auto] {
        let mut engine = disk.engine(kind, 4).unwrap();
        let writes = [
            Op::Write { offset: 0, buffers: Buffers::zeroed(512).unwrap() },
            Op::Discard { offset: 0, len: 512 },
            Op::WriteZeroes { offset: 0, len: 512, may_unmap: false },
        ];
        for op in writes {
            let rejected = engine.submit(Request { token: 0, op }).unwrap_err();
            assert_eq!(rejected.reason, SubmitError::ReadOnly);
        }
        engine.submit(Request { token: 0, op: Op::Flush }).unwrap();
    }
}

#[test]
fn an_engine_has_a_sensible_depth() {
    let dir = folder();
    let disk = open(&OpenOptions::raw(image(&dir, 4096))).unwrap();
    for depth in [0, 32769, u16::MAX] {
        let error = disk.engine(EngineKind::Sync, depth).unwrap_err();
        assert!(matches!(error, EngineError::Depth(found) if found == depth));
    }
    assert_eq!(disk.engine(EngineKind::Sync, 1).unwrap().kind(), EngineKind::Sync);
}

#[test]
fn an_open_image_waits_for_its_storage() {
    // It is opened without waiting, for what may not be an image, but must not stay so.
    let dir = folder();
    let path = image(&dir, 4096);
    let _disk = open(&OpenOptions::raw(&path)).unwrap();
    let path = fs::canonicalize(path).unwrap();
    let fd = fs::read_dir("/proc/self/fd")
        .unwrap()
        .map(|entry| entry.unwrap())
        .find(|entry| fs::read_link(entry.path()).is_ok_and(|target| target == path))
        .unwrap()
        .file_name();
    let info = fs::read_to_string(Path::new("/proc/self/fdinfo").join(fd)).unwrap();
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap();
    let flags = i32::from_str_radix(flags.trim(), 8).unwrap();
    assert_eq!(flags & libc::O_NONBLOCK, 0);
}

#[test]
fn the_topology_is_one_a_guest_can_use() {
    let dir = folder();
    let path = image(&dir, 1 << 20);
    for direct in [false, true] {
        let topology = open(&OpenOptions { direct, ..OpenOptions::raw(&path) }).unwrap().topology();
        assert!(topology.logical_block >= 512 && topology.logical_block.is_power_of_two());
        assert!(topology.physical_block >= topology.logical_block);
        assert!(topology.physical_block.is_multiple_of(topology.logical_block));
        assert!(topology.discard_granularity >= 512);
    }
}
