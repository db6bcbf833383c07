//! A file that answers no more: who reads it waits (fanotify(7)).
#![expect(unsafe_code, reason = "fanotify is a few system calls")]

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::wait_until;

/// How long each read is held up before [`Withheld::hold`].
const DELAY: Duration = Duration::from_secs(1);
const POLL: Duration = Duration::from_millis(2);

/// Reads of a file (or whoever opens it) wait a while each, and after [`hold`](Self::hold) until this is dropped.
#[derive(Debug)]
pub struct Withheld {
    word: Arc<Word>,
    thread: Option<JoinHandle<()>>,
}

/// What the thread is told, and tells.
#[derive(Debug, Default)]
struct Word {
    hold: AtomicBool,
    held: AtomicBool,
    over: AtomicBool,
}

impl Withheld {
    /// # Panics
    /// Without CAP_SYS_ADMIN.
    #[must_use]
    pub fn new(path: &Path) -> Self {
        Self::of(path, libc::FAN_ACCESS_PERM)
    }

    /// The same of whoever opens the file, and from the beginning until this is dropped.
    ///
    /// # Panics
    /// Without CAP_SYS_ADMIN.
    #[must_use]
    pub fn closed(path: &Path) -> Self {
        let file = Self::of(path, libc::FAN_OPEN_PERM);
        file.hold();
        file
    }

    fn of(path: &Path, what: u64) -> Self {
        let mut events = watch(path, what).expect("fanotify, which needs CAP_SYS_ADMIN");
        let word = Arc::new(Word::default());
        let heard = Arc::clone(&word);
        let thread = Some(thread::spawn(move || serve(&mut events, &heard).expect("events of the file")));
        Self { word, thread }
    }

    /// The next read waits.
    pub fn hold(&self) {
        self.word.hold.store(true, Ordering::SeqCst);
    }

    /// Waits until a read waits.
    ///
    /// # Panics
    /// When none comes.
    pub fn wait(&self) {
        let is_held = || self.word.held.load(Ordering::SeqCst).then_some(());
        wait_until(super::LIMIT, is_held, || "a read of the file".to_owned());
    }
}

impl Drop for Withheld {
    fn drop(&mut self) {
        self.word.over.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Has it told `what` is done to the file at `path`; who does it waits for an answer.
fn watch(path: &Path, what: u64) -> io::Result<File> {
    let flags = libc::FAN_CLASS_CONTENT | libc::FAN_CLOEXEC | libc::FAN_NONBLOCK;
    // SAFETY: the call takes flags only.
    let fd = check(unsafe { libc::fanotify_init(flags, (libc::O_RDONLY | libc::O_CLOEXEC) as u32) })?;
    // SAFETY: the call just returned the descriptor, and nobody else has it.
    let events = unsafe { OwnedFd::from_raw_fd(fd) };
    let path = CString::new(path.as_os_str().as_bytes())?;
    let at = libc::AT_FDCWD;
    // SAFETY: the path ends with a zero.
    check(unsafe { libc::fanotify_mark(events.as_raw_fd(), libc::FAN_MARK_ADD, what, at, path.as_ptr()) })?;
    Ok(events.into())
}

fn serve(events: &mut File, word: &Word) -> io::Result<()> {
    let mut waiting: Vec<(OwnedFd, Instant)> = Vec::new();
    while !word.over.load(Ordering::SeqCst) {
        waiting.extend(next(events)?.into_iter().map(|read| (read, Instant::now())));
        let hold = word.hold.load(Ordering::SeqCst);
        word.held.store(hold && !waiting.is_empty(), Ordering::SeqCst);
        if !hold && waiting.first().is_some_and(|(_, since)| since.elapsed() >= DELAY) {
            allow(events, &waiting.remove(0).0)?;
        }
        thread::sleep(POLL);
    }
    waiting.iter().try_for_each(|(read, _)| allow(events, read))
}

/// A read that waits, if there is one: the file.
fn next(events: &mut File) -> io::Result<Option<OwnedFd>> {
    const SIZE: usize = size_of::<libc::fanotify_event_metadata>();
    let mut bytes = [0; SIZE];
    match events.read(&mut bytes) {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
        Err(error) => return Err(error),
    }
    // SAFETY: the kernel wrote such a structure, of integers.
    let event: libc::fanotify_event_metadata = unsafe { std::mem::transmute(bytes) };
    // SAFETY: the kernel just made the descriptor, and nobody else has it.
    Ok(Some(unsafe { OwnedFd::from_raw_fd(event.fd) }))
}

fn allow(events: &mut File, read: &OwnedFd) -> io::Result<()> {
    // `struct fanotify_response`
    let (fd, answer) = (read.as_raw_fd().to_ne_bytes(), libc::FAN_ALLOW.to_ne_bytes());
    events.write_all(&[fd, answer].concat())
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
