//! Defects that other control loops had, and that this one must not have. `docs/hardening.md` lists them all, with the test of each.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};
use vmm_api::command::Method;
use vmm_state::Phase;
use vmm_tests::harness::{LIMIT, Pending, Requests, Scratch, UNBOOTABLE, Vmm, vm_arguments, vm_config};
use vmm_tests::tiny::Guest;

const PING: &[u8] = b"GET /api/v1/vmm.ping HTTP/1.1\r\nHost: localhost\r\n\r\n";

/// All that waits at a wake-up is served, not the first of it.
#[test]
fn many_requests_at_one_wake_up_are_all_answered() {
    const CLIENTS: usize = 50;
    const EACH: usize = 20;
    let scratch = Scratch::new();
    let vmm = Vmm::with_api(&scratch, [""; 0]);
    let connect = |_| UnixStream::connect(vmm.socket()).unwrap();
    let mut clients: Vec<UnixStream> = (0..CLIENTS).map(connect).collect();
    vmm.signal("STOP");
    for client in &mut clients {
        client.set_read_timeout(Some(LIMIT)).unwrap();
        client.write_all(&PING.repeat(EACH)).unwrap();
    }
    vmm.signal("CONT");
    for mut client in clients {
        let mut seen = Vec::new();
        let mut buffer = [0; 4096];
        while String::from_utf8_lossy(&seen).matches("\"pid\"").count() < EACH {
            let count = client.read(&mut buffer).unwrap();
            assert_ne!(count, 0, "an answer is missing: {}", String::from_utf8_lossy(&seen));
            seen.extend_from_slice(&buffer[..count]);
        }
    }
}

/// CPU time of the process so far, in clock ticks.
fn ticks(vmm: &Vmm) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{}/stat", vmm.pid())).unwrap();
    // After the name, which may hold anything: state, then utime and stime as the 12th and 13th.
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    [fields[11], fields[12]].map(|ticks| ticks.parse::<u64>().unwrap()).iter().sum()
}

/// A process that spins takes hundreds of milliseconds of the second, even on a busy machine.
fn rests(vmm: &Vmm, about: &str) {
    // What was just asked for may still be at work.
    thread::sleep(Duration::from_millis(200));
    let before = ticks(vmm);
    thread::sleep(Duration::from_secs(1));
    let spent = ticks(vmm) - before;
    assert!(spent <= 10, "{about}: {spent} ticks of CPU time in a second");
}

#[test]
fn input_that_nobody_takes_keeps_nobody_awake() {
    let scratch = Scratch::new();
    let mut vmm = Vmm::with_api(&scratch, [""; 0]);
    let mut api = vmm.api();
    vmm.type_in("before there is a VM");
    rests(&vmm, "no VM");

    let kernel = scratch.path("kernel");
    let mut config = vm_config(&kernel, &scratch.path("unused"));
    config["serial"] = json!({ "mode": "Tty" });
    api.create(&config);
    vmm.type_in("before it boots");
    rests(&vmm, "created");
    assert_eq!(api.put("vm.boot").status, 500);
    rests(&vmm, "after a boot that failed");

    fs::copy(scratch.guest(Guest::Halt), &kernel).unwrap();
    api.puts(&["vm.boot"]);
    vmm.stdout.wait_for("halted");
    vmm.type_in(&"more than the port holds ".repeat(100));
    rests(&vmm, "a guest that does not read");
    api.puts(&["vm.pause"]);
    vmm.type_in(&"and more ".repeat(100));
    rests(&vmm, "paused");
    api.puts(&["vm.shutdown"]);
    vmm.type_in("after its end");
    rests(&vmm, "shut down");
    api.puts(&["vm.boot"]);
    vmm.close_stdin();
    rests(&vmm, "standard input has ended");
    api.puts(&["vm.delete"]);
    rests(&vmm, "deleted");
    assert_eq!(api.get("vmm.ping").status, 200);
}

/// A number in a document is a number: it names no descriptor of the process, which is neither used nor closed.
#[test]
fn numbers_in_json_never_become_descriptors() {
    let scratch = Scratch::new();
    let vmm = Vmm::with_api(&scratch, [""; 0]);
    let mut api = vmm.api();
    let kernel = scratch.guest(Guest::Halt);
    let config = vm_config(&kernel, &scratch.path("serial"));
    // Everything that is made once is there now.
    api.create(&config);
    let before = vmm.holdings();
    let numbers: Vec<u32> = (0..64).collect();
    let with_fds = |mut net: Value| {
        net["fds"] = json!(numbers);
        net
    };
    api.puts(&["vm.delete"]);
    let mut with_net = config.clone();
    with_net["net"] = json!([with_fds(json!({ "num_queues": 128 }))]);
    assert!(api.try_create(&with_net).status >= 400);
    api.create(&config);
    let restore =
        json!({ "source_url": "file:///x", "net_fds": [with_fds(json!({ "id": "n", "num_fds": 64 }))] });
    for (name, body) in [("vm.add-net", with_fds(json!({ "id": "n" }))), ("vm.restore", restore)] {
        let answer = api.request(Method::Put, name, body.to_string().as_bytes());
        assert!(answer.status >= 400, "{name}: {answer:?}");
    }
    vmm.expect_holdings(&before, "after documents with numbers of descriptors");
    api.puts(&["vm.boot", "vm.delete"]);
}

#[test]
fn the_log_holds_nothing_of_what_a_guest_is_told() {
    const SECRET: &str = "secret-4711";
    let scratch = Scratch::new();
    let mut vmm = Vmm::with_api(&scratch, ["-vvv"]);
    let serial = scratch.path("serial");
    let mut config = vm_config(&scratch.guest(Guest::Hello), &serial);
    config["payload"]["cmdline"] = json!(format!("password={SECRET}"));
    let mut api = vmm.api();
    let mut wrong = config.clone();
    wrong["cpus"]["boot_vcpus"] = json!(SECRET);
    wrong[SECRET] = json!(SECRET);
    assert_eq!(api.try_create(&wrong).status, 400);
    api.create(&config);
    assert_eq!(api.try_create(&config).status, 409);
    let answer = api.request(Method::Put, "vm.validate", config.to_string().as_bytes());
    assert_eq!(answer.status, 200, "{answer:?}");
    assert!(api.get("vm.info").body.contains(SECRET), "the owner may ask for it");
    drop(Pending::send(vmm.socket(), "vm.boot", b""));
    vmm.expect_exit(0);
    let told = fs::read_to_string(&serial).unwrap();
    assert!(told.contains(SECRET), "the guest is told: {told}");

    let arguments = vm_arguments(&scratch.guest(Guest::Hello), "null");
    let cmdline = format!("password={SECRET}");
    let more = ["-vvv", "--cmdline", &cmdline];
    let mut alone = Vmm::spawn(arguments.iter().map(String::as_str).chain(more));
    alone.expect_exit(0);
    for log in [vmm.stderr.text(), alone.stderr.text()] {
        assert!(log.contains("the VM runs"), "a log with all levels: {log}");
        assert!(!log.contains(SECRET), "{log}");
    }
}

/// A VMM whose VM does not come up ends, and takes its API with it.
#[test]
fn no_api_outlives_a_vmm_that_cannot_start() {
    let scratch = Scratch::new();
    let socket = scratch.path("api");
    let option = format!("path={}", socket.display());
    let arguments = vm_arguments(&scratch.path("no-kernel"), "null");
    let flags = ["--api-socket", option.as_str()];
    let mut vmm = Vmm::spawn(arguments.iter().map(String::as_str).chain(flags));
    vmm.expect_exit(1);
    assert!(!socket.exists(), "the socket goes with the process");
    assert!(UnixStream::connect(&socket).is_err());
}

/// An edit of the configuration happens as a whole, or not at all.
#[test]
fn a_device_that_is_refused_leaves_the_configuration_as_it_was() {
    for phase in [Phase::Created, Phase::Shutdown] {
        let scratch = Scratch::new();
        let vmm = Vmm::with_api(&scratch, [""; 0]);
        let requests = Requests::new(&scratch.guest(Guest::Halt), scratch.disk("disk", 4096), "Null");
        let mut api = vmm.api();
        api.create(&requests.vm);
        if phase == Phase::Shutdown {
            api.puts(&["vm.boot", "vm.shutdown"]);
        }
        let before = api.info().config;
        let bad_disk = json!({ "path": requests.disk, "image_type": "Raw", "id": "_disk0" });
        let bad_queues = json!({ "path": requests.disk, "image_type": "Raw", "num_queues": 0 });
        let mut refused = vec![
            ("vm.add-disk", bad_disk, 409),
            ("vm.add-disk", bad_queues, 422),
            ("vm.add-disk", json!({ "path": 1 }), 400),
            ("vm.remove-device", json!({ "id": "nobody" }), 404),
            ("vm.remove-device", json!({ "id": "_serial" }), 422),
        ];
        let unbootable =
            |name: &&'static str| (*name, serde_json::from_slice(&requests.body(name)).unwrap(), 501);
        refused.extend(UNBOOTABLE.iter().map(unbootable));
        for (name, body, status) in refused {
            let answer = api.request(Method::Put, name, body.to_string().as_bytes());
            assert_eq!(answer.status, status, "{name} {body} in {phase}: {answer:?}");
            assert_eq!(api.info().config, before, "{name} {body} in {phase}");
        }
        api.puts(&["vm.boot"]);
    }
}
