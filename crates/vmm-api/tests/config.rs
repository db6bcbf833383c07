//! Reading and writing of configurations.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]

use serde_json::{Value, json};
use vmm_api::config::{
    Bytes, ConsoleMode, Fault, FaultKind, ImageType, UnknownFields, VmConfig, parse_vm_config,
};
use vmm_fuzzing::{Random, rounds};

fn parse(json: &Value) -> Result<VmConfig, Vec<Fault>> {
    parse_vm_config(json.to_string().as_bytes(), UnknownFields::Refuse).map(|parsed| parsed.config)
}

fn faults(json: &Value) -> Vec<(String, FaultKind)> {
    parse(json).unwrap_err().into_iter().map(|fault| (fault.path, fault.kind)).collect()
}

fn one_fault(json: &Value) -> Fault {
    let mut faults = parse(json).unwrap_err();
    assert_eq!(faults.len(), 1, "{faults:?}");
    faults.remove(0)
}

/// Uses every field that this build supports, away from its default where that is possible.
fn rich() -> Value {
    json!({
        "cpus": {
            "boot_vcpus": 2, "max_vcpus": 8,
            "topology": {"threads_per_core": 2, "cores_per_die": 2, "dies_per_package": 1, "packages": 2},
            "max_phys_bits": 40, "nested": false, "core_scheduling": "Off",
            "affinity": [{"vcpu": 0, "host_cpus": [0, 1]}, {"vcpu": 7, "host_cpus": [1]}],
        },
        "memory": {
            "size": 0, "mergeable": true, "prefault": true, "reserve": true, "thp": false,
            "zones": [
                {"id": "a", "size": 1 << 30, "shared": true, "hugepages": true, "hugepage_size": 2 << 20},
                {"id": "b", "size": 1 << 20, "file": "/dev/shm/b", "mergeable": true, "prefault": true, "reserve": true},
            ],
        },
        "payload": {"kernel": "/boot/vmlinux", "cmdline": "console=ttyS0", "initramfs": "/boot/initrd"},
        "disks": [
            {"path": "/a.raw", "readonly": true, "direct": true, "num_queues": 2, "queue_size": 256, "id": "root",
             "serial": "S1", "sparse": false, "image_type": "Raw", "lock_granularity": "Full",
             "disable_io_uring": true, "disable_aio": true, "pci_device_id": 9},
            {"path": "/b.raw"},
        ],
        "rng": {"src": "/dev/random", "id": "entropy"},
        "serial": {"mode": "File", "file": "/tmp/serial"},
        "console": {"mode": "Socket", "socket": "/tmp/console", "id": "c"},
        "debug_console": {"mode": "Pty", "iobase": 0x402},
    })
}

#[test]
fn writes_the_contract_with_all_defaults() {
    let config = parse(&json!({"payload": {"kernel": "/k"}, "disks": [{"path": "/d"}]})).unwrap();
    let expected = json!({
        "cpus": {"boot_vcpus": 1, "max_vcpus": 1, "kvm_hyperv": false, "max_phys_bits": 46, "nested": true,
                 "features": {"amx": false}, "core_scheduling": "Vm"},
        "memory": {"size": 536_870_912, "mergeable": false, "hotplug_method": "Acpi", "shared": false,
                   "hugepages": false, "prefault": false, "reserve": false, "thp": true},
        "payload": {"kernel": "/k"},
        "disks": [{"path": "/d", "readonly": false, "direct": false, "num_queues": 1, "queue_size": 128,
                   "vhost_user": false, "backing_files": false, "sparse": true, "image_type": "Unknown",
                   "lock_granularity": "ByteRange", "disable_io_uring": false, "disable_aio": false,
                   "iommu": false, "pci_segment": 0}],
        "rng": {"src": "/dev/urandom", "iommu": false, "pci_segment": 0},
        "serial": {"mode": "Null"},
        "console": {"mode": "Tty", "iommu": false, "pci_segment": 0},
        "debug_console": {"mode": "Off", "iobase": 233},
        "iommu": false, "watchdog": false, "pvpanic": false, "gdb": false, "landlock_enable": false,
    });
    assert_eq!(serde_json::to_value(&config).unwrap(), expected);
}

#[test]
fn what_is_written_reads_back_the_same() {
    for document in [json!({}), json!({"payload": {"kernel": "/k"}}), rich()] {
        let config = parse(&document).unwrap();
        let written = serde_json::to_value(&config).unwrap();
        assert_eq!(parse(&written).unwrap(), config);
        assert_eq!(serde_json::from_value::<VmConfig>(written).unwrap(), config);
    }
    let config = parse(&rich()).unwrap();
    assert_eq!(config.memory.zones.unwrap()[0].hugepage_size, Some(Bytes::mib(2)));
    assert_eq!(config.disks.unwrap()[0].image_type, ImageType::Raw);
    assert_eq!(config.debug_console.mode, ConsoleMode::Pty);
}

#[test]
fn the_form_of_v16_is_read_as_the_present_one() {
    let old = json!({
        "cpus": {"boot_vcpus": 1, "max_vcpus": 1, "topology": null, "kvm_hyperv": false},
        "memory": {"size": 1 << 28, "mergeable": false, "hotplug_method": "Acpi", "hotplug_size": null, "zones": null},
        "kernel": {"path": "/vmlinux"}, "initramfs": {"path": "/initrd"}, "cmdline": {"args": "quiet"},
        "disks": [{"path": "/d", "poll_queue": true, "disable_io_uring": false, "rate_limiter_config": null}],
        "net": null, "balloon": null, "fs": [], "pmem": null, "devices": null, "vsock": null, "numa": [],
        "serial": {"file": null, "mode": "Null", "iommu": false},
        "console": {"file": null, "mode": "Off", "iommu": false},
        "iommu": false, "sgx_epc": null, "tdx": null, "watchdog": false,
    });
    let payload = parse(&old).unwrap().payload.unwrap();
    assert_eq!(payload.kernel.unwrap().to_str(), Some("/vmlinux"));
    assert_eq!(payload.initramfs.unwrap().to_str(), Some("/initrd"));
    assert_eq!(payload.cmdline.as_deref(), Some("quiet"));

    // The old default of the command line makes no payload.
    assert_eq!(parse(&json!({"cmdline": {"args": ""}, "kernel": null})).unwrap().payload, None);
    // Both forms at once are fine as long as they say different things.
    let both = json!({"payload": {"kernel": "/k", "cmdline": null}, "cmdline": {"args": "a"}});
    assert_eq!(parse(&both).unwrap().payload.unwrap().cmdline.as_deref(), Some("a"));
    let twice = json!({"payload": {"kernel": "/k"}, "kernel": {"path": "/k"}});
    assert_eq!(faults(&twice), [("kernel".into(), FaultKind::Invalid)]);
    assert_eq!(faults(&json!({"kernel": "/k"})), [("kernel".into(), FaultKind::Type)]);
    assert_eq!(faults(&json!({"kernel": {"pth": "/k"}})).len(), 2);
    assert_eq!(
        faults(&json!({"kernel": {"path": "/k"}, "payload": 3})),
        [("payload".into(), FaultKind::Type)]
    );
}

#[test]
fn older_names_of_fields_are_read_and_refused_as_the_present_ones() {
    let document = json!({"platform": {"serial_number": "1", "uuid": "u", "num_pci_segments": 1}});
    let expected = ["platform.system_serial_number", "platform.system_uuid"];
    let found = faults(&document);
    assert_eq!(found, expected.map(|path| (path.to_owned(), FaultKind::NotBuilt)));
    let twice = json!({"platform": {"uuid": null, "system_uuid": null}});
    assert_eq!(faults(&twice), [("platform.uuid".into(), FaultKind::Invalid)]);
}

#[test]
fn retired_fields_pass_only_at_their_old_default() {
    for (document, path) in [
        (json!({"disks": [{"path": "/d", "poll_queue": false}]}), "disks[0].poll_queue"),
        (json!({"sgx_epc": [{"id": "e"}]}), "sgx_epc"),
        (json!({"tdx": {"firmware": "/f"}}), "tdx"),
        (json!({"serial": {"mode": "Null", "iommu": true}}), "serial.iommu"),
    ] {
        assert_eq!(faults(&document), [(path.to_owned(), FaultKind::Retired)]);
    }
    let fs = json!({"fs": [{"tag": "t", "socket": "/s", "dax": true, "cache_size": 8_589_934_592u64}]});
    assert_eq!(faults(&fs), [("fs[0]".into(), FaultKind::NotBuilt)]);
}

#[test]
fn later_fields_are_refused_by_name_away_from_their_default() {
    let fault = one_fault(&json!({"net": [{"tap": "t0"}]}));
    assert_eq!((fault.path.as_str(), fault.kind), ("net[0]", FaultKind::NotBuilt));
    assert_eq!(fault.message, "not supported by this build yet: net[0]");

    for (document, path) in [
        (json!({"vsock": {"cid": 3, "socket": "/s"}}), "vsock"),
        (json!({"watchdog": true}), "watchdog"),
        (json!({"cpus": {"boot_vcpus": 1, "max_vcpus": 1, "features": {"amx": true}}}), "cpus.features.amx"),
        (json!({"memory": {"size": 4096, "hotplug_size": 4096}}), "memory.hotplug_size"),
        (
            json!({"memory": {"size": 0, "zones": [{"id": "z", "size": 1, "host_numa_node": 0}]}}),
            "memory.zones[0].host_numa_node",
        ),
        (json!({"disks": [{"path": "/d"}, {"path": "/e", "iommu": true}]}), "disks[1].iommu"),
    ] {
        assert_eq!(faults(&document), [(path.to_owned(), FaultKind::NotBuilt)], "{document}");
    }
}

#[test]
fn unknown_names_are_refused_with_the_nearest() {
    for (document, path, name) in [
        (json!({"disk": []}), "disk", "disks"),
        (json!({"cpus": {"boot_vcpus": 1, "max_vcpus": 1, "nestd": true}}), "cpus.nestd", "nested"),
        (json!({"disks": [{"read_only": true}]}), "disks[0].read_only", "readonly"),
        (json!({"platform": {"serial_numbr": "1"}}), "platform.serial_numbr", "serial_number"),
    ] {
        let fault = one_fault(&document);
        assert_eq!((fault.path.as_str(), fault.kind), (path, FaultKind::Unknown));
        assert_eq!(fault.message, format!("unknown field; did you mean {name:?}?"));
    }
    assert_eq!(one_fault(&json!({"entirely_else": 1})).message, "unknown field");
}

#[test]
fn unknown_names_can_be_warned_about() {
    let json =
        br#"{"payload": {"kernel": "/k"}, "disk": 1, "cpus": {"boot_vcpus": 1, "max_vcpus": 1, "x": {}}}"#;
    let parsed = parse_vm_config(json, UnknownFields::Warn).unwrap();
    let paths: Vec<&str> = parsed.warnings.iter().map(|warning| warning.path.as_str()).collect();
    assert_eq!(paths, ["disk", "cpus.x"]);
    // What is known and retired stays refused.
    assert!(parse_vm_config(br#"{"tdx": {}}"#, UnknownFields::Warn).is_err());
}

#[test]
fn all_faults_are_found_at_once_with_their_paths() {
    let document = json!({
        "cpus": {"boot_vcpus": "four", "max_vcpus": -1, "topology": {"threads_per_core": 1}},
        "memory": {"size": 1.5, "zones": [{"id": 3}, 7]},
        "disks": [{"path": "/a"}, {"path": 5, "reedonly": true, "image_type": "qcow2"}],
        "net": {"tap": "x"},
        "watchdog": true,
    });
    let expected = [
        ("cpus.boot_vcpus", FaultKind::Type),
        ("cpus.max_vcpus", FaultKind::Type),
        ("cpus.topology.cores_per_die", FaultKind::Invalid),
        ("cpus.topology.dies_per_package", FaultKind::Invalid),
        ("cpus.topology.packages", FaultKind::Invalid),
        ("memory.size", FaultKind::Type),
        ("memory.zones[0].id", FaultKind::Type),
        ("memory.zones[0].size", FaultKind::Invalid),
        ("memory.zones[1]", FaultKind::Type),
        ("disks[1].reedonly", FaultKind::Unknown),
        ("disks[1].path", FaultKind::Type),
        ("disks[1].image_type", FaultKind::Type),
        ("net", FaultKind::Type),
        ("watchdog", FaultKind::NotBuilt),
    ];
    assert_eq!(faults(&document), expected.map(|(path, kind)| (path.to_owned(), kind)));
}

#[test]
fn messages_say_what_was_expected_and_found() {
    let message = |document: Value| one_fault(&document).message;
    let cpus = |boot: Value| json!({"cpus": {"boot_vcpus": boot, "max_vcpus": 1}});
    assert_eq!(
        message(cpus(json!("4"))),
        "expected a whole number from 0 to 4294967295, found the string \"4\""
    );
    assert_eq!(message(cpus(json!(null))), "expected a whole number from 0 to 4294967295, found null");
    assert_eq!(message(json!({"serial": {}})), "is required, and missing");
    assert_eq!(
        message(json!({"serial": {"mode": "tty"}})),
        "expected one of Off, Null, Tty, Pty, File, Socket, found the string \"tty\"; did you mean \"Tty\"?"
    );
    assert_eq!(message(json!([1])), "expected an object, found an array");
    assert_eq!(message(json!({"rng": {"src": ""}})), "an empty path");
    assert_eq!(message(json!({"rng": {"src": "/a\0b"}})), "a path with a NUL byte");
}

#[test]
fn duplicate_keys_are_refused() {
    let json = br#"{"watchdog": false, "cpus": {"boot_vcpus": 1, "max_vcpus": 1, "boot_vcpus": 2}, "watchdog": false}"#;
    let faults = parse_vm_config(json, UnknownFields::Refuse).unwrap_err();
    let found: Vec<_> = faults.iter().map(|fault| (fault.path.as_str(), fault.message.as_str())).collect();
    assert_eq!(found, [("watchdog", "given twice"), ("cpus.boot_vcpus", "given twice")]);
}

#[test]
fn nasty_numbers_are_type_faults() {
    for number in
        ["-1", "1.5", "1e3", "18446744073709551616", "1e308", "-9223372036854775809", "\"1\"", "true", "[]"]
    {
        let json = format!(r#"{{"memory": {{"size": {number}}}}}"#);
        let faults = parse_vm_config(json.as_bytes(), UnknownFields::Refuse).unwrap_err();
        assert_eq!(faults.len(), 1, "{number}");
        assert_eq!((faults[0].path.as_str(), faults[0].kind), ("memory.size", FaultKind::Type), "{number}");
    }
    let largest = parse_vm_config(br#"{"memory": {"size": 18446744073709551615}}"#, UnknownFields::Refuse);
    assert_eq!(largest.unwrap().config.memory.size, Bytes(u64::MAX));
    let fault = one_fault(&json!({"disks": [{"path": "/d", "queue_size": 65536}]}));
    assert_eq!(fault.message, "expected a whole number from 0 to 65535, found 65536");
}

#[test]
fn the_list_of_faults_is_bounded() {
    let entries: Vec<String> = (0..50_000).map(|index| format!("\"f{index}\":0")).collect();
    let json = format!("{{{}}}", entries.join(","));
    let faults = parse_vm_config(json.as_bytes(), UnknownFields::Refuse);
    assert_eq!(faults.unwrap_err().len(), 101);
    let warned = parse_vm_config(json.as_bytes(), UnknownFields::Warn).unwrap();
    assert_eq!(warned.warnings.len(), 100);

    let nets = |count| json!({"net": vec![json!({}); count]});
    assert_eq!(parse(&nets(8192)).unwrap_err().len(), 101);
    assert_eq!(one_fault(&nets(8193)).message, "8193 elements are more than 8192");
}

#[test]
fn fuzz_documents_and_what_is_accepted_reads_back() {
    let seed = rich().to_string().into_bytes();
    let pieces: [&[u8]; 12] = [
        b"null",
        b"-1",
        b"[]",
        b"{}",
        b"\"\"",
        b"1e999",
        b"99999999999999999999",
        b"\\u0000",
        b",",
        b"}",
        b"[[[[",
        b"\xff",
    ];
    let mut rng = Random::new(0x5eed_1234_abcd_0001);
    let mut accepted = 0;
    for _ in 0..rounds(10_000) {
        let mut json = seed.clone();
        for _ in 0..=rng.below(3) {
            let at = rng.below(json.len());
            match rng.below(4) {
                0 => json[at] = rng.below(256) as u8,
                1 => json[at] = b'0' + rng.below(10) as u8,
                2 => drop(json.splice(at..at, pieces[rng.below(pieces.len())].iter().copied())),
                _ => drop(json.drain(at..(at + rng.below(8)).min(json.len()))),
            }
        }
        if let Ok(parsed) = parse_vm_config(&json, UnknownFields::Warn) {
            accepted += 1;
            let written = serde_json::to_vec(&parsed.config).unwrap();
            assert_eq!(parse_vm_config(&written, UnknownFields::Refuse).unwrap().config, parsed.config);
        }
    }
    assert!(accepted > 250, "only {accepted} mutants were accepted: the test says little");
}
