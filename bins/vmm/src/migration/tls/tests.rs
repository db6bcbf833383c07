use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use vmm_tests::certificates::{Authority, Good, write};

use super::*;

/// How long anything may take before a test fails.
const LIMIT: Duration = Duration::from_secs(60);

fn sockets() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let one = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (one, listener.accept().unwrap().0)
}

fn folder() -> (tempfile::TempDir, Authority) {
    let (folder, authority) = (tempfile::tempdir().unwrap(), Authority::new("ours"));
    let _ = authority.folder(folder.path().to_owned(), &["127.0.0.1", "::1", "host.example"]);
    (folder, authority)
}

/// A source and a receiver that greet each other, the source for a receiver at `address`.
fn greet(folder: &Path, address: &str) -> (io::Result<TlsStream>, io::Result<TlsStream>) {
    let (ours, theirs) = sockets();
    let (client, server) = (Client::load(folder).unwrap(), Server::load(folder).unwrap());
    thread::scope(|scope| {
        let other = scope.spawn(move || server.greet(theirs, &mut || true));
        let one = client.greet(ours, address, &mut || true);
        // One that is refused is closed, as the migration does it.
        let one = one.map_err(|error| io::Error::other(error.to_string()));
        (one, other.join().unwrap())
    })
}

fn pair() -> (Arc<TlsStream>, Arc<TlsStream>) {
    let (folder, _) = folder();
    let (one, other) = greet(folder.path(), "127.0.0.1:7");
    (Arc::new(one.unwrap()), Arc::new(other.unwrap()))
}

fn read_all(stream: &TlsStream) -> Vec<u8> {
    let mut all = Vec::new();
    (&mut &*stream).read_to_end(&mut all).unwrap();
    all
}

fn bytes(seed: u32, length: usize) -> Vec<u8> {
    let mut state = seed;
    std::iter::repeat_with(|| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0]
    })
    .take(length)
    .collect()
}

/// Four threads, two directions, more than any buffer holds: whoever waits holds nobody else.
#[test]
fn both_directions_carry_much_at_once() {
    let (one, other) = pair();
    let length = 8 << 20;
    thread::scope(|scope| {
        for (number, stream) in [(1, &one), (2, &other)] {
            scope.spawn(move || {
                (&mut &**stream).write_all(&bytes(number, length)).unwrap();
                stream.shutdown(Shutdown::Write).unwrap();
            });
        }
        let read = scope.spawn(|| read_all(&one));
        assert!(read_all(&other) == bytes(1, length), "it arrived as it was sent");
        assert!(read.join().unwrap() == bytes(2, length), "it arrived as it was sent");
    });
}

/// The other end takes nothing for a while: what the caller gives again is sent once.
#[test]
fn a_write_that_waits_goes_on_with_the_same_bytes() {
    let (one, other) = pair();
    one.socket().set_write_timeout(Some(Duration::from_millis(20))).unwrap();
    let (sent, mut waited) = (bytes(3, 24 << 20), 0);
    let all = thread::scope(|scope| {
        let mut reader = None;
        let mut rest = sent.as_slice();
        while !rest.is_empty() {
            match (&mut &*one).write(rest) {
                Ok(count) => rest = &rest[count..],
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::WouldBlock);
                    waited += 1;
                    if waited == 3 {
                        reader = Some(scope.spawn(|| read_all(&other)));
                    }
                }
            }
        }
        one.shutdown(Shutdown::Write).unwrap();
        reader.unwrap().join().unwrap()
    });
    assert!(all == sent, "it arrived as it was sent");
}

/// A write that was given up may have sent some of what it was given; it never says that it sent more than it now gets.
#[test]
fn a_write_that_was_given_up_is_not_mixed_up_with_a_shorter_one() {
    let (one, other) = pair();
    one.socket().set_write_timeout(Some(Duration::from_millis(20))).unwrap();
    let big = bytes(4, 1 << 20);
    while (&mut &*one).write(&big).is_ok() {}
    let reader = thread::spawn(move || read_all(&other));
    let count = loop {
        match (&mut &*one).write(b"ab") {
            Ok(count) => break count,
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
    };
    assert!(count <= 2);
    one.shutdown(Shutdown::Both).unwrap();
    reader.join().unwrap();
}

#[test]
fn a_reader_that_waits_is_ended_by_another_thread() {
    let (one, other) = pair();
    let waiting = Arc::clone(&one);
    let reader = thread::spawn(move || (&mut &*waiting).read(&mut [0; 9]).unwrap());
    // It waits, and meanwhile the other direction goes on.
    (&mut &*one).write_all(b"hello").unwrap();
    let mut hello = [0; 5];
    (&mut &*other).read_exact(&mut hello).unwrap();
    assert_eq!(&hello, b"hello");
    assert!(!reader.is_finished());
    one.shutdown(Shutdown::Both).unwrap();
    assert_eq!(reader.join().unwrap(), 0);
}

#[test]
fn a_read_times_out_as_one_of_the_socket() {
    let (one, _other) = pair();
    one.socket().set_read_timeout(Some(Duration::from_millis(20))).unwrap();
    assert_eq!((&mut &*one).read(&mut [0; 9]).unwrap_err().kind(), ErrorKind::WouldBlock);
}

/// Whoever is on the way cannot change a bit unseen.
#[test]
fn a_flipped_bit_ends_the_stream() {
    let (folder, _) = folder();
    let ((ours, near), (far, theirs)) = (sockets(), sockets());
    let (client, server) = (Client::load(folder.path()).unwrap(), Server::load(folder.path()).unwrap());
    let (back, from) = (near.try_clone().unwrap(), far.try_clone().unwrap());
    thread::spawn(move || drop(io::copy(&mut &from, &mut &back)));
    thread::spawn(move || {
        let mut buffer = [0; 65536];
        while let Ok(count @ 1..) = (&mut &near).read(&mut buffer) {
            // No record of the handshake from this side is so long.
            if count > 5000 {
                buffer[count - 9] ^= 1;
            }
            (&mut &far).write_all(&buffer[..count]).unwrap();
        }
    });
    let other = thread::spawn(move || {
        let stream = server.greet(theirs, &mut || true).unwrap();
        let mut all = Vec::new();
        (&mut &stream).read_to_end(&mut all).unwrap_err()
    });
    let stream = client.greet(ours, "127.0.0.1:7", &mut || true).unwrap();
    (&mut &stream).write_all(&[7; 16000]).unwrap();
    assert!(other.join().unwrap().to_string().contains("decrypt"));
    // And the writer is told.
    stream.socket().set_read_timeout(Some(LIMIT)).unwrap();
    assert!((&mut &stream).read(&mut [0; 9]).unwrap_err().to_string().contains("BadRecordMac"));
}

#[test]
fn the_certificate_is_for_the_host_of_the_address() {
    let (folder, _) = folder();
    for (address, fits) in [
        ("127.0.0.1:7", true),
        ("host.example:7", true),
        ("HOST.example:7", true),
        ("[::1]:7", true),
        ("127.0.0.2:7", false),
        ("example:7", false),
        ("source.example:7", false),
        ("[::2]:7", false),
    ] {
        let (one, other) = greet(folder.path(), address);
        assert_eq!(one.is_ok(), fits, "{address}: {one:?}");
        assert_eq!(other.is_ok(), fits, "{address}: {other:?}");
    }
    let (ours, _theirs) = sockets();
    let error = Client::load(folder.path()).unwrap().greet(ours, "a b:7", &mut || true).unwrap_err();
    assert!(error.to_string().contains("no host that a certificate can be for"), "{error}");
}

/// A source without a certificate, and one whose certificate says that it is for servers only.
#[test]
fn a_source_shows_a_certificate_for_sources() {
    let (folder, _) = folder();
    let (ours, theirs) = sockets();
    let config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .unwrap()
        .with_root_certificates(roots(folder.path()).unwrap())
        .with_no_client_auth();
    let (nobody, server) = (Client(Arc::new(config)), Server::load(folder.path()).unwrap());
    let other = thread::spawn(move || server.greet(theirs, &mut || true).unwrap_err());
    let stream = nobody.greet(ours, "127.0.0.1:7", &mut || true).unwrap();
    assert!((&mut &stream).read(&mut [0; 9]).unwrap_err().to_string().contains("CertificateRequired"));
    drop(stream);
    assert!(other.join().unwrap().to_string().contains("shows no certificate"));
}

#[test]
fn files_that_do_not_do_are_told_by_their_names() {
    let (folder, authority) = folder();
    let at = folder.path();
    let error = |end: &str| match end {
        "client" => crate::exit::chain(&Client::load(at).unwrap_err()).to_string(),
        _ => crate::exit::chain(&Server::load(at).unwrap_err()).to_string(),
    };
    let good = std::fs::read(at.join("ca-cert.pem")).unwrap();
    for (content, words) in [
        (&b""[..], "it has none in PEM"),
        (b"-----BEGIN CERTIFICATE-----\nAAAA\n", "it ends before its end marker"),
        (b"-----BEGIN CERTIFICATE-----\n!!\n-----END CERTIFICATE-----\n", "there is no certificate"),
        (b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "cannot be used: BadEncoding"),
    ] {
        std::fs::write(at.join("ca-cert.pem"), content).unwrap();
        for end in ["client", "server"] {
            let text = error(end);
            assert!(text.contains("ca-cert.pem") && text.contains(words), "{text}");
        }
    }
    std::fs::write(at.join("ca-cert.pem"), good).unwrap();
    for end in ["client", "server"] {
        let (certificate, _) = authority.issue(&["127.0.0.1"], Good::Still);
        write(at, end, &(certificate, "no key".to_owned()));
        assert!(error(end).contains(&format!("no private key to be read in {}/{end}-key.pem", at.display())));
        let (_, key) = authority.issue(&["127.0.0.1"], Good::Still);
        std::fs::write(at.join(format!("{end}-key.pem")), key).unwrap();
        let text = error(end);
        assert!(text.contains(&format!("{end}-cert.pem")) && text.contains("the key is another's"), "{text}");
    }
}
