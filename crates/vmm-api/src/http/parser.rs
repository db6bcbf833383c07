//! Requests out of a stream of bytes (RFC 9112). Pure: no socket, no clock.
//!
//! The parser owns the bytes that were received and not yet used, so its memory is bounded by the limits and by how
//! much its user pushes before polling.

use crate::command::Method;
use crate::error::{ApiError, Code, ErrorForm};

/// Most headers of a request.
const MAX_HEADERS: usize = 64;

/// Memory kept for the next request of a connection.
const KEPT_CAPACITY: usize = 64 * 1024;

/// What a request may have.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes of request line and headers.
    pub head: usize,
    /// Bytes of body.
    pub body: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { head: 16 * 1024, body: 1024 * 1024 }
    }
}

/// The method of a request, as far as it matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// `GET`
    Get,
    /// `PUT`
    Put,
    /// `HEAD`: no route takes it, and its answer has no body.
    Head,
    /// Any other token.
    Other,
}

impl Verb {
    fn of(token: &str) -> Self {
        match token {
            "GET" => Self::Get,
            "PUT" => Self::Put,
            "HEAD" => Self::Head,
            _ => Self::Other,
        }
    }

    /// Whether this is `method`.
    #[must_use]
    pub const fn is(self, method: Method) -> bool {
        matches!((self, method), (Self::Get, Method::Get) | (Self::Put, Method::Put))
    }
}

/// How a request is to be answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Manner {
    /// The method.
    pub verb: Verb,
    /// Whether the connection stays open.
    pub keep_alive: bool,
    /// The form of an error.
    pub errors: ErrorForm,
}

impl Manner {
    /// How a request is answered that could not be read.
    pub const UNKNOWN: Self = Self { verb: Verb::Other, keep_alive: false, errors: ErrorForm::Causes };
}

/// A whole request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// How to answer it.
    pub manner: Manner,
    /// The path, without query.
    pub path: String,
    /// The query, as it came; empty if there is none. Commands do not look at it, as the contract's server.
    pub query: String,
    /// The body.
    pub body: Vec<u8>,
    /// The offset in the connection's stream at which the request ends.
    pub end: u64,
}

/// What polling the parser gave.
#[derive(Debug, PartialEq, Eq)]
pub enum Progress {
    /// More bytes are needed.
    Incomplete,
    /// The client waits for `100 Continue` before it sends the body. Told once per request.
    Continue,
    /// A request.
    Request(Request),
}

/// The stream cannot be read further; the connection ends with this answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unreadable {
    /// The answer.
    pub error: ApiError,
    /// Its manner.
    pub manner: Manner,
}

/// The requests of one connection.
#[derive(Debug)]
pub struct Parser {
    limits: Limits,
    buffer: Vec<u8>,
    /// Bytes of `buffer` in which the end of the head was looked for.
    searched: usize,
    /// The head of the request at the start of `buffer`, once it is complete.
    head: Option<Head>,
    /// Bytes used by earlier requests.
    used: u64,
}

/// A head that has been read.
#[derive(Clone, Debug)]
struct Head {
    manner: Manner,
    path: String,
    query: String,
    /// Bytes of the head.
    length: usize,
    /// Bytes of the body to come.
    body: usize,
    /// The client waits for `100 Continue`, and was not told yet.
    expects: bool,
}

impl Parser {
    /// A parser at the start of a stream.
    #[must_use]
    pub const fn new(limits: Limits) -> Self {
        Self { limits, buffer: Vec::new(), searched: 0, head: None, used: 0 }
    }

    /// Takes received bytes.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// Whether a part of a request is there.
    #[must_use]
    pub fn started(&self) -> bool {
        !self.buffer.is_empty()
    }

    /// The offset in the stream after all bytes pushed so far.
    #[must_use]
    pub fn received(&self) -> u64 {
        self.used.saturating_add(self.buffer.len() as u64)
    }

    /// The next request, if its bytes are there.
    ///
    /// # Errors
    /// The bytes are no request this server takes. The parser must not be used further: where the next request would
    /// start is not known.
    pub fn poll(&mut self) -> Result<Progress, Box<Unreadable>> {
        if self.head.is_none() {
            self.skip_empty_lines();
            match self.find_head()? {
                Some(head) => self.head = Some(head),
                None => return Ok(Progress::Incomplete),
            }
        }
        let Some(head) = self.head.as_mut() else { return Ok(Progress::Incomplete) };
        // Both are bounded by the limits.
        let total = head.length.saturating_add(head.body);
        if self.buffer.len() < total {
            return Ok(if std::mem::take(&mut head.expects) {
                Progress::Continue
            } else {
                Progress::Incomplete
            });
        }
        Ok(self.take_request(total))
    }

    fn take_request(&mut self, total: usize) -> Progress {
        let Some(head) = self.head.take() else { return Progress::Incomplete };
        let body = self.buffer.get(head.length..total).unwrap_or_default().to_vec();
        self.consume(total);
        let Head { manner, path, query, .. } = head;
        Progress::Request(Request { manner, path, query, body, end: self.used })
    }

    fn consume(&mut self, count: usize) {
        let count = count.min(self.buffer.len());
        self.buffer.drain(..count);
        self.used = self.used.saturating_add(count as u64);
        self.searched = 0;
        if self.buffer.len() < KEPT_CAPACITY {
            self.buffer.shrink_to(KEPT_CAPACITY);
        }
    }

    /// Empty lines before a request line are to be ignored (RFC 9112 section 2.2).
    fn skip_empty_lines(&mut self) {
        let mut rest = self.buffer.as_slice();
        while let Some(next) = rest.strip_prefix(b"\r\n").or_else(|| rest.strip_prefix(b"\n")) {
            rest = next;
        }
        let empty = self.buffer.len().saturating_sub(rest.len());
        if empty > 0 {
            self.consume(empty);
        }
    }

    fn find_head(&mut self) -> Result<Option<Head>, Box<Unreadable>> {
        // The end is looked for only in what is new, so that a head sent byte by byte costs no more than its length.
        let from = self.searched.saturating_sub(3);
        let end = self.buffer.get(from..).and_then(head_end).map(|end| from.saturating_add(end));
        self.searched = self.buffer.len();
        match end {
            Some(end) if end <= self.limits.head => self.read_head(end).map(Some),
            None if self.buffer.len() <= self.limits.head => Ok(None),
            _ => Err(unreadable(Code::HeadTooLarge, format!("the head is over {} bytes", self.limits.head))),
        }
    }

    fn read_head(&self, end: usize) -> Result<Head, Box<Unreadable>> {
        let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
        let mut parsed = httparse::Request::new(&mut headers);
        match parsed.parse(self.buffer.get(..end).unwrap_or_default()) {
            Ok(httparse::Status::Complete(length)) => head_of(&parsed, length, self.limits.body),
            Ok(httparse::Status::Partial) => Err(malformed("the head ends too early")),
            Err(httparse::Error::TooManyHeaders) => {
                Err(unreadable(Code::HeadTooLarge, format!("there are more than {MAX_HEADERS} headers")))
            }
            Err(httparse::Error::Version) => {
                Err(unreadable(Code::UnsupportedVersion, "only HTTP/1.0 and HTTP/1.1 are spoken here"))
            }
            Err(error) => Err(malformed(&error.to_string())),
        }
    }
}

/// The offset after the first empty line.
fn head_end(bytes: &[u8]) -> Option<usize> {
    let mut at = 0usize;
    loop {
        let rest = bytes.get(at..)?;
        at = at.saturating_add(rest.iter().position(|byte| *byte == b'\n')?).saturating_add(1);
        let after = bytes.get(at..)?;
        if after.starts_with(b"\n") {
            return Some(at.saturating_add(1));
        }
        if after.starts_with(b"\r\n") {
            return Some(at.saturating_add(2));
        }
    }
}

fn head_of(parsed: &httparse::Request<'_, '_>, length: usize, most: usize) -> Result<Head, Box<Unreadable>> {
    let manner = manner_of(parsed);
    let refuse = |code, detail: String| Box::new(Unreadable { error: ApiError::new(code, detail), manner });
    let (path, query) = target_of(parsed.path.unwrap_or_default())
        .ok_or_else(|| refuse(Code::MalformedRequest, "the request target is not a path".to_owned()))?;
    if let Some(coding) = header(parsed.headers, "transfer-encoding") {
        return Err(if coding.eq_ignore_ascii_case(b"chunked") {
            refuse(Code::LengthRequired, "chunked requests are not taken; send a Content-Length".to_owned())
        } else {
            refuse(Code::UnsupportedCoding, "transfer codings are not supported".to_owned())
        });
    }
    let body = content_length(parsed)
        .ok_or_else(|| refuse(Code::MalformedRequest, "the Content-Length is not one number".to_owned()))?;
    let body = usize::try_from(body).ok().filter(|body| *body <= most);
    let body = body.ok_or_else(|| refuse(Code::BodyTooLarge, format!("the body is over {most} bytes")))?;
    let expects = match header(parsed.headers, "expect") {
        None => false,
        Some(expectation) if expectation.eq_ignore_ascii_case(b"100-continue") => parsed.version == Some(1),
        Some(_) => {
            return Err(refuse(Code::ExpectationFailed, "only 100-continue can be expected".to_owned()));
        }
    };
    Ok(Head { manner, path, query, length, body, expects })
}

fn manner_of(parsed: &httparse::Request<'_, '_>) -> Manner {
    let connection =
        |option: &str| headers(parsed.headers, "connection").any(|value| has_token(value, option));
    let keep_alive = if parsed.version == Some(1) { !connection("close") } else { connection("keep-alive") };
    let wants_problem = headers(parsed.headers, "accept").any(accepts_problem);
    let errors = if wants_problem { ErrorForm::Problem } else { ErrorForm::Causes };
    Manner { verb: Verb::of(parsed.method.unwrap_or_default()), keep_alive, errors }
}

/// Path and query of a request target in origin form or absolute form.
fn target_of(target: &str) -> Option<(String, String)> {
    let target = match target.strip_prefix("http://") {
        Some(rest) => rest.find('/').and_then(|slash| rest.get(slash..)).unwrap_or("/"),
        None => target,
    };
    let target = target.split('#').next().unwrap_or_default();
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    path.starts_with('/').then(|| (path.to_owned(), query.to_owned()))
}

/// The length of the body, 0 if none is stated; `None` if it is not one plain number.
fn content_length(parsed: &httparse::Request<'_, '_>) -> Option<u64> {
    let mut stated = headers(parsed.headers, "content-length");
    let Some(first) = stated.next() else { return Some(0) };
    if stated.next().is_some() || first.is_empty() || !first.iter().all(u8::is_ascii_digit) {
        return None;
    }
    // More digits than 64 bits hold are still a number, and surely too large.
    Some(std::str::from_utf8(first).ok()?.parse().unwrap_or(u64::MAX))
}

fn headers<'a>(all: &'a [httparse::Header<'a>], name: &'a str) -> impl Iterator<Item = &'a [u8]> {
    all.iter().filter(move |header| header.name.eq_ignore_ascii_case(name)).map(|header| header.value)
}

fn header<'a>(all: &'a [httparse::Header<'a>], name: &'a str) -> Option<&'a [u8]> {
    headers(all, name).next()
}

fn has_token(value: &[u8], token: &str) -> bool {
    value.split(|byte| *byte == b',').any(|item| item.trim_ascii().eq_ignore_ascii_case(token.as_bytes()))
}

/// Whether an `Accept` value asks for JSON by name. Existing clients of the contract send `*/*`.
fn accepts_problem(value: &[u8]) -> bool {
    value.split(|byte| *byte == b',').any(|item| {
        let mut parts = item.split(|byte| *byte == b';').map(<[u8]>::trim_ascii);
        let name = parts.next().unwrap_or_default();
        let named = name.eq_ignore_ascii_case(b"application/json")
            || name.eq_ignore_ascii_case(b"application/problem+json");
        named && !parts.any(|part| matches!(part, b"q=0" | b"q=0.0" | b"q=0.00" | b"q=0.000"))
    })
}

fn malformed(detail: &str) -> Box<Unreadable> {
    unreadable(Code::MalformedRequest, format!("the request cannot be read: {detail}"))
}

fn unreadable(code: Code, detail: impl Into<String>) -> Box<Unreadable> {
    Box::new(Unreadable { error: ApiError::new(code, detail), manner: Manner::UNKNOWN })
}
