//! Writes a snapshot directory.

use std::fs::File;
use std::ops::Range;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::value::RawValue;

use super::draft::Workplace;
use super::hash::{ChunkHasher, is_zero};
use super::manifest::{
    FORMAT, MAX_MANIFEST, MAX_STATE, MAX_TABLE, Parent, Region, STATE, TABLE, Unsigned, check_regions,
    memory_name,
};
use super::work::{Buffers, Job, Stop, sized};
use super::{
    CHUNK, Chain, Extents, Hash, MAX_DEPTH, MAX_EXTENTS, MemorySource, PAGE, Storage, Table, Work,
    WriteError, chunk_range, part, part_mut,
};
use crate::{Record, RecordSet, minicbor};

/// A snapshot that has a directory and nothing in it yet.
///
/// Nothing is a snapshot before [`Filled::commit`] has returned. A draft that is dropped removes what it wrote;
/// what a killed process left, the next draft for the same directory removes.
#[derive(Debug)]
pub struct Draft<'s> {
    place: Workplace<'s>,
}

/// What an incremental snapshot builds on.
#[derive(Debug, Clone, Copy)]
pub struct Increment<'a> {
    /// Where the parent is, as the manifest will say: absolute, or relative to the directory of the snapshot.
    pub parent: &'a Path,
    /// Per region the bytes that may have changed since, in any order.
    pub changed: &'a [Vec<Range<u64>>],
}

/// What goes into the manifest and the state file.
#[derive(Debug, Clone, Copy)]
pub struct Contents<'a> {
    /// Version of the VMM.
    pub vmm: &'a str,
    /// Architecture of the guest, as in a target triple.
    pub architecture: &'a str,
    /// When the VM was saved.
    pub created: SystemTime,
    /// The VM's configuration, any JSON value.
    pub config: &'a RawValue,
    /// The VM's records.
    pub state: &'a RecordSet,
}

impl<'s> Draft<'s> {
    /// Takes the directory at `path`, which is empty, absent (its parent is not), or left by a failed attempt.
    ///
    /// # Errors
    /// [`WriteError::Exists`], [`NotEmpty`](WriteError::NotEmpty), [`Busy`](WriteError::Busy) or
    /// [`Io`](WriteError::Io).
    pub fn begin(storage: &'s dyn Storage, path: &Path) -> Result<Self, WriteError> {
        Ok(Self { place: Workplace::claim(storage, path)? })
    }

    /// Writes memory: all of `source`, or what changed since a parent.
    ///
    /// # Errors
    /// Every [`WriteError`] but those of [`begin`](Self::begin).
    pub fn memory(
        self,
        source: &dyn MemorySource,
        increment: Option<&Increment<'_>>,
        work: &Work<'_>,
    ) -> Result<Filled<'s>, WriteError> {
        let regions = regions_of(source)?;
        let parent = increment.map(|increment| self.parent(increment, &regions)).transpose()?;
        let extents = extents_of(&regions, increment)?;
        let mut files = Vec::new();
        for region in &regions {
            let file = self.place.create(&region.file)?;
            self.place.resize(&file, &region.file, region.size)?;
            files.push(file);
        }
        let sizes: Vec<u64> = regions.iter().map(|region| region.size).collect();
        let table = Table::empty(extents);
        let writer = Writer { place: &self.place, source, regions: &regions, files: &files, table: &table };
        let found = Mutex::new(Vec::new());
        let each = |job: Job, buffers: &mut Buffers| {
            if let Some(hash) = writer.chunk(job, buffers)? {
                found.lock().unwrap_or_else(PoisonError::into_inner).push((job, hash));
            }
            Ok(())
        };
        work.run(&sizes, &|region, from| writer.next(region, from), &each).map_err(|stop| match stop {
            Stop::Cancelled => WriteError::Cancelled,
            Stop::Failed(error) => error,
        })?;
        let table = table.with(found.into_inner().unwrap_or_else(PoisonError::into_inner));
        Ok(Filled { place: self.place, regions, files, table, parent })
    }

    fn parent(&self, increment: &Increment<'_>, regions: &[Region]) -> Result<Parent, WriteError> {
        let invalid = |what: &str| WriteError::Invalid { what: what.to_owned() };
        let location = increment.parent.to_str().ok_or_else(|| invalid("the parent's path is not UTF-8"))?;
        let chain = Chain::open(&self.place.path().join(location)).map_err(WriteError::Parent)?;
        if chain.depth() >= MAX_DEPTH {
            return Err(WriteError::Invalid {
                what: format!("its chain would exceed {MAX_DEPTH} snapshots"),
            });
        }
        if !chain.regions().iter().map(Region::place).eq(regions.iter().map(Region::place)) {
            return Err(invalid("the parent has other memory regions"));
        }
        Ok(Parent { id: chain.newest().id(), location: location.to_owned() })
    }
}

fn regions_of(source: &dyn MemorySource) -> Result<Vec<Region>, WriteError> {
    let places = source.places().into_iter().enumerate();
    let regions: Vec<Region> = places
        .map(|(index, place)| Region {
            zone: place.zone,
            gpa: place.gpa,
            size: place.size,
            file: memory_name(index),
        })
        .collect();
    check_regions(&regions).map_err(|what| WriteError::Invalid { what })?;
    Ok(regions)
}

/// What of each region is to be saved.
fn extents_of(regions: &[Region], increment: Option<&Increment<'_>>) -> Result<Vec<Extents>, WriteError> {
    let Some(increment) = increment else {
        return Ok(regions.iter().map(|region| Extents::whole(region.size)).collect());
    };
    let invalid = |what: String| WriteError::Invalid { what };
    if increment.changed.len() != regions.len() {
        return Err(invalid("a list of changes per memory region is needed".to_owned()));
    }
    let pairs = regions.iter().zip(increment.changed);
    pairs
        .map(|(region, changed)| {
            let extents = Extents::covering(changed, region.size);
            let extents =
                extents.ok_or_else(|| invalid(format!("changes outside the region at {:#x}", region.gpa)))?;
            Ok(extents.at_most(MAX_EXTENTS))
        })
        .collect()
}

/// What the threads that write memory share.
struct Writer<'a> {
    place: &'a Workplace<'a>,
    source: &'a dyn MemorySource,
    regions: &'a [Region],
    files: &'a [File],
    table: &'a Table,
}

impl Writer<'_> {
    /// The first chunk from `from` on that has data to be saved.
    fn next(&self, region: usize, from: u64) -> Result<Option<u64>, WriteError> {
        let Some(table) = self.table.regions.get(region) else { return Ok(None) };
        let mut at = from.saturating_mul(CHUNK);
        while let Some(extent) = table.extents.within(at..u64::MAX).next() {
            let Some(data) = self.data(region, extent.start)? else { break };
            if data.start < extent.end {
                return Ok(Some(data.start / CHUNK));
            }
            at = data.start;
        }
        Ok(None)
    }

    /// Data from `offset` on, as whole pages.
    fn data(&self, region: usize, offset: u64) -> Result<Option<Range<u64>>, WriteError> {
        let data = self.source.next_data(region, offset);
        let data = data.map_err(|source| WriteError::Memory { region, offset, source })?;
        Ok(data.map(|data| {
            let start = data.start.max(offset) / PAGE * PAGE;
            // A source that says nothing new does not hold us up.
            start..data.end.max(start + 1).next_multiple_of(PAGE)
        }))
    }

    /// Saves a chunk and gives its hash, unless all of it is zero.
    fn chunk(&self, Job { region, chunk }: Job, buffers: &mut Buffers) -> Result<Option<Hash>, WriteError> {
        let (Some(Region { size, .. }), Some(table)) =
            (self.regions.get(region), self.table.regions.get(region))
        else {
            return Ok(None);
        };
        let window = chunk_range(chunk, *size);
        sized(&mut buffers.chunk, &window);
        let mut hasher = ChunkHasher::default();
        for extent in table.extents.within(window.clone()) {
            let mut at = extent.start;
            while at < extent.end {
                let Some(data) = self.data(region, at)?.filter(|data| data.start < extent.end) else { break };
                let data = data.start..data.end.min(extent.end);
                let bytes = part_mut(&mut buffers.chunk, data.start - window.start..data.end - window.start);
                let read = self.source.read(region, data.start, bytes);
                read.map_err(|source| WriteError::Memory { region, offset: data.start, source })?;
                self.pages(region, &window, &data, &buffers.chunk, &mut hasher)?;
                at = data.end;
            }
        }
        Ok(hasher.finish())
    }

    /// Hashes and writes the pages of `data` that are not zero, neighbours together.
    fn pages(
        &self,
        region: usize,
        window: &Range<u64>,
        data: &Range<u64>,
        chunk: &[u8],
        hasher: &mut ChunkHasher,
    ) -> Result<(), WriteError> {
        let mut run = data.start..data.start;
        for start in data.clone().step_by(PAGE as usize) {
            let offset = start - window.start;
            let page = part(chunk, offset..offset + PAGE);
            if is_zero(page) {
                self.flush(region, window, &run, chunk)?;
                run = start + PAGE..start + PAGE;
            } else {
                hasher.page(offset, page);
                run.end = start + PAGE;
            }
        }
        self.flush(region, window, &run, chunk)
    }

    fn flush(
        &self,
        region: usize,
        window: &Range<u64>,
        run: &Range<u64>,
        chunk: &[u8],
    ) -> Result<(), WriteError> {
        let (Some(file), Some(Region { file: name, .. })) =
            (self.files.get(region), self.regions.get(region))
        else {
            return Ok(());
        };
        let bytes = part(chunk, run.start - window.start..run.end - window.start);
        self.place.write(file, name, bytes, run.start)
    }
}

/// A snapshot whose memory is written; state and manifest are not.
#[derive(Debug)]
pub struct Filled<'s> {
    place: Workplace<'s>,
    regions: Vec<Region>,
    files: Vec<File>,
    table: Table,
    parent: Option<Parent>,
}

impl Filled<'_> {
    /// Brings everything to stable storage, the manifest last, and gives the snapshot's id.
    ///
    /// # Errors
    /// [`WriteError::Io`], or [`Invalid`](WriteError::Invalid) for a state or configuration that is too large.
    pub fn commit(self, contents: &Contents<'_>) -> Result<Hash, WriteError> {
        let Self { place, regions, files, table, parent } = self;
        let state = minicbor::to_vec(Record::of(contents.state)).unwrap_or_default();
        if state.len() as u64 > MAX_STATE {
            return Err(WriteError::Invalid { what: format!("{} bytes of state", state.len()) });
        }
        let table = table.encode();
        if table.len() as u64 > MAX_TABLE {
            return Err(WriteError::Invalid { what: format!("{} bytes of chunk table", table.len()) });
        }
        for (region, file) in regions.iter().zip(&files) {
            place.finish(file, &region.file)?;
        }
        let state = place.file(STATE, &state)?;
        let chunks = place.file(TABLE, &table)?;
        let since = contents.created.duration_since(UNIX_EPOCH).unwrap_or_default();
        let manifest = Unsigned {
            format: FORMAT,
            vmm: contents.vmm,
            architecture: contents.architecture,
            created_ms: u64::try_from(since.as_millis()).unwrap_or(u64::MAX),
            config: contents.config,
            parent: parent.as_ref(),
            state: &state,
            chunks: &chunks,
            memory: &regions,
        };
        let invalid = |what: String| WriteError::Invalid { what };
        let (bytes, id) = manifest.encode().map_err(|error| invalid(error.to_string()))?;
        if bytes.len() as u64 > MAX_MANIFEST {
            return Err(invalid(format!("the manifest would have {} bytes", bytes.len())));
        }
        place.commit(&bytes)?;
        Ok(id)
    }
}
