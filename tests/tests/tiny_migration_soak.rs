//! A tiny guest that moves from process to process, over UNIX sockets, over TCP between two network namespaces, and
//! over TLS on it.
//!
//! `VMM_MIGRATIONS` says how often; 12 times without it.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]

use std::fs;

use vmm_tests::certificates::Authority;
use vmm_tests::harness::counting::{counting_in, goes_on};
use vmm_tests::harness::migrating::{Namespaces, receive_at, send_to, url};
use vmm_tests::harness::{Holdings, Scratch, SerialFile, Vmm};
use vmm_tests::tiny::Guest;

/// How much more memory a process may have whose guest came a long way than one whose guest came a short one, in KiB.
const SLACK: u64 = 2048;

/// How a guest comes to another process.
#[derive(Clone, Copy, Debug)]
enum Link {
    Unix,
    Tcp,
    Tls,
}

impl Link {
    const ALL: [Self; 3] = [Self::Unix, Self::Tcp, Self::Tls];
}

/// Where the processes are.
struct Places {
    /// Absent where they are not allowed: all is in one network then.
    namespaces: Option<Namespaces>,
}

impl Places {
    fn new() -> Self {
        let namespaces = Namespaces::new();
        match &namespaces {
            Ok(_) => println!("TCP goes between two network namespaces"),
            Err(error) => {
                println!("TCP goes over the loopback interface, for there are no namespaces: {error}");
            }
        }
        Self { namespaces: namespaces.ok() }
    }

    /// The `number`th process: by turns in one and in the other.
    fn spawn(&self, scratch: &Scratch, number: usize) -> Vmm {
        match &self.namespaces {
            Some(namespaces) => Vmm::in_namespace(scratch, namespaces.name(number % 2 == 1)),
            None => Vmm::with_api(scratch, [""; 0]),
        }
    }

    /// An address where that process can be reached.
    fn address(&self, scratch: &Scratch, number: usize, link: Link) -> String {
        match (link, &self.namespaces) {
            (Link::Unix, _) => url(&scratch.path(format!("m{number}"))),
            (Link::Tcp | Link::Tls, Some(_)) => format!("tcp:{}:7000", Namespaces::ADDRESSES[number % 2]),
            (Link::Tcp | Link::Tls, None) => {
                // A port that was free a moment ago.
                let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
                format!("tcp:{}", listener.local_addr().unwrap())
            }
        }
    }
}

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
    let hosts = [Namespaces::ADDRESSES.as_slice(), &["127.0.0.1"]].concat();
    let certificates = Authority::new("ours").folder(scratch.path("tls"), &hosts);
    let mut here = places.spawn(&scratch, 0);
    let mut serial = counting_in(&here, &scratch);
    // By link and direction.
    let mut first: [Option<Arrived>; 2 * Link::ALL.len()] = [const { None }; _];
    for number in 1..=count {
        // Two migrations by each: there and back.
        let link = Link::ALL[number / 2 % Link::ALL.len()];
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
