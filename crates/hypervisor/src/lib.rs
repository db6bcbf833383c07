//! The boundary to the hypervisor.
//!
//! [`Hypervisor`], [`Vm`] and [`Vcpu`] are what the rest of a VMM needs of one: small traits over owned
//! types, so that every manager runs as well on the scripted [`fake`] as on [`kvm`]. Nothing here knows a
//! device. [`router::InterruptRouter`] owns the one table of interrupt routes that a VM has.
//!
//! An error names the call that failed ([`HypervisorError`]); a call that this host does not know can be
//! told from one that failed by [`HypervisorError::is_unsupported`].

mod error;
pub mod fake;
pub mod kvm;
pub mod router;
pub mod state;
mod traits;

pub use error::{HypervisorError, Result};
pub use traits::{
    ClockData, Hypervisor, IoEventAddress, Kick, MemorySlot, Msi, MsiRoute, Vcpu, VcpuExit, Vm, VmOptions,
};

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
