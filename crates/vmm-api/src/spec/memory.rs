//! Memory.

use std::collections::BTreeSet;

use super::check::Checker;
use super::{Backing, Bytes, DEFAULT_ZONE, Hugepages, MemorySpec, ZoneSpec};
use crate::config::{MemoryConfig, MemoryZoneConfig};

/// Guest page size; sizes of zones are multiples of it.
const PAGE: u64 = 4096;
/// Address space below 4 GiB that memory may have to make room for.
const HOLE: u64 = 1 << 32;

pub(super) fn check(config: &MemoryConfig, phys_bits: u8, checker: &mut Checker) -> Option<MemorySpec> {
    let zones = match config.zones.as_deref() {
        None | Some([]) => vec![whole(config, checker)],
        Some(zones) => {
            refuse_both(config, checker);
            unique_ids(zones, checker);
            let zone = |(index, zone)| part(index, zone, config, checker);
            zones.iter().enumerate().map(zone).collect()
        }
    };
    let total = zones.iter().try_fold(0u64, |sum, zone| sum.checked_add(zone.size.get()));
    let limit = 1u64.checked_shl(u32::from(phys_bits)).unwrap_or(u64::MAX).saturating_sub(HOLE);
    // A number of address bits that is itself wrong says nothing about the size.
    if checker.was_read("cpus") && phys_bits > 32 && total.is_none_or(|total| total > limit) {
        let path = if config.zones.is_some() { "memory.zones" } else { "memory.size" };
        checker.invalid(path, format!("more memory than {phys_bits} physical address bits reach"));
    }
    Some(MemorySpec { zones, thp: config.thp })
}

/// The one zone of a VM that names none.
fn whole(config: &MemoryConfig, checker: &mut Checker) -> ZoneSpec {
    let hugepages = hugepages("memory", config.hugepages, config.hugepage_size, config.size, checker);
    size("memory", config.size, checker);
    ZoneSpec {
        id: DEFAULT_ZONE.to_owned(),
        size: config.size,
        backing: if config.shared { Backing::Memfd } else { Backing::Anonymous },
        hugepages,
        shared: config.shared,
        mergeable: config.mergeable,
        prefault: config.prefault,
        reserve: config.reserve,
    }
}

/// One zone that the configuration names; what is set for all memory holds for it too.
fn part(index: usize, zone: &MemoryZoneConfig, all: &MemoryConfig, checker: &mut Checker) -> ZoneSpec {
    let path = format!("memory.zones[{index}]");
    let hugepages = hugepages(&path, zone.hugepages, zone.hugepage_size, zone.size, checker);
    size(&path, zone.size, checker);
    ZoneSpec {
        id: zone.id.clone(),
        size: zone.size,
        backing: match &zone.file {
            Some(file) => Backing::File(file.clone()),
            None if zone.shared => Backing::Memfd,
            None => Backing::Anonymous,
        },
        hugepages,
        shared: zone.shared,
        mergeable: zone.mergeable || all.mergeable,
        prefault: zone.prefault || all.prefault,
        reserve: zone.reserve || all.reserve,
    }
}

fn refuse_both(config: &MemoryConfig, checker: &mut Checker) {
    let set_for_all = [
        ("size", config.size != Bytes(0)),
        ("shared", config.shared),
        ("hugepages", config.hugepages),
        ("hugepage_size", config.hugepage_size.is_some()),
    ];
    for (name, _) in set_for_all.iter().filter(|(_, set)| *set) {
        let message =
            if *name == "size" { "must be 0 if there are zones" } else { "must be set for each zone" };
        checker.invalid(format!("memory.{name}"), message);
    }
}

fn unique_ids(zones: &[MemoryZoneConfig], checker: &mut Checker) {
    let mut ids = BTreeSet::new();
    for (index, zone) in zones.iter().enumerate() {
        let path = format!("memory.zones[{index}].id");
        if zone.id.is_empty() {
            checker.invalid(path, "must not be empty");
        } else if !ids.insert(&zone.id) {
            checker.invalid(path, format!("{:?} is also the name of another zone", zone.id));
        }
    }
}

fn size(path: &str, size: Bytes, checker: &mut Checker) {
    if size.get() == 0 {
        checker.invalid(format!("{path}.size"), "must not be 0");
    } else if !size.get().is_multiple_of(PAGE) {
        checker.invalid(format!("{path}.size"), format!("{size} is not a multiple of {PAGE} bytes"));
    }
}

fn hugepages(path: &str, on: bool, page: Option<Bytes>, size: Bytes, checker: &mut Checker) -> Hugepages {
    let Some(page) = page else {
        return if on { Hugepages::HostDefault } else { Hugepages::Off };
    };
    let path = format!("{path}.hugepage_size");
    if !on {
        checker.invalid(path, "needs hugepages to be on");
    } else if !page.get().is_power_of_two() || page.get() <= PAGE {
        checker.invalid(path, format!("{page} is not a power of two above {PAGE} bytes"));
    } else if !size.get().is_multiple_of(page.get()) {
        checker.invalid(path, format!("{size} of memory is not a multiple of {page}"));
    }
    Hugepages::Of(page)
}
