//! The phases and sets of them.

use std::fmt;

/// How many phases there are.
pub(crate) const COUNT: usize = 9;

/// How far the VM is. Derived from [`VmSlot`](crate::VmSlot), never stored beside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// There is no VM.
    Empty,
    /// A configuration is stored; nothing of it runs or holds memory.
    Created,
    /// A machine is being built for the configuration; the API is served meanwhile.
    Booting,
    /// The guest runs.
    Running,
    /// The guest's vCPUs are parked; memory and devices exist.
    Paused,
    /// A snapshot is being written; the guest is paused, or runs on meanwhile. The API is served.
    Saving,
    /// The VM is being given away to another VMM; its guest runs on here until the hand-over.
    Migrating,
    /// A VM of another VMM is waited for, or is on its way here. There is none yet.
    Receiving,
    /// The guest is off; its configuration is kept and can be booted again.
    Shutdown,
}

impl Phase {
    /// Every phase, in table order.
    pub const ALL: [Self; COUNT] = [
        Self::Empty,
        Self::Created,
        Self::Booting,
        Self::Running,
        Self::Paused,
        Self::Saving,
        Self::Migrating,
        Self::Receiving,
        Self::Shutdown,
    ];

    /// Our name of the phase.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Empty => "Empty",
            Self::Created => "Created",
            Self::Booting => "Booting",
            Self::Running => "Running",
            Self::Paused => "Paused",
            Self::Saving => "Saving",
            Self::Migrating => "Migrating",
            Self::Receiving => "Receiving",
            Self::Shutdown => "Shutdown",
        }
    }

    /// The word of the REST contract's `VmState` that `vm.info` shows; `None` without a VM (then `vm.info` is 404). The
    /// contract has no word for a boot under way, nor for a snapshot or a migration: then see
    /// [`VmSlot::shown`](crate::VmSlot::shown).
    #[must_use]
    pub const fn contract_word(self) -> Option<&'static str> {
        match self {
            Self::Empty | Self::Receiving => None,
            Self::Booting => Some(Self::Created.name()),
            Self::Saving | Self::Migrating => Some(Self::Paused.name()),
            other => Some(other.name()),
        }
    }

    /// The item of `items` that is this phase's; they are in table order.
    #[must_use]
    pub(crate) const fn of<T>(self, items: &[T; COUNT]) -> &T {
        let [empty, created, booting, running, paused, saving, migrating, receiving, off] = items;
        match self {
            Self::Empty => empty,
            Self::Created => created,
            Self::Booting => booting,
            Self::Running => running,
            Self::Paused => paused,
            Self::Saving => saving,
            Self::Migrating => migrating,
            Self::Receiving => receiving,
            Self::Shutdown => off,
        }
    }

    const fn bit(self) -> u16 {
        1 << (self as u8)
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A set of phases, for "allowed in" lists.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct PhaseSet(u16);

impl PhaseSet {
    /// The set without members.
    pub const EMPTY: Self = Self(0);

    /// This set and `phase`.
    #[must_use]
    pub const fn with(self, phase: Phase) -> Self {
        Self(self.0 | phase.bit())
    }

    /// Whether `phase` is a member.
    #[must_use]
    pub const fn contains(self, phase: Phase) -> bool {
        self.0 & phase.bit() != 0
    }

    /// The members in table order.
    pub fn iter(self) -> impl Iterator<Item = Phase> {
        Phase::ALL.into_iter().filter(move |phase| self.contains(*phase))
    }
}

impl FromIterator<Phase> for PhaseSet {
    fn from_iter<I: IntoIterator<Item = Phase>>(phases: I) -> Self {
        phases.into_iter().fold(Self::EMPTY, Self::with)
    }
}

impl fmt::Debug for PhaseSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

impl fmt::Display for PhaseSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (place, phase) in self.iter().enumerate() {
            if place > 0 {
                f.write_str(", ")?;
            }
            f.write_str(phase.name())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_keep_table_order() {
        let set: PhaseSet = [Phase::Shutdown, Phase::Created].into_iter().collect();
        assert_eq!(set.to_string(), "Created, Shutdown");
        assert!(!set.contains(Phase::Running));
        assert_eq!(PhaseSet::EMPTY.iter().count(), 0);
    }

    #[test]
    fn contract_words_are_the_contracts() {
        let words: Vec<_> = Phase::ALL.iter().filter_map(|phase| phase.contract_word()).collect();
        assert_eq!(words, ["Created", "Created", "Running", "Paused", "Paused", "Paused", "Shutdown"]);
    }
}
