//! Loads a kernel into a scratch memory of 1 GiB and prints where everything went.

use std::{env, error::Error, fs::File};

use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm_boot::{Cmdline, MemoryKind, MemoryMap, MemoryRange, Source};

const SIZE: usize = 1 << 30;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = env::args().skip(1);
    let kernel = File::open(arguments.next().ok_or("usage: inspect KERNEL [INITRAMFS]")?)?;
    let initramfs = arguments.next().map(File::open).transpose()?;

    let memory: GuestMemoryMmap<()> = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), SIZE)])?;
    let map = MemoryMap::new(&[MemoryRange { start: 0, size: SIZE as u64, kind: MemoryKind::Ram }])?;
    let cmdline = Cmdline::new("console=ttyS0")?;
    let source =
        Source { kernel: &kernel, initramfs: initramfs.as_ref(), cmdline: &cmdline, map: &map, rsdp: None };

    let loaded = vmm_boot::load(&memory, &source)?;
    println!("{:?}, entry at {:#x}", loaded.format, loaded.registers.general.rip);
    println!("kernel    {}", loaded.kernel);
    if let Some(span) = loaded.initramfs {
        println!("initramfs {span}");
    }
    Ok(())
}
