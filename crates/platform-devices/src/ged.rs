//! The generic event device: tells the guest that something about its machine changed (ACPI 6.5,
//! section 5.6.9).
//!
//! One byte of registers: a bit per kind of event, cleared by reading. Its interrupt is an edge, active
//! high, as the ACPI tables say.

use std::sync::{Arc, Mutex};

use vmm_device_model::bus::BusDevice;
use vmm_device_model::device::{SaveState, VmDevice};
use vmm_device_model::interrupt::InterruptLine;
use vmm_device_model::metrics::Metered;
use vmm_device_model::recipe::{BuildError, Recipe, Resources};
use vmm_snapshot::RecordError;

use crate::registers::{Late, RegisterFile, Registers, Window, lock, read_bytes};

/// Bytes of the event register.
pub const GED_LEN: u64 = 1;

/// What changed; the value is its bit in the event register.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum GedEvent {
    /// vCPUs came or go.
    Cpu = 1,
    /// Memory came.
    Memory = 2,
    /// PCI functions came or go.
    Pci = 4,
    /// The power button was pressed.
    PowerButton = 8,
    /// The generation id has changed.
    GenerationId = 16,
}

const ALL_EVENTS: u8 = 0x1f;

/// The event register and its interrupt line.
#[derive(Debug)]
pub struct GedRegisters {
    line: Arc<dyn InterruptLine>,
    pending: u8,
}

impl GedRegisters {
    /// No event yet; pulses `line` for each.
    pub fn new(line: Arc<dyn InterruptLine>) -> Self {
        Self { line, pending: 0 }
    }

    /// Sets the event's bit and interrupts.
    pub fn raise(&mut self, event: GedEvent) {
        self.pending |= event as u8;
        self.line.pulse();
    }
}

impl BusDevice for GedRegisters {
    fn read(&mut self, _: u16, offset: u64, data: &mut [u8]) {
        read_bytes(offset, data, |offset| if offset == 0 { std::mem::take(&mut self.pending) } else { 0xff });
    }

    fn write(&mut self, _: u16, _: u64, _: &[u8]) {}
}

impl Metered for GedRegisters {}

impl RegisterFile for GedRegisters {
    fn pause(&mut self) {}

    fn resume(&mut self) {
        if self.pending != 0 {
            // An edge from before a restore may be lost; one too many finds the register empty.
            self.line.pulse();
        }
    }

    fn reset(&mut self) {
        self.pending = 0;
    }
}

/// Saved state of [`GedRegisters`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, minicbor::Encode, minicbor::Decode)]
pub struct GedV1 {
    /// Event register.
    #[n(0)]
    pub pending: u8,
}

vmm_snapshot::schema!(GedV1: "ged" v1);

impl SaveState for GedRegisters {
    type State = GedV1;

    fn save(&self) -> GedV1 {
        let Self { line: _, pending } = self;
        GedV1 { pending: *pending }
    }

    fn restore(&mut self, state: GedV1) -> Result<(), RecordError> {
        let GedV1 { pending } = state;
        if pending & !ALL_EVENTS != 0 {
            return Err(RecordError::invalid::<GedV1>(format!("pending {pending:#x} has reserved bits")));
        }
        self.pending = pending;
        Ok(())
    }
}

/// Recipe of a generic event device.
#[derive(Debug)]
pub struct GedRecipe {
    id: String,
    base: u64,
    gsi: u32,
    device: Late<GedRegisters>,
}

impl GedRecipe {
    /// A device whose event register is at guest physical address `base`, with interrupt `gsi`.
    pub fn new(id: impl Into<String>, base: u64, gsi: u32) -> Self {
        Self { id: id.into(), base, gsi, device: Late::new() }
    }

    /// The way to the device, once it is built.
    pub fn ged(&self) -> Ged {
        Ged(self.device.clone())
    }
}

impl<R: Resources + ?Sized> Recipe<R> for GedRecipe {
    fn id(&self) -> &str {
        &self.id
    }

    fn build(self: Box<Self>, resources: &mut R) -> Result<Box<dyn VmDevice>, BuildError> {
        let Self { id: _, base, gsi, device } = *self;
        let line = resources.interrupt_line(gsi)?;
        let registers = Arc::new(Mutex::new(GedRegisters::new(line)));
        Window::Mmio { base, len: GED_LEN }.map(resources, Arc::clone(&registers) as _)?;
        device.set(&registers);
        Ok(Box::new(Registers::new(registers)))
    }
}

/// Tells the guest about events, from any thread.
#[derive(Debug, Clone)]
pub struct Ged(Late<GedRegisters>);

impl Ged {
    /// Tells the guest. Returns whether there is a device to do so: it is built and not gone.
    pub fn raise(&self, event: GedEvent) -> bool {
        let device = self.0.get();
        if let Some(device) = &device {
            lock(device).raise(event);
        }
        device.is_some()
    }
}

#[cfg(test)]
mod tests {
    use vmm_device_model::testing::{TestLine, TestResources, fuzz_registers, save_reset_restore};
    use vmm_fuzzing::rounds;

    use super::*;

    fn read(device: &mut GedRegisters) -> u8 {
        let mut data = [0xff];
        device.read(0, 0, &mut data);
        data[0]
    }

    #[test]
    fn events_gather_until_read() {
        let line = Arc::<TestLine>::default();
        let mut device = GedRegisters::new(line.clone());
        device.raise(GedEvent::Cpu);
        device.raise(GedEvent::PowerButton);
        assert_eq!((line.edges(), line.level()), (2, false));
        device.write(0, 0, &[0xff]);
        assert_eq!(read(&mut device), 9);
        assert_eq!(read(&mut device), 0);
    }

    #[test]
    fn a_pending_event_interrupts_again_after_restore() {
        let line = Arc::<TestLine>::default();
        let mut device = GedRegisters::new(line.clone());
        device.restore(GedV1 { pending: 2 }).unwrap();
        assert_eq!(line.edges(), 0);
        device.resume();
        assert_eq!(line.edges(), 1);
        assert_eq!(read(&mut device), 2);
        device.resume();
        assert_eq!(line.edges(), 1);
        device.restore(GedV1 { pending: 0x20 }).unwrap_err();
    }

    #[test]
    fn built_from_its_recipe() {
        let mut resources = TestResources::new(0x1000).unwrap();
        let recipe = Box::new(GedRecipe::new("_ged", 0xfed0_0000, 5));
        let ged = recipe.ged();
        assert!(!ged.raise(GedEvent::Cpu), "not built yet");
        let mut device = recipe.build(&mut resources).unwrap();
        assert!(ged.raise(GedEvent::Pci));
        assert_eq!(resources.lines[0].0, 5);
        save_reset_restore(&mut *device).unwrap();
        let mut data = [0xff];
        assert!(resources.mmio.read(0xfed0_0000, &mut data));
        assert_eq!(data, [4]);
    }

    #[test]
    fn fuzz_any_access() {
        let line = Arc::<TestLine>::default();
        fuzz_registers(&Mutex::new(GedRegisters::new(line)), 0, 8, rounds(100), 9);
    }
}
