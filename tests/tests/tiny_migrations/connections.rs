//! Migrations over several connections.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use serde_json::Value;
use vmm_migration_protocol::{Command, Decoder, Frame, Item, Join, Message, SessionId};
use vmm_tests::harness::migrating::url;

use super::*;

/// Stands between two ends, and counts what goes to the destination on each connection, in the order in which they are
/// opened.
struct Between {
    bytes: Arc<Mutex<Vec<Arc<AtomicUsize>>>>,
    /// The connection that is cut, and after how many bytes to the destination.
    cut: Option<(usize, usize)>,
}

impl Between {
    fn start(at: &Path, to: &Path, cut: Option<(usize, usize)>) -> Self {
        let listener = UnixListener::bind(at).unwrap();
        let bytes: Arc<Mutex<Vec<Arc<AtomicUsize>>>> = Arc::default();
        let (to, counts) = (to.to_owned(), Arc::clone(&bytes));
        std::thread::spawn(move || {
            while let Ok((source, _)) = listener.accept() {
                let Ok(destination) = UnixStream::connect(&to) else { continue };
                let counter = Arc::new(AtomicUsize::new(0));
                let mut counts = counts.lock().unwrap();
                let most = cut.filter(|(which, _)| *which == counts.len()).map(|(_, most)| most);
                counts.push(Arc::clone(&counter));
                let (mut back, mut from) = (source.try_clone().unwrap(), destination.try_clone().unwrap());
                std::thread::spawn(move || {
                    let _ = std::io::copy(&mut from, &mut back);
                    let _ = back.shutdown(std::net::Shutdown::Write);
                });
                std::thread::spawn(move || count(source, destination, &counter, most));
            }
        });
        Self { bytes, cut }
    }

    fn counts(&self) -> Vec<usize> {
        self.bytes.lock().unwrap().iter().map(|count| count.load(Ordering::SeqCst)).collect()
    }
}

fn count(mut source: UnixStream, mut destination: UnixStream, counter: &AtomicUsize, most: Option<usize>) {
    let mut buffer = [0; 4096];
    let mut left = most.unwrap_or(usize::MAX);
    while left > 0 {
        let room = buffer.len().min(left);
        match source.read(&mut buffer[..room]) {
            Ok(0) | Err(_) => {
                let _ = destination.shutdown(std::net::Shutdown::Write);
                return;
            }
            Ok(count) => {
                left -= count;
                if destination.write_all(&buffer[..count]).is_err() {
                    return;
                }
                counter.fetch_add(count, Ordering::SeqCst);
            }
        }
    }
    for end in [source, destination] {
        let _ = end.shutdown(std::net::Shutdown::Both);
    }
}

fn over(path: &Path, connections: u16) -> Value {
    json!({ "destination_url": url(path), "connections": connections })
}

/// Join with its header.
const JOIN: usize = 44;
/// Mark with its header.
const MARK: usize = 29;

#[test]
fn memory_goes_over_as_many_connections_as_are_wanted_and_16_at_most() {
    let _turn = turn();
    let scratch = Scratch::new();
    let (mut vmm, mut serial) = counting_guest(&scratch);
    for (wanted, used) in [(4, 4), (128, 16), (2, 2)] {
        let next = Vmm::with_api(&scratch, [""; 0]);
        let other = SerialFile::new(scratch.path(format!("serial{wanted}")));
        let (mut received, path) = receive(&next, &scratch, &other);
        let at = scratch.path(format!("between{wanted}"));
        let between = Between::start(&at, &path, None);
        vmm.api().done("vm.send-migration", &over(&at, wanted));
        assert_eq!(received.answer().status, 204);
        vmm.expect_exit(0);
        goes_on(&serial, &other);
        let counts = between.counts();
        assert_eq!(counts.len(), used, "{counts:?}");
        // Joined, and each pass has ended there, two of them at least.
        assert!(counts.iter().all(|count| *count >= JOIN + 2 * MARK), "{counts:?}");
        (vmm, serial) = (next, other);
    }
    vmm.api().puts(&["vm.pause", "vm.resume"]);
}

#[test]
fn a_paused_guest_goes_over_several_connections() {
    let _turn = turn();
    let scratch = Scratch::new();
    let (first, serial) = counting_guest(&scratch);
    arrives_paused(&scratch, first, &serial, |path| over(path, 3));
}

#[test]
fn any_connection_that_is_lost_ends_the_migration_as_the_first_one_does() {
    let _turn = turn();
    let scratch = Scratch::new();
    let (mut first, serial) = counting_guest(&scratch);
    let second = Vmm::with_api(&scratch, [""; 0]);
    let other = SerialFile::new(scratch.path("other"));
    // Before Join is whole, after it, in the first pass, and before the first Mark is whole.
    for (number, cut) in [(1, JOIN - 1), (3, JOIN), (1, JOIN + 1), (2, JOIN + 20)].into_iter().enumerate() {
        let (mut received, path) = receive(&second, &scratch, &other);
        let at = scratch.path(format!("between{number}"));
        let between = Between::start(&at, &path, Some(cut));
        let answer = first.api().put_json("vm.send-migration", &over(&at, 4));
        assert_eq!(between.cut, Some(cut));
        refused(&answer, 500, "connection");
        assert_eq!(first.api().phase(), Phase::Running, "{cut:?}");
        refused(&received.answer(), 500, "connection");
        assert_eq!(second.api().phase(), Phase::Empty, "{cut:?}");
        serial.wait_longer_than(serial.text().len() + 20);
    }
    let (mut received, path) = receive(&second, &scratch, &other);
    first.api().done("vm.send-migration", &over(&path, 4));
    assert_eq!(received.answer().status, 204);
    first.expect_exit(0);
    goes_on(&serial, &other);
}

/// The next frame that is not about memory.
fn frame(from: &mut UnixStream, decoder: &mut Decoder) -> Option<Frame> {
    let mut byte = [0];
    loop {
        from.read_exact(&mut byte).ok()?;
        if let Some(Item::Frame(frame)) = decoder.push(&mut byte.as_slice()).unwrap() {
            return Some(frame);
        }
    }
}

/// What the destination does with a connection that begins so.
fn knock(path: &Path, first: &[u8]) -> Option<Command> {
    let mut stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream.write_all(first).unwrap();
    frame(&mut stream, &mut Decoder::new()).map(|frame| frame.command())
}

/// The destination takes the connections of the session only, each once, and the others harm nobody.
#[test]
fn connections_that_belong_to_no_session_are_closed() {
    let _turn = turn();
    let scratch = Scratch::new();
    let (mut first, serial) = counting_guest(&scratch);
    let second = Vmm::with_api(&scratch, [""; 0]);
    let other = SerialFile::new(scratch.path("other"));
    let (mut received, path) = receive(&second, &scratch, &other);
    let join = |session, index, role| {
        Message::Join(Join { session: SessionId(session), index, role }).encode().unwrap().encode()
    };
    // Before there is a session.
    assert_eq!(knock(&path, &join([0; 16], 1, 0)), None);

    let at = scratch.path("between");
    let listener = UnixListener::bind(&at).unwrap();
    let mut sent = pending(&first, "vm.send-migration", &over(&at, 3));
    let (mut source, _) = listener.accept().unwrap();
    let mut destination = UnixStream::connect(&path).unwrap();
    let (mut back, mut from) = (source.try_clone().unwrap(), destination.try_clone().unwrap());
    std::thread::spawn(move || std::io::copy(&mut from, &mut back));
    let mut decoder = Decoder::new();
    let hello = frame(&mut source, &mut decoder).unwrap();
    destination.write_all(&hello.encode()).unwrap();
    let Ok(Message::Hello(hello)) = Message::decode(hello) else { panic!("no Hello") };
    let session = hello.session.0;
    std::thread::spawn(move || std::io::copy(&mut source, &mut destination));

    // The source waits for its second connection.
    let (mut held, _) = listener.accept().unwrap();
    let said = frame(&mut held, &mut Decoder::new()).unwrap();
    let (mut third, _) = listener.accept().unwrap();
    let said_too = frame(&mut third, &mut Decoder::new()).unwrap();
    let mut wrong = session;
    wrong[15] ^= 1;
    for (session, index, role) in
        [(wrong, 1, 0), ([0; 16], 1, 0), (session, 0, 0), (session, 3, 0), (session, 128, 0), (session, 1, 1)]
    {
        assert_eq!(knock(&path, &join(session, index, role)), None, "{index} {role}");
    }
    // Memory without a word.
    assert_eq!(knock(&path, &Message::Landed(0).encode().unwrap().encode()), None);

    // The right ones are taken, each once.
    for (stream, said, index) in [(held, said, 1), (third, said_too, 2)] {
        assert_eq!(said.encode(), join(session, index, 0));
        let mut to = UnixStream::connect(&path).unwrap();
        to.write_all(&said.encode()).unwrap();
        let ack = frame(&mut to, &mut Decoder::new()).unwrap();
        assert_eq!(ack.command(), Command::Ack);
        assert_eq!(knock(&path, &join(session, index, 0)), None, "{index} again");
        let (mut stream, mut from) = (stream, to.try_clone().unwrap());
        stream.write_all(&ack.encode()).unwrap();
        std::thread::spawn(move || std::io::copy(&mut stream, &mut to));
        // Kept open to the end of the test.
        std::thread::spawn(move || std::io::copy(&mut from, &mut std::io::sink()));
    }
    assert_eq!(sent.answer().status, 204);
    assert_eq!(received.answer().status, 204);
    first.expect_exit(0);
    goes_on(&serial, &other);
}

/// Who knows the session's id can end it, and no more.
#[test]
fn a_further_connection_that_says_something_else_ends_the_session() {
    let _turn = turn();
    let scratch = Scratch::new();
    let (first, serial) = counting_guest(&scratch);
    let second = Vmm::with_api(&scratch, [""; 0]);
    let other = SerialFile::new(scratch.path("other"));
    let mark = Message::Mark(vmm_migration_protocol::Mark { pass: 0, last: false, bytes: 4096 });
    let complete = Message::Complete;
    for (number, lie) in [mark, complete].into_iter().enumerate() {
        let (mut received, path) = receive(&second, &scratch, &other);
        let at = scratch.path(format!("between{number}"));
        let listener = UnixListener::bind(&at).unwrap();
        let mut sent = pending(&first, "vm.send-migration", &over(&at, 2));
        let (mut source, mut first_to) = (listener.accept().unwrap().0, UnixStream::connect(&path).unwrap());
        let (mut back, mut from) = (source.try_clone().unwrap(), first_to.try_clone().unwrap());
        std::thread::spawn(move || {
            let _ = std::io::copy(&mut from, &mut back);
            let _ = back.shutdown(std::net::Shutdown::Write);
        });
        std::thread::spawn(move || {
            let _ = std::io::copy(&mut source, &mut first_to);
            let _ = first_to.shutdown(std::net::Shutdown::Both);
        });
        let (mut beside, mut to) = (listener.accept().unwrap().0, UnixStream::connect(&path).unwrap());
        to.write_all(&frame(&mut beside, &mut Decoder::new()).unwrap().encode()).unwrap();
        assert_eq!(frame(&mut to, &mut Decoder::new()).unwrap().command(), Command::Ack);
        to.write_all(&lie.encode().unwrap().encode()).unwrap();
        refused(&received.answer(), 500, "connection 1");
        let answer = sent.answer();
        assert_eq!(answer.status, 500, "{answer:?}");
        assert_eq!(first.api().phase(), Phase::Running);
        assert_eq!(second.api().phase(), Phase::Empty);
        serial.wait_longer_than(serial.text().len() + 20);
    }
}

/// The destination agreed on three and takes the first only.
#[test]
fn a_destination_that_takes_no_further_connection_is_told() {
    let _turn = turn();
    let scratch = Scratch::new();
    let (first, serial) = counting_guest(&scratch);
    let second = Vmm::with_api(&scratch, [""; 0]);
    let other = SerialFile::new(scratch.path("other"));
    let (mut received, path) = receive(&second, &scratch, &other);
    let at = scratch.path("between");
    let listener = UnixListener::bind(&at).unwrap();
    std::thread::spawn(move || {
        let (mut source, _) = listener.accept().unwrap();
        let mut destination = UnixStream::connect(path).unwrap();
        let (mut back, mut from) = (source.try_clone().unwrap(), destination.try_clone().unwrap());
        std::thread::spawn(move || std::io::copy(&mut from, &mut back));
        std::thread::spawn(move || {
            let _ = std::io::copy(&mut source, &mut destination);
            let _ = destination.shutdown(std::net::Shutdown::Both);
        });
        listener.incoming().for_each(drop);
    });
    let answer = first.api().put_json("vm.send-migration", &over(&at, 3));
    refused(&answer, 500, "connection");
    assert_eq!(first.api().phase(), Phase::Running);
    refused(&received.answer(), 500, "connection");
    serial.wait_longer_than(serial.text().len() + 20);
}
