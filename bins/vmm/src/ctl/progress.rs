//! How far the VMM is, for the line on the terminal.

use std::path::Path;
use std::time::Duration;

use serde_json::Value;
use vmm_api::client::{Client, EventReader};
use vmm_api::events::{Received, StreamItem};

use super::show::{about, plain};
use crate::progress::{PERIOD, Progress};

/// How long an event that is there already may take to arrive.
const MOMENT: Duration = Duration::from_millis(1);

/// Most events that are looked at between two changes.
const MOST_EVENTS: usize = 1000;

/// Starts the line. What the VMM tells at `socket` is shown with it.
pub(super) fn start(about: &str, socket: &Path) -> Progress {
    let socket = socket.to_owned();
    Progress::start(about, move || {
        let mut events = watch(&socket);
        move || events.as_mut().and_then(newest)
    })
}

/// The VMM's events from now on; other VMMs have no such stream.
fn watch(socket: &Path) -> Option<EventReader> {
    let mut client = Client::connect(socket).ok()?;
    client.set_timeout(Some(PERIOD)).ok()?;
    let mut events = client.events_to_come().ok()?;
    events.set_timeout(Some(MOMENT)).ok()?;
    Some(events)
}

/// What the newest event says of how far it is, if there is one.
fn newest(events: &mut EventReader) -> Option<String> {
    let mut latest = None;
    // Some events come so fast that the line would never change.
    for item in events.take(MOST_EVENTS) {
        match item {
            Ok(StreamItem::Event(event)) => latest = how_far(&event).or(latest),
            Ok(StreamItem::Lost { .. }) => {}
            Err(_) => break,
        }
    }
    latest
}

fn how_far(event: &Received) -> Option<String> {
    let number = |name| event.properties.get(name).and_then(Value::as_u64);
    match (event.source.as_str(), event.event.as_str()) {
        ("job", "progress") => Some(match (number("done")?, number("total")) {
            (done, Some(total @ 1..)) => format!("{} %", done.saturating_mul(100) / total),
            (done, _) => done.to_string(),
        }),
        ("vm", "migration-progress") => {
            let mut text = format!("pass {}, {}", number("passes")?, about(number("sent_bytes")?));
            let rates = [("bandwidth", ""), ("dirty_rate", " dirtied")];
            for (rate, what) in rates.into_iter().filter_map(|(name, what)| Some((number(name)?, what))) {
                text.push_str(&format!(", {}/s{what}", about(rate)));
            }
            if let Some(ms) = number("expected_blackout_ms") {
                text.push_str(&format!(", blackout {ms} ms"));
            }
            Some(text)
        }
        ("vm", "boot-stage") => Some(format!("{} done", plain(event.properties.get("stage")?.as_str()?))),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_say_how_far() {
        let far = |name: &str, properties: &str| {
            let (source, event) = name.split_once('/').unwrap();
            let event = format!(
                r#"{{"seq":1,"time":{{"secs":0,"nanos":0}},"source":"{source}","event":"{event}","properties":{properties}}}"#
            );
            match StreamItem::parse(event.as_bytes()).unwrap() {
                StreamItem::Event(event) => how_far(&event),
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(far("job/progress", r#"{"job":1,"done":3,"total":4}"#).as_deref(), Some("75 %"));
        assert_eq!(far("job/progress", r#"{"job":1,"done":3,"total":0}"#).as_deref(), Some("3"));
        assert_eq!(far("vm/boot-stage", r#"{"stage":"memory"}"#).as_deref(), Some("memory done"));
        assert_eq!(far("vm/booted", "{}"), None);
        let young = r#"{"job":1,"passes":1,"sent_bytes":900,"throttle":0}"#;
        assert_eq!(far("vm/migration-progress", young).as_deref(), Some("pass 1, 900 B"));
        let old = r#"{"passes":3,"sent_bytes":3670016,"bandwidth":2097152,"dirty_rate":1024,"expected_blackout_ms":7}"#;
        let text = "pass 3, 3.5 MiB, 2.0 MiB/s, 1.0 KiB/s dirtied, blackout 7 ms";
        assert_eq!(far("vm/migration-progress", old).as_deref(), Some(text));
    }
}
