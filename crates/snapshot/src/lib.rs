#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

pub mod directory;
pub mod golden;
mod record;
mod set;

#[doc(hidden)]
pub use minicbor;
#[doc(hidden)]
pub use record::follows;
pub use record::{Never, NoState, Record, RecordError, Schema};
pub use set::{RecordSet, SetError};
