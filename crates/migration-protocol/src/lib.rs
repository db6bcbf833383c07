#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod command;
mod decoder;
mod frame;

pub use command::Command;
pub use decoder::Decoder;
pub use frame::{Frame, FrameError, HEADER_LENGTH, VERSION, header};
