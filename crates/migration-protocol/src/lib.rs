#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod command;
mod cpu;
mod decoder;
mod fault;
mod frame;
mod memory;
mod message;
mod negotiate;

pub use command::{Command, Sender};
pub use cpu::{CpuNeeds, CpuidLeaf};
pub use decoder::{Decoder, Item};
pub use fault::{End, Failure, Fault, Missing, MissingKind, Reason};
pub use frame::{
    BULK_HEADER_LENGTH, Bulk, CHUNK, Frame, FrameError, HEADER_LENGTH, VERSION, contents_checksum,
};
pub use memory::{
    Barrier, DescriptorRange, Intake, MAX_REGIONS, Mark, MemoryError, MemoryLayout, MemoryRange, PAGE,
    Region, Zero,
};
pub use message::{Join, MAGIC, Message, MessageError, Progress, SessionOutcome};
pub use negotiate::{
    Accept, Features, Hello, MAX_CONNECTIONS, MAX_REQUESTED_CONNECTIONS, Offer, Purpose, SessionId, Versions,
};
