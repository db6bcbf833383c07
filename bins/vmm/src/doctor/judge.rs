//! What the facts mean, and what to do.

use std::io;

use vmm_memory_manager::userfault::Features;

use super::facts::{Facts, Guests, HugePages, IoUring, KvmFacts, Memory, Node, Pool, Userfaultfd};
use super::{Check, Verdict, limits};

/// Memory of a VM whose configuration does not say.
const DEFAULT_GUEST: u64 = 512 << 20;

/// Judges the facts; always the same checks in the same order.
pub(super) fn judge(facts: &Facts) -> Vec<Check> {
    vec![
        kvm(&facts.kvm),
        guests(&facts.kvm),
        io_uring(facts.io_uring),
        hugepages(&facts.hugepages),
        userfaultfd(facts.userfaultfd),
        seccomp(facts.seccomp),
        landlock(facts.landlock),
        tun(facts.tun),
        vhost(&facts.vhost),
        limits::open_files(facts.open_files),
        limits::locked_memory(facts.locked_memory),
        memory(facts.memory),
    ]
}

pub(super) fn ok(name: &'static str, found: impl Into<String>) -> Check {
    Check { name, verdict: Verdict::Ok, found: found.into(), advice: None }
}

pub(super) fn warn(name: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Check {
    Check { name, verdict: Verdict::Warn, found: found.into(), advice: Some(advice.into()) }
}

fn fail(name: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Check {
    Check { verdict: Verdict::Fail, ..warn(name, found, advice) }
}

fn kvm(facts: &KvmFacts) -> Check {
    let name = "kvm";
    match facts {
        KvmFacts::Usable { max_vcpus, .. } => {
            ok(name, format!("/dev/kvm has all that is needed; up to {max_vcpus} vCPUs in a VM"))
        }
        KvmFacts::Denied => fail(
            name,
            "this user may not open /dev/kvm",
            "add the user to its group (`sudo usermod -aG kvm $USER`) and log in again",
        ),
        KvmFacts::Missing { processor: Some(feature) } => fail(
            name,
            format!("there is no /dev/kvm, though the processor has {feature}"),
            "load KVM's module (`sudo modprobe kvm_intel` or `kvm_amd`); in a container, pass /dev/kvm in; if \
             the module says \"disabled by bios\", turn virtualization on in the firmware's settings",
        ),
        KvmFacts::Missing { processor: None } => fail(
            name,
            "there is no /dev/kvm, and the processor shows no virtualization (vmx or svm)",
            "turn virtualization on in the firmware's settings; in a VM, turn nested virtualization on for it",
        ),
        KvmFacts::Unusable(why) => fail(name, why, "use Linux 5.10 or later with its own KVM"),
    }
}

fn guests(facts: &KvmFacts) -> Check {
    let name = "guests";
    match facts {
        KvmFacts::Usable { guests: Guests::Kernels, .. } => ok(name, "unmodified kernels run"),
        KvmFacts::Usable { guests: Guests::TinyOnly(why), .. } => warn(
            name,
            format!(
                "only tiny guests run, no unmodified kernel: this KVM emulates guest kernel code and lacks \
                 instructions ({why})"
            ),
            "use a machine whose KVM has hardware virtualization (Intel VT-x or AMD-V) under it",
        ),
        KvmFacts::Usable { guests: Guests::None(why), .. } => {
            fail(name, format!("the simplest guest does not run: {why}"), "look for a reason in `dmesg`")
        }
        _ => fail(name, "not tried, for KVM cannot be used", "see kvm above"),
    }
}

fn io_uring(facts: IoUring) -> Check {
    let name = "io_uring";
    match (facts.setup, facts.disabled) {
        (Node::Usable, _) => ok(name, "it can be used"),
        (Node::Refused(_), Some(disabled @ 1..)) => warn(
            name,
            format!("kernel.io_uring_disabled is {disabled}; disks use slower means"),
            "`sudo sysctl kernel.io_uring_disabled=0`",
        ),
        (Node::Refused(libc::ENOSYS), _) => warn(
            name,
            "the kernel has none, or a system call filter hides it; disks use slower means",
            "use Linux 5.10 or later; in a container, allow io_uring in its seccomp profile",
        ),
        (Node::Refused(errno), _) => warn(
            name,
            format!("it is refused ({}); disks use slower means", text(errno)),
            "in a container, allow io_uring in its seccomp profile",
        ),
    }
}

fn hugepages(facts: &HugePages) -> Check {
    let name = "huge pages";
    let transparent = match &facts.transparent {
        Some(mode) => format!("transparent ones: {mode}"),
        None => "no transparent ones".into(),
    };
    let pool = |pool: &Pool| format!("{} free of {} of {}", pool.free, pool.total, size(pool.size));
    let reserved: Vec<String> = facts.pools.iter().filter(|pool| pool.total > 0).map(pool).collect();
    if facts.pools.iter().any(|pool| pool.free > 0) {
        return ok(name, format!("{}; {transparent}", reserved.join(", ")));
    }
    let found = if reserved.is_empty() { "none reserved".to_owned() } else { reserved.join(", ") };
    warn(
        name,
        format!("{found}, so `--memory hugepages=on` cannot work; {transparent}"),
        "only if you want it: `sudo sysctl vm.nr_hugepages=512` reserves 512 pages of the default size",
    )
}

fn userfaultfd(facts: Userfaultfd) -> Check {
    let name = "userfaultfd";
    match (facts.call, facts.device) {
        (Node::Usable, _) | (_, Node::Usable) => {
            let lacking = |wanted| facts.features.lacking(wanted) != Features::NONE;
            if lacking(Features::WRITE_PROTECT | Features::WRITE_PROTECT_SHARED) {
                return warn(
                    name,
                    "it does not protect all memory from writes, so live snapshots are taken in passes",
                    "only for live snapshots: use Linux 5.19 or later",
                );
            }
            let door = if facts.call == Node::Usable { "" } else { " through /dev/userfaultfd" };
            ok(
                name,
                format!("it can be used{door}, for live snapshots of one moment and for memory on demand"),
            )
        }
        (Node::Refused(libc::ENOSYS), _) => warn(
            name,
            "the kernel has none",
            "only for live snapshots and memory on demand: use a kernel with CONFIG_USERFAULTFD",
        ),
        (Node::Refused(errno), _) => warn(
            name,
            format!("it is refused for faults of the kernel ({})", text(errno)),
            "only for live snapshots and memory on demand: `sudo sysctl vm.unprivileged_userfaultfd=1`, or give this \
             user access to /dev/userfaultfd",
        ),
    }
}

fn seccomp(node: Node) -> Check {
    let name = "seccomp";
    match node {
        Node::Usable => ok(name, "system calls can be filtered"),
        Node::Refused(errno) => warn(
            name,
            format!("system calls cannot be filtered ({}); VMs run only with `--seccomp false`", text(errno)),
            "use a kernel with CONFIG_SECCOMP_FILTER",
        ),
    }
}

fn landlock(version: Result<u32, i32>) -> Check {
    let name = "landlock";
    let advice = "use Linux 5.13 or later with `landlock` among its security modules (boot parameter lsm=)";
    match version {
        Ok(version) => ok(name, format!("paths can be confined (ABI {version})")),
        Err(libc::EOPNOTSUPP) => warn(name, "it is switched off; paths are not confined", advice),
        Err(libc::ENOSYS) => warn(name, "the kernel has none; paths are not confined", advice),
        Err(errno) => {
            let found = format!("it is refused ({}); paths are not confined", text(errno));
            warn(name, found, "in a container, allow landlock in its seccomp profile")
        }
    }
}

fn tun(node: Node) -> Check {
    let name = "tun";
    match node {
        Node::Usable => ok(name, "/dev/net/tun can be used"),
        Node::Refused(libc::ENOENT | libc::ENODEV | libc::ENXIO) => warn(
            name,
            "there is no /dev/net/tun",
            "only for network devices: `sudo modprobe tun`; in a container, pass /dev/net/tun in",
        ),
        Node::Refused(errno) => warn(
            name,
            format!("/dev/net/tun cannot be opened ({})", text(errno)),
            "only for network devices: give this user access to /dev/net/tun",
        ),
    }
}

fn vhost(nodes: &[(&'static str, Node)]) -> Check {
    let name = "vhost";
    let names = |usable: bool| {
        let chosen = nodes.iter().filter(|(_, node)| (*node == Node::Usable) == usable);
        chosen.map(|(name, _)| format!("/dev/{name}")).collect::<Vec<_>>()
    };
    let (usable, missing) = (names(true).join(", "), names(false));
    if missing.is_empty() {
        return ok(name, format!("{usable} can be used"));
    }
    let modules = missing.iter().map(|node| node.trim_start_matches("/dev/").replace('-', "_"));
    let have = if usable.is_empty() { "none".to_owned() } else { usable };
    warn(
        name,
        format!("usable: {have}; not usable: {}", missing.join(", ")),
        format!(
            "only for devices that the kernel serves: `sudo modprobe -a {}`, and give this user access",
            modules.collect::<Vec<_>>().join(" ")
        ),
    )
}

fn memory(facts: Memory) -> Check {
    let name = "memory";
    let usable = match (facts.available, facts.cgroup_limit) {
        (Some(available), Some(limit)) => Some(available.min(limit)),
        (available, limit) => available.or(limit),
    };
    let mut found =
        facts.available.map_or("free memory unknown".into(), |b| format!("{} available", size(b)));
    if let Some(limit) = facts.cgroup_limit {
        found = format!("{found}, control group limited to {}", size(limit));
    }
    if usable.is_some_and(|usable| usable < DEFAULT_GUEST) {
        return warn(
            name,
            format!("{found}: less than the {} of a VM by default", size(DEFAULT_GUEST)),
            "give guests less (`--memory size=256M`), or raise the limit",
        );
    }
    if facts.overcommit == Some(2) {
        return warn(
            name,
            format!("{found}; vm.overcommit_memory is 2, so all memory of a guest counts when it starts"),
            "`sudo sysctl vm.overcommit_memory=0`, unless this is intended",
        );
    }
    ok(name, found)
}

/// Bytes in the largest unit that keeps a digit before the point.
pub(super) fn size(bytes: u64) -> String {
    let units = [(1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    match units.iter().find(|(unit, _)| bytes >= *unit) {
        Some((unit, name)) if bytes.is_multiple_of(*unit) => format!("{} {name}", bytes / unit),
        Some((unit, name)) => {
            let tenths = u128::from(bytes) * 10 / u128::from(*unit);
            format!("{}.{} {name}", tenths / 10, tenths % 10)
        }
        None => format!("{bytes} bytes"),
    }
}

fn text(errno: i32) -> String {
    let text = io::Error::from_raw_os_error(errno).to_string();
    // Without the "(os error 1)" that Rust adds.
    text.split(" (os error").next().unwrap_or(&text).to_owned()
}

#[cfg(test)]
mod tests {
    use super::super::facts::Limit;
    use super::*;

    const GOOD: Node = Node::Usable;

    fn all() -> Features {
        Features::WRITE_PROTECT | Features::WRITE_PROTECT_SHARED
    }

    /// A machine on which all is well.
    fn well() -> Facts {
        let limit = Some(Limit { soft: Some(20_000), hard: None });
        Facts {
            kvm: KvmFacts::Usable { max_vcpus: 1024, guests: Guests::Kernels },
            io_uring: IoUring { setup: GOOD, disabled: Some(0) },
            hugepages: HugePages {
                pools: vec![
                    Pool { size: 2 << 20, total: 8, free: 4 },
                    Pool { size: 1 << 30, total: 0, free: 0 },
                ],
                transparent: Some("madvise".into()),
            },
            userfaultfd: Userfaultfd { features: all(), call: GOOD, device: GOOD },
            seccomp: GOOD,
            landlock: Ok(7),
            tun: GOOD,
            vhost: vec![("vhost-net", GOOD), ("vhost-vsock", GOOD)],
            open_files: limit,
            locked_memory: Some(Limit { soft: None, hard: None }),
            memory: Memory { available: Some(5 << 30), overcommit: Some(0), cgroup_limit: None },
        }
    }

    /// The one check that is not ok after `change`.
    fn complaint(change: impl FnOnce(&mut Facts)) -> Check {
        let mut facts = well();
        change(&mut facts);
        let mut bad: Vec<Check> = judge(&facts).into_iter().filter(|c| c.verdict != Verdict::Ok).collect();
        assert_eq!(bad.len(), 1, "{bad:?}");
        bad.remove(0)
    }

    #[track_caller]
    fn assert_says(check: &Check, name: &str, verdict: Verdict, found: &str, advice: &str) {
        assert_eq!((check.name, check.verdict), (name, verdict), "{check:?}");
        assert!(check.found.contains(found), "{check:?}");
        assert!(check.advice.as_deref().unwrap_or_default().contains(advice), "{check:?}");
    }

    #[test]
    fn all_is_well() {
        for check in judge(&well()) {
            assert_eq!((check.verdict, &check.advice), (Verdict::Ok, &None), "{check:?}");
        }
    }

    #[test]
    fn without_kvm_no_vm_runs() {
        let of = |kvm| {
            let checks = judge(&Facts { kvm, ..well() });
            assert_says(&checks[1], "guests", Verdict::Fail, "not tried", "kvm above");
            checks[0].clone()
        };
        let missing = |processor| of(KvmFacts::Missing { processor });
        assert_says(&of(KvmFacts::Denied), "kvm", Verdict::Fail, "may not open", "usermod");
        assert_says(&missing(Some("AMD-V")), "kvm", Verdict::Fail, "AMD-V", "modprobe");
        assert_says(&missing(None), "kvm", Verdict::Fail, "no virtualization", "firmware");
        let old = of(KvmFacts::Unusable("KVM lacks KVM_CAP_IRQFD".into()));
        assert_says(&old, "kvm", Verdict::Fail, "KVM_CAP_IRQFD", "Linux");
    }

    #[test]
    fn an_emulating_kvm_is_named_in_plain_words() {
        let of = |guests| complaint(|facts| facts.kvm = KvmFacts::Usable { max_vcpus: 1, guests });
        let tiny = of(Guests::TinyOnly("cmpxchg16b".into()));
        assert_says(&tiny, "guests", Verdict::Warn, "no unmodified kernel", "hardware virtualization");
        let none = of(Guests::None("KVM_RUN failed".into()));
        assert_says(&none, "guests", Verdict::Fail, "KVM_RUN failed", "dmesg");
    }

    #[test]
    fn a_sandbox_that_cannot_be_is_told() {
        let seccomp = complaint(|facts| facts.seccomp = Node::Refused(libc::ENOSYS));
        assert_says(&seccomp, "seccomp", Verdict::Warn, "--seccomp false", "CONFIG_SECCOMP_FILTER");
        let landlock = |errno| complaint(|facts| facts.landlock = Err(errno));
        assert_says(&landlock(libc::ENOSYS), "landlock", Verdict::Warn, "has none", "5.13");
        assert_says(&landlock(libc::EOPNOTSUPP), "landlock", Verdict::Warn, "switched off", "lsm=");
        assert_says(&landlock(libc::EPERM), "landlock", Verdict::Warn, "not permitted", "container");
    }

    #[test]
    fn io_uring_says_who_refuses() {
        let of = |errno, disabled| {
            complaint(|facts| facts.io_uring = IoUring { setup: Node::Refused(errno), disabled })
        };
        assert_says(&of(libc::EPERM, Some(2)), "io_uring", Verdict::Warn, "io_uring_disabled is 2", "sysctl");
        assert_says(&of(libc::ENOSYS, None), "io_uring", Verdict::Warn, "has none", "seccomp");
        let refused = of(libc::EPERM, Some(0));
        assert_says(&refused, "io_uring", Verdict::Warn, "(Operation not permitted)", "seccomp");
    }

    #[test]
    fn huge_pages_must_be_free() {
        let none = complaint(|facts| facts.hugepages = HugePages::default());
        assert_says(&none, "huge pages", Verdict::Warn, "none reserved", "nr_hugepages");
        let taken = complaint(|facts| facts.hugepages.pools[0].free = 0);
        assert_says(&taken, "huge pages", Verdict::Warn, "0 free of 8 of 2 MiB", "nr_hugepages");
        let checks = judge(&well());
        assert_eq!(checks[3].found, "4 free of 8 of 2 MiB; transparent ones: madvise");
    }

    #[test]
    fn userfaultfd_has_two_doors() {
        let refused = Node::Refused;
        let of = |call, device| {
            complaint(|facts| facts.userfaultfd = Userfaultfd { features: all(), call, device })
        };
        let denied = of(refused(libc::EPERM), refused(libc::EACCES));
        assert_says(&denied, "userfaultfd", Verdict::Warn, "not permitted", "unprivileged_userfaultfd");
        let none = of(refused(libc::ENOSYS), refused(libc::ENOENT));
        assert_says(&none, "userfaultfd", Verdict::Warn, "has none", "CONFIG_USERFAULTFD");
        let device = Facts {
            userfaultfd: Userfaultfd { features: all(), call: refused(libc::EPERM), device: GOOD },
            ..well()
        };
        assert_eq!(judge(&device)[4].verdict, Verdict::Ok);
        let old = complaint(|facts| facts.userfaultfd.features = Features::WRITE_PROTECT);
        assert_says(&old, "userfaultfd", Verdict::Warn, "in passes", "5.19");
    }

    #[test]
    fn device_nodes_are_named() {
        let of = |errno| complaint(|facts| facts.tun = Node::Refused(errno));
        assert_says(&of(libc::ENOENT), "tun", Verdict::Warn, "there is no", "modprobe tun");
        assert_says(&of(libc::EACCES), "tun", Verdict::Warn, "Permission denied", "access");
        let vhost = complaint(|facts| facts.vhost[0].1 = Node::Refused(libc::ENOENT));
        assert_says(
            &vhost,
            "vhost",
            Verdict::Warn,
            "usable: /dev/vhost-vsock; not usable: /dev/vhost-net",
            "-a vhost_net`",
        );
    }

    #[test]
    fn memory_counts_the_control_group() {
        let little = complaint(|facts| facts.memory.cgroup_limit = Some(256 << 20));
        assert_says(&little, "memory", Verdict::Warn, "limited to 256 MiB", "--memory");
        let little = complaint(|facts| facts.memory.available = Some(100 << 20));
        assert_says(&little, "memory", Verdict::Warn, "100 MiB available", "--memory");
        let strict = complaint(|facts| facts.memory.overcommit = Some(2));
        assert_says(&strict, "memory", Verdict::Warn, "overcommit_memory is 2", "sysctl");
        let unknown = judge(&Facts { memory: Memory::default(), ..well() });
        assert_eq!(unknown[11].found, "free memory unknown");
    }

    #[test]
    fn sizes_read_well() {
        let expected = [
            (0, "0 bytes"),
            (1023, "1023 bytes"),
            (1024, "1 KiB"),
            ((5 << 30) + (200 << 20), "5.1 GiB"),
            (u64::MAX, "17179869183.9 GiB"),
        ];
        for (bytes, text) in expected {
            assert_eq!(size(bytes), text);
        }
    }
}
