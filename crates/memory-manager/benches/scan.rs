//! How fast memory that is there and zero is found to be so, as a migration does it, beside a loop that reads as much.
//!
//! `cargo bench -p vmm-memory-manager --bench scan`. One JSON object: medians over interleaved rounds.
#![expect(unsafe_code, reason = "the floor reads guest memory as a slice, for there is no guest")]

use std::error::Error;
use std::hint::black_box;
use std::time::Instant;

use vm_memory::GuestMemoryBackend;
use vmm_hypervisor::fake::Fake;
use vmm_hypervisor::{Hypervisor, VmOptions};
use vmm_memory_manager::map::MemoryMap;
use vmm_memory_manager::straight::each_page;
use vmm_memory_manager::zone::{ZoneConfig, ZoneOptions};

const SIZE: u64 = 1 << 30;
const PORTION: u64 = 256 << 10;
const PAGE: usize = 4096;
const ROUNDS: usize = 21;

fn main() -> Result<(), Box<dyn Error>> {
    let vm = Fake::new().create_vm(&VmOptions { ioapic_pins: 24, tss_address: 0 })?;
    let options = ZoneOptions { prefault: true, ..ZoneOptions::default() };
    let zone = ZoneConfig { id: "z".into(), size: SIZE, file: None, shared: false, huge_page: None, options };
    let map = MemoryMap::create(vm, &[zone], 40)?;
    let source = map.source()?;
    let memory = map.memory().iter().next().ok_or("no memory")?.get_mmap().as_ptr().cast::<u64>();
    // SAFETY: so many bytes are mapped, and nobody writes to them.
    let words = unsafe { std::slice::from_raw_parts(memory, SIZE as usize / size_of::<u64>()) };
    let (mut ours, mut floor) = (Vec::new(), Vec::new());
    let zeros = [0_u8; PAGE];
    for _ in 0..ROUNDS {
        let start = Instant::now();
        let mut found = 0_u64;
        for at in (0..SIZE).step_by(PORTION as usize) {
            for run in source.lying(0, at..at + PORTION)?.ok_or("it has to be read")? {
                each_page(&source.slice(0, &run)?, |page| found += u64::from(*page == zeros));
            }
        }
        ours.push(start.elapsed().as_secs_f64());
        if found != SIZE / PAGE as u64 {
            return Err(format!("{found} pages are zero").into());
        }
        let start = Instant::now();
        black_box(words.iter().fold(0, |sum: u64, word| sum.wrapping_add(*word)));
        floor.push(start.elapsed().as_secs_f64());
    }
    let mib = |times: &mut Vec<f64>| {
        times.sort_by(f64::total_cmp);
        times.get(ROUNDS / 2).map_or(f64::NAN, |time| (SIZE >> 20) as f64 / time)
    };
    let (ours, floor) = (mib(&mut ours), mib(&mut floor));
    println!(
        "{{\"name\":\"zero memory looked at\",\"unit\":\"MiB/s\",\"ours\":{ours},\"floor\":{floor},\"ratio\":{},\
         \"goal\":\"ratio-at-least\",\"target\":0.7}}",
        ours / floor
    );
    Ok(())
}
