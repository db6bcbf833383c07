//! The one variable that holds the VM.

use crate::Phase;
use std::mem;

/// A move was asked for in a phase that does not have it. The value that could not be placed comes back.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the VM slot cannot do that in phase {phase}")]
pub struct Misplaced<T> {
    /// The phase the slot was, and still is, in.
    pub phase: Phase,
    /// What the caller handed in.
    pub value: T,
}

/// A phase without a machine, from where a boot begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Idle {
    /// Never booted.
    Created,
    /// Switched off.
    Shutdown,
    /// Not even a configuration before: both come of a snapshot.
    Empty,
}

/// What the guest does while its VM is saved or given away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guest {
    /// It runs on.
    Runs,
    /// It is paused.
    Rests,
}

/// The VM, or its absence: `C` is the configuration, `M` the running machine.
///
/// The owner does the work first and moves the slot afterwards; a move cannot fail half way.
#[derive(Debug, Default)]
pub enum VmSlot<C, M> {
    /// No VM.
    #[default]
    Empty,
    /// Only a configuration.
    Created(C),
    /// A snapshot is being looked at, for the configuration that is in it.
    Loading,
    /// A machine is being built for the configuration. If that fails the VM is in the second phase again.
    Booting(C, Idle),
    /// A machine whose vCPUs run.
    Running(C, M),
    /// A machine whose vCPUs are parked.
    Paused(C, M),
    /// A machine that is being saved.
    Saving(C, M, Guest),
    /// A machine that is being given away.
    Migrating(C, M, Guest),
    /// A VM of another VMM is waited for.
    Awaiting,
    /// Its configuration is here; its machine is not this VMM's yet.
    Arriving(C),
    /// Only a configuration, of a machine that has been switched off.
    Shutdown(C),
}

impl<C, M> VmSlot<C, M> {
    /// The phase this slot is in.
    pub const fn phase(&self) -> Phase {
        match self {
            Self::Empty => Phase::Empty,
            Self::Created(_) => Phase::Created,
            Self::Loading | Self::Booting(..) => Phase::Booting,
            Self::Running(..) => Phase::Running,
            Self::Paused(..) => Phase::Paused,
            Self::Saving(..) => Phase::Saving,
            Self::Migrating(..) => Phase::Migrating,
            Self::Awaiting | Self::Arriving(_) => Phase::Receiving,
            Self::Shutdown(_) => Phase::Shutdown,
        }
    }

    /// The phase that clients of the contract are shown: a VM that is being saved or given away runs, or is paused.
    pub const fn shown(&self) -> Phase {
        match self {
            Self::Saving(_, _, Guest::Runs) | Self::Migrating(_, _, Guest::Runs) => Phase::Running,
            Self::Saving(_, _, Guest::Rests) | Self::Migrating(_, _, Guest::Rests) => Phase::Paused,
            other => other.phase(),
        }
    }

    /// The configuration, where there is one.
    pub const fn config(&self) -> Option<&C> {
        match self {
            Self::Empty | Self::Loading | Self::Awaiting => None,
            Self::Created(config)
            | Self::Booting(config, _)
            | Self::Running(config, _)
            | Self::Paused(config, _)
            | Self::Saving(config, _, _)
            | Self::Migrating(config, _, _)
            | Self::Arriving(config)
            | Self::Shutdown(config) => Some(config),
        }
    }

    /// The configuration, to change it.
    pub const fn config_mut(&mut self) -> Option<&mut C> {
        match self {
            Self::Empty | Self::Loading | Self::Awaiting => None,
            Self::Created(config)
            | Self::Booting(config, _)
            | Self::Running(config, _)
            | Self::Paused(config, _)
            | Self::Saving(config, _, _)
            | Self::Migrating(config, _, _)
            | Self::Arriving(config)
            | Self::Shutdown(config) => Some(config),
        }
    }

    /// The machine, where there is one.
    pub const fn machine(&self) -> Option<&M> {
        match self {
            Self::Running(_, machine)
            | Self::Paused(_, machine)
            | Self::Saving(_, machine, _)
            | Self::Migrating(_, machine, _) => Some(machine),
            _ => None,
        }
    }

    /// The machine, to act on it.
    pub const fn machine_mut(&mut self) -> Option<&mut M> {
        match self {
            Self::Running(_, machine)
            | Self::Paused(_, machine)
            | Self::Saving(_, machine, _)
            | Self::Migrating(_, machine, _) => Some(machine),
            _ => None,
        }
    }

    /// Configuration and machine together, where there is a machine.
    pub const fn parts_mut(&mut self) -> Option<(&mut C, &mut M)> {
        match self {
            Self::Running(config, machine)
            | Self::Paused(config, machine)
            | Self::Saving(config, machine, _)
            | Self::Migrating(config, machine, _) => Some((config, machine)),
            _ => None,
        }
    }

    /// Empty to Created.
    ///
    /// # Errors
    /// There is a VM already; the configuration comes back.
    pub fn create(&mut self, config: C) -> Result<(), Misplaced<C>> {
        match self {
            Self::Empty => {
                *self = Self::Created(config);
                Ok(())
            }
            _ => Err(Misplaced { phase: self.phase(), value: config }),
        }
    }

    /// Created or Shutdown to Booting.
    ///
    /// # Errors
    /// There is no configuration, or a machine is there or on its way.
    pub fn begin_boot(&mut self) -> Result<(), Misplaced<()>> {
        match mem::take(self) {
            Self::Created(config) => *self = Self::Booting(config, Idle::Created),
            Self::Shutdown(config) => *self = Self::Booting(config, Idle::Shutdown),
            other => return self.put_back(other),
        }
        Ok(())
    }

    /// Empty to Booting: a snapshot is being looked at.
    ///
    /// # Errors
    /// There is a VM already.
    pub fn begin_restore(&mut self) -> Result<(), Misplaced<()>> {
        match mem::take(self) {
            Self::Empty => *self = Self::Loading,
            other => return self.put_back(other),
        }
        Ok(())
    }

    /// Empty to Receiving.
    ///
    /// # Errors
    /// There is a VM already.
    pub fn begin_receive(&mut self) -> Result<(), Misplaced<()>> {
        match mem::take(self) {
            Self::Empty => *self = Self::Awaiting,
            other => return self.put_back(other),
        }
        Ok(())
    }

    /// The configuration of the snapshot, or of the VM that arrives, is known. Still Booting, or Receiving.
    ///
    /// # Errors
    /// Neither is waited for; the configuration comes back.
    pub fn load(&mut self, config: C) -> Result<(), Misplaced<C>> {
        match self {
            Self::Loading => {
                *self = Self::Booting(config, Idle::Empty);
                Ok(())
            }
            Self::Awaiting => {
                *self = Self::Arriving(config);
                Ok(())
            }
            _ => Err(Misplaced { phase: self.phase(), value: config }),
        }
    }

    /// Booting to Running.
    ///
    /// # Errors
    /// No boot is under way; the machine comes back.
    pub fn start(&mut self, machine: M) -> Result<(), Misplaced<M>> {
        match mem::take(self) {
            Self::Booting(config, _) => {
                *self = Self::Running(config, machine);
                Ok(())
            }
            other => {
                *self = other;
                Err(Misplaced { phase: self.phase(), value: machine })
            }
        }
    }

    /// Booting or Receiving to Paused: the end of a restore, or a VM has arrived.
    ///
    /// # Errors
    /// No boot is under way, and no VM on its way here; the machine comes back.
    pub fn restored(&mut self, machine: M) -> Result<(), Misplaced<M>> {
        match mem::take(self) {
            Self::Booting(config, _) | Self::Arriving(config) => {
                *self = Self::Paused(config, machine);
                Ok(())
            }
            other => {
                *self = other;
                Err(Misplaced { phase: self.phase(), value: machine })
            }
        }
    }

    /// Booting to where the boot began. A VM that arrived is gone again, and its end of the migration under way: still
    /// Receiving, until [`end_receive`](Self::end_receive).
    ///
    /// # Errors
    /// No boot is under way, and no VM waited for.
    pub fn fail_boot(&mut self) -> Result<(), Misplaced<()>> {
        match mem::take(self) {
            Self::Booting(config, Idle::Created) => *self = Self::Created(config),
            Self::Booting(config, Idle::Shutdown) => *self = Self::Shutdown(config),
            Self::Loading | Self::Booting(_, Idle::Empty) => {}
            Self::Awaiting | Self::Arriving(_) => *self = Self::Awaiting,
            other => return self.put_back(other),
        }
        Ok(())
    }

    /// Receiving to Empty: no VM came.
    ///
    /// # Errors
    /// None was waited for.
    pub fn end_receive(&mut self) -> Result<(), Misplaced<()>> {
        match mem::take(self) {
            Self::Awaiting | Self::Arriving(_) => Ok(()),
            other => self.put_back(other),
        }
    }

    /// Running to Paused.
    ///
    /// # Errors
    /// The VM does not run.
    pub fn pause(&mut self) -> Result<(), Misplaced<()>> {
        match mem::take(self) {
            Self::Running(config, machine) => {
                *self = Self::Paused(config, machine);
                Ok(())
            }
            other => self.put_back(other),
        }
    }

    /// Paused to Running.
    ///
    /// # Errors
    /// The VM is not paused.
    pub fn resume(&mut self) -> Result<(), Misplaced<()>> {
        match mem::take(self) {
            Self::Paused(config, machine) => {
                *self = Self::Running(config, machine);
                Ok(())
            }
            other => self.put_back(other),
        }
    }

    /// Running or Paused to Saving.
    ///
    /// # Errors
    /// There is no machine, or it is being saved already.
    pub fn begin_save(&mut self) -> Result<(), Misplaced<()>> {
        match mem::take(self) {
            Self::Running(config, machine) => *self = Self::Saving(config, machine, Guest::Runs),
            Self::Paused(config, machine) => *self = Self::Saving(config, machine, Guest::Rests),
            other => return self.put_back(other),
        }
        Ok(())
    }

    /// Saving to Running or Paused: where the guest is now.
    ///
    /// # Errors
    /// The VM is not being saved.
    pub fn end_save(&mut self, guest: Guest) -> Result<(), Misplaced<()>> {
        match (mem::take(self), guest) {
            (Self::Saving(config, machine, _), Guest::Runs) => *self = Self::Running(config, machine),
            (Self::Saving(config, machine, _), Guest::Rests) => *self = Self::Paused(config, machine),
            (other, _) => return self.put_back(other),
        }
        Ok(())
    }

    /// Running or Paused to Migrating.
    ///
    /// # Errors
    /// There is no machine, or a job is under way.
    pub fn begin_migrate(&mut self) -> Result<(), Misplaced<()>> {
        match mem::take(self) {
            Self::Running(config, machine) => *self = Self::Migrating(config, machine, Guest::Runs),
            Self::Paused(config, machine) => *self = Self::Migrating(config, machine, Guest::Rests),
            other => return self.put_back(other),
        }
        Ok(())
    }

    /// Migrating to Running or Paused: the VM stays, and that is where its guest is now.
    ///
    /// # Errors
    /// The VM is not being given away.
    pub fn end_migrate(&mut self, guest: Guest) -> Result<(), Misplaced<()>> {
        match (mem::take(self), guest) {
            (Self::Migrating(config, machine, _), Guest::Runs) => *self = Self::Running(config, machine),
            (Self::Migrating(config, machine, _), Guest::Rests) => *self = Self::Paused(config, machine),
            (other, _) => return self.put_back(other),
        }
        Ok(())
    }

    /// Running, Paused, Saving or Migrating to Shutdown; the machine comes out, for the caller to end. `None`, and no move, without
    /// one.
    pub fn stop(&mut self) -> Option<M> {
        match mem::take(self) {
            Self::Running(config, machine)
            | Self::Paused(config, machine)
            | Self::Saving(config, machine, _)
            | Self::Migrating(config, machine, _) => {
                *self = Self::Shutdown(config);
                Some(machine)
            }
            other => {
                *self = other;
                None
            }
        }
    }

    /// Any phase to Empty; what was there comes out.
    pub fn clear(&mut self) -> (Option<C>, Option<M>) {
        match mem::take(self) {
            Self::Empty | Self::Loading | Self::Awaiting => (None, None),
            Self::Created(config)
            | Self::Booting(config, _)
            | Self::Arriving(config)
            | Self::Shutdown(config) => (Some(config), None),
            Self::Running(config, machine)
            | Self::Paused(config, machine)
            | Self::Saving(config, machine, _)
            | Self::Migrating(config, machine, _) => (Some(config), Some(machine)),
        }
    }

    fn put_back(&mut self, other: Self) -> Result<(), Misplaced<()>> {
        *self = other;
        Err(Misplaced { phase: self.phase(), value: () })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Slot = VmSlot<&'static str, u32>;

    #[test]
    fn a_refused_move_changes_nothing_and_gives_the_value_back() {
        let mut slot = Slot::Running("c", 1);
        assert_eq!(slot.start(2), Err(Misplaced { phase: Phase::Running, value: 2 }));
        assert_eq!(slot.create("d"), Err(Misplaced { phase: Phase::Running, value: "d" }));
        assert_eq!(slot.resume().map_err(|e| e.phase), Err(Phase::Running));
        assert_eq!(slot.begin_boot().map_err(|e| e.phase), Err(Phase::Running));
        assert_eq!(slot.fail_boot().map_err(|e| e.phase), Err(Phase::Running));
        assert_eq!(slot.machine(), Some(&1));
        assert_eq!(slot.config(), Some(&"c"));
        let mut slot = Slot::Shutdown("c");
        assert!(slot.pause().is_err());
        assert_eq!(slot.stop(), None);
        assert_eq!(slot.phase(), Phase::Shutdown);
        assert_eq!(slot.begin_save().map_err(|e| e.phase), Err(Phase::Shutdown));
        assert_eq!(slot.end_save(Guest::Runs).map_err(|e| e.phase), Err(Phase::Shutdown));
        assert_eq!(slot.begin_restore().map_err(|e| e.phase), Err(Phase::Shutdown));
        assert_eq!(slot.load("d"), Err(Misplaced { phase: Phase::Shutdown, value: "d" }));
        assert_eq!(slot.restored(2), Err(Misplaced { phase: Phase::Shutdown, value: 2 }));
    }

    #[test]
    fn a_restore_that_fails_leaves_nothing_and_one_that_does_not_a_paused_vm() {
        let mut slot = Slot::default();
        slot.begin_restore().unwrap();
        assert_eq!((slot.phase(), slot.config()), (Phase::Booting, None));
        slot.fail_boot().unwrap();
        assert_eq!(slot.phase(), Phase::Empty);
        slot.begin_restore().unwrap();
        slot.load("c").unwrap();
        assert_eq!((slot.phase(), slot.config()), (Phase::Booting, Some(&"c")));
        slot.fail_boot().unwrap();
        assert_eq!(slot.phase(), Phase::Empty);
        slot.begin_restore().unwrap();
        slot.load("c").unwrap();
        slot.restored(1).unwrap();
        assert_eq!((slot.phase(), slot.machine()), (Phase::Paused, Some(&1)));
    }

    #[test]
    fn a_vm_that_is_saved_keeps_its_machine_and_shows_what_its_guest_does() {
        for (mut slot, shown) in
            [(Slot::Running("c", 1), Phase::Running), (Slot::Paused("c", 1), Phase::Paused)]
        {
            slot.begin_save().unwrap();
            assert_eq!((slot.phase(), slot.shown(), slot.machine()), (Phase::Saving, shown, Some(&1)));
            assert!(slot.begin_save().is_err() && slot.pause().is_err() && slot.resume().is_err());
            slot.end_save(Guest::Rests).unwrap();
            assert_eq!(slot.phase(), Phase::Paused);
        }
        let mut slot = Slot::Saving("c", 1, Guest::Runs);
        assert_eq!((slot.stop(), slot.phase()), (Some(1), Phase::Shutdown));
    }

    #[test]
    fn a_vm_that_is_given_away_goes_or_is_as_before() {
        for (mut slot, shown, guest) in [
            (Slot::Running("c", 1), Phase::Running, Guest::Runs),
            (Slot::Paused("c", 1), Phase::Paused, Guest::Rests),
        ] {
            slot.begin_migrate().unwrap();
            assert_eq!((slot.phase(), slot.shown(), slot.machine()), (Phase::Migrating, shown, Some(&1)));
            assert!(slot.begin_migrate().is_err() && slot.begin_save().is_err() && slot.pause().is_err());
            assert_eq!(slot.parts_mut().map(|(c, m)| (*c, *m)), Some(("c", 1)));
            slot.end_migrate(guest).unwrap();
            assert_eq!((slot.phase(), slot.machine()), (shown, Some(&1)));
            assert!(slot.end_migrate(guest).is_err());
            slot.begin_migrate().unwrap();
            assert_eq!((slot.stop(), slot.phase()), (Some(1), Phase::Shutdown));
        }
    }

    #[test]
    fn a_vm_arrives_or_there_is_none() {
        let mut slot = Slot::default();
        assert!(slot.end_receive().is_err());
        slot.begin_receive().unwrap();
        assert_eq!((slot.phase(), slot.config()), (Phase::Receiving, None));
        assert!(slot.begin_receive().is_err() && slot.begin_restore().is_err() && slot.start(1).is_err());
        assert!(slot.restored(1).is_err(), "nothing is known of it");
        slot.load("c").unwrap();
        assert_eq!((slot.phase(), slot.config(), slot.machine()), (Phase::Receiving, Some(&"c"), None));
        slot.fail_boot().unwrap();
        assert_eq!((slot.phase(), slot.config()), (Phase::Receiving, None));
        slot.end_receive().unwrap();
        assert_eq!(slot.phase(), Phase::Empty);
        slot.begin_receive().unwrap();
        slot.load("c").unwrap();
        slot.restored(1).unwrap();
        assert_eq!((slot.phase(), slot.machine()), (Phase::Paused, Some(&1)));
        let mut slot = Slot::Arriving("c");
        assert_eq!(slot.clear(), (Some("c"), None));
    }

    #[test]
    fn the_whole_way() {
        let mut slot = Slot::default();
        assert_eq!(slot.clear(), (None, None));
        slot.create("c").unwrap();
        slot.begin_boot().unwrap();
        assert_eq!((slot.phase(), slot.config(), slot.machine()), (Phase::Booting, Some(&"c"), None));
        slot.fail_boot().unwrap();
        assert_eq!(slot.phase(), Phase::Created);
        slot.begin_boot().unwrap();
        slot.start(1).unwrap();
        slot.pause().unwrap();
        slot.resume().unwrap();
        assert_eq!(slot.stop(), Some(1));
        slot.begin_boot().unwrap();
        slot.fail_boot().unwrap();
        assert_eq!(slot.phase(), Phase::Shutdown);
        slot.begin_boot().unwrap();
        slot.start(2).unwrap();
        assert_eq!(slot.parts_mut().map(|(c, m)| (*c, *m)), Some(("c", 2)));
        assert_eq!(slot.clear(), (Some("c"), Some(2)));
        assert_eq!(slot.phase(), Phase::Empty);
    }
}
