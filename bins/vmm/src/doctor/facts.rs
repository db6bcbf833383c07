//! What there is to know about a machine.

use std::io;

use vmm_memory_manager::userfault::Features;

/// All facts.
#[derive(Clone, Debug)]
pub(super) struct Facts {
    pub(super) kvm: KvmFacts,
    pub(super) io_uring: IoUring,
    pub(super) hugepages: HugePages,
    pub(super) userfaultfd: Userfaultfd,
    /// Whether system calls can be filtered.
    pub(super) seccomp: Node,
    /// Landlock's version, or the `errno` of asking for it.
    pub(super) landlock: Result<u32, i32>,
    pub(super) tun: Node,
    /// Name and node of each vhost device.
    pub(super) vhost: Vec<(&'static str, Node)>,
    pub(super) open_files: Option<Limit>,
    /// In bytes.
    pub(super) locked_memory: Option<Limit>,
    pub(super) memory: Memory,
}

#[derive(Clone, Debug)]
pub(super) enum KvmFacts {
    /// There is no /dev/kvm; the virtualization that the processor itself has, if any.
    Missing { processor: Option<&'static str> },
    /// /dev/kvm is there and this user may not open it.
    Denied,
    /// Anything else that stands against it.
    Unusable(String),
    /// It can be used.
    Usable { max_vcpus: u32, guests: Guests },
}

/// What guests KVM runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Guests {
    /// Unmodified kernels.
    Kernels,
    /// Tiny guests of plain integer instructions, for this reason.
    TinyOnly(String),
    /// None, for this reason.
    None(String),
}

/// Whether a device node or a system call can be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Node {
    Usable,
    /// The `errno` of the attempt.
    Refused(i32),
}

impl Node {
    pub(super) fn of<T>(result: io::Result<T>) -> Self {
        match result {
            Ok(_) => Self::Usable,
            Err(error) => Self::Refused(error.raw_os_error().unwrap_or(libc::EIO)),
        }
    }
}

#[derive(Clone, Copy, Debug)]
pub(super) struct IoUring {
    pub(super) setup: Node,
    /// kernel.io_uring_disabled: 0 for all, 1 for a group, 2 for nobody.
    pub(super) disabled: Option<u64>,
}

#[derive(Clone, Debug, Default)]
pub(super) struct HugePages {
    /// By size, smallest first.
    pub(super) pools: Vec<Pool>,
    /// `always`, `madvise` or `never`.
    pub(super) transparent: Option<String>,
}

/// Huge pages of one size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Pool {
    /// Size of a page in bytes.
    pub(super) size: u64,
    pub(super) total: u64,
    pub(super) free: u64,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Userfaultfd {
    /// What it can do.
    pub(super) features: Features,
    pub(super) call: Node,
    pub(super) device: Node,
}

/// A resource limit; `None` is unlimited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Limit {
    pub(super) soft: Option<u64>,
    pub(super) hard: Option<u64>,
}

/// In bytes.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Memory {
    /// What the kernel says can be had without swapping.
    pub(super) available: Option<u64>,
    /// vm.overcommit_memory: 0 heuristic, 1 always, 2 never.
    pub(super) overcommit: Option<u64>,
    /// The lowest limit of the control groups that this process is in.
    pub(super) cgroup_limit: Option<u64>,
}
