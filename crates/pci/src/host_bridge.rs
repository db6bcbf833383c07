//! A PCI segment with one bus: configuration access, the functions on it, and where their BARs answer.

use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use arc_swap::ArcSwap;
use vmm_device_model::bus::{Bus, BusTarget};
use vmm_device_model::device::{Blocker, DeviceChange, DeviceError, Lifecycle, SaveState};
use vmm_device_model::doorbell::Doorbells;
use vmm_device_model::metrics::Metered;
use vmm_device_model::recipe::BuildError;
use vmm_snapshot::RecordError;

use crate::bdf::{BUS_CONFIG_SIZE, Bdf};
use crate::config::{BARS, ConfigSpace, ConfigWordV1, Identity};
use crate::function::{Attach, ConfigEffect, PciFunction};
use crate::placement::Placement;
use crate::windows::Windows;

/// Region of [`HostBridge`] that is the ECAM window; as long as there are buses, see [`ECAM_SIZE`].
pub const REGION_ECAM: u16 = 0;
/// Region of [`HostBridge`] that is the port mechanism: [`CONFIG_PORTS_LEN`] ports at [`CONFIG_PORTS`].
pub const REGION_PORTS: u16 = 1;
/// Bytes of ECAM window in which functions can be; a larger window reads as all ones behind it.
pub const ECAM_SIZE: u64 = BUS_CONFIG_SIZE;
/// First port of PCI configuration mechanism #1.
pub const CONFIG_PORTS: u16 = 0xcf8;
/// Ports of PCI configuration mechanism #1.
pub const CONFIG_PORTS_LEN: u16 = 8;

const ADDRESS_ENABLE: u32 = 1 << 31;
/// Enable bit, bus, device, function and register; the rest reads as zero.
const ADDRESS_WRITABLE: u32 = 0x80ff_fffc;
/// Red Hat's PCI Express host bridge, which no driver has quirks for; class "host bridge".
const IDENTITY: Identity = Identity {
    vendor: 0x1b36,
    device: 0x0008,
    subsystem_vendor: 0,
    subsystem: 0,
    class: 0x06_0000,
    revision: 0,
};

type Functions = Vec<Option<Arc<Mutex<dyn PciFunction>>>>;

/// One PCI segment: its bus 0, with the host bridge's own function at 00.0.
///
/// It stands on the buses itself, as [`REGION_ECAM`] and [`REGION_PORTS`]. A configuration access takes the
/// lock of the function it is for and no other; only a write that moves a BAR takes more.
pub struct HostBridge {
    segment: u16,
    /// By device and function number.
    functions: ArcSwap<Functions>,
    /// Held while `functions` is replaced.
    change: Mutex<()>,
    placement: Placement,
    /// The latch at port 0xcf8.
    address: AtomicU32,
    root: Arc<Mutex<Root>>,
}

impl HostBridge {
    /// A segment with nothing but the host bridge's own function.
    ///
    /// BARs answer on `bus`, inside `windows` only, and their doorbells are kept in `doorbells`.
    pub fn new(segment: u16, bus: Arc<Bus>, doorbells: Arc<dyn Doorbells>, windows: Windows) -> Arc<Self> {
        let root = Arc::new(Mutex::new(Root(ConfigSpace::new(&IDENTITY))));
        let mut functions: Functions = vec![None; 256];
        if let Some(first) = functions.first_mut() {
            *first = Some(Arc::clone(&root) as _);
        }
        Arc::new(Self {
            segment,
            functions: ArcSwap::from_pointee(functions),
            change: Mutex::new(()),
            placement: Placement::new(bus, doorbells, windows),
            address: AtomicU32::new(0),
            root,
        })
    }

    /// Puts a function on the bus, also under a running guest. Its BARs answer as its configuration space
    /// says from then on.
    ///
    /// # Errors
    /// The place is taken or not on this bus, or the description of its BARs is impossible.
    pub fn attach(self: &Arc<Self>, bdf: Bdf, attach: &Attach) -> Result<Attachment, PciError> {
        check_windows(bdf, attach)?;
        if bdf.segment() != self.segment || bdf.bus() != 0 {
            return Err(PciError::NoSuchBus { bdf });
        }
        self.change_functions(|functions| match functions.get_mut(usize::from(bdf.devfn())) {
            Some(place @ None) => {
                *place = Some(Arc::clone(&attach.function));
                Ok(())
            }
            _ => Err(PciError::Taken { bdf }),
        })?;
        self.placement.add(bdf, attach);
        Ok(Attachment { bridge: Arc::clone(self), bdf })
    }

    /// Takes a function off the bus: its configuration space and its BARs are gone for the guest.
    ///
    /// # Errors
    /// Nothing is there, or it is the host bridge itself.
    pub fn detach(&self, bdf: Bdf) -> Result<(), PciError> {
        if bdf.devfn() == 0 || bdf.segment() != self.segment || bdf.bus() != 0 {
            return Err(PciError::NotAttached { bdf });
        }
        self.change_functions(|functions| {
            let place = functions.get_mut(usize::from(bdf.devfn()));
            place.and_then(Option::take).map(drop).ok_or(PciError::NotAttached { bdf })
        })?;
        self.placement.remove(bdf);
        Ok(())
    }

    /// Its segment.
    pub fn segment(&self) -> u16 {
        self.segment
    }

    fn change_functions<T>(
        &self,
        change: impl FnOnce(&mut Functions) -> Result<T, PciError>,
    ) -> Result<T, PciError> {
        let _one_writer = self.change.lock().unwrap_or_else(PoisonError::into_inner);
        let mut functions = Functions::clone(&self.functions.load());
        let value = change(&mut functions)?;
        self.functions.store(Arc::new(functions));
        Ok(value)
    }

    fn function(&self, bdf: Bdf) -> Option<Arc<Mutex<dyn PciFunction>>> {
        if bdf.bus() != 0 {
            return None;
        }
        self.functions.load().get(usize::from(bdf.devfn()))?.clone()
    }

    /// `data` is all ones already, which is what an absent function reads as.
    fn config_read(&self, bdf: Bdf, register: u16, data: &mut [u8]) {
        if let Some(function) = self.function(bdf) {
            function.lock().unwrap_or_else(PoisonError::into_inner).config_read(register, data);
        }
    }

    fn config_write(&self, bdf: Bdf, register: u16, data: &[u8]) {
        let Some(function) = self.function(bdf) else { return };
        let effect = function.lock().unwrap_or_else(PoisonError::into_inner).config_write(register, data);
        if effect == ConfigEffect::BarsMoved {
            self.placement.reconcile();
        }
    }

    /// Which register an access to `offset` of a region is for; `None` where nothing answers.
    fn decode(&self, region: u16, offset: u64, len: usize) -> Option<(Bdf, u16)> {
        let (bdf, register) = match (region, offset) {
            (REGION_ECAM, _) => Bdf::from_ecam_offset(self.segment, offset)?,
            (REGION_PORTS, 4..8) if offset + len as u64 <= 8 => {
                let address = self.address.load(Ordering::Relaxed);
                if address & ADDRESS_ENABLE == 0 {
                    return None;
                }
                // Bus, device and function lie as in an ECAM offset, with 8 register bits in place of 12.
                let place = u64::from(address & 0xff_ff00) << 4;
                let (bdf, _) = Bdf::from_ecam_offset(self.segment, place)?;
                (bdf, (address & 0xfc) as u16 + (offset - 4) as u16)
            }
            _ => return None,
        };
        // No access spans two functions.
        (usize::from(register) + len <= 4096).then_some((bdf, register))
    }
}

impl BusTarget for HostBridge {
    fn read(&self, region: u16, offset: u64, data: &mut [u8]) {
        if (region, offset, data.len()) == (REGION_PORTS, 0, 4) {
            data.copy_from_slice(&self.address.load(Ordering::Relaxed).to_le_bytes());
        } else if let Some((bdf, register)) = self.decode(region, offset, data.len()) {
            self.config_read(bdf, register, data);
        }
    }

    fn write(&self, region: u16, offset: u64, data: &[u8]) {
        // The latch takes 32-bit accesses only; a byte at 0xcf9 is somebody else's reset register.
        if let (REGION_PORTS, 0, Ok(latch)) = (region, offset, <[u8; 4]>::try_from(data)) {
            self.address.store(u32::from_le_bytes(latch) & ADDRESS_WRITABLE, Ordering::Relaxed);
        } else if let Some((bdf, register)) = self.decode(region, offset, data.len()) {
            self.config_write(bdf, register, data);
        }
    }
}

impl fmt::Debug for HostBridge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let functions = self.functions.load().iter().flatten().count();
        write!(f, "PCI segment {} with {functions} functions", self.segment)
    }
}

fn check_windows(bdf: Bdf, attach: &Attach) -> Result<(), PciError> {
    let mut seen = [false; BARS];
    for window in &attach.bars {
        let bad = PciError::BadBar { bdf, index: window.index };
        match seen.get_mut(usize::from(window.index)) {
            Some(seen) if !*seen && window.size != 0 => *seen = true,
            _ => return Err(bad),
        }
        if window.doorbells.iter().any(|bell| bell.offset >= window.size) {
            return Err(bad);
        }
    }
    Ok(())
}

/// A function's place on a bus; its owner's handle. Dropping it changes nothing, see [`HostBridge::detach`].
#[derive(Debug, Clone)]
pub struct Attachment {
    bridge: Arc<HostBridge>,
    bdf: Bdf,
}

impl Attachment {
    /// Where the function is.
    pub fn bdf(&self) -> Bdf {
        self.bdf
    }

    /// The owner changed the configuration space (reset, restore): BARs are brought in line. Not to be
    /// called with the function's lock held.
    pub fn sync_bars(&self) {
        self.bridge.placement.reconcile();
    }

    /// Where a BAR answers now.
    pub fn bar_address(&self, index: u8) -> Option<u64> {
        self.bridge.placement.address(self.bdf, index)
    }
}

/// The host bridge's own function.
#[derive(Debug)]
struct Root(ConfigSpace);

impl PciFunction for Root {
    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        self.0.read(offset, data);
    }

    fn config_write(&mut self, offset: u16, data: &[u8]) -> ConfigEffect {
        self.0.write(offset, data);
        ConfigEffect::None
    }

    fn bar_addresses(&self) -> [Option<u64>; BARS] {
        [None; BARS]
    }
}

/// The host bridge as the thread that owns the VM sees it: it has state, but no work of its own.
#[derive(Debug, Clone)]
pub struct HostBridgeDevice(pub Arc<HostBridge>);

impl HostBridgeDevice {
    fn with_root<T>(&self, work: impl FnOnce(&mut ConfigSpace) -> T) -> T {
        work(&mut self.0.root.lock().unwrap_or_else(PoisonError::into_inner).0)
    }
}

impl Metered for HostBridgeDevice {}

impl Lifecycle for HostBridgeDevice {
    fn service(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }

    fn quiesce_begin(&mut self) {}

    fn quiesce_finish(&mut self, _: Instant) -> Result<(), DeviceError> {
        Ok(())
    }

    fn resume(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        self.with_root(ConfigSpace::reset);
        self.0.address.store(0, Ordering::Relaxed);
        Ok(())
    }

    fn blockers(&self) -> Vec<Blocker> {
        Vec::new()
    }

    fn take_changes(&mut self) -> Vec<DeviceChange> {
        Vec::new()
    }
}

impl SaveState for HostBridgeDevice {
    type State = HostBridgeV1;

    fn save(&self) -> HostBridgeV1 {
        // The functions and their places belong to their own records.
        let HostBridge { segment: _, functions: _, change: _, placement: _, address, root: _ } = &*self.0;
        let config = self.with_root(|root| root.save());
        HostBridgeV1 { address: address.load(Ordering::Relaxed), config }
    }

    fn restore(&mut self, state: HostBridgeV1) -> Result<(), RecordError> {
        if state.address & !ADDRESS_WRITABLE != 0 {
            let what = format!("config address cannot be {:#x}", state.address);
            return Err(RecordError::invalid::<HostBridgeV1>(what));
        }
        self.with_root(|root| root.restore(&state.config))?;
        self.0.address.store(state.address, Ordering::Relaxed);
        Ok(())
    }
}

/// Saved state of a host bridge.
#[derive(Debug, Clone, PartialEq, Eq, minicbor::Encode, minicbor::Decode)]
pub struct HostBridgeV1 {
    /// The latch at port 0xcf8.
    #[n(0)]
    pub address: u32,
    /// Its own function's configuration space.
    #[n(1)]
    pub config: Vec<ConfigWordV1>,
}

vmm_snapshot::schema!(HostBridgeV1: "pci-host-bridge" v1);

/// Why a function could not be attached or detached.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PciError {
    /// The segment or bus is not this one.
    #[error("there is no PCI bus for {bdf}")]
    NoSuchBus {
        /// What was asked for.
        bdf: Bdf,
    },
    /// A function is there already.
    #[error("PCI address {bdf} is taken")]
    Taken {
        /// What was asked for.
        bdf: Bdf,
    },
    /// No function that could be detached is there.
    #[error("no function to detach at PCI address {bdf}")]
    NotAttached {
        /// What was asked for.
        bdf: Bdf,
    },
    /// A BAR's number, size or doorbell is impossible.
    #[error("BAR {index} of PCI function {bdf} is impossible")]
    BadBar {
        /// Whose BAR.
        bdf: Bdf,
        /// Its number.
        index: u8,
    },
}

impl From<PciError> for BuildError {
    fn from(source: PciError) -> Self {
        Self::Device { what: "cannot attach a PCI function".to_owned(), source: Box::new(source) }
    }
}
