//! Guest memory written to a snapshot and restored from it.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests fail by panicking")]

use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use vm_memory::{Bytes, GuestAddress};
use vmm_hypervisor::fake::Fake;
use vmm_hypervisor::{Hypervisor, Vm, VmOptions};
use vmm_memory_manager::map::MemoryMap;
use vmm_memory_manager::restore::{Fill, RestoreError, Saved};
use vmm_memory_manager::zone::{ZoneConfig, ZoneOptions};
use vmm_snapshot::RecordSet;
use vmm_snapshot::directory::{Chain, Contents, Draft, HostStorage, Increment, MemorySource, Work};

const MIB: u64 = 1 << 20;

fn zone(size: u64) -> ZoneConfig {
    let options = ZoneOptions::default();
    ZoneConfig { id: "mem0".to_owned(), size, file: None, shared: false, huge_page: None, options }
}

fn vm(fake: &Fake) -> Arc<dyn Vm> {
    fake.create_vm(&VmOptions { ioapic_pins: 24, tss_address: 0 }).unwrap()
}

fn work() -> Work<'static> {
    Work::quiet(NonZeroUsize::new(2).unwrap())
}

fn write(map: &MemoryMap, gpa: u64, bytes: &[u8]) {
    map.memory().write_slice(bytes, GuestAddress(gpa)).unwrap();
}

/// All of guest memory as one vector, read through a source, which makes no page.
fn content(map: &MemoryMap) -> Vec<u8> {
    let source = map.source().unwrap();
    let mut all = Vec::new();
    for (region, place) in source.places().iter().enumerate() {
        let mut bytes = vec![0xee; usize::try_from(place.size).unwrap()];
        source.read(region, 0, &mut bytes).unwrap();
        all.extend(bytes);
    }
    all
}

fn save(map: &MemoryMap, path: &Path, increment: Option<&Increment<'_>>) {
    let draft = Draft::begin(&HostStorage, path).unwrap();
    let filled = draft.memory(&map.source().unwrap(), increment, &work()).unwrap();
    let config = serde_json::value::RawValue::from_string("{}".to_owned()).unwrap();
    let state = RecordSet::new();
    let created = SystemTime::UNIX_EPOCH;
    let contents = Contents { vmm: "0", architecture: "x86_64", created, config: &config, state: &state };
    filled.commit(&contents).unwrap();
}

fn restore(
    fake: &Fake,
    map: &MemoryMap,
    zones: &[ZoneConfig],
    path: &Path,
    fill: Fill,
) -> Result<MemoryMap, RestoreError> {
    let chain = Chain::open(path).unwrap();
    let layout = map.save();
    MemoryMap::restore(vm(fake), zones, &Saved { layout: &layout, chain: &chain, fill }, &work())
}

#[test]
fn memory_comes_back_mapped_or_copied() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::new();
    let zones = [zone(8 * MIB)];
    let map = MemoryMap::create(vm(&fake), &zones, 40).unwrap();
    write(&map, 5 * MIB + 5, b"content");
    save(&map, &dir.path().join("a"), None);
    let expected = content(&map);
    for fill in [Fill::Lazy, Fill::Eager] {
        let back = restore(&fake, &map, &zones, &dir.path().join("a"), fill).unwrap();
        assert!(content(&back) == expected);
    }
}
