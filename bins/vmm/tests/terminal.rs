//! Whatever ends the VMM, the user's terminal is as it was.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus};
use std::time::Duration;

use serde_json::json;
use vmm::console::RawTerminal;
use vmm_tests::harness::terminal::Terminal;
use vmm_tests::harness::{Api, Scratch, Vmm, binary, vm_arguments, vm_config, wait_until};
use vmm_tests::tiny::Guest;

const SOON: Duration = Duration::from_secs(20);

/// Ends a VMM whose guest has the terminal in this way.
fn ended_by(guest: Guest, end: &dyn Fn(&mut Vmm, &mut Terminal)) -> ExitStatus {
    let scratch = Scratch::new();
    let mut terminal = Terminal::new();
    let mut config = vm_config(&scratch.guest(guest), Path::new("unused"));
    config["serial"] = json!({ "mode": "Tty" });
    let mut vmm = Vmm::on_terminal(&scratch, &terminal, true, &[]);
    vmm.api().create(&config);
    vmm.api().puts(&["vm.boot"]);
    assert!(terminal.is_raw());
    end(&mut vmm, &mut terminal);
    let status = vmm.wait();
    assert!(!terminal.is_raw(), "{status}");
    status
}

#[test]
fn a_guest_that_powers_off_gives_it_back() {
    let status = ended_by(Guest::Echo, &|_, terminal| terminal.main.write_all(b"q").unwrap());
    assert_eq!(status.code(), Some(0));
}

#[test]
fn a_client_that_ends_the_vmm_gives_it_back() {
    let status = ended_by(Guest::Halt, &|vmm, _| vmm.api().puts(&["vmm.shutdown"]));
    assert_eq!(status.code(), Some(0));
}

#[test]
fn signals_that_ask_for_the_end_give_it_back() {
    for signal in ["TERM", "INT", "HUP"] {
        let status = ended_by(Guest::Halt, &|vmm, _| vmm.signal(signal));
        assert_eq!(status.code(), Some(0), "{signal}");
    }
}

#[test]
fn a_crash_gives_it_back_and_is_still_a_crash() {
    for (name, signal) in [
        ("ABRT", libc::SIGABRT),
        ("BUS", libc::SIGBUS),
        ("FPE", libc::SIGFPE),
        ("ILL", libc::SIGILL),
        ("QUIT", libc::SIGQUIT),
        ("SEGV", libc::SIGSEGV),
        ("TRAP", libc::SIGTRAP),
    ] {
        let status = ended_by(Guest::Halt, &|vmm, _| vmm.signal(name));
        assert_eq!(status.signal(), Some(signal), "{name}");
    }
}

#[test]
fn a_boot_that_fails_leaves_it() {
    let scratch = Scratch::new();
    let terminal = Terminal::new();
    let mut vmm = Command::new(binary());
    vmm.args(vm_arguments(&scratch.write("kernel", "not a kernel"), "tty"));
    vmm.stdin(terminal.program_side()).stdout(terminal.program_side());
    assert_eq!(vmm.output().unwrap().status.code(), Some(1));
    assert!(!terminal.is_raw());
}

#[test]
fn a_hang_up_that_is_ignored_ends_nothing() {
    let scratch = Scratch::new();
    let socket = scratch.path("api.sock");
    let vmm = Command::new("sh")
        .args(["-c", "trap '' HUP; exec \"$0\" --api-socket \"$1\""])
        .args([binary(), socket.clone()])
        .spawn()
        .unwrap();
    let mut vmm = Killed(vmm);
    let pid = vmm.0.id();
    let signal = |name: &str| {
        let line = format!("kill -{name} {pid}");
        assert!(Command::new("sh").args(["-c", &line]).status().unwrap().success());
    };
    wait_until(SOON, || UnixStream::connect(&socket).ok(), || "the API socket".to_owned());
    signal("HUP");
    for _ in 0..3 {
        assert_eq!(Api::connect(&socket).get("vmm.ping").status, 200);
    }
    signal("TERM");
    assert_eq!(vmm.0.wait().unwrap().code(), Some(0));
}

/// A process that does not outlive the test.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Set for the process that is to fail.
const ROLE: &str = "VMM_TEST_TERMINAL";

/// Runs this very test in another process, on a terminal; there, `fail` is called with the terminal in raw mode.
fn failure_gives_it_back(test: &str, fail: fn()) -> String {
    if std::env::var_os(ROLE).is_some() {
        vmm::run::confine();
        let raw = RawTerminal::enter().unwrap();
        // Nobody cleans up.
        std::mem::forget(raw);
        eprintln!("in raw mode");
        fail();
    }
    let terminal = Terminal::new();
    let mut other = Command::new(std::env::current_exe().unwrap());
    other.args(["--exact", test, "--nocapture"]).env(ROLE, "1").stdin(terminal.program_side());
    let output = other.output().unwrap();
    assert!(!output.status.success());
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(text.contains("in raw mode"), "{text}");
    wait_until(SOON, || (!terminal.is_raw()).then_some(()), || format!("the terminal; {text}"));
    text
}

#[test]
fn a_panic_gives_it_back() {
    let text = failure_gives_it_back("a_panic_gives_it_back", || panic!("on purpose"));
    assert!(text.contains("on purpose"), "{text}");
}

#[test]
fn an_abort_gives_it_back() {
    failure_gives_it_back("an_abort_gives_it_back", || std::process::abort());
}

#[test]
fn a_stack_overflow_gives_it_back_and_is_told() {
    fn deep(depth: u64) -> u64 {
        let room = std::hint::black_box([depth; 512]);
        room.iter().sum::<u64>() + if depth < u64::MAX { deep(depth + 1) } else { 0 }
    }
    let text = failure_gives_it_back("a_stack_overflow_gives_it_back_and_is_told", || {
        std::hint::black_box(deep(0));
    });
    assert!(text.contains("has overflowed its stack"), "{text}");
}
