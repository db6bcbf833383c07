//! A function with two BARs of memory-like registers and a doorbell in each.
#![allow(dead_code, clippy::unwrap_used, reason = "shared by test binaries that use different parts of it")]

use std::sync::{Arc, Mutex};

use vmm_device_model::bus::BusDevice;
use vmm_pci::bdf::Bdf;
use vmm_pci::config::{BARS, Bar, BarKind, ConfigSpace, Identity};
use vmm_pci::endpoint::Endpoint;
use vmm_pci::function::{Attach, BarDoorbell, BarWindow, ConfigEffect, PciFunction};
use vmm_pci::host_bridge::Attachment;
use vmm_pci::resources::PciResources;
use vmm_pci::testing::TestPciResources;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub(crate) const IDENTITY: Identity = Identity {
    vendor: 0x1234,
    device: 0x5678,
    subsystem_vendor: 0x9abc,
    subsystem: 0xdef0,
    class: 0xff_0000,
    revision: 3,
};
/// Size of BAR 0 (64-bit) and of BAR 2 (32-bit).
pub(crate) const SIZE: u64 = 0x1000;

pub(crate) struct TestFunction {
    pub(crate) endpoint: Endpoint,
    /// What its BARs read as.
    pub(crate) tag: u8,
}

impl PciFunction for TestFunction {
    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        self.endpoint.read(offset, data);
    }

    fn config_write(&mut self, offset: u16, data: &[u8]) -> ConfigEffect {
        self.endpoint.write(offset, data)
    }

    fn bar_addresses(&self) -> [Option<u64>; BARS] {
        self.endpoint.bar_addresses()
    }
}

impl BusDevice for TestFunction {
    fn read(&mut self, region: u16, _: u64, data: &mut [u8]) {
        data.fill(self.tag + region as u8);
    }

    fn write(&mut self, _: u16, _: u64, _: &[u8]) {}
}

/// A machine, and functions with tags 0x10, 0x20 ... in slots 1, 2 ...
pub(crate) fn machine(functions: u8) -> (TestPciResources, Vec<Attachment>) {
    let mut machine = TestPciResources::new(0x1000).unwrap();
    let attached = (1..=functions).map(|slot| attach(&mut machine, slot)).collect();
    (machine, attached)
}

pub(crate) fn attach(machine: &mut TestPciResources, slot: u8) -> Attachment {
    let bdf = machine.bdf(Some(slot)).unwrap();
    let parts = function(machine, slot * 0x10);
    machine.attach(bdf, parts).unwrap()
}

pub(crate) fn function(machine: &mut TestPciResources, tag: u8) -> Attach {
    let mut config = ConfigSpace::new(&IDENTITY);
    let mut bars = Vec::new();
    for (index, kind) in [(0, BarKind::Memory64), (2, BarKind::Memory32)] {
        let address = machine.bar_address(kind, SIZE).unwrap();
        config.add_bar(Bar { index, kind, size: SIZE, address }).unwrap();
    }
    let function = Arc::new(Mutex::new(TestFunction { endpoint: Endpoint::new(config), tag }));
    for index in [0_u8, 2] {
        let event = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        bars.push(BarWindow {
            index,
            size: SIZE,
            target: function.clone(),
            region: index.into(),
            doorbells: vec![BarDoorbell { offset: 0x10, event }],
        });
    }
    Attach { function, bars }
}

pub(crate) fn enable(machine: &TestPciResources, bdf: Bdf, on: bool) {
    machine.config_write(bdf, 4, &[if on { 6 } else { 0 }, 0]);
}

pub(crate) fn read_u32(machine: &TestPciResources, bdf: Bdf, offset: u16) -> u32 {
    let mut data = [0; 4];
    machine.config_read(bdf, offset, &mut data);
    u32::from_le_bytes(data)
}

/// Moves BAR 0, as Linux does: low half, then high half.
pub(crate) fn move_bar0(machine: &TestPciResources, bdf: Bdf, address: u64) {
    machine.config_write(bdf, 0x10, &(address as u32).to_le_bytes());
    machine.config_write(bdf, 0x14, &((address >> 32) as u32).to_le_bytes());
}

/// What answers at an address; 0xff is nobody.
pub(crate) fn who(machine: &TestPciResources, address: u64) -> u8 {
    let mut data = [0];
    machine.base.mmio.read(address, &mut data);
    data[0]
}

/// Where doorbells are, sorted.
pub(crate) fn bells(machine: &TestPciResources) -> Vec<u64> {
    let attached = machine.doorbells.attached.lock().unwrap();
    let mut addresses: Vec<u64> = attached
        .iter()
        .map(|(address, _)| match address {
            vmm_device_model::doorbell::DoorbellAddress::Mmio(address)
            | vmm_device_model::doorbell::DoorbellAddress::Pio(address) => *address,
        })
        .collect();
    addresses.sort_unstable();
    addresses
}
