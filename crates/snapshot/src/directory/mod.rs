//! The snapshot directory: manifest, state, chunk table and memory files.
//!
//! The format is described in `FORMAT.md` of this crate. [`Draft`] writes a directory, [`Snapshot`] opens
//! one, [`Chain`] opens one with all its parents; [`inspect`], [`diff`] and [`merge`] are the offline tools.
//! Nothing here knows a hypervisor: guest memory comes through [`MemorySource`].

mod chain;
mod diff;
mod draft;
mod error;
mod extents;
mod hash;
mod inspect;
mod layout;
mod manifest;
mod merge;
mod pages;
mod read;
mod source;
mod storage;
mod table;
mod work;
mod write;

pub use chain::{Chain, MAX_DEPTH, Piece};
pub use diff::{ConfigChange, Described, Difference, RecordChange, diff};
pub use error::{ReadError, WriteError};
pub use extents::{Extents, MAX_EXTENTS};
pub use hash::Hash;
pub use inspect::{Inspection, LayerSummary, MAX_SETS, MemorySummary, RecordSummary, inspect};
pub use manifest::{
    DataFile, MAX_MANIFEST, MAX_REGIONS, MAX_STATE, MAX_TABLE, Manifest, NEWEST, OLDEST, PACKED, Parent,
    Region, SPARSE,
};
pub use merge::merge;
pub use read::Snapshot;
pub use source::{BytesMemory, FileMemory, MemorySource, Place};
pub use storage::{HostStorage, Storage};
pub use table::{RegionTable, Table, TableError};
pub use work::{Progress, Work};
pub use write::{Contents, Draft, Filled, Finished, Increment};

/// Bytes of a page: the unit of extents and of what counts as zero.
pub const PAGE: u64 = 4096;

/// Bytes of a chunk: the unit of hashing. The last chunk of a region may be shorter.
pub const CHUNK: u64 = 2 << 20;

/// The part of `bytes` at `range`; empty when `range` is not in it.
fn part(bytes: &[u8], range: std::ops::Range<u64>) -> &[u8] {
    let (Ok(start), Ok(end)) = (usize::try_from(range.start), usize::try_from(range.end)) else {
        return &[];
    };
    bytes.get(start..end).unwrap_or_default()
}

/// As [`part`], to be written to.
fn part_mut(bytes: &mut [u8], range: std::ops::Range<u64>) -> &mut [u8] {
    let (Ok(start), Ok(end)) = (usize::try_from(range.start), usize::try_from(range.end)) else {
        return &mut [];
    };
    bytes.get_mut(start..end).unwrap_or_default()
}

/// Bytes of chunk `chunk` in a region of `size` bytes.
fn chunk_range(chunk: u64, size: u64) -> std::ops::Range<u64> {
    let start = chunk.saturating_mul(CHUNK).min(size);
    start..start.saturating_add(CHUNK).min(size)
}
