//! CMOS memory and its real-time clock (Motorola MC146818A data sheet).
//!
//! The clock shows the host's UTC. It cannot be set: writes to it are dropped, for the host's clock is the
//! better one. Alarms and periodic interrupts are not wired.

use std::sync::Arc;
use std::time::Duration;

use vmm_device_model::bus::BusDevice;
use vmm_device_model::device::SaveState;
use vmm_device_model::metrics::Metered;
use vmm_snapshot::RecordError;

use crate::clock::Clock;
use crate::registers::{Placed, RegisterFile, Window, read_bytes, write_bytes};

/// Port that selects a byte; the next one is the byte.
pub const CMOS_PORT: u16 = 0x70;
/// Number of ports.
pub const CMOS_LEN: u16 = 2;
const SIZE: usize = 128;

const SECONDS: u8 = 0x00;
const MINUTES: u8 = 0x02;
const HOURS: u8 = 0x04;
const DAY_OF_WEEK: u8 = 0x06;
const DAY_OF_MONTH: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
const STATUS_C: u8 = 0x0c;
const STATUS_D: u8 = 0x0d;
/// Where the FADT of PCs puts the century.
const CENTURY: u8 = 0x32;

/// Divider for a crystal of 32768 Hz, periodic rate 1024 Hz.
const A_DEFAULT: u8 = 0x26;
const A_UPDATING: u8 = 0x80;
const B_24_HOURS: u8 = 0x02;
const B_BINARY: u8 = 0x04;
/// The guest is setting the clock: no update goes on.
const B_SET: u8 = 0x80;
/// Memory and time are valid.
const D_VALID: u8 = 0x80;
/// The clock says "updating" for so long before each second (tBUC of the data sheet).
const UPDATE_NOTICE: Duration = Duration::from_micros(244);

/// The guest's RAM, as firmware asks CMOS for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RamSize {
    /// Bytes below 4 GiB.
    pub below_4g: u64,
    /// Bytes from 4 GiB up.
    pub above_4g: u64,
}

/// CMOS memory with a real-time clock.
#[derive(Debug)]
pub struct Cmos {
    utc: Arc<dyn Clock>,
    /// Content after power-on.
    power_on: [u8; SIZE],
    bytes: [u8; SIZE],
    index: u8,
}

impl Cmos {
    /// With the time of `utc`, counted from 1970-01-01, and the size registers saying `ram`.
    pub fn new(utc: Arc<dyn Clock>, ram: RamSize) -> Self {
        let power_on = power_on(ram);
        Self { utc, power_on, bytes: power_on, index: 0 }
    }

    /// Recipe of the device at its usual ports.
    pub fn recipe(id: impl Into<String>, utc: Arc<dyn Clock>, ram: RamSize) -> Placed<Self> {
        Placed::new(id, Window::Pio { base: CMOS_PORT, len: CMOS_LEN }, Self::new(utc, ram))
    }

    fn byte(&self, index: u8) -> u8 {
        self.bytes.get(usize::from(index)).copied().unwrap_or(0xff)
    }

    fn read_byte(&self) -> u8 {
        let now = || Civil::at(self.utc.now().as_secs());
        match self.index {
            SECONDS => self.number(now().second),
            MINUTES => self.number(now().minute),
            HOURS => self.hour(now().hour),
            DAY_OF_WEEK => self.number(now().weekday),
            DAY_OF_MONTH => self.number(now().day),
            MONTH => self.number(now().month),
            YEAR => self.number((now().year % 100) as u8),
            CENTURY => self.number((now().year / 100) as u8),
            STATUS_A => self.byte(STATUS_A) & !A_UPDATING | self.updating(),
            STATUS_C => 0,
            STATUS_D => D_VALID,
            index => self.byte(index),
        }
    }

    /// A number of at most two digits in the mode that the guest chose.
    fn number(&self, value: u8) -> u8 {
        if self.byte(STATUS_B) & B_BINARY != 0 { value } else { ((value / 10) << 4) | (value % 10) }
    }

    fn hour(&self, hour: u8) -> u8 {
        if self.byte(STATUS_B) & B_24_HOURS != 0 {
            return self.number(hour);
        }
        let afternoon = if hour >= 12 { 0x80 } else { 0 };
        let hour = if hour.is_multiple_of(12) { 12 } else { hour % 12 };
        self.number(hour) | afternoon
    }

    fn updating(&self) -> u8 {
        let second = Duration::from_secs(1);
        let within = Duration::from_nanos(self.utc.now().subsec_nanos().into());
        let soon = within >= second.saturating_sub(UPDATE_NOTICE);
        if soon && self.byte(STATUS_B) & B_SET == 0 { A_UPDATING } else { 0 }
    }

    fn write_byte(&mut self, value: u8) {
        let stored = match self.index {
            SECONDS | MINUTES | HOURS | DAY_OF_WEEK..=YEAR | CENTURY | STATUS_C | STATUS_D => return,
            STATUS_A => value & !A_UPDATING,
            _ => value,
        };
        if let Some(byte) = self.bytes.get_mut(usize::from(self.index)) {
            *byte = stored;
        }
    }
}

/// The size registers that firmware reads.
fn power_on(ram: RamSize) -> [u8; SIZE] {
    const KIB: u64 = 1 << 10;
    const MIB: u64 = 1 << 20;
    const BASE_KIB: u64 = 640;
    /// Unit of the size registers above 16 MiB and 4 GiB.
    const BLOCK: u64 = 64 * KIB;
    let base = BASE_KIB.min(ram.below_4g / KIB);
    let extended = (ram.below_4g.saturating_sub(MIB) / KIB).min(0xffff);
    let above_16m = (ram.below_4g.saturating_sub(16 * MIB) / BLOCK).min(0xffff);
    let above_4g = (ram.above_4g / BLOCK).min(0xff_ffff);

    let mut bytes = [0; SIZE];
    let mut set = |index: usize, value: u64, len: usize| {
        for (byte, value) in bytes.iter_mut().skip(index).take(len).zip(value.to_le_bytes()) {
            *byte = value;
        }
    };
    set(usize::from(STATUS_A), A_DEFAULT.into(), 1);
    set(usize::from(STATUS_B), B_24_HOURS.into(), 1);
    set(0x15, base, 2);
    set(0x17, extended, 2);
    set(0x30, extended, 2);
    set(0x34, above_16m, 2);
    set(0x5b, above_4g, 3);
    bytes
}

impl BusDevice for Cmos {
    fn read(&mut self, _: u16, offset: u64, data: &mut [u8]) {
        // The selecting port cannot be read.
        read_bytes(offset, data, |port| if port == 1 { self.read_byte() } else { 0xff });
    }

    fn write(&mut self, _: u16, offset: u64, data: &[u8]) {
        write_bytes(offset, data, |port, value| match port {
            // Bit 7 of the selecting port masks NMIs: there are none.
            0 => self.index = value & 0x7f,
            1 => self.write_byte(value),
            _ => {}
        });
    }
}

impl Metered for Cmos {}

impl RegisterFile for Cmos {
    fn pause(&mut self) {}

    fn resume(&mut self) {}

    fn reset(&mut self) {
        self.bytes = self.power_on;
        self.index = 0;
    }
}

/// Saved state of [`Cmos`]. The time is not part of it: that is the host's.
#[derive(Debug, Clone, PartialEq, Eq, minicbor::Encode, minicbor::Decode)]
pub struct CmosV1 {
    /// Selected byte, below 128.
    #[n(0)]
    pub index: u8,
    /// The 128 bytes.
    #[cbor(n(1), with = "minicbor::bytes")]
    pub bytes: Vec<u8>,
}

vmm_snapshot::schema!(CmosV1: "cmos" v1);

impl SaveState for Cmos {
    type State = CmosV1;

    fn save(&self) -> CmosV1 {
        let Self { utc: _, power_on: _, bytes, index } = self;
        CmosV1 { index: *index, bytes: bytes.to_vec() }
    }

    fn restore(&mut self, state: CmosV1) -> Result<(), RecordError> {
        let CmosV1 { index, bytes } = state;
        let invalid = RecordError::invalid::<CmosV1>;
        if usize::from(index) >= SIZE {
            return Err(invalid(format!("index {index} is not below {SIZE}")));
        }
        self.bytes = bytes.try_into().map_err(|bytes: Vec<u8>| {
            invalid(format!("bytes: there are {}, expected {SIZE}", bytes.len()))
        })?;
        self.index = index;
        Ok(())
    }
}

/// A point in time of the Gregorian calendar.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Civil {
    year: u64,
    /// 1 to 12.
    month: u8,
    /// 1 to 31.
    day: u8,
    /// 1 to 7, from Sunday.
    weekday: u8,
    hour: u8,
    minute: u8,
    second: u8,
}

impl Civil {
    /// `seconds` after the start of 1970.
    fn at(seconds: u64) -> Self {
        const DAY: u64 = 86_400;
        let (days, within) = (seconds / DAY, seconds % DAY);
        let (year, month, day) = date(days);
        // 1970-01-01 was a Thursday.
        let weekday = ((days + 4) % 7 + 1) as u8;
        Self {
            year,
            month,
            day,
            weekday,
            hour: (within / 3600) as u8,
            minute: (within / 60 % 60) as u8,
            second: (within % 60) as u8,
        }
    }
}

/// Year, month and day of a day counted from 1970-01-01.
///
/// Years are counted from March, so that the leap day is the last of its year, and in eras of 400 years,
/// which all have the same number of days.
fn date(days: u64) -> (u64, u8, u8) {
    const ERA: u64 = 146_097;
    /// From 0000-03-01 to 1970-01-01.
    const BEFORE_1970: u64 = 719_468;
    let days = days + BEFORE_1970;
    let (era, day_of_era) = (days / ERA, days % ERA);
    let leap_days = day_of_era / 1460 + day_of_era / (ERA - 1) - day_of_era / 36_524;
    let year_of_era = (day_of_era - leap_days) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    // Months from March have 31, 30, 31, 30, 31 days, over and over: 153 days per five months.
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    (year, month as u8, day as u8)
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use vmm_device_model::recipe::Recipe;
    use vmm_device_model::testing::{TestResources, fuzz_registers, save_reset_restore};
    use vmm_fuzzing::rounds;

    use super::*;
    use crate::testing::TestClock;

    const GIB: u64 = 1 << 30;
    const RAM: RamSize = RamSize { below_4g: 3 * GIB, above_4g: 5 * GIB };

    fn cmos(seconds: u64) -> (Arc<TestClock>, Cmos) {
        let clock = Arc::new(TestClock::new(Duration::from_secs(seconds)));
        (clock.clone(), Cmos::new(clock, RAM))
    }

    fn read(cmos: &mut Cmos, index: u8) -> u8 {
        let mut data = [0xff];
        cmos.write(0, 0, &[index]);
        cmos.read(0, 1, &mut data);
        data[0]
    }

    fn write(cmos: &mut Cmos, index: u8, value: u8) {
        cmos.write(0, 0, &[index]);
        cmos.write(0, 1, &[value]);
    }

    fn time(cmos: &mut Cmos) -> [u8; 8] {
        [CENTURY, YEAR, MONTH, DAY_OF_MONTH, HOURS, MINUTES, SECONDS, DAY_OF_WEEK]
            .map(|index| read(cmos, index))
    }

    #[test]
    fn known_moments() {
        // From date(1): Thursday, Tuesday (leap day), Friday, Monday.
        for (seconds, expected) in [
            (0, [0x19, 0x70, 1, 1, 0, 0, 0, 5]),
            (951_827_696, [0x20, 0x00, 2, 0x29, 0x12, 0x34, 0x56, 3]),
            (1_767_225_599, [0x20, 0x25, 0x12, 0x31, 0x23, 0x59, 0x59, 4]),
            (4_107_542_400, [0x21, 0x00, 3, 1, 0, 0, 0, 2]),
        ] {
            assert_eq!(time(&mut cmos(seconds).1), expected, "{seconds}");
        }
    }

    #[test]
    fn every_day_follows_the_one_before() {
        let mut last = (1969, 12, 31);
        for days in 0..150_000 {
            let (year, month, day) = date(days);
            let leap = year.is_multiple_of(4) && !year.is_multiple_of(100) || year.is_multiple_of(400);
            let previous_month_days = match month {
                1 | 2 | 4 | 6 | 8 | 9 | 11 => 31,
                3 if leap => 29,
                3 => 28,
                _ => 30,
            };
            let expected = match (month, day) {
                (1, 1) => (year - 1, 12, 31),
                (_, 1) => (year, month - 1, previous_month_days),
                _ => (year, month, day - 1),
            };
            assert_eq!(last, expected, "day {days}");
            last = (year, month, day);
        }
        // Far beyond any clock: no overflow.
        date(u64::MAX / 86_400);
    }

    #[test]
    fn modes() {
        // 1970-01-01 23:59:58.
        let (clock, mut cmos) = cmos(86_398);
        write(&mut cmos, STATUS_B, B_24_HOURS | B_BINARY);
        assert_eq!(time(&mut cmos), [19, 70, 1, 1, 23, 59, 58, 5]);
        write(&mut cmos, STATUS_B, B_BINARY);
        assert_eq!(read(&mut cmos, HOURS), 0x80 | 11);
        write(&mut cmos, STATUS_B, 0);
        assert_eq!(read(&mut cmos, HOURS), 0x91);
        for (hour, expected) in [(0, 0x12), (1, 0x01), (11, 0x11), (12, 0x92), (13, 0x81)] {
            clock.set(Duration::from_secs(hour * 3600));
            assert_eq!(read(&mut cmos, HOURS), expected, "hour {hour}");
        }
    }

    #[test]
    fn update_is_announced_just_before_the_second() {
        let (clock, mut cmos) = cmos(0);
        for (nanos, expected) in [
            (0, A_DEFAULT),
            (999_755_999, A_DEFAULT),
            (999_756_000, A_DEFAULT | A_UPDATING),
            (999_999_999, A_DEFAULT | A_UPDATING),
            (1_000_000_000, A_DEFAULT),
        ] {
            clock.set(Duration::from_nanos(nanos));
            assert_eq!(read(&mut cmos, STATUS_A), expected, "{nanos}");
        }
        clock.set(Duration::from_nanos(999_999_999));
        write(&mut cmos, STATUS_B, B_SET | B_24_HOURS);
        assert_eq!(read(&mut cmos, STATUS_A), A_DEFAULT);
    }

    #[test]
    fn the_clock_cannot_be_set() {
        let (_, mut cmos) = cmos(951_827_696);
        let before = time(&mut cmos);
        for index in [SECONDS, MINUTES, HOURS, DAY_OF_WEEK, DAY_OF_MONTH, MONTH, YEAR, CENTURY] {
            write(&mut cmos, index, 0x11);
        }
        write(&mut cmos, STATUS_D, 0);
        assert_eq!(time(&mut cmos), before);
        assert_eq!((read(&mut cmos, STATUS_C), read(&mut cmos, STATUS_D)), (0, D_VALID));
    }

    #[test]
    fn size_registers() {
        let (_, mut cmos) = cmos(0);
        let mut word = |index: u8, len: u8| {
            (0..len).rev().fold(0_u64, |value, i| value << 8 | u64::from(read(&mut cmos, index + i)))
        };
        assert_eq!(word(0x15, 2), 640);
        assert_eq!(word(0x17, 2), 0xffff);
        assert_eq!(word(0x30, 2), 0xffff);
        assert_eq!(word(0x34, 2), (3 * GIB - (16 << 20)) >> 16);
        assert_eq!(word(0x5b, 3), (5 * GIB) >> 16);
    }

    #[test]
    fn sizes_of_extreme_machines_saturate() {
        let tiny = power_on(RamSize { below_4g: 64 << 10, above_4g: 0 });
        assert_eq!((tiny[0x15], tiny[0x17], tiny[0x34]), (64, 0, 0));
        let huge = power_on(RamSize { below_4g: u64::MAX, above_4g: u64::MAX });
        assert_eq!(huge[0x34..0x36], [0xff; 2]);
        assert_eq!(huge[0x5b..0x5e], [0xff; 3]);
    }

    #[test]
    fn memory_is_kept_and_a_wide_write_selects_and_stores() {
        let (_, mut cmos) = cmos(0);
        cmos.write(0, 0, &[0x8f, 0x0a]);
        assert_eq!(read(&mut cmos, 0x0f), 0x0a);
        write(&mut cmos, 0x7f, 0x5a);
        assert_eq!(read(&mut cmos, 0xff), 0x5a, "bit 7 selects nothing");
        let mut data = [0];
        cmos.read(0, 0, &mut data);
        assert_eq!(data, [0xff]);
    }

    #[test]
    fn impossible_state_is_refused() {
        let (_, mut cmos) = cmos(0);
        let good = cmos.save();
        cmos.restore(CmosV1 { index: 128, ..good.clone() }).unwrap_err();
        for len in [0, 127, 129] {
            cmos.restore(CmosV1 { bytes: vec![0; len], ..good.clone() }).unwrap_err();
        }
        assert_eq!(cmos.save(), good);
    }

    #[test]
    fn survives_save_reset_restore() {
        let mut resources = TestResources::new(0x1000).unwrap();
        let clock = Arc::<TestClock>::default();
        let mut device = Box::new(Cmos::recipe("_cmos", clock, RAM)).build(&mut resources).unwrap();
        resources.pio.write(0x70, &[0x40]);
        resources.pio.write(0x71, &[0x12]);
        save_reset_restore(&mut *device).unwrap();
        let mut data = [0];
        resources.pio.read(0x71, &mut data);
        assert_eq!(data, [0x12]);
    }

    #[test]
    fn fuzz_any_access() {
        fuzz_registers(&Mutex::new(cmos(0).1), 0, 4, rounds(1000), 10);
    }
}
