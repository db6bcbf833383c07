use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;

use vm_memory::GuestMemoryBackend;
use vmm_migration_protocol::{Mark, MemoryLayout, Region, Sums, page_checksum};

use super::*;

const SIZE: u64 = 4 << 20;

/// Told and heard at once.
struct Told(u64, Said);

impl From<(u64, Said, Place)> for Told {
    fn from((number, said, _): (u64, Said, Place)) -> Self {
        Self(number, said)
    }
}

/// Told, and not heard yet.
struct Waiting(Place);

impl From<(u64, Said, Place)> for Waiting {
    fn from((_, _, place): (u64, Said, Place)) -> Self {
        Self(place)
    }
}

/// A session with two connections, numbers 7 and 8 here.
struct Session {
    ground: Arc<Ground>,
    memory: Arc<GuestRam>,
    to: Sender<Told>,
    told: Receiver<Told>,
}

impl Session {
    fn new() -> Self {
        Self::with(Features::NONE)
    }

    fn with(features: Features) -> Self {
        let memory = Arc::new(GuestRam::from_ranges(&[(GuestAddress(0), 4 << 20)]).unwrap());
        let layout = vec![Region { gpa: 0, length: SIZE, zone: "z".to_owned() }];
        let ground = Arc::new(Ground::default());
        assert!(!ground.admit(8, 1), "nothing is taken yet");
        ground.open(Arc::clone(&memory), MemoryLayout::new(layout).unwrap(), (7, 2), features, None);
        assert!(ground.admit(8, 1) && !ground.admit(9, 1) && !ground.admit(9, 0));
        let (to, told) = channel();
        Self { ground, memory, to, told }
    }

    /// A connection that has said its first frame.
    fn connect(&self, number: u64) -> (UnixStream, JoinHandle<()>) {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let (ground, to) = (Arc::clone(&self.ground), self.to.clone());
        let socket = Arc::new(Socket::Unix(theirs));
        let thread = std::thread::spawn(move || read(number, &socket, &ground, &to));
        let first = Message::Query(vmm_migration_protocol::SessionId([1; 16]));
        ours.write_all(&first.encode().unwrap().encode()).unwrap();
        assert!(matches!(self.told.recv(), Ok(Told(_, Said::First(..)))));
        (ours, thread)
    }

    fn first_byte(&self, gpa: u64) -> u8 {
        self.memory.read_obj(GuestAddress(gpa)).unwrap()
    }
}

fn memory(gpa: u64, pass: u32, length: usize) -> Vec<u8> {
    let contents = vec![u8::try_from(pass + 1).unwrap(); length];
    let range = MemoryRange::new(gpa, length as u64).unwrap();
    let bulk = Bulk::memory(range, pass, contents_checksum([contents.as_slice()])).unwrap();
    [bulk.header().as_slice(), &contents].concat()
}

fn mark(pass: u32, last: bool, bytes: u64) -> Vec<u8> {
    Message::Mark(Mark { pass, last, bytes }).encode().unwrap().encode()
}

#[test]
fn a_pass_lands_when_it_has_on_every_connection() {
    let session = Session::new();
    let (mut first, reads) = session.connect(7);
    let (mut second, reads_too) = session.connect(8);
    first.write_all(&[memory(0, 0, 8192), mark(0, false, 8192)].concat()).unwrap();
    second.write_all(&memory(1 << 20, 0, 300_000 / 4096 * 4096)).unwrap();
    second.write_all(&mark(0, false, 300_000 / 4096 * 4096)).unwrap();
    assert!(matches!(session.told.recv(), Ok(Told(_, Said::Landed { pass: 0, last: false }))));
    assert_eq!((session.first_byte(0), session.first_byte(1 << 20)), (1, 1));
    second.write_all(&[memory(0, 1, 4096), mark(1, true, 4096)].concat()).unwrap();
    first.write_all(&mark(1, true, 0)).unwrap();
    assert!(matches!(session.told.recv(), Ok(Told(_, Said::Landed { pass: 1, last: true }))));
    assert_eq!(session.first_byte(0), 2);
    drop((first, second));
    for _ in 0..2 {
        assert!(matches!(session.told.recv(), Ok(Told(7 | 8, Said::Lost(_)))));
    }
    reads.join().unwrap();
    reads_too.join().unwrap();
}

#[test]
fn peers_that_are_faster_than_the_driver_wait_and_memory_does_not_grow() {
    let (ground, (to, told)) = (Arc::new(Ground::default()), channel::<Waiting>());
    let frame = Message::Query(vmm_migration_protocol::SessionId([1; 16])).encode().unwrap().encode();
    let (mut peers, mut readers) = (Vec::new(), Vec::new());
    for number in [7, 8] {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_write_timeout(Some(Duration::from_millis(100))).unwrap();
        let (ground, to, socket) = (Arc::clone(&ground), to.clone(), Arc::new(Socket::Unix(theirs)));
        readers.push(std::thread::spawn(move || read(number, &socket, &ground, &to)));
        peers.push(ours);
    }
    drop(to);
    let (many, mut sent) = (frame.repeat(100), 0);
    for peer in &mut peers {
        // What the sockets hold comes on top.
        while peer.write_all(&many).is_ok() {
            sent += many.len();
            assert!(sent < 16 << 20, "nobody stops it");
        }
    }
    // They have room in turn, and it is bounded for both together.
    let held: Vec<Waiting> = std::iter::from_fn(|| told.try_recv().ok()).collect();
    assert!((1000..=super::super::backlog::MOST / 256).contains(&held.len()), "{}", held.len());
    drop(held);
    drop(peers);
    let rest = told.iter().map(|Waiting(place)| drop(place)).count();
    assert!(rest > 1000, "{rest}: it goes on");
    readers.into_iter().for_each(|reader| reader.join().unwrap());
}

#[test]
fn only_the_first_connection_of_a_session_says_much_at_once() {
    let session = Session::new();
    session.ground.begin(7);
    let state = Message::State(vec![1; 2 << 20]).encode().unwrap().encode();
    let (mut first, reads) = session.connect(7);
    let (mut second, reads_too) = session.connect(8);
    first.write_all(&state).unwrap();
    assert!(matches!(session.told.recv(), Ok(Told(7, Said::Frame(_)))));
    // It does not get further than this end reads.
    let _ = second.write_all(&state);
    let Ok(Told(8, Said::Garbage(text))) = session.told.recv() else { panic!("it was let through") };
    assert!(text.contains("too large"), "{text}");
    drop((first, second));
    reads.join().unwrap();
    reads_too.join().unwrap();
}

/// A range with these contents, and the checksums that are said of them.
fn summed(gpa: u64, contents: &[u8], sums: Vec<u32>) -> Vec<u8> {
    let range = MemoryRange::new(gpa, contents.len() as u64).unwrap();
    let bulk = Bulk::memory(range, 0, 0).unwrap();
    let sums = Message::Sums(Sums { range, pass: 0, sums }).encode().unwrap().encode();
    [bulk.header().as_slice(), contents, &sums].concat()
}

#[test]
fn a_page_that_changed_on_the_way_is_asked_for_again_and_its_neighbours_are_not() {
    let session = Session::with(Features::PAGE_SUMS);
    let (mut first, reads) = session.connect(7);
    // Larger than what is read at once, and with a small one behind it.
    let contents: Vec<u8> = (0..100 * 4096).map(|at| (at / 4096 + 1) as u8).collect();
    let mut sums: Vec<u32> = contents.chunks(4096).map(page_checksum).collect();
    sums[41] ^= 1;
    first.write_all(&summed(1 << 20, &contents, sums)).unwrap();
    let small = [9; 4096];
    first.write_all(&summed(0, &small, vec![page_checksum(&small)])).unwrap();
    first.write_all(&mark(0, false, 101 * 4096)).unwrap();
    drop(first);
    let Ok(Told(7, Said::Damaged(range))) = session.told.recv() else { panic!("it was not seen") };
    assert_eq!((range.gpa(), range.length()), ((1 << 20) + 41 * 4096, 4096));
    assert!(matches!(session.told.recv(), Ok(Told(7, Said::Lost(_)))), "the rest is whole");
    reads.join().unwrap();
    let mut landed = vec![0; contents.len()];
    session.memory.read_slice(&mut landed, GuestAddress(1 << 20)).unwrap();
    assert!(landed == contents && session.first_byte(0) == 9);
}

#[test]
fn memory_that_goes_straight_to_its_place_is_within_the_guests_and_has_its_checksums() {
    let page = [5; 4096];
    let right = vec![page_checksum(&page)];
    let cases = [
        (summed(SIZE, &page, right.clone()), "not in the guest's memory"),
        (summed(0, &page, right.clone())[..40 + 4096].to_vec(), ""),
        (
            [&summed(0, &page, right.clone())[..40 + 4096], &mark(0, true, 4096)].concat(),
            "no checksums follow",
        ),
        (summed(0, &page, right)[40 + 4096..].to_vec(), "not what came before"),
    ];
    for (bytes, expected) in cases {
        let session = Session::with(Features::PAGE_SUMS);
        let (mut first, reads) = session.connect(7);
        first.write_all(&bytes).unwrap();
        drop(first);
        let said = session.told.recv().unwrap().1;
        match said {
            Said::Garbage(text) => assert!(!expected.is_empty() && text.contains(expected), "{text}"),
            Said::Lost(_) => assert!(expected.is_empty()),
            other => panic!("{other:?}"),
        }
        reads.join().unwrap();
    }
}

/// What `say` makes of a session in which connection 1 has ended pass 0 and connection 0 has not.
fn ahead(said: &[u8]) -> (Session, String) {
    let session = Session::new();
    let (mut second, reads) = session.connect(8);
    second.write_all(&[&mark(0, false, 0), said].concat()).unwrap();
    let Ok(Told(8, Said::Garbage(text))) = session.told.recv() else { panic!("it was let through") };
    reads.join().unwrap();
    (session, text)
}

#[test]
fn memory_of_a_pass_that_has_not_begun_everywhere_is_refused() {
    let (session, text) = ahead(&memory(0, 1, 4096));
    assert!(text.contains("pass 1 arrives in pass 0"), "{text}");
    assert_eq!(session.first_byte(0), 0);
    let range = MemoryRange::new(0, 4096).unwrap();
    let (_, text) = ahead(&Message::Zero(Zero { range, pass: 1 }).encode().unwrap().encode());
    assert!(text.contains("pass 1 arrives in pass 0"), "{text}");
    let (_, text) = ahead(&mark(1, false, 0));
    assert!(text.contains("cannot end this pass"), "{text}");
    let (_, text) = ahead(&mark(1, true, 0));
    assert!(text.contains("whether the pass is the last"), "{text}");
}

#[test]
fn memory_on_a_connection_that_was_not_admitted_lands_nowhere() {
    let session = Session::new();
    let (mut stranger, reads) = session.connect(9);
    stranger.write_all(&memory(0, 0, 4096)).unwrap();
    assert!(matches!(session.told.recv(), Ok(Told(9, Said::Garbage(_)))));
    reads.join().unwrap();
    assert_eq!(session.first_byte(0), 0);
    assert_eq!(session.memory.num_regions(), 1);
}

#[test]
fn a_connection_begins_as_one() {
    let session = Session::new();
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let socket = Arc::new(Socket::Unix(theirs));
    ours.write_all(&mark(0, true, 0)).unwrap();
    read(9, &socket, &session.ground, &session.to);
    assert!(matches!(ours.read(&mut [0]), Ok(0)), "it is closed");
    assert!(session.told.try_recv().is_err());
}
