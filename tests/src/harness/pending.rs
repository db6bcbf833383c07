//! Requests that are not waited for.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use super::{Answer, LIMIT, Requests, wait_until};

/// A request that was sent, on a connection of its own. Dropped, it is a client that leaves.
#[derive(Debug)]
pub struct Pending {
    stream: UnixStream,
    received: Vec<u8>,
    ended: bool,
}

impl Pending {
    /// Sends a request.
    ///
    /// # Panics
    /// When it cannot be sent.
    #[must_use]
    pub fn send(socket: &Path, name: &str, body: &[u8]) -> Self {
        let mut stream = UnixStream::connect(socket).expect("the API socket takes a connection");
        let (method, length) = (Requests::method(name).name(), body.len());
        let head = format!(
            "{method} /api/v1/{name} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n"
        );
        let bytes = [head.as_bytes(), body].concat();
        stream.write_all(&bytes).expect("the API takes a request");
        stream.set_nonblocking(true).expect("a socket that does not block");
        Self { stream, received: Vec::new(), ended: false }
    }

    /// Whether the answer is there; of a stream, its beginning.
    ///
    /// # Panics
    /// When the connection breaks.
    pub fn is_answered(&mut self) -> bool {
        let mut buffer = [0; 4096];
        while !self.ended {
            match self.stream.read(&mut buffer) {
                Ok(0) => self.ended = true,
                Ok(count) => self.received.extend_from_slice(buffer.get(..count).unwrap_or_default()),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => panic!("{error} in an answer"),
            }
        }
        self.ended || self.is_stream()
    }

    fn is_stream(&self) -> bool {
        let text = String::from_utf8_lossy(&self.received);
        text.split_once("\r\n\r\n").is_some_and(|(head, _)| head.contains("application/x-ndjson"))
    }

    /// Waits for the answer.
    ///
    /// # Panics
    /// When it takes longer than [`LIMIT`], or is none.
    pub fn answer(&mut self) -> Answer {
        wait_until(LIMIT, || self.is_answered().then_some(()), || "an answer".to_owned());
        let text = String::from_utf8_lossy(&self.received);
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {text:?}"));
        let status = head.split(' ').nth(1).and_then(|word| word.parse().ok());
        let status = status.unwrap_or_else(|| panic!("no status: {head:?}"));
        Answer { status, body: body.to_owned() }
    }
}
