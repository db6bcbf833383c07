//! Guest memory on the fake hypervisor: where it lies, and who learns of the pages that were written.

use std::error::Error;

use vm_memory::{Bytes, GuestAddress};
use vmm_hypervisor::fake::Fake;
use vmm_hypervisor::{Hypervisor, VmOptions};
use vmm_memory_manager::dirty::DirtyCollector;
use vmm_memory_manager::layout::{Layout, Range};
use vmm_memory_manager::map::MemoryMap;
use vmm_memory_manager::zone::{ZoneConfig, ZoneOptions};

fn main() -> Result<(), Box<dyn Error>> {
    println!("4 GiB and 2 GiB of RAM in 40 bits of address:");
    let large = Layout::new(&[4 << 30, 2 << 30], 40)?;
    for piece in &large.ram {
        println!("  zone {} from {:#011x}: {}", piece.zone, piece.offset, show(&piece.range));
    }
    println!("  64-bit BARs: {}", show(&large.mmio64));

    let hypervisor = Fake::new();
    let vm = hypervisor.create_vm(&VmOptions { ioapic_pins: 24, tss_address: 0 })?;
    let zone = ZoneConfig {
        id: "mem0".to_owned(),
        size: 16 << 20,
        file: None,
        shared: true,
        huge_page: None,
        options: ZoneOptions::default(),
    };
    let mut map = MemoryMap::create(vm, &[zone], 40)?;
    let mut dirty = DirtyCollector::new();
    dirty.start(&mut map, "migration")?;

    // A device writes through its handle, vCPUs as the hypervisor logs it.
    map.dma().view().write_obj(1_u64, GuestAddress(0x5000))?;
    hypervisor.set_dirty(0, vec![0b0110]);
    dirty.start(&mut map, "snapshot")?;
    map.dma().view().write_obj(1_u64, GuestAddress(0x6ffc))?;

    for name in ["migration", "snapshot"] {
        let pages: Vec<_> = dirty.take(&map, name)?.iter().map(show).collect();
        println!("written since {name} started: {}", pages.join(", "));
    }
    Ok(())
}

fn show(range: &Range) -> String {
    format!("{:#011x}..{:#011x}", range.start, range.end())
}
