//! A virtio-pci device and its driver in one process: negotiation, a request, a pause in between.
//!
//! `cargo run -p vmm-virtio-devices --example echo`

use std::error::Error;
use std::time::{Duration, Instant};

use vmm_device_model::device::Lifecycle;
use vmm_virtio_devices::testing::{EchoDevice, Segment, TestDriver};

fn main() -> Result<(), Box<dyn Error>> {
    let mut driver = TestDriver::new(Box::new(EchoDevice::new()), 1 << 20)?;
    let features = driver.start(!0)?;
    println!("{} is {:?}, features {features:#x}", driver.device.bdf(), driver.device.phase());

    let from = driver.place(b"hello, device")?;
    let to = driver.allocate(13, 16)?;
    let len = driver.request(0, &[Segment::readable(from, 13), Segment::writable(to, 13)])?;
    println!("{len} bytes back: {:?}", String::from_utf8_lossy(&driver.peek(to, 13)?));

    driver.device.quiesce_begin();
    driver.device.quiesce_finish(Instant::now() + Duration::from_secs(5))?;
    println!("paused, device started: {}", driver.device.is_started());
    driver.device.resume()?;
    println!("resumed, device started: {}", driver.device.is_started());
    Ok(())
}
