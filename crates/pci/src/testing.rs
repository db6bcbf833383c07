//! A PCI bus without a VM, for the tests of functions. Part of the public interface, so that a device crate
//! of another project can use it.

use std::io;
use std::sync::Arc;

use vmm_device_model::bus::{Bus, BusTarget, Mapping};
use vmm_device_model::device::Attention;
use vmm_device_model::dma::DmaMemory;
use vmm_device_model::interrupt::{InterruptLine, MsiVectors};
use vmm_device_model::recipe::{BuildError, Resources};
use vmm_device_model::testing::{TestDoorbells, TestResources};
use vmm_device_model::thread::ThreadHook;

use crate::bdf::Bdf;
use crate::config::BarKind;
use crate::function::Attach;
use crate::host_bridge::{
    Attachment, CONFIG_PORTS, CONFIG_PORTS_LEN, ECAM_SIZE, HostBridge, REGION_ECAM, REGION_PORTS,
};
use crate::resources::PciResources;
use crate::slots::SlotAllocator;
use crate::windows::{BarAllocator, Windows};

/// Where the test machine's ECAM window starts.
pub const TEST_ECAM: u64 = 0xe800_0000;

/// Resources with a real host bridge, on the buses of [`TestResources`].
#[derive(Debug)]
pub struct TestPciResources {
    /// Memory, buses, vectors and attention.
    pub base: TestResources,
    /// The segment.
    pub bridge: Arc<HostBridge>,
    /// Where doorbells are.
    pub doorbells: Arc<TestDoorbells>,
    /// Device numbers.
    pub slots: SlotAllocator,
    /// Addresses for BARs.
    pub bars: BarAllocator,
}

impl TestPciResources {
    /// With `size` bytes of guest memory at address 0, below the PCI windows.
    ///
    /// # Errors
    /// The memory could not be mapped.
    pub fn new(size: usize) -> io::Result<Self> {
        let base = TestResources::new(size)?;
        let windows = Windows { mmio32: 0xc000_0000..0xe800_0000, mmio64: 0x10_0000_0000..0x20_0000_0000 };
        let doorbells = Arc::new(TestDoorbells::default());
        let bridge = HostBridge::new(0, Arc::clone(&base.mmio), Arc::clone(&doorbells) as _, windows.clone());
        let stand = |bus: &Bus, base, len, region| {
            let target = Arc::clone(&bridge) as Arc<dyn BusTarget>;
            bus.update(|map| map.insert(Mapping { base, len, target, region })).map_err(io::Error::other)
        };
        stand(&base.mmio, TEST_ECAM, ECAM_SIZE, REGION_ECAM)?;
        stand(&base.pio, CONFIG_PORTS.into(), CONFIG_PORTS_LEN.into(), REGION_PORTS)?;
        let mut slots = SlotAllocator::new();
        slots.take("host bridge", Some(0)).map_err(io::Error::other)?;
        Ok(Self { base, bridge, doorbells, slots, bars: BarAllocator::new(windows) })
    }

    /// Reads configuration space as a guest does, through the ECAM window.
    pub fn config_read(&self, bdf: Bdf, offset: u16, data: &mut [u8]) {
        self.base.mmio.read(TEST_ECAM + bdf.ecam_offset() + u64::from(offset), data);
    }

    /// Writes configuration space as a guest does, through the ECAM window.
    pub fn config_write(&self, bdf: Bdf, offset: u16, data: &[u8]) {
        self.base.mmio.write(TEST_ECAM + bdf.ecam_offset() + u64::from(offset), data);
    }
}

impl Resources for TestPciResources {
    fn map_pio(
        &mut self,
        base: u16,
        len: u16,
        target: Arc<dyn BusTarget>,
        region: u16,
    ) -> Result<(), BuildError> {
        self.base.map_pio(base, len, target, region)
    }

    fn map_mmio(
        &mut self,
        base: u64,
        len: u64,
        target: Arc<dyn BusTarget>,
        region: u16,
    ) -> Result<(), BuildError> {
        self.base.map_mmio(base, len, target, region)
    }

    fn interrupt_line(&mut self, gsi: u32) -> Result<Arc<dyn InterruptLine>, BuildError> {
        self.base.interrupt_line(gsi)
    }

    fn msi_vectors(&mut self, count: u16) -> Result<Arc<dyn MsiVectors>, BuildError> {
        self.base.msi_vectors(count)
    }

    fn dma(&self) -> DmaMemory {
        self.base.dma()
    }

    fn attention(&self) -> Arc<dyn Attention> {
        self.base.attention()
    }

    fn threads(&self) -> Arc<dyn ThreadHook> {
        self.base.threads()
    }
}

impl PciResources for TestPciResources {
    fn bdf(&mut self, slot: Option<u8>) -> Result<Bdf, BuildError> {
        let failed = |source: Box<dyn std::error::Error + Send + Sync>| BuildError::Device {
            what: "cannot book a PCI slot".to_owned(),
            source,
        };
        // There is no device id here; each call is another device.
        let id = (0..).map(|i| format!("device {i}")).find(|id| self.slots.slot_of(id).is_none());
        let slot = self.slots.take(&id.unwrap_or_default(), slot).map_err(|e| failed(e.into()))?;
        Bdf::new(0, 0, slot, 0).map_err(|e| failed(e.into()))
    }

    fn bar_address(&mut self, kind: BarKind, size: u64) -> Result<u64, BuildError> {
        self.bars.take(kind, size).ok_or(BuildError::Exhausted { what: "PCI address space" })
    }

    fn attach(&mut self, bdf: Bdf, attach: Attach) -> Result<Attachment, BuildError> {
        Ok(self.bridge.attach(bdf, &attach)?)
    }
}
