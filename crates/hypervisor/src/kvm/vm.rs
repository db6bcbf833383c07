//! A VM in KVM.
#![expect(unsafe_code, reason = "guest memory slots and unions of the kernel's structs")]

use std::sync::Arc;

use kvm_bindings::{
    KVM_API_VERSION, KVM_CAP_EXCEPTION_PAYLOAD, KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X2APIC_API,
    KVM_CAP_X86_TRIPLE_FAULT_EVENT, KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, KVM_IRQ_ROUTING_MSI,
    KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK,
    KVM_X2APIC_API_USE_32BIT_IDS, KvmIrqRouting, kvm_clock_data, kvm_enable_cap, kvm_irq_routing_entry,
    kvm_msi, kvm_userspace_memory_region,
};
use kvm_ioctls::{IoEventAddress as KvmIoEventAddress, Kvm as KvmFd, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::failed;
use super::vcpu::{Can, KvmVcpu};
use crate::{
    ClockData, HypervisorError, IoEventAddress, MemorySlot, Msi, MsiRoute, Result, Vcpu, Vm, VmOptions,
};

const _: () = assert!(KVM_API_VERSION == 12);

#[derive(Debug)]
pub(super) struct KvmVm {
    fd: Arc<VmFd>,
    /// Whether a triple fault that waits is told (KVM_CAP_X86_TRIPLE_FAULT_EVENT).
    tells_triple_fault: bool,
}

impl KvmVm {
    pub(super) fn create(kvm: &KvmFd, options: &VmOptions) -> Result<Self> {
        let fd = create(kvm).map_err(failed("KVM_CREATE_VM"))?;
        let bad_address = || HypervisorError::from_errno("KVM_SET_TSS_ADDR", libc::EINVAL);
        let tss = usize::try_from(options.tss_address).map_err(|_| bad_address())?;
        // The page of the identity map comes before the three of the TSS; before any vCPU, says the API.
        let identity_map = options.tss_address.checked_sub(0x1000).ok_or_else(bad_address)?;
        fd.set_identity_map_address(identity_map).map_err(failed("KVM_SET_IDENTITY_MAP_ADDR"))?;
        fd.set_tss_address(tss).map_err(failed("KVM_SET_TSS_ADDR"))?;
        let mut cap = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, ..Default::default() };
        cap.args = [options.ioapic_pins.into(), 0, 0, 0];
        fd.enable_cap(&cap).map_err(failed("KVM_ENABLE_CAP(KVM_CAP_SPLIT_IRQCHIP)"))?;
        let mut cap = kvm_enable_cap { cap: KVM_CAP_X2APIC_API, ..Default::default() };
        cap.args =
            [u64::from(KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK), 0, 0, 0];
        fd.enable_cap(&cap).map_err(failed("KVM_ENABLE_CAP(KVM_CAP_X2APIC_API)"))?;
        // Without it KVM_GET_VCPU_EVENTS changes CR2 and DR6, and calls a pending exception an injected one.
        enable_if_there(&fd, KVM_CAP_EXCEPTION_PAYLOAD)?;
        let tells_triple_fault = enable_if_there(&fd, KVM_CAP_X86_TRIPLE_FAULT_EVENT)?;
        Ok(Self { fd: Arc::new(fd), tells_triple_fault })
    }
}

/// Most times that a VM is tried to be created when signals are in the way.
const CREATE_TRIES: u32 = 100;

/// KVM gives up with EINTR when anything wants the thread's attention meanwhile, be it work of io_uring's.
fn create(kvm: &KvmFd) -> std::result::Result<VmFd, kvm_ioctls::Error> {
    let mut tries = 1;
    loop {
        match kvm.create_vm() {
            Err(error) if error.errno() == libc::EINTR && tries < CREATE_TRIES => tries += 1,
            done => return done,
        }
    }
}

/// Enables a capability of the VM where the host has it; returns whether it has.
fn enable_if_there(fd: &VmFd, cap: u32) -> Result<bool> {
    if fd.check_extension_raw(cap.into()) <= 0 {
        return Ok(false);
    }
    let mut enable = kvm_enable_cap { cap, ..Default::default() };
    enable.args = [1, 0, 0, 0];
    fd.enable_cap(&enable).map_err(failed("KVM_ENABLE_CAP"))?;
    Ok(true)
}

fn region(slot: &MemorySlot, size: u64) -> kvm_userspace_memory_region {
    let read_only = if slot.read_only { KVM_MEM_READONLY } else { 0 };
    let log_dirty = if slot.log_dirty { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
    kvm_userspace_memory_region {
        slot: slot.slot,
        flags: read_only | log_dirty,
        guest_phys_addr: slot.guest_address,
        memory_size: size,
        userspace_addr: slot.host_address,
    }
}

fn io_event_address(address: IoEventAddress) -> KvmIoEventAddress {
    match address {
        IoEventAddress::Pio(port) => KvmIoEventAddress::Pio(port),
        IoEventAddress::Mmio(gpa) => KvmIoEventAddress::Mmio(gpa),
    }
}

fn halves(address: u64) -> (u32, u32) {
    (address as u32, (address >> 32) as u32)
}

impl Vm for KvmVm {
    fn create_vcpu(&self, id: u32) -> Result<Box<dyn Vcpu>> {
        let fd = self.fd.create_vcpu(id.into()).map_err(failed("KVM_CREATE_VCPU"))?;
        let can = Can {
            xsave_size: self.fd.check_extension_int(kvm_ioctls::Cap::Xsave2),
            scale_tsc: self.fd.check_extension(kvm_ioctls::Cap::TscControl),
            tell_triple_fault: self.tells_triple_fault,
        };
        Ok(Box::new(KvmVcpu::new(fd, Arc::clone(&self.fd), can)))
    }

    unsafe fn set_memory_slot(&self, slot: &MemorySlot) -> Result<()> {
        // SAFETY: the caller keeps the memory mapped and free of Rust references.
        unsafe { self.fd.set_user_memory_region(region(slot, slot.size)) }
            .map_err(failed("KVM_SET_USER_MEMORY_REGION"))
    }

    fn remove_memory_slot(&self, slot: &MemorySlot) -> Result<()> {
        // SAFETY: a size of 0 removes the slot; no memory is given to the guest.
        unsafe { self.fd.set_user_memory_region(region(slot, 0)) }
            .map_err(failed("KVM_SET_USER_MEMORY_REGION"))
    }

    fn dirty_log(&self, slot: &MemorySlot) -> Result<Vec<u64>> {
        let size = usize::try_from(slot.size)
            .map_err(|_| HypervisorError::from_errno("KVM_GET_DIRTY_LOG", libc::EINVAL))?;
        self.fd.get_dirty_log(slot.slot, size).map_err(failed("KVM_GET_DIRTY_LOG"))
    }

    fn signal_msi(&self, msi: Msi) -> Result<()> {
        let (address_lo, address_hi) = halves(msi.address);
        let msi = kvm_msi { address_lo, address_hi, data: msi.data, ..Default::default() };
        self.fd.signal_msi(msi).map(drop).map_err(failed("KVM_SIGNAL_MSI"))
    }

    fn set_routes(&self, routes: &[MsiRoute]) -> Result<()> {
        let entries: Vec<_> = routes
            .iter()
            .map(|route| {
                let mut entry = kvm_irq_routing_entry {
                    gsi: route.gsi,
                    type_: KVM_IRQ_ROUTING_MSI,
                    ..Default::default()
                };
                (entry.u.msi.address_lo, entry.u.msi.address_hi) = halves(route.msi.address);
                entry.u.msi.data = route.msi.data;
                entry
            })
            .collect();
        let table = KvmIrqRouting::from_entries(&entries)
            .map_err(|_| HypervisorError::from_errno("KVM_SET_GSI_ROUTING", libc::E2BIG))?;
        self.fd.set_gsi_routing(&table).map_err(failed("KVM_SET_GSI_ROUTING"))
    }

    fn attach_irqfd(&self, event: &EventFd, gsi: u32) -> Result<()> {
        self.fd.register_irqfd(event, gsi).map_err(failed("KVM_IRQFD"))
    }

    fn detach_irqfd(&self, event: &EventFd, gsi: u32) -> Result<()> {
        self.fd.unregister_irqfd(event, gsi).map_err(failed("KVM_IRQFD"))
    }

    fn attach_ioeventfd(&self, address: IoEventAddress, event: &EventFd) -> Result<()> {
        self.fd
            .register_ioevent(event, &io_event_address(address), NoDatamatch)
            .map_err(failed("KVM_IOEVENTFD"))
    }

    fn detach_ioeventfd(&self, address: IoEventAddress, event: &EventFd) -> Result<()> {
        self.fd
            .unregister_ioevent(event, &io_event_address(address), NoDatamatch)
            .map_err(failed("KVM_IOEVENTFD"))
    }

    fn clock(&self) -> Result<ClockData> {
        let data = self.fd.get_clock().map_err(failed("KVM_GET_CLOCK"))?;
        Ok(ClockData {
            clock: data.clock,
            realtime: (data.flags & KVM_CLOCK_REALTIME != 0).then_some(data.realtime),
            host_tsc: (data.flags & KVM_CLOCK_HOST_TSC != 0).then_some(data.host_tsc),
        })
    }

    fn set_clock(&self, clock: &ClockData) -> Result<()> {
        // KVM knows no more flags than this on the way in.
        let flags = if clock.realtime.is_some() { KVM_CLOCK_REALTIME } else { 0 };
        let realtime = clock.realtime.unwrap_or(0);
        let data = kvm_clock_data { clock: clock.clock, flags, realtime, ..Default::default() };
        self.fd.set_clock(&data).map_err(failed("KVM_SET_CLOCK"))
    }
}
