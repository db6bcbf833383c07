//! The RAM of a VM from a snapshot: as it was laid out, never laid out anew.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};
use vmm_device_model::dma::GuestRam;
use vmm_hypervisor::Vm;
use vmm_snapshot::RecordError;
use vmm_snapshot::directory::{Chain, MAX_REGIONS, Piece, Place, ReadError, Work};

use crate::fill::{Behind, FillError, FillThreads, Filling};
use crate::layout::{HIGH_RAM_START, HOLE_START, Layout, PAGE_SIZE, Placement};
use crate::map::{MemoryLayoutV1, MemoryMap, PieceV1, Zone};
use crate::sys::{self, Advice};
use crate::zone::{Backing, Region, ZoneConfig, ZoneError, check_host};

/// When memory that a snapshot holds is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fill {
    /// When the guest touches it, from a private mapping of the snapshot's file: sizes are checked, content is
    /// not. Zones that cannot be mapped so (shared, in huge pages, prefaulted) are filled as in `Eager`.
    Lazy,
    /// Before the guest runs, each chunk verified. Pages that are zero are not allocated, but for what comes with
    /// a huge page.
    Eager,
}

/// What RAM is restored from.
#[derive(Debug, Clone, Copy)]
pub struct Saved<'a> {
    /// Where RAM lay.
    pub layout: &'a MemoryLayoutV1,
    /// What was in it.
    pub chain: &'a Chain,
    /// When it is read.
    pub fill: Fill,
}

/// Guest physical addresses have at most 52 bits (Intel SDM volume 3, section 4.1.4).
const MAX_ADDRESS: u64 = 1 << 52;

impl MemoryMap {
    /// Gets the memory of `zones` from the host, puts what was saved into it, and gives it to the guest.
    ///
    /// Of a zone's configuration all but the content of its file counts: a shared file gets the saved content,
    /// a private zone is restored without its file.
    ///
    /// # Errors
    /// The snapshot is not of these zones, or damaged, or the host or the hypervisor refuses; nothing is left
    /// mapped. A zone's own shared file may have lost its content then.
    pub fn restore(
        vm: Arc<dyn Vm>,
        zones: &[ZoneConfig],
        saved: &Saved<'_>,
        work: &Work<'_>,
    ) -> Result<Self, RestoreError> {
        Self::restore_with(vm, zones, saved, work, None)
    }

    /// As [`restore`](Self::restore); shared memory, which cannot be a mapping of a snapshot, is filled by threads while the
    /// guest runs, where `Fill::Lazy` is wanted and this host can: not huge pages, which nothing reserves, and not a file that
    /// has a name, which other processes may map. Nobody may give this memory to another process before it is
    /// [filled](Self::is_filling).
    ///
    /// # Errors
    /// As `restore`.
    pub fn restore_behind(
        vm: Arc<dyn Vm>,
        zones: &[ZoneConfig],
        saved: &Saved<'_>,
        work: &Work<'_>,
        behind: &Behind<'_>,
    ) -> Result<Self, RestoreError> {
        Self::restore_with(vm, zones, saved, work, Some(behind))
    }

    fn restore_with(
        vm: Arc<dyn Vm>,
        zones: &[ZoneConfig],
        saved: &Saved<'_>,
        work: &Work<'_>,
        behind: Option<&Behind<'_>>,
    ) -> Result<Self, RestoreError> {
        let layout = layout_of(saved.layout, zones)?;
        let places = saved.layout.ram.iter().map(place_of);
        if !saved.chain.regions().iter().map(vmm_snapshot::directory::Region::place).eq(places) {
            return Err(RestoreError::OtherMemory);
        }
        check_host(layout.ram_size())?;
        let zones: Vec<_> = zones.iter().map(restored).collect();
        let lazy: Vec<_> = zones.iter().map(|zone| is_lazy(zone, saved.fill)).collect();
        let (regions, files) = map_all(&layout, &zones, &lazy, saved.chain)?;
        let memory = Arc::new(GuestRam::from_regions(regions).map_err(ZoneError::from)?);
        let later = |piece: &Placement| zones.get(piece.zone).is_some_and(|zone| can_wait(zone, saved.fill));
        let later: Vec<_> = layout.ram.iter().map(later).collect();
        let filling = behind.filter(|_| later.contains(&true)).and_then(|behind| {
            let prepared = Filling::new(Arc::clone(&memory), &later, behind);
            prepared.inspect_err(FillError::log).ok()
        });
        let now = |region: usize| filling.is_none() || later.get(region) != Some(&true);
        let unmapped = files.iter().enumerate().any(|(region, file)| file.is_none() && now(region));
        if saved.fill == Fill::Lazy && unmapped {
            log::info!("memory that is shared or in huge pages is filled before the guest runs");
        }
        fill(&memory, &files, &now, saved.chain, work)?;
        let threads = filling.zip(behind).map(|(filling, behind)| FillThreads::start(filling, behind));
        let zones = zones.iter().map(Zone::from).collect();
        let mut map = Self::assemble(vm, layout, zones, memory, files)?;
        if let Some(threads) = threads {
            map.filled_by(threads?);
        }
        Ok(map)
    }
}

/// Mapped files of a snapshot, a place for each region.
type Files = Vec<Option<PathBuf>>;

fn place_of(piece: &PieceV1) -> Place {
    Place { zone: piece.zone.clone(), gpa: piece.range.start, size: piece.range.size }
}

/// The saved layout, whose pieces are checked to be all of `zones` and where RAM can be.
fn layout_of(saved: &MemoryLayoutV1, zones: &[ZoneConfig]) -> Result<Layout, RestoreError> {
    let invalid = |what: String| RestoreError::Layout(RecordError::invalid::<MemoryLayoutV1>(what));
    if saved.ram.len() > MAX_REGIONS {
        return Err(invalid(format!(
            "{} pieces of RAM, at most {MAX_REGIONS} are possible",
            saved.ram.len()
        )));
    }
    let mut placed = vec![0_u64; zones.len()];
    let mut free = 0;
    let mut ram = Vec::with_capacity(saved.ram.len());
    for PieceV1 { zone: id, offset, range } in &saved.ram {
        let zone = zones.iter().position(|zone| zone.id == *id);
        let zone = zone.ok_or_else(|| RestoreError::Zone { zone: id.clone(), what: "is not configured" })?;
        let whole = [range.start, range.size].iter().all(|n| n.is_multiple_of(PAGE_SIZE)) && range.size > 0;
        let in_hole = range.start < HIGH_RAM_START && range.end() > HOLE_START;
        if !whole || range.start < free || range.end() > MAX_ADDRESS || in_hole {
            let what = format!("{:#x} bytes of RAM cannot be at {:#x}", range.size, range.start);
            return Err(invalid(what));
        }
        free = range.end();
        // A zone's pieces follow each other in it as they do in memory.
        match placed.get_mut(zone) {
            Some(placed) if *placed == *offset => *placed += range.size,
            _ => return Err(invalid(format!("zone {id:?} has no piece at {offset:#x} here"))),
        }
        ram.push(Placement { zone, offset: *offset, range: *range });
    }
    if let Some((zone, _)) = zones.iter().zip(&placed).find(|(zone, placed)| zone.size != **placed) {
        return Err(RestoreError::Zone { zone: zone.id.clone(), what: "was saved with another size" });
    }
    let window = saved.mmio64;
    if window.size == 0 || window.start < free.max(HIGH_RAM_START) || window.end() > MAX_ADDRESS {
        let what = format!("{:#x} bytes of 64-bit window cannot be at {:#x}", window.size, window.start);
        return Err(invalid(what));
    }
    Ok(Layout { ram, mmio64: window })
}

/// A zone as it is restored: the snapshot replaces the content of a private zone's file.
fn restored(zone: &ZoneConfig) -> ZoneConfig {
    let file = zone.file.clone().filter(|_| zone.shared || zone.huge_page.is_some());
    ZoneConfig { file, ..zone.clone() }
}

fn is_lazy(zone: &ZoneConfig, fill: Fill) -> bool {
    fill == Fill::Lazy && !zone.shared && zone.huge_page.is_none() && !zone.options.prefault
}

/// Whether a zone can be filled while the guest runs.
fn can_wait(zone: &ZoneConfig, fill: Fill) -> bool {
    let is_named = zone.file.as_ref().is_some_and(|path| !path.is_dir());
    fill == Fill::Lazy && zone.shared && zone.huge_page.is_none() && !zone.options.prefault && !is_named
}

fn map_all(
    layout: &Layout,
    zones: &[ZoneConfig],
    lazy: &[bool],
    chain: &Chain,
) -> Result<(Vec<Region>, Files), RestoreError> {
    let eager = |(zone, lazy): (_, &bool)| (!lazy).then(|| Backing::open_empty(zone)).transpose();
    let backings = zones.iter().zip(lazy).map(eager).collect::<Result<Vec<_>, _>>()?;
    let (mut regions, mut files) = (Vec::new(), Vec::new());
    for (number, piece) in layout.ram.iter().enumerate() {
        let (Some(zone), Some(backing)) = (zones.get(piece.zone), backings.get(piece.zone)) else { continue };
        let (backing, at, path) = match backing {
            Some(backing) => (backing, piece.offset, None),
            None => {
                let (file, path) = snapshot_file(chain, number, piece)?;
                (&Backing::of_file(zone, file), 0, Some(path))
            }
        };
        regions.push(backing.map(piece, at)?);
        files.push(path);
    }
    Ok((regions, files))
}

/// The file of the base for a region, and whether it is still as long as it was when it was opened.
fn snapshot_file(
    chain: &Chain,
    number: usize,
    piece: &Placement,
) -> Result<(std::fs::File, PathBuf), RestoreError> {
    let base = chain.base();
    let (Some(region), Some(file)) = (base.manifest().memory.get(number), base.memory(number)) else {
        return Err(RestoreError::OtherMemory);
    };
    let path = base.path().join(&region.file);
    let failed = |source| ReadError::Io { path: path.clone(), source };
    let found = file.metadata().map_err(failed)?.len();
    if found != piece.range.size {
        return Err(ReadError::Size { path, found, expected: piece.range.size }.into());
    }
    Ok((file.try_clone().map_err(failed)?, path))
}

/// Puts in what the mappings of `files` do not show, where it is to be there `now`.
fn fill(
    memory: &GuestRam,
    files: &Files,
    now: &(dyn Fn(usize) -> bool + Sync),
    chain: &Chain,
    work: &Work<'_>,
) -> Result<(), RestoreError> {
    let is_mapped = |region: usize| files.get(region).is_some_and(Option::is_some);
    let is_wanted = |region: usize| !is_mapped(region) && now(region);
    let gpa = |piece: &Piece<'_>| {
        let region = chain.regions().get(piece.region);
        region.map(|region| region.gpa + piece.offset).ok_or(io::ErrorKind::NotFound)
    };
    // What has nothing to do does not start threads for it.
    if chain.depth() > 1 && (0..files.len()).any(is_mapped) {
        let put = |piece: Piece<'_>| put(memory, gpa(&piece)?, piece.bytes);
        chain.load_overlay_of(&is_mapped, work, &put)?;
    }
    if (0..files.len()).any(is_wanted) {
        let put_used = |piece: Piece<'_>| put_used(memory, gpa(&piece)?, piece.bytes);
        chain.load_of(&is_wanted, work, &put_used)?;
    }
    Ok(())
}

/// Writes the pages of `bytes` that are not zero, neighbours together.
fn put_used(memory: &GuestRam, gpa: u64, bytes: &[u8]) -> io::Result<()> {
    static ZERO: [u8; PAGE_SIZE as usize] = [0; PAGE_SIZE as usize];
    let mut run = 0..0;
    for page in bytes.chunks(ZERO.len()) {
        if *page == ZERO {
            put(memory, gpa + run.start as u64, bytes.get(run.clone()).unwrap_or_default())?;
            run.start = run.end + page.len();
        }
        run.end += page.len();
    }
    put(memory, gpa + run.start as u64, bytes.get(run).unwrap_or_default())
}

/// Writes `bytes`, whole pages, at `gpa`.
fn put(memory: &GuestRam, gpa: u64, bytes: &[u8]) -> io::Result<()> {
    if bytes.is_empty() {
        return Ok(());
    }
    let address = GuestAddress(gpa);
    let host = vm_memory::GuestMemoryBackend::get_host_address(memory, address).map_err(io::Error::other)?;
    // A host without space, or a mapped file that has shrunk, is an error here and a signal below.
    match sys::advise(host as usize, bytes.len(), Advice::Populate) {
        // A kernel that cannot (before 5.14).
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
        other => other?,
    }
    memory.write_slice(bytes, address).map_err(io::Error::other)
}

/// RAM that cannot be restored.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RestoreError {
    /// The saved layout cannot be one.
    #[error("cannot lay guest memory out as it was")]
    Layout(#[source] RecordError),
    /// A zone is not as it was.
    #[error("memory zone {zone:?} {what}")]
    Zone {
        /// Id of the zone.
        zone: String,
        /// What is wrong with it.
        what: &'static str,
    },
    /// The snapshot's memory and its saved layout are not of one VM.
    #[error("the snapshot's memory files are not those of its memory layout")]
    OtherMemory,
    /// The snapshot cannot be read.
    #[error("cannot read guest memory from the snapshot")]
    Read(#[from] ReadError),
    /// There are no threads that fill it.
    #[error("cannot start a thread that fills guest memory")]
    Threads(#[source] io::Error),
    /// The host or the hypervisor refuses.
    #[error("cannot get guest memory")]
    Memory(#[from] ZoneError),
}

#[cfg(test)]
mod tests {
    use vm_memory::mmap::MmapRegionBuilder;
    use vm_memory::{FileOffset, GuestRegionMmap};

    use super::*;

    #[test]
    fn a_file_that_shrinks_under_a_restore_is_an_error_and_no_signal() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4 * PAGE_SIZE).unwrap();
        let mapping = MmapRegionBuilder::new(usize::try_from(4 * PAGE_SIZE).unwrap())
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_PRIVATE)
            .with_file_offset(FileOffset::new(file.try_clone().unwrap(), 0))
            .build()
            .unwrap();
        let memory =
            GuestRam::from_regions(vec![GuestRegionMmap::new(mapping, GuestAddress(0)).unwrap()]).unwrap();
        put(&memory, PAGE_SIZE, &[1; PAGE_SIZE as usize]).unwrap();
        file.set_len(PAGE_SIZE).unwrap();
        assert_eq!(
            put(&memory, 2 * PAGE_SIZE, &[1; PAGE_SIZE as usize]).unwrap_err().raw_os_error(),
            Some(14)
        );
        put(&memory, 4 * PAGE_SIZE, &[1]).unwrap_err();
    }
}
