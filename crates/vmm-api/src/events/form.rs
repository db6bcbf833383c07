//! The two forms of an event. Pure.

use std::time::Duration;

use serde::Serialize;
use serde_json::{Map, Value};

use super::Event;

/// No line of either form is this long, its newline included: a pipe takes it whole or not at all (`PIPE_BUF`), and the
/// monitor's readers have buffers of this size.
pub const LINE_MOST: usize = 4096;

/// What the stream says of every event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// Number of the event, from 1.
    pub seq: u64,
    /// When, since 1970 in UTC.
    pub time: Duration,
    /// Number of the machine that it is about, from 1; 0 if it is about none.
    pub machine: u64,
}

#[derive(Serialize)]
struct StreamForm<'a> {
    seq: u64,
    time: Clock,
    source: &'a str,
    event: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    machine: Option<u64>,
    #[serde(skip_serializing_if = "Map::is_empty")]
    properties: Map<String, Value>,
}

#[derive(Serialize)]
struct Clock {
    secs: u64,
    nanos: u32,
}

impl From<Duration> for Clock {
    fn from(time: Duration) -> Self {
        Self { secs: time.as_secs(), nanos: time.subsec_nanos() }
    }
}

/// The event as a line of the API's stream, newline and all.
#[must_use]
pub fn stream_line(stamp: &Stamp, event: &Event) -> Vec<u8> {
    let kind = event.kind();
    let form = StreamForm {
        seq: stamp.seq,
        time: stamp.time.into(),
        source: kind.source,
        event: kind.event,
        machine: (stamp.machine != 0).then_some(stamp.machine),
        properties: event.properties().map(|(key, value)| (key.to_owned(), value)).collect(),
    };
    // Numbers and texts always have a JSON form.
    let mut line = serde_json::to_vec(&form).unwrap_or_default();
    line.push(b'\n');
    line
}

/// The event as a line of the contract's event monitor; `None` if it is none of the contract's.
///
/// Its readers count braces to find an object's end, so there are none in texts. All values are texts there.
#[must_use]
pub fn monitor_line(since_start: Duration, event: &Event) -> Option<Vec<u8>> {
    let kind = event.kind();
    let told = kind.monitor?;
    let property = |(key, value): (&str, Value)| {
        let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        let text = Value::from(text).to_string().replace('{', "\\u007b").replace('}', "\\u007d");
        format!("\"{key}\":{text}")
    };
    let properties: Vec<String> =
        event.properties().filter(|(key, _)| told.contains(key)).map(property).collect();
    let properties =
        if properties.is_empty() { "null".to_owned() } else { format!("{{{}}}", properties.join(",")) };
    let (secs, nanos) = (since_start.as_secs(), since_start.subsec_nanos());
    let line = format!(
        "{{\"timestamp\":{{\"secs\":{secs},\"nanos\":{nanos}}},\"source\":\"{}\",\"event\":\"{}\",\"properties\":{properties}}}\n",
        kind.source, kind.event
    );
    Some(line.into_bytes())
}
