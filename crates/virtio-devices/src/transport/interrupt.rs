//! Interrupts of a virtio-pci device: MSI-X vectors, the ISR byte, the configuration generation.

use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use vmm_device_model::metrics::Padded;
use vmm_pci::msix::MsixTrigger;

use super::NO_VECTOR;
use crate::device::VirtioInterrupt;

const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// What device threads and the front share without the front's lock.
#[derive(Debug)]
pub(super) struct PciInterrupt {
    msix: MsixTrigger,
    /// How many vectors there are; each of the fields below is less, or [`NO_VECTOR`].
    vectors: u16,
    config_vector: AtomicU16,
    queues: Vec<Padded<QueueInterrupt>>,
    isr: AtomicU8,
    generation: AtomicU8,
}

/// What a queue's thread touches for an interrupt.
#[derive(Debug)]
struct QueueInterrupt {
    vector: AtomicU16,
    /// Interrupts so far, masked ones among them.
    raised: AtomicU64,
}

impl PciInterrupt {
    pub(super) fn new(msix: MsixTrigger, vectors: u16, queues: usize) -> Self {
        let queue = || QueueInterrupt { vector: AtomicU16::new(NO_VECTOR), raised: AtomicU64::new(0) };
        Self {
            msix,
            vectors,
            config_vector: AtomicU16::new(NO_VECTOR),
            queues: (0..queues).map(|_| Padded(queue())).collect(),
            isr: AtomicU8::new(0),
            generation: AtomicU8::new(0),
        }
    }

    /// Whether a driver may write this to a vector register.
    pub(super) fn knows(&self, vector: u16) -> bool {
        vector < self.vectors || vector == NO_VECTOR
    }

    pub(super) fn config_vector(&self) -> u16 {
        self.config_vector.load(Ordering::Relaxed)
    }

    /// A vector that does not exist reads back as [`NO_VECTOR`]: the driver sees that it failed.
    pub(super) fn set_config_vector(&self, vector: u16) {
        self.config_vector.store(if self.knows(vector) { vector } else { NO_VECTOR }, Ordering::Relaxed);
    }

    pub(super) fn queue_vector(&self, queue: usize) -> u16 {
        self.queues.get(queue).map_or(NO_VECTOR, |queue| queue.vector.load(Ordering::Relaxed))
    }

    /// See [`set_config_vector`](Self::set_config_vector).
    pub(super) fn set_queue_vector(&self, queue: usize, vector: u16) {
        if let Some(queue) = self.queues.get(queue) {
            queue.vector.store(if self.knows(vector) { vector } else { NO_VECTOR }, Ordering::Relaxed);
        }
    }

    /// The ISR byte; reading it clears it.
    pub(super) fn take_isr(&self) -> u8 {
        self.isr.swap(0, Ordering::Relaxed)
    }

    pub(super) fn isr(&self) -> u8 {
        self.isr.load(Ordering::Relaxed)
    }

    pub(super) fn set_isr(&self, isr: u8) {
        self.isr.store(isr & (ISR_QUEUE | ISR_CONFIG), Ordering::Relaxed);
    }

    pub(super) fn generation(&self) -> u8 {
        self.generation.load(Ordering::Acquire)
    }

    pub(super) fn set_generation(&self, generation: u8) {
        self.generation.store(generation, Ordering::Release);
    }

    /// The driver reset the device: no vectors, nothing to tell. The generation goes on counting.
    pub(super) fn reset(&self) {
        self.set_config_vector(NO_VECTOR);
        for queue in &self.queues {
            queue.vector.store(NO_VECTOR, Ordering::Relaxed);
        }
        self.isr.store(0, Ordering::Relaxed);
    }

    /// Interrupts for every queue that has a vector.
    pub(super) fn interrupt_all(&self) {
        let vectors = self.queues.iter().map(|queue| queue.vector.load(Ordering::Relaxed));
        vectors.filter(|vector| *vector != NO_VECTOR).for_each(|vector| self.msix.trigger(vector));
    }

    /// Interrupts of each queue so far.
    pub(super) fn raised(&self) -> impl Iterator<Item = u64> + '_ {
        self.queues.iter().map(|queue| queue.raised.load(Ordering::Relaxed))
    }

    fn raise(&self, vector: u16, isr: u8) {
        if vector == NO_VECTOR {
            // For a driver that polls the ISR byte.
            self.isr.fetch_or(isr, Ordering::Relaxed);
        } else {
            self.msix.trigger(vector);
        }
    }
}

impl VirtioInterrupt for PciInterrupt {
    fn queue(&self, index: u16) {
        if let Some(queue) = self.queues.get(usize::from(index)) {
            // Several threads may raise it; beside the interrupt itself the locked addition is nothing.
            queue.raised.fetch_add(1, Ordering::Relaxed);
            self.raise(queue.vector.load(Ordering::Relaxed), ISR_QUEUE);
        }
    }

    fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        self.raise(self.config_vector(), ISR_CONFIG);
    }
}
