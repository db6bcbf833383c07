//! Folds a chain into one snapshot.

use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, UNIX_EPOCH};

use super::work::{Buffers, Job};
use super::{
    CHUNK, Chain, Contents, Draft, Hash, MemorySource, Place, Region, Storage, Work, WriteError, chunk_range,
    part,
};

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
