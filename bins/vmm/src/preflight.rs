//! What a boot would find out about this host, told without booting: `vm.validate` and `vmm validate`.
//!
//! Nothing is created or changed. Images are opened, not locked, and the kernel is loaded into scratch memory.
//! A fact may be another by the time of the boot, which alone decides.

use std::error::Error;
use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use vmm_api::commands::vm::ValidateRequest;
use vmm_api::error::FaultReport;
use vmm_api::info::ValidateReply;
use vmm_api::socket::ListeningSocket;
use vmm_api::spec::{Checked, MachineSpec, Sink};
use vmm_memory_manager::zone;
use vmm_virtio_devices::rng::RngDevice;

use crate::exit::chain;
use crate::machine::trial;

/// The kind of the faults found here, beside those of [`vmm_api::config::FaultKind`].
pub const KIND: &str = "environment";

/// The answer to a request that was read.
#[must_use]
pub fn report(request: ValidateRequest, most_vcpus: u32) -> ValidateReply {
    let Checked { config, spec } = match request.checked {
        Ok(checked) => *checked,
        Err(faults) => return ValidateReply { valid: false, faults, warnings: Vec::new(), config: None },
    };
    let faults = preflight(&spec, most_vcpus);
    let warning = |w: &vmm_api::config::Warning| FaultReport {
        path: w.path.clone(),
        kind: "warning".to_owned(),
        message: w.message.clone(),
    };
    let warnings = spec.warnings.iter().map(warning).collect();
    ValidateReply { valid: faults.is_empty(), faults, warnings, config: Some(config) }
}

/// All that stands against a boot of `spec` on this host, whose hypervisor gives at most `most_vcpus`.
#[must_use]
pub fn preflight(spec: &MachineSpec, most_vcpus: u32) -> Vec<FaultReport> {
    let mut faults = Faults::default();
    if spec.cpus.max > most_vcpus {
        let message =
            format!("{} vCPUs are more than the {most_vcpus} that this host can give", spec.cpus.max);
        faults.add("cpus.max_vcpus", message);
    }
    faults.check("memory", zone::check_host(spec.memory.total().get()));
    for (part, error) in trial::payload(spec) {
        faults.add(&format!("payload.{part}"), chain(&error));
    }
    for (index, tried) in trial::disks(&spec.disks).into_iter().enumerate() {
        if let Err(error) = tried {
            faults.add(&format!("disks[{index}].path"), chain(&error));
        }
    }
    faults.check("rng.src", RngDevice::new("trial", &spec.rng.source));
    faults.0.extend(consoles(spec));
    faults.0
}

/// What stands against the consoles of `spec`: files and sockets.
#[must_use]
pub fn consoles(spec: &MachineSpec) -> Vec<FaultReport> {
    let mut faults = Faults::default();
    let sinks = [
        ("serial", spec.serial.as_ref()),
        ("console", spec.console.as_ref().map(|console| &console.sink)),
        ("debug_console", spec.debug_console.as_ref().map(|console| &console.sink)),
    ];
    for (name, sink) in sinks {
        match sink {
            Some(Sink::File(path)) => faults.check(&format!("{name}.file"), writable(path)),
            Some(Sink::Socket(path)) => {
                faults.check(&format!("{name}.socket"), ListeningSocket::check(path));
            }
            Some(Sink::Null | Sink::Tty | Sink::Pty) | None => {}
        }
    }
    faults.0
}

#[derive(Default)]
struct Faults(Vec<FaultReport>);

impl Faults {
    fn add(&mut self, path: &str, message: String) {
        self.0.push(FaultReport { path: path.to_owned(), kind: KIND.to_owned(), message });
    }

    fn check<T, E: Error>(&mut self, path: &str, result: Result<T, E>) {
        if let Err(error) = result {
            self.add(path, chain(&error));
        }
    }
}

/// Whether a console's file can be written, or made; it is left as it is.
fn writable(path: &Path) -> Result<(), WriteError> {
    let failed = |source| WriteError { path: path.display().to_string(), source };
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    match OpenOptions::new().append(true).custom_flags(flags).open(path) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
            let folder = std::fs::metadata(parent.unwrap_or(Path::new("."))).map_err(failed)?;
            if folder.is_dir() { Ok(()) } else { Err(failed(std::io::ErrorKind::NotADirectory.into())) }
        }
        Err(error) => Err(failed(error)),
    }
}

#[derive(Debug, thiserror::Error)]
#[error("cannot write {path}")]
struct WriteError {
    path: String,
    #[source]
    source: std::io::Error,
}

#[cfg(test)]
mod tests {
    use vmm_api::config::UnknownFields;
    use vmm_api::spec::parse_and_check;
    use vmm_tests::tiny::Guest;

    use super::*;

    fn spec(json: &serde_json::Value) -> MachineSpec {
        parse_and_check(json.to_string().as_bytes(), UnknownFields::Refuse).unwrap().spec
    }

    fn paths(json: &serde_json::Value) -> Vec<String> {
        preflight(&spec(json), 8).into_iter().map(|fault| fault.path).collect()
    }

    #[test]
    fn a_vm_that_would_boot_has_no_faults_and_nothing_is_made() {
        let folder = tempfile::tempdir().unwrap();
        let kernel = Guest::Halt.write(folder.path()).unwrap();
        let disk = folder.path().join("disk");
        std::fs::write(&disk, vec![0; 1 << 20]).unwrap();
        let serial = folder.path().join("serial");
        let json = serde_json::json!({
            "payload": { "kernel": kernel },
            "disks": [{ "path": disk, "image_type": "Raw" }],
            "serial": { "mode": "File", "file": serial },
            "console": { "mode": "Off" },
        });
        assert_eq!(paths(&json), [""; 0]);
        assert!(!serial.exists());
        // Nothing is left of it, and what another has is told.
        let other = vmm_disk_image::open(&vmm_disk_image::OpenOptions::raw(&disk)).unwrap();
        assert_eq!(paths(&json), ["disks[0].path"]);
        drop(other);
        assert_eq!(paths(&json), [""; 0]);
    }

    #[test]
    fn all_faults_of_the_host_are_told_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let garbage = folder.path().join("garbage");
        std::fs::write(&garbage, vec![7; 1 << 20]).unwrap();
        let json = serde_json::json!({
            "payload": { "kernel": garbage, "initramfs": folder.path().join("absent") },
            "cpus": { "boot_vcpus": 1, "max_vcpus": 9 },
            "memory": { "size": 1_u64 << 45 },
            "disks": [{ "path": garbage, "image_type": "Raw" }, { "path": garbage, "image_type": "Raw" }],
            "rng": { "src": "/nonexistent" },
            "serial": { "mode": "File", "file": "/nonexistent/serial" },
            "console": { "mode": "Socket", "socket": garbage },
        });
        let expected = [
            "cpus.max_vcpus",
            "memory",
            "payload.initramfs",
            "disks[1].path",
            "rng.src",
            "serial.file",
            "console.socket",
        ];
        assert_eq!(paths(&json), expected);
        let json = serde_json::json!({ "payload": { "kernel": garbage }, "console": { "mode": "Off" } });
        let faults = preflight(&spec(&json), 8);
        assert!(faults[0].message.contains("not a kernel"), "{faults:?}");
        assert_eq!(faults[0].path, "payload.kernel");
    }
}
