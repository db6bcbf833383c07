//! The common configuration structure (virtio 1.3, section 4.1.4.3).

use super::interrupt::PciInterrupt;
use super::layout::COMMON_LEN;
use super::phase::{Event, Phase};
use super::queue::{QueueConfig, size_is_valid};
use super::status::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FAILED, FEATURES_OK, NEEDS_RESET};
use super::{NO_VECTOR, VIRTIO_F_VERSION_1};

/// Bits that a driver can set; DEVICE_NEEDS_RESET is the device's.
const DRIVER_BITS: u8 = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED;

/// Negotiation and queue configuration; vectors and generation live in [`PciInterrupt`].
#[derive(Debug)]
pub(super) struct Common {
    pub(super) offered: u64,
    pub(super) device_feature_select: u32,
    pub(super) driver_feature_select: u32,
    pub(super) driver_features: u64,
    pub(super) status: u8,
    pub(super) phase: Phase,
    pub(super) queue_select: u16,
    pub(super) queues: Vec<QueueConfig>,
}

/// What a register write asks of the back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Effect {
    None,
    /// The phase changed to one that the back has to work on.
    Service,
    /// The write makes no sense; it was dropped.
    Refused,
}

impl Common {
    pub(super) fn new(offered: u64, queue_sizes: &[u16]) -> Self {
        Self {
            offered,
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            status: 0,
            phase: Phase::Reset,
            queue_select: 0,
            queues: queue_sizes.iter().map(|max| QueueConfig::new(*max)).collect(),
        }
    }

    /// Any offset and width; zeros past the end.
    pub(super) fn read(&self, offset: u64, data: &mut [u8], interrupt: &PciInterrupt) {
        let image = self.image(interrupt);
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let bytes = image.iter().skip(start).copied().chain(std::iter::repeat(0));
        for (to, from) in data.iter_mut().zip(bytes) {
            *to = from;
        }
    }

    /// A register is written whole, 64-bit ones also by halves; other writes are refused.
    pub(super) fn write(&mut self, offset: u64, data: &[u8], interrupt: &PciInterrupt) -> Effect {
        let value = data.iter().rev().take(8).fold(0, |value, byte| value << 8 | u64::from(*byte));
        let narrow = value as u16;
        match (offset, data.len()) {
            (0, 4) => self.device_feature_select = value as u32,
            (8, 4) => self.driver_feature_select = value as u32,
            (12, 4) => return self.set_driver_features(value as u32),
            (16, 2) if self.phase == Phase::Configuring => interrupt.set_config_vector(narrow),
            (20, 1) => return self.set_status(value as u8),
            (22, 2) => self.queue_select = narrow,
            (24..56, _) => return self.write_queue(offset, data.len(), value, interrupt),
            // Drivers withdraw vectors after a reset, when they are gone already.
            (16, 2) if narrow == NO_VECTOR => {}
            _ => return Effect::Refused,
        }
        Effect::None
    }

    /// An event from the back; what it means for the status register.
    pub(super) fn advance(&mut self, event: Event) {
        let before = self.phase;
        self.phase = before.next(event);
        if before != self.phase && self.phase == Phase::Failed {
            self.status |= NEEDS_RESET;
        }
    }

    /// To power-on values, status 0.
    pub(super) fn reset(&mut self) {
        let max_sizes: Vec<u16> = self.queues.iter().map(|q| q.max_size).collect();
        *self = Self::new(self.offered, &max_sizes);
    }

    /// Features that both sides agreed on.
    pub(super) fn agreed(&self) -> u64 {
        self.driver_features & self.offered
    }

    fn set_driver_features(&mut self, half: u32) -> Effect {
        if self.phase != Phase::Configuring || self.status & FEATURES_OK != 0 {
            return Effect::Refused;
        }
        let half = u64::from(half);
        match self.driver_feature_select {
            0 => self.driver_features = self.driver_features & !0xffff_ffff | half,
            1 => self.driver_features = self.driver_features & 0xffff_ffff | half << 32,
            // Bits that do not exist; a driver may write zeros.
            _ if half == 0 => {}
            _ => return Effect::Refused,
        }
        Effect::None
    }

    fn set_status(&mut self, value: u8) -> Effect {
        if value == 0 {
            return self.driver_event(Event::ResetWritten);
        }
        if self.phase == Phase::Resetting {
            return Effect::Refused;
        }
        // Bits are only ever added.
        let mut added = value & DRIVER_BITS & !self.status;
        if added & FEATURES_OK != 0 && !self.features_acceptable() {
            added &= !FEATURES_OK;
        }
        let driver_ok = added & DRIVER_OK != 0 && (self.status | added) & FEATURES_OK != 0;
        if !driver_ok {
            added &= !DRIVER_OK;
        }
        self.status |= added;
        if self.status == 0 {
            return Effect::Refused;
        }
        let status = self.driver_event(Event::StatusWritten);
        if driver_ok { self.driver_event(Event::DriverOk) } else { status }
    }

    /// Whether a driver may go on with the features that it wrote.
    pub(super) fn features_acceptable(&self) -> bool {
        let accepted = self.driver_features;
        accepted & !self.offered == 0 && accepted & VIRTIO_F_VERSION_1 != 0
    }

    fn driver_event(&mut self, event: Event) -> Effect {
        let before = self.phase;
        self.phase = before.next(event);
        if self.phase == Phase::Reset {
            self.reset();
        }
        let work = matches!(self.phase, Phase::Starting | Phase::Resetting);
        if work && self.phase != before { Effect::Service } else { Effect::None }
    }

    fn write_queue(&mut self, offset: u64, len: usize, value: u64, interrupt: &PciInterrupt) -> Effect {
        let select = usize::from(self.queue_select);
        let open = self.phase == Phase::Configuring;
        let Some(queue) = self.queues.get_mut(select).filter(|q| open && !q.enabled) else {
            let withdrawn = (offset, len, value as u16) == (26, 2, NO_VECTOR);
            return if withdrawn { Effect::None } else { Effect::Refused };
        };
        let half = |whole: u64, high: bool| {
            if high { whole & 0xffff_ffff | value << 32 } else { whole & !0xffff_ffff | value }
        };
        match (offset, len) {
            (24, 2) if size_is_valid(value as u16, queue.max_size) => queue.size = value as u16,
            (26, 2) => interrupt.set_queue_vector(select, value as u16),
            (28, 2) if value == 1 => queue.enabled = true,
            (32 | 36, 4) => queue.descriptors = half(queue.descriptors, offset == 36),
            (40 | 44, 4) => queue.available = half(queue.available, offset == 44),
            (48 | 52, 4) => queue.used = half(queue.used, offset == 52),
            (32, 8) => queue.descriptors = value,
            (40, 8) => queue.available = value,
            (48, 8) => queue.used = value,
            _ => return Effect::Refused,
        }
        Effect::None
    }

    /// All registers as they read now, in order.
    fn image(&self, interrupt: &PciInterrupt) -> Vec<u8> {
        let half = |features: u64, select: u32| match select {
            0 => features as u32,
            1 => (features >> 32) as u32,
            _ => 0,
        };
        let select = usize::from(self.queue_select);
        let queue = self.queues.get(select);
        let get = |field: fn(&QueueConfig) -> u64| queue.map_or(0, field);
        let mut image = Vec::with_capacity(COMMON_LEN as usize);
        image.extend(self.device_feature_select.to_le_bytes());
        image.extend(half(self.offered, self.device_feature_select).to_le_bytes());
        image.extend(self.driver_feature_select.to_le_bytes());
        image.extend(half(self.driver_features, self.driver_feature_select).to_le_bytes());
        image.extend(interrupt.config_vector().to_le_bytes());
        image.extend((self.queues.len() as u16).to_le_bytes());
        image.extend([self.status, interrupt.generation()]);
        image.extend(self.queue_select.to_le_bytes());
        image.extend((get(|q| q.size.into()) as u16).to_le_bytes());
        image.extend(interrupt.queue_vector(select).to_le_bytes());
        image.extend((get(|q| q.enabled.into()) as u16).to_le_bytes());
        // The notification offset of a queue is its index.
        image.extend(queue.map_or(0, |_| self.queue_select).to_le_bytes());
        image.extend(get(|q| q.descriptors).to_le_bytes());
        image.extend(get(|q| q.available).to_le_bytes());
        image.extend(get(|q| q.used).to_le_bytes());
        image
    }
}
