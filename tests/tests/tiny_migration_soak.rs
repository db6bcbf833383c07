//! A tiny guest that moves from process to process, over UNIX sockets, over TCP between two network namespaces, and
//! over TLS on it.
//!
//! `VMM_MIGRATIONS` says how often; 12 times without it.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]

use std::fs;

use vmm_tests::certificates::Authority;
use vmm_tests::harness::counting::{counting_in, goes_on};
use vmm_tests::harness::migrating::{receive_at, send_to};
use vmm_tests::harness::places::{Link, Places};
use vmm_tests::harness::{Holdings, Scratch, SerialFile, Vmm};
use vmm_tests::tiny::Guest;

/// How much more memory a process may have whose guest came a long way than one whose guest came a short one, in KiB.
const SLACK: u64 = 2048;

/// How a guest comes to another process, by turns.
const LINKS: [Link; 3] = [Link::Unix, Link::Tcp, Link::Tls];

/// What a process holds whose guest has arrived.
struct Arrived(Holdings, u64);

impl Arrived {
    fn at(vmm: &Vmm) -> Self {
        Self(vmm.holdings_at_rest(), vmm.resident_kib())
    }
}

#[test]
fn many_migrations_lose_nothing_and_leave_nothing_behind() {
    let count = std::env::var("VMM_MIGRATIONS").map_or(12, |number| number.parse().unwrap());
    let scratch = Scratch::new();
    let places = Places::new();
    let certificates = Authority::new("ours").folder(scratch.path("tls"), &Places::HOSTS);
    let mut here = places.spawn(&scratch, 0);
    let mut serial = counting_in(&here, &scratch);
    // By link and direction.
    let mut first: [Option<Arrived>; 2 * LINKS.len()] = [const { None }; _];
    for number in 1..=count {
        // Two migrations by each: there and back.
        let link = LINKS[number / 2 % LINKS.len()];
        let there = places.spawn(&scratch, number);
        let other = SerialFile::new(scratch.path(format!("side{}", number % 2)));
        let address = places.address(&scratch, number, link);
        let tls = matches!(link, Link::Tls).then_some(certificates.as_path());
        let mut received = receive_at(&there, &address, tls, &other);
        let answer = send_to(&here, &address, tls);
        assert_eq!((answer.status, received.answer().status), (204, 204), "{number}, {link:?}: {answer:?}");
        drop(received);
        here.expect_exit(0);
        goes_on(&serial, &other);
        check(&there, &mut first[number % first.len()], number);
        fs::remove_file(serial.path()).unwrap();
        (here, serial) = (there, other);
    }
    here.api().puts(&["vmm.shutdown"]);
    here.expect_exit(0);
    let mut left: Vec<_> = fs::read_dir(scratch.folder()).unwrap().map(|e| e.unwrap().file_name()).collect();
    left.sort();
    let serial = serial.path().file_name().unwrap();
    assert_eq!(left, [Guest::Pages.name().as_ref(), serial, "tls".as_ref()], "files that nobody removed");
}

/// The guest takes along no more than it brought the first time.
fn check(vmm: &Vmm, first: &mut Option<Arrived>, number: usize) {
    let Some(Arrived(holdings, memory)) = first else {
        *first = Some(Arrived::at(vmm));
        return;
    };
    vmm.expect_holdings(holdings, &format!("after {number} migrations"));
    let now = vmm.resident_kib();
    assert!(now < *memory + SLACK, "{memory} KiB became {now} KiB in {number} migrations");
}
