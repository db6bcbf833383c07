#![doc = include_str!("../README.md")]

mod bounce;
mod buffers;
mod disk;
mod engine;
mod job;
mod notify;
mod open;
mod raw;
mod sync;
mod sys;
mod uring;

pub use buffers::Buffers;
pub use disk::{Disk, Topology};
pub use engine::{Completion, Engine, EngineError, EngineKind, Op, Rejected, Request, SubmitError};
pub use open::{ImageType, LockMode, OpenError, OpenOptions, open};
