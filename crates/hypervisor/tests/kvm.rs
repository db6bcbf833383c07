//! The KVM backend with a real-mode guest of a few bytes. Needs `/dev/kvm`; any KVM will do.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]
#![expect(unsafe_code, reason = "a page of guest memory")]

use std::sync::Arc;
use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

use vmm_hypervisor::kvm::Kvm;
use vmm_hypervisor::state::MpState;
use vmm_hypervisor::{Hypervisor, MemorySlot, Vcpu, VcpuExit, Vm, VmOptions};

const OPTIONS: VmOptions = VmOptions { ioapic_pins: 24, tss_address: 0xfffb_d000 };
const CODE: u64 = 0x1000;

/// A VM whose page at `CODE` holds `code`, and a vCPU about to run it in real mode.
fn guest(code: &[u8]) -> (Arc<dyn Vm>, Box<dyn Vcpu>, MemorySlot) {
    let kvm = Kvm::open().unwrap_or_else(|e| panic!("this test needs a usable /dev/kvm: {e}"));
    let vm = kvm.create_vm(&OPTIONS).unwrap();
    // Leaked: the guest may run until the process ends.
    let page = Box::leak(Box::new(Page([0; 4096])));
    page.0[..code.len()].copy_from_slice(code);
    let slot = MemorySlot {
        slot: 0,
        guest_address: CODE,
        size: 4096,
        host_address: (&raw mut *page) as u64,
        read_only: false,
        log_dirty: true,
    };
    // SAFETY: the page is never freed, and not touched from here on.
    unsafe { vm.set_memory_slot(&slot) }.unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    vcpu.set_cpuid(&kvm.supported_cpuid().unwrap()).unwrap();
    let mut sregs = vcpu.sregs().unwrap();
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs).unwrap();
    let mut regs = vcpu.regs().unwrap();
    (regs.rip, regs.rflags) = (CODE, 2);
    vcpu.set_regs(&regs).unwrap();
    (vm, vcpu, slot)
}

#[repr(align(4096))]
struct Page([u8; 4096]);

#[test]
fn port_and_memory_mapped_accesses_exit_with_their_data() {
    // mov al, 0x5a; out 0x80, al; in al, 0x81; mov [0x8000], al; mov [0x1ff0], al; l: jmp l
    let code =
        [0xb0, 0x5a, 0xe6, 0x80, 0xe4, 0x81, 0xa2, 0x00, 0x80, 0xa2, 0xf0, 0x1f, 0xe6, 0x82, 0xeb, 0xfe];
    let (vm, mut vcpu, slot) = guest(&code);
    assert_eq!(vcpu.run().unwrap(), VcpuExit::PioWrite { port: 0x80, size: 1, data: &[0x5a] });
    match vcpu.run().unwrap() {
        VcpuExit::PioRead { port: 0x81, size: 1, data } => data[0] = 0x77,
        other => panic!("{other:?}"),
    }
    assert_eq!(vcpu.run().unwrap(), VcpuExit::MmioWrite { address: 0x8000, data: &[0x77] });
    assert_eq!(vcpu.run().unwrap(), VcpuExit::PioWrite { port: 0x82, size: 1, data: &[0x77] });
    assert_eq!(vm.dirty_log(&slot).unwrap(), [1], "the write to 0x1ff0 dirtied the slot's first page");
}

#[test]
fn a_string_instruction_tells_the_size_of_one_access() {
    // mov cx, 4; mov di, 0x1800; cld; rep insb (dx = 0x60)
    let code = [0xb9, 4, 0, 0xbf, 0x00, 0x18, 0xba, 0x60, 0x00, 0xfc, 0xf3, 0x6c, 0xe6, 0x80, 0xeb, 0xfe];
    let (_vm, mut vcpu, _) = guest(&code);
    let mut got = 0;
    loop {
        match vcpu.run().unwrap() {
            VcpuExit::PioRead { port: 0x60, size, data } => {
                assert_eq!(size, 1);
                got += data.len();
                data.fill(1);
            }
            VcpuExit::PioWrite { port: 0x80, .. } => break,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(got, 4);
}

#[test]
fn a_kick_ends_a_run_and_is_never_lost() {
    let (_vm, mut vcpu, _) = guest(&[0xeb, 0xfe]);
    let kick = vcpu.bind().unwrap();
    kick.kick();
    assert_eq!(vcpu.run().unwrap(), VcpuExit::Interrupted, "a kick before the run");
    let (done, finished) = std::sync::mpsc::channel::<()>();
    let kicker = std::thread::spawn(move || {
        while finished.recv_timeout(Duration::from_micros(300)) == Err(RecvTimeoutError::Timeout) {
            kick.kick();
        }
        kick
    });
    for _ in 0..20 {
        assert_eq!(vcpu.run().unwrap(), VcpuExit::Interrupted);
    }
    drop(done);
    let kick = kicker.join().unwrap();
    drop(vcpu);
    kick.kick();
}

#[test]
fn state_reads_back_as_written() {
    let (vm, mut vcpu, _) = guest(&[0xeb, 0xfe]);
    let mut regs = vcpu.regs().unwrap();
    (regs.rax, regs.r15) = (1, 15);
    vcpu.set_regs(&regs).unwrap();
    assert_eq!(vcpu.regs().unwrap(), regs);
    let sregs = vcpu.sregs().unwrap();
    vcpu.set_sregs(&sregs).unwrap();
    assert_eq!(vcpu.sregs().unwrap(), sregs);
    let xsave = vcpu.xsave().unwrap();
    vcpu.set_xsave(&xsave).unwrap();
    assert_eq!(vcpu.xsave().unwrap(), xsave);
    assert!(vcpu.set_xsave(&xsave[1..]).is_err() && vcpu.set_xsave(&xsave[..512]).is_err());
    vcpu.set_xsave(&xsave[..576]).unwrap();
    let longer = |last: u8| xsave.iter().copied().chain([0, 0, 0, last]).collect::<Vec<_>>();
    vcpu.set_xsave(&longer(0)).unwrap();
    assert!(vcpu.set_xsave(&longer(1)).is_err(), "a component that this host does not have");
    let khz = vcpu.tsc_khz().unwrap();
    vcpu.set_tsc_khz(khz).unwrap();
    // Some KVMs take another offset, some keep theirs, old ones have none.
    if let Ok(offset) = vcpu.tsc_offset() {
        vcpu.set_tsc_offset(offset).unwrap();
        assert_eq!(vcpu.tsc_offset().unwrap(), offset);
    }
    if let Ok(nested) = vcpu.nested_state() {
        assert_eq!(nested, None, "nothing is nested");
    }
    assert!(vcpu.set_nested_state(&[0; 7]).is_err());
    let lapic = vcpu.lapic().unwrap();
    vcpu.set_lapic(&lapic).unwrap();
    assert_eq!(vcpu.lapic().unwrap().register(0x30), lapic.register(0x30));
    let events = vcpu.events().unwrap();
    vcpu.set_events(&events).unwrap();
    let debug = vcpu.debug_regs().unwrap();
    vcpu.set_debug_regs(&debug).unwrap();
    assert_eq!(vcpu.mp_state().unwrap(), MpState::Runnable);
    vcpu.set_mp_state(MpState::Halted).unwrap();
    assert_eq!(vcpu.mp_state().unwrap(), MpState::Halted);
    assert!(vcpu.tsc_khz().unwrap() > 0);
    let clock = vm.clock().unwrap();
    vm.set_clock(&clock).unwrap();
    let kvm = Kvm::open().unwrap();
    let msrs = vcpu.msrs(&kvm.msr_indices().unwrap()).unwrap();
    assert!(msrs.iter().any(|m| m.index == 0x10), "the TSC is among {} MSRs", msrs.len());
    let refused = vcpu.set_msrs(&msrs).unwrap();
    assert!(refused.len() < msrs.len() / 2, "refused: {refused:x?}");
}

#[test]
fn a_vcpu_has_one_thread_and_a_thread_one_vcpu() {
    let (_vm, mut first, _) = guest(&[0xeb, 0xfe]);
    let (_other_vm, mut second, _) = guest(&[0xeb, 0xfe]);
    let kick = first.bind().unwrap();
    first.bind().unwrap();
    assert!(second.bind().is_err(), "the thread has a vCPU");
    let mut first = std::thread::spawn(move || {
        assert!(first.bind().is_err(), "the vCPU has a thread");
        first
    })
    .join()
    .unwrap();
    kick.kick();
    assert_eq!(first.run().unwrap(), VcpuExit::Interrupted);
    drop(first);
    second.bind().unwrap().kick();
    assert_eq!(second.run().unwrap(), VcpuExit::Interrupted, "the thread is free again");
}

#[test]
fn a_vcpu_that_another_thread_drops_leaves_no_dangling_handler() {
    let (_vm, mut vcpu, _) = guest(&[0xeb, 0xfe]);
    let kick = vcpu.bind().unwrap();
    std::thread::spawn(move || drop(vcpu)).join().unwrap();
    kick.kick();
    // SAFETY: a signal to this thread, as a late kick would be; its handler still has the vCPU's page.
    unsafe { libc::raise(libc::SIGRTMIN()) };
}

#[test]
fn a_missing_device_node_is_named() {
    let error = Kvm::open_path("/nonexistent/kvm".as_ref()).unwrap_err();
    assert_eq!(error.to_string(), "cannot open /nonexistent/kvm");
}
