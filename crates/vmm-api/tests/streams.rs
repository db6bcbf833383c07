//! `vmm.events` on a real socket.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "test code")]

mod common;

use common::{Rig, Wire};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;
use vmm_api::client::{Client, ClientError, EventReader};
use vmm_api::commands::vmm;
use vmm_api::events::{Bounds, Event, Journal, Stamp, StreamItem, Text, stream_line};
use vmm_api::http::Config;

/// As long as a line may be.
fn fat() -> Event {
    Event::BootFailed {
        stage: Some("\u{1}".repeat(256).as_str().into()),
        reason: "\u{1}".repeat(256).as_str().into(),
    }
}

fn tell(journal: &Journal, event: &Event) {
    journal.push(|seq| stream_line(&Stamp { seq, time: Duration::ZERO, machine: 0 }, event));
}

fn rig() -> Rig {
    Rig::new(Config::default())
}

fn numbers(items: impl IntoIterator<Item = Result<StreamItem, ClientError>>) -> Vec<u64> {
    let number = |item| match item {
        Ok(StreamItem::Event(event)) => event.seq,
        other => panic!("{other:?}"),
    };
    items.into_iter().map(number).collect()
}

/// All bytes up to the end of the connection.
fn rest(mut stream: &UnixStream) -> String {
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

fn get(rig: &Rig, query: &str) -> Wire {
    let mut wire = rig.wire();
    wire.send(&format!("GET /api/v1/vmm.events{query} HTTP/1.1\r\n\r\n"));
    wire
}

#[test]
fn an_answer_without_length_until_the_end() {
    let rig = rig();
    tell(&rig.journal, &Event::VmmStarted);
    tell(&rig.journal, &Event::Created);
    let wire = get(&rig, "?follow=false");
    assert_eq!(
        rest(&wire.stream),
        "HTTP/1.1 200 OK\r\nServer: Cloud Hypervisor API\r\nConnection: close\r\n\
         Content-Type: application/x-ndjson\r\n\r\n\
         {\"seq\":1,\"time\":{\"secs\":0,\"nanos\":0},\"source\":\"vmm\",\"event\":\"started\"}\n\
         {\"seq\":2,\"time\":{\"secs\":0,\"nanos\":0},\"source\":\"vm\",\"event\":\"created\"}\n"
    );
    let wire = get(&rig, "?from=3&follow=false");
    assert!(rest(&wire.stream).ends_with("\r\n\r\n"), "there is nothing yet");
}

#[test]
fn events_come_as_they_happen_and_from_where_the_reader_wants() {
    let rig = rig();
    (0..3).for_each(|_| tell(&rig.journal, &Event::Paused));
    let mut from_first = rig.client().events(1).unwrap();
    assert_eq!(numbers(from_first.by_ref().take(3)), [1, 2, 3]);
    let mut to_come = rig.client().events_to_come().unwrap();
    let mut resumed = rig.client().events(3).unwrap();
    assert_eq!(numbers(resumed.by_ref().take(1)), [3]);
    for seq in 4..20 {
        tell(&rig.journal, &Event::Resumed);
        for reader in [&mut from_first, &mut to_come, &mut resumed] {
            assert_eq!(numbers(reader.take(1)), [seq]);
        }
    }
    assert_eq!(numbers(rig.client().events_so_far(18).unwrap()), [18, 19]);
    assert_eq!(rig.client().call::<vmm::Ping>(&()).unwrap().version, "1.2.3");
}

#[test]
fn a_reader_that_comes_late_is_told_what_it_lost() {
    let rig = Rig::with_journal(Config::default(), Journal::new(Bounds { events: 5, bytes: 1 << 20 }));
    (0..12).for_each(|_| tell(&rig.journal, &Event::Paused));
    let mut items = rig.client().events_so_far(3).unwrap();
    assert_eq!(items.next().unwrap().unwrap(), StreamItem::Lost { count: 5, next: 8 });
    assert_eq!(numbers(items), [8, 9, 10, 11, 12]);
}

#[test]
fn queries_that_make_no_sense_are_refused() {
    let rig = rig();
    tell(&rig.journal, &Event::Paused);
    for (query, why) in [
        ("?from=x", "from is a number or next"),
        ("?from=-1", "from is a number or next"),
        ("?from=", "from is a number or next"),
        ("?from=3", "the next event is number 2"),
        ("?follow=maybe", "follow is true or false"),
        ("?form=1", "it takes from and follow only"),
    ] {
        let answer = get(&rig, query).answer();
        assert_eq!(answer.status, 400, "{query}: {answer:?}");
        assert!(answer.body.contains(why), "{query}: {answer:?}");
    }
    let Err(ClientError::Refused(problem)) = rig.client().events(3) else { panic!("it is refused") };
    assert_eq!(problem.code, "malformed_request");
    let answer = rig.wire().ask("PUT", "vmm.events");
    assert!(answer.status == 405 && answer.head.contains("Allow: GET\r\n"), "{answer:?}");
    assert_eq!(rig.wire().ask("GET", "vmm.events2").status, 404);
    // Commands do not look at a query.
    assert_eq!(rig.wire().ask("GET", "vmm.ping?from=x").status, 200);
}

/// The journal is far larger than what fits into the socket, and turns over many times meanwhile.
#[test]
fn a_reader_that_stops_loses_the_oldest_and_nobody_else_notices() {
    let rig = Rig::with_journal(Config::default(), Journal::new(Bounds { events: 100, bytes: 1 << 20 }));
    let stalled = rig.client().events(1).unwrap();
    let mut awake = rig.client().events(1).unwrap();
    let mut seen = 0;
    for _ in 0..5000 {
        tell(&rig.journal, &fat());
        seen += 1;
        assert_eq!(numbers(awake.by_ref().take(1)), [seen]);
    }
    assert_eq!(rig.client().call::<vmm::Ping>(&()).unwrap().version, "1.2.3");
    // What was in the socket, then the gap, then what the journal still has.
    let (mut next, mut lost) = (1, 0);
    for item in stalled {
        match item.unwrap() {
            StreamItem::Lost { count, next: after } => {
                (lost, next) = (lost + count, next + count);
                assert_eq!(after, next);
            }
            StreamItem::Event(event) => {
                assert_eq!(event.seq, next);
                next += 1;
            }
        }
        if next > seen {
            break;
        }
    }
    assert!(lost > 4000, "{lost} lost");
}

#[test]
fn many_streams_at_once_and_no_more_than_there_may_be() {
    let rig = Rig::new(Config { max_streams: 20, ..Config::default() });
    let mut readers: Vec<EventReader> = (0..20).map(|_| rig.client().events(1).unwrap()).collect();
    for _ in 0..2 {
        let answer = get(&rig, "").answer();
        assert_eq!(answer.status, 503, "{answer:?}");
    }
    let Err(ClientError::Refused(problem)) = rig.client().events(1) else { panic!("it is refused") };
    assert_eq!(problem.code, "too_many_streams");
    (0..100).for_each(|_| tell(&rig.journal, &Event::Paused));
    for reader in &mut readers {
        assert_eq!(numbers(reader.take(100)), (1..=100).collect::<Vec<_>>());
    }
    drop(readers.pop());
    until_a_stream_is_free(&rig);
}

fn until_a_stream_is_free(rig: &Rig) {
    let start = std::time::Instant::now();
    while get(rig, "?follow=false").answer().status != 200 {
        assert!(start.elapsed() < Duration::from_secs(20), "no stream is free");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_client_that_leaves_or_speaks_ends_its_stream() {
    let rig = Rig::new(Config { max_streams: 1, ..Config::default() });
    drop(rig.client().events(1).unwrap());
    until_a_stream_is_free(&rig);
    // Before the first event, and after.
    for events in 0..2 {
        (0..events).for_each(|_| tell(&rig.journal, &Event::Paused));
        let mut wire = get(&rig, "");
        assert_eq!(wire.answer().status, 200);
        wire.send("GET /api/v1/vmm.ping HTTP/1.1\r\n\r\n");
        let end = rest_or_reset(&wire.stream);
        assert!(!end.contains("1.2.3"), "{end}");
        until_a_stream_is_free(&rig);
    }
    // In one piece with the request.
    let wire = get(&rig, " HTTP/1.1\r\n\r\nx");
    rest_or_reset(&wire.stream);
    until_a_stream_is_free(&rig);
}

/// What comes until the connection ends, in whatever way.
fn rest_or_reset(mut stream: &UnixStream) -> String {
    let mut bytes = Vec::new();
    let end = stream.read_to_end(&mut bytes);
    assert!(
        end.as_ref().map_or_else(|e| e.kind() == std::io::ErrorKind::ConnectionReset, |_| true),
        "{end:?}"
    );
    String::from_utf8_lossy(&bytes).into_owned()
}

#[test]
fn a_client_that_says_no_more_still_listens() {
    let rig = rig();
    let wire = get(&rig, "");
    wire.stream.shutdown(Shutdown::Write).unwrap();
    let mut reader = std::io::BufReader::new(&wire.stream);
    for seq in 1..4 {
        tell(&rig.journal, &Event::Paused);
        let mut line = String::new();
        while !line.contains(&format!("\"seq\":{seq},")) {
            line.clear();
            assert!(std::io::BufRead::read_line(&mut reader, &mut line).unwrap() > 0, "it ended");
        }
    }
}

#[test]
fn an_idle_stream_is_neither_evicted_nor_timed_out() {
    let short = Duration::from_millis(10);
    let rig = Rig::new(Config {
        max_connections: 3,
        idle_timeout: short,
        request_timeout: short,
        eviction_age: short,
        ..Config::default()
    });
    let mut streams: Vec<EventReader> = (0..2).map(|_| rig.client().events(1).unwrap()).collect();
    // Each of these takes the third place, and gives it up when it was idle for long enough.
    let mut wires = Vec::new();
    for _ in 0..20 {
        let mut wire = rig.wire();
        assert_eq!(wire.ask("GET", "vmm.ping").status, 200);
        wires.push(wire);
        std::thread::sleep(short);
    }
    tell(&rig.journal, &Event::Paused);
    for stream in &mut streams {
        assert_eq!(numbers(stream.take(1)), [1]);
    }
}

#[test]
fn the_end_of_the_server_is_the_end_of_the_streams_after_the_last_event() {
    let mut rig = rig();
    let mut readers: Vec<EventReader> = (0..5).map(|_| rig.client().events(1).unwrap()).collect();
    tell(&rig.journal, &Event::Paused);
    for reader in &mut readers {
        assert_eq!(numbers(reader.take(1)), [1]);
    }
    tell(&rig.journal, &Event::VmmShutdown);
    rig.stop_server();
    for reader in readers {
        assert_eq!(numbers(reader), [2]);
    }
}

#[test]
fn a_reader_that_stops_does_not_hold_the_server_at_its_end() {
    let grace = Duration::from_millis(50);
    let mut rig = Rig::new(Config { stop_grace: grace, ..Config::default() });
    let stalled = rig.client().events(1).unwrap();
    (0..500).for_each(|_| tell(&rig.journal, &fat()));
    let (done, ended) = std::sync::mpsc::channel();
    let stopping = std::thread::spawn(move || {
        rig.stop_server();
        done.send(()).unwrap();
    });
    ended.recv_timeout(Duration::from_secs(20)).unwrap();
    stopping.join().unwrap();
    assert!(stalled.count() > 0, "what was in the socket is there, and then it ends");
}

#[test]
fn a_time_limit_is_not_the_end_of_the_events() {
    let rig = rig();
    let mut client = Client::connect(&rig.path).unwrap();
    client.set_timeout(Some(Duration::from_millis(20))).unwrap();
    let mut reader = client.events(1).unwrap();
    assert!(matches!(reader.next(), Some(Err(ClientError::Io { .. }))));
    tell(&rig.journal, &Event::Paused);
    let event = reader.find(|item| item.is_ok()).unwrap().unwrap();
    assert!(matches!(event, StreamItem::Event(event) if event.seq == 1));
}

/// A VMM that ends in the middle of a line, and one that says something else.
#[test]
fn a_client_takes_whole_lines_only() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let line = stream_line(&Stamp { seq: 1, time: Duration::ZERO, machine: 0 }, &Event::VmmStarted);
    let mut answer = b"HTTP/1.1 200 OK\r\n\r\n".to_vec();
    answer.extend_from_slice(&line);
    let (mut half, mut wrong, mut endless) = (answer.clone(), answer.clone(), answer);
    half.extend_from_slice(&line[..20]);
    wrong.extend_from_slice(b"nonsense\n");
    endless.extend_from_slice(&vec![b'x'; 100 * 1024]);
    let server = std::thread::spawn(move || {
        for answer in [half, wrong, endless] {
            let (mut stream, _) = listener.accept().unwrap();
            // The client may have left before the end.
            let _ = stream.read(&mut [0; 1024]);
            let _ = stream.write_all(&answer);
        }
    });
    let items = || Client::connect(&path).unwrap().events(1).unwrap().skip(1).collect::<Vec<_>>();
    assert_eq!(items().len(), 0, "half a line is none");
    assert!(matches!(&items()[..], [Err(ClientError::Answer { .. })]));
    assert!(matches!(&items()[..], [Err(ClientError::Answer { .. })]));
    server.join().unwrap();
}

#[test]
fn texts_reach_the_client_as_they_are() {
    let rig = rig();
    tell(&rig.journal, &Event::DeviceReset { id: Text::from("a\"{\n}é") });
    let Some(Ok(StreamItem::Event(event))) = rig.client().events(1).unwrap().next() else {
        panic!("an event")
    };
    assert_eq!(event.properties["id"], "a\"{\n}é");
}
