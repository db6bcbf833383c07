//! A snapshot with all its parents, read as one.

use std::io;
use std::path::{Path, PathBuf};

use super::read::stopped;
use super::work::{Buffers, Job, sized};
use super::{Extents, Hash, Manifest, Place, ReadError, Region, Snapshot, Work, chunk_range, part, part_mut};
use crate::RecordSet;

/// Most snapshots of a chain, the one without parent included.
pub const MAX_DEPTH: usize = 32;

/// A snapshot and its parents; of every page the newest counts.
#[derive(Debug)]
pub struct Chain {
    base: Snapshot,
    /// Oldest first; empty for a snapshot without parent.
    overlays: Vec<Snapshot>,
}

/// A piece of guest memory, read and verified.
#[derive(Debug, Clone, Copy)]
pub struct Piece<'a> {
    /// Number of the region in [`Chain::regions`].
    pub region: usize,
    /// Offset in the region; a whole page.
    pub offset: u64,
    /// At most a chunk, whole pages.
    pub bytes: &'a [u8],
}

/// Which regions are meant, by their numbers.
type Wanted<'a> = &'a (dyn Fn(usize) -> bool + Sync);

/// What takes pieces, on several threads at once.
type Sink<'a> = &'a (dyn Fn(Piece<'_>) -> io::Result<()> + Sync);

impl Chain {
    /// Opens the snapshot at `path` and all its parents, as [`Snapshot::open`] does each.
    ///
    /// # Errors
    /// Every [`ReadError`] but those that are about the content of memory.
    pub fn open(path: &Path) -> Result<Self, ReadError> {
        let mut newer: Vec<Snapshot> = Vec::new();
        let mut at = Snapshot::open(path)?;
        while let Some(parent) = at.manifest().parent.clone() {
            // Absolute locations replace the path that they are joined to.
            let place = at.path().join(&parent.location);
            newer.push(at);
            if newer.len() == MAX_DEPTH {
                return Err(ReadError::TooDeep { path: path.to_owned(), limit: MAX_DEPTH });
            }
            at = open_parent(&newer, place, parent.id)?;
        }
        newer.reverse();
        Ok(Self { base: at, overlays: newer })
    }

    /// The snapshot that was asked for.
    #[must_use]
    pub fn newest(&self) -> &Snapshot {
        self.overlays.last().unwrap_or(&self.base)
    }

    /// The one without parent: its memory files can be mapped privately, one mapping per region, before
    /// [`load_overlay`](Self::load_overlay) copies the newer pages in.
    #[must_use]
    pub fn base(&self) -> &Snapshot {
        &self.base
    }

    /// All snapshots, oldest first.
    pub fn layers(&self) -> impl DoubleEndedIterator<Item = &Snapshot> {
        std::iter::once(&self.base).chain(&self.overlays)
    }

    /// Number of snapshots.
    #[must_use]
    pub fn depth(&self) -> usize {
        self.overlays.len() + 1
    }

    /// What the newest one is.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        self.newest().manifest()
    }

    /// The records of the newest one.
    ///
    /// # Errors
    /// [`ReadError::Records`].
    pub fn state(&self) -> Result<RecordSet, ReadError> {
        self.newest().state()
    }

    /// Memory; the same in all snapshots.
    #[must_use]
    pub fn regions(&self) -> &[Region] {
        &self.manifest().memory
    }

    /// Verifies the memory of all snapshots, oldest first; progress starts anew for each.
    ///
    /// # Errors
    /// As [`Snapshot::verify`].
    pub fn verify(&self, work: &Work<'_>) -> Result<(), ReadError> {
        self.layers().try_for_each(|layer| layer.verify(work))
    }

    /// Hands over all memory that is not zero, a chunk at a time in no order, each verified first. Memory that
    /// is not handed over is zero.
    ///
    /// # Errors
    /// As [`Snapshot::verify`], or [`ReadError::Sink`].
    pub fn load(&self, work: &Work<'_>, sink: Sink<'_>) -> Result<(), ReadError> {
        self.load_of(&|_| true, work, sink)
    }

    /// As [`load`](Self::load), of the regions that are `wanted`; the others are not read.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_of(&self, wanted: Wanted<'_>, work: &Work<'_>, sink: Sink<'_>) -> Result<(), ReadError> {
        let next = |region: usize, from: u64| self.next_chunk(region, from);
        let find = |region: usize, from: u64| Ok(wanted(region).then(|| next(region, from)).flatten());
        let each = |job: Job, buffers: &mut Buffers| {
            self.read_chunk(job, buffers)?;
            let offset = job.chunk * super::CHUNK;
            give(sink, Piece { region: job.region, offset, bytes: &buffers.chunk })
        };
        work.run(&self.sizes(), &find, &each).map_err(stopped)
    }

    /// The first chunk from `from` on of a region that is not zero in some snapshot.
    #[must_use]
    pub fn next_chunk(&self, region: usize, from: u64) -> Option<u64> {
        self.layers().filter_map(|layer| layer.table().regions.get(region)?.next(from)).min()
    }

    /// Reads chunk `chunk` of a region into `bytes`, which are as long afterwards, each snapshot's part of it verified.
    ///
    /// # Errors
    /// As [`Snapshot::verify`]. What is in `bytes` is of no use then.
    pub fn chunk(&self, region: usize, chunk: u64, bytes: &mut Vec<u8>) -> Result<(), ReadError> {
        let mut buffers = Buffers { chunk: std::mem::take(bytes), scratch: Vec::new() };
        let read = self.read_chunk(Job { region, chunk }, &mut buffers);
        *bytes = buffers.chunk;
        read
    }

    /// Hands over what the newer snapshots hold over the base, in no order, each page once and verified.
    /// Pages that became zero are among them.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_overlay(&self, work: &Work<'_>, sink: Sink<'_>) -> Result<(), ReadError> {
        self.load_overlay_of(&|_| true, work, sink)
    }

    /// As [`load_overlay`](Self::load_overlay), of the regions that are `wanted`; the others are not read.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_overlay_of(
        &self,
        wanted: Wanted<'_>,
        work: &Work<'_>,
        sink: Sink<'_>,
    ) -> Result<(), ReadError> {
        let overlay = self.overlay();
        let find = |region: usize, from: u64| {
            let start = from.saturating_mul(super::CHUNK);
            let extents = overlay.get(region).filter(|_| wanted(region));
            let extents = extents.and_then(|extents| extents.within(start..u64::MAX).next());
            Ok(extents.map(|range| range.start / super::CHUNK))
        };
        let sizes = self.sizes();
        let each = |job: Job, buffers: &mut Buffers| {
            let window = chunk_range(job.chunk, sizes.get(job.region).copied().unwrap_or(0));
            sized(&mut buffers.chunk, &window);
            self.lay_over(job, buffers)?;
            let extents =
                overlay.get(job.region).into_iter().flat_map(|extents| extents.within(window.clone()));
            for range in extents {
                let bytes = part(&buffers.chunk, range.start - window.start..range.end - window.start);
                give(sink, Piece { region: job.region, offset: range.start, bytes })?;
            }
            Ok(())
        };
        work.run(&sizes, &find, &each).map_err(stopped)
    }

    /// Per region the pages that a snapshot above the base holds.
    #[must_use]
    pub fn overlay(&self) -> Vec<Extents> {
        let of = |(index, region): (usize, &Region)| {
            let tables = self.overlays.iter().filter_map(|layer| layer.table().regions.get(index));
            let ranges: Vec<_> = tables.flat_map(|table| table.extents.ranges()).cloned().collect();
            Extents::covering(&ranges, region.size).unwrap_or_default()
        };
        self.regions().iter().enumerate().map(of).collect()
    }

    pub(super) fn sizes(&self) -> Vec<u64> {
        self.regions().iter().map(|region| region.size).collect()
    }

    /// Which layers say something about a chunk; equal answers of two chains mean equal content.
    pub(super) fn sources(&self, Job { region, chunk }: Job) -> Vec<(Hash, Option<Hash>)> {
        let of = |layer: &Snapshot| {
            let table = layer.table().regions.get(region)?;
            let window = chunk_range(chunk, layer.manifest().memory.get(region)?.size);
            let holds = table.extents.within(window).next().is_some();
            holds.then(|| (layer.id(), table.hash(chunk)))
        };
        self.layers().filter_map(of).collect()
    }

    /// Reads a chunk into `buffers.chunk`, each layer's part of it verified.
    pub(super) fn read_chunk(&self, job: Job, buffers: &mut Buffers) -> Result<(), ReadError> {
        let window = chunk_range(job.chunk, self.regions().get(job.region).map_or(0, |region| region.size));
        if self.base.table().regions.get(job.region).is_some_and(|table| table.hash(job.chunk).is_some()) {
            self.base.read_chunk(job.region, job.chunk, &mut buffers.chunk)?;
        } else {
            sized(&mut buffers.chunk, &window);
            buffers.chunk.fill(0);
        }
        self.lay_over(job, buffers)
    }

    /// Copies what the overlays hold of a chunk into `buffers.chunk`, which is as long as the chunk.
    fn lay_over(&self, Job { region, chunk }: Job, buffers: &mut Buffers) -> Result<(), ReadError> {
        for layer in &self.overlays {
            let (Some(table), Some(Region { size, .. })) =
                (layer.table().regions.get(region), layer.manifest().memory.get(region))
            else {
                continue;
            };
            let window = chunk_range(chunk, *size);
            let mut extents = table.extents.within(window.clone()).peekable();
            let zero = table.hash(chunk).is_none();
            if extents.peek().is_some() && !zero {
                layer.read_chunk(region, chunk, &mut buffers.scratch)?;
            }
            for range in extents {
                let range = range.start - window.start..range.end - window.start;
                let target = part_mut(&mut buffers.chunk, range.clone());
                let source = part(&buffers.scratch, range);
                if zero {
                    target.fill(0);
                } else if target.len() == source.len() {
                    target.copy_from_slice(source);
                }
            }
        }
        Ok(())
    }
}

fn give(sink: Sink<'_>, piece: Piece<'_>) -> Result<(), ReadError> {
    sink(piece).map_err(|source| ReadError::Sink { region: piece.region, offset: piece.offset, source })
}

/// Opens the parent of the last of `newer`.
fn open_parent(newer: &[Snapshot], place: PathBuf, id: Hash) -> Result<Snapshot, ReadError> {
    let parent = match Snapshot::open(&place) {
        Ok(parent) => parent,
        Err(ReadError::NoManifest { .. }) => return Err(ReadError::MissingParent { path: place, id }),
        Err(ReadError::Missing { path }) if path == place => {
            return Err(ReadError::MissingParent { path: place, id });
        }
        Err(error) => return Err(error),
    };
    // Ids are hashes, so that only a forger of hashes gets past the next check; a link back is told as such.
    if newer.iter().any(|snapshot| snapshot.identity() == parent.identity()) {
        return Err(ReadError::Cycle { path: place });
    }
    if parent.id() != id {
        return Err(ReadError::OtherParent { path: place, found: parent.id(), expected: id });
    }
    let places = |snapshot: &Snapshot| -> Vec<Place> {
        snapshot.manifest().memory.iter().map(Region::place).collect()
    };
    if let Some(child) = newer.last().filter(|child| places(child) != places(&parent)) {
        return Err(ReadError::OtherMemory { path: child.path().to_owned(), other: place });
    }
    Ok(parent)
}
