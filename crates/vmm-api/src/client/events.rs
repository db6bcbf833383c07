//! The events of a VMM, one after the other.

use std::io;
use std::time::Duration;

use super::{Client, ClientError, MAX_HEAD, read_head};
use crate::events::{EVENTS_ROUTE, StreamItem};
use crate::http::route::ROOT;

/// Most bytes of a line: far more than any VMM writes.
const MAX_LINE: usize = 64 * 1024;

/// The events of a VMM, as they happen. Ends when the VMM does.
///
/// An error that is a time limit's is not the end: the next call waits again.
#[derive(Debug)]
pub struct EventReader {
    client: Client,
    ended: bool,
}

impl Client {
    /// The events from number `from` on (1: from the first), and then those to come. The connection is used up by it.
    ///
    /// # Errors
    /// The VMM refuses, or the exchange fails.
    pub fn events(self, from: u64) -> Result<EventReader, ClientError> {
        self.stream_events(&format!("from={from}"))
    }

    /// The events that are to come.
    ///
    /// # Errors
    /// The VMM refuses, or the exchange fails.
    pub fn events_to_come(self) -> Result<EventReader, ClientError> {
        self.stream_events("from=next")
    }

    /// The events from number `from` up to now.
    ///
    /// # Errors
    /// The VMM refuses, or the exchange fails.
    pub fn events_so_far(self, from: u64) -> Result<EventReader, ClientError> {
        self.stream_events(&format!("from={from}&follow=false"))
    }

    fn stream_events(mut self, query: &str) -> Result<EventReader, ClientError> {
        let unreadable = |what: String| ClientError::Answer { name: EVENTS_ROUTE.to_owned(), what };
        if self.out_of_step {
            return Err(ClientError::OutOfStep { name: EVENTS_ROUTE.to_owned() });
        }
        let request = format!(
            "GET {ROOT}{EVENTS_ROUTE}?{query} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n\r\n"
        );
        let fail = |source| ClientError::Io { name: EVENTS_ROUTE.to_owned(), source };
        self.write(request.as_bytes(), &[]).map_err(fail)?;
        loop {
            match read_head(&self.buffer).map_err(unreadable)? {
                Some(head) if head.status == 200 => {
                    self.buffer.drain(..head.length);
                    return Ok(EventReader { client: self, ended: false });
                }
                Some(_) => break,
                None if self.buffer.len() > MAX_HEAD => {
                    return Err(unreadable("its head is too long".into()));
                }
                None => self.fill(EVENTS_ROUTE)?,
            }
        }
        match self.read_answer(EVENTS_ROUTE)?.judge() {
            Ok(answer) => Err(unreadable(format!("status {} is no stream's", answer.status))),
            Err(error) => Err(error),
        }
    }
}

impl EventReader {
    /// Limits the wait for the next event.
    ///
    /// # Errors
    /// The time is zero.
    pub fn set_timeout(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.client.set_timeout(timeout)
    }

    /// The next line as it came, with its end; for those who pass it on.
    pub fn next_line(&mut self) -> Option<Result<Vec<u8>, ClientError>> {
        if self.ended {
            return None;
        }
        let line = self.read();
        self.ended = match &line {
            Ok(line) => line.is_none(),
            Err(error) => !error.is_timeout(),
        };
        line.transpose()
    }

    fn read(&mut self) -> Result<Option<Vec<u8>>, ClientError> {
        let unreadable = |what: String| ClientError::Answer { name: EVENTS_ROUTE.to_owned(), what };
        let mut searched = 0;
        loop {
            let buffer = &mut self.client.buffer;
            let found = buffer.iter().skip(searched).position(|byte| *byte == b'\n');
            if let Some(end) = found.map(|at| searched.saturating_add(at)) {
                return Ok(Some(buffer.drain(..=end).collect()));
            }
            if buffer.len() > MAX_LINE {
                return Err(unreadable("a line is too long".to_owned()));
            }
            searched = buffer.len();
            match self.client.fill(EVENTS_ROUTE) {
                Err(ClientError::Io { source, .. }) if source.kind() == io::ErrorKind::UnexpectedEof => {
                    // What is left is the start of a line that a stopped VMM did not finish.
                    return Ok(None);
                }
                other => other?,
            }
        }
    }
}

impl Iterator for EventReader {
    type Item = Result<StreamItem, ClientError>;

    fn next(&mut self) -> Option<Self::Item> {
        let line = self.next_line()?;
        Some(line.and_then(|line| {
            StreamItem::parse(&line).map_err(|error| {
                self.ended = true;
                ClientError::Answer { name: EVENTS_ROUTE.to_owned(), what: error.to_string() }
            })
        }))
    }
}
