//! The VMM under test as a process: start it, read what it prints, talk to its API, see how it ends.
//!
//! A failed expectation is a panic that carries the end of what the process printed: this is for tests.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

mod api;
pub mod counting;
pub mod linux;
pub mod migrating;
mod output;
mod pending;
pub mod places;
mod requests;
pub mod saving;
pub mod terminal;
pub mod user;
mod vmm;
pub mod withheld;

use std::cell::Cell;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

pub use api::{Answer, Api};
pub use output::{Output, SerialFile};
pub use pending::Pending;
pub use requests::{Requests, UNBOOTABLE};
pub use vmm::{Holdings, Vmm, resident_kib};

use crate::tiny::Guest;

/// How long anything may take before a test fails. Far more than needed: only failures wait for it.
pub const LIMIT: Duration = Duration::from_secs(60);

const POLL: Duration = Duration::from_millis(5);

/// The answer has this status, and says so.
///
/// # Panics
/// When it has not, or does not.
pub fn refused(answer: &Answer, status: u16, words: &str) {
    assert_eq!(answer.status, status, "{answer:?}");
    assert!(answer.body.contains(words), "{answer:?} does not say {words:?}");
}

thread_local! {
    /// How many binaries this test has asked for.
    static ASKED: Cell<usize> = const { Cell::new(0) };
}

/// The `vmm` binary: `$VMM_BIN`, else the one that cargo built into the same target folder as this program. Of several
/// that `$VMM_BIN` names, separated by colons, each test takes one after the other.
///
/// # Panics
/// When it is not there; where it should have been built, with the command that makes it.
#[must_use]
pub fn binary() -> PathBuf {
    if let Some(paths) = std::env::var_os("VMM_BIN") {
        let paths: Vec<PathBuf> = std::env::split_paths(&paths).collect();
        let turn = ASKED.replace(ASKED.get() + 1);
        let path = paths.iter().cycle().nth(turn).cloned().unwrap_or_default();
        assert!(path.is_file(), "VMM_BIN names {}, which is not there", path.display());
        return path;
    }
    let program = std::env::current_exe().expect("the path of this program");
    // target/debug/deps/tiny-0123 or target/debug/examples/x
    let folder = program.ancestors().nth(2).expect("a program in a target folder");
    let path = folder.join("vmm");
    assert!(path.is_file(), "no VMM to test at {}: run `cargo build -p vmm`", path.display());
    path
}

/// A folder for the files of one test, removed at its end.
#[derive(Debug)]
pub struct Scratch {
    folder: tempfile::TempDir,
}

impl Scratch {
    /// A new one.
    ///
    /// # Panics
    /// When it cannot be made.
    #[must_use]
    #[expect(clippy::new_without_default, reason = "it makes a folder")]
    pub fn new() -> Self {
        let folder = tempfile::Builder::new().prefix("vmm-test-").tempdir().expect("a folder for the test");
        Self { folder }
    }

    /// The path of `name` in it.
    pub fn path(&self, name: impl AsRef<OsStr>) -> PathBuf {
        self.folder.path().join(name.as_ref())
    }

    /// The folder itself.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Writes a file.
    ///
    /// # Panics
    /// When it cannot be written.
    pub fn write(&self, name: impl AsRef<OsStr>, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, content).expect("a file of the test");
        path
    }

    /// The kernel file of a tiny guest.
    ///
    /// # Panics
    /// When it cannot be written.
    #[must_use]
    pub fn guest(&self, guest: Guest) -> PathBuf {
        guest.write(self.folder()).expect("a guest's file")
    }

    /// A sparse file of `size` bytes.
    ///
    /// # Panics
    /// When it cannot be made.
    #[must_use]
    pub fn disk(&self, name: &str, size: u64) -> PathBuf {
        let path = self.path(name);
        let file = fs::File::create(&path).expect("a disk's file");
        file.set_len(size).expect("a disk's size");
        path
    }
}

/// A VM as `vm.create` takes it: 32 MiB, one vCPU, the kernel, its serial port to the file `serial`.
#[must_use]
pub fn vm_config(kernel: &Path, serial: &Path) -> Value {
    json!({
        "cpus": { "boot_vcpus": 1, "max_vcpus": 1 },
        "memory": { "size": 32 << 20 },
        "payload": { "kernel": kernel },
        "serial": { "mode": "File", "file": serial },
        "console": { "mode": "Off" },
    })
}

/// The same by the command line, without `--cpus`.
#[must_use]
pub fn vm_arguments(kernel: &Path, serial: &str) -> Vec<String> {
    let kernel = kernel.display().to_string();
    ["--kernel", &kernel, "--memory", "size=32M", "--serial", serial, "--console", "off"]
        .map(str::to_owned)
        .to_vec()
}

/// Waits until `condition` gives something.
///
/// # Panics
/// When that takes longer than `limit`, with what `about` says.
pub fn wait_until<T>(
    limit: Duration,
    mut condition: impl FnMut() -> Option<T>,
    about: impl FnOnce() -> String,
) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(start.elapsed() < limit, "waited {} s for {}", limit.as_secs(), about());
        std::thread::sleep(POLL);
    }
}
