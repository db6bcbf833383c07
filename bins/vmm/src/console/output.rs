//! The thread that writes a console's output out.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmm_platform_devices::output::{Drained, OutputRing};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::outlet::Outlet;
use super::sys::{self, Interest};

/// Bytes that wait for a slow reader, or for a client, before the oldest are lost.
const RING: usize = 256 << 10;
/// How long the last output may take when the console closes.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// How long the thread is waited for. Only a write that blocks in spite of all makes it late: then it is left behind.
const JOIN: Duration = Duration::from_secs(2);

/// Writes a ring out. Dropped, it writes what is left, for a bounded time.
#[derive(Debug)]
pub(super) struct OutputThread {
    stop: EventFd,
    /// Hung up when the thread has ended.
    ended: Receiver<()>,
    thread: Option<JoinHandle<()>>,
}

impl OutputThread {
    pub(super) fn start(name: &str, outlet: Outlet) -> io::Result<(Self, Arc<OutputRing>)> {
        let flags = EFD_NONBLOCK | EFD_CLOEXEC;
        let ready = Arc::new(EventFd::new(flags)?);
        let stop = EventFd::new(flags)?;
        let ring = OutputRing::new(RING, Arc::clone(&ready) as _);
        let (alive, ended) = channel();
        let stop_seen = stop.try_clone()?;
        let writer = Writer {
            ring: Arc::clone(&ring),
            ready,
            stop: stop_seen,
            outlet,
            complained: false,
            _alive: alive,
        };
        let thread = std::thread::Builder::new().name(format!("{name}-out")).spawn(move || writer.run())?;
        Ok((Self { stop, ended, thread: Some(thread) }, ring))
    }
}

impl Drop for OutputThread {
    fn drop(&mut self) {
        let _ = self.stop.write(1);
        let late = self.ended.recv_timeout(JOIN) == Err(RecvTimeoutError::Timeout);
        match self.thread.take() {
            Some(thread) if late => {
                log::warn!("thread {} is stuck in a write", thread.thread().name().unwrap_or_default());
            }
            Some(thread) => {
                let _ = thread.join();
            }
            None => {}
        }
    }
}

struct Writer {
    ring: Arc<OutputRing>,
    ready: Arc<EventFd>,
    stop: EventFd,
    outlet: Outlet,
    /// An error was logged.
    complained: bool,
    _alive: Sender<()>,
}

impl Writer {
    fn run(mut self) {
        // Once stopped: when it is over at the latest.
        let mut end: Option<Instant> = None;
        loop {
            let out = self.outlet.current();
            let drained = out.as_ref().map_or(Drained::Blocked, |out| self.drain(out));
            // Stopped: nothing is left, or nobody is there to take it.
            if end.is_some() && (drained == Drained::Empty || out.is_none()) {
                return;
            }
            let left = end.map(|end| end.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return;
            }
            let _ = sys::wait(&self.awaited(drained, out.as_deref()), left);
            if drained == Drained::Empty {
                let _ = self.ready.read();
            }
            self.outlet.noticed();
            if self.stop.read().is_ok() {
                end.get_or_insert(Instant::now() + LAST_WORDS);
            }
        }
    }

    /// What there is to wait for after a turn that ended so.
    fn awaited(&self, drained: Drained, out: Option<&File>) -> Vec<(RawFd, Interest)> {
        let readable = |fd| (fd, Interest::Readable);
        let changes = self.outlet.changes();
        let mut awaited = vec![readable(self.stop.as_raw_fd())];
        awaited.extend(changes.map(readable));
        let out = out.map(File::as_raw_fd);
        match drained {
            Drained::Blocked => awaited.extend(out.map(|fd| (fd, Interest::Writable))),
            Drained::Empty => {
                awaited.push(readable(self.ready.as_raw_fd()));
                // A file stays hung up; a client is gone then.
                awaited.extend(out.filter(|_| changes.is_some()).map(|fd| (fd, Interest::HangUp)));
            }
        }
        awaited
    }

    /// Writes out what can be. What cannot be written to a file (its reader has gone, the disk is full) is lost: the guest
    /// goes on, and what it says later may be written again. What cannot be written to a client waits for the next one.
    fn drain(&mut self, out: &Arc<File>) -> Drained {
        let piece = self.outlet.piece();
        match self.ring.drain(&mut Polled { out, piece }) {
            Ok(drained) => drained,
            Err(_) if self.outlet.failed(out) => Drained::Blocked,
            Err(error) => {
                if !std::mem::replace(&mut self.complained, true) {
                    log::warn!("console output is lost: {error}");
                }
                // A sink does not fail.
                let _ = self.ring.drain(&mut io::sink());
                Drained::Empty
            }
        }
    }
}

/// Writes only what does not block, for the descriptor may be a blocking one that is shared with the user's shell.
struct Polled<'a> {
    out: &'a File,
    /// Most bytes at once.
    piece: usize,
}

impl io::Write for Polled<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if !sys::wait(&[(self.out.as_raw_fd(), Interest::Writable)], Some(Duration::ZERO))? {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let piece = bytes.get(..self.piece).unwrap_or(bytes);
        self.out.write(piece)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::io::Read;

    use vmm_platform_devices::output::ByteSink;

    use super::*;

    /// Lets the room of a terminal be no multiple of what is written at once, so that the last write is too long.
    const ODD: [u8; 100] = [b'x'; 100];
    /// Far more than a terminal holds.
    static FLOOD: [u8; 200 << 10] = [b'x'; 200 << 10];

    fn fixed(file: File) -> Outlet {
        Outlet::Fixed(Arc::new(file))
    }

    /// Drops it on another thread, for it may never come back.
    fn assert_ends(output: OutputThread) {
        let (done, ended) = channel();
        std::thread::spawn(move || {
            drop(output);
            done.send(())
        });
        ended.recv_timeout(Duration::from_secs(30)).unwrap();
    }

    #[test]
    fn a_pty_that_nobody_reads_does_not_hold_its_console() {
        let pty = sys::open_pty().unwrap();
        let mut main = pty.main.try_clone().unwrap();
        io::Write::write_all(&mut main, &ODD).unwrap();
        let (output, ring) = OutputThread::start("test", fixed(main)).unwrap();
        ring.put(&FLOOD);
        assert_ends(output);
        drop(pty.other);
    }

    #[test]
    fn a_thread_that_is_stuck_in_a_write_is_left_behind() {
        let (release, stuck) = channel::<()>();
        let (alive, ended) = channel();
        let thread = std::thread::spawn(move || {
            let _ = stuck.recv();
            drop(alive);
        });
        let stop = EventFd::new(EFD_NONBLOCK).unwrap();
        assert_ends(OutputThread { stop, ended, thread: Some(thread) });
        release.send(()).unwrap();
    }

    #[test]
    fn the_users_terminal_is_written_without_blocking_and_left_as_it_is() {
        let mut pty = sys::open_pty().unwrap();
        let shared = OpenOptions::new().write(true).open(&pty.path).unwrap();
        let mut own = sys::for_writing(&shared).unwrap();
        let blocked = std::iter::repeat_with(|| io::Write::write(&mut own, &[b'x'; 4096]))
            .take(1000)
            .find_map(Result::err)
            .unwrap();
        assert_eq!(blocked.kind(), io::ErrorKind::WouldBlock);
        let mut bytes = [0; 16];
        assert_eq!(pty.main.read(&mut bytes).unwrap(), 16);
        assert!(
            std::fs::read_to_string(format!("/proc/self/fdinfo/{}", shared.as_raw_fd()))
                .unwrap()
                .lines()
                .any(|line| line.strip_prefix("flags:").is_some_and(|flags| !flags.contains("4001")))
        );
    }

    #[test]
    fn what_cannot_be_written_is_lost_and_the_next_byte_wakes_the_thread_again() {
        let ready = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let ring = OutputRing::new(RING, Arc::clone(&ready) as _);
        let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
        let mut writer = Writer {
            ring: Arc::clone(&ring),
            ready: Arc::clone(&ready),
            stop: EventFd::new(EFD_NONBLOCK).unwrap(),
            outlet: fixed(full),
            complained: false,
            _alive: channel().0,
        };
        for byte in *b"ab" {
            ring.put(&[byte]);
            ready.read().unwrap();
            let out = writer.outlet.current().unwrap();
            assert_eq!(writer.drain(&out), Drained::Empty);
        }
        assert!(writer.complained);
    }
}
