//! The guest's address spaces: which device answers where.
//!
//! A vCPU looks an address up in an immutable map ([`Bus::read`], [`Bus::write`]) and takes no lock but
//! the target's own. Whoever changes the map ([`Bus::update`]) builds a new one and swaps it in, so that
//! BARs move and devices come and go under running vCPUs. An access that started before the swap may
//! still end in the old target.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;

/// A device that answers accesses one at a time, behind its own lock.
pub trait BusDevice: Send {
    /// Fills `data` from `offset` in region number `region`.
    ///
    /// Any length and any offset inside the region can come from the guest. What a device does not know
    /// reads as all ones: `data` arrives filled with 0xff.
    fn read(&mut self, region: u16, offset: u64, data: &mut [u8]);

    /// Takes a write of `data` at `offset` in region number `region`. What it does not know is dropped.
    fn write(&mut self, region: u16, offset: u64, data: &[u8]);
}

/// What stands on a bus: a device that does its own locking.
///
/// `Mutex<impl BusDevice>` is one; a device with a lock-free road implements it directly.
pub trait BusTarget: Send + Sync {
    /// See [`BusDevice::read`].
    fn read(&self, region: u16, offset: u64, data: &mut [u8]);
    /// See [`BusDevice::write`].
    fn write(&self, region: u16, offset: u64, data: &[u8]);
}

impl<D: BusDevice + ?Sized> BusTarget for Mutex<D> {
    fn read(&self, region: u16, offset: u64, data: &mut [u8]) {
        self.lock().unwrap_or_else(PoisonError::into_inner).read(region, offset, data);
    }

    fn write(&self, region: u16, offset: u64, data: &[u8]) {
        self.lock().unwrap_or_else(PoisonError::into_inner).write(region, offset, data);
    }
}

/// A range of addresses and the region of a target that answers there.
#[derive(Clone)]
pub struct Mapping {
    /// First address.
    pub base: u64,
    /// Bytes; not 0.
    pub len: u64,
    /// Who answers.
    pub target: Arc<dyn BusTarget>,
    /// Which of the target's regions this is; handed back to it on each access.
    pub region: u16,
}

impl Mapping {
    /// Last address, inclusive; the map's checks make it representable.
    fn last(&self) -> u64 {
        self.base.saturating_add(self.len.saturating_sub(1))
    }
}

impl fmt::Debug for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}+{:#x} region {}", self.base, self.len, self.region)
    }
}

/// The mappings of one address space, sorted and free of overlap.
#[derive(Debug, Clone, Default)]
pub struct BusMap {
    mappings: Vec<Mapping>,
}

impl BusMap {
    /// Adds a mapping.
    ///
    /// # Errors
    /// It is empty, wraps around the address space, or overlaps another.
    pub fn insert(&mut self, mapping: Mapping) -> Result<(), BusError> {
        let (base, len) = (mapping.base, mapping.len);
        if len == 0 || base.checked_add(len - 1).is_none() {
            return Err(BusError::BadRange { base, len });
        }
        let at = self.mappings.partition_point(|m| m.base < base);
        let before = at.checked_sub(1).and_then(|i| self.mappings.get(i)).filter(|m| m.last() >= base);
        let after = self.mappings.get(at).filter(|m| m.base <= mapping.last());
        if let Some(other) = before.or(after) {
            return Err(BusError::Overlap { base, len, other_base: other.base, other_len: other.len });
        }
        self.mappings.insert(at, mapping);
        Ok(())
    }

    /// Takes the mapping that starts at `base` out.
    ///
    /// # Errors
    /// None starts there.
    pub fn remove(&mut self, base: u64) -> Result<Mapping, BusError> {
        match self.mappings.binary_search_by_key(&base, |m| m.base) {
            Ok(at) => Ok(self.mappings.remove(at)),
            Err(_) => Err(BusError::NotMapped { base }),
        }
    }

    /// All mappings, in order of address.
    pub fn iter(&self) -> impl Iterator<Item = &Mapping> {
        self.mappings.iter()
    }

    /// The mapping that holds all of `len` bytes at `addr`, and the offset in it.
    fn find(&self, addr: u64, len: usize) -> Option<(&Mapping, u64)> {
        let at = self.mappings.partition_point(|m| m.base <= addr).checked_sub(1)?;
        let mapping = self.mappings.get(at)?;
        let offset = addr - mapping.base;
        let end = offset.checked_add(len as u64)?;
        (end <= mapping.len).then_some((mapping, offset))
    }
}

/// One address space of the guest (port I/O or memory-mapped I/O).
#[derive(Debug, Default)]
pub struct Bus {
    map: ArcSwap<BusMap>,
    /// Held while a new map is built; never by a vCPU that only reads or writes.
    update: Mutex<()>,
}

impl Bus {
    /// An address space in which nothing answers.
    pub fn new() -> Self {
        Self::default()
    }

    /// A guest's read. Where nothing answers, or an access runs over a mapping's end: all ones.
    /// Returns whether a device was asked.
    pub fn read(&self, addr: u64, data: &mut [u8]) -> bool {
        data.fill(0xff);
        let map = self.map.load();
        match map.find(addr, data.len()) {
            Some((mapping, offset)) => {
                mapping.target.read(mapping.region, offset, data);
                true
            }
            None => false,
        }
    }

    /// A guest's write; dropped where nothing answers. Returns whether a device was asked.
    pub fn write(&self, addr: u64, data: &[u8]) -> bool {
        let found = {
            let map = self.map.load();
            map.find(addr, data.len()).map(|(m, offset)| (Arc::clone(&m.target), m.region, offset))
        };
        // The map is released first: a write may move a BAR, which swaps it.
        match found {
            Some((target, region, offset)) => {
                target.write(region, offset, data);
                true
            }
            None => false,
        }
    }

    /// Changes the map: all of `change` takes effect at once, or, on an error, none of it.
    ///
    /// # Errors
    /// What `change` returns.
    pub fn update<T>(&self, change: impl FnOnce(&mut BusMap) -> Result<T, BusError>) -> Result<T, BusError> {
        let _one_writer = self.update.lock().unwrap_or_else(PoisonError::into_inner);
        let mut map = BusMap::clone(&self.map.load());
        let value = change(&mut map)?;
        self.map.store(Arc::new(map));
        Ok(value)
    }

    /// The map as it is now.
    pub fn snapshot(&self) -> Arc<BusMap> {
        self.map.load_full()
    }
}

/// Why the map of an address space did not change.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BusError {
    /// Length 0, or past the end of the address space.
    #[error("address range {base:#x} with length {len:#x} is empty or wraps around")]
    BadRange {
        /// First address.
        base: u64,
        /// Bytes.
        len: u64,
    },
    /// Something answers there already.
    #[error("address range {base:#x}+{len:#x} overlaps {other_base:#x}+{other_len:#x}")]
    Overlap {
        /// First address of the refused range.
        base: u64,
        /// Its length in bytes.
        len: u64,
        /// First address of the range that is there.
        other_base: u64,
        /// Its length in bytes.
        other_len: u64,
    },
    /// Nothing starts there.
    #[error("nothing is mapped at address {base:#x}")]
    NotMapped {
        /// The address.
        base: u64,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo(Vec<(u16, u64, Vec<u8>)>);

    impl BusDevice for Echo {
        fn read(&mut self, region: u16, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8 + region as u8);
        }

        fn write(&mut self, region: u16, offset: u64, data: &[u8]) {
            self.0.push((region, offset, data.to_vec()));
        }
    }

    fn mapping(base: u64, len: u64, region: u16) -> Mapping {
        Mapping { base, len, target: Arc::new(Mutex::new(Echo(Vec::new()))), region }
    }

    #[test]
    fn access_reaches_the_region_and_its_offset() {
        let bus = Bus::new();
        let device = Arc::new(Mutex::new(Echo(Vec::new())));
        bus.update(|m| m.insert(Mapping { base: 0x100, len: 0x10, target: device.clone(), region: 3 }))
            .unwrap();
        let mut data = [0; 2];
        assert!(bus.read(0x104, &mut data));
        assert_eq!(data, [7, 7]);
        assert!(bus.write(0x108, &[1, 2]));
        assert_eq!(device.lock().unwrap().0, [(3, 8, vec![1, 2])]);
    }

    #[test]
    fn holes_and_overruns_read_as_ones_and_drop_writes() {
        let bus = Bus::new();
        bus.update(|m| m.insert(mapping(0x100, 4, 0))).unwrap();
        for addr in [0, 0xff, 0x103, 0x104, u64::MAX] {
            let mut data = [0; 2];
            assert!(!bus.read(addr, &mut data), "{addr:#x}");
            assert_eq!(data, [0xff; 2]);
            assert!(!bus.write(addr, &data));
        }
    }

    #[test]
    fn overlap_and_bad_ranges_are_refused_and_change_nothing() {
        let bus = Bus::new();
        bus.update(|m| m.insert(mapping(0x100, 0x10, 0))).unwrap();
        for (base, len) in [(0x100, 1), (0xff, 2), (0x10f, 1), (0, u64::MAX), (0x80, 0x100)] {
            let error = bus.update(|m| m.insert(mapping(base, len, 0))).unwrap_err();
            assert!(matches!(error, BusError::Overlap { other_base: 0x100, .. }), "{error}");
        }
        for (base, len) in [(5, 0), (u64::MAX, 2)] {
            let error = bus.update(|m| m.insert(mapping(base, len, 0))).unwrap_err();
            assert_eq!(error, BusError::BadRange { base, len });
        }
        let error =
            bus.update(|m| m.insert(mapping(0x200, 1, 0)).and_then(|()| m.remove(0x300))).unwrap_err();
        assert_eq!(error, BusError::NotMapped { base: 0x300 });
        assert_eq!(bus.snapshot().iter().count(), 1, "a failed change leaves the map as it was");
        bus.update(|m| m.insert(mapping(u64::MAX, 1, 0))).unwrap();
    }

    /// A target that moves itself while it is being written, as a BAR does.
    struct Mover(Arc<Bus>);

    impl BusTarget for Mover {
        fn read(&self, _: u16, _: u64, _: &mut [u8]) {}

        fn write(&self, _: u16, _: u64, _: &[u8]) {
            self.0
                .update(|m| {
                    let old = m.remove(0x100)?;
                    m.insert(Mapping { base: 0x200, ..old })
                })
                .unwrap();
        }
    }

    #[test]
    fn a_target_may_change_the_map_from_its_own_write() {
        let bus = Arc::new(Bus::new());
        let target = Arc::new(Mover(bus.clone()));
        bus.update(|m| m.insert(Mapping { base: 0x100, len: 4, target, region: 0 })).unwrap();
        assert!(bus.write(0x100, &[0]));
        assert!(!bus.read(0x100, &mut [0]));
        assert!(bus.read(0x200, &mut [0]));
    }
}
