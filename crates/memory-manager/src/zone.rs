//! RAM as the host backs it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, SealFlags};
use vm_memory::bitmap::{AtomicBitmap, NewBitmap};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestAddress, GuestRegionMmap};

use crate::layout::{LayoutError, PAGE_SIZE, Placement};
use crate::sys::{self, Advice};

/// How one zone of guest RAM is backed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ZoneConfig {
    /// Id, unique in the VM.
    pub id: String,
    /// Bytes.
    pub size: u64,
    /// A file to map instead of memory of this process's own; a directory (hugetlbfs, tmpfs) gets a
    /// nameless file.
    pub file: Option<PathBuf>,
    /// Writes reach the backing, which other processes can map.
    pub shared: bool,
    /// Huge pages of this size in bytes (hugetlbfs), a power of two.
    pub huge_page: Option<u64>,
    /// What else the host does with the memory.
    pub options: ZoneOptions,
}

/// What else the host does with the memory of a zone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ZoneOptions {
    /// Equal pages may be shared (KSM).
    pub mergeable: bool,
    /// All of it is allocated before the guest runs.
    pub prefault: bool,
    /// Transparent huge pages may be used.
    pub thp: bool,
    /// Swap space is reserved, so that running out shows now and not under the guest.
    pub reserve: bool,
}

/// The first 2 MiB hold boot data and little else; one huge page for them would cost the zeroing of 2 MiB
/// before the first instruction.
const THP_FREE_LOW: usize = 2 << 20;

/// Whether this host has `wanted` bytes of RAM and swap; where it does not tell, it is taken to have them.
///
/// # Errors
/// It has not.
pub fn check_host(wanted: u64) -> Result<(), ZoneError> {
    match sys::host_memory() {
        Ok(host) if wanted > host => Err(ZoneError::HostTooSmall { wanted, host }),
        _ => Ok(()),
    }
}

impl ZoneConfig {
    /// The file that this zone would show instead of zeroes: one that it names and that holds something, be it another guest's memory.
    pub fn filled_file(&self) -> Option<&Path> {
        let path = self.file.as_deref()?;
        // What cannot be looked at cannot be opened either.
        let holds_something = path.metadata().is_ok_and(|meta| meta.is_file() && meta.blocks() != 0);
        holds_something.then_some(path)
    }
}

/// Memory as it is mapped.
pub(crate) type Region = GuestRegionMmap<AtomicBitmap>;

/// A zone's open backing.
#[derive(Debug)]
pub(crate) struct Backing<'a> {
    config: &'a ZoneConfig,
    file: Option<File>,
}

impl<'a> Backing<'a> {
    pub(crate) fn open(config: &'a ZoneConfig) -> Result<Self, ZoneError> {
        let failed = |what| move |source| ZoneError::Backing { zone: config.id.clone(), what, source };
        if let Some(size) = config.huge_page.filter(|size| !size.is_power_of_two() || *size < PAGE_SIZE) {
            return Err(ZoneError::HugePage { zone: config.id.clone(), size });
        }
        let file = match &config.file {
            Some(path) if path.is_dir() => {
                Some(nameless_file(path).map_err(failed("create a file in the directory of"))?)
            }
            Some(path) => Some(
                OpenOptions::new().read(true).write(true).open(path).map_err(failed("open the file of"))?,
            ),
            None if config.shared || config.huge_page.is_some() => {
                Some(sys::memfd(&config.id, config.huge_page).map_err(failed("create a memory file for"))?)
            }
            None => None,
        };
        if let Some(file) = &file {
            let meta = file.metadata().map_err(failed("look at the file of"))?;
            // A file that is there may be larger, never smaller: reading past its end kills the process.
            if meta.len() < config.size {
                file.set_len(config.size).map_err(failed("size the file of"))?;
            }
            if config.file.is_none() {
                // Whoever gets it must not fear to lose what it maps.
                let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
                rustix::fs::fcntl_add_seals(file, seals)
                    .map_err(|error| failed("seal the file of")(error.into()))?;
            }
        }
        Ok(Self { config, file })
    }

    /// As [`open`](Self::open), of all zeroes, whatever is in the zone's file.
    pub(crate) fn open_empty(config: &'a ZoneConfig) -> Result<Self, ZoneError> {
        let backing = Self::open(config)?;
        let named = config.file.as_ref().is_some_and(|path| !path.is_dir());
        if let Some(file) = backing.file.as_ref().filter(|_| named) {
            let failed = |source| {
                let what = "clear the file of";
                ZoneError::Backing { zone: config.id.clone(), what, source }
            };
            if config.shared {
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                rustix::fs::fallocate(file, flags, 0, config.size).map_err(|error| failed(error.into()))?;
            } else if file.metadata().map_err(failed)?.blocks() != 0 {
                // Not ours to clear, and in the way.
                return Err(failed(io::ErrorKind::AlreadyExists.into()));
            }
        }
        Ok(backing)
    }

    /// A zone whose pieces are in files of their own; this is one.
    pub(crate) fn of_file(config: &'a ZoneConfig, file: File) -> Self {
        Self { config, file: Some(file) }
    }

    /// Maps a piece of the zone that begins at `offset` of its file.
    pub(crate) fn map(&self, piece: &Placement, offset: u64) -> Result<Region, ZoneError> {
        let config = self.config;
        let failed = |what| move |source| ZoneError::Backing { zone: config.id.clone(), what, source };
        let size = usize::try_from(piece.range.size)
            .map_err(|_| LayoutError::Size { zone: piece.zone, size: piece.range.size })?;
        let mut flags = if config.shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
        if !config.options.reserve {
            flags |= libc::MAP_NORESERVE;
        }
        if self.file.is_none() {
            flags |= libc::MAP_ANONYMOUS;
        }
        let mut builder = MmapRegionBuilder::new_with_bitmap(size, AtomicBitmap::with_len(size))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(flags)
            .with_hugetlbfs(config.huge_page.is_some());
        if let Some(file) = &self.file {
            let file = file.try_clone().map_err(failed("duplicate the file of"))?;
            builder = builder.with_file_offset(FileOffset::new(file, offset));
        }
        let mapping = builder.build().map_err(|e| failed("map")(io::Error::other(e)))?;
        // What is private and in a file, yet not the zone's, is a snapshot's: its pages come one by one.
        let thp = config.huge_page.is_none() && config.file.is_none();
        let thp = thp && (self.file.is_none() || config.shared);
        advise(mapping.as_ptr() as usize, size, piece, config, thp).map_err(failed("set the options of"))?;
        GuestRegionMmap::new(mapping, GuestAddress(piece.range.start))
            .ok_or(ZoneError::Layout(LayoutError::TooLarge { phys_bits: 64 }))
    }
}

fn nameless_file(directory: &Path) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    match OpenOptions::new().read(true).write(true).custom_flags(libc::O_TMPFILE).open(directory) {
        // hugetlbfs got O_TMPFILE late; a file unlinked at once serves as well.
        Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => {
            let path = directory.join(format!(".vmm-memory-{}", std::process::id()));
            let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path)?;
            std::fs::remove_file(&path)?;
            Ok(file)
        }
        other => other,
    }
}

fn advise(start: usize, len: usize, piece: &Placement, config: &ZoneConfig, thp: bool) -> io::Result<()> {
    // Guest memory in a core dump helps nobody and leaks the guest.
    sys::advise(start, len, Advice::DontDump)?;
    if config.options.mergeable {
        sys::advise(start, len, Advice::Mergeable)?;
    }
    if thp {
        let low = if piece.range.start == 0 { THP_FREE_LOW.min(len) } else { 0 };
        let wanted = if config.options.thp { Advice::HugePage } else { Advice::NoHugePage };
        // EINVAL: a kernel without transparent huge pages; then there are none, as good as asked.
        let _ = sys::advise(start, low, Advice::NoHugePage);
        let _ = sys::advise(start + low, len - low, wanted);
    }
    if config.options.prefault {
        prefault(start, len)?;
    }
    Ok(())
}

/// Bytes that one thread populates; below it more threads do not pay.
const PREFAULT_CHUNK: usize = 256 << 20;

/// Allocates all pages, on as many threads as the host has CPUs.
fn prefault(start: usize, len: usize) -> io::Result<()> {
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let chunk = len.div_ceil(cpus).next_multiple_of(2 << 20).max(PREFAULT_CHUNK);
    std::thread::scope(|scope| {
        let populate = |at| {
            let size = chunk.min(len - at);
            let work = move || sys::advise(start + at, size, Advice::Populate);
            std::thread::Builder::new().name("prefault".to_owned()).spawn_scoped(scope, work)
        };
        let threads = (0..len).step_by(chunk).map(populate).collect::<io::Result<Vec<_>>>()?;
        threads
            .into_iter()
            .try_for_each(|thread| thread.join().unwrap_or_else(|_| Err(io::Error::other("prefault thread"))))
    })
}

/// RAM that cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ZoneError {
    /// Sizes that cannot be laid out.
    #[error("cannot lay guest memory out")]
    Layout(#[from] LayoutError),
    /// More than the host has.
    #[error("guest memory of {wanted} bytes is more than this host's {host} bytes of RAM and swap")]
    HostTooSmall {
        /// Bytes asked for.
        wanted: u64,
        /// Bytes of RAM and swap.
        host: u64,
    },
    /// No size of a page.
    #[error("memory zone {zone:?} cannot have huge pages of {size} bytes")]
    HugePage {
        /// Id of the zone.
        zone: String,
        /// Bytes asked for.
        size: u64,
    },
    /// The host refused.
    #[error("cannot {what} memory zone {zone:?}")]
    Backing {
        /// Id of the zone.
        zone: String,
        /// What was attempted.
        what: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The hypervisor refused.
    #[error("cannot give memory to the guest")]
    Slot(#[from] vmm_hypervisor::HypervisorError),
    /// Regions that cannot be one guest's memory.
    #[error("cannot assemble guest memory")]
    Collection(#[from] vm_memory::GuestRegionCollectionError),
}
