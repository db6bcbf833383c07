//! The threads that write a source's connections: memory on all of them, frames on the first.

use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::net::Shutdown;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use vmm_memory_manager::source::GuestMemorySource;
use vmm_migration_protocol::{
    Absent, Bulk, Command, Fault, Features, Frame, FrameError, Mark, MemoryRange, Message, Output, PAGE,
    Packer, Reason, SourceInput, Sums, Zero, contents_checksum, page_checksum,
};
use vmm_snapshot::directory::MemorySource;

use super::LOOK;
use super::course::{Course, Piece};
use super::inputs::Answers;
use super::link::Socket;
use super::pace::Pace;
use super::straight::Batch;
use super::turn::Turn;
use super::vectors;
use crate::exit::chain;

/// How long one write waits for the link before the thread looks whether it is to end.
pub(super) const PATIENCE: Duration = Duration::from_millis(50);

/// A link that takes nothing for so long is lost.
pub(super) const STALLED: Duration = Duration::from_secs(10);

/// How long the peer is heard after the link has broken.
const LAST_WORDS: Duration = Duration::from_secs(1);

static ZERO_PAGE: [u8; PAGE as usize] = [0; PAGE as usize];

/// What is to be written.
#[derive(Debug)]
pub(super) enum Out {
    Frame(Frame),
    Pass(Arc<Course>),
    /// Further connections that carry memory from now on.
    Lanes(Vec<Lane>),
    /// Nothing more comes.
    Close,
}

/// What the driver and these threads share.
#[derive(Debug, Default)]
pub(super) struct Shared {
    /// The pass under way is to end between two frames.
    pub(super) interrupted: AtomicBool,
    /// The driver is at its end: the link need not take anything any more.
    pub(super) over: AtomicBool,
    /// Bytes of the pass on the link.
    pub(super) sent: AtomicU64,
    /// What was agreed on, before there is a pass.
    pub(super) features: OnceLock<Features>,
    /// How fast they may follow each other.
    pub(super) pace: Pace,
}

impl Shared {
    fn features(&self) -> Features {
        self.features.get().copied().unwrap_or_default()
    }

    fn is_unwanted(&self) -> bool {
        self.interrupted.load(Ordering::SeqCst) || self.over.load(Ordering::SeqCst)
    }
}

/// The end of a connection that is written to.
#[derive(Debug)]
pub(super) struct Pen {
    /// Which connection of the session it is.
    pub(super) index: u16,
    pub(super) socket: Arc<Socket>,
    pub(super) memory: Arc<GuestMemorySource>,
    pub(super) shared: Arc<Shared>,
    /// While memory goes compressed.
    pub(super) packer: Option<Packer>,
    /// Of the thread that writes.
    pub(super) turn: Turn,
    /// Why nothing more can be written.
    pub(super) broken: Option<String>,
}

/// The thread of connection 0.
#[derive(Debug)]
pub(super) struct Writer {
    pub(super) pen: Pen,
    /// The files of memory that is handed over, for the frame about them.
    pub(super) files: Vec<File>,
    pub(super) queue: Receiver<Out>,
    pub(super) answers: Answers,
    /// Disconnected when the connection has been read to its end.
    pub(super) read: Receiver<()>,
    pub(super) lanes: Vec<Lane>,
}

/// A further connection, as connection 0 sees it.
#[derive(Debug)]
pub(super) struct Lane {
    pub(super) work: Sender<Arc<Course>>,
    /// Its share of a pass has been sent, or cannot be.
    pub(super) done: Receiver<()>,
}

/// The thread of a further connection.
#[derive(Debug)]
pub(super) struct LaneWriter {
    pub(super) pen: Pen,
    pub(super) work: Receiver<Arc<Course>>,
    pub(super) done: Sender<()>,
    pub(super) answers: Answers,
}

impl Writer {
    pub(super) fn run(mut self) {
        while let Ok(out) = self.queue.recv() {
            match out {
                Out::Frame(frame) if frame.command() == Command::Descriptors => self.hand_over(&frame),
                Out::Frame(frame) => self.pen.write(&[&frame.encode()]),
                Out::Lanes(lanes) => self.lanes = lanes,
                Out::Pass(course) => {
                    let answer = match self.pass(&course) {
                        Ok(sent) => SourceInput::Done(sent),
                        Err(fault) => SourceInput::Failed(fault),
                    };
                    if self.pen.broken.is_some() {
                        self.hear_out();
                    }
                    let _ = self.answers.send(answer);
                }
                Out::Close => return self.pen.socket.shutdown(Shutdown::Write),
            }
        }
    }

    /// What the peer said before the link broke comes first. One that goes on saying something is not heard for ever.
    fn hear_out(&self) {
        let since = Instant::now();
        while self.read.recv_timeout(LOOK) == Err(RecvTimeoutError::Timeout) {
            if self.pen.shared.is_unwanted() || since.elapsed() >= LAST_WORDS {
                return self.pen.socket.shutdown(Shutdown::Both);
            }
        }
    }

    /// Writes a frame with the files of memory beside its first byte.
    fn hand_over(&mut self, frame: &Frame) {
        let (bytes, files) = (frame.encode(), std::mem::take(&mut self.files));
        let mut sent = 0;
        self.pen.try_write(|socket| socket.write_with(&bytes, &files).inspect(|count| sent = *count));
        self.pen.write(&[bytes.get(sent..).unwrap_or_default()]);
    }

    /// Sends a pass over all connections; gives how much that was.
    fn pass(&mut self, course: &Arc<Course>) -> Result<Output, Fault> {
        for lane in &self.lanes {
            // One that is gone is found by its answer.
            let _ = lane.work.send(Arc::clone(course));
        }
        let Self { pen, queue, lanes, .. } = self;
        pen.share(course, &mut |pen, time| frames_between(pen, queue, time));
        for lane in lanes {
            wait(lane, course, pen, queue);
        }
        course.check()?;
        Ok(Output::Sent { link: self.pen.shared.sent.load(Ordering::Relaxed), memory: course.described() })
    }
}

/// What a connection does between two frames of memory, for so long.
type Between<'a> = &'a mut dyn FnMut(&mut Pen, Duration);

/// Frames of the driver that are to go between those of memory, and those that come for so long.
fn frames_between(pen: &mut Pen, queue: &Receiver<Out>, time: Duration) {
    let mut next = if time.is_zero() { queue.try_recv().ok() } else { queue.recv_timeout(time).ok() };
    while let Some(out) = next {
        match out {
            Out::Frame(frame) => pen.write(&[&frame.encode()]),
            // A machine gives one step at a time, and closes after that.
            Out::Pass(_) | Out::Lanes(_) | Out::Close => {}
        }
        next = queue.try_recv().ok();
    }
}

/// Waits for a connection's share of the pass.
fn wait(lane: &Lane, course: &Course, pen: &mut Pen, queue: &Receiver<Out>) {
    loop {
        match lane.done.recv_timeout(PATIENCE) {
            Ok(()) => return,
            Err(RecvTimeoutError::Timeout) => frames_between(pen, queue, Duration::ZERO),
            Err(RecvTimeoutError::Disconnected) => {
                return course.stop(Fault::new(Reason::Failed, "a connection is gone"));
            }
        }
    }
}

impl LaneWriter {
    pub(super) fn run(mut self) {
        loop {
            let before = self.pen.broken.is_some();
            match self.work.recv_timeout(LOOK) {
                Ok(course) => {
                    self.pen.share(&course, &mut |_, time| std::thread::park_timeout(time));
                    self.look(before);
                    if self.done.send(()).is_err() {
                        return;
                    }
                }
                Err(RecvTimeoutError::Timeout) if !before && self.pen.socket.is_gone() => {
                    self.pen.broken = Some("the other end has closed it".to_owned());
                    self.look(before);
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    /// Without the connection there is no session.
    fn look(&self, was_broken: bool) {
        if let Some(text) = &self.pen.broken
            && !was_broken
            && !self.pen.shared.is_unwanted()
        {
            let _ = self.answers.send(SourceInput::Lost(format!("connection {}: {text}", self.pen.index)));
        }
    }
}

impl Pen {
    /// Sends a share of the memory, then Mark. Other connections take what this one does not.
    fn share(&mut self, course: &Course, between: Between<'_>) {
        if let Err(fault) = self.portions(course, between) {
            course.stop(fault);
        }
    }

    fn portions(&mut self, course: &Course, between: Between<'_>) -> Result<(), Fault> {
        self.packer = self.shared.features().contains(Features::LZ4).then(Packer::new);
        let (memory, summed) = (Arc::clone(&self.memory), self.shared.features().sums_pages());
        let (mut described, mut pieces, mut buffer) = (self.absent(course)?, Vec::new(), Vec::new());
        loop {
            course.take(&memory, &mut pieces).map_err(|error| unreadable(&error))?;
            if pieces.is_empty() {
                break;
            }
            let mut batch = Batch::default();
            for piece in &pieces {
                let lies = if self.goes_straight() {
                    memory.lying(piece.region, piece.range.clone()).map_err(|error| unreadable(&error))?
                } else {
                    None
                };
                match lies {
                    Some(lies) => batch.add(&memory, piece, &lies, (course, summed))?,
                    None => described += self.piece((piece, &mut buffer), course, between)?,
                }
            }
            described += self.batch(&batch, course, between)?;
            self.turn.give_way();
        }
        course.describe(described);
        self.message(Message::Mark(Mark { pass: course.number, last: course.last, bytes: described }))?;
        self.check(course)
    }

    /// Says what the destination is to be without, and gives the bytes of that.
    fn absent(&mut self, course: &Course) -> Result<u64, Fault> {
        let mut described = 0;
        for range in course.take_absent() {
            self.message(Message::Absent(Absent { range, pass: course.number }))?;
            self.check(course)?;
            described += range.length();
        }
        Ok(described)
    }

    /// Whether memory may change from the moment when it is looked at to when it is on the link, and the link takes it as it is.
    fn goes_straight(&self) -> bool {
        let features = self.shared.features();
        let unsummed = features.sums_pages() || features.contains(Features::UNCHECKED_MEMORY);
        unsummed && self.packer.is_none() && self.socket.plain().is_some()
    }

    /// Sends what is in `batch`, and gives the bytes described.
    fn batch(&mut self, batch: &Batch<'_>, course: &Course, between: Between<'_>) -> Result<u64, Fault> {
        let mut parts = batch.parts();
        let bytes = parts.iter().map(|part| part.len() as u64).sum();
        self.wait_for(bytes, course, between)?;
        let mut rest = parts.as_mut_slice();
        while !rest.is_empty() && self.broken.is_none() {
            let mut sent = 0;
            self.try_write(|socket| {
                let to = socket.plain().ok_or(ErrorKind::Unsupported)?;
                vectors::send(to, rest).inspect(|count| sent = *count)
            });
            let gone = vectors::skip(rest, sent);
            rest = rest.get_mut(gone..).unwrap_or_default();
        }
        self.shared.sent.fetch_add(bytes, Ordering::Relaxed);
        between(self, Duration::ZERO);
        self.check(course)?;
        Ok(batch.described())
    }

    /// Sends a part of a region by way of a buffer, and gives the bytes described.
    fn piece(
        &mut self,
        (piece, buffer): (&Piece, &mut Vec<u8>),
        course: &Course,
        between: Between<'_>,
    ) -> Result<u64, Fault> {
        let Piece { region, range } = piece;
        let gpa = self.memory.gpa(*region).ok_or_else(|| unreadable(&ErrorKind::NotFound.into()))?;
        buffer.resize(usize::try_from(range.end - range.start).unwrap_or_default(), 0);
        self.memory.read(*region, range.start, buffer).map_err(|error| unreadable(&error))?;
        let (mut gpa, mut described) = (gpa + range.start, 0);
        for run in runs(buffer) {
            let length = run.bytes.len() as u64;
            let range = MemoryRange::new(gpa, length).map_err(|error| failed(&error))?;
            gpa += length;
            // Memory that was never sent is zero.
            if run.zero && course.all {
                continue;
            }
            described += length;
            if run.zero {
                self.message(Message::Zero(Zero { range, pass: course.number }))?;
            } else {
                let mut packer = self.packer.take();
                let features = self.shared.features();
                let (bulk, contents) = bulk((range, course.number), run.bytes, (features, packer.as_mut()))
                    .map_err(|error| failed(&error))?;
                self.wait_for(contents.len() as u64, course, between)?;
                self.counted(&[&bulk.header(), contents]);
                self.packer = packer;
                if features.sums_pages() && bulk.command() == Command::Memory {
                    let sums = run.bytes.chunks(ZERO_PAGE.len()).map(page_checksum);
                    let (pass, sums) = (course.number, sums.collect());
                    self.message(Message::Sums(Sums { range, pass, sums }))?;
                }
            }
            between(self, Duration::ZERO);
            self.check(course)?;
        }
        Ok(described)
    }

    /// Waits until the limit of bandwidth lets so many bytes go; frames do not wait.
    fn wait_for(&mut self, bytes: u64, course: &Course, between: Between<'_>) -> Result<(), Fault> {
        let until = self.shared.pace.take(bytes);
        loop {
            let rest = until.saturating_duration_since(Instant::now());
            if rest.is_zero() {
                return Ok(());
            }
            between(self, rest.min(PATIENCE));
            self.check(course)?;
        }
    }

    fn check(&self, course: &Course) -> Result<(), Fault> {
        if self.broken.is_some() {
            return Err(Fault::new(Reason::Failed, "the link takes nothing any more"));
        }
        if self.shared.is_unwanted() {
            return Err(Fault::new(Reason::Cancelled, "interrupted"));
        }
        course.check()
    }

    fn message(&mut self, message: Message) -> Result<(), Fault> {
        let frame = message.encode().map_err(|error| failed(&error))?;
        self.counted(&[&frame.encode()]);
        Ok(())
    }

    fn counted(&mut self, parts: &[&[u8]]) {
        self.write(parts);
        let bytes = parts.iter().map(|part| part.len() as u64).sum();
        self.shared.sent.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Writes parts of one frame. A link that does not take them is broken: what it has of the frame is of no use.
    fn write(&mut self, parts: &[&[u8]]) {
        for part in parts {
            let mut rest = *part;
            while !rest.is_empty() && self.broken.is_none() {
                self.try_write(|mut socket| {
                    let count = socket.write(rest)?;
                    rest = rest.get(count..).unwrap_or_default();
                    Ok(count)
                });
            }
        }
    }

    /// Writes once, as soon as the link takes something.
    fn try_write(&mut self, mut write: impl FnMut(&Socket) -> io::Result<usize>) {
        let since = Instant::now();
        while self.broken.is_none() {
            match write(&self.socket) {
                Ok(0) => self.give_up(),
                Ok(_) => return,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    if self.shared.is_unwanted() || since.elapsed() >= STALLED {
                        self.give_up();
                    }
                }
                // The peer may have said why before it closed: reading goes on to the end.
                Err(error) => self.broken = Some(error.to_string()),
            }
        }
    }

    fn give_up(&mut self) {
        self.broken = Some("the other end takes nothing any more".to_owned());
        if self.index == 0 {
            // It will not end the stream either, which is read.
            self.socket.shutdown(Shutdown::Both);
        }
    }
}

/// The beginning of a frame with these bytes of memory, and its contents: smaller, if a packer makes them so.
pub(super) fn bulk<'a>(
    (range, pass): (MemoryRange, u32),
    bytes: &'a [u8],
    (features, packer): (Features, Option<&'a mut Packer>),
) -> Result<(Bulk, &'a [u8]), FrameError> {
    let has_sum = !features.contains(Features::UNCHECKED_MEMORY);
    let sum = |has_own: bool, bytes| if has_own { contents_checksum([bytes]) } else { 0 };
    match packer.and_then(|packer| packer.pack(bytes)) {
        Some(packed) => Ok((Bulk::packed(range, pass, sum(has_sum, packed), packed.len())?, packed)),
        None => {
            let has_own = has_sum && !features.sums_pages();
            Ok((Bulk::memory(range, pass, sum(has_own, bytes))?, bytes))
        }
    }
}

/// Pages next to each other that are all zero, or all not.
pub(super) struct Run<'a> {
    pub(super) zero: bool,
    pub(super) bytes: &'a [u8],
}

/// The runs of whole pages.
pub(super) fn runs(bytes: &[u8]) -> Vec<Run<'_>> {
    let is_zero = |page: &[u8]| *page == ZERO_PAGE;
    let (mut runs, mut start) = (Vec::new(), 0);
    let mut before: Option<bool> = None;
    for (number, page) in bytes.chunks(ZERO_PAGE.len()).enumerate() {
        let zero = is_zero(page);
        let at = number * ZERO_PAGE.len();
        if let Some(before) = before.filter(|before| *before != zero) {
            runs.push(Run { zero: before, bytes: bytes.get(start..at).unwrap_or_default() });
            start = at;
        }
        before = Some(zero);
    }
    if let Some(zero) = before {
        runs.push(Run { zero, bytes: bytes.get(start..).unwrap_or_default() });
    }
    runs
}

pub(super) fn unreadable(error: &io::Error) -> Fault {
    Fault::new(Reason::Failed, &format!("guest memory: {error}"))
}

pub(super) fn failed(error: &dyn std::error::Error) -> Fault {
    Fault::new(Reason::Failed, &chain(error).to_string())
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;
    use std::sync::mpsc::channel;

    use super::*;
    use crate::migration::inputs::inputs;
    use crate::migration::postcopy::pushing::tests::{LIMIT, map};

    #[test]
    fn a_peer_that_takes_nothing_and_goes_on_talking_is_not_heard_for_ever() {
        for interrupted in [false, true] {
            let (map, (answers, told), (queue, queued)) = (map(), inputs(), channel());
            let (ours, theirs) = UnixStream::pair().unwrap();
            theirs.shutdown(Shutdown::Read).unwrap();
            // Whoever reads the connection does so all the time.
            let (_reads, read) = channel();
            let pen = Pen {
                index: 0,
                socket: Arc::new(Socket::Unix(ours)),
                memory: Arc::new(map.source().unwrap()),
                shared: Arc::default(),
                packer: None,
                turn: Turn::new(),
                broken: None,
            };
            let (socket, shared) = (Arc::clone(&pen.socket), Arc::clone(&pen.shared));
            socket.set_timeouts(Some(LIMIT), None).unwrap();
            let writer = Writer { pen, files: Vec::new(), queue: queued, answers, read, lanes: Vec::new() };
            queue.send(Out::Pass(Arc::new(Course::new(1, None, false)))).unwrap();
            shared.interrupted.store(interrupted, Ordering::SeqCst);
            let thread = std::thread::spawn(move || writer.run());
            let answer = told.recv_timeout(LIMIT);
            assert!(matches!(answer, Ok(SourceInput::Failed(_))), "{answer:?}");
            assert_eq!((&*socket).read(&mut [0]).unwrap(), 0, "who reads it comes to the end");
            drop(queue);
            thread.join().unwrap();
        }
    }

    #[test]
    fn zero_pages_are_told_from_others() {
        let mut bytes = vec![0; 5 * ZERO_PAGE.len()];
        bytes[2 * ZERO_PAGE.len() + 9] = 1;
        bytes[4 * ZERO_PAGE.len() - 1] = 1;
        let found: Vec<_> =
            runs(&bytes).iter().map(|run| (run.zero, run.bytes.len() / ZERO_PAGE.len())).collect();
        assert_eq!(found, [(true, 2), (false, 2), (true, 1)]);
        assert!(runs(&[]).is_empty());
    }
}
