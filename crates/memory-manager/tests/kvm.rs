//! Dirty pages of a guest that runs. Needs `/dev/kvm`; any KVM will do.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]

mod common;

use std::path::Path;
use std::sync::Arc;

use common::{MIB, PAGE, content, save, work, write, zone};
use vm_memory::{Bytes, GuestAddress};
use vmm_hypervisor::kvm::Kvm;
use vmm_hypervisor::{Hypervisor, Vcpu, VcpuExit, Vm, VmOptions};
use vmm_memory_manager::dirty::{Changed, DirtyCollector};
use vmm_memory_manager::map::MemoryMap;
use vmm_memory_manager::restore::{Fill, Saved};
use vmm_snapshot::directory::{Chain, Increment};

const CODE: u64 = 0x1000;

/// Adds 1 to the first byte of page BX / 16 and tells so on port 0x80, again and again.
const GUEST: [u8; 10] = [
    0x8e, 0xdb, // l: mov ds, bx
    0xfe, 0x06, 0x00, 0x00, // inc byte [0]
    0xe6, 0x80, // out 0x80, al
    0xeb, 0xf6, // jmp l
];

/// A VM with the memory that `memory` makes, and a vCPU that can run `GUEST` in it.
fn guest(memory: impl FnOnce(Arc<dyn Vm>) -> MemoryMap) -> (MemoryMap, Box<dyn Vcpu>) {
    let kvm = Kvm::open().unwrap_or_else(|e| panic!("this test needs a usable /dev/kvm: {e}"));
    let vm = kvm.create_vm(&VmOptions { ioapic_pins: 24, tss_address: 0xfffb_d000 }).unwrap();
    let map = memory(vm.clone());
    let mut vcpu = vm.create_vcpu(0).unwrap();
    vcpu.set_cpuid(&kvm.supported_cpuid().unwrap()).unwrap();
    let mut sregs = vcpu.sregs().unwrap();
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs).unwrap();
    (map, vcpu)
}

/// Memory with nothing but `GUEST` in it.
fn fresh(vm: Arc<dyn Vm>) -> MemoryMap {
    let map = MemoryMap::create(vm, &[zone(MIB)], 40).unwrap();
    write(&map, CODE, &GUEST);
    map
}

/// Has the guest write to `page`.
fn touch(vcpu: &mut dyn Vcpu, page: u64) {
    let mut regs = vcpu.regs().unwrap();
    (regs.rip, regs.rflags, regs.rbx) = (CODE, 2, page * PAGE / 16);
    vcpu.set_regs(&regs).unwrap();
    assert!(matches!(vcpu.run().unwrap(), VcpuExit::PioWrite { port: 0x80, .. }));
}

fn pages(changed: &Changed) -> Vec<u64> {
    assert_eq!(changed.len(), 1);
    changed[0].iter().flat_map(|range| range.start / PAGE..range.end / PAGE).collect()
}

#[test]
fn trackers_see_guest_and_devices_from_the_start_to_the_end() {
    let (mut map, mut vcpu) = guest(fresh);
    let mut dirty = DirtyCollector::new();
    // Mapped for the guest, with its dirty bits set, before anybody tracks.
    [8, 9].into_iter().for_each(|page| touch(&mut *vcpu, page));
    dirty.start(&mut map, "snapshot").unwrap();
    assert!(pages(&dirty.take_changed(&map, "snapshot").unwrap()).is_empty());

    // The first write after the start, to a page that was writable before it.
    touch(&mut *vcpu, 9);
    map.dma().view().write_obj(1_u8, GuestAddress(20 * PAGE)).unwrap();
    dirty.start(&mut map, "migration").unwrap();
    touch(&mut *vcpu, 10);
    let taken = dirty.take_changed(&map, "snapshot").unwrap();
    assert_eq!(pages(&taken), [9, 10, 20]);
    // Once told, told again only if written again.
    touch(&mut *vcpu, 10);
    assert_eq!(pages(&dirty.take_changed(&map, "snapshot").unwrap()), [10]);
    assert_eq!(pages(&dirty.take_changed(&map, "migration").unwrap()), [10]);

    // A snapshot that failed gives back what it took.
    touch(&mut *vcpu, 11);
    dirty.give_back(&map, "snapshot", &taken).unwrap();
    assert_eq!(pages(&dirty.take_changed(&map, "snapshot").unwrap()), [9, 10, 11, 20]);
    assert_eq!(pages(&dirty.take_changed(&map, "migration").unwrap()), [11]);

    // One that ends leaves the other alone; the log goes off and on again with the last and the first.
    dirty.stop(&mut map, "snapshot").unwrap();
    touch(&mut *vcpu, 12);
    assert_eq!(pages(&dirty.take_changed(&map, "migration").unwrap()), [12]);
    dirty.stop(&mut map, "migration").unwrap();
    touch(&mut *vcpu, 13);
    dirty.start(&mut map, "snapshot").unwrap();
    touch(&mut *vcpu, 14);
    assert_eq!(pages(&dirty.take_changed(&map, "snapshot").unwrap()), [14]);
    let counts: Vec<u8> =
        (8..=14).map(|page| map.memory().read_obj(GuestAddress(page * PAGE)).unwrap()).collect();
    assert_eq!(counts, [1, 2, 2, 1, 1, 1, 1], "the guest wrote what it should");
}

#[test]
fn a_guest_goes_on_from_a_mapped_snapshot_and_from_its_child() {
    let dir = tempfile::tempdir().unwrap();
    let (map, mut vcpu) = guest(fresh);
    [8, 9, 9].into_iter().for_each(|page| touch(&mut *vcpu, page));
    save(&map, &dir.path().join("a"), None);
    let layout = map.save();
    let restored = |name: &str, fill| {
        let chain = Chain::open(&dir.path().join(name)).unwrap();
        guest(|vm| {
            let saved = Saved { layout: &layout, chain: &chain, fill };
            MemoryMap::restore(vm, &[zone(MIB)], &saved, &work()).unwrap()
        })
    };
    let (mut map, mut vcpu) = restored("a", Fill::Lazy);
    // Before the guest runs, as after a restore: everything that it writes is seen.
    let mut dirty = DirtyCollector::new();
    dirty.start(&mut map, "snapshot").unwrap();
    [9, 10].into_iter().for_each(|page| touch(&mut *vcpu, page));
    let changed = map.changed_since_restore().unwrap().unwrap();
    assert_eq!(pages(&changed), [9, 10]);
    assert_eq!(dirty.take_changed(&map, "snapshot").unwrap(), changed, "both ways tell the same");
    Chain::open(&dir.path().join("a")).unwrap().verify(&work()).unwrap();

    save(
        &map,
        &dir.path().join("b"),
        Some(&Increment { parent: Path::new("../a"), id: None, changed: &changed, packed: true }),
    );
    for fill in [Fill::Lazy, Fill::Eager] {
        let (back, mut vcpu) = restored("b", fill);
        touch(&mut *vcpu, 10);
        let counts: Vec<u8> =
            (8..=11).map(|page| back.memory().read_obj(GuestAddress(page * PAGE)).unwrap()).collect();
        assert_eq!(counts, [1, 3, 2, 0], "{fill:?}");
        assert!(content(&back) != content(&map));
    }
}
