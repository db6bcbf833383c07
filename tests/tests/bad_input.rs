//! The bad-input matrix, host side: what users and clients get wrong is refused by name, and costs nothing.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use vmm_api::command::Method;
use vmm_tests::harness::{Api, LIMIT, Scratch, SerialFile, Vmm, vm_arguments, vm_config};
use vmm_tests::tiny::{self, Guest};

/// The VM of the command line could not be had.
const FAILED: i32 = 1;
/// The command line itself is wrong.
const USAGE: i32 = 2;

/// Runs the VMM with `arguments`; it says `text`, and ends with `code`.
fn refused(arguments: &[String], code: i32, text: &str) {
    let mut vmm = Vmm::spawn(arguments);
    let status = vmm.wait();
    let said = vmm.stderr.text();
    assert_eq!(status.code(), Some(code), "{arguments:?}: {status}\n{said}");
    assert!(said.contains(text), "{arguments:?}: {text:?} is not in\n{said}");
    assert_eq!(vmm.stdout.text(), "", "{arguments:?}: no guest ran");
}

fn words(line: &str) -> Vec<String> {
    line.split_whitespace().map(str::to_owned).collect()
}

/// Bad kernels: name, content, what is said of it.
fn bad_kernels() -> Vec<(&'static str, Vec<u8>, &'static str)> {
    let elf = Guest::Hello.elf();
    let bzimage = tiny::bzimage();
    let cut = |file: &[u8], length: usize| file[..length].to_vec();
    let patched = |offset: usize, bytes: &[u8]| {
        let mut file = Guest::Hello.elf();
        file[offset..offset + bytes.len()].copy_from_slice(bytes);
        file
    };
    // Of the first program header, at 64: address at +24, size in the file at +32, in memory at +40. The second one's type is at 120.
    vec![
        ("empty", Vec::new(), "not a kernel: found an empty file"),
        ("script", b"#!/bin/sh\n".repeat(100), "not a kernel: found a script"),
        ("zeros", vec![0; 1 << 20], "not a kernel"),
        ("elf-in-header", cut(&elf, 40), "too short for the ELF header"),
        ("elf-in-program-headers", cut(&elf, 100), "too short for the program headers"),
        ("elf-in-segment", cut(&elf, elf.len() - 1), "too short for the segment"),
        ("elf-above-ram", patched(64 + 24, &0x8000_0000_u64.to_le_bytes()), "outside the guest's RAM"),
        ("elf-larger-than-ram", patched(64 + 40, &(1_u64 << 62).to_le_bytes()), "outside the guest's RAM"),
        ("elf-wraps", patched(64 + 24, &u64::MAX.to_le_bytes()), "impossible size"),
        ("elf-file-over-memory", patched(64 + 40, &1_u64.to_le_bytes()), "impossible size"),
        ("elf-on-boot-data", patched(64 + 24, &0x7000_u64.to_le_bytes()), "overlaps the PVH memory map"),
        ("elf-without-pvh", patched(120, &[0]), "no PVH entry point"),
        ("elf-of-arm", patched(18, &[183]), "ELF machine is 0xb7"),
        ("bzimage-in-header", cut(&bzimage, 0x220), "too short for the setup header"),
        ("bzimage-in-setup", cut(&bzimage, 0x800), "too short for the protected-mode code"),
        ("bzimage-in-code", cut(&bzimage, bzimage.len() - 1), "too short for the protected-mode code"),
    ]
}

#[test]
fn bad_kernels_and_initramfs() {
    let scratch = Scratch::new();
    for (name, content, text) in bad_kernels() {
        let kernel = scratch.write(name, content);
        refused(&vm_arguments(&kernel, "tty"), FAILED, text);
    }
    refused(&vm_arguments(&scratch.path("none"), "tty"), FAILED, "No such file");
    refused(&vm_arguments(scratch.folder(), "tty"), FAILED, "is not a file");
    refused(&vm_arguments(Path::new("/dev/zero"), "tty"), FAILED, "is not a file");

    let kernel = scratch.guest(Guest::Hello);
    let with = |path: &Path| {
        let more = ["--initramfs".to_owned(), path.display().to_string()];
        [vm_arguments(&kernel, "tty"), more.to_vec()].concat()
    };
    refused(&with(&scratch.path("none")), FAILED, "No such file");
    refused(&with(scratch.folder()), FAILED, "is not a file");
    refused(&with(&scratch.disk("large", 64 << 20)), FAILED, "initramfs");
}

#[test]
fn bad_flags() {
    let scratch = Scratch::new();
    let kernel = scratch.guest(Guest::Hello).display().to_string();
    let too_large = format!("size={}G", host_memory_gib() * 4);
    let rows: &[(&str, i32, &str)] = &[
        ("", USAGE, "--kernel"),
        ("--memory size=64M", USAGE, "--kernel: is required"),
        ("--kernel", USAGE, "--kernel"),
        ("--wibble --kernel K", USAGE, "unexpected argument '--wibble'"),
        ("--kernel K --cpus boot=0", USAGE, "--cpus boot: at least one vCPU must boot"),
        ("--kernel K --cpus boot=2,max=1", USAGE, "--cpus max: 1 is less than boot_vcpus, 2"),
        ("--kernel K --cpus boot=255", USAGE, "more than 254 vCPUs"),
        ("--kernel K --cpus boot=4294967295", USAGE, "more than 254 vCPUs"),
        ("--kernel K --cpus boot=-1", USAGE, "--cpus boot: expected a whole number"),
        ("--kernel K --cpus boot=", USAGE, "--cpus boot: expected a whole number"),
        ("--kernel K --cpus boot=2,boot=2", USAGE, "--cpus boot"),
        ("--kernel K --cpus boot=4,topology=1:3:1:1", USAGE, "its parts multiply to 3, but max_vcpus is 4"),
        ("--kernel K --cpus boot=2,topology=0:2:1:1", USAGE, "no part of the topology may be 0"),
        ("--kernel K --cpus boots=1", USAGE, "--cpus boots: unknown key"),
        ("--kernel K --memory size=0", USAGE, "--memory size: must not be 0"),
        ("--kernel K --memory size=1001", USAGE, "--memory size: 1001 is not a multiple of 4096 bytes"),
        (
            "--kernel K --memory size=64T",
            USAGE,
            "--memory size: more memory than 46 physical address bits reach",
        ),
        ("--kernel K --memory size=99999999999999999999", USAGE, "--memory size: expected a number of bytes"),
        ("--kernel K --memory size=12x", USAGE, "--memory size: expected a number of bytes"),
        ("--kernel K --memory size=4096", FAILED, "guest memory is too small"),
        ("--kernel K --memory LARGE", FAILED, "is more than this host's"),
        ("--kernel K --disk image_type=raw", USAGE, "--disk path: is required"),
        ("--kernel K --disk path=x,num_queues=0", USAGE, "--disk num_queues: must not be 0"),
        ("--kernel K --disk path=x,queue_size=3", USAGE, "--disk queue_size: 3 is not a power of two"),
        ("--kernel K --disk path=x,image_type=exe", USAGE, "--disk image_type"),
        ("--kernel K --net tap=x", USAGE, "--net: not supported by this build yet"),
        ("--kernel K --serial wibble", USAGE, "--serial"),
        ("--kernel K --serial file=/proc/none/x", FAILED, "/proc/none/x"),
        ("--kernel K --seccomp maybe", USAGE, "--seccomp: expected true, false, log or errno"),
        ("--api-socket path=/proc/none/x", FAILED, "cannot bind socket /proc/none/x"),
        ("--api-socket path=K", FAILED, "exists and is not a socket"),
        ("--api-socket fd=99", FAILED, "cannot take descriptor 99 as the API socket"),
    ];
    for (line, code, text) in rows {
        let line = line.replace("LARGE", &too_large);
        let arguments = words(&line).into_iter().map(|word| match word.strip_suffix('K') {
            Some(start @ ("" | "path=")) => format!("{start}{kernel}"),
            _ => word,
        });
        refused(&arguments.collect::<Vec<_>>(), *code, text);
    }
}

#[test]
fn bad_kernel_command_lines() {
    let scratch = Scratch::new();
    let kernel = scratch.guest(Guest::Hello);
    let with = |text: &str| {
        let more = ["--cmdline".to_owned(), text.to_owned()];
        [vm_arguments(&kernel, "tty"), more.to_vec()].concat()
    };
    refused(&with(&"x".repeat(2048)), USAGE, "--cmdline: 2048 bytes are more than the 2047");
    refused(&with("caf\u{e9}"), USAGE, "is not an ASCII character");
    let longest = "x".repeat(2047);
    let mut vmm = Vmm::spawn(with(&longest));
    vmm.expect_exit(0);
    assert_eq!(vmm.stdout.text(), format!("hello {longest}\n"));
}

/// RAM and swap of this host, in GiB, rounded up.
fn host_memory_gib() -> u64 {
    let info = fs::read_to_string("/proc/meminfo").unwrap();
    let kib = |name: &str| -> u64 {
        let line = info.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    };
    (kib("MemTotal:") + kib("SwapTotal:")).div_ceil(1 << 20)
}

fn with_disk(kernel: &Path, disk: &str) -> Vec<String> {
    [vm_arguments(kernel, "tty"), words(&format!("--disk {disk}"))].concat()
}

#[test]
fn bad_disks() {
    let scratch = Scratch::new();
    let kernel = scratch.guest(Guest::Hello);
    let odd = scratch.disk("odd", (1 << 20) + 100).display().to_string();
    let empty = scratch.disk("empty", 0).display().to_string();
    let twice = scratch.disk("twice", 1 << 20).display().to_string();
    let rows = [
        (scratch.path("none").display().to_string(), "does not exist"),
        (scratch.folder().display().to_string(), "is a directory"),
        ("/dev/null".to_owned(), "is a character device"),
        (odd, "has an odd size: 1048676 bytes is not a multiple of 512"),
        (empty, "is empty"),
        (format!("{twice},image_type=raw path={twice}"), "is locked"),
    ];
    for (disk, text) in rows {
        refused(&with_disk(&kernel, &format!("path={disk},image_type=raw")), FAILED, text);
    }
}

#[test]
fn a_disk_that_may_only_be_read() {
    let scratch = Scratch::new();
    let kernel = scratch.guest(Guest::Hello);
    let disk = scratch.disk("disk", 1 << 20);
    fs::set_permissions(&disk, fs::Permissions::from_mode(0o444)).unwrap();
    let disk = format!("path={},image_type=raw", disk.display());
    let mut vmm = Vmm::spawn_unprivileged(&with_disk(&kernel, &disk));
    assert_eq!(vmm.wait().code(), Some(FAILED));
    let said = vmm.stderr.text();
    assert!(said.contains("ermission denied"), "{said}");
    Vmm::spawn_unprivileged(&with_disk(&kernel, &format!("{disk},readonly=on"))).expect_exit(0);
}

#[test]
fn a_disk_that_another_vmm_has() {
    let scratch = Scratch::new();
    let kernel = scratch.guest(Guest::Hello);
    let disk = format!("path={},image_type=raw", scratch.disk("disk", 1 << 20).display());
    let mut owner = Vmm::spawn(with_disk(&scratch.guest(Guest::Halt), &disk));
    owner.stdout.wait_for("halted");
    refused(&with_disk(&kernel, &disk), FAILED, "is locked: another process");
    refused(&with_disk(&kernel, &format!("{disk},readonly=on")), FAILED, "is locked: another process");
    owner.signal("TERM");
    owner.expect_exit(0);
    Vmm::spawn(with_disk(&kernel, &disk)).expect_exit(0);
}

#[test]
fn a_raw_disk_whose_guest_wrote_a_qcow2_header_stays_raw() {
    let scratch = Scratch::new();
    let kernel = scratch.guest(Guest::Hello);
    // Version 3, backing file "/etc/passwd" at 0x100, a virtual size of 1 TiB.
    let mut content = vec![0; 1 << 20];
    content[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    content[8..20].copy_from_slice(&[0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 11]);
    content[24..32].copy_from_slice(&(1_u64 << 40).to_be_bytes());
    content[0x100..0x10b].copy_from_slice(b"/etc/passwd");
    let disk = scratch.write("disk", &content);
    for image_type in [",image_type=raw", ""] {
        let mut vmm = Vmm::spawn(with_disk(&kernel, &format!("path={}{image_type}", disk.display())));
        vmm.expect_exit(0);
        assert_eq!(vmm.stderr.text().contains("the image is used as raw"), image_type.is_empty());
    }
    assert_eq!(fs::read(&disk).unwrap(), content, "nobody took it for what it says");
}

/// Where a document is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    Create,
    Boot,
}

/// Merges `change` into `document`, as RFC 7396 says.
fn merge(document: &mut Value, change: &Value) {
    match (document, change) {
        (Value::Object(members), Value::Object(changes)) => {
            for (name, change) in changes {
                merge(members.entry(name.clone()).or_insert(Value::Null), change);
            }
        }
        (document, change) => *document = change.clone(),
    }
}

/// Documents with a fault: the change that makes it, where it is refused, the status, what is said.
fn bad_documents(scratch: &Scratch) -> Vec<(Value, At, u16, &'static str)> {
    use At::{Boot, Create};
    let odd = scratch.disk("odd", 1001);
    let text = scratch.write("text", "no kernel");
    vec![
        (json!({ "payload": null }), Create, 422, "payload"),
        (json!({ "payload": { "kernel": null } }), Create, 422, "needs a kernel or firmware"),
        (json!({ "payload": { "kernel": 7 } }), Create, 400, "payload.kernel"),
        (json!({ "payload": { "cmdline": "x".repeat(3000) } }), Create, 422, "more than the 2047"),
        (json!({ "cpus": { "boot_vcpus": 0 } }), Create, 422, "at least one vCPU"),
        (json!({ "cpus": { "boot_vcpus": 2 } }), Create, 422, "less than boot_vcpus"),
        (json!({ "cpus": { "boot_vcpus": "2" } }), Create, 400, "cpus.boot_vcpus"),
        (json!({ "cpus": { "boot_vcpus": -1 } }), Create, 400, "cpus.boot_vcpus"),
        (json!({ "cpus": { "boot_vcpus": 1.5 } }), Create, 400, "cpus.boot_vcpus"),
        (json!({ "cpus": { "boot_vcpus": 1_u64 << 40 } }), Create, 400, "cpus.boot_vcpus"),
        (json!({ "cpus": [] }), Create, 400, "cpus"),
        (
            json!({ "cpus": { "topology": { "threads_per_core": 2, "cores_per_die": 2, "dies_per_package": 1, "packages": 1 } } }),
            Create,
            422,
            "multiply to 4, but max_vcpus is 1",
        ),
        (json!({ "memory": { "size": 0 } }), Create, 422, "must not be 0"),
        (json!({ "memory": { "size": 1001 } }), Create, 422, "not a multiple of 4096"),
        (json!({ "memory": { "size": 1_u64 << 60 } }), Create, 422, "physical address bits"),
        (json!({ "memory": { "size": (host_memory_gib() * 4) << 30 } }), Boot, 500, "more than this host"),
        (json!({ "memory": { "sizes": 1 } }), Create, 400, "sizes"),
        (json!({ "wibble": 1 }), Create, 400, "wibble"),
        (json!({ "net": [{ "tap": "x" }] }), Create, 501, "net"),
        (json!({ "disks": [{}] }), Create, 422, "disks[0].path"),
        (json!({ "disks": {} }), Create, 400, "disks"),
        (json!({ "disks": [{ "path": "/none" }] }), Boot, 500, "does not exist"),
        (json!({ "disks": [{ "path": "/tmp" }] }), Boot, 500, "is a directory"),
        (json!({ "disks": [{ "path": odd }] }), Boot, 500, "odd size"),
        (
            json!({ "disks": [{ "path": "x", "id": "a" }, { "path": "y", "id": "a" }] }),
            Create,
            422,
            "disks[1].id",
        ),
        (json!({ "payload": { "kernel": "/none" } }), Boot, 500, "No such file"),
        (json!({ "payload": { "kernel": text } }), Boot, 500, "not a kernel"),
        (json!({ "payload": { "initramfs": "/none" } }), Boot, 500, "No such file"),
        (json!({ "serial": { "mode": "File", "file": null } }), Create, 422, "serial.file"),
        (json!({ "serial": { "file": "/proc/none/x" } }), Boot, 500, "/proc/none/x"),
    ]
}

#[test]
fn bad_documents_leave_a_vmm_that_boots_good_ones() {
    let scratch = Scratch::new();
    let vmm = Vmm::with_api(&scratch, [""; 0]);
    let mut api = vmm.api();
    boots_a_good_vm(&scratch, &mut api);
    let before = vmm.holdings();
    for (change, at, status, text) in bad_documents(&scratch) {
        let mut document = vm_config(&scratch.guest(Guest::Halt), &scratch.path("serial"));
        merge(&mut document, &change);
        if at == At::Boot {
            api.create(&document);
        }
        let answer = if at == At::Boot { api.put("vm.boot") } else { api.try_create(&document) };
        assert_eq!(answer.status, status, "{change}: {answer:?}");
        assert!(answer.body.contains(text), "{change}: {text:?} is not in {}", answer.body);
        if at == At::Boot {
            assert_eq!(api.state(), "Created", "{change}");
            api.puts(&["vm.delete"]);
        }
        assert_eq!(api.get("vm.info").status, 404, "{change}");
        vmm.expect_holdings(&before, &change.to_string());
        boots_a_good_vm(&scratch, &mut api);
    }
}

fn boots_a_good_vm(scratch: &Scratch, api: &mut Api) {
    let serial = SerialFile::new(scratch.path("good-serial"));
    fs::remove_file(serial.path()).ok();
    api.create(&vm_config(&scratch.guest(Guest::Halt), serial.path()));
    api.puts(&["vm.boot"]);
    serial.wait_for("halted");
    api.puts(&["vm.delete"]);
}

#[test]
fn a_boot_that_failed_can_be_tried_again() {
    let scratch = Scratch::new();
    let vmm = Vmm::with_api(&scratch, [""; 0]);
    let mut api = vmm.api();
    let mut config = vm_config(&scratch.guest(Guest::Halt), &scratch.path("serial"));
    merge(&mut config, &json!({ "disks": [{ "path": scratch.path("late"), "image_type": "Raw" }] }));
    api.create(&config);
    for _ in 0..3 {
        assert_eq!(api.put("vm.boot").status, 500);
        assert_eq!(api.state(), "Created");
    }
    let _ = scratch.disk("late", 1 << 20);
    api.puts(&["vm.boot"]);
    assert_eq!(api.state(), "Running");
    SerialFile::new(scratch.path("serial")).wait_for("halted");
}

#[test]
fn bad_requests() {
    let scratch = Scratch::new();
    let vmm = Vmm::with_api(&scratch, [""; 0]);
    let mut api = vmm.api();
    let rows: &[(Method, &str, &[u8], u16, &str)] = &[
        (Method::Get, "vm.boot", b"", 405, "method"),
        (Method::Put, "vm.info", b"", 405, "method"),
        (Method::Put, "vmm.ping", b"", 405, "method"),
        (Method::Put, "vm.wibble", b"", 404, "vm.wibble"),
        (Method::Get, "../v2/vmm.ping", b"", 404, ""),
        (Method::Put, "vm.snapshot", b"{}", 404, "snapshot"),
        (Method::Put, "vm.restore", br#"{"source_url": "file:///x"}"#, 404, "/x"),
        (Method::Put, "vm.create", b"", 400, ""),
        (Method::Put, "vm.create", b"{", 400, ""),
        (Method::Put, "vm.create", b"[]", 400, ""),
        (Method::Put, "vm.create", b"null", 400, ""),
        (Method::Put, "vm.create", b"{} {}", 400, ""),
        (Method::Put, "vm.create", b"\xff\xfe", 400, ""),
        (Method::Put, "vm.create", b"{\"cpus\": {\"boot_vcpus\": 1, \"boot_vcpus\": 2}}", 422, "given twice"),
    ];
    for (method, name, body, status, text) in rows {
        let answer = api.request(*method, name, body);
        let what = format!("{name} {}", String::from_utf8_lossy(body));
        assert_eq!(answer.status, *status, "{what}: {answer:?}");
        assert!(answer.body.contains(text), "{what}: {answer:?}");
    }
    let deep = "[".repeat(100_000);
    assert_eq!(api.request(Method::Put, "vm.create", deep.as_bytes()).status, 400);
    let large = format!("{{\"payload\": \"{}\"}}", "x".repeat(2 << 20));
    assert_eq!(vmm.api().request(Method::Put, "vm.create", large.as_bytes()).status, 413);
    boots_a_good_vm(&scratch, &mut vmm.api());
}

/// What the server answers to these bytes, until it closes the connection.
fn talk(vmm: &Vmm, bytes: &[u8]) -> String {
    let mut stream = UnixStream::connect(vmm.socket()).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream.write_all(bytes).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut answer = Vec::new();
    // A server that has refused may reset the connection.
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

#[test]
fn what_is_not_http_is_refused() {
    let scratch = Scratch::new();
    let vmm = Vmm::with_api(&scratch, [""; 0]);
    let long = format!("GET /api/v1/vmm.ping HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(100_000));
    let rows: &[(&[u8], &str)] = &[
        (b"hello\r\n\r\n", "HTTP/1.1 400"),
        (b"\0\x01\x02\x03\r\n\r\n", "HTTP/1.1 400"),
        (b"GET / HTTP/9.9\r\n\r\n", "HTTP/1.1 "),
        (b"PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: -1\r\n\r\n", "HTTP/1.1 400"),
        (b"PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n", "HTTP/1.1 4"),
        (b"PUT /api/v1/vm.create HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "HTTP/1.1 411"),
        (long.as_bytes(), "HTTP/1.1 431"),
    ];
    for (bytes, start) in rows {
        let answer = talk(&vmm, bytes);
        let what = String::from_utf8_lossy(&bytes[..bytes.len().min(80)]).into_owned();
        assert!(answer.starts_with(start), "{what:?}: {answer:?}");
    }
    assert_eq!(
        talk(&vmm, b"PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 10\r\n\r\n{"),
        "",
        "half a request"
    );
    boots_a_good_vm(&scratch, &mut vmm.api());
}

#[test]
fn half_requests_and_a_thousand_connections_keep_nobody_waiting() {
    let scratch = Scratch::new();
    let mut vmm = Vmm::with_api(&scratch, [""; 0]);
    let mut silent: Vec<UnixStream> = Vec::new();
    for start in
        [b"PUT /api/v1/vm.cre".as_slice(), b"PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 9\r\n\r\n{"]
    {
        let mut stream = UnixStream::connect(vmm.socket()).unwrap();
        stream.write_all(start).unwrap();
        silent.push(stream);
    }
    boots_a_good_vm(&scratch, &mut vmm.api());
    for count in 0..1000 {
        silent.push(UnixStream::connect(vmm.socket()).unwrap());
        if count % 100 == 99 {
            assert_eq!(vmm.api().get("vmm.ping").status, 200, "after {count} connections");
        }
    }
    boots_a_good_vm(&scratch, &mut vmm.api());
    drop(silent);
    boots_a_good_vm(&scratch, &mut vmm.api());
    assert!(vmm.is_running());
}

#[test]
fn a_client_that_leaves_before_its_answer_costs_nothing() {
    let scratch = Scratch::new();
    let vmm = Vmm::with_api(&scratch, [""; 0]);
    let config = vm_config(&scratch.guest(Guest::Halt), &scratch.path("serial")).to_string();
    for _ in 0..50 {
        for (name, body) in [("vm.create", config.as_str()), ("vm.boot", ""), ("vm.delete", "")] {
            let mut stream = UnixStream::connect(vmm.socket()).unwrap();
            let length = body.len();
            write!(stream, "PUT /api/v1/{name} HTTP/1.1\r\nContent-Length: {length}\r\n\r\n{body}").unwrap();
        }
    }
    std::thread::sleep(Duration::from_millis(50));
    let mut api = vmm.api();
    api.puts(&["vm.delete"]);
    boots_a_good_vm(&scratch, &mut api);
}
