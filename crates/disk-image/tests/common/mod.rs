//! Disks and engines to test on.

pub(crate) mod model;

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::OnceLock;

use tempfile::TempDir;
use vmm_disk_image::{Buffers, Completion, Disk, Engine, EngineKind, Op, OpenOptions, Request, open};

/// Depth of the engine of a bench.
pub(crate) const DEPTH: u16 = 32;
/// Size of the disk of a bench in bytes.
pub(crate) const SIZE: u64 = 8 << 20;

/// One combination to test.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Setup {
    pub(crate) kind: EngineKind,
    pub(crate) direct: bool,
    medium: Medium,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Medium {
    File,
    /// A loop device with this sector size in bytes.
    Loop(u32),
}

impl Setup {
    pub(crate) fn all() -> Vec<Self> {
        let mut all = Vec::new();
        for kind in [EngineKind::Sync, EngineKind::IoUring] {
            for medium in [Medium::File, Medium::Loop(512), Medium::Loop(4096)] {
                for direct in [false, true] {
                    all.push(Self { kind, direct, medium });
                }
            }
        }
        all
    }

    pub(crate) fn is_file(&self) -> bool {
        self.medium == Medium::File
    }

    /// What this machine lacks for the setup.
    pub(crate) fn missing(&self) -> Option<&'static str> {
        static URING: OnceLock<bool> = OnceLock::new();
        static LOOP: OnceLock<bool> = OnceLock::new();
        let uring = || {
            let dir = folder();
            let path = dir.path().join("probe");
            File::create(&path).unwrap().set_len(4096).unwrap();
            open(&OpenOptions::raw(&path)).unwrap().engine(EngineKind::IoUring, 1).is_ok()
        };
        let loops = || {
            let dir = folder();
            let path = dir.path().join("probe");
            File::create(&path).unwrap().set_len(1 << 20).unwrap();
            LoopDevice::attach(&path, 512).is_ok()
        };
        if self.kind == EngineKind::IoUring && !*URING.get_or_init(uring) {
            Some("no io_uring")
        } else if !self.is_file() && !*LOOP.get_or_init(loops) {
            Some("no loop device")
        } else {
            None
        }
    }
}

impl fmt::Display for Setup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cache = if self.direct { "direct" } else { "buffered" };
        match self.medium {
            Medium::File => write!(f, "{}::{cache}::file", self.kind),
            Medium::Loop(sector) => write!(f, "{}::{cache}::loop{sector}", self.kind),
        }
    }
}

/// An engine on a fresh disk.
pub(crate) struct Bench {
    // In the order in which they must go.
    pub(crate) engine: Box<dyn Engine>,
    pub(crate) disk: Arc<dyn Disk>,
    path: PathBuf,
    _device: Option<LoopDevice>,
    _dir: TempDir,
}

impl Bench {
    pub(crate) fn new(setup: &Setup) -> Self {
        Self::with_size(setup, SIZE)
    }

    pub(crate) fn with_size(setup: &Setup, size: u64) -> Self {
        let dir = folder();
        let path = dir.path().join("disk.raw");
        File::create(&path).unwrap().set_len(size).unwrap();
        let device = match setup.medium {
            Medium::File => None,
            Medium::Loop(sector) => Some(LoopDevice::attach(&path, sector).unwrap()),
        };
        let opened = device.as_ref().map_or(path.clone(), |device| device.0.clone());
        let disk = open(&OpenOptions { direct: setup.direct, ..OpenOptions::raw(opened) }).unwrap();
        assert_eq!(disk.size(), size);
        if let Medium::Loop(sector) = setup.medium {
            assert_eq!(disk.topology().logical_block, sector);
        }
        let engine = disk.engine(setup.kind, DEPTH).unwrap();
        assert_eq!(engine.kind(), setup.kind);
        Self { engine, disk, path, _device: device, _dir: dir }
    }

    /// The file, also that behind a loop device.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Carries out one operation.
    pub(crate) fn run(&mut self, op: Op) -> io::Result<Completion> {
        self.engine.submit(Request { token: 1, op }).unwrap();
        let mut completion = self.finish().remove(0);
        assert_eq!(completion.token, 1);
        std::mem::replace(&mut completion.result, Ok(0))?;
        Ok(completion)
    }

    pub(crate) fn write(&mut self, offset: u64, buffers: Buffers) -> io::Result<()> {
        self.run(Op::Write { offset, buffers }).map(drop)
    }

    pub(crate) fn flush(&mut self) {
        self.run(Op::Flush).unwrap();
    }

    pub(crate) fn read(&mut self, offset: u64, len: usize) -> Vec<u8> {
        self.read_chunked(offset, len, usize::MAX)
    }

    pub(crate) fn read_chunked(&mut self, offset: u64, len: usize, chunk: usize) -> Vec<u8> {
        // Not zero, so that bytes which the engine leaves out are seen.
        let buffers = Buffers::from_slice(&vec![0xa5; len]).unwrap().chunked(chunk);
        let completion = self.run(Op::Read { offset, buffers }).unwrap();
        completion.buffers.unwrap().as_slice().unwrap().to_vec()
    }

    /// Waits for everything in flight.
    pub(crate) fn finish(&mut self) -> Vec<Completion> {
        wait(&mut *self.engine)
    }
}

/// Kicks an engine and waits for everything in flight, as a device would: by the completion descriptor.
pub(crate) fn wait(engine: &mut dyn Engine) -> Vec<Completion> {
    engine.kick().unwrap();
    let mut done = Vec::new();
    while engine.in_flight() > 0 {
        assert!(readable(engine.completion_fd(), 10_000), "no completion: {engine:?}");
        engine.reap(&mut done).unwrap();
    }
    done
}

/// Whether a descriptor is or becomes readable within some milliseconds.
pub(crate) fn readable(fd: BorrowedFd<'_>, milliseconds: i32) -> bool {
    #![expect(unsafe_code, reason = "no safe wrapper of poll")]
    let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    loop {
        // SAFETY: one pollfd, as said.
        let ready = unsafe { libc::poll(&raw mut poll, 1, milliseconds) };
        if ready >= 0 {
            return ready == 1;
        }
        assert_eq!(io::Error::last_os_error().kind(), io::ErrorKind::Interrupted);
    }
}

/// Bytes that differ from place to place and from seed to seed.
pub(crate) fn fill(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = vec![0; len];
    for word in bytes.chunks_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        word.copy_from_slice(&state.to_le_bytes()[..word.len()]);
    }
    bytes
}

/// A folder on the filesystem of the build, which does direct I/O where `/tmp` may not.
fn folder() -> TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// A block device made of a file, gone with this value.
struct LoopDevice(PathBuf);

impl LoopDevice {
    fn attach(file: &Path, sector: u32) -> io::Result<Self> {
        let sector = sector.to_string();
        let output = Command::new("losetup")
            .args(["--find", "--show", "--sector-size", &sector])
            .arg(file)
            .output()?;
        if !output.status.success() {
            return Err(io::Error::other(String::from_utf8_lossy(&output.stderr).into_owned()));
        }
        Ok(Self(PathBuf::from(String::from_utf8_lossy(&output.stdout).trim())))
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        // No panic: it may be one that brings us here.
        let detached = Command::new("losetup").arg("--detach").arg(&self.0).status();
        if !detached.is_ok_and(|status| status.success()) {
            eprintln!("cannot detach {:?}", self.0);
        }
    }
}
