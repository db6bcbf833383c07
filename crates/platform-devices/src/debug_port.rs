//! Ports for who debugs a guest's start: POST codes at 0x80 and a console at 0xe9.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use vmm_device_model::bus::BusDevice;
use vmm_device_model::device::SaveState;
use vmm_device_model::metrics::{ConsoleCounter, Measures, Metered};
use vmm_snapshot::{NoState, RecordError};

use crate::clock::Clock;
use crate::output::{ByteSink, Discard};
use crate::registers::{Placed, RegisterFile, Window, read_bytes, write_bytes};

/// Where PCs take POST codes.
pub const POST_PORT: u16 = 0x80;
/// Where emulators have a debug console.
pub const DEBUG_CONSOLE_PORT: u16 = 0xe9;

/// Who wrote a code, by the range it is from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PostKind {
    /// 0x00 to 0x1f.
    Firmware,
    /// 0x20 to 0x3f.
    Bootloader,
    /// 0x40 to 0x5f.
    Kernel,
    /// 0x60 to 0x7f.
    Userspace,
    /// The rest.
    Custom,
}

impl From<u8> for PostKind {
    fn from(code: u8) -> Self {
        match code {
            0x00..=0x1f => Self::Firmware,
            0x20..=0x3f => Self::Bootloader,
            0x40..=0x5f => Self::Kernel,
            0x60..=0x7f => Self::Userspace,
            0x80..=0xff => Self::Custom,
        }
    }
}

impl fmt::Display for PostKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Firmware => "firmware",
            Self::Bootloader => "bootloader",
            Self::Kernel => "kernel",
            Self::Userspace => "userspace",
            Self::Custom => "custom",
        })
    }
}

/// A code that a guest wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PostCode {
    /// The code.
    pub code: u8,
    /// Since the device was built.
    pub at: Duration,
}

impl PostCode {
    /// Who wrote it.
    pub fn kind(self) -> PostKind {
        self.code.into()
    }
}

/// Takes POST codes. Called by vCPU threads under the device's lock: it never blocks.
pub trait PostCodes: Send + Sync + fmt::Debug {
    /// The guest wrote a code.
    fn post(&self, code: PostCode);
}

impl PostCodes for Discard {
    fn post(&self, _: PostCode) {}
}

/// Takes the codes that a guest posts at 0x80, and logs the first of them at debug level.
#[derive(Debug)]
pub struct PostPort {
    clock: Arc<dyn Clock>,
    built: Duration,
    codes: Arc<dyn PostCodes>,
    /// Lines that may still be logged: guests use this port for delays, too.
    log_budget: u32,
}

/// Codes logged per device and reset.
const LOG_LINES: u32 = 256;

impl PostPort {
    /// Hands codes to `codes` with their time on `clock`, which is monotonic.
    pub fn new(clock: Arc<dyn Clock>, codes: Arc<dyn PostCodes>) -> Self {
        let built = clock.now();
        Self { clock, built, codes, log_budget: LOG_LINES }
    }

    /// Recipe of the port at [`POST_PORT`].
    pub fn recipe(id: impl Into<String>, clock: Arc<dyn Clock>, codes: Arc<dyn PostCodes>) -> Placed<Self> {
        Placed::new(id, Window::Pio { base: POST_PORT, len: 1 }, Self::new(clock, codes))
    }

    fn post(&mut self, code: u8) {
        let post = PostCode { code, at: self.clock.now().saturating_sub(self.built) };
        self.codes.post(post);
        if self.log_budget > 0 {
            self.log_budget -= 1;
            let (kind, micros) = (post.kind(), post.at.as_micros());
            log::debug!("debug port: {kind} code {code:#04x} after {micros} us");
        }
    }
}

impl BusDevice for PostPort {
    fn read(&mut self, _: u16, _: u64, _: &mut [u8]) {}

    fn write(&mut self, _: u16, offset: u64, data: &[u8]) {
        write_bytes(offset, data, |offset, code| {
            if offset == 0 {
                self.post(code);
            }
        });
    }
}

impl Metered for PostPort {}

impl RegisterFile for PostPort {
    fn pause(&mut self) {}

    fn resume(&mut self) {}

    fn reset(&mut self) {
        self.log_budget = LOG_LINES;
    }
}

impl SaveState for PostPort {
    type State = NoState;

    fn save(&self) -> NoState {
        let Self { clock: _, built: _, codes: _, log_budget: _ } = self;
        NoState {}
    }

    fn restore(&mut self, state: NoState) -> Result<(), RecordError> {
        let NoState {} = state;
        Ok(())
    }
}

/// Passes what a guest writes to port 0xe9 on, byte by byte.
#[derive(Debug)]
pub struct DebugConsole {
    sink: Arc<dyn ByteSink>,
    counts: ConsoleCounter,
}

/// What the port reads: how a guest finds out that it is there.
const DEBUG_CONSOLE_HERE: u8 = 0xe9;

impl DebugConsole {
    /// Writes to `sink`.
    pub fn new(sink: Arc<dyn ByteSink>) -> Self {
        Self { sink, counts: ConsoleCounter::default() }
    }

    /// Recipe of the console at `port`, usually [`DEBUG_CONSOLE_PORT`].
    pub fn recipe(id: impl Into<String>, port: u16, sink: Arc<dyn ByteSink>) -> Placed<Self> {
        Placed::new(id, Window::Pio { base: port, len: 1 }, Self::new(sink))
    }
}

impl BusDevice for DebugConsole {
    fn read(&mut self, _: u16, offset: u64, data: &mut [u8]) {
        read_bytes(offset, data, |offset| if offset == 0 { DEBUG_CONSOLE_HERE } else { 0xff });
    }

    fn write(&mut self, _: u16, offset: u64, data: &[u8]) {
        write_bytes(offset, data, |offset, value| {
            if offset == 0 {
                self.sink.put(&[value]);
                self.counts.output.add(1);
            }
        });
    }
}

impl Metered for DebugConsole {
    fn measure(&self, measures: &mut Measures) {
        self.counts.measure(measures);
    }
}

impl RegisterFile for DebugConsole {
    fn pause(&mut self) {}

    fn resume(&mut self) {}

    fn reset(&mut self) {}
}

impl SaveState for DebugConsole {
    type State = NoState;

    fn save(&self) -> NoState {
        let Self { sink: _, counts: _ } = self;
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
    use crate::testing::{TestClock, TestCodes, TestSink};

    #[test]
    fn kinds_by_range() {
        for (code, kind) in [
            (0x00, PostKind::Firmware),
            (0x1f, PostKind::Firmware),
            (0x20, PostKind::Bootloader),
            (0x3f, PostKind::Bootloader),
            (0x40, PostKind::Kernel),
            (0x5f, PostKind::Kernel),
            (0x60, PostKind::Userspace),
            (0x7f, PostKind::Userspace),
            (0x80, PostKind::Custom),
            (0xff, PostKind::Custom),
        ] {
            assert_eq!(PostKind::from(code), kind, "{code:#x}");
        }
    }

    #[test]
    fn codes_carry_the_time_since_the_start() {
        let clock = Arc::new(TestClock::new(Duration::from_secs(5)));
        let codes = Arc::<TestCodes>::default();
        let mut port = PostPort::new(clock.clone(), codes.clone());
        clock.advance(Duration::from_millis(8));
        port.write(0, 0, &[0x41]);
        port.write(0, 1, &[0x42]);
        assert_eq!(codes.take(), [PostCode { code: 0x41, at: Duration::from_millis(8) }]);
    }

    #[test]
    fn the_log_is_bounded_and_the_codes_are_not() {
        let codes = Arc::<TestCodes>::default();
        let mut port = PostPort::new(Arc::<TestClock>::default(), codes.clone());
        for _ in 0..1000 {
            port.write(0, 0, &[0]);
        }
        assert_eq!((port.log_budget, codes.take().len()), (0, 1000));
        port.reset();
        assert_eq!(port.log_budget, LOG_LINES);
    }

    #[test]
    fn built_from_their_recipes() {
        let mut resources = TestResources::new(0x1000).unwrap();
        let (clock, sink) = (Arc::<TestClock>::default(), Arc::<TestSink>::default());
        let post = Box::new(PostPort::recipe("_post", clock.clone(), Arc::new(Discard)));
        let console = Box::new(DebugConsole::recipe("_debug", DEBUG_CONSOLE_PORT, sink.clone()));
        save_reset_restore(&mut *post.build(&mut resources).unwrap()).unwrap();
        save_reset_restore(&mut *console.build(&mut resources).unwrap()).unwrap();
        let mut data = [0];
        resources.pio.read(0xe9, &mut data);
        assert_eq!(data, [0xe9]);
        resources.pio.read(0x80, &mut data);
        assert_eq!(data, [0xff]);
        resources.pio.write(0xe9, b"x");
        assert_eq!(sink.take(), b"x");
    }

    #[test]
    fn fuzz_any_access() {
        fuzz_registers(&Mutex::new(DebugConsole::new(Arc::new(Discard))), 0, 4, rounds(50), 7);
        fuzz_registers(
            &Mutex::new(PostPort::new(Arc::<TestClock>::default(), Arc::new(Discard))),
            0,
            4,
            rounds(50),
            8,
        );
    }
}
