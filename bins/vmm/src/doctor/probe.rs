//! Finds the facts. Everything that is a file is looked for under a root, so that tests can make one up.

use std::fs::{self, OpenOptions};
use std::io::{self, Read};
use std::path::{Component, Path, PathBuf};

use vmm_hypervisor::Hypervisor;
use vmm_hypervisor::kvm::{Kvm, OpenError};
use vmm_memory_manager::userfault::{self, Features};

use super::facts::{Facts, HugePages, IoUring, KvmFacts, Limit, Memory, Node, Pool, Userfaultfd};
use super::{guest, limits, syscalls};

/// The facts of the machine whose files are under `root`; system calls are those of this process.
pub(super) fn gather(root: &Path) -> Facts {
    Facts {
        kvm: kvm(root),
        io_uring: IoUring {
            setup: Node::of(syscalls::io_uring()),
            disabled: number(&root.join("proc/sys/kernel/io_uring_disabled")),
        },
        hugepages: hugepages(root),
        userfaultfd: Userfaultfd {
            features: userfault::supported().unwrap_or(Features::NONE),
            call: Node::of(syscalls::userfaultfd()),
            device: node(root, "dev/userfaultfd"),
        },
        seccomp: Node::of(syscalls::seccomp_trap()),
        landlock: syscalls::landlock_version().map_err(|e| e.raw_os_error().unwrap_or(libc::EIO)),
        tun: node(root, "dev/net/tun"),
        vhost: ["vhost-net", "vhost-vsock"].map(|name| (name, node(root, &format!("dev/{name}")))).into(),
        open_files: limit(root, "Max open files"),
        locked_memory: limit(root, "Max locked memory"),
        memory: memory(root),
    }
}

fn kvm(root: &Path) -> KvmFacts {
    match Kvm::open_path(&root.join("dev/kvm")) {
        Ok(kvm) => KvmFacts::Usable { max_vcpus: kvm.max_vcpus(), guests: guest::probe(kvm) },
        Err(OpenError::Open { source, .. }) if source.kind() == io::ErrorKind::PermissionDenied => {
            KvmFacts::Denied
        }
        Err(OpenError::Open { source, .. })
            if matches!(source.raw_os_error(), Some(libc::ENOENT | libc::ENODEV | libc::ENXIO)) =>
        {
            KvmFacts::Missing { processor: processor(&text(&root.join("proc/cpuinfo")).unwrap_or_default()) }
        }
        Err(error) => KvmFacts::Unusable(crate::exit::chain(&error)),
    }
}

/// The virtualization that the processor has, from /proc/cpuinfo.
fn processor(cpuinfo: &str) -> Option<&'static str> {
    let flags = cpuinfo.lines().find_map(|line| line.strip_prefix("flags"))?;
    let has = |flag: &str| flags.split_whitespace().any(|word| word == flag);
    if has("vmx") {
        Some("Intel VT-x")
    } else if has("svm") {
        Some("AMD-V")
    } else {
        None
    }
}

/// Whether a device can be opened for reading and writing.
fn node(root: &Path, path: &str) -> Node {
    Node::of(OpenOptions::new().read(true).write(true).open(root.join(path)))
}

/// Documentation/admin-guide/mm/hugetlbpage.rst and transhuge.rst of the kernel.
fn hugepages(root: &Path) -> HugePages {
    let mm = root.join("sys/kernel/mm");
    let entries = fs::read_dir(mm.join("hugepages")).into_iter().flatten().flatten();
    let mut pools: Vec<Pool> = entries.filter_map(|entry| pool(&entry.path())).collect();
    pools.sort_unstable();
    // The mode in force stands in brackets.
    let transparent = text(&mm.join("transparent_hugepage/enabled"))
        .and_then(|modes| Some(modes.split_once('[')?.1.split_once(']')?.0.to_owned()));
    HugePages { pools, transparent }
}

/// The pool of a folder `hugepages-<KIBIBYTES>kB`.
fn pool(folder: &Path) -> Option<Pool> {
    let name = folder.file_name()?.to_str()?;
    let kibibytes: u64 = name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()?;
    Some(Pool {
        size: kibibytes.checked_mul(1024)?,
        total: number(&folder.join("nr_hugepages"))?,
        free: number(&folder.join("free_hugepages"))?,
    })
}

fn limit(root: &Path, name: &str) -> Option<Limit> {
    limits::parse(&text(&root.join("proc/self/limits"))?, name)
}

fn memory(root: &Path) -> Memory {
    let meminfo = text(&root.join("proc/meminfo")).unwrap_or_default();
    let groups = text(&root.join("proc/self/cgroup")).unwrap_or_default();
    Memory {
        available: available(&meminfo),
        overcommit: number(&root.join("proc/sys/vm/overcommit_memory")),
        cgroup_limit: cgroup_limit(root, &groups),
    }
}

/// `MemAvailable` of /proc/meminfo, in bytes.
fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// The lowest memory limit on the way up from the groups of /proc/self/cgroup (cgroups(7)).
fn cgroup_limit(root: &Path, groups: &str) -> Option<u64> {
    let limits = groups.lines().flat_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, group) = (fields.next().unwrap_or_default(), fields.next().unwrap_or_default());
        let (tree, file) = match controllers {
            "" => ("sys/fs/cgroup", "memory.max"),
            list if list.split(',').any(|one| one == "memory") => {
                ("sys/fs/cgroup/memory", "memory.limit_in_bytes")
            }
            _ => return Vec::new(),
        };
        // A group may be shown relative to a namespace's root, with `..`; such steps are left out.
        let steps = Path::new(group).components().filter(|step| matches!(step, Component::Normal(_)));
        let group: PathBuf = steps.collect();
        group.ancestors().filter_map(|group| number(&root.join(tree).join(group).join(file))).collect()
    });
    // The first version says "unlimited" by a number close to 2^63.
    limits.filter(|limit| *limit < 1 << 60).min()
}

/// The number that a file holds; `max` and the like are none.
fn number(path: &Path) -> Option<u64> {
    text(path)?.trim().parse().ok()
}

/// The text of a file, of its first megabyte.
fn text(path: &Path) -> Option<String> {
    let mut text = String::new();
    fs::File::open(path).ok()?.take(1 << 20).read_to_string(&mut text).ok()?;
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine of these files.
    fn machine(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    #[test]
    fn a_machine_without_files_has_nothing() {
        let root = machine(&[]);
        let facts = gather(root.path());
        assert!(matches!(facts.kvm, KvmFacts::Missing { processor: None }), "{facts:?}");
        assert_eq!(facts.tun, Node::Refused(libc::ENOENT));
        assert!(facts.vhost.iter().all(|(_, node)| *node == Node::Refused(libc::ENOENT)));
        assert_eq!((facts.open_files, facts.locked_memory), (None, None));
        assert!(facts.hugepages.pools.is_empty());
        assert_eq!(
            (facts.memory.available, facts.memory.overcommit, facts.memory.cgroup_limit),
            (None, None, None)
        );
    }

    #[test]
    fn what_is_no_kvm_is_told() {
        let root = machine(&[("dev/kvm", "")]);
        let KvmFacts::Unusable(why) = gather(root.path()).kvm else {
            panic!("a plain file is no KVM");
        };
        assert!(why.contains("KVM"), "{why}");
    }

    #[test]
    fn the_processor_tells_its_virtualization() {
        assert_eq!(processor("model\t: x\nflags\t\t: fpu vmx sse\n"), Some("Intel VT-x"));
        assert_eq!(processor("flags\t\t: fpu svm\nflags\t\t: vmx\n"), Some("AMD-V"));
        assert_eq!(processor("vmx flags\t: vnmi\nflags\t\t: fpu svm_lock\n"), None);
        assert_eq!(processor(""), None);
    }

    #[test]
    fn reads_huge_pages() {
        let pool = "sys/kernel/mm/hugepages/hugepages";
        let file = |size: &str, name: &str| format!("{pool}-{size}kB/{name}");
        let root = machine(&[
            (&file("1048576", "nr_hugepages"), "1\n"),
            (&file("1048576", "free_hugepages"), "0\n"),
            (&file("2048", "nr_hugepages"), "8\n"),
            (&file("2048", "free_hugepages"), "4\n"),
            (&file("64", "nr_hugepages"), "torn"),
            (&file("99999999999999999999", "nr_hugepages"), "1\n"),
            ("sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never\n"),
        ]);
        let found = hugepages(root.path());
        let expected = [Pool { size: 2 << 20, total: 8, free: 4 }, Pool { size: 1 << 30, total: 1, free: 0 }];
        assert_eq!(found.pools, expected);
        assert_eq!(found.transparent.as_deref(), Some("madvise"));
    }

    #[test]
    fn the_lowest_limit_on_the_way_up_counts() {
        let root = machine(&[
            ("sys/fs/cgroup/a/memory.max", "1000\n"),
            ("sys/fs/cgroup/a/b/memory.max", "max\n"),
            ("sys/fs/cgroup/a/b/c/memory.max", "2000\n"),
            ("sys/fs/cgroup/memory/old/memory.limit_in_bytes", "500\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n"),
        ]);
        let limit = |groups| cgroup_limit(root.path(), groups);
        assert_eq!(limit("0::/a/b/c\n"), Some(1000));
        assert_eq!(limit("0::/../a/b\n"), Some(1000));
        assert_eq!(limit("5:cpu,memory:/old\n4:cpu:/a\n0::/\n"), Some(500));
        assert_eq!(limit("4:memory:/\n0::/elsewhere\n"), None);
        assert_eq!(limit("torn"), None);
    }

    #[test]
    fn reads_available_memory() {
        assert_eq!(available("MemTotal: 9 kB\nMemAvailable:   2048 kB\n"), Some(2 << 20));
        assert_eq!(available("MemAvailable: 99999999999999999999 kB\n"), None);
        assert_eq!(available(""), None);
    }
}
