//! Many owners' records, keyed by owner: [`RecordSet`].

use std::collections::BTreeMap;

use crate::{Record, RecordError, Schema};

/// The records of many owners, each under its owner's id (`"_disk0"`, `"vcpu/0"`, `"ioapic"`).
///
/// Restoring *takes* records out and ends with [`finish`](Self::finish): state that nobody asked for is an
/// error, for it belongs to a device that this VM does not have. A set is a [`Schema`] itself, so a manager
/// can put the set of its devices into the set of the VM; that makes a tree.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RecordSet {
    records: BTreeMap<String, Record>,
}

impl RecordSet {
    /// A set without records.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Packs `state` under `owner`.
    ///
    /// # Errors
    /// `owner` already has a record.
    pub fn put<S: Schema>(&mut self, owner: &str, state: &S) -> Result<(), SetError> {
        self.insert(owner, Record::of(state))
    }

    /// Adds a record that is packed already.
    ///
    /// # Errors
    /// `owner` already has a record.
    pub fn insert(&mut self, owner: &str, record: Record) -> Result<(), SetError> {
        if self.records.contains_key(owner) {
            return Err(SetError::Twice { owner: owner.to_owned() });
        }
        self.records.insert(owner.to_owned(), record);
        Ok(())
    }

    /// Takes `owner`'s record out and unpacks it, upgrading older versions.
    ///
    /// # Errors
    /// There is no such record, or it is not the state `S` (it is gone from the set then, too: the restore
    /// has failed).
    pub fn take<S: Schema>(&mut self, owner: &str) -> Result<S, SetError> {
        let record = self.take_record(owner)?;
        record.parse().map_err(|source| SetError::Record { owner: owner.to_owned(), source })
    }

    /// Takes `owner`'s record out as it is.
    ///
    /// # Errors
    /// There is no such record.
    pub fn take_record(&mut self, owner: &str) -> Result<Record, SetError> {
        self.records.remove(owner).ok_or_else(|| SetError::Missing { owner: owner.to_owned() })
    }

    /// Whether `owner` has a record here.
    #[must_use]
    pub fn contains(&self, owner: &str) -> bool {
        self.records.contains_key(owner)
    }

    /// Owners and records, in the order of the owners' ids.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Record)> {
        self.records.iter().map(|(owner, record)| (owner.as_str(), record))
    }

    /// Number of records.
    #[must_use]
    pub fn len(&self) -> usize {
        self.records.len()
    }

    /// Whether no record is here.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// Ends a restore.
    ///
    /// # Errors
    /// Records that nobody took are left.
    pub fn finish(self) -> Result<(), SetError> {
        if self.is_empty() {
            return Ok(());
        }
        Err(SetError::LeftOver { owners: self.records.into_keys().collect() })
    }
}

/// Why a set of records could not be filled or emptied.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SetError {
    /// Two owners with one id.
    #[error("{owner:?} has a record already")]
    Twice {
        /// The id.
        owner: String,
    },
    /// Nothing was saved for this owner.
    #[error("no record of {owner:?}")]
    Missing {
        /// The id.
        owner: String,
    },
    /// The owner's record is not the state that was asked for.
    #[error("state of {owner:?}")]
    Record {
        /// The id.
        owner: String,
        /// What is wrong with it.
        #[source]
        source: RecordError,
    },
    /// State that nobody restored.
    #[error("records that nothing here restores: {}", owners.join(", "))]
    LeftOver {
        /// Whose they are.
        owners: Vec<String>,
    },
}

/// How a set travels.
#[derive(minicbor::Encode, minicbor::Decode)]
struct Entry {
    #[n(0)]
    owner: String,
    #[n(1)]
    record: Record,
}

impl From<crate::Never> for RecordSet {
    fn from(never: crate::Never) -> Self {
        never.absurd()
    }
}

/// Encoded as an array of (owner, record), owners strictly ascending: doubled owners are refused.
impl Schema for RecordSet {
    const KIND: &'static str = "record-set";
    const VERSION: u16 = 1;
    type Previous = crate::Never;

    fn encode(&self) -> Vec<u8> {
        let entries: Vec<Entry> = self
            .iter()
            .map(|(owner, record)| Entry { owner: owner.to_owned(), record: record.clone() })
            .collect();
        minicbor::to_vec(entries).unwrap_or_default()
    }

    fn decode(bytes: &[u8]) -> Result<Self, RecordError> {
        let malformed = |source| RecordError::Malformed { kind: Self::KIND, version: Self::VERSION, source };
        let entries: Vec<Entry> = minicbor::decode(bytes).map_err(malformed)?;
        let mut set = Self::new();
        for Entry { owner, record } in entries {
            set.insert(&owner, record).map_err(|error| RecordError::invalid::<Self>(error.to_string()))?;
        }
        if set.encode() != bytes {
            return Err(malformed(minicbor::decode::Error::message(
                "more or other than the version describes",
            )));
        }
        Ok(set)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::NoState;

    #[derive(Debug, PartialEq, minicbor::Encode, minicbor::Decode)]
    struct Timer {
        #[n(0)]
        ticks: u64,
    }
    crate::schema!(Timer: "timer" v1);

    fn set() -> RecordSet {
        let mut set = RecordSet::new();
        set.put("timer", &Timer { ticks: 7 }).unwrap();
        set.put("rng", &NoState {}).unwrap();
        set
    }

    #[test]
    fn everything_taken_is_the_end() {
        let mut set = set();
        assert_eq!(set.take::<Timer>("timer").unwrap(), Timer { ticks: 7 });
        set.take::<NoState>("rng").unwrap();
        set.finish().unwrap();
    }

    #[test]
    fn left_over_is_named() {
        let mut set = set();
        set.take::<Timer>("timer").unwrap();
        let error = set.finish().unwrap_err();
        assert_eq!(error.to_string(), "records that nothing here restores: rng");
    }

    #[test]
    fn taken_is_gone_and_missing_is_named() {
        let mut set = set();
        set.take::<Timer>("timer").unwrap();
        assert_eq!(set.take::<Timer>("timer").unwrap_err().to_string(), "no record of \"timer\"");
    }

    #[test]
    fn one_owner_one_record() {
        let error = set().put("rng", &NoState {}).unwrap_err();
        assert_eq!(error.to_string(), "\"rng\" has a record already");
    }

    #[test]
    fn the_wrong_state_names_owner_and_cause() {
        let error = set().take::<NoState>("timer").unwrap_err();
        assert_eq!(error.to_string(), "state of \"timer\"");
        let cause = std::error::Error::source(&error).unwrap().to_string();
        assert_eq!(cause, "record is of kind \"timer\", expected \"none\"");
    }

    #[test]
    fn a_set_in_a_set() {
        let mut vm = RecordSet::new();
        vm.put("devices", &set()).unwrap();
        let travelled = RecordSet::decode(&vm.encode()).unwrap();
        assert_eq!(travelled, vm);
        let mut vm = travelled;
        assert_eq!(vm.take::<RecordSet>("devices").unwrap(), set());
        vm.finish().unwrap();
    }

    #[test]
    fn doubled_or_unsorted_owners_are_refused() {
        let entry = |owner: &str| Entry { owner: owner.to_owned(), record: Record::of(&NoState {}) };
        for owners in [["a", "a"], ["b", "a"]] {
            let bytes = minicbor::to_vec(owners.map(entry)).unwrap();
            assert!(RecordSet::decode(&bytes).is_err(), "{owners:?}");
        }
        let bytes = minicbor::to_vec(["a", "b"].map(entry)).unwrap();
        assert_eq!(RecordSet::decode(&bytes).unwrap().len(), 2);
    }
}
