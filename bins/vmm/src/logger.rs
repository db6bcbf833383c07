//! Where log messages go: one line each, to standard error or a file, as text or as JSON.
//!
//! A line reads `vmm: 12.345678s: <vcpu0> WARN:vmm_pci::slots -- message device=_disk0`: seconds since the start,
//! thread, level, module, the message, and the fields that the log statement names. It is written by one call, so that
//! lines of several threads and processes do not mix. A message is one line whatever it holds: control characters are
//! escaped. What cannot be written is lost, and nothing else happens: who reads standard error, a pipe or a terminal, has a tenth of a
//! second for a line, once; while nothing is taken, lines are lost at once.

mod filter;
mod line;
pub(crate) mod time;

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError, RwLock};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use log::{LevelFilter, Log, Metadata, Record};

pub use filter::{Filter, FilterError};
use line::Moment;

use crate::console::for_writing;

/// What is logged, how, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogOptions {
    /// The least important level that is logged at first; see [`set_level`].
    pub level: LevelFilter,
    /// Modules that have a level of their own.
    pub filter: Filter,
    /// The form of a line.
    pub format: LogFormat,
    /// The file that the log is appended to; `None` is standard error.
    pub file: Option<PathBuf>,
}

impl Default for LogOptions {
    fn default() -> Self {
        Self { level: LevelFilter::Warn, filter: Filter::default(), format: LogFormat::default(), file: None }
    }
}

/// The form of a line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// An object a line.
    Json,
}

/// The log cannot be set up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LogError {
    /// Its file cannot be opened.
    #[error("cannot open the log file {path}", path = .path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// There is no standard error.
    #[error("cannot use standard error for the log")]
    Stderr(#[source] io::Error),
    /// This process has a log already.
    #[error("the log is set up already")]
    Again,
}

/// Where the log is, for who cannot use it: a signal's handler.
#[derive(Debug, Clone, Copy)]
pub struct LogPlace {
    /// Where lines are written to. It stays open.
    pub descriptor: RawFd,
    /// From when times count.
    pub start: Instant,
}

static LOGGER: OnceLock<Logger> = OnceLock::new();

/// Sets up the log of this process, once. Times count from here.
///
/// # Errors
///
/// The file cannot be opened, or there is a log already.
pub fn init(options: &LogOptions) -> Result<LogPlace, LogError> {
    LOGGER.set(Logger::new(options)?).map_err(|_| LogError::Again)?;
    let logger = LOGGER.get().ok_or(LogError::Again)?;
    log::set_logger(logger).map_err(|_| LogError::Again)?;
    log::set_max_level(logger.most(options.level));
    Ok(LogPlace { descriptor: logger.output.descriptor(), start: logger.start })
}

/// Changes the level of all modules that have none of their own, at any time and from any thread. Answers the one before;
/// `Off` if there is no log.
pub fn set_level(level: LevelFilter) -> LevelFilter {
    LOGGER.get().map_or(LevelFilter::Off, |logger| {
        // Two at a time could leave the one's maximum with the other's level.
        let _one = logger.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let before = logger.set_level(level);
        log::set_max_level(logger.most(level));
        before
    })
}

/// The level of all modules that have none of their own; `Off` if there is no log.
pub fn level() -> LevelFilter {
    LOGGER.get().map_or(LevelFilter::Off, |logger| to_filter(logger.level.load(Ordering::Relaxed)))
}

/// What the field `vm` says from now on, on each line; `None` for no such field.
pub fn set_vm(name: Option<String>) {
    if let Some(logger) = LOGGER.get() {
        *logger.vm.write().unwrap_or_else(PoisonError::into_inner) = name;
    }
}

#[derive(Debug)]
struct Logger {
    start: Instant,
    /// A `LevelFilter` as its number.
    level: AtomicUsize,
    changing: Mutex<()>,
    filter: Filter,
    format: LogFormat,
    vm: RwLock<Option<String>>,
    output: Output,
}

impl Logger {
    fn new(options: &LogOptions) -> Result<Self, LogError> {
        Ok(Self {
            start: Instant::now(),
            level: AtomicUsize::new(options.level as usize),
            changing: Mutex::default(),
            filter: options.filter.clone(),
            format: options.format,
            vm: RwLock::default(),
            output: Output::open(options)?,
        })
    }

    fn set_level(&self, level: LevelFilter) -> LevelFilter {
        to_filter(self.level.swap(level as usize, Ordering::Relaxed))
    }

    /// The most that any module logs while the others log `level`.
    fn most(&self, level: LevelFilter) -> LevelFilter {
        level.max(self.filter.most())
    }

    fn line(&self, record: &Record<'_>) -> String {
        let thread = thread::current();
        // The process's first thread has the process's name, as it shows in /proc.
        let name = thread.name().map_or("unnamed", |name| if name == "main" { "vmm" } else { name });
        let vm = self.vm.read().unwrap_or_else(PoisonError::into_inner);
        let moment = Moment {
            time: SystemTime::now(),
            elapsed: self.start.elapsed(),
            thread: name,
            vm: vm.as_deref(),
        };
        match self.format {
            LogFormat::Text => line::text(&moment, record),
            LogFormat::Json => line::json(&moment, record),
        }
    }
}

fn to_filter(number: usize) -> LevelFilter {
    LevelFilter::iter().nth(number).unwrap_or(LevelFilter::Off)
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        let level = metadata.level();
        match self.filter.level_of(metadata.target()) {
            Some(most) => level <= most,
            None => level as usize <= self.level.load(Ordering::Relaxed),
        }
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            // Nobody is left to be told of a failure.
            let _ = self.output.write(self.line(record).as_bytes());
        }
    }

    fn flush(&self) {}
}

#[derive(Debug)]
enum Output {
    Stderr(Stderr),
    File(File),
}

/// How long a line waits for whoever reads standard error.
const PATIENCE: Duration = Duration::from_millis(100);

/// Standard error, by a descriptor of its own that does not block where that can be had.
#[derive(Debug)]
struct Stderr {
    file: File,
    /// Nobody took the last line.
    stuck: AtomicBool,
}

impl Stderr {
    fn of(file: &impl AsFd) -> io::Result<Self> {
        Ok(Self { file: for_writing(file)?, stuck: AtomicBool::new(false) })
    }

    fn write(&self, mut line: &[u8]) -> io::Result<()> {
        let begun = Instant::now();
        while !line.is_empty() {
            match (&self.file).write(line) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(count) => line = line.get(count..).unwrap_or_default(),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    if self.stuck.load(Ordering::Relaxed) || begun.elapsed() >= PATIENCE {
                        self.stuck.store(true, Ordering::Relaxed);
                        return Err(error);
                    }
                    thread::park_timeout(Duration::from_millis(1));
                }
                Err(error) => return Err(error),
            }
        }
        self.stuck.store(false, Ordering::Relaxed);
        Ok(())
    }
}

impl Output {
    fn open(options: &LogOptions) -> Result<Self, LogError> {
        let Some(path) = &options.file else {
            return Stderr::of(&io::stderr()).map(Self::Stderr).map_err(LogError::Stderr);
        };
        let file = OpenOptions::new().append(true).create(true).mode(0o600).open(path);
        file.map(Self::File).map_err(|source| LogError::Open { path: path.clone(), source })
    }

    fn descriptor(&self) -> RawFd {
        match self {
            Self::Stderr(stderr) => stderr.file.as_raw_fd(),
            Self::File(file) => file.as_raw_fd(),
        }
    }

    /// Both are unbuffered: a line is one write(2), unless the system takes only a part.
    fn write(&self, line: &[u8]) -> io::Result<()> {
        match self {
            Self::Stderr(stderr) => stderr.write(line),
            Self::File(file) => (&*file).write_all(line),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::sync::Barrier;

    use log::Level;

    use super::*;

    fn log(logger: &Logger, level: Level, message: &str) {
        logger.log(&Record::builder().level(level).target("t").args(format_args!("{message}")).build());
    }

    fn logs(logger: &Logger, level: Level, module: &str) -> bool {
        logger.enabled(&Metadata::builder().level(level).target(module).build())
    }

    #[test]
    fn the_level_changes_at_once_and_modules_keep_their_own() {
        let filter = "quiet=error,loud=trace".parse().unwrap();
        let logger = Logger::new(&LogOptions { filter, ..LogOptions::default() }).unwrap();
        let at =
            |level| [logs(&logger, level, "m"), logs(&logger, level, "quiet"), logs(&logger, level, "loud")];
        assert_eq!((at(Level::Warn), at(Level::Info)), ([true, false, true], [false, false, true]));
        assert_eq!(logger.set_level(LevelFilter::Debug), LevelFilter::Warn);
        assert_eq!((at(Level::Debug), at(Level::Trace)), ([true, false, true], [false, false, true]));
        assert_eq!(logger.set_level(LevelFilter::Off), LevelFilter::Debug);
        assert_eq!((at(Level::Error), at(Level::Trace)), ([false, true, true], [false, false, true]));
        // What the macros ask first must let the loudest module through.
        assert_eq!(logger.most(LevelFilter::Off), LevelFilter::Trace);
        for level in LevelFilter::iter() {
            assert_eq!(to_filter(level as usize), level);
        }
    }

    #[test]
    fn a_line_has_this_thread_and_the_vm_in_the_form_that_was_asked_for() {
        let mut logger = Logger::new(&LogOptions::default()).unwrap();
        *logger.vm.get_mut().unwrap() = Some("web".to_owned());
        let record = |args| Record::builder().level(Level::Info).target("t").args(args).build();
        let name = thread::current().name().unwrap().to_owned();
        let text = logger.line(&record(format_args!("x")));
        assert!(text.ends_with(&format!("s: <{name}> INFO:t -- x vm=web\n")), "{text}");
        logger.format = LogFormat::Json;
        let object: serde_json::Value =
            serde_json::from_str(&logger.line(&record(format_args!("x")))).unwrap();
        assert_eq!((&object["thread"], &object["vm"]), (&name.into(), &"web".into()));
        let unnamed = thread::spawn(move || logger.line(&record(format_args!("x")))).join().unwrap();
        assert!(unnamed.contains("\"thread\":\"unnamed\""), "{unnamed}");
    }

    #[test]
    fn lines_of_threads_do_not_mix_and_are_appended() {
        const THREADS: usize = 8;
        const LINES: usize = 200;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        std::fs::write(&path, "kept\n").unwrap();
        let options =
            LogOptions { level: LevelFilter::Info, file: Some(path.clone()), ..LogOptions::default() };
        let logger = Logger::new(&options).unwrap();
        let start = Barrier::new(THREADS);
        thread::scope(|scope| {
            for _ in 0..THREADS {
                scope.spawn(|| {
                    start.wait();
                    for _ in 0..LINES {
                        log(&logger, Level::Info, &"x".repeat(300));
                        log(&logger, Level::Debug, "not logged");
                    }
                });
            }
        });
        let text = std::fs::read_to_string(path).unwrap();
        let mut lines = text.lines();
        assert_eq!(lines.next(), Some("kept"));
        let whole = |line: &str| {
            line.starts_with("vmm: ") && line.ends_with(&format!("INFO:t -- {}", "x".repeat(300)))
        };
        assert!(lines.clone().all(whole), "{text}");
        assert_eq!(lines.count(), THREADS * LINES);
    }

    #[test]
    fn who_does_not_read_standard_error_holds_nobody() {
        let (mut reader, writer) = io::pipe().unwrap();
        let stderr = Stderr::of(&writer).unwrap();
        let line = [&[b'x'; 4000][..], b"\n"].concat();
        let lost = |lines: usize| (0..lines).filter(|_| stderr.write(&line).is_err()).count();
        // A pipe takes 64 KiB.
        assert!(lost(100) > 50);
        let mut some = vec![0; 60_000];
        reader.read_exact(&mut some).unwrap();
        assert_eq!(lost(3), 0, "it is read again");
    }

    #[test]
    fn a_log_that_cannot_be_written_is_no_error() {
        let options = LogOptions { file: Some("/dev/full".into()), ..LogOptions::default() };
        let logger = Logger::new(&options).unwrap();
        assert!(logger.output.write(b"x").is_err(), "/dev/full takes nothing");
        log(&logger, Level::Error, "x");
    }

    #[test]
    fn a_file_that_cannot_be_opened_is_named() {
        let options = LogOptions { file: Some("/nonexistent/folder/log".into()), ..LogOptions::default() };
        let error = Output::open(&options).unwrap_err();
        assert_eq!(error.to_string(), "cannot open the log file /nonexistent/folder/log");
        assert!(matches!(error, LogError::Open { source, .. } if source.kind() == ErrorKind::NotFound));
    }
}
