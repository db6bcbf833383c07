//! Nothing is left behind. One test in its own process, for it counts this process's descriptors and threads.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "test code")]

mod common;

use common::{Rig, config};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};
use vmm_api::commands::{vm, vmm};
use vmm_api::config::{UnknownFields, parse_vm_config};
use vmm_api::http::Config;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Closing reaches the server a moment after the client's call returns.
fn settles_at(expected: usize, what: &str) {
    let start = Instant::now();
    while descriptors() != expected {
        assert!(
            start.elapsed() < Duration::from_secs(20),
            "{what}: {} descriptors, not {expected}",
            descriptors()
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn fds_of_vm(rig: &Rig) -> u64 {
    rig.client().call::<vm::Info>(&()).unwrap().memory_actual_size
}

fn delete(rig: &Rig) {
    rig.client().call::<vm::Delete>(&()).unwrap();
}

fn empty() -> vm::CreateRequest {
    vm::CreateRequest::new(parse_vm_config(config("").as_bytes(), UnknownFields::Refuse).unwrap().config)
        .unwrap()
}

#[test]
fn connections_and_descriptors_come_and_go() {
    let before = descriptors();
    let rig = Rig::new(Config { eviction_age: Duration::from_millis(20), ..Config::default() });
    // Without a client; what each part must come back to.
    let floor = descriptors();
    descriptors_reach_their_request(&rig);
    settles_at(floor, "descriptors_reach_their_request");
    descriptors_nobody_takes_are_closed(&rig);
    settles_at(floor, "descriptors_nobody_takes_are_closed");
    descriptors_bind_to_the_request_whose_bytes_carried_them(&rig);
    settles_at(floor, "descriptors_bind_to_the_request_whose_bytes_carried_them");
    a_thousand_connections_do_no_harm(&rig);
    settles_at(floor, "a_thousand_connections_do_no_harm");
    clients_that_send_on_or_leave_while_they_wait_do_not_spin_the_server(&rig);
    settles_at(floor, "clients_that_send_on_or_leave_while_they_wait_do_not_spin_the_server");
    streams_come_and_go_and_do_not_spin_the_server(&rig);
    settles_at(floor, "streams_come_and_go_and_do_not_spin_the_server");
    many_requests_with_disconnects(&rig);
    settles_at(floor, "many_requests_with_disconnects");

    drop(rig);
    settles_at(before, "after the rig");
}

fn descriptors_reach_their_request(rig: &Rig) {
    let null = File::open("/dev/null").unwrap();
    let fds: Vec<BorrowedFd<'_>> = vec![null.as_fd(); 5];
    rig.client().call_with_fds::<vm::Create>(&empty(), &fds).unwrap();
    assert_eq!(fds_of_vm(rig), 5);
    delete(rig);
}

fn descriptors_nobody_takes_are_closed(rig: &Rig) {
    let null = File::open("/dev/null").unwrap();
    let mut client = rig.client();
    // A command without descriptors, a path that is not there, a client that leaves in the middle, one that
    // sends more than is taken.
    client.call_with_fds::<vmm::Ping>(&(), &[null.as_fd(); 3]).unwrap();
    let answer = client.request(vmm_api::command::Method::Get, "nonsense", b"", &[null.as_fd(); 3]).unwrap();
    assert_eq!(answer.status, 404);
    let wire = rig.wire();
    wire.stream.send_with_fds(&[&b"PUT /api/v1/vm.cr"[..]], &[null.as_raw_fd(); 3]).unwrap();
    drop(wire);
    let mut wire = rig.wire();
    wire.stream.send_with_fds(&[&b"PUT /api/v1/vm.create HT"[..]], &[null.as_raw_fd(); 65]).unwrap();
    let answer = wire.answer();
    assert_eq!((answer.status, answer.body.contains("too many")), (400, true), "{answer:?}");
}

fn descriptors_bind_to_the_request_whose_bytes_carried_them(rig: &Rig) {
    let null = File::open("/dev/null").unwrap();
    let mut wire = rig.wire();
    // Two requests that arrive together; the second one's message carries descriptors.
    wire.stream.send_with_fds(&[&b"GET /api/v1/vmm.ping HTTP/1.1\r\n\r\n"[..]], &[]).unwrap();
    let body = config("");
    let head = format!("PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: {}\r\n\r\n", body.len());
    wire.stream.send_with_fds(&[head.as_bytes()], &[null.as_raw_fd(); 2]).unwrap();
    wire.send(&format!("{body}GET /api/v1/vm.info HTTP/1.1\r\n\r\n"));
    assert_eq!((wire.answer().status, wire.answer().status), (200, 204));
    let info = wire.answer();
    assert!(info.body.contains(r#""memory_actual_size":2"#), "{info:?}");
    delete(rig);
    // And the other way round: those of the first do not reach the second.
    wire.stream
        .send_with_fds(&[&b"GET /api/v1/vmm.ping HTTP/1.1\r\n\r\n"[..]], &[null.as_raw_fd(); 2])
        .unwrap();
    assert_eq!(wire.answer().status, 200);
    assert_eq!(wire.ask_with("PUT", "vm.create", &config("")).status, 204);
    assert_eq!(fds_of_vm(rig), 0);
    delete(rig);
}

fn a_thousand_connections_do_no_harm(rig: &Rig) {
    let quiet = descriptors();
    let mut crowd: Vec<UnixStream> = (0..1000).map(|_| UnixStream::connect(&rig.path).unwrap()).collect();
    let mut client = rig.client();
    client.call::<vmm::Ping>(&()).unwrap();
    client.call::<vmm::Ping>(&()).unwrap();
    let servers = descriptors() - quiet - 1001;
    assert!(servers <= 256, "{servers} connections are open on the server's side");
    // With every place taken by half a request, nobody gives way; whoever leaves makes room at once.
    crowd.clear();
    let mut crowd: Vec<_> = (0..256).map(|_| rig.wire()).collect();
    crowd.iter_mut().for_each(|wire| wire.send("GET /"));
    crowd.pop();
    rig.client().call::<vmm::Ping>(&()).unwrap();
}

/// CPU time of the server's thread so far, in clock ticks of 10 ms.
fn server_ticks() -> u64 {
    let stat = std::fs::read_dir("/proc/self/task").unwrap().find_map(|task| {
        let stat = std::fs::read_to_string(task.unwrap().path().join("stat")).ok()?;
        stat.contains("(http-server)").then_some(stat)
    });
    let stat = stat.unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

fn clients_that_send_on_or_leave_while_they_wait_do_not_spin_the_server(rig: &Rig) {
    let mut wire = rig.wire();
    assert_eq!(wire.ask_with("PUT", "vm.create", &config("slow")).status, 204);
    wire.send("PUT /api/v1/vm.boot HTTP/1.1\r\n\r\n");
    let mut leaver = rig.wire();
    leaver.send("PUT /api/v1/vm.boot HTTP/1.1\r\n\r\n");
    // The server has both boots when it answers somebody who came later.
    rig.client().call::<vmm::Ping>(&()).unwrap();
    wire.send("GET /api/v1/vmm.ping HTTP/1.1\r\n\r\n");
    drop(leaver);
    let before = server_ticks();
    std::thread::sleep(Duration::from_millis(400));
    let spent = server_ticks() - before;
    assert!(spent <= 3, "the server was busy for {spent} of 40 ticks");
    rig.release();
    assert_eq!((wire.answer().status, wire.answer().status), (204, 200));
    delete(rig);
}

fn streams_come_and_go_and_do_not_spin_the_server(rig: &Rig) {
    let null = File::open("/dev/null").unwrap();
    let request = &b"GET /api/v1/vmm.events HTTP/1.1\r\n\r\n"[..];
    for _ in 0..500 {
        let wire = rig.wire();
        wire.stream.send_with_fds(&[request], &[null.as_raw_fd(); 2]).unwrap();
        rig.journal.push(|_| b"{}\n".to_vec());
    }
    let mut quiet = rig.wire();
    quiet.stream.send_with_fds(&[request], &[]).unwrap();
    assert_eq!(quiet.answer().status, 200);
    quiet.stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut stalled = rig.wire();
    stalled.stream.send_with_fds(&[request], &[]).unwrap();
    assert_eq!(stalled.answer().status, 200);
    (0..300).for_each(|_| rig.journal.push(|_| vec![b'x'; 4000]));
    stalled.stream.shutdown(std::net::Shutdown::Write).unwrap();
    let before = server_ticks();
    std::thread::sleep(Duration::from_millis(400));
    let spent = server_ticks() - before;
    assert!(spent <= 3, "the server was busy for {spent} of 40 ticks");
}

fn many_requests_with_disconnects(rig: &Rig) {
    for turn in 0..2000usize {
        let mut wire = rig.wire();
        let request = "GET /api/v1/vmm.ping HTTP/1.1\r\n\r\n";
        wire.send(&request[..1 + turn % request.len()]);
        if turn % request.len() == request.len() - 1 {
            assert_eq!(wire.answer().status, 200);
        }
    }
}
