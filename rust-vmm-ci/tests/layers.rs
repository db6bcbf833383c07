//! The house rules that `cargo metadata` and the files of each crate can show: layers, and what a crate must have.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "tests fail by panicking")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// Folder, package and layer of each library crate. A crate uses lower layers only, in tests and examples, too.
const LAYERS: [(&str, &str, u8); 16] = [
    ("vmm-state", "vmm-state", 0),
    ("migration-protocol", "vmm-migration-protocol", 0),
    ("snapshot", "vmm-snapshot", 0),
    ("hypervisor", "vmm-hypervisor", 1),
    ("device-model", "vmm-device-model", 1),
    ("vmm-epoll", "vmm-epoll", 1),
    ("disk-image", "vmm-disk-image", 1),
    ("boot", "vmm-boot", 1),
    ("pci", "vmm-pci", 2),
    ("memory-manager", "vmm-memory-manager", 2),
    ("cpu-manager", "vmm-cpu-manager", 2),
    ("vmm-api", "vmm-api", 2),
    ("device-manager", "vmm-device-manager", 3),
    ("platform-devices", "vmm-platform-devices", 3),
    ("virtio-devices", "vmm-virtio-devices", 3),
    ("acpi-tables", "vmm-acpi-tables", 3),
];

/// The ten crates that stay, whatever else changes.
const NAMED: [&str; 10] = [
    "vmm-api",
    "vmm-epoll",
    "vmm-state",
    "cpu-manager",
    "memory-manager",
    "device-manager",
    "migration-protocol",
    "snapshot",
    "pci",
    "acpi-tables",
];

/// What puts everything together, above all layers.
const TOP: [&str; 3] = ["vmm", "vmm-tests", "xtask"];

/// Below all layers, for the tests of any crate and for nothing else.
const TEST_TOOLS: [&str; 1] = ["vmm-fuzzing"];

/// Crates that have no need of `unsafe`, ever.
const PURE: [&str; 3] = ["vmm-state", "migration-protocol", "snapshot"];

/// Never among the dependencies of a library crate: errors are typed, and threads are not tasks.
const BANNED: [&str; 4] = ["tokio", "anyhow", "async-std", "eyre"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

fn packages() -> Vec<Value> {
    let output = Command::new("cargo")
        .args(["metadata", "--no-deps", "--offline", "--format-version", "1"])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    metadata["packages"].as_array().unwrap().clone()
}

fn name(value: &Value) -> &str {
    value["name"].as_str().unwrap()
}

fn layer(package: &str) -> Option<u8> {
    LAYERS.iter().find(|(_, name, _)| *name == package).map(|(_, _, layer)| *layer)
}

/// Our crates among the dependencies of `package`, of any kind.
fn own_dependencies(package: &Value) -> impl Iterator<Item = &str> {
    let dependencies = package["dependencies"].as_array().unwrap().iter();
    let own = dependencies.filter(|dependency| !dependency["path"].is_null());
    own.filter(|dependency| !is_test_tool(dependency)).map(name)
}

/// Whether tests alone use it, and may: it comes with no package.
fn is_test_tool(dependency: &Value) -> bool {
    TEST_TOOLS.contains(&name(dependency)) && dependency["kind"] == "dev"
}

/// The faults of the tree that `packages` describes.
fn layer_faults(packages: &[Value]) -> Vec<String> {
    let mut faults = Vec::new();
    for package in packages {
        let user = name(package);
        let Some(own) = layer(user) else {
            if !TOP.contains(&user) && !TEST_TOOLS.contains(&user) {
                faults.push(format!("{user} is in no layer: add it to this table and to ARCHITECTURE.md"));
            }
            continue;
        };
        for used in own_dependencies(package) {
            match layer(used) {
                Some(lower) if lower < own => {}
                Some(other) => faults.push(format!("{user} (layer {own}) uses {used} (layer {other})")),
                None => faults.push(format!("{user} (layer {own}) uses {used}, which is above all layers")),
            }
        }
    }
    faults
}

#[test]
fn crates_use_lower_layers_only() {
    assert_eq!(layer_faults(&packages()), Vec::<String>::new());
}

#[test]
fn the_layer_test_can_fail() {
    let package = |name: &str, used: &str| serde_json::json!({ "name": name, "dependencies": [{ "name": used, "path": "x" }, { "name": "libc", "path": null }] });
    let faults = |name, used| layer_faults(&[package(name, used)]).len();
    assert_eq!(faults("vmm-pci", "vmm-device-model"), 0);
    assert_eq!(faults("vmm", "vmm-pci"), 0);
    assert_eq!(faults("vmm-device-model", "vmm-pci"), 1, "upwards");
    assert_eq!(faults("vmm-device-manager", "vmm-virtio-devices"), 1, "sideways");
    assert_eq!(faults("vmm-pci", "vmm"), 1, "to the assembly");
    assert_eq!(faults("vmm-new", "vmm-pci"), 1, "not in the table");
    assert_eq!(faults("vmm-pci", "vmm-fuzzing"), 1, "a tool of tests outside them");
}

#[test]
fn folders_packages_and_the_table_agree() {
    let packages = packages();
    for (folder, package, _) in LAYERS {
        let found = packages.iter().find(|found| name(found) == package);
        let manifest =
            found.unwrap_or_else(|| panic!("no package {package}"))["manifest_path"].as_str().unwrap();
        assert_eq!(Path::new(manifest), root().join("crates").join(folder).join("Cargo.toml"));
    }
    for folder in NAMED {
        assert!(LAYERS.iter().any(|(known, _, _)| *known == folder), "{folder}");
    }
}

#[test]
fn every_crate_has_what_a_crate_has() {
    let mut faults = Vec::new();
    for package in packages().iter().filter(|package| layer(name(package)).is_some()) {
        let folder = PathBuf::from(package["manifest_path"].as_str().unwrap()).parent().unwrap().to_owned();
        let mut fault = |what: &str| faults.push(format!("{}: {what}", name(package)));
        for file in ["README.md", "CHANGELOG.md", "LICENSE-APACHE", "LICENSE-BSD-3-Clause"] {
            if fs::read_to_string(folder.join(file)).is_ok_and(|text| text.trim().is_empty()) {
                fault(&format!("{file} is empty"));
            }
            if !folder.join(file).is_file() {
                fault(&format!("no {file}"));
            }
        }
        if package["license"] != "Apache-2.0 OR BSD-3-Clause" {
            fault("another licence");
        }
        if package["description"].as_str().is_none_or(str::is_empty) {
            fault("no description");
        }
        if package["readme"] != "README.md" {
            fault("no readme field");
        }
        let targets = package["targets"].as_array().unwrap();
        if !targets.iter().any(|target| target["kind"][0] == "example") {
            fault("no example");
        }
        for dependency in package["dependencies"].as_array().unwrap() {
            if dependency["kind"].is_null() && BANNED.contains(&name(dependency)) {
                fault(&format!("depends on {}", name(dependency)));
            }
            if !dependency["path"].is_null() && dependency["req"] == "*" && !is_test_tool(dependency) {
                fault(&format!("path dependency on {} has no version", name(dependency)));
            }
        }
    }
    assert_eq!(faults, Vec::<String>::new());
}

#[test]
fn every_crate_takes_the_workspaces_lints() {
    for package in packages() {
        let manifest = fs::read_to_string(package["manifest_path"].as_str().unwrap()).unwrap();
        assert!(manifest.contains("[lints]\nworkspace = true"), "{} has lints of its own", name(&package));
    }
    let workspace = fs::read_to_string(root().join("Cargo.toml")).unwrap();
    for lint in
        ["missing_docs", "unsafe_code", "unwrap_used", "indexing_slicing", "undocumented_unsafe_blocks"]
    {
        assert!(workspace.contains(&format!("\n{lint} = \"deny\"")), "{lint} is not denied");
    }
}

#[test]
fn pure_crates_forbid_unsafe_code() {
    for folder in PURE {
        let lib = fs::read_to_string(root().join("crates").join(folder).join("src/lib.rs")).unwrap();
        assert!(lib.contains("#![forbid(unsafe_code)]"), "{folder}");
    }
}
