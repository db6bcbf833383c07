//! The smallest HTTP client, so that what is measured is the server.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use crate::Result;
use crate::process::Process;

pub(crate) const PING: &[u8] = b"GET /api/v1/vmm.ping HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n";
pub(crate) const VM_INFO: &[u8] = b"GET /api/v1/vm.info HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n";

/// A PUT request of the command `name`.
pub(crate) fn put(name: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    format!("PUT /api/v1/{name} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n{body}")
        .into_bytes()
}

/// A connection that is kept.
pub(crate) struct Connection {
    stream: UnixStream,
    buffer: Vec<u8>,
}

impl Connection {
    /// Connects as soon as `process` listens.
    pub(crate) fn wait_for(socket: &Path, process: &mut Process) -> Result<Self> {
        loop {
            match UnixStream::connect(socket) {
                Ok(stream) => return Ok(Self { stream, buffer: vec![0; 64 << 10] }),
                // Not asleep: a timer would be coarser than what is measured.
                Err(_) if process.is_running()? => std::thread::yield_now(),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Sends the request and reads the whole answer, which must be 200 or 204.
    pub(crate) fn request(&mut self, request: &[u8]) -> Result<()> {
        self.stream.write_all(request)?;
        let mut filled = 0;
        loop {
            filled += self.read_more(filled)?;
            let answer = self.buffer.get(..filled).unwrap_or_default();
            if let Some(length) = answer_length(answer)?
                && filled >= length
            {
                return Ok(());
            }
        }
    }

    /// Sends bytes and awaits nothing.
    pub(crate) fn send(&mut self, bytes: &[u8]) -> Result<()> {
        Ok(self.stream.write_all(bytes)?)
    }

    /// Sends the request and reads it back.
    pub(crate) fn echo(&mut self, request: &[u8]) -> Result<()> {
        self.stream.write_all(request)?;
        let mut filled = 0;
        while filled < request.len() {
            filled += self.read_more(filled)?;
        }
        Ok(())
    }

    fn read_more(&mut self, filled: usize) -> Result<usize> {
        let room = self.buffer.get_mut(filled..).unwrap_or_default();
        match self.stream.read(room)? {
            0 => Err("the connection was closed in an answer, or the answer is too long".into()),
            length => Ok(length),
        }
    }
}

/// Bytes of the answer with its head; `None` until the head is there.
fn answer_length(answer: &[u8]) -> Result<Option<usize>> {
    const END: &[u8] = b"\r\n\r\n";
    let Some(head) = answer.windows(END.len()).position(|bytes| bytes == END) else { return Ok(None) };
    let text = std::str::from_utf8(answer.get(..head).unwrap_or_default())?;
    if text.starts_with("HTTP/1.1 204") {
        return Ok(Some(head + END.len()));
    }
    if !text.starts_with("HTTP/1.1 200") {
        return Err(format!("an answer that is no success: {text}").into());
    }
    let length = text.lines().find_map(|line| line.strip_prefix("Content-Length: "));
    Ok(Some(head + END.len() + length.ok_or("an answer without a length")?.trim().parse::<usize>()?))
}
