//! The threads of a running VM.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};
use vmm_api::client::Client;
use vmm_api::command::Method;
use vmm_tests::harness::terminal::Terminal;
use vmm_tests::harness::{Api, LIMIT, Scratch, SerialFile, Vmm, vm_arguments, vm_config, wait_until};
use vmm_tests::tiny::Guest;

use crate::{Case, tracer};

pub(crate) const ALL: &[Case] = &[
    ("each_thread_has_its_filters", each_thread_has_its_filters),
    ("no_thread_has_a_filter_if_none_is_wanted", no_thread_has_a_filter_if_none_is_wanted),
    ("a_forbidden_call_of_any_thread_ends_the_vmm", a_forbidden_call_of_any_thread_ends_the_vmm),
    ("a_forbidden_call_gives_the_terminal_back", a_forbidden_call_gives_the_terminal_back),
    ("other_modes_let_the_vmm_live", other_modes_let_the_vmm_live),
    ("sigsys_that_somebody_sends_is_no_violation", sigsys_that_somebody_sends_is_no_violation),
    ("descriptors_that_clients_pass_are_taken", descriptors_that_clients_pass_are_taken),
    ("the_whole_life_passes_the_filters", the_whole_life_passes_the_filters),
];

/// Every thread of the VM that [`config`] describes, and how many filters it is under: threads inherit the control
/// thread's filter, but for two that are older.
const THREADS: [(&str, u32); 10] = [
    ("vmm", 1),
    ("http-server", 1),
    ("event-monitor", 1),
    ("vcpu0", 2),
    ("_disk0_q0", 2),
    ("_disk1_q0", 2),
    ("_rng", 2),
    ("_console", 2),
    ("serial-out", 2),
    ("console-out", 2),
];
/// getppid(2): no filter allows it.
const FORBIDDEN: i64 = libc::SYS_getppid;

/// A VM with a device of each kind, whose guest drives all of them.
pub(crate) fn config(scratch: &Scratch, serial: &Path) -> Value {
    let mut config = vm_config(&scratch.guest(Guest::Drivers), serial);
    config["console"] = json!({ "mode": "Pty" });
    config["disks"] = json!([
        { "path": scratch.disk("one", 1 << 20), "image_type": "Raw" },
        { "path": scratch.disk("two", 1 << 20), "image_type": "Raw", "disable_io_uring": true },
    ]);
    config
}

/// A VMM whose VM runs, and has driven all its devices.
fn running(scratch: &Scratch, arguments: &[&str]) -> (Vmm, SerialFile) {
    let monitor = format!("path={}", scratch.path("events").display());
    let vmm = Vmm::with_api(scratch, [&["--event-monitor", &monitor], arguments].concat());
    let serial = SerialFile::new(scratch.path("serial"));
    let mut api = vmm.api();
    api.create(&config(scratch, serial.path()));
    api.puts(&["vm.boot"]);
    serial.wait_for("driven\n");
    (vmm, serial)
}

/// Threads by name with their ids and what /proc says of them; not those that KVM and io_uring add, which are the kernel's.
fn threads(vmm: &Vmm) -> BTreeMap<String, (i32, String)> {
    let folder = format!("/proc/{}/task", vmm.pid());
    let thread = |entry: fs::DirEntry| {
        let name = fs::read_to_string(entry.path().join("comm")).ok()?.trim_end().to_owned();
        let status = fs::read_to_string(entry.path().join("status")).ok()?;
        let id = entry.file_name().to_str()?.parse().ok()?;
        let ours = !name.starts_with("kvm-") && !name.starts_with("iou-");
        ours.then_some((name, (id, status)))
    };
    fs::read_dir(folder).unwrap().flatten().filter_map(thread).collect()
}

/// A number of /proc/PID/status.
fn number(status: &str, field: &str) -> u32 {
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("no {field} in {status}")).trim().parse().unwrap()
}

fn assert_threads(vmm: &Vmm, mode: u32) {
    let threads = threads(vmm);
    let mut names: Vec<_> = THREADS.iter().map(|(name, _)| *name).collect();
    names.sort_unstable();
    assert_eq!(threads.keys().map(String::as_str).collect::<Vec<_>>(), names);
    for (name, filters) in THREADS {
        let status = &threads[name].1;
        assert_eq!(number(status, "NoNewPrivs"), 1, "{name}");
        assert_eq!(number(status, "Seccomp"), mode, "{name}");
        // Since Linux 5.9.
        if status.contains("Seccomp_filters") {
            assert_eq!(number(status, "Seccomp_filters"), if mode == 0 { 0 } else { filters }, "{name}");
        }
    }
}

fn each_thread_has_its_filters() {
    for arguments in [&[][..], &["--seccomp", "log"], &["--seccomp", "errno"]] {
        let scratch = Scratch::new();
        let (vmm, _) = running(&scratch, arguments);
        assert_threads(&vmm, 2);
        // Those of the next boot as well.
        vmm.api().puts(&["vm.reboot"]);
        let again = || (threads(&vmm).len() == THREADS.len()).then_some(());
        wait_until(LIMIT, again, || "all threads after a reboot".to_owned());
        assert_threads(&vmm, 2);
    }
}

fn no_thread_has_a_filter_if_none_is_wanted() {
    let scratch = Scratch::new();
    let (vmm, _) = running(&scratch, &["--seccomp", "false"]);
    assert_threads(&vmm, 0);
}

fn a_forbidden_call_of_any_thread_ends_the_vmm() {
    for (name, _) in THREADS {
        let scratch = Scratch::new();
        let (mut vmm, _) = running(&scratch, &[]);
        tracer::force(threads(&vmm)[name].0, FORBIDDEN);
        vmm.expect_exit(12);
        let text = vmm.stderr.text();
        assert!(text.contains(&format!("<{name}> ERROR:")), "{text}");
        assert!(text.contains(&format!("forbidden system call getppid ({FORBIDDEN})")), "{text}");
    }
}

fn a_forbidden_call_gives_the_terminal_back() {
    let scratch = Scratch::new();
    let terminal = Terminal::new();
    let log = scratch.path("log");
    let mut command = Command::new(vmm_tests::harness::binary());
    command.args(vm_arguments(&scratch.guest(Guest::Spin), "tty")).arg("--log-file").arg(&log);
    let stream = || terminal.program_side();
    let mut child = command.stdin(stream()).stdout(stream()).spawn().unwrap();
    wait_until(LIMIT, || terminal.is_raw().then_some(()), || "raw mode".to_owned());
    // Its first thread waits for events, now or soon.
    tracer::force(child.id().try_into().unwrap(), FORBIDDEN);
    assert_eq!(child.wait().unwrap().code(), Some(12));
    assert!(!terminal.is_raw());
    let text = fs::read_to_string(log).unwrap();
    assert!(text.contains("<vmm> ERROR:") && text.contains("getppid"), "{text}");
}

fn other_modes_let_the_vmm_live() {
    for (mode, expected) in [("log", i64::from(std::process::id())), ("errno", -i64::from(libc::EPERM))] {
        let scratch = Scratch::new();
        let (vmm, serial) = running(&scratch, &["--seccomp", mode]);
        for (name, (thread, _)) in threads(&vmm) {
            assert_eq!(tracer::insert(thread, FORBIDDEN), expected, "{mode}: {name}");
        }
        fs::write(serial.path(), "").unwrap();
        vmm.api().puts(&["vm.reboot"]);
        serial.wait_for("driven\n");
    }
}

fn sigsys_that_somebody_sends_is_no_violation() {
    let scratch = Scratch::new();
    let (mut vmm, _) = running(&scratch, &[]);
    vmm.signal("SYS");
    let status = vmm.wait();
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(libc::SIGSYS), "{status}");
    assert_eq!(vmm.stderr.text(), "");
}

fn descriptors_that_clients_pass_are_taken() {
    let scratch = Scratch::new();
    let vmm = Vmm::with_api(&scratch, [""; 0]);
    let file = fs::File::open("/dev/null").unwrap();
    let mut client = Client::connect(vmm.socket()).unwrap();
    for _ in 0..3 {
        // Nobody wants them: they are closed.
        let answer = client.request(Method::Get, "vmm.ping", b"", &[file.as_fd(), file.as_fd()]);
        assert!(answer.is_ok_and(|answer| answer.status < 500));
    }
    assert_eq!(vmm.api().get("vmm.ping").status, 200);
}

/// What the guest says when it has driven its devices.
fn driven(api: &mut Api, serial: &SerialFile, way: &str) {
    api.puts(&[way]);
    serial.wait_for("driven\n");
    assert_eq!(serial.text().matches("disk 00000\n").count(), 2, "{}", serial.text());
    // For the next time.
    fs::write(serial.path(), "").unwrap();
}

/// Two clients of a console that is a socket, one after the other, get what the guest says.
fn talk(api: &mut Api, serial: &SerialFile, socket: &Path) {
    for _ in 0..2 {
        let mut client = UnixStream::connect(socket).unwrap();
        client.set_read_timeout(Some(LIMIT)).unwrap();
        client.write_all(b"typed").unwrap();
        driven(api, serial, "vm.reboot");
        let mut text = [0; 8];
        client.read_exact(&mut text).unwrap();
        assert_eq!(&text, b"console\n");
    }
}

fn the_whole_life_passes_the_filters() {
    let scratch = Scratch::new();
    let mut vmm = Vmm::with_api(&scratch, ["--verify-state"]);
    let serial = SerialFile::new(scratch.path("serial"));
    let mut config = config(&scratch, serial.path());
    config["cpus"] =
        json!({ "boot_vcpus": 2, "max_vcpus": 4, "affinity": [{ "vcpu": 0, "host_cpus": [0] }] });
    config["memory"] = json!({ "size": 0, "zones": [
        { "id": "file", "size": 32 << 20, "file": scratch.folder() },
        { "id": "shared", "size": 2 << 20, "shared": true, "prefault": true },
        { "id": "merged", "size": 2 << 20, "mergeable": true },
    ]});
    config["debug_console"] = json!({ "mode": "File", "file": scratch.path("debug") });
    config["pvpanic"] = json!(true);
    let socket = scratch.path("console");
    let mut api = vmm.api();
    for console in [json!({ "mode": "Pty" }), json!({ "mode": "Socket", "socket": socket })] {
        let is_socket = console["mode"] == "Socket";
        config["console"] = console;
        api.create(&config);
        driven(&mut api, &serial, "vm.boot");
        if is_socket {
            talk(&mut api, &serial, &socket);
        }
        for name in ["vm.counters", "vmm.metrics", "vm.boot-trace", "vmm.openapi", "vmm.log-level"] {
            assert_eq!(api.get(name).status, 200, "{name}");
        }
        api.puts(&["vm.power-button"]);
        api.puts(&["vm.pause", "vm.resume", "vm.pause", "vm.resume"]);
        driven(&mut api, &serial, "vm.reboot");
        api.puts(&["vm.pause"]);
        driven(&mut api, &serial, "vm.reboot");
        api.puts(&["vm.shutdown"]);
        driven(&mut api, &serial, "vm.boot");
        api.puts(&["vm.pause", "vm.delete"]);
        // Faults pass them, too.
        let mut broken = config.clone();
        broken["payload"]["kernel"] = json!(scratch.path("nothing"));
        for (config, is_good) in [(&config, true), (&broken, false)] {
            let answer = api.request(Method::Put, "vm.validate", config.to_string().as_bytes());
            assert!(answer.status < 500 && answer.body.contains("nothing") != is_good, "{answer:?}");
        }
        api.create(&broken);
        assert_eq!(api.put("vm.boot").status, 500);
        api.puts(&["vm.delete"]);
    }
    api.puts(&["vmm.shutdown"]);
    vmm.expect_exit(0);
    assert_eq!(vmm.stderr.text(), "");
}
