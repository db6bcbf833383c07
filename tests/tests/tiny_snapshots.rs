//! Snapshots of tiny guests by the real binary: saved, restored in another process, cancelled, refused. They run on any KVM.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]
#![expect(unsafe_code, reason = "limits of another process are C's")]

use std::fs::{self, OpenOptions, Permissions};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use vmm_api::client::Client;
use vmm_api::events::StreamItem;
use vmm_state::Phase;
use vmm_tests::harness::counting::{counting_guest, counting_with, counts, goes_on};
use vmm_tests::harness::saving::{from, to, url};
use vmm_tests::harness::{
    Answer, Api, LIMIT, Pending, Scratch, SerialFile, Vmm, refused, resident_kib, vm_config, wait_until,
};
use vmm_tests::tiny::Guest;

#[test]
fn a_guest_goes_on_in_another_process() {
    let scratch = Scratch::new();
    let (mut first, serial) = counting_guest(&scratch);
    let saved = scratch.path("saved");
    first.api().puts(&["vm.pause"]);
    first.api().done("vm.snapshot", &to(&saved));
    assert_eq!(first.api().phase(), Phase::Paused, "as before");
    first.api().puts(&["vmm.shutdown"]);
    first.expect_exit(0);

    let second = Vmm::with_api(&scratch, [""; 0]);
    let other = SerialFile::new(scratch.path("other"));
    let mut body = from(&saved, &other);
    body["resume"] = json!(false);
    second.api().done("vm.restore", &body);
    assert_eq!(second.api().state(), "Paused", "unless it is told to run");
    second.api().puts(&["vm.resume"]);
    goes_on(&serial, &other);
    // It is a VM as any other: it reboots, and boots again.
    second.api().puts(&["vm.reboot", "vm.shutdown", "vm.boot"]);
    let manifest: Value = serde_json::from_slice(&fs::read(saved.join("manifest.json")).unwrap()).unwrap();
    let from =
        json!({ "source_url": url(&saved), "id": manifest["id"], "created_ms": manifest["created_ms"] });
    assert_eq!(second.api().get("vm.info").json()["restored_from"], from);
    wait_until(LIMIT, || other.text().contains("00000000\n").then_some(()), || "a boot".to_owned());
}

/// Reads what is there until it has `text`.
fn read_until(stream: &mut UnixStream, text: &str) -> String {
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    let (mut seen, mut buffer) = (String::new(), [0; 256]);
    while !seen.contains(text) {
        let count = stream.read(&mut buffer).unwrap();
        assert_ne!(count, 0, "the console ended after {seen:?}");
        seen.push_str(&String::from_utf8_lossy(&buffer[..count]));
    }
    seen
}

#[test]
fn a_restored_guest_keeps_its_socket_and_its_pty() {
    let scratch = Scratch::new();
    let saved = scratch.path("saved");
    let socket = |name: &str| json!({ "mode": "Socket", "socket": scratch.path(name) });
    {
        let vmm = Vmm::with_api(&scratch, [""; 0]);
        let mut config = vm_config(&scratch.guest(Guest::Echo), &scratch.path("unused"));
        config["serial"] = socket("one");
        vmm.api().create(&config);
        vmm.api().puts(&["vm.boot"]);
        let mut console = UnixStream::connect(scratch.path("one")).unwrap();
        read_until(&mut console, "ready");
        console.write_all(b"abc").unwrap();
        read_until(&mut console, "abc");
        vmm.api().puts(&["vm.pause"]);
        vmm.api().done("vm.snapshot", &to(&saved));
    }
    let vmm = Vmm::with_api(&scratch, [""; 0]);
    let restore = |serial| json!({ "source_url": url(&saved), "resume": true, "serial": serial });
    vmm.api().done("vm.restore", &restore(socket("two")));
    let mut console = UnixStream::connect(scratch.path("two")).unwrap();
    console.write_all(b"def").unwrap();
    assert_eq!(read_until(&mut console, "def"), "def", "nothing is said twice");
    vmm.api().puts(&["vm.delete"]);

    vmm.api().done("vm.restore", &restore(json!({ "mode": "Pty" })));
    let path = vmm.api().get("vm.info").json()["config"]["serial"]["file"].as_str().unwrap().to_owned();
    let mut pty = OpenOptions::new().read(true).write(true).open(path).unwrap();
    pty.write_all(b"q").unwrap();
    // It powers off, which is the end of the VMM: typing has arrived.
    let mut vmm = vmm;
    vmm.expect_exit(0);
}

#[test]
fn many_cycles_in_one_process_leave_nothing_behind() {
    let cycles = std::env::var("VMM_SNAPSHOT_CYCLES").map_or(20, |number| number.parse().unwrap());
    let scratch = Scratch::new();
    let (vmm, serial) = counting_guest(&scratch);
    let mut api = vmm.api();
    let saved = scratch.path("saved");
    let cycle = |api: &mut Api| {
        api.puts(&["vm.pause"]);
        api.done("vm.snapshot", &to(&saved));
        api.puts(&["vm.delete"]);
        fs::remove_file(serial.path()).unwrap();
        api.done("vm.restore", &from(&saved, &serial));
        serial.wait_longer_than(20);
        fs::remove_dir_all(&saved).unwrap();
    };
    cycle(&mut api);
    cycle(&mut api);
    let before = (vmm.holdings(), resident_kib(&vmm.pid().to_string()));
    for _ in 2..cycles {
        cycle(&mut api);
    }
    vmm.expect_holdings(&before.0, "after many cycles");
    let after = resident_kib(&vmm.pid().to_string());
    assert!(after < before.1 + 2048, "{} KiB became {after} KiB in {cycles} cycles", before.1);
    assert!(counts(&serial).windows(2).all(|pair| pair[1] == pair[0] + 1), "it still counts");
}

/// A VM whose snapshot lasts: all of its memory is there, and has to be looked at. It grows until what is to be seen is seen.
fn slow_to_save(scratch: &Scratch, mib: u64) -> Vmm {
    let vmm = Vmm::with_api(scratch, [""; 0]);
    let serial = SerialFile::new(scratch.path(format!("serial-{mib}")));
    let mut config = vm_config(&scratch.guest(Guest::Ticker), serial.path());
    config["memory"] = json!({ "size": mib << 20, "prefault": true });
    vmm.api().create(&config);
    vmm.api().puts(&["vm.boot"]);
    serial.wait_for("00000001\n");
    vmm
}

/// Does `attempt` with ever slower VMs until it says that it saw what it came for.
fn until_seen(mut attempt: impl FnMut(&Scratch, Vmm) -> bool) {
    for mib in [64, 128, 256, 512, 1024] {
        let scratch = Scratch::new();
        let vmm = slow_to_save(&scratch, mib);
        if attempt(&scratch, vmm) {
            return;
        }
    }
    panic!("no snapshot is slow enough");
}

#[test]
fn a_snapshot_is_cancelled_by_a_client_and_by_the_end_of_the_vmm() {
    for live in [false, true] {
        until_seen(|scratch, mut vmm| {
            let saved = scratch.path("saved");
            if !live {
                vmm.api().puts(&["vm.pause"]);
            }
            let body = json!({ "destination_url": url(&saved), "live": live }).to_string();
            let begin = || Pending::send(vmm.socket(), "vm.snapshot", body.as_bytes());
            let mut snapshot = begin();
            let mut api = vmm.api();
            while api.phase() != Phase::Saving && !snapshot.is_answered() {}
            let cancel = api.put("vm.cancel");
            let answer = snapshot.answer();
            if cancel.status == 409 {
                // It was over already.
                return false;
            }
            assert_eq!(cancel.status, 204, "{cancel:?}");
            refused(&answer, 409, "cancelled");
            assert!(!saved.exists(), "nothing is left");
            assert_eq!(api.phase(), if live { Phase::Running } else { Phase::Paused }, "as before");

            let mut snapshot = begin();
            while api.phase() != Phase::Saving && !snapshot.is_answered() {}
            api.puts(&["vmm.shutdown"]);
            let answer = snapshot.answer();
            assert!([204, 409].contains(&answer.status), "who waits for a snapshot is answered: {answer:?}");
            vmm.expect_exit(0);
            assert_eq!(saved.exists(), saved.join("manifest.json").exists(), "a whole one, or none");
            true
        });
    }
}

#[test]
fn clients_are_served_while_a_vm_is_saved_and_who_would_disturb_it_waits() {
    until_seen(|scratch, vmm| {
        let mut api = vmm.api();
        api.puts(&["vm.pause"]);
        let send = |name: &str, body: &Value| Pending::send(vmm.socket(), name, body.to_string().as_bytes());
        let mut snapshot = send("vm.snapshot", &to(&scratch.path("saved")));
        let seen = |api: &mut Api, pending: &mut Pending| {
            wait_until(
                LIMIT,
                || (api.phase() == Phase::Saving || pending.is_answered()).then_some(()),
                || "a snapshot".to_owned(),
            );
        };
        seen(&mut api, &mut snapshot);
        let mut resume = send("vm.resume", &json!({}));
        let mut again = send("vm.snapshot", &to(&scratch.path("again")));
        let asked: Vec<Answer> = ["vmm.ping", "vm.info", "vm.counters", "vmm.metrics", "vm.boot-trace"]
            .map(|name| api.get(name))
            .into();
        let waited = !resume.is_answered();
        if api.phase() != Phase::Saving || !waited {
            return false;
        }
        assert!(asked.iter().all(|answer| answer.status == 200), "{asked:?}");
        assert_eq!(snapshot.answer().status, 204);
        assert_eq!(resume.answer().status, 204, "it waited for the snapshot");
        refused(&again.answer(), 409, "not paused");
        assert_eq!(api.phase(), Phase::Running);
        true
    });
}

/// Sets how large a file of the process may become (RLIMIT_FSIZE).
fn limit_files(vmm: &Vmm, size: libc::rlim_t) {
    let pid = libc::pid_t::try_from(vmm.pid()).unwrap();
    let limit = libc::rlimit { rlim_cur: size, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: a valid limit to read from; the former one is not asked for.
    let set = unsafe { libc::prlimit(pid, libc::RLIMIT_FSIZE, &raw const limit, std::ptr::null_mut()) };
    assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
}

#[test]
fn a_disk_that_is_full_leaves_the_guest_as_it_was() {
    let scratch = Scratch::new();
    let (vmm, serial) = counting_guest(&scratch);
    let saved = scratch.path("saved");
    let mut api = vmm.api();
    for _ in 0..2 {
        // Enough for what the guest prints.
        limit_files(&vmm, 1 << 20);
        refused(
            &api.put_json("vm.snapshot", &json!({ "destination_url": url(&saved), "live": true })),
            500,
            "File too large",
        );
        assert_eq!(api.phase(), Phase::Running);
        api.puts(&["vm.pause"]);
        refused(&api.put_json("vm.snapshot", &to(&saved)), 500, "File too large");
        assert!(!saved.exists(), "nothing is left");
        assert_eq!(api.phase(), Phase::Paused);
        limit_files(&vmm, libc::RLIM_INFINITY);
        api.puts(&["vm.resume"]);
        serial.wait_longer_than(serial.text().len() + 20);
    }
    api.puts(&["vm.pause"]);
    api.done("vm.snapshot", &to(&saved));
}

#[test]
fn what_cannot_be_saved_is_refused_by_name() {
    let scratch = Scratch::new();
    let (vmm, _serial) = counting_guest(&scratch);
    let mut api = vmm.api();
    let (saved, other) = (scratch.path("saved"), scratch.path("other"));
    refused(&api.put_json("vm.snapshot", &to(&saved)), 409, "not paused");
    api.puts(&["vm.pause"]);
    for bad in ["http:///x", "file://x", ""] {
        refused(&api.put_json("vm.snapshot", &json!({ "destination_url": bad })), 422, "destination_url");
    }
    let incremental = json!({ "destination_url": url(&saved), "incremental": true });
    refused(&api.put_json("vm.snapshot", &incremental), 422, "incremental");
    fs::create_dir(&other).unwrap();
    fs::write(other.join("mine"), "x").unwrap();
    refused(&api.put_json("vm.snapshot", &to(&other)), 500, "mine");
    assert!(other.join("mine").exists());
    refused(&api.put_json("vm.snapshot", &to(Path::new("/nowhere/at/all"))), 500, "No such file");
    api.done("vm.snapshot", &to(&saved));
    refused(&api.put_json("vm.snapshot", &to(&saved)), 500, "holds a snapshot already");
    refused(&api.put("vm.cancel"), 409, "nothing to cancel");
    assert_eq!(api.phase(), Phase::Paused);
}

#[test]
fn what_cannot_be_restored_is_refused_by_name_and_leaves_no_vm() {
    let scratch = Scratch::new();
    let (vmm, serial) = counting_guest(&scratch);
    let saved = scratch.path("saved");
    let mut api = vmm.api();
    api.puts(&["vm.pause"]);
    api.done("vm.snapshot", &to(&saved));
    refused(&api.put_json("vm.restore", &json!({ "source_url": url(&saved) })), 409, "exists");
    api.puts(&["vm.delete"]);
    let fresh = vmm.holdings();
    let restore = |more: Value| {
        let mut body = json!({ "source_url": url(&saved) });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    for (body, status, words) in [
        (json!({ "source_url": url(&scratch.path("nothing")) }), 404, "nothing"),
        (json!({ "source_url": url(scratch.folder()) }), 404, "manifest.json"),
        (json!({ "source_url": "file:relative" }), 422, "source_url"),
        (restore(json!({ "disks": [{ "id": "_disk0", "path": "/x" }] })), 422, "_disk0"),
        (restore(json!({ "console": { "mode": "Null" } })), 422, "console.mode"),
        (restore(json!({ "net": [{ "id": "n", "mac": "x" }] })), 501, "net[0]"),
        (restore(json!({ "serial": { "mode": "File", "file": "/nowhere/at/all" } })), 500, "/nowhere/at/all"),
    ] {
        refused(&api.put_json("vm.restore", &body), status, words);
        assert_eq!(api.phase(), Phase::Empty, "{body}");
    }
    for name in ["manifest.json", "state.cbor", "chunks.bin"] {
        let path = saved.join(name);
        let whole = fs::read(&path).unwrap();
        let mut damaged = whole.clone();
        let middle = damaged.len() / 2;
        damaged[middle] ^= 1;
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        fs::write(&path, damaged).unwrap();
        refused(&api.put_json("vm.restore", &restore(json!({}))), 500, name);
        fs::write(&path, whole).unwrap();
    }
    vmm.expect_holdings(&fresh, "after restores that failed");
    api.done("vm.restore", &from(&saved, &serial));
    assert_eq!(api.phase(), Phase::Running);
}

#[test]
fn two_clones_run_at_once_with_disks_and_consoles_of_their_own() {
    let scratch = Scratch::new();
    let saved = scratch.path("saved");
    let vmm = Vmm::with_api(&scratch, [""; 0]);
    let disks = json!({ "disks": [{ "path": scratch.disk("disk", 1 << 20), "image_type": "Raw" }] });
    let serial = counting_with(&vmm, &scratch, &disks);
    vmm.api().puts(&["vm.pause"]);
    vmm.api().done("vm.snapshot", &to(&saved));
    let clone = |name: &str| {
        let other = SerialFile::new(scratch.path(format!("serial-{name}")));
        let mut body = from(&saved, &other);
        body["disks"] = json!([{ "id": "_disk0", "path": scratch.disk(name, 1 << 20) }]);
        (Vmm::with_api(&scratch, [""; 0]), other, body)
    };
    let (one, two) = (clone("one"), clone("two"));
    let send = |(vmm, _, body): &(Vmm, SerialFile, Value)| {
        Pending::send(vmm.socket(), "vm.restore", body.to_string().as_bytes())
    };
    for (mut pending, of) in [(send(&one), &one), (send(&two), &two)] {
        let answer = pending.answer();
        assert_eq!(answer.status, 204, "{answer:?}");
        goes_on(&serial, &of.1);
    }
    // The original still has its disk; a clone that wants it, too, does not get it.
    let (third, other, mut body) = clone("three");
    body.as_object_mut().unwrap().remove("disks");
    refused(&third.api().put_json("vm.restore", &body), 500, "disk");
    assert_eq!((third.api().phase(), other.text()), (Phase::Empty, String::new()));
}

#[test]
fn a_live_snapshot_of_a_guest_that_counts_in_memory() {
    let scratch = Scratch::new();
    let (vmm, serial) = counting_guest(&scratch);
    let (saved, later) = (scratch.path("saved"), scratch.path("later"));
    let mut api = vmm.api();
    api.done("vm.snapshot", &json!({ "destination_url": url(&saved), "live": true, "track": true }));
    assert_eq!(api.state(), "Running");
    let at = counts(&serial).len();
    serial.wait_longer_than(serial.text().len() + 100);
    api.done("vm.snapshot", &json!({ "destination_url": url(&later), "live": true, "incremental": true }));
    assert!(size_on_disk(&later) < size_on_disk(&saved), "only what changed");
    let events = Client::connect(vmm.socket()).unwrap().events_so_far(1).unwrap();
    let blackout = |item: StreamItem| match item {
        StreamItem::Event(event) if event.name() == "vm/snapshotted" => {
            event.properties["blackout_us"].as_u64()
        }
        _ => None,
    };
    let blackouts: Vec<u64> = events.filter_map(|item| blackout(item.unwrap())).collect();
    assert!(blackouts.len() == 2 && blackouts.iter().all(|time| *time > 0), "{blackouts:?}");

    for folder in [&saved, &later] {
        let other = SerialFile::new(scratch.path(format!("of-{}", folder.file_name().unwrap().display())));
        let clone = Vmm::with_api(&scratch, [""; 0]);
        clone.api().done("vm.restore", &from(folder, &other));
        other.wait_longer_than(60);
        let (all, ours) = (counts(&serial), counts(&other));
        assert!(ours.windows(2).all(|pair| pair[1] == pair[0] + 1), "{ours:?}");
        assert!(all.contains(&ours[0]), "it goes on from where the first was");
        assert_eq!(ours[0] as usize > at, *folder == later, "{} of {at}", ours[0]);
    }
    // The first one counted on all the while.
    assert!(counts(&serial).windows(2).all(|pair| pair[1] == pair[0] + 1));
}

fn size_on_disk(folder: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().metadata().unwrap().blocks()).sum()
}

#[test]
fn a_vm_that_was_restored_is_saved_again_whole_or_as_a_chain() {
    let scratch = Scratch::new();
    let (vmm, mut serial) = counting_guest(&scratch);
    let mut api = vmm.api();
    let name = |number: usize| scratch.path(format!("saved-{number}"));
    api.puts(&["vm.pause"]);
    api.done("vm.snapshot", &to(&name(0)));
    for number in 1..5 {
        // Mapped lazily, mapped lazily, copied and tracked, mapped again.
        let eager = number == 3;
        let other = SerialFile::new(scratch.path(format!("serial-{number}")));
        let mut body = from(&name(number - 1), &other);
        body["prefault"] = json!(eager);
        body["track"] = json!(eager);
        api.puts(&["vm.delete"]);
        api.done("vm.restore", &body);
        goes_on(&serial, &other);
        serial = other;
        api.puts(&["vm.pause"]);
        let incremental = number != 4;
        api.done(
            "vm.snapshot",
            &json!({ "destination_url": url(&name(number)), "incremental": incremental }),
        );
    }
    let manifest = |number| fs::read_to_string(name(number).join("manifest.json")).unwrap();
    assert!((1..4).all(|number| manifest(number).contains("\"parent\":{")));
    assert!(manifest(4).contains("\"parent\":null"), "a whole one needs no other");
    api.puts(&["vm.delete"]);
    (0..4).for_each(|number| fs::remove_dir_all(name(number)).unwrap());
    let other = SerialFile::new(scratch.path("serial-last"));
    api.done("vm.restore", &from(&name(4), &other));
    goes_on(&serial, &other);
}

/// What lies where the parent was is another moment, or another guest.
#[test]
fn an_incremental_snapshot_whose_parent_was_replaced_is_refused() {
    let scratch = Scratch::new();
    let (vmm, serial) = counting_guest(&scratch);
    let (parent, child) = (scratch.path("parent"), scratch.path("child"));
    let body = |folder: &Path, track: bool, incremental: bool| json!({ "destination_url": url(folder), "live": true, "track": track, "incremental": incremental });
    let mut api = vmm.api();
    api.done("vm.snapshot", &body(&parent, true, false));
    fs::remove_dir_all(&parent).unwrap();
    api.done("vm.snapshot", &body(&parent, false, false));
    refused(&api.put_json("vm.snapshot", &body(&child, true, true)), 500, "expected the parent");
    assert!(!child.exists());
    serial.wait_longer_than(serial.text().len() + 40);
    fs::remove_dir_all(&parent).unwrap();
    api.done("vm.snapshot", &body(&parent, true, false));
    api.done("vm.snapshot", &body(&child, true, true));
}

#[test]
fn an_incremental_snapshot_that_fails_loses_no_change() {
    let scratch = Scratch::new();
    let (vmm, serial) = counting_guest(&scratch);
    let mut api = vmm.api();
    let name = |number: usize| scratch.path(format!("saved-{number}"));
    let incremental =
        |number, live| json!({ "destination_url": url(&name(number)), "incremental": true, "live": live });
    api.done("vm.snapshot", &json!({ "destination_url": url(&name(0)), "live": true, "track": true }));
    serial.wait_longer_than(serial.text().len() + 20);
    for live in [true, false] {
        limit_files(&vmm, 1 << 20);
        if !live {
            api.puts(&["vm.pause"]);
        }
        refused(&api.put_json("vm.snapshot", &incremental(1, live)), 500, "File too large");
        limit_files(&vmm, libc::RLIM_INFINITY);
    }
    api.done("vm.snapshot", &incremental(1, false));
    api.puts(&["vm.delete"]);
    let other = SerialFile::new(scratch.path("other"));
    api.done("vm.restore", &from(&name(1), &other));
    goes_on(&serial, &other);
}

#[test]
fn the_command_line_restores_a_vm_and_confines_it() {
    let scratch = Scratch::new();
    let (vmm, serial) = counting_guest(&scratch);
    let saved = scratch.path("saved");
    vmm.api().puts(&["vm.pause"]);
    vmm.api().done("vm.snapshot", &to(&saved));
    let arguments = |more: &[&str]| {
        let restore = format!("source_url={},resume=on", url(&saved));
        ["--restore", &restore].into_iter().chain(more.iter().copied()).map(str::to_owned).collect::<Vec<_>>()
    };
    let restored = Vmm::spawn(arguments(&["--serial", "tty"]));
    let last = format!("{:08x}\n", counts(&serial).last().unwrap() + 5);
    restored.stdout.wait_for(&last);
    for (more, words) in [
        (&["--memory", "size=1G"][..], "--memory: cannot be given beside --restore"),
        (&["--disk", "id=x,path=/x"], "the snapshot has no disk \"x\""),
        (&["--serial", "nothing"], "--serial"),
    ] {
        let mut vmm = Vmm::spawn(arguments(more));
        assert!(!vmm.wait().success());
        assert!(vmm.stderr.text().contains(words), "{}", vmm.stderr.text());
    }
}

#[test]
fn a_snapshot_that_shrinks_under_its_vm_is_told_by_name() {
    let scratch = Scratch::new();
    let (vmm, _serial) = counting_guest(&scratch);
    let saved = scratch.path("saved");
    vmm.api().puts(&["vm.pause"]);
    vmm.api().done("vm.snapshot", &to(&saved));
    drop(vmm);
    let mut vmm = Vmm::with_api(&scratch, [""; 0]);
    let other = SerialFile::new(scratch.path("other"));
    vmm.api().done("vm.restore", &from(&saved, &other));
    other.wait_longer_than(20);
    let memory: PathBuf = saved.join("memory-0.bin");
    fs::set_permissions(&memory, Permissions::from_mode(0o600)).unwrap();
    OpenOptions::new().write(true).open(&memory).unwrap().set_len(0).unwrap();
    vmm.expect_exit(13);
    let log = vmm.stderr.text();
    assert!(log.contains("guest memory is lost") && log.contains("memory-0.bin"), "{log}");
}

/// A device's thread that touches lost memory gets a signal, where a vCPU's is stopped by KVM.
#[test]
fn a_snapshot_that_shrinks_is_told_by_name_when_a_device_meets_it() {
    let scratch = Scratch::new();
    let vmm = Vmm::with_api(&scratch, [""; 0]);
    let serial = SerialFile::new(scratch.path("serial"));
    let mut config = vm_config(&scratch.guest(Guest::Drivers), serial.path());
    config["disks"] = json!([{ "path": scratch.disk("disk", 1 << 20), "image_type": "Raw" }]);
    vmm.api().create(&config);
    vmm.api().puts(&["vm.boot"]);
    // It halts then, and touches nothing any more.
    serial.wait_for("driven\n");
    let saved = scratch.path("saved");
    vmm.api().puts(&["vm.pause"]);
    vmm.api().done("vm.snapshot", &to(&saved));
    drop(vmm);
    let mut vmm = Vmm::with_api(&scratch, [""; 0]);
    let mut body = from(&saved, &SerialFile::new(scratch.path("other")));
    body["resume"] = json!(false);
    vmm.api().done("vm.restore", &body);
    let memory = saved.join("memory-0.bin");
    fs::set_permissions(&memory, Permissions::from_mode(0o600)).unwrap();
    OpenOptions::new().write(true).open(&memory).unwrap().set_len(0).unwrap();
    // A device that goes on looks at its rings.
    let _resume = Pending::send(vmm.socket(), "vm.resume", b"");
    vmm.expect_exit(13);
    let log = vmm.stderr.text();
    assert!(log.contains("has shrunk or cannot be read") && log.contains("memory-0.bin"), "{log}");
}

/// Names of the VMM's events about its VM, without stages and progress.
fn told(vmm: &Vmm) -> Vec<String> {
    let events = Client::connect(vmm.socket()).unwrap().events_so_far(1).unwrap();
    let name = |item: StreamItem| match item {
        StreamItem::Event(event) => Some(event.name()),
        StreamItem::Lost { .. } => None,
    };
    let all = events.filter_map(|item| name(item.unwrap()));
    let of_it = ["vm/boot-stage", "job/progress"];
    all.filter(|name| !name.starts_with("vmm/") && !of_it.contains(&name.as_str())).collect()
}

#[test]
fn what_happens_is_told_in_the_contracts_words_and_in_order() {
    let scratch = Scratch::new();
    let (vmm, serial) = counting_guest(&scratch);
    let saved = scratch.path("saved");
    vmm.api().puts(&["vm.pause"]);
    vmm.api().done("vm.snapshot", &to(&saved));
    assert_eq!(vmm.api().put_json("vm.snapshot", &to(&saved)).status, 500);
    let expected = "vm/created vm/booting vm/booted vm/pausing vm/paused \
        vm/snapshotting job/started job/finished vm/snapshotted \
        vm/snapshotting job/started job/finished vm/snapshot-failed";
    assert_eq!(told(&vmm), expected.split_whitespace().collect::<Vec<_>>());

    let monitor = scratch.path("events");
    let other = Vmm::with_api(&scratch, ["--event-monitor", &format!("path={}", monitor.display())]);
    assert_eq!(other.api().put_json("vm.restore", &to(&saved)).status, 400, "it lacks its URL");
    assert_eq!(
        other.api().put_json("vm.restore", &json!({ "source_url": url(scratch.folder()) })).status,
        404
    );
    let mut body = from(&saved, &serial);
    body["memory_restore_mode"] = json!("Copy");
    other.api().done("vm.restore", &body);
    let expected = "vm/restoring vm/restore-failed vm/restoring vm/restored vm/resuming vm/resumed";
    assert_eq!(told(&other), expected.split_whitespace().collect::<Vec<_>>());
    // A thread of its own writes there.
    let lines = || Some(fs::read_to_string(&monitor).unwrap()).filter(|lines| lines.contains("\"resumed\""));
    let lines = wait_until(LIMIT, lines, || "the last event in the monitor".to_owned());
    let of_monitor = lines.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let words: Vec<String> = of_monitor.map(|line| line["event"].as_str().unwrap().to_owned()).collect();
    assert_eq!(words, ["starting", "restoring", "restoring", "restored", "resuming", "resumed"]);
}

#[test]
fn landlock_allows_a_snapshot_where_the_vm_says_so() {
    let scratch = Scratch::new();
    let (allowed, forbidden) = (scratch.path("allowed"), scratch.path("forbidden"));
    fs::create_dir(&allowed).unwrap();
    let vmm = Vmm::with_api(&scratch, [""; 0]);
    let serial = SerialFile::new(scratch.path("serial"));
    let mut config = vm_config(&scratch.guest(Guest::Ticker), serial.path());
    config["landlock_enable"] = json!(true);
    config["landlock_rules"] = json!([{ "path": allowed, "access": "rw" }]);
    vmm.api().create(&config);
    vmm.api().puts(&["vm.boot"]);
    serial.wait_for("00000001\n");
    vmm.api().puts(&["vm.pause"]);
    let track = |folder: &Path, incremental: bool| json!({ "destination_url": url(folder), "track": true, "incremental": incremental });
    refused(&vmm.api().put_json("vm.snapshot", &track(&forbidden, false)), 500, "landlock");
    vmm.api().done("vm.snapshot", &track(&allowed.join("one"), false));
    vmm.api().done("vm.snapshot", &track(&allowed.join("two"), true));
    vmm.api().puts(&["vmm.shutdown"]);

    // What is restored can be read, its parents too, and nothing else.
    let vmm = Vmm::with_api(&scratch, [""; 0]);
    let other = SerialFile::new(scratch.path("other"));
    vmm.api().done("vm.restore", &from(&allowed.join("two"), &other));
    goes_on(&serial, &other);
    let more = json!({ "destination_url": url(&allowed.join("three")), "live": true, "incremental": true });
    vmm.api().done("vm.snapshot", &more);
    refused(
        &vmm.api().put_json("vm.snapshot", &json!({ "destination_url": url(&forbidden), "live": true })),
        500,
        "landlock",
    );
}
