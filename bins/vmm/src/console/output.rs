//! The thread that writes a console's output out.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmm_device_model::thread::{self, ThreadHook};
use vmm_platform_devices::output::{Drained, OutputRing};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::sys;
use crate::sandbox::OUTPUT_THREAD;

/// Bytes that wait for a slow reader before the oldest are lost.
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
    pub(super) fn start(
        name: &str,
        out: File,
        hook: &Arc<dyn ThreadHook>,
    ) -> io::Result<(Self, Arc<OutputRing>)> {
        let flags = EFD_NONBLOCK | EFD_CLOEXEC;
        let ready = Arc::new(EventFd::new(flags)?);
        let stop = EventFd::new(flags)?;
        let ring = OutputRing::new(RING, Arc::clone(&ready) as _);
        let (alive, ended) = channel();
        let stop_seen = stop.try_clone()?;
        let writer =
            Writer { ring: Arc::clone(&ring), ready, stop: stop_seen, out, complained: false, _alive: alive };
        let thread = thread::spawn(hook, OUTPUT_THREAD, &format!("{name}-out"), move || writer.run())?;
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
    out: File,
    /// An error was logged.
    complained: bool,
    _alive: Sender<()>,
}

impl Writer {
    fn run(mut self) {
        // Once stopped: when it is over at the latest.
        let mut end: Option<Instant> = None;
        loop {
            let (out, stop) = (self.out.as_raw_fd(), self.stop.as_raw_fd());
            match (self.drain(), end) {
                (Drained::Empty, Some(_)) => return,
                (Drained::Empty, None) => {
                    let _ = sys::wait(&[self.ready.as_raw_fd(), stop], None, None);
                    let _ = self.ready.read();
                }
                (Drained::Blocked, None) => {
                    let _ = sys::wait(&[stop], Some(out), None);
                }
                (Drained::Blocked, Some(end)) => {
                    let left = end.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return;
                    }
                    let _ = sys::wait(&[], Some(out), Some(left));
                }
            }
            if end.is_none() && self.stop.read().is_ok() {
                end = Some(Instant::now() + LAST_WORDS);
            }
        }
    }

    /// Writes out what can be. What cannot be written (its reader has gone, the disk is full) is lost: the guest goes
    /// on, and what it says later may be written again.
    fn drain(&mut self) -> Drained {
        self.ring.drain(&mut Polled(&mut self.out)).unwrap_or_else(|error| {
            if !std::mem::replace(&mut self.complained, true) {
                log::warn!("console output is lost: {error}");
            }
            // A sink does not fail.
            let _ = self.ring.drain(&mut io::sink());
            Drained::Empty
        })
    }
}

/// Writes only what does not block, for the descriptor may be a blocking one that is shared with the user's shell.
struct Polled<'a>(&'a mut File);

/// A writable pipe takes this much without blocking (PIPE_BUF is 4096); a terminal may take less.
const PIECE: usize = 512;

impl io::Write for Polled<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if !sys::wait(&[], Some(self.0.as_raw_fd()), Some(Duration::ZERO))? {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let piece = bytes.get(..PIECE).unwrap_or(bytes);
        self.0.write(piece)
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
        let (output, ring) = OutputThread::start("test", main, &(Arc::new(thread::Unconfined) as _)).unwrap();
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
        let mut writer = Writer {
            ring: Arc::clone(&ring),
            ready: Arc::clone(&ready),
            stop: EventFd::new(EFD_NONBLOCK).unwrap(),
            out: OpenOptions::new().write(true).open("/dev/full").unwrap(),
            complained: false,
            _alive: channel().0,
        };
        for byte in *b"ab" {
            ring.put(&[byte]);
            ready.read().unwrap();
            assert_eq!(writer.drain(), Drained::Empty);
        }
        assert!(writer.complained);
    }
}
