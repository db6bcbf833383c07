//! Where a writer gets guest memory from.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use super::{part, storage};

/// A contiguous part of a memory zone in guest physical memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The zone's name in the configuration. A zone may have several places.
    pub zone: String,
    /// Guest physical address of the first byte; a whole page.
    pub gpa: u64,
    /// Bytes; whole pages.
    pub size: u64,
}

/// Guest memory as a writer reads it, from several threads at once.
///
/// It does not change while it is read, or whoever changes it saves the pages again.
pub trait MemorySource: Sync {
    /// The places, ascending by address; a *region* of the other methods is a place's number.
    fn places(&self) -> Vec<Place>;

    /// The first bytes from `offset` on that may be other than zero; `None` if there are none up to the end.
    ///
    /// This is what keeps pages that the guest never touched from being faulted in.
    ///
    /// # Errors
    /// What the host says.
    fn next_data(&self, region: usize, offset: u64) -> io::Result<Option<Range<u64>>>;

    /// Fills `bytes` from `offset` on. What is not data is zero, and stays what it is: it is not faulted in.
    ///
    /// # Errors
    /// What the host says.
    fn read(&self, region: usize, offset: u64, bytes: &mut [u8]) -> io::Result<()>;
}

/// Memory in vectors, each as long as its place.
#[derive(Debug, Clone, Default)]
pub struct BytesMemory(pub Vec<(Place, Vec<u8>)>);

impl MemorySource for BytesMemory {
    fn places(&self) -> Vec<Place> {
        self.0.iter().map(|(place, _)| place.clone()).collect()
    }

    fn next_data(&self, region: usize, offset: u64) -> io::Result<Option<Range<u64>>> {
        let size = self.0.get(region).map_or(0, |(_, bytes)| bytes.len() as u64);
        Ok((offset < size).then_some(offset..size))
    }

    fn read(&self, region: usize, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let all = self.0.get(region).map_or(&[][..], |(_, bytes)| bytes);
        let found = part(all, offset..offset.saturating_add(bytes.len() as u64));
        if found.len() != bytes.len() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        bytes.copy_from_slice(found);
        Ok(())
    }
}

/// Memory in files, a memfd for instance: holes are not read.
#[derive(Debug, Default)]
pub struct FileMemory(pub Vec<(Place, File)>);

impl FileMemory {
    fn file(&self, region: usize) -> io::Result<&File> {
        self.0.get(region).map(|(_, file)| file).ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

impl MemorySource for FileMemory {
    fn places(&self) -> Vec<Place> {
        self.0.iter().map(|(place, _)| place.clone()).collect()
    }

    fn next_data(&self, region: usize, offset: u64) -> io::Result<Option<Range<u64>>> {
        let file = self.file(region)?;
        let Some(start) = storage::next_data(file, offset)? else { return Ok(None) };
        Ok(Some(start..storage::next_hole(file, start)?))
    }

    fn read(&self, region: usize, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.file(region)?.read_exact_at(bytes, offset)
    }
}
