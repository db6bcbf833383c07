//! Programs of Debian 13 in the cache: QEMU (of its backports), virtiofsd, busybox, decompressors, mke2fs, mmdebstrap, iasl.
//!
//! They come with every library that they need, the C library included, and run through their own dynamic loader. So they work
//! the same on any x86-64 distribution, and nothing is installed on the machine.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::apt::{self, PrivateApt, Suite};
use crate::cache::Cache;
use crate::error::{Error, Result, describe};
use crate::progress::Step;

/// What is in it. libarchive lets mke2fs read a tar archive.
const PACKAGES: &[&str] = &[
    "acpica-tools",
    "busybox-static",
    "e2fsprogs",
    "libarchive13t64",
    "lz4",
    "mmdebstrap",
    "virtiofsd",
    "xz-utils",
    "zstd",
];
/// Where from, at best: QEMU 10.0 changes the bits of pending interrupts in two threads without a lock, later ones do not.
const QEMU: (&str, Suite) = ("qemu-system-x86", Suite::TrixieBackports);
const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";
const PROGRAM_FOLDERS: &[&str] = &["usr/bin", "usr/sbin", "usr/libexec"];

/// Unpacks `packages` and what they need in `folder`.
fn add(apt: &PrivateApt, packages: &[&str], folder: &Path) -> Result<()> {
    let archives = folder.join("archives");
    let debs = apt.download_closure(packages, &archives)?;
    debs.iter().try_for_each(|deb| apt::extract(deb, folder))?;
    fs::remove_dir_all(&archives).map_err(Error::io("remove", &archives))
}

/// The unpacked programs.
#[derive(Debug, Clone)]
pub struct Toolbox {
    root: PathBuf,
}

impl Toolbox {
    /// Fetches the programs (about 100 MB) unless they are there.
    ///
    /// # Errors
    /// When apt or dpkg fails.
    pub fn open(cache: &Cache) -> Result<Self> {
        let recipe = format!("2 {} {PACKAGES:?} {QEMU:?}", Suite::Trixie.name());
        let root = cache.entry("toolbox", &recipe, |folder| {
            let _step = Step::begin("fetching QEMU and other tools from Debian 13 into the cache");
            add(&PrivateApt::open(cache, Suite::Trixie)?, PACKAGES, folder)?;
            let (qemu, suite) = QEMU;
            let fetched = PrivateApt::open(cache, suite).and_then(|apt| add(&apt, &[qemu], folder));
            fetched.or_else(|error| {
                eprintln!("no QEMU from {}, so an older one: {}", suite.name(), describe(&error));
                add(&PrivateApt::open(cache, Suite::Trixie)?, &[qemu], folder)
            })
        })?;
        Ok(Self { root })
    }

    /// The folder that holds them as a root file system would.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where `program` is.
    ///
    /// # Errors
    /// [`Error::NotFound`] when the toolbox has no such program.
    pub fn path(&self, program: &str) -> Result<PathBuf> {
        PROGRAM_FOLDERS
            .iter()
            .map(|folder| self.root.join(folder).join(program))
            .find(|path| path.exists())
            .ok_or_else(|| Error::not_found(program, "the toolbox"))
    }

    /// A command that runs `program` with its own libraries. It is to be given absolute links only: what it starts itself runs
    /// on the machine's libraries as usual.
    ///
    /// # Errors
    /// [`Error::NotFound`] when the toolbox has no such program.
    pub fn command(&self, program: &str) -> Result<Command> {
        let libraries = self.root.join(LIBRARIES);
        let mut command = Command::new(libraries.join("ld-linux-x86-64.so.2"));
        command.arg("--library-path").arg(&libraries).arg("--argv0").arg(program).arg(self.path(program)?);
        command.env("MKE2FS_CONFIG", self.root.join("etc/mke2fs.conf"));
        command.env("QEMU_MODULE_DIR", libraries.join("qemu"));
        Ok(command)
    }

    /// `qemu-system-x86_64` with the folders of its firmware.
    ///
    /// # Errors
    /// [`Error::NotFound`] when the toolbox has none.
    pub fn qemu(&self) -> Result<Command> {
        let mut command = self.command("qemu-system-x86_64")?;
        for folder in ["usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu"] {
            command.arg("-L").arg(self.root.join(folder));
        }
        Ok(command)
    }
}
