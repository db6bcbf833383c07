//! The server on a real socket with a toy host.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "test code")]

mod common;

use common::{Rig, TABLE, Toy, Wire, config};
use std::error::Error;
use std::io::{self, Write};
use std::net::Shutdown;
use std::time::Duration;
use vmm_api::client::ClientError;
use vmm_api::command::ApiRequest;
use vmm_api::commands::{vm, vmm};
use vmm_api::config::{UnknownFields, parse_vm_config};
use vmm_api::error::Problem;
use vmm_api::http::{ApiSocket, Config, Server};
use vmm_api::info::VmState;
use vmm_epoll::mailbox;

fn rig() -> Rig {
    Rig::new(Config::default())
}

fn create(word: &str) -> vm::CreateRequest {
    vm::CreateRequest::new(parse_vm_config(config(word).as_bytes(), UnknownFields::Refuse).unwrap().config)
        .unwrap()
}

#[test]
fn a_whole_life_through_the_typed_client() {
    let rig = rig();
    let mut client = rig.client();
    assert_eq!(client.call::<vmm::Ping>(&()).unwrap().version, "1.2.3");
    client.call::<vm::Create>(&create("")).unwrap();
    let state = |client: &mut vmm_api::client::Client| client.call::<vm::Info>(&()).unwrap().state;
    assert_eq!(state(&mut client), VmState::Created);
    client.call::<vm::Boot>(&()).unwrap();
    assert_eq!(state(&mut client), VmState::Running);
    client.call::<vm::Pause>(&()).unwrap();
    assert_eq!(state(&mut client), VmState::Paused);
    client.call::<vm::Boot>(&()).unwrap();
    assert_eq!(state(&mut client), VmState::Running);
    client.call::<vm::Pause>(&()).unwrap();
    client.call::<vm::Resume>(&()).unwrap();
    client.call::<vm::Reboot>(&()).unwrap();
    client.call::<vm::Shutdown>(&()).unwrap();
    assert_eq!(state(&mut client), VmState::Shutdown);
    client.call::<vm::Delete>(&()).unwrap();
    client.call::<vm::Delete>(&()).unwrap();
}

#[test]
fn refusals_reach_the_client_with_code_phase_and_causes() {
    let rig = rig();
    let mut client = rig.client();
    let refusal = |result: Result<(), ClientError>| match result {
        Err(ClientError::Refused(problem)) => *problem,
        other => panic!("{other:?}"),
    };
    let problem = refusal(client.call::<vm::Pause>(&()));
    assert_eq!((problem.status, problem.code.as_str()), (404, "no_vm"));
    client.call::<vm::Create>(&create("fails")).unwrap();
    let problem = refusal(client.call::<vm::Create>(&create("")));
    assert_eq!((problem.status, problem.code.as_str()), (409, "vm_exists"));
    let problem = refusal(client.call::<vm::Pause>(&()));
    assert_eq!((problem.status, problem.code.as_str()), (409, "wrong_phase"));
    assert_eq!(
        (problem.phase.as_deref(), &problem.allowed_phases[..]),
        (Some("Created"), &["Running".to_owned()][..])
    );
    let problem = refusal(client.call::<vm::Boot>(&()));
    assert_eq!(
        (problem.status, problem.causes),
        (500, vec!["cannot boot".to_owned(), "no kernel".to_owned()])
    );
}

#[test]
fn statuses_and_bodies_as_existing_clients_know_them() {
    let rig = rig();
    let mut wire = rig.wire();
    let check = |wire: &mut Wire, method: &str, name: &str, status: u16, body: &str| {
        let answer = wire.ask(method, name);
        assert_eq!((answer.status, answer.body.as_str()), (status, body), "{method} {name}");
        answer.head
    };
    check(&mut wire, "PUT", "vm.delete", 204, "");
    check(&mut wire, "GET", "vm.info", 404, r#"["vm.info is not possible: there is no VM"]"#);
    check(&mut wire, "GET", "nonsense", 404, r#"["there is no /api/v1/nonsense"]"#);
    let head = check(&mut wire, "GET", "vm.boot", 405, r#"["vm.boot takes PUT only"]"#);
    assert!(head.contains("\r\nAllow: PUT\r\n"), "{head}");
    let head = check(&mut wire, "DELETE", "vmm.ping", 405, r#"["vmm.ping takes GET only"]"#);
    assert!(head.contains("\r\nAllow: GET\r\n"), "{head}");
    assert_eq!(wire.ask("PUT", "vm.receive-migration").status, 400, "what it would take is looked at");
    let answer = wire.ask_with("PUT", "vm.receive-migration", r#"{"receiver_url": "file:///x"}"#);
    let refusal = r#"["vm.receive-migration is not possible: this build does not support it yet"]"#;
    assert_eq!((answer.status, answer.body.as_str()), (501, refusal));
    let head = check(
        &mut wire,
        "GET",
        "vmm.ping",
        200,
        r#"{"version":"1.2.3","build_version":"1.2.3","pid":42,"features":["toy"]}"#,
    );
    assert!(head.contains("\r\nServer: Cloud Hypervisor API\r\n"), "{head}");
    assert!(!head.to_lowercase().contains("transfer-encoding"), "{head}");
    for broken in ["{", "", "[1,]", "\u{1}"] {
        let answer = wire.ask_with("PUT", "vm.create", broken);
        assert_eq!(answer.status, 400, "{answer:?}");
    }
    assert_eq!(wire.ask_with("PUT", "vm.create", &config("")).status, 204);
    assert_eq!(wire.ask("PUT", "vm.pause").status, 409);
}

#[test]
fn problem_json_when_the_client_asks_for_json() {
    let rig = rig();
    let mut wire = rig.wire();
    wire.send("GET /api/v1/vm.info HTTP/1.1\r\nAccept: application/json\r\n\r\n");
    let answer = wire.answer();
    assert!(answer.head.contains("Content-Type: application/problem+json\r\n"), "{answer:?}");
    let problem: serde_json::Value = serde_json::from_str(&answer.body).unwrap();
    assert_eq!((&problem["code"], &problem["status"]), (&"no_vm".into(), &404.into()));
}

#[test]
fn a_configuration_is_refused_with_all_its_faults() {
    let rig = rig();
    let mut wire = rig.wire();
    let mut refused = |body: &str| {
        let length = body.len();
        let head =
            format!("PUT /api/v1/vm.create HTTP/1.1\r\nAccept: application/json\r\nContent-Length: {length}");
        wire.send(&format!("{head}\r\n\r\n{body}"));
        let answer = wire.answer();
        let problem: Problem = serde_json::from_str(&answer.body).unwrap();
        assert_eq!(problem.status, answer.status);
        let faults: Vec<_> = problem.faults.into_iter().map(|fault| (fault.path, fault.kind)).collect();
        (answer.status, problem.code, faults)
    };
    let fault = |path: &str, kind: &str| (path.to_owned(), kind.to_owned());
    let (status, code, faults) = refused(
        r#"{"payload": {"kernel": "/k"}, "cpus": {"boot_vcpus": "two"}, "memry": {}, "watchdog": true}"#,
    );
    assert_eq!((status, code.as_str()), (400, "malformed_body"));
    for expected in
        [fault("cpus.boot_vcpus", "type"), fault("memry", "unknown-field"), fault("watchdog", "not-built")]
    {
        assert!(faults.contains(&expected), "{expected:?} in {faults:?}");
    }
    let (status, code, _) = refused(r#"{"payload": {"kernel": "/k"}, "memry": {}}"#);
    assert_eq!((status, code.as_str()), (400, "unknown_field"));
    let (status, code, faults) = refused(r#"{"payload": {"kernel": "/k"}, "watchdog": true}"#);
    assert_eq!((status, code.as_str(), faults), (501, "not_built", vec![fault("watchdog", "not-built")]));
    let (status, code, faults) = refused(r#"{"payload": {"kernel": "/k"}, "cpus": {"boot_vcpus": 2}}"#);
    assert_eq!(
        (status, code.as_str(), faults.len()),
        (422, "invalid_config", 1),
        "more at boot than at most: {faults:?}"
    );
    let (status, code, _) = refused("{}");
    assert_eq!((status, code.as_str()), (422, "invalid_config"), "nothing to boot");
    let (status, code, _) = refused("{");
    assert_eq!((status, code.as_str()), (400, "malformed_body"));
    assert_eq!(rig.client().call::<vmm::Ping>(&()).unwrap().version, "1.2.3");
}

#[test]
fn requests_may_come_in_single_bytes_and_several_at_once() {
    let rig = rig();
    let mut wire = rig.wire();
    let (body, info) = (config(""), "GET /api/v1/vm.info HTTP/1.1\r\n\r\n");
    let length = body.len();
    let request = format!("PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: {length}\r\n\r\n{body}{info}");
    for byte in request.bytes() {
        wire.stream.write_all(&[byte]).unwrap();
    }
    assert_eq!((wire.answer().status, wire.answer().status), (204, 200));
    let burst = "GET /api/v1/vmm.ping HTTP/1.1\r\n\r\nPUT /api/v1/vm.boot HTTP/1.1\r\n\r\n".repeat(20);
    wire.send(&burst);
    for turn in 0..20 {
        assert_eq!(wire.answer().status, 200);
        assert_eq!(wire.answer().status, if turn == 0 { 204 } else { 409 });
    }
}

#[test]
fn a_parked_request_keeps_its_connection_in_order_and_others_free() {
    let rig = rig();
    let mut wire = rig.wire();
    assert_eq!(wire.ask_with("PUT", "vm.create", &config("slow")).status, 204);
    wire.send("PUT /api/v1/vm.boot HTTP/1.1\r\n\r\nGET /api/v1/vm.info HTTP/1.1\r\n\r\n");
    let mut other = rig.client();
    assert_eq!(other.call::<vm::Info>(&()).unwrap().state, VmState::Created);
    rig.release();
    assert_eq!(wire.answer().status, 204);
    let info = wire.answer();
    assert!(info.body.contains(r#""state":"Running""#), "{info:?}");
}

#[test]
fn info_is_answered_from_the_board_while_the_host_is_busy_and_is_never_older_than_an_answer() {
    let rig = rig();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("go on");
    let mut busy = rig.client();
    for _ in 0..100 {
        busy.call::<vm::Create>(&create(&format!("until {}", file.display()))).unwrap();
        assert_eq!(busy.call::<vm::Info>(&()).unwrap().state, VmState::Created);
        busy.call::<vm::Delete>(&()).unwrap();
        assert!(busy.call::<vm::Info>(&()).is_err(), "there is no VM");
    }
    busy.call::<vm::Create>(&create(&format!("until {}", file.display()))).unwrap();
    let boot = std::thread::spawn(move || busy.call::<vm::Boot>(&()));
    let mut other = rig.client();
    for _ in 0..10 {
        assert_eq!(other.call::<vm::Info>(&()).unwrap().state, VmState::Created);
    }
    std::fs::write(file, "").unwrap();
    boot.join().unwrap().unwrap();
    assert_eq!(other.call::<vm::Info>(&()).unwrap().state, VmState::Running);
    let counted = |(name, status, count)| name == "vm.info" && status == 200 && count == 111;
    assert!(rig.counts.get().into_iter().any(counted), "{:?}", rig.counts.get());
}

#[test]
fn a_client_that_leaves_before_its_answer_harms_nobody() {
    let rig = rig();
    let mut wire = rig.wire();
    assert_eq!(wire.ask_with("PUT", "vm.create", &config("slow")).status, 204);
    wire.send("PUT /api/v1/vm.boot HTTP/1.1\r\n\r\n");
    // One that closes, and one that closes with an answer unread.
    let mut rude = rig.wire();
    rude.send("GET /api/v1/vmm.ping HTTP/1.1\r\n\r\nGET /api/v1/vmm.ping HTTP/1.1\r\n\r\n");
    drop(rude);
    drop(wire);
    let mut client = rig.client();
    // The abandoned boot reaches the host before or after this; its answer finds nobody.
    client.call::<vmm::Ping>(&()).unwrap();
    rig.release();
    while client.call::<vm::Info>(&()).unwrap().state != VmState::Running {}
}

#[test]
fn a_half_closed_client_still_gets_its_answer() {
    let rig = rig();
    let mut wire = rig.wire();
    wire.send("GET /api/v1/vmm.ping HTTP/1.1\r\n\r\n");
    wire.stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(wire.answer().status, 200);
    wire.assert_closed();
}

#[test]
fn connection_close_and_http_1_0_close() {
    let rig = rig();
    for request in [
        "GET /api/v1/vmm.ping HTTP/1.1\r\nConnection: close\r\n\r\n",
        "GET /api/v1/vmm.ping HTTP/1.0\r\n\r\n",
    ] {
        let mut wire = rig.wire();
        wire.send(request);
        let answer = wire.answer();
        assert!(answer.head.contains("\r\nConnection: close\r\n"), "{answer:?}");
        wire.assert_closed();
    }
}

#[test]
fn expect_continue_is_answered() {
    let rig = rig();
    let mut wire = rig.wire();
    let (body, length) = (config(""), config("").len());
    wire.send(&format!(
        "PUT /api/v1/vm.create HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: {length}\r\n\r\n"
    ));
    assert_eq!(wire.answer().head, "HTTP/1.1 100 Continue\r\n\r\n");
    wire.send(&body);
    assert_eq!(wire.answer().status, 204);
}

#[test]
fn too_much_is_refused_with_an_answer_and_the_connection_ends() {
    let rig = rig();
    let check = |text: &str, status: u16| {
        let mut wire = rig.wire();
        // The server answers before it has everything, and takes the rest, so that nothing fails on the client's side.
        wire.stream.write_all(text.as_bytes()).unwrap();
        let answer = wire.answer();
        assert_eq!(answer.status, status, "{answer:?}");
        assert!(answer.head.contains("\r\nConnection: close\r\n"), "{answer:?}");
        wire.stream.shutdown(Shutdown::Write).unwrap();
        wire.assert_closed();
    };
    let over = 1024 * 1024 + 1;
    let head = format!("PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: {over}\r\n\r\n");
    check(&head, 413);
    check(&format!("{head}{}", " ".repeat(over)), 413);
    check(&format!("GET / HTTP/1.1\r\nX: {}", "x".repeat(20_000)), 431);
    check("PUT /api/v1/vm.create HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", 411);
    check("\u{0}\u{1}\r\n\r\n", 400);
    check("GET / HTTP/3.0\r\n\r\n", 505);
    // A body of exactly the limit is taken: it is JSON's business then.
    let json = config("");
    let exact = format!("{}{json}", " ".repeat(over - 1 - json.len()));
    assert_eq!(exact.len(), over - 1);
    assert_eq!(rig.wire().ask_with("PUT", "vm.create", &exact).status, 204);
}

#[test]
fn half_a_request_then_silence_is_408_and_idleness_ends_without_a_word() {
    let config = Config {
        request_timeout: Duration::from_millis(100),
        idle_timeout: Duration::from_millis(200),
        ..Config::default()
    };
    let rig = Rig::new(config);
    for half in ["GET /api", "PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 9\r\n\r\n{"] {
        let mut wire = rig.wire();
        wire.send(half);
        assert_eq!(wire.answer().status, 408);
        wire.stream.shutdown(Shutdown::Write).unwrap();
        wire.assert_closed();
    }
    // A trickle does not extend the time.
    let mut wire = rig.wire();
    let sender = wire.stream.try_clone().unwrap();
    let trickle = std::thread::spawn(move || {
        let mut sender = sender;
        while sender.write_all(b"x").is_ok() {
            std::thread::sleep(Duration::from_millis(20));
        }
    });
    assert_eq!(wire.answer().status, 408);
    rig.wire().assert_closed();
    drop(wire);
    trickle.join().unwrap();
}

#[test]
fn a_client_that_does_not_read_stalls_only_itself() {
    let rig = Rig::new(Config { request_timeout: Duration::from_millis(300), ..Config::default() });
    let mut deaf = rig.wire();
    deaf.stream.set_write_timeout(Some(Duration::from_millis(50))).unwrap();
    let burst = "GET /api/v1/vmm.ping HTTP/1.1\r\n\r\n".repeat(1000);
    while deaf.stream.write_all(burst.as_bytes()).is_ok() {}
    let mut client = rig.client();
    for _ in 0..100 {
        client.call::<vmm::Ping>(&()).unwrap();
    }
    // It is given up once its time is over: what was sent can be read, then comes the end.
    std::thread::sleep(Duration::from_millis(600));
    while deaf.answer_or_end() {}
}

#[test]
fn who_finds_all_places_taken_is_served_when_one_is_free() {
    let config = Config { max_connections: 2, eviction_age: Duration::from_secs(3600), ..Config::default() };
    for half in ["", "GET /"] {
        let rig = Rig::new(config);
        let mut crowd = [rig.wire(), rig.wire()];
        crowd.iter_mut().for_each(|wire| wire.send(half));
        // Time for the server to read the halves, and to find that there is no place; without it the test is easier.
        std::thread::sleep(Duration::from_millis(50));
        let mut late = rig.wire();
        late.send("GET /api/v1/vmm.ping HTTP/1.1\r\n\r\n");
        std::thread::sleep(Duration::from_millis(50));
        drop(crowd);
        assert_eq!(late.answer().status, 200, "{half:?}");
    }
}

#[test]
fn nobody_gives_way_to_nobody() {
    let config = Config { max_connections: 2, eviction_age: Duration::ZERO, ..Config::default() };
    let rig = Rig::new(config);
    let mut pair = [rig.wire(), rig.wire()];
    for wire in pair.iter_mut().rev() {
        assert_eq!(wire.ask("GET", "vmm.ping").status, 200);
    }
    // The third takes the place of the one that has been idle for longest.
    assert_eq!(rig.wire().ask("GET", "vmm.ping").status, 200);
    pair[1].assert_closed();
    assert_eq!(pair[0].ask("GET", "vmm.ping").status, 200);
}

#[test]
fn a_host_that_forgets_or_ends_still_answers() {
    let mut rig = rig();
    let mut wire = rig.wire();
    assert_eq!(wire.ask_with("PUT", "vm.create", &config("forgets")).status, 204);
    let answer = wire.ask("PUT", "vm.boot");
    assert_eq!(
        (answer.status, answer.body.as_str()),
        (500, r#"["the VMM ended the request without an answer"]"#)
    );
    rig.end_host();
    assert_eq!(wire.ask("GET", "vmm.ping").status, 500);
    assert_eq!(wire.ask("GET", "nonsense").status, 404);
}

#[test]
fn the_answer_to_vmm_shutdown_is_sent_before_the_end() {
    let mut rig = rig();
    let mut wire = rig.wire();
    wire.send("PUT /api/v1/vmm.shutdown HTTP/1.1\r\n\r\n");
    rig.join_host();
    rig.stop_server();
    assert_eq!(wire.answer().status, 204);
    wire.assert_closed();
    assert!(!rig.path.exists());
    assert!(std::os::unix::net::UnixStream::connect(&rig.path).is_err());
}

#[test]
fn a_thread_whose_prologue_fails_does_not_serve() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("api.sock");
    let (requests, _inbox) = mailbox::<ApiRequest<Toy>>().unwrap();
    let socket = ApiSocket::bind(&path).unwrap();
    let server = Server::new(socket, &TABLE, requests, Config::default()).unwrap();
    let error = server.start(|| Err(io::ErrorKind::PermissionDenied.into())).unwrap_err();
    assert_eq!(error.source().unwrap().to_string(), "permission denied");
    assert!(!path.exists(), "its socket goes with it");
}
