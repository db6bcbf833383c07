//! Whatever a guest prints and nobody reads, memory stays what it is.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]

use std::fs::OpenOptions;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vmm::console::Consoles;
use vmm_api::config::UnknownFields;
use vmm_api::spec::{MachineSpec, parse_and_check};
use vmm_platform_devices::output::ByteSink;
use vmm_tests::harness::resident_kib;
use vmm_virtio_devices::console::ConsoleDevice;
use vmm_virtio_devices::testing::{Segment, TestDriver};

const TRANSMIT: u16 = 1;
/// Far above the rings, the kernel's buffers are not counted.
const GROWTH_KIB: u64 = 8 << 10;
/// As long as anything here may take on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);

fn spec(serial: &Value) -> MachineSpec {
    let document = json!({
        "payload": { "kernel": "unused" },
        "serial": serial,
        "console": { "mode": "Off" },
    });
    parse_and_check(document.to_string().as_bytes(), UnknownFields::Refuse).unwrap().spec
}

/// Runs `flood` on the serial port's sink, for every kind of reader that does not read.
fn without_readers(flood: fn(Arc<dyn ByteSink>)) {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("socket");
    let at_socket = json!({ "mode": "Socket", "socket": socket });
    for (name, serial, attach) in [
        ("null", json!({ "mode": "Null" }), false),
        ("pty without a user", json!({ "mode": "Pty" }), false),
        ("pty whose user stopped", json!({ "mode": "Pty" }), true),
        ("socket without a client", at_socket.clone(), false),
        ("socket whose client stopped", at_socket, true),
    ] {
        let mut consoles = Consoles::open(&spec(&serial)).unwrap();
        let console = consoles.serial.as_mut().unwrap();
        let _user = attach.then(|| match console.pty_path() {
            Some(pty) => Box::new(OpenOptions::new().read(true).open(pty).unwrap()) as Box<dyn Read>,
            None => Box::new(admit(console, &socket)),
        });
        let before = resident_kib("self");
        // On a thread, for it might wait for a reader.
        let (sink, (done, ended)) = (console.end().sink(), channel());
        thread::spawn(move || {
            flood(sink);
            done.send(())
        });
        ended.recv_timeout(LIMIT).unwrap_or_else(|error| panic!("{name}: {error}"));
        let grown = resident_kib("self").saturating_sub(before);
        assert!(grown < GROWTH_KIB, "{name}: {grown} KiB more");
    }
}

/// Connects, and lets the client in as the control thread does.
fn admit(console: &mut vmm::console::Console, path: &Path) -> UnixStream {
    let client = UnixStream::connect(path).unwrap();
    let Some(vmm::console::InputSource::Clients { listener, link }) = console.take_input() else {
        panic!("a socket has clients");
    };
    assert!(link.admit(listener.accept().unwrap().0).unwrap().is_some());
    client
}

#[test]
fn a_gibibyte_that_nobody_reads_does_not_grow_memory() {
    without_readers(|sink| {
        let piece = [b'x'; 4096];
        for _ in 0..1 << 18 {
            sink.put(&piece);
        }
    });
    // As a serial port prints.
    without_readers(|sink| (0..1 << 20).for_each(|_| sink.put(b"x")));
}

#[test]
fn a_driver_of_virtio_console_never_waits_for_a_reader() {
    struct Out(Arc<dyn ByteSink>);
    impl Write for Out {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.put(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    without_readers(|sink| {
        let device = ConsoleDevice::new("_console", Box::new(Out(sink)), (80, 25)).unwrap();
        let mut driver = TestDriver::new(Box::new(device), 4 << 20).unwrap();
        driver.start(!0).unwrap();
        let at = driver.allocate(1 << 16, 16).unwrap();
        for _ in 0..1000 {
            assert_eq!(driver.request(TRANSMIT, &[Segment::readable(at, 1 << 16)]).unwrap(), 0);
        }
    });
}

#[test]
fn a_late_client_gets_the_newest_that_was_kept() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let mut consoles = Consoles::open(&spec(&json!({ "mode": "Socket", "socket": path }))).unwrap();
    let console = consoles.serial.as_mut().unwrap();
    let sink = console.end().sink();
    let lines: Vec<u8> = (0..100_000).flat_map(|n| format!("{n:08x}\n").into_bytes()).collect();
    lines.chunks(100).for_each(|piece| sink.put(piece));
    let mut client = admit(console, &path);
    client.set_read_timeout(Some(LIMIT)).unwrap();
    let mut kept = vec![0; 256 << 10];
    client.read_exact(&mut kept).unwrap();
    assert!(kept == lines[lines.len() - kept.len()..], "the newest, in order");
    sink.put(b"news");
    client.read_exact(&mut kept[..4]).unwrap();
    assert_eq!(kept[..4], *b"news");

    // Nobody who would take it: the end is not delayed.
    drop(client);
    sink.put(b"the last words");
    let start = Instant::now();
    drop(consoles);
    assert!(start.elapsed() < LIMIT);
    assert!(!path.exists());
}
