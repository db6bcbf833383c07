//! The stream as a client reads it.

use serde::Deserialize;
use serde_json::{Map, Value};

/// One line of the stream.
#[derive(Clone, Debug, PartialEq)]
pub enum StreamItem {
    /// An event.
    Event(Received),
    /// Events that were gone before this reader came for them.
    Lost {
        /// How many.
        count: u64,
        /// Number of the event that follows.
        next: u64,
    },
}

/// An event as it was told. A newer VMM may tell kinds that this crate does not know.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Received {
    /// Its number, from 1. To resume after it, read from the next.
    pub seq: u64,
    /// When.
    pub time: Time,
    /// Who tells.
    pub source: String,
    /// What happened.
    pub event: String,
    /// The machine that it is about.
    #[serde(default)]
    pub machine: Option<u64>,
    /// What it says besides.
    #[serde(default)]
    pub properties: Map<String, Value>,
}

/// A time since 1970 in UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub struct Time {
    /// Seconds.
    pub secs: u64,
    /// Nanoseconds of the second.
    pub nanos: u32,
}

impl StreamItem {
    /// Reads a line.
    ///
    /// # Errors
    /// It is none of the stream's.
    pub fn parse(line: &[u8]) -> Result<Self, serde_json::Error> {
        #[derive(Deserialize)]
        struct Lost {
            lost: u64,
            next: u64,
        }
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Line {
            Lost(Lost),
            Event(Received),
        }
        Ok(match serde_json::from_slice(line)? {
            Line::Lost(Lost { lost, next }) => Self::Lost { count: lost, next },
            Line::Event(event) => Self::Event(event),
        })
    }
}

impl Received {
    /// `source/event`.
    #[must_use]
    pub fn name(&self) -> String {
        format!("{}/{}", self.source, self.event)
    }
}
