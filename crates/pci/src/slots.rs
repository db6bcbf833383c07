//! Which device number belongs to which device id.

use std::collections::BTreeMap;

use vmm_snapshot::RecordError;

use crate::bdf::DEVICES;

/// The device numbers of one bus, booked by device id.
///
/// A number is asked for or is the lowest free one. It stays with its id until released, and
/// across save and restore: an id that is booked gets its own number again.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SlotAllocator {
    taken: BTreeMap<u8, String>,
}

impl SlotAllocator {
    /// All numbers free.
    pub fn new() -> Self {
        Self::default()
    }

    /// The number of device `id`: `wanted`, the one it has, or the lowest free one.
    ///
    /// # Errors
    /// `wanted` does not exist or is another's, `id` has another one, or none is free.
    pub fn take(&mut self, id: &str, wanted: Option<u8>) -> Result<u8, SlotError> {
        if let Some(slot) = self.slot_of(id) {
            return match wanted {
                Some(wanted) if wanted != slot => Err(SlotError::Taken { slot, owner: id.to_owned() }),
                _ => Ok(slot),
            };
        }
        let slot = match wanted {
            Some(slot) if slot >= DEVICES => return Err(SlotError::NoSuchSlot { slot }),
            Some(slot) => slot,
            None => (0..DEVICES).find(|s| !self.taken.contains_key(s)).ok_or(SlotError::Full)?,
        };
        if let Some(owner) = self.taken.get(&slot) {
            return Err(SlotError::Taken { slot, owner: owner.clone() });
        }
        self.taken.insert(slot, id.to_owned());
        Ok(slot)
    }

    /// Gives the number of device `id` back; returns it if there was one.
    pub fn release(&mut self, id: &str) -> Option<u8> {
        let slot = self.slot_of(id)?;
        self.taken.remove(&slot);
        Some(slot)
    }

    /// The number that device `id` has.
    pub fn slot_of(&self, id: &str) -> Option<u8> {
        self.taken.iter().find(|(_, owner)| *owner == id).map(|(slot, _)| *slot)
    }

    /// All bookings, for saved state.
    pub fn save(&self) -> SlotsV1 {
        let slot = |(slot, id): (&u8, &String)| SlotV1 { slot: *slot, id: id.clone() };
        SlotsV1 { slots: self.taken.iter().map(slot).collect() }
    }

    /// Bookings from saved state: each of its ids gets its own number again when it asks.
    ///
    /// # Errors
    /// A number does not exist, or a number or an id is there twice.
    pub fn restore(state: SlotsV1) -> Result<Self, RecordError> {
        let mut slots = Self::new();
        for SlotV1 { slot, id } in state.slots {
            if slots.slot_of(&id).is_some() {
                return Err(RecordError::invalid::<SlotsV1>(format!("{id:?} is there twice")));
            }
            let taken = slots.take(&id, Some(slot));
            taken.map_err(|e| RecordError::invalid::<SlotsV1>(e.to_string()))?;
        }
        Ok(slots)
    }
}

/// Saved state of a [`SlotAllocator`].
#[derive(Debug, Clone, PartialEq, Eq, minicbor::Encode, minicbor::Decode)]
pub struct SlotsV1 {
    /// The bookings, by number.
    #[n(0)]
    pub slots: Vec<SlotV1>,
}

vmm_snapshot::schema!(SlotsV1: "pci-slots" v1);

/// One booking.
#[derive(Debug, Clone, PartialEq, Eq, minicbor::Encode, minicbor::Decode)]
pub struct SlotV1 {
    /// Device number.
    #[n(0)]
    pub slot: u8,
    /// Device id.
    #[n(1)]
    pub id: String,
}

/// Why a device number was not given.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SlotError {
    /// Above 31.
    #[error("PCI slot {slot} does not exist, the highest is 31")]
    NoSuchSlot {
        /// The number.
        slot: u8,
    },
    /// Somebody has it.
    #[error("PCI slot {slot} belongs to {owner:?}")]
    Taken {
        /// The number.
        slot: u8,
        /// Device id of who has it.
        owner: String,
    },
    /// All 32 are booked.
    #[error("no PCI slot is free")]
    Full,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lowest_free_or_the_one_asked_for() {
        let mut slots = SlotAllocator::new();
        assert_eq!(slots.take("bridge", Some(0)).unwrap(), 0);
        assert_eq!(slots.take("b", Some(2)).unwrap(), 2);
        assert_eq!(slots.take("a", None).unwrap(), 1);
        assert_eq!(slots.take("c", None).unwrap(), 3);
        assert_eq!(slots.take("a", None).unwrap(), 1, "an id keeps its slot");
        assert_eq!(slots.take("a", Some(9)).unwrap_err(), SlotError::Taken { slot: 1, owner: "a".into() });
        assert_eq!(slots.take("d", Some(2)).unwrap_err(), SlotError::Taken { slot: 2, owner: "b".into() });
        assert_eq!(slots.take("d", Some(32)).unwrap_err(), SlotError::NoSuchSlot { slot: 32 });
        assert_eq!(slots.release("a"), Some(1));
        assert_eq!(slots.release("a"), None);
        assert_eq!(slots.take("d", None).unwrap(), 1);
    }

    #[test]
    fn thirty_two_devices_and_no_more() {
        let mut slots = SlotAllocator::new();
        for i in 0..32 {
            assert_eq!(slots.take(&format!("d{i}"), None).unwrap(), i);
        }
        assert_eq!(slots.take("one more", None).unwrap_err(), SlotError::Full);
    }

    #[test]
    fn saved_bookings_come_back_by_id() {
        let mut slots = SlotAllocator::new();
        slots.take("a", None).unwrap();
        slots.take("b", Some(7)).unwrap();
        let mut restored = SlotAllocator::restore(slots.save()).unwrap();
        assert_eq!(restored, slots);
        assert_eq!(restored.take("b", None).unwrap(), 7);
        assert_eq!(restored.take("new", None).unwrap(), 1);
    }

    #[test]
    fn impossible_bookings_are_refused() {
        let state = |slots: &[(u8, &str)]| SlotsV1 {
            slots: slots.iter().map(|(slot, id)| SlotV1 { slot: *slot, id: (*id).to_owned() }).collect(),
        };
        for bad in [&[(32, "a")][..], &[(1, "a"), (1, "b")], &[(1, "a"), (2, "a")], &[(1, "a"), (1, "a")]] {
            assert!(SlotAllocator::restore(state(bad)).is_err(), "{bad:?}");
        }
    }
}
