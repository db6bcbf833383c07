//! ACPI's reset, sleep control and sleep status registers, all at one port (ACPI 6.5, sections 4.8.3.6
//! and 4.8.4.6: the registers of a hardware-reduced machine).

use std::sync::Arc;

use vmm_device_model::bus::BusDevice;
use vmm_device_model::device::SaveState;
use vmm_device_model::metrics::Metered;
use vmm_snapshot::{NoState, RecordError};

use crate::events::{Cause, SystemEvent, SystemEvents};
use crate::registers::{Placed, RegisterFile, Window, read_bytes, write_bytes};

/// The port that the ACPI tables name.
pub const ACPI_PM_PORT: u16 = 0x3c0;
/// What a guest writes to reset the machine.
pub const RESET_VALUE: u8 = 1;
/// Sleep type of the soft-off state, as the `_S5_` object gives it.
pub const S5_SLEEP_TYPE: u8 = 5;

const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 7;
const SLEEP_ENABLE: u8 = 1 << 5;

/// Turns the machine off or starts it again.
#[derive(Debug)]
pub struct AcpiPm {
    events: Arc<dyn SystemEvents>,
}

impl AcpiPm {
    /// Posts requests to `events`.
    pub fn new(events: Arc<dyn SystemEvents>) -> Self {
        Self { events }
    }

    /// Recipe of the registers at [`ACPI_PM_PORT`].
    pub fn recipe(id: impl Into<String>, events: Arc<dyn SystemEvents>) -> Placed<Self> {
        Placed::new(id, Window::Pio { base: ACPI_PM_PORT, len: 1 }, Self::new(events))
    }

    fn write_control(&self, value: u8) {
        let sleep_type = value >> SLEEP_TYPE_SHIFT & SLEEP_TYPE_MASK;
        if value == RESET_VALUE {
            self.events.request(SystemEvent::Reset(Cause::AcpiReset));
        } else if value & SLEEP_ENABLE != 0 && sleep_type == S5_SLEEP_TYPE {
            self.events.request(SystemEvent::Shutdown(Cause::AcpiSleep));
        }
        // Anything else clears status bits that are never set, or asks for a sleep that is not offered.
    }
}

impl BusDevice for AcpiPm {
    fn read(&mut self, _: u16, offset: u64, data: &mut [u8]) {
        // Sleep status: no wake event.
        read_bytes(offset, data, |offset| if offset == 0 { 0 } else { 0xff });
    }

    fn write(&mut self, _: u16, offset: u64, data: &[u8]) {
        write_bytes(offset, data, |offset, value| {
            if offset == 0 {
                self.write_control(value);
            }
        });
    }
}

impl Metered for AcpiPm {}

impl RegisterFile for AcpiPm {
    fn pause(&mut self) {}

    fn resume(&mut self) {}

    fn reset(&mut self) {}
}

impl SaveState for AcpiPm {
    type State = NoState;

    fn save(&self) -> NoState {
        let Self { events: _ } = self;
        NoState {}
    }

    fn restore(&mut self, state: NoState) -> Result<(), RecordError> {
        let NoState {} = state;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use vmm_device_model::recipe::Recipe;
    use vmm_device_model::testing::{TestResources, fuzz_registers, save_reset_restore};
    use vmm_fuzzing::rounds;

    use super::*;
    use crate::testing::TestEvents;

    #[test]
    fn reset_and_s5_and_nothing_else() {
        let events = Arc::<TestEvents>::default();
        let mut device = AcpiPm::new(events.clone());
        for value in 0..=255_u8 {
            device.write(0, 0, &[value]);
            let expected = match value {
                1 => vec![SystemEvent::Reset(Cause::AcpiReset)],
                // Sleep type 5 and enable, whatever the reserved bits are.
                _ if value & 0x3c == 0x34 => vec![SystemEvent::Shutdown(Cause::AcpiSleep)],
                _ => vec![],
            };
            assert_eq!(events.take(), expected, "{value:#x}");
        }
        device.write(0, 1, &[1]);
        assert_eq!(events.take(), []);
    }

    #[test]
    fn built_from_its_recipe() {
        let mut resources = TestResources::new(0x1000).unwrap();
        let events = Arc::<TestEvents>::default();
        let mut device = Box::new(AcpiPm::recipe("_acpi_pm", events.clone())).build(&mut resources).unwrap();
        save_reset_restore(&mut *device).unwrap();
        resources.pio.write(0x3c0, &[0x34]);
        assert_eq!(events.take(), [SystemEvent::Shutdown(Cause::AcpiSleep)]);
        let mut data = [0xff];
        assert!(resources.pio.read(0x3c0, &mut data));
        assert_eq!(data, [0]);
    }

    #[test]
    fn fuzz_any_access() {
        fuzz_registers(&Mutex::new(AcpiPm::new(Arc::<TestEvents>::default())), 0, 4, rounds(100), 5);
    }
}
