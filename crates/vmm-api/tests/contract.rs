//! The tables against the contract file: names, defaults, required fields, words.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]

use std::collections::{BTreeMap, BTreeSet};

use vmm_api::config::VmConfig;
use vmm_api::config::table::{Need, Shape, Table};

const CONTRACT: &str = include_str!("data/contract.yaml");

/// One schema of the contract file.
#[derive(Debug, Default)]
struct Schema {
    required: BTreeSet<String>,
    words: BTreeSet<String>,
    /// Property and its default.
    properties: BTreeMap<String, Option<String>>,
}

/// Reads the schemas by their indentation; the file is regular enough.
fn schemas() -> BTreeMap<String, Schema> {
    let mut schemas: BTreeMap<String, Schema> = BTreeMap::new();
    let (mut schema, mut section, mut property) = (String::new(), String::new(), String::new());
    for line in CONTRACT.lines().skip_while(|line| *line != "  schemas:").skip(1) {
        let indent = line.len() - line.trim_start().len();
        let (name, value) = line.trim().split_once(':').unwrap_or((line.trim(), ""));
        let value = value.trim().trim_matches('"').to_owned();
        let words =
            || value.trim_matches(['[', ']']).split(',').map(|w| w.trim().trim_matches('"').to_owned());
        let entry = schemas.entry(if indent == 4 { name.to_owned() } else { schema.clone() }).or_default();
        match (indent, name) {
            (4, _) => schema = name.to_owned(),
            (6, "enum") => entry.words = words().collect(),
            (6, "required") if !value.is_empty() => entry.required = words().collect(),
            (6, _) => section = name.to_owned(),
            (8, item) if section == "required" => {
                entry.required.insert(item.trim_start_matches("- ").to_owned());
            }
            (8, _) if section == "properties" => {
                property = name.to_owned();
                entry.properties.insert(property.clone(), None);
            }
            (10, "default") if section == "properties" => {
                entry.properties.insert(property.clone(), Some(value));
            }
            _ => {}
        }
    }
    schemas
}

/// All tables below `table`, by name, and all choices by the field that has them.
fn collect(
    table: &'static Table,
    tables: &mut BTreeMap<&'static str, &'static Table>,
    words: &mut BTreeMap<String, BTreeSet<String>>,
) {
    tables.insert(table.name, table);
    for field in table.fields {
        let mut shape = (field.shape)();
        if let Shape::List(element) = shape {
            shape = element();
        }
        match shape {
            Shape::Object(inner) => collect(inner, tables, words),
            Shape::Choice(choice) => {
                let spelled = choice.iter().map(|word| word.json.to_owned()).collect();
                words.insert(format!("{}.{}", table.name, field.name), spelled);
            }
            _ => {}
        }
    }
}

fn tables() -> (BTreeMap<&'static str, &'static Table>, BTreeMap<String, BTreeSet<String>>) {
    let (mut tables, mut words) = (BTreeMap::new(), BTreeMap::new());
    collect(VmConfig::TABLE, &mut tables, &mut words);
    (tables, words)
}

/// Defaults of the contract file that its releases no longer have.
const STALE_DEFAULTS: &[&str] = &["NetConfig.ip", "NetConfig.mask"];

#[test]
fn every_field_of_the_contract_is_known_with_its_default() {
    let (tables, _) = tables();
    let schemas = schemas();
    let mut compared = 0;
    for (name, table) in &tables {
        let Some(schema) = schemas.get(*name) else {
            continue;
        };
        for (property, default) in &schema.properties {
            let at = format!("{name}.{property}");
            let field = table.by_name(property).unwrap_or_else(|| panic!("{at} is not in the table"));
            compared += 1;
            if STALE_DEFAULTS.contains(&at.as_str()) || field.need != Need::Optional {
                continue;
            }
            let ours = match (field.default)() {
                serde_json::Value::String(text) => text,
                other => other.to_string(),
            };
            if let Some(theirs) = default {
                assert_eq!(&ours, theirs, "{at}");
            }
        }
    }
    assert!(compared > 200, "only {compared} fields compared: the contract file was not understood");
}

#[test]
fn every_object_of_the_configuration_is_in_the_contract() {
    let (tables, _) = tables();
    let schemas = schemas();
    let unknown: Vec<_> = tables.keys().filter(|name| !schemas.contains_key(**name)).copied().collect();
    // Objects of optional builds of the contract's releases.
    assert_eq!(unknown, ["FwCfgConfig", "FwCfgItem", "IvshmemConfig", "PvmemcontrolConfig"]);
}

#[test]
fn fields_beyond_the_contract_file_are_few_and_meant() {
    let (tables, _) = tables();
    let schemas = schemas();
    let mut beyond = BTreeSet::new();
    for (name, table) in &tables {
        let Some(schema) = schemas.get(*name) else {
            continue;
        };
        for field in table.fields.iter().filter(|field| !schema.properties.contains_key(field.name)) {
            beyond.insert(format!("{name}.{}", field.name));
        }
    }
    let meant = [
        // Descriptors; their numbers are never taken from a document.
        "DeviceConfig.fd",
        "NetConfig.fds",
        "PlatformConfig.iommufd_fd",
        // Accepted by the releases, though not in their file.
        "DiskConfig.disable_aio",
        "DiskConfig.disable_io_uring",
        "FsConfig.iommu",
        "GenericVhostUserConfig.iommu",
        "UserDeviceConfig.iommu",
        "VmConfig.gdb",
        "VmConfig.ivshmem",
        "VmConfig.pvmemcontrol",
        "PayloadConfig.fw_cfg_config",
    ];
    assert_eq!(beyond, meant.iter().map(|name| (*name).to_owned()).collect());
}

#[test]
fn required_fields_are_the_contracts() {
    let (tables, _) = tables();
    let schemas = schemas();
    for (name, table) in &tables {
        let Some(schema) = schemas.get(*name) else {
            continue;
        };
        let ours: BTreeSet<String> =
            table.fields.iter().filter(|f| f.need != Need::Optional).map(|f| f.name.to_owned()).collect();
        let mut theirs = schema.required.clone();
        match *name {
            // Older clients give a kernel instead; what is missing is said by the check.
            "VmConfig" => assert!(theirs.remove("payload")),
            // Defaults that the contract file has in spite of requiring them.
            "FsConfig" => assert!(theirs.remove("num_queues") && theirs.remove("queue_size")),
            // The file requires none, the releases all.
            "CpuTopology" => theirs.extend(schema.properties.keys().cloned()),
            _ => {}
        }
        assert_eq!(ours, theirs, "{name}");
    }
}

#[test]
fn words_are_the_contracts() {
    let (_, words) = tables();
    let schemas = schemas();
    for (field, schema) in [
        ("CpusConfig.core_scheduling", "CoreSchedulingMode"),
        ("DiskConfig.image_type", "ImageType"),
        ("DiskConfig.lock_granularity", "LockGranularity"),
        ("ConsoleConfig.mode", "ConsoleMode"),
        ("SerialConfig.mode", "ConsoleMode"),
        ("DebugConsoleConfig.mode", "ConsoleMode"),
    ] {
        assert_eq!(words[field], schemas[schema].words, "{field}");
        assert!(words[field].len() > 1, "{field}");
    }
}
