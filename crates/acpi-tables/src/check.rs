//! What a description must satisfy so that its tables make sense.

use std::collections::HashSet;

use crate::{Error, Machine, PciSegment, Window};

/// Names of processors have three hexadecimal digits.
pub(crate) const MAX_CPUS: usize = 4096;
/// Names of host bridges have one hexadecimal digit.
pub(crate) const MAX_SEGMENTS: usize = 16;

const FOUR_GIB: u64 = 1 << 32;
const BUS_SIZE: u64 = 1 << 20;

pub(crate) fn check(machine: &Machine) -> Result<(), Error> {
    let cpus = machine.cpus.len();
    if cpus == 0 || cpus > MAX_CPUS {
        return Err(Error::CpuCount { count: cpus, limit: MAX_CPUS });
    }
    let mut apic_ids = HashSet::new();
    for cpu in &machine.cpus {
        if !apic_ids.insert(cpu.apic_id) {
            return Err(Error::DuplicateApicId(cpu.apic_id));
        }
    }
    let count = machine.pci.len();
    if count > MAX_SEGMENTS {
        return Err(Error::SegmentCount { count, limit: MAX_SEGMENTS });
    }
    let mut numbers = HashSet::new();
    for pci in &machine.pci {
        if !numbers.insert(pci.segment) {
            return Err(Error::DuplicateSegment(pci.segment));
        }
        check_segment(pci, machine.ged.address)?;
    }
    Ok(())
}

fn check_segment(pci: &PciSegment, ged: u64) -> Result<(), Error> {
    let segment = pci.segment;
    if pci.start_bus > pci.end_bus {
        return Err(Error::Buses { segment, start: pci.start_bus, end: pci.end_bus });
    }
    let ecam = ecam(pci).filter(|ecam| pci.ecam_base.is_multiple_of(BUS_SIZE) && below_4_gib(ecam));
    let Some(ecam) = ecam else { return Err(Error::Ecam { segment, address: pci.ecam_base }) };

    let bad = |what, window: Window| Error::Window { segment, what, start: window.start, size: window.size };
    if !below_4_gib(&pci.mmio32) {
        return Err(bad("32-bit MMIO", pci.mmio32));
    }
    let mmio64 = pci.mmio64.unwrap_or(Window { start: FOUR_GIB, size: 1 });
    if mmio64.last().is_none() {
        return Err(bad("64-bit MMIO", mmio64));
    }
    // The guest places BARs anywhere in the windows.
    for window in [pci.mmio32, mmio64].into_iter().chain([ecam]) {
        if window.start <= ged && window.last() >= Some(ged) {
            return Err(Error::GedInWindow { segment, address: ged });
        }
    }
    Ok(())
}

/// The part of the ECAM that the segment's buses have.
pub(crate) fn ecam(pci: &PciSegment) -> Option<Window> {
    let buses = u64::from(pci.end_bus.checked_sub(pci.start_bus)?) + 1;
    let start = pci.ecam_base.checked_add(u64::from(pci.start_bus) * BUS_SIZE)?;
    Some(Window { start, size: buses * BUS_SIZE })
}

fn below_4_gib(window: &Window) -> bool {
    window.last().is_some_and(|last| last < FOUR_GIB)
}
