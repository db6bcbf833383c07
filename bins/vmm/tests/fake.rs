//! The assembly on the scripted hypervisor: whatever call of boot and pause fails, nothing is left behind.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};
use vmm::events::Events;
use vmm::exit::chain;
use vmm::machine::stages::Stages;
use vmm::machine::{
    ClockChoice, EventPost, Locks, Machine, MachineError, MachineEvent, MachineMessage, MachineV1, Plan,
    Ports, Saved, SavedMemory,
};
use vmm::sandbox::{PathPolicy, Sandbox};
use vmm::vmm::{Policy, Vmm};
use vmm_api::command::Host;
use vmm_api::config::{UnknownFields, VmConfig};
use vmm_api::spec::{Checked, MachineSpec, Sink, parse_and_check};
use vmm_cpu_manager::set::VcpuError;
use vmm_cpu_manager::state::VcpuV1;
use vmm_device_manager::tree::{DeviceTreeV1, ResourceV1};
use vmm_device_model::metrics::{Sample, Value};
use vmm_device_model::thread::{ThreadHook, ThreadKind, Unconfined};
use vmm_epoll::{Inbox, mailbox};
use vmm_hypervisor::fake::{Exit, Fake, Live};
use vmm_memory_manager::map::{MemoryLayoutV1, MemoryMap};
use vmm_platform_devices::events::SystemEvent;
use vmm_snapshot::{Record, RecordSet, Schema};
use vmm_state::Phase;
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
        "pvpanic": true,
    });
    parse_and_check(json.to_string().as_bytes(), UnknownFields::Refuse).unwrap().spec
}

fn build(fake: &Fake, spec: &MachineSpec) -> Result<Machine, MachineError> {
    Ok(build_told(fake, spec)?.0)
}

/// A machine, and what it tells.
fn build_told(fake: &Fake, spec: &MachineSpec) -> Result<(Machine, Inbox<MachineMessage>), MachineError> {
    build_with(fake, spec, &(Arc::new(Unconfined) as _))
}

fn build_with(
    fake: &Fake,
    spec: &MachineSpec,
    threads: &Arc<dyn ThreadHook>,
) -> Result<(Machine, Inbox<MachineMessage>), MachineError> {
    let (mailbox, inbox) = mailbox().unwrap();
    let post = EventPost::new(1, mailbox);
    let mut stages = Stages::default();
    let plan = plan(fake, spec, &post, threads);
    Ok((Machine::build(&plan, &mut stages)?, inbox))
}

/// A machine whose consoles end nowhere.
fn plan<'a>(
    fake: &'a Fake,
    spec: &'a MachineSpec,
    post: &'a EventPost,
    threads: &'a Arc<dyn ThreadHook>,
) -> Plan<'a> {
    static PORTS: Ports = Ports { serial: None, console: None, debug: None };
    Plan { hypervisor: fake, spec, ports: &PORTS, post, threads, locks: Locks::Now, generation: None }
}

/// Waits for what `look` finds.
fn wait_for<T>(mut look: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(start.elapsed() < Duration::from_secs(20), "it does not happen");
        std::thread::yield_now();
    }
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
    let (fake, mut noticed) = (Fake::new(), 0);
    let calls = fake.fail_each(
        || (),
        |()| life(&fake, &spec),
        |failed, (), result| {
            assert_eq!(fake.live(), Live::default(), "after {failed:?} failed");
            assert!(failed.is_some() || result.is_ok());
            // A few calls may fail without harm, such as telling a guest's clock of a pause.
            noticed += usize::from(result.is_err());
        },
    );
    assert!(noticed > calls / 2, "{noticed} of {calls} failures were noticed");
}

#[test]
fn build_fails_at_every_call_that_it_makes() {
    let folder = tempfile::tempdir().unwrap();
    let spec = spec(folder.path());
    let fake = Fake::new();
    fake.fail_each(
        || (),
        |()| build(&fake, &spec),
        |failed, (), result| {
            assert_eq!(result.is_err(), failed.is_some(), "{failed:?} failed unnoticed");
            drop(result);
            assert_eq!(fake.live(), Live::default());
        },
    );
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

/// Confines no thread of a kind.
#[derive(Debug)]
struct Refuses(&'static str);

impl ThreadHook for Refuses {
    fn begin(&self, kind: ThreadKind) -> io::Result<()> {
        if kind.0 == self.0 { Err(io::Error::other("told to refuse")) } else { Ok(()) }
    }
}

#[test]
fn a_vcpu_that_cannot_be_confined_fails_the_boot() {
    let folder = tempfile::tempdir().unwrap();
    let (fake, spec) = (Fake::new(), spec(folder.path()));
    let error = build_with(&fake, &spec, &(Arc::new(Refuses("vcpu")) as _)).unwrap_err();
    assert!(
        chain(&error).ends_with("cannot confine the thread of vcpu0: told to refuse"),
        "{}",
        chain(&error)
    );
    assert_eq!(fake.live(), Live::default());
}

#[test]
fn a_console_that_cannot_be_confined_fails_the_boot() {
    let folder = tempfile::tempdir().unwrap();
    let mut spec = spec(folder.path());
    spec.serial = Some(Sink::File(folder.path().join("serial")));
    let sandbox = Sandbox::new(Arc::new(Refuses("console-output")), PathPolicy::Never);
    let (post, _inbox) = mailbox().unwrap();
    let fake = Arc::new(Fake::new());
    let mut vmm = Vmm::new(Arc::clone(&fake) as _, post, Policy::default(), Events::new()).confined(sandbox);
    vmm.create(Checked { config: VmConfig::default(), spec });
    vmm.boot_at_start();
    let error = vmm.take_failure().unwrap();
    assert_eq!(chain(&error), "consoles: cannot set up serial: told to refuse");
    assert_eq!((vmm.phase(), fake.live()), (Phase::Empty, Live::default()), "the VMM ends");
}

/// A machine of saved state whose memory is blank.
fn restore(fake: &Fake, spec: &MachineSpec, records: RecordSet) -> Result<Machine, MachineError> {
    restore_as(fake, spec, records, false)
}

fn restore_as(
    fake: &Fake,
    spec: &MachineSpec,
    records: RecordSet,
    another: bool,
) -> Result<Machine, MachineError> {
    let memory =
        Box::new(|saved: SavedMemory| Ok(MemoryMap::create(saved.vm, &saved.zones, saved.phys_bits)?));
    let (mailbox, _inbox) = mailbox().unwrap();
    let saved = Saved { records, memory, clock: ClockChoice::StoodStill, another };
    let (post, threads) = (EventPost::new(2, mailbox), Arc::new(Unconfined) as _);
    Machine::restore(&plan(fake, spec, &post, &threads), saved, &mut Stages::default())
}

fn save(fake: &Fake, spec: &MachineSpec) -> RecordSet {
    let mut machine = build(fake, spec).unwrap();
    machine.start();
    machine.pause().unwrap();
    machine.save().unwrap()
}

#[test]
fn what_is_restored_is_what_was_saved() {
    let folder = tempfile::tempdir().unwrap();
    let spec = spec(folder.path());
    let fake = Fake::new();
    let records = save(&fake, &spec);
    let bytes = records.encode().len();
    assert!(bytes <= 48 << 10, "{bytes} bytes");
    let mut machine = restore(&fake, &spec, records.clone()).unwrap();
    let again = machine.save().unwrap();
    for ((owner, was), (_, is)) in records.iter().zip(again.iter()) {
        // Time goes on.
        assert!(was == is || owner == "clock", "{owner}: {was:?} became {is:?}");
    }
    machine.resume().unwrap();
    machine.pause().unwrap();
    drop(machine);
    assert_eq!(fake.live(), Live::default());
}

#[test]
fn a_host_that_knows_fewer_calls_saves_and_restores_all_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let spec = spec(folder.path());
    let calls = [
        ("KVM_GET_DEVICE_ATTR", "KVM_SET_DEVICE_ATTR"),
        ("KVM_GET_NESTED_STATE", "KVM_SET_NESTED_STATE"),
        ("KVM_GET_DEBUGREGS", "KVM_SET_DEBUGREGS"),
        ("KVM_GET_XCRS", "KVM_SET_XCRS"),
        ("KVM_GET_VCPU_EVENTS", "KVM_SET_VCPU_EVENTS"),
        ("KVM_GET_TSC_KHZ", "KVM_SET_TSC_KHZ"),
    ];
    for (get, set) in calls {
        let fake = Fake::new();
        fake.unsupported(get);
        fake.unsupported(set);
        let records = save(&fake, &spec);
        drop(restore(&fake, &spec, records).unwrap());
        assert_eq!(fake.live(), Live::default());
    }
}

#[test]
fn a_save_that_fails_leaves_the_guest_and_can_be_repeated() {
    let folder = tempfile::tempdir().unwrap();
    let spec = spec(folder.path());
    let fake = Fake::new();
    let mut machine = build(&fake, &spec).unwrap();
    machine.start();
    machine.pause().unwrap();
    let live = fake.live();
    let machine = RefCell::new(machine);
    fake.fail_each(
        || (),
        |()| machine.borrow_mut().save(),
        |failed, (), result| {
            assert_eq!(result.is_err(), failed.is_some(), "{failed:?} failed unnoticed");
            let mut machine = machine.borrow_mut();
            machine.resume().unwrap();
            machine.pause().unwrap();
            machine.save().unwrap();
            assert_eq!(fake.live(), live);
        },
    );
}

#[test]
fn any_call_of_a_restore_that_fails_leaves_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let spec = spec(folder.path());
    let fake = Fake::new();
    let records = save(&fake, &spec);
    fake.fail_each(
        || (),
        |()| restore(&fake, &spec, records.clone()),
        |failed, (), result| {
            // Telling a guest's clock of the pause is a courtesy.
            let told = failed.is_some_and(|call| call != "KVM_KVMCLOCK_CTRL");
            assert_eq!(result.is_err(), told, "{failed:?} failed unnoticed");
            drop(result);
            assert_eq!(fake.live(), Live::default());
        },
    );
}

/// The generation ID, and whether the event device tells of another.
fn generation(fake: &Fake, machine: &mut Machine) -> ([u8; 16], bool) {
    let mut id = [0; 16];
    machine.memory().memory().read_slice(&mut id, GuestAddress(0xf_e000)).unwrap();
    assert_eq!(id, machine.generation());
    let before = fake.answers().len();
    fake.script(0, [Exit::MmioRead { address: 0xf900_0000, size: 1 }]);
    machine.resume().unwrap();
    let told = wait_for(|| fake.answers().get(before).cloned());
    machine.pause().unwrap();
    (id, told.data == [0x10])
}

#[test]
fn a_copy_of_a_guest_is_told_and_a_moved_one_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let spec = spec(folder.path());
    let fake = Fake::new();
    let mut machine = build(&fake, &spec).unwrap();
    machine.start();
    machine.pause().unwrap();
    let records = machine.save().unwrap();
    let (first, told) = generation(&fake, &mut machine);
    assert!(first != [0; 16] && !told, "{first:?}");
    drop(machine);
    let mut ids = BTreeSet::from([first]);
    for another in [true, true, false] {
        let mut machine = restore_as(&fake, &spec, records.clone(), another).unwrap();
        let (id, told) = generation(&fake, &mut machine);
        assert_eq!(told, another);
        // Its memory is blank here.
        assert_eq!(id != [0; 16], another);
        assert!(!another || ids.insert(id), "{id:?} was there before");
    }
}

#[test]
fn a_guest_that_boots_again_is_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let spec = spec(folder.path());
    let fake = Fake::new();
    let (post, threads) = (EventPost::new(1, mailbox().unwrap().0), Arc::new(Unconfined) as _);
    let again = Plan { generation: Some([7; 16]), ..plan(&fake, &spec, &post, &threads) };
    let mut machine = Machine::build(&again, &mut Stages::default()).unwrap();
    machine.start();
    machine.pause().unwrap();
    assert_eq!(generation(&fake, &mut machine), ([7; 16], false));
}

/// AML of what a driver of the ID goes by: the device's `_CID`, the address in `ADDR`, and the event that is passed on.
#[test]
fn the_tables_say_where_the_generation_id_is_and_who_tells_of_it() {
    let folder = tempfile::tempdir().unwrap();
    let machine = build(&Fake::new(), &spec(folder.path())).unwrap();
    let mut tables = vec![0; 0x5_e000];
    machine.memory().memory().read_slice(&mut tables, GuestAddress(0xa_0000)).unwrap();
    let behind = |what: &[u8]| {
        let at = tables.windows(what.len()).position(|window| window == what);
        &tables[at.unwrap_or_else(|| panic!("{what:x?} is not there")) + what.len()..]
    };
    behind(b"\x08_CID\x0dVM_Gen_Counter\0");
    // A package of two: the lower half as a double word, the upper as ZeroOp.
    let [0x12, _, 2, 0x0c, low @ .., 0] = &behind(b"\x08ADDR")[..9] else { panic!("another form") };
    let address = GuestAddress(u32::from_le_bytes(low.try_into().unwrap()).into());
    let mut id = [0; 16];
    machine.memory().memory().read_slice(&mut id, address).unwrap();
    assert_eq!(id, machine.generation());
    // If (Local0 & 16) { Notify (\_SB.VGEN, 0x80) }
    behind(b"\x7b\x60\x0a\x10\0\x86\\._SB_VGEN\x0a\x80");
}

/// The records with one of them changed.
fn with<S: Schema>(records: &RecordSet, owner: &str, change: impl FnOnce(&mut S)) -> RecordSet {
    let mut records = records.clone();
    let mut state: S = records.take(owner).unwrap();
    change(&mut state);
    records.put(owner, &state).unwrap();
    records
}

fn with_vcpu(records: &RecordSet, change: impl FnOnce(&mut VcpuV1)) -> RecordSet {
    with(records, "vcpus", |vcpus: &mut RecordSet| *vcpus = with(vcpus, "1", change))
}

#[test]
fn what_cannot_be_restored_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let spec = spec(folder.path());
    let fake = Fake::new();
    let good = save(&fake, &spec);
    let refused = |records: RecordSet, wanted: &str| {
        let error = chain(&restore(&fake, &spec, records).unwrap_err());
        assert!(error.contains(wanted), "{error}");
        assert_eq!(fake.live(), Live::default());
    };
    let mut without = good.clone();
    without.take_record("clock").unwrap();
    refused(without, "no record of \"clock\"");
    let mut more = good.clone();
    more.put("tpm", &RecordSet::new()).unwrap();
    refused(more, "records that nothing here restores: tpm");
    let mut newer = good.clone();
    let mut record = newer.take_record("machine").unwrap();
    record.version += 1;
    newer.insert("machine", record).unwrap();
    refused(newer, "machine record has version 2, this build knows versions up to 1");
    let mut kind = good.clone();
    let mut record = kind.take_record("machine").unwrap();
    "engine".clone_into(&mut record.kind);
    kind.insert("machine", record).unwrap();
    refused(kind, "record is of kind \"engine\"");

    let machine = |change: fn(&mut MachineV1)| with(&good, "machine", change);
    refused(machine(|m| m.boot_vcpus = 1), "the guest had vCPUs 1, this VM has 2");
    refused(machine(|m| m.topology = [2, 1, 1, 1]), "topology");
    refused(machine(|m| m.mmio32.start = 0), "the guest had 32-bit PCI window at 0x0,");
    refused(machine(|m| m.phys_bits = 40), "the guest had bits of physical address 40, this VM has 46");
    let layout = |l: &mut MemoryLayoutV1| l.ram[0].range.size += 4096;
    refused(with(&good, "memory-layout", layout), "laid out differently");
    let fewer = |vcpus: &mut RecordSet| drop(vcpus.take_record("1").unwrap());
    refused(with(&good, "vcpus", fewer), "the guest had vCPU records 1, this VM has 2");

    let feature = |vcpu: &mut VcpuV1| vcpu.cpuid.iter_mut().find(|l| l.function == 1).unwrap().ecx |= 1 << 28;
    refused(with_vcpu(&good, feature), "the guest was given AVX (CPUID 0x1.0 Ecx bit 28)");
    fake.unsupported("KVM_SET_TSC_KHZ");
    let rate = |vcpu: &mut VcpuV1| vcpu.tsc_khz = Some(3_000_000);
    refused(with_vcpu(&good, rate), "the guest's TSC runs at 3000000 kHz, this host gives 2000000 kHz");
    fake.heal();

    let less = |devices: &mut RecordSet| drop(devices.take_record("_disk0").unwrap());
    refused(with(&good, "devices", less), "no record of \"_disk0\"");
    let more = |devices: &mut RecordSet| devices.put("_disk7", &RecordSet::new()).unwrap();
    refused(with(&good, "devices", more), "records that nothing here restores: _disk7");
    let moved = |tree: &mut DeviceTreeV1| {
        let disk = tree.devices.iter_mut().find(|node| node.id == "_disk0").unwrap();
        let bar = disk.resources.iter_mut().find(|r| matches!(r, ResourceV1::Bar { .. })).unwrap();
        *bar = ResourceV1::Bar { base: 0x1000, len: 0x1000 };
    };
    refused(
        with(&good, "device-tree", moved),
        "device \"_disk0\" cannot have a BAR of 0x1000 bytes at 0x1000",
    );
    let line = |tree: &mut DeviceTreeV1| {
        let ged = tree.devices.iter_mut().find(|node| node.id == "_ged").unwrap();
        let line = ged.resources.iter_mut().find(|r| matches!(r, ResourceV1::Line { .. })).unwrap();
        *line = ResourceV1::Line { gsi: 6 };
    };
    refused(
        with(&good, "device-tree", line),
        "device \"_ged\" had Line { gsi: 6 }, here it has Line { gsi: 5 }",
    );
    restore(&fake, &spec, good).unwrap();
}

/// Every integer of the records at its edges: refused, or a machine that can be saved again.
#[test]
fn fuzz_records() {
    let folder = tempfile::tempdir().unwrap();
    let spec = spec(folder.path());
    let fake = Fake::new();
    let good = save(&fake, &spec);
    let (mut taken, mut refused) = (0, 0);
    for owner in ["machine", "clock", "memory-layout", "device-tree"] {
        let mut rest = good.clone();
        let record = rest.take_record(owner).unwrap();
        for bytes in vmm_fuzzing::hostile_records(&record.bytes) {
            let mut records = rest.clone();
            records.insert(owner, Record { bytes, ..record.clone() }).unwrap();
            match restore(&fake, &spec, records) {
                Ok(machine) => {
                    machine.save().unwrap();
                    taken += 1;
                }
                Err(_) => refused += 1,
            }
            assert_eq!(fake.live(), Live::default());
        }
    }
    assert!(taken > 0 && refused > 0, "{taken} taken, {refused} refused");
}

fn config_address(device: u8, register: u32) -> Exit {
    let address = 0x8000_0000 | u32::from(device) << 11 | register;
    Exit::PioWrite { port: 0xcf8, data: address.to_le_bytes().to_vec() }
}

const READ_CONFIG: Exit = Exit::PioRead { port: 0xcfc, size: 4, count: 1 };

#[test]
fn a_guest_finds_the_panic_device_and_its_panic_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let spec = spec(folder.path());
    let fake = Fake::new();
    let (mut machine, mut inbox) = build_told(&fake, &spec).unwrap();
    for device in 0..32 {
        fake.script(0, [config_address(device, 0), READ_CONFIG]);
        fake.script(0, [config_address(device, 0x10), READ_CONFIG]);
    }
    machine.start();
    let answers = wait_for(|| Some(fake.answers()).filter(|answers| answers.len() == 64));
    let value = |at: usize| u32::from_le_bytes(answers[at].data.as_slice().try_into().unwrap());
    let device = (0..32).find(|device| value(2 * device) == 0x0011_1b36).unwrap();
    let bar = u64::from(value(2 * device + 1));
    let enable = Exit::PioWrite { port: 0xcfc, data: vec![2] };
    let says = |event| Exit::MmioWrite { address: bar, data: vec![event] };
    fake.script(0, [config_address(device as u8, 4), enable, says(2), says(1)]);
    let mut told = Vec::new();
    wait_for(|| {
        told.extend(inbox.take_all().into_iter().map(|message| message.event));
        (told.len() == 2).then_some(())
    });
    assert!(matches!(told[0], MachineEvent::System(SystemEvent::CrashLoaded)), "{told:?}");
    assert!(matches!(told[1], MachineEvent::System(SystemEvent::Panicked)), "{told:?}");
    machine.pause().unwrap();
    machine.save_reset_restore().unwrap();
    fake.script(0, [says(1)]);
    machine.resume().unwrap();
    wait_for(|| inbox.take_all().pop_front());
}

#[test]
fn an_nmi_reaches_a_paused_guest_or_its_refusal_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let spec = spec(folder.path());
    let fake = Fake::new();
    let mut machine = build(&fake, &spec).unwrap();
    machine.start();
    machine.nmi().unwrap();
    machine.pause().unwrap();
    machine.nmi().unwrap();
    assert_eq!(fake.count("KVM_NMI"), 4, "two vCPUs, twice");
    machine.save_reset_restore().unwrap();
    fake.fail_nth_of("KVM_NMI", 1);
    let error = machine.nmi().unwrap_err();
    assert!(matches!(error, MachineError::Vcpu(VcpuError::Nmi { .. })), "{error:?}");
    machine.resume().unwrap();
}

#[test]
fn counts_are_told_in_both_forms_and_begin_anew_with_a_machine() {
    let folder = tempfile::tempdir().unwrap();
    let spec = spec(folder.path());
    let fake = Fake::new();
    let exits = |machine: &Machine| -> u64 {
        let of_guest = |sample: &Sample| {
            let (_, reason) = sample.labels.last().unwrap();
            sample.family.name == "vmm_vcpu_exits" && reason == "pio_write"
        };
        let value = |sample: &Sample| if let Value::Counter(count) = sample.value { count } else { 0 };
        machine.metrics().iter().filter(|sample| of_guest(sample)).map(value).sum()
    };
    for _ in 0..2 {
        let mut machine = build(&fake, &spec).unwrap();
        assert_eq!(exits(&machine), 0);
        fake.script(0, vec![Exit::PioWrite { port: 0x3f8, data: vec![b'x'] }; 5]);
        machine.start();
        wait_for(|| (exits(&machine) == 5).then_some(()));
        machine.pause().unwrap();
        machine.save_reset_restore().unwrap();
        machine.resume().unwrap();
        assert_eq!(exits(&machine), 5, "counts go on over a pause");

        let counters = machine.counters();
        let disk = &counters["_disk0"];
        assert_eq!(counters.len(), 1, "{counters:?}");
        let names: Vec<_> = disk.keys().map(String::as_str).collect();
        assert_eq!(names, ["read_bytes", "read_ops", "write_bytes", "write_ops"]);
        check(&machine.metrics());
    }
}

/// What OpenMetrics asks of samples.
fn check(samples: &[Sample]) {
    let mut seen = BTreeSet::new();
    for Sample { family, labels, value } in samples {
        assert_eq!(value.kind(), family.kind, "{family:?}");
        assert!(family.unit.is_empty() || family.name.ends_with(&format!("_{}", family.unit)), "{family:?}");
        assert!(family.name.starts_with("vmm_") && !family.name.ends_with("_total"), "{family:?}");
        assert!(family.help.ends_with('.'), "{family:?}");
        assert!(seen.insert((family.name, labels)), "{} {labels:?} is there twice", family.name);
    }
    for name in ["vmm_vcpu_exits", "vmm_block_latency_seconds", "vmm_rng_bytes", "vmm_virtio_interrupts"] {
        assert!(seen.iter().any(|(seen, _)| *seen == name), "{name}");
    }
}
