//! The thread that reads a connection of a destination; memory lands from here.

use std::collections::BTreeMap;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress};
use vmm_device_model::dma::GuestRam;
use vmm_memory_manager::straight::slice;
use vmm_migration_protocol::{
    Absent, Barrier, Bulk, Command, Fault, Features, Frame, Intake, Item, MemoryLayout, MemoryRange, Message,
    PAGE, Reason, Zero, contents_checksum, unpack,
};

use super::ahead::Ahead;
use super::backlog::{Backlog, Place};
use super::link::{End, Frames, Socket};
use super::postcopy::arriving::Arriving;
use super::straight::page_sums;

/// How long a frame may take to be written. They are small, and a socket has room for them.
pub(super) const WRITE: Duration = Duration::from_secs(1);

/// How long a connection may take before it has said what it wants.
const FIRST: Duration = Duration::from_secs(10);

/// Where memory is to land.
#[derive(Debug, Default)]
pub(super) struct Ground {
    /// Empty while the destination takes none.
    open: Mutex<Option<Open>>,
    /// The connection on which descriptors of memory are to come; 0 for none.
    handed: AtomicU64,
    /// Memory that comes after the hand-over.
    late: Mutex<Option<Arc<Arriving>>>,
    /// The session's first connection; 0 for none.
    first: AtomicU64,
    /// What waits for the driver.
    backlog: Arc<Backlog>,
    /// Something has come where memory does.
    came: Arc<AtomicBool>,
}

#[derive(Debug)]
struct Open {
    target: Arc<Target>,
    /// The connections that it comes on, by their numbers here: their indices in the session.
    connections: BTreeMap<u64, u16>,
}

/// The memory of a session.
#[derive(Debug)]
pub(super) struct Target {
    memory: Arc<GuestRam>,
    layout: MemoryLayout,
    /// What was agreed on.
    features: Features,
    /// Allocates ahead of what arrives, where there is a thread for it.
    ahead: Option<Ahead>,
    barrier: Mutex<Barrier>,
    /// What is to come after the hand-over; `None` where nothing may.
    absent: Option<Mutex<Vec<Absent>>>,
}

impl Ground {
    /// Takes memory, laid out as in `layout`, on connection `number` and as many more as the session has, in the way that was agreed on.
    pub(super) fn open(
        &self,
        memory: Arc<GuestRam>,
        layout: MemoryLayout,
        (number, connections): (u64, u16),
        features: Features,
        ahead: Option<Ahead>,
    ) {
        let barrier = Mutex::new(Barrier::new(connections, layout.bytes()));
        let absent = features.contains(Features::POST_COPY).then(Mutex::default);
        let target = Arc::new(Target { memory, layout, features, ahead, barrier, absent });
        *self.lock() = Some(Open { target, connections: BTreeMap::from([(number, 0)]) });
    }

    /// Takes it on connection `number`, too, which is `index` of the session, unless that one is there already.
    pub(super) fn admit(&self, number: u64, index: u16) -> bool {
        let mut open = self.lock();
        let Some(Open { connections, .. }) = &mut *open else { return false };
        let is_free = !connections.values().any(|taken| *taken == index);
        if is_free {
            connections.insert(number, index);
        }
        is_free
    }

    pub(super) fn close(&self) {
        *self.lock() = None;
    }

    /// What the last pass has left out.
    pub(super) fn absent(&self) -> Vec<Absent> {
        let open = self.lock();
        let absent = open.as_ref().and_then(|open| open.target.absent.as_ref());
        absent.map(|all| all.lock().unwrap_or_else(PoisonError::into_inner).clone()).unwrap_or_default()
    }

    /// Memory that comes after the hand-over goes there.
    pub(super) fn follow(&self, arriving: Option<Arc<Arriving>>) {
        *self.late.lock().unwrap_or_else(PoisonError::into_inner) = arriving;
    }

    /// Where it goes that comes on connection `number`.
    fn late(&self, number: u64) -> Option<Arc<Arriving>> {
        let late = self.late.lock().unwrap_or_else(PoisonError::into_inner);
        late.clone().filter(|late| late.takes(number))
    }

    /// Descriptors of memory are to come on this connection, whose number is not 0.
    pub(super) fn expect_files(&self, connection: u64) {
        self.handed.store(connection, Ordering::SeqCst);
    }

    /// No descriptors are to come any more.
    pub(super) fn refuse_files(&self) {
        self.handed.store(0, Ordering::SeqCst);
    }

    /// A session has begun on this connection, whose number is not 0.
    pub(super) fn begin(&self, connection: u64) {
        self.first.store(connection, Ordering::SeqCst);
    }

    /// Whether something has come where memory does since this was asked last. It need not be a frame yet: in what the link holds, others
    /// wait behind much memory.
    pub(super) fn has_come(&self) -> bool {
        self.came.swap(false, Ordering::Relaxed)
    }

    fn is_first(&self, connection: u64) -> bool {
        self.first.load(Ordering::SeqCst) == connection
    }

    fn takes_files(&self, connection: u64) -> bool {
        self.handed.load(Ordering::SeqCst) == connection
    }

    fn lock(&self) -> MutexGuard<'_, Option<Open>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where memory of connection `number` lands, and which of the session's it is.
    fn target(&self, number: u64) -> Option<(Arc<Target>, u16)> {
        let open = self.lock();
        let open = open.as_ref()?;
        open.connections.get(&number).map(|index| (Arc::clone(&open.target), *index))
    }
}

impl Target {
    /// Notes that this comes after the hand-over.
    fn leave_out(&self, range: Absent) -> Option<Said> {
        let Some(absent) = &self.absent else {
            return Some(Said::Garbage("post-copy was not agreed on".to_owned()));
        };
        absent.lock().unwrap_or_else(PoisonError::into_inner).push(range);
        None
    }

    fn barrier(&self) -> MutexGuard<'_, Barrier> {
        self.barrier.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What came on a connection.
#[derive(Debug)]
pub(super) enum Said {
    /// The first frame of all.
    First(Arc<Socket>, Frame),
    Frame(Frame),
    /// The frame about descriptors of memory, and what came beside it or before.
    Files(Frame, Vec<OwnedFd>),
    Garbage(String),
    Lost(String),
    Landed {
        pass: u32,
        last: bool,
    },
    Damaged(MemoryRange),
    /// All of memory is there, under a guest that runs.
    Whole,
    /// Memory cannot land.
    Failed(Fault),
}

impl Said {
    /// Bytes that it carries, about.
    fn carried(&self) -> usize {
        match self {
            Self::First(_, frame) | Self::Frame(frame) | Self::Files(frame, _) => frame.payload().len(),
            Self::Garbage(text) | Self::Lost(text) => text.len(),
            Self::Landed { .. } | Self::Damaged(_) | Self::Whole | Self::Failed(_) => 0,
        }
    }
}

/// Reads `socket` to its end, and tells `to` as connection `number`.
pub(super) fn read<T: From<(u64, Said, Place)>>(
    number: u64,
    socket: &Arc<Socket>,
    ground: &Ground,
    to: &Sender<T>,
) {
    let _ = socket.set_timeouts(None, Some(WRITE));
    let mut frames = Frames::of(socket);
    let tell = |said: Said| {
        let place = ground.backlog.place(said.carried());
        to.send((number, said, place).into()).is_ok()
    };
    // Who says nothing does not keep others out.
    match frames.first(FIRST) {
        Ok(Item::Frame(frame)) if may_be_first(frame.command()) => {
            if !tell(Said::First(Arc::clone(socket), frame)) {
                return;
            }
        }
        // Somebody looked whether this end is there, or did not come to speak.
        Err(End::Lost(text)) => {
            log::debug!("migration: a connection without a word: {text}");
            return socket.shutdown(Shutdown::Both);
        }
        other => {
            log::warn!("migration: a connection that does not begin as one: {other:?}");
            return socket.shutdown(Shutdown::Both);
        }
    }
    // Before there is memory, and with it.
    let end = match control(&mut frames, (ground, number), &tell) {
        Ok(Some(item)) => {
            frames.note_in(&ground.came);
            match (ground.late(number), ground.target(number)) {
                (Some(late), _) => late.land(&mut frames, (number, item), &tell),
                (None, Some((target, _))) => land(&mut frames, item, (ground, number, target), &tell),
                (None, None) => Err(End::Garbage("memory out of place".to_owned())),
            }
        }
        Ok(None) => return,
        Err(end) => Err(end),
    };
    match end {
        Ok(()) => {}
        Err(End::Garbage(text)) => drop(tell(Said::Garbage(text))),
        Err(End::Lost(text)) => drop(tell(Said::Lost(text))),
    }
}

fn is_data(item: &Item) -> bool {
    match item {
        Item::Frame(frame) => frame.command().is_data(),
        Item::Bulk(_) => true,
    }
}

fn may_be_first(command: Command) -> bool {
    matches!(command, Command::Hello | Command::Join | Command::Query | Command::Rejoin)
}

/// Up to the first frame about memory. `None`: nobody listens.
fn control(
    frames: &mut Frames,
    (ground, number): (&Ground, u64),
    tell: &dyn Fn(Said) -> bool,
) -> Result<Option<Item>, End> {
    loop {
        // Looked at before each wait: a source attaches them to a frame that follows an answer.
        frames.want_files(ground.takes_files(number));
        frames.take_large(ground.is_first(number));
        match frames.next()? {
            Item::Frame(frame) if !frame.command().is_data() => {
                let said = match frame.command() {
                    Command::Descriptors => Said::Files(frame, frames.take_files()),
                    _ => Said::Frame(frame),
                };
                if !tell(said) {
                    return Ok(None);
                }
            }
            item => return Ok(Some(item)),
        }
    }
}

/// From the first frame about memory on.
fn land(
    frames: &mut Frames,
    first: Item,
    (ground, number, target): (&Ground, u64, Arc<Target>),
    tell: &dyn Fn(Said) -> bool,
) -> Result<(), End> {
    let (layout, features) = (target.layout.clone(), target.features);
    // It does not keep memory that is given up.
    drop(target);
    frames.take_large(ground.is_first(number));
    let mut intake = Intake::new(&layout).with_page_sums(features.sums_pages());
    let (mut rooms, mut item) = (Rooms::default(), first);
    let place = || ground.target(number).ok_or_else(|| End::Garbage("memory out of place".to_owned()));
    loop {
        let said = match item {
            Item::Frame(frame) if !frame.command().is_data() => vec![Said::Frame(frame)],
            Item::Frame(frame) => about(frame, &mut intake, &place()?, &mut rooms)?,
            Item::Bulk(bulk) => {
                let (target, _) = place()?;
                if bulk.command() == Command::Packed && !features.contains(Features::LZ4) {
                    return Err(End::Garbage("compression was not agreed on".to_owned()));
                }
                target.barrier().take(bulk.pass(), bulk.range().length()).map_err(garbage)?;
                intake.bulk(&bulk).map_err(garbage)?;
                // Later, it is there.
                if let Some(ahead) = target.ahead.as_ref().filter(|_| bulk.pass() == 0) {
                    ahead.note(&layout, bulk.range());
                }
                put(frames, &target, &bulk, &mut rooms)?.into_iter().collect()
            }
        };
        for said in said {
            if !tell(said) {
                return Ok(());
            }
        }
        item = frames.next()?;
        if is_data(&item)
            && let Some(late) = ground.late(number)
        {
            return late.land(frames, (number, item), tell);
        }
    }
}

/// What the driver is to hear of a frame about memory that is not bulk.
fn about(
    frame: Frame,
    intake: &mut Intake<'_>,
    (target, index): &(Arc<Target>, u16),
    rooms: &mut Rooms,
) -> Result<Vec<Said>, End> {
    let said = match Message::decode(frame).map_err(garbage)? {
        Message::Zero(zero) => {
            target.barrier().take(zero.pass, zero.range.length()).map_err(garbage)?;
            intake.zero(zero).map_err(garbage)?;
            clear(&target.memory, zero, &mut rooms.arrived).err().map(Said::Failed)
        }
        Message::Absent(absent) => {
            target.barrier().take(absent.pass, absent.range.length()).map_err(garbage)?;
            intake.absent(absent).map_err(garbage)?;
            target.leave_out(absent)
        }
        Message::Sums(sums) => {
            intake.sums(&sums).map_err(garbage)?;
            let found = match slice(&target.memory, sums.range.gpa(), sums.range.length()) {
                Ok(landed) => page_sums(&landed),
                Err(error) => return Ok(vec![Said::Failed(cannot(&error))]),
            };
            return Ok(sums.damaged(&found).into_iter().map(Said::Damaged).collect());
        }
        Message::Mark(mark) => {
            intake.mark(mark).map_err(garbage)?;
            let all = target.barrier().mark(*index, mark.last).map_err(garbage)?;
            all.then_some(Said::Landed { pass: mark.pass, last: mark.last })
        }
        other => Some(Said::Garbage(format!("{:?} is not for this", other.command()))),
    };
    Ok(said.into_iter().collect())
}

fn garbage(error: impl std::error::Error) -> End {
    End::Garbage(error.to_string())
}

/// Where contents are that do not go straight to where they belong.
#[derive(Default)]
struct Rooms {
    arrived: Vec<u8>,
    unpacked: Vec<u8>,
}

/// Puts contents where they belong: straight from the link, unless they have to be right, or have to become others, first.
fn put(frames: &mut Frames, target: &Target, bulk: &Bulk, rooms: &mut Rooms) -> Result<Option<Said>, End> {
    let (range, memory) = (bulk.range(), &target.memory);
    let is_packed = bulk.command() == Command::Packed;
    let has_sum = !target.features.contains(Features::UNCHECKED_MEMORY);
    let has_own = has_sum && (is_packed || !target.features.sums_pages());
    if !is_packed && !has_own {
        let place = match slice(memory, range.gpa(), range.length()) {
            Ok(place) => place,
            Err(error) => return Ok(Some(Said::Failed(cannot(&error)))),
        };
        if frames.contents_into(&place)? {
            return Ok(None);
        }
    }
    let Rooms { arrived, unpacked } = rooms;
    arrived.resize(bulk.length(), 0);
    frames.contents(arrived)?;
    if has_own && bulk.check(contents_checksum([arrived.as_slice()])).is_err() {
        return Ok(Some(Said::Damaged(range)));
    }
    let contents = if is_packed {
        // A range of one frame is short.
        unpacked.resize(usize::try_from(range.length()).unwrap_or_default(), 0);
        unpack(arrived, unpacked).map_err(garbage)?;
        unpacked
    } else {
        arrived
    };
    let written = memory.write_slice(contents, GuestAddress(range.gpa()));
    Ok(written.err().map(|error| Said::Failed(cannot(&error))))
}

/// Makes a range zero; pages that are so are not made.
fn clear(memory: &GuestRam, zero: Zero, buffer: &mut Vec<u8>) -> Result<(), Fault> {
    let zeros = [0; PAGE as usize];
    buffer.resize(zeros.len(), 0);
    let mut gpa = zero.range.gpa();
    while gpa < zero.range.end() {
        let page = buffer.get_mut(..zeros.len()).unwrap_or_default();
        memory.read_slice(page, GuestAddress(gpa)).map_err(|error| cannot(&error))?;
        if *page != zeros {
            memory.write_slice(&zeros, GuestAddress(gpa)).map_err(|error| cannot(&error))?;
        }
        gpa += PAGE;
    }
    Ok(())
}

fn cannot(error: &dyn std::error::Error) -> Fault {
    Fault::new(Reason::Failed, &format!("guest memory: {error}"))
}

#[cfg(test)]
#[cfg(feature = "compression")]
mod packed_tests {
    use std::cell::RefCell;
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use vmm_migration_protocol::{Packer, Region};

    use super::*;

    /// What a connection says that sends these frames, its end, and the guest's first page then.
    fn said(bytes: &[u8], packed: bool) -> (Vec<Said>, String, Vec<u8>) {
        let length = 4 * PAGE;
        let memory =
            Arc::new(GuestRam::from_ranges(&[(GuestAddress(0), usize::try_from(length).unwrap())]).unwrap());
        let layout = MemoryLayout::new(vec![Region { gpa: 0, length, zone: "mem0".into() }]).unwrap();
        let ground = Ground::default();
        let features = if packed { Features::LZ4 } else { Features::NONE };
        ground.open(Arc::clone(&memory), layout, (1, 1), features, None);
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        ours.write_all(bytes).unwrap();
        drop(ours);
        let mut frames = Frames::of(&Arc::new(Socket::Unix(theirs)));
        let said = RefCell::new(Vec::new());
        let tell = |what: Said| {
            said.borrow_mut().push(what);
            true
        };
        let (first, target) = (frames.next().unwrap(), ground.target(1).unwrap().0);
        let end = land(&mut frames, first, (&ground, 1, target), &tell).unwrap_err();
        let mut page = vec![0; usize::try_from(PAGE).unwrap()];
        memory.read_slice(&mut page, GuestAddress(0)).unwrap();
        (said.into_inner(), format!("{end:?}"), page)
    }

    fn frame(contents: &[u8], checksum: u32, length: u64) -> Vec<u8> {
        let range = MemoryRange::new(0, length).unwrap();
        let bulk = Bulk::packed(range, 0, checksum, contents.len()).unwrap();
        [&bulk.header()[..], contents].concat()
    }

    #[test]
    fn compressed_memory_lands_where_that_was_agreed_on_and_as_much_as_was_announced() {
        let page = vec![7; usize::try_from(PAGE).unwrap()];
        let packed = Packer::new().pack(&page).unwrap().to_vec();
        let checksum = contents_checksum([&packed[..]]);
        let whole = frame(&packed, checksum, PAGE);
        let nothing = vec![0; page.len()];

        let (told, end, landed) = said(&whole, true);
        assert!(told.is_empty() && end.contains("closed the connection"), "{told:?} {end}");
        assert!(landed == page);

        let (told, end, landed) = said(&whole, false);
        assert!(told.is_empty() && end.contains("not agreed on"), "{told:?} {end}");
        assert!(landed == nothing);

        let (_, end, landed) = said(&frame(&packed, checksum, 2 * PAGE), true);
        assert!(end.contains("become 4096 bytes, the range has 8192"), "{end}");
        assert!(landed == nothing);

        let garbage = vec![0xff; 99];
        let (_, end, landed) = said(&frame(&garbage, contents_checksum([&garbage[..]]), PAGE), true);
        assert!(end.starts_with("Garbage"), "{end}");
        assert!(landed == nothing);

        // Damaged on the way: it is asked for again.
        let (told, _, landed) = said(&frame(&packed, checksum ^ 1, PAGE), true);
        assert!(matches!(told[..], [Said::Damaged(range)] if range.length() == PAGE), "{told:?}");
        assert!(landed == nothing);
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::sync::mpsc::{Receiver, channel};
    use std::thread::JoinHandle;

    use vm_memory::GuestMemoryBackend;
    use vmm_migration_protocol::{Mark, Region, Sums, page_checksum};

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
}
