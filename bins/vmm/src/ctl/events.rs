//! `vmm ctl events`: what happens in the VMM, an event a line.

use std::fmt::Write as _;
use std::io::{self, Write};
use std::time::{Duration, Instant};

use clap::{Arg, ArgAction, ArgMatches, Command};
use serde_json::Value;
use vmm_api::client::{Client, ClientError, EventReader};
use vmm_api::config::{Fault, FaultKind};
use vmm_api::events::{Received, StreamItem, Time};

use super::CtlError;
use super::show::plain;

/// The subcommand.
pub(super) const EVENTS: &str = "events";

/// Which events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Range {
    /// From this number on, and those to come.
    From(u64),
    /// From this number on, as far as they have happened.
    SoFar(u64),
    /// Those to come.
    ToCome,
}

pub(super) fn command() -> Command {
    let follow = Arg::new("no-follow").long("no-follow").action(ArgAction::SetTrue);
    let from = Arg::new("from").long("from").value_name("NUMBER|next").default_value("1");
    Command::new(EVENTS)
        .about("Prints what happens in the VMM, an event a line, until the VMM ends")
        .arg(from.help("The first event; next is the next that happens"))
        .arg(follow.help("Only those that have happened"))
}

/// The events that the arguments mean.
pub(super) fn range(given: &ArgMatches) -> Result<Range, Vec<Fault>> {
    let from = given.get_one::<String>("from").map_or("1", String::as_str);
    let fault = |kind, message: &str| Err(vec![Fault::new("--from", kind, message)]);
    match (from.parse(), given.get_flag("no-follow")) {
        (Ok(from), false) => Ok(Range::From(from)),
        (Ok(from), true) => Ok(Range::SoFar(from)),
        (Err(_), false) if from == "next" => Ok(Range::ToCome),
        (Err(_), true) if from == "next" => fault(FaultKind::Invalid, "next contradicts --no-follow"),
        (Err(_), _) => fault(FaultKind::Type, "expected the number of an event, or next"),
    }
}

/// Prints them until the stream ends, the reader leaves, or the time is over.
pub(super) fn print(client: Client, range: Range, json: bool, end: Option<Instant>) -> Result<(), CtlError> {
    let mut reader = match range {
        Range::From(from) => client.events(from),
        Range::SoFar(from) => client.events_so_far(from),
        Range::ToCome => client.events_to_come(),
    }?;
    loop {
        let left = end.map(|end| end.saturating_duration_since(Instant::now()).max(Duration::from_millis(1)));
        reader.set_timeout(left).map_err(CtlError::Limit)?;
        let Some(line) = next(&mut reader, json) else { return Ok(()) };
        let mut out = io::stdout().lock();
        match out.write_all(&line?).and_then(|()| out.flush()) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            printed => printed.map_err(CtlError::Print)?,
        }
    }
}

fn next(reader: &mut EventReader, json: bool) -> Option<Result<Vec<u8>, ClientError>> {
    if json { reader.next_line() } else { Some(reader.next()?.map(|item| line(&item).into_bytes())) }
}

/// An item of the stream, for people.
fn line(item: &StreamItem) -> String {
    match item {
        StreamItem::Lost { count, next } => format!("{count} events are gone; the next is {next}\n"),
        StreamItem::Event(event) => {
            let mut text = format!("{:>6} {} {}", event.seq, utc(event.time), plain(&event.name()));
            // Writing to a String cannot fail.
            if let Some(machine) = event.machine {
                let _ = write!(text, " machine={machine}");
            }
            text + &properties(event) + "\n"
        }
    }
}

/// ` key=value` for each.
pub(super) fn properties(event: &Received) -> String {
    let value = |value: &Value| plain(&value.as_str().map_or_else(|| value.to_string(), str::to_owned));
    event.properties.iter().fold(String::new(), |text, (key, of)| text + " " + &plain(key) + "=" + &value(of))
}

/// `2026-11-26T16:02:13.059Z`.
fn utc(time: Time) -> String {
    let (days, second) = (time.secs / 86_400, time.secs % 86_400);
    let (year, month, day) = date(days);
    let (hours, minutes, seconds) = (second / 3600, second / 60 % 60, second % 60);
    format!(
        "{year:04}-{month:02}-{day:02}T{hours:02}:{minutes:02}:{seconds:02}.{:03}Z",
        time.nanos / 1_000_000
    )
}

/// Year, month and day of a day since 1970, by the Gregorian calendar.
fn date(mut days: u64) -> (u64, u64, u64) {
    // 400 years always have the same number of days.
    const ERA: u64 = 146_097;
    let mut year = 1970 + days / ERA * 400;
    days %= ERA;
    let leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    while let Some(rest) = days.checked_sub(if leap(year) { 366 } else { 365 }) {
        (days, year) = (rest, year + 1);
    }
    let february = if leap(year) { 29 } else { 28 };
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30] {
        match days.checked_sub(length) {
            Some(rest) => (days, month) = (rest, month + 1),
            None => break,
        }
    }
    (year, month, days + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_a_line() {
        let event =
            br#"{"seq":7,"time":{"secs":1764170133,"nanos":59338116},"source":"vm","event":"boot-stage",
            "machine":1,"properties":{"duration_us":412,"stage":"mem\u001bory"}}"#;
        let expected =
            "     7 2025-11-26T15:15:33.059Z vm/boot-stage machine=1 duration_us=412 stage=mem\\u{1b}ory\n";
        assert_eq!(line(&StreamItem::parse(event).unwrap()), expected);
        let lost = StreamItem::parse(br#"{"lost":12,"next":20}"#).unwrap();
        assert_eq!(line(&lost), "12 events are gone; the next is 20\n");
    }

    #[test]
    fn days_have_dates() {
        let of = |secs| utc(Time { secs, nanos: 0 });
        assert_eq!(of(0), "1970-01-01T00:00:00.000Z");
        assert_eq!(of(951_782_400), "2000-02-29T00:00:00.000Z");
        assert_eq!(of(4_107_542_399), "2100-02-28T23:59:59.000Z");
        assert_eq!(of(4_107_542_400), "2100-03-01T00:00:00.000Z");
        assert_eq!(of(1_798_761_599), "2026-12-31T23:59:59.000Z");
        assert_eq!(of(13_569_465_600), "2400-01-01T00:00:00.000Z");
        // No number holds it up.
        assert!(of(u64::MAX).starts_with("584554"));
    }
}
