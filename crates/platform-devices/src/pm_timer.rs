//! The ACPI power management timer: a counter of 32 bits at 3.579545 MHz (ACPI 6.5, section 4.8.3.3).

use std::sync::Arc;
use std::time::Duration;

use vmm_device_model::bus::BusDevice;
use vmm_device_model::device::SaveState;
use vmm_device_model::metrics::Metered;
use vmm_snapshot::RecordError;

use crate::clock::Clock;
use crate::registers::{Placed, RegisterFile, Window, read_value};

/// The port that the ACPI tables name.
pub const PM_TIMER_PORT: u16 = 0xb008;
/// Number of ports.
pub const PM_TIMER_LEN: u16 = 4;
/// Ticks per second.
pub const PM_TIMER_HZ: u32 = 3_579_545;

/// The power management timer. It reads the same while the VM is paused, and then shows that time has passed, as the TSC and the
/// paravirtual clock do: guests compare them.
#[derive(Debug)]
pub struct PmTimer {
    clock: Arc<dyn Clock>,
    /// The counter at `since`.
    counter: u32,
    since: Duration,
    paused: bool,
}

impl PmTimer {
    /// Counts from 0 from now on; `clock` is monotonic.
    pub fn new(clock: Arc<dyn Clock>) -> Self {
        let since = clock.now();
        Self { clock, counter: 0, since, paused: false }
    }

    /// Recipe of the timer at [`PM_TIMER_PORT`].
    pub fn recipe(id: impl Into<String>, clock: Arc<dyn Clock>) -> Placed<Self> {
        Placed::new(id, Window::Pio { base: PM_TIMER_PORT, len: PM_TIMER_LEN }, Self::new(clock))
    }

    fn counter(&self) -> u32 {
        if self.paused {
            return self.counter;
        }
        self.counter.wrapping_add(ticks(self.clock.now().saturating_sub(self.since)))
    }
}

/// The counter wraps: the low 32 bits are the counter.
fn ticks(time: Duration) -> u32 {
    (time.as_nanos().saturating_mul(PM_TIMER_HZ.into()) / NANOS_PER_SECOND) as u32
}

const NANOS_PER_SECOND: u128 = 1_000_000_000;

impl BusDevice for PmTimer {
    fn read(&mut self, _: u16, offset: u64, data: &mut [u8]) {
        read_value(self.counter().into(), offset, data);
    }

    fn write(&mut self, _: u16, _: u64, _: &[u8]) {}
}

impl Metered for PmTimer {}

impl RegisterFile for PmTimer {
    fn pause(&mut self) {
        self.counter = self.counter();
        if !self.paused {
            self.since = self.clock.now();
        }
        self.paused = true;
    }

    fn resume(&mut self) {
        self.paused = false;
    }

    fn reset(&mut self) {
        (self.counter, self.since) = (0, self.clock.now());
    }
}

/// Saved state of [`PmTimer`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, minicbor::Encode, minicbor::Decode)]
pub struct PmTimerV1 {
    /// The counter; it goes on from there.
    #[n(0)]
    pub counter: u32,
}

vmm_snapshot::schema!(PmTimerV1: "pm-timer" v1);

impl PmTimerV1 {
    /// The state of a timer that went on for so long.
    #[must_use]
    pub fn after(self, time: Duration) -> Self {
        Self { counter: self.counter.wrapping_add(ticks(time)) }
    }
}

impl SaveState for PmTimer {
    type State = PmTimerV1;

    fn save(&self) -> PmTimerV1 {
        let Self { clock: _, counter: _, since: _, paused: _ } = self;
        PmTimerV1 { counter: self.counter() }
    }

    fn restore(&mut self, state: PmTimerV1) -> Result<(), RecordError> {
        let PmTimerV1 { counter } = state;
        (self.counter, self.since) = (counter, self.clock.now());
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
    use crate::testing::TestClock;

    fn read(timer: &mut PmTimer) -> u32 {
        let mut data = [0xff; 4];
        timer.read(0, 0, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn counts_at_its_frequency_and_wraps() {
        let clock = Arc::<TestClock>::default();
        let mut timer = PmTimer::new(clock.clone());
        assert_eq!(read(&mut timer), 0);
        clock.set(Duration::from_millis(100));
        assert_eq!(read(&mut timer), 357_954);
        clock.set(Duration::from_secs(1));
        assert_eq!(read(&mut timer), PM_TIMER_HZ);
        clock.set(Duration::from_secs(1200));
        assert_eq!(read(&mut timer), (1200_u64 * 3_579_545 % (1 << 32)) as u32);
        clock.set(Duration::MAX);
        read(&mut timer);
    }

    #[test]
    fn narrow_reads_see_their_bytes() {
        let clock = Arc::<TestClock>::default();
        let mut timer = PmTimer::new(clock.clone());
        timer.counter = 0x4433_2211;
        let mut two = [0; 2];
        timer.read(0, 2, &mut two);
        assert_eq!(two, [0x33, 0x44]);
        timer.write(0, 0, &[0; 4]);
        assert_eq!(read(&mut timer), 0x4433_2211);
    }

    #[test]
    fn reads_the_same_while_paused_and_then_shows_the_time_that_passed() {
        let clock = Arc::<TestClock>::default();
        let mut timer = PmTimer::new(clock.clone());
        clock.set(Duration::from_secs(1));
        timer.pause();
        clock.set(Duration::from_secs(50));
        assert_eq!(read(&mut timer), PM_TIMER_HZ);
        let saved = timer.save();

        timer.pause();
        timer.resume();
        timer.resume();
        assert_eq!(read(&mut timer), 50 * PM_TIMER_HZ);

        let mut other = PmTimer::new(clock.clone());
        clock.set(Duration::from_secs(60));
        other.pause();
        other.restore(saved).unwrap();
        assert_eq!(read(&mut other), PM_TIMER_HZ);
        other.restore(saved.after(Duration::from_secs(10))).unwrap();
        assert_eq!(read(&mut other), 11 * PM_TIMER_HZ);
        clock.set(Duration::from_secs(61));
        other.resume();
        assert_eq!(read(&mut other), 12 * PM_TIMER_HZ, "it goes on from the restore");
    }

    #[test]
    fn survives_save_reset_restore() {
        let mut resources = TestResources::new(0x1000).unwrap();
        let clock = Arc::<TestClock>::default();
        let mut device = Box::new(PmTimer::recipe("_pm_timer", clock.clone())).build(&mut resources).unwrap();
        clock.set(Duration::from_secs(1));
        save_reset_restore(&mut *device).unwrap();
        let mut data = [0; 4];
        assert!(resources.pio.read(0xb008, &mut data));
        assert_eq!(u32::from_le_bytes(data), PM_TIMER_HZ);
    }

    #[test]
    fn fuzz_any_access() {
        let clock = Arc::<TestClock>::default();
        fuzz_registers(&Mutex::new(PmTimer::new(clock)), 0, 16, rounds(50), 6);
    }
}
