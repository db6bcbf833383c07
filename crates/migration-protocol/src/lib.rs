#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod command;
mod cpu;
mod decoder;
mod destination;
mod docs;
mod fault;
mod frame;
mod machine;
mod memory;
mod message;
mod negotiate;
mod pacer;
mod packing;
mod policy;
mod postcopy;
mod source;

pub use command::{Command, Sender};
pub use cpu::{CpuNeeds, CpuidLeaf};
pub use decoder::{Decoder, Item};
pub use destination::{
    Destination, DestinationAction, DestinationInput, DestinationKind, DestinationOutcome, DestinationState,
    DestinationStep, DestinationUndo,
};
pub use docs::machines_markdown;
pub use fault::{End, Failure, Fault, Missing, MissingKind, Reason};
pub use frame::{
    BULK_HEADER_LENGTH, Bulk, CHUNK, Frame, FrameError, HEADER_LENGTH, VERSION, contents_checksum,
    page_checksum,
};
pub use machine::{Cell, Limits, Outcomes, Output, REMEMBERED};
pub use memory::{
    Absent, Barrier, DescriptorRange, Intake, MAX_REGIONS, Mark, MemoryError, MemoryLayout, MemoryRange,
    PAGE, Region, Sums, Zero,
};
pub use message::{Join, MAGIC, Message, MessageError, Progress, SessionOutcome};
pub use negotiate::{
    Accept, Features, Hello, MAX_CONNECTIONS, MAX_REQUESTED_CONNECTIONS, Offer, Purpose, SessionId, Versions,
};
pub use pacer::Pacer;
pub use packing::{Packer, UnpackError, unpack};
pub use policy::{Decision, Goals, Pass, Policy, Stop, TimeoutStrategy};
pub use postcopy::{
    Filler, FillerAction, FillerInput, FillerKind, FillerOutcome, FillerState, FillerStep, Supplier,
    SupplierAction, SupplierInput, SupplierKind, SupplierOutcome, SupplierState, SupplierStep,
};
pub use source::{
    Source, SourceAction, SourceInput, SourceKind, SourceOutcome, SourceProgress, SourceSetup, SourceState,
    SourceStep, SourceUndo, What,
};
