//! Interrupts: pins of the IOAPIC and MSI vectors.

use std::fmt;
use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

/// One input pin of the interrupt controller.
pub trait InterruptLine: Send + Sync + fmt::Debug {
    /// Drives the pin. For an edge-triggered pin the change to `true` is the interrupt.
    fn set(&self, asserted: bool);

    /// An edge: asserts and deasserts.
    fn pulse(&self) {
        self.set(true);
        self.set(false);
    }
}

/// A message-signalled interrupt: what a write of `data` to `address` means to the local APICs
/// (Intel SDM volume 3, "Message Signalled Interrupts").
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MsiMessage {
    /// Message address, both halves.
    pub address: u64,
    /// Message data.
    pub data: u32,
}

/// A block of MSI vectors that belongs to one device. Dropping it gives the vectors back.
pub trait MsiVectors: Send + Sync + fmt::Debug {
    /// How many vectors.
    fn count(&self) -> u16;

    /// Sets where vectors go; `None` is a masked vector, which has no route. One call is one update of
    /// the hypervisor's routing table, however many vectors it names.
    ///
    /// # Errors
    /// A vector is not of this block, or the hypervisor refuses; the routes are then as before.
    fn set_routes(&self, routes: &[(u16, Option<MsiMessage>)]) -> io::Result<()>;

    /// Raises vector `index`. Without a route nothing happens.
    ///
    /// # Errors
    /// The vector is not of this block, or signalling failed.
    fn trigger(&self, index: u16) -> io::Result<()>;

    /// An eventfd that raises vector `index` when written, for back ends outside this process's threads.
    ///
    /// # Errors
    /// The vector is not of this block, or no descriptor could be had.
    fn event(&self, index: u16) -> io::Result<EventFd>;
}

/// Gives out blocks of MSI vectors; the hypervisor's interrupt router, adapted by the assembly.
pub trait MsiSource: Send + Sync + fmt::Debug {
    /// A block of `count` vectors, none of them routed.
    ///
    /// # Errors
    /// The routing table is full, or no descriptors could be had.
    fn allocate(&self, count: u16) -> io::Result<Arc<dyn MsiVectors>>;
}
