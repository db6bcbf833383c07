//! Devices on the PCI bus.

use std::net::IpAddr;
use std::path::PathBuf;

use super::table::{choice, object, pci_object};
use super::wire::Bytes;

object! {
    /// A bucket of tokens that refills over time.
    pub struct TokenBucket {
        /// Tokens it holds.
        [current, required] size: u64 = 0,
        /// Tokens it holds once more at the start.
        [current] one_time_burst: Option<u64> = None,
        /// Milliseconds until it is full again.
        [current, required] refill_time: u64 = 0,
    }
}

object! {
    /// Limits on bytes and on operations per second.
    pub struct RateLimiterConfig {
        /// Limit on bytes.
        [current] bandwidth: Option<TokenBucket> = None,
        /// Limit on operations.
        [current] ops: Option<TokenBucket> = None,
    }
}

object! {
    /// A rate limiter that several disks share.
    pub struct RateLimitGroupConfig {
        /// Name of the group.
        [current, required] id: String = String::new(),
        /// Its limits.
        [current, required; key = ""] rate_limiter_config: RateLimiterConfig = RateLimiterConfig::default(),
    }
}

object! {
    /// Host CPUs on which the thread of one queue may run.
    pub struct VirtQueueAffinity {
        /// Index of the queue.
        [current, required] queue_index: u16 = 0,
        /// Host CPUs.
        [current, required] host_cpus: Vec<u32> = Vec::new(),
    }
}

choice! {
    /// Format of a disk image.
    pub enum ImageType {
        /// Not said. Such an image is used as raw; its content is never looked at to guess.
        Unknown = "Unknown" | "unknown",
        /// The bytes of the disk.
        Raw = "Raw" | "raw",
        /// QEMU's copy-on-write format.
        Qcow2 = "Qcow2" | "qcow2",
        /// Fixed virtual hard disk.
        FixedVhd = "FixedVhd" | "vhd" | "fixedvhd" | "fixed-vhd",
        /// Hyper-V virtual hard disk.
        Vhdx = "Vhdx" | "vhdx",
    }
}

choice! {
    /// What the lock on a disk image covers.
    pub enum LockGranularity {
        /// The bytes of the image.
        ByteRange = "ByteRange" | "byte-range" | "byterange",
        /// The whole file.
        Full = "Full" | "full",
    }
}

pci_object! {
    /// A virtio-blk disk.
    pub struct DiskConfig {
        /// Image file or block device.
        [current] path: Option<PathBuf> = None,
        /// The guest may only read.
        [current] readonly: bool = false,
        /// Bypass the page cache of the host.
        [current] direct: bool = false,
        /// Number of request queues, at most the vCPUs at boot.
        [current] num_queues: u32 = 1,
        /// Entries of each queue, a power of two.
        [current] queue_size: u16 = 128,
        /// The device is a vhost-user back-end.
        [later] vhost_user: bool = false,
        /// Socket of the vhost-user back-end.
        [later; key = "socket"] vhost_socket: Option<PathBuf> = None,
        /// Limits of this disk.
        [later; key = ""] rate_limiter_config: Option<RateLimiterConfig> = None,
        /// Serial number that the guest reads, at most 20 bytes.
        [current] serial: Option<String> = None,
        /// Group of disks that share a limiter.
        [later] rate_limit_group: Option<String> = None,
        /// Host CPUs per queue, as `queue@[cpus]`.
        [later] queue_affinity: Option<Vec<VirtQueueAffinity>> = None,
        /// Whether a backing file that the image names may be opened.
        [later] backing_files: bool = false,
        /// Whether what the guest discards is given back to the host.
        [current] sparse: bool = true,
        /// Format of the image.
        [current] image_type: ImageType = ImageType::Unknown,
        /// What the lock on the image covers.
        [current] lock_granularity: LockGranularity = LockGranularity::ByteRange,
        /// Do not use io_uring (for tests).
        [current; key = "_disable_io_uring"; alias = "_disable_io_uring"] disable_io_uring: bool = false,
        /// Do not use Linux AIO (for tests).
        [current; key = "_disable_aio"; alias = "_disable_aio"] disable_aio: bool = false,
    }
    retired {
        "poll_queue" = "true", "queues are always polled as needed";
    }
}

choice! {
    /// Which end of a vhost-user socket listens.
    pub enum VhostMode {
        /// The back-end; the VMM connects.
        Client = "Client" | "client",
        /// The VMM.
        Server = "Server" | "server",
    }
}

pci_object! {
    /// A virtio-net device.
    pub struct NetConfig {
        /// Name of the tap device.
        [current] tap: Option<String> = None,
        /// Address to give to the tap device.
        [current] ip: Option<IpAddr> = None,
        /// Network mask to give to the tap device.
        [current] mask: Option<IpAddr> = None,
        /// MAC address of the guest; chosen at random if absent.
        [current] mac: Option<String> = None,
        /// MAC address to give to the tap device.
        [current] host_mac: Option<String> = None,
        /// Largest packet.
        [current] mtu: Option<u16> = None,
        /// Number of queues, two for each pair.
        [current] num_queues: u32 = 2,
        /// Entries of each queue, a power of two.
        [current] queue_size: u16 = 256,
        /// The device is a vhost-user back-end.
        [current] vhost_user: bool = false,
        /// Socket of the vhost-user back-end.
        [current; key = "socket"] vhost_socket: Option<PathBuf> = None,
        /// Which end of the socket listens.
        [current] vhost_mode: VhostMode = VhostMode::Client,
        /// Descriptors of open tap devices; the numbers in a document mean nothing.
        [current; key = "fd"] fds: Option<Vec<i32>> = None,
        /// Limits of this device.
        [current; key = ""] rate_limiter_config: Option<RateLimiterConfig> = None,
        /// Offer TCP segmentation offload.
        [current] offload_tso: bool = true,
        /// Offer UDP fragmentation offload.
        [current] offload_ufo: bool = true,
        /// Offer checksum offload.
        [current] offload_csum: bool = true,
    }
}

pci_object! {
    /// The virtio-rng source of random bytes.
    pub struct RngConfig {
        /// File to read random bytes from.
        [current, in_json] src: PathBuf = PathBuf::from("/dev/urandom"),
    }
}

pci_object! {
    /// The virtio-rtc clock.
    pub struct RtcConfig {}
}

pci_object! {
    /// The memory balloon.
    pub struct BalloonConfig {
        /// Bytes taken from the guest at boot.
        [current, in_json] size: Bytes = Bytes(0),
        /// Give memory back when the guest runs out of it.
        [current] deflate_on_oom: bool = false,
        /// Let the guest report free pages.
        [current] free_page_reporting: bool = false,
    }
}

pci_object! {
    /// A shared file system by vhost-user.
    pub struct FsConfig {
        /// Name under which the guest mounts it.
        [current, required] tag: String = String::new(),
        /// Socket of the back-end.
        [current, required] socket: PathBuf = PathBuf::new(),
        /// Number of request queues.
        [current] num_queues: u32 = 1,
        /// Entries of each queue.
        [current] queue_size: u16 = 1024,
    }
    retired {
        "dax" = "true", "there is no DAX window";
        "cache_size" = "8589934592", "there is no DAX window";
    }
}

pci_object! {
    /// Any virtio device by vhost-user.
    pub struct GenericVhostUserConfig {
        /// Socket of the back-end.
        [current, required] socket: PathBuf = PathBuf::new(),
        /// Entries of each queue.
        [current, required] queue_sizes: Vec<u16> = Vec::new(),
        /// Number of the virtio device type.
        [current, required; key = "virtio_id"; alias = "virtio_id"] device_type: u32 = 0,
    }
}

pci_object! {
    /// Persistent memory in a file.
    pub struct PmemConfig {
        /// The file.
        [current, required] file: PathBuf = PathBuf::new(),
        /// Size in bytes; that of the file if absent.
        [current] size: Option<Bytes> = None,
        /// Keep the writes of the guest from the file.
        [current] discard_writes: bool = false,
    }
    retired {
        "mergeable" = "false", "it is part of the memory now";
    }
}

pci_object! {
    /// A physical device passed through by VFIO.
    pub struct DeviceConfig {
        /// Its path in sysfs.
        [current] path: Option<PathBuf> = None,
        /// Descriptor of the open device.
        [current] fd: Option<i32> = None,
        /// GPUDirect clique of the device.
        [current] x_nv_gpudirect_clique: Option<u8> = None,
        /// BARs that are not mapped.
        [current] x_exclude_mmap_bars: Option<Vec<u64>> = None,
    }
}

pci_object! {
    /// A device of another process by vfio-user.
    pub struct UserDeviceConfig {
        /// Socket of the process.
        [current, required] socket: PathBuf = PathBuf::new(),
    }
}

pci_object! {
    /// A vDPA device.
    pub struct VdpaConfig {
        /// Its path.
        [current, required] path: PathBuf = PathBuf::new(),
        /// Number of queues.
        [current, in_json] num_queues: u32 = 1,
    }
}

pci_object! {
    /// The virtio-vsock device.
    pub struct VsockConfig {
        /// Context id of the guest, 3 or more.
        [current, required] cid: u64 = 0,
        /// UNIX socket that stands for the host's end.
        [current, required] socket: PathBuf = PathBuf::new(),
    }
}

pci_object! {
    /// Memory shared between VMs.
    pub struct IvshmemConfig {
        /// The file.
        [current, required] path: PathBuf = PathBuf::new(),
        /// Size in bytes.
        [current, in_json] size: Bytes = Bytes::mib(128),
    }
}

object! {
    /// The guest's control over its physical memory.
    pub struct PvmemcontrolConfig {}
}
