//! Guest memory that is saved and restored, and what the kernel says about its mappings.
#![allow(dead_code, reason = "each test uses some of it")]

use std::num::NonZeroUsize;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm_hypervisor::fake::Fake;
use vmm_hypervisor::{Hypervisor, Vm, VmOptions};
use vmm_memory_manager::map::MemoryMap;
use vmm_memory_manager::restore::{Fill, RestoreError, Saved};
use vmm_memory_manager::zone::{ZoneConfig, ZoneOptions};
use vmm_snapshot::RecordSet;
use vmm_snapshot::directory::{Chain, Contents, Draft, HostStorage, Increment, MemorySource, Work};

pub(crate) const MIB: u64 = 1 << 20;
pub(crate) const PAGE: u64 = 4096;

pub(crate) fn zone(size: u64) -> ZoneConfig {
    let options = ZoneOptions::default();
    ZoneConfig { id: "mem0".to_owned(), size, file: None, shared: false, huge_page: None, options }
}

pub(crate) fn vm(fake: &Fake) -> Arc<dyn Vm> {
    fake.create_vm(&VmOptions { ioapic_pins: 24, tss_address: 0 }).unwrap()
}

pub(crate) fn create(zones: &[ZoneConfig]) -> MemoryMap {
    MemoryMap::create(vm(&Fake::new()), zones, 40).unwrap()
}

pub(crate) fn work() -> Work<'static> {
    Work::quiet(NonZeroUsize::new(2).unwrap())
}

pub(crate) fn write(map: &MemoryMap, gpa: u64, bytes: &[u8]) {
    map.memory().write_slice(bytes, GuestAddress(gpa)).unwrap();
}

/// All of guest memory, read through the mapping: every page is touched.
pub(crate) fn content(map: &MemoryMap) -> Vec<u8> {
    let mut all = Vec::new();
    for place in map.places() {
        let mut bytes = vec![0xee; usize::try_from(place.size).unwrap()];
        map.memory().read_slice(&mut bytes, GuestAddress(place.gpa)).unwrap();
        all.extend(bytes);
    }
    all
}

/// All of guest memory as a writer would read it: data, and zeroes elsewhere.
pub(crate) fn data(source: &dyn MemorySource) -> Vec<u8> {
    let mut all = Vec::new();
    for (region, place) in source.places().iter().enumerate() {
        let mut bytes = vec![0; usize::try_from(place.size).unwrap()];
        let mut at = 0;
        while let Some(data) = source.next_data(region, at).unwrap() {
            assert!(data.start >= at && data.end > data.start && data.end <= place.size, "{data:?}");
            let part = usize::try_from(data.start).unwrap()..usize::try_from(data.end).unwrap();
            source.read(region, data.start, &mut bytes[part]).unwrap();
            at = data.end;
        }
        all.extend(bytes);
    }
    all
}

pub(crate) fn save(map: &MemoryMap, path: &Path, increment: Option<&Increment<'_>>) {
    let draft = Draft::begin(&HostStorage, path).unwrap();
    let filled = draft.memory(&map.source().unwrap(), increment, &work()).unwrap();
    let config = serde_json::value::RawValue::from_string("{}".to_owned()).unwrap();
    let (created, state) = (SystemTime::UNIX_EPOCH, &RecordSet::new());
    filled.commit(&Contents { vmm: "0", architecture: "x86_64", created, config: &config, state }).unwrap();
}

/// Restores `zones`, laid out as `map` is.
pub(crate) fn restore(
    fake: &Fake,
    map: &MemoryMap,
    zones: &[ZoneConfig],
    path: &Path,
    fill: Fill,
) -> Result<MemoryMap, RestoreError> {
    let chain = Chain::open(path).unwrap();
    let saved = Saved { layout: &map.save(), chain: &chain, fill };
    MemoryMap::restore(vm(fake), zones, &saved, &work())
}

/// The mappings that a VM's memory consists of (proc_pid_maps(5)), by their paths. A neighbour that the kernel
/// joined with one is part of it.
pub(crate) fn mappings(map: &MemoryMap) -> Vec<String> {
    let regions: Vec<_> = map.memory().iter().map(|region| region.get_mmap()).collect();
    let within = |start: usize, end: usize| {
        regions.iter().any(|r| start < r.as_ptr() as usize + r.size() && end > r.as_ptr() as usize)
    };
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let ours = maps.lines().filter(|line| {
        let (start, end) = line.split_whitespace().next().unwrap().split_once('-').unwrap();
        let number = |text| usize::from_str_radix(text, 16).unwrap();
        within(number(start), number(end))
    });
    ours.map(|line| line.split_whitespace().nth(5).unwrap_or_default().to_owned()).collect()
}

/// Bytes of a VM's memory that this process's page tables show, the zero page and pages of files included.
pub(crate) fn resident(map: &MemoryMap) -> u64 {
    let pagemap = std::fs::File::open("/proc/self/pagemap").unwrap();
    let pages = map.memory().iter().map(|region| {
        let mapping = region.get_mmap();
        let mut entries = vec![0; mapping.size() / 4096 * 8];
        pagemap.read_exact_at(&mut entries, mapping.as_ptr() as u64 / PAGE * 8).unwrap();
        let present = |entry: &&[u8; 8]| u64::from_ne_bytes(**entry) >> 62 != 0;
        entries.as_chunks::<8>().0.iter().filter(present).count() as u64
    });
    pages.sum::<u64>() * PAGE
}

/// Bytes that the files behind a VM's memory take.
pub(crate) fn allocated(map: &MemoryMap) -> u64 {
    let blocks = |region: &vm_memory::GuestRegionMmap<_>| {
        region.get_mmap().file_offset().map_or(0, |file| file.file().metadata().unwrap().blocks())
    };
    map.memory().iter().map(blocks).sum::<u64>() * 512
}
