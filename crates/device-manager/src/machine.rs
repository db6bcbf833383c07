//! What the devices of a machine are built from, and the books on who has what.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::sync::Arc;

use vmm_device_model::bus::{Bus, BusTarget, Mapping};
use vmm_device_model::device::Attention;
use vmm_device_model::dma::DmaMemory;
use vmm_device_model::interrupt::{InterruptLine, MsiSource, MsiVectors};
use vmm_device_model::recipe::{BuildError, Resources};
use vmm_device_model::thread::ThreadHook;
use vmm_pci::bdf::Bdf;
use vmm_pci::config::BarKind;
use vmm_pci::function::Attach;
use vmm_pci::host_bridge::{Attachment, HostBridge};
use vmm_pci::resources::PciResources;
use vmm_pci::slots::SlotAllocator;
use vmm_pci::windows::{BarAllocator, Windows};
use vmm_snapshot::RecordError;

use crate::node::Resource;
use crate::tree::{DeviceTreeV1, ResourceV1, invalid};

/// Gives the pins of the machine's interrupt controller.
pub trait Lines: Send + fmt::Debug {
    /// Pin `gsi`; `None` where there is none.
    fn line(&self, gsi: u32) -> Option<Arc<dyn InterruptLine>>;
}

/// Makes the way by which one device calls for the thread that owns the VM.
pub trait Attentions: Send + fmt::Debug {
    /// For the device `id`.
    fn of(&self, id: &str) -> Arc<dyn Attention>;
}

/// The buses, and who gives interrupts and attention: what a machine is given.
#[derive(Debug)]
pub struct Parts {
    /// Port I/O.
    pub pio: Arc<Bus>,
    /// Memory-mapped I/O.
    pub mmio: Arc<Bus>,
    /// Guest memory.
    pub memory: DmaMemory,
    /// Pins of the interrupt controller.
    pub lines: Box<dyn Lines>,
    /// Message-signalled interrupts.
    pub msi: Arc<dyn MsiSource>,
    /// Calls for the control thread.
    pub attentions: Box<dyn Attentions>,
    /// What the devices' threads go through before they begin.
    pub threads: Arc<dyn ThreadHook>,
    /// The PCI segment.
    pub bridge: Arc<HostBridge>,
    /// Where BARs may lie.
    pub windows: Windows,
}

/// What devices are built from, and who has what of it.
#[derive(Debug)]
pub struct Machine {
    parts: Parts,
    lines_taken: BTreeMap<u32, String>,
    slots: SlotAllocator,
    bars: BarAllocator,
    /// BARs that a saved device tree keeps for devices that are yet to be built: base and size, in order.
    kept: BTreeMap<String, VecDeque<(u64, u64)>>,
}

impl Machine {
    /// With everything free but the host bridge's own place, PCI device 0.
    ///
    /// # Errors
    /// Never in practice: place 0 of a new bus is free.
    pub fn new(parts: Parts) -> Result<Self, BuildError> {
        let mut slots = SlotAllocator::new();
        slots.take("host bridge", Some(0)).map_err(|e| slot_error("host bridge", e))?;
        let bars = BarAllocator::new(parts.windows.clone());
        Ok(Self { parts, lines_taken: BTreeMap::new(), slots, bars, kept: BTreeMap::new() })
    }

    /// Keeps the device numbers and BAR addresses of a saved tree for its devices. Before any device is built.
    ///
    /// # Errors
    /// The tree is impossible here.
    pub(crate) fn keep(&mut self, tree: &DeviceTreeV1) -> Result<(), RecordError> {
        for node in &tree.devices {
            let id = &node.id;
            for resource in &node.resources {
                match *resource {
                    ResourceV1::Slot { device } => {
                        let taken = self.slots.take(id, Some(device));
                        taken.map_err(|error| invalid(format!("device {id:?}: {error}")))?;
                    }
                    ResourceV1::Bar { base, len } => {
                        if !self.bars.take_at(base, len) {
                            let what =
                                format!("device {id:?} cannot have a BAR of {len:#x} bytes at {base:#x}");
                            return Err(invalid(what));
                        }
                        self.kept.entry(id.clone()).or_default().push_back((base, len));
                    }
                    // Their owners ask for these by number.
                    ResourceV1::Pio { .. }
                    | ResourceV1::Mmio { .. }
                    | ResourceV1::Line { .. }
                    | ResourceV1::Msi { .. }
                    | ResourceV1::Function { .. } => {}
                }
            }
        }
        Ok(())
    }

    /// Resources for the device `id`; what it takes is booked until the builder's end.
    pub(crate) fn builder<'a>(&'a mut self, id: &'a str) -> Builder<'a> {
        Builder { machine: self, id, booked: Vec::new() }
    }

    /// Takes back what a device had, in the opposite order.
    pub(crate) fn release(&mut self, id: &str, resources: &[Resource]) {
        for resource in resources.iter().rev() {
            match resource {
                Resource::Pio { base, .. } => unmap(&self.parts.pio, (*base).into()),
                Resource::Mmio { base, .. } => unmap(&self.parts.mmio, *base),
                Resource::Bar { base, .. } => drop(self.bars.release(*base)),
                Resource::Line { gsi } => drop(self.lines_taken.remove(gsi)),
                // The vectors go with their owner.
                Resource::Msi { .. } => {}
                Resource::Slot { .. } => drop(self.slots.release(id)),
                Resource::Function { bdf } => {
                    if let Err(error) = self.parts.bridge.detach(*bdf) {
                        log::warn!(device = id; "{error}");
                    }
                }
            }
        }
    }
}

fn unmap(bus: &Bus, base: u64) {
    if let Err(error) = bus.update(|map| map.remove(base)) {
        log::warn!("{error}");
    }
}

fn slot_error(id: &str, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> BuildError {
    BuildError::Device { what: format!("cannot give {id} a PCI device number"), source: source.into() }
}

/// The resources of a machine while one device is built.
#[derive(Debug)]
pub(crate) struct Builder<'a> {
    machine: &'a mut Machine,
    id: &'a str,
    booked: Vec<Resource>,
}

impl Builder<'_> {
    /// The device stands: what it took is its own.
    pub(crate) fn finish(mut self) -> Vec<Resource> {
        std::mem::take(&mut self.booked)
    }
}

impl Drop for Builder<'_> {
    fn drop(&mut self) {
        let booked = std::mem::take(&mut self.booked);
        self.machine.release(self.id, &booked);
    }
}

impl Resources for Builder<'_> {
    fn map_pio(
        &mut self,
        base: u16,
        len: u16,
        target: Arc<dyn BusTarget>,
        region: u16,
    ) -> Result<(), BuildError> {
        let mapping = Mapping { base: base.into(), len: len.into(), target, region };
        self.machine.parts.pio.update(|map| map.insert(mapping))?;
        self.booked.push(Resource::Pio { base, len });
        Ok(())
    }

    fn map_mmio(
        &mut self,
        base: u64,
        len: u64,
        target: Arc<dyn BusTarget>,
        region: u16,
    ) -> Result<(), BuildError> {
        self.machine.parts.mmio.update(|map| map.insert(Mapping { base, len, target, region }))?;
        self.booked.push(Resource::Mmio { base, len });
        Ok(())
    }

    fn interrupt_line(&mut self, gsi: u32) -> Result<Arc<dyn InterruptLine>, BuildError> {
        let line = self.machine.parts.lines.line(gsi).ok_or(BuildError::Exhausted { what: "such GSI" })?;
        if let Some(owner) = self.machine.lines_taken.get(&gsi) {
            return Err(BuildError::Taken { what: format!("GSI {gsi} (by {owner})") });
        }
        self.machine.lines_taken.insert(gsi, self.id.to_owned());
        self.booked.push(Resource::Line { gsi });
        Ok(line)
    }

    fn msi_vectors(&mut self, count: u16) -> Result<Arc<dyn MsiVectors>, BuildError> {
        let allocate = self.machine.parts.msi.allocate(count);
        let vectors = allocate.map_err(|source| BuildError::Io { what: "allocate MSI vectors", source })?;
        self.booked.push(Resource::Msi { count });
        Ok(vectors)
    }

    fn dma(&self) -> DmaMemory {
        self.machine.parts.memory.clone()
    }

    fn attention(&self) -> Arc<dyn Attention> {
        self.machine.parts.attentions.of(self.id)
    }

    fn threads(&self) -> Arc<dyn ThreadHook> {
        Arc::clone(&self.machine.parts.threads)
    }
}

impl PciResources for Builder<'_> {
    fn bdf(&mut self, slot: Option<u8>) -> Result<Bdf, BuildError> {
        let device = self.machine.slots.take(self.id, slot).map_err(|e| slot_error(self.id, e))?;
        self.booked.push(Resource::Slot { device });
        Bdf::new(self.machine.parts.bridge.segment(), 0, device, 0).map_err(|e| slot_error(self.id, e))
    }

    fn bar_address(&mut self, kind: BarKind, size: u64) -> Result<u64, BuildError> {
        let kept = self.machine.kept.get_mut(self.id).and_then(VecDeque::pop_front);
        let base = match kept {
            Some((base, len)) if len == size => Some(base),
            Some((base, len)) => {
                self.machine.bars.release(base);
                let what = format!("BAR of {len:#x} bytes at {base:#x}, which has {size:#x} bytes here,");
                return Err(BuildError::Taken { what });
            }
            None => self.machine.bars.take(kind, size),
        };
        let base = base.ok_or(BuildError::Exhausted { what: "PCI address space" })?;
        self.booked.push(Resource::Bar { base, len: size });
        Ok(base)
    }

    fn attach(&mut self, bdf: Bdf, attach: Attach) -> Result<Attachment, BuildError> {
        let attachment = self.machine.parts.bridge.attach(bdf, &attach)?;
        self.booked.push(Resource::Function { bdf });
        Ok(attachment)
    }
}
