//! The events of a VMM, one after the other.

use std::io;

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
        let answer = self.read_answer(EVENTS_ROUTE)?;
        Err(match serde_json::from_slice(&answer.body) {
            Ok(problem) => ClientError::Refused(Box::new(problem)),
            Err(_) => unreadable(format!("status {} without a problem report", answer.status)),
        })
    }
}

impl EventReader {
    fn read(&mut self) -> Result<Option<StreamItem>, ClientError> {
        let unreadable = |what: String| ClientError::Answer { name: EVENTS_ROUTE.to_owned(), what };
        let mut searched = 0;
        loop {
            let buffer = &mut self.client.buffer;
            let found = buffer.iter().skip(searched).position(|byte| *byte == b'\n');
            if let Some(end) = found.map(|at| searched.saturating_add(at)) {
                let line: Vec<u8> = buffer.drain(..=end).collect();
                return StreamItem::parse(&line).map(Some).map_err(|error| unreadable(error.to_string()));
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
        if self.ended {
            return None;
        }
        let item = self.read();
        let passing = |error: &ClientError| {
            matches!(error, ClientError::Io { source, .. }
                if matches!(source.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut))
        };
        self.ended = match &item {
            Ok(item) => item.is_none(),
            Err(error) => !passing(error),
        };
        item.transpose()
    }
}
