//! The register file: configuration space and the BAR, behind one lock.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use vmm_device_model::bus::BusDevice;
use vmm_device_model::device::Attention;
use vmm_device_model::limiter::Limiter;
use vmm_pci::config::{BARS, CAP_VENDOR, Capability, ConfigError, ConfigSpace};
use vmm_pci::endpoint::Endpoint;
use vmm_pci::function::{ConfigEffect, PciFunction};
use vmm_sys_util::eventfd::EventFd;

use super::common::{Common, Effect};
use super::interrupt::PciInterrupt;
use super::layout::{
    BAR, BAR_SIZE, COMMON, COMMON_LEN, DEVICE, DEVICE_LEN, ISR, ISR_LEN, MSIX_PENDING, MSIX_TABLE, NOTIFY,
    NOTIFY_LEN, NOTIFY_MULTIPLIER,
};
use crate::device::DeviceConfig;

const CAP_COMMON: u8 = 1;
const CAP_NOTIFY: u8 = 2;
const CAP_ISR: u8 = 3;
const CAP_DEVICE: u8 = 4;
const CAP_PCI: u8 = 5;

// Fields of the window capability, from its start.
const WINDOW_BAR: u16 = 4;
const WINDOW_OFFSET: u16 = 8;
const WINDOW_LENGTH: u16 = 12;
const WINDOW_DATA: u16 = 16;

/// What the guest touches of a virtio-pci function.
pub(super) struct Front {
    /// The device's.
    pub(super) id: String,
    pub(super) endpoint: Endpoint,
    pub(super) common: Common,
    pub(super) interrupt: Arc<PciInterrupt>,
    pub(super) config: Arc<dyn DeviceConfig>,
    pub(super) kicks: Vec<Arc<EventFd>>,
    pub(super) attention: Arc<dyn Attention>,
    /// Where the window capability is (virtio 1.3, section 4.1.4.9).
    pub(super) window: u16,
    pub(super) misuse: Limiter,
}

impl Front {
    /// A whole reset, as at power-on. The BARs have to be brought in line.
    pub(super) fn power_on(&mut self) {
        self.endpoint.reset();
        self.driver_reset();
        self.interrupt.set_generation(0);
    }

    /// What a driver's reset puts back.
    pub(super) fn driver_reset(&mut self) {
        self.common.reset();
        self.interrupt.reset();
    }

    fn common_write(&mut self, offset: u64, data: &[u8]) {
        match self.common.write(offset, data, &self.interrupt) {
            Effect::None => {}
            Effect::Service => self.attention.request(),
            Effect::Refused => self.misused("common configuration", offset),
        }
    }

    /// Where a doorbell in the kernel did not catch it.
    fn notify(&self, offset: u64) {
        let multiplier = u64::from(NOTIFY_MULTIPLIER);
        let kick = usize::try_from(offset / multiplier).ok().and_then(|i| self.kicks.get(i));
        match kick {
            // A full counter is a kick already.
            Some(kick) if offset.is_multiple_of(multiplier) => drop(kick.write(1)),
            _ => self.misused("notification", offset),
        }
    }

    fn misused(&self, what: &str, offset: u64) {
        if let Some(admitted) = self.misuse.admit(Instant::now()) {
            let id = self.id.as_str();
            log::warn!(device = id; "the driver's write to {what} at {offset:#x} is dropped{admitted}");
        }
    }

    /// The place in the BAR that the window capability points to, if it is one.
    fn window_target(&self) -> Option<(u64, usize)> {
        let config = self.endpoint.config();
        let offset = u64::from(config.u32_at(self.window + WINDOW_OFFSET));
        let length = config.u32_at(self.window + WINDOW_LENGTH);
        let bar = config.u16_at(self.window + WINDOW_BAR) as u8;
        let good = bar == BAR && matches!(length, 1 | 2 | 4) && offset.is_multiple_of(length.into());
        (good && offset + u64::from(length) <= BAR_SIZE).then_some((offset, length as usize))
    }
}

impl PciFunction for Front {
    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        self.endpoint.read(offset, data);
        if offset == self.window + WINDOW_DATA
            && let Some((target, length)) = self.window_target()
        {
            let mut value = [0xff; 4];
            if let Some(value) = value.get_mut(..length) {
                self.read(BAR.into(), target, value);
            }
            for (to, from) in data.iter_mut().zip(value.iter().take(length)) {
                *to = *from;
            }
        }
    }

    fn config_write(&mut self, offset: u16, data: &[u8]) -> ConfigEffect {
        if offset == self.window + WINDOW_DATA {
            match self.window_target() {
                Some((target, length)) => {
                    if let Some(value) = data.get(..length) {
                        self.write(BAR.into(), target, value);
                    }
                }
                None => self.misused("configuration access window", offset.into()),
            }
            return ConfigEffect::None;
        }
        self.endpoint.write(offset, data)
    }

    fn bar_addresses(&self) -> [Option<u64>; BARS] {
        self.endpoint.bar_addresses()
    }
}

const TABLE: u64 = MSIX_TABLE as u64;
const PENDING: u64 = MSIX_PENDING as u64;

impl BusDevice for Front {
    fn read(&mut self, _: u16, offset: u64, data: &mut [u8]) {
        match offset {
            COMMON..ISR => self.common.read(offset - COMMON, data, &self.interrupt),
            ISR..DEVICE => {
                data.fill(0);
                if let (ISR, Some(first)) = (offset, data.first_mut()) {
                    *first = self.interrupt.take_isr();
                }
            }
            DEVICE..NOTIFY => {
                data.fill(0);
                self.config.read(offset - DEVICE, data);
            }
            NOTIFY..TABLE => data.fill(0),
            TABLE.. => {
                let Some(msix) = self.endpoint.msix() else { return };
                match offset {
                    PENDING.. => msix.pending_read(offset - PENDING, data),
                    _ => msix.table_read(offset - TABLE, data),
                }
            }
        }
    }

    fn write(&mut self, _: u16, offset: u64, data: &[u8]) {
        match offset {
            COMMON..ISR => self.common_write(offset - COMMON, data),
            ISR..DEVICE => {}
            DEVICE..NOTIFY => self.config.write(offset - DEVICE, data),
            NOTIFY..TABLE => self.notify(offset - NOTIFY),
            TABLE..PENDING => {
                if let Some(msix) = self.endpoint.msix() {
                    msix.table_write(offset - TABLE, data);
                }
            }
            PENDING.. => {}
        }
    }
}

impl fmt::Debug for Front {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Front")
            .field("endpoint", &self.endpoint)
            .field("common", &self.common)
            .finish_non_exhaustive()
    }
}

/// Adds virtio's capabilities (virtio 1.3, section 4.1.4). Returns where the window is.
pub(super) fn add_capabilities(config: &mut ConfigSpace) -> Result<u16, ConfigError> {
    let area = |start: u64, len: u32| start..start + u64::from(len);
    config.add_capability(&capability(CAP_COMMON, area(COMMON, COMMON_LEN), &[]))?;
    config.add_capability(&capability(CAP_ISR, area(ISR, ISR_LEN), &[]))?;
    config.add_capability(&capability(CAP_DEVICE, area(DEVICE, DEVICE_LEN), &[]))?;
    let multiplier = NOTIFY_MULTIPLIER.to_le_bytes();
    config.add_capability(&capability(CAP_NOTIFY, area(NOTIFY, NOTIFY_LEN), &multiplier))?;
    let mut window = capability(CAP_PCI, 0..0, &[0; 4]);
    // BAR, offset and length are the driver's; the data bytes are not kept.
    window.writable = vec![0, 0, 0xff, 0, 0, 0];
    window.writable.extend([0xff; 8]);
    config.add_capability(&window)
}

/// `struct virtio_pci_cap` without its first two bytes.
fn capability(kind: u8, area: Range<u64>, tail: &[u8]) -> Capability {
    let length = 16 + tail.len() as u8;
    let mut body = vec![length, kind, BAR, 0, 0, 0];
    body.extend((area.start as u32).to_le_bytes());
    body.extend(((area.end - area.start) as u32).to_le_bytes());
    body.extend(tail);
    Capability { id: CAP_VENDOR, body, writable: Vec::new() }
}
