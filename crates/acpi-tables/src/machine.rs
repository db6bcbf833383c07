//! The description of a machine that its tables are made of.

/// A machine, as far as its ACPI tables tell of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    /// Who made the tables.
    pub oem: Oem,
    /// All processors, those present at boot and those that may come later; the position is the ACPI processor UID.
    pub cpus: Vec<Cpu>,
    /// Guest-physical address of the local APICs, usually `0xfee00000`.
    pub lapic_address: u32,
    /// The I/O APIC.
    pub ioapic: IoApic,
    /// PCI segments (host bridges).
    pub pci: Vec<PciSegment>,
    /// The first serial port.
    pub serial: Option<Serial>,
    /// The generic event device; the guest is told of it when something signals through it.
    pub ged: Ged,
    /// Whether there is a power button; the GED signals it.
    pub power_button: bool,
    /// I/O ports of power management.
    pub ports: PowerPorts,
    /// Whether there is a CMOS clock at ports 0x70 and 0x71.
    pub rtc: bool,
    /// Guest-physical address of the generation id, 16 bytes; the GED signals that it has changed.
    pub generation_id: Option<u64>,
}

/// Who made the tables: part of every table's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Oem {
    /// OEM id, ASCII, padded with spaces.
    pub id: [u8; 6],
    /// OEM table id, ASCII, padded with spaces.
    pub table_id: [u8; 8],
    /// OEM revision.
    pub revision: u32,
}

impl Default for Oem {
    fn default() -> Self {
        Self { id: *b"VMMRS ", table_id: *b"VMMRSTBL", revision: 1 }
    }
}

/// A processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cpu {
    /// Local APIC id; above 254 it is told as x2APIC.
    pub apic_id: u32,
    /// Present at boot. One that is not may be brought online later.
    pub enabled: bool,
}

/// An I/O APIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoApic {
    /// Its id.
    pub id: u8,
    /// Guest-physical address of its registers.
    pub address: u32,
    /// GSI of its first pin.
    pub gsi_base: u32,
}

/// A range of guest-physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// First address.
    pub start: u64,
    /// Size in bytes, not 0.
    pub size: u64,
}

impl Window {
    /// The last address, or `None` for an empty window and for one that wraps around.
    pub(crate) fn last(&self) -> Option<u64> {
        self.start.checked_add(self.size.checked_sub(1)?)
    }
}

/// A PCI segment with its host bridge. Segment 0 has the I/O ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PciSegment {
    /// Segment number.
    pub segment: u16,
    /// Guest-physical address where the ECAM of bus 0 is or would be; 1 MiB for each bus, below 4 GiB.
    pub ecam_base: u64,
    /// First bus.
    pub start_bus: u8,
    /// Last bus.
    pub end_bus: u8,
    /// Window for 32-bit BARs.
    pub mmio32: Window,
    /// Window for 64-bit BARs.
    pub mmio64: Option<Window>,
    /// GSIs for INTx: pin `p` (0 is INTA) of device `d` is wired to number `(d + p) mod 4`. None: no routing table.
    pub intx_gsis: Option<[u32; 4]>,
}

/// A 16550 serial port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Serial {
    /// First of its 8 I/O ports.
    pub port: u16,
    /// ISA interrupt, wired to the GSI of the same number.
    pub irq: u8,
}

/// The generic event device: a register of one byte, cleared by reading, with the bits of [`GedEvent`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ged {
    /// Guest-physical address of the register.
    pub address: u64,
    /// GSI, edge-triggered.
    pub gsi: u32,
}

/// Bits of the GED's register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum GedEvent {
    /// A processor was added or is to be removed.
    Cpu = 1,
    /// Memory was added.
    Memory = 2,
    /// A PCI device was added or is to be removed.
    Pci = 4,
    /// The power button was pressed.
    PowerButton = 8,
    /// The generation id has changed.
    GenerationId = 16,
}

/// I/O ports of power management.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PowerPorts {
    /// The 32-bit PM timer, 4 ports.
    pub pm_timer: u16,
    /// Sleep control, sleep status and reset, one port: see [`RESET_VALUE`] and [`S5_VALUE`].
    pub control: u16,
}

/// Sleep type of S5.
pub(crate) const S5_SLEEP_TYPE: u8 = 5;

/// A guest that writes this to [`PowerPorts::control`] asks for a reset.
pub const RESET_VALUE: u8 = 1;

/// A guest that writes this to [`PowerPorts::control`] powers off: sleep type of S5 in bits 2 to 4, enable in bit 5.
pub const S5_VALUE: u8 = S5_SLEEP_TYPE << 2 | 1 << 5;
