//! `vmm ctl`: commands to a VMM that runs, by its API socket. `ch-remote` is the same by another name.
//!
//! `arguments` makes a [`Job`] of the command line and touches nothing; [`run`] does it. A subcommand is a row of
//! [`ROWS`], made of a command of the API by its trait `Subcommand`; what no single command is (waiting, any call) stands
//! beside them.

mod arguments;
mod commands;
mod complaint;
mod events;
mod progress;
mod rows;
mod show;
mod words;

use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use vmm_api::client::{Client, ClientError, RawAnswer};
use vmm_api::command::Method;

use crate::exit::ExitCode;
use crate::signals::inherited;
use crate::validate::document;

pub(crate) use arguments::{NAME, command, parse};
use events::Range;
use rows::{Body, Payload, Shown};
pub use rows::{ROWS, Row};
pub(crate) use show::{moment, plain, short, table};
pub use words::Goal;

/// Names the socket where `--api-socket` does not.
pub const SOCKET_VARIABLE: &str = "VMM_API_SOCKET";

/// What is to be done.
#[derive(Debug)]
pub struct Job {
    /// The socket that the command line names.
    pub(crate) socket: Option<PathBuf>,
    /// Replies are printed as they come.
    pub(crate) json: bool,
    /// The longest that all of it may take.
    pub(crate) timeout: Option<Duration>,
    /// How long the socket may take to appear.
    pub(crate) connect_within: Duration,
    /// The first thing to do.
    pub(crate) step: Step,
    /// What to wait for after it.
    pub(crate) wait: Option<Goal>,
}

/// One thing to do.
#[derive(Debug)]
pub(crate) enum Step {
    /// A command of the table.
    Command(&'static Row, Payload),
    /// A command by its name.
    Any(String, Method, Body),
    /// Events.
    Events(Range),
    /// Only waiting.
    Wait(Goal),
}

/// What went wrong.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CtlError {
    /// Nothing says where the VMM listens.
    #[error("no API socket: give --api-socket PATH, or set {SOCKET_VARIABLE}")]
    NoSocket,
    /// The VMM refuses, or cannot be talked to.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The document to send cannot be read.
    #[error("cannot read {name}")]
    Document {
        /// Which.
        name: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A descriptor to send is none.
    #[error("cannot send descriptor {fd}")]
    Descriptor {
        /// Its number.
        fd: i32,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Time limits are those of sockets.
    #[error("cannot limit the time")]
    Limit(#[source] io::Error),
    /// The reply cannot be printed.
    #[error("cannot print the reply")]
    Print(#[source] io::Error),
}

impl CtlError {
    /// How the process ends.
    pub(crate) fn code(&self) -> ExitCode {
        match self {
            Self::NoSocket => ExitCode::Usage,
            Self::Client(error) if error.is_gone() => ExitCode::NoVmm,
            Self::Client(error) if error.is_timeout() => ExitCode::TimedOut,
            _ => ExitCode::VmmError,
        }
    }
}

/// Does the job; prints the reply on standard output, and complaints on standard error.
#[must_use]
pub fn run(job: Job) -> ExitCode {
    match perform(job) {
        Ok(code) => code,
        Err(error) => {
            let _ = writeln!(io::stderr(), "{}", complaint::text(&error));
            error.code()
        }
    }
}

fn perform(job: Job) -> Result<ExitCode, CtlError> {
    let variable = || std::env::var_os(SOCKET_VARIABLE).filter(|path| !path.is_empty()).map(PathBuf::from);
    let socket = job.socket.clone().or_else(variable).ok_or(CtlError::NoSocket)?;
    let mut session = Session::open(&socket, &job)?;
    let code = match job.step {
        Step::Command(row, payload) => session.command(row, payload, job.json)?,
        Step::Any(name, method, body) => {
            let answer = session.call(&name, method, &body, &[])?;
            print(&answer.body)?;
            ExitCode::Success
        }
        // The connection is used up, and the VMM has ended, or was not waited for.
        Step::Events(range) => {
            events::print(session.client, range, job.json, session.end)?;
            return Ok(ExitCode::Success);
        }
        Step::Wait(goal) => {
            session.wait(goal)?;
            ExitCode::Success
        }
    };
    if let Some(goal) = job.wait {
        session.wait(goal)?;
    }
    Ok(code)
}

/// A connection, and the time that is left.
struct Session {
    client: Client,
    socket: PathBuf,
    end: Option<Instant>,
    limit: Option<Duration>,
}

impl Session {
    fn open(socket: &Path, job: &Job) -> Result<Self, CtlError> {
        let end = job.timeout.and_then(|limit| Instant::now().checked_add(limit));
        let within = job.timeout.map_or(job.connect_within, |limit| limit.min(job.connect_within));
        let client = Client::connect_within(socket, within)?;
        Ok(Self { client, socket: socket.to_owned(), end, limit: job.timeout })
    }

    /// What is left of the time; a call gets a moment in any case.
    fn left(&self) -> Option<Duration> {
        let left = |end: Instant| end.saturating_duration_since(Instant::now());
        self.end.map(|end| left(end).max(Duration::from_millis(1)))
    }

    fn command(&mut self, row: &Row, payload: Payload, json: bool) -> Result<ExitCode, CtlError> {
        let Payload { body, fds } = payload;
        let passed = |fd: i32| inherited(fd).map_err(|source| CtlError::Descriptor { fd, source });
        let fds = fds.into_iter().map(passed).collect::<Result<Vec<OwnedFd>, _>>()?;
        let borrowed: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
        let answer = self.call(row.name, row.method, &body, &borrowed)?;
        let shown = row.show(answer.body.clone());
        if json {
            print(&answer.body)?;
            // What another VMM says may be of another form.
            return Ok(shown.map_or(ExitCode::Success, |shown| shown.code()));
        }
        let Shown { text, success } = shown?;
        print(text.as_bytes())?;
        Ok(if success { ExitCode::Success } else { ExitCode::VmmError })
    }

    fn call(
        &mut self,
        name: &str,
        method: Method,
        body: &Body,
        fds: &[BorrowedFd<'_>],
    ) -> Result<RawAnswer, CtlError> {
        let read;
        let body = match body {
            Body::Bytes(bytes) => bytes.as_slice(),
            Body::File(file) => {
                let name = file.as_ref().map_or("standard input".into(), |file| file.display().to_string());
                read = document(file.as_deref()).map_err(|source| CtlError::Document { name, source })?;
                read.as_slice()
            }
        };
        self.client.set_timeout(self.left()).map_err(CtlError::Limit)?;
        let _progress = progress::start(name, &self.socket);
        let answer = self.client.request(method, name, body, fds)?;
        Ok(answer.judge()?)
    }

    fn wait(&mut self, goal: Goal) -> Result<(), CtlError> {
        let left = self.limit.and(self.left());
        let _progress = progress::start(goal.about(), &self.socket);
        match goal {
            Goal::Phase(phase) => self.client.wait_for(phase, left)?,
            Goal::Ended => self.client.wait_for_end(left)?,
        }
        Ok(())
    }
}

/// Prints `text` and ends its last line. A reader that has seen enough, such as `head`, does not matter.
fn print(text: &[u8]) -> Result<(), CtlError> {
    let mut out = io::stdout().lock();
    let end: &[u8] = if text.is_empty() || text.ends_with(b"\n") { b"" } else { b"\n" };
    let printed = out.write_all(text).and_then(|()| out.write_all(end)).and_then(|()| out.flush());
    match printed {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(CtlError::Print(error)),
        _ => Ok(()),
    }
}
