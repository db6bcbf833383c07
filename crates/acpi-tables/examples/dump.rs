//! Writes the tables of a small machine to a folder, for `iasl -d`.

use std::{env, error::Error, fs, path::PathBuf};

use vmm_acpi_tables::{Cpu, Ged, IoApic, Machine, Oem, PciSegment, PowerPorts, Serial, Window, build};

fn main() -> Result<(), Box<dyn Error>> {
    let folder = PathBuf::from(env::args().nth(1).ok_or("usage: dump FOLDER")?);
    let machine = Machine {
        oem: Oem::default(),
        cpus: (0..2).map(|apic_id| Cpu { apic_id, enabled: true }).collect(),
        lapic_address: 0xfee0_0000,
        ioapic: IoApic { id: 0, address: 0xfec0_0000, gsi_base: 0 },
        pci: vec![PciSegment {
            segment: 0,
            ecam_base: 0xe800_0000,
            start_bus: 0,
            end_bus: 0,
            mmio32: Window { start: 0xc000_0000, size: 640 << 20 },
            mmio64: None,
            intx_gsis: Some([16, 17, 18, 19]),
        }],
        serial: Some(Serial { port: 0x3f8, irq: 4 }),
        ged: Ged { address: 0xfd00_0000, gsi: 5 },
        power_button: true,
        ports: PowerPorts { pm_timer: 0xb008, control: 0x3c0 },
        rtc: true,
        generation_id: Some(0xf_e000),
    };
    fs::create_dir_all(&folder)?;
    for blob in build(&machine, 0xa_0000, 0x6_0000)?.blobs {
        let path = folder.join(format!("{:x}.dat", blob.address));
        fs::write(&path, &blob.bytes)?;
        println!("{:>6} bytes  {}", blob.bytes.len(), path.display());
    }
    Ok(())
}
