//! Moves pages from guest memory to the memory files.

use std::fs::File;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use super::draft::Workplace;
use super::hash::{ChunkHasher, is_zero};
use super::layout::Layout;
use super::work::{Buffers, Job, sized};
use super::{CHUNK, Extents, Hash, MemorySource, PAGE, Region, WriteError, chunk_range, part, part_mut};

/// What is read without asking whether it is data: asking can take longer, and what changed most likely is.
const LITTLE: u64 = 16 * PAGE;

/// The memory file of a region while it is written.
#[derive(Debug)]
pub(super) struct MemoryFile {
    pub(super) file: File,
    pub(super) layout: Layout,
}

/// What the threads that write memory share.
pub(super) struct Writer<'a> {
    place: &'a Workplace<'a>,
    source: &'a dyn MemorySource,
    regions: &'a [Region],
    files: &'a [MemoryFile],
    /// Per region what is to be written.
    wanted: &'a [Extents],
    /// The files hold older content: zero pages are written, too, and nothing is hashed.
    over: bool,
    /// Per region what is known to be data. Asking costs as much as the run of data is long.
    known: Vec<Mutex<Range<u64>>>,
}

impl<'a> Writer<'a> {
    pub(super) fn new(
        place: &'a Workplace<'a>,
        source: &'a dyn MemorySource,
        (regions, files): (&'a [Region], &'a [MemoryFile]),
        wanted: &'a [Extents],
        over: bool,
    ) -> Self {
        let known = regions.iter().map(|_| Mutex::default()).collect();
        Self { place, source, regions, files, wanted, over, known }
    }
}

impl Writer<'_> {
    /// The first chunk from `from` on that has something to be written.
    pub(super) fn next(&self, region: usize, from: u64) -> Result<Option<u64>, WriteError> {
        let Some(wanted) = self.wanted.get(region) else { return Ok(None) };
        let mut at = from.saturating_mul(CHUNK);
        while let Some(extent) = wanted.within(at..u64::MAX).next() {
            if self.over || is_little(&extent) {
                return Ok(Some(extent.start / CHUNK));
            }
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
        let known = self.known.get(region).map(|known| known.lock().unwrap_or_else(PoisonError::into_inner));
        if let Some(known) = known.filter(|known| known.contains(&offset)) {
            return Ok(Some(offset..known.end));
        }
        let data = self.source.next_data(region, offset);
        let Some(data) = data.map_err(|source| WriteError::Memory { region, offset, source })? else {
            return Ok(None);
        };
        let start = data.start.max(offset) / PAGE * PAGE;
        // A source that says nothing new does not hold us up.
        let data = start..data.end.max(start + 1).next_multiple_of(PAGE);
        if let Some(known) = self.known.get(region) {
            known.lock().unwrap_or_else(PoisonError::into_inner).clone_from(&data);
        }
        Ok(Some(data))
    }

    /// Saves what is wanted of a chunk and gives its hash, unless all of it is zero.
    pub(super) fn chunk(
        &self,
        Job { region, chunk }: Job,
        buffers: &mut Buffers,
    ) -> Result<Option<Hash>, WriteError> {
        let (Some(Region { size, file: name, .. }), Some(memory), Some(wanted)) =
            (self.regions.get(region), self.files.get(region), self.wanted.get(region))
        else {
            return Ok(None);
        };
        let window = chunk_range(chunk, *size);
        let held = memory.layout.position(window.start)..memory.layout.position(window.end);
        sized(&mut buffers.chunk, &held);
        let mut piece = Piece {
            writer: self,
            region,
            name,
            file: &memory.file,
            chunk: window.start,
            first: held.start,
            bytes: &mut buffers.chunk,
            run: Run::default(),
            hasher: ChunkHasher::default(),
        };
        for extent in wanted.within(window) {
            // Bytes that the file lacks before the extent.
            let missing = extent.start - memory.layout.position(extent.start);
            let mut at = extent.start;
            while at < extent.end {
                let data = if is_little(&extent) { Some(extent.clone()) } else { self.data(region, at)? };
                let data = data.filter(|data| data.start < extent.end);
                let data = data.map_or(extent.end..extent.end, |data| data.start..data.end.min(extent.end));
                piece.add(at - missing..data.start - missing, true)?;
                piece.copy(&data, missing)?;
                at = data.end;
            }
        }
        piece.finish()
    }
}

fn is_little(extent: &Range<u64>) -> bool {
    extent.end - extent.start <= LITTLE
}

/// A chunk while it is written.
struct Piece<'a> {
    writer: &'a Writer<'a>,
    region: usize,
    /// Name of the memory file.
    name: &'a str,
    file: &'a File,
    /// First byte of the chunk in the region.
    chunk: u64,
    /// And in the file.
    first: u64,
    /// What the file holds from there on.
    bytes: &'a mut [u8],
    /// What is to be written next.
    run: Run,
    hasher: ChunkHasher,
}

/// Pages of a file, side by side, that are all zero or none of them.
#[derive(Default)]
struct Run {
    range: Range<u64>,
    zero: bool,
}

impl Piece<'_> {
    /// Reads `data` of the region, which in the file is `missing` bytes further to the front.
    fn copy(&mut self, data: &Range<u64>, missing: u64) -> Result<(), WriteError> {
        if data.is_empty() {
            return Ok(());
        }
        let (region, offset, before) = (self.region, data.start, missing + self.first);
        let bytes = part_mut(self.bytes, offset - before..data.end - before);
        let read = self.writer.source.read(region, offset, bytes);
        read.map_err(|source| WriteError::Memory { region, offset, source })?;
        for start in data.clone().step_by(PAGE as usize) {
            let page = part(self.bytes, start - before..start - before + PAGE);
            let zero = is_zero(page);
            if !zero && !self.writer.over {
                self.hasher.page(start - self.chunk, page);
            }
            self.add(start - missing..start - missing + PAGE, zero)?;
        }
        Ok(())
    }

    /// Adds a part of the file to what is to be written.
    fn add(&mut self, range: Range<u64>, zero: bool) -> Result<(), WriteError> {
        if range.is_empty() {
            return Ok(());
        }
        if self.run.range.end != range.start || self.run.zero != zero {
            self.flush()?;
            self.run = Run { range: range.start..range.start, zero };
        }
        self.run.range.end = range.end;
        Ok(())
    }

    fn flush(&self) -> Result<(), WriteError> {
        let Run { range, zero } = &self.run;
        let Writer { place, over, .. } = self.writer;
        match zero {
            _ if range.is_empty() => Ok(()),
            true if *over => place.zero(self.file, self.name, range.clone()),
            // A new file is zero.
            true => Ok(()),
            false => {
                let bytes = part(self.bytes, range.start - self.first..range.end - self.first);
                place.write(self.file, self.name, bytes, range.start)
            }
        }
    }

    fn finish(self) -> Result<Option<Hash>, WriteError> {
        self.flush()?;
        Ok(self.hasher.finish())
    }
}
