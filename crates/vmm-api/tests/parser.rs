//! The request parser, apart from sockets.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "test code")]

use vmm_api::error::{Code, ErrorForm};
use vmm_api::http::parser::{Limits, Parser, Progress, Request, Verb};
use vmm_fuzzing::{Random, rounds};

const LIMITS: Limits = Limits { head: 512, body: 64 };

const CREATE: &str = "PUT /api/v1/vm.create HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\nContent-Type: application/json\r\nContent-Length: 13\r\n\r\n{\"cpus\": null";
const PING: &str = "GET /api/v1/vmm.ping HTTP/1.1\r\nHost: x\r\n\r\n";

/// All that comes out of `bytes` when they arrive in pieces of `size`.
fn parse(bytes: &[u8], size: usize) -> (Vec<Request>, Option<Code>, usize) {
    let mut parser = Parser::new(LIMITS);
    let (mut requests, mut continues) = (Vec::new(), 0);
    for piece in bytes.chunks(size) {
        parser.push(piece);
        loop {
            match parser.poll() {
                Ok(Progress::Request(request)) => requests.push(request),
                Ok(Progress::Continue) => continues += 1,
                Ok(Progress::Incomplete) => break,
                Err(unreadable) => return (requests, Some(unreadable.error.code), continues),
            }
        }
    }
    (requests, None, continues)
}

fn one(text: &str) -> Request {
    let (mut requests, error, _) = parse(text.as_bytes(), text.len());
    assert_eq!((requests.len(), error), (1, None), "{text:?}");
    requests.remove(0)
}

fn refused(text: &str) -> Code {
    let (requests, error, _) = parse(text.as_bytes(), text.len());
    assert!(requests.is_empty(), "{text:?}");
    error.unwrap_or_else(|| panic!("not refused: {text:?}"))
}

#[test]
fn a_request_is_read() {
    let request = one(CREATE);
    assert_eq!((request.path.as_str(), request.manner.verb), ("/api/v1/vm.create", Verb::Put));
    assert_eq!(request.body, b"{\"cpus\": null");
    assert_eq!(request.end, CREATE.len() as u64);
    assert!(request.manner.keep_alive);
    assert_eq!(request.manner.errors, ErrorForm::Causes);
}

#[test]
fn pieces_and_pipelines_of_any_size_give_the_same_requests() {
    let stream = [PING, CREATE, "\r\n", PING, "\n", CREATE, PING].concat();
    let (whole, error, _) = parse(stream.as_bytes(), stream.len());
    assert_eq!((whole.len(), error), (5, None));
    for size in 1..stream.len() {
        assert_eq!(parse(stream.as_bytes(), size).0, whole, "pieces of {size}");
    }
    for split in 0..=CREATE.len() {
        let mut parser = Parser::new(LIMITS);
        parser.push(&CREATE.as_bytes()[..split]);
        let before = parser.poll().unwrap();
        parser.push(&CREATE.as_bytes()[split..]);
        let request = if split == CREATE.len() { before } else { parser.poll().unwrap() };
        assert_eq!(request, Progress::Request(one(CREATE)), "split at {split}");
    }
}

#[test]
fn the_end_of_each_request_is_known() {
    let (requests, ..) = parse([PING, CREATE, PING].concat().as_bytes(), 7);
    let ends: Vec<u64> = requests.iter().map(|request| request.end).collect();
    let (ping, create) = (PING.len() as u64, CREATE.len() as u64);
    assert_eq!(ends, [ping, ping + create, ping + create + ping]);
}

#[test]
fn bare_line_feeds_queries_and_absolute_targets_are_taken() {
    assert_eq!(one("GET /api/v1/vm.info HTTP/1.1\nHost: x\n\n").path, "/api/v1/vm.info");
    assert_eq!(one("GET /api/v1/vm.info?x=1 HTTP/1.1\r\n\r\n").path, "/api/v1/vm.info");
    for target in ["/a?x=1&y=?", "http://localhost/a?x=1&y=?#z?"] {
        let request = one(&format!("GET {target} HTTP/1.1\r\n\r\n"));
        assert_eq!((request.path.as_str(), request.query.as_str()), ("/a", "x=1&y=?"), "{target}");
    }
    let request = one("GET /a#b?c HTTP/1.1\r\n\r\n");
    assert_eq!((request.path.as_str(), request.query.as_str()), ("/a", ""));
    assert_eq!(one("GET http://localhost/api/v1/vm.info HTTP/1.1\r\n\r\n").path, "/api/v1/vm.info");
    assert_eq!(one("GET http://localhost HTTP/1.1\r\n\r\n").path, "/");
    assert_eq!(refused("OPTIONS * HTTP/1.1\r\n\r\n"), Code::MalformedRequest);
}

#[test]
fn keep_alive_follows_version_and_header() {
    let keeps = |text: &str| one(text).manner.keep_alive;
    assert!(keeps("GET / HTTP/1.1\r\n\r\n"));
    assert!(!keeps("GET / HTTP/1.1\r\nConnection: Close\r\n\r\n"));
    assert!(!keeps("GET / HTTP/1.1\r\nConnection: foo, close\r\n\r\n"));
    assert!(!keeps("GET / HTTP/1.0\r\n\r\n"));
    assert!(keeps("GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"));
}

#[test]
fn the_error_form_follows_accept() {
    let form = |accept: &str| one(&format!("GET / HTTP/1.1\r\nAccept: {accept}\r\n\r\n")).manner.errors;
    for accept in ["*/*", "", "text/html", "application/*", "application/json;q=0", "application/jsonx"] {
        assert_eq!(form(accept), ErrorForm::Causes, "{accept}");
    }
    for accept in
        ["application/json", "text/html, Application/Problem+JSON;q=0.5", "a/b,application/json ; x=y"]
    {
        assert_eq!(form(accept), ErrorForm::Problem, "{accept}");
    }
}

#[test]
fn continue_is_told_once_and_only_when_the_body_is_awaited() {
    let head = "PUT /x HTTP/1.1\r\nExpect: 100-Continue\r\nContent-Length: 4\r\n\r\n";
    let text = format!("{head}body");
    let (requests, error, continues) = parse(text.as_bytes(), 1);
    assert_eq!((requests.len(), error, continues), (1, None, 1));
    assert_eq!(parse(text.as_bytes(), text.len()).2, 0, "the body is here already");
    let old = text.replace("HTTP/1.1", "HTTP/1.0");
    assert_eq!(parse(old.as_bytes(), 1).2, 0, "HTTP/1.0 does not know it");
    assert_eq!(refused("PUT /x HTTP/1.1\r\nExpect: wonders\r\n\r\n"), Code::ExpectationFailed);
    assert_eq!(refused(&head.replace("4", "65")), Code::BodyTooLarge, "refused before it is sent");
}

#[test]
fn sizes_are_bounded_to_the_byte() {
    let with_head = |size: usize| {
        let start = "GET / HTTP/1.1\r\nX: ";
        format!("{start}{}\r\n\r\n", "a".repeat(size - start.len() - 4))
    };
    assert_eq!(one(&with_head(LIMITS.head)).path, "/");
    assert_eq!(refused(&with_head(LIMITS.head + 1)), Code::HeadTooLarge);
    assert_eq!(refused(&"a".repeat(LIMITS.head + 1)), Code::HeadTooLarge);
    assert_eq!(refused(&format!("GET / HTTP/1.1\r\n{}\r\n", "a:\r\n".repeat(65))), Code::HeadTooLarge);
    let with_body =
        |size: usize| format!("PUT / HTTP/1.1\r\nContent-Length: {size}\r\n\r\n{}", "b".repeat(size));
    assert_eq!(one(&with_body(LIMITS.body)).body.len(), LIMITS.body);
    assert_eq!(refused(&with_body(LIMITS.body + 1)), Code::BodyTooLarge);
    for size in ["18446744073709551615", "18446744073709551616", "99999999999999999999999999"] {
        assert_eq!(refused(&format!("PUT / HTTP/1.1\r\nContent-Length: {size}\r\n\r\n")), Code::BodyTooLarge);
    }
}

#[test]
fn what_could_smuggle_a_request_is_refused() {
    let head = |headers: &str| refused(&format!("PUT / HTTP/1.1\r\n{headers}\r\n\r\n"));
    assert_eq!(head("Transfer-Encoding: chunked"), Code::LengthRequired);
    assert_eq!(head("Transfer-Encoding: chunked\r\nContent-Length: 3"), Code::LengthRequired);
    assert_eq!(head("Transfer-Encoding: gzip, chunked"), Code::UnsupportedCoding);
    for length in ["+1", "-1", "1, 1", "0x1", "", "1 1", "one"] {
        assert_eq!(head(&format!("Content-Length: {length}")), Code::MalformedRequest, "{length:?}");
    }
    assert_eq!(head("Content-Length: 1\r\nContent-Length: 1"), Code::MalformedRequest);
    assert_eq!(head("Content-Length : 1"), Code::MalformedRequest);
    assert_eq!(head("A: b\r\n folded"), Code::MalformedRequest);
}

#[test]
fn garbage_is_refused() {
    assert_eq!(refused("\0\0\0\0\r\n\r\n"), Code::MalformedRequest);
    assert_eq!(refused("GET\r\n\r\n"), Code::MalformedRequest);
    assert_eq!(refused("GET / HTTP/2.0\r\n\r\n"), Code::UnsupportedVersion);
    assert_eq!(refused("\x16\x03\x01\x02\r\n\r\n"), Code::MalformedRequest);
    assert_eq!(parse(b"\r\n\r\n\n\n\r\n", 1), (Vec::new(), None, 0));
    let mut parser = Parser::new(LIMITS);
    parser.push(&b"\r\n".repeat(10_000));
    assert_eq!(parser.poll(), Ok(Progress::Incomplete));
    assert!(!parser.started(), "empty lines are not kept");
}

#[test]
fn fuzz_requests_do_no_harm_and_pieces_never_matter() {
    let seeds: Vec<Vec<u8>> = [PING, CREATE].iter().map(|text| text.as_bytes().to_vec()).collect();
    let tokens: [&[u8]; 10] = [
        b"\r\n\r\n",
        b"\n\n",
        b"Content-Length: 3\r\n",
        b"Expect: 100-continue\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"HTTP/1.1",
        b"\0",
        b"\xff",
        b" ",
        b"99999999999999999999",
    ];
    let mut random = Random::new(0x5eed);
    let mut outcomes = [0usize; 2];
    for _ in 0..rounds(20_000) {
        let mut bytes: Vec<u8> = (0..=random.below(3)).flat_map(|_| seeds[random.below(2)].clone()).collect();
        for _ in 0..random.below(6) {
            let at = random.below(bytes.len());
            match random.below(4) {
                0 => bytes[at] = u8::try_from(random.below(256)).unwrap(),
                1 => drop(bytes.drain(at..(at + random.below(20)).min(bytes.len()))),
                2 => drop(bytes.splice(at..at, tokens[random.below(tokens.len())].iter().copied())),
                _ => bytes.truncate(at + 1),
            }
            if bytes.is_empty() {
                bytes.push(b'G');
            }
        }
        let whole = parse(&bytes, bytes.len());
        let pieces = parse(&bytes, 1 + random.below(9));
        assert_eq!((&whole.0, whole.1), (&pieces.0, pieces.1), "{:?}", String::from_utf8_lossy(&bytes));
        for request in &whole.0 {
            assert!(request.body.len() <= LIMITS.body && request.end <= bytes.len() as u64);
        }
        outcomes[usize::from(whole.1.is_some())] += 1;
    }
    assert!(outcomes.iter().all(|count| *count > 1000), "the mutations must reach both ways: {outcomes:?}");
}
