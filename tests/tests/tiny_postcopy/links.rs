//! Post-copy over TCP, as it is and with TLS: what is said on all of its connections stays within their protection, also when the link was
//! lost.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::{Value, json};
use vmm_tests::certificates::Authority;
use vmm_tests::harness::migrating::{receive_tcp, with_tls};

use super::*;

/// Bytes to the destination on the connection for wanted memory that are more than a handshake and what is said at first, and fewer
/// than these and four pages.
const A_PAGE: usize = 16 << 10;

/// Stands between two ends at a port of its own, counts what goes to the destination on each connection, in the order in which they
/// are opened, and can lose the link.
#[derive(Clone)]
struct Wire(Arc<Mutex<Inner>>);

struct Inner {
    /// The link is cut as soon as so many bytes have gone there on the second connection.
    most: Option<usize>,
    cut: bool,
    /// By connection.
    bytes: Vec<usize>,
    /// Bytes that begin as a frame does.
    plain: bool,
    open: Vec<TcpStream>,
}

impl Wire {
    /// To `port`; gives its own, too.
    fn start(port: u16, most: Option<usize>) -> (Self, u16) {
        let inner = Inner { most, cut: false, bytes: Vec::new(), plain: false, open: Vec::new() };
        let wire = Self(Arc::new(Mutex::new(inner)));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (own, accepting) = (listener.local_addr().unwrap().port(), wire.clone());
        std::thread::spawn(move || {
            while let Ok((source, _)) = listener.accept() {
                accepting.take(&source, port);
            }
        });
        (wire, own)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, source: &TcpStream, port: u16) {
        let mut inner = self.lock();
        let destination = TcpStream::connect(("127.0.0.1", port)).ok().filter(|_| !inner.cut);
        let Some(destination) = destination else { return };
        let number = inner.bytes.len();
        inner.bytes.push(0);
        for (from, to, counted) in [(source, &destination, Some(number)), (&destination, source, None)] {
            inner.open.push(from.try_clone().unwrap());
            let (from, to, wire) = (from.try_clone().unwrap(), to.try_clone().unwrap(), self.clone());
            std::thread::spawn(move || wire.pass(&from, &to, counted));
        }
    }

    fn pass(&self, mut from: &TcpStream, mut to: &TcpStream, counted: Option<usize>) {
        let mut bytes = [0; 4096];
        while let Ok(count @ 1..) = from.read(&mut bytes) {
            if counted.is_some_and(|number| !self.lock().lets(number, &bytes[..count])) {
                break;
            }
            if to.write_all(&bytes[..count]).is_err() {
                break;
            }
        }
        // What is still said the other way is passed on.
        let _ = to.shutdown(Shutdown::Write);
    }

    fn mend(&self) {
        let mut inner = self.lock();
        (inner.most, inner.cut) = (None, false);
    }
}

impl Inner {
    fn lets(&mut self, number: usize, bytes: &[u8]) -> bool {
        // TLS begins with a record of a handshake (RFC 8446 section 5.1).
        self.plain |= self.bytes[number] == 0 && bytes[0] != 0x16;
        self.bytes[number] += bytes.len();
        if self.most.is_some_and(|most| self.bytes.get(1).is_some_and(|bytes| *bytes > most)) {
            self.cut = true;
            self.open.drain(..).for_each(|socket| drop(socket.shutdown(Shutdown::Both)));
        }
        !self.cut
    }
}

/// What `vm.send-migration` is told: memory comes so slowly that the guest has to ask for what it needs.
fn slowly(port: u16, tls: Option<&PathBuf>) -> Value {
    let url = format!("tcp:127.0.0.1:{port}");
    let body = json!({ "destination_url": url, "memory_mode": "Postcopy", "max_bandwidth": 1 << 20 });
    with_tls(body, tls.map(PathBuf::as_path))
}

/// With certificates for both ends, and without.
fn ways(scratch: &Scratch) -> [Option<PathBuf>; 2] {
    [None, Some(Authority::new("ours").folder(scratch.path("tls"), &["127.0.0.1"]))]
}

#[test]
fn a_guest_and_the_memory_that_it_asks_for_go_over_tcp_and_tls() {
    let _turn = turn();
    let scratch = Scratch::new();
    let (mut vmm, mut serial) = counting_guest(&scratch);
    for tls in ways(&scratch) {
        let next = Vmm::with_api(&scratch, [""; 0]);
        let other = SerialFile::new(scratch.path(format!("serial-{}", next.pid())));
        let (mut received, port) = receive_tcp(&next, &other, tls.as_deref());
        let (wire, own) = Wire::start(port, None);
        let mut body = slowly(own, tls.as_ref());
        body["connections"] = json!(3);
        vmm.api().done("vm.send-migration", &body);
        assert_eq!(received.answer().status, 204);
        vmm.expect_exit(0);
        goes_on(&serial, &other);
        let end = progress(&next);
        assert_eq!((&end["status"], &end["owed_bytes"]), (&json!("Completed"), &Value::Null), "{end}");
        let inner = wire.lock();
        // Two more for memory, and one for what the guest asks for, on which some came.
        assert_eq!((inner.bytes.len(), inner.plain), (4, tls.is_none()), "{:?}", inner.bytes);
        assert!(inner.bytes[3] > A_PAGE, "{:?}", inner.bytes);
        drop(inner);
        (vmm, serial) = (next, other);
    }
    vmm.api().puts(&["vm.pause", "vm.resume", "vm.reboot"]);
}

#[test]
fn a_lost_link_is_there_again_over_tcp_and_tls() {
    let _turn = turn();
    let scratch = Scratch::new();
    for tls in ways(&scratch) {
        let scratch = Scratch::new();
        let (mut first, serial) = counting_guest(&scratch);
        let second = Vmm::with_api(&scratch, [""; 0]);
        let other = SerialFile::new(scratch.path("other"));
        let (mut received, port) = receive_tcp(&second, &other, tls.as_deref());
        let (wire, own) = Wire::start(port, Some(A_PAGE));
        let mut sent = pending(&first, "vm.send-migration", &slowly(own, tls.as_ref()));
        assert_eq!(received.answer().status, 204);
        for vmm in [&first, &second] {
            let now = until(vmm, "a lost link", |now| now["status"] == "Severed");
            assert!(now["owed_bytes"].as_u64().unwrap() > 0, "{now}");
        }
        assert!(!sent.is_answered());
        // Who has the destination looked for is told when it is there.
        let mut looks = Pending::send(first.socket(), "vm.cancel", b"");
        wire.mend();
        assert_eq!(looks.answer().status, 204);
        assert_eq!(sent.answer().status, 204);
        first.expect_exit(0);
        goes_on(&serial, &other);
        until(&second, "the end", |now| now["status"] == "Completed");
        let inner = wire.lock();
        assert_eq!((inner.bytes.len(), inner.plain), (4, tls.is_none()), "both anew: {:?}", inner.bytes);
    }
}
