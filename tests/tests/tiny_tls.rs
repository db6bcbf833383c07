//! Migrations of tiny guests over mutual TLS, and what stands against them; compressed ones. They run on any KVM.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]

use std::fs;
use std::io::Read;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};

use serde_json::{Value, json};
use vmm_state::Phase;
use vmm_tests::certificates::{Authority, Good, write};
use vmm_tests::harness::counting::{counting_guest, goes_on};
use vmm_tests::harness::migrating::{receive_tcp, turn, with_tls};
use vmm_tests::harness::{LIMIT, Pending, Scratch, SerialFile, Vmm, refused, wait_until};

fn to(host: &str, port: u16, tls_dir: Option<&Path>) -> Value {
    with_tls(json!({ "destination_url": format!("tcp:{host}:{port}") }), tls_dir)
}

#[test]
fn a_guest_goes_over_tls_and_comes_back() {
    let _turn = turn();
    let scratch = Scratch::new();
    let tls = Authority::new("ours").folder(scratch.path("tls"), &["127.0.0.1", "localhost"]);
    let (mut first, serial) = counting_guest(&scratch);
    let mut second = Vmm::with_api(&scratch, [""; 0]);
    let other = SerialFile::new(scratch.path("other"));
    let (mut received, port) = receive_tcp(&second, &other, Some(&tls));
    first.api().done("vm.send-migration", &to("127.0.0.1", port, Some(&tls)));
    assert_eq!(received.answer().status, 204);
    first.expect_exit(0);
    goes_on(&serial, &other);

    // Back, to a host that has a name.
    let third = Vmm::with_api(&scratch, [""; 0]);
    let last = SerialFile::new(scratch.path("last"));
    let (mut received, port) = receive_tcp(&third, &last, Some(&tls));
    second.api().done("vm.send-migration", &to("localhost", port, Some(&tls)));
    assert_eq!(received.answer().status, 204);
    second.expect_exit(0);
    goes_on(&other, &last);
}

/// What is wrong at one end or both, and what both say of it.
struct Wrong {
    about: &'static str,
    source: Option<PathBuf>,
    receiver: Option<PathBuf>,
    /// In the answer to the source's client.
    said: &'static str,
    /// In the receiver's log.
    logged: &'static str,
}

fn everything_that_is_wrong(scratch: &Scratch) -> Vec<Wrong> {
    let (ours, theirs) = (Authority::new("ours"), Authority::new("theirs"));
    let here = &["127.0.0.1"];
    let folder = |name: &str| ours.folder(scratch.path(name), here);
    let good = folder("good");
    let case = |about, source: &Path, receiver: &Path, said, logged| {
        let (source, receiver) = (Some(source.to_owned()), Some(receiver.to_owned()));
        Wrong { about, source, receiver, said, logged }
    };
    let strange_server = folder("strange-server");
    write(&strange_server, "server", &theirs.issue(here, Good::Still));
    let strange_client = folder("strange-client");
    write(&strange_client, "client", &theirs.issue(here, Good::Still));
    let old_server = folder("old-server");
    write(&old_server, "server", &ours.issue(here, Good::Expired));
    let old_client = folder("old-client");
    write(&old_client, "client", &ours.issue(here, Good::Expired));
    let other_host = ours.folder(scratch.path("other-host"), &["127.0.0.2", "host.example"]);
    let no_key = folder("no-key");
    fs::remove_file(no_key.join("client-key.pem")).unwrap();
    let other_key = folder("other-key");
    fs::copy(good.join("server-key.pem"), other_key.join("client-key.pem")).unwrap();
    let no_pem = folder("no-pem");
    fs::write(no_pem.join("ca-cert.pem"), "nothing").unwrap();
    vec![
        case("its issuer", &good, &strange_server, "certificate is refused: UnknownIssuer", "UnknownCA"),
        case("the source's issuer", &strange_client, &good, "it does not know its issuer", "UnknownIssuer"),
        case("its time", &good, &old_server, "certificate expired", "CertificateExpired"),
        case("the source's time", &old_client, &good, "it is expired there", "certificate expired"),
        case("its name", &good, &other_host, "not valid for name", "the other end refuses this one"),
        Wrong {
            receiver: None,
            ..case("a plain receiver", &good, &good, "does it speak TLS?", "the other end speaks TLS")
        },
        Wrong {
            source: None,
            ..case("a plain source", &good, &good, "the other end speaks TLS", "does not speak TLS")
        },
        case("no key", &no_key, &good, "no-key/client-key.pem", ""),
        case("another's key", &other_key, &good, "client-cert.pem", ""),
        case("no issuers", &no_pem, &good, "no certificate to be read", ""),
        case("no folder", &scratch.path("nothing"), &good, "nothing/client-cert.pem", ""),
    ]
}

#[test]
fn what_either_end_does_not_accept_is_told_at_both_and_changes_nothing() {
    let _turn = turn();
    let scratch = Scratch::new();
    let (mut first, serial) = counting_guest(&scratch);
    let second = Vmm::with_api(&scratch, [""; 0]);
    let other = SerialFile::new(scratch.path("other"));
    for Wrong { about, source, receiver, said, logged } in everything_that_is_wrong(&scratch) {
        let (mut received, port) = receive_tcp(&second, &other, receiver.as_deref());
        let before = second.stderr.text().len();
        let body = to("127.0.0.1", port, source.as_deref());
        let answer = first.api().put_json("vm.send-migration", &body);
        assert_eq!(answer.status, 500, "{about}: {answer:?}");
        assert!(answer.body.contains(said), "{about}: {answer:?} does not say {said:?}");
        assert_eq!(first.api().phase(), Phase::Running, "{about}");
        let log = || second.stderr.text().get(before..).is_some_and(|log| log.contains(logged)).then_some(());
        wait_until(LIMIT, log, || format!("{about}: {logged:?} in {}", second.stderr.text()));
        // Nobody was let in, and so the receiver still waits.
        assert!(!received.is_answered(), "{about}");
        second.api().puts(&["vm.cancel"]);
        refused(&received.answer(), 409, "cancelled");
        assert_eq!(second.api().phase(), Phase::Empty, "{about}");
        serial.wait_longer_than(serial.text().len() + 20);
    }
    let tls = scratch.path("good");
    let (mut received, port) = receive_tcp(&second, &other, Some(&tls));
    first.api().done("vm.send-migration", &to("127.0.0.1", port, Some(&tls)));
    assert_eq!(received.answer().status, 204);
    first.expect_exit(0);
    goes_on(&serial, &other);
}

#[test]
fn a_receiver_without_its_files_says_which_and_tls_is_for_tcp() {
    let scratch = Scratch::new();
    let tls = Authority::new("ours").folder(scratch.path("tls"), &["127.0.0.1"]);
    fs::remove_file(tls.join("server-cert.pem")).unwrap();
    let vmm = Vmm::with_api(&scratch, [""; 0]);
    let serial = SerialFile::new(scratch.path("serial"));
    let (mut received, _) = receive_tcp(&vmm, &serial, Some(&tls));
    refused(&received.answer(), 500, "tls/server-cert.pem");
    assert_eq!(vmm.api().phase(), Phase::Empty);
    let body = json!({ "receiver_url": format!("unix:{}", scratch.path("m").display()), "tls_dir": tls });
    refused(&vmm.api().put_json("vm.receive-migration", &body), 422, "TLS is for tcp:host:port");
}

/// Passes a connection on to `port`, and gives its own port; its end is how many bytes went there.
fn counted(port: u16) -> (u16, JoinHandle<u64>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let own = listener.local_addr().unwrap().port();
    let work = move || {
        let (source, _) = listener.accept().unwrap();
        let destination = TcpStream::connect(("127.0.0.1", port)).unwrap();
        let (mut back, mut from) = (source.try_clone().unwrap(), destination.try_clone().unwrap());
        thread::spawn(move || drop(std::io::copy(&mut from, &mut back)));
        let count = std::io::copy(&mut &source, &mut &destination).unwrap();
        let _ = destination.shutdown(Shutdown::Write);
        count
    };
    (own, thread::spawn(work))
}

/// Moves a paused guest, whose memory travels once, over TLS, and gives the bytes on the link.
fn bytes_of_a_migration(compression: &str) -> u64 {
    let scratch = Scratch::new();
    let tls = Authority::new("ours").folder(scratch.path("tls"), &["127.0.0.1"]);
    let (mut first, serial) = counting_guest(&scratch);
    first.api().puts(&["vm.pause"]);
    let second = Vmm::with_api(&scratch, [""; 0]);
    let other = SerialFile::new(scratch.path("other"));
    let (mut received, port) = receive_tcp(&second, &other, Some(&tls));
    let (between, count) = counted(port);
    let mut body = to("127.0.0.1", between, Some(&tls));
    body["compression"] = json!(compression);
    first.api().done("vm.send-migration", &body);
    assert_eq!(received.answer().status, 204);
    first.expect_exit(0);
    second.api().puts(&["vm.resume"]);
    goes_on(&serial, &other);
    count.join().unwrap()
}

#[test]
fn compressed_memory_takes_less_of_the_link() {
    let _turn = turn();
    let (plain, packed) = (bytes_of_a_migration("None"), bytes_of_a_migration("Lz4"));
    assert!(packed < plain / 2, "{packed} bytes instead of {plain}");
}

/// One who says nothing holds up neither a receiver nor, once cancelled, a source.
#[test]
fn a_handshake_that_stalls_holds_nobody() {
    let _turn = turn();
    let scratch = Scratch::new();
    let tls = Authority::new("ours").folder(scratch.path("tls"), &["127.0.0.1"]);
    let (mut first, serial) = counting_guest(&scratch);

    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = silent.local_addr().unwrap().port();
    let body = to("127.0.0.1", port, Some(&tls)).to_string();
    let mut sent = Pending::send(first.socket(), "vm.send-migration", body.as_bytes());
    let (held, _) = silent.accept().unwrap();
    assert!(!sent.is_answered());
    first.api().puts(&["vm.cancel"]);
    refused(&sent.answer(), 409, "cancelled");
    drop(held);
    // And by itself, in time.
    refused(&first.api().put_json("vm.send-migration", &to("127.0.0.1", port, Some(&tls))), 500, "in time");
    assert_eq!(first.api().phase(), Phase::Running);

    let second = Vmm::with_api(&scratch, [""; 0]);
    let other = SerialFile::new(scratch.path("other"));
    let (mut received, port) = receive_tcp(&second, &other, Some(&tls));
    let mut stalled: Vec<_> = (0..5).map(|_| TcpStream::connect(("127.0.0.1", port)).unwrap()).collect();
    first.api().done("vm.send-migration", &to("127.0.0.1", port, Some(&tls)));
    assert_eq!(received.answer().status, 204);
    first.expect_exit(0);
    goes_on(&serial, &other);
    for stream in &mut stalled {
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest);
        assert!(rest.is_empty(), "it was greeted");
    }
}
