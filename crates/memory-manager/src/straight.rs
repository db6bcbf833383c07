//! RAM that goes to a socket from where it lies, and comes from one to where it belongs.
//!
//! The guest may write to it all the while: nobody may take it for a slice of Rust's.

use std::io;
use std::ops::Range;

use rustix::fs::SealFlags;
use vm_memory::bitmap::{AtomicBitmap, BS};
use vm_memory::{GuestAddress, GuestMemoryBackend, VolatileSlice};
use vmm_device_model::dma::GuestRam;

use crate::source::GuestMemorySource;
use crate::sys::{self, Advice};

/// Guest memory, which may change at any time.
pub type GuestSlice<'a> = VolatileSlice<'a, BS<'a, AtomicBitmap>>;

impl GuestMemorySource {
    /// What of `range` (offsets in a region, whole pages) can be taken from where it lies; the rest of it is zero. To look at
    /// it makes no pages, and is no signal.
    ///
    /// `None`: it is to be [read](vmm_snapshot::directory::MemorySource::read). Of a file by name somebody can cut off what is mapped;
    /// shared huge pages do not tell which are there; and of what a mapping shows of a file under it nothing shall stay in memory.
    ///
    /// # Errors
    /// No such region, or the page tables cannot be asked.
    pub fn lying(&self, region: usize, range: Range<u64>) -> io::Result<Option<Vec<Range<u64>>>> {
        let at = self.region(region)?;
        match (&at.file, at.shared) {
            (None, false) => self.all_own(region, range).map(Some),
            (Some(file), true) if !at.huge => {
                let sealed = *at.sealed.get_or_init(|| {
                    let seals = rustix::fs::fcntl_get_seals(file.file());
                    seals.is_ok_and(|seals| seals.contains(SealFlags::SHRINK))
                });
                Ok(sealed.then(|| vec![range]))
            }
            _ => Ok(None),
        }
    }

    /// A part of a region.
    ///
    /// # Errors
    /// There is none.
    pub fn slice(&self, region: usize, range: &Range<u64>) -> io::Result<GuestSlice<'_>> {
        let gpa = self.gpa(region).and_then(|gpa| gpa.checked_add(range.start));
        let gpa = gpa.ok_or(io::ErrorKind::NotFound)?;
        slice(self.memory(), gpa, range.end.saturating_sub(range.start))
    }
}

/// `length` bytes of guest memory from `gpa` on, which are in one region.
///
/// # Errors
/// They are not.
pub fn slice(memory: &GuestRam, gpa: u64, length: u64) -> io::Result<GuestSlice<'_>> {
    let length = usize::try_from(length).map_err(io::Error::other)?;
    memory.get_slice(GuestAddress(gpa), length).map_err(io::Error::other)
}

/// Allocates the pages of a part of guest memory, in one go where the kernel can (Linux 5.14); elsewhere they are when they are
/// written. A host without space is an error here and a signal there.
///
/// # Errors
/// There is no memory.
pub fn prefault(slice: &GuestSlice<'_>) -> io::Result<()> {
    match sys::advise(slice.ptr_guard().as_ptr().addr(), slice.len(), Advice::Populate) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use vm_memory::Bytes;
    use vmm_hypervisor::fake::Fake;
    use vmm_hypervisor::{Hypervisor, VmOptions};

    use super::*;
    use crate::layout::PAGE_SIZE;
    use crate::map::MemoryMap;
    use crate::zone::{ZoneConfig, ZoneOptions};

    const SIZE: u64 = 8 << 20;

    fn map(shared: bool, file: Option<PathBuf>) -> MemoryMap {
        let vm = Fake::new().create_vm(&VmOptions { ioapic_pins: 24, tss_address: 0 }).unwrap();
        let options = ZoneOptions::default();
        let zone = ZoneConfig { id: "z".into(), size: SIZE, file, shared, huge_page: None, options };
        MemoryMap::create(vm, &[zone], 40).unwrap()
    }

    /// The only range of pages that the process has of its own.
    fn resident(map: &MemoryMap) -> u64 {
        let runs = map.source().unwrap().lying(0, 0..SIZE).unwrap().unwrap();
        runs.iter().map(|run| run.end - run.start).sum()
    }

    #[test]
    fn private_memory_lies_where_it_was_written_and_looking_makes_none() {
        let map = map(false, None);
        let at = [3 << 20, (3 << 20) + PAGE_SIZE, 5 << 20];
        for at in at {
            map.memory().write_obj(7_u8, GuestAddress(at)).unwrap();
        }
        let source = map.source().unwrap();
        let found = source.lying(0, 0..SIZE).unwrap().unwrap();
        assert!(at.iter().all(|at| found.iter().any(|run| run.contains(at))), "{found:?}");
        let before = resident(&map);
        assert!(before < SIZE / 2, "{found:?}");
        for run in &found {
            let slice = source.slice(0, run).unwrap();
            let mut bytes = vec![0_u8; slice.len()];
            assert_eq!(slice.copy_to(&mut bytes), bytes.len());
        }
        assert_eq!(resident(&map), before);
        assert!(source.slice(0, &(SIZE - PAGE_SIZE..SIZE + PAGE_SIZE)).is_err());
        assert!(source.slice(1, &(0..PAGE_SIZE)).is_err());
    }

    #[test]
    fn of_shared_memory_only_what_nobody_can_cut_off_is_touched() {
        let range = PAGE_SIZE..4 * PAGE_SIZE;
        let found = map(true, None).source().unwrap().lying(0, range.clone()).unwrap();
        assert_eq!(found, Some(vec![range.clone()]));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ram");
        std::fs::write(&path, vec![1; SIZE as usize]).unwrap();
        let named = map(true, Some(path.clone()));
        assert_eq!(named.source().unwrap().lying(0, range.clone()).unwrap(), None);
        let under = map(false, Some(path));
        assert_eq!(under.source().unwrap().lying(0, range).unwrap(), None);
    }

    #[test]
    fn what_is_allocated_ahead_is_there_and_nothing_beside_it() {
        let map = map(false, None);
        // The first 2 MiB have no huge pages.
        prefault(&slice(map.memory(), 16 * PAGE_SIZE, 8 * PAGE_SIZE).unwrap()).unwrap();
        let found = map.source().unwrap().lying(0, 0..SIZE).unwrap();
        let expected: Vec<_> = std::iter::once(16 * PAGE_SIZE..24 * PAGE_SIZE).collect();
        assert_eq!(found, Some(expected));
        assert_eq!(map.memory().read_obj::<u8>(GuestAddress(16 * PAGE_SIZE)).unwrap(), 0);
    }
}
