//! What a device of a virtual machine is.
//!
//! The crate holds the vocabulary that devices, buses and managers share and nothing that knows a
//! particular device or hypervisor:
//!
//! - [`bus`]: the map from guest addresses to devices, swapped atomically, never locked by a vCPU;
//! - [`device`]: the life cycle of a device and its saved state;
//! - [`dma`]: the handle through which a device reaches guest memory;
//! - [`interrupt`]: lines, MSI vectors, and who gives them;
//! - [`doorbell`]: guest writes that become an eventfd signal without leaving the kernel;
//! - [`dirty`]: sources of dirty guest pages;
//! - [`limiter`]: how often a guest can make the log say something;
//! - [`metrics`]: what devices count, and how it is told;
//! - [`recipe`]: a checked description of a device that can be built, and the resources it is built from.
//!
//! Lock order, for everybody: bus map (writers only), then PCI configuration space, then the device.
#![forbid(unsafe_code)]

pub mod bus;
pub mod device;
pub mod dirty;
pub mod dma;
pub mod doorbell;
pub mod interrupt;
pub mod limiter;
pub mod metrics;
pub mod recipe;
pub mod testing;

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
