//! The set of vCPUs on the scripted hypervisor: exits reach their targets, pause and resume lose nothing,
//! and any call that fails leaves nothing behind.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests fail by panicking")]

use std::io;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use vmm_cpu_manager::affinity::CoreScheduling;
use vmm_cpu_manager::cpuid::{Cpuid, CpuidOptions};
use vmm_cpu_manager::entry::{Control, Entry};
use vmm_cpu_manager::set::{ExitTargets, Unfinished, VcpuError, VcpuEvent, VcpuEventKind, VcpuSet, VcpuSpec};
use vmm_cpu_manager::state::{MsrV1, TimeBase, VcpuV1};
use vmm_cpu_manager::topology::Topology;
use vmm_device_model::bus::{Bus, BusDevice, Mapping};
use vmm_device_model::metrics::Value;
use vmm_device_model::thread::{ThreadHook, ThreadKind, Unconfined};
use vmm_hypervisor::fake::{Exit, Fake, Live};
use vmm_hypervisor::state::{DescriptorTable, Regs, Segment};
use vmm_hypervisor::{Hypervisor, VmOptions};
use vmm_snapshot::Schema;

#[derive(Default)]
struct Log(Vec<(u64, Vec<u8>)>);

impl BusDevice for Log {
    fn read(&mut self, _: u16, offset: u64, data: &mut [u8]) {
        data.fill(self.0.len() as u8);
        self.0.push((offset, Vec::new()));
    }

    fn write(&mut self, _: u16, offset: u64, data: &[u8]) {
        self.0.push((offset, data.to_vec()));
    }
}

struct World {
    targets: ExitTargets,
    log: Arc<Mutex<Log>>,
    eois: Arc<Mutex<Vec<u8>>>,
    events: Receiver<VcpuEvent>,
}

fn world() -> World {
    let (pio, mmio) = (Arc::new(Bus::new()), Arc::new(Bus::new()));
    let log = Arc::new(Mutex::new(Log::default()));
    for bus in [&pio, &mmio] {
        bus.update(|m| m.insert(Mapping { base: 0, len: 0x1000, target: log.clone(), region: 0 })).unwrap();
    }
    let eois = Arc::new(Mutex::new(Vec::new()));
    let (sender, events) = channel();
    let sender = Mutex::new(sender);
    let seen = Arc::clone(&eois);
    let targets = ExitTargets {
        pio,
        mmio,
        end_of_interrupt: Arc::new(move |vector| seen.lock().unwrap().push(vector)),
        events: Arc::new(move |event| sender.lock().unwrap().send(event).unwrap()),
    };
    World { targets, log, eois, events }
}

fn create(fake: &Fake, boot: u32, targets: &ExitTargets) -> Result<VcpuSet, VcpuError> {
    create_with(fake, boot, targets, Arc::new(Unconfined))
}

fn create_with(
    fake: &Fake,
    boot: u32,
    targets: &ExitTargets,
    threads: Arc<dyn ThreadHook>,
) -> Result<VcpuSet, VcpuError> {
    begin(fake, boot, targets, threads)?.finish(Some(entry()))
}

fn begin(
    fake: &Fake,
    boot: u32,
    targets: &ExitTargets,
    threads: Arc<dyn ThreadHook>,
) -> Result<Unfinished, VcpuError> {
    let topology = Topology::flat(4);
    let options = CpuidOptions { topology, max_phys_bits: None, nested: false };
    let cpuid = Cpuid::new(&fake.supported_cpuid()?, &options);
    let affinity = vec![(0, vec![0])];
    let spec = VcpuSpec {
        boot,
        topology,
        cpuid,
        msrs: None,
        affinity,
        core_scheduling: CoreScheduling::Vm,
        threads,
    };
    let vm = fake.create_vm(&VmOptions { ioapic_pins: 24, tss_address: 0 })?;
    VcpuSet::begin(fake, &vm, &spec, targets)
}

fn entry() -> Entry {
    Entry {
        regs: Regs { rip: 0x1000, ..Regs::default() },
        code: Segment { base: 1, ..Segment::default() },
        data: Segment::default(),
        task: Segment::default(),
        gdt: DescriptorTable::default(),
        idt: DescriptorTable::default(),
        control: Control { cr0: 1, ..Control::default() },
    }
}

fn wait_for(what: impl Fn() -> bool) {
    for _ in 0..5000 {
        if what() {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(what(), "did not happen within 5 s");
}

#[test]
fn exits_reach_their_targets_in_accesses_of_their_size() {
    let (fake, world) = (Fake::new(), world());
    fake.script(
        0,
        [
            Exit::PioWrite { port: 0x80, data: vec![1] },
            Exit::PioRead { port: 0x60, size: 2, count: 3 },
            Exit::MmioWrite { address: 0x10, data: vec![2; 8] },
            Exit::MmioRead { address: 0x2000, size: 4 },
            Exit::IoapicEoi(0x31),
        ],
    );
    let mut set = create(&fake, 1, &world.targets).unwrap();
    assert!(fake.count("KVM_RUN") == 0, "vCPUs start parked");
    set.run();
    wait_for(|| world.eois.lock().unwrap().as_slice() == [0x31]);
    let log = &world.log.lock().unwrap().0;
    assert_eq!(log[0], (0x80, vec![1]));
    assert_eq!(log[1..4].iter().map(|l| l.0).collect::<Vec<_>>(), [0x60; 3]);
    assert_eq!(log[4], (0x10, vec![2; 8]));
    let answers = fake.answers();
    assert_eq!(answers[0].data, [1, 1, 2, 2, 3, 3], "three reads of two bytes");
    assert_eq!(answers[1].data, [0xff; 4], "where nothing is");
}

#[test]
fn what_ends_a_guest_is_told_and_the_vcpu_parks() {
    for (exit, expected) in [
        (Exit::Shutdown, "triple fault"),
        (Exit::SystemEvent(2), "system event 2"),
        (Exit::InternalError(1), "the hypervisor cannot emulate the guest's instruction (internal error 1)"),
        (Exit::RunFails(libc::EIO), "the vCPU cannot run"),
    ] {
        let (fake, world) = (Fake::new(), world());
        fake.script(0, [exit]);
        let mut set = create(&fake, 1, &world.targets).unwrap();
        set.run();
        let event = world.events.recv_timeout(Duration::from_secs(5)).unwrap();
        assert_eq!(event.kind.to_string(), expected);
        set.pause().unwrap();
        set.save().unwrap();
    }
}

#[test]
fn pause_and_resume_a_thousand_times_lose_no_exit() {
    let (fake, world) = (Fake::new(), world());
    let mut set = create(&fake, 4, &world.targets).unwrap();
    for round in 0..1000 {
        for vcpu in 0..4 {
            fake.script(vcpu, [Exit::PioWrite { port: 0x80, data: vec![round as u8] }]);
        }
        set.run();
        set.pause().unwrap();
    }
    set.run();
    wait_for(|| world.log.lock().unwrap().0.len() == 4000);
    assert!(world.events.try_recv().is_err());
}

#[test]
fn a_brake_keeps_vcpus_out_of_the_guest_and_nothing_else_from_them() {
    let (fake, world) = (Fake::new(), world());
    let mut set = create(&fake, 2, &world.targets).unwrap();
    let written = || world.log.lock().unwrap().0.len();
    let write = |vcpu| fake.script(vcpu, [Exit::PioWrite { port: 0x80, data: vec![1] }]);
    let brake = set.brake();
    // Who is parked needs no rest.
    brake.rest(Duration::from_secs(3600));
    write(0);
    set.run();
    wait_for(|| written() == 1);
    brake.rest(Duration::from_secs(3600));
    // Orders are obeyed in their turn, so both rest now.
    set.nmi().unwrap();
    (0..2).for_each(write);
    brake.rest(Duration::from_secs(3600));
    set.nmi().unwrap();
    assert_eq!(written(), 1, "it is out of the guest");
    set.pause().unwrap();
    set.save().unwrap();
    set.run();
    wait_for(|| written() == 3);
    brake.rest(Duration::from_millis(1));
    (0..2).for_each(write);
    wait_for(|| written() == 5);
    drop(set);
    brake.rest(Duration::from_millis(1));
}

#[test]
fn a_guest_that_is_held_runs_on_when_it_is_told_to() {
    let (fake, world) = (Fake::new(), world());
    let mut set = create(&fake, 2, &world.targets).unwrap();
    let written = || world.log.lock().unwrap().0.len();
    let write = |vcpu| fake.script(vcpu, [Exit::PioWrite { port: 0x80, data: vec![1] }]);
    set.hold();
    (0..2).for_each(write);
    set.run();
    wait_for(|| written() == 2);
    set.hold();
    // Orders are obeyed in their turn, so both are held now.
    set.nmi().unwrap();
    (0..2).for_each(write);
    set.hold();
    set.nmi().unwrap();
    assert_eq!(written(), 2, "it is out of the guest");
    set.run();
    wait_for(|| written() == 4);
    set.hold();
    set.pause().unwrap();
    set.run();
    (0..2).for_each(write);
    wait_for(|| written() == 6);
}

#[test]
fn state_moves_to_another_set() {
    let (fake, world) = (Fake::new(), world());
    let first = create(&fake, 2, &world.targets).unwrap();
    let states = first.save().unwrap();
    assert_eq!(states[0].regs.rip, 0x1000);
    drop(first);
    let mut second = create(&fake, 2, &world.targets).unwrap();
    second.restore(states.clone(), TimeBase::SameVm).unwrap();
    assert_eq!(second.save().unwrap(), states);
    let error = second.restore(states[..1].to_vec(), TimeBase::SameVm).unwrap_err();
    assert!(matches!(error, VcpuError::Count { states: 1, vcpus: 2 }));
}

/// KVM writes the wall clock to guest memory when its MSR is set, and the memory may still be another process's.
#[test]
fn what_writes_to_guest_memory_waits_until_the_vcpu_runs() {
    const CLOCKS: [u32; 2] = [0x11, 0x4b56_4d00];
    let (fake, world) = (Fake::new(), world());
    let mut set = create(&fake, 1, &world.targets).unwrap();
    let mut states = set.save().unwrap();
    states[0].msrs = CLOCKS.iter().map(|index| MsrV1 { index: *index, value: 0x1000 }).collect();
    let before = fake.calls().len();
    set.restore(states, TimeBase::SameVm).unwrap();
    let restored = fake.calls().split_off(before);
    assert!(!restored.iter().any(|call| call.starts_with("KVM_SET_MSRS")), "{restored:?}");
    let found = |set: &VcpuSet| {
        let msrs = set.save().unwrap().remove(0).msrs;
        CLOCKS.map(|index| msrs.iter().find(|msr| msr.index == index).map_or(0, |msr| msr.value))
    };
    let (saved, runs) = (found(&set), fake.calls().len());
    set.run();
    wait_for(|| fake.calls().split_off(runs).iter().any(|call| call.starts_with("KVM_SET_MSRS")));
    set.pause().unwrap();
    assert_eq!(found(&set), saved, "saved meanwhile, it is as it was");
}

fn tsc(state: &mut VcpuV1) -> &mut MsrV1 {
    state.msrs.iter_mut().find(|msr| msr.index == 0x10).unwrap()
}

#[test]
fn tscs_go_on_together_and_keep_what_the_guest_put_between_them() {
    for (offsets_known, guesses) in [(true, false), (true, true), (false, false)] {
        let (fake, world) = (Fake::new(), world());
        fake.set_host_tsc(3_000);
        let mut set = create(&fake, 2, &world.targets).unwrap();
        let mut states = set.save().unwrap();
        // Read one after the other; the second vCPU's is 3 ahead.
        for (state, value, offset) in [(0, 10_000, 7_000), (1, 10_500, 7_003)] {
            tsc(&mut states[state]).value = value;
            states[state].tsc_offset = Some(offset);
        }
        if guesses {
            fake.guess_tsc();
        }
        if !offsets_known {
            fake.unsupported("KVM_GET_DEVICE_ATTR");
        }
        fake.set_host_tsc(1 << 40);
        // At 2 GHz.
        set.restore(states.clone(), TimeBase::After(Duration::from_micros(1))).unwrap();
        let values: Vec<_> = set.save().unwrap().iter_mut().map(|state| tsc(state).value).collect();
        assert_eq!(values, if offsets_known { [12_000, 12_003] } else { [12_000, 12_500] });
        if offsets_known {
            // In the VM itself nothing happens to them.
            set.restore(states, TimeBase::SameVm).unwrap();
            let offsets: Vec<_> = set.save().unwrap().iter().map(|state| state.tsc_offset).collect();
            assert_eq!(offsets, [Some(7_000), Some(7_003)]);
        }
    }
}

/// Every integer of a saved state at its edges: refused, or taken; and the vCPU still obeys.
#[test]
fn fuzz_states() {
    let (fake, world) = (Fake::new(), world());
    let mut set = create(&fake, 1, &world.targets).unwrap();
    let good = set.save().unwrap();
    let (mut taken, mut refused) = (0, 0);
    for bytes in vmm_fuzzing::hostile_records(&good[0].encode()) {
        match VcpuV1::decode(&bytes).map(|state| set.restore(vec![state], TimeBase::SameVm)) {
            Ok(Ok(())) => taken += 1,
            Ok(Err(_)) | Err(_) => refused += 1,
        }
        set.save().unwrap();
    }
    assert!(taken > 0 && refused > 0, "{taken} taken, {refused} refused");
    set.restore(good.clone(), TimeBase::SameVm).unwrap();
    assert_eq!(set.save().unwrap(), good);
}

#[test]
fn any_call_that_fails_leaves_nothing_behind() {
    let (fake, world) = (Fake::new(), world());
    let calls = fake.fail_each(
        || (),
        |()| create(&fake, 2, &world.targets),
        |failed, (), created| {
            assert_eq!(created.is_err(), failed.is_some(), "{failed:?} failed unnoticed");
            drop(created);
            assert_eq!(fake.live(), Live::default(), "after {failed:?} failed");
        },
    );
    assert!(calls > 2, "{calls} calls");
}

/// Lets threads begin until it has seen so many.
#[derive(Debug)]
struct Porter(Mutex<u32>);

impl ThreadHook for Porter {
    fn begin(&self, kind: ThreadKind) -> io::Result<()> {
        assert_eq!(kind.0, "vcpu");
        let mut left = self.0.lock().unwrap();
        *left = left.checked_sub(1).ok_or(io::ErrorKind::PermissionDenied)?;
        Ok(())
    }
}

#[test]
fn a_vcpu_that_cannot_be_confined_leaves_nothing_behind() {
    let (fake, world) = (Fake::new(), world());
    let error = create_with(&fake, 2, &world.targets, Arc::new(Porter(Mutex::new(1)))).unwrap_err();
    assert!(matches!(error, VcpuError::Confine { .. }), "{error}");
    assert_eq!(fake.live(), Live::default());
}

#[test]
fn vcpus_are_made_beside_their_owner_and_enter_where_they_are_told_at_last() {
    let (fake, world) = (Fake::new(), world());
    let unfinished = begin(&fake, 3, &world.targets, Arc::new(Unconfined)).unwrap();
    wait_for(|| fake.count("KVM_SET_LAPIC") == 3);
    assert_eq!(fake.count("KVM_SET_REGS"), 0);
    let set = unfinished.finish(Some(entry())).unwrap();
    assert_eq!((set.len(), fake.count("KVM_SET_REGS")), (3, 1));
    assert_eq!(set.save().unwrap()[0].regs.rip, 0x1000);
}

#[test]
fn vcpus_that_nobody_waits_for_leave_nothing_behind() {
    let (fake, world) = (Fake::new(), world());
    drop(begin(&fake, 3, &world.targets, Arc::new(Unconfined)).unwrap());
    assert_eq!(fake.count("KVM_CREATE_VCPU"), 3);
    assert_eq!(fake.live(), Live::default());
}

#[test]
fn the_vcpus_behind_one_that_fails_are_not_made() {
    let (fake, world) = (Fake::new(), world());
    fake.fail_nth_of("KVM_CREATE_VCPU", 2);
    let error = create(&fake, 4, &world.targets).unwrap_err();
    assert!(matches!(error, VcpuError::Hypervisor(_)), "{error}");
    assert_eq!(fake.count("KVM_CREATE_VCPU"), 2);
    assert_eq!(fake.live(), Live::default());
}

#[test]
fn an_nmi_reaches_every_vcpu() {
    let (fake, world) = (Fake::new(), world());
    let mut set = create(&fake, 3, &world.targets).unwrap();
    set.run();
    set.nmi().unwrap();
    assert_eq!(fake.count("KVM_NMI"), 3);
    assert!(!matches!(world.events.try_recv(), Ok(VcpuEvent { kind: VcpuEventKind::Failed(_), .. })));
}

#[test]
fn an_nmi_that_is_refused_is_told_and_the_others_have_theirs() {
    let (fake, world) = (Fake::new(), world());
    let mut set = create(&fake, 3, &world.targets).unwrap();
    for running in [false, true] {
        if running {
            set.run();
        }
        let before = fake.count("KVM_NMI");
        fake.fail_nth_of("KVM_NMI", 2);
        assert!(matches!(set.nmi(), Err(VcpuError::Nmi { .. })));
        assert_eq!(fake.count("KVM_NMI"), before + 3);
        set.nmi().unwrap();
    }
}

#[test]
fn an_nmi_to_a_paused_guest_waits_in_its_state() {
    let (fake, world) = (Fake::new(), world());
    let mut set = create(&fake, 2, &world.targets).unwrap();
    let pending = |set: &VcpuSet| -> Vec<_> {
        set.save().unwrap().iter().map(|state| state.events.as_ref().unwrap().nmi_pending).collect()
    };
    set.run();
    set.pause().unwrap();
    assert_eq!(pending(&set), [0, 0]);
    set.nmi().unwrap();
    assert_eq!(pending(&set), [1, 1]);
    let states = set.save().unwrap();
    drop(set);
    let mut set = create(&fake, 2, &world.targets).unwrap();
    set.restore(states, TimeBase::SameVm).unwrap();
    assert_eq!(pending(&set), [1, 1], "it moves with the state");
    set.run();
    set.pause().unwrap();
    assert_eq!(pending(&set), [0, 0], "taken by the guest");
}

#[test]
fn exits_are_counted_by_vcpu_and_reason() {
    let (fake, world) = (Fake::new(), world());
    let write = || Exit::PioWrite { port: 0x80, data: vec![1] };
    let read = || Exit::MmioRead { address: 0x2000, size: 4 };
    fake.script(0, [write(), read(), write(), Exit::IoapicEoi(3), Exit::InternalError(1)]);
    fake.script(1, [read(), Exit::RunFails(libc::EIO)]);
    let mut set = create(&fake, 2, &world.targets).unwrap();
    let count = |set: &VcpuSet, vcpu: &str, reason: &str| {
        let wanted = [("vcpu", vcpu.to_owned()), ("reason", reason.to_owned())];
        let samples = set.measure();
        let found: Vec<_> = samples.iter().filter(|sample| sample.labels == wanted).collect();
        assert_eq!((found.len(), found[0].family.name), (1, "vmm_vcpu_exits"));
        found[0].value.clone()
    };
    set.run();
    for _ in 0..2 {
        world.events.recv_timeout(Duration::from_secs(5)).unwrap();
    }
    let expected = [
        ("0", "pio_write", 2),
        ("0", "mmio_read", 1),
        ("0", "ioapic_eoi", 1),
        ("0", "failure", 1),
        ("0", "mmio_write", 0),
        ("1", "mmio_read", 1),
        ("1", "failure", 1),
        ("1", "pio_write", 0),
    ];
    for (vcpu, reason, times) in expected {
        assert_eq!(count(&set, vcpu, reason), Value::Counter(times), "{reason} of vcpu{vcpu}");
    }
    // Counts go on over a pause.
    set.pause().unwrap();
    set.run();
    set.pause().unwrap();
    assert_eq!(count(&set, "0", "pio_write"), Value::Counter(2));
}

#[test]
fn orders_whose_kicks_fall_together_are_all_obeyed() {
    let (fake, world) = (Fake::new(), world());
    let mut set = create(&fake, 2, &world.targets).unwrap();
    for round in 1..=200 {
        set.run();
        set.run();
        set.nmi().unwrap();
        set.pause().unwrap();
        assert_eq!(fake.count("KVM_NMI"), 2 * round);
    }
}
