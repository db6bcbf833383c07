//! The RAM of one VM.
#![expect(unsafe_code, reason = "host memory is given to the guest")]

use std::path::PathBuf;
use std::sync::Arc;

use minicbor::{Decode, Encode};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};
use vmm_device_model::dma::{DmaMemory, GuestRam};
use vmm_hypervisor::{MemorySlot, Vm};
use vmm_snapshot::RecordError;

use crate::fill::{FillError, FillThreads};
use crate::layout::{Layout, Range};
use crate::zone::{Backing, ZoneConfig, ZoneError, check_host};

/// The RAM of one VM, in the hypervisor's slots. Dropped, it takes it from the guest again.
#[derive(Debug)]
pub struct MemoryMap {
    vm: Arc<dyn Vm>,
    layout: Layout,
    zones: Vec<Zone>,
    slots: Vec<MemorySlot>,
    memory: Arc<GuestRam>,
    dma: DmaMemory,
    /// Per region the snapshot's file that it is a private mapping of; empty where nothing was restored.
    files: Vec<Option<PathBuf>>,
    /// What is being filled while the guest runs.
    filling: Option<FillThreads>,
    /// Another process that maps it, too.
    shared_with: Option<String>,
}

/// RAM that no VM has yet: a migration fills it before there is a machine.
#[derive(Debug)]
pub struct HostMemory {
    layout: Layout,
    zones: Vec<Zone>,
    memory: Arc<GuestRam>,
}

/// What is kept of a zone's configuration.
#[derive(Debug, Clone)]
pub(crate) struct Zone {
    pub(crate) id: String,
    /// The kernel may replace a page by one that is equal, behind this process's back.
    pub(crate) mergeable: bool,
}

impl From<&ZoneConfig> for Zone {
    fn from(config: &ZoneConfig) -> Self {
        Self { id: config.id.clone(), mergeable: config.options.mergeable }
    }
}

impl HostMemory {
    /// Gets the memory of `zones` from the host. Files that zones name aside, it is zero.
    ///
    /// # Errors
    /// The host refuses; nothing is left mapped.
    pub fn create(zones: &[ZoneConfig], phys_bits: u8) -> Result<Self, ZoneError> {
        let sizes: Vec<_> = zones.iter().map(|zone| zone.size).collect();
        let layout = Layout::new(&sizes, phys_bits)?;
        check_host(layout.ram_size())?;
        let backings = zones.iter().map(Backing::open).collect::<Result<Vec<_>, _>>()?;
        let mut regions = Vec::with_capacity(layout.ram.len());
        for piece in &layout.ram {
            if let Some(backing) = backings.get(piece.zone) {
                regions.push(backing.map(piece, piece.offset)?);
            }
        }
        let memory = Arc::new(GuestRam::from_regions(regions)?);
        Ok(Self::of(layout, zones.iter().map(Zone::from).collect(), memory))
    }

    pub(crate) fn of(layout: Layout, zones: Vec<Zone>, memory: Arc<GuestRam>) -> Self {
        Self { layout, zones, memory }
    }

    /// The RAM itself.
    pub fn memory(&self) -> &Arc<GuestRam> {
        &self.memory
    }

    /// Where it lies: the zone, the guest physical address and the bytes of each region.
    pub fn regions(&self) -> impl Iterator<Item = (&str, u64, u64)> {
        let zone = |number: usize| self.zones.get(number).map_or("", |zone| &zone.id);
        self.layout.ram.iter().map(move |piece| (zone(piece.zone), piece.range.start, piece.range.size))
    }

    /// Gives it to the guest of `vm`.
    ///
    /// # Errors
    /// The hypervisor refuses.
    pub fn give_to(self, vm: Arc<dyn Vm>) -> Result<MemoryMap, ZoneError> {
        MemoryMap::assemble(vm, self.layout, self.zones, self.memory, Vec::new())
    }
}

/// A snapshot's file that guest memory is a mapping of.
///
/// An access to `addresses` that raises SIGBUS says that the file has shrunk, or cannot be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MappedFile {
    /// The file.
    pub path: PathBuf,
    /// Addresses in this process.
    pub addresses: std::ops::Range<usize>,
}

impl MemoryMap {
    /// Gets the memory of `zones` from the host and gives it to the guest.
    ///
    /// # Errors
    /// The host or the hypervisor refuses; nothing is left mapped.
    pub fn create(vm: Arc<dyn Vm>, zones: &[ZoneConfig], phys_bits: u8) -> Result<Self, ZoneError> {
        HostMemory::create(zones, phys_bits)?.give_to(vm)
    }

    /// Gives `memory`, a region per piece of `layout`, to the guest. `files` are the files of a snapshot that
    /// regions are mappings of.
    pub(crate) fn assemble(
        vm: Arc<dyn Vm>,
        layout: Layout,
        zones: Vec<Zone>,
        memory: Arc<GuestRam>,
        files: Vec<Option<PathBuf>>,
    ) -> Result<Self, ZoneError> {
        let dma = DmaMemory::from(Arc::clone(&memory));
        let mut map = Self {
            vm,
            layout,
            zones,
            slots: Vec::new(),
            memory,
            dma,
            files,
            filling: None,
            shared_with: None,
        };
        map.give_to_guest()?;
        Ok(map)
    }

    fn give_to_guest(&mut self) -> Result<(), ZoneError> {
        for (number, region) in (0..).zip(self.memory.iter()) {
            let slot = MemorySlot {
                slot: number,
                guest_address: region.start_addr().raw_value(),
                size: region.len(),
                host_address: region.as_ptr() as u64,
                read_only: false,
                log_dirty: false,
            };
            // SAFETY: `self.memory` keeps the region mapped, and drop removes the slot first. All access
            // to it in this process is by volatile copies.
            unsafe { self.vm.set_memory_slot(&slot) }?;
            self.slots.push(slot);
        }
        Ok(())
    }

    /// Where things lie.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The RAM itself.
    pub fn memory(&self) -> &Arc<GuestRam> {
        &self.memory
    }

    /// The handle that devices get.
    pub fn dma(&self) -> DmaMemory {
        self.dma.clone()
    }

    /// It is filled from now on.
    pub(crate) fn filled_by(&mut self, threads: FillThreads) {
        self.filling = Some(threads);
    }

    /// Whether some of it is still to be filled from the snapshot that it was restored from.
    pub fn is_filling(&self) -> bool {
        self.filling.as_ref().is_some_and(|threads| !threads.filling().is_over())
    }

    /// The guest is there, and may run: whatever could not be read until now is told here, and from now on to whom it
    /// concerns then.
    ///
    /// # Errors
    /// Memory that was to be filled cannot be; the guest is of no use.
    pub fn settle(&self) -> Result<(), FillError> {
        self.filling.as_ref().map_or(Ok(()), |threads| threads.filling().settle())
    }

    /// Whether somebody waits for memory that is still to be filled.
    pub fn is_awaited(&self) -> bool {
        self.filling.as_ref().is_some_and(|threads| threads.filling().is_awaited())
    }

    /// Nothing is filled any more: what is missing is zero from now on, also for who waits for it. Only for a guest that
    /// is over. vCPUs have been told to stop and run no further with it; no device is at work, which might carry zeroes to
    /// where they outlast the guest.
    pub fn abandon(&self) {
        if let Some(threads) = &self.filling {
            threads.filling().end();
        }
    }

    /// Another process has mapped this memory, on behalf of `who`: it writes into it as it likes, unseen by the page
    /// tables of this one.
    pub fn share_with(&mut self, who: &str) {
        self.shared_with = Some(who.to_owned());
    }

    /// On whose behalf another process has mapped it.
    pub fn shared_with(&self) -> Option<&str> {
        self.shared_with.as_deref()
    }

    /// The snapshot's files that RAM is a mapping of; for a handler of SIGBUS.
    pub fn mapped_files(&self) -> Vec<MappedFile> {
        let mapped = self.memory.iter().zip(&self.files).filter_map(|(region, path)| {
            let mapping = region.get_mmap();
            let start = mapping.as_ptr() as usize;
            Some(MappedFile { path: path.clone()?, addresses: start..start + mapping.size() })
        });
        mapped.collect()
    }

    /// RAM in bytes.
    pub fn size(&self) -> u64 {
        self.layout.ram_size()
    }

    /// Ids of the zones.
    pub(crate) fn zones(&self) -> &[Zone] {
        &self.zones
    }

    pub(crate) fn slots(&self) -> &[MemorySlot] {
        &self.slots
    }

    pub(crate) fn vm(&self) -> &dyn Vm {
        &*self.vm
    }

    /// Has the hypervisor log the pages that vCPUs write, or stop that. All slots or none.
    pub(crate) fn log_dirty(&mut self, log_dirty: bool) -> Result<(), ZoneError> {
        for (done, slot) in self.slots.iter().enumerate() {
            let changed = MemorySlot { log_dirty, ..*slot };
            // SAFETY: as in `give_to_guest`; only a flag changes.
            if let Err(error) = unsafe { self.vm.set_memory_slot(&changed) } {
                for slot in self.slots.iter().take(done) {
                    // SAFETY: as above. A refusal leaves a log that nobody reads: slow, not wrong.
                    let _ = unsafe { self.vm.set_memory_slot(slot) };
                }
                return Err(error.into());
            }
        }
        self.slots.iter_mut().for_each(|slot| slot.log_dirty = log_dirty);
        Ok(())
    }

    /// Where the RAM lies, as a record.
    pub fn save(&self) -> MemoryLayoutV1 {
        let piece = |p: &crate::layout::Placement| {
            Some(PieceV1 { zone: self.zones.get(p.zone)?.id.clone(), offset: p.offset, range: p.range })
        };
        MemoryLayoutV1 { ram: self.layout.ram.iter().filter_map(piece).collect(), mmio64: self.layout.mmio64 }
    }

    /// Checks that a saved layout is this VM's: it is never recomputed for a guest that has seen it.
    ///
    /// # Errors
    /// It is another.
    pub fn check(&self, saved: &MemoryLayoutV1) -> Result<(), RecordError> {
        if self.save() == *saved {
            return Ok(());
        }
        Err(RecordError::invalid::<MemoryLayoutV1>("the guest's memory was laid out differently"))
    }
}

impl Drop for MemoryMap {
    fn drop(&mut self) {
        for slot in &self.slots {
            if let Err(error) = self.vm.remove_memory_slot(slot) {
                // The mapping must not go while the guest may write it; leaking is the safe way out.
                log::error!("guest memory stays mapped: {error}");
                std::mem::forget(Arc::clone(&self.memory));
            }
        }
    }
}

/// Where a guest's RAM lies: named by zone and guest address, never by slot.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct MemoryLayoutV1 {
    /// Pieces of RAM, in order of address.
    #[n(0)]
    pub ram: Vec<PieceV1>,
    /// Window for 64-bit PCI BARs.
    #[n(1)]
    pub mmio64: Range,
}

/// A piece of a zone and where the guest sees it.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct PieceV1 {
    /// Id of the zone.
    #[n(0)]
    pub zone: String,
    /// Offset in the zone, in bytes.
    #[n(1)]
    pub offset: u64,
    /// Guest physical addresses.
    #[n(2)]
    pub range: Range,
}

vmm_snapshot::schema!(MemoryLayoutV1: "memory-layout" v1);
