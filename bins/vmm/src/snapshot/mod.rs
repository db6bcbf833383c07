//! `vmm snapshot`: what can be done with a snapshot directory without a VMM.
//!
//! `arguments` makes a [`Job`] of the command line and touches nothing; [`run`] does it; `text` shows what it found.

mod arguments;
mod text;

use std::io::{self, Write};
use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use serde_json::{Value, json};
use vmm_snapshot::directory::{Chain, HostStorage, Progress as Done, ReadError, Work, diff, inspect, merge};

use crate::ctl::plain;
use crate::exit::{ExitCode, report};
use crate::progress::Progress;

pub(crate) use arguments::{command, job};

/// More threads than this wait for the disk.
const MOST_THREADS: usize = 8;

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Job {
    /// What.
    pub(crate) task: Task,
    /// Answer in JSON.
    pub(crate) json: bool,
}

/// One of the subcommands, with its directories.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Task {
    /// Compare all of a chain with its hashes.
    Verify(PathBuf),
    /// Say what a snapshot is.
    Inspect(PathBuf),
    /// Fold a chain into a new directory.
    Merge { chain: PathBuf, target: PathBuf },
    /// Say what two snapshots differ in.
    Diff { before: PathBuf, after: PathBuf },
}

/// What was found: what is printed, and how the process ends.
struct Answer {
    text: String,
    code: ExitCode,
}

impl Answer {
    fn new(job: &Job, text: impl FnOnce() -> String, json: &Value, code: ExitCode) -> Self {
        // `{:#}` is the pretty form.
        Self { text: if job.json { format!("{json:#}\n") } else { text() }, code }
    }
}

/// Does the job; prints what it found on standard output, and complaints on standard error.
#[must_use]
pub fn run(job: &Job) -> ExitCode {
    let answer = match &job.task {
        Task::Verify(path) => verify(job, path),
        Task::Inspect(path) => inspected(job, path).map_err(|error| complaint(&error)),
        Task::Merge { chain, target } => merged(job, chain, target).map_err(|error| complaint(&error)),
        Task::Diff { before, after } => compared(job, before, after).map_err(|error| complaint(&error)),
    };
    match answer {
        Ok(Answer { text, code }) => {
            // Nobody may be listening any more.
            let _ = io::stdout().write_all(text.as_bytes());
            code
        }
        Err(text) => {
            let _ = writeln!(io::stderr(), "{text}");
            ExitCode::VmmError
        }
    }
}

/// An error and its causes, one a line; names in a manifest do not command the terminal.
fn complaint(error: &dyn std::error::Error) -> String {
    report(error).lines().map(plain).collect::<Vec<_>>().join("\n")
}

fn causes(error: &dyn std::error::Error) -> Vec<String> {
    std::iter::successors(Some(error), |error| error.source()).map(ToString::to_string).collect()
}

/// Whether the error is about what is in a directory, and not about reading it.
fn is_mismatch(error: &ReadError) -> bool {
    !matches!(error, ReadError::Io { .. } | ReadError::Sink { .. } | ReadError::Cancelled)
}

fn verify(job: &Job, path: &Path) -> Result<Answer, String> {
    let mut layers = Vec::new();
    let outcome = whole(path, &mut layers);
    if let Some(error) = outcome.as_ref().err().filter(|error| !is_mismatch(error)) {
        return Err(complaint(error));
    }
    let (fault, code) = match &outcome {
        Ok(()) => (None, ExitCode::Success),
        Err(error) => (Some(error), ExitCode::Mismatch),
    };
    let json = json!({
        "whole": fault.is_none(),
        "snapshots": layers,
        "causes": fault.map_or(Vec::new(), |error| causes(error)),
    });
    if let Some(error) = fault.filter(|_| !job.json) {
        let _ = writeln!(io::stderr(), "{}", complaint(error));
    }
    Ok(Answer::new(job, || text::verified(&layers, fault.is_none()), &json, code))
}

/// Compares all of the chain at `path` with its hashes, and lists the snapshots of which nothing is wrong.
fn whole(path: &Path, layers: &mut Vec<Value>) -> Result<(), ReadError> {
    let chain = Chain::open(path)?;
    let long = Long::start("snapshot verify", chain.depth() as u64);
    for layer in chain.layers() {
        layer.state()?;
        long.work(|work| layer.verify(work))?;
        long.next();
        let tables = || layer.table().regions.iter();
        layers.push(json!({
            "id": layer.id().to_string(),
            "path": layer.path().to_string_lossy(),
            "chunks": tables().map(|table| table.chunks.len() as u64).sum::<u64>(),
            "held_bytes": tables().map(|table| table.extents.bytes()).sum::<u64>(),
        }));
    }
    Ok(())
}

fn inspected(job: &Job, path: &Path) -> Result<Answer, ReadError> {
    let found = inspect(path)?;
    // It has no map with keys other than text, so that it can be told as JSON.
    let json = if job.json { serde_json::to_value(&found).unwrap_or_default() } else { Value::Null };
    Ok(Answer::new(job, || text::inspection(&found), &json, ExitCode::Success))
}

fn merged(job: &Job, chain: &Path, target: &Path) -> Result<Answer, vmm_snapshot::directory::WriteError> {
    let long = Long::start("snapshot merge", 1);
    let id = long.work(|work| merge(chain, &HostStorage, target, work))?;
    drop(long);
    let json = json!({ "id": id.to_string(), "path": target.to_string_lossy() });
    let text = || format!("{} is snapshot {id}\n", plain(&target.to_string_lossy()));
    Ok(Answer::new(job, text, &json, ExitCode::Success))
}

fn compared(job: &Job, before: &Path, after: &Path) -> Result<Answer, ReadError> {
    let (before, after) = (Chain::open(before)?, Chain::open(after)?);
    let long = Long::start("snapshot diff", 1);
    let found = long.work(|work| diff(&before, &after, work))?;
    drop(long);
    let code = if found.is_none() { ExitCode::Success } else { ExitCode::Mismatch };
    let json = if job.json { serde_json::to_value(&found).unwrap_or_default() } else { Value::Null };
    Ok(Answer::new(job, || text::difference(&found, after.regions()), &json, code))
}

/// Work that takes long: how far it is, shown as long as this lives.
struct Long {
    far: Arc<Far>,
    _line: Progress,
}

/// How far work is; each of its parts starts anew.
#[derive(Default)]
struct Far {
    part: AtomicU64,
    parts: u64,
    done: AtomicU64,
    total: AtomicU64,
}

impl Far {
    fn text(&self) -> Option<String> {
        let of = |number: &AtomicU64| number.load(Ordering::Relaxed);
        let percent = of(&self.done).saturating_mul(100).checked_div(of(&self.total))?;
        let part = of(&self.part) + 1;
        if self.parts > 1 {
            Some(format!("{percent} % of snapshot {part} of {}", self.parts))
        } else {
            Some(format!("{percent} %"))
        }
    }
}

impl Long {
    fn start(about: &str, parts: u64) -> Self {
        let far = Arc::new(Far { parts, ..Far::default() });
        let shown = Arc::clone(&far);
        let line = Progress::start(about, move || move || shown.text());
        Self { far, _line: line }
    }

    fn next(&self) {
        self.far.part.fetch_add(1, Ordering::Relaxed);
    }

    fn work<T>(&self, with: impl FnOnce(&Work<'_>) -> T) -> T {
        let watch = |Done { done, total }| {
            self.far.total.store(total, Ordering::Relaxed);
            self.far.done.store(done, Ordering::Relaxed);
            ControlFlow::Continue(())
        };
        let threads = thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
        let most = NonZeroUsize::MIN.saturating_add(MOST_THREADS - 1);
        with(&Work { threads: threads.min(most), watch: &watch })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_says_how_far() {
        let far = Far { parts: 3, ..Far::default() };
        assert_eq!(far.text(), None, "nothing is known yet");
        far.total.store(8, Ordering::Relaxed);
        far.done.store(4, Ordering::Relaxed);
        assert_eq!(far.text().as_deref(), Some("50 % of snapshot 1 of 3"));
        assert_eq!(Far { parts: 1, ..far }.text().as_deref(), Some("50 %"));
    }

    #[test]
    fn names_in_errors_do_not_command_the_terminal() {
        let error = ReadError::Missing { path: "a\u{1b}[2J".into() };
        assert_eq!(complaint(&error), "error: a\\u{1b}[2J is missing");
    }
}
