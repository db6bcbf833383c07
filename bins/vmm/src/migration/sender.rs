//! The thread that writes a source's connection: frames, and memory between them.

use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::net::Shutdown;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender};
use std::time::{Duration, Instant};

use vmm_memory_manager::dirty::Changed;
use vmm_memory_manager::source::GuestMemorySource;
use vmm_migration_protocol::{
    Bulk, Command, Fault, Frame, Mark, MemoryRange, Message, Output, PAGE, Reason, SourceInput, Zero,
    contents_checksum,
};
use vmm_snapshot::directory::{MemorySource, Place};

use super::link::Socket;
use super::pace::Pace;
use crate::exit::chain;

/// Bytes of memory that are read at a time. Small, so that frames come between and a checksum is of what is sent.
const CHUNK: u64 = 256 << 10;

/// How long one write waits for the link before the thread looks whether it is to end.
pub(super) const PATIENCE: Duration = Duration::from_millis(50);

/// A link that takes nothing for so long is lost.
const STALLED: Duration = Duration::from_secs(10);

static ZERO_PAGE: [u8; PAGE as usize] = [0; PAGE as usize];

/// What is to be written.
#[derive(Debug)]
pub(super) enum Out {
    Frame(Frame),
    Pass(Pass),
    /// Nothing more comes.
    Close,
}

/// A pass over memory.
#[derive(Debug)]
pub(super) struct Pass {
    pub(super) number: u32,
    /// `None`: all of it.
    pub(super) what: Option<Changed>,
    pub(super) last: bool,
}

/// What the driver and this thread share.
#[derive(Debug, Default)]
pub(super) struct Shared {
    /// The pass under way is to end between two frames.
    pub(super) interrupted: AtomicBool,
    /// The driver is at its end: the link need not take anything any more.
    pub(super) over: AtomicBool,
    /// Bytes of the pass on the link.
    pub(super) sent: AtomicU64,
    /// How fast they may follow each other.
    pub(super) pace: Pace,
}

/// The thread.
#[derive(Debug)]
pub(super) struct Writer {
    pub(super) socket: Arc<Socket>,
    pub(super) memory: GuestMemorySource,
    /// The files of memory that is handed over, for the frame about them.
    pub(super) files: Vec<File>,
    pub(super) queue: Receiver<Out>,
    pub(super) answers: Sender<SourceInput>,
    pub(super) shared: Arc<Shared>,
    /// Disconnected when the connection has been read to its end.
    pub(super) read: Receiver<()>,
    pub(super) broken: bool,
}

impl Writer {
    pub(super) fn run(mut self) {
        while let Ok(out) = self.queue.recv() {
            match out {
                Out::Frame(frame) if frame.command() == Command::Descriptors => self.hand_over(&frame),
                Out::Frame(frame) => self.write(&[&frame.encode()]),
                Out::Pass(pass) => {
                    let answer = match self.pass(&pass) {
                        Ok(bytes) => SourceInput::Done(Output::Bytes(bytes)),
                        Err(fault) => SourceInput::Failed(fault),
                    };
                    if self.broken {
                        // What the peer said before the link broke comes first.
                        let _ = self.read.recv();
                    }
                    let _ = self.answers.send(answer);
                }
                Out::Close => return self.socket.shutdown(Shutdown::Write),
            }
        }
    }

    /// Sends memory, then Mark; gives the bytes on the link.
    fn pass(&mut self, pass: &Pass) -> Result<u64, Fault> {
        self.shared.sent.store(0, Ordering::Relaxed);
        let places = self.memory.places();
        let mut described = 0_u64;
        match &pass.what {
            None => {
                for (number, place) in places.iter().enumerate() {
                    let mut at = 0;
                    while let Some(run) =
                        self.memory.next_data(number, at).map_err(|error| unreadable(&error))?
                    {
                        let run = run.start / PAGE * PAGE..run.end.next_multiple_of(PAGE).min(place.size);
                        at = run.end;
                        described += self.range((number, place), run, pass)?;
                    }
                }
            }
            Some(changed) => {
                for ((number, place), ranges) in places.iter().enumerate().zip(changed) {
                    for range in ranges {
                        described += self.range((number, place), range.clone(), pass)?;
                    }
                }
            }
        }
        let mark = Message::Mark(Mark { pass: pass.number, last: pass.last, bytes: described });
        self.message(mark)?;
        self.check()?;
        Ok(self.shared.sent.load(Ordering::Relaxed))
    }

    /// Sends a range of a region, and gives the bytes described.
    fn range(
        &mut self,
        (number, place): (usize, &Place),
        range: Range<u64>,
        pass: &Pass,
    ) -> Result<u64, Fault> {
        let (mut buffer, mut at, mut described) = (Vec::new(), range.start, 0);
        while at < range.end {
            let end = (at + 1).next_multiple_of(CHUNK).min(range.end);
            buffer.resize(usize::try_from(end - at).unwrap_or_default(), 0);
            self.memory.read(number, at, &mut buffer).map_err(|error| unreadable(&error))?;
            let mut gpa = place.gpa + at;
            for run in runs(&buffer) {
                let length = run.bytes.len() as u64;
                let range = MemoryRange::new(gpa, length).map_err(|error| failed(&error))?;
                gpa += length;
                // Memory that was never sent is zero.
                if run.zero && pass.what.is_none() {
                    continue;
                }
                described += length;
                if run.zero {
                    self.message(Message::Zero(Zero { range, pass: pass.number }))?;
                } else {
                    let checksum = contents_checksum([run.bytes]);
                    let bulk = Bulk::memory(range, pass.number, checksum).map_err(|error| failed(&error))?;
                    self.wait_for(length)?;
                    self.counted(&[&bulk.header(), run.bytes]);
                }
                self.between()?;
            }
            at = end;
        }
        Ok(described)
    }

    /// Waits until the limit of bandwidth lets so many bytes go; frames do not wait.
    fn wait_for(&mut self, bytes: u64) -> Result<(), Fault> {
        let until = self.shared.pace.take(bytes);
        loop {
            let rest = until.saturating_duration_since(Instant::now());
            if rest.is_zero() {
                return Ok(());
            }
            match self.queue.recv_timeout(rest.min(PATIENCE)) {
                Ok(Out::Frame(frame)) => self.write(&[&frame.encode()]),
                Ok(Out::Pass(_) | Out::Close) | Err(_) => {}
            }
            self.check()?;
        }
    }

    /// Frames that are to go between those of memory, and whether it goes on.
    fn between(&mut self) -> Result<(), Fault> {
        while let Ok(out) = self.queue.try_recv() {
            match out {
                Out::Frame(frame) => self.write(&[&frame.encode()]),
                // A machine gives one step at a time, and closes after that.
                Out::Pass(_) | Out::Close => {}
            }
        }
        self.check()
    }

    fn check(&self) -> Result<(), Fault> {
        if self.broken {
            return Err(Fault::new(Reason::Failed, "the link takes nothing any more"));
        }
        if self.shared.interrupted.load(Ordering::SeqCst) || self.shared.over.load(Ordering::SeqCst) {
            return Err(Fault::new(Reason::Cancelled, "interrupted"));
        }
        Ok(())
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

    /// Writes a frame with the files of memory beside its first byte.
    fn hand_over(&mut self, frame: &Frame) {
        let (bytes, files) = (frame.encode(), std::mem::take(&mut self.files));
        let mut sent = 0;
        self.try_write(|socket| socket.write_with(&bytes, &files).inspect(|count| sent = *count));
        self.write(&[bytes.get(sent..).unwrap_or_default()]);
    }

    /// Writes parts of one frame. A link that does not take them is broken: what it has of the frame is of no use.
    fn write(&mut self, parts: &[&[u8]]) {
        for part in parts {
            let mut rest = *part;
            while !rest.is_empty() && !self.broken {
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
        while !self.broken {
            match write(&self.socket) {
                Ok(0) => self.give_up(),
                Ok(_) => return,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    let unwanted = self.shared.interrupted.load(Ordering::SeqCst)
                        || self.shared.over.load(Ordering::SeqCst);
                    if unwanted || since.elapsed() >= STALLED {
                        self.give_up();
                    }
                }
                // The peer may have said why before it closed: reading goes on to the end.
                Err(_) => self.broken = true,
            }
        }
    }

    /// The peer takes nothing, and so will not end the stream either.
    fn give_up(&mut self) {
        self.broken = true;
        self.socket.shutdown(Shutdown::Both);
    }
}

/// Pages next to each other that are all zero, or all not.
struct Run<'a> {
    zero: bool,
    bytes: &'a [u8],
}

/// The runs of whole pages.
fn runs(bytes: &[u8]) -> Vec<Run<'_>> {
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

fn unreadable(error: &io::Error) -> Fault {
    Fault::new(Reason::Failed, &format!("guest memory: {error}"))
}

fn failed(error: &dyn std::error::Error) -> Fault {
    Fault::new(Reason::Failed, &chain(error).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

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
