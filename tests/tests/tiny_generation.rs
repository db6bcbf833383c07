//! The VM generation ID as a tiny guest reads it: the same over reboots and migrations, another after a restore (Microsoft,
//! "Virtual Machine Generation ID", of which its table of cases is the source). By the real binary, on any KVM.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]

use std::os::unix::net::UnixStream;
use std::path::Path;

use serde_json::json;
use vmm_snapshot::directory::Chain;
use vmm_tests::harness::{LIMIT, Pending, Scratch, SerialFile, Vmm, vm_config, wait_until};
use vmm_tests::tiny::Guest;

/// The ID that the guest prints from now on, and how often it was told of another so far.
fn said(serial: &SerialFile) -> (String, usize) {
    serial.wait_longer_than(serial.text().len() + 80);
    let text = serial.text();
    // The last line may be cut.
    let id = text.lines().rev().skip(1).find(|line| line.len() == 16);
    (id.unwrap().to_owned(), text.matches("another\n").count())
}

#[test]
fn it_is_the_same_guest_until_a_copy_is_made() {
    let scratch = Scratch::new();
    let mut first = Vmm::with_api(&scratch, [""; 0]);
    let serial = SerialFile::new(scratch.path("serial"));
    first.api().create(&vm_config(&scratch.guest(Guest::Generation), serial.path()));
    first.api().puts(&["vm.boot"]);
    let same = said(&serial);
    assert!(same.0 != "0".repeat(16) && same.1 == 0, "{same:?}");
    for way in [&["vm.reboot"][..], &["vm.shutdown", "vm.boot"], &["vm.pause", "vm.resume"]] {
        first.api().puts(way);
        assert_eq!(said(&serial), same, "{way:?}");
    }

    let mut second = Vmm::with_api(&scratch, [""; 0]);
    let moved = SerialFile::new(scratch.path("moved"));
    let path = scratch.path("migration");
    let address = format!("unix:{}", path.display());
    let here = json!({ "receiver_url": address, "serial": { "mode": "File", "file": moved.path() } });
    let mut received = Pending::send(second.socket(), "vm.receive-migration", here.to_string().as_bytes());
    wait_until(LIMIT, || UnixStream::connect(&path).ok(), || "a receiver".to_owned());
    first.api().done("vm.send-migration", &json!({ "destination_url": address }));
    assert_eq!(received.answer().status, 204);
    first.expect_exit(0);
    assert_eq!(said(&moved), same, "it has moved");
    second.api().puts(&["vm.reboot"]);
    assert_eq!(said(&moved), same, "it has moved and booted");

    let saved = scratch.path("saved");
    let url = format!("file://{}", saved.display());
    second.api().puts(&["vm.pause"]);
    second.api().done("vm.snapshot", &json!({ "destination_url": url }));
    second.api().puts(&["vm.resume"]);
    assert_eq!(said(&moved), same, "a copy changes nothing of the original");
    second.api().puts(&["vmm.shutdown"]);
    second.expect_exit(0);

    let mut seen = vec![same.0];
    for copy in ["one", "two"] {
        let vmm = Vmm::with_api(&scratch, [""; 0]);
        let serial = SerialFile::new(scratch.path(copy));
        let body = json!({
            "source_url": url, "resume": true, "serial": { "mode": "File", "file": serial.path() },
        });
        vmm.api().done("vm.restore", &body);
        let (id, told) = said(&serial);
        assert!(told == 1 && !seen.contains(&id), "{id} after {seen:?}, told {told} times");
        vmm.api().puts(&["vm.reboot"]);
        assert_eq!(said(&serial), (id.clone(), 1), "a copy that boots is no other copy");
        seen.push(id);
    }
}

/// It is written while the guest is restored, before anybody tracks what changes.
#[test]
fn an_incremental_snapshot_of_a_restored_guest_has_its_generation() {
    let scratch = Scratch::new();
    let (saved, child) = (scratch.path("saved"), scratch.path("child"));
    let url = |path: &Path| format!("file://{}", path.display());
    let vmm = Vmm::with_api(&scratch, [""; 0]);
    let serial = SerialFile::new(scratch.path("serial"));
    let mut api = vmm.api();
    api.create(&vm_config(&scratch.guest(Guest::Generation), serial.path()));
    api.puts(&["vm.boot"]);
    said(&serial);
    api.puts(&["vm.pause"]);
    api.done("vm.snapshot", &json!({ "destination_url": url(&saved) }));
    api.puts(&["vm.delete"]);
    let other = SerialFile::new(scratch.path("other"));
    // Memory that is copied, so that its page tables do not tell.
    api.done(
        "vm.restore",
        &json!({
            "source_url": url(&saved), "prefault": true, "track": true,
            "serial": { "mode": "File", "file": other.path() },
        }),
    );
    api.done("vm.snapshot", &json!({ "destination_url": url(&child), "incremental": true }));
    let [before, after] = [&saved, &child].map(|path| {
        let chain = Chain::open(path).unwrap();
        let mut chunk = Vec::new();
        chain.chunk(0, 0, &mut chunk).unwrap();
        chunk[0xf_e000..0xf_e000 + 4096].to_vec()
    });
    assert!(before != after, "it is that of the parent");
}
