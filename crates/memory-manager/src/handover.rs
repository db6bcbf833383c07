//! RAM that another process of this host takes over by its descriptors, without a copy.
//!
//! | zone | descriptor | what the taker checks |
//! |---|---|---|
//! | shared, no file | its memfd | a memory file of that kind of pages, and so large, that nobody can make smaller |
//! | shared, a file | its file | the very file that the taker's configuration names, which the taker opens itself |
//! | shared, a directory | a nameless file in it | nameless, of the same file system, and so large |
//! | private | none | |
//!
//! Private memory has no descriptor: it cannot be handed over.

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{FsWord, SealFlags};
use vm_memory::GuestMemoryBackend;
use vmm_device_model::dma::GuestRam;

use crate::layout::Layout;
use crate::map::{HostMemory, MemoryMap, Zone};
use crate::zone::{Backing, ZoneConfig, ZoneError, ZoneOptions};

/// File systems of memory files (statfs(2)).
const TMPFS: FsWord = 0x0102_1994;
const HUGETLBFS: FsWord = 0x9584_58f6;

/// Most files that can be handed over: as many descriptors go with one message (SCM_MAX_FD of unix(7)).
pub const MAX_FILES: usize = 253;

/// A piece of RAM, and where it lies in the files that are handed over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SharedPiece {
    /// Guest physical address of its first byte.
    pub gpa: u64,
    /// Bytes.
    pub size: u64,
    /// Which of the files.
    pub file: usize,
    /// Where it begins in that file, in bytes.
    pub offset: u64,
}

/// RAM as another process can take it over.
#[derive(Debug)]
pub struct SharedMemory {
    /// A file per zone, in the zones' order.
    pub files: Vec<File>,
    /// A piece per region, in the order of their addresses.
    pub pieces: Vec<SharedPiece>,
}

impl SharedMemory {
    /// Where RAM of this layout lies in its zones' files.
    fn pieces_of(layout: &Layout) -> Vec<SharedPiece> {
        let piece = |piece: &crate::layout::Placement| SharedPiece {
            gpa: piece.range.start,
            size: piece.range.size,
            file: piece.zone,
            offset: piece.offset,
        };
        layout.ram.iter().map(piece).collect()
    }
}

impl MemoryMap {
    /// The RAM for another process to take over with [`HostMemory::adopt`]. It stays this one's, too: only one of both may
    /// write to it.
    ///
    /// # Errors
    /// A zone is private, or there are more than [`MAX_FILES`]; or it is still [being filled](Self::is_filling).
    pub fn share(&self) -> Result<SharedMemory, HandoverError> {
        if self.is_filling() {
            return Err(HandoverError::Filling);
        }
        let zones = self.zones();
        if zones.len() > MAX_FILES {
            return Err(HandoverError::TooMany { zones: zones.len() });
        }
        let mut files: Vec<Option<File>> = zones.iter().map(|_| None).collect();
        for (piece, region) in self.layout().ram.iter().zip(self.memory().iter()) {
            let mapping = region.get_mmap();
            let file = mapping.file_offset().filter(|file| file.start() == piece.offset);
            let Some(file) = file.filter(|_| mapping.flags() & libc::MAP_SHARED != 0) else { continue };
            if let Some(place) = files.get_mut(piece.zone).filter(|place| place.is_none()) {
                *place = Some(file.file().try_clone().map_err(HandoverError::Duplicate)?);
            }
        }
        let private = zones.iter().zip(&files).filter(|(_, file)| file.is_none());
        let private: Vec<_> = private.map(|(zone, _)| zone.id.clone()).collect();
        if !private.is_empty() {
            return Err(HandoverError::Private { zones: private });
        }
        let pieces = SharedMemory::pieces_of(self.layout());
        Ok(SharedMemory { files: files.into_iter().flatten().collect(), pieces })
    }
}

impl HostMemory {
    /// Maps the memory of `zones` that another process hands over: `files` with `pieces` in them, as [`MemoryMap::share`]
    /// gave. Nothing is written to it, and nothing allocated.
    ///
    /// # Errors
    /// The files are not such that these zones can be in them; nothing is left mapped.
    pub fn adopt(
        zones: &[ZoneConfig],
        phys_bits: u8,
        files: Vec<OwnedFd>,
        pieces: &[SharedPiece],
    ) -> Result<Self, HandoverError> {
        let sizes: Vec<_> = zones.iter().map(|zone| zone.size).collect();
        let layout = Layout::new(&sizes, phys_bits).map_err(ZoneError::from)?;
        if files.len() != zones.len() {
            return Err(HandoverError::Count { files: files.len(), zones: zones.len() });
        }
        if SharedMemory::pieces_of(&layout) != pieces {
            return Err(HandoverError::Pieces);
        }
        // What is there need not be allocated, and is not for this process to touch yet.
        let here = |zone: &ZoneConfig| ZoneConfig {
            options: ZoneOptions { prefault: false, ..zone.options },
            ..zone.clone()
        };
        let configs: Vec<_> = zones.iter().map(here).collect();
        let mut known = Vec::with_capacity(files.len());
        let mut backings = Vec::with_capacity(files.len());
        for (config, file) in configs.iter().zip(files) {
            let refused = |what| HandoverError::File { zone: config.id.clone(), what };
            let (file, id) = checked(config, File::from(file))?;
            if known.contains(&id) {
                return Err(refused("is the one of another zone"));
            }
            known.push(id);
            backings.push(Backing::of_file(config, file));
        }
        let mut regions = Vec::with_capacity(layout.ram.len());
        for piece in &layout.ram {
            if let Some(backing) = backings.get(piece.zone) {
                regions.push(backing.map(piece, piece.offset)?);
            }
        }
        let memory = Arc::new(GuestRam::from_regions(regions).map_err(ZoneError::from)?);
        Ok(Self::of(layout, zones.iter().map(Zone::from).collect(), memory))
    }

    /// Where memory of `zones` lies before there is any: the zone, the guest physical address and the bytes of each region.
    ///
    /// # Errors
    /// It cannot be laid out.
    pub fn places(zones: &[ZoneConfig], phys_bits: u8) -> Result<Vec<(String, u64, u64)>, ZoneError> {
        let sizes: Vec<_> = zones.iter().map(|zone| zone.size).collect();
        let layout = Layout::new(&sizes, phys_bits)?;
        let place = |piece: &crate::layout::Placement| {
            Some((zones.get(piece.zone)?.id.clone(), piece.range.start, piece.range.size))
        };
        Ok(layout.ram.iter().filter_map(place).collect())
    }
}

/// A file's device and inode.
type FileId = (u64, u64);

/// The file that the zone is mapped from, if `file` can be its, and which it is.
fn checked(config: &ZoneConfig, file: File) -> Result<(File, FileId), HandoverError> {
    let zone = || config.id.clone();
    let refused = |what| HandoverError::File { zone: zone(), what };
    let unknown = |source| HandoverError::Look { zone: zone(), source };
    if !config.shared {
        return Err(HandoverError::Private { zones: vec![zone()] });
    }
    let found = file.metadata().map_err(unknown)?;
    if !found.is_file() {
        return Err(refused("is not a file"));
    }
    if found.len() < config.size {
        return Err(refused("is too small"));
    }
    let id = (found.dev(), found.ino());
    let file = match &config.file {
        None => {
            is_memory_file(config, &file)
                .map_err(unknown)?
                .then_some(())
                .ok_or(refused("is no such memory file"))?;
            file
        }
        Some(path) if path.is_dir() => {
            let folder = path.metadata().map_err(unknown)?;
            if found.nlink() != 0 || folder.dev() != found.dev() {
                return Err(refused("is not a nameless one of the zone's directory"));
            }
            file
        }
        // What the path stands for here is for this process's owner to say.
        Some(path) => own_file(path, &found).map_err(unknown)?.ok_or(refused("is not the zone's"))?,
    };
    Ok((file, id))
}

/// Whether `file` is a memfd of the zone's kind of pages that can never become smaller: to touch what is gone is a signal.
fn is_memory_file(config: &ZoneConfig, file: &File) -> io::Result<bool> {
    let seals = match rustix::fs::fcntl_get_seals(file) {
        Ok(seals) => seals,
        // Other files than those of memory have none.
        Err(rustix::io::Errno::INVAL) => return Ok(false),
        Err(error) => return Err(error.into()),
    };
    let system = rustix::fs::fstatfs(file)?;
    let page = u64::try_from(system.f_bsize).unwrap_or(0);
    let pages = match config.huge_page {
        Some(size) => system.f_type == HUGETLBFS && page == size,
        None => system.f_type == TMPFS,
    };
    Ok(pages && seals.contains(SealFlags::SHRINK))
}

/// The file at `path`, if that is the one that was handed over.
fn own_file(path: &Path, handed: &Metadata) -> io::Result<Option<File>> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    let own = file.metadata()?;
    Ok((own.dev() == handed.dev() && own.ino() == handed.ino()).then_some(file))
}

/// RAM that cannot pass from one process to another.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HandoverError {
    /// Not all of it is there.
    #[error("guest memory is still being read from the snapshot that it was restored from")]
    Filling,
    /// Memory of one process alone.
    #[error("memory zone {} is private: only shared memory can be handed over (shared=on)", zones.join(", "))]
    Private {
        /// Ids of the zones.
        zones: Vec<String>,
    },
    /// More zones than descriptors can travel.
    #[error("{zones} memory zones, at most {MAX_FILES} can be handed over")]
    TooMany {
        /// How many there are.
        zones: usize,
    },
    /// Not a file for each zone.
    #[error("{files} files are handed over for {zones} memory zones")]
    Count {
        /// How many came.
        files: usize,
        /// How many are wanted.
        zones: usize,
    },
    /// The guest's memory lies elsewhere in the files, or in other pieces.
    #[error("the pieces of memory that are handed over are not those of its layout")]
    Pieces,
    /// A file that the zone cannot be in.
    #[error("the file handed over for memory zone {zone:?} {what}")]
    File {
        /// Id of the zone.
        zone: String,
        /// What is wrong with it.
        what: &'static str,
    },
    /// A file about which nothing can be learnt.
    #[error("cannot look at the file handed over for memory zone {zone:?}")]
    Look {
        /// Id of the zone.
        zone: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// No more descriptors.
    #[error("cannot duplicate a descriptor of guest memory")]
    Duplicate(#[source] io::Error),
    /// The host refuses.
    #[error("cannot map the memory that is handed over")]
    Map(#[from] ZoneError),
}
