//! Answers that go on: what a stream is to the server.
//!
//! A stream does not pass the host. The API thread pulls from it as fast as its client takes it, one piece at a time, so
//! a slow client costs one piece of memory; a stream that has nothing wakes the thread when it has.

use std::fmt;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use crate::error::ApiError;

/// Bytes that are pulled for a client at one time.
pub(crate) const PIECE: usize = 16 * 1024;

/// A route whose answer goes on.
pub trait StreamRoute: Send + fmt::Debug {
    /// The route below `/api/v1/`; its method is GET.
    fn name(&self) -> &'static str;

    /// One sentence for help and documents.
    fn doc(&self) -> &'static str;

    /// The answer's media type.
    fn media_type(&self) -> &'static str;

    /// A stream for one client.
    ///
    /// # Errors
    /// The query makes no sense.
    fn open(&self, query: Query<'_>) -> Result<Box<dyn Stream>, ApiError>;
}

/// One client's stream. Never blocks.
pub trait Stream: Send + fmt::Debug {
    /// Appends the next bytes to `to`, which is empty: about as many as `room` at most. If there is nothing yet, `waker` is
    /// written to when there is.
    fn pull(&mut self, room: usize, to: &mut Vec<u8>, waker: &Arc<EventFd>) -> Pulled;
}

/// What pulling gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pulled {
    /// Bytes.
    Data,
    /// Nothing yet.
    Nothing,
    /// Nothing any more.
    End,
}

/// The query of a request: `key=value&key=value`, as it came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Query<'a>(pub &'a str);

impl<'a> Query<'a> {
    /// Keys and values; a key alone has an empty value. Nothing is decoded: keys and values of streams are plain words.
    pub fn pairs(self) -> impl Iterator<Item = (&'a str, &'a str)> {
        let parts = self.0.split('&').filter(|part| !part.is_empty());
        parts.map(|part| part.split_once('=').unwrap_or((part, "")))
    }
}

/// The streams of a server.
#[derive(Debug)]
pub(crate) struct Streams {
    pub(crate) routes: Vec<Box<dyn StreamRoute>>,
    /// Readable when a stream that had nothing has something.
    pub(crate) ready: Arc<EventFd>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_are_split_into_keys_and_values() {
        let pairs = |text| Query(text).pairs().collect::<Vec<_>>();
        assert_eq!(pairs("a=1&b&&c=2=3&="), [("a", "1"), ("b", ""), ("c", "2=3"), ("", "")]);
        assert_eq!(pairs(""), []);
    }
}
