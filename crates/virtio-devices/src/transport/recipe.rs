//! From a virtio device to a function on the bus.

use std::sync::{Arc, Mutex};

use vmm_device_model::device::VmDevice;
use vmm_device_model::limiter::Limiter;
use vmm_device_model::recipe::{BuildError, Recipe};
use vmm_pci::config::{Bar, BarKind, ConfigSpace, Identity};
use vmm_pci::endpoint::Endpoint;
use vmm_pci::function::{Attach, BarDoorbell, BarWindow};
use vmm_pci::msix::BarPlace;
use vmm_pci::resources::PciResources;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::common::Common;
use super::front::{Front, add_capabilities};
use super::interrupt::PciInterrupt;
use super::layout::{BAR, BAR_SIZE, MAX_QUEUES, MSIX_PENDING, MSIX_TABLE, NOTIFY, NOTIFY_MULTIPLIER};
use super::pci::VirtioPci;
use super::queue::size_is_valid;
use crate::device::VirtioDevice;

const VENDOR: u16 = 0x1af4;
/// PCI device IDs of modern devices start here.
const FIRST_DEVICE: u16 = 0x1040;

/// A virtio device that is to become a PCI function.
#[derive(Debug)]
pub struct VirtioPciRecipe {
    /// Device id; the key of its saved state.
    pub id: String,
    /// The device.
    pub device: Box<dyn VirtioDevice>,
    /// PCI device number; `None` for the lowest free one.
    pub slot: Option<u8>,
}

impl<'r> Recipe<dyn PciResources + 'r> for VirtioPciRecipe {
    fn id(&self) -> &str {
        &self.id
    }

    fn build(
        self: Box<Self>,
        resources: &mut (dyn PciResources + 'r),
    ) -> Result<Box<dyn VmDevice>, BuildError> {
        Ok(Box::new(self.build_pci(resources)?))
    }
}

impl VirtioPciRecipe {
    /// As [`Recipe::build`], with the type kept.
    ///
    /// # Errors
    /// As [`Recipe::build`].
    pub fn build_pci(self, resources: &mut dyn PciResources) -> Result<VirtioPci, BuildError> {
        let Self { id, device, slot } = self;
        let sizes = device.queue_sizes();
        if sizes.len() > MAX_QUEUES || sizes.iter().any(|size| !size_is_valid(*size, 1 << 15)) {
            return Err(failed("the device's virtqueues are impossible")(format!("{sizes:?}").into()));
        }
        let bdf = resources.bdf(slot)?;
        let address = resources.bar_address(BarKind::Memory64, BAR_SIZE)?;
        // One for each queue and one for configuration changes.
        let vectors = resources.msi_vectors(sizes.len() as u16 + 1)?;

        let mut config = ConfigSpace::new(&identity(device.device_type())?);
        let bar = Bar { index: BAR, kind: BarKind::Memory64, size: BAR_SIZE, address };
        config.add_bar(bar).map_err(|e| failed("cannot lay out the BAR")(e.into()))?;
        let window =
            add_capabilities(&mut config).map_err(|e| failed("cannot list capabilities")(e.into()))?;
        let place = |offset| BarPlace { bar: BAR, offset };
        let count = vectors.count();
        let endpoint = Endpoint::with_msix(config, vectors, place(MSIX_TABLE), place(MSIX_PENDING))
            .map_err(|e| failed("cannot have MSI-X")(e.into()))?;
        let msix = endpoint.msix().ok_or(BuildError::Exhausted { what: "MSI vectors" })?;
        let interrupt = Arc::new(PciInterrupt::new(msix.trigger(), count, sizes.len()));
        let kick = |_| EventFd::new(EFD_NONBLOCK).map(Arc::new);
        let kicks = sizes.iter().map(kick).collect::<Result<Vec<_>, _>>();
        let kicks = kicks.map_err(|source| BuildError::Io { what: "create an eventfd", source })?;

        let attention = resources.attention();
        let doorbells = doorbells(&kicks);
        let front = Arc::new(Mutex::new(Front {
            id: id.clone(),
            endpoint,
            common: Common::new(device.features(), &sizes),
            interrupt,
            config: device.config(),
            kicks,
            attention: Arc::clone(&attention),
            window,
            misuse: Limiter::for_guest(),
        }));
        let target = Arc::clone(&front) as _;
        let bar = BarWindow { index: BAR, size: BAR_SIZE, target, region: BAR.into(), doorbells };
        let function = Arc::clone(&front) as _;
        let attachment = resources.attach(bdf, Attach { function, bars: vec![bar] })?;
        Ok(VirtioPci::new(id, device, front, attachment, resources.dma(), attention))
    }
}

fn doorbells(kicks: &[Arc<EventFd>]) -> Vec<BarDoorbell> {
    let offsets = (NOTIFY..).step_by(NOTIFY_MULTIPLIER as usize);
    offsets.zip(kicks).map(|(offset, event)| BarDoorbell { offset, event: Arc::clone(event) }).collect()
}

fn identity(device_type: u32) -> Result<Identity, BuildError> {
    let device = u16::try_from(device_type).ok().and_then(|t| FIRST_DEVICE.checked_add(t));
    let device = device.ok_or_else(|| failed("not a virtio device type")(device_type.to_string().into()))?;
    let class = match device_type {
        // Network, block, console, SCSI, GPU, input; everything else is in no class.
        1 => 0x02_0000,
        2 => 0x01_8000,
        3 => 0x07_8000,
        8 => 0x01_0000,
        16 => 0x03_8000,
        18 => 0x09_8000,
        _ => 0xff_0000,
    };
    Ok(Identity { vendor: VENDOR, device, subsystem_vendor: VENDOR, subsystem: device, class, revision: 1 })
}

fn failed(what: &'static str) -> impl Fn(Box<dyn std::error::Error + Send + Sync>) -> BuildError {
    move |source| BuildError::Device { what: what.to_owned(), source }
}
