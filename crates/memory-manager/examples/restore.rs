//! What it costs to look at guest memory, to save it, and to restore it; on the fake hypervisor.
//!
//! `cargo run --release -p vmm-memory-manager --example restore [DIR]` writes 256 MiB into DIR, or into a
//! temporary directory.

use std::error::Error;
use std::num::NonZeroUsize;
use std::path::Path;
use std::time::{Instant, SystemTime};

use vm_memory::{Bytes, GuestAddress};
use vmm_hypervisor::fake::Fake;
use vmm_hypervisor::{Hypervisor, VmOptions};
use vmm_memory_manager::map::MemoryMap;
use vmm_memory_manager::restore::{Fill, Saved};
use vmm_memory_manager::zone::{ZoneConfig, ZoneOptions};
use vmm_snapshot::RecordSet;
use vmm_snapshot::directory::{Chain, Contents, Draft, HostStorage, MemorySource, Work};

const MIB: u64 = 1 << 20;

fn main() -> Result<(), Box<dyn Error>> {
    let temporary = tempfile::tempdir()?;
    let dir = std::env::args().nth(1).map_or(temporary.path().to_owned(), Into::into);
    let dir = dir.join("example-snapshot");

    for shared in [false, true] {
        for size in [512 * MIB, 4096 * MIB] {
            let map = create(size, shared)?;
            let source = map.source()?;
            let what =
                format!("scan {} MiB, empty, {}", size / MIB, if shared { "shared" } else { "private" });
            timed(&what, || runs(&source))?;
        }
    }

    // 256 of 512 MiB, and every other page of 64 MiB more.
    let map = create(512 * MIB, false)?;
    let page = [0x5a_u8; 4096];
    for gpa in (0..256 * MIB).step_by(4096).chain((300 * MIB..364 * MIB).step_by(8192)) {
        map.memory().write_slice(&page, GuestAddress(gpa))?;
    }
    let source = map.source()?;
    let found = timed("scan 512 MiB, 288 MiB in use, 32 MiB of it in single pages", || runs(&source))?;
    println!("  {found} runs");
    timed("read it", || read(&source))?;
    timed("save it (writes, hashes, syncs)", || save(&source, &dir))?;

    let chain = timed("open the snapshot", || Ok(Chain::open(&dir)?))?;
    let layout = map.save();
    for fill in [Fill::Lazy, Fill::Eager] {
        let vm = Fake::new().create_vm(&VmOptions { ioapic_pins: 24, tss_address: 0 })?;
        let saved = Saved { layout: &layout, chain: &chain, fill };
        let zones = [zone(512 * MIB, false)];
        let restored =
            timed(&format!("restore it, {fill:?}"), || Ok(MemoryMap::restore(vm, &zones, &saved, &work())?))?;
        let source = restored.source()?;
        timed("  scan what was restored", || runs(&source))?;
        if fill == Fill::Lazy {
            timed("  ask what changed, nothing", || Ok(restored.changed_since_restore()?))?;
        }
        timed("  unmap it", || {
            drop((source, restored));
            Ok(())
        })?;
    }
    std::fs::remove_dir_all(dir)?;
    Ok(())
}

fn timed<T>(what: &str, act: impl FnOnce() -> Result<T, Box<dyn Error>>) -> Result<T, Box<dyn Error>> {
    let start = Instant::now();
    let result = act()?;
    println!("{:>10.3} ms  {what}", start.elapsed().as_secs_f64() * 1e3);
    Ok(result)
}

fn zone(size: u64, shared: bool) -> ZoneConfig {
    let options = ZoneOptions::default();
    ZoneConfig { id: "mem0".to_owned(), size, file: None, shared, huge_page: None, options }
}

fn create(size: u64, shared: bool) -> Result<MemoryMap, Box<dyn Error>> {
    let vm = Fake::new().create_vm(&VmOptions { ioapic_pins: 24, tss_address: 0 })?;
    Ok(MemoryMap::create(vm, &[zone(size, shared)], 40)?)
}

fn work() -> Work<'static> {
    Work::quiet(std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN))
}

/// Number of runs of data.
fn runs(source: &dyn MemorySource) -> Result<u64, Box<dyn Error>> {
    let mut runs = 0;
    for region in 0..source.places().len() {
        let mut at = 0;
        while let Some(data) = source.next_data(region, at)? {
            at = data.end;
            runs += 1;
        }
    }
    Ok(runs)
}

/// Reads all data, a chunk at most at a time.
fn read(source: &dyn MemorySource) -> Result<(), Box<dyn Error>> {
    let mut chunk = vec![0; 2 << 20];
    for region in 0..source.places().len() {
        let mut at = 0;
        while let Some(data) = source.next_data(region, at)? {
            at = data.end.min(data.start + chunk.len() as u64);
            let bytes = chunk.get_mut(..usize::try_from(at - data.start)?).unwrap_or_default();
            source.read(region, data.start, bytes)?;
        }
    }
    Ok(())
}

fn save(source: &dyn MemorySource, dir: &Path) -> Result<(), Box<dyn Error>> {
    let filled = Draft::begin(&HostStorage, dir)?.memory(source, None, &work())?;
    let config = serde_json::value::RawValue::from_string("{}".to_owned())?;
    let created = SystemTime::now();
    let state = &RecordSet::new();
    filled.commit(&Contents { vmm: "0", architecture: "x86_64", created, config: &config, state })?;
    Ok(())
}
