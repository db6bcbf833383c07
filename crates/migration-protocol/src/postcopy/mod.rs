//! What follows Commit in post-copy: the guest runs at the destination, and a part of its memory is at the source still.
//!
//! The guest is the destination's for good. So nothing here gives it back: a link that is lost only stops it, until the
//! source has found the way again. The source keeps the memory until all of it is there, or until its operator drops it.

mod filler;
mod supplier;

pub use filler::{Filler, FillerAction, FillerInput, FillerKind, FillerOutcome, FillerState, FillerStep};
pub use supplier::{
    Supplier, SupplierAction, SupplierInput, SupplierKind, SupplierOutcome, SupplierState, SupplierStep,
};
