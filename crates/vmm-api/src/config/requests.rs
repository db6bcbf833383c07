//! The bodies of requests other than `vm.create` and `vm.add-*`.
//!
//! The contract requires fewer fields than it can do without; what is missing is refused where it is needed.

use std::path::PathBuf;

use super::console::ConsoleMode;
use super::table::{choice, object};
use super::wire::Bytes;

object! {
    /// Body of `vm.resize`: the sizes that are wanted; what is absent stays.
    pub struct VmResize {
        /// vCPUs.
        [current] desired_vcpus: Option<u32> = None,
        /// Guest memory in bytes.
        [current] desired_ram: Option<Bytes> = None,
        /// Size of the balloon in bytes.
        [current] desired_balloon: Option<Bytes> = None,
    }
}

object! {
    /// Body of `vm.resize-disk`.
    pub struct VmResizeDisk {
        /// Id of the disk.
        [current] id: String = String::new(),
        /// Its new size in bytes.
        [current] desired_size: Bytes = Bytes(0),
    }
}

object! {
    /// Body of `vm.resize-zone`.
    pub struct VmResizeZone {
        /// Id of the memory zone.
        [current] id: String = String::new(),
        /// Its new size in bytes.
        [current] desired_ram: Bytes = Bytes(0),
    }
}

object! {
    /// Body of `vm.remove-device`.
    pub struct VmRemoveDevice {
        /// Id of the device.
        [current] id: String = String::new(),
    }
}

object! {
    /// Body of `vm.snapshot`.
    pub struct VmSnapshotConfig {
        /// Where to: `file:///folder`, which is empty or not there.
        [current] destination_url: String = String::new(),
        /// Let the guest run on while its memory is written; a VM that runs can only be saved so.
        [current] live: bool = false,
        /// Write only what changed since the snapshot that this VM was last saved to, or restored from, with `track`.
        [current] incremental: bool = false,
        /// Keep track of what changes from now on, for an incremental snapshot; an incremental one does so anyway.
        [current] track: bool = false,
    }
}

object! {
    /// Body of `vm.coredump`.
    pub struct VmCoredumpData {
        /// Where to: `file:///file`.
        [current] destination_url: String = String::new(),
    }
}

choice! {
    /// How guest memory comes back.
    pub enum MemoryRestoreMode {
        /// All of it before the guest runs.
        Copy = "Copy" | "copy",
        /// Page by page, as the guest touches it.
        OnDemand = "OnDemand" | "ondemand",
    }
}

choice! {
    /// What the clocks of a restored guest show.
    pub enum GuestClock {
        /// Time has passed since it was saved.
        MovedOn = "MovedOn" | "moved-on",
        /// Time stood still.
        StoodStill = "StoodStill" | "stood-still",
    }
}

object! {
    /// Descriptors that take the place of a network device's, after a restore.
    pub struct RestoredNetConfig {
        /// Id of the device.
        [current, required] id: String = String::new(),
        /// How many there are.
        [current] num_fds: u32 = 0,
        /// The descriptors; the numbers in a document mean nothing.
        [current] fds: Option<Vec<i32>> = None,
    }
}

object! {
    /// A memory zone's new place on the host.
    pub struct VmMemoryZoneUpdateData {
        /// Id of the zone.
        [current, required] id: String = String::new(),
        /// Host NUMA node to take its memory from.
        [current, required] host_numa_node: u32 = 0,
    }
}

object! {
    /// A disk's new image, after a restore.
    pub struct RestoredDiskConfig {
        /// Id of the disk.
        [current, required] id: String = String::new(),
        /// The image.
        [current, required] path: PathBuf = PathBuf::new(),
    }
}

object! {
    /// Where a console goes after a restore; its device stays.
    pub struct RestoredConsoleConfig {
        /// The file, for mode `File`.
        [current] file: Option<PathBuf> = None,
        /// The socket, for mode `Socket`.
        [current] socket: Option<PathBuf> = None,
        /// Where the console goes.
        [current, required] mode: ConsoleMode = ConsoleMode::Null,
    }
}

object! {
    /// A network device's new address and tap interface, after a restore.
    pub struct RestoredNicConfig {
        /// Id of the device.
        [current, required] id: String = String::new(),
        /// MAC address.
        [current] mac: Option<String> = None,
        /// Name of the tap interface.
        [current] tap: Option<String> = None,
    }
}

object! {
    /// The new address and socket of the vsock device, after a restore.
    pub struct RestoredVsockConfig {
        /// Context id.
        [current] cid: Option<u64> = None,
        /// Socket on the host.
        [current] socket: Option<PathBuf> = None,
    }
}

object! {
    /// Body of `vm.restore`. What is given beside the snapshot replaces what the VM had, so that a clone is one request.
    pub struct RestoreConfig {
        /// Where from: `file:///folder`.
        [current, required] source_url: String = String::new(),
        /// Copy and verify all memory before the guest runs, and take all pages from the host.
        [current] prefault: bool = false,
        /// How memory comes back; as the guest touches it if absent.
        [current] memory_restore_mode: Option<MemoryRestoreMode> = None,
        /// Run the guest at once.
        [current] resume: bool = false,
        /// Keep track of what changes from now on, for an incremental snapshot.
        [current] track: bool = false,
        /// What the guest's clocks show.
        [current] clock: GuestClock = GuestClock::MovedOn,
        /// Descriptors for network devices.
        [later] net_fds: Option<Vec<RestoredNetConfig>> = None,
        /// Memory zones that move on the host.
        [later] zone_updates: Option<Vec<VmMemoryZoneUpdateData>> = None,
        /// Other images of disks.
        [current; key = ""] disks: Option<Vec<RestoredDiskConfig>> = None,
        /// Where the serial port goes.
        [current; key = ""] serial: Option<RestoredConsoleConfig> = None,
        /// Where virtio-console goes.
        [current; key = ""] console: Option<RestoredConsoleConfig> = None,
        /// Where the debug console goes.
        [current; key = ""] debug_console: Option<RestoredConsoleConfig> = None,
        /// Other addresses and tap interfaces of network devices.
        [later; key = ""] net: Option<Vec<RestoredNicConfig>> = None,
        /// Another address or socket of the vsock device.
        [later; key = ""] vsock: Option<RestoredVsockConfig> = None,
    }
}

choice! {
    /// When memory travels.
    pub enum MigrationMode {
        /// Before the destination runs.
        Precopy = "Precopy" | "precopy",
        /// After it has begun to.
        Postcopy = "Postcopy" | "postcopy",
    }
}

choice! {
    /// What happens when a migration takes too long.
    pub enum TimeoutStrategy {
        /// It is given up; the guest stays.
        Cancel = "Cancel" | "cancel",
        /// It is finished, however long the guest stands still.
        Ignore = "Ignore" | "ignore",
    }
}

choice! {
    /// Whether guest memory is compressed on its way.
    pub enum Compression {
        /// It goes as it is.
        None = "None" | "none",
        /// In LZ4 blocks, where that makes it smaller and the destination can read them.
        Lz4 = "Lz4" | "lz4",
    }
}

object! {
    /// Body of `vm.receive-migration`.
    pub struct ReceiveMigrationData {
        /// Where to listen: `unix:/path` or `tcp:host:port`.
        [current, required] receiver_url: String = String::new(),
        /// Folder of the certificates, for TLS over TCP: ca-cert.pem, server-cert.pem, server-key.pem.
        [current] tls_dir: Option<PathBuf> = None,
        /// When memory travels: the source says it, and either is taken.
        [current] memory_mode: MigrationMode = MigrationMode::Precopy,
        /// Memory zones that move on the host.
        [later] zone_updates: Option<Vec<VmMemoryZoneUpdateData>> = None,
        /// Files and folders that the source's configuration may name. At a UNIX socket it may name any if none is given, elsewhere
        /// none.
        [current] paths: Option<Vec<PathBuf>> = None,
        /// Images of disks, by their ids; where none is given, the path is the source's.
        [current; key = ""] disks: Option<Vec<RestoredDiskConfig>> = None,
        /// Where the serial port goes.
        [current; key = ""] serial: Option<RestoredConsoleConfig> = None,
        /// Where virtio-console goes.
        [current; key = ""] console: Option<RestoredConsoleConfig> = None,
        /// Where the debug console goes.
        [current; key = ""] debug_console: Option<RestoredConsoleConfig> = None,
        /// Answer as soon as a source can come: how it ends, `vm.migration-progress` and the events tell.
        [current] detach: bool = false,
    }
}

object! {
    /// Body of `vm.send-migration`.
    pub struct SendMigrationData {
        /// Where to: `unix:/path` or `tcp:host:port`.
        [current, required] destination_url: String = String::new(),
        /// Pass memory by descriptors to a VMM on this host, through a UNIX socket; all of it must be shared.
        [current] local: bool = false,
        /// How long the guest may stand still, in milliseconds.
        [current] downtime_ms: u64 = 300,
        /// How long all of it may take, in seconds.
        [current] timeout_s: u64 = 3600,
        /// What happens then.
        [current] timeout_strategy: TimeoutStrategy = TimeoutStrategy::Cancel,
        /// Number of TCP connections, 1 to 128.
        [current] connections: u64 = 1,
        /// Folder of the certificates, for TLS over TCP: ca-cert.pem, client-cert.pem, client-key.pem.
        [current] tls_dir: Option<PathBuf> = None,
        /// When memory travels.
        [current] memory_mode: MigrationMode = MigrationMode::Precopy,
        /// Only ask whether the destination would take the VM. Nothing of it moves.
        [current] check: bool = false,
        /// Answer at once: how it ends, `vm.migration-progress` and the events tell.
        [current] detach: bool = false,
        /// Stay, without a VM, when the VM is elsewhere.
        [current] preserve_source: bool = false,
        /// Most bytes per second on the link; 0 is no limit.
        [current] max_bandwidth: u64 = 0,
        /// Slow vCPUs down, in steps, while the guest changes memory faster than the link carries it.
        [current] auto_converge: bool = false,
        /// Compress memory: for links that are slower than that.
        [current] compression: Compression = Compression::None,
    }
}

choice! {
    /// The least important messages that are logged.
    pub enum LogLevel {
        /// None at all.
        Off = "off" | "off",
        /// Errors.
        Error = "error" | "error",
        /// Warnings too.
        Warn = "warn" | "warn",
        /// Information too.
        Info = "info" | "info",
        /// Debugging too.
        Debug = "debug" | "debug",
        /// Everything.
        Trace = "trace" | "trace",
    }
}

object! {
    /// The level of the log: reply of `vmm.log-level`, and the body that sets it.
    pub struct LogLevelConfig {
        /// The least important messages that are logged.
        [current, required] level: LogLevel = LogLevel::Warn,
    }
}
