//! The whole configuration of a VM.

use super::console::{ConsoleConfig, DebugConsoleConfig, SerialConfig};
use super::devices::{
    BalloonConfig, DeviceConfig, DiskConfig, FsConfig, GenericVhostUserConfig, IvshmemConfig, NetConfig,
    PmemConfig, PvmemcontrolConfig, RateLimitGroupConfig, RngConfig, RtcConfig, UserDeviceConfig, VdpaConfig,
    VsockConfig,
};
use super::fault::FaultKind;
use super::json::Node;
use super::machine::{
    CpusConfig, LandlockConfig, MemoryConfig, NumaConfig, PayloadConfig, PciSegmentConfig, PlatformConfig,
    TpmConfig,
};
use super::reader::Reader;
use super::table::{Table, object};

object! {
    /// Configuration of a VM: the body of `vm.create`, and `config` in the reply of `vm.info`.
    pub struct VmConfig {
        /// vCPUs.
        [current] cpus: CpusConfig = CpusConfig::default(),
        /// Memory.
        [current] memory: MemoryConfig = MemoryConfig::default(),
        /// What the guest boots.
        [current] payload: Option<PayloadConfig> = None,
        /// Rate limiters that disks share.
        [later] rate_limit_groups: Option<Vec<RateLimitGroupConfig>> = None,
        /// Disks.
        [current] disks: Option<Vec<DiskConfig>> = None,
        /// Network devices.
        [later] net: Option<Vec<NetConfig>> = None,
        /// Source of random bytes.
        [current] rng: RngConfig = RngConfig::default(),
        /// Memory balloon.
        [later] balloon: Option<BalloonConfig> = None,
        /// Shared file systems.
        [later] fs: Option<Vec<FsConfig>> = None,
        /// vhost-user devices of any type.
        [later] generic_vhost_user: Option<Vec<GenericVhostUserConfig>> = None,
        /// Persistent memory.
        [later] pmem: Option<Vec<PmemConfig>> = None,
        /// Serial port.
        [current] serial: SerialConfig = SerialConfig::default(),
        /// virtio-console.
        [current] console: ConsoleConfig = ConsoleConfig::default(),
        /// Debug console.
        [current] debug_console: DebugConsoleConfig = DebugConsoleConfig::default(),
        /// Devices passed through by VFIO.
        [later] devices: Option<Vec<DeviceConfig>> = None,
        /// Devices of other processes by vfio-user.
        [later] user_devices: Option<Vec<UserDeviceConfig>> = None,
        /// vDPA devices.
        [later] vdpa: Option<Vec<VdpaConfig>> = None,
        /// Sockets between guest and host.
        [later] vsock: Option<VsockConfig> = None,
        /// NUMA nodes.
        [later] numa: Option<Vec<NumaConfig>> = None,
        /// Whether there is a virtual IOMMU.
        [later] iommu: bool = false,
        /// Watchdog.
        [later] watchdog: bool = false,
        /// virtio-rtc clock.
        [later] rtc: Option<RtcConfig> = None,
        /// Device by which the guest reports its panic.
        [current] pvpanic: bool = false,
        /// PCI segments.
        [later] pci_segments: Option<Vec<PciSegmentConfig>> = None,
        /// Identity and limits of the machine.
        [current] platform: Option<PlatformConfig> = None,
        /// Trusted platform module.
        [later] tpm: Option<TpmConfig> = None,
        /// Memory shared between VMs.
        [later] ivshmem: Option<IvshmemConfig> = None,
        /// The guest's control over its physical memory.
        [later] pvmemcontrol: Option<PvmemcontrolConfig> = None,
        /// Whether a debugger may attach.
        [later] gdb: bool = false,
        /// Whether the sandbox restricts paths.
        [later] landlock_enable: bool = false,
        /// More paths that the sandbox allows.
        [later] landlock_rules: Option<Vec<LandlockConfig>> = None,
    }
    retired {
        "sgx_epc" = "[]", "SGX is gone";
        "tdx" = "null", "use platform.tdx and payload.firmware";
    }
}

object! {
    /// The v16 form of a kernel or initial RAM file system.
    pub(crate) struct OldPath {
        /// Its path.
        [current, required] path: std::path::PathBuf = std::path::PathBuf::new(),
    }
}

object! {
    /// The v16 form of the command line.
    pub(crate) struct OldCmdline {
        /// Its text.
        [current, required] args: String = String::new(),
    }
}

/// The fields that older releases had beside those of `table`, whose values are moved to where they belong now.
pub(crate) fn older_fields(table: &Table) -> &'static [(&'static str, &'static Table)] {
    const OF_CONFIG: [(&str, &Table); 3] =
        [("kernel", OldPath::TABLE), ("initramfs", OldPath::TABLE), ("cmdline", OldCmdline::TABLE)];
    if table.name == VmConfig::TABLE.name { &OF_CONFIG } else { &[] }
}

/// Moves the top-level `kernel`, `initramfs` and `cmdline` objects of older releases into `payload`.
pub(crate) fn fold_old_payload(root: &mut Node, reader: &mut Reader) {
    let Node::Object(entries) = root else {
        return;
    };
    let (old, mut rest): (Vec<_>, Vec<_>) = std::mem::take(entries)
        .into_iter()
        .partition(|(name, _)| matches!(name.as_str(), "kernel" | "initramfs" | "cmdline"));
    for (name, value) in old {
        if value == Node::Null {
            continue;
        }
        let text = reader.at(&name, |reader| match name.as_str() {
            "cmdline" => read_old(&value, reader, |old: OldCmdline| old.args),
            _ => read_old(&value, reader, |old: OldPath| old.path.to_string_lossy().into_owned()),
        });
        // The old default of the command line says nothing about a payload.
        let Some(text) = text.filter(|text| !text.is_empty()) else {
            continue;
        };
        let Some(payload) = payload_of(&mut rest) else {
            continue; // Not an object: its own fault is recorded later.
        };
        if payload.iter().any(|(given, value)| *given == name && *value != Node::Null) {
            reader.at(&name, |reader| {
                reader.fault(FaultKind::Invalid, format!("given twice, see payload.{name}"));
            });
            continue;
        }
        payload.retain(|(given, _)| *given != name);
        payload.push((name, Node::Text(text)));
    }
    *entries = rest;
}

fn read_old<T: super::wire::Wire>(node: &Node, reader: &mut Reader, text: fn(T) -> String) -> Option<String> {
    T::read(node, reader).map(text)
}

/// The entries of `payload`, which is made if there is none.
fn payload_of(root: &mut Vec<(String, Node)>) -> Option<&mut Vec<(String, Node)>> {
    root.retain(|(name, value)| name != "payload" || *value != Node::Null);
    if !root.iter().any(|(name, _)| name == "payload") {
        root.push(("payload".into(), Node::Object(Vec::new())));
    }
    match root.iter_mut().find(|(name, _)| name == "payload") {
        Some((_, Node::Object(entries))) => Some(entries),
        _ => None,
    }
}
