//! How fast the event monitor tells what guests do: one that resets again and again could fill a disk.
//!
//! What a guest repeats is written at once as long as that is rare. Then its newest events wait for their time, older ones are
//! left out, and how many is told. Whatever else happens is written at once, after those that wait.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use vmm_api::events::{Event, monitor_line};

/// Lines of guests that are written at once after a rest.
const BURST: u32 = 256;
/// How long it takes until one more may be.
const EACH: Duration = Duration::from_millis(125);
/// Most of them that wait.
const WAITING: usize = 16;

/// A line of the monitor, and what its pace depends on.
#[derive(Debug)]
pub(super) struct Line {
    /// The guest can have it told again and again.
    repeats: bool,
    /// Since the start of the VMM.
    time: Duration,
    text: Vec<u8>,
}

impl Line {
    /// The line of an event, if it is one of the monitor's.
    pub(super) fn of(time: Duration, event: &Event) -> Option<Self> {
        Some(Self { repeats: event.guest_repeats(), time, text: monitor_line(time, event)? })
    }

    /// In the form that a journal keeps.
    pub(super) fn packed(self) -> Vec<u8> {
        let nanos = u64::try_from(self.time.as_nanos()).unwrap_or(u64::MAX);
        [&[u8::from(self.repeats)], nanos.to_le_bytes().as_slice(), &self.text].concat()
    }

    /// Undoes [`packed`](Self::packed).
    pub(super) fn unpack(packed: &[u8]) -> Option<Self> {
        let ([repeats], rest) = packed.split_first_chunk()?;
        let (nanos, text) = rest.split_first_chunk()?;
        let time = Duration::from_nanos(u64::from_le_bytes(*nanos));
        Some(Self { repeats: *repeats != 0, time, text: text.to_vec() })
    }
}

/// Decides when lines are written.
#[derive(Debug)]
pub(super) struct Pace {
    /// Lines of guests that may be written at once.
    room: u32,
    /// Since when there is so much.
    since: Instant,
    waiting: VecDeque<Line>,
    ready: VecDeque<Vec<u8>>,
    left_out: u64,
}

impl Pace {
    pub(super) fn new() -> Self {
        let (waiting, ready) = (VecDeque::new(), VecDeque::new());
        Self { room: BURST, since: Instant::now(), waiting, ready, left_out: 0 }
    }

    /// Takes the next line.
    pub(super) fn take(&mut self, line: Line) {
        if !line.repeats {
            self.release();
            return self.make_ready(line);
        }
        self.waiting.push_back(line);
        if self.waiting.len() > WAITING {
            self.waiting.pop_front();
            self.leave_out(1);
        }
    }

    /// As many were left out before the next line.
    pub(super) fn leave_out(&mut self, lines: u64) {
        self.left_out = self.left_out.saturating_add(lines);
    }

    /// The next line to be written at this moment, if it is time for one.
    pub(super) fn next(&mut self, now: Instant) -> Option<Vec<u8>> {
        if self.ready.is_empty()
            && !self.waiting.is_empty()
            && self.has_room(now)
            && let Some(line) = self.waiting.pop_front()
        {
            self.make_ready(line);
        }
        self.ready.pop_front()
    }

    /// When the next line is due, if one waits.
    pub(super) fn due(&self) -> Option<Instant> {
        (!self.waiting.is_empty()).then(|| self.since + EACH)
    }

    /// Nothing waits any more.
    pub(super) fn release(&mut self) {
        for line in std::mem::take(&mut self.waiting) {
            self.make_ready(line);
        }
    }

    /// Those that were left out are told of with the time of the line that follows.
    fn make_ready(&mut self, line: Line) {
        let events = std::mem::take(&mut self.left_out);
        let told = (events > 0).then(|| monitor_line(line.time, &Event::LeftOut { events }));
        self.ready.extend(told.flatten());
        self.ready.push_back(line.text);
    }

    /// Takes the room of a line.
    fn has_room(&mut self, now: Instant) -> bool {
        let passed = now.saturating_duration_since(self.since).as_millis() / EACH.as_millis();
        let more = u32::try_from(passed).unwrap_or(u32::MAX);
        (self.room, self.since) = match self.room.saturating_add(more) {
            room if room < BURST => (room, self.since + EACH * more),
            _ => (BURST, now),
        };
        let left = self.room.checked_sub(1);
        self.room = left.unwrap_or_default();
        left.is_some()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn line(number: u64, event: &Event) -> Line {
        Line::unpack(&Line::of(Duration::from_millis(number), event).unwrap().packed()).unwrap()
    }

    /// All that may be written by now, as names, counts and milliseconds.
    fn written(pace: &mut Pace, now: Instant) -> Vec<(String, Option<u64>, u64)> {
        let of = |line: Vec<u8>| {
            let line: Value = serde_json::from_slice(&line).unwrap();
            let count = line["properties"]["events"].as_str().map(|text| text.parse().unwrap());
            let time = &line["timestamp"];
            let time = time["secs"].as_u64().unwrap() * 1000 + time["nanos"].as_u64().unwrap() / 1_000_000;
            (line["event"].as_str().unwrap().to_owned(), count, time)
        };
        std::iter::from_fn(|| pace.next(now)).map(of).collect()
    }

    #[test]
    fn what_floods_is_left_out_and_counted_and_the_newest_is_told_in_its_time() {
        let mut pace = Pace::new();
        let mut now = pace.since;
        let mut told = Vec::new();
        for number in 0..10_000 {
            pace.take(line(number, &Event::Rebooted));
            told.extend(written(&mut pace, now));
        }
        assert_eq!(told.len(), BURST as usize);
        assert_eq!(written(&mut pace, now + EACH / 2), []);
        assert_eq!(pace.due(), Some(now + EACH));
        for waited in 0..WAITING {
            now += EACH;
            let more = written(&mut pace, now);
            assert_eq!(more.len(), if waited == 0 { 2 } else { 1 }, "{more:?}");
            told.extend(more);
        }
        assert_eq!((pace.due(), written(&mut pace, now + 1000 * EACH)), (None, vec![]));
        let left_out = 10_000 - u64::from(BURST) - WAITING as u64;
        assert_eq!(told[BURST as usize], ("left-out".to_owned(), Some(left_out), 9_984));
        assert_eq!(told.last().unwrap(), &("rebooted".to_owned(), None, 9_999));
        assert!(told.is_sorted_by_key(|(_, _, time)| *time));
    }

    #[test]
    fn what_a_guest_cannot_repeat_is_told_at_once_and_in_order() {
        let mut pace = Pace::new();
        let now = pace.since;
        for number in 0..1000 {
            pace.take(line(number, &Event::Booting));
        }
        for number in 1000..2000 {
            pace.take(line(number, &Event::Paused));
        }
        let told = written(&mut pace, now);
        assert_eq!(told[0].1, Some(1000 - WAITING as u64));
        assert_eq!(told.len(), 1 + WAITING + 1000);
        assert!(told.is_sorted_by_key(|(_, _, time)| *time));
        assert!(told[1 + WAITING..].iter().all(|(name, _, _)| name == "paused"));
        pace.leave_out(3);
        pace.take(line(2000, &Event::Shutdown));
        let told: Vec<_> =
            written(&mut pace, now).into_iter().map(|(name, count, _)| (name, count)).collect();
        assert_eq!(told, [("left-out".to_owned(), Some(3)), ("shutdown".to_owned(), None)]);
    }

    /// As fast as that, for ever.
    #[test]
    fn a_flood_has_its_pace_and_a_rest_gives_room_again() {
        let mut pace = Pace::new();
        let mut now = pace.since;
        let flood = |pace: &mut Pace, now: &mut Instant, steps: u32| {
            let mut lines = 0;
            for _ in 0..steps {
                *now += EACH / 10;
                pace.take(line(0, &Event::Rebooted));
                lines += written(pace, *now).iter().filter(|(_, count, _)| count.is_none()).count();
            }
            lines as u32
        };
        assert_eq!(flood(&mut pace, &mut now, BURST), BURST);
        flood(&mut pace, &mut now, 10 * BURST);
        assert_eq!(flood(&mut pace, &mut now, 1000), 100);
        now += EACH * BURST * 2;
        written(&mut pace, now);
        assert!(flood(&mut pace, &mut now, BURST) > BURST - WAITING as u32 - 1);
    }
}
