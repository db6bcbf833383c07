//! Why a snapshot cannot be read or written.

use std::io;
use std::path::PathBuf;

use super::{Hash, TableError};
use crate::{RecordError, minicbor};

/// Why a snapshot directory is not taken.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// There is no manifest: no snapshot, or one that was not finished.
    #[error("{} is no snapshot: it has no manifest.json", path.display())]
    NoManifest {
        /// The directory.
        path: PathBuf,
    },
    /// The manifest is another program's.
    #[error("{} is not the manifest of a snapshot", path.display())]
    NotASnapshot {
        /// The manifest.
        path: PathBuf,
    },
    /// A file or directory is not there.
    #[error("{} is missing", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// A symbolic link, which is never followed.
    #[error("{} is a symbolic link", path.display())]
    Symlink {
        /// The link.
        path: PathBuf,
    },
    /// A directory, device or pipe.
    #[error("{} is not a regular file", path.display())]
    NotAFile {
        /// The file.
        path: PathBuf,
    },
    /// Written by a newer build.
    #[error("{} has format {found}, this build knows formats up to {known}", path.display())]
    Newer {
        /// The manifest.
        path: PathBuf,
        /// Its format.
        found: u32,
        /// Newest format of this build.
        known: u32,
    },
    /// Older than the oldest format still in the tree.
    #[error("{} has format {found}, the oldest supported is {oldest}", path.display())]
    Older {
        /// The manifest.
        path: PathBuf,
        /// Its format.
        found: u32,
        /// Oldest format of this build.
        oldest: u32,
    },
    /// The manifest is whole, yet not as its format says.
    #[error("{} does not parse", path.display())]
    Manifest {
        /// The manifest.
        path: PathBuf,
        /// What the parser met.
        #[source]
        source: serde_json::Error,
    },
    /// The manifest names a file that would not be in the directory, or is reserved.
    #[error("{} names {name:?}, which cannot be a file of the snapshot", path.display())]
    Leaves {
        /// The manifest.
        path: PathBuf,
        /// The name.
        name: String,
    },
    /// The manifest describes what cannot be.
    #[error("{}: {what}", path.display())]
    Absurd {
        /// The manifest.
        path: PathBuf,
        /// The count or size, and its limit.
        what: String,
    },
    /// A file is shorter or longer than the manifest says: truncated, or changed.
    #[error("{} has {found} bytes, expected {expected}", path.display())]
    Size {
        /// The file.
        path: PathBuf,
        /// Bytes that it has.
        found: u64,
        /// Bytes that it should have.
        expected: u64,
    },
    /// A file's content is not what was written.
    #[error("{} is damaged: its hash is wrong", path.display())]
    Hash {
        /// The file.
        path: PathBuf,
    },
    /// A chunk of memory is not what was written.
    #[error("{} is damaged: the hash of chunk {chunk} (byte {offset:#x}) is wrong", path.display())]
    Chunk {
        /// The memory file.
        path: PathBuf,
        /// Number of the chunk.
        chunk: u64,
        /// Its first byte in the file.
        offset: u64,
    },
    /// The chunk table is whole, yet not one of this snapshot.
    #[error("{} does not parse", path.display())]
    Table {
        /// The chunk table.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: TableError,
    },
    /// The state file is whole, yet holds no record.
    #[error("{} does not parse", path.display())]
    State {
        /// The state file.
        path: PathBuf,
        /// What the decoder met.
        #[source]
        source: minicbor::decode::Error,
    },
    /// The state file's record is not a set of records that this build knows.
    #[error("state in {}", path.display())]
    Records {
        /// The state file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: RecordError,
    },
    /// The snapshot holds changes, and what they change is not there.
    #[error("parent {id} is missing: no snapshot at {}", path.display())]
    MissingParent {
        /// Where it should be.
        path: PathBuf,
        /// Its id.
        id: Hash,
    },
    /// Another snapshot is where the parent should be.
    #[error("{} is snapshot {found}, expected the parent {expected}", path.display())]
    OtherParent {
        /// The directory.
        path: PathBuf,
        /// Id of what is there.
        found: Hash,
        /// Id of the parent.
        expected: Hash,
    },
    /// Two snapshots that belong together have not the same memory.
    #[error("{} has other memory regions than {}", path.display(), other.display())]
    OtherMemory {
        /// The child.
        path: PathBuf,
        /// The parent.
        other: PathBuf,
    },
    /// A snapshot without parent does not hold all pages.
    #[error("{} has no parent and does not hold all memory", path.display())]
    Incomplete {
        /// The snapshot.
        path: PathBuf,
    },
    /// A snapshot is its own ancestor.
    #[error("{} is its own ancestor", path.display())]
    Cycle {
        /// The directory that came up twice.
        path: PathBuf,
    },
    /// Too many ancestors.
    #[error("the chain of {} has more than {limit} snapshots", path.display())]
    TooDeep {
        /// The newest snapshot.
        path: PathBuf,
        /// Most snapshots of a chain.
        limit: usize,
    },
    /// A guest of another architecture.
    #[error("the snapshot is of architecture {found:?}, expected {expected:?}")]
    Architecture {
        /// What it is of.
        found: String,
        /// What was asked for.
        expected: &'static str,
    },
    /// The caller's sink did not take a piece of memory.
    #[error("memory region {region} at {offset:#x} could not be loaded")]
    Sink {
        /// Number of the region.
        region: usize,
        /// Offset in it.
        offset: u64,
        /// What the sink said.
        #[source]
        source: io::Error,
    },
    /// The caller stopped it.
    #[error("stopped on request")]
    Cancelled,
    /// The host failed.
    #[error("cannot read {}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}

/// Why no snapshot was written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WriteError {
    /// The destination is a snapshot, which is immutable.
    #[error("{} holds a snapshot already", path.display())]
    Exists {
        /// The destination.
        path: PathBuf,
    },
    /// The destination holds what no snapshot writer left.
    #[error("{} is not empty: it holds {name:?}", path.display())]
    NotEmpty {
        /// The destination.
        path: PathBuf,
        /// A name in it.
        name: String,
    },
    /// Another writer is at work there.
    #[error("{} is being written by another snapshot", path.display())]
    Busy {
        /// The destination.
        path: PathBuf,
    },
    /// What was asked for cannot be described by a snapshot.
    #[error("cannot write such a snapshot: {what}")]
    Invalid {
        /// What is wrong.
        what: String,
    },
    /// The parent cannot be built on.
    #[error("parent of the snapshot")]
    Parent(#[source] ReadError),
    /// Guest memory could not be read.
    #[error("memory region {region} at {offset:#x} could not be read")]
    Memory {
        /// Number of the region.
        region: usize,
        /// Offset in it.
        offset: u64,
        /// What the source said.
        #[source]
        source: io::Error,
    },
    /// The caller stopped it.
    #[error("stopped on request")]
    Cancelled,
    /// The host failed: no space, a quota, a broken disk.
    #[error("cannot {what} {}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}
