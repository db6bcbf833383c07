//! The VM generation ID: 16 bytes in guest memory that tell a guest that it is another than before, a copy say, so that it draws
//! new random numbers (Microsoft, "Virtual Machine Generation ID").
//!
//! The ACPI tables say where they are; the guest must not use the page for anything else. A new ID is told by the generic event
//! device, so the ID is written first.

use std::sync::{Arc, Mutex};

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};
use vmm_device_model::bus::BusDevice;
use vmm_device_model::device::{SaveState, VmDevice};
use vmm_device_model::dma::DmaMemory;
use vmm_device_model::metrics::Metered;
use vmm_device_model::recipe::{BuildError, Recipe, Resources};
use vmm_snapshot::RecordError;

use crate::ged::{Ged, GedEvent};
use crate::registers::{Late, RegisterFile, Registers, lock};

/// A generation ID.
pub type GenerationId = [u8; 16];

/// Where a guest finds its generation ID.
#[derive(Debug)]
pub struct VmGeneration {
    memory: DmaMemory,
    address: u64,
}

/// Its registers are memory: no access comes here.
impl BusDevice for VmGeneration {
    fn read(&mut self, _: u16, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write(&mut self, _: u16, _: u64, _: &[u8]) {}
}

impl Metered for VmGeneration {}

impl RegisterFile for VmGeneration {
    fn pause(&mut self) {}

    fn resume(&mut self) {}

    fn reset(&mut self) {}
}

/// Saved state of [`VmGeneration`]. The ID is part of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, minicbor::Encode, minicbor::Decode)]
pub struct VmGenerationV1 {
    /// Guest physical address of the ID.
    #[n(0)]
    pub address: u64,
}

vmm_snapshot::schema!(VmGenerationV1: "vm-generation" v1);

impl SaveState for VmGeneration {
    type State = VmGenerationV1;

    fn save(&self) -> VmGenerationV1 {
        let Self { memory: _, address } = self;
        VmGenerationV1 { address: *address }
    }

    fn restore(&mut self, state: VmGenerationV1) -> Result<(), RecordError> {
        if state.address != self.address {
            let (was, is) = (state.address, self.address);
            return Err(RecordError::invalid::<VmGenerationV1>(format!(
                "the ID was at {was:#x}, here it is at {is:#x}"
            )));
        }
        Ok(())
    }
}

/// Recipe of a generation ID.
#[derive(Debug)]
pub struct VmGenerationRecipe {
    id: String,
    address: u64,
    ged: Ged,
    device: Late<VmGeneration>,
}

impl VmGenerationRecipe {
    /// At guest physical address `address`, a multiple of 8, with changes told by `ged`.
    pub fn new(id: impl Into<String>, address: u64, ged: Ged) -> Self {
        Self { id: id.into(), address, ged, device: Late::new() }
    }

    /// The way to the device, once it is built.
    pub fn generation(&self) -> Generation {
        Generation { device: self.device.clone(), ged: self.ged.clone() }
    }
}

impl<R: Resources + ?Sized> Recipe<R> for VmGenerationRecipe {
    fn id(&self) -> &str {
        &self.id
    }

    fn build(self: Box<Self>, resources: &mut R) -> Result<Box<dyn VmDevice>, BuildError> {
        let generation =
            Arc::new(Mutex::new(VmGeneration { memory: resources.dma(), address: self.address }));
        self.device.set(&generation);
        Ok(Box::new(Registers::new(generation)))
    }
}

/// Gives a guest generation IDs.
#[derive(Debug, Clone)]
pub struct Generation {
    device: Late<VmGeneration>,
    ged: Ged,
}

impl Generation {
    /// Writes the first ID, before the guest runs. Nothing happens where there is no device.
    ///
    /// # Errors
    /// There is no memory.
    pub fn begin(&self, id: &GenerationId) -> Result<(), GuestMemoryError> {
        let Some(device) = self.device.get() else { return Ok(()) };
        let device = lock(&device);
        device.memory.view().write_slice(id, GuestAddress(device.address))
    }

    /// The ID that the guest finds; all zero where there is no device.
    ///
    /// # Errors
    /// There is no memory.
    pub fn current(&self) -> Result<GenerationId, GuestMemoryError> {
        let mut id = GenerationId::default();
        if let Some(device) = self.device.get() {
            let device = lock(&device);
            device.memory.view().read_slice(&mut id, GuestAddress(device.address))?;
        }
        Ok(id)
    }

    /// Writes another ID and tells the guest, whose vCPUs are paused and have their state.
    ///
    /// # Errors
    /// There is no memory; the guest is not told.
    pub fn renew(&self, id: &GenerationId) -> Result<(), GuestMemoryError> {
        self.begin(id)?;
        self.ged.raise(GedEvent::GenerationId);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use vmm_device_model::testing::{TestResources, save_reset_restore};

    use super::*;
    use crate::ged::GedRecipe;

    const GED: u64 = 0xfed0_0000;
    const ADDRESS: u64 = 0x800;

    fn id_of(resources: &TestResources) -> GenerationId {
        let mut id = [0; 16];
        resources.dma().view().read_slice(&mut id, GuestAddress(ADDRESS)).unwrap();
        id
    }

    #[test]
    fn the_first_id_is_written_and_another_one_is_told() {
        let mut resources = TestResources::new(0x1000).unwrap();
        let ged = Box::new(GedRecipe::new("_ged", GED, 5));
        let recipe = Box::new(VmGenerationRecipe::new("_vm_generation", ADDRESS, ged.ged()));
        let generation = recipe.generation();
        generation.begin(&[9; 16]).unwrap();
        assert_eq!(generation.current().unwrap(), [0; 16]);
        let _ged = ged.build(&mut resources).unwrap();
        let mut device = recipe.build(&mut resources).unwrap();
        let events = |resources: &TestResources| {
            let mut data = [0xff];
            assert!(resources.mmio.read(GED, &mut data));
            data[0]
        };
        generation.begin(&[1; 16]).unwrap();
        assert_eq!((id_of(&resources), events(&resources)), ([1; 16], 0));
        assert_eq!(generation.current().unwrap(), [1; 16]);
        generation.renew(&[2; 16]).unwrap();
        assert_eq!((id_of(&resources), events(&resources)), ([2; 16], GedEvent::GenerationId as u8));
        save_reset_restore(&mut *device).unwrap();
        assert_eq!((id_of(&resources), events(&resources)), ([2; 16], 0), "the same guest");
    }

    #[test]
    fn it_does_not_move_and_is_in_memory() {
        let mut resources = TestResources::new(0x1000).unwrap();
        let ged = Box::new(GedRecipe::new("_ged", GED, 5));
        let recipe = Box::new(VmGenerationRecipe::new("_vm_generation", 0x1000, ged.ged()));
        let generation = recipe.generation();
        let mut device = recipe.build(&mut resources).unwrap();
        generation.renew(&[1; 16]).unwrap_err();
        generation.current().unwrap_err();
        let moved = vmm_snapshot::Record::of(&VmGenerationV1 { address: 0x2000 });
        let error = device.restore_record(&moved).unwrap_err().to_string();
        assert!(error.ends_with("the ID was at 0x2000, here it is at 0x1000"), "{error}");
    }
}
