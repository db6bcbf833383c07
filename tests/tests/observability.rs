//! What the real binary tells of itself: logs, the trace of its boot, its version.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use serde_json::Value;
use vmm_tests::harness::{Scratch, SerialFile, Vmm, binary, vm_arguments, vm_config};
use vmm_tests::tiny::Guest;

/// The events of a trace that have a time: name, begin and end in microseconds.
fn events(path: &Path) -> Vec<(String, f64, f64)> {
    let document: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    let events = document["traceEvents"].as_array().unwrap().iter().filter(|event| event["ph"] != "M");
    events
        .map(|event| {
            let start = event["ts"].as_f64().unwrap();
            let end = start + event["dur"].as_f64().unwrap_or_default();
            (event["name"].as_str().unwrap().to_owned(), start, end)
        })
        .collect()
}

#[track_caller]
fn of(events: &[(String, f64, f64)], name: &str) -> (f64, f64) {
    let found = events.iter().find(|event| event.0 == name);
    let (_, start, end) = found.unwrap_or_else(|| panic!("{name} in {events:?}"));
    (*start, *end)
}

#[test]
fn the_boot_trace_has_every_stage_in_order_and_the_guests_codes() {
    let scratch = Scratch::new();
    let path = scratch.path("trace.json");
    let mut vmm = Vmm::with_api(&scratch, ["-vv", "--boot-trace", path.to_str().unwrap()]);
    let serial = SerialFile::new(scratch.path("serial"));
    let mut api = vmm.api();
    api.create(&vm_config(&scratch.guest(Guest::Post), serial.path()));
    api.puts(&["vm.boot"]);
    let booted = events(&path);
    let order = [
        "process",
        "command line",
        "kvm",
        "console",
        "vm",
        "memory",
        "devices",
        "kernel",
        "vcpus",
        "first run",
    ];
    let times = order.map(|name| of(&booted, name));
    assert_eq!(times[0], (0.0, 0.0));
    assert!(times.is_sorted_by(|before, after| before.1 <= after.0), "{booted:?}");
    let devices = of(&booted, "devices");
    for device in ["_ioapic", "_serial", "_post", "_ged"] {
        let (start, end) = of(&booted, device);
        assert!(devices.0 <= start && end <= devices.1, "{device} in {booted:?}");
    }

    vmm.stderr.wait_for("code 0x01");
    api.puts(&["vm.shutdown"]);
    let code = of(&events(&path), "POST 0x01 (firmware)");
    assert!(code.0 >= of(&booted, "vcpus").1);
    // The next machine's trace takes its place, and begins with itself.
    api.puts(&["vm.boot"]);
    let again = events(&path);
    assert_eq!(again[0].1, 0.0, "{again:?}");
    assert!(!again.iter().any(|event| event.0 == "kvm"), "{again:?}");
    api.puts(&["vmm.shutdown"]);
    vmm.expect_exit(0);
}

#[test]
fn a_boot_trace_that_cannot_be_written_is_told_before_anything_is_started() {
    let scratch = Scratch::new();
    let mut arguments = vm_arguments(&scratch.guest(Guest::Hello), "tty");
    arguments.extend(["--boot-trace", "/nonexistent/trace"].map(str::to_owned));
    let mut vmm = Vmm::spawn(arguments);
    vmm.expect_exit(1);
    assert_eq!(vmm.stdout.text(), "");
    let text = vmm.stderr.text();
    assert!(text.starts_with("error: cannot open the file for boot traces /nonexistent/trace\n"), "{text}");
}

#[test]
fn logs_are_objects_where_that_is_asked_for() {
    let scratch = Scratch::new();
    let mut arguments = vm_arguments(&scratch.guest(Guest::Hello), "tty");
    arguments.extend(["-vvv", "--log-format", "json"].map(str::to_owned));
    let mut vmm = Vmm::spawn(arguments);
    vmm.expect_exit(0);
    let text = vmm.stderr.text();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for line in &lines {
        for member in ["timestamp", "level", "thread", "module", "message"] {
            assert!(line[member].is_string(), "{member} in {line}");
        }
        assert!(line["elapsed"].is_f64(), "{line}");
    }
    let loaded = lines.iter().find(|line| line["message"].as_str().unwrap().starts_with("loaded "));
    assert_eq!(loaded.unwrap()["level"], "DEBUG", "{text}");
    assert_eq!(loaded.unwrap()["thread"], "vmm", "{text}");
}

#[test]
fn modules_have_levels_of_their_own() {
    let scratch = Scratch::new();
    let vmm = Vmm::with_api(&scratch, ["--log-filter", "vmm_api::http=debug,vmm=error"]);
    vmm.api().get("vmm.ping");
    vmm.stderr.wait_for("DEBUG:vmm_api::http::server -- API request vmm.ping\n");
    let text = vmm.stderr.text();
    assert!(text.lines().all(|line| line.contains("DEBUG:vmm_api::http")), "{text}");
}

#[test]
fn the_version_is_the_contracts_under_the_contracts_name() {
    let printed = |name: &str| {
        let output = Command::new(binary()).arg0(name).arg("--version").output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(printed("/usr/bin/cloud-hypervisor"), "cloud-hypervisor v53.0.0\n");
    assert_eq!(printed("vmm"), format!("vmm v{}\n", env!("CARGO_PKG_VERSION")));
}
