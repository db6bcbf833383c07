//! `vmm ctl` against the real binary with tiny guests: a VM's life, every exit status, tables and JSON.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]
#![expect(unsafe_code, reason = "descriptors are received by a call of C's")]

#[path = "../../../crates/vmm-api/examples/lifecycle.rs"]
#[allow(dead_code, reason = "its main is the example's")]
mod lifecycle;

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};
use vmm::cli::CONTRACT_VERSION;
use vmm::ctl::ROWS;
use vmm::vmm::TABLE;
use vmm_tests::harness::{Scratch, SerialFile, Vmm, binary, vm_arguments, vm_config, wait_until};
use vmm_tests::tiny::Guest;

/// As long as anything may take on a busy machine; only failures wait for it.
const LIMIT: &str = "60";

/// `vmm ctl`, not yet started.
fn ctl(socket: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(binary());
    command.arg("ctl").arg("--api-socket").arg(socket).args(["--timeout", LIMIT]).args(arguments);
    command.env_remove("VMM_API_SOCKET").stdin(Stdio::null());
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// What it printed; it must succeed.
#[track_caller]
fn done(vmm: &Vmm, arguments: &[&str]) -> String {
    let output = ctl(vmm.socket(), arguments).output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{arguments:?}: {output:?}");
    text(&output.stdout)
}

/// What it complained; it must end with `code` and print nothing else.
#[track_caller]
fn fails(output: &Output, code: i32) -> String {
    assert_eq!((output.status.code(), text(&output.stdout).as_str()), (Some(code), ""), "{output:?}");
    text(&output.stderr)
}

#[track_caller]
fn refused(vmm: &Vmm, arguments: &[&str]) -> String {
    fails(&ctl(vmm.socket(), arguments).output().unwrap(), 1)
}

fn parsed(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// Flags of a VM of `guest` with its serial port in a file.
fn flags(scratch: &Scratch, guest: Guest) -> (Vec<String>, SerialFile) {
    let serial = SerialFile::new(scratch.path("serial"));
    (vm_arguments(&scratch.guest(guest), &format!("file={}", serial.path().display())), serial)
}

fn create(vmm: &Vmm, flags: &[String]) {
    let words: Vec<&str> = ["create"].into_iter().chain(flags.iter().map(String::as_str)).collect();
    assert_eq!(done(vmm, &words), "");
}

#[test]
fn every_command_of_the_table_has_a_subcommand() {
    let table: BTreeSet<_> = TABLE.iter().map(|row| (row.name(), row.method().name())).collect();
    let covered: BTreeSet<_> = ROWS.iter().map(|row| (row.name, row.method.name())).collect();
    assert_eq!(covered, table);
}

#[test]
fn a_vm_lives_its_whole_life_by_the_client_alone() {
    let scratch = Scratch::new();
    let mut vmm = Vmm::with_api(&scratch, [""; 0]);
    let ping = format!("v{}, process {}\n", env!("CARGO_PKG_VERSION"), vmm.pid());
    assert_eq!(done(&vmm, &["ping"]), ping);
    assert_eq!(done(&vmm, &["wait", "none"]), "");
    let (flags, serial) = flags(&scratch, Guest::Ticker);
    create(&vmm, &flags);
    let kernel = scratch.path("ticker");
    let expected = format!("state   Created\nvCPUs   1\nmemory  32M\nkernel  {}\n", kernel.display());
    assert_eq!(done(&vmm, &["info"]), expected);

    // A device that is added comes with the boot.
    let disk = scratch.disk("disk", 1 << 20);
    let disk = format!("path={},image_type=raw,id=data", disk.display());
    assert_eq!(done(&vmm, &["add-disk", &disk]), "");
    assert_eq!(done(&vmm, &["boot", "--wait", "running"]), "");
    serial.wait_for("00000003\n");
    let info = done(&vmm, &["info"]);
    let (facts, devices) = info.split_once("\n\n").unwrap();
    assert!(facts.starts_with("state   Running\nboots   1\n"), "{info}");
    let lines: Vec<&str> = devices.lines().collect();
    assert_eq!(lines[0].split_whitespace().collect::<Vec<_>>(), ["DEVICE", "ADDRESS", "PARENT"]);
    let data: Vec<_> =
        lines.iter().find(|line| line.starts_with("data ")).unwrap().split_whitespace().collect();
    assert!(data[1].starts_with("0000:00:") && data[2] == "-", "{info}");

    let counters = done(&vmm, &["counters"]);
    let header: Vec<&str> = counters.lines().next().unwrap().split_whitespace().collect();
    assert_eq!(header, ["DEVICE", "COUNTER", "VALUE"]);
    assert!(
        counters.lines().any(|line| line.starts_with("data ") && line.contains(" read_ops ")),
        "{counters}"
    );
    assert!(done(&vmm, &["metrics"]).ends_with("# EOF\n"));
    assert!(parsed(&done(&vmm, &["boot-trace"]))["traceEvents"].is_array());
    assert_eq!(done(&vmm, &["log-level"]), "warn\n");
    assert_eq!(done(&vmm, &["log-level", "error"]), "");
    assert_eq!(done(&vmm, &["log-level"]), "error\n");

    for (word, state) in
        [("pause", "Paused"), ("resume", "Running"), ("reboot", "Running"), ("shutdown", "Shutdown")]
    {
        assert_eq!(done(&vmm, &[word]), "");
        assert!(done(&vmm, &["info"]).contains(&format!(" {state}\n")), "{word}");
        assert_eq!(done(&vmm, &["wait", state]), "", "the contract's word will do");
    }
    assert_eq!(done(&vmm, &["remove-device", "data"]), "");
    assert!(refused(&vmm, &["remove-device", "data"]).contains("[no_device]"));
    assert_eq!(done(&vmm, &["delete", "--wait", "none"]), "");
    assert_eq!(done(&vmm, &["shutdown-vmm", "--wait", "ended"]), "");
    vmm.expect_exit(0);
}

#[test]
fn replies_in_json_are_the_vmms_own() {
    let scratch = Scratch::new();
    let vmm = Vmm::with_api(&scratch, [""; 0]);
    create(&vmm, &flags(&scratch, Guest::Halt).0);
    let info = vmm.api().get("vm.info").body;
    assert_eq!(done(&vmm, &["info", "--json"]), format!("{info}\n"));
    assert_eq!(done(&vmm, &["call", "vm.info", "--get"]), format!("{info}\n"));
    assert_eq!(done(&vmm, &["boot", "--json"]), "", "no reply is no output");
    // As the contract's program, whose output is read by programs.
    let output = Command::new(binary())
        .arg0("/usr/bin/ch-remote")
        .args(["--api-socket", vmm.socket().to_str().unwrap(), "ping"])
        .output()
        .unwrap();
    assert_eq!(parsed(&text(&output.stdout))["pid"], vmm.pid());
    let output = Command::new(binary()).arg0("ch-remote").arg("--version").output().unwrap();
    assert_eq!(
        text(&output.stdout),
        format!("ch-remote {CONTRACT_VERSION}\n"),
        "by this name, the contract's"
    );
}

#[test]
fn a_vm_comes_of_a_file_or_of_standard_input() {
    let scratch = Scratch::new();
    let vmm = Vmm::with_api(&scratch, [""; 0]);
    let config = vm_config(&scratch.guest(Guest::Halt), &scratch.path("serial"));
    let file = scratch.write("config.json", config.to_string());
    assert_eq!(done(&vmm, &["validate", file.to_str().unwrap()]), "valid\n");
    assert_eq!(done(&vmm, &["create", file.to_str().unwrap()]), "");
    done(&vmm, &["delete"]);
    for arguments in [&["create", "-"][..], &["create"]] {
        let mut child = ctl(vmm.socket(), arguments).stdin(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(config.to_string().as_bytes()).unwrap();
        assert!(child.wait().unwrap().success());
        assert_eq!(parsed(&done(&vmm, &["info", "--json"]))["config"]["memory"]["size"], 32 << 20);
        done(&vmm, &["delete"]);
    }
    // What is wrong with it is said by the VMM, all at once, each with its place.
    let file = scratch
        .write("wrong.json", json!({ "cpus": { "boot_vcpus": 2, "max_vcpus": 1 }, "disk": [] }).to_string());
    let complaint = refused(&vmm, &["create", file.to_str().unwrap()]);
    assert!(complaint.starts_with("error: ") && complaint.contains("\n  disk: unknown field"), "{complaint}");
    let output = ctl(vmm.socket(), &["validate", file.to_str().unwrap()]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stdout).contains("error: disk: unknown field"), "{output:?}");
    let missing = scratch.path("missing");
    let complaint = refused(&vmm, &["create", missing.to_str().unwrap()]);
    assert!(
        complaint.contains("cannot read") && complaint.contains("caused by: No such file"),
        "{complaint}"
    );
}

#[test]
fn a_refusal_is_told_with_its_code_and_what_would_do() {
    let scratch = Scratch::new();
    let vmm = Vmm::with_api(&scratch, [""; 0]);
    assert_eq!(
        refused(&vmm, &["pause"]),
        "error: vm.pause is not possible: there is no VM [no_vm]\n  possible while the VM is Running; it is Empty\n"
    );
    let (mut flags, _serial) = flags(&scratch, Guest::Halt);
    flags[1] = scratch.path("nowhere").display().to_string();
    create(&vmm, &flags);
    let complaint = refused(&vmm, &["boot"]);
    assert!(complaint.lines().next().unwrap().ends_with("[boot_failed]"), "{complaint}");
    assert!(complaint.contains("\n  caused by: ") && complaint.contains("nowhere"), "{complaint}");
    for arguments in [
        &["resize", "--cpus", "2"][..],
        &["resize-disk", "--disk", "d", "--size", "1G"],
        &["resize-zone", "--id", "z", "--size", "1G"],
        &["snapshot", "/nowhere"],
        &["coredump", "file:///nowhere"],
        &["add-net", "tap=t"],
    ] {
        let complaint = refused(&vmm, arguments);
        assert!(complaint.contains("[not_built]") || complaint.contains("[wrong_phase]"), "{complaint}");
    }
    for arguments in [
        &["restore", "/nowhere"][..],
        &["send-migration", "--local", "unix:/nowhere"],
        &["receive-migration", "receiver_url=unix:/nowhere"],
    ] {
        let complaint = refused(&vmm, arguments);
        assert!(
            ["[not_built]", "[wrong_phase]", "[vm_exists]"].iter().any(|code| complaint.contains(code)),
            "{complaint}"
        );
    }
    assert!(refused(&vmm, &["call", "vm.nonsense"]).contains("[unknown_route]"));
}

#[test]
fn a_wrong_command_line_is_told_apart() {
    let scratch = Scratch::new();
    let nowhere = scratch.path("none");
    let says = |arguments: &[&str]| fails(&ctl(&nowhere, arguments).output().unwrap(), 2);
    assert!(says(&["infos"]).contains("a similar subcommand exists: 'info'"));
    assert!(says(&["resize"]).contains("give --cpus, --memory or --balloon"));
    assert!(says(&["resize", "--memory", "1GB"]).contains("512M or 1G"));
    assert!(says(&["add-disk", "patch=/d"]).contains("add-disk patch: unknown key; did you mean \"path\"?"));
    assert!(says(&["create", "--kernel", "k", "--cpus", "boot=0"]).contains("--cpus"));
    assert!(says(&["create", "file", "--kernel", "k"]).contains("contradicts the flags"));
    assert!(says(&["events", "--from", "x"]).contains("the number of an event, or next"));
    assert!(says(&["events", "--from", "next", "--no-follow"]).contains("contradicts"));
    assert!(says(&["events", "--wait", "running"]).contains("until the VMM ends"));
    assert!(says(&["wait", "gone"]).contains("ended"));
    assert!(says(&["info", "--connect-within=-1"]).contains("a number of seconds"));
    let mut command = Command::new(binary());
    let output = command.args(["ctl", "ping"]).env_remove("VMM_API_SOCKET").output().unwrap();
    assert!(fails(&output, 2).contains("VMM_API_SOCKET"));
}

#[test]
fn nobody_at_the_socket_is_told_apart() {
    let scratch = Scratch::new();
    let path = scratch.path("none");
    let complaint = fails(&ctl(&path, &["ping"]).output().unwrap(), 3);
    assert!(complaint.starts_with("error: cannot connect to API socket"), "{complaint}");
    assert!(complaint.contains("caused by: No such file"), "{complaint}");
    // A VMM that goes away in the middle of a call.
    let listener = UnixListener::bind(&path).unwrap();
    let vmm = thread::spawn(move || {
        let (mut peer, _) = listener.accept().unwrap();
        assert!(peer.read(&mut [0; 4096]).unwrap() > 0);
    });
    fails(&ctl(&path, &["boot"]).output().unwrap(), 3);
    vmm.join().unwrap();
}

#[test]
fn a_time_limit_is_told_apart_and_the_socket_may_be_waited_for() {
    let scratch = Scratch::new();
    let path = scratch.path("late");
    let mut child = ctl(&path, &["--connect-within", LIMIT, "ping"]).stdout(Stdio::null()).spawn().unwrap();
    let mut vmm = Vmm::spawn(["--api-socket", &format!("path={}", path.display())]);
    assert!(child.wait().unwrap().success());
    let mut command = Command::new(binary());
    command.args(["ctl", "wait", "running", "--timeout", "0.1"]).env("VMM_API_SOCKET", &path);
    let complaint = fails(&command.output().unwrap(), 4);
    assert_eq!(complaint, "error: the VM is not Running after 0.1 s but Empty\n");
    assert!(vmm.is_running());
    // One that takes the request and does not answer.
    let silent = scratch.path("silent");
    let _listener = UnixListener::bind(&silent).unwrap();
    let mut command = Command::new(binary());
    command.args(["ctl", "ping", "--timeout", "0.1", "--api-socket"]).arg(&silent);
    assert!(fails(&command.output().unwrap(), 4).starts_with("error: cannot exchange vmm.ping"));
}

#[test]
fn a_guest_that_powers_off_is_waited_for() {
    let scratch = Scratch::new();
    let mut vmm = Vmm::with_api(&scratch, [""; 0]);
    create(&vmm, &flags(&scratch, Guest::Echo).0);
    done(&vmm, &["boot"]);
    let _ = vmm.holdings_at_rest();
    let mut waiter = ctl(vmm.socket(), &["wait", "ended"]).spawn().unwrap();
    let connected = || vmm.descriptors().iter().filter(|name| *name == "socket").count() == 2;
    wait_until(Duration::from_secs(60), || connected().then_some(()), || "the waiter to connect".to_owned());
    assert!(waiter.try_wait().unwrap().is_none());
    done(&vmm, &["shutdown-vmm"]);
    assert!(waiter.wait().unwrap().success());
    vmm.expect_exit(0);
}

#[test]
fn events_are_told_a_line_each() {
    let scratch = Scratch::new();
    let mut vmm = Vmm::with_api(&scratch, [""; 0]);
    let mut to_come =
        ctl(vmm.socket(), &["events", "--from", "next", "--json"]).stdout(Stdio::piped()).spawn().unwrap();
    // It watches once its stream is one of the VMM's descriptors; what happens then is all there.
    let mut coming = BufReader::new(to_come.stdout.take().unwrap());
    let mut first = String::new();
    let life = thread::scope(|scope| {
        let reading = scope.spawn(|| coming.read_line(&mut first));
        let flags = flags(&scratch, Guest::Halt);
        while !reading.is_finished() {
            create(&vmm, &flags.0);
            done(&vmm, &["delete"]);
        }
        reading.join().unwrap().unwrap();
        flags
    });
    assert!(parsed(&first)["seq"].as_u64() > Some(1), "{first}");

    create(&vmm, &life.0);
    done(&vmm, &["boot"]);
    life.1.wait_for("halted");
    let table = done(&vmm, &["events", "--no-follow"]);
    assert!(table.lines().next().unwrap().contains("Z vmm/starting version="), "{table}");
    assert!(table.contains(" vm/booted machine=1 duration_us="), "{table}");
    let json = done(&vmm, &["events", "--no-follow", "--json", "--from", "2"]);
    let numbers: Vec<_> = json.lines().map(|line| parsed(line)["seq"].as_u64().unwrap()).collect();
    assert_eq!((numbers[0], numbers.len()), (2, table.lines().count() - 1));
    let complaint = refused(&vmm, &["events", "--from", "1000000"]);
    assert!(complaint.starts_with("error: "), "{complaint}");
    // The stream ends with the VMM, which is no failure.
    done(&vmm, &["shutdown-vmm"]);
    vmm.expect_exit(0);
    let mut rest = String::new();
    coming.read_to_string(&mut rest).unwrap();
    assert!(to_come.wait().unwrap().success());
    assert_eq!(parsed(rest.lines().last().unwrap())["event"], "shutdown");
}

#[test]
fn descriptors_travel_with_the_request() {
    let scratch = Scratch::new();
    let path = scratch.path("vmm");
    let listener = UnixListener::bind(&path).unwrap();
    let (file, other) = (File::open("/dev/null").unwrap(), File::open("/dev/zero").unwrap());
    let vmm = thread::spawn(move || {
        use vmm_sys_util::sock_ctrl_msg::ScmSocket;
        let (peer, _) = listener.accept().unwrap();
        let (mut bytes, mut fds) = ([0u8; 8192], [-1; 8]);
        let mut vector = [libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }];
        // SAFETY: the vector describes `bytes`, which lives and takes any bytes.
        let (count, passed) = unsafe { peer.recv_with_fds(&mut vector, &mut fds) }.unwrap();
        (&peer).write_all(b"HTTP/1.1 204 No Content\r\n\r\n").unwrap();
        let link = |fd: &i32| std::fs::read_link(format!("/proc/self/fd/{fd}")).unwrap();
        let targets: Vec<_> = fds[..passed].iter().map(link).collect();
        (String::from_utf8(bytes[..count].to_vec()).unwrap(), targets)
    });
    // The shell passes them on; the standard library closes what it opened.
    let line = format!(
        "exec \"$0\" ctl --api-socket \"$1\" add-net 'id=n,fd=[7,8]' 7</proc/{0}/fd/{1} 8</proc/{0}/fd/{2}",
        std::process::id(),
        file.as_raw_fd(),
        other.as_raw_fd()
    );
    let output = Command::new("sh").args(["-c", &line]).arg(binary()).arg(&path).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let (request, targets) = vmm.join().unwrap();
    assert_eq!(targets, ["/dev/null", "/dev/zero"].map(std::path::PathBuf::from));
    let body = parsed(request.split_once("\r\n\r\n").unwrap().1);
    assert_eq!((&body["id"], body.get("fds")), (&json!("n"), None), "no number is sent");
    // A number that is no descriptor.
    let silent = scratch.path("silent");
    let _listener = UnixListener::bind(&silent).unwrap();
    let complaint = fails(&ctl(&silent, &["add-net", "fd=[999]"]).output().unwrap(), 1);
    assert!(complaint.starts_with("error: cannot send descriptor 999"), "{complaint}");
}

#[test]
fn a_terminal_sees_the_time_that_a_long_call_takes() {
    let scratch = Scratch::new();
    let path = scratch.path("vmm");
    let listener = UnixListener::bind(&path).unwrap();
    let shown = scratch.path("terminal");
    let line = format!("{} ctl --api-socket {} boot", binary().display(), path.display());
    let mut child = Command::new("script")
        .args(["-qefc", &line])
        .arg(&shown)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let (mut peer, _) = listener.accept().unwrap();
    assert!(peer.read(&mut [0; 4096]).unwrap() > 0);
    let text = || std::fs::read_to_string(&shown).unwrap_or_default();
    wait_until(
        Duration::from_secs(60),
        || text().contains("vm.boot ... 0 s").then_some(()),
        || format!("the line; there is {:?}", text()),
    );
    peer.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").unwrap();
    assert!(child.wait().unwrap().success());
}

#[test]
fn the_librarys_example_is_right() {
    let scratch = Scratch::new();
    let vmm = Vmm::with_api(&scratch, [""; 0]);
    lifecycle::live(vmm.socket(), &scratch.guest(Guest::Halt)).unwrap();
    assert_eq!(vmm.api().get("vm.info").status, 404);
}

#[test]
fn completions_are_complete_and_shells_take_them() {
    for shell in ["bash", "zsh", "fish"] {
        let output = Command::new(binary()).args(["completion", shell]).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let script = text(&output.stdout);
        for word in ROWS.iter().map(|row| row.word).chain(["doctor", "validate", "wait", "call"]) {
            assert!(script.contains(word), "{shell}: {word}");
        }
        assert!(!script.contains("sgx-epc"), "what is refused is not offered");
    }
    // Bash is on every Linux that builds this.
    let line = "source <(\"$0\" completion bash) && COMP_WORDS=(vmm ctl resi) COMP_CWORD=2 && _vmm vmm resi ctl && \
                echo \"${COMPREPLY[@]}\"";
    let output = Command::new("bash").args(["-c", line]).arg(binary()).output().unwrap();
    assert_eq!(text(&output.stdout), "resize resize-disk resize-zone\n", "{output:?}");
}
