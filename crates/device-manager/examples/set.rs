//! A set with a toy device: built from the machine's resources, refused when they are taken, saved, and given
//! back.

use std::error::Error;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vmm_device_manager::machine::{Attentions, Lines, Machine, Parts};
use vmm_device_manager::set::DeviceSet;
use vmm_device_model::bus::BusDevice;
use vmm_device_model::device::{
    Attention, Blocker, DeviceChange, DeviceError, Lifecycle, SaveState, VmDevice,
};
use vmm_device_model::interrupt::InterruptLine;
use vmm_device_model::metrics::Metered;
use vmm_device_model::recipe::{BuildError, Recipe, Resources};
use vmm_device_model::testing::{TestAttention, TestDoorbells, TestLine, TestMsi, TestResources};
use vmm_pci::host_bridge::HostBridge;
use vmm_pci::windows::Windows;
use vmm_snapshot::{NoState, RecordError};

/// A device without state: what it answers is all ones.
#[derive(Debug)]
struct Toy;

impl BusDevice for Toy {
    fn read(&mut self, _region: u16, _offset: u64, _data: &mut [u8]) {}
    fn write(&mut self, _region: u16, _offset: u64, _data: &[u8]) {}
}

impl Metered for Toy {}

impl Lifecycle for Toy {
    fn service(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }
    fn quiesce_begin(&mut self) {}
    fn quiesce_finish(&mut self, _deadline: Instant) -> Result<(), DeviceError> {
        Ok(())
    }
    fn resume(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }
    fn reset(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }
    fn blockers(&self) -> Vec<Blocker> {
        Vec::new()
    }
    fn take_changes(&mut self) -> Vec<DeviceChange> {
        Vec::new()
    }
}

impl SaveState for Toy {
    type State = NoState;
    fn save(&self) -> NoState {
        NoState {}
    }
    fn restore(&mut self, NoState {}: NoState) -> Result<(), RecordError> {
        Ok(())
    }
}

#[derive(Debug)]
struct ToyRecipe {
    id: &'static str,
    port: u16,
    gsi: u32,
}

impl<R: Resources + ?Sized> Recipe<R> for ToyRecipe {
    fn id(&self) -> &str {
        self.id
    }

    fn build(self: Box<Self>, resources: &mut R) -> Result<Box<dyn VmDevice>, BuildError> {
        resources.map_pio(self.port, 8, Arc::new(Mutex::new(Toy)), 0)?;
        resources.interrupt_line(self.gsi)?;
        Ok(Box::new(Toy))
    }
}

/// 24 pins that nobody listens to.
#[derive(Debug)]
struct Pins;

impl Lines for Pins {
    fn line(&self, gsi: u32) -> Option<Arc<dyn InterruptLine>> {
        (gsi < 24).then(|| Arc::new(TestLine::default()) as _)
    }
}

/// Calls for a control thread that is not there.
#[derive(Debug)]
struct Nobody;

impl Attentions for Nobody {
    fn of(&self, _id: &str) -> Arc<dyn Attention> {
        Arc::new(TestAttention::default())
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let base = TestResources::new(0x1000)?;
    let windows = Windows { mmio32: 0xc000_0000..0xe800_0000, mmio64: 0x1_0000_0000..0x80_0000_0000 };
    let doorbells = Arc::new(TestDoorbells::default());
    let parts = Parts {
        pio: Arc::clone(&base.pio),
        mmio: Arc::clone(&base.mmio),
        memory: base.memory.clone(),
        lines: Box::new(Pins),
        msi: Arc::new(TestMsi::default()),
        attentions: Box::new(Nobody),
        bridge: HostBridge::new(0, base.mmio, doorbells, windows.clone()),
        windows,
    };
    let mut set = DeviceSet::new(Machine::new(parts)?);
    set.add(Box::new(ToyRecipe { id: "first", port: 0x100, gsi: 5 }))?;
    if let Err(error) = set.add(Box::new(ToyRecipe { id: "second", port: 0x200, gsi: 5 })) {
        let cause = error.source().map(ToString::to_string).unwrap_or_default();
        println!("refused: {error}: {cause}");
    }
    set.add(Box::new(ToyRecipe { id: "second", port: 0x200, gsi: 6 }))?;
    for node in set.nodes() {
        println!("{}: {:?}", node.id, node.resources);
    }
    set.quiesce(Instant::now() + Duration::from_secs(1))?;
    let saved = set.save()?;
    set.reset()?;
    set.restore(saved)?;
    set.resume()?;
    drop(set);
    println!("left on the bus: {}", base.pio.snapshot().iter().count());
    Ok(())
}
