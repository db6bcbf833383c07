//! Post-copy of a guest that uses its disk all the time: memory that the disk's thread waits for, and who may open the image.

use std::fs;
use std::path::PathBuf;

use vmm_tests::harness::vm_config;

use super::*;

/// How many sectors the guest writes, one after the other.
const SECTORS: u32 = 256;

/// A guest that counts by way of its disk, what its serial port says, and the configuration.
fn on_a_disk(scratch: &Scratch) -> (Vmm, SerialFile, Value) {
    let (vmm, serial) = (Vmm::with_api(scratch, [""; 0]), SerialFile::new(scratch.path("serial")));
    let mut config = vm_config(&scratch.guest(Guest::Disk), serial.path());
    config["disks"] = json!([{ "path": scratch.disk("image.raw", 1 << 20), "image_type": "Raw" }]);
    vmm.api().create(&config);
    vmm.api().puts(&["vm.boot"]);
    // It has gone over them all once.
    serial.wait_for("00000120\n");
    (vmm, serial, config)
}

/// No write is lost that the guest has seen done: of a guest that stands still.
fn has_all(disk: &PathBuf, serial: &SerialFile) {
    let last = *counts(serial).last().unwrap();
    let image = fs::read(disk).unwrap();
    for sector in 0..SECTORS {
        let at = sector as usize * 512;
        let number = u32::from_le_bytes(image[at..at + 4].try_into().unwrap());
        // It may have written more than it has said so far.
        assert!(number % SECTORS == sector && number + SECTORS > last, "{number} after {last}");
    }
}

#[test]
fn a_disk_goes_along_before_memory_does_and_no_write_is_lost() {
    let _turn = turn();
    let scratch = Scratch::new();
    let (mut first, serial, mut config) = on_a_disk(&scratch);
    let disk = scratch.path("image.raw");
    let mut second = Vmm::with_api(&scratch, [""; 0]);
    let other = SerialFile::new(scratch.path("other"));
    let (mut received, path) = receive(&second, &scratch, &other);
    let between = scratch.path("between");
    let relay = Relay::start(&between, &path, Data::CutAfter(0));
    let mut sent = pending(&first, "vm.send-migration", &late(&between));
    assert_eq!(received.answer().status, 204);
    until(&second, "a lost link", |now| now["status"] == "Severed");
    let third = Vmm::with_api(&scratch, [""; 0]);
    config["serial"]["file"] = json!(scratch.path("third"));
    third.api().create(&config);
    refused(&third.api().put("vm.boot"), 500, "locked");
    has_all(&disk, &serial);

    relay.mend();
    assert_eq!(sent.answer().status, 204);
    first.expect_exit(0);
    goes_on(&serial, &other);
    until(&second, "the end", |now| now["status"] == "Completed");
    // It is the new one's now, for the old one has ended.
    refused(&third.api().put("vm.boot"), 500, "locked");
    let counted = counts(&other).len();
    wait_until(LIMIT, || (counts(&other).len() > counted + 300).then_some(()), || other.text());
    second.api().puts(&["vm.pause"]);
    has_all(&disk, &other);
    second.api().puts(&["vm.delete"]);
    third.api().puts(&["vm.boot"]);
    second.api().puts(&["vmm.shutdown"]);
    second.expect_exit(0);
}

/// Whoever is killed while memory is missing at the destination: its image is the destination's.
#[test]
fn a_source_that_dies_has_no_lock_of_the_disk_any_more() {
    let _turn = turn();
    let scratch = Scratch::new();
    let (first, _serial, mut config) = on_a_disk(&scratch);
    let second = Vmm::with_api(&scratch, [""; 0]);
    let other = SerialFile::new(scratch.path("other"));
    let (mut received, path) = receive(&second, &scratch, &other);
    let between = scratch.path("between");
    let _relay = Relay::start(&between, &path, Data::CutAfter(0));
    let _sent = pending(&first, "vm.send-migration", &late(&between));
    assert_eq!(received.answer().status, 204);
    until(&second, "a lost link", |now| now["status"] == "Severed");
    drop(first);
    let third = Vmm::with_api(&scratch, [""; 0]);
    config["serial"]["file"] = json!(scratch.path("third"));
    third.api().create(&config);
    refused(&third.api().put("vm.boot"), 500, "locked");
    drop(second);
    // The kernel closes what the rings of a process hold after its end.
    let boots = || (third.api().put("vm.boot").status == 204).then_some(());
    wait_until(LIMIT, boots, || format!("the lock: {:?}", third.api().put("vm.boot")));
}
