#![doc = include_str!("../README.md")]

pub mod block;
mod chain;
pub mod console;
pub mod device;
pub mod rng;
pub mod testing;
pub mod transport;
pub mod worker;
