//! The threads that send what is owed: one all of it, one what the guest waits for.

use std::io::{ErrorKind, Write};
use std::net::Shutdown;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::time::{Duration, Instant};

use vmm_memory_manager::source::GuestMemorySource;
use vmm_migration_protocol::{
    Fault, Features, Frame, Item, MemoryRange, Message, Output, Packer, Reason, SourceInput, Zero,
};
use vmm_snapshot::directory::MemorySource;

use super::owed::Owed;
use crate::exit::chain;
use crate::migration::inputs::Answers;
use crate::migration::link::{End, Frames, Socket};
use crate::migration::pace::Pace;
use crate::migration::sender::{PATIENCE, STALLED, bulk, runs};

/// Bytes of memory that are read and sent at once, at most: what the guest waits for comes after no more.
const RUN: u64 = 256 << 10;

/// What goes on connection 0.
#[derive(Debug)]
pub(super) enum Out {
    Frame(Frame),
    /// All that is owed.
    Push,
    /// Nothing more comes.
    Close,
}

/// Writes a connection.
pub(super) struct Quill {
    pub(super) socket: Arc<Socket>,
    pub(super) memory: Arc<GuestMemorySource>,
    /// It is to end as soon as it can.
    pub(super) stop: Arc<AtomicBool>,
    /// Bytes on the link.
    pub(super) sent: Arc<AtomicU64>,
    /// The number that memory carries.
    pub(super) pass: u32,
    pub(super) features: Features,
    /// Where memory goes compressed.
    pub(super) packer: Option<Packer>,
}

impl Quill {
    /// The pages of `run`, which are of one region.
    fn memory(&mut self, run: &Range<u64>) -> Result<(), Fault> {
        let unreadable = |what: &str| Fault::new(Reason::Failed, &format!("guest memory: {what}"));
        let within = |region: &usize| {
            let gpa = self.memory.gpa(*region).unwrap_or(u64::MAX);
            run.start >= gpa && run.end - gpa <= self.memory.size(*region).unwrap_or(0)
        };
        let count = self.memory.places().len();
        let region = (0..count).find(within).ok_or_else(|| unreadable("there is none"))?;
        let offset = run.start - self.memory.gpa(region).unwrap_or(0);
        let mut buffer = vec![0; usize::try_from(run.end - run.start).unwrap_or(0)];
        self.memory.read(region, offset, &mut buffer).map_err(|error| unreadable(&error.to_string()))?;
        // The guest stands still here, and no sums follow.
        let features = self.features.common(Features::UNCHECKED_MEMORY);
        let mut gpa = run.start;
        for part in runs(&buffer) {
            let range = MemoryRange::new(gpa, part.bytes.len() as u64).map_err(|error| failed(&error))?;
            gpa = range.end();
            if part.zero {
                let zero = Message::Zero(Zero { range, pass: self.pass });
                self.frame(&zero.encode().map_err(|error| failed(&error))?)?;
                continue;
            }
            let mut packer = self.packer.take();
            let (bulk, contents) = bulk((range, self.pass), part.bytes, (features, packer.as_mut()))
                .map_err(|error| failed(&error))?;
            self.write(&bulk.header())?;
            self.write(contents)?;
            self.packer = packer;
        }
        Ok(())
    }

    fn frame(&self, frame: &Frame) -> Result<(), Fault> {
        self.write(&frame.encode())
    }

    fn write(&self, bytes: &[u8]) -> Result<(), Fault> {
        let lost = |text: &str| Fault::new(Reason::Lost, text);
        let (mut rest, mut since, mut socket) = (bytes, Instant::now(), &*self.socket);
        while !rest.is_empty() {
            match socket.write(rest) {
                Ok(0) => return Err(lost("the other end takes nothing any more")),
                Ok(count) => {
                    rest = rest.get(count..).unwrap_or_default();
                    since = Instant::now();
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    if self.stop.load(Ordering::SeqCst) || since.elapsed() >= STALLED {
                        return Err(lost("the other end takes nothing any more"));
                    }
                }
                Err(error) => return Err(lost(&error.to_string())),
            }
        }
        self.sent.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(())
    }
}

/// The thread of connection 0.
pub(super) struct Pusher<'a> {
    pub(super) quill: Quill,
    pub(super) owed: Arc<Owed>,
    pub(super) pace: &'a Pace,
    pub(super) queue: Receiver<Out>,
    pub(super) answers: Answers,
}

impl Pusher<'_> {
    pub(super) fn run(mut self) {
        while let Ok(out) = self.queue.recv() {
            match out {
                // Whoever reads the connection hears that it is gone.
                Out::Frame(frame) => drop(self.quill.frame(&frame)),
                Out::Push => {
                    let pushed = self.push();
                    let _ = self.answers.send(match &pushed {
                        Ok(_) => SourceInput::Done(Output::Nothing),
                        Err(fault) => SourceInput::Failed(fault.clone()),
                    });
                    if pushed.is_ok_and(|closed| closed) {
                        break;
                    }
                }
                Out::Close => break,
            }
        }
        self.quill.socket.shutdown(Shutdown::Write);
    }

    /// Sends all that is owed; whether nothing more is to come.
    fn push(&mut self) -> Result<bool, Fault> {
        while self.owed.bytes() > 0 {
            let until = self.pace.take(0);
            let wait = until.saturating_duration_since(Instant::now()).min(PATIENCE);
            if self.between(wait)? {
                return Ok(true);
            }
            if !wait.is_zero() {
                continue;
            }
            // Not before it may go: until then whoever asks for it gets it at once.
            let Some(run) = self.owed.take(0..u64::MAX, RUN) else { break };
            self.pace.take(run.end - run.start);
            self.quill.memory(&run)?;
        }
        Ok(false)
    }

    /// What the driver wants to be sent meanwhile, for so long; whether it is to end.
    fn between(&mut self, time: Duration) -> Result<bool, Fault> {
        let mut next = if time.is_zero() {
            self.queue.try_recv()
        } else {
            self.queue.recv_timeout(time).map_err(|error| match error {
                RecvTimeoutError::Timeout => TryRecvError::Empty,
                RecvTimeoutError::Disconnected => TryRecvError::Disconnected,
            })
        };
        loop {
            if self.quill.stop.load(Ordering::SeqCst) {
                return Err(Fault::new(Reason::Cancelled, "interrupted"));
            }
            match next {
                Ok(Out::Frame(frame)) => self.quill.frame(&frame)?,
                Ok(Out::Push) => {}
                Ok(Out::Close) | Err(TryRecvError::Disconnected) => return Ok(true),
                Err(TryRecvError::Empty) => return Ok(false),
            }
            next = self.queue.try_recv();
        }
    }
}

/// Sends what is asked for on this connection, at once, until it ends.
pub(super) fn serve(mut quill: Quill, mut frames: Frames, owed: &Owed, answers: &Answers) {
    let about = |text: &str| format!("the connection for wanted memory: {text}");
    let end = loop {
        let range = match frames.next().map(asked) {
            Ok(Ok(range)) if owed.covers(&range) => range,
            Ok(Ok(range)) => {
                let text = format!("{} bytes at {:#x} are not the guest's", range.length(), range.gpa());
                break SourceInput::Garbage(about(&text));
            }
            Ok(Err(text)) | Err(End::Garbage(text)) => break SourceInput::Garbage(about(&text)),
            Err(End::Lost(text)) => break SourceInput::Lost(about(&text)),
        };
        // What is not owed any more is on its way.
        let mut sent = Ok(());
        while let (Ok(()), Some(run)) = (&sent, owed.take(range.gpa()..range.end(), RUN)) {
            sent = quill.memory(&run);
        }
        if let Err(fault) = sent {
            break SourceInput::Lost(about(fault.text()));
        }
    };
    let _ = answers.send(end);
}

/// What a frame asks for.
fn asked(item: Item) -> Result<MemoryRange, String> {
    match item {
        Item::Frame(frame) => match Message::decode(frame) {
            Ok(Message::Want(range)) => Ok(range),
            Ok(other) => Err(format!("{} frame", other.command())),
            Err(error) => Err(error.to_string()),
        },
        Item::Bulk(_) => Err("memory comes the wrong way".to_owned()),
    }
}

fn failed(error: &dyn std::error::Error) -> Fault {
    Fault::new(Reason::Failed, &chain(error))
}

#[cfg(test)]
pub(in crate::migration) mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;
    use std::sync::mpsc::channel;

    use vm_memory::{Bytes, GuestAddress};
    use vmm_hypervisor::fake::Fake;
    use vmm_hypervisor::{Hypervisor, VmOptions};
    use vmm_memory_manager::map::MemoryMap;
    use vmm_memory_manager::zone::{ZoneConfig, ZoneOptions};
    use vmm_migration_protocol::{Decoder, MemoryLayout, PAGE, Region};

    use super::*;
    use crate::migration::inputs::inputs;

    /// Long: only for what hangs.
    pub(in crate::migration) const LIMIT: Duration = Duration::from_secs(60);
    const SIZE: u64 = 1 << 20;

    pub(in crate::migration) fn map() -> MemoryMap {
        let vm = Fake::new().create_vm(&VmOptions { ioapic_pins: 24, tss_address: 0 }).unwrap();
        let options = ZoneOptions::default();
        let zone =
            ZoneConfig { id: "z".into(), size: SIZE, file: None, shared: false, huge_page: None, options };
        let map = MemoryMap::create(vm, &[zone], 40).unwrap();
        (1..9).for_each(|page| map.memory().write_obj(page as u8, GuestAddress(page * PAGE)).unwrap());
        map
    }

    /// A source that owes pages 0 to 8.
    pub(in crate::migration::postcopy) fn owing() -> Arc<Owed> {
        let layout = MemoryLayout::new(vec![Region { gpa: 0, length: SIZE, zone: "z".into() }]);
        let owed = Owed::none(layout.unwrap());
        owed.set(&vec![std::iter::once(0..9 * PAGE).collect()]);
        Arc::new(owed)
    }

    fn quill(map: &MemoryMap, socket: UnixStream) -> Quill {
        Quill {
            socket: Arc::new(Socket::Unix(socket)),
            memory: Arc::new(map.source().unwrap()),
            stop: Arc::default(),
            sent: Arc::default(),
            pass: 2,
            features: Features::NONE,
            packer: None,
        }
    }

    /// The ranges of all that came, with the first byte of each.
    pub(in crate::migration::postcopy) fn arrived(bytes: &[u8]) -> Vec<(u64, u64, u8)> {
        let (mut rest, mut decoder, mut found) = (bytes, Decoder::new(), Vec::new());
        while !rest.is_empty() {
            match decoder.push(&mut rest).unwrap() {
                Some(Item::Bulk(bulk)) => {
                    found.push((bulk.range().gpa() / PAGE, bulk.range().length() / PAGE, rest[0]));
                    assert_eq!(bulk.pass(), 2);
                    rest = &rest[bulk.length()..];
                }
                Some(Item::Frame(frame)) => match Message::decode(frame).unwrap() {
                    Message::Zero(zero) => {
                        found.push((zero.range.gpa() / PAGE, zero.range.length() / PAGE, 0));
                    }
                    other => panic!("{other:?}"),
                },
                None => {}
            }
        }
        found
    }

    /// What a destination gets that asks for these, and why nobody listens to it any more.
    fn asked_for(owed: &Owed, wants: &[(u64, u64)], rest: &[u8]) -> (Vec<(u64, u64, u8)>, SourceInput) {
        let map = map();
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        for (page, pages) in wants {
            let range = MemoryRange::new(page * PAGE, pages * PAGE).unwrap();
            ours.write_all(&Message::Want(range).encode().unwrap().encode()).unwrap();
        }
        ours.write_all(rest).unwrap();
        ours.shutdown(Shutdown::Write).unwrap();
        let (answers, told) = inputs();
        let quill = quill(&map, theirs);
        let frames = Frames::of(&quill.socket);
        serve(quill, frames, owed, &answers);
        let mut bytes = Vec::new();
        ours.read_to_end(&mut bytes).unwrap();
        (arrived(&bytes), told.recv_timeout(LIMIT).unwrap())
    }

    #[test]
    fn what_is_wanted_comes_once_and_nothing_else_does() {
        let owed = owing();
        // Again, and what was never owed.
        let (came, end) = asked_for(&owed, &[(3, 1), (3, 1), (0, 2), (0, 5), (20, 4)], b"");
        assert_eq!(came, [(3, 1, 3), (0, 1, 0), (1, 1, 1), (2, 1, 2), (4, 1, 4)]);
        assert!(matches!(&end, SourceInput::Lost(text) if text.contains("wanted memory")), "{end:?}");
        assert_eq!(owed.bytes(), 4 * PAGE);
        // All there is, and after the end nothing.
        let (came, _) = asked_for(&owed, &[(0, SIZE / PAGE), (0, SIZE / PAGE)], b"");
        assert_eq!(came, [(5, 4, 5)]);
        assert_eq!(asked_for(&owed, &[(5, 1)], b"").0, []);
    }

    #[test]
    fn who_asks_for_what_is_not_the_guests_is_not_listened_to() {
        let wrong = Message::Committed(vmm_migration_protocol::SessionId([0; 16])).encode().unwrap().encode();
        for (wants, rest, words) in [
            (vec![(SIZE / PAGE, 1), (1, 1)], &b""[..], "are not the guest's"),
            (vec![(SIZE / PAGE - 1, 2), (1, 1)], b"", "are not the guest's"),
            (vec![], &wrong, "Committed frame"),
            (vec![], &[0xff; 64], "wanted memory"),
        ] {
            let owed = owing();
            let (came, end) = asked_for(&owed, &wants, rest);
            assert!(came.is_empty(), "{came:?}");
            assert!(matches!(&end, SourceInput::Garbage(text) if text.contains(words)), "{end:?}");
            assert_eq!(owed.bytes(), 9 * PAGE);
        }
    }

    /// What comes of a push, with `stop` set or not, and what is said of it.
    fn pushed(owed: &Arc<Owed>, stop: bool) -> (Vec<(u64, u64, u8)>, SourceInput) {
        let map = map();
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let (queue, queued) = channel();
        let (answers, told) = inputs();
        let (quill, pace) = (quill(&map, theirs), Pace::default());
        quill.stop.store(stop, Ordering::SeqCst);
        queue.send(Out::Push).unwrap();
        let answer = std::thread::scope(|scope| {
            let pusher = Pusher { quill, owed: Arc::clone(owed), pace: &pace, queue: queued, answers };
            scope.spawn(move || pusher.run());
            let answer = told.recv_timeout(LIMIT).unwrap();
            drop(queue);
            answer
        });
        let mut bytes = Vec::new();
        ours.read_to_end(&mut bytes).unwrap();
        (arrived(&bytes), answer)
    }

    #[test]
    fn all_that_is_owed_is_pushed_unless_somebody_interrupts() {
        let owed = owing();
        let (came, answer) = pushed(&owed, true);
        assert!(came.is_empty() && matches!(answer, SourceInput::Failed(_)), "{came:?} {answer:?}");
        let owed = owing();
        assert!(owed.take(2 * PAGE..3 * PAGE, PAGE).is_some());
        let (came, answer) = pushed(&owed, false);
        assert_eq!(came, [(0, 1, 0), (1, 1, 1), (3, 6, 3)]);
        assert!(matches!(answer, SourceInput::Done(_)) && owed.bytes() == 0, "{answer:?}");
    }

    #[test]
    fn what_waits_for_the_limit_of_bandwidth_is_there_for_who_asks() {
        let (map, owed, pace) = (map(), owing(), Pace::new(1));
        pace.take(1 << 20);
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (queue, queued) = channel();
        let (answers, told) = inputs();
        let (quill, before) = (quill(&map, theirs), owed.bytes());
        let stop = Arc::clone(&quill.stop);
        std::thread::scope(|scope| {
            let pusher = Pusher { quill, owed: Arc::clone(&owed), pace: &pace, queue: queued, answers };
            scope.spawn(move || pusher.run());
            // Who fails here ends it, too.
            let queue = queue;
            queue.send(Out::Push).unwrap();
            let said = Message::Ack(vmm_migration_protocol::Command::Commit).encode().unwrap();
            queue.send(Out::Frame(said)).unwrap();
            // Whoever says that has begun to push.
            (&ours).read_exact(&mut [0]).unwrap();
            assert_eq!(owed.bytes(), before);
            owed.replace(owed.pages());
            assert!(
                matches!(told.recv_timeout(LIMIT), Ok(SourceInput::Done(_))),
                "nothing is left to wait for"
            );
            stop.store(true, Ordering::SeqCst);
            drop(queue);
        });
    }
}
