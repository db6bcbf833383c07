//! The forms of events, the journal's bounds, and the page.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "test code")]

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use vmm_api::events::{
    Bounds, CrashReason, Event, ExitCause, ExitVia, JobOutcome, Journal, LINE_MOST, PanicEvent, RebootCause,
    Stamp, StreamItem, Taken, Text, events_markdown, monitor_line, stream_line,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// One event of every kind, with all that it can say; texts are `text`.
fn one_of_each(text: &str) -> Vec<Event> {
    let text = || Text::from(text);
    vec![
        Event::VmmStarting { version: text() },
        Event::VmmStarted,
        Event::VmmShutdown,
        Event::LeftOut { events: u64::MAX },
        Event::LogLevelChanged { level: text() },
        Event::Created,
        Event::Booting,
        Event::BootStage { stage: text(), duration_us: u64::MAX },
        Event::Booted { duration_us: 1200 },
        Event::BootFailed { stage: Some(text()), reason: text() },
        Event::Pausing,
        Event::Paused,
        Event::Resuming,
        Event::Resumed,
        Event::Rebooting { cause: RebootCause::Guest },
        Event::Rebooted,
        Event::Shutdown,
        Event::Deleted,
        Event::Snapshotting,
        Event::Snapshotted {
            id: "x".into(),
            duration_us: 1,
            blackout_us: Some(1),
            in_passes: Some("x".into()),
        },
        Event::SnapshotFailed { reason: "x".into() },
        Event::Restoring,
        Event::Restored { duration_us: 1 },
        Event::RestoreFailed { stage: Some("x".into()), reason: "x".into() },
        Event::MigrationProgress {
            job: 1,
            passes: 2,
            sent_bytes: 3,
            bandwidth: Some(4),
            dirty_rate: Some(5),
            throttle: 6,
            expected_blackout_ms: Some(7),
        },
        Event::Migrated { duration_us: 1, blackout_us: Some(1), sent_bytes: 1, passes: 1 },
        Event::MigrationInDoubt { job: 1 },
        Event::MigrationSevered { job: 1, reason: "x".into() },
        Event::MigrationRestored { job: 1 },
        Event::MigrationFailed { reason: "x".into() },
        Event::Resizing,
        Event::Resized,
        Event::GuestPanic { event: PanicEvent::CrashLoaded },
        Event::GuestExit {
            cause: ExitCause::Crash,
            via: Some(ExitVia::AcpiSleep),
            vcpu: Some(3),
            reason: Some(CrashReason::InternalError),
            code: Some(1),
        },
        Event::DeviceActivated { id: text() },
        Event::DeviceReset { id: text() },
        Event::DeviceNeedsReset { id: text() },
        Event::ConsoleConnected { id: text() },
        Event::ConsoleDisconnected { id: text() },
        Event::JobStarted { job: 1, kind: text() },
        Event::JobProgress { job: 1, done: 5, total: Some(10) },
        Event::JobFinished { job: 1, outcome: JobOutcome::Cancelled },
    ]
}

const STAMP: Stamp = Stamp { seq: 7, time: Duration::new(1_764_170_133, 59), machine: 2 };

fn stream(event: &Event) -> String {
    String::from_utf8(stream_line(&STAMP, event)).unwrap()
}

fn monitor(event: &Event) -> Option<String> {
    monitor_line(Duration::new(1, 500), event).map(|line| String::from_utf8(line).unwrap())
}

#[test]
fn every_kind_is_tried_here() {
    let tried: Vec<_> = one_of_each("x").iter().map(|event| *event.kind()).collect();
    assert_eq!(tried, Event::KINDS);
    for event in one_of_each("x") {
        let said: Vec<_> = event.properties().map(|(key, _)| key).collect();
        let known: Vec<_> = event.kind().properties.iter().map(|property| property.name).collect();
        assert_eq!(said, known, "{event:?}");
    }
}

#[test]
fn the_monitor_has_the_contracts_form() {
    assert_eq!(
        monitor(&Event::Booted { duration_us: 5 }).unwrap(),
        "{\"timestamp\":{\"secs\":1,\"nanos\":500},\"source\":\"vm\",\"event\":\"booted\",\"properties\":null}\n"
    );
    assert_eq!(
        monitor(&Event::DeviceActivated { id: "_disk0".into() }).unwrap(),
        "{\"timestamp\":{\"secs\":1,\"nanos\":500},\"source\":\"virtio-device\",\"event\":\"activated\",\
         \"properties\":{\"id\":\"_disk0\"}}\n"
    );
    assert_eq!(
        monitor(&Event::GuestPanic { event: PanicEvent::Panic }).unwrap(),
        "{\"timestamp\":{\"secs\":1,\"nanos\":500},\"source\":\"guest\",\"event\":\"panic\",\
         \"properties\":{\"event\":\"panic\"}}\n"
    );
}

/// What the contract's releases tell and its readers know, so far as it can happen here.
const CONTRACT: [&str; 21] = [
    "vmm/starting null",
    "vmm/shutdown null",
    "vm/booting null",
    "vm/booted null",
    "vm/pausing null",
    "vm/paused null",
    "vm/resuming null",
    "vm/resumed null",
    "vm/rebooting null",
    "vm/rebooted null",
    "vm/shutdown null",
    "vm/deleted null",
    "vm/snapshotting null",
    "vm/snapshotted null",
    "vm/restoring null",
    "vm/restored null",
    "vm/resizing null",
    "vm/resized null",
    r#"guest/panic {"event":"crash_loaded"}"#,
    r#"virtio-device/activated {"id":"x"}"#,
    r#"virtio-device/reset {"id":"x"}"#,
];

#[test]
fn the_monitor_has_the_contracts_events_and_one_more() {
    let told: Vec<String> = one_of_each("x")
        .iter()
        .filter_map(monitor)
        .map(|line| {
            let line: Value = serde_json::from_str(&line).unwrap();
            assert_eq!(line.as_object().unwrap().len(), 4, "{line}");
            format!(
                "{}/{} {}",
                line["source"].as_str().unwrap(),
                line["event"].as_str().unwrap(),
                line["properties"]
            )
        })
        .collect();
    let sorted = |mut names: Vec<String>| {
        names.sort_unstable();
        names
    };
    let left_out = r#"vmm/left-out {"events":"18446744073709551615"}"#;
    assert_eq!(sorted(told), sorted(CONTRACT.into_iter().chain([left_out]).map(str::to_owned).collect()));
}

#[test]
fn the_stream_numbers_events_and_says_more() {
    assert_eq!(
        stream(&Event::Rebooting { cause: RebootCause::Client }),
        "{\"seq\":7,\"time\":{\"secs\":1764170133,\"nanos\":59},\"source\":\"vm\",\"event\":\"rebooting\",\
         \"machine\":2,\"properties\":{\"cause\":\"client\"}}\n"
    );
    let none = stream_line(&Stamp { machine: 0, ..STAMP }, &Event::VmmStarted);
    assert_eq!(
        String::from_utf8(none).unwrap(),
        "{\"seq\":7,\"time\":{\"secs\":1764170133,\"nanos\":59},\"source\":\"vmm\",\"event\":\"started\"}\n"
    );
    let exit = one_of_each("x").into_iter().find(|event| matches!(event, Event::GuestExit { .. })).unwrap();
    let StreamItem::Event(exit) = StreamItem::parse(stream(&exit).as_bytes()).unwrap() else {
        panic!("an event")
    };
    assert_eq!((exit.seq, exit.name(), exit.machine), (7, "guest/exit".to_owned(), Some(2)));
    assert_eq!(
        Value::from(exit.properties).to_string(),
        r#"{"cause":"crash","code":1,"reason":"internal-error","vcpu":3,"via":"acpi-sleep"}"#
    );
    let lost = StreamItem::parse(br#"{"lost":3,"next":9}"#).unwrap();
    assert_eq!(lost, StreamItem::Lost { count: 3, next: 9 });
    assert!(StreamItem::parse(b"{}").is_err());
}

/// Controls become six bytes each, quotes two; braces are what the monitor's readers count.
#[test]
fn no_text_makes_a_line_too_long_or_breaks_it() {
    for text in ["\u{1}".repeat(5000), "\"".repeat(5000), "{".repeat(5000), "}\n".repeat(9), "é".repeat(5000)]
    {
        for event in one_of_each(&text) {
            for line in [Some(stream(&event)), monitor(&event)].into_iter().flatten() {
                assert!(line.len() < LINE_MOST, "{} bytes: {line}", line.len());
                assert!(line.ends_with('\n') && line.lines().count() == 1, "{line}");
                serde_json::from_str::<Value>(&line).unwrap();
            }
        }
    }
    let line = monitor(&Event::DeviceReset { id: "a{b}}c".into() }).unwrap();
    assert_eq!((line.matches('{').count(), line.matches('}').count()), (3, 3), "{line}");
    assert_eq!(serde_json::from_str::<Value>(&line).unwrap()["properties"]["id"], "a{b}}c");
}

fn number(seq: u64) -> Vec<u8> {
    format!("{seq}\n").into_bytes()
}

fn read(journal: &Journal, from: u64, room: usize) -> (String, Taken) {
    let mut to = Vec::new();
    let taken = journal.read(from, room, &mut to, None);
    (String::from_utf8(to).unwrap(), taken)
}

#[test]
fn a_journal_keeps_the_newest_and_counts_what_is_lost() {
    let journal = Journal::new(Bounds { events: 3, bytes: 1000 });
    assert_eq!(read(&journal, 1, 100), (String::new(), Taken { lost: 0, next: 1 }));
    (0..2).for_each(|_| journal.push(number));
    assert_eq!(read(&journal, 1, 100), ("1\n2\n".into(), Taken { lost: 0, next: 3 }));
    (0..4).for_each(|_| journal.push(number));
    assert_eq!(read(&journal, 3, 100), ("4\n5\n6\n".into(), Taken { lost: 1, next: 7 }));
    assert_eq!(read(&journal, 1, 100), ("4\n5\n6\n".into(), Taken { lost: 3, next: 7 }));
    assert_eq!(read(&journal, 0, 100).1, Taken { lost: 3, next: 7 }, "0 is 1");
    assert_eq!(read(&journal, 6, 100), ("6\n".into(), Taken { lost: 0, next: 7 }), "resumed");
    assert_eq!(read(&journal, 7, 100), (String::new(), Taken { lost: 0, next: 7 }));
    assert_eq!(journal.next(), 7);
}

#[test]
fn a_journal_is_bounded_in_bytes_too() {
    let journal = Journal::new(Bounds { events: 1000, bytes: 100 });
    (0..20).for_each(|_| journal.push(|_| vec![b'x'; 30]));
    assert_eq!(read(&journal, 1, 1000), ("x".repeat(90), Taken { lost: 17, next: 21 }));
    // One that does not fit at all is lost like any other.
    journal.push(|_| vec![b'x'; 101]);
    assert_eq!(read(&journal, 20, 1000), (String::new(), Taken { lost: 2, next: 22 }));
    journal.push(number);
    assert_eq!(read(&journal, 22, 1000), ("22\n".into(), Taken { lost: 0, next: 23 }));
}

#[test]
fn a_piece_is_about_as_large_as_asked_for_and_never_empty_for_that() {
    let journal = Journal::default();
    (0..5).for_each(|_| journal.push(number));
    assert_eq!(read(&journal, 1, 4), ("1\n2\n".into(), Taken { lost: 0, next: 3 }));
    assert_eq!(read(&journal, 3, 1), ("3\n".into(), Taken { lost: 0, next: 4 }));
    assert_eq!(read(&journal, u64::MAX, 1).1, Taken { lost: 0, next: u64::MAX });
}

#[test]
fn a_reader_that_found_nothing_is_woken_once() {
    let journal = Journal::default();
    let waker = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
    let wait = || journal.read(journal.next(), 10, &mut Vec::new(), Some(&waker));
    journal.push(number);
    assert!(waker.read().is_err(), "it does not wait yet");
    wait();
    wait();
    journal.push(number);
    assert_eq!(waker.read().unwrap(), 1, "however often it came");
    journal.push(number);
    assert!(waker.read().is_err(), "it did not come back");
    journal.read(1, 10, &mut Vec::new(), Some(&waker));
    journal.push(number);
    assert!(waker.read().is_err(), "it found something");
    // One that has gone costs nothing for long.
    wait();
    assert_eq!(Arc::strong_count(&waker), 2);
    journal.push(number);
    assert_eq!(Arc::strong_count(&waker), 1);
}

#[test]
fn many_threads_tell_and_no_number_is_missing() {
    let journal = Journal::new(Bounds { events: 10_000, bytes: 1 << 20 });
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| (0..1000).for_each(|_| journal.push(number)));
        }
    });
    let expected: String = (1..=4000).map(|seq| format!("{seq}\n")).collect();
    assert_eq!(read(&journal, 1, usize::MAX), (expected, Taken { lost: 0, next: 4001 }));
}

#[test]
fn the_page_is_made_from_the_types() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/events.md");
    let page = events_markdown();
    if std::env::var_os("VMM_BLESS").is_some() {
        std::fs::write(&path, &page).unwrap();
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(committed, page, "run with VMM_BLESS=1 and look at the difference");
}
