//! Linux guests: what they boot from, and what they say.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::{Value, json};

use super::{SerialFile, Vmm, wait_until};
use crate::cache::Cache;
use crate::error::Result;
use crate::image::{initramfs, rootfs};
use crate::kernels::{Kernel, KernelVersion};
use crate::report::Report;
use crate::toolbox::Toolbox;

/// Kernels, initramfs and root file system, from the cache.
#[derive(Debug)]
pub struct Images {
    kernels: Vec<(Kernel, PathBuf)>,
    rootfs: PathBuf,
}

impl Images {
    /// Fetches and builds what is not there yet.
    ///
    /// # Errors
    /// Those of fetching.
    pub fn get(cache: &Cache) -> Result<Self> {
        let tools = Toolbox::open(cache)?;
        let kernel = |version| {
            let kernel = Kernel::get(cache, &tools, version)?;
            let initramfs = initramfs::guest(cache, &tools, &kernel)?;
            Ok((kernel, initramfs))
        };
        let kernels = KernelVersion::ALL.into_iter().map(kernel).collect::<Result<_>>()?;
        Ok(Self { kernels, rootfs: rootfs::image(cache, &tools)? })
    }

    /// A kernel and the initramfs that goes with it.
    ///
    /// # Panics
    /// Never: every version is there.
    #[must_use]
    pub fn kernel(&self, version: KernelVersion) -> (&Kernel, &Path) {
        let found = self.kernels.iter().find(|(kernel, _)| kernel.version == version);
        let (kernel, initramfs) = found.expect("every version");
        (kernel, initramfs)
    }

    /// Debian 13 on ext4; not to be written.
    #[must_use]
    pub fn rootfs(&self) -> &Path {
        &self.rootfs
    }
}

/// A Linux guest to be booted.
#[derive(Debug, Clone)]
pub struct LinuxGuest {
    /// The kernel file.
    pub kernel: PathBuf,
    /// Its initramfs.
    pub initramfs: PathBuf,
    /// Its command line.
    pub cmdline: String,
    /// vCPUs.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Raw disks.
    pub disks: Vec<PathBuf>,
}

impl LinuxGuest {
    /// The arguments of the VMM, with the guest's serial port in the file `serial`.
    #[must_use]
    pub fn arguments(&self, serial: &Path) -> Vec<String> {
        let mut words = vec![
            format!("--kernel={}", self.kernel.display()),
            format!("--initramfs={}", self.initramfs.display()),
            format!("--cmdline={}", self.cmdline),
            format!("--cpus=boot={}", self.cpus),
            format!("--memory=size={}M", self.memory_mib),
            format!("--serial=file={}", serial.display()),
            "--console=off".to_owned(),
        ];
        words.extend(self.disks.iter().map(|path| format!("--disk=path={},image_type=raw", path.display())));
        words
    }

    /// The same as a document for `vm.create`.
    #[must_use]
    pub fn document(&self, serial: &Path) -> Value {
        let disk = |path: &PathBuf| json!({ "path": path, "image_type": "Raw" });
        json!({
            "payload": { "kernel": self.kernel, "initramfs": self.initramfs, "cmdline": self.cmdline },
            "cpus": { "boot_vcpus": self.cpus, "max_vcpus": self.cpus },
            "memory": { "size": self.memory_mib << 20 },
            "disks": self.disks.iter().map(disk).collect::<Vec<_>>(),
            "serial": { "mode": "File", "file": serial },
            "console": { "mode": "Off" },
        })
    }
}

/// Whether the test that has just failed had a guest that crashed: its kernel panicked, or took a triple fault.
static CRASHED: AtomicBool = AtomicBool::new(false);

/// Notes what a process or console said, when its test has failed.
pub(super) fn note_crash(text: &str) {
    if text.contains("Kernel panic") || text.contains("triple fault") {
        CRASHED.store(true, Ordering::SeqCst);
    }
}

/// Whether a guest of the test that has just failed had crashed; asking forgets it.
#[must_use]
pub fn take_crash() -> bool {
    CRASHED.swap(false, Ordering::SeqCst)
}

/// The console of a running guest. When the test fails it shows its end.
#[derive(Debug)]
pub struct Console {
    serial: SerialFile,
}

impl Console {
    /// The console in the file at `path`.
    #[must_use]
    pub fn new(path: PathBuf) -> Self {
        Self { serial: SerialFile::new(path) }
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.serial.path()
    }

    /// What the guest told so far, in whole lines.
    #[must_use]
    pub fn report(&self) -> Report {
        let text = self.serial.text();
        Report::parse(text.rsplit_once('\n').map_or("", |(lines, _)| lines))
    }

    /// Every value that the guest told for `name`, in order.
    #[must_use]
    pub fn facts(&self, name: &str) -> Vec<String> {
        self.report().all(name).map(str::to_owned).collect()
    }

    /// The only value that it told for `name`.
    ///
    /// # Panics
    /// When there is none, or more than one.
    #[must_use]
    pub fn fact(&self, name: &str) -> String {
        let facts = self.facts(name);
        let [fact] = facts.as_slice() else { panic!("{name}: one value is expected, found {facts:?}") };
        fact.clone()
    }

    /// Waits until the guest says `VMM-TEST: name=value`.
    ///
    /// # Panics
    /// When it does not within `limit`, or its kernel panics, or the VMM ends.
    pub fn wait_for(&self, vmm: &mut Vmm, limit: Duration, name: &str, value: &str) {
        let said = || {
            let found = self.facts(name).iter().any(|fact| fact == value);
            assert!(found || vmm.is_running(), "the VMM ended before the guest said {name}={value}");
            self.check_alive();
            found.then_some(())
        };
        wait_until(limit, said, || format!("the guest to say {name}={value}"));
    }

    /// Waits until the VMM ends with status 0.
    ///
    /// # Panics
    /// When it does not within `limit`, or the guest's kernel panics, or the status is another.
    pub fn wait_for_power_off(&self, vmm: &mut Vmm, limit: Duration) {
        let off = || {
            self.check_alive();
            (!vmm.is_running()).then_some(())
        };
        wait_until(limit, off, || "the guest to power off".to_owned());
        vmm.expect_exit(0);
    }

    /// Checks that the guest's kernel goes on.
    ///
    /// # Panics
    /// When it does not.
    pub fn check_alive(&self) {
        assert!(!self.serial.text().contains("Kernel panic"), "the guest's kernel panicked");
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        if std::thread::panicking() {
            note_crash(&self.serial.text());
            eprintln!("the guest's console ends with:\n{}", self.serial.tail());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crash_is_noted_once() {
        note_crash("vmm: 8.9s: <vmm> ERROR:vmm::vmm -- the guest powers off");
        assert!(!take_crash());
        note_crash("vmm: 8.9s: <vmm> ERROR:vmm::vmm -- vcpu0: triple fault");
        assert!(take_crash() && !take_crash());
        note_crash("[    3.6] Kernel panic - not syncing");
        assert!(take_crash());
    }
}
