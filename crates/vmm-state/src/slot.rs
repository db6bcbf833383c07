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

/// A phase with a configuration and without a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Idle {
    /// Never booted.
    Created,
    /// Switched off.
    Shutdown,
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
    /// A machine is being built for the configuration. If that fails the VM is in the second phase again.
    Booting(C, Idle),
    /// A machine whose vCPUs run.
    Running(C, M),
    /// A machine whose vCPUs are parked.
    Paused(C, M),
    /// Only a configuration, of a machine that has been switched off.
    Shutdown(C),
}

impl<C, M> VmSlot<C, M> {
    /// The phase this slot is in.
    pub const fn phase(&self) -> Phase {
        match self {
            Self::Empty => Phase::Empty,
            Self::Created(_) => Phase::Created,
            Self::Booting(..) => Phase::Booting,
            Self::Running(..) => Phase::Running,
            Self::Paused(..) => Phase::Paused,
            Self::Shutdown(_) => Phase::Shutdown,
        }
    }

    /// The configuration, where there is one.
    pub const fn config(&self) -> Option<&C> {
        match self {
            Self::Empty => None,
            Self::Created(config)
            | Self::Booting(config, _)
            | Self::Running(config, _)
            | Self::Paused(config, _)
            | Self::Shutdown(config) => Some(config),
        }
    }

    /// The configuration, to change it.
    pub const fn config_mut(&mut self) -> Option<&mut C> {
        match self {
            Self::Empty => None,
            Self::Created(config)
            | Self::Booting(config, _)
            | Self::Running(config, _)
            | Self::Paused(config, _)
            | Self::Shutdown(config) => Some(config),
        }
    }

    /// The machine, where there is one.
    pub const fn machine(&self) -> Option<&M> {
        match self {
            Self::Running(_, machine) | Self::Paused(_, machine) => Some(machine),
            Self::Empty | Self::Created(_) | Self::Booting(..) | Self::Shutdown(_) => None,
        }
    }

    /// The machine, to act on it.
    pub const fn machine_mut(&mut self) -> Option<&mut M> {
        match self {
            Self::Running(_, machine) | Self::Paused(_, machine) => Some(machine),
            Self::Empty | Self::Created(_) | Self::Booting(..) | Self::Shutdown(_) => None,
        }
    }

    /// Configuration and machine together, where there is a machine.
    pub const fn parts_mut(&mut self) -> Option<(&mut C, &mut M)> {
        match self {
            Self::Running(config, machine) | Self::Paused(config, machine) => Some((config, machine)),
            Self::Empty | Self::Created(_) | Self::Booting(..) | Self::Shutdown(_) => None,
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

    /// Booting to where the boot began.
    ///
    /// # Errors
    /// No boot is under way.
    pub fn fail_boot(&mut self) -> Result<(), Misplaced<()>> {
        match mem::take(self) {
            Self::Booting(config, Idle::Created) => *self = Self::Created(config),
            Self::Booting(config, Idle::Shutdown) => *self = Self::Shutdown(config),
            other => return self.put_back(other),
        }
        Ok(())
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

    /// Running or Paused to Shutdown; the machine comes out, for the caller to end. `None`, and no move, without one.
    pub fn stop(&mut self) -> Option<M> {
        match mem::take(self) {
            Self::Running(config, machine) | Self::Paused(config, machine) => {
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
            Self::Empty => (None, None),
            Self::Created(config) | Self::Booting(config, _) | Self::Shutdown(config) => (Some(config), None),
            Self::Running(config, machine) | Self::Paused(config, machine) => (Some(config), Some(machine)),
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
