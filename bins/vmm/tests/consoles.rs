//! Consoles of the real binary: sockets and ptys, readers that stop, input without a guest, the window's size.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};
use vmm_tests::harness::terminal::{self, Terminal};
use vmm_tests::harness::{Api, Holdings, LIMIT, Scratch, Vmm, vm_config, wait_until};
use vmm_tests::tiny::Guest;

/// A VM of `guest` with these serial and virtio consoles, running.
struct Rig {
    scratch: Scratch,
    vmm: Vmm,
    api: Api,
}

impl Rig {
    fn boot(guest: Guest, consoles: &dyn Fn(&Scratch) -> Value) -> Self {
        let scratch = Scratch::new();
        let vmm = Vmm::with_api(&scratch, [""; 0]);
        Self::boot_on(scratch, vmm, guest, consoles)
    }

    fn boot_on(scratch: Scratch, vmm: Vmm, guest: Guest, consoles: &dyn Fn(&Scratch) -> Value) -> Self {
        let mut api = vmm.api();
        api.create(&config(&scratch, guest, &consoles(&scratch)));
        api.puts(&["vm.boot"]);
        Self { scratch, vmm, api }
    }

    /// The pty or socket of a console, as `vm.info` tells.
    fn place(&mut self, console: &str) -> PathBuf {
        let info = self.api.get("vm.info").json();
        let console = &info["config"][console];
        let place = if console["mode"] == "Pty" { &console["file"] } else { &console["socket"] };
        place.as_str().unwrap_or_else(|| panic!("{info}")).into()
    }

    /// Opens the serial port's outer end.
    fn attach(&mut self) -> Box<dyn Attached> {
        let place = self.place("serial");
        if place.starts_with("/dev/pts") { Box::new(open_pty(&place)) } else { Box::new(connect(&place)) }
    }
}

fn config(scratch: &Scratch, guest: Guest, consoles: &Value) -> Value {
    let mut config = vm_config(&scratch.guest(guest), Path::new("unused"));
    for (console, value) in consoles.as_object().unwrap() {
        config[console] = value.clone();
    }
    config
}

fn serial_socket(scratch: &Scratch) -> Value {
    json!({ "serial": { "mode": "Socket", "socket": scratch.path("serial.sock") } })
}

fn serial_pty(_: &Scratch) -> Value {
    json!({ "serial": { "mode": "Pty" } })
}

/// The outer end of a console.
trait Attached: Read + Write + Send {
    fn another(&self) -> Box<dyn Attached>;
}

impl Attached for File {
    fn another(&self) -> Box<dyn Attached> {
        Box::new(self.try_clone().unwrap())
    }
}

impl Attached for UnixStream {
    fn another(&self) -> Box<dyn Attached> {
        Box::new(self.try_clone().unwrap())
    }
}

fn open_pty(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).open(path).unwrap()
}

fn connect(path: &Path) -> UnixStream {
    let stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream
}

/// Reads until `text` was seen; on a thread, for a terminal may never answer.
fn read_until(from: &dyn Attached, text: &str) -> String {
    let text = text.to_owned();
    let about = format!("waiting for {text:?}");
    read_while(from, &about, move |seen| !String::from_utf8_lossy(seen).contains(&text))
}

fn read_while(from: &dyn Attached, about: &str, goes_on: impl Fn(&[u8]) -> bool + Send + 'static) -> String {
    String::from_utf8_lossy(&read_bytes(from, about, goes_on)).into_owned()
}

fn read_bytes(from: &dyn Attached, about: &str, goes_on: impl Fn(&[u8]) -> bool + Send + 'static) -> Vec<u8> {
    let mut from = from.another();
    let (sender, receiver) = std::sync::mpsc::channel();
    thread::spawn(move || {
        let mut seen = Vec::new();
        let mut piece = [0; 4096];
        while goes_on(&seen) {
            match from.read(&mut piece) {
                Ok(count @ 1..) => seen.extend(&piece[..count]),
                end => return drop(sender.send(Err(format!("{end:?} after {seen:?}")))),
            }
        }
        // Only the caller's own end is left.
        drop(from);
        drop(sender.send(Ok(seen)));
    });
    receiver.recv_timeout(LIMIT).unwrap_or_else(|error| panic!("{about}: {error}")).unwrap()
}

#[test]
fn a_socket_has_one_client_at_a_time_and_the_next_one_when_it_left() {
    let mut rig = Rig::boot(Guest::Echo, &serial_socket);
    let path = rig.place("serial");
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);

    // The guest spoke before anybody was there.
    let mut first = connect(&path);
    read_until(&first, "ready\n");
    first.write_all(b"abc").unwrap();
    assert_eq!(read_until(&first, "abc"), "abc");

    let mut second = connect(&path);
    assert_eq!(second.read(&mut [0; 16]).unwrap(), 0, "the second client is sent away");
    first.write_all(b"def").unwrap();
    assert_eq!(read_until(&first, "def"), "def", "and the first one notices nothing");

    drop(first);
    for round in 0..20 {
        let mut next = connect(&path);
        let text = format!("round {round};");
        next.write_all(text.as_bytes()).unwrap();
        assert_eq!(read_until(&next, ";"), text);
    }
    rig.api.puts(&["vm.delete"]);
    assert!(!path.exists());
}

#[test]
fn a_client_that_has_nothing_more_to_send_still_hears_the_guest() {
    let mut rig = Rig::boot(Guest::Echo, &serial_socket);
    let mut client = connect(&rig.place("serial"));
    read_until(&client, "ready\n");
    client.write_all(b"the last of it").unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    read_until(&client, "the last of it");
    rig.api.puts(&["vm.reboot"]);
    read_until(&client, "ready\n");
    rig.api.puts(&["vmm.shutdown"]);
    let mut rest = Vec::new();
    client.read_to_end(&mut rest).unwrap();
    rig.vmm.expect_exit(0);
}

#[test]
fn what_was_sent_before_a_client_left_arrives_before_what_the_next_one_sends() {
    let mut rig = Rig::boot(Guest::Echo, &serial_socket);
    let path = rig.place("serial");
    let mut client = connect(&path);
    client.write_all(format!("{};", "0123456789".repeat(2000)).as_bytes()).unwrap();
    drop(client);
    let mut client = connect(&path);
    client.write_all(b"q").unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    let end = answer.get(answer.len().saturating_sub(20)..);
    assert!(answer.ends_with("6789;q\n"), "{} bytes, {end:?}", answer.len());
    rig.vmm.expect_exit(0);
}

#[test]
fn info_tells_where_each_console_is() {
    let all = |scratch: &Scratch| {
        let pty = json!({ "mode": "Pty" });
        let socket = json!({ "mode": "Socket", "socket": scratch.path("console.sock") });
        json!({ "serial": pty, "console": socket, "debug_console": pty })
    };
    let mut rig = Rig::boot(Guest::Halt, &all);
    let (serial, debug) = (rig.place("serial"), rig.place("debug_console"));
    assert!(serial.starts_with("/dev/pts") && debug.starts_with("/dev/pts") && serial != debug);
    assert_eq!(rig.place("console"), rig.scratch.path("console.sock"));
}

#[test]
fn ptys_and_sockets_go_from_boot_to_boot() {
    for consoles in [serial_socket, serial_pty] {
        let mut rig = Rig::boot(Guest::Echo, &consoles);
        let mut client = rig.attach();
        read_until(&*client, "ready\n");
        for way in [["vm.reboot"].as_slice(), &["vm.shutdown", "vm.boot"], &["vm.pause", "vm.reboot"]] {
            rig.api.puts(way);
            read_until(&*client, "ready\n");
            client.write_all(b"abc").unwrap();
            read_until(&*client, "abc");
        }
    }
}

#[test]
fn a_socket_s_path_is_taken_only_if_nobody_has_it() {
    let scratch = Scratch::new();
    let vmm = Vmm::with_api(&scratch, [""; 0]);
    let mut api = vmm.api();
    let path = scratch.path("serial.sock");
    let fails = |api: &mut Api, words: &str| {
        let answer = api.put("vm.boot");
        assert_eq!(answer.status, 500, "{answer:?}");
        assert!(answer.body.contains(words), "{answer:?}");
        assert_eq!(api.state(), "Created");
    };
    api.create(&config(&scratch, Guest::Echo, &serial_socket(&scratch)));
    fs::write(&path, "precious").unwrap();
    fails(&mut api, "exists and is not a socket");
    assert_eq!(fs::read(&path).unwrap(), b"precious");
    fs::remove_file(&path).unwrap();

    let other = std::os::unix::net::UnixListener::bind(&path).unwrap();
    fails(&mut api, "is in use by another process");
    drop(other);
    assert!(path.exists(), "as after a crash");
    api.puts(&["vm.boot"]);
    read_until(&connect(&path), "ready\n");
}

/// Bytes of all values but `q`, which ends the guest.
fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let byte = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        if state as u8 == b'q' { b'r' } else { state as u8 }
    };
    std::iter::repeat_with(byte).take(len).collect()
}

/// Bytes that go both ways; the Linux guests' tests send a mebibyte.
const BOTH_WAYS: usize = 64 << 10;

#[test]
fn what_is_sent_over_a_pty_or_socket_comes_back_whole() {
    for consoles in [serial_socket, serial_pty] {
        let mut rig = Rig::boot(Guest::Echo, &consoles);
        let client = rig.attach();
        read_until(&*client, "ready\n");
        let sent = noise(BOTH_WAYS);
        let (mut writer, bytes) = (client.another(), sent.clone());
        let writes = thread::spawn(move || writer.write_all(&bytes).unwrap());
        let back = read_bytes(&*client, "the echo", |seen| seen.len() < BOTH_WAYS);
        writes.join().unwrap();
        assert!(back == sent, "{} bytes came back, and not those that were sent", back.len());
    }
}

/// A reader that stops, or never was there.
#[test]
fn a_guest_goes_on_without_a_reader() {
    let pty_and_nobody: fn(&mut Rig) -> Option<Box<dyn Attached>> = |_| None;
    let attached: fn(&mut Rig) -> Option<Box<dyn Attached>> = |rig| Some(rig.attach());
    type Consoles = fn(&Scratch) -> Value;
    let cases: [(&str, Consoles, _); 4] = [
        ("socket without a client", serial_socket, pty_and_nobody),
        ("socket whose client stopped", serial_socket, attached),
        ("pty without a user", serial_pty, pty_and_nobody),
        ("pty whose user stopped", serial_pty, attached),
    ];
    for (name, serial, client) in cases {
        let consoles = |scratch: &Scratch| {
            let mut consoles = serial(scratch);
            consoles["debug_console"] = json!({ "mode": "File", "file": scratch.path("dots") });
            consoles
        };
        let mut rig = Rig::boot(Guest::Flood, &consoles);
        let client = client(&mut rig);
        let dots = rig.scratch.path("dots");
        let count = || fs::metadata(&dots).map_or(0, |file| file.len());
        let goes_on = |by: u64| {
            let before = count();
            wait_until(LIMIT, || (count() > before + by).then_some(()), || format!("the guest, {name}"));
        };
        goes_on(50);
        let before = rig.vmm.resident_kib();
        for _ in 0..20 {
            goes_on(30);
            assert_eq!(rig.api.state(), "Running", "{name}");
        }
        let grown = rig.vmm.resident_kib().saturating_sub(before);
        assert!(grown < 2 << 10, "{name}: {grown} KiB more");
        // Who reads on finds what the guest said last.
        let client = client.unwrap_or_else(|| rig.attach());
        let now = format!("\n{:06x}", count() >> 4);
        read_until(&*client, &now);
        rig.api.puts(&["vm.delete"]);
    }
}

/// What a process that waits may use of a processor in a second; one that spins uses all that it gets.
const IDLE: Duration = Duration::from_millis(200);

fn assert_idle(vmm: &Vmm, about: &str) {
    let before = vmm.cpu_time();
    thread::sleep(Duration::from_secs(1));
    let used = vmm.cpu_time().saturating_sub(before);
    assert!(used < IDLE, "{about}: {used:?} of processor time in a second");
}

#[test]
fn input_without_a_guest_never_spins() {
    let scratch = Scratch::new();
    let mut vmm = Vmm::with_api(&scratch, [""; 0]);
    let mut api = vmm.api();
    vmm.type_in("typed before there is a VM");
    assert_idle(&vmm, "before vm.create");
    api.create(&config(&scratch, Guest::Halt, &json!({ "serial": { "mode": "Tty" } })));
    vmm.type_in("typed before it boots");
    assert_idle(&vmm, "before vm.boot");
    api.puts(&["vm.boot"]);
    vmm.type_in(&"typed to a guest that reads nothing".repeat(1000));
    assert_idle(&vmm, "a guest that reads nothing");
    api.puts(&["vm.pause"]);
    assert_idle(&vmm, "a paused guest");
    api.puts(&["vm.shutdown"]);
    vmm.type_in("typed after it");
    assert_idle(&vmm, "after vm.shutdown");
    api.puts(&["vm.delete"]);
    vmm.type_in("typed after that");
    assert_idle(&vmm, "after vm.delete");
    api.create(&config(&scratch, Guest::Echo, &json!({ "serial": { "mode": "Tty" } })));
    api.puts(&["vm.boot"]);
    vmm.close_stdin();
    assert_eq!(api.state(), "Running");
    api.puts(&["vm.shutdown"]);
    assert_idle(&vmm, "after the end of standard input");
}

#[test]
fn the_end_of_standard_input_never_spins() {
    let scratch = Scratch::new();
    let mut vmm = Vmm::with_api(&scratch, [""; 0]);
    vmm.close_stdin();
    assert_idle(&vmm, "before vm.create");
    let rig = Rig::boot_on(scratch, vmm, Guest::Halt, &|_| json!({ "serial": { "mode": "Tty" } }));
    assert_idle(&rig.vmm, "with a guest");
}

#[test]
fn a_terminal_that_closes_neither_ends_nor_spins_the_vmm() {
    let scratch = Scratch::new();
    let terminal = Terminal::new();
    let vmm = Vmm::on_terminal(&scratch, &terminal, false, &[]);
    let mut rig = Rig::boot_on(scratch, vmm, Guest::Halt, &|_| json!({ "serial": { "mode": "Tty" } }));
    drop(terminal);
    assert_idle(&rig.vmm, "a closed terminal");
    rig.api.puts(&["vm.reboot"]);
    assert_idle(&rig.vmm, "a closed terminal, after a reboot");
    assert_eq!(rig.api.state(), "Running");
    rig.api.puts(&["vm.delete", "vmm.shutdown"]);
    rig.vmm.expect_exit(0);
}

#[test]
fn ptys_and_sockets_that_nobody_uses_never_spin() {
    for consoles in [serial_socket, serial_pty] {
        let mut rig = Rig::boot(Guest::Halt, &consoles);
        assert_idle(&rig.vmm, "before anybody came");
        let mut client = rig.attach();
        read_until(&*client, "halted\n");
        // More than the port and the descriptor hold.
        let writes = {
            let mut client = client.another();
            thread::spawn(move || drop(client.write_all(&[b'x'; 1 << 20])))
        };
        assert_idle(&rig.vmm, "a guest that reads nothing");
        assert!(!writes.is_finished(), "the VMM keeps what the guest does not take");
        rig.api.puts(&["vm.shutdown"]);
        // Without a guest it is read and lost.
        wait_until(LIMIT, || writes.is_finished().then_some(()), || "input to be lost".to_owned());
        client.write_all(b"typed after it").unwrap();
        assert_idle(&rig.vmm, "after vm.shutdown");
        drop(client);
        assert_idle(&rig.vmm, "after the client left");
        rig.api.puts(&["vm.boot"]);
        read_until(&*rig.attach(), "halted\n");
        rig.api.puts(&["vm.delete"]);
        assert_idle(&rig.vmm, "after vm.delete");
    }
}

/// What it holds once that does not change any more: its threads come up one after the other, and a client's end is noticed later.
fn settled(vmm: &Vmm) -> Holdings {
    let mut before = vmm.holdings();
    wait_until(
        LIMIT,
        || {
            thread::sleep(Duration::from_millis(200));
            let now = vmm.holdings();
            (now == std::mem::replace(&mut before, now.clone())).then_some(now)
        },
        || "a process at rest".to_owned(),
    )
}

#[test]
fn clients_come_and_go_and_leave_nothing() {
    let mut rig = Rig::boot(Guest::Echo, &serial_socket);
    let path = rig.place("serial");
    read_until(&connect(&path), "ready\n");
    let before = settled(&rig.vmm);
    for round in 0..300 {
        let mut client = connect(&path);
        // Some send nothing, some more than is taken.
        drop(client.write_all(&vec![b'x'; (round % 3) * 1000]));
    }
    rig.api.puts(&["vm.reboot"]);
    read_until(&connect(&path), "ready\n");
    rig.vmm.expect_holdings(&before, "after three hundred clients");
}

#[test]
fn a_client_waits_while_no_descriptor_is_left() {
    let mut rig = Rig::boot(Guest::Halt, &serial_socket);
    let path = rig.place("serial");
    let limit = |count: usize| {
        let line = format!("prlimit --pid {} --nofile={count}:4096", rig.vmm.pid());
        assert!(std::process::Command::new("sh").args(["-c", &line]).status().unwrap().success(), "{line}");
    };
    limit(rig.vmm.descriptors().len());
    let client = connect(&path);
    assert_idle(&rig.vmm, "no descriptor is left");
    limit(4096);
    read_until(&client, "halted\n");
    assert_eq!(rig.api.state(), "Running");
}

fn console_on(mode: &str) -> impl Fn(&Scratch) -> Value + use<> {
    let console = json!({ "mode": mode });
    move |_| json!({ "serial": { "mode": "Pty" }, "console": console })
}

#[test]
fn virtio_console_follows_the_size_of_the_terminal() {
    let scratch = Scratch::new();
    let terminal = Terminal::new();
    terminal.resize(100, 40);
    let vmm = Vmm::on_terminal(&scratch, &terminal, true, &[]);
    let mut rig = Rig::boot_on(scratch, vmm, Guest::ConsoleSize, &console_on("Tty"));
    let serial = rig.attach();
    read_until(&*serial, "00280064\n");
    terminal.resize(132, 50);
    read_until(&*serial, "00320084\n");
    // With nobody who could be told.
    rig.api.puts(&["vm.shutdown"]);
    terminal.resize(80, 24);
    rig.api.puts(&["vm.boot"]);
    read_until(&*serial, "00180050\n");
}

#[test]
fn virtio_console_follows_the_size_of_its_pty_once_something_is_typed() {
    let mut rig = Rig::boot(Guest::ConsoleSize, &console_on("Pty"));
    let serial = rig.attach();
    read_until(&*serial, "00190050\n");
    let mut console = open_pty(&rig.place("console"));
    terminal::resize(&console, 90, 30);
    console.write_all(b"x").unwrap();
    read_until(&*serial, "001e005a\n");
}
