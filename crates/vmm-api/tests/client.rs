//! The client: time limits, waiting, calls that break off, and what other VMMs answer.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]

mod common;

use common::{Rig, config};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;
use std::time::{Duration, Instant};
use vmm_api::client::{Client, ClientError};
use vmm_api::command::Method;
use vmm_api::commands::{vm, vmm};
use vmm_api::config::{DiskConfig, UnknownFields, VmResize, parse_vm_config};
use vmm_api::error::Code;
use vmm_api::http::Config;
use vmm_api::options::FromOptions;
use vmm_state::Phase;

/// Far more than anything here takes; only failures wait for it.
const LONG: Duration = Duration::from_secs(20);
const SHORT: Duration = Duration::from_millis(100);

fn create(word: &str) -> vm::CreateRequest {
    let parsed = parse_vm_config(config(word).as_bytes(), UnknownFields::Refuse).unwrap();
    vm::CreateRequest::new(parsed.config).unwrap()
}

/// A client and its peer's end of the connection.
fn pair() -> (Client, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    theirs.set_read_timeout(Some(LONG)).unwrap();
    let mut client = Client::from(ours);
    client.set_timeout(Some(LONG)).unwrap();
    (client, theirs)
}

fn answer(status: &str, body: &str) -> String {
    format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n{body}", body.len())
}

#[test]
fn a_call_that_breaks_off_takes_no_other_calls_answer() {
    let (mut client, mut peer) = pair();
    client.set_timeout(Some(SHORT)).unwrap();
    let error = client.call::<vmm::Ping>(&()).unwrap_err();
    assert!(error.is_timeout() && !error.is_gone(), "{error:?}");
    // The answer comes late.
    peer.write_all(answer("200 OK", r#"{"version": "1"}"#).as_bytes()).unwrap();
    let error = client.call::<vmm::Ping>(&()).unwrap_err();
    assert!(matches!(&error, ClientError::OutOfStep { name } if name == "vmm.ping"), "{error:?}");
}

#[test]
fn the_limit_is_for_the_whole_answer() {
    let (mut client, mut peer) = pair();
    client.set_timeout(Some(Duration::from_millis(300))).unwrap();
    peer.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n").unwrap();
    // A byte now and then, each in time, until the client is gone or has waited far too long.
    let drip = thread::spawn(move || {
        let pause = || thread::sleep(Duration::from_millis(20));
        (0..1000).all(|_| {
            pause();
            peer.write_all(b" ").is_ok()
        })
    });
    let error = client.call::<vmm::Ping>(&()).unwrap_err();
    assert!(error.is_timeout(), "{error:?}");
    drop(client);
    assert!(!drip.join().unwrap(), "it waited for all of them");
}

#[test]
fn a_calls_limit_does_not_outlive_it() {
    let (ours, mut peer) = UnixStream::pair().unwrap();
    // Another name of the same socket, whose time limit it shows.
    let socket = ours.try_clone().unwrap();
    let mut client = Client::from(ours);
    client.set_timeout(Some(LONG)).unwrap();
    let vmm = thread::spawn(move || {
        assert!(peer.read(&mut [0; 4096]).unwrap() > 0);
        let whole = answer("200 OK", r#"{"version": "1"}"#);
        // What is left of the time for the last part is less than all of it.
        for part in whole.as_bytes().chunks(20) {
            thread::sleep(SHORT);
            peer.write_all(part).unwrap();
        }
    });
    client.call::<vmm::Ping>(&()).unwrap();
    vmm.join().unwrap();
    assert_eq!(socket.read_timeout().unwrap(), Some(LONG));
}

#[test]
fn a_vmm_that_goes_away_is_told_from_one_that_is_late() {
    let (mut client, peer) = pair();
    drop(peer);
    assert!(client.call::<vmm::Ping>(&()).unwrap_err().is_gone());
    let folder = tempfile::tempdir().unwrap();
    assert!(Client::connect(folder.path().join("none")).unwrap_err().is_gone());
}

#[test]
fn any_command_can_be_called_and_none_that_is_no_name() {
    let rig = Rig::new(Config::default());
    let mut client = rig.client();
    let ping = client.call_any("vmm.ping", Method::Get, b"").unwrap();
    assert!(String::from_utf8(ping.body).unwrap().contains(r#""version":"1.2.3""#));
    let error = client.call_any("vmm.nonsense", Method::Put, b"{}").unwrap_err();
    assert_eq!(error.code(), Some(Code::UnknownRoute));
    for name in ["vmm.ping HTTP/1.1\r\nX: y\r\n\r\nGET /api/v1/vmm.ping", "vm ping", "é"] {
        let error = client.call_any(name, Method::Get, b"").unwrap_err();
        assert!(matches!(error, ClientError::Request(_)), "{error:?}");
    }
    // Nothing was sent by these.
    client.call::<vmm::Ping>(&()).unwrap();
}

#[test]
fn an_older_vmm_is_understood() {
    let (mut client, mut peer) = pair();
    let older = thread::spawn(move || {
        let mut request = [0; 4096];
        for body in [
            answer("200 OK", r#"{"version": "16.0.0"}"#),
            answer("500 Internal Server Error", r#"["Failed to boot","No payload"]"#),
            answer("500 Internal Server Error", "VmNotBooted"),
            answer(
                "200 OK",
                r#"{"config": {"kernel": {"path": "/k"}}, "state": "Running", "memory_actual_size": 1}"#,
            ),
        ] {
            assert!(peer.read(&mut request).unwrap() > 0);
            peer.write_all(body.as_bytes()).unwrap();
        }
    });
    assert_eq!(client.call::<vmm::Ping>(&()).unwrap().version, "16.0.0");
    let error = client.call::<vm::Boot>(&()).unwrap_err();
    assert_eq!((error.to_string().as_str(), error.code()), ("Failed to boot: No payload", None));
    assert_eq!(client.call::<vm::Pause>(&()).unwrap_err().to_string(), "VmNotBooted");
    // It tells no phase; the state does.
    client.wait_for(Phase::Running, Some(LONG)).unwrap();
    older.join().unwrap();
}

#[test]
fn waiting_ends_with_the_phase_or_the_limit() {
    let rig = Rig::new(Config::default());
    let mut client = rig.client();
    client.wait_for(Phase::Empty, None).unwrap();
    client.call::<vm::Create>(&create("slow")).unwrap();
    let error = client.wait_for(Phase::Running, Some(SHORT)).unwrap_err();
    assert!(error.is_timeout());
    assert_eq!(error.to_string(), "the VM is not Running after 0.1 s but Created");

    let mut waiting = rig.client();
    let waiter = thread::spawn(move || waiting.wait_for(Phase::Running, Some(LONG)));
    let mut booting = rig.client();
    let boot = thread::spawn(move || booting.call::<vm::Boot>(&()));
    client.wait_for(Phase::Booting, Some(LONG)).unwrap();
    rig.release();
    boot.join().unwrap().unwrap();
    waiter.join().unwrap().unwrap();
    // The connection's own limit is what it was.
    client.call::<vmm::Ping>(&()).unwrap();
}

#[test]
fn the_end_of_a_vmm_is_waited_for() {
    let mut rig = Rig::new(Config::default());
    let mut client = rig.client();
    let error = client.wait_for_end(Some(SHORT)).unwrap_err();
    assert_eq!((error.to_string().as_str(), error.is_timeout()), ("the VMM has not ended after 0.1 s", true));
    let waiter = thread::spawn(move || client.wait_for_end(Some(LONG)));
    rig.client().call::<vmm::Shutdown>(&()).unwrap();
    rig.join_host();
    rig.stop_server();
    waiter.join().unwrap().unwrap();
}

#[test]
fn a_socket_that_is_about_to_come_is_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("api.sock");
    let error = Client::connect_within(&path, SHORT).unwrap_err();
    assert!(matches!(&error, ClientError::Connect { source, .. } if source.kind() == ErrorKind::NotFound));
    let client = {
        let path = path.clone();
        thread::spawn(move || Client::connect_within(path, LONG).map(drop))
    };
    thread::sleep(SHORT);
    // First a socket to which nobody listens, as a VMM that crashed leaves it.
    drop(UnixListener::bind(&path).unwrap());
    thread::sleep(SHORT);
    std::fs::remove_file(&path).unwrap();
    let _listener = UnixListener::bind(&path).unwrap();
    client.join().unwrap().unwrap();
    // What can never be one is not waited for.
    let start = Instant::now();
    assert!(Client::connect_within("x".repeat(200), Duration::from_secs(600)).is_err());
    assert!(start.elapsed() < LONG);
}

#[test]
fn option_strings_make_the_objects_of_requests() {
    let disk = DiskConfig::from_options("add-disk", "path=/d,id=x").unwrap();
    assert_eq!((disk.path.as_deref(), disk.id.as_deref()), (Some("/d".as_ref()), Some("x")));
    let faults = |text| {
        let faults = DiskConfig::from_options("add-disk", text).unwrap_err();
        faults.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    assert_eq!(faults("path=/d,patch=1"), ["add-disk patch: unknown key; did you mean \"path\"?"]);
    assert!(faults("readonly=maybe")[0].starts_with("add-disk readonly: expected on or off"));
    let resize = VmResize::from_options("resize", "desired_ram=1G").unwrap();
    assert_eq!(resize.desired_ram.map(|size| size.get()), Some(1 << 30));
    assert!(DiskConfig::option_help().contains("path=<path>\n"));
}
