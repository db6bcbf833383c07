//! What a PCI function is to the host bridge.

use std::fmt;
use std::sync::{Arc, Mutex};

use vmm_device_model::bus::BusTarget;
use vmm_sys_util::eventfd::EventFd;

use crate::config::BARS;

/// The guest's view of one PCI function, behind a lock of its own.
///
/// The host bridge holds that lock for the length of one call and calls nothing else meanwhile.
pub trait PciFunction: Send {
    /// Fills `data` from configuration space; any offset below 4096 and any length can come.
    fn config_read(&mut self, offset: u16, data: &mut [u8]);

    /// Takes a write to configuration space, and says whether a BAR may answer elsewhere now: the host
    /// bridge then asks [`bar_addresses`](Self::bar_addresses), with the lock released in between.
    fn config_write(&mut self, offset: u16, data: &[u8]) -> ConfigEffect;

    /// Where each BAR should answer now; `None` where there is none or decoding is off.
    fn bar_addresses(&self) -> [Option<u64>; BARS];
}

/// What a write to configuration space asks of the host bridge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum ConfigEffect {
    /// Nothing.
    None,
    /// Look where the BARs should be.
    BarsMoved,
}

/// A function as it is attached to a bus.
#[derive(Clone)]
pub struct Attach {
    /// Its configuration space.
    pub function: Arc<Mutex<dyn PciFunction>>,
    /// What stands behind its BARs.
    pub bars: Vec<BarWindow>,
}

impl fmt::Debug for Attach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attach").field("bars", &self.bars).finish_non_exhaustive()
    }
}

/// What answers in a BAR.
#[derive(Clone)]
pub struct BarWindow {
    /// Which BAR.
    pub index: u8,
    /// Its size in bytes.
    pub size: u64,
    /// Who answers.
    pub target: Arc<dyn BusTarget>,
    /// Which of the target's regions the BAR is.
    pub region: u16,
    /// Doorbells inside the BAR; they move with it.
    pub doorbells: Vec<BarDoorbell>,
}

impl fmt::Debug for BarWindow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BAR {} of {:#x}, {} doorbells", self.index, self.size, self.doorbells.len())
    }
}

/// A guest write that signals an eventfd.
#[derive(Debug, Clone)]
pub struct BarDoorbell {
    /// Where in the BAR.
    pub offset: u64,
    /// What is signalled.
    pub event: Arc<EventFd>,
}
