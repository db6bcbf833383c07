//! From the checked configuration to devices: adding a device is a line here.

use std::io::{self, Write};
use std::sync::Arc;

use vmm_api::spec::{DeviceIdentity, DiskFormat, DiskSpec, LockGranularity, MachineSpec, RngSpec};
use vmm_device_manager::set::AnyRecipe;
use vmm_device_model::device::VmDevice;
use vmm_device_model::recipe::{BuildError, Recipe, Resources};
use vmm_disk_image::{Disk, EngineKind, ImageType, LockMode, OpenOptions};
use vmm_memory_manager::layout;
use vmm_pci::host_bridge::{
    CONFIG_PORTS, CONFIG_PORTS_LEN, ECAM_SIZE, HostBridge, HostBridgeDevice, REGION_ECAM, REGION_PORTS,
};
use vmm_platform_devices::acpi_pm::AcpiPm;
use vmm_platform_devices::clock::{Monotonic, Utc};
use vmm_platform_devices::cmos::{Cmos, RamSize};
use vmm_platform_devices::debug_port::{DebugConsole, PostPort};
use vmm_platform_devices::ged::{Ged, GedRecipe};
use vmm_platform_devices::i8042::I8042;
use vmm_platform_devices::ioapic::IoApicRecipe;
use vmm_platform_devices::output::ByteSink;
use vmm_platform_devices::pm_timer::PmTimer;
use vmm_platform_devices::pvpanic::PvPanicRecipe;
use vmm_platform_devices::serial::SerialRecipe;
use vmm_platform_devices::vm_generation::{Generation, VmGenerationRecipe};
use vmm_virtio_devices::block::{BlockDevice, BlockError, BlockOptions};
use vmm_virtio_devices::console::ConsoleDevice;
use vmm_virtio_devices::device::VirtioDevice;
use vmm_virtio_devices::rng::RngDevice;
use vmm_virtio_devices::transport::VirtioPciRecipe;

use super::kernel::GENERATION_ID;
use super::{Board, EventPost, Locks, MachineError};
use crate::boot_trace::Recorder;
use crate::console::End;

/// The GED's event register.
pub(super) const GED_ADDRESS: u64 = layout::PLATFORM.start;
/// The id of the power management timer.
pub(super) const PM_TIMER: &str = "_pm_timer";
/// The GED's interrupt.
pub(super) const GED_GSI: u32 = 5;

/// Where the machine's consoles end outside of it.
#[derive(Debug, Default)]
pub struct Ports {
    /// The serial port's.
    pub serial: Option<Arc<End>>,
    /// virtio-console's.
    pub console: Option<Arc<End>>,
    /// The debug console's.
    pub debug: Option<Arc<End>>,
}

/// The ways to the devices that the machine needs beside their life cycle.
#[derive(Debug)]
pub(super) struct Ways {
    /// Tells the guest of events.
    pub(super) ged: Ged,
    /// Tells the guest that it is another.
    pub(super) generation: Generation,
    /// The disks' images, for their locks.
    pub(super) disks: Vec<Arc<dyn Disk>>,
    /// Where consoles write, by device.
    pub(super) outputs: Vec<(String, ConsoleOutput)>,
}

/// Where a console writes. It outlives the machine, so what it lost before is not of this one.
#[derive(Debug)]
pub(super) struct ConsoleOutput {
    sink: Arc<dyn ByteSink>,
    lost_before: u64,
}

impl ConsoleOutput {
    fn new(sink: Arc<dyn ByteSink>) -> Self {
        let lost_before = sink.lost();
        Self { sink, lost_before }
    }

    /// Bytes of this machine's guest that were lost.
    pub(super) fn lost(&self) -> u64 {
        self.sink.lost().saturating_sub(self.lost_before)
    }
}

/// Adds every device of the machine.
pub(super) fn add_all(
    board: &mut Board,
    spec: &MachineSpec,
    ports: &Ports,
    post: &EventPost,
    locks: Locks,
    recorder: &mut Recorder,
) -> Result<Ways, MachineError> {
    let mut disks = Vec::with_capacity(spec.disks.len());
    let ged = GedRecipe::new("_ged", GED_ADDRESS, GED_GSI);
    let raise = ged.ged();
    let generation = VmGenerationRecipe::new("_vm_generation", GENERATION_ID.start, ged.ged());
    let another = generation.generation();
    let clock = || Arc::new(Monotonic::new());
    let events = Arc::new(post.clone());
    let ram = ram_size(spec.memory.total().get());
    // First who delivers interrupts: it is restored before those that raise them.
    let mut recipes: Vec<AnyRecipe> = vec![
        Box::new(IoApicRecipe::new("_ioapic", layout::IOAPIC.start, Arc::clone(&board.roads.ioapic))),
        Box::new(HostBridgeRecipe(Arc::clone(&board.bridge))),
        Box::new(I8042::recipe("_i8042", Arc::clone(&events) as _)),
        Box::new(Cmos::recipe("_cmos", Arc::new(Utc), ram)),
        Box::new(AcpiPm::recipe("_acpi", Arc::clone(&events) as _)),
        Box::new(PmTimer::recipe(PM_TIMER, clock())),
        Box::new(ged),
        Box::new(generation),
        Box::new(PostPort::recipe("_post", clock(), recorder.codes())),
    ];
    let mut outputs = Vec::new();
    let mut writes = |id: &str, end: &End| outputs.push((id.to_owned(), ConsoleOutput::new(end.sink())));
    if let Some(end) = &ports.serial {
        writes("_serial", end);
        let recipe = SerialRecipe::com1("_serial", end.sink(), end.room());
        let input = recipe.input();
        end.connect(Box::new(move |bytes| input.enqueue(bytes)));
        recipes.push(Box::new(recipe));
    }
    if let (Some(end), Some(console)) = (&ports.debug, &spec.debug_console) {
        writes("_debug_console", end);
        recipes.push(Box::new(DebugConsole::recipe("_debug_console", console.port, end.sink())));
    }
    for disk in &spec.disks {
        let failed = |source| MachineError::Disk { id: disk.identity.id.clone(), source };
        let made = recorder.time(format!("open {}", disk.identity.id), || {
            let image = open_image(disk, locks)?;
            Ok((Arc::clone(&image), disk_recipe(disk, image)?))
        });
        let (image, recipe) = made.map_err(failed)?;
        disks.push(image);
        recipes.push(Box::new(recipe));
    }
    recipes.push(Box::new(rng_recipe(&spec.rng)?));
    if let (Some(end), Some(console)) = (&ports.console, &spec.console) {
        writes(&console.identity.id, end);
        recipes.push(Box::new(console_recipe(&console.identity, end)?));
    }
    if spec.pvpanic {
        recipes.push(Box::new(PvPanicRecipe::new("_pvpanic", events)));
    }
    for recipe in recipes {
        recorder.time(recipe.id().to_owned(), || board.devices.add(recipe))?;
    }
    Ok(Ways { ged: raise, generation: another, disks, outputs })
}

/// Opens the image of a disk, and locks it if `locks` says so.
pub(super) fn open_image(spec: &DiskSpec, locks: Locks) -> Result<Arc<dyn Disk>, vmm_disk_image::OpenError> {
    let DiskFormat::Raw = spec.image.format;
    let lock = match spec.image.lock {
        LockGranularity::ByteRange => LockMode::ByteRange,
        LockGranularity::Full => LockMode::Full,
    };
    vmm_disk_image::open(&OpenOptions {
        path: spec.image.path.clone(),
        read_only: spec.image.readonly,
        direct: spec.image.direct,
        lock,
        lock_later: locks == Locks::Later,
        image_type: ImageType::Raw,
    })
}

fn disk_recipe(spec: &DiskSpec, disk: Arc<dyn Disk>) -> Result<VirtioPciRecipe, DiskError> {
    let device = BlockDevice::new(BlockOptions {
        id: spec.identity.id.clone(),
        disk,
        queues: spec.queues,
        queue_size: spec.queue_size,
        engine: if spec.io_uring { EngineKind::Auto } else { EngineKind::Sync },
        serial: spec.serial.clone(),
        sparse: spec.image.sparse,
    })?;
    Ok(virtio(&spec.identity, Box::new(device)))
}

fn rng_recipe(spec: &RngSpec) -> Result<VirtioPciRecipe, MachineError> {
    let device = RngDevice::new(spec.identity.id.clone(), &spec.source)?;
    Ok(virtio(&spec.identity, Box::new(device)))
}

fn console_recipe(identity: &DeviceIdentity, end: &Arc<End>) -> Result<VirtioPciRecipe, MachineError> {
    let output = Box::new(SinkWriter(end.sink()));
    let device =
        ConsoleDevice::new(identity.id.clone(), output, end.size()).map_err(MachineError::Console)?;
    let (input, window, room) = (device.input(), device.input(), end.room());
    device.on_room(Box::new(move || room.notify()));
    let resize = Box::new(move |columns, rows| window.resize(columns, rows));
    end.connect_window(Box::new(move |bytes| input.enqueue(bytes)), resize);
    Ok(virtio(identity, Box::new(device)))
}

/// Writes into a sink, which takes everything and never blocks.
#[derive(Debug)]
struct SinkWriter(Arc<dyn ByteSink>);

impl Write for SinkWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.put(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn virtio(identity: &DeviceIdentity, device: Box<dyn VirtioDevice>) -> VirtioPciRecipe {
    VirtioPciRecipe { id: identity.id.clone(), device, slot: identity.device_number }
}

/// A disk cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiskError {
    /// The image cannot be opened.
    #[error("cannot open the image")]
    Open(#[from] vmm_disk_image::OpenError),
    /// The image opens, but no device can be made of it.
    #[error("cannot serve the image")]
    Device(#[from] BlockError),
}

/// Puts the host bridge's two ways to configuration space on the buses.
#[derive(Debug)]
struct HostBridgeRecipe(Arc<HostBridge>);

impl<R: Resources + ?Sized> Recipe<R> for HostBridgeRecipe {
    fn id(&self) -> &str {
        "_pci0"
    }

    fn build(self: Box<Self>, resources: &mut R) -> Result<Box<dyn VmDevice>, BuildError> {
        let Self(bridge) = *self;
        resources.map_mmio(layout::ECAM.start, ECAM_SIZE, Arc::clone(&bridge) as _, REGION_ECAM)?;
        resources.map_pio(CONFIG_PORTS, CONFIG_PORTS_LEN, Arc::clone(&bridge) as _, REGION_PORTS)?;
        Ok(Box::new(HostBridgeDevice(bridge)))
    }
}

fn ram_size(total: u64) -> RamSize {
    let below = total.min(layout::HOLE_START);
    RamSize { below_4g: below, above_4g: total - below }
}

#[cfg(test)]
mod tests {
    use vmm_platform_devices::output::{Discard, OutputRing};

    use super::*;

    #[test]
    fn what_a_console_lost_before_a_machine_is_not_the_machines() {
        let ring = OutputRing::new(4, Arc::new(Discard));
        ring.put(b"123456");
        let output = ConsoleOutput::new(Arc::clone(&ring) as _);
        assert_eq!((ring.lost(), output.lost()), (2, 0));
        ring.put(b"789");
        assert_eq!(output.lost(), 3);
    }
}
