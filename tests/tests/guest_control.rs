//! What operators do to a running guest, and what a guest tells of itself, over the real binary.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]

use serde_json::json;
use vmm_api::command::Method;
use vmm_tests::harness::{Api, LIMIT, Scratch, SerialFile, Vmm, vm_config, wait_until};
use vmm_tests::tiny::Guest;

/// A running VM of `guest` with a panic device.
fn booted(scratch: &Scratch, guest: Guest, arguments: &[&str]) -> (Vmm, Api, SerialFile) {
    let vmm = Vmm::with_api(scratch, arguments);
    let serial = SerialFile::new(scratch.path("serial"));
    let mut config = vm_config(&scratch.guest(guest), serial.path());
    config["pvpanic"] = json!(true);
    let mut api = vmm.api();
    api.create(&config);
    api.puts(&["vm.boot"]);
    (vmm, api, serial)
}

#[test]
fn a_guest_takes_an_nmi_and_one_that_comes_while_it_is_paused() {
    let scratch = Scratch::new();
    let (_vmm, mut api, serial) = booted(&scratch, Guest::Nmi, &[]);
    serial.wait_for("ready\n");
    api.puts(&["vm.nmi"]);
    serial.wait_for("nmi\n");

    let scratch = Scratch::new();
    // The pause saves, resets and restores: the NMI is in the saved state of the next one.
    let (_vmm, mut api, serial) = booted(&scratch, Guest::Nmi, &["--verify-state"]);
    serial.wait_for("ready\n");
    api.puts(&["vm.pause", "vm.nmi"]);
    assert_eq!(serial.text(), "ready\n");
    api.puts(&["vm.resume"]);
    serial.wait_for("nmi\n");
}

#[test]
fn a_guest_sees_its_power_button() {
    let scratch = Scratch::new();
    let (mut vmm, mut api, serial) = booted(&scratch, Guest::PowerButton, &[]);
    serial.wait_for("ready\n");
    api.puts(&["vm.power-button"]);
    vmm.expect_exit(0);
    assert_eq!(serial.text(), "ready\nbutton\n");
}

#[test]
fn a_power_button_that_was_pressed_during_a_pause_is_seen_after_it() {
    let scratch = Scratch::new();
    let (mut vmm, mut api, serial) = booted(&scratch, Guest::PowerButton, &["--verify-state"]);
    serial.wait_for("ready\n");
    api.puts(&["vm.pause", "vm.power-button", "vm.resume"]);
    vmm.expect_exit(0);
}

#[test]
fn a_panic_is_told_and_leads_where_the_operator_chose() {
    let told = |api: &mut Api| {
        let event = || api.info().last_guest_event;
        assert_eq!(wait_until(LIMIT, event, || "the panic to be told".to_owned()), "panic");
    };
    for (choice, state) in [("report", "Running"), ("pause", "Paused"), ("stop", "Shutdown")] {
        let scratch = Scratch::new();
        let (mut vmm, mut api, serial) = booted(&scratch, Guest::Panic, &["--on-panic", choice]);
        told(&mut api);
        if choice == "report" {
            serial.wait_for("panicked");
        }
        assert_eq!(api.state(), state, "{choice}");
        assert!(vmm.is_running());
        assert!(vmm.stderr.text().contains("kernel panic"), "{}", vmm.stderr.text());
    }
    let scratch = Scratch::new();
    let (mut vmm, ..) = booted(&scratch, Guest::Panic, &["--on-panic", "exit"]);
    vmm.expect_exit(10);
}

#[test]
fn a_guest_that_panics_at_each_boot_boots_again_and_again() {
    let scratch = Scratch::new();
    let (_vmm, mut api, _) = booted(&scratch, Guest::Panic, &["--on-panic", "restart"]);
    wait_until(LIMIT, || (api.info().boots > 3).then_some(()), || "three restarts".to_owned());
}

#[test]
fn counters_and_metrics_tell_what_a_guest_does() {
    let scratch = Scratch::new();
    let (_vmm, mut api, serial) = booted(&scratch, Guest::Ticker, &[]);
    serial.wait_for("00000010\n");
    let counters = api.get("vm.counters").json();
    assert!(counters.is_object(), "{counters}");
    let metrics = api.get("vmm.metrics");
    assert_eq!(metrics.status, 200);
    assert!(metrics.body.ends_with("# EOF\n"), "{}", metrics.body);
    let exits =
        metrics.body.lines().find(|line| line.starts_with("vmm_vcpu_exits_total") && line.contains("pio"));
    assert!(exits.is_some(), "{}", metrics.body);
    let trace = api.get("vm.boot-trace").json();
    assert!(trace["traceEvents"].as_array().is_some_and(|events| events.len() > 5), "{trace}");
}

#[test]
fn the_level_of_the_log_changes_while_the_vmm_runs() {
    let scratch = Scratch::new();
    let vmm = Vmm::with_api(&scratch, [""; 0]);
    let mut api = vmm.api();
    assert_eq!(api.get("vmm.log-level").json(), json!({ "level": "warn" }));
    let answer = api.request(Method::Put, "vmm.log-level", br#"{"level": "debug"}"#);
    assert_eq!((answer.status, answer.json()), (200, json!({ "level": "warn" })), "the level before");
    assert_eq!(api.get("vmm.log-level").json(), json!({ "level": "debug" }));
    vmm.stderr.wait_for("vmm.log-level");
    assert_eq!(api.request(Method::Put, "vmm.log-level", br#"{"level": "loud"}"#).status, 400);
}

#[test]
fn a_configuration_is_validated_without_a_vm() {
    let scratch = Scratch::new();
    let vmm = Vmm::with_api(&scratch, [""; 0]);
    let mut api = vmm.api();
    let mut validate = |config: &serde_json::Value| {
        let answer = api.request(Method::Put, "vm.validate", config.to_string().as_bytes());
        assert_eq!(answer.status, 200, "{answer:?}");
        answer.json()
    };
    let serial = scratch.path("serial");
    let good = vm_config(&scratch.guest(Guest::Halt), &serial);
    let reply = validate(&good);
    assert_eq!(reply["valid"], true, "{reply}");
    assert_eq!(reply["config"]["rng"]["id"], "_rng", "defaults and ids are filled in");
    assert!(!serial.exists(), "nothing is made");

    let mut odd = good.clone();
    odd["cpus"] = json!({ "boot_vcpus": 4, "max_vcpus": 2 });
    odd["wibble"] = json!(1);
    let reply = validate(&odd);
    let paths: Vec<&str> =
        reply["faults"].as_array().unwrap().iter().filter_map(|f| f["path"].as_str()).collect();
    assert_eq!((reply["valid"].as_bool(), paths.contains(&"wibble")), (Some(false), true), "{reply}");
    assert!(paths.iter().any(|path| path.starts_with("cpus")), "all faults at once: {paths:?}");

    let mut absent = good;
    absent["payload"]["kernel"] = json!(scratch.path("absent"));
    let reply = validate(&absent);
    assert_eq!(reply["faults"][0]["path"], "payload.kernel", "{reply}");
    assert_eq!(reply["faults"][0]["kind"], "environment");
    assert_eq!(api.get("vm.info").status, 404);
    assert_eq!(api.request(Method::Put, "vm.validate", b"{").status, 400);
}

#[test]
fn a_file_is_validated_from_the_command_line() {
    let scratch = Scratch::new();
    let good = vm_config(&scratch.guest(Guest::Halt), &scratch.path("serial"));
    let file = scratch.write("vm.json", good.to_string());
    let mut vmm = Vmm::spawn(["validate", file.to_str().unwrap()]);
    vmm.expect_exit(0);
    assert_eq!(vmm.stdout.text(), "valid\n");

    let file = scratch.write("bad.json", r#"{"payload": {"kernel": "/absent"}, "memory": {"size": 1}}"#);
    let mut vmm = Vmm::spawn(["validate", "--json", file.to_str().unwrap()]);
    vmm.expect_exit(1);
    let reply: serde_json::Value = serde_json::from_str(&vmm.stdout.text()).unwrap();
    assert_eq!(reply["valid"], false);
    assert!(reply["faults"][0]["path"].as_str().is_some_and(|path| path.starts_with("memory")), "{reply}");

    let mut vmm = Vmm::spawn(["validate", "/absent/file"]);
    vmm.expect_exit(1);
    assert!(vmm.stderr.text().contains("/absent/file"), "{}", vmm.stderr.text());
    Vmm::spawn(["validate"]).expect_exit(2);
}

#[test]
fn a_vm_of_the_command_line_that_does_not_boot_ends_the_vmm_also_with_an_api() {
    let scratch = Scratch::new();
    let socket = format!("path={}", scratch.path("api").display());
    let mut vmm = Vmm::spawn(["--api-socket", &socket, "--kernel", "/absent/kernel", "--console", "off"]);
    vmm.expect_exit(1);
    let report = vmm.stderr.text();
    assert!(report.contains("the VM does not boot") && report.contains("/absent/kernel"), "{report}");
    assert!(!scratch.path("api").exists());
}
