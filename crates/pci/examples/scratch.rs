//! A function with four bytes of scratch registers in a BAR, found and used as a guest would.
//!
//! `cargo run -p vmm-pci --example scratch`

use std::error::Error;
use std::sync::{Arc, Mutex};

use vmm_device_model::bus::BusDevice;
use vmm_pci::config::{BARS, Bar, BarKind, ConfigSpace, Identity};
use vmm_pci::endpoint::Endpoint;
use vmm_pci::function::{Attach, BarWindow, ConfigEffect, PciFunction};
use vmm_pci::resources::PciResources;
use vmm_pci::testing::TestPciResources;

const SIZE: u64 = 0x1000;

struct Scratch {
    endpoint: Endpoint,
    registers: [u8; 4],
}

impl PciFunction for Scratch {
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

impl BusDevice for Scratch {
    fn read(&mut self, _: u16, offset: u64, data: &mut [u8]) {
        let registers = self.registers.iter().skip(usize::try_from(offset).unwrap_or(usize::MAX));
        data.iter_mut().zip(registers).for_each(|(to, from)| *to = *from);
    }

    fn write(&mut self, _: u16, offset: u64, data: &[u8]) {
        let registers = self.registers.iter_mut().skip(usize::try_from(offset).unwrap_or(usize::MAX));
        registers.zip(data).for_each(|(to, from)| *to = *from);
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut machine = TestPciResources::new(0x1000)?;

    // The device's side.
    let bdf = machine.bdf(None)?;
    let address = machine.bar_address(BarKind::Memory64, SIZE)?;
    let identity = Identity {
        vendor: 0x1234,
        device: 1,
        subsystem_vendor: 0,
        subsystem: 0,
        class: 0xff_0000,
        revision: 0,
    };
    let mut config = ConfigSpace::new(&identity);
    config.add_bar(Bar { index: 0, kind: BarKind::Memory64, size: SIZE, address })?;
    let scratch = Arc::new(Mutex::new(Scratch { endpoint: Endpoint::new(config), registers: [0; 4] }));
    let bar = BarWindow { index: 0, size: SIZE, target: scratch.clone(), region: 0, doorbells: Vec::new() };
    machine.attach(bdf, Attach { function: scratch, bars: vec![bar] })?;

    // The guest's side: decoding on, find the BAR, use it, move it, use it there.
    machine.config_write(bdf, 4, &[2]);
    let mut bar = [0; 8];
    machine.config_read(bdf, 0x10, &mut bar);
    let home = u64::from_le_bytes(bar) & !0xf;
    machine.base.mmio.write(home, b"here");
    machine.config_write(bdf, 0x10, &((home + 0x10_0000) as u32).to_le_bytes());
    let mut text = [0; 4];
    machine.base.mmio.read(home + 0x10_0000, &mut text);
    println!("{bdf}: BAR 0 moved from {home:#x}, reads {:?}", String::from_utf8_lossy(&text));
    Ok(())
}
