//! What the offline commands do: inspect, diff, merge.

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, UNIX_EPOCH};

use serde::Serialize;
use serde_json::value::RawValue;

use super::read::stopped;
use super::work::{Buffers, Job};
use super::{
    CHUNK, Chain, Contents, Draft, Extents, Hash, MemorySource, PAGE, Place, ReadError, Region, Storage,
    Work, WriteError, chunk_range, part,
};
use crate::{RecordSet, Schema};

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
    /// Records, those in sets of sets included.
    pub records: Vec<RecordSummary>,
}

/// A snapshot of a chain.
#[derive(Debug, Serialize)]
pub struct LayerSummary {
    /// Its id.
    pub id: Hash,
    /// Its directory.
    pub path: PathBuf,
    /// Number of extents.
    pub extents: u64,
    /// Bytes of memory that it holds, zero pages included.
    pub held_bytes: u64,
    /// Chunks that are not all zero.
    pub chunks: u64,
    /// Bytes that its memory files take on disk.
    pub disk_bytes: u64,
}

/// A record.
#[derive(Debug, Serialize, PartialEq, Eq)]
pub struct RecordSummary {
    /// Whose it is; owners in sets of sets are joined by slashes.
    pub owner: String,
    /// What it describes.
    pub kind: String,
    /// In which version.
    pub version: u16,
    /// Bytes of its content.
    pub bytes: u64,
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
        layers: chain.layers().map(summary).collect::<Result<_, _>>()?,
        records: records(chain.state()?),
    })
}

fn summary(layer: &super::Snapshot) -> Result<LayerSummary, ReadError> {
    let tables = || layer.table().regions.iter();
    Ok(LayerSummary {
        id: layer.id(),
        path: layer.path().to_owned(),
        extents: tables().map(|table| table.extents.ranges().len() as u64).sum(),
        held_bytes: tables().map(|table| table.extents.bytes()).sum(),
        chunks: tables().map(|table| table.chunks.len() as u64).sum(),
        disk_bytes: layer.disk_bytes()?,
    })
}

/// Sets inside sets are opened without recursion: how deep they go is the file's choice.
fn records(set: RecordSet) -> Vec<RecordSummary> {
    let mut all = Vec::new();
    let mut sets = vec![(String::new(), set)];
    while let Some((prefix, set)) = sets.pop() {
        for (owner, record) in set.iter() {
            let owner = format!("{prefix}{owner}");
            all.push(RecordSummary {
                owner: owner.clone(),
                kind: record.kind.clone(),
                version: record.version,
                bytes: record.bytes.len() as u64,
            });
            // A set that this build does not know is shown as a record.
            if record.kind == RecordSet::KIND
                && let Ok(inner) = record.parse()
            {
                sets.push((format!("{owner}/"), inner));
            }
        }
    }
    all.sort_by(|a, b| a.owner.cmp(&b.owner));
    all
}

/// What differs between two snapshots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// The configurations are not the same text.
    pub config: bool,
    /// Owners whose records differ, or are in one of the two only.
    pub records: Vec<String>,
    /// Per region the pages that differ.
    pub memory: Vec<Extents>,
}

/// Compares two snapshots. Chunks that the two are known to share are not read; what is read is verified.
///
/// # Errors
/// As [`Chain::load`], or [`ReadError::OtherMemory`].
pub fn diff(a: &Chain, b: &Chain, work: &Work<'_>) -> Result<Difference, ReadError> {
    if !a.regions().iter().map(Region::place).eq(b.regions().iter().map(Region::place)) {
        let (path, other) = (a.newest().path().to_owned(), b.newest().path().to_owned());
        return Err(ReadError::OtherMemory { path, other });
    }
    let (left, right) = (a.state()?, b.state()?);
    let differs = |of: &RecordSet, from: &RecordSet| -> Vec<String> {
        let found = |owner: &str| from.iter().find(|(other, _)| *other == owner).map(|(_, record)| record);
        let differing = of.iter().filter(|(owner, record)| found(owner) != Some(*record));
        differing.map(|(owner, _)| owner.to_owned()).collect()
    };
    let mut records = differs(&left, &right);
    records.extend(differs(&right, &left));
    records.sort_unstable();
    records.dedup();
    let pages: Mutex<Vec<Vec<Range<u64>>>> = Mutex::new(a.regions().iter().map(|_| Vec::new()).collect());
    let find = |region: usize, from: u64| {
        Ok([a.next_chunk(region, from), b.next_chunk(region, from)].into_iter().flatten().min())
    };
    let each = |job: Job, buffers: &mut Buffers| {
        if same_chunk(a, b, job) {
            return Ok(());
        }
        let mut other = Buffers::default();
        a.read_chunk(job, buffers)?;
        b.read_chunk(job, &mut other)?;
        let start = job.chunk * CHUNK;
        let pairs = buffers.chunk.chunks(PAGE as usize).zip(other.chunk.chunks(PAGE as usize));
        let mut pages = pages.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pages) = pages.get_mut(job.region) {
            let starts = (start..).step_by(PAGE as usize);
            let changed = pairs.zip(starts).filter(|((a, b), _)| a != b);
            pages.extend(changed.map(|(_, start)| start..start + PAGE));
        }
        Ok(())
    };
    work.run(&a.sizes(), &find, &each).map_err(stopped)?;
    let pages = pages.into_inner().unwrap_or_else(PoisonError::into_inner);
    let memory = pages.iter().map(|pages| Extents::covering(pages, u64::MAX).unwrap_or_default()).collect();
    Ok(Difference { config: a.manifest().config.get() != b.manifest().config.get(), records, memory })
}

/// Whether a chunk is the same by what the tables say.
fn same_chunk(a: &Chain, b: &Chain, job: Job) -> bool {
    let (left, right) = (a.sources(job), b.sources(job));
    let one = |sources: &[(Hash, Option<Hash>)]| sources.len() == 1;
    // Either the same snapshots made it, or it is whole in one file on each side.
    left == right || (one(&left) && one(&right) && left.first().map(|l| l.1) == right.first().map(|r| r.1))
}

/// Folds the chain of the snapshot at `path` into a new snapshot without parent, and gives its id.
///
/// What is read is verified; the sources stay as they are.
///
/// # Errors
/// Every [`WriteError`]; a damaged source is the cause of [`WriteError::Memory`].
pub fn merge(path: &Path, storage: &dyn Storage, target: &Path, work: &Work<'_>) -> Result<Hash, WriteError> {
    let chain = Chain::open(path).map_err(WriteError::Parent)?;
    let state = chain.state().map_err(WriteError::Parent)?;
    let memory = ChainMemory { chain: &chain, idle: Mutex::new(Vec::new()) };
    let filled = Draft::begin(storage, target)?.memory(&memory, None, work)?;
    let manifest = chain.manifest();
    let created = UNIX_EPOCH.checked_add(Duration::from_millis(manifest.created_ms)).unwrap_or(UNIX_EPOCH);
    filled.commit(&Contents {
        vmm: &manifest.vmm,
        architecture: &manifest.architecture,
        created,
        config: &manifest.config,
        state: &state,
    })
}

/// A chain as the memory of a new snapshot, a chunk at a time.
struct ChainMemory<'a> {
    chain: &'a Chain,
    /// Buffers that no thread uses.
    idle: Mutex<Vec<Buffers>>,
}

impl ChainMemory<'_> {
    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<Buffers>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl MemorySource for ChainMemory<'_> {
    fn places(&self) -> Vec<Place> {
        self.chain.regions().iter().map(Region::place).collect()
    }

    fn next_data(&self, region: usize, offset: u64) -> io::Result<Option<Range<u64>>> {
        let size = self.chain.regions().get(region).map_or(0, |region| region.size);
        let chunk = self.chain.next_chunk(region, offset / CHUNK);
        Ok(chunk.map(|chunk| chunk_range(chunk, size)).map(|range| range.start.max(offset)..range.end))
    }

    fn read(&self, region: usize, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let mut buffers = self.idle().pop().unwrap_or_default();
        let job = Job { region, chunk: offset / CHUNK };
        self.chain.read_chunk(job, &mut buffers).map_err(io::Error::other)?;
        let start = offset - job.chunk * CHUNK;
        let found = part(&buffers.chunk, start..start + bytes.len() as u64);
        if found.len() != bytes.len() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        bytes.copy_from_slice(found);
        self.idle().push(buffers);
        Ok(())
    }
}
