//! Ends that come while memory follows the guest.

use vmm_tests::harness::vm_config;

use super::*;

/// A guest that is elsewhere, and stands still by itself.
struct Following {
    first: Vmm,
    second: Vmm,
    sent: Pending,
    relay: Relay,
    scratch: Scratch,
}

/// Sends a guest that halts before it is given away, and so waits for none of its memory, which does not come. The link stays.
fn following() -> Following {
    let scratch = Scratch::new();
    let (first, socket) = (Vmm::with_api(&scratch, [""; 0]), scratch.path("serial"));
    let mut config = vm_config(&scratch.guest(Guest::Pages), &socket);
    config["payload"]["cmdline"] = json!("halts");
    config["serial"] = json!({ "mode": "Socket", "socket": socket });
    first.api().create(&config);
    first.api().puts(&["vm.boot"]);
    let mut serial = UnixStream::connect(&socket).unwrap();
    let second = Vmm::with_api(&scratch, [""; 0]);
    let other = SerialFile::new(scratch.path("other"));
    let (mut received, path) = receive(&second, &scratch, &other);
    let between = scratch.path("between");
    let relay = Relay::start(&between, &path, Data::Waits);
    let sent = pending(&first, "vm.send-migration", &late(&between));
    until(&first, "a pass", |now| now["passes"].as_u64() >= Some(1));
    // What it has changed since then, and that is all of its pages, follows it.
    serial.write_all(b"x").unwrap();
    let mut said = String::new();
    while !said.contains("halted\n") {
        let mut bytes = [0; 4096];
        let count = serial.read(&mut bytes).unwrap();
        said.push_str(str::from_utf8(&bytes[..count]).unwrap());
    }
    relay.set(Data::Lost);
    assert_eq!(received.answer().status, 204);
    Following { first, second, sent, relay, scratch }
}

#[test]
fn a_destination_that_ends_tells_its_source_and_both_say_what_is_lost() {
    let _turn = turn();
    for ends in [|vmm: &Vmm| vmm.api().puts(&["vmm.shutdown"]), |vmm: &Vmm| vmm.signal("TERM")] {
        let Following { mut first, mut second, mut sent, relay: _relay, scratch: _scratch } = following();
        until(&second, "memory that is missing", |now| now["owed_bytes"].as_u64() > Some(1 << 20));
        // Whatever would end the guest only has to wait.
        for name in ["vm.shutdown", "vm.delete", "vm.reboot", "vm.cancel"] {
            assert_eq!(second.api().put(name).status, 409, "{name}");
        }
        // Nothing that is here can be taken back.
        refused(&first.api().put("vm.cancel"), 409, "the guest is the destination's");
        assert!(!sent.is_answered());
        ends(&second);
        second.expect_exit(0);
        let told = second.stderr.text();
        assert!(told.contains("the guest is lost: "), "{told}");
        refused(&sent.answer(), 500, "the destination's VMM has ended");
        first.expect_exit(13);
        let told = first.stderr.text();
        assert!(told.contains("the guest is lost: ") && told.contains("VMM has ended"), "{told}");
    }
}

#[test]
fn a_source_that_ends_while_memory_may_be_missing_does_not_say_that_all_is_well() {
    let _turn = turn();
    let Following { mut first, second, sent: _sent, relay, scratch: _scratch } = following();
    // All of it is on its way, and will not arrive.
    until(&first, "nothing to send", |now| now["owed_bytes"] == 0);
    assert!(progress(&second)["owed_bytes"].as_u64() > Some(1 << 20));
    relay.cut();
    until(&first, "a lost link", |now| now["status"] == "Severed");
    first.api().puts(&["vmm.shutdown"]);
    first.expect_exit(13);
    assert!(first.stderr.text().contains("the guest at the destination is lost"), "{}", first.stderr.text());
}
