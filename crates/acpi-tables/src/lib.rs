#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod check;
mod dsdt;
mod fixed;
mod machine;

use aml::{rsdp::Rsdp, xsdt::XSDT};
use thiserror::Error;

pub use crate::machine::{
    Cpu, Ged, GedEvent, IoApic, Machine, Oem, PciSegment, PowerPorts, RESET_VALUE, S5_VALUE, Serial, Window,
};

/// Where a table may start: the RSDP wants 16, the rest is for the eye in a dump.
const ALIGNMENT: u64 = 64;

/// Why a machine cannot have tables.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum Error {
    /// No processor, or more than names can be given to.
    #[error("machine has {count} processors, 1 to {limit} are possible")]
    CpuCount {
        /// Their number.
        count: usize,
        /// The limit.
        limit: usize,
    },
    /// Two processors have one APIC id.
    #[error("two processors have the APIC id {0}")]
    DuplicateApicId(u32),
    /// More PCI segments than names can be given to.
    #[error("machine has {count} PCI segments, the limit is {limit}")]
    SegmentCount {
        /// Their number.
        count: usize,
        /// The limit.
        limit: usize,
    },
    /// Two PCI segments have one number.
    #[error("two PCI segments have the number {0}")]
    DuplicateSegment(u16),
    /// The first bus comes after the last one.
    #[error("PCI segment {segment} has buses {start} to {end}")]
    Buses {
        /// The segment.
        segment: u16,
        /// First bus.
        start: u8,
        /// Last bus.
        end: u8,
    },
    /// The ECAM is not aligned to 1 MiB or not all below 4 GiB.
    #[error("the ECAM of PCI segment {segment} at {address:#x} is not aligned to 1 MiB or not below 4 GiB")]
    Ecam {
        /// The segment.
        segment: u16,
        /// Its address.
        address: u64,
    },
    /// A window is empty, wraps around, or is not where its kind must be.
    #[error("the {what} window of PCI segment {segment} is impossible: {size:#x} bytes at {start:#x}")]
    Window {
        /// The segment.
        segment: u16,
        /// Which window.
        what: &'static str,
        /// First address.
        start: u64,
        /// Size in bytes.
        size: u64,
    },
    /// The GED's register lies where the guest places BARs, or in the ECAM.
    #[error("the register of the event device at {address:#x} is in a window of PCI segment {segment}")]
    GedInWindow {
        /// The segment.
        segment: u16,
        /// The register.
        address: u64,
    },
    /// The place for the tables does not suffice, or is not aligned.
    #[error(
        "tables need {needed:#x} bytes or more at {base:#x}, there are {available:#x}; alignment is {ALIGNMENT}"
    )]
    Space {
        /// First address.
        base: u64,
        /// Bytes needed so far.
        needed: u64,
        /// Bytes that there are.
        available: u64,
    },
}

/// A table in its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blob {
    /// Guest-physical address.
    pub address: u64,
    /// The bytes to write there.
    pub bytes: Vec<u8>,
}

/// All tables of a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tables {
    /// Guest-physical address of the RSDP, to be handed to the guest: the base address.
    pub rsdp_address: u64,
    /// RSDP, DSDT, FADT, MADT, MCFG (if there is PCI), XSDT.
    pub blobs: Vec<Blob>,
}

/// Makes the tables of `machine` for guest memory from `base_address` on, the RSDP first, in at most `max_len` bytes.
/// The same description always gives the same bytes.
///
/// # Errors
/// [`enum@Error`] when the description contradicts itself or the tables do not fit.
pub fn build(machine: &Machine, base_address: u64, max_len: u64) -> Result<Tables, Error> {
    check::check(machine)?;
    let oem = &machine.oem;
    let mut place = Place::new(base_address, max_len)?;
    let rsdp_address = place.reserve(Rsdp::len())?;

    let dsdt = place.add(dsdt::dsdt(machine))?;
    let mut tables = vec![place.add(fixed::fadt(machine, dsdt))?, place.add(fixed::madt(machine))?];
    if !machine.pci.is_empty() {
        tables.push(place.add(fixed::mcfg(machine))?);
    }
    let mut xsdt = XSDT::new(oem.id, oem.table_id, oem.revision);
    for address in tables {
        xsdt.add_entry(address);
    }
    let xsdt = place.add(fixed::bytes(&xsdt))?;

    let rsdp = Blob { address: rsdp_address, bytes: fixed::bytes(&Rsdp::new(oem.id, xsdt)) };
    place.blobs.insert(0, rsdp);
    Ok(Tables { rsdp_address, blobs: place.blobs })
}

/// Hands out addresses one after the other.
struct Place {
    base: u64,
    size: u64,
    used: u64,
    blobs: Vec<Blob>,
}

impl Place {
    fn new(base: u64, size: u64) -> Result<Self, Error> {
        if !base.is_multiple_of(ALIGNMENT) || base.checked_add(size).is_none() {
            return Err(Error::Space { base, needed: 0, available: size });
        }
        Ok(Self { base, size, used: 0, blobs: Vec::new() })
    }

    fn reserve(&mut self, len: usize) -> Result<u64, Error> {
        let address = self.base.saturating_add(self.used);
        let needed = self.used.saturating_add(len as u64);
        if needed > self.size {
            return Err(Error::Space { base: self.base, needed, available: self.size });
        }
        self.used = needed.checked_next_multiple_of(ALIGNMENT).unwrap_or(u64::MAX);
        Ok(address)
    }

    fn add(&mut self, bytes: Vec<u8>) -> Result<u64, Error> {
        let address = self.reserve(bytes.len())?;
        self.blobs.push(Blob { address, bytes });
        Ok(address)
    }
}
