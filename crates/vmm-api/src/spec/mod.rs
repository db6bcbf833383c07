//! The checked form of a configuration, from which a machine is built.
//!
//! [`MachineSpec::check`] decides what the document and this build alone can decide, and lists all faults at once.
//! Facts of the environment (files, locks, sockets, memory, the host's CPUs) are for the boot to find out.
//! A spec cannot be wrong in what its types and this module promise; nothing needs to be validated again.

mod check;
mod consoles;
mod cpus;
mod disks;
mod edit;
mod foreign;
mod ids;
mod landlock;
mod memory;
mod migration;
mod payload;
mod snapshot;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

pub use crate::config::{Bytes, CoreScheduling, LockGranularity};
use crate::config::{Fault, FaultKind, UnknownFields, VmConfig, Warning, read_vm_config};

use check::Checker;
pub use edit::{with_device, without_device};
pub use ids::fill_ids;
pub use migration::{MigrationAddress, ReceiveSpec, SendSpec};
pub use snapshot::{RestoreSpec, SnapshotSpec};

/// The largest number of vCPUs: beyond it, APIC ids need the extended destination format.
pub const MAX_VCPUS: u32 = 254;
/// The largest virtqueue that this build serves.
pub const MAX_QUEUE_SIZE: u16 = 1024;
/// The longest kernel command line in bytes, without its NUL (Linux on x86 takes 2048 with it).
pub const MAX_CMDLINE: usize = 2047;
/// The longest serial number of a disk in bytes (virtio 1.2, section 5.2.6).
pub const MAX_DISK_SERIAL: usize = 20;
/// The name of the memory zone of a VM without zones.
pub const DEFAULT_ZONE: &str = "mem0";

/// A machine that can be built.
#[derive(Clone, Debug, PartialEq)]
pub struct MachineSpec {
    /// vCPUs.
    pub cpus: CpuSpec,
    /// Memory.
    pub memory: MemorySpec,
    /// What the guest boots.
    pub payload: PayloadSpec,
    /// Disks, in the order of the configuration.
    pub disks: Vec<DiskSpec>,
    /// Source of random bytes.
    pub rng: RngSpec,
    /// Serial port; `None` is no serial port.
    pub serial: Option<Sink>,
    /// virtio-console, if there is one.
    pub console: Option<ConsoleSpec>,
    /// Debug console, if there is one.
    pub debug_console: Option<DebugConsoleSpec>,
    /// Whether the guest has a device by which it reports its panic.
    pub pvpanic: bool,
    /// Which paths the process may reach.
    pub landlock: LandlockSpec,
    /// What the author of the configuration should know.
    pub warnings: Vec<Warning>,
}

/// vCPUs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuSpec {
    /// vCPUs that run at boot, 1 to `max`.
    pub boot: u32,
    /// vCPUs that can ever run, at most [`MAX_VCPUS`].
    pub max: u32,
    /// Their arrangement; the product is `max`.
    pub topology: Topology,
    /// Host CPUs of each pinned vCPU, never empty.
    pub affinity: BTreeMap<u32, BTreeSet<u32>>,
    /// Whether the guest may run virtual machines, where the host can.
    pub nested: bool,
    /// Physical address bits at most, 32 to 52; the host's if those are fewer.
    pub max_phys_bits: u8,
    /// Which vCPU threads may share a host core.
    pub core_scheduling: CoreScheduling,
}

/// Arrangement of vCPUs; no part is zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Topology {
    /// Threads in a core.
    pub threads_per_core: u32,
    /// Cores in a die.
    pub cores_per_die: u32,
    /// Dies in a package.
    pub dies_per_package: u32,
    /// Packages.
    pub packages: u32,
}

/// Memory at boot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemorySpec {
    /// Its parts, at least one, with unique ids.
    pub zones: Vec<ZoneSpec>,
    /// Whether the host may use transparent huge pages.
    pub thp: bool,
}

impl MemorySpec {
    /// Size of all zones; [`MachineSpec::check`] saw that it does not overflow.
    #[must_use]
    pub fn total(&self) -> Bytes {
        Bytes(self.zones.iter().fold(0, |sum, zone| sum.saturating_add(zone.size.get())))
    }
}

/// One part of guest memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ZoneSpec {
    /// Its name.
    pub id: String,
    /// Its size: not zero, a multiple of 4 KiB and of its huge page size.
    pub size: Bytes,
    /// What holds it.
    pub backing: Backing,
    /// Huge pages.
    pub hugepages: Hugepages,
    /// Whether other processes can share it.
    pub shared: bool,
    /// Whether the host may merge equal pages.
    pub mergeable: bool,
    /// Whether all pages are taken from the host at boot.
    pub prefault: bool,
    /// Whether swap space is reserved.
    pub reserve: bool,
}

/// What holds a memory zone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Private anonymous memory.
    Anonymous,
    /// A memfd, for memory that is shared.
    Memfd,
    /// A file, mapped privately unless the zone is shared.
    File(PathBuf),
}

/// Huge pages of a zone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hugepages {
    /// None.
    Off,
    /// Of the host's default size.
    HostDefault,
    /// Of this size, a power of two.
    Of(Bytes),
}

/// What the guest boots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PayloadSpec {
    /// A kernel.
    Kernel {
        /// ELF with a PVH entry, or bzImage.
        kernel: PathBuf,
        /// Initial RAM file system.
        initramfs: Option<PathBuf>,
        /// Command line: ASCII, no NUL, at most [`MAX_CMDLINE`] bytes.
        cmdline: String,
    },
    /// Firmware, an ELF file with a PVH entry.
    Firmware(PathBuf),
}

/// Name of a PCI device, and its place if that was chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceIdentity {
    /// Its name, unique in the VM.
    pub id: String,
    /// Its device number on bus 0, 1 to 31, unique; automatic if `None`.
    pub device_number: Option<u8>,
}

/// A virtio-blk disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskSpec {
    /// Name and place.
    pub identity: DeviceIdentity,
    /// The image.
    pub image: DiskImage,
    /// Number of queues, 1 to the vCPUs at boot.
    pub queues: u16,
    /// Entries of each queue, a power of two, 4 to [`MAX_QUEUE_SIZE`].
    pub queue_size: u16,
    /// Serial number: printable ASCII, 1 to [`MAX_DISK_SERIAL`] bytes.
    pub serial: Option<String>,
    /// Whether io_uring may serve the disk.
    pub io_uring: bool,
    /// Whether Linux AIO may serve the disk.
    pub aio: bool,
}

/// The image of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskImage {
    /// File or block device.
    pub path: PathBuf,
    /// Its format, as the configuration says.
    pub format: DiskFormat,
    /// The guest may only read.
    pub readonly: bool,
    /// Bypass the page cache of the host.
    pub direct: bool,
    /// Give what the guest discards back to the host.
    pub sparse: bool,
    /// What the lock covers.
    pub lock: LockGranularity,
}

/// Formats of disk images that this build serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskFormat {
    /// The bytes of the disk.
    Raw,
}

/// The virtio-rng device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RngSpec {
    /// Name and place.
    pub identity: DeviceIdentity,
    /// File to read from.
    pub source: PathBuf,
}

/// Where the output of a console goes, and its input comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sink {
    /// Nowhere.
    Null,
    /// The terminal of the VMM.
    Tty,
    /// A new pseudo terminal.
    Pty,
    /// A file; there is no input.
    File(PathBuf),
    /// A UNIX socket that the VMM listens on; it has one client at a time.
    Socket(PathBuf),
}

/// The virtio-console.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConsoleSpec {
    /// Name and place.
    pub identity: DeviceIdentity,
    /// Where it goes.
    pub sink: Sink,
}

/// The debug console.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DebugConsoleSpec {
    /// Its I/O port.
    pub port: u16,
    /// Where it goes.
    pub sink: Sink,
}

/// Which paths the process may reach.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LandlockSpec {
    /// None but those of the VM and of `rules`.
    pub enable: bool,
    /// Paths beside those that the VM needs.
    pub rules: Vec<GrantedPath>,
}

/// A path that the process may reach, whatever it is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GrantedPath {
    /// File, or folder with all that is in it; if relative, to the VMM's working directory.
    pub path: PathBuf,
    /// How it may be used.
    pub access: PathAccess,
}

/// How a path may be used; at least one of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PathAccess {
    /// Reading, listing, executing.
    pub read: bool,
    /// Writing, truncating, making, renaming and removing files.
    pub write: bool,
}

/// A document that was read and checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Checked {
    /// The configuration as wire types, for `vm.info`; automatic ids are filled in.
    pub config: VmConfig,
    /// Its checked form; its warnings include those of reading.
    pub spec: MachineSpec,
}

impl MachineSpec {
    /// Checks a configuration.
    ///
    /// # Errors
    ///
    /// All faults, with their JSON paths.
    pub fn check(config: &VmConfig) -> Result<Self, Vec<Fault>> {
        let mut config = config.clone();
        let (spec, faults) = Checker::default().run(&mut config);
        match spec {
            Some(spec) if faults.is_empty() => Ok(spec),
            _ => Err(faults),
        }
    }
}

/// Reads and checks a document in one go, the body of `vm.create` and `vm.validate`.
///
/// # Errors
///
/// All faults of reading and of meaning. Where a part could not be read, nothing is said about what it means.
pub fn parse_and_check(json: &[u8], unknown: UnknownFields) -> Result<Checked, Vec<Fault>> {
    let draft = read_vm_config(json, unknown)?;
    let (mut config, mut faults, mut warnings) = (draft.config, draft.faults, draft.warnings);
    let (spec, more) = Checker::knowing(&faults).run(&mut config);
    faults.extend(more);
    match spec {
        Some(mut spec) if faults.is_empty() => {
            warnings.append(&mut spec.warnings);
            spec.warnings = warnings;
            Ok(Checked { config, spec })
        }
        _ => Err(faults),
    }
}
