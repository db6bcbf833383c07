//! A blocking client of the API, typed by the same commands as the server.
//!
//! It also reads what other VMMs of the contract answer: errors as arrays of causes or plain text, replies with fewer or
//! more fields. [`Client::call`] is typed; [`Client::call_any`] takes any name; [`Client::request`] judges nothing.
//!
//! ```no_run
//! use std::time::Duration;
//! use vmm_api::client::Client;
//! use vmm_api::commands::{vm, vmm};
//! use vmm_state::Phase;
//!
//! let ten_seconds = Duration::from_secs(10);
//! let mut client = Client::connect_within("/run/vmm/api.sock", ten_seconds)?;
//! println!("VMM {}", client.call::<vmm::Ping>(&())?.version);
//! client.call::<vm::Boot>(&())?;
//! client.wait_for(Phase::Running, Some(ten_seconds))?;
//! println!("{:?}", client.call::<vm::Info>(&())?.state);
//! # Ok::<(), vmm_api::client::ClientError>(())
//! ```

mod answer;
mod events;
mod wait;

use crate::command::{Command, Decode, Encode, Incoming, Method};
use crate::config::UnknownFields;
use crate::error::{ApiError, Code, Problem};
use crate::http::descriptors::send;
use crate::http::route::ROOT;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use vmm_state::Phase;

pub use answer::RawAnswer;
pub use events::EventReader;

/// Most bytes of an answer's head.
const MAX_HEAD: usize = 64 * 1024;

/// Most bytes of an answer's body.
const MAX_BODY: usize = 64 * 1024 * 1024;

/// A call that did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error("cannot connect to API socket {}", .path.display())]
    Connect {
        /// The socket's path.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The connection broke, or a time limit passed.
    #[error("cannot exchange {name} with the VMM")]
    Io {
        /// The command.
        name: String,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The answer is not HTTP, or not what this command is answered.
    #[error("the VMM's answer to {name} cannot be read: {what}")]
    Answer {
        /// The command.
        name: String,
        /// What is wrong with it.
        what: String,
    },
    /// The request has no JSON form, or its command no name.
    #[error("the request cannot be written")]
    Request(#[source] ApiError),
    /// An earlier call broke off: what comes next on this connection may be its answer.
    #[error("{name} was not sent: an earlier call on this connection broke off")]
    OutOfStep {
        /// The command.
        name: String,
    },
    /// The VMM says no.
    #[error("{0}")]
    Refused(Box<Problem>),
    /// The VM did not get there in time.
    #[error("the VM is not {wanted} after {:.1} s but {found}", .limit.as_secs_f32())]
    NotReached {
        /// Where it should be.
        wanted: Phase,
        /// Where it was last: a word of the VMM's.
        found: String,
        /// The time that passed.
        limit: Duration,
    },
    /// The VMM did not end in time.
    #[error("the VMM has not ended after {:.1} s", .limit.as_secs_f32())]
    NotEnded {
        /// The time that passed.
        limit: Duration,
    },
}

impl ClientError {
    /// The code of a refusal, if the VMM gave one that this build knows.
    #[must_use]
    pub fn code(&self) -> Option<Code> {
        match self {
            Self::Refused(problem) => Code::from_name(&problem.code),
            _ => None,
        }
    }

    /// Whether a time limit passed.
    #[must_use]
    pub fn is_timeout(&self) -> bool {
        match self {
            Self::NotReached { .. } | Self::NotEnded { .. } => true,
            // A time limit of a socket shows as the first (socket(7)).
            Self::Io { source, .. } => {
                matches!(source.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
            }
            _ => false,
        }
    }

    /// Whether there is no VMM: nobody listens, or it went away.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        matches!(self, Self::Connect { .. } | Self::Io { .. }) && !self.is_timeout()
    }
}

/// A connection to a VMM. Calls are made one after the other. After one that broke off (an error of the exchange, not a
/// refusal) the connection is of no use any more.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    /// Received and not yet used.
    buffer: Vec<u8>,
    /// The longest that a call may take.
    limit: Option<Duration>,
    /// When the call that is being made has taken that long.
    deadline: Option<Instant>,
    /// A call broke off.
    out_of_step: bool,
}

/// A connection that was made elsewhere.
impl From<UnixStream> for Client {
    fn from(stream: UnixStream) -> Self {
        Self { stream, buffer: Vec::new(), limit: None, deadline: None, out_of_step: false }
    }
}

impl Client {
    /// Connects to the socket at `path`.
    ///
    /// # Errors
    /// Nobody listens there.
    pub fn connect(path: impl AsRef<Path>) -> Result<Self, ClientError> {
        let path = path.as_ref();
        let stream = UnixStream::connect(path)
            .map_err(|source| ClientError::Connect { path: path.to_owned(), source })?;
        Ok(stream.into())
    }

    /// Limits each call as a whole; without a limit it waits as long as the command takes. A command whose answer was
    /// not waited for goes on in the VMM.
    ///
    /// # Errors
    /// The time is zero.
    pub fn set_timeout(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.limit_parts(timeout)?;
        self.limit = timeout;
        Ok(())
    }

    /// Limits each read and write.
    fn limit_parts(&self, limit: Option<Duration>) -> io::Result<()> {
        self.stream.set_read_timeout(limit)?;
        self.stream.set_write_timeout(limit)
    }

    /// Limits the next read or write to what is left of the call's time.
    fn limit_to_rest(&self) -> io::Result<()> {
        let Some(deadline) = self.deadline else { return Ok(()) };
        match deadline.saturating_duration_since(Instant::now()) {
            Duration::ZERO => Err(io::ErrorKind::TimedOut.into()),
            rest => self.limit_parts(Some(rest)),
        }
    }

    /// Makes a call and waits for its reply.
    ///
    /// # Errors
    /// The VMM refuses, or the exchange fails.
    pub fn call<C: Command>(&mut self, request: &C::Request) -> Result<C::Reply, ClientError> {
        self.call_with_fds::<C>(request, &[])
    }

    /// Makes a call that carries file descriptors.
    ///
    /// # Errors
    /// The VMM refuses, or the exchange fails.
    pub fn call_with_fds<C: Command>(
        &mut self,
        request: &C::Request,
        fds: &[BorrowedFd<'_>],
    ) -> Result<C::Reply, ClientError> {
        let body = request.encode().map_err(ClientError::Request)?;
        let answer = self.request(C::METHOD, C::NAME, &body, fds)?;
        let answer = answer.judge()?;
        // A newer VMM may say more than this client knows.
        let unknown_fields = UnknownFields::Warn;
        let incoming = Incoming { body: answer.body, fds: Vec::new(), unknown_fields };
        C::Reply::decode(incoming)
            .map_err(|error| ClientError::Answer { name: C::NAME.to_owned(), what: error.to_string() })
    }

    /// Makes a call by its name and gives the reply as it came, for commands that this build does not know.
    ///
    /// # Errors
    /// The VMM refuses, or the exchange fails.
    pub fn call_any(&mut self, name: &str, method: Method, body: &[u8]) -> Result<RawAnswer, ClientError> {
        self.request(method, name, body, &[])?.judge()
    }

    /// Sends one request and gives its answer as it came, refusals too.
    ///
    /// # Errors
    /// The exchange fails, or `name` is nothing that a path can hold.
    pub fn request(
        &mut self,
        method: Method,
        name: &str,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<RawAnswer, ClientError> {
        if name.bytes().any(|byte| !byte.is_ascii_graphic()) {
            let what = format!("{name:?} cannot be the name of a command");
            return Err(ClientError::Request(ApiError::new(Code::MalformedRequest, what)));
        }
        if self.out_of_step {
            return Err(ClientError::OutOfStep { name: name.to_owned() });
        }
        self.deadline = self.limit.and_then(|limit| Instant::now().checked_add(limit));
        let answer = self.exchange(method, name, body, fds);
        self.out_of_step = answer.is_err();
        if self.deadline.take().is_some() {
            let restored = self.limit_parts(self.limit);
            restored.map_err(|source| ClientError::Io { name: name.to_owned(), source })?;
        }
        answer
    }

    fn exchange(
        &mut self,
        method: Method,
        name: &str,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<RawAnswer, ClientError> {
        let method = method.name();
        let mut head =
            format!("{method} {ROOT}{name} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n");
        if !body.is_empty() {
            head.push_str(&format!("Content-Type: application/json\r\nContent-Length: {}\r\n", body.len()));
        }
        head.push_str("\r\n");
        let numbers: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        // A server that refuses early (too large a body) closes its side; its answer is there to be read all the same.
        let written = self.write(&[head.as_bytes(), body].concat(), &numbers);
        match (self.read_answer(name), written) {
            (Err(ClientError::Io { name, source: _ }), Err(source)) => Err(ClientError::Io { name, source }),
            (answer, _) => answer,
        }
    }

    fn write(&self, mut bytes: &[u8], fds: &[RawFd]) -> io::Result<()> {
        let mut fds = fds;
        while !bytes.is_empty() {
            self.limit_to_rest()?;
            match send(&self.stream, bytes, fds) {
                Ok(count) => {
                    fds = &[];
                    bytes = bytes.get(count..).unwrap_or_default();
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn read_answer(&mut self, name: &str) -> Result<RawAnswer, ClientError> {
        let unreadable = |what: &str| ClientError::Answer { name: name.to_owned(), what: what.to_owned() };
        loop {
            let head = loop {
                match read_head(&self.buffer).map_err(|what| unreadable(&what))? {
                    Some(head) => break head,
                    None if self.buffer.len() > MAX_HEAD => return Err(unreadable("its head is too long")),
                    None => self.fill(name)?,
                }
            };
            if head.body > MAX_BODY {
                return Err(unreadable("its body is too long"));
            }
            let total = head.length.saturating_add(head.body);
            while self.buffer.len() < total {
                self.fill(name)?;
            }
            let body = self.buffer.get(head.length..total).unwrap_or_default().to_vec();
            self.buffer.drain(..total);
            // Interim answers come before the real one.
            if head.status >= 200 {
                return Ok(RawAnswer { status: head.status, body });
            }
        }
    }

    fn fill(&mut self, name: &str) -> Result<(), ClientError> {
        let fail = |source| ClientError::Io { name: name.to_owned(), source };
        let mut bytes = [0; 16 * 1024];
        let count = loop {
            self.limit_to_rest().map_err(fail)?;
            match self.stream.read(&mut bytes) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => break other.map_err(fail)?,
            }
        };
        if count == 0 {
            return Err(fail(io::ErrorKind::UnexpectedEof.into()));
        }
        self.buffer.extend_from_slice(bytes.get(..count).unwrap_or_default());
        Ok(())
    }
}

struct AnswerHead {
    status: u16,
    length: usize,
    body: usize,
}

fn read_head(bytes: &[u8]) -> Result<Option<AnswerHead>, String> {
    let mut headers = [httparse::EMPTY_HEADER; 64];
    let mut parsed = httparse::Response::new(&mut headers);
    let length = match parsed.parse(bytes) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(error) => return Err(error.to_string()),
    };
    let stated = parsed.headers.iter().find(|header| header.name.eq_ignore_ascii_case("content-length"));
    let body = match stated.map(|header| std::str::from_utf8(header.value).unwrap_or_default().parse()) {
        None => 0,
        Some(Ok(body)) => body,
        Some(Err(_)) => return Err("its Content-Length is no number".to_owned()),
    };
    Ok(Some(AnswerHead { status: parsed.code.unwrap_or_default(), length, body }))
}
