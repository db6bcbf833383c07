//! A toy device on a bus: a counter that the guest reads and writes, saved, reset and restored.

use std::error::Error;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use vmm_device_model::bus::BusDevice;
use vmm_device_model::device::{Blocker, DeviceChange, DeviceError, Lifecycle, SaveState, VmDevice};
use vmm_device_model::metrics::{Family, Kind, Measures, Metered, Value};
use vmm_device_model::recipe::{BuildError, Recipe, Resources};
use vmm_device_model::testing::{TestResources, save_reset_restore};
use vmm_snapshot::RecordError;

/// What the guest touches: one register that counts the writes to it.
#[derive(Debug, Default)]
struct Front {
    writes: u8,
}

impl BusDevice for Front {
    fn read(&mut self, _region: u16, offset: u64, data: &mut [u8]) {
        // Anything but a byte at offset 0 stays all ones.
        if let (0, [byte]) = (offset, data) {
            *byte = self.writes;
        }
    }

    fn write(&mut self, _region: u16, _offset: u64, _data: &[u8]) {
        self.writes = self.writes.wrapping_add(1);
    }
}

/// What the thread that owns the VM holds.
#[derive(Debug)]
struct Counter {
    front: Arc<Mutex<Front>>,
}

impl Counter {
    fn front(&self) -> MutexGuard<'_, Front> {
        self.front.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Lifecycle for Counter {
    fn service(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }

    // Nothing is ever in flight.
    fn quiesce_begin(&mut self) {}

    fn quiesce_finish(&mut self, _deadline: Instant) -> Result<(), DeviceError> {
        Ok(())
    }

    fn resume(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        *self.front() = Front::default();
        Ok(())
    }

    fn blockers(&self) -> Vec<Blocker> {
        Vec::new()
    }

    fn take_changes(&mut self) -> Vec<DeviceChange> {
        Vec::new()
    }
}

/// What it counts.
static WRITES: Family =
    Family { name: "toy_writes", help: "Writes to the register.", unit: "", kind: Kind::Counter };

impl Metered for Counter {
    fn measure(&self, measures: &mut Measures) {
        measures.sample(&WRITES, &[], Value::Counter(self.front().writes.into()));
    }
}

/// Its saved state, first version.
#[derive(Debug, Clone, PartialEq, Eq, minicbor::Encode, minicbor::Decode)]
struct CounterV1 {
    #[n(0)]
    writes: u8,
}

vmm_snapshot::schema!(CounterV1: "toy-counter" v1);

impl SaveState for Counter {
    type State = CounterV1;

    fn save(&self) -> CounterV1 {
        // All fields named: a new one does not compile until somebody decides about it here.
        let Front { writes } = *self.front();
        CounterV1 { writes }
    }

    fn restore(&mut self, state: CounterV1) -> Result<(), RecordError> {
        let CounterV1 { writes } = state;
        *self.front() = Front { writes };
        Ok(())
    }
}

/// How it comes into a VM: at port 0x500.
#[derive(Debug)]
struct CounterRecipe;

impl<R: Resources + ?Sized> Recipe<R> for CounterRecipe {
    fn id(&self) -> &str {
        "_counter"
    }

    fn build(self: Box<Self>, resources: &mut R) -> Result<Box<dyn VmDevice>, BuildError> {
        let front = Arc::new(Mutex::new(Front::default()));
        resources.map_pio(0x500, 1, Arc::clone(&front) as _, 0)?;
        Ok(Box::new(Counter { front }))
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut resources = TestResources::new(0x1000)?;
    let mut device = Box::new(CounterRecipe).build(&mut resources)?;
    let guest = resources.pio;
    for _ in 0..3 {
        guest.write(0x500, &[0]);
    }
    let record = save_reset_restore(&mut *device)?;
    println!("saved, reset and restored: {record:?}");
    let mut measures = Measures::of_device("_counter");
    device.measure(&mut measures);
    println!("it counts {:?}", measures.into_parts().1);
    let mut count = [0];
    guest.read(0x500, &mut count);
    println!("the guest reads {count:?} at port 0x500");
    guest.read(0x501, &mut count);
    println!("and {count:?} at port 0x501, where nothing is");
    Ok(())
}
