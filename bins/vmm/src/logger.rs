//! Where log messages go: one line each, to standard error or a file.
//!
//! A line reads `vmm: 12.345678s: <vcpu0> WARN:vmm_pci::slots -- message`: seconds since the start, thread, level,
//! module. It is written by one call, so that lines of several threads and processes do not mix. A message is one
//! line whatever it holds: control characters are escaped. What cannot be written is lost, and nothing else happens.

use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use log::{LevelFilter, Log, Metadata, Record};

/// What is logged, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogOptions {
    /// The least important level that is logged.
    pub level: LevelFilter,
    /// The file that the log is appended to; `None` is standard error.
    pub file: Option<PathBuf>,
}

impl Default for LogOptions {
    fn default() -> Self {
        Self { level: LevelFilter::Warn, file: None }
    }
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

/// Sets up the log of this process, once. Times count from here.
///
/// # Errors
///
/// The file cannot be opened, or there is a log already.
pub fn init(options: &LogOptions) -> Result<LogPlace, LogError> {
    let logger = Logger { start: Instant::now(), level: options.level, output: Output::open(options)? };
    let place = LogPlace { descriptor: logger.output.descriptor(), start: logger.start };
    // It lives as long as the process, as every log does.
    log::set_logger(Box::leak(Box::new(logger))).map_err(|_| LogError::Again)?;
    log::set_max_level(options.level);
    Ok(place)
}

#[derive(Debug)]
struct Logger {
    start: Instant,
    level: LevelFilter,
    output: Output,
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= self.level
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            let thread = thread::current();
            // Nobody is left to be told of a failure.
            // The process's first thread has the process's name, as it shows in /proc.
            let name = thread.name().map(|name| if name == "main" { "vmm" } else { name });
            let _ = self.output.write(line(self.start.elapsed(), name, record).as_bytes());
        }
    }

    fn flush(&self) {}
}

#[derive(Debug)]
enum Output {
    Stderr,
    File(File),
}

impl Output {
    fn open(options: &LogOptions) -> Result<Self, LogError> {
        let Some(path) = &options.file else {
            return Ok(Self::Stderr);
        };
        let file = OpenOptions::new().append(true).create(true).mode(0o600).open(path);
        file.map(Self::File).map_err(|source| LogError::Open { path: path.clone(), source })
    }

    fn descriptor(&self) -> RawFd {
        match self {
            Self::Stderr => libc::STDERR_FILENO,
            Self::File(file) => file.as_raw_fd(),
        }
    }

    /// Both are unbuffered: a line is one write(2), unless the system takes only a part.
    fn write(&self, line: &[u8]) -> io::Result<()> {
        match self {
            Self::Stderr => io::stderr().lock().write_all(line),
            Self::File(file) => (&*file).write_all(line),
        }
    }
}

fn line(elapsed: Duration, thread: Option<&str>, record: &Record<'_>) -> String {
    let mut line = String::with_capacity(128);
    // Writing to a String fails only if a Display of the message does.
    let _ = write!(
        line,
        "vmm: {}.{:06}s: <{}> {}:{} -- ",
        elapsed.as_secs(),
        elapsed.subsec_micros(),
        thread.unwrap_or("unnamed"),
        record.level(),
        record.target(),
    );
    let _ = write!(Escaped(&mut line), "{}", record.args());
    line.push('\n');
    line
}

/// Escapes control characters, so that a message can neither forge a line nor drive a terminal.
struct Escaped<'s>(&'s mut String);

impl std::fmt::Write for Escaped<'_> {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        for character in text.chars() {
            if character.is_control() {
                self.0.extend(character.escape_default());
            } else {
                self.0.push(character);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use log::Level;

    use super::*;

    fn line_of(level: Level, message: &str) -> String {
        let elapsed = Duration::new(12, 345_678_900);
        let record = |args| Record::builder().level(level).target("vmm_pci::slots").args(args).build();
        line(elapsed, Some("vcpu0"), &record(format_args!("{message}")))
    }

    fn log(logger: &Logger, level: Level, message: &str) {
        logger.log(&Record::builder().level(level).target("t").args(format_args!("{message}")).build());
    }

    #[test]
    fn a_line_has_time_thread_level_and_target() {
        let expected = "vmm: 12.345678s: <vcpu0> WARN:vmm_pci::slots -- slot 3 is taken\n";
        assert_eq!(line_of(Level::Warn, "slot 3 is taken"), expected);
        let record = Record::builder().args(format_args!("x")).build();
        assert_eq!(line(Duration::ZERO, None, &record), "vmm: 0.000000s: <unnamed> INFO: -- x\n");
    }

    #[test]
    fn a_message_is_one_line() {
        let text = line_of(Level::Info, "a\nvmm: forged\r\u{1b}[2J\u{85}ü");
        assert!(text.ends_with("-- a\\nvmm: forged\\r\\u{1b}[2J\\u{85}ü\n"), "{text}");
        assert_eq!(text.lines().count(), 1);
    }

    #[test]
    fn lines_of_threads_do_not_mix_and_are_appended() {
        const THREADS: usize = 8;
        const LINES: usize = 200;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        std::fs::write(&path, "kept\n").unwrap();
        let options = LogOptions { level: LevelFilter::Info, file: Some(path.clone()) };
        let logger =
            Logger { start: Instant::now(), level: options.level, output: Output::open(&options).unwrap() };
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
    fn a_log_that_cannot_be_written_is_no_error() {
        let options = LogOptions { file: Some("/dev/full".into()), ..LogOptions::default() };
        let logger = Logger {
            start: Instant::now(),
            level: LevelFilter::Trace,
            output: Output::open(&options).unwrap(),
        };
        assert!(logger.output.write(b"x").is_err(), "/dev/full takes nothing");
        log(&logger, Level::Error, "x");
    }

    #[test]
    fn a_file_that_cannot_be_opened_is_named() {
        let options = LogOptions { file: Some("/nonexistent/folder/log".into()), ..LogOptions::default() };
        let error = Output::open(&options).unwrap_err();
        assert_eq!(error.to_string(), "cannot open the log file /nonexistent/folder/log");
        assert!(matches!(error, LogError::Open { source, .. } if source.kind() == io::ErrorKind::NotFound));
    }
}
