//! What the guest boots: the kernel, the ACPI tables, and the boot processor's first registers.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm_acpi_tables as acpi;
use vmm_api::spec::{MachineSpec, PayloadSpec};
use vmm_boot as boot;
use vmm_cpu_manager::entry::{Control, Entry};
use vmm_cpu_manager::topology::Topology;
use vmm_hypervisor::state::{DescriptorTable, Regs, Segment};
use vmm_memory_manager::layout::{self, Layout, Range};
use vmm_memory_manager::map::MemoryMap;
use vmm_pci::host_bridge::ECAM_SIZE;
use vmm_platform_devices::{acpi_pm, pm_timer, serial};

use super::recipes::{GED_ADDRESS, GED_GSI};

/// ACPI tables lie where PCs have their firmware; nothing else of ours is there.
const ACPI_START: u64 = 0xa_0000;
const ACPI_END: u64 = 0x10_0000;
/// The generation ID has a page of its own, which the guest is told to leave alone. It never moves.
pub(super) const GENERATION_ID: Range = Range { start: 0xf_e000, size: 0x1000 };
/// Where a PC's firmware is entered in real mode. Linux goes there to reset a machine of reduced hardware
/// that has no EFI, which is what this one is.
const RESET_VECTOR: u64 = 0xf_fff0;

/// What a guest boots, by its files.
pub(super) struct Payload<'a> {
    kernel: &'a Path,
    initramfs: Option<&'a Path>,
    cmdline: &'a str,
}

impl<'a> Payload<'a> {
    pub(super) fn of(spec: &'a MachineSpec) -> Self {
        match &spec.payload {
            PayloadSpec::Kernel { kernel, initramfs, cmdline } => {
                Self { kernel, initramfs: initramfs.as_deref(), cmdline }
            }
            PayloadSpec::Firmware(path) => Self { kernel: path, initramfs: None, cmdline: "" },
        }
    }

    /// The files that cannot be opened, by their fields.
    pub(super) fn unreadable(&self) -> Vec<(&'static str, BootError)> {
        let files = [("kernel", Some(self.kernel)), ("initramfs", self.initramfs)];
        files.into_iter().filter_map(|(field, path)| Some((field, open(path?).err()?))).collect()
    }
}

/// Loads the kernel and the tables into guest memory.
pub(super) fn load(spec: &MachineSpec, memory: &MemoryMap, topology: &Topology) -> Result<Entry, BootError> {
    let rsdp = write_tables(&describe(spec, memory.layout(), topology), memory)?;
    load_kernel(&Payload::of(spec), &**memory.memory(), memory.layout(), Some(rsdp))
}

/// Loads the kernel.
pub(super) fn load_kernel<M: GuestMemoryBackend>(
    payload: &Payload<'_>,
    memory: &M,
    layout: &Layout,
    rsdp: Option<u64>,
) -> Result<Entry, BootError> {
    let cmdline = boot::Cmdline::new(payload.cmdline)?;
    let kernel_file = open(payload.kernel)?;
    let initramfs_file = payload.initramfs.map(open).transpose()?;
    let source = boot::Source {
        kernel: &kernel_file,
        initramfs: initramfs_file.as_ref(),
        cmdline: &cmdline,
        map: &memory_map(layout)?,
        rsdp,
    };
    let loaded = boot::load(memory, &source)
        .map_err(|source| BootError::Load { path: payload.kernel.to_owned(), source })?;
    log::debug!("loaded {} as {:?}", payload.kernel.display(), loaded.format);
    Ok(entry(&loaded.registers))
}

fn open(path: &Path) -> Result<File, BootError> {
    let failed = |source| BootError::Open { path: path.to_owned(), source };
    // A FIFO would otherwise hold the thread until somebody writes to it.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(failed)?;
    match file.metadata().map_err(failed)?.is_file() {
        true => Ok(file),
        false => Err(BootError::NotAFile { path: path.to_owned() }),
    }
}

fn memory_map(layout: &Layout) -> Result<boot::MemoryMap, boot::MemoryMapError> {
    let range = |start, size, kind| boot::MemoryRange { start, size, kind };
    let mut ranges: Vec<_> = layout
        .ram
        .iter()
        .map(|piece| range(piece.range.start, piece.range.size, boot::MemoryKind::Ram))
        .collect();
    let Range { start: id, size: id_size } = GENERATION_ID;
    ranges.push(range(ACPI_START, id - ACPI_START, boot::MemoryKind::Acpi));
    ranges.push(range(id, id_size, boot::MemoryKind::Reserved));
    let rest = GENERATION_ID.end();
    ranges.push(range(rest, ACPI_END - rest, boot::MemoryKind::Acpi));
    ranges.push(range(layout::ECAM.start, layout::ECAM.size, boot::MemoryKind::Reserved));
    boot::MemoryMap::new(&ranges)
}

fn describe(spec: &MachineSpec, layout: &Layout, topology: &Topology) -> acpi::Machine {
    let window = |range: Range| acpi::Window { start: range.start, size: range.size };
    let cpu = |index| acpi::Cpu { apic_id: topology.apic_id(index), enabled: index < spec.cpus.boot };
    let buses = u8::try_from(ECAM_SIZE >> 20).unwrap_or(u8::MAX);
    acpi::Machine {
        oem: acpi::Oem::default(),
        cpus: (0..spec.cpus.max).map(cpu).collect(),
        lapic_address: u32::try_from(layout::LAPIC.start).unwrap_or(u32::MAX),
        ioapic: acpi::IoApic {
            id: 0,
            address: u32::try_from(layout::IOAPIC.start).unwrap_or(u32::MAX),
            gsi_base: 0,
        },
        pci: vec![acpi::PciSegment {
            segment: 0,
            ecam_base: layout::ECAM.start,
            start_bus: 0,
            end_bus: buses.saturating_sub(1),
            mmio32: window(layout::MMIO32),
            mmio64: Some(window(layout.mmio64)),
            intx_gsis: None,
        }],
        serial: spec.serial.as_ref().map(|_| acpi::Serial {
            port: serial::COM1_PORT,
            irq: u8::try_from(serial::COM1_GSI).unwrap_or(4),
        }),
        ged: acpi::Ged { address: GED_ADDRESS, gsi: GED_GSI },
        power_button: true,
        ports: acpi::PowerPorts { pm_timer: pm_timer::PM_TIMER_PORT, control: acpi_pm::ACPI_PM_PORT },
        rtc: true,
        generation_id: Some(GENERATION_ID.start),
    }
}

/// Returns the address of the RSDP.
fn write_tables(machine: &acpi::Machine, memory: &MemoryMap) -> Result<u64, BootError> {
    let tables = acpi::build(machine, ACPI_START, GENERATION_ID.start - ACPI_START)?;
    let blobs = tables.blobs.iter().map(|blob| (blob.address, blob.bytes.as_slice()));
    for (address, bytes) in blobs.chain([(RESET_VECTOR, reset_code().as_slice())]) {
        memory.memory().write_slice(bytes, GuestAddress(address)).map_err(BootError::NoRoom)?;
    }
    Ok(tables.rsdp_address)
}

/// What is run at [`RESET_VECTOR`]: a write to the ACPI reset register, then a halt.
fn reset_code() -> [u8; 9] {
    let [low, high] = acpi_pm::ACPI_PM_PORT.to_le_bytes();
    // mov al, value; mov dx, port; out dx, al; hlt; jmp to the hlt
    [0xb0, acpi_pm::RESET_VALUE, 0xba, low, high, 0xee, 0xf4, 0xeb, 0xfd]
}

fn entry(registers: &boot::BootRegisters) -> Entry {
    let boot::BootRegisters { general, control, cs, data, tr, gdt, idt } = registers;
    Entry {
        regs: Regs {
            rip: general.rip,
            rsp: general.rsp,
            rbx: general.rbx,
            rsi: general.rsi,
            rflags: general.rflags,
            ..Regs::default()
        },
        code: segment(cs),
        data: segment(data),
        task: segment(tr),
        gdt: DescriptorTable { base: gdt.base, limit: gdt.limit },
        idt: DescriptorTable { base: idt.base, limit: idt.limit },
        control: Control { cr0: control.cr0, cr3: control.cr3, cr4: control.cr4, efer: control.efer },
    }
}

fn segment(s: &boot::Segment) -> Segment {
    Segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        type_: s.type_,
        dpl: 0,
        present: true,
        db: s.db,
        s: s.s,
        l: s.l,
        g: s.g,
        avl: false,
        unusable: false,
    }
}

/// What the guest boots cannot be loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BootError {
    /// A file cannot be opened.
    #[error("cannot open {}", .path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// A directory or a device, say.
    #[error("{} is not a file", .path.display())]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
    /// The command line is impossible.
    #[error("kernel command line")]
    Cmdline(#[from] boot::CmdlineError),
    /// The memory map is impossible.
    #[error("memory map")]
    MemoryMap(#[from] boot::MemoryMapError),
    /// The kernel or initramfs does not load.
    #[error("cannot load {}", .path.display())]
    Load {
        /// The kernel.
        path: PathBuf,
        /// Why.
        #[source]
        source: boot::Error,
    },
    /// The ACPI tables are impossible.
    #[error("ACPI tables")]
    Acpi(#[from] acpi::Error),
    /// Guest memory ends before the tables do.
    #[error("guest memory is too small for the ACPI tables below 1 MiB")]
    NoRoom(#[source] vm_memory::GuestMemoryError),
}

impl BootError {
    /// The field of the payload that is at fault.
    pub(super) fn field(&self) -> &'static str {
        match self {
            Self::Cmdline(_) | Self::Load { source: boot::Error::Cmdline(_), .. } => "cmdline",
            Self::Load { source: boot::Error::Initramfs(_), .. } => "initramfs",
            _ => "kernel",
        }
    }
}
