//! Writes a snapshot directory.

use std::collections::BTreeSet;
use std::fmt;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::value::RawValue;

use super::draft::Workplace;
use super::hash::ChunkHasher;
use super::layout::Layout;
use super::manifest::{
    MAX_MANIFEST, MAX_STATE, MAX_TABLE, PACKED, Parent, Region, SPARSE, STATE, TABLE, Unsigned,
    check_regions, memory_name,
};
use super::pages::{MemoryFile, Writer};
use super::work::{Buffers, Job, Stop, sized};
use super::{
    Chain, Extents, Hash, MAX_DEPTH, MemorySource, ReadError, Storage, Table, Work, WriteError, chunk_range,
    part_mut,
};
use crate::{Record, RecordSet, minicbor};

/// A snapshot that has a directory and nothing in it yet.
///
/// Nothing is a snapshot before [`Filled::commit`] has returned. A draft that is dropped removes what it wrote;
/// what a killed process left, the next draft for the same directory removes.
#[derive(Debug)]
pub struct Draft<'s> {
    failed: OnFailure<'s>,
    place: Workplace<'s>,
}

/// What is called when a snapshot is given up. In all that holds one it comes first: to close files may take long, and so may to
/// remove them.
struct OnFailure<'s>(Option<&'s (dyn Fn() + Sync)>);

impl Drop for OnFailure<'_> {
    fn drop(&mut self) {
        if let Some(failed) = self.0 {
            failed();
        }
    }
}

impl fmt::Debug for OnFailure<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("OnFailure").field(&self.0.is_some()).finish()
    }
}

/// What an incremental snapshot builds on.
#[derive(Debug, Clone, Copy)]
pub struct Increment<'a> {
    /// Where the parent is, as the manifest will say: absolute, or relative to the directory of the snapshot.
    pub parent: &'a Path,
    /// Its id, where that is known: another snapshot there is none.
    pub id: Option<Hash>,
    /// Per region the bytes that may have changed since, in any order.
    pub changed: &'a [Vec<Range<u64>>],
    /// The memory files are to hold nothing between the changed pages, so that single pages are not written and synced
    /// one by one. Such a snapshot is written once: [`Filled::again`] refuses it.
    pub packed: bool,
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
        Ok(Self { failed: OnFailure(None), place: Workplace::claim(storage, path)? })
    }

    /// Calls `failed` when nothing will come of it, before what was written is closed and removed: that may take long, and a guest
    /// that waits for the snapshot need not wait for that.
    #[must_use]
    pub fn on_failure(self, failed: &'s (dyn Fn() + Sync)) -> Self {
        Self { failed: OnFailure(Some(failed)), ..self }
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
        let format = if increment.is_some_and(|increment| increment.packed) { PACKED } else { SPARSE };
        let mut files = Vec::new();
        for (region, extents) in regions.iter().zip(&extents) {
            let layout = Layout::new(format, extents, region.size);
            let file = self.place.create(&region.file)?;
            self.place.resize(&file, &region.file, layout.file_size())?;
            files.push(MemoryFile { file, layout });
        }
        let filled = Filled {
            failed: self.failed,
            place: self.place,
            regions,
            files,
            table: Table::empty(extents),
            format,
            parent,
            stale: BTreeSet::new(),
            threads: work.threads,
        };
        filled.first(source, work)
    }

    fn parent(&self, increment: &Increment<'_>, regions: &[Region]) -> Result<Parent, WriteError> {
        let invalid = |what: &str| WriteError::Invalid { what: what.to_owned() };
        let location = increment.parent.to_str().ok_or_else(|| invalid("the parent's path is not UTF-8"))?;
        let chain = Chain::open(&self.place.path().join(location)).map_err(WriteError::Parent)?;
        let found = chain.newest().id();
        if let Some(expected) = increment.id.filter(|id| *id != found) {
            let path = chain.newest().path().to_owned();
            return Err(WriteError::Parent(ReadError::OtherParent { path, found, expected }));
        }
        if chain.depth() >= MAX_DEPTH {
            return Err(WriteError::Invalid {
                what: format!("its chain would exceed {MAX_DEPTH} snapshots"),
            });
        }
        if !chain.regions().iter().map(Region::place).eq(regions.iter().map(Region::place)) {
            return Err(invalid("the parent has other memory regions"));
        }
        Ok(Parent { id: found, location: location.to_owned() })
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
    match increment {
        None => Ok(regions.iter().map(|region| Extents::whole(region.size)).collect()),
        Some(increment) => per_region(regions, increment.changed, Extents::incremental),
    }
}

/// The pages of each region that `changed` touches.
fn covering(regions: &[Region], changed: &[Vec<Range<u64>>]) -> Result<Vec<Extents>, WriteError> {
    per_region(regions, changed, Extents::covering)
}

/// What `extents` makes of the changes of each region.
fn per_region(
    regions: &[Region],
    changed: &[Vec<Range<u64>>],
    extents: impl Fn(&[Range<u64>], u64) -> Option<Extents>,
) -> Result<Vec<Extents>, WriteError> {
    let invalid = |what: String| WriteError::Invalid { what };
    if changed.len() != regions.len() {
        return Err(invalid("a list of changes per memory region is needed".to_owned()));
    }
    let pairs = regions.iter().zip(changed);
    pairs
        .map(|(region, changed)| {
            extents(changed, region.size)
                .ok_or_else(|| invalid(format!("changes outside the region at {:#x}", region.gpa)))
        })
        .collect()
}

fn stopped(stop: Stop<WriteError>) -> WriteError {
    match stop {
        Stop::Cancelled => WriteError::Cancelled,
        Stop::Failed(error) => error,
    }
}

/// A snapshot whose memory is written; state and manifest are not.
///
/// Of a guest that ran meanwhile, what changed is written [`again`](Self::again), the last time when it is paused. It may
/// run on before [`commit`](Self::commit).
#[derive(Debug)]
pub struct Filled<'s> {
    failed: OnFailure<'s>,
    /// Closed before the directory is cleared: what is unlinked and open is written all the same, and stays where the file system
    /// is of a network.
    files: Vec<MemoryFile>,
    place: Workplace<'s>,
    regions: Vec<Region>,
    table: Table,
    format: u32,
    parent: Option<Parent>,
    /// Region and number of chunks that were written after they were hashed.
    stale: BTreeSet<(usize, u64)>,
    threads: NonZeroUsize,
}

impl<'s> Filled<'s> {
    fn first(self, source: &dyn MemorySource, work: &Work<'_>) -> Result<Self, WriteError> {
        let wanted: Vec<Extents> = self.table.regions.iter().map(|table| table.extents.clone()).collect();
        let found = Mutex::new(Vec::new());
        let writer = self.writer(source, &wanted, false);
        let each = |job: Job, buffers: &mut Buffers| {
            if let Some(hash) = writer.chunk(job, buffers)? {
                found.lock().unwrap_or_else(PoisonError::into_inner).push((job, hash));
            }
            Ok(())
        };
        work.run(&self.sizes(), &|region, from| writer.next(region, from), &each).map_err(stopped)?;
        let table = self.table.with(found.into_inner().unwrap_or_else(PoisonError::into_inner));
        Ok(Self { table, ..self })
    }

    /// Writes again what changed after it was read: per region bytes in any order, of which `source` is now read.
    ///
    /// A page that changed while or after it was read has to be in `changed` of a later call. Nothing is hashed here, so
    /// that the call with the guest paused takes as long as reading the pages and writing them to the page cache.
    ///
    /// # Errors
    /// [`WriteError::Memory`], [`Io`](WriteError::Io), [`Cancelled`](WriteError::Cancelled), or
    /// [`Invalid`](WriteError::Invalid) for changes outside the regions or a [packed](Increment::packed) snapshot. What was
    /// written is gone then.
    pub fn again(
        mut self,
        source: &dyn MemorySource,
        changed: &[Vec<Range<u64>>],
        work: &Work<'_>,
    ) -> Result<Self, WriteError> {
        if self.format == PACKED {
            let what = "what is packed cannot be written again".to_owned();
            return Err(WriteError::Invalid { what });
        }
        let places = self.regions.iter().map(Region::place);
        if !source.places().into_iter().eq(places) {
            return Err(WriteError::Invalid { what: "the memory has other regions than before".to_owned() });
        }
        let mut wanted = Vec::new();
        for (extents, table) in covering(&self.regions, changed)?.into_iter().zip(&mut self.table.regions) {
            let (grown, more) = table.extents.grown(&extents);
            table.extents = grown;
            wanted.push(more);
        }
        let writer = self.writer(source, &wanted, true);
        let touched = Mutex::new(BTreeSet::new());
        let each = |job: Job, buffers: &mut Buffers| {
            touched.lock().unwrap_or_else(PoisonError::into_inner).insert((job.region, job.chunk));
            writer.chunk(job, buffers).map(|_| ())
        };
        work.run(&self.sizes(), &|region, from| writer.next(region, from), &each).map_err(stopped)?;
        self.stale.extend(touched.into_inner().unwrap_or_else(PoisonError::into_inner));
        Ok(self)
    }

    /// Hashes the chunks that were written again, as they are in the files now. [`commit`](Self::commit) does what is
    /// left of it, untold.
    ///
    /// # Errors
    /// [`WriteError::Io`] or [`Cancelled`](WriteError::Cancelled). What was written is gone then.
    pub fn rehash(mut self, work: &Work<'_>) -> Result<Self, WriteError> {
        if self.stale.is_empty() {
            return Ok(self);
        }
        let stale = std::mem::take(&mut self.stale);
        let find = |region: usize, from: u64| {
            Ok(stale.range((region, from)..(region + 1, 0)).next().map(|(_, chunk)| *chunk))
        };
        let found = Mutex::new(Vec::new());
        let each = |job: Job, buffers: &mut Buffers| {
            if let Some(hash) = self.written(job, buffers)? {
                found.lock().unwrap_or_else(PoisonError::into_inner).push((job, hash));
            }
            Ok(())
        };
        work.run(&self.sizes(), &find, &each).map_err(stopped)?;
        let found = found.into_inner().unwrap_or_else(PoisonError::into_inner);
        let table = self.table.without(&stale).with(found);
        Ok(Self { table, ..self })
    }

    fn sizes(&self) -> Vec<u64> {
        self.regions.iter().map(|region| region.size).collect()
    }

    fn writer<'a>(&'a self, source: &'a dyn MemorySource, wanted: &'a [Extents], over: bool) -> Writer<'a> {
        let Self { place, regions, files, .. } = self;
        Writer::new(place, source, (regions, files), wanted, over)
    }

    /// The hash of what was written of a chunk, which is not packed.
    fn written(&self, job: Job, buffers: &mut Buffers) -> Result<Option<Hash>, WriteError> {
        let (Some(Region { size, file: name, .. }), Some(MemoryFile { file, .. }), Some(table)) =
            (self.regions.get(job.region), self.files.get(job.region), self.table.regions.get(job.region))
        else {
            return Ok(None);
        };
        let window = chunk_range(job.chunk, *size);
        sized(&mut buffers.chunk, &window);
        let mut hasher = ChunkHasher::default();
        for extent in table.extents.within(window.clone()) {
            let range = extent.start - window.start..extent.end - window.start;
            let bytes = part_mut(&mut buffers.chunk, range.clone());
            self.place.read_back(file, name, bytes, extent.start)?;
            hasher.pages(range.start, bytes);
        }
        Ok(hasher.finish())
    }

    /// [Finishes](Self::finish) and [commits](Finished::commit).
    ///
    /// # Errors
    /// Those of both.
    pub fn commit(self, contents: &Contents<'_>) -> Result<Hash, WriteError> {
        self.finish(contents)?.commit()
    }

    /// Brings everything but the manifest to stable storage.
    ///
    /// # Errors
    /// [`WriteError::Io`], or [`Invalid`](WriteError::Invalid) for a state or configuration that is too large.
    pub fn finish(self, contents: &Contents<'_>) -> Result<Finished<'s>, WriteError> {
        let threads = self.threads;
        // Dropped in the reverse order.
        let Self { place, regions, files, table, format, parent, failed, .. } =
            self.rehash(&Work::quiet(threads))?;
        let state = minicbor::to_vec(Record::of(contents.state)).unwrap_or_default();
        if state.len() as u64 > MAX_STATE {
            return Err(WriteError::Invalid { what: format!("{} bytes of state", state.len()) });
        }
        let table = table.encode();
        if table.len() as u64 > MAX_TABLE {
            return Err(WriteError::Invalid { what: format!("{} bytes of chunk table", table.len()) });
        }
        let (state_file, state) = place.file(STATE, &state)?;
        let (chunks_file, chunks) = place.file(TABLE, &table)?;
        let names = regions.iter().map(|region| region.file.as_str());
        let memory = names.zip(files.iter().map(|memory| &memory.file));
        let others = [(STATE, &state_file), (TABLE, &chunks_file)];
        place.finish(&memory.chain(others).collect::<Vec<_>>(), threads)?;
        let since = contents.created.duration_since(UNIX_EPOCH).unwrap_or_default();
        let manifest = Unsigned {
            format,
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
        Ok(Finished { failed, place, manifest: bytes, id })
    }
}

/// A snapshot of which only the manifest is not written. Dropped, it is removed.
#[derive(Debug)]
pub struct Finished<'s> {
    failed: OnFailure<'s>,
    place: Workplace<'s>,
    manifest: Vec<u8>,
    id: Hash,
}

impl Finished<'_> {
    /// Brings the manifest to stable storage: that makes it a snapshot. Gives its id.
    ///
    /// # Errors
    /// [`WriteError::Io`].
    pub fn commit(self) -> Result<Hash, WriteError> {
        let Self { mut failed, place, manifest, id } = self;
        place.commit(&manifest)?;
        failed.0 = None;
        Ok(id)
    }
}
