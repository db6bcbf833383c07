//! The chunk table: per region its extents and the hash of each chunk that is not all zero.

use std::collections::BTreeSet;
use std::ops::Range;

use super::work::Job;
use super::{CHUNK, Extents, Hash, MAX_EXTENTS, PAGE, Region, chunk_range};

const MAGIC: &[u8; 8] = b"VMMCHNKS";
const VERSION: u32 = 1;

/// What the table says about one region.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RegionTable {
    /// Pages that this snapshot holds; all others are the parent's.
    pub extents: Extents,
    /// Number and hash of each chunk of the memory file that is not all zero, ascending.
    pub chunks: Vec<(u32, Hash)>,
}

impl RegionTable {
    /// The hash of chunk `chunk`; `None` means that all its bytes are zero.
    #[must_use]
    pub fn hash(&self, chunk: u64) -> Option<Hash> {
        let at = self.chunks.binary_search_by_key(&chunk, |(index, _)| u64::from(*index)).ok()?;
        self.chunks.get(at).map(|(_, hash)| *hash)
    }

    /// The first chunk from `chunk` on that is not all zero.
    pub(super) fn next(&self, chunk: u64) -> Option<u64> {
        let at = self.chunks.partition_point(|(index, _)| u64::from(*index) < chunk);
        self.chunks.get(at).map(|(index, _)| u64::from(*index))
    }
}

/// The content of the chunk table, in the order of the manifest's regions.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Table {
    /// One per region.
    pub regions: Vec<RegionTable>,
}

/// Why bytes are not the chunk table of a snapshot.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum TableError {
    /// Another file.
    #[error("the magic number is not that of a chunk table")]
    Magic,
    /// Not the version that goes with this format of the manifest.
    #[error("table version {0}, expected {VERSION}")]
    Version(u32),
    /// The bytes end early, go on, or announce more than they hold.
    #[error("the length does not fit what the table announces")]
    Length,
    /// As many regions as the manifest has were expected.
    #[error("{found} regions, the manifest has {expected}")]
    Regions {
        /// Regions in the table.
        found: u32,
        /// Regions in the manifest.
        expected: usize,
    },
    /// Extents overlap, touch, are not whole pages, leave the region, or are too many.
    #[error("extents of region {0} are not in order")]
    Extents(usize),
    /// Chunks are not ascending, leave the region, or lie outside all extents.
    #[error("chunks of region {0} are not in order")]
    Chunks(usize),
}

impl Table {
    /// A table with these extents and no chunks.
    pub(super) fn empty(extents: Vec<Extents>) -> Self {
        let of = |extents| RegionTable { extents, chunks: Vec::new() };
        Self { regions: extents.into_iter().map(of).collect() }
    }

    /// The same with these chunks, which it did not have, in whatever order they were finished.
    pub(super) fn with(mut self, chunks: Vec<(Job, Hash)>) -> Self {
        for (job, hash) in chunks {
            // Addresses of 52 bits have chunk numbers of 31.
            if let (Some(region), Ok(chunk)) = (self.regions.get_mut(job.region), u32::try_from(job.chunk)) {
                region.chunks.push((chunk, hash));
            }
        }
        self.regions.iter_mut().for_each(|region| region.chunks.sort_unstable_by_key(|(chunk, _)| *chunk));
        self
    }

    /// The same without these chunks, given by region and number.
    pub(super) fn without(mut self, chunks: &BTreeSet<(usize, u64)>) -> Self {
        for (index, region) in self.regions.iter_mut().enumerate() {
            region.chunks.retain(|(chunk, _)| !chunks.contains(&(index, u64::from(*chunk))));
        }
        self
    }

    /// The table as bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let count = |items: usize| u32::try_from(items).unwrap_or(u32::MAX).to_le_bytes();
        let mut bytes = MAGIC.to_vec();
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(count(self.regions.len()));
        for region in &self.regions {
            bytes.extend(count(region.extents.ranges().len()));
            bytes.extend(count(region.chunks.len()));
            for range in region.extents.ranges() {
                bytes.extend((range.start / PAGE).to_le_bytes());
                bytes.extend(((range.end - range.start) / PAGE).to_le_bytes());
            }
            for (index, hash) in &region.chunks {
                bytes.extend(index.to_le_bytes());
                bytes.extend(hash.0);
            }
        }
        bytes
    }

    /// The table of a snapshot with `regions`, from bytes that may come from anywhere.
    ///
    /// # Errors
    /// The bytes are anything but what [`encode`](Self::encode) writes for such regions.
    pub fn decode(bytes: &[u8], regions: &[Region]) -> Result<Self, TableError> {
        let mut rest = bytes;
        if array::<8>(&mut rest)? != *MAGIC {
            return Err(TableError::Magic);
        }
        match u32::from_le_bytes(array(&mut rest)?) {
            VERSION => {}
            version => return Err(TableError::Version(version)),
        }
        let found = u32::from_le_bytes(array(&mut rest)?);
        if usize::try_from(found) != Ok(regions.len()) {
            return Err(TableError::Regions { found, expected: regions.len() });
        }
        let mut table = Self::default();
        for (index, region) in regions.iter().enumerate() {
            table.regions.push(decode_region(&mut rest, index, region.size)?);
        }
        if rest.is_empty() { Ok(table) } else { Err(TableError::Length) }
    }
}

fn decode_region(rest: &mut &[u8], index: usize, size: u64) -> Result<RegionTable, TableError> {
    let extents = u32::from_le_bytes(array(rest)?) as usize;
    let chunks = u32::from_le_bytes(array(rest)?) as usize;
    if extents > MAX_EXTENTS {
        return Err(TableError::Extents(index));
    }
    // Counts are believed only as far as bytes follow.
    let needed = extents.checked_mul(16).and_then(|bytes| bytes.checked_add(chunks.checked_mul(36)?));
    if needed.is_none_or(|needed| needed > rest.len()) {
        return Err(TableError::Length);
    }
    let mut ranges: Vec<Range<u64>> = Vec::with_capacity(extents);
    for _ in 0..extents {
        let (first, pages) = (u64::from_le_bytes(array(rest)?), u64::from_le_bytes(array(rest)?));
        let end = first.checked_add(pages).and_then(|end| end.checked_mul(PAGE));
        let end = end.ok_or(TableError::Extents(index))?;
        ranges.push(end - pages * PAGE..end);
    }
    let extents = Extents::exact(ranges, size).ok_or(TableError::Extents(index))?;
    let mut table = RegionTable { extents, chunks: Vec::with_capacity(chunks) };
    for _ in 0..chunks {
        let (chunk, hash) = (u32::from_le_bytes(array(rest)?), Hash(array(rest)?));
        let ascending = table.chunks.last().is_none_or(|(last, _)| *last < chunk);
        let covered = table.extents.within(chunk_range(chunk.into(), size)).next().is_some();
        if !ascending || u64::from(chunk) >= size.div_ceil(CHUNK) || !covered {
            return Err(TableError::Chunks(index));
        }
        table.chunks.push((chunk, hash));
    }
    Ok(table)
}

fn array<const N: usize>(rest: &mut &[u8]) -> Result<[u8; N], TableError> {
    let (array, after) = rest.split_first_chunk::<N>().ok_or(TableError::Length)?;
    *rest = after;
    Ok(*array)
}
