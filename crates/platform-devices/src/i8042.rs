//! What is left of the keyboard controller (Intel 8042): resetting the machine.
//!
//! No keyboard and no mouse is behind it. It says so in the way that costs a guest the least time: its
//! output buffer is never empty, which Linux's probe takes for "no controller found" after 16 reads, while a
//! driver that waits until it may write (bit 1 of the status) never waits. So that a loop that drains the
//! buffer ends as well, it runs dry after a few reads.

use std::sync::Arc;

use vmm_device_model::bus::BusDevice;
use vmm_device_model::device::SaveState;
use vmm_device_model::metrics::Metered;
use vmm_snapshot::RecordError;

use crate::events::{Cause, SystemEvent, SystemEvents};
use crate::registers::{Placed, RegisterFile, Window, read_bytes, write_bytes};

/// First port.
pub const I8042_PORT: u16 = 0x60;
/// Number of ports: data 0x60, system control port B 0x61, status and command 0x64.
pub const I8042_LEN: u16 = 5;

const DATA: u64 = 0;
const PORT_B: u64 = 1;
const COMMAND: u64 = 4;

/// The output buffer holds a byte.
const STATUS_OUTPUT_FULL: u8 = 1 << 0;
/// Pulses the machine's reset line.
const COMMAND_RESET: u8 = 0xfe;
/// Gate of timer 2, speaker: kept, without effect.
const PORT_B_WRITABLE: u8 = 0x03;
/// Output of timer 2: high, so that who waits for it does not wait.
const PORT_B_TIMER: u8 = 1 << 5;
/// Reads after which the output buffer is empty. More than Linux's 16, or it would find a controller.
const STALE_BYTES: u8 = 32;

/// The reset road of a keyboard controller.
#[derive(Debug)]
pub struct I8042 {
    events: Arc<dyn SystemEvents>,
    /// Bytes that the output buffer still pretends to hold.
    stale: u8,
    port_b: u8,
}

impl I8042 {
    /// Posts resets to `events`.
    pub fn new(events: Arc<dyn SystemEvents>) -> Self {
        Self { events, stale: STALE_BYTES, port_b: 0 }
    }

    /// Recipe of the controller at its usual ports.
    pub fn recipe(id: impl Into<String>, events: Arc<dyn SystemEvents>) -> Placed<Self> {
        Placed::new(id, Window::Pio { base: I8042_PORT, len: I8042_LEN }, Self::new(events))
    }

    fn read_port(&mut self, port: u64) -> u8 {
        match port {
            DATA => {
                self.stale = self.stale.saturating_sub(1);
                0xff
            }
            PORT_B => PORT_B_TIMER | self.port_b,
            COMMAND if self.stale > 0 => STATUS_OUTPUT_FULL,
            COMMAND => 0,
            _ => 0xff,
        }
    }
}

impl BusDevice for I8042 {
    fn read(&mut self, _: u16, offset: u64, data: &mut [u8]) {
        read_bytes(offset, data, |port| self.read_port(port));
    }

    fn write(&mut self, _: u16, offset: u64, data: &[u8]) {
        write_bytes(offset, data, |port, value| match (port, value) {
            (COMMAND, COMMAND_RESET) => self.events.request(SystemEvent::Reset(Cause::I8042)),
            (PORT_B, value) => self.port_b = value & PORT_B_WRITABLE,
            _ => {}
        });
    }
}

impl Metered for I8042 {}

impl RegisterFile for I8042 {
    fn pause(&mut self) {}

    fn resume(&mut self) {}

    fn reset(&mut self) {
        self.stale = STALE_BYTES;
        self.port_b = 0;
    }
}

/// Saved state of [`I8042`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, minicbor::Encode, minicbor::Decode)]
pub struct I8042V1 {
    /// Bytes that the output buffer still pretends to hold, at most 32.
    #[n(0)]
    pub stale: u8,
    /// Writable bits of system control port B.
    #[n(1)]
    pub port_b: u8,
}

vmm_snapshot::schema!(I8042V1: "i8042" v1);

impl SaveState for I8042 {
    type State = I8042V1;

    fn save(&self) -> I8042V1 {
        let Self { events: _, stale, port_b } = self;
        I8042V1 { stale: *stale, port_b: *port_b }
    }

    fn restore(&mut self, state: I8042V1) -> Result<(), RecordError> {
        let I8042V1 { stale, port_b } = state;
        let invalid = RecordError::invalid::<I8042V1>;
        if stale > STALE_BYTES {
            return Err(invalid(format!("stale is {stale}, there are at most {STALE_BYTES}")));
        }
        if port_b & !PORT_B_WRITABLE != 0 {
            return Err(invalid(format!("port B {port_b:#x} has reserved bits")));
        }
        self.stale = stale;
        self.port_b = port_b;
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

    fn read(device: &mut I8042, port: u64) -> u8 {
        let mut data = [0xff];
        device.read(0, port, &mut data);
        data[0]
    }

    #[test]
    fn only_the_reset_command_resets() {
        let events = Arc::<TestEvents>::default();
        let mut device = I8042::new(events.clone());
        for port in 0..5 {
            for value in 0..=255 {
                device.write(0, port, &[value]);
                let reset = port == COMMAND && value == 0xfe;
                let expected = if reset { vec![SystemEvent::Reset(Cause::I8042)] } else { vec![] };
                assert_eq!(events.take(), expected, "port {port} value {value:#x}");
            }
        }
    }

    #[test]
    fn linux_finds_no_controller_and_never_waits() {
        let mut device = I8042::new(Arc::<TestEvents>::default());
        // As i8042_flush() does: a buffer that holds 16 bytes is still not empty after 16 reads.
        for _ in 0..16 {
            assert_eq!(read(&mut device, COMMAND), 1);
            assert_eq!(read(&mut device, DATA), 0xff);
        }
        assert_eq!(read(&mut device, COMMAND) & 1, 1);
    }

    #[test]
    fn a_draining_loop_ends() {
        let mut device = I8042::new(Arc::<TestEvents>::default());
        let mut rounds = 0;
        while read(&mut device, COMMAND) & 1 == 1 {
            read(&mut device, DATA);
            rounds += 1;
            assert!(rounds < 100);
        }
    }

    #[test]
    fn port_b_keeps_its_gate_and_shows_no_memory_error() {
        let mut device = I8042::new(Arc::<TestEvents>::default());
        device.write(0, PORT_B, &[0xff]);
        assert_eq!(read(&mut device, PORT_B), 0x23);
        device.reset();
        assert_eq!(read(&mut device, PORT_B), 0x20);
    }

    #[test]
    fn impossible_state_is_refused() {
        let mut device = I8042::new(Arc::<TestEvents>::default());
        device.restore(I8042V1 { stale: 33, port_b: 0 }).unwrap_err();
        device.restore(I8042V1 { stale: 0, port_b: 4 }).unwrap_err();
        device.restore(I8042V1 { stale: 0, port_b: 3 }).unwrap();
    }

    #[test]
    fn survives_save_reset_restore() {
        let mut resources = TestResources::new(0x1000).unwrap();
        let recipe = Box::new(I8042::recipe("_i8042", Arc::<TestEvents>::default()));
        let mut device = recipe.build(&mut resources).unwrap();
        let mut data = [0];
        assert!(resources.pio.read(0x60, &mut data));
        resources.pio.write(0x61, &[1]);
        save_reset_restore(&mut *device).unwrap();
        assert!(resources.pio.read(0x64, &mut data));
    }

    #[test]
    fn fuzz_any_access() {
        fuzz_registers(&Mutex::new(I8042::new(Arc::<TestEvents>::default())), 0, 16, rounds(200), 4);
    }
}
