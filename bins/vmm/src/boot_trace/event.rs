//! Events, and a document of them in Chrome's Trace Event Format.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// Whose event it is: a row of the viewer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Row {
    Vmm = 1,
    Guest = 2,
}

/// Something that happened, or that took its time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Event {
    name: String,
    row: Row,
    start: Instant,
    duration: Option<Duration>,
}

impl Event {
    /// The VMM's work from `start` on.
    pub(super) fn span(name: impl Into<String>, start: Instant, duration: Duration) -> Self {
        Self { name: name.into(), row: Row::Vmm, start, duration: Some(duration) }
    }

    pub(super) fn instant(name: impl Into<String>, row: Row, at: Instant) -> Self {
        Self { name: name.into(), row, start: at, duration: None }
    }

    /// Times count in microseconds, with fractions.
    fn json(&self, process: u32, origin: Instant) -> Value {
        let start = micros(self.start.saturating_duration_since(origin));
        let (name, row) = (&self.name, self.row as u8);
        match self.duration {
            Some(duration) => json!({
                "name": name, "cat": "boot", "ph": "X", "ts": start, "dur": micros(duration), "pid": process, "tid": row,
            }),
            None => json!({
                "name": name, "cat": "boot", "ph": "i", "s": "t", "ts": start, "pid": process, "tid": row,
            }),
        }
    }
}

/// The JSON object form, an event a line; times count from `origin`.
pub(super) fn document(process: u32, origin: Instant, events: &[Event]) -> String {
    let title = |what: &str, row: u8, name: &str| json!({ "name": what, "ph": "M", "pid": process, "tid": row, "args": { "name": name } });
    let titles = [
        title("process_name", Row::Vmm as u8, "vmm"),
        title("thread_name", Row::Vmm as u8, "boot"),
        title("thread_name", Row::Guest as u8, "guest"),
    ];
    let lines: Vec<String> = titles
        .into_iter()
        .chain(events.iter().map(|event| event.json(process, origin)))
        .map(|event| event.to_string())
        .collect();
    format!("{{\"displayTimeUnit\":\"ms\",\"traceEvents\":[\n{}\n]}}\n", lines.join(",\n"))
}

fn micros(time: Duration) -> f64 {
    // Exact to the nanosecond for 104 days.
    time.as_nanos() as f64 / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_document_is_the_golden_file() {
        let origin = Instant::now();
        let at = |micros: u64| origin + Duration::from_nanos(micros * 1000 + 250);
        let events = [
            Event::instant("process", Row::Vmm, origin),
            Event::span("memory", at(100), Duration::from_micros(1500)),
            Event::span("a \"quoted\"\nname", at(1600), Duration::ZERO),
            Event::instant("first run", Row::Vmm, at(2000)),
            Event::instant("POST 0x40 (kernel)", Row::Guest, at(3_600_000_000)),
        ];
        let document = document(4711, origin, &events);
        assert_eq!(document, include_str!("golden.json"));
        assert!(serde_json::from_str::<Value>(&document).is_ok());
    }

    #[test]
    fn what_was_before_the_origin_is_at_it() {
        let origin = Instant::now();
        let event = Event::instant("x", Row::Vmm, origin - Duration::from_secs(1));
        assert_eq!(event.json(1, origin)["ts"], 0.0);
    }
}
