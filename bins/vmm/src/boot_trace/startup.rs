//! What the process does before it has a VMM, and the file that traces go to. As the log, it is the process's own: it is
//! published once, and whoever makes a trace finds it.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Instant;

use super::event::{Event, Row};

static PUBLISHED: OnceLock<Startup> = OnceLock::new();

pub(super) fn published() -> Option<&'static Startup> {
    PUBLISHED.get()
}

/// The start of this process.
#[derive(Debug)]
pub struct Startup {
    begun: Instant,
    events: Vec<Event>,
    file: Option<TraceFile>,
}

impl Startup {
    /// The process begins now.
    #[must_use]
    pub fn begin() -> Self {
        let begun = Instant::now();
        Self { begun, events: vec![Event::instant("process", Row::Vmm, begun)], file: None }
    }

    /// Does a step of the start and writes down how long it took.
    pub fn time<R>(&mut self, name: &str, step: impl FnOnce() -> R) -> R {
        let start = Instant::now();
        let result = step();
        self.events.push(Event::span(name, start, start.elapsed()));
        result
    }

    /// Traces are written to the file at `path`, which loses what it held.
    ///
    /// # Errors
    /// It cannot be opened.
    pub fn write_to(&mut self, path: &Path) -> Result<(), TraceFileError> {
        // Opened once, while the process still may open files.
        let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path);
        let file = file.map_err(|source| TraceFileError { path: path.to_owned(), source })?;
        self.file = Some(TraceFile { path: path.to_owned(), file: Mutex::new(file) });
        Ok(())
    }

    /// From now on every trace knows of it. The first one stays.
    pub fn publish(self) {
        let _ = PUBLISHED.set(self);
    }

    pub(super) fn begun(&self) -> Instant {
        self.begun
    }

    pub(super) fn events(&self) -> Vec<Event> {
        self.events.clone()
    }

    pub(super) fn file(&self) -> Option<&TraceFile> {
        self.file.as_ref()
    }
}

/// The file for traces cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error("cannot open the file for boot traces {path}", path = .path.display())]
pub struct TraceFileError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// The file that holds the last trace.
#[derive(Debug)]
pub(super) struct TraceFile {
    path: PathBuf,
    file: Mutex<File>,
}

impl TraceFile {
    /// Replaces what it holds. A failure is logged: no boot fails for it.
    pub(super) fn write(&self, text: &str) {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let written =
            file.set_len(0).and_then(|()| file.rewind()).and_then(|()| file.write_all(text.as_bytes()));
        if let Err(error) = written {
            log::warn!("cannot write the boot trace {}: {error}", self.path.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_holds_the_last_trace_only() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace.json");
        std::fs::write(&path, "what was there before, and is longer").unwrap();
        let mut startup = Startup::begin();
        assert_eq!(startup.time("step", || 7), 7);
        assert_eq!(startup.events().len(), 2);
        startup.write_to(&path).unwrap();
        for text in ["a long one", "short"] {
            startup.file().unwrap().write(text);
            assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
        }
    }

    #[test]
    fn a_file_that_cannot_be_had_is_named() {
        let error = Startup::begin().write_to(Path::new("/nonexistent/trace")).unwrap_err();
        assert_eq!(error.to_string(), "cannot open the file for boot traces /nonexistent/trace");
        // Nothing happens but a line in the log.
        let mut full = Startup::begin();
        full.write_to(Path::new("/dev/full")).unwrap();
        full.file().unwrap().write("x");
    }
}
