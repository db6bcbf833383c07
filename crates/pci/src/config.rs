//! The configuration space of an endpoint: a file of registers with a mask of what the guest may write.
//!
//! Sizing of a BAR needs no code of its own: the address bits below its size are not writable, so that a
//! write of all ones reads back as the size (PCI local bus specification 3.0, 6.2.5.1).

use std::fmt;

use vmm_snapshot::RecordError;

/// Bytes of configuration space that hold registers; the extended space reads as zero.
pub const CONFIG_SIZE: usize = 256;
/// BARs of a type-0 header.
pub const BARS: usize = 6;
/// Vendor-specific capability.
pub const CAP_VENDOR: u8 = 0x09;
/// MSI-X capability.
pub const CAP_MSIX: u8 = 0x11;

const COMMAND: u8 = 0x04;
const COMMAND_MEMORY: u16 = 1 << 1;
const STATUS: u8 = 0x06;
const STATUS_CAPABILITIES: u16 = 1 << 4;
const BAR0: u8 = 0x10;
const CAPABILITIES: u8 = 0x34;
const FIRST_CAPABILITY: u8 = 0x40;

/// One register: its place, its value at reset, and which of its bits the guest may write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Register {
    /// Name in the specification.
    pub name: &'static str,
    /// Offset in configuration space.
    pub offset: u8,
    /// Bytes: 1, 2, 3 (the class code) or 4.
    pub width: u8,
    /// Value at reset.
    pub reset: u32,
    /// Bits that the guest can change.
    pub writable: u32,
}

/// Who a function says it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Subsystem vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
    /// Class code: base class, subclass and programming interface from the top, 24 bits.
    pub class: u32,
    /// Revision ID.
    pub revision: u8,
}

impl Identity {
    /// The registers of a type-0 header (PCI local bus specification 3.0, figure 6-1), without the BARs.
    /// What the table leaves out reads as zero and takes no write.
    fn registers(&self) -> [Register; 9] {
        let fixed = |name, offset, width, reset: u32| Register { name, offset, width, reset, writable: 0 };
        [
            fixed("vendor ID", 0x00, 2, self.vendor.into()),
            fixed("device ID", 0x02, 2, self.device.into()),
            // I/O space, memory space, bus master, parity error response, SERR#, interrupt disable.
            Register { name: "command", offset: COMMAND, width: 2, reset: 0, writable: 0x0547 },
            fixed("revision ID", 0x08, 1, self.revision.into()),
            fixed("class code", 0x09, 3, self.class & 0xff_ffff),
            Register { name: "cache line size", offset: 0x0c, width: 1, reset: 0, writable: 0xff },
            fixed("subsystem vendor ID", 0x2c, 2, self.subsystem_vendor.into()),
            fixed("subsystem ID", 0x2e, 2, self.subsystem.into()),
            Register { name: "interrupt line", offset: 0x3c, width: 1, reset: 0, writable: 0xff },
        ]
    }
}

/// What kind of addresses a BAR takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum BarKind {
    /// Memory below 4 GiB.
    Memory32,
    /// Memory anywhere; takes two BAR registers.
    Memory64,
    /// Memory anywhere, without side effects of reads; takes two BAR registers.
    Memory64Prefetchable,
}

impl BarKind {
    fn flags(self) -> u32 {
        match self {
            Self::Memory32 => 0,
            Self::Memory64 => 0b0100,
            Self::Memory64Prefetchable => 0b1100,
        }
    }

    fn is_64_bit(self) -> bool {
        self != Self::Memory32
    }
}

/// A BAR as it is built in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bar {
    /// Which of the six; a 64-bit one takes the next as well.
    pub index: u8,
    /// What it takes.
    pub kind: BarKind,
    /// Bytes: a power of two, at least 16.
    pub size: u64,
    /// Address at reset, as the firmware of a real machine would have placed it.
    pub address: u64,
}

/// A capability without its first two bytes (id and link), which the list fills in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Capability {
    /// Capability ID.
    pub id: u8,
    /// Its bytes from offset 2 on.
    pub body: Vec<u8>,
    /// For each byte of the body, the bits that the guest can write; missing bytes are read-only.
    pub writable: Vec<u8>,
}

/// The configuration space of one function with a type-0 header.
#[derive(Clone)]
pub struct ConfigSpace {
    bytes: [u8; CONFIG_SIZE],
    writable: [u8; CONFIG_SIZE],
    reset: [u8; CONFIG_SIZE],
    bars: Vec<Bar>,
    /// Where the next capability goes and which byte links to it.
    next_capability: usize,
    link: usize,
}

impl ConfigSpace {
    /// A function without BARs and capabilities.
    pub fn new(identity: &Identity) -> Self {
        let mut space = Self {
            bytes: [0; CONFIG_SIZE],
            writable: [0; CONFIG_SIZE],
            reset: [0; CONFIG_SIZE],
            bars: Vec::new(),
            next_capability: FIRST_CAPABILITY.into(),
            link: CAPABILITIES.into(),
        };
        for register in identity.registers() {
            space.define(&register);
        }
        space
    }

    /// Adds a BAR.
    ///
    /// # Errors
    /// Its size, address or place in the header is impossible.
    pub fn add_bar(&mut self, bar: Bar) -> Result<(), ConfigError> {
        let bad = |what| ConfigError::Bar { index: bar.index, what };
        let registers = if bar.kind.is_64_bit() { 2 } else { 1 };
        if usize::from(bar.index) + registers > BARS {
            return Err(bad("does not fit into the header"));
        }
        let taken = |b: &Bar| {
            let (first, last) = (b.index, b.index + u8::from(b.kind.is_64_bit()));
            (first..=last).contains(&bar.index) || (bar.index..bar.index + registers as u8).contains(&first)
        };
        if self.bars.iter().any(taken) {
            return Err(bad("is taken"));
        }
        if bar.size < 16 || !bar.size.is_power_of_two() {
            return Err(bad("has a size that is no power of two of at least 16"));
        }
        if !bar.kind.is_64_bit() && bar.size > 1 << 31 {
            return Err(bad("is too large for 32 bits"));
        }
        let last = bar.address.checked_add(bar.size - 1);
        if !bar.address.is_multiple_of(bar.size)
            || last.is_none_or(|l| !bar.kind.is_64_bit() && l > u32::MAX.into())
        {
            return Err(bad("has an impossible address"));
        }
        let mask = !(bar.size - 1);
        let offset = BAR0 + 4 * bar.index;
        let low = bar.address as u32 | bar.kind.flags();
        self.define(&Register { name: "BAR", offset, width: 4, reset: low, writable: mask as u32 });
        if bar.kind.is_64_bit() {
            let (reset, writable) = ((bar.address >> 32) as u32, (mask >> 32) as u32);
            self.define(&Register { name: "BAR, upper half", offset: offset + 4, width: 4, reset, writable });
        }
        self.bars.push(bar);
        Ok(())
    }

    /// Appends a capability to the list and returns its offset.
    ///
    /// # Errors
    /// The configuration space is full.
    pub fn add_capability(&mut self, capability: &Capability) -> Result<u16, ConfigError> {
        let at = self.next_capability;
        let end = at + 2 + capability.body.len();
        if end > CONFIG_SIZE {
            return Err(ConfigError::NoRoom { id: capability.id });
        }
        let header = [capability.id, 0];
        let writable = [0, 0].iter().chain(&capability.writable).copied().chain(std::iter::repeat(0));
        let bytes = header.iter().chain(&capability.body).copied().zip(writable);
        for (i, (value, mask)) in bytes.enumerate() {
            self.set_byte(at + i, value, mask);
        }
        // `at` is below CONFIG_SIZE, so it fits the link byte.
        self.set_byte(self.link, at as u8, 0);
        self.define(&Register {
            name: "status",
            offset: STATUS,
            width: 2,
            reset: STATUS_CAPABILITIES.into(),
            writable: 0,
        });
        self.link = at + 1;
        self.next_capability = end.next_multiple_of(4);
        Ok(at as u16)
    }

    /// Reads `data.len()` bytes at `offset`; zeros where there is no register.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        let bytes = self.bytes.iter().skip(offset.into()).copied().chain(std::iter::repeat(0));
        for (to, from) in data.iter_mut().zip(bytes) {
            *to = from;
        }
    }

    /// Writes what is writable of `data` at `offset`. Returns whether a BAR may answer elsewhere now.
    pub fn write(&mut self, offset: u16, data: &[u8]) -> bool {
        let before = self.bar_addresses();
        let cells = self.bytes.iter_mut().zip(&self.writable).skip(offset.into());
        for ((byte, mask), value) in cells.zip(data) {
            *byte = *byte & !mask | value & mask;
        }
        before != self.bar_addresses()
    }

    /// Two bytes at `offset`, little-endian.
    pub fn u16_at(&self, offset: u16) -> u16 {
        let mut data = [0; 2];
        self.read(offset, &mut data);
        u16::from_le_bytes(data)
    }

    /// Four bytes at `offset`, little-endian.
    pub fn u32_at(&self, offset: u16) -> u32 {
        let mut data = [0; 4];
        self.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// The BARs that are built in.
    pub fn bars(&self) -> &[Bar] {
        &self.bars
    }

    /// Where each BAR answers: what its register holds while memory decoding is on.
    pub fn bar_addresses(&self) -> [Option<u64>; BARS] {
        let mut addresses = [None; BARS];
        if self.u16_at(COMMAND.into()) & COMMAND_MEMORY == 0 {
            return addresses;
        }
        for bar in &self.bars {
            let offset = u16::from(BAR0) + 4 * u16::from(bar.index);
            let low = u64::from(self.u32_at(offset) & !0xf);
            let high = if bar.kind.is_64_bit() { u64::from(self.u32_at(offset + 4)) } else { 0 };
            if let Some(address) = addresses.get_mut(usize::from(bar.index)) {
                *address = Some(high << 32 | low);
            }
        }
        addresses
    }

    /// Back to the values at reset.
    pub fn reset(&mut self) {
        self.bytes = self.reset;
    }

    /// The registers that the guest can write.
    pub fn save(&self) -> Vec<ConfigWordV1> {
        let word =
            |offset: u16| ConfigWordV1 { offset, value: self.u32_at(offset) & self.writable_at(offset) };
        (0..CONFIG_SIZE as u16).step_by(4).filter(|o| self.writable_at(*o) != 0).map(word).collect()
    }

    /// Takes over what [`save`](Self::save) gave.
    ///
    /// # Errors
    /// The words are not those of this function, or have bits that no guest could have set.
    pub fn restore(&mut self, words: &[ConfigWordV1]) -> Result<(), RecordError> {
        let invalid = |what: String| RecordError::Invalid { kind: "pci config", what };
        let expected = (0..CONFIG_SIZE as u16).step_by(4).filter(|o| self.writable_at(*o) != 0);
        if !expected.eq(words.iter().map(|w| w.offset)) {
            return Err(invalid("registers are not those of this function".to_owned()));
        }
        for word in words {
            if word.value & !self.writable_at(word.offset) != 0 {
                let (offset, value) = (word.offset, word.value);
                return Err(invalid(format!("register {offset:#x} cannot hold {value:#x}")));
            }
        }
        self.reset();
        for word in words {
            self.write(word.offset, &word.value.to_le_bytes());
        }
        Ok(())
    }

    fn writable_at(&self, offset: u16) -> u32 {
        let bytes = self.writable.iter().skip(offset.into()).take(4).rev();
        bytes.fold(0, |word, byte| word << 8 | u32::from(*byte))
    }

    fn define(&mut self, register: &Register) {
        let values = register.reset.to_le_bytes().into_iter().zip(register.writable.to_le_bytes());
        for (i, (value, mask)) in values.take(register.width.into()).enumerate() {
            self.set_byte(usize::from(register.offset) + i, value, mask);
        }
    }

    fn set_byte(&mut self, at: usize, value: u8, mask: u8) {
        for (file, byte) in [(&mut self.bytes, value), (&mut self.reset, value), (&mut self.writable, mask)] {
            if let Some(cell) = file.get_mut(at) {
                *cell = byte;
            }
        }
    }
}

impl fmt::Debug for ConfigSpace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (vendor, device) = (self.u16_at(0), self.u16_at(2));
        write!(f, "config space of {vendor:04x}:{device:04x}, BARs {:x?}", self.bar_addresses())
    }
}

/// Saved state of one dword of configuration space that the guest can write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, minicbor::Encode, minicbor::Decode)]
pub struct ConfigWordV1 {
    /// Offset in configuration space, a multiple of 4.
    #[n(0)]
    pub offset: u16,
    /// Its value, writable bits only.
    #[n(1)]
    pub value: u32,
}

/// Why a configuration space cannot be built as asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// A BAR is impossible.
    #[error("BAR {index} {what}")]
    Bar {
        /// Which BAR.
        index: u8,
        /// What is wrong with it.
        what: &'static str,
    },
    /// The capability list is full.
    #[error("no room for capability {id:#x} in configuration space")]
    NoRoom {
        /// Capability ID.
        id: u8,
    },
}
