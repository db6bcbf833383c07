//! One snapshot directory, opened.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::hash::ChunkHasher;
use super::layout::Layout;
use super::manifest::{MANIFEST, MAX_MANIFEST};
use super::work::{Stop, sized};
use super::{
    CHUNK, DataFile, Extents, Hash, Manifest, ReadError, Region, RegionTable, Table, Work, chunk_range, part,
    part_mut, storage,
};
use crate::{Record, RecordSet, minicbor};

/// A snapshot whose manifest, state and chunk table are verified and whose memory files have their sizes.
///
/// Memory itself is looked at by [`verify`](Self::verify), or when a [`Chain`](super::Chain) is loaded. A
/// private mapping of [`memory`](Self::memory) is thus not verified; it is as good as the disk.
#[derive(Debug)]
pub struct Snapshot {
    path: PathBuf,
    /// Device and inode of the directory, by which a cycle shows.
    identity: (u64, u64),
    manifest: Manifest,
    /// The state file, which is read again where it is wanted: nobody wants those of parents, and they may be large.
    state: File,
    table: Table,
    memory: Vec<MemoryFile>,
}

/// A memory file, opened.
#[derive(Debug)]
struct MemoryFile {
    file: File,
    layout: Layout,
}

impl Snapshot {
    /// Opens the directory at `path`, without its parents.
    ///
    /// Allocates in proportion to the files that are there, whatever they announce.
    ///
    /// # Errors
    /// Every [`ReadError`] but those that are about parents and memory.
    pub fn open(path: &Path) -> Result<Self, ReadError> {
        let dir = storage::open_dir(path).map_err(|error| failed(error, path.to_owned()))?;
        let metadata = dir.metadata().map_err(|source| ReadError::Io { path: path.to_owned(), source })?;
        let place = path.join(MANIFEST);
        let (file, size) = open(&dir, path, MANIFEST).map_err(|error| match error {
            ReadError::Missing { .. } => ReadError::NoManifest { path: path.to_owned() },
            error => error,
        })?;
        if size > MAX_MANIFEST {
            let what = format!("{size} bytes, at most {MAX_MANIFEST} are possible");
            return Err(ReadError::Absurd { path: place, what });
        }
        let manifest = Manifest::decode(&read_all(&file, &place, size)?, &place)?;
        let (state, found) = open(&dir, path, &manifest.state.file)?;
        read_state(&state, found, path, &manifest.state)?;
        let (chunks, found) = open(&dir, path, &manifest.chunks.file)?;
        let bytes = read_file(&chunks, found, path, &manifest.chunks)?;
        let table = Table::decode(&bytes, &manifest.memory)
            .map_err(|source| ReadError::Table { path: path.join(&manifest.chunks.file), source })?;
        let mut memory = Vec::new();
        for (region, RegionTable { extents, .. }) in manifest.memory.iter().zip(&table.regions) {
            let (file, found) = open(&dir, path, &region.file)?;
            let layout = Layout::new(manifest.format, extents, region.size);
            if found != layout.file_size() {
                let path = path.join(&region.file);
                return Err(ReadError::Size { path, found, expected: layout.file_size() });
            }
            memory.push(MemoryFile { file, layout });
        }
        let identity = (metadata.dev(), metadata.ino());
        let snapshot = Self { path: path.to_owned(), identity, manifest, state, table, memory };
        snapshot.check_complete()?;
        Ok(snapshot)
    }

    fn check_complete(&self) -> Result<(), ReadError> {
        let regions = self.manifest.memory.iter().zip(&self.table.regions);
        let whole = |(region, table): (&Region, &RegionTable)| table.extents == Extents::whole(region.size);
        if self.manifest.parent.is_none() && !regions.into_iter().all(whole) {
            return Err(ReadError::Incomplete { path: self.path.clone() });
        }
        Ok(())
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn identity(&self) -> (u64, u64) {
        self.identity
    }

    /// What it is.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Its id.
    #[must_use]
    pub fn id(&self) -> Hash {
        self.manifest.id
    }

    /// The records of the VM, read from the file that was opened.
    ///
    /// # Errors
    /// [`ReadError::Records`]; [`Hash`](ReadError::Hash) or [`Io`](ReadError::Io) if the file is not what it was.
    pub fn state(&self) -> Result<RecordSet, ReadError> {
        let Manifest { state, .. } = &self.manifest;
        let record = read_state(&self.state, state.size, &self.path, state)?;
        record.parse().map_err(|source| ReadError::Records { path: self.path.join(&state.file), source })
    }

    /// Extents and chunk hashes.
    #[must_use]
    pub fn table(&self) -> &Table {
        &self.table
    }

    /// The memory file of a region. That of a snapshot without parent is as long as the region, and offsets in both are the
    /// same: for a private mapping.
    #[must_use]
    pub fn memory(&self, region: usize) -> Option<&File> {
        self.memory.get(region).map(|memory| &memory.file)
    }

    /// Bytes that the memory file of a region takes on disk.
    pub(super) fn disk_bytes(&self, region: usize) -> Result<u64, ReadError> {
        let (Some(MemoryFile { file, .. }), Some(Region { file: name, .. })) =
            (self.memory.get(region), self.manifest.memory.get(region))
        else {
            return Ok(0);
        };
        let metadata = file.metadata();
        let metadata = metadata.map_err(|source| ReadError::Io { path: self.path.join(name), source })?;
        // The unit of st_blocks is 512 bytes on Linux.
        Ok(metadata.blocks().saturating_mul(512))
    }

    /// Reads chunk `chunk` of a region into `buffer` and verifies it. What is not held is zero.
    pub(super) fn read_chunk(
        &self,
        region: usize,
        chunk: u64,
        buffer: &mut Vec<u8>,
    ) -> Result<(), ReadError> {
        let (Some(MemoryFile { file, layout }), Some(Region { size, file: name, .. }), Some(table)) =
            (self.memory.get(region), self.manifest.memory.get(region), self.table.regions.get(region))
        else {
            buffer.clear();
            return Ok(());
        };
        let path = || self.path.join(name);
        let range = chunk_range(chunk, *size);
        sized(buffer, &range);
        let first = layout.position(range.start);
        let held = part_mut(buffer, 0..layout.position(range.end) - first);
        file.read_exact_at(held, first).map_err(|error| match error.kind() {
            // It was long enough when it was opened.
            io::ErrorKind::UnexpectedEof => ReadError::Size {
                path: path(),
                found: file.metadata().map_or(0, |metadata| metadata.len()),
                expected: layout.file_size(),
            },
            _ => ReadError::Io { path: path(), source: error },
        })?;
        let in_chunk = |place: Range<u64>| place.start - range.start..place.end - range.start;
        let places = match layout {
            Layout::Sparse(_) => vec![in_chunk(range.clone())],
            Layout::Packed(_) => {
                let places: Vec<_> = table.extents.within(range.clone()).map(in_chunk).collect();
                spread(buffer, &places);
                places
            }
        };
        let mut hasher = ChunkHasher::default();
        places.into_iter().for_each(|place| hasher.pages(place.start, part(buffer, place)));
        if hasher.finish() == table.hash(chunk) {
            return Ok(());
        }
        Err(ReadError::Chunk { path: path(), chunk, offset: range.start })
    }

    /// Reads all memory files and compares them with the chunk table. Holes cost nothing.
    ///
    /// # Errors
    /// [`ReadError::Chunk`], [`Size`](ReadError::Size), [`Io`](ReadError::Io) or
    /// [`Cancelled`](ReadError::Cancelled).
    pub fn verify(&self, work: &Work<'_>) -> Result<(), ReadError> {
        let sizes: Vec<u64> = self.manifest.memory.iter().map(|region| region.size).collect();
        // A chunk without hash must be zero: what is not a hole is looked at, too.
        let find = |region: usize, from: u64| {
            let (Some(table), Some(MemoryFile { file, layout })) =
                (self.table.regions.get(region), self.memory.get(region))
            else {
                return Ok(None);
            };
            let position = layout.position(from.saturating_mul(CHUNK));
            let data = storage::next_data(file, position).map_err(|source| {
                let name = self.manifest.memory.get(region).map_or("", |region| &region.file);
                ReadError::Io { path: self.path.join(name), source }
            })?;
            // What was added to the file since it was opened is nobody's.
            let data = data.filter(|position| *position < layout.file_size());
            let data = data.map(|position| layout.offset(position) / CHUNK);
            Ok([data, table.next(from)].into_iter().flatten().min())
        };
        work.run(&sizes, &find, &|job, buffers| self.read_chunk(job.region, job.chunk, &mut buffers.chunk))
            .map_err(stopped)
    }
}

/// Moves what lies packed at the beginning of `chunk` to its `places`, and makes the rest zero.
fn spread(chunk: &mut [u8], places: &[Range<u64>]) {
    let mut packed: u64 = places.iter().map(|place| place.end - place.start).sum();
    let mut end = chunk.len() as u64;
    // From the last on: no place is before where its content was.
    for place in places.iter().rev() {
        packed -= place.end - place.start;
        let from = part_mut(chunk, packed..place.end);
        let moved = usize::try_from(place.end - place.start).map_or(0, |bytes| bytes.min(from.len()));
        from.copy_within(..moved, from.len() - moved);
        part_mut(chunk, place.end..end).fill(0);
        end = place.start;
    }
    part_mut(chunk, 0..end).fill(0);
}

pub(super) fn stopped(stop: Stop<ReadError>) -> ReadError {
    match stop {
        Stop::Cancelled => ReadError::Cancelled,
        Stop::Failed(error) => error,
    }
}

fn failed(error: io::Error, path: PathBuf) -> ReadError {
    // What O_NOFOLLOW says of a link.
    if error.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error()) {
        return ReadError::Symlink { path };
    }
    match error.kind() {
        io::ErrorKind::NotFound => ReadError::Missing { path },
        io::ErrorKind::NotADirectory => ReadError::NoManifest { path },
        _ => ReadError::Io { path, source: error },
    }
}

/// Opens a regular file of the snapshot at `path` and says how long it is.
fn open(dir: &File, path: &Path, name: &str) -> Result<(File, u64), ReadError> {
    let path = path.join(name);
    let file = storage::open_file(dir, name).map_err(|error| failed(error, path.clone()))?;
    let metadata = match file.metadata() {
        Ok(metadata) => metadata,
        Err(source) => return Err(ReadError::Io { path, source }),
    };
    if !metadata.is_file() {
        return Err(ReadError::NotAFile { path });
    }
    Ok((file, metadata.len()))
}

/// Reads a file of `size` bytes, and not a byte more.
fn read_all(file: &File, path: &Path, size: u64) -> Result<Vec<u8>, ReadError> {
    let mut bytes = vec![0; usize::try_from(size).unwrap_or(usize::MAX)];
    let read = file.read_exact_at(&mut bytes, 0);
    read.map_err(|source| ReadError::Io { path: path.to_owned(), source })?;
    Ok(bytes)
}

/// Reads the state, and compares it likewise.
fn read_state(file: &File, found: u64, path: &Path, expected: &DataFile) -> Result<Record, ReadError> {
    let bytes = read_file(file, found, path, expected)?;
    minicbor::decode(&bytes).map_err(|source| ReadError::State { path: path.join(&expected.file), source })
}

/// Reads a file of the snapshot at `path`, which has `found` bytes, and compares it with what the manifest says of it.
fn read_file(file: &File, found: u64, path: &Path, expected: &DataFile) -> Result<Vec<u8>, ReadError> {
    let path = path.join(&expected.file);
    if found != expected.size {
        return Err(ReadError::Size { path, found, expected: expected.size });
    }
    let bytes = read_all(file, &path, found)?;
    if Hash::of(&bytes) != expected.sha256 {
        return Err(ReadError::Hash { path });
    }
    Ok(bytes)
}
