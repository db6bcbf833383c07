//! The serial port: a 16550A, whose registers are `vm-superio`'s.
//!
//! Output goes byte by byte to a [`ByteSink`], input comes through a [`SerialInput`] as far as the receive
//! FIFO has room and the guest wants it: a driver that has opened the port (DTR) and takes RTS back is sent nothing, as by
//! the other end of a cable with hardware flow control.

use std::convert::Infallible;
use std::fmt;
use std::io::{self, Write};
use std::sync::{Arc, Mutex};

use vm_superio::serial::{NoEvents, Serial as Uart};
use vm_superio::{SerialState, Trigger};
use vmm_device_model::bus::BusDevice;
use vmm_device_model::device::{SaveState, VmDevice};
use vmm_device_model::interrupt::InterruptLine;
use vmm_device_model::metrics::{ConsoleCounter, Measures, Metered};
use vmm_device_model::recipe::{BuildError, Recipe, Resources};
use vmm_snapshot::RecordError;

use crate::output::{ByteSink, Notify};
use crate::registers::{Late, RegisterFile, Registers, Window, lock, read_bytes, write_bytes};

/// First port of COM1.
pub const COM1_PORT: u16 = 0x3f8;
/// Number of ports.
pub const SERIAL_LEN: u16 = 8;
/// Interrupt of COM1.
pub const COM1_GSI: u32 = 4;
/// Bytes of the receive FIFO.
const FIFO: usize = 64;

const IER: u8 = 1;
const IIR: u8 = 2;
const MCR: u8 = 4;
const MCR_DTR: u8 = 1;
const MCR_RTS: u8 = 1 << 1;
const MCR_LOOP: u8 = 1 << 4;

/// A 16550A.
pub struct Serial {
    uart: Uart<Edge, NoEvents, Out>,
    line: Arc<dyn InterruptLine>,
    sink: Arc<dyn ByteSink>,
    room: Arc<dyn Notify>,
    /// Input was refused: whoever has it waits for `room`. Not saved: a new process has its own input.
    starved: bool,
    counts: Arc<ConsoleCounter>,
}

impl Serial {
    /// A port after power-on. It pulses `line`, writes to `sink`, and notifies `room` when input that was
    /// refused may be tried again.
    pub fn new(line: Arc<dyn InterruptLine>, sink: Arc<dyn ByteSink>, room: Arc<dyn Notify>) -> Self {
        let counts = Arc::<ConsoleCounter>::default();
        let out = Out { sink: Arc::clone(&sink), counts: Arc::clone(&counts) };
        let uart = Uart::new(Edge(Arc::clone(&line)), out);
        Self { uart, line, sink, room, starved: false, counts }
    }

    fn enqueue(&mut self, bytes: &[u8]) -> usize {
        let taken = if self.holds() { 0 } else { self.uart.enqueue_raw_bytes(bytes).unwrap_or(0) };
        self.starved |= taken < bytes.len();
        self.counts.input.add(taken as u64);
        taken
    }

    /// Whether the guest wants no input now. Without DTR nothing is held back: not every program sets the lines.
    fn holds(&mut self) -> bool {
        let control = self.uart.read(MCR);
        control & MCR_LOOP != 0 || control & (MCR_DTR | MCR_RTS) == MCR_DTR
    }

    /// Tells who waits once the guest took all that was there: a driver reads in bursts.
    fn feed(&mut self) {
        if self.starved && self.uart.fifo_capacity() == FIFO && !self.holds() {
            self.starved = false;
            self.room.notify();
        }
    }

    /// What interrupts the driver: input as long as there is some, then the empty transmitter, which is told once.
    ///
    /// `vm-superio` forgets input when this register or one byte is read, and tells two causes at once, which means a third one. A
    /// driver that looks here again, as Linux does after 256 bytes, would leave the rest unread for ever.
    fn identify(&mut self) -> u8 {
        let told = self.uart.read(IIR);
        let SerialState { interrupt_enable, line_control, .. } = self.uart.state();
        let input = self.uart.fifo_capacity() < FIFO && interrupt_enable & IER_DATA != 0;
        let empty = told & IIR_THR_EMPTY != 0;
        if input && empty && line_control & LCR_DLAB == 0 {
            // Reading took it; this gives it back.
            let _ = self.uart.write(IER, interrupt_enable);
        }
        IIR_FIFO
            | match (input, empty) {
                (true, _) => IIR_DATA,
                (false, true) => IIR_THR_EMPTY,
                (false, false) => IIR_NONE,
            }
    }

    fn uart_of(&self, state: &SerialState) -> Option<Uart<Edge, NoEvents, Out>> {
        let line = Edge(Arc::clone(&self.line));
        let out = Out { sink: Arc::clone(&self.sink), counts: Arc::clone(&self.counts) };
        Uart::from_state(state, line, NoEvents, out).ok()
    }
}

impl fmt::Debug for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Not the FIFO: what a user types is nobody's business.
        f.debug_struct("Serial").field("starved", &self.starved).finish_non_exhaustive()
    }
}

impl BusDevice for Serial {
    fn read(&mut self, _: u16, offset: u64, data: &mut [u8]) {
        read_bytes(offset, data, |offset| match u8::try_from(offset) {
            Ok(IIR) => self.identify(),
            Ok(register @ 0..8) => self.uart.read(register),
            _ => 0xff,
        });
        self.feed();
    }

    fn write(&mut self, _: u16, offset: u64, data: &[u8]) {
        write_bytes(offset, data, |offset, value| {
            if let Ok(register @ 0..8) = u8::try_from(offset) {
                // Neither the line nor the sink can fail.
                let _ = self.uart.write(register, value);
            }
        });
        self.feed();
    }
}

impl Metered for Serial {
    fn measure(&self, measures: &mut Measures) {
        self.counts.measure(measures);
    }
}

impl RegisterFile for Serial {
    fn pause(&mut self) {}

    fn resume(&mut self) {
        let SerialState { interrupt_enable, interrupt_identification, in_buffer, .. } = self.uart.state();
        let input = !in_buffer.is_empty() && interrupt_enable & IER_DATA != 0;
        if input || interrupt_identification & IIR_THR_EMPTY != 0 && interrupt_enable & IER_THR_EMPTY != 0 {
            // An edge from before a restore may be lost; one too many hurts nobody.
            self.line.pulse();
        }
    }

    fn reset(&mut self) {
        if let Some(uart) = self.uart_of(&SerialState::default()) {
            self.uart = uart;
        }
        self.feed();
    }
}

/// Nothing pending, in the interrupt identification register.
const IIR_NONE: u8 = 1;
/// Transmitter empty, there.
const IIR_THR_EMPTY: u8 = 2;
/// Data received, there.
const IIR_DATA: u8 = 4;
/// There are FIFOs, and they are on; there.
const IIR_FIFO: u8 = 0xc0;
/// What can stand in that register: nothing pending, or what is.
const IIR_VALUES: [u8; 4] = [IIR_NONE, IIR_THR_EMPTY, IIR_DATA, IIR_THR_EMPTY | IIR_DATA];
/// The bits of the interrupt enable register.
const IER_BITS: u8 = 0x0f;
/// Interrupt when there is data, in the interrupt enable register.
const IER_DATA: u8 = 1;
/// Interrupt when the transmitter is empty, there.
const IER_THR_EMPTY: u8 = 1 << 1;
/// The first two registers are the divisor, in the line control register.
const LCR_DLAB: u8 = 1 << 7;
/// Transmitter idle, in the line status register: always so here.
const LSR_IDLE: u8 = 0x60;

/// Saved state of [`Serial`].
#[derive(Clone, PartialEq, Eq, minicbor::Encode, minicbor::Decode)]
pub struct SerialV1 {
    /// Divisor latch, low and high byte.
    #[n(0)]
    pub divisor: [u8; 2],
    /// Interrupt enable register.
    #[n(1)]
    pub interrupt_enable: u8,
    /// Interrupt identification register without its FIFO bits.
    #[n(2)]
    pub interrupt_identification: u8,
    /// Line control register.
    #[n(3)]
    pub line_control: u8,
    /// Line status register.
    #[n(4)]
    pub line_status: u8,
    /// Modem control register.
    #[n(5)]
    pub modem_control: u8,
    /// Modem status register.
    #[n(6)]
    pub modem_status: u8,
    /// Scratch register.
    #[n(7)]
    pub scratch: u8,
    /// Receive FIFO, at most 64 bytes.
    #[cbor(n(8), with = "minicbor::bytes")]
    pub input: Vec<u8>,
}

vmm_snapshot::schema!(SerialV1: "serial" v1);

impl fmt::Debug for SerialV1 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SerialV1").field("input_len", &self.input.len()).finish_non_exhaustive()
    }
}

impl SaveState for Serial {
    type State = SerialV1;

    fn save(&self) -> SerialV1 {
        let Self { uart, line: _, sink: _, room: _, starved: _, counts: _ } = self;
        let SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer,
        } = uart.state();
        SerialV1 {
            divisor: [baud_divisor_low, baud_divisor_high],
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            input: in_buffer,
        }
    }

    fn restore(&mut self, state: SerialV1) -> Result<(), RecordError> {
        check(&state)?;
        let SerialV1 {
            divisor: [baud_divisor_low, baud_divisor_high],
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            input,
        } = state;
        let state = SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer: input,
        };
        self.uart = self
            .uart_of(&state)
            .ok_or_else(|| RecordError::invalid::<SerialV1>("input does not fit the FIFO"))?;
        Ok(())
    }
}

fn check(state: &SerialV1) -> Result<(), RecordError> {
    let invalid = RecordError::invalid::<SerialV1>;
    if state.input.len() > FIFO {
        return Err(invalid(format!("input of {} bytes does not fit the FIFO of {FIFO}", state.input.len())));
    }
    if state.interrupt_enable & !IER_BITS != 0 {
        return Err(invalid(format!("interrupt enable {:#x} has reserved bits", state.interrupt_enable)));
    }
    if !IIR_VALUES.contains(&state.interrupt_identification) {
        let found = state.interrupt_identification;
        return Err(invalid(format!("interrupt identification {found:#x} names no interrupt")));
    }
    let data_ready = u8::from(!state.input.is_empty());
    if state.line_status != LSR_IDLE | data_ready {
        let (found, len) = (state.line_status, state.input.len());
        return Err(invalid(format!("line status {found:#x} contradicts {len} bytes of input")));
    }
    Ok(())
}

/// The interrupt of an ISA device: an edge.
struct Edge(Arc<dyn InterruptLine>);

impl Trigger for Edge {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.pulse();
        Ok(())
    }
}

struct Out {
    sink: Arc<dyn ByteSink>,
    counts: Arc<ConsoleCounter>,
}

impl Write for Out {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.sink.put(bytes);
        // Under the port's lock.
        self.counts.output.add(bytes.len() as u64);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Recipe of a serial port.
#[derive(Debug)]
pub struct SerialRecipe {
    id: String,
    port: u16,
    gsi: u32,
    sink: Arc<dyn ByteSink>,
    room: Arc<dyn Notify>,
    device: Late<Serial>,
}

impl SerialRecipe {
    /// A port like COM1, but at ports `port` to `port + 7` and with interrupt `gsi`.
    ///
    /// Its output goes to `sink`. `room` is notified when input that [`SerialInput`] refused may be tried
    /// again.
    pub fn new(
        id: impl Into<String>,
        port: u16,
        gsi: u32,
        sink: Arc<dyn ByteSink>,
        room: Arc<dyn Notify>,
    ) -> Self {
        Self { id: id.into(), port, gsi, sink, room, device: Late::new() }
    }

    /// COM1.
    pub fn com1(id: impl Into<String>, sink: Arc<dyn ByteSink>, room: Arc<dyn Notify>) -> Self {
        Self::new(id, COM1_PORT, COM1_GSI, sink, room)
    }

    /// The way to the port's input, once it is built.
    pub fn input(&self) -> SerialInput {
        SerialInput(self.device.clone())
    }
}

impl<R: Resources + ?Sized> Recipe<R> for SerialRecipe {
    fn id(&self) -> &str {
        &self.id
    }

    fn build(self: Box<Self>, resources: &mut R) -> Result<Box<dyn VmDevice>, BuildError> {
        let Self { id: _, port, gsi, sink, room, device } = *self;
        let line = resources.interrupt_line(gsi)?;
        let serial = Arc::new(Mutex::new(Serial::new(line, sink, room)));
        Window::Pio { base: port, len: SERIAL_LEN }.map(resources, Arc::clone(&serial) as _)?;
        device.set(&serial);
        Ok(Box::new(Registers::new(serial)))
    }
}

/// Sends bytes into a serial port, from any thread.
#[derive(Debug, Clone)]
pub struct SerialInput(Late<Serial>);

impl SerialInput {
    /// Puts as many of `bytes` into the receive FIFO as it takes, and returns how many. The rest stays with
    /// the caller, who tries again when notified. A port that is not built, or gone, takes none and
    /// notifies nobody.
    pub fn enqueue(&self, bytes: &[u8]) -> usize {
        self.0.get().map_or(0, |serial| lock(&serial).enqueue(bytes))
    }
}

#[cfg(test)]
mod tests {
    use vmm_device_model::metrics::Value;
    use vmm_device_model::testing::{TestLine, TestResources, fuzz_registers, save_reset_restore};
    use vmm_fuzzing::rounds;

    use super::*;
    use crate::output::{Discard, OutputRing};
    use crate::testing::{TestNotify, TestSink};

    const LSR: u64 = 5;

    struct Rig {
        serial: Serial,
        line: Arc<TestLine>,
        sink: Arc<TestSink>,
        room: Arc<TestNotify>,
    }

    fn rig() -> Rig {
        let (line, sink, room) =
            (Arc::<TestLine>::default(), Arc::<TestSink>::default(), Arc::<TestNotify>::default());
        Rig { serial: Serial::new(line.clone(), sink.clone(), room.clone()), line, sink, room }
    }

    impl Rig {
        fn read(&mut self, register: u64) -> u8 {
            let mut data = [0xff];
            self.serial.read(0, register, &mut data);
            data[0]
        }

        fn write(&mut self, register: u8, value: u8) {
            self.serial.write(0, register.into(), &[value]);
        }
    }

    #[test]
    fn output_reaches_the_sink() {
        let mut rig = rig();
        for byte in b"hello" {
            rig.write(0, *byte);
        }
        assert_eq!(rig.sink.take(), b"hello");
        assert_eq!(rig.line.edges(), 0, "no interrupt is enabled");
        rig.write(IER, 2);
        assert_eq!(rig.line.edges(), 1, "the transmitter is empty");
    }

    #[test]
    fn power_on_values() {
        let mut rig = rig();
        assert_eq!(rig.read(LSR), 0x60);
        assert_eq!(rig.read(2), 0xc1);
        rig.write(3, 0x83);
        assert_eq!((rig.read(0), rig.read(1)), (12, 0));
    }

    #[test]
    fn input_interrupts_and_waits_for_room() {
        let mut rig = rig();
        rig.write(IER, 1);
        assert_eq!(rig.serial.enqueue(&[7; 100]), 64);
        assert_eq!(rig.line.edges(), 1);
        assert_eq!(rig.serial.enqueue(&[8]), 0);
        for left in (0..64).rev() {
            assert_eq!(rig.read(0), 7);
            assert_eq!(rig.room.take(), u64::from(left == 0), "{left} left");
        }
        assert_eq!(rig.read(LSR) & 1, 0);
        assert_eq!(rig.serial.enqueue(&[8]), 1);
        rig.read(0);
        assert_eq!(rig.room.take(), 0, "nobody waits");
    }

    /// What Linux's driver does: it takes 256 bytes at most, and then looks whether there is a cause left.
    #[test]
    fn input_interrupts_until_all_of_it_was_taken() {
        let mut rig = rig();
        rig.write(IER, IER_DATA | IER_THR_EMPTY);
        assert_eq!(rig.read(2), IIR_FIFO | IIR_THR_EMPTY);
        rig.write(0, b'x');
        rig.serial.enqueue(b"abc");
        for byte in b"abc" {
            assert_eq!(rig.read(2), IIR_FIFO | IIR_DATA, "the most urgent, and only that");
            assert_eq!(rig.read(0), *byte);
        }
        assert_eq!(rig.read(2), IIR_FIFO | IIR_THR_EMPTY, "still pending, and told once");
        assert_eq!(rig.read(2), IIR_FIFO | IIR_NONE);
        rig.serial.enqueue(b"d");
        rig.write(IER, 0);
        assert_eq!(rig.read(2), IIR_FIFO | IIR_NONE, "nobody wants to know");
        let before = rig.line.edges();
        rig.write(IER, IER_DATA);
        assert_eq!((rig.line.edges(), rig.read(2)), (before + 1, IIR_FIFO | IIR_DATA));
    }

    #[test]
    fn loop_mode_holds_input_back() {
        let mut rig = rig();
        rig.write(MCR, MCR_LOOP);
        rig.write(0, 0x5a);
        assert_eq!(rig.read(0), 0x5a);
        assert_eq!(rig.sink.take(), b"");
        assert_eq!(rig.serial.enqueue(b"x"), 0);
        rig.write(7, 1);
        assert_eq!(rig.room.take(), 0);
        rig.write(MCR, 0);
        assert_eq!(rig.room.take(), 1);
    }

    #[test]
    fn a_driver_holds_input_back_by_its_lines() {
        let mut rig = rig();
        rig.write(MCR, MCR_DTR | MCR_RTS);
        assert_eq!(rig.serial.enqueue(b"a"), 1);
        rig.write(MCR, MCR_DTR);
        assert_eq!(rig.serial.enqueue(b"b"), 0);
        rig.read(0);
        assert_eq!(rig.room.take(), 0, "there is room, but the driver wants nothing");
        rig.write(MCR, MCR_DTR | MCR_RTS);
        assert_eq!(rig.room.take(), 1);
        assert_eq!(rig.serial.enqueue(b"b"), 1);
        rig.write(MCR, 0);
        assert_eq!(
            rig.serial.enqueue(b"c"),
            1,
            "who closed the port, or never set a line, is sent what comes"
        );
    }

    #[test]
    fn reset_empties_the_fifo_and_feeds() {
        let mut rig = rig();
        rig.serial.enqueue(&[7; 65]);
        rig.write(7, 9);
        rig.serial.reset();
        assert_eq!(rig.room.take(), 1);
        assert_eq!((rig.read(LSR), rig.read(7)), (0x60, 0));
    }

    #[test]
    fn pending_interrupts_survive_a_restore() {
        let mut old = rig();
        old.write(IER, 1);
        old.serial.enqueue(b"ab");
        let saved = old.serial.save();
        let mut new = rig();
        new.serial.restore(saved.clone()).unwrap();
        assert_eq!(new.serial.save(), saved);
        let before = new.line.edges();
        new.serial.resume();
        assert_eq!(new.line.edges(), before + 1);
        assert_eq!((new.read(0), new.read(0)), (b'a', b'b'));
        new.serial.resume();
        assert_eq!(new.line.edges(), before + 1, "nothing is pending");
    }

    #[test]
    fn impossible_state_is_refused() {
        let mut rig = rig();
        let good = rig.serial.save();
        for bad in [
            SerialV1 { interrupt_enable: 0x10, ..good.clone() },
            SerialV1 { interrupt_identification: 0, ..good.clone() },
            SerialV1 { interrupt_identification: 8, ..good.clone() },
            SerialV1 { line_status: 0x61, ..good.clone() },
            SerialV1 { input: vec![0], ..good.clone() },
            SerialV1 { line_status: 0x61, input: vec![0; 65], ..good.clone() },
        ] {
            rig.serial.restore(bad).unwrap_err();
        }
        assert_eq!(rig.serial.save(), good);
        rig.serial.restore(SerialV1 { line_status: 0x61, input: vec![0; 64], ..good }).unwrap();
    }

    #[test]
    fn fuzz_any_access() {
        let device = Mutex::new(rig().serial);
        fuzz_registers(&device, 0, 16, rounds(300), 3);
    }

    #[test]
    fn a_gigabyte_of_output_does_not_grow_memory() {
        // A sample of it: the bound does not depend on the amount.
        let ring = OutputRing::new(1024, Arc::new(Discard));
        let mut serial = Serial::new(Arc::<TestLine>::default(), ring.clone(), Arc::new(Discard));
        for _ in 0..100_000 {
            serial.write(0, 0, b"x");
        }
        assert_eq!(ring.lost(), 100_000 - 1024);
    }

    #[test]
    fn built_from_its_recipe() {
        let mut resources = TestResources::new(0x1000).unwrap();
        let sink = Arc::<TestSink>::default();
        let recipe = Box::new(SerialRecipe::com1("_serial", sink.clone(), Arc::new(Discard)));
        let input = recipe.input();
        assert_eq!(input.enqueue(b"early"), 0);
        let mut device = recipe.build(&mut resources).unwrap();
        assert_eq!(resources.lines[0].0, 4);
        assert_eq!(input.enqueue(b"a"), 1);
        resources.pio.write(0x3f8, b"b");
        assert_eq!(sink.take(), b"b");
        resources.pio.write(0x3ff, &[0x77]);
        save_reset_restore(&mut *device).unwrap();
        let mut data = [0];
        resources.pio.read(0x3f8, &mut data);
        assert_eq!(&data, b"a");
        resources.pio.write(0x3f8, b"c");
        let mut measures = Measures::of_device("_serial");
        device.measure(&mut measures);
        let values: Vec<_> = measures.into_parts().1.into_iter().map(|sample| sample.value).collect();
        assert_eq!(values, [Value::Counter(1), Value::Counter(2)], "in and out, over a reset");
    }
}
