#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

pub mod bdf;
pub mod config;
pub mod endpoint;
pub mod function;
pub mod host_bridge;
pub mod msix;
mod placement;
pub mod resources;
pub mod slots;
pub mod testing;
pub mod windows;
