//! Moves pages from guest memory to the memory files.

use std::fs::File;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use super::draft::Workplace;
use super::hash::{ChunkHasher, is_zero};
use super::work::{Buffers, Job, sized};
use super::{CHUNK, Extents, Hash, MemorySource, PAGE, Region, WriteError, chunk_range, part, part_mut};

/// What the threads that write memory share.
pub(super) struct Writer<'a> {
    place: &'a Workplace<'a>,
    source: &'a dyn MemorySource,
    regions: &'a [Region],
    files: &'a [File],
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
        (regions, files): (&'a [Region], &'a [File]),
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
            if self.over {
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
        let (Some(Region { size, .. }), Some(wanted)) = (self.regions.get(region), self.wanted.get(region))
        else {
            return Ok(None);
        };
        let window = chunk_range(chunk, *size);
        sized(&mut buffers.chunk, &window);
        let mut piece = Piece { writer: self, region, start: window.start, hasher: ChunkHasher::default() };
        for extent in wanted.within(window) {
            let mut at = extent.start;
            while at < extent.end {
                let data = self.data(region, at)?.filter(|data| data.start < extent.end);
                let data = data.map_or(extent.end..extent.end, |data| data.start..data.end.min(extent.end));
                piece.zero(at..data.start)?;
                piece.copy(&data, &mut buffers.chunk)?;
                at = data.end;
            }
        }
        Ok(piece.hasher.finish())
    }
}

/// A chunk while it is written.
struct Piece<'a> {
    writer: &'a Writer<'a>,
    region: usize,
    /// First byte of the chunk in the region.
    start: u64,
    hasher: ChunkHasher,
}

impl Piece<'_> {
    /// Reads `data` of the region into `chunk` and writes it, neighbours together.
    fn copy(&mut self, data: &Range<u64>, chunk: &mut [u8]) -> Result<(), WriteError> {
        if data.is_empty() {
            return Ok(());
        }
        let (region, first) = (self.region, data.start);
        let bytes = part_mut(chunk, first - self.start..data.end - self.start);
        let read = self.writer.source.read(region, first, bytes);
        read.map_err(|source| WriteError::Memory { region, offset: first, source })?;
        let (mut run, mut zero) = (first..first, false);
        for start in data.clone().step_by(PAGE as usize) {
            let page = part(chunk, start - self.start..start - self.start + PAGE);
            if is_zero(page) != zero {
                self.flush(&run, zero, chunk)?;
                (run, zero) = (start..start, !zero);
            }
            if !zero && !self.writer.over {
                self.hasher.page(start - self.start, page);
            }
            run.end = start + PAGE;
        }
        self.flush(&run, zero, chunk)
    }

    fn flush(&self, run: &Range<u64>, zero: bool, chunk: &[u8]) -> Result<(), WriteError> {
        if zero {
            return self.zero(run.clone());
        }
        let Some((file, name)) = self.file() else { return Ok(()) };
        let bytes = part(chunk, run.start - self.start..run.end - self.start);
        self.writer.place.write(file, name, bytes, run.start)
    }

    /// Makes a part of the file zero, which a new file is.
    fn zero(&self, range: Range<u64>) -> Result<(), WriteError> {
        let Some((file, name)) = self.file().filter(|_| self.writer.over && !range.is_empty()) else {
            return Ok(());
        };
        self.writer.place.zero(file, name, range)
    }

    fn file(&self) -> Option<(&File, &str)> {
        let region = self.writer.regions.get(self.region)?;
        Some((self.writer.files.get(self.region)?, &region.file))
    }
}
