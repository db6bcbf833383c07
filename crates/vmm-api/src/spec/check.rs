//! Collects faults while the parts of a configuration are turned into their checked form.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    DeviceIdentity, Fault, FaultKind, MachineSpec, RngSpec, VmConfig, Warning, consoles, cpus, disks, ids,
};
use super::{memory, payload};
use crate::config::record;

/// PCI devices on bus 0 beside the host bridge.
const MAX_PCI_DEVICES: u8 = 31;

/// State of one check.
#[derive(Debug, Default)]
pub(super) struct Checker {
    faults: Vec<Fault>,
    warnings: Vec<Warning>,
    /// Top-level fields that could not be read: their values are made up, so nothing is said about them.
    unread: BTreeSet<String>,
    /// Who has which PCI device number.
    device_numbers: BTreeMap<u8, String>,
}

impl Checker {
    /// A checker that knows what could not be read.
    pub(super) fn knowing(faults: &[Fault]) -> Self {
        let made_up = |fault: &&Fault| fault.kind != FaultKind::Unknown;
        let top_level = |fault: &Fault| match top_level(&fault.path) {
            "kernel" | "initramfs" | "cmdline" => "payload".to_owned(), // the form of older releases
            name => name.to_owned(),
        };
        let unread = faults.iter().filter(made_up).map(top_level).collect();
        Self { unread, ..Self::default() }
    }

    /// Checks all of `config` and fills in its automatic ids.
    pub(super) fn run(mut self, config: &mut VmConfig) -> (Option<MachineSpec>, Vec<Fault>) {
        for fault in config.not_built() {
            self.fault(fault.path, fault.kind, fault.message);
        }
        ids::check(config, &mut self);
        ids::fill_ids(config);

        let cpus = cpus::check(&config.cpus, &mut self);
        let memory = memory::check(&config.memory, config.cpus.max_phys_bits, &mut self);
        let payload = payload::check(config.payload.as_ref(), &mut self);
        let disks =
            disks::check(config.disks.as_deref().unwrap_or_default(), config.cpus.boot_vcpus, &mut self);
        let identity = self.identity("rng", config.rng.id.as_deref(), config.rng.pci_device_id);
        let rng = identity.map(|identity| RngSpec { identity, source: config.rng.src.clone() });
        let serial = consoles::serial(&config.serial, &mut self);
        let console = consoles::console(&config.console, &mut self);
        consoles::together(serial.as_ref(), console.as_ref().map(|console| &console.sink), &mut self);
        let debug_console = consoles::debug_console(&config.debug_console, &mut self);
        let pvpanic = config.pvpanic;
        self.count_devices(disks.len() + 1 + usize::from(console.is_some()) + usize::from(pvpanic));

        let spec =
            cpus.zip(memory).zip(payload).zip(rng).map(|(((cpus, memory), payload), rng)| MachineSpec {
                cpus,
                memory,
                payload,
                disks,
                rng,
                serial,
                console,
                debug_console,
                pvpanic,
                warnings: self.warnings,
            });
        (spec, self.faults)
    }

    /// Whether the top-level field `name` holds what the document says.
    pub(super) fn was_read(&self, name: &str) -> bool {
        !self.unread.contains(name)
    }

    /// Records a fault, unless its part of the configuration could not be read.
    pub(super) fn fault(&mut self, path: impl Into<String>, kind: FaultKind, message: impl Into<String>) {
        let path = path.into();
        if self.was_read(top_level(&path)) {
            record(&mut self.faults, Fault::new(path, kind, message));
        }
    }

    /// Records a value that cannot be used.
    pub(super) fn invalid(&mut self, path: impl Into<String>, message: impl Into<String>) {
        self.fault(path, FaultKind::Invalid, message);
    }

    /// Records what would be right in a later build.
    pub(super) fn not_built(&mut self, path: impl Into<String>, message: impl std::fmt::Display) {
        self.fault(path, FaultKind::NotBuilt, format!("not supported by this build yet: {message}"));
    }

    /// Records a warning.
    pub(super) fn warn(&mut self, path: impl Into<String>, message: impl Into<String>) {
        self.warnings.push(Warning::new(path, message));
    }

    /// Name and place of the PCI device at `path`, whose id is filled in.
    pub(super) fn identity(
        &mut self,
        path: &str,
        id: Option<&str>,
        number: Option<u8>,
    ) -> Option<DeviceIdentity> {
        if let Some(number) = number {
            let path = format!("{path}.pci_device_id");
            if number == 0 || number > MAX_PCI_DEVICES {
                self.invalid(path, format!("device number {number} is not in 1 to {MAX_PCI_DEVICES}"));
            } else if let Some(other) = self.device_numbers.insert(number, path.clone()) {
                self.invalid(path, format!("device number {number} is also that of {other}"));
            }
        }
        Some(DeviceIdentity { id: id?.to_owned(), device_number: number })
    }

    fn count_devices(&mut self, devices: usize) {
        if devices > usize::from(MAX_PCI_DEVICES) {
            let message = format!("{devices} PCI devices in all; a segment holds {MAX_PCI_DEVICES}");
            self.invalid("disks", message);
        }
    }
}

/// The top-level field that `path` is in.
fn top_level(path: &str) -> &str {
    path.split(['.', '[']).next().unwrap_or(path)
}
