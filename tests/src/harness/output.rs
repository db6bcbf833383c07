//! What a process prints, and what a guest's serial port wrote into a file.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use super::{LIMIT, wait_until};
use crate::run::tail;

const TAIL_LINES: usize = 40;

/// All that came out of a pipe so far.
#[derive(Debug, Clone, Default)]
pub struct Output {
    bytes: Arc<Mutex<Vec<u8>>>,
    ended: Arc<AtomicBool>,
}

impl Output {
    /// Reads `pipe` to its end on a thread.
    pub(super) fn capture(mut pipe: impl Read + Send + 'static) -> Self {
        let output = Self::default();
        let Self { bytes, ended } = output.clone();
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = pipe.read(&mut buffer) {
                let read = buffer.get(..count).unwrap_or_default();
                bytes.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(read);
            }
            ended.store(true, Ordering::SeqCst);
        });
        output
    }

    /// Of a process that prints elsewhere.
    pub(super) fn none() -> Self {
        Self { bytes: Arc::default(), ended: Arc::new(AtomicBool::new(true)) }
    }

    /// The text so far.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
    }

    /// Waits until `text` is in it.
    ///
    /// # Panics
    /// When that takes longer than [`LIMIT`], with the end of what came instead.
    pub fn wait_for(&self, text: &str) {
        wait_for_text(LIMIT, text, || self.text());
    }

    /// Waits for the end of the pipe: a process that has ended may have printed what is not read yet.
    pub(super) fn wait_for_end(&self) {
        let ended = || self.ended.load(Ordering::SeqCst).then_some(());
        wait_until(LIMIT, ended, || "the end of the output".to_owned());
    }

    /// The end of the text.
    #[must_use]
    pub fn tail(&self) -> String {
        tail(&self.text(), TAIL_LINES)
    }
}

/// A file that a guest's serial port writes.
#[derive(Debug, Clone)]
pub struct SerialFile {
    path: PathBuf,
}

impl SerialFile {
    /// The file at `path`, which need not be there yet.
    #[must_use]
    pub fn new(path: PathBuf) -> Self {
        Self { path }
    }

    /// Its path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The text so far; none without the file.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.path).unwrap_or_default()).into_owned()
    }

    /// Waits until `text` is in it.
    ///
    /// # Panics
    /// When that takes longer than [`LIMIT`], with the end of what came instead.
    pub fn wait_for(&self, text: &str) {
        self.wait_within(LIMIT, text);
    }

    /// Waits until `text` is in it.
    ///
    /// # Panics
    /// When that takes longer than `limit`, with the end of what came instead.
    pub fn wait_within(&self, limit: Duration, text: &str) {
        wait_for_text(limit, text, || self.text());
    }

    /// Waits until there is more of it than `length` bytes.
    ///
    /// # Panics
    /// When that takes longer than [`LIMIT`].
    pub fn wait_longer_than(&self, length: usize) {
        wait_until(
            LIMIT,
            || (self.text().len() > length).then_some(()),
            || format!("more than {length} bytes in {}", self.path.display()),
        );
    }

    /// The end of the text.
    #[must_use]
    pub fn tail(&self) -> String {
        tail(&self.text(), TAIL_LINES)
    }
}

fn wait_for_text(limit: Duration, wanted: &str, text: impl Fn() -> String) {
    wait_until(
        limit,
        || text().contains(wanted).then_some(()),
        || format!("{wanted:?}; what came ends with:\n{}", tail(&text(), TAIL_LINES)),
    );
}
