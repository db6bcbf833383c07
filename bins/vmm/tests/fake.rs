//! The assembly on the scripted hypervisor: whatever call of boot and pause fails, nothing is left behind.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use std::path::Path;

use vmm::machine::stages::Stages;
use vmm::machine::{EventPost, Machine, MachineError, Ports};
use vmm_api::config::UnknownFields;
use vmm_api::spec::{MachineSpec, parse_and_check};
use vmm_epoll::mailbox;
use vmm_hypervisor::fake::{Exit, Fake, Live};
use vmm_tests::tiny::Guest;

/// A machine with a disk, a random source and both consoles.
fn spec(folder: &Path) -> MachineSpec {
    let kernel = Guest::Halt.write(folder).unwrap();
    let disk = folder.join("disk");
    std::fs::write(&disk, vec![0; 1 << 20]).unwrap();
    let json = serde_json::json!({
        "payload": { "kernel": kernel, "cmdline": "console=ttyS0" },
        "cpus": { "boot_vcpus": 2, "max_vcpus": 3 },
        "memory": { "size": 64 << 20 },
        "disks": [{ "path": disk, "image_type": "Raw" }],
        "serial": { "mode": "Null" },
        "console": { "mode": "Null" },
    });
    parse_and_check(json.to_string().as_bytes(), UnknownFields::Refuse).unwrap().spec
}

fn build(fake: &Fake, spec: &MachineSpec) -> Result<Machine, MachineError> {
    let (mailbox, _inbox) = mailbox().unwrap();
    let post = EventPost { machine: 1, mailbox };
    Machine::build(fake, spec, &Ports::default(), &post, &mut Stages::default())
}

fn life(fake: &Fake, spec: &MachineSpec) -> Result<(), MachineError> {
    let mut machine = build(fake, spec)?;
    machine.start();
    machine.pause()?;
    machine.save_reset_restore()?;
    machine.resume()?;
    machine.pause()
}

#[test]
fn any_call_that_fails_leaves_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let spec = spec(folder.path());
    let fake = Fake::new();
    life(&fake, &spec).unwrap();
    assert_eq!(fake.live(), Live::default());
    let calls = fake.calls().len();
    let mut failed = 0;
    for nth in 1..=calls {
        let before = fake.calls().len();
        fake.fail_nth(nth);
        // A few calls may fail without harm, such as telling a guest's clock of a pause.
        failed += usize::from(life(&fake, &spec).is_err());
        fake.heal();
        assert_eq!(fake.live(), Live::default(), "after {:?} failed", fake.calls().get(before + nth - 1));
    }
    assert!(failed > calls / 2, "{failed} of {calls} failures were noticed");
    life(&fake, &spec).unwrap();
}

#[test]
fn build_fails_at_every_call_that_it_makes() {
    let folder = tempfile::tempdir().unwrap();
    let spec = spec(folder.path());
    let fake = Fake::new();
    drop(build(&fake, &spec).unwrap());
    let calls = fake.calls().len();
    // The end of the life above: what a machine undoes when it is dropped.
    let teardown = fake
        .calls()
        .iter()
        .rev()
        .take_while(|c| !c.starts_with("KVM_GET") && !c.starts_with("KVM_SET_LAPIC"))
        .count();
    for nth in 1..=calls - teardown {
        fake.fail_nth(nth);
        let result = build(&fake, &spec);
        assert!(result.is_err(), "call {nth} of {calls} ({:?}) failed unnoticed", fake.calls().last());
        fake.heal();
        assert_eq!(fake.live(), Live::default());
    }
}

#[test]
fn a_guest_that_does_odd_things_is_answered() {
    let folder = tempfile::tempdir().unwrap();
    let spec = spec(folder.path());
    let fake = Fake::new();
    let accesses = (0..0x1_0000_u32).step_by(7).map(|port| Exit::PioWrite {
        // Not the ports that ask for a reset or power-off.
        port: if matches!(port, 0x60..=0x64 | 0x3c0) { 0 } else { port as u16 },
        data: vec![0xff; 1 + port as usize % 4],
    });
    fake.script(0, accesses);
    fake.script(1, (0..2000).map(|i| Exit::MmioRead { address: 0xe800_0000 + i * 13, size: 8 }));
    let mut machine = build(&fake, &spec).unwrap();
    machine.start();
    while fake.answers().len() < 2000 {
        std::thread::yield_now();
    }
    machine.pause().unwrap();
    machine.save_reset_restore().unwrap();
}
