//! Which paths a VM needs, from its configuration.

use std::path::{Path, PathBuf};

use vmm_api::spec::{Backing, Hugepages, MachineSpec, PathAccess, PayloadSpec, Sink};
use vmm_memory_manager::userfault;

use crate::migration::LOAD;

/// Standard output, where consoles that are a terminal write to.
pub(super) const STANDARD_OUTPUT: &str = "/proc/self/fd/1";

/// A path, and what it is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PathRule {
    /// File or folder. A folder stands for all that is in it.
    pub path: PathBuf,
    /// What it is for.
    pub usage: Usage,
}

/// What a path is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Usage {
    /// A file that is read.
    Read,
    /// The same, but not now: a VM that has its memory already reads what it booted from when it boots again. It need not be there.
    ReadLater,
    /// A disk's image or block device.
    Disk {
        /// It is written, too.
        writable: bool,
    },
    /// A file that output goes to, made if it is not there.
    Output,
    /// A terminal, or a folder of them.
    Terminal,
    /// The folder of a socket that is made, and removed in the end.
    Sockets,
    /// A file that holds guest memory, or the folder where one is made.
    Memory,
    /// The folder of a snapshot that the VM is restored from.
    Snapshot,
    /// The device that handles faults of guest memory, if there is one.
    Faults,
    /// What the process is told of itself, for metrics.
    Itself,
    /// What the configuration says.
    Granted(PathAccess),
}

/// How a VM begins in this process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Beginning {
    /// It boots.
    Boot,
    /// It is restored from the snapshots in these folders, or has come by migration, for which there are none.
    Saved(Vec<PathBuf>),
}

/// All that the machine of `spec` opens, at its beginning and at every boot to come. /dev/kvm is open already.
pub fn rules(spec: &MachineSpec, beginning: &Beginning) -> Vec<PathRule> {
    let mut rules = Rules(Vec::new());
    let payload = match beginning {
        Beginning::Boot => Usage::Read,
        Beginning::Saved(snapshots) => {
            snapshots.iter().for_each(|folder| rules.add(folder, Usage::Snapshot));
            Usage::ReadLater
        }
    };
    match &spec.payload {
        PayloadSpec::Kernel { kernel, initramfs, cmdline: _ } => {
            rules.add(kernel, payload);
            initramfs.iter().for_each(|path| rules.add(path, payload));
        }
        PayloadSpec::Firmware(path) => rules.add(path, payload),
    }
    for disk in &spec.disks {
        rules.add(&disk.image.path, Usage::Disk { writable: !disk.image.readonly });
    }
    rules.add(&spec.rng.source, Usage::Read);
    let sinks = [
        spec.serial.as_ref(),
        spec.console.as_ref().map(|console| &console.sink),
        spec.debug_console.as_ref().map(|console| &console.sink),
    ];
    sinks.into_iter().flatten().for_each(|sink| rules.sink(sink));
    for zone in &spec.memory.zones {
        if let Backing::File(path) = &zone.backing {
            rules.add(path, Usage::Memory);
        }
        if zone.hugepages == Hugepages::HostDefault {
            rules.add("/proc/meminfo", Usage::Read);
        }
    }
    rules.add(userfault::DEVICE, Usage::Faults);
    rules.add("/proc/self", Usage::Itself);
    rules.add("/proc/stat", Usage::Read);
    rules.add(LOAD, Usage::Read);
    for granted in &spec.landlock.rules {
        rules.add(&granted.path, Usage::Granted(granted.access));
    }
    rules.0
}

struct Rules(Vec<PathRule>);

impl Rules {
    fn add(&mut self, path: impl AsRef<Path>, usage: Usage) {
        let rule = PathRule { path: path.as_ref().to_owned(), usage };
        if !self.0.contains(&rule) {
            self.0.push(rule);
        }
    }

    fn sink(&mut self, sink: &Sink) {
        match sink {
            Sink::Null => {}
            Sink::Tty => self.add(STANDARD_OUTPUT, Usage::Terminal),
            Sink::Pty => {
                self.add("/dev/ptmx", Usage::Terminal);
                self.add("/dev/pts", Usage::Terminal);
            }
            Sink::File(path) => self.add(path, Usage::Output),
            Sink::Socket(path) => self.add(folder_of(path), Usage::Sockets),
        }
    }
}

fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

#[cfg(test)]
mod tests {
    use vmm_api::config::UnknownFields;
    use vmm_api::spec::parse_and_check;

    use super::*;

    fn of(json: &str) -> Vec<(String, Usage)> {
        let spec = parse_and_check(json.as_bytes(), UnknownFields::Refuse).unwrap().spec;
        rules(&spec, &Beginning::Boot)
            .into_iter()
            .map(|rule| (rule.path.display().to_string(), rule.usage))
            .collect()
    }

    #[test]
    fn everything_that_a_vm_opens_is_there_and_nothing_else() {
        let found = of(r#"{
            "payload": {"kernel": "/vm/kernel", "initramfs": "/vm/initramfs"},
            "disks": [{"path": "/vm/a", "image_type": "Raw"},
                      {"path": "/vm/b", "image_type": "Raw", "readonly": true}],
            "rng": {"src": "/dev/hwrng"},
            "serial": {"mode": "Pty"},
            "console": {"mode": "File", "file": "/log/console"},
            "debug_console": {"mode": "Tty"},
            "memory": {"size": 0, "zones": [
                {"id": "x", "size": 2097152, "file": "/dev/shm"},
                {"id": "y", "size": 2097152, "hugepages": true},
                {"id": "z", "size": 2097152}]},
            "landlock_rules": [{"path": "/more", "access": "w"}]
        }"#);
        let expected = [
            ("/vm/kernel", Usage::Read),
            ("/vm/initramfs", Usage::Read),
            ("/vm/a", Usage::Disk { writable: true }),
            ("/vm/b", Usage::Disk { writable: false }),
            ("/dev/hwrng", Usage::Read),
            ("/dev/ptmx", Usage::Terminal),
            ("/dev/pts", Usage::Terminal),
            ("/log/console", Usage::Output),
            (STANDARD_OUTPUT, Usage::Terminal),
            ("/dev/shm", Usage::Memory),
            ("/proc/meminfo", Usage::Read),
            (userfault::DEVICE, Usage::Faults),
            ("/proc/self", Usage::Itself),
            ("/proc/stat", Usage::Read),
            ("/proc/loadavg", Usage::Read),
            ("/more", Usage::Granted(PathAccess { read: false, write: true })),
        ];
        assert_eq!(found, expected.map(|(path, usage)| (path.to_owned(), usage)));
    }

    #[test]
    fn a_restored_vm_needs_its_snapshot_now_and_its_kernel_later() {
        let json = br#"{"payload": {"kernel": "/vm/kernel", "initramfs": "/vm/initramfs"}}"#;
        let spec = parse_and_check(json, UnknownFields::Refuse).unwrap().spec;
        let found = rules(&spec, &Beginning::Saved(vec!["/saved".into()]));
        let of = |path: &str, usage| PathRule { path: path.into(), usage };
        let expected = [
            of("/saved", Usage::Snapshot),
            of("/vm/kernel", Usage::ReadLater),
            of("/vm/initramfs", Usage::ReadLater),
        ];
        assert_eq!(found[..3], expected);
    }

    #[test]
    fn what_is_needed_twice_is_listed_once() {
        let found = of(r#"{
            "payload": {"firmware": "/vm/firmware"},
            "serial": {"mode": "Socket", "socket": "here"}, "console": {"mode": "Pty"},
            "debug_console": {"mode": "Pty"}
        }"#);
        let expected = [
            ("/vm/firmware", Usage::Read),
            ("/dev/urandom", Usage::Read),
            (".", Usage::Sockets),
            ("/dev/ptmx", Usage::Terminal),
            ("/dev/pts", Usage::Terminal),
            (userfault::DEVICE, Usage::Faults),
            ("/proc/self", Usage::Itself),
            ("/proc/stat", Usage::Read),
            ("/proc/loadavg", Usage::Read),
        ];
        assert_eq!(found, expected.map(|(path, usage)| (path.to_owned(), usage)));
    }
}
