//! The set of devices of a VM.
//!
//! [`set::DeviceSet`] names no device. It builds recipes with the machine's resources, keeps what each device
//! took ([`node`]), gives it back when the device goes, and walks all devices through their life cycle and
//! through save and restore. Boot, hot-plug and restore add a device by the same call.
#![forbid(unsafe_code)]

pub mod machine;
pub mod node;
pub mod set;
pub mod tree;

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
