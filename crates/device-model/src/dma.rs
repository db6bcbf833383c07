//! How a device reaches guest memory.

use std::sync::Arc;

use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryLoadGuard, GuestMemoryMmap};

/// Guest RAM as mapped into this process, with a bitmap of the pages that this process wrote.
pub type GuestRam = GuestMemoryMmap<AtomicBitmap>;

/// What a device sees of guest memory at one moment: RAM, and nothing but RAM.
///
/// A descriptor that points at a device's registers therefore fails to resolve, by type. Hold it for one
/// batch of work, not longer: it keeps the mapping alive.
pub type DmaView = GuestMemoryLoadGuard<GuestRam>;

/// A device's handle on guest memory, replaceable under a running device.
///
/// Devices keep this and take a [`view`](Self::view) per batch of work; when memory is plugged, the next
/// view shows it. The identity mapping now; translated by an IOMMU later.
#[derive(Debug, Clone)]
pub struct DmaMemory {
    memory: GuestMemoryAtomic<GuestRam>,
}

impl DmaMemory {
    /// A handle on `memory`.
    pub fn new(memory: GuestRam) -> Self {
        Self { memory: GuestMemoryAtomic::new(memory) }
    }

    /// Guest memory as it is now.
    pub fn view(&self) -> DmaView {
        self.memory.memory()
    }

    /// Replaces what every clone of this handle will see from its next view on.
    pub fn replace(&self, memory: GuestRam) {
        // The lock serialises writers only; a poisoned one guards nothing that could be half-done.
        self.memory.lock().unwrap_or_else(std::sync::PoisonError::into_inner).replace(memory);
    }
}

impl From<Arc<GuestRam>> for DmaMemory {
    fn from(memory: Arc<GuestRam>) -> Self {
        Self { memory: GuestMemoryAtomic::from(memory) }
    }
}

impl GuestAddressSpace for DmaMemory {
    type M = GuestRam;
    type T = DmaView;

    fn memory(&self) -> Self::T {
        self.view()
    }
}
