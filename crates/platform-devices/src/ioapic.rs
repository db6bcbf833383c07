//! The I/O APIC: 24 interrupt pins, each with a redirection entry that says what its interrupt means to the
//! local APICs (Intel 82093AA data sheet; Intel SDM volume 3, "Message Signalled Interrupts").
//!
//! The local APICs live in the hypervisor. This device sends them messages through an [`IoApicTarget`],
//! and learns through [`IoApic::end_of_interrupt`] when a level-triggered interrupt was handled. For that the
//! hypervisor must know which vectors to report: a pin has a *route* exactly while its entry describes a
//! level-triggered interrupt, masked or not, for drivers mask a pin before they end its interrupt.
//!
//! Lock order: a device may drive its line under its own lock, so this device calls no other device
//! ([`EoiListener`]) under its lock.

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use vmm_device_model::bus::BusTarget;
use vmm_device_model::device::{Blocker, DeviceChange, DeviceError, Lifecycle, SaveState, VmDevice};
use vmm_device_model::interrupt::{InterruptLine, MsiMessage};
use vmm_device_model::limiter::Limiter;
use vmm_device_model::metrics::Metered;
use vmm_device_model::recipe::{BuildError, Recipe, Resources};
use vmm_snapshot::RecordError;

use crate::registers::{Window, lock, read_value};

/// Number of pins.
pub const PINS: u8 = 24;
/// Where guests expect the first IOAPIC: guest physical address.
pub const IOAPIC_BASE: u64 = 0xfec0_0000;
/// Bytes that its registers take.
pub const IOAPIC_LEN: u64 = 0x1000;

/// The hypervisor's side: its local APICs and its table of interrupt routes.
pub trait IoApicTarget: Send + Sync + fmt::Debug {
    /// Sets (`Some`) or removes (`None`) the routes of pins, all in one update of the table. A route's use is
    /// that the end of its vector's interrupt is reported to [`IoApic::end_of_interrupt`].
    ///
    /// # Errors
    /// The hypervisor refuses; the routes are then as before.
    fn set_routes(&self, routes: &[(u8, Option<MsiMessage>)]) -> io::Result<()>;

    /// Sends an interrupt message to the local APICs, now.
    ///
    /// # Errors
    /// No local APIC took it.
    fn deliver(&self, message: MsiMessage) -> io::Result<()>;
}

/// Learns that the guest ended a pin's level-triggered interrupt; a device that is still in need of
/// service then asserts its line again.
pub trait EoiListener: Send + Sync + fmt::Debug {
    /// The interrupt ended. Called without any lock of the IOAPIC.
    fn end_of_interrupt(&self);
}

/// The I/O APIC.
#[derive(Debug)]
pub struct IoApic {
    pins: Mutex<Pins>,
    target: Arc<dyn IoApicTarget>,
    listeners: Mutex<Vec<(u8, Arc<dyn EoiListener>)>>,
    refused: Limiter,
}

impl IoApic {
    /// With all pins masked and deasserted.
    pub fn new(target: Arc<dyn IoApicTarget>) -> Arc<Self> {
        Arc::new(Self {
            pins: Mutex::new(Pins::default()),
            target,
            listeners: Mutex::default(),
            refused: Limiter::for_guest(),
        })
    }

    /// The line into `pin`; `None` if there is no such pin. Lines into the same pin are one wire.
    pub fn line(self: &Arc<Self>, pin: u8) -> Option<Arc<dyn InterruptLine>> {
        (pin < PINS).then(|| Arc::new(Line { ioapic: Arc::clone(self), pin }) as _)
    }

    /// Has `listener` told of every end of a level-triggered interrupt of `pin`.
    pub fn on_end_of_interrupt(&self, pin: u8, listener: Arc<dyn EoiListener>) {
        lock(&self.listeners).push((pin, listener));
    }

    /// The guest ended the interrupt with `vector` (KVM_EXIT_IOAPIC_EOI). Pins that are still asserted
    /// interrupt again.
    pub fn end_of_interrupt(&self, vector: u8) {
        let ended = lock(&self.pins).end(vector);
        if ended == 0 {
            return;
        }
        let listeners: Vec<_> = lock(&self.listeners)
            .iter()
            .filter(|(pin, _)| ended & bit(*pin) != 0)
            .map(|(_, listener)| Arc::clone(listener))
            .collect();
        for listener in listeners {
            listener.end_of_interrupt();
        }
        let mut pins = lock(&self.pins);
        for pin in (0..PINS).filter(|pin| ended & bit(*pin) != 0) {
            self.service(&mut pins, pin);
        }
    }

    fn set_line(&self, pin: u8, asserted: bool) {
        let mut pins = lock(&self.pins);
        let rises = asserted && pins.asserted & bit(pin) == 0;
        if !asserted {
            pins.asserted &= !bit(pin);
            return;
        }
        pins.asserted |= bit(pin);
        let Some(entry) = pins.entry(pin) else { return };
        if entry.is_level() {
            self.service(&mut pins, pin);
        } else if rises && !entry.is_masked() {
            // An edge on a masked pin is lost, says the data sheet.
            self.send(*entry);
        }
    }

    /// Interrupts for a level-triggered pin if it waits for that.
    fn service(&self, pins: &mut Pins, pin: u8) {
        let asserted = pins.asserted & bit(pin) != 0;
        if let Some(entry) = pins.entry(pin)
            && asserted
            && entry.is_level()
            && !entry.is_masked()
            && !entry.has(REMOTE_IRR)
            && self.send(*entry)
        {
            entry.0 |= REMOTE_IRR;
        }
    }

    /// Whether a local APIC took the entry's message.
    fn send(&self, entry: Entry) -> bool {
        let Some(message) = entry.message() else { return false };
        match self.target.deliver(message) {
            Ok(()) => true,
            // A destination that is not there is the guest's mistake.
            Err(e) => {
                self.complain(format_args!("interrupt message {message:x?} was not taken: {e}"));
                false
            }
        }
    }

    fn write_register(&self, value: u32) {
        let mut pins = lock(&self.pins);
        match Register::of(pins.select) {
            Some(Register::Id) => pins.id = (value >> ID_SHIFT & 0xf) as u8,
            Some(Register::Entry { pin, high }) => {
                let Some(entry) = pins.entry(pin) else { return };
                let before = entry.route();
                entry.write(high, value);
                let after = entry.route();
                if before != after
                    && let Err(e) = self.target.set_routes(&[(pin, after)])
                {
                    self.complain(format_args!("cannot set the route of pin {pin}: {e}"));
                }
                self.service(&mut pins, pin);
            }
            Some(Register::Version | Register::Arbitration) | None => {}
        }
    }

    fn complain(&self, what: fmt::Arguments<'_>) {
        if let Some(admitted) = self.refused.admit(Instant::now()) {
            log::warn!(device = "ioapic"; "{what}{admitted}");
        }
    }

    /// Takes `pins` over, with their routes. On an error the routes are as before.
    fn replace(&self, new: Pins) -> io::Result<()> {
        let mut pins = lock(&self.pins);
        let routes: Vec<_> = (0..PINS).zip(new.entries.iter().map(|entry| entry.route())).collect();
        self.target.set_routes(&routes)?;
        *pins = new;
        Ok(())
    }
}

impl BusTarget for IoApic {
    fn read(&self, _: u16, offset: u64, data: &mut [u8]) {
        let pins = lock(&self.pins);
        match offset {
            IOREGSEL => read_value(pins.select.into(), 0, data),
            IOWIN => {
                if let Some(value) = pins.read() {
                    read_value(value.into(), 0, data);
                }
            }
            _ => {}
        }
    }

    fn write(&self, _: u16, offset: u64, data: &[u8]) {
        match (offset, data) {
            (IOREGSEL, [select, ..]) => lock(&self.pins).select = *select,
            // The data sheet asks for 32-bit accesses here: less is not a register write.
            (IOWIN, [a, b, c, d, ..]) => self.write_register(u32::from_le_bytes([*a, *b, *c, *d])),
            _ => {}
        }
    }
}

/// Offset of the register that selects a register.
const IOREGSEL: u64 = 0;
/// Offset of the window to the selected register.
const IOWIN: u64 = 0x10;
/// Version 0x11, and the highest pin's number.
const VERSION: u32 = (PINS as u32 - 1) << 16 | 0x11;
const ID_SHIFT: u32 = 24;

/// What a selector selects.
enum Register {
    Id,
    Version,
    Arbitration,
    Entry { pin: u8, high: bool },
}

impl Register {
    fn of(select: u8) -> Option<Self> {
        match select {
            0 => Some(Self::Id),
            1 => Some(Self::Version),
            2 => Some(Self::Arbitration),
            0x10.. => {
                let pin = (select - 0x10) / 2;
                (pin < PINS).then_some(Self::Entry { pin, high: select % 2 == 1 })
            }
            _ => None,
        }
    }
}

/// What a guest sees, and the state of the wires.
#[derive(Debug, Default)]
struct Pins {
    id: u8,
    select: u8,
    entries: [Entry; PINS as usize],
    /// Bit per pin: its line is asserted.
    asserted: u32,
}

impl Pins {
    fn entry(&mut self, pin: u8) -> Option<&mut Entry> {
        self.entries.get_mut(usize::from(pin))
    }

    fn read(&self) -> Option<u32> {
        match Register::of(self.select)? {
            Register::Id | Register::Arbitration => Some(u32::from(self.id) << ID_SHIFT),
            Register::Version => Some(VERSION),
            Register::Entry { pin, high } => {
                let entry = self.entries.get(usize::from(pin))?.0;
                Some(if high { entry >> 32 } else { entry } as u32)
            }
        }
    }

    /// Ends the interrupts with `vector`; their pins as bits.
    fn end(&mut self, vector: u8) -> u32 {
        let mut ended = 0;
        for (pin, entry) in (0..PINS).zip(&mut self.entries) {
            if entry.has(REMOTE_IRR) && entry.vector() == vector {
                entry.0 &= !REMOTE_IRR;
                ended |= bit(pin);
            }
        }
        ended
    }
}

fn bit(pin: u8) -> u32 {
    1_u32.checked_shl(pin.into()).unwrap_or(0)
}

/// A redirection entry (82093AA, section 3.2.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry(u64);

const MODE_SHIFT: u32 = 8;
const LOGICAL: u64 = 1 << 11;
/// An interrupt was delivered and not yet ended. Level-triggered pins only; read-only.
const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASK: u64 = 1 << 16;
const DESTINATION_SHIFT: u32 = 56;
/// Vector, delivery mode, destination mode, polarity, trigger mode, mask; destination.
const WRITABLE: u64 = 0xff00_0000_0001_afff;

const MSI_BASE: u64 = 0xfee0_0000;
const MSI_DESTINATION_SHIFT: u32 = 12;
const MSI_LOGICAL: u64 = 1 << 2;
/// Level-triggered, and the level is "asserted".
const MSI_LEVEL: u32 = 1 << 15 | 1 << 14;

impl Default for Entry {
    fn default() -> Self {
        Self(MASK)
    }
}

impl Entry {
    fn has(self, bits: u64) -> bool {
        self.0 & bits != 0
    }

    fn is_masked(self) -> bool {
        self.has(MASK)
    }

    fn vector(self) -> u8 {
        self.0 as u8
    }

    fn mode(self) -> u8 {
        (self.0 >> MODE_SHIFT & 7) as u8
    }

    /// Whether the mode has a vector: fixed, lowest priority.
    fn has_vector(self) -> bool {
        self.mode() <= 1
    }

    /// Other modes are edge-triggered whatever the bit says.
    fn is_level(self) -> bool {
        self.has(LEVEL) && self.has_vector()
    }

    /// What the local APICs get; `None` for what they would not take: vectors below 16, SMI, ExtINT (there
    /// is no interrupt controller that could give its vector), reserved modes.
    fn message(self) -> Option<MsiMessage> {
        let valid = match self.mode() {
            0 | 1 => self.vector() >= 16,
            4 | 5 => true,
            _ => false,
        };
        let logical = if self.has(LOGICAL) { MSI_LOGICAL } else { 0 };
        let level = if self.is_level() { MSI_LEVEL } else { 0 };
        valid.then(|| MsiMessage {
            address: MSI_BASE | (self.0 >> DESTINATION_SHIFT) << MSI_DESTINATION_SHIFT | logical,
            data: u32::from(self.vector()) | u32::from(self.mode()) << MODE_SHIFT | level,
        })
    }

    fn route(self) -> Option<MsiMessage> {
        if self.is_level() { self.message() } else { None }
    }

    fn write(&mut self, high: bool, value: u32) {
        let (half, value) =
            if high { (u64::MAX << 32, u64::from(value) << 32) } else { (0xffff_ffff, value.into()) };
        let writable = WRITABLE & half;
        self.0 = self.0 & !writable | value & writable;
        if !self.is_level() {
            // Version 0x11 has no EOI register: drivers end an interrupt by switching to edge and back.
            self.0 &= !REMOTE_IRR;
        }
    }
}

#[derive(Debug)]
struct Line {
    ioapic: Arc<IoApic>,
    pin: u8,
}

impl InterruptLine for Line {
    fn set(&self, asserted: bool) {
        self.ioapic.set_line(self.pin, asserted);
    }
}

/// Puts an IOAPIC on the bus. The IOAPIC exists before, for the other devices' lines.
#[derive(Debug)]
pub struct IoApicRecipe {
    id: String,
    base: u64,
    ioapic: Arc<IoApic>,
}

impl IoApicRecipe {
    /// `ioapic` with its registers at guest physical address `base`, usually [`IOAPIC_BASE`].
    pub fn new(id: impl Into<String>, base: u64, ioapic: Arc<IoApic>) -> Self {
        Self { id: id.into(), base, ioapic }
    }
}

impl<R: Resources + ?Sized> Recipe<R> for IoApicRecipe {
    fn id(&self) -> &str {
        &self.id
    }

    fn build(self: Box<Self>, resources: &mut R) -> Result<Box<dyn VmDevice>, BuildError> {
        let window = Window::Mmio { base: self.base, len: IOAPIC_LEN };
        window.map(resources, Arc::clone(&self.ioapic) as _)?;
        Ok(Box::new(Back(self.ioapic)))
    }
}

/// The IOAPIC as the thread that owns the VM sees it.
#[derive(Debug)]
struct Back(Arc<IoApic>);

impl Metered for Back {}

impl Lifecycle for Back {
    fn service(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }

    fn quiesce_begin(&mut self) {}

    fn quiesce_finish(&mut self, _: Instant) -> Result<(), DeviceError> {
        Ok(())
    }

    fn resume(&mut self) -> Result<(), DeviceError> {
        // A restore delivers nothing, for the local APICs' own state comes later.
        let mut pins = lock(&self.0.pins);
        for pin in 0..PINS {
            self.0.service(&mut pins, pin);
        }
        Ok(())
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        // The wires are the devices' to drive.
        let asserted = lock(&self.0.pins).asserted;
        self.0
            .replace(Pins { asserted, ..Pins::default() })
            .map_err(|e| DeviceError::caused("cannot remove the IOAPIC's interrupt routes", e))
    }

    fn blockers(&self) -> Vec<Blocker> {
        Vec::new()
    }

    fn take_changes(&mut self) -> Vec<DeviceChange> {
        Vec::new()
    }
}

/// Saved state of [`IoApic`].
#[derive(Debug, Clone, PartialEq, Eq, minicbor::Encode, minicbor::Decode)]
pub struct IoApicV1 {
    /// Identification register, 4 bits.
    #[n(0)]
    pub id: u8,
    /// Selected register.
    #[n(1)]
    pub select: u8,
    /// Redirection entries as the guest reads them.
    #[n(2)]
    pub entries: [u64; PINS as usize],
    /// Bit per pin: its line is asserted.
    #[n(3)]
    pub asserted: u32,
}

vmm_snapshot::schema!(IoApicV1: "ioapic" v1);

impl SaveState for Back {
    type State = IoApicV1;

    fn save(&self) -> IoApicV1 {
        let IoApic { pins, target: _, listeners: _, refused: _ } = &*self.0;
        let Pins { id, select, entries, asserted } = &*lock(pins);
        IoApicV1 { id: *id, select: *select, entries: entries.map(|entry| entry.0), asserted: *asserted }
    }

    fn restore(&mut self, state: IoApicV1) -> Result<(), RecordError> {
        let IoApicV1 { id, select, entries, asserted } = state;
        let invalid = RecordError::invalid::<IoApicV1>;
        if id > 0xf {
            return Err(invalid(format!("id {id:#x} has more than 4 bits")));
        }
        if asserted >> PINS != 0 {
            return Err(invalid(format!("asserted {asserted:#x} names pins beyond {PINS}")));
        }
        for (pin, entry) in entries.into_iter().enumerate() {
            if entry & !(WRITABLE | REMOTE_IRR) != 0 {
                return Err(invalid(format!("entry {pin} is {entry:#x}: reserved bits are set")));
            }
            if Entry(entry).has(REMOTE_IRR) && !Entry(entry).is_level() {
                return Err(invalid(format!("entry {pin} is {entry:#x}: an edge has no remote IRR")));
            }
        }
        self.0
            .replace(Pins { id, select, entries: entries.map(Entry), asserted })
            .map_err(|e| invalid(format!("entries: their interrupt routes are refused: {e}")))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Weak;

    use vmm_device_model::testing::{TestResources, fuzz_registers, save_reset_restore};
    use vmm_fuzzing::rounds;

    use super::*;
    use crate::testing::TestTarget;

    fn ioapic() -> (Arc<TestTarget>, Arc<IoApic>) {
        let target = Arc::new(TestTarget::default());
        (target.clone(), IoApic::new(target))
    }

    fn write(ioapic: &IoApic, register: u8, value: u32) {
        ioapic.write(0, 0, &u32::from(register).to_le_bytes());
        ioapic.write(0, 0x10, &value.to_le_bytes());
    }

    fn read(ioapic: &IoApic, register: u8) -> u32 {
        ioapic.write(0, 0, &u32::from(register).to_le_bytes());
        let mut data = [0xff; 4];
        ioapic.read(0, 0x10, &mut data);
        u32::from_le_bytes(data)
    }

    fn program(ioapic: &IoApic, pin: u8, low: u32, destination: u32) {
        write(ioapic, 0x11 + 2 * pin, destination << 24);
        write(ioapic, 0x10 + 2 * pin, low);
    }

    const LEVEL_LOW: u32 = 1 << 15;
    const MASKED_LOW: u32 = 1 << 16;

    #[test]
    fn identification_registers() {
        let (_, ioapic) = ioapic();
        assert_eq!(read(&ioapic, 1), 0x0017_0011);
        write(&ioapic, 0, 0xffff_ffff);
        assert_eq!(read(&ioapic, 0), 0x0f00_0000);
        assert_eq!(read(&ioapic, 2), 0x0f00_0000);
        write(&ioapic, 1, 0);
        assert_eq!(read(&ioapic, 1), 0x0017_0011);
        for register in (3..0x10).chain(0x40..=0xff) {
            assert_eq!(read(&ioapic, register), u32::MAX, "register {register:#x}");
        }
        assert_eq!(read(&ioapic, 0x10), MASKED_LOW);
    }

    #[test]
    fn read_only_and_reserved_bits_of_an_entry_stay_clear() {
        let (_, ioapic) = ioapic();
        program(&ioapic, 23, u32::MAX, 0);
        write(&ioapic, 0x11 + 46, u32::MAX);
        assert_eq!(read(&ioapic, 0x10 + 46), 0x0001_afff);
        assert_eq!(read(&ioapic, 0x11 + 46), 0xff00_0000);
    }

    #[test]
    fn an_edge_is_one_message() {
        let (target, ioapic) = ioapic();
        program(&ioapic, 4, 0x31, 2);
        let line = ioapic.line(4).unwrap();
        line.set(true);
        line.set(true);
        assert_eq!(target.take(), [MsiMessage { address: 0xfee0_2000, data: 0x31 }]);
        line.set(false);
        line.pulse();
        assert_eq!(target.take().len(), 1);
        assert_eq!(target.route(4), None, "the end of an edge is not to be reported");
    }

    #[test]
    fn modes_become_messages() {
        let (target, ioapic) = ioapic();
        let line = ioapic.line(0).unwrap();
        for (low, data) in [(0x931, Some(0x131)), (0xc31, Some(0x431)), (0xd00, Some(0x500))] {
            program(&ioapic, 0, low, 0xff);
            line.pulse();
            let expected = data.map(|data| MsiMessage { address: 0xfeef_f004, data });
            assert_eq!(target.take(), expected.into_iter().collect::<Vec<_>>(), "{low:#x}");
        }
        // A vector below 16, SMI, two reserved modes, ExtINT.
        for low in [0x0f, 0x231, 0x331, 0x631, 0x731] {
            program(&ioapic, 0, low, 0);
            line.pulse();
            assert_eq!(target.take(), [], "{low:#x}");
        }
    }

    #[test]
    fn a_masked_edge_is_lost() {
        let (target, ioapic) = ioapic();
        program(&ioapic, 4, 0x31 | MASKED_LOW, 0);
        ioapic.line(4).unwrap().pulse();
        program(&ioapic, 4, 0x31, 0);
        assert_eq!(target.take(), []);
    }

    #[test]
    fn a_level_interrupts_again_until_deasserted() {
        let (target, ioapic) = ioapic();
        program(&ioapic, 9, 0x51 | LEVEL_LOW, 1);
        let message = MsiMessage { address: 0xfee0_1000, data: 0xc051 };
        assert_eq!(target.route(9), Some(message));
        let line = ioapic.line(9).unwrap();
        line.set(true);
        line.set(true);
        assert_eq!(target.take(), [message]);
        assert_eq!(read(&ioapic, 0x10 + 18), 0x51 | LEVEL_LOW | REMOTE_IRR as u32);
        ioapic.end_of_interrupt(0x50);
        assert_eq!(target.take(), []);
        ioapic.end_of_interrupt(0x51);
        assert_eq!(target.take(), [message], "still asserted");
        line.set(false);
        ioapic.end_of_interrupt(0x51);
        assert_eq!(target.take(), []);
        assert_eq!(read(&ioapic, 0x10 + 18), 0x51 | LEVEL_LOW);
    }

    #[test]
    fn a_masked_level_waits_and_keeps_its_route() {
        let (target, ioapic) = ioapic();
        program(&ioapic, 9, 0x51 | LEVEL_LOW | MASKED_LOW, 0);
        let line = ioapic.line(9).unwrap();
        line.set(true);
        assert_eq!(target.take(), []);
        assert!(target.route(9).is_some());
        program(&ioapic, 9, 0x51 | LEVEL_LOW, 0);
        assert_eq!(target.take().len(), 1);
        // As a threaded handler does: mask, end, unmask.
        program(&ioapic, 9, 0x51 | LEVEL_LOW | MASKED_LOW, 0);
        ioapic.end_of_interrupt(0x51);
        assert_eq!(target.take(), []);
        program(&ioapic, 9, 0x51 | LEVEL_LOW, 0);
        assert_eq!(target.take().len(), 1);
    }

    #[test]
    fn switching_to_edge_and_back_ends_the_interrupt() {
        let (target, ioapic) = ioapic();
        program(&ioapic, 9, 0x51 | LEVEL_LOW, 0);
        ioapic.line(9).unwrap().set(true);
        assert_eq!(target.take().len(), 1);
        write(&ioapic, 0x10 + 18, 0x51 | MASKED_LOW);
        assert_eq!(target.route(9), None);
        write(&ioapic, 0x10 + 18, 0x51 | LEVEL_LOW);
        assert_eq!(target.take().len(), 1);
    }

    /// Deasserts its line at the end of an interrupt: it would deadlock under the IOAPIC's lock.
    #[derive(Debug)]
    struct Served(Weak<IoApic>);

    impl EoiListener for Served {
        fn end_of_interrupt(&self) {
            self.0.upgrade().unwrap().line(9).unwrap().set(false);
        }
    }

    #[test]
    fn a_listener_may_drive_its_line() {
        let (target, ioapic) = ioapic();
        program(&ioapic, 9, 0x51 | LEVEL_LOW, 0);
        ioapic.on_end_of_interrupt(9, Arc::new(Served(Arc::downgrade(&ioapic))));
        ioapic.line(9).unwrap().set(true);
        ioapic.end_of_interrupt(0x51);
        assert_eq!(target.take().len(), 1, "the listener was asked before the pin was served again");
    }

    #[test]
    fn a_message_nobody_takes_is_tried_again_later() {
        let (target, ioapic) = ioapic();
        program(&ioapic, 9, 0x51 | LEVEL_LOW, 0);
        target.refuse(true);
        let line = ioapic.line(9).unwrap();
        line.set(true);
        assert_eq!(read(&ioapic, 0x10 + 18) & REMOTE_IRR as u32, 0);
        target.refuse(false);
        program(&ioapic, 9, 0x51 | LEVEL_LOW, 1);
        assert_eq!(target.take().len(), 1);
    }

    #[test]
    fn odd_accesses_are_answered() {
        let (_, ioapic) = ioapic();
        write(&ioapic, 0x10, 0x31);
        ioapic.write(0, 0x10, &[0, 0]);
        ioapic.write(0, 0x12, &[0; 4]);
        assert_eq!(read(&ioapic, 0x10), 0x31);
        let mut wide = [0xff; 8];
        ioapic.read(0, 0x10, &mut wide);
        assert_eq!(wide, [0x31, 0, 0, 0, 0, 0, 0, 0]);
        let mut hole = [0xff; 4];
        ioapic.read(0, 0x40, &mut hole);
        assert_eq!(hole, [0xff; 4]);
    }

    #[test]
    fn fuzz_any_access() {
        let (_, ioapic) = ioapic();
        fuzz_registers(&*ioapic, 0, 0x50, rounds(200), 1);
        fuzz_registers(&*ioapic, 0, IOAPIC_LEN, rounds(3), 2);
    }

    #[test]
    fn there_are_24_pins() {
        let (_, ioapic) = ioapic();
        assert!(ioapic.line(23).is_some());
        assert!(ioapic.line(24).is_none());
        assert!(ioapic.line(255).is_none());
    }

    #[test]
    fn restore_sets_all_routes_at_once_and_delivers_at_resume() {
        let (target, ioapic) = ioapic();
        program(&ioapic, 9, 0x51 | LEVEL_LOW, 0);
        program(&ioapic, 10, 0x52 | LEVEL_LOW, 0);
        target.refuse(true);
        ioapic.line(9).unwrap().set(true);
        target.refuse(false);
        let saved = Back(ioapic).save();

        let (target, ioapic) = self::ioapic();
        let mut back = Back(ioapic.clone());
        back.restore(saved.clone()).unwrap();
        assert_eq!(target.take_calls(), 1);
        assert!(target.route(9).is_some() && target.route(10).is_some());
        assert_eq!(target.take(), []);
        assert_eq!(back.save(), saved);
        back.resume().unwrap();
        assert_eq!(target.take().len(), 1);
        back.reset().unwrap();
        assert_eq!(target.route(9), None);
        assert_eq!(lock(&ioapic.pins).asserted, 1 << 9, "the wire is the device's");
        target.refuse(true);
        back.reset().unwrap_err();
        back.restore(saved).unwrap_err();
    }

    #[test]
    fn impossible_state_is_refused() {
        let (_, ioapic) = ioapic();
        let mut back = Back(ioapic);
        let good = back.save();
        for (pin, entry) in [(0, 1 << 12), (5, 1 << 17), (23, 1 << 55), (7, REMOTE_IRR), (7, u64::MAX)] {
            let mut state = good.clone();
            state.entries[pin] = entry;
            back.restore(state).unwrap_err();
        }
        back.restore(IoApicV1 { id: 16, ..good.clone() }).unwrap_err();
        back.restore(IoApicV1 { asserted: 1 << 24, ..good.clone() }).unwrap_err();
        assert_eq!(back.save(), good, "a refused record changes nothing");
    }

    #[test]
    fn survives_save_reset_restore() {
        let mut resources = TestResources::new(0x1000).unwrap();
        let (_, ioapic) = ioapic();
        let recipe = Box::new(IoApicRecipe::new("_ioapic", IOAPIC_BASE, ioapic.clone()));
        let mut device = recipe.build(&mut resources).unwrap();
        program(&ioapic, 9, 0x51 | LEVEL_LOW, 3);
        write(&ioapic, 0, 0x0700_0000);
        save_reset_restore(&mut *device).unwrap();
        let mut data = [0; 4];
        assert!(resources.mmio.read(IOAPIC_BASE + 0x10, &mut data));
        assert_eq!(u32::from_le_bytes(data), 0x0700_0000);
    }
}
