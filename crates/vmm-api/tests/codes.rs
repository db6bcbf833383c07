//! Every error code is produced by a request, or is said to be reserved.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "test code")]

mod common;

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::time::Duration;

use common::{Rig, Wire, config};
use serde_json::Value;
use vmm_api::commands::device::AddDisk;
use vmm_api::config::{DiskConfig, UnknownFields, parse_vm_config};
use vmm_api::error::{ApiError, Code};
use vmm_api::http::Config;
use vmm_api::spec::{fill_ids, with_device, without_device};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

const ASKS: &str = "Accept: application/json\r\n";

/// The code in the answer, which must be of the code's status.
fn code(wire: &mut Wire) -> Code {
    let answer = wire.answer();
    let body: Value = serde_json::from_str(&answer.body).unwrap_or_else(|_| panic!("{answer:?}"));
    // A request that could not be read is answered in the plain form: its status has one code only.
    let code = match body["code"].as_str() {
        Some(name) => Code::from_name(name).unwrap(),
        None => *Code::ALL.iter().find(|code| code.status() == answer.status).unwrap(),
    };
    assert_eq!(code.status(), answer.status, "{answer:?}");
    code
}

fn request(rig: &Rig, method: &str, name: &str, headers: &str, body: &str) -> Code {
    let mut wire = rig.wire();
    let length = body.len();
    wire.send(&format!(
        "{method} /api/v1/{name} HTTP/1.1\r\n{ASKS}{headers}Content-Length: {length}\r\n\r\n{body}"
    ));
    code(&mut wire)
}

fn raw(rig: &Rig, bytes: &str) -> Code {
    let mut wire = rig.wire();
    wire.send(bytes);
    code(&mut wire)
}

fn of_the_server(rig: &Rig) -> Vec<Code> {
    let long = "x".repeat(20_000);
    let null = File::open("/dev/null").unwrap();
    let crowded = rig.wire();
    crowded.stream.send_with_fds(&[&b"PUT /"[..]], &[null.as_raw_fd(); 65]).unwrap();
    let mut crowded = crowded;
    let too_many = crowded.answer();
    assert!(too_many.body.contains("descriptors"), "{too_many:?}");
    vec![
        Code::TooManyDescriptors,
        request(rig, "GET", "nowhere", "", ""),
        request(rig, "PUT", "vmm.ping", "", ""),
        raw(rig, "nonsense\r\n\r\n"),
        request(rig, "PUT", "vm.create", "Expect: wonders\r\n", "{}"),
        raw(rig, &format!("PUT /api/v1/vm.create HTTP/1.1\r\n{ASKS}Transfer-Encoding: chunked\r\n\r\n")),
        raw(rig, &format!("PUT /api/v1/vm.create HTTP/1.1\r\n{ASKS}Transfer-Encoding: gzip\r\n\r\n")),
        raw(rig, &format!("PUT /api/v1/vm.create HTTP/1.1\r\n{ASKS}Content-Length: 99999999\r\n\r\n")),
        raw(rig, &format!("GET /{long} HTTP/1.1\r\n\r\n")),
        raw(rig, "GET /api/v1/vmm.ping HTTP/2.0\r\n\r\n"),
        {
            // One stream is all that there may be.
            let mut stream = rig.wire();
            stream.send("GET /api/v1/vmm.events HTTP/1.1\r\n\r\n");
            assert!(stream.answer_or_end());
            request(rig, "GET", "vmm.events", "", "")
        },
        // The rest never comes.
        raw(rig, "GET /api/v1/vmm.ping HTT"),
    ]
}

fn of_the_vm(rig: &Rig) -> Vec<Code> {
    let put = |name, body| request(rig, "PUT", name, "", body);
    let done = |name: &str, body: &str| assert_eq!(rig.wire().ask_with("PUT", name, body).status, 204);
    let mut codes = vec![
        put("vm.boot", ""),
        put("vm.create", "{"),
        put("vm.create", r#"{"disk": []}"#),
        put("vm.create", "{}"),
        put("vm.create", r#"{"payload": {"kernel": "/k"}, "watchdog": true, "tpm": {"socket": "/s"}}"#),
    ];
    done("vm.create", &config("fails"));
    let another = config("");
    codes.extend([put("vm.create", &another), put("vm.pause", ""), put("vm.boot", "")]);
    done("vm.delete", "");
    codes.push(put("vm.restore", r#"{"source_url": "file:///s"}"#));
    codes.push(put("vm.restore", r#"{"source_url": "file:///missing"}"#));
    done("vm.create", &config("forgets"));
    codes.push(put("vm.boot", ""));
    done("vm.delete", "");
    done("vm.create", &config(""));
    done("vm.boot", "");
    codes.push(put("vm.snapshot", r#"{"destination_url": "file:///s"}"#));
    codes.push(put("vm.snapshot", r#"{"destination_url": "file:///cancelled"}"#));
    codes.push(put("vm.snapshot", r#"{"destination_url": "file:///crowded"}"#));
    codes.push(put("vm.send-migration", r#"{"destination_url": "unix:/m"}"#));
    codes
}

/// The host passes on what these functions say.
fn of_devices() -> [Code; 3] {
    let json = br#"{"payload": {"kernel": "k"}, "disks": [{"path": "a", "id": "a"}]}"#;
    let mut config = parse_vm_config(json, UnknownFields::Refuse).unwrap().config;
    fill_ids(&mut config);
    let disk = DiskConfig { path: Some("b".into()), id: Some("a".into()), ..DiskConfig::default() };
    let code = |result: Result<_, ApiError>| result.map(|_| ()).unwrap_err().code;
    let rng = config.rng.id.clone().unwrap();
    [
        code(with_device::<AddDisk>(&config, disk)),
        code(without_device(&config, "nobody")),
        code(without_device(&config, &rng)),
    ]
}

#[test]
fn every_code_is_produced_or_reserved() {
    let rig =
        Rig::new(Config { request_timeout: Duration::from_millis(300), max_streams: 1, ..Config::default() });
    let lists = [of_the_server(&rig), of_the_vm(&rig), of_devices().to_vec()];
    let produced: BTreeSet<Code> = lists.into_iter().flatten().collect();
    let expected = Code::ALL.into_iter().filter(|code| !code.is_reserved()).collect();
    assert_eq!(produced, expected);
}
