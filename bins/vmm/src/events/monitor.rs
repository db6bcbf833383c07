//! The thread `event-monitor`: writes the contract's events where the user wants them.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmm_api::events::Journal;
use vmm_device_model::thread::{self, ThreadHook};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::pace::{Line, Pace};
use crate::sandbox::MONITOR_THREAD;
use crate::signals;

/// How long the last events may take at the end.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// How long the thread is waited for. Only a file system that hangs makes it late: then it is left behind.
const JOIN: Duration = Duration::from_secs(2);
/// When a write is tried again where nothing tells that it would work.
const RETRY: Duration = Duration::from_millis(100);

/// Where the events go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MonitorTarget {
    /// A file, made if it is not there, a FIFO, or a device.
    Path(PathBuf),
    /// A descriptor that was inherited under this number, above standard error's.
    Fd(i32),
}

/// The event monitor cannot be set up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MonitorError {
    /// The path cannot be opened.
    #[error("cannot open the event monitor {}", .path.display())]
    Open {
        /// The path.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The descriptor is not one that was passed, or cannot be used.
    #[error("cannot take descriptor {fd} as the event monitor")]
    Descriptor {
        /// Its number.
        fd: i32,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A kernel object or the thread cannot be made.
    #[error("cannot {what} for the event monitor")]
    Start {
        /// What was attempted.
        what: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// A running event monitor. Dropped, it writes what is left, for a bounded time.
#[derive(Debug)]
pub struct Monitor {
    stop: EventFd,
    /// Hung up when the thread has ended.
    ended: Receiver<()>,
    thread: Option<JoinHandle<()>>,
}

impl Monitor {
    /// Writes what is pushed into `journal` to the target, on a thread that begins with `threads`.
    ///
    /// # Errors
    /// The target cannot be opened, or the thread not started.
    pub fn start(
        target: &MonitorTarget,
        journal: Journal,
        threads: &Arc<dyn ThreadHook>,
    ) -> Result<Self, MonitorError> {
        Self::on(open(target)?, journal, threads)
    }

    fn on(out: File, journal: Journal, threads: &Arc<dyn ThreadHook>) -> Result<Self, MonitorError> {
        let fail = |what| move |source| MonitorError::Start { what, source };
        let event = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(fail("create an eventfd"));
        let (ready, stop) = (event()?, event()?);
        let epoll = Epoll::new().map_err(fail("create an epoll instance"))?;
        for fd in [ready.as_raw_fd(), stop.as_raw_fd()] {
            watch(&epoll, fd, EventSet::IN).map_err(fail("watch an eventfd"))?;
        }
        let (alive, ended) = channel();
        let stop_seen = stop.try_clone().map_err(fail("clone an eventfd"))?;
        let writer = Writer {
            journal,
            next: 1,
            pace: Pace::new(),
            line: Vec::new(),
            sent: 0,
            out,
            complained: false,
            epoll,
            ready: Arc::new(ready),
            stop: stop_seen,
            _alive: alive,
        };
        let thread = thread::spawn(threads, MONITOR_THREAD, "event-monitor", move || writer.run());
        let thread = thread.map_err(fail("start the thread"))?;
        Ok(Self { stop, ended, thread: Some(thread) })
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        let _ = self.stop.write(1);
        let late = self.ended.recv_timeout(JOIN) == Err(RecvTimeoutError::Timeout);
        match self.thread.take() {
            Some(_) if late => log::warn!("the event monitor is stuck in a write"),
            Some(thread) => {
                let _ = thread.join();
            }
            None => {}
        }
    }
}

/// Opened for both directions, a FIFO needs no reader: opening does not wait for one, writing does not fail for want of
/// one, and what is written is kept for the next.
fn open(target: &MonitorTarget) -> Result<File, MonitorError> {
    match target {
        MonitorTarget::Path(path) => {
            let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(true).mode(0o600).custom_flags(flags);
            options.open(path).map_err(|source| MonitorError::Open { path: path.clone(), source })
        }
        MonitorTarget::Fd(fd) => {
            let descriptor = signals::inherited(*fd).and_then(|fd| {
                signals::write_without_blocking(&fd)?;
                Ok(fd)
            });
            descriptor.map(File::from).map_err(|source| MonitorError::Descriptor { fd: *fd, source })
        }
    }
}

fn watch(epoll: &Epoll, fd: RawFd, events: EventSet) -> io::Result<()> {
    epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events, 0))
}

struct Writer {
    /// Of packed lines.
    journal: Journal,
    /// Number of the next event.
    next: u64,
    pace: Pace,
    /// The line that is being written.
    line: Vec<u8>,
    /// Bytes of it that are written.
    sent: usize,
    out: File,
    /// An error or a loss was logged.
    complained: bool,
    epoll: Epoll,
    ready: Arc<EventFd>,
    stop: EventFd,
    _alive: Sender<()>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Nothing can be done until the next event.
    Idle,
    /// The reader is behind.
    Blocked,
}

impl Writer {
    fn run(mut self) {
        // Once stopped: when it is over at the latest.
        let mut end: Option<Instant> = None;
        loop {
            let state = self.drain();
            if end.is_some_and(|end| state == State::Idle || Instant::now() >= end) {
                return;
            }
            self.wait(state, end);
            if end.is_none() && self.stop.read().is_ok() {
                end = Some(Instant::now() + LAST_WORDS);
                self.pace.release();
            }
        }
    }

    /// Writes what there is, a line at a time: what a slow reader makes wait stays in the journal, which is bounded.
    fn drain(&mut self) -> State {
        while self.take_line() {
            match self.out.write(self.line.get(self.sent..).unwrap_or_default()) {
                Ok(count) => self.sent = self.sent.saturating_add(count),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return State::Blocked,
                Err(error) => {
                    self.complain(format_args!("cannot be written, events are lost: {error}"));
                    // The reader has gone, or the disk is full. What was begun is ended once it can be; what was not is
                    // lost.
                    if self.sent > 0 {
                        return State::Idle;
                    }
                    self.line.clear();
                }
            }
        }
        State::Idle
    }

    /// Whether there is a line to write, or the rest of one.
    fn take_line(&mut self) -> bool {
        if self.sent < self.line.len() {
            return true;
        }
        self.line.clear();
        self.sent = 0;
        loop {
            if let Some(line) = self.pace.next(Instant::now()) {
                self.line = line;
                return true;
            }
            let mut packed = Vec::new();
            let taken = self.journal.read(self.next, 0, &mut packed, Some(&self.ready));
            if taken.lost > 0 {
                self.complain(format_args!("has a slow reader, events are lost"));
                self.pace.leave_out(taken.lost);
            }
            self.next = taken.next;
            match Line::unpack(&packed) {
                Some(line) => self.pace.take(line),
                None => return false,
            }
        }
    }

    fn complain(&mut self, what: fmt::Arguments<'_>) {
        if !std::mem::replace(&mut self.complained, true) {
            log::warn!("the event monitor {what}");
        }
    }

    /// Waits until there is something to do, `end` at the latest.
    fn wait(&self, state: State, end: Option<Instant>) {
        let fd = self.out.as_raw_fd();
        // Only now: of a reader that has gone epoll would tell again and again.
        let watched = state == State::Blocked && watch(&self.epoll, fd, EventSet::OUT).is_ok();
        // What blocks without being watchable is not known to exist.
        let blind = (state == State::Blocked && !watched).then_some(RETRY);
        let due = self.pace.due().filter(|_| state == State::Idle);
        let left = end.into_iter().chain(due).map(|end| end.saturating_duration_since(Instant::now()));
        let timeout = left.chain(blind).min();
        // Not before it is over.
        let millis = |time: Duration| time.as_millis().saturating_add(1);
        let timeout = timeout.map_or(-1, |time| i32::try_from(millis(time)).unwrap_or(i32::MAX));
        let mut events = [EpollEvent::default(); 3];
        let _ = self.epoll.wait(timeout, &mut events);
        let _ = self.ready.read();
        if watched {
            let _ = self.epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;

    use vmm_api::events::{Bounds, Event};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(30);

    /// A monitor that writes into a socket, whose room is no multiple of a line.
    fn monitor(journal: &Journal) -> (Monitor, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs.set_read_timeout(Some(LIMIT)).unwrap();
        let threads: Arc<dyn ThreadHook> = Arc::new(thread::Unconfined);
        (Monitor::on(File::from(OwnedFd::from(ours)), journal.clone(), &threads).unwrap(), theirs)
    }

    /// A line that says which it is at both ends.
    fn line(seq: u64) -> Vec<u8> {
        let packed = Line::of(Duration::ZERO, &Event::Paused).unwrap().packed();
        let start = packed.iter().position(|byte| *byte == b'{').unwrap();
        [&packed[..start], format!("{seq} {} {seq}\n", "x".repeat(3000)).as_bytes()].concat()
    }

    /// CPU time of the thread so far, in clock ticks of 10 ms.
    fn ticks() -> u64 {
        // Threads name themselves a moment after they began.
        let stat = std::iter::repeat_with(|| {
            std::fs::read_dir("/proc/self/task").unwrap().find_map(|task| {
                let stat = std::fs::read_to_string(task.unwrap().path().join("stat")).ok()?;
                stat.contains("(event-monitor)").then_some(stat)
            })
        });
        let stat = stat.flatten().next().unwrap();
        let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    }

    fn rests() {
        let before = ticks();
        std::thread::sleep(Duration::from_millis(400));
        let spent = ticks() - before;
        assert!(spent <= 3, "the thread was busy for {spent} of 40 ticks");
    }

    /// One test, for it counts the time of the one thread of this name.
    #[test]
    fn lines_are_whole_and_the_thread_rests_whatever_its_reader_does() {
        let journal = Journal::new(Bounds { events: 50, bytes: 1 << 20 });
        let (writer, mut reader) = monitor(&journal);
        (0..1000).for_each(|_| journal.push(line));
        rests();
        journal.push(line);
        let mut text = String::new();
        while !text.ends_with(" 1001\n") {
            let mut bytes = [0; 4096];
            let count = reader.read(&mut bytes).unwrap();
            assert!(count > 0, "it ended");
            text.push_str(std::str::from_utf8(&bytes[..count]).unwrap());
        }
        let whole = |text: &str| {
            let (first, last) = (text.split(' ').next().unwrap(), text.rsplit(' ').next().unwrap());
            assert!(first == last && text.len() > 3000, "{text}");
            first.parse::<u64>().unwrap()
        };
        let seen: Vec<u64> = text.lines().filter(|line| !line.contains("left-out")).map(whole).collect();
        assert!(seen.is_sorted_by(|a, b| a < b) && seen.len() < 1000, "{seen:?}");
        assert_eq!(seen[seen.len() - 50..], (952..=1001).collect::<Vec<_>>(), "the journal's are there");
        // The reader goes, in the middle of a line and between two.
        (0..200).for_each(|_| journal.push(line));
        rests();
        drop(reader);
        (0..200).for_each(|_| journal.push(line));
        rests();
        drop(writer);
        let (writer, reader) = monitor(&journal);
        drop(reader);
        (0..200).for_each(|_| journal.push(line));
        rests();
        drop(writer);
    }
}
