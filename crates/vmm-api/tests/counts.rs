//! Every answer of a real server is counted once.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "test code")]

mod common;

use common::{Rig, config};
use vmm_api::http::Config;

#[test]
fn answers_are_counted_by_command_and_status() {
    let rig = Rig::new(Config::default());
    let mut wire = rig.wire();
    for _ in 0..3 {
        wire.ask("GET", "vmm.ping");
    }
    wire.ask("GET", "vm.info");
    wire.ask_with("PUT", "vm.create", "{");
    wire.ask_with("PUT", "vm.create", &config("x"));
    wire.ask("PUT", "vm.info");
    wire.ask("GET", "vm.made-up");
    wire.ask("GET", "another-made-up");
    wire.send("nonsense\r\n\r\n");
    wire.answer();
    wire.assert_closed();
    let expected = [
        ("unknown", 404, 2),
        ("unreadable", 400, 1),
        ("vm.create", 204, 1),
        ("vm.create", 400, 1),
        ("vm.info", 404, 1),
        ("vm.info", 405, 1),
        ("vmm.ping", 200, 3),
    ];
    assert_eq!(rig.counts.get(), expected);
}

#[test]
fn an_answer_nobody_waits_for_counts_too_and_an_open_request_does_not() {
    let rig = Rig::new(Config::default());
    let mut wire = rig.wire();
    wire.ask_with("PUT", "vm.create", &config("slow"));
    wire.send("PUT /api/v1/vm.boot HTTP/1.1\r\n\r\n");
    // Answered after the boot was taken, for requests reach the host in order.
    let mut other = rig.wire();
    while other.ask("GET", "vm.info").status != 200 {}
    drop(wire);
    let boots = || rig.counts.get().into_iter().find(|(command, ..)| *command == "vm.boot");
    assert_eq!(boots(), None);
    rig.release();
    // The mailbox of releases and that of requests have no order between them.
    while boots().is_none() {
        other.ask("GET", "vmm.ping");
    }
    assert_eq!(boots(), Some(("vm.boot", 204, 1)));
}
