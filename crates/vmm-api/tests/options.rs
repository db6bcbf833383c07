//! Option strings against the JSON they stand for.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]

use serde_json::{Value, json};
use vmm_api::config::{Fault, FaultKind, UnknownFields, VmConfig, parse_vm_config};
use vmm_api::options::{Arity, FLAGS, Flag, VmFlags, help_for};
use vmm_fuzzing::{Random, rounds};

fn flags(given: &[(&str, &str)]) -> VmFlags {
    let mut flags = VmFlags::new();
    given.iter().for_each(|(name, value)| flags.add(name, value).unwrap());
    flags
}

fn parse(given: &[(&str, &str)]) -> VmConfig {
    flags(given).parse().unwrap_or_else(|faults| panic!("{given:?}: {faults:?}")).config
}

fn faults(given: &[(&str, &str)]) -> Vec<Fault> {
    flags(given).parse().unwrap_err()
}

fn one_fault(flag: &str, text: &str) -> Fault {
    let mut faults = faults(&[(flag, text)]);
    assert_eq!(faults.len(), 1, "{faults:?}");
    faults.remove(0)
}

#[test]
fn option_strings_mean_what_their_json_means() {
    let cpus = json!({"cpus": {
        "boot_vcpus": 2, "max_vcpus": 4, "nested": false, "max_phys_bits": 40, "core_scheduling": "Vcpu",
        "topology": {"threads_per_core": 2, "cores_per_die": 1, "dies_per_package": 1, "packages": 2},
        "affinity": [{"vcpu": 0, "host_cpus": [1, 2, 3, 4]}, {"vcpu": 1, "host_cpus": [7]}],
    }});
    let text = "boot=2,max=4,nested=off,max_phys_bits=40,core_scheduling=vcpu,topology=2:1:1:2,affinity=[0@[1,2-4],1@[7]]";
    let cases: &[(&[(&str, &str)], Value)] = &[
        (&[], json!({})),
        (&[("cpus", text)], cpus),
        (&[("cpus", "boot=3")], json!({"cpus": {"boot_vcpus": 3, "max_vcpus": 3}})),
        (&[("cpus", "max=3")], json!({"cpus": {"boot_vcpus": 1, "max_vcpus": 3}})),
        (&[("cpus", "features=[]")], json!({"cpus": {"boot_vcpus": 1, "max_vcpus": 1, "features": {}}})),
        (
            &[("memory", "size=1G,shared=on,hugepages=true,hugepage_size=2M,thp=off")],
            json!({"memory": {"size": 1 << 30, "shared": true, "hugepages": true, "hugepage_size": 2 << 20, "thp": false}}),
        ),
        (&[("memory", "mergeable=on")], json!({"memory": {"size": 512 << 20, "mergeable": true}})),
        (
            &[("memory-zone", "id=a"), ("memory-zone", "id=b,size=4096,file=/f")],
            json!({"memory": {"size": 0, "zones": [{"id": "a", "size": 512 << 20}, {"id": "b", "size": 4096, "file": "/f"}]}}),
        ),
        (
            &[("memory", "size=0,prefault=on"), ("memory-zone", "id=a,size=1G")],
            json!({"memory": {"size": 0, "prefault": true, "zones": [{"id": "a", "size": 1 << 30}]}}),
        ),
        (
            &[("kernel", "/k"), ("initramfs", "/i,with=comma"), ("cmdline", "a=\"b c\" root=/dev/vda1,x")],
            json!({"payload": {"kernel": "/k", "initramfs": "/i,with=comma", "cmdline": "a=\"b c\" root=/dev/vda1,x"}}),
        ),
        (&[("firmware", "/fw")], json!({"payload": {"firmware": "/fw"}})),
        (
            &[
                ("disk", "path=/a,readonly=on,image_type=raw,lock_granularity=full,_disable_io_uring=on"),
                ("disk", "path=\"/b,c\",id=x"),
            ],
            json!({"disks": [
             {"path": "/a", "readonly": true, "image_type": "Raw", "lock_granularity": "Full", "disable_io_uring": true},
             {"path": "/b,c", "id": "x"}]}),
        ),
        (
            &[("disk", "path=/a,poll_queue=on,image_type=VHD,serial=S 1,pci_device_id=0x1f")],
            json!({"disks": [{"path": "/a", "image_type": "FixedVhd", "serial": "S 1", "pci_device_id": 31}]}),
        ),
        (
            &[("disk", "path=/a,bw_size=0,bw_refill_time=0,ops_size=5,iommu=off")],
            json!({"disks": [{"path": "/a", "rate_limiter_config": {}}]}),
        ),
        (&[("rng", "src=/dev/random,id=r")], json!({"rng": {"src": "/dev/random", "id": "r"}})),
        (&[("rng", "id=r")], json!({"rng": {"src": "/dev/urandom", "id": "r"}})),
        (&[("serial", "tty")], json!({"serial": {"mode": "Tty"}})),
        (&[("serial", "file=/tmp/a=b")], json!({"serial": {"mode": "File", "file": "/tmp/a=b"}})),
        (&[("serial", "socket=/tmp/s")], json!({"serial": {"mode": "Socket", "socket": "/tmp/s"}})),
        (&[("console", "pty,id=c")], json!({"console": {"mode": "Pty", "id": "c"}})),
        (&[("console", "off")], json!({"console": {"mode": "Off"}})),
        (
            &[("debug-console", "file=/d,iobase=0x402")],
            json!({"debug_console": {"mode": "File", "file": "/d", "iobase": 0x402}}),
        ),
        (&[("pvpanic", "")], json!({"pvpanic": true})),
        (
            &[("platform", "num_pci_segments=1,iommu_address_width=64")],
            json!({"platform": {"num_pci_segments": 1, "iommu_address_width_bits": 64}}),
        ),
    ];
    for (given, json) in cases {
        // A limiter is part of a later capability even when empty; only its reading is compared.
        match (flags(given).parse(), parse_vm_config(json.to_string().as_bytes(), UnknownFields::Refuse)) {
            (Ok(ours), Ok(theirs)) => assert_eq!(ours.config, theirs.config, "{given:?}"),
            (Err(ours), Err(theirs)) => assert_eq!(ours.len(), theirs.len(), "{given:?}"),
            (ours, theirs) => panic!("{given:?}: {ours:?} but {theirs:?}"),
        }
    }
}

#[test]
fn later_objects_are_read_before_they_are_refused() {
    for (flag, text) in [
        (
            "net",
            "tap=t,ip=10.0.0.1,mask=255.255.255.0,mac=12:34:56:78:90:ab,fd=[3,4],num_queues=4,bw_size=1,bw_refill_time=1",
        ),
        ("net", "fd=3:4,vhost_mode=server,socket=/s"),
        ("balloon", "size=1G,deflate_on_oom=on"),
        ("fs", "tag=t,socket=/s,num_queues=1,queue_size=1024"),
        ("generic-vhost-user", "socket=/s,virtio_id=26,queue_sizes=[128,256]"),
        ("pmem", "file=/p,size=2M,discard_writes=on"),
        ("device", "path=/sys/bus/pci/devices/0000:00:01.0,x_exclude_mmap_bars=[0,1-2]"),
        ("user-device", "socket=/s"),
        ("vdpa", "path=/dev/vhost-vdpa-0,num_queues=2"),
        ("vsock", "cid=3,socket=/s"),
        ("numa", "guest_numa_id=0,cpus=[0-3],distances=[1@20,2@25],memory_zones=[a,b]"),
        ("numa", "guest_numa_id=0,distances=[(1@20)]"),
        ("rtc", "id=r"),
        ("pci-segment", "pci_segment=0,mmio32_aperture_weight=2"),
        ("tpm", "socket=/s"),
        ("ivshmem", "path=/p"),
        ("rate-limit-group", "id=g,ops_size=10,ops_refill_time=10"),
        ("fw-cfg-config", "e820=off"),
        ("watchdog", ""),
    ] {
        let fault = one_fault(flag, text);
        assert_eq!(fault.kind, FaultKind::NotBuilt, "--{flag} {text}: {fault}");
        assert!(fault.path.starts_with(&format!("--{flag}")), "--{flag} {text}: {fault}");
    }
    let fault = one_fault("platform", "uuid=u");
    assert_eq!((fault.path.as_str(), fault.kind), ("--platform system_uuid", FaultKind::NotBuilt));
}

#[test]
fn faults_name_flag_and_key() {
    for (flag, text, path, message) in [
        ("cpus", "boot=x", "--cpus boot", "expected a whole number from 0 to 4294967295, found \"x\""),
        ("cpus", "boot=-1", "--cpus boot", "expected a whole number from 0 to 4294967295, found -1"),
        ("cpus", "bot=1", "--cpus bot", "unknown key; did you mean \"boot\"?"),
        ("cpus", "boot_vcpus=1", "--cpus boot_vcpus", ""),
        (
            "cpus",
            "topology=1:2",
            "--cpus topology",
            "expected threads_per_core:cores_per_die:dies_per_package:packages, found \"1:2\"",
        ),
        (
            "cpus",
            "topology=1:x:1:1",
            "--cpus topology",
            "expected a whole number from 0 to 4294967295, found \"x\"",
        ),
        (
            "cpus",
            "affinity=[0@1-9999999]",
            "--cpus affinity",
            "expected numbers and ranges such as [1,3-5], found \"1-9999999\"",
        ),
        ("cpus", "affinity=[0@[1]", "--cpus", "a '[' without its ']'"),
        ("cpus", "boot=1,boot=2", "--cpus boot", "given twice"),
        ("cpus", "boot", "--cpus boot", "needs a value"),
        ("cpus", "nested=maybe", "--cpus nested", "expected on or off, found \"maybe\""),
        (
            "memory",
            "size=1X",
            "--memory size",
            "expected a number of bytes such as 4096, 512M or 1G, found \"1X\"",
        ),
        ("memory", "size=16777216T", "--memory size", ""),
        ("memory", "file=/f", "--memory file", "no longer supported: use a memory zone with a file"),
        ("memory-zone", "size=1G", "--memory-zone id", "is required, and missing"),
        (
            "disk",
            "path=/d,poll_queue=off",
            "--disk poll_queue",
            "no longer supported: queues are always polled as needed",
        ),
        (
            "disk",
            "path=/d,image_type=qcow",
            "--disk image_type",
            "expected one of unknown, raw, qcow2, vhd, vhdx, found \"qcow\"; did you mean \"qcow2\"?",
        ),
        (
            "disk",
            "path=/d,queue_size=70000",
            "--disk queue_size",
            "expected a whole number from 0 to 65535, found 70000",
        ),
        ("serial", "tty,pty", "--serial pty", "given twice"),
        ("serial", "", "--serial ", ""),
        ("debug-console", "socket=/s", "--debug-console socket", ""),
        ("disk", "path=/d,,", "--disk ", ""),
    ] {
        let faults = faults(&[(flag, text)]);
        let fault = &faults[0];
        assert_eq!(fault.path, path, "--{flag} {text}");
        assert!(message.is_empty() || fault.message == message, "--{flag} {text}: {fault}");
    }
}

#[test]
fn several_flags_are_told_apart_and_all_faults_are_listed() {
    let given = [
        ("disk", "path=/a,readonly=x,direct=y"),
        ("disk", "path=/b,iommu=on"),
        ("kernel", "/k"),
        ("kernel", "/l"),
        ("net", "tap=t"),
    ];
    let mut paths: Vec<String> = faults(&given).into_iter().map(|fault| fault.path).collect();
    paths.sort();
    assert_eq!(paths, ["--disk[0] direct", "--disk[0] readonly", "--disk[1] iommu", "--kernel", "--net"]);
}

#[test]
fn a_key_that_cannot_be_read_is_not_missing_too() {
    let paths = |text| faults(&[("vsock", text)]).into_iter().map(|fault| fault.path).collect::<Vec<_>>();
    assert_eq!(paths("cid=x,socket=/s"), ["--vsock cid", "--vsock"]);
    assert_eq!(paths("cid=3"), ["--vsock socket", "--vsock"]);
}

#[test]
fn json_paths_become_flags() {
    let flags = flags(&[("disk", "path=/a"), ("disk", "path=/b")]);
    for (path, name) in [
        ("disks[1].vhost_socket", "--disk[1] socket"),
        ("disks", "--disk"),
        ("cpus.topology", "--cpus topology"),
        ("cpus.affinity[2].vcpu", "--cpus affinity[2] vcpu"),
        ("memory.size", "--memory size"),
        ("memory.zones[0].id", "--memory-zone id"),
        ("payload", "--kernel"),
        ("payload.cmdline", "--cmdline"),
        ("serial.file", "--serial file"),
        ("$", "$"),
    ] {
        assert_eq!(flags.name(path), name);
    }
}

#[test]
fn every_flag_has_a_target_a_text_and_help() {
    for flag in FLAGS {
        assert!(!flag.doc().is_empty(), "--{}", flag.name);
        assert_eq!(flag.arity() == Arity::Switch, flag.value.is_empty(), "--{}", flag.name);
        assert_eq!(
            help_for(flag.name).is_some(),
            matches!(flag.value, "OPTIONS" | "MODE"),
            "--{}",
            flag.name
        );
        if let Some(help) = help_for(flag.name) {
            assert!(help.lines().count() > 0, "--{}", flag.name);
        }
    }
    assert_eq!(Flag::by_name("disk").unwrap().arity(), Arity::Many);
    assert_eq!(Flag::by_name("cpus").unwrap().arity(), Arity::Once);
    assert!(VmFlags::new().add("dsk", "").is_err());
    assert_eq!(help_for("nothing"), None);
}

#[test]
fn help_lists_keys_values_and_defaults() {
    let cpus = help_for("cpus").unwrap();
    assert!(cpus.contains("boot=<number>\n    vCPUs that run at boot. [default: 1]"), "{cpus}");
    assert!(
        cpus.contains("topology=<threads_per_core>:<cores_per_die>:<dies_per_package>:<packages>"),
        "{cpus}"
    );
    assert!(cpus.contains("affinity=[<vcpu>@[<host_cpus>,..],..]"), "{cpus}");
    assert!(cpus.contains("Not in this build yet, accepted at their defaults: kvm_hyperv"), "{cpus}");
    assert!(
        help_for("memory")
            .unwrap()
            .contains("size=<size>\n    Size in bytes; 0 if zones are given. [default: 512M]")
    );
    assert!(help_for("serial").unwrap().starts_with("off|null|tty|pty|file=<path>|socket=<path>"));
    assert!(help_for("serial").unwrap().contains("[default: null]"));
    assert!(help_for("debug-console").unwrap().starts_with("off|null|tty|pty|file=<path>\n"));
}

#[test]
fn fuzz_option_strings() {
    let seeds = [
        ("cpus", "boot=2,max=4,topology=1:2:1:2,affinity=[0@[1,2-4],1@[7]],features=[amx]"),
        ("disk", "path=\"/a,b\",readonly=on,bw_size=1,bw_refill_time=2,queue_affinity=[0@[1]]"),
        ("numa", "guest_numa_id=0,cpus=[0-3],distances=[(1@20)],memory_zones=[a,b]"),
        ("console", "file=/tmp/x,iommu=on"),
    ];
    let mut random = Random::new(0x1234_5678_9abc_def1);
    let alphabet: Vec<char> = "[]\"=,@:-0x9Ké\0 ()".chars().collect();
    for (flag, seed) in seeds {
        for _ in 0..rounds(3000) {
            let mut text: Vec<char> = seed.chars().collect();
            for _ in 0..=random.below(3) {
                let at = random.below(text.len());
                match random.below(3) {
                    0 => text[at] = alphabet[random.below(alphabet.len())],
                    1 => text.insert(at, alphabet[random.below(alphabet.len())]),
                    _ => drop(text.remove(at)),
                }
            }
            let text: String = text.into_iter().collect();
            if let Err(faults) = flags(&[(flag, &text)]).parse() {
                assert!(!faults.is_empty());
            }
        }
    }
    assert_eq!(parse(&[]), VmConfig::default());
}
