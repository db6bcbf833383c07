//! The configuration of one virtqueue as its driver writes it, and the queue made of it.

use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemory, Permissions};
use vmm_device_model::dma::GuestRam;

/// Registers of one virtqueue. Foreign numbers until [`QueueConfig::build`] accepted them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct QueueConfig {
    /// Largest size; the device's, not the driver's.
    pub(super) max_size: u16,
    pub(super) size: u16,
    pub(super) enabled: bool,
    pub(super) descriptors: u64,
    pub(super) available: u64,
    pub(super) used: u64,
    /// Where the device is in the rings while it is stopped.
    pub(super) next_available: u16,
    pub(super) next_used: u16,
}

impl QueueConfig {
    pub(super) fn new(max_size: u16) -> Self {
        Self {
            max_size,
            size: max_size,
            enabled: false,
            descriptors: 0,
            available: 0,
            used: 0,
            next_available: 0,
            next_used: 0,
        }
    }

    /// The queue, if its size is one and its rings are aligned and lie in `memory`.
    pub(super) fn build(&self, memory: &GuestRam, event_index: bool) -> Result<Queue, QueueError> {
        if !size_is_valid(self.size, self.max_size) {
            return Err(QueueError::Size { size: self.size, max: self.max_size });
        }
        let size = usize::from(self.size);
        // Virtio 1.3, section 2.7: alignment and length of each part, with the event index field.
        let parts = [
            ("descriptor table", self.descriptors, 16, 16 * size, Permissions::Read),
            ("available ring", self.available, 2, 6 + 2 * size, Permissions::Read),
            ("used ring", self.used, 4, 6 + 8 * size, Permissions::Write),
        ];
        for (part, address, align, len, access) in parts {
            let in_memory = memory.check_range(GuestAddress(address), len, access);
            if !address.is_multiple_of(align) || !in_memory {
                return Err(QueueError::Address { part, address });
            }
        }
        let refused = |_| QueueError::Size { size: self.size, max: self.max_size };
        let mut queue = Queue::new(self.max_size).map_err(refused)?;
        queue.try_set_size(self.size).map_err(refused)?;
        let halves = |address: u64| (Some(address as u32), Some((address >> 32) as u32));
        let ((d0, d1), (a0, a1)) = (halves(self.descriptors), halves(self.available));
        let (u0, u1) = halves(self.used);
        queue.set_desc_table_address(d0, d1);
        queue.set_avail_ring_address(a0, a1);
        queue.set_used_ring_address(u0, u1);
        queue.set_next_avail(self.next_available);
        queue.set_next_used(self.next_used);
        queue.set_event_idx(event_index);
        queue.set_ready(true);
        Ok(queue)
    }
}

/// Whether a driver may give a queue this size (virtio 1.3, section 2.7).
pub(super) fn size_is_valid(size: u16, max: u16) -> bool {
    size.is_power_of_two() && size <= max
}

/// Why a virtqueue cannot be worked on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum QueueError {
    /// Its size is 0, no power of two, or more than the device offers.
    #[error("virtqueue size {size} is not a power of two up to {max}")]
    Size {
        /// Its size.
        size: u16,
        /// What the device offers.
        max: u16,
    },
    /// A part of it is not aligned, or not in guest memory.
    #[error("{part} at {address:#x} is not aligned or not in guest memory")]
    Address {
        /// Which part.
        part: &'static str,
        /// Guest physical address.
        address: u64,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> GuestRam {
        GuestRam::from_ranges(&[(GuestAddress(0), 0x1_0000), (GuestAddress(0x2_0000), 0x1000)]).unwrap()
    }

    fn good() -> QueueConfig {
        let addresses =
            QueueConfig { descriptors: 0x1000, available: 0x2000, used: 0x3000, ..QueueConfig::new(256) };
        QueueConfig { enabled: true, next_available: 7, next_used: 5, ..addresses }
    }

    #[test]
    fn a_good_configuration_becomes_a_queue() {
        let queue = good().build(&memory(), true).unwrap();
        assert!(queue.is_valid(&memory()));
        let state = queue.state();
        assert_eq!((state.desc_table, state.avail_ring, state.used_ring), (0x1000, 0x2000, 0x3000));
        assert_eq!(
            (state.next_avail, state.next_used, state.size, state.event_idx_enabled),
            (7, 5, 256, true)
        );
    }

    #[test]
    fn bad_sizes_are_refused() {
        for size in [0, 3, 255, 512, u16::MAX] {
            let queue = QueueConfig { size, ..good() };
            assert_eq!(queue.build(&memory(), false), Err(QueueError::Size { size, max: 256 }));
        }
    }

    #[test]
    fn parts_outside_memory_or_unaligned_are_refused() {
        // The last 4 KiB of a region; the table of 256 descriptors fits exactly, the used ring does not.
        let end = 0x1_0000 - 0x1000;
        assert!(QueueConfig { descriptors: end, ..good() }.build(&memory(), false).is_ok());
        for bad in [end + 16, 0x1008, 0x1_0000, 0x1_8000, u64::MAX - 15, 0x2_0010] {
            let queue = QueueConfig { descriptors: bad, ..good() };
            assert!(queue.build(&memory(), false).is_err(), "descriptors at {bad:#x}");
        }
        for bad in [0x2001, 0x1_0000 - 516, u64::MAX - 1] {
            let queue = QueueConfig { available: bad, ..good() };
            assert!(queue.build(&memory(), false).is_err(), "available ring at {bad:#x}");
        }
        for bad in [0x3002, 0x1_0000 - 2052, u64::MAX - 3] {
            let queue = QueueConfig { used: bad, ..good() };
            assert!(queue.build(&memory(), false).is_err(), "used ring at {bad:#x}");
        }
    }
}
