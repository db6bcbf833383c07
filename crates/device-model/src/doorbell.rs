//! Guest writes that become an eventfd signal without leaving the kernel (KVM_IOEVENTFD).

use std::fmt;
use std::io;

use vmm_sys_util::eventfd::EventFd;

/// Where a doorbell is rung.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DoorbellAddress {
    /// A port.
    Pio(u64),
    /// A guest physical address.
    Mmio(u64),
}

/// Binds doorbells to eventfds; the hypervisor's, adapted by the assembly.
pub trait Doorbells: Send + Sync + fmt::Debug {
    /// From now on a guest write of any length at `address` signals `event`.
    ///
    /// # Errors
    /// The address has a doorbell already, or the hypervisor refuses.
    fn attach(&self, address: DoorbellAddress, event: &EventFd) -> io::Result<()>;

    /// Undoes [`attach`](Self::attach).
    ///
    /// # Errors
    /// No such doorbell, or the hypervisor refuses.
    fn detach(&self, address: DoorbellAddress, event: &EventFd) -> io::Result<()>;
}
