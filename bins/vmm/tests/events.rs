//! The event monitor and the event stream of the real binary, with tiny guests.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;
use vmm_api::client::{Client, EventReader};
use vmm_api::events::{LINE_MOST, Received, StreamItem};
use vmm_tests::harness::{Api, LIMIT, Scratch, SerialFile, Vmm, vm_arguments, vm_config, wait_until};
use vmm_tests::tiny::Guest;

/// The names of the monitor's events, each of which must have the contract's form.
fn monitored(text: &str) -> Vec<String> {
    let mut before = 0;
    let name = |line: &str| {
        assert!(line.len() + 1 < LINE_MOST, "{line}");
        let event: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error} in {line:?}"));
        let keys: Vec<&String> = event.as_object().unwrap().keys().collect();
        assert_eq!(keys, ["event", "properties", "source", "timestamp"], "{line}");
        let time = &event["timestamp"];
        let time = time["secs"].as_u64().unwrap() * 1_000_000_000 + time["nanos"].as_u64().unwrap();
        assert!(time >= before, "{text}");
        before = time;
        format!("{}/{}", event["source"].as_str().unwrap(), event["event"].as_str().unwrap())
    };
    assert!(text.is_empty() || text.ends_with('\n'), "{text:?}");
    text.lines().map(name).collect()
}

fn monitor_flag(path: &Path) -> [String; 2] {
    ["--event-monitor".to_owned(), format!("path={}", path.display())]
}

/// A VMM with an API and an event monitor at `path`, and a VM of `guest`, not booted.
fn created(scratch: &Scratch, path: &Path, guest: Guest) -> (Vmm, SerialFile) {
    let vmm = Vmm::with_api(scratch, monitor_flag(path));
    let serial = SerialFile::new(scratch.path("serial"));
    vmm.api().create(&vm_config(&scratch.guest(guest), serial.path()));
    (vmm, serial)
}

fn events(vmm: &Vmm, from: u64) -> EventReader {
    let mut client = Client::connect(vmm.socket()).unwrap();
    client.set_timeout(Some(LIMIT)).unwrap();
    client.events(from).unwrap()
}

fn event(item: Option<Result<StreamItem, vmm_api::client::ClientError>>) -> Received {
    match item {
        Some(Ok(StreamItem::Event(event))) => event,
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_monitors_file_tells_a_whole_life_in_order() {
    let scratch = Scratch::new();
    let path = scratch.write("events", "of an earlier run, and longer than what follows\n".repeat(100));
    fs::remove_file(&path).unwrap();
    let (mut vmm, serial) = created(&scratch, &path, Guest::Ticker);
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(vmm.threads().iter().filter(|name| *name == "event-monitor").count(), 1);
    let mut api = vmm.api();
    api.puts(&["vm.boot"]);
    serial.wait_for("00000001\n");
    api.puts(&["vm.pause", "vm.resume", "vm.reboot", "vm.shutdown", "vm.boot", "vm.delete", "vmm.shutdown"]);
    vmm.expect_exit(0);
    let expected = "\
        vmm/starting vm/booting vm/booted vm/pausing vm/paused vm/resuming vm/resumed \
        vm/rebooting vm/booting vm/booted vm/rebooted vm/shutdown vm/booting vm/booted vm/shutdown vm/deleted \
        vmm/shutdown";
    assert_eq!(monitored(&fs::read_to_string(&path).unwrap()).join(" "), expected);
    assert_eq!(vmm.stderr.text(), "");
}

#[test]
fn a_file_that_is_there_is_emptied_and_a_guest_that_powers_off_is_told() {
    let scratch = Scratch::new();
    let path = scratch.write("events", "of an earlier run\n".repeat(100));
    let mut arguments = vm_arguments(&scratch.guest(Guest::Hello), "tty");
    arguments.extend(monitor_flag(&path));
    Vmm::spawn(arguments).expect_exit(0);
    let expected = "vmm/starting vm/booting vm/booted vm/shutdown vm/deleted vmm/shutdown";
    assert_eq!(monitored(&fs::read_to_string(&path).unwrap()).join(" "), expected);
}

fn fifo(scratch: &Scratch) -> PathBuf {
    let path = scratch.path("fifo");
    assert!(Command::new("mkfifo").arg(&path).status().unwrap().success());
    path
}

#[test]
fn a_fifo_needs_no_reader_and_keeps_events_for_the_next() {
    let scratch = Scratch::new();
    let path = fifo(&scratch);
    let (mut vmm, _) = created(&scratch, &path, Guest::Halt);
    let mut api = vmm.api();
    api.puts(&["vm.boot"]);
    let mut first = BufReader::new(File::open(&path).unwrap()).lines();
    let mut names = || monitored(&(first.next().unwrap().unwrap() + "\n")).remove(0);
    assert_eq!([names(), names(), names()], ["vmm/starting", "vm/booting", "vm/booted"]);
    drop(first);
    api.puts(&["vm.pause"]);
    let mut second = File::open(&path).unwrap();
    api.puts(&["vm.shutdown", "vmm.shutdown"]);
    vmm.expect_exit(0);
    let mut text = String::new();
    second.read_to_string(&mut text).unwrap();
    assert_eq!(monitored(&text).join(" "), "vm/pausing vm/paused vm/shutdown vm/deleted vmm/shutdown");
}

#[test]
fn a_monitors_reader_that_stops_loses_events_and_holds_nobody() {
    let scratch = Scratch::new();
    let path = fifo(&scratch);
    let (mut vmm, serial) = created(&scratch, &path, Guest::Ticker);
    let mut reader = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&path).unwrap();
    let mut api = vmm.api();
    api.puts(&["vm.boot"]);
    serial.wait_for("00000001\n");
    // Far more events than pipe and journal hold.
    for _ in 0..1500 {
        api.puts(&["vm.pause", "vm.resume"]);
    }
    serial.wait_longer_than(serial.text().len());
    // What the pipe held, whole; then what the journal still has.
    let mut bytes = vec![0; 1 << 20];
    let count = reader.read(&mut bytes).unwrap();
    let held = monitored(std::str::from_utf8(&bytes[..count]).unwrap());
    assert_eq!(held[..3], ["vmm/starting", "vm/booting", "vm/booted"]);
    let told =
        || vmm.stderr.text().contains("the event monitor has a slow reader, events are lost").then_some(());
    wait_until(LIMIT, told, || "the log to tell of the loss".to_owned());
    api.puts(&["vmm.shutdown"]);
    let mut text = String::new();
    let last = || {
        let count = reader.read(&mut bytes).unwrap_or_default();
        text.push_str(std::str::from_utf8(&bytes[..count]).unwrap());
        text.contains("\"vmm\",\"event\":\"shutdown\"").then_some(())
    };
    wait_until(LIMIT, last, || "the last event".to_owned());
    let names = monitored(&text);
    assert!(names.len() > 3000 && held.len() + names.len() < 6000, "{} and {}", held.len(), names.len());
    vmm.expect_exit(0);
    assert_eq!(vmm.stderr.text().matches("event monitor").count(), 1, "{}", vmm.stderr.text());
}

/// A guest that resets for ever is told of in bounded space, and nothing is left out in silence.
#[test]
fn a_guest_that_resets_in_a_loop_does_not_fill_the_monitors_file() {
    let scratch = Scratch::new();
    let path = scratch.path("events");
    let (mut vmm, _) = created(&scratch, &path, Guest::Reset);
    let mut api = vmm.api();
    api.puts(&["vm.boot"]);
    let boots = |api: &mut Api| api.get("vm.info").json()["boots"].as_u64().unwrap();
    wait_until(LIMIT, || (boots(&mut api) >= 150).then_some(()), || "a guest that resets".to_owned());
    api.puts(&["vm.shutdown"]);
    let boots = boots(&mut api);
    api.puts(&["vmm.shutdown"]);
    vmm.expect_exit(0);
    let text = fs::read_to_string(&path).unwrap();
    let names = monitored(&text);
    let repeats = ["vm/booting", "vm/booted", "vm/rebooting", "vm/rebooted"];
    let told = names.iter().filter(|name| repeats.contains(&name.as_str())).count() as u64;
    let counts = text.lines().filter_map(|line| {
        let event: Value = serde_json::from_str(line).unwrap();
        event["properties"]["events"].as_str().map(|count| count.parse::<u64>().unwrap())
    });
    let left_out: u64 = counts.sum();
    assert!(left_out > 0, "{boots} boots");
    assert_eq!(told + left_out, 4 * boots - 2, "{names:?}");
    assert_eq!(names[names.len() - 3..], ["vm/shutdown", "vm/deleted", "vmm/shutdown"]);
}

#[test]
fn a_monitors_reader_that_never_reads_does_not_hold_the_end() {
    let scratch = Scratch::new();
    let path = fifo(&scratch);
    let (mut vmm, _) = created(&scratch, &path, Guest::Halt);
    let mut api = vmm.api();
    api.puts(&["vm.boot"]);
    for _ in 0..300 {
        api.puts(&["vm.pause", "vm.resume"]);
    }
    api.puts(&["vmm.shutdown"]);
    vmm.expect_exit(0);
    assert_eq!(vmm.stderr.text(), "", "the thread was not stuck");
}

#[test]
fn a_monitor_that_cannot_be_written_is_told_once_and_holds_nobody() {
    let scratch = Scratch::new();
    let (mut vmm, serial) = created(&scratch, Path::new("/dev/full"), Guest::Halt);
    let mut api = vmm.api();
    api.puts(&["vm.boot"]);
    serial.wait_for("halted");
    api.puts(&["vm.pause", "vm.resume", "vmm.shutdown"]);
    vmm.expect_exit(0);
    assert_eq!(vmm.stderr.text().matches("the event monitor cannot be written").count(), 1);
}

#[test]
fn a_monitor_that_cannot_be_opened_ends_the_start() {
    let scratch = Scratch::new();
    let folder = scratch.folder().display().to_string();
    for (value, why) in [
        (format!("path={folder}"), format!("cannot open the event monitor {folder}")),
        (format!("path={folder}/none/events"), format!("cannot open the event monitor {folder}/none/events")),
        ("fd=3000".to_owned(), "cannot take descriptor 3000 as the event monitor".to_owned()),
    ] {
        let mut vmm = Vmm::spawn(["--api-socket", &format!("{folder}/api"), "--event-monitor", &value]);
        vmm.expect_exit(1);
        assert!(vmm.stderr.text().contains(&why), "{value}: {}", vmm.stderr.text());
    }
}

#[test]
fn only_descriptors_that_were_passed_for_writing_are_taken() {
    let scratch = Scratch::new();
    let refused = |fd: u32, redirection: &str, why: &str| {
        let output = Command::new("sh")
            .args([
                "-c",
                &format!("{redirection} exec \"$0\" \"$@\""),
                env!("CARGO_BIN_EXE_vmm"),
                "--api-socket",
            ])
            .arg(scratch.path("api"))
            .args(["--event-monitor", &format!("fd={fd}")])
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(1) && text.contains(why), "{fd}: {output:?}");
    };
    refused(7, "exec 7</dev/null;", "it is not open for writing");
    // What this test was started with is closed; among the numbers are those of what the VMM itself has open by then.
    let close: String = (3..10).map(|fd| format!("exec {fd}>&-;")).collect();
    for fd in 3..10 {
        refused(fd, &close, "no such descriptor was passed to this process");
    }
}

/// Runs the guest with descriptor 7 as the event monitor; `redirection` makes that descriptor of standard output or `$OUT`.
fn with_inherited(scratch: &Scratch, redirection: &str, out: &Path) -> String {
    let output = Command::new("sh")
        .args(["-c", &format!("exec \"$0\" \"$@\" {redirection}"), env!("CARGO_BIN_EXE_vmm")])
        .args(vm_arguments(&scratch.guest(Guest::Hello), "off"))
        .args(["--event-monitor", "fd=7"])
        .env("OUT", out)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn an_inherited_descriptor_is_the_monitor() {
    let expected = "vmm/starting vm/booting vm/booted vm/shutdown vm/deleted vmm/shutdown";
    let scratch = Scratch::new();
    let file = scratch.path("events");
    assert_eq!(monitored(&with_inherited(&scratch, "7>&1", &file)).join(" "), expected, "a pipe");
    with_inherited(&scratch, "7>\"$OUT\"", &file);
    assert_eq!(monitored(&fs::read_to_string(&file).unwrap()).join(" "), expected, "a file");
}

/// All that the stream tells of a guest's life, up to the end of the VMM.
fn life_of(guest: Guest) -> Vec<Received> {
    let scratch = Scratch::new();
    let mut vmm = Vmm::with_api(&scratch, [""; 0]);
    let reader = events(&vmm, 1);
    let serial = SerialFile::new(scratch.path("serial"));
    vmm.api().create(&vm_config(&scratch.guest(guest), serial.path()));
    vmm.api().puts(&["vm.boot"]);
    let all: Vec<Received> = reader.map(|item| event(Some(item))).collect();
    vmm.wait();
    let numbers: Vec<u64> = all.iter().map(|event| event.seq).collect();
    assert_eq!(numbers, (1..=numbers.len() as u64).collect::<Vec<_>>());
    all
}

fn names(events: &[Received]) -> String {
    events.iter().map(Received::name).collect::<Vec<_>>().join(" ")
}

const BOOT: &str = "vmm/starting vmm/started vm/created vm/booting \
    vm/boot-stage vm/boot-stage vm/boot-stage vm/boot-stage vm/boot-stage vm/boot-stage vm/booted";

fn exit_of(events: &[Received]) -> &serde_json::Map<String, Value> {
    &events.iter().find(|event| event.name() == "guest/exit").unwrap().properties
}

#[test]
fn the_stream_tells_how_guests_end_for_good() {
    for guest in [Guest::Hello, Guest::Crash] {
        let life = life_of(guest);
        let end = "guest/exit vm/shutdown vm/deleted vmm/shutdown";
        assert_eq!(names(&life), format!("{BOOT} {end}"), "{guest:?}");
        let exit = exit_of(&life);
        if guest == Guest::Hello {
            assert_eq!(Value::from(exit.clone()).to_string(), r#"{"cause":"shutdown","via":"acpi-sleep"}"#);
        } else {
            assert_eq!((&exit["cause"], &exit["vcpu"]), (&"crash".into(), &0.into()), "{exit:?}");
            assert!(exit["reason"].is_string(), "{exit:?}");
        }
    }
}

#[test]
fn the_stream_tells_why_guests_start_again() {
    for (guest, expected) in [
        (Guest::Reset, r#"{"cause":"reset","via":"acpi-reset"}"#),
        (Guest::I8042Reset, r#"{"cause":"reset","via":"i8042"}"#),
        (Guest::TripleFault, r#"{"cause":"triple-fault","vcpu":0}"#),
    ] {
        let scratch = Scratch::new();
        let vmm = Vmm::with_api(&scratch, [""; 0]);
        let serial = SerialFile::new(scratch.path("serial"));
        vmm.api().create(&vm_config(&scratch.guest(guest), serial.path()));
        vmm.api().puts(&["vm.boot"]);
        let boots = BOOT.split(' ').count();
        let mut reader = events(&vmm, boots as u64 + 1);
        let again: Vec<Received> = reader.by_ref().take(boots).map(|item| event(Some(item))).collect();
        let boot = BOOT.split_once("vm/created ").unwrap().1;
        assert_eq!(names(&again), format!("guest/exit vm/rebooting {boot} vm/rebooted"), "{guest:?}");
        assert_eq!(Value::from(exit_of(&again).clone()).to_string(), expected);
        assert_eq!(again[1].properties["cause"], "guest");
        assert_eq!((again[0].machine, again[2].machine), (Some(1), Some(2)));
    }
}

#[test]
fn a_streams_reader_that_stops_holds_neither_guest_nor_api_and_is_told_what_it_lost() {
    let scratch = Scratch::new();
    let mut vmm = Vmm::with_api(&scratch, [""; 0]);
    let serial = SerialFile::new(scratch.path("serial"));
    vmm.api().create(&vm_config(&scratch.guest(Guest::Ticker), serial.path()));
    let (stalled, for_ever) = (events(&vmm, 1), events(&vmm, 1));
    let mut api = vmm.api();
    api.puts(&["vm.boot"]);
    for _ in 0..3000 {
        api.puts(&["vm.pause", "vm.resume"]);
    }
    serial.wait_longer_than(serial.text().len());
    assert_eq!(api.state(), "Running");
    let (mut next, mut lost) = (1, 0);
    for item in stalled {
        match item.unwrap() {
            StreamItem::Lost { count, next: after } => {
                (lost, next) = (lost + count, next + count);
                assert_eq!(after, next);
            }
            StreamItem::Event(event) => {
                assert_eq!(event.seq, next);
                next += 1;
            }
        }
        if next > 12_000 {
            break;
        }
    }
    assert!(lost > 0);
    api.puts(&["vmm.shutdown"]);
    vmm.expect_exit(0);
    drop(for_ever);
}

#[test]
fn a_boot_that_fails_is_told_without_paths() {
    let scratch = Scratch::new();
    let vmm = Vmm::with_api(&scratch, [""; 0]);
    let serial = SerialFile::new(scratch.path("serial"));
    vmm.api().create(&vm_config(&scratch.path("no-such-kernel"), serial.path()));
    assert_eq!(vmm.api().put("vm.boot").status, 500);
    let all: Vec<Received> = Client::connect(vmm.socket())
        .and_then(|client| client.events_so_far(1))
        .unwrap()
        .map(|item| event(Some(item)))
        .collect();
    let last = all.last().unwrap();
    assert_eq!((last.name().as_str(), &last.properties["stage"]), ("vm/boot-failed", &"kernel".into()));
    assert!(!format!("{all:?}").contains("no-such-kernel"));
}
