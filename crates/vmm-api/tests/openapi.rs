//! The generated documents against what is committed, and the schemas of replies against what is written.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]

use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::path::Path;
use vmm_api::command::Encode;
use vmm_api::commands::device::{Added, PciDeviceInfo};
use vmm_api::commands::operations;
use vmm_api::config::{CpusConfig, FaultKind, UnknownFields, VmConfig};
use vmm_api::error::{ApiError, Code, ErrorForm, FaultReport, Problem};
use vmm_api::info::{DeviceNode, PingReply, RestoredFrom, ValidateReply, VmInfo, VmState};
use vmm_api::openapi::{document, errors_markdown};
use vmm_api::progress::{MigrationProgressReply, MigrationRole};
use vmm_api::spec::parse_and_check;
use vmm_state::{Action, Admission, Phase, admit};

fn committed(name: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs").join(name);
    if std::env::var_os("VMM_BLESS").is_some() {
        std::fs::write(&path, text).unwrap();
    }
    let found = std::fs::read_to_string(&path).unwrap_or_default();
    // Not by assert_eq: the texts are long.
    assert!(
        found == text,
        "docs/{name} is not what the code says: run with VMM_BLESS=1 and look at the difference"
    );
}

#[test]
fn the_committed_document_is_generated() {
    committed("openapi.json", &format!("{:#}\n", document(&operations())));
}

#[test]
fn the_committed_page_of_errors_is_generated() {
    committed("errors.md", &errors_markdown());
}

fn schema(name: &str) -> Value {
    document(&operations())["components"]["schemas"][name].clone()
}

fn keys(value: &Value) -> BTreeSet<String> {
    value.as_object().unwrap().keys().cloned().collect()
}

fn required(schema: &Value) -> BTreeSet<String> {
    schema["required"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|name| name.as_str().unwrap().to_owned())
        .collect()
}

/// `full` writes all that it can, `bare` no more than it must.
fn describes(name: &str, full: &Value, bare: &Value) {
    let schema = schema(name);
    assert_eq!(keys(&schema["properties"]), keys(full), "{name}");
    assert_eq!(required(&schema), keys(bare), "{name}");
}

#[test]
fn replies_are_what_their_schemas_say() {
    let ping =
        PingReply { version: "1".into(), build_version: "1".into(), pid: 1, features: vec!["a".into()] };
    let written = serde_json::from_slice(&ping.encode().unwrap()).unwrap();
    describes("VmmPingResponse", &written, &written);
    let bare = VmInfo {
        config: std::sync::Arc::default(),
        state: VmState::Created,
        memory_actual_size: 1,
        device_tree: None,
        phase: "Created".into(),
        boots: 0,
        last_guest_event: None,
        restored_from: None,
    };
    let full = VmInfo {
        device_tree: Some([("a".to_owned(), DeviceNode::default())].into()),
        last_guest_event: Some("reset".into()),
        restored_from: Some(RestoredFrom { source_url: "file:///a".into(), id: "b".into(), created_ms: 1 }),
        ..bare.clone()
    };
    let write = |info: &VmInfo| serde_json::from_slice::<Value>(&info.encode().unwrap()).unwrap();
    describes("VmInfo", &write(&full), &write(&bare));
    let node = &write(&full)["device_tree"]["a"];
    describes("DeviceNode", node, node);
    let origin = &write(&full)["restored_from"];
    describes("RestoredFrom", origin, origin);
    assert_eq!(schema("VmState")["enum"], json!(VmState::ALL));
    let bare = MigrationProgressReply::default();
    let full = MigrationProgressReply {
        role: Some(MigrationRole::Source),
        step: Some("Copying".into()),
        bandwidth: Some(1),
        dirty_rate: Some(1),
        expected_blackout_ms: Some(1),
        owed_bytes: Some(1),
        blackout_us: Some(1),
        causes: vec!["a".into()],
        ..bare.clone()
    };
    let write = |reply: &MigrationProgressReply| serde_json::from_slice(&reply.encode().unwrap()).unwrap();
    describes("MigrationProgress", &write(&full), &write(&bare));
    let (valid, faults, warnings) = (true, Vec::new(), Vec::new());
    let bare = ValidateReply { valid, faults, warnings, config: None };
    let full = ValidateReply { config: Some(VmConfig::default()), ..bare.clone() };
    let write = |reply: &ValidateReply| serde_json::from_slice(&reply.encode().unwrap()).unwrap();
    describes("VmValidation", &write(&full), &write(&bare));
    let added = Added::Hot(PciDeviceInfo { id: "a".into(), bdf: "b".into() });
    let written = serde_json::from_slice(&added.encode().unwrap()).unwrap();
    describes("PciDeviceInfo", &written, &written);
}

#[test]
fn errors_are_what_their_schemas_say() {
    let fault = FaultReport { path: "a".into(), kind: "type".into(), message: "b".into() };
    let Admission::Refused(refusal) = admit(Phase::Created, Action::Pause) else { panic!("is refused") };
    let full = ApiError::from(refusal).with_faults(vec![fault.clone()]);
    let write = |error: &ApiError| serde_json::to_value(Problem::from(error)).unwrap();
    describes("Problem", &write(&full), &write(&ApiError::new(Code::Internal, "x")));
    let fault = serde_json::to_value(fault).unwrap();
    describes("Fault", &fault, &fault);
    let causes: Value = serde_json::from_slice(&full.body(ErrorForm::Causes)).unwrap();
    assert!(causes.as_array().unwrap().iter().all(Value::is_string));
}

#[test]
fn phases_and_refusals_are_those_of_the_life_cycle() {
    let document = document(&operations());
    let pause = &document["paths"]["/vm.pause"]["put"];
    assert_eq!(pause["x-phases"], json!(["Running"]));
    let statuses = keys(&pause["responses"]);
    assert!(statuses.contains("404") && statuses.contains("409") && statuses.contains("204"), "{statuses:?}");
    // Without a VM there is nothing to delete, which is no refusal.
    let delete = &document["paths"]["/vm.delete"]["put"];
    assert!(delete["x-phases"].as_array().unwrap().contains(&json!("Empty")));
    assert!(!keys(&delete["responses"]).contains("404"));
}

/// Every reference leads somewhere, and nothing stands beside one.
#[test]
fn references_lead_somewhere() {
    fn walk(root: &Value, value: &Value, count: &mut usize) {
        if let Some(reference) = value["$ref"].as_str() {
            assert!(root.pointer(&reference[1..]).is_some_and(|target| !target.is_null()), "{reference}");
            assert_eq!(value.as_object().unwrap().len(), 1, "{value}");
            *count += 1;
        }
        match value {
            Value::Object(map) => map.values().for_each(|value| walk(root, value, count)),
            Value::Array(items) => items.iter().for_each(|value| walk(root, value, count)),
            _ => {}
        }
    }
    let (document, mut count) = (document(&operations()), 0);
    walk(&document, &document, &mut count);
    assert!(count > 100, "{count}");
}

/// What the reader takes and refuses is what the schema says, for each field of the configuration by itself.
#[test]
fn a_field_s_default_is_of_its_schema() {
    for (name, property) in schema("VmConfig")["properties"].as_object().unwrap() {
        let default = &property["default"];
        let type_of = match default {
            Value::Null | Value::Object(_) => continue,
            Value::Bool(_) => "boolean",
            Value::Number(_) => "integer",
            Value::String(_) => "string",
            Value::Array(_) => "array",
        };
        assert_eq!(property["type"], type_of, "{name}");
    }
}

/// Bounds that are narrower than a type's are told by the table and held by the check. What is right but not built yet is
/// within them.
#[test]
fn told_bounds_are_held() {
    let mut checked = 0;
    for (field, least, most) in
        CpusConfig::TABLE.fields.iter().filter_map(|f| Some((f, f.range?.0, f.range?.1)))
    {
        for (value, fits) in [(least - 1, false), (least, true), (most, true), (most + 1, false)] {
            let mut config =
                json!({ "payload": { "kernel": "/k" }, "cpus": { "boot_vcpus": 1, "max_vcpus": 1 } });
            config["cpus"][field.name] = json!(value);
            let path = format!("cpus.{}", field.name);
            let faults = parse_and_check(config.to_string().as_bytes(), UnknownFields::Refuse).err();
            let refused =
                faults.iter().flatten().any(|fault| fault.path == path && fault.kind != FaultKind::NotBuilt);
            assert_ne!(refused, fits, "{path}: {value}: {faults:?}");
            checked += 1;
        }
    }
    assert_eq!(checked, 12);
}
