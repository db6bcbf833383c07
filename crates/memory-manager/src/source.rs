//! Guest memory as a snapshot's writer reads it: pages that nobody ever wrote are neither read nor made.
//!
//! | memory | what counts as data | from where it is read |
//! |---|---|---|
//! | private, no file | pages in memory or swapped out, as the page tables say | the mapping |
//! | private mapping of a file (a snapshot's, a zone's) | such pages, and what of the file is no hole | the mapping, else the file |
//! | shared (memfd, file) | what of the file is no hole | the file |
//! | huge pages, private | pages as above | the mapping |
//! | huge pages, shared | all, for hugetlbfs does not tell holes, unless there is nothing in the file | the file |

use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::{Arc, OnceLock};

use rustix::fs::SeekFrom;
use rustix::io::Errno;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend};
use vmm_device_model::dma::GuestRam;
use vmm_snapshot::directory::{CHUNK, MemorySource, Place};

use crate::dirty::Changed;
use crate::layout::PAGE_SIZE;
use crate::map::MemoryMap;
use crate::pagemap::{Own, Pagemap};

/// Pages that a look at the page tables for the next data finds at most: a writer of few pages asks for each anew.
const NEXT_PAGES: u64 = 64;
/// As much as that for a read of a chunk.
const READ_PAGES: u64 = CHUNK / PAGE_SIZE;
/// Fewer bytes between two runs of data are data, too: to find that they are zero costs less than to ask again.
const GAP: u64 = 16 * PAGE_SIZE;

/// Guest memory for another thread to read; it stays mapped for as long as this lives.
#[derive(Debug)]
pub struct GuestMemorySource {
    memory: Arc<GuestRam>,
    pagemap: Pagemap,
    /// The pages of private memory that are there.
    which: Own,
    regions: Vec<Region>,
}

#[derive(Debug)]
pub(crate) struct Region {
    place: Place,
    /// Address of the first byte in this process.
    host: u64,
    pub(crate) shared: bool,
    pub(crate) huge: bool,
    pub(crate) file: Option<FileOffset>,
    /// Nobody can make the file smaller; asked for when that matters.
    pub(crate) sealed: OnceLock<bool>,
}

impl MemoryMap {
    /// The RAM for a snapshot's writer, a region per piece of the layout.
    ///
    /// # Errors
    /// The page tables cannot be asked (/proc/self/pagemap), or [it is being filled](Self::is_filling).
    pub fn source(&self) -> io::Result<GuestMemorySource> {
        self.source_of(Own::All)
    }

    /// The same; of private memory only `which` pages are there.
    pub(crate) fn source_of(&self, which: Own) -> io::Result<GuestMemorySource> {
        if self.is_filling() {
            let what = "it is still being read from the snapshot that it was restored from";
            return Err(io::Error::new(io::ErrorKind::ResourceBusy, what));
        }
        let pagemap = Pagemap::open()?;
        let regions = self.places().into_iter().zip(self.memory().iter()).map(|(place, region)| {
            let mapping = region.get_mmap();
            Region {
                place,
                host: mapping.as_ptr() as u64,
                shared: mapping.flags() & libc::MAP_SHARED != 0,
                huge: mapping.is_hugetlbfs() == Some(true),
                file: mapping.file_offset().cloned(),
                sealed: OnceLock::new(),
            }
        });
        Ok(GuestMemorySource {
            memory: Arc::clone(self.memory()),
            pagemap,
            which,
            regions: regions.collect(),
        })
    }

    /// What may have changed since all of the RAM was restored as mappings of a snapshot's files, for the page
    /// tables know; `None` for RAM that was not. Pages of newer snapshots than the base are among it.
    ///
    /// # Errors
    /// The page tables cannot be asked.
    pub fn changed_since_restore(&self) -> io::Result<Option<Changed>> {
        if self.mapped_files().len() != self.memory().num_regions() {
            return Ok(None);
        }
        let source = self.source()?;
        let mut changed = Changed::new();
        for (number, region) in source.regions.iter().enumerate() {
            changed.push(source.all_own(number, 0..region.place.size)?);
        }
        Ok(Some(changed))
    }

    /// The pieces of RAM, as a snapshot names them.
    pub fn places(&self) -> Vec<Place> {
        let place = |piece: crate::map::PieceV1| Place {
            zone: piece.zone,
            gpa: piece.range.start,
            size: piece.range.size,
        };
        self.save().ram.into_iter().map(place).collect()
    }
}

impl GuestMemorySource {
    /// Bytes of a region, if there is one of that number.
    pub fn size(&self, region: usize) -> Option<u64> {
        self.regions.get(region).map(|region| region.place.size)
    }

    /// Guest physical address of a region's first byte.
    pub fn gpa(&self, region: usize) -> Option<u64> {
        self.regions.get(region).map(|region| region.place.gpa)
    }

    /// Whether a region shows a file where nothing was written.
    pub(crate) fn is_overlay(&self, region: usize) -> bool {
        self.regions.get(region).is_some_and(|at| !at.shared && !at.huge && at.file.is_some())
    }

    pub(crate) fn memory(&self) -> &GuestRam {
        &self.memory
    }

    /// All pages in `range` that are this process's own.
    pub(crate) fn all_own(&self, region: usize, range: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        let (mut all, mut at) = (Vec::new(), range.start);
        while at < range.end {
            let (runs, told) = self.own(region, at..range.end, READ_PAGES)?;
            runs.into_iter().for_each(|run| join(&mut all, run, 0));
            at = told;
        }
        Ok(all)
    }

    pub(crate) fn region(&self, region: usize) -> io::Result<&Region> {
        self.regions.get(region).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// The pages in `range` that are this process's own, and where they end to be told.
    fn own(&self, region: usize, range: Range<u64>, most: u64) -> io::Result<(Vec<Range<u64>>, u64)> {
        let which = match self.which {
            Own::All if self.is_overlay(region) => Own::OverFile,
            which => which,
        };
        let region = self.region(region)?;
        let host = |offset: u64| region.host + offset.min(region.place.size);
        let pages = range.start / PAGE_SIZE * PAGE_SIZE..range.end.next_multiple_of(PAGE_SIZE);
        let (runs, end) = self.pagemap.runs(host(pages.start)..host(pages.end), most, which)?;
        let offset = |host: u64| (host - region.host).clamp(range.start, range.end);
        let runs = runs.into_iter().map(|run| offset(run.start)..offset(run.end));
        Ok((runs.collect(), offset(end)))
    }

    /// The first of them, with little gaps.
    fn next_own(&self, region: usize, mut range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        let mut found = Vec::new();
        while found.is_empty() && !range.is_empty() {
            let (runs, end) = self.own(region, range.clone(), NEXT_PAGES)?;
            runs.into_iter().for_each(|run| join(&mut found, run, GAP));
            range.start = end;
        }
        Ok(found.into_iter().next())
    }

    /// Fills `bytes` from private memory: what is this process's own from the mapping, the rest from what lies
    /// under it.
    fn read_private(&self, number: usize, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let region = self.region(number)?;
        let end = offset + bytes.len() as u64;
        let mut at = offset;
        while at < end {
            let (runs, told) = self.own(number, at..end, READ_PAGES)?;
            for run in runs {
                region.read_file(at, part_mut(bytes, at - offset..run.start - offset))?;
                let address = GuestAddress(region.place.gpa + run.start);
                let target = part_mut(bytes, run.start - offset..run.end - offset);
                self.memory.read_slice(target, address).map_err(io::Error::other)?;
                at = run.end;
            }
            region.read_file(at, part_mut(bytes, at - offset..told - offset))?;
            at = told;
        }
        Ok(())
    }
}

impl MemorySource for GuestMemorySource {
    fn places(&self) -> Vec<Place> {
        self.regions.iter().map(|region| region.place.clone()).collect()
    }

    fn next_data(&self, region: usize, offset: u64) -> io::Result<Option<Range<u64>>> {
        let at = self.region(region)?;
        let size = at.place.size;
        let filed = at.file_data(offset)?;
        if at.shared {
            return Ok(filed);
        }
        // Own pages before the file's data are all that matters now.
        let until = filed.as_ref().map_or(size, |filed| filed.start);
        Ok(self.next_own(region, offset.min(until)..until)?.or(filed))
    }

    fn read(&self, region: usize, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let at = self.region(region)?;
        let end = offset.checked_add(bytes.len() as u64).filter(|end| *end <= at.place.size);
        if end.is_none() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if at.shared { at.read_file(offset, bytes) } else { self.read_private(region, offset, bytes) }
    }
}

impl Region {
    /// Fills `bytes` from the file; without one they are zero.
    fn read_file(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        // To read a file makes no pages, and an error is an error rather than a signal.
        match &self.file {
            Some(file) => file.file().read_exact_at(bytes, file.start() + offset),
            None => {
                bytes.fill(0);
                Ok(())
            }
        }
    }

    /// The first bytes from `offset` on for which the file has something; in bytes of the region.
    fn file_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        let size = self.place.size;
        let Some(file) = self.file.as_ref().filter(|_| offset < size) else { return Ok(None) };
        if self.huge {
            // hugetlbfs knows how many pages it has, not where.
            let any = file.file().metadata()?.blocks() != 0;
            return Ok(any.then_some(offset..size));
        }
        let seek = |to| match rustix::fs::seek(file.file(), to) {
            Ok(at) => Ok(Some(at.saturating_sub(file.start()).min(size))),
            Err(Errno::NXIO) => Ok(None),
            Err(error) => Err(io::Error::from(error)),
        };
        let start = seek(SeekFrom::Data(file.start() + offset))?.filter(|start| *start < size);
        let Some(start) = start else { return Ok(None) };
        let end = seek(SeekFrom::Hole(file.start() + start))?.unwrap_or(size);
        Ok(Some(start..end))
    }
}

/// Adds `run` to `runs`, to the last of them if no more than `gap` lies between.
fn join(runs: &mut Vec<Range<u64>>, run: Range<u64>, gap: u64) {
    match runs.last_mut() {
        Some(last) if run.start <= last.end.saturating_add(gap) => last.end = run.end,
        _ => runs.push(run),
    }
}

/// The part of `bytes` at `range`; empty when `range` is not in it.
fn part_mut(bytes: &mut [u8], range: Range<u64>) -> &mut [u8] {
    let (Ok(start), Ok(end)) = (usize::try_from(range.start), usize::try_from(range.end)) else {
        return &mut [];
    };
    bytes.get_mut(start..end).unwrap_or_default()
}
