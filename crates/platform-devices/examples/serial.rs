//! A guest's serial driver without a VM: it polls the line status register and sends back what it receives.
//!
//! `cargo run -p vmm-platform-devices --example serial`

use std::error::Error;
use std::io;
use std::sync::Arc;

use vmm_device_model::bus::Bus;
use vmm_device_model::recipe::Recipe;
use vmm_device_model::testing::TestResources;
use vmm_platform_devices::output::{Discard, OutputRing};
use vmm_platform_devices::serial::{COM1_PORT, SerialRecipe};

fn main() -> Result<(), Box<dyn Error>> {
    let mut resources = TestResources::new(0x1000)?;
    let ring = OutputRing::new(4096, Arc::new(Discard));
    let recipe = Box::new(SerialRecipe::com1("_serial", ring.clone(), Arc::new(Discard)));
    let input = recipe.input();
    let _device = recipe.build(&mut resources)?;

    let mut text: &[u8] =
        b"The receive FIFO holds 64 bytes, so a longer line reaches the guest in more than one piece.\n";
    while !text.is_empty() {
        let taken = input.enqueue(text);
        text = text.get(taken..).unwrap_or_default();
        guest(&resources.pio);
    }
    ring.drain(&mut io::stdout())?;
    Ok(())
}

/// What the guest does until nothing is left to receive.
fn guest(ports: &Bus) {
    const LINE_STATUS: u64 = COM1_PORT as u64 + 5;
    const DATA_READY: u8 = 1;
    let read = |port| {
        let mut data = [0];
        ports.read(port, &mut data);
        let [value] = data;
        value
    };
    while read(LINE_STATUS) & DATA_READY != 0 {
        let byte = read(COM1_PORT.into());
        ports.write(COM1_PORT.into(), &[byte]);
    }
}
