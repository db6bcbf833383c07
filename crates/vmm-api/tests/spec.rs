//! From configurations to machines.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]

use serde_json::{Value, json};
use vmm_api::config::{Bytes, FaultKind, UnknownFields, VmConfig};
use vmm_api::spec::{
    Backing, DiskFormat, Hugepages, MAX_CMDLINE, MachineSpec, PayloadSpec, Sink, Topology, fill_ids,
    parse_and_check,
};

/// A configuration that can be built, with `patch` merged over it.
fn with(patch: &Value) -> Value {
    let mut document = json!({
        "cpus": {"boot_vcpus": 2, "max_vcpus": 4},
        "memory": {"size": 1 << 30},
        "payload": {"kernel": "/k"},
    });
    merge(&mut document, patch);
    document
}

fn merge(into: &mut Value, patch: &Value) {
    match (into, patch) {
        (Value::Object(into), Value::Object(patch)) => {
            patch.iter().for_each(|(name, value)| merge(into.entry(name).or_insert(Value::Null), value));
        }
        (into, patch) => *into = patch.clone(),
    }
}

fn spec(patch: &Value) -> MachineSpec {
    parse_and_check(with(patch).to_string().as_bytes(), UnknownFields::Refuse).unwrap().spec
}

fn faults_of(document: &Value) -> Vec<(String, FaultKind)> {
    let faults = parse_and_check(document.to_string().as_bytes(), UnknownFields::Refuse).unwrap_err();
    faults.into_iter().map(|fault| (fault.path, fault.kind)).collect()
}

/// Asserts that each patch is refused by exactly one fault.
fn refused(kind: FaultKind, cases: &[(Value, &str)]) {
    for (patch, path) in cases {
        assert_eq!(faults_of(&with(patch)), [((*path).to_owned(), kind)], "{patch}");
    }
}

#[test]
fn a_small_configuration_becomes_a_machine() {
    let spec = spec(&json!({"disks": [{"path": "/d", "image_type": "Raw", "serial": "S"}]}));
    assert_eq!((spec.cpus.boot, spec.cpus.max, spec.cpus.max_phys_bits, spec.cpus.nested), (2, 4, 46, true));
    let topology = Topology { threads_per_core: 1, cores_per_die: 4, dies_per_package: 1, packages: 1 };
    assert_eq!(spec.cpus.topology, topology);
    assert_eq!(spec.memory.total(), Bytes::mib(1024));
    assert_eq!(spec.memory.zones[0].id, "mem0");
    assert_eq!(
        (&spec.memory.zones[0].backing, spec.memory.zones[0].hugepages),
        (&Backing::Anonymous, Hugepages::Off)
    );
    let payload = PayloadSpec::Kernel { kernel: "/k".into(), initramfs: None, cmdline: String::new() };
    assert_eq!(spec.payload, payload);
    let disk = &spec.disks[0];
    assert_eq!((disk.identity.id.as_str(), disk.queues, disk.queue_size), ("_disk0", 1, 128));
    assert_eq!((disk.image.path.to_str(), disk.image.format), (Some("/d"), DiskFormat::Raw));
    assert_eq!((spec.rng.identity.id.as_str(), spec.rng.source.to_str()), ("_rng", Some("/dev/urandom")));
    assert_eq!(spec.serial, Some(Sink::Null));
    let console = spec.console.unwrap();
    assert_eq!((console.identity.id.as_str(), console.sink), ("_console", Sink::Tty));
    assert_eq!(spec.debug_console, None);
    assert_eq!(spec.warnings, []);
}

#[test]
fn cpus_that_cannot_be() {
    let cpus = |value: Value| json!({ "cpus": value });
    let topology = |parts: [u32; 4]| {
        json!({"cpus": {"topology": {"threads_per_core": parts[0], "cores_per_die": parts[1],
                                     "dies_per_package": parts[2], "packages": parts[3]}}})
    };
    refused(
        FaultKind::Invalid,
        &[
            (cpus(json!({"boot_vcpus": 0})), "cpus.boot_vcpus"),
            (cpus(json!({"boot_vcpus": 5})), "cpus.max_vcpus"),
            (cpus(json!({"max_phys_bits": 31})), "cpus.max_phys_bits"),
            (cpus(json!({"max_phys_bits": 53})), "cpus.max_phys_bits"),
            (topology([1, 2, 1, 1]), "cpus.topology"),
            (topology([2, 0, 1, 2]), "cpus.topology.cores_per_die"),
            // 256 x 256 x .. is 4 in 8 bits, and 65536^4 wraps around 64.
            (topology([16, 17, 1, 1]), "cpus.topology"),
            (topology([65536, 65536, 65536, 65536]), "cpus.topology"),
            (cpus(json!({"affinity": [{"vcpu": 4, "host_cpus": [0]}]})), "cpus.affinity[0].vcpu"),
            (cpus(json!({"affinity": [{"vcpu": 0, "host_cpus": []}]})), "cpus.affinity[0].host_cpus"),
            (
                cpus(json!({"affinity": [{"vcpu": 0, "host_cpus": [0]}, {"vcpu": 0, "host_cpus": [1]}]})),
                "cpus.affinity[1].vcpu",
            ),
        ],
    );
    refused(FaultKind::NotBuilt, &[(cpus(json!({"max_vcpus": 255})), "cpus.max_vcpus")]);
    assert_eq!(spec(&cpus(json!({"max_vcpus": 254}))).cpus.max, 254);
    assert_eq!(spec(&topology([2, 1, 1, 2])).cpus.topology.packages, 2);
}

#[test]
fn memory_that_cannot_be() {
    let memory = |value: Value| json!({ "memory": value });
    let zones = |value: Value| json!({"memory": {"size": 0, "zones": value}});
    refused(
        FaultKind::Invalid,
        &[
            (memory(json!({"size": 0})), "memory.size"),
            (memory(json!({"size": 4097})), "memory.size"),
            (memory(json!({"size": 1u64 << 47})), "memory.size"),
            (memory(json!({"hugepage_size": 2 << 20})), "memory.hugepage_size"),
            (memory(json!({"hugepages": true, "hugepage_size": 3 << 20})), "memory.hugepage_size"),
            (memory(json!({"hugepages": true, "hugepage_size": 4096})), "memory.hugepage_size"),
            (memory(json!({"hugepages": true, "hugepage_size": 1u64 << 31})), "memory.hugepage_size"),
            (memory(json!({"zones": [{"id": "a", "size": 4096}]})), "memory.size"),
            (
                memory(json!({"size": 0, "shared": true, "zones": [{"id": "a", "size": 4096}]})),
                "memory.shared",
            ),
            (zones(json!([{"id": "a", "size": 4096}, {"id": "a", "size": 4096}])), "memory.zones[1].id"),
            (zones(json!([{"id": "", "size": 4096}])), "memory.zones[0].id"),
            (zones(json!([{"id": "a", "size": 0}])), "memory.zones[0].size"),
            (
                zones(json!([{"id": "a", "size": u64::MAX - 4095}, {"id": "b", "size": u64::MAX - 4095}])),
                "memory.zones",
            ),
        ],
    );
}

#[test]
fn zones_take_their_backing_from_what_they_say() {
    let spec = spec(&json!({"memory": {"size": 0, "prefault": true, "zones": [
        {"id": "a", "size": 4096},
        {"id": "b", "size": 4 << 20, "shared": true, "hugepages": true, "hugepage_size": 2 << 20, "mergeable": true},
        {"id": "c", "size": 2 << 20, "file": "/f", "hugepages": true},
    ]}}));
    let zones = spec.memory.zones;
    let backings: Vec<_> = zones.iter().map(|zone| zone.backing.clone()).collect();
    assert_eq!(backings, [Backing::Anonymous, Backing::Memfd, Backing::File("/f".into())]);
    let hugepages: Vec<_> = zones.iter().map(|zone| zone.hugepages).collect();
    assert_eq!(hugepages, [Hugepages::Off, Hugepages::Of(Bytes::mib(2)), Hugepages::HostDefault]);
    assert!(zones.iter().all(|zone| zone.prefault));
    assert_eq!(zones.iter().map(|zone| zone.mergeable).collect::<Vec<_>>(), [false, true, false]);
}

#[test]
fn payloads_that_cannot_be() {
    let payload = |value: Value| json!({ "payload": value });
    let long = "x".repeat(MAX_CMDLINE + 1);
    refused(
        FaultKind::Invalid,
        &[
            (payload(json!(null)), "payload"),
            (payload(json!({"kernel": null})), "payload"),
            (payload(json!({"firmware": "/f"})), "payload.firmware"),
            (payload(json!({"cmdline": long})), "payload.cmdline"),
            (payload(json!({"cmdline": "a\0b"})), "payload.cmdline"),
            (payload(json!({"cmdline": "ä"})), "payload.cmdline"),
        ],
    );
    refused(FaultKind::NotBuilt, &[(payload(json!({"kernel": null, "igvm": "/i"})), "payload.igvm")]);
    let spec = spec(&payload(json!({"kernel": null, "firmware": "/f", "cmdline": "a", "initramfs": "/i"})));
    assert_eq!(spec.payload, PayloadSpec::Firmware("/f".into()));
    assert_eq!(spec.warnings.len(), 2);
}

#[test]
fn disks_that_cannot_be() {
    let disk = |value: Value| {
        let mut typed = json!({"image_type": "Raw"});
        merge(&mut typed, &value);
        json!({ "disks": [typed] })
    };
    let d = |extra: Value| {
        let mut value = json!({"path": "/d"});
        merge(&mut value, &extra);
        disk(value)
    };
    refused(
        FaultKind::Invalid,
        &[
            (disk(json!({})), "disks[0].path"),
            (d(json!({"num_queues": 0})), "disks[0].num_queues"),
            (d(json!({"num_queues": 3})), "disks[0].num_queues"),
            (d(json!({"queue_size": 0})), "disks[0].queue_size"),
            (d(json!({"queue_size": 2})), "disks[0].queue_size"),
            (d(json!({"queue_size": 100})), "disks[0].queue_size"),
            (d(json!({"serial": "123456789012345678901"})), "disks[0].serial"),
            (d(json!({"serial": ""})), "disks[0].serial"),
            (d(json!({"serial": "é"})), "disks[0].serial"),
            (d(json!({"serial": "a\nb"})), "disks[0].serial"),
            (d(json!({"pci_device_id": 0})), "disks[0].pci_device_id"),
            (d(json!({"pci_device_id": 32})), "disks[0].pci_device_id"),
        ],
    );
    refused(
        FaultKind::NotBuilt,
        &[
            (d(json!({"queue_size": 2048})), "disks[0].queue_size"),
            (d(json!({"image_type": "Qcow2"})), "disks[0].image_type"),
            (d(json!({"image_type": "FixedVhd"})), "disks[0].image_type"),
            (d(json!({"image_type": "Vhdx"})), "disks[0].image_type"),
            (
                d(json!({"rate_limiter_config": {"ops": {"size": 1, "refill_time": 1}}})),
                "disks[0].rate_limiter_config",
            ),
        ],
    );
    let both = faults_of(&with(&d(json!({"vhost_user": true, "vhost_socket": "/s"}))));
    assert!(both.contains(&("disks[0].path".into(), FaultKind::Invalid)));
    let socket = faults_of(&with(&disk(json!({"vhost_user": true, "vhost_socket": "/s"}))));
    assert!(socket.iter().all(|(_, kind)| *kind == FaultKind::NotBuilt), "{socket:?}");

    let many = json!({"disks": (0..30).map(|n| json!({"path": format!("/{n}"), "image_type": "Raw"})).collect::<Vec<_>>()});
    refused(FaultKind::Invalid, &[(many, "disks")]);
}

#[test]
fn an_image_without_type_is_raw_and_warned_about() {
    let spec = spec(&json!({"disks": [{"path": "/d.qcow2"}]}));
    assert_eq!(spec.disks[0].image.format, DiskFormat::Raw);
    assert_eq!(spec.warnings.iter().map(|w| w.path.as_str()).collect::<Vec<_>>(), ["disks[0].image_type"]);
}

#[test]
fn names_are_unique_across_kinds_and_stable() {
    let d = |id: &str| json!({"path": "/d", "image_type": "Raw", "id": id});
    refused(
        FaultKind::Invalid,
        &[
            (json!({"disks": [d("a"), d("a")]}), "disks[1].id"),
            (json!({"disks": [d("x")], "rng": {"src": "/r", "id": "x"}}), "rng.id"),
            (json!({"disks": [d("_serial")]}), "disks[0].id"),
            (json!({"disks": [d("")]}), "disks[0].id"),
            (json!({"disks": [d("a\tb")]}), "disks[0].id"),
            (json!({"disks": [d(&"x".repeat(129))]}), "disks[0].id"),
            (
                json!({"rng": {"src": "/r", "pci_device_id": 3}, "console": {"mode": "Null", "pci_device_id": 3}}),
                "console.pci_device_id",
            ),
        ],
    );

    let disk = |id: Option<&str>| json!({"path": "/d", "image_type": "Raw", "id": id});
    let patch = json!({"disks": [disk(None), disk(Some("_disk0")), disk(None), disk(Some("_rng"))]});
    let checked = parse_and_check(with(&patch).to_string().as_bytes(), UnknownFields::Refuse).unwrap();
    let ids: Vec<_> = checked.spec.disks.iter().map(|disk| disk.identity.id.as_str()).collect();
    assert_eq!(ids, ["_disk1", "_disk0", "_disk2", "_rng"]);
    assert_eq!(checked.spec.rng.identity.id, "_rng0");
    // The configuration keeps them, so that taking a disk away renames none.
    let mut config = checked.config;
    config.disks.as_mut().unwrap().remove(0);
    fill_ids(&mut config);
    let spec = MachineSpec::check(&config).unwrap();
    assert_eq!(
        spec.disks.iter().map(|d| d.identity.id.as_str()).collect::<Vec<_>>(),
        ["_disk0", "_disk2", "_rng"]
    );
}

#[test]
fn consoles_need_their_places() {
    refused(
        FaultKind::Invalid,
        &[
            (json!({"serial": {"mode": "File"}}), "serial.file"),
            (json!({"serial": {"mode": "Socket"}}), "serial.socket"),
            (json!({"console": {"mode": "File", "socket": "/s"}}), "console.file"),
            (json!({"debug_console": {"mode": "File"}}), "debug_console.file"),
            (json!({"debug_console": {"mode": "Socket"}}), "debug_console.mode"),
        ],
    );
    let long = format!("/{}", "s".repeat(107));
    let socket = |path: &str| json!({"mode": "Socket", "socket": path});
    refused(
        FaultKind::Invalid,
        &[
            (json!({"serial": socket(&long)}), "serial.socket"),
            (json!({"serial": socket("/s"), "console": socket("/s")}), "console.socket"),
        ],
    );
    let sockets = spec(&json!({"serial": socket(&long[1..]), "console": socket("/s")}));
    assert_eq!(sockets.serial, Some(Sink::Socket(long[1..].into())));
    assert_eq!(sockets.console.unwrap().sink, Sink::Socket("/s".into()));
    let spec = spec(&json!({
        "serial": {"mode": "Tty"}, "console": {"mode": "Tty"}, "debug_console": {"mode": "Pty", "file": "/dev/pts/3"},
    }));
    assert_eq!((spec.serial, spec.console.unwrap().sink), (Some(Sink::Tty), Sink::Tty));
    assert_eq!(
        spec.warnings.iter().map(|warning| warning.path.as_str()).collect::<Vec<_>>(),
        ["console.mode"]
    );
    let debug = spec.debug_console.unwrap();
    assert_eq!((debug.port, debug.sink), (0xe9, Sink::Pty));
    let off = self::spec(&json!({"serial": {"mode": "Off"}, "console": {"mode": "Off"}}));
    assert_eq!((off.serial, off.console), (None, None));
}

#[test]
fn a_panic_device_is_there_when_asked_for_and_takes_a_place_on_the_bus() {
    assert!(!spec(&json!({})).pvpanic);
    assert!(spec(&json!({"pvpanic": true})).pvpanic);
    // Beside the random source and the console there is room for 29.
    let disks =
        |count: usize| -> Vec<_> { (0..count).map(|_| json!({"path": "/d", "image_type": "Raw"})).collect() };
    spec(&json!({"disks": disks(29)}));
    spec(&json!({"pvpanic": true, "disks": disks(28)}));
    refused(FaultKind::Invalid, &[(json!({"pvpanic": true, "disks": disks(29)}), "disks")]);
}

#[test]
fn reading_and_checking_list_all_faults_but_none_that_follows_from_another() {
    let document = json!({
        "cpus": {"boot_vcpus": "2", "max_vcpus": 0},
        "memory": {"size": 5, "nope": 1},
        "disks": [{"path": "/d", "num_queues": 9, "image_type": "Raw"}],
        "serial": {"mode": "File"},
        "net": [{}],
    });
    let expected = [
        ("cpus.boot_vcpus", FaultKind::Type),
        ("memory.nope", FaultKind::Unknown),
        ("net[0]", FaultKind::NotBuilt),
        ("memory.size", FaultKind::Invalid),
        ("payload", FaultKind::Invalid),
        ("serial.file", FaultKind::Invalid),
    ];
    assert_eq!(faults_of(&document), expected.map(|(path, kind)| (path.to_owned(), kind)));
    // The old form of a payload that cannot be read is not reported as missing.
    assert_eq!(faults_of(&json!({"kernel": {"path": 1}})), [("kernel.path".into(), FaultKind::Type)]);
}

#[test]
fn a_configuration_made_in_code_is_checked_too() {
    let mut config = VmConfig { watchdog: true, ..VmConfig::default() };
    let faults = MachineSpec::check(&config).unwrap_err();
    let paths: Vec<_> = faults.iter().map(|fault| fault.path.as_str()).collect();
    assert_eq!(paths, ["watchdog", "payload"]);
    config.watchdog = false;
    config.payload = serde_json::from_value(json!({"kernel": "/k"})).unwrap();
    assert!(MachineSpec::check(&config).is_ok());
}
