//! A blocking client of the API, typed by the same commands as the server.
//!
//! ```no_run
//! use vmm_api::client::Client;
//! use vmm_api::commands::{vm, vmm};
//!
//! let mut client = Client::connect("/run/vmm/api.sock")?;
//! println!("VMM {}", client.call::<vmm::Ping>(&())?.version);
//! client.call::<vm::Boot>(&())?;
//! println!("{:?}", client.call::<vm::Info>(&())?.state);
//! # Ok::<(), vmm_api::client::ClientError>(())
//! ```

mod events;

use crate::command::{Command, Decode, Encode, Incoming, Method};
use crate::config::UnknownFields;
use crate::error::{ApiError, Problem};
use crate::http::descriptors::send;
use crate::http::route::ROOT;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

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
    /// The request has no JSON form.
    #[error("the request cannot be written")]
    Request(#[source] ApiError),
    /// The VMM says no.
    #[error("{0}")]
    Refused(Box<Problem>),
}

/// An answer as it came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawAnswer {
    /// HTTP status.
    pub status: u16,
    /// The body; empty if there was none.
    pub body: Vec<u8>,
}

/// A connection to a VMM. Calls are made one after the other.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    /// Received and not yet used.
    buffer: Vec<u8>,
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
        Ok(Self { stream, buffer: Vec::new() })
    }

    /// Limits the wait for each part of an answer; without a limit a call waits as long as the command takes.
    ///
    /// # Errors
    /// The time is zero.
    pub fn set_timeout(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.stream.set_read_timeout(timeout)?;
        self.stream.set_write_timeout(timeout)
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
        let unreadable = |what| ClientError::Answer { name: C::NAME.to_owned(), what };
        match answer.status {
            200..=299 => {
                // A newer VMM may say more than this client knows.
                let unknown_fields = UnknownFields::Warn;
                let incoming = Incoming { body: answer.body, fds: Vec::new(), unknown_fields };
                C::Reply::decode(incoming).map_err(|error| unreadable(error.to_string()))
            }
            status => match serde_json::from_slice(&answer.body) {
                Ok(problem) => Err(ClientError::Refused(Box::new(problem))),
                Err(_) => Err(unreadable(format!("status {status} without a problem report"))),
            },
        }
    }

    /// Sends one request and gives its answer as it came.
    ///
    /// # Errors
    /// The exchange fails.
    pub fn request(
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
