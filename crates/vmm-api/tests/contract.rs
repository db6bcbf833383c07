//! The OpenAPI document against the contract file: ours says all that the contract says, and what differs is meant.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]

use serde_json::Value;
use std::collections::BTreeSet;
use vmm_api::commands::operations;
use vmm_api::openapi::document;

/// Every deliberate difference: what [`compare`] finds (`*` stands for anything), and the row of `docs/deviations.md`
/// that tells it.
const DIFFERENCES: &[(&str, &str)] = &[
    ("PUT * status 405 is absent", "a phase that does not allow the request"),
    ("*: format \"int*\", here \"uint*\"", "format of numbers that are never negative"),
    ("CpuTopology.* must be given", "`CpuTopology` with a part left out"),
    ("VmConfig.payload may be missing", "fields that must be given although they can do without"),
    ("FsConfig.num_queues may be missing", "fields that must be given although they can do without"),
    ("FsConfig.queue_size may be missing", "fields that must be given although they can do without"),
    (
        "GenericVhostUserConfig.device_type may be missing",
        "fields that must be given although they can do without",
    ),
    ("NetConfig.ip: default \"192.168.249.1\", here null", "defaults of `NetConfig.ip` and `mask`"),
    ("NetConfig.mask: default \"255.255.255.0\", here null", "defaults of `NetConfig.ip` and `mask`"),
    (
        "VdpaConfig.num_queues: default 1, here null",
        "default of `VdpaConfig.num_queues`, which must be given",
    ),
    (
        "PUT /vm.add-user-device: schema VmAddUserDevice, here \"UserDeviceConfig\"",
        "name of the body of `vm.add-user-device`",
    ),
    ("VmAddUserDevice.id is beyond", "name of the body of `vm.add-user-device`"),
    // Descriptors; their numbers are never taken from a document.
    ("DeviceConfig.fd is beyond", "fields of its releases that are not in its document"),
    ("NetConfig.fds is beyond", "fields of its releases that are not in its document"),
    ("PlatformConfig.iommufd_fd is beyond", "fields of its releases that are not in its document"),
    ("RestoreConfig.net_fds is beyond", "fields of its releases that are not in its document"),
    ("DeviceNode.parent is beyond", "fields of its releases that are not in its document"),
    ("DiskConfig.disable_aio is beyond", "fields of its releases that are not in its document"),
    ("DiskConfig.disable_io_uring is beyond", "fields of its releases that are not in its document"),
    ("FsConfig.iommu is beyond", "fields of its releases that are not in its document"),
    ("GenericVhostUserConfig.iommu is beyond", "fields of its releases that are not in its document"),
    ("UserDeviceConfig.iommu is beyond", "fields of its releases that are not in its document"),
    ("VmAddUserDevice.iommu is beyond", "fields of its releases that are not in its document"),
    ("VmConfig.gdb is beyond", "fields of its releases that are not in its document"),
    ("VmConfig.ivshmem is beyond", "fields of its releases that are not in its document"),
    ("VmConfig.pvmemcontrol is beyond", "fields of its releases that are not in its document"),
    ("PayloadConfig.fw_cfg_config is beyond", "fields of its releases that are not in its document"),
    (
        "RestoreConfig.memory_restore_mode: default \"Copy\", here null",
        "default of `RestoreConfig.memory_restore_mode`",
    ),
    ("RestoreConfig.clock is beyond", "overrides in `vm.restore`"),
    ("RestoreConfig.console is beyond", "overrides in `vm.restore`"),
    ("RestoreConfig.debug_console is beyond", "overrides in `vm.restore`"),
    ("RestoreConfig.disks is beyond", "overrides in `vm.restore`"),
    ("RestoreConfig.net is beyond", "overrides in `vm.restore`"),
    ("RestoreConfig.serial is beyond", "overrides in `vm.restore`"),
    ("RestoreConfig.vsock is beyond", "overrides in `vm.restore`"),
    ("ReceiveMigrationData.console is beyond", "overrides in `vm.receive-migration`"),
    ("ReceiveMigrationData.debug_console is beyond", "overrides in `vm.receive-migration`"),
    ("ReceiveMigrationData.detach is beyond", "`check`, `detach` and more in migrations"),
    ("ReceiveMigrationData.disks is beyond", "overrides in `vm.receive-migration`"),
    ("ReceiveMigrationData.paths is beyond", "overrides in `vm.receive-migration`"),
    ("ReceiveMigrationData.serial is beyond", "overrides in `vm.receive-migration`"),
    ("SendMigrationData.auto_converge is beyond", "`check`, `detach` and more in migrations"),
    ("SendMigrationData.check is beyond", "`check`, `detach` and more in migrations"),
    ("SendMigrationData.compression is beyond", "`compression` in `vm.send-migration`"),
    ("SendMigrationData.detach is beyond", "`check`, `detach` and more in migrations"),
    ("SendMigrationData.max_bandwidth is beyond", "`check`, `detach` and more in migrations"),
    ("SendMigrationData.preserve_source is beyond", "`check`, `detach` and more in migrations"),
    ("RestoreConfig.track is beyond", "`live`, `incremental` and `track` of snapshots; `vm.cancel`"),
    ("VmSnapshotConfig.incremental is beyond", "`live`, `incremental` and `track` of snapshots; `vm.cancel`"),
    ("VmSnapshotConfig.live is beyond", "`live`, `incremental` and `track` of snapshots; `vm.cancel`"),
    ("VmSnapshotConfig.track is beyond", "`live`, `incremental` and `track` of snapshots; `vm.cancel`"),
    ("VmInfo.boots is beyond", "`phase`, `boots`, `last_guest_event` and `restored_from` in `vm.info`"),
    (
        "VmInfo.last_guest_event is beyond",
        "`phase`, `boots`, `last_guest_event` and `restored_from` in `vm.info`",
    ),
    ("VmInfo.phase is beyond", "`phase`, `boots`, `last_guest_event` and `restored_from` in `vm.info`"),
    (
        "VmInfo.restored_from is beyond",
        "`phase`, `boots`, `last_guest_event` and `restored_from` in `vm.info`",
    ),
];

/// The contract, and ours.
struct Documents {
    theirs: Value,
    ours: Value,
    found: BTreeSet<String>,
    /// Names of the objects that were compared already: they refer to each other.
    seen: BTreeSet<String>,
    /// Properties that both have.
    compared: usize,
}

/// Who sends a value. A request may leave out more than the contract says, a reply less.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Request,
    Reply,
}

fn compare() -> Documents {
    let theirs: Value = serde_saphyr::from_str(include_str!("data/contract.yaml")).unwrap();
    let ours = document(&operations());
    let mut documents =
        Documents { theirs, ours, found: BTreeSet::new(), seen: BTreeSet::new(), compared: 0 };
    documents.paths();
    documents
}

/// A schema behind its references, and its name if it has one.
fn resolve<'a>(root: &'a Value, mut schema: &'a Value) -> (&'a Value, &'a str) {
    let mut name = "";
    loop {
        let only = &schema["allOf"][0];
        let reference = if only["$ref"].is_null() { &schema["$ref"] } else { &only["$ref"] };
        let Some(reference) = reference.as_str() else { return (schema, name) };
        let pointer = reference.strip_prefix('#').unwrap();
        schema = root.pointer(pointer).unwrap_or_else(|| panic!("{reference} leads nowhere"));
        name = reference.rsplit('/').next().unwrap();
    }
}

fn names(value: &Value) -> impl Iterator<Item = &str> {
    value.as_object().into_iter().flatten().map(|(name, _)| name.as_str())
}

fn words(value: &Value) -> BTreeSet<&str> {
    value.as_array().into_iter().flatten().filter_map(Value::as_str).collect()
}

impl Documents {
    fn differ(&mut self, what: String) {
        self.found.insert(what);
    }

    fn paths(&mut self) {
        let (theirs, ours) = (self.theirs.clone(), self.ours.clone());
        for path in names(&theirs["paths"]) {
            for method in names(&theirs["paths"][path]) {
                let at = format!("{} {path}", method.to_uppercase());
                let (their, our) = (&theirs["paths"][path][method], &ours["paths"][path][method]);
                if our.is_null() {
                    self.differ(format!("{at} is absent"));
                    continue;
                }
                let (their_id, our_id) = (&their["operationId"], &our["operationId"]);
                if !their_id.is_null() && their_id != our_id {
                    self.differ(format!("{at}: operationId {their_id}, here {our_id}"));
                }
                self.body(&at, Way::Request, &their["requestBody"], &our["requestBody"]);
                for status in names(&their["responses"]) {
                    let later = our["x-later"] == true && !status.starts_with('2');
                    let (their, our) = (&their["responses"][status], &our["responses"][status]);
                    if later {
                        // How its work fails is said when there is any.
                    } else if our.is_null() {
                        self.differ(format!("{at} status {status} is absent"));
                    } else {
                        self.body(&format!("{at} {status}"), Way::Reply, their, resolve(&ours, our).0);
                    }
                }
            }
        }
    }

    fn body(&mut self, at: &str, way: Way, their: &Value, our: &Value) {
        let schema = |body: &Value| body["content"]["application/json"]["schema"].clone();
        let (their, our) = (schema(their), schema(our));
        match (their.is_null(), our.is_null()) {
            (false, false) => self.schema(at, way, &their, &our),
            (false, true) => self.differ(format!("{at} has no body")),
            // An error's body is ours to say.
            (true, _) => {}
        }
    }

    fn schema(&mut self, at: &str, way: Way, their: &Value, our: &Value) {
        let default = |use_of: &Value, schema: &Value| {
            if use_of["default"].is_null() { schema["default"].clone() } else { use_of["default"].clone() }
        };
        let (theirs, ours) = (self.theirs.clone(), self.ours.clone());
        let ((their_schema, their_name), (our_schema, our_name)) =
            (resolve(&theirs, their), resolve(&ours, our));
        let (their_default, our_default) = (default(their, their_schema), default(our, our_schema));
        if !their_default.is_null() && their_default != our_default {
            self.differ(format!("{at}: default {their_default}, here {our_default}"));
        }
        if !their_name.is_empty() && their_name != our_name {
            self.differ(format!("{at}: schema {their_name}, here {our_name:?}"));
        }
        if !their_name.is_empty() && !self.seen.insert(format!("{their_name} {}", way == Way::Request)) {
            return;
        }
        let at = if their_name.is_empty() { at } else { their_name };
        self.plain(at, their_schema, our_schema);
        self.properties(at, way, their_schema, our_schema);
        for inner in ["items", "additionalProperties"] {
            if their_schema[inner].is_object() {
                self.schema(&format!("{at}.{inner}"), way, &their_schema[inner], &our_schema[inner]);
            }
        }
    }

    fn plain(&mut self, at: &str, their: &Value, our: &Value) {
        for key in ["type", "format"] {
            if !their[key].is_null() && their[key] != our[key] {
                self.differ(format!("{at}: {key} {}, here {}", their[key], our[key]));
            }
        }
        for word in words(&their["enum"]).difference(&words(&our["enum"])) {
            self.differ(format!("{at}: no word {word}"));
        }
        let narrower =
            |key: &str, narrows: fn(f64, f64) -> bool| match (their[key].as_f64(), our[key].as_f64()) {
                (Some(their), Some(our)) => narrows(their, our),
                _ => false,
            };
        if narrower("minimum", |their, our| our > their) || narrower("maximum", |their, our| our < their) {
            self.differ(format!("{at}: narrower bounds"));
        }
    }

    fn properties(&mut self, at: &str, way: Way, their: &Value, our: &Value) {
        for name in names(&their["properties"]) {
            let place = format!("{at}.{name}");
            match &our["properties"][name] {
                Value::Null => self.differ(format!("{place} is absent")),
                found => {
                    self.compared += 1;
                    self.schema(&place, way, &their["properties"][name], found);
                }
            }
        }
        let beyond: Vec<&str> = names(&our["properties"])
            .filter(|name| {
                their["properties"][name].is_null() && our["properties"][name]["deprecated"] != true
            })
            .collect();
        if !their["properties"].is_null() {
            beyond.iter().for_each(|name| self.differ(format!("{at}.{name} is beyond")));
        }
        let (their, our) = (words(&their["required"]), words(&our["required"]));
        let (more, what) = match way {
            Way::Request => (our.difference(&their), "must be given"),
            Way::Reply => (their.difference(&our), "may be missing"),
        };
        more.for_each(|name| self.differ(format!("{at}.{name} {what}")));
    }
}

/// Whether `text` has the parts of `pattern` between its stars, in order, from start to end.
fn matches(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('*');
    let Some(mut rest) = text.strip_prefix(parts.next().unwrap()) else { return false };
    for part in parts {
        match rest.find(part) {
            Some(at) if !part.is_empty() => rest = &rest[at + part.len()..],
            Some(_) => rest = "",
            None => return false,
        }
    }
    rest.is_empty()
}

#[test]
fn patterns_match() {
    for (pattern, text, matched) in [
        ("a", "a", true),
        ("a", "ab", false),
        ("*", "anything", true),
        ("PUT * 405", "PUT /x 405", true),
        ("PUT * 405", "PUT /x 404", false),
        ("*: b", "a: b", true),
        ("*: b", "a: bc", false),
    ] {
        assert_eq!(matches(pattern, text), matched, "{pattern} {text}");
    }
}

#[test]
fn the_document_says_all_that_the_contract_says() {
    let documents = compare();
    let meant = |found: &&String| DIFFERENCES.iter().any(|(pattern, _)| matches(pattern, found));
    let (_, unmeant): (Vec<_>, Vec<_>) = documents.found.iter().partition(meant);
    assert!(unmeant.is_empty(), "differences that are not in the list: {unmeant:#?}");
    let stale: Vec<_> = DIFFERENCES
        .iter()
        .filter(|(pattern, _)| !documents.found.iter().any(|found| matches(pattern, found)))
        .collect();
    assert!(stale.is_empty(), "differences that are no more: {stale:#?}");
    assert!(documents.compared > 250, "only {} properties compared", documents.compared);
}

#[test]
fn every_difference_is_told() {
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/deviations.md");
    let page = std::fs::read_to_string(page).unwrap();
    for (pattern, row) in DIFFERENCES {
        let told = page.lines().any(|line| line.starts_with(&format!("| {row} |")));
        assert!(told, "{pattern}: docs/deviations.md has no row {row:?}");
    }
}
