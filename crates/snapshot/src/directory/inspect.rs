//! Says what a snapshot is.

use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::value::RawValue;

use super::{Chain, Hash, ReadError, Region, Snapshot};
use crate::{RecordSet, Schema};

/// How deep sets in sets are opened. A set that lies deeper is told as a record: how deep they go is the file's choice.
pub const MAX_SETS: usize = 16;

/// What a snapshot is, for people and for scripts.
#[derive(Debug, Serialize)]
pub struct Inspection {
    /// Its id.
    pub id: Hash,
    /// Version of the format.
    pub format: u32,
    /// Version of the VMM that wrote it.
    pub vmm: String,
    /// Architecture of the guest.
    pub architecture: String,
    /// Milliseconds since 1970-01-01T00:00:00Z.
    pub created_ms: u64,
    /// Configuration of the VM.
    pub config: Box<RawValue>,
    /// Memory.
    pub memory: Vec<Region>,
    /// The chain, oldest first; the last one is the snapshot itself.
    pub layers: Vec<LayerSummary>,
    /// The records of the VM, by owner.
    pub records: Vec<RecordSummary>,
}

/// A snapshot of a chain.
#[derive(Debug, Serialize)]
pub struct LayerSummary {
    /// Its id.
    pub id: Hash,
    /// Its directory.
    pub path: PathBuf,
    /// Version of the VMM that wrote it.
    pub vmm: String,
    /// Milliseconds since 1970-01-01T00:00:00Z.
    pub created_ms: u64,
    /// Bytes of its state file.
    pub state_bytes: u64,
    /// Of all regions.
    #[serde(flatten)]
    pub total: MemorySummary,
    /// Per region, in the order of [`Inspection::memory`].
    pub regions: Vec<MemorySummary>,
}

/// What a snapshot holds of memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct MemorySummary {
    /// Number of extents.
    pub extents: u64,
    /// Bytes in them, zero pages included.
    pub held_bytes: u64,
    /// Chunks that are not all zero.
    pub chunks: u64,
    /// Bytes on disk.
    pub disk_bytes: u64,
}

/// A record.
#[derive(Debug, Serialize, PartialEq, Eq)]
pub struct RecordSummary {
    /// Whose it is.
    pub owner: String,
    /// What it describes.
    pub kind: String,
    /// In which version.
    pub version: u16,
    /// Bytes of its content.
    pub bytes: u64,
    /// The records in it, if it is a set that this build knows.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub records: Vec<Self>,
}

/// Says what the snapshot at `path` and its parents are. Memory is not read.
///
/// # Errors
/// As [`Chain::open`], or [`ReadError::Records`].
pub fn inspect(path: &Path) -> Result<Inspection, ReadError> {
    let chain = Chain::open(path)?;
    let manifest = chain.manifest();
    Ok(Inspection {
        id: manifest.id,
        format: manifest.format,
        vmm: manifest.vmm.clone(),
        architecture: manifest.architecture.clone(),
        created_ms: manifest.created_ms,
        config: manifest.config.clone(),
        memory: manifest.memory.clone(),
        layers: chain.layers().map(layer).collect::<Result<_, _>>()?,
        records: records(&chain.state()?, MAX_SETS),
    })
}

fn layer(layer: &Snapshot) -> Result<LayerSummary, ReadError> {
    let manifest = layer.manifest();
    let of = |(index, table): (usize, &super::RegionTable)| {
        Ok(MemorySummary {
            extents: table.extents.ranges().len() as u64,
            held_bytes: table.extents.bytes(),
            chunks: table.chunks.len() as u64,
            disk_bytes: layer.disk_bytes(index)?,
        })
    };
    let regions: Vec<_> = layer.table().regions.iter().enumerate().map(of).collect::<Result<_, _>>()?;
    let total = regions.iter().fold(MemorySummary::default(), |all, region| MemorySummary {
        extents: all.extents + region.extents,
        held_bytes: all.held_bytes + region.held_bytes,
        chunks: all.chunks + region.chunks,
        disk_bytes: all.disk_bytes.saturating_add(region.disk_bytes),
    });
    Ok(LayerSummary {
        id: layer.id(),
        path: layer.path().to_owned(),
        vmm: manifest.vmm.clone(),
        created_ms: manifest.created_ms,
        state_bytes: manifest.state.size,
        total,
        regions,
    })
}

fn records(set: &RecordSet, depth: usize) -> Vec<RecordSummary> {
    let of = |(owner, record): (&str, &crate::Record)| RecordSummary {
        owner: owner.to_owned(),
        kind: record.kind.clone(),
        version: record.version,
        bytes: record.bytes.len() as u64,
        records: inner(record, depth).map_or(Vec::new(), |set| records(&set, depth - 1)),
    };
    set.iter().map(of).collect()
}

/// The set that a record is, if it is to be opened.
pub(super) fn inner(record: &crate::Record, depth: usize) -> Option<RecordSet> {
    if depth == 0 || record.kind != RecordSet::KIND { None } else { record.parse().ok() }
}
