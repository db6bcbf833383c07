//! A line on the terminal while a call takes its time.

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde_json::Value;
use vmm_api::client::{Client, EventReader};
use vmm_api::events::{Received, StreamItem};

use super::show::plain;

/// What is faster than this shows nothing.
const PATIENCE: Duration = Duration::from_millis(500);

/// How often the line changes.
const PERIOD: Duration = Duration::from_secs(1);

/// How long an event that is there already may take to arrive.
const MOMENT: Duration = Duration::from_millis(1);

/// Most events that are looked at between two changes.
const MOST_EVENTS: usize = 1000;

/// Shows the line as long as it lives.
pub(super) struct Progress {
    running: Option<(Sender<()>, JoinHandle<()>)>,
}

impl Progress {
    /// Starts it, if standard error is a terminal. What the VMM tells at `socket` is shown with it.
    pub(super) fn start(about: &str, socket: &Path) -> Self {
        if io::stderr().is_terminal() {
            Self::on(io::stderr(), about, socket.to_owned(), PATIENCE)
        } else {
            Self { running: None }
        }
    }

    fn on(
        mut terminal: impl Write + Send + 'static,
        about: &str,
        socket: PathBuf,
        patience: Duration,
    ) -> Self {
        let (end, ended) = mpsc::channel();
        let (about, start) = (plain(about), Instant::now());
        let over = move |pause| ended.recv_timeout(pause) != Err(RecvTimeoutError::Timeout);
        let show = move || {
            if over(patience) {
                return;
            }
            draw(&mut terminal, &line(&about, start.elapsed(), ""));
            let (mut news, mut latest) = (watch(&socket), String::new());
            while !over(PERIOD) {
                latest = news.as_mut().and_then(newest).unwrap_or(latest);
                draw(&mut terminal, &line(&about, start.elapsed(), &latest));
            }
            draw(&mut terminal, "");
        };
        // Without the thread there is no line, and nothing else is missing.
        let thread = thread::Builder::new().name("progress".to_owned()).spawn(show);
        Self { running: thread.ok().map(|thread| (end, thread)) }
    }
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
        ("vm", "boot-stage") => Some(format!("{} done", plain(event.properties.get("stage")?.as_str()?))),
        _ => None,
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some((end, thread)) = self.running.take() {
            drop(end);
            let _ = thread.join();
        }
    }
}

fn line(about: &str, elapsed: Duration, latest: &str) -> String {
    let mut text = format!("{about} ... ");
    let (minutes, seconds) = (elapsed.as_secs() / 60, elapsed.as_secs() % 60);
    // Writing to a String cannot fail.
    let _ = if minutes > 0 { write!(text, "{minutes} min {seconds} s") } else { write!(text, "{seconds} s") };
    if !latest.is_empty() {
        let _ = write!(text, ", {latest}");
    }
    text
}

/// Replaces the line (ECMA-48: carriage return, erase in line).
fn draw(terminal: &mut impl Write, text: &str) {
    let _ = write!(terminal, "\r\x1b[K{text}").and_then(|()| terminal.flush());
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Screen(Arc<Mutex<Vec<u8>>>);

    impl Screen {
        fn text(&self) -> String {
            String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
        }
    }

    impl Write for Screen {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn what_is_fast_shows_nothing_and_what_is_slow_cleans_up() {
        let screen = Screen::default();
        drop(Progress::on(screen.clone(), "vm.boot", PathBuf::new(), Duration::from_secs(600)));
        assert_eq!(screen.text(), "");
        let progress = Progress::on(screen.clone(), "vm.boot", PathBuf::new(), Duration::ZERO);
        while screen.text().is_empty() {
            thread::yield_now();
        }
        drop(progress);
        let text = screen.text();
        assert!(text.starts_with("\r\x1b[Kvm.boot ... 0 s") && text.ends_with("\r\x1b[K"), "{text:?}");
    }

    #[test]
    fn the_line_says_how_long_and_how_far() {
        assert_eq!(line("x", Duration::from_secs(59), ""), "x ... 59 s");
        assert_eq!(line("x", Duration::from_secs(61), "7 %"), "x ... 1 min 1 s, 7 %");
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
    }
}
