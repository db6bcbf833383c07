//! The virtio-pci transport, modern only (virtio 1.3, section 4.1).
//!
//! The *front* (`front.rs`) is the register file behind the function's lock: negotiation, queue configuration,
//! MSI-X. It never waits and never touches the device's threads; DRIVER_OK and reset post
//! [`Attention`](vmm_device_model::device::Attention) and the status register tells. The *back*
//! ([`VirtioPci`]) belongs to the thread that owns the VM and starts, stops and resets the device with no
//! lock held. What both have to agree on is one small table: `phase.rs`.
//!
//! Queue configuration and features are frozen once the driver said DRIVER_OK: the registers are read-only
//! from then until a reset is done, and the back validates a copy.
//!
//! Kicks go through an ioeventfd per queue, and through the register file to the same eventfd where there
//! is none. Interrupts are MSI-X only; INTx (an ISR-driven line) is not offered: the interrupt pin reads 0.
//!
//! Lock order: front, then the device's configuration space or MSI-X state. Device threads take only the
//! latter.

mod common;
mod front;
mod interrupt;
mod pci;
mod phase;
mod queue;
mod recipe;
mod state;

pub use pci::VirtioPci;
pub use phase::Phase;
pub use queue::QueueError;
pub use recipe::VirtioPciRecipe;
pub use state::{QueueV1, VirtioPciV1};

/// The BAR of a virtio-pci function: one, 64-bit memory.
pub mod layout {
    /// Which BAR.
    pub const BAR: u8 = 0;
    /// Its size in bytes.
    pub const BAR_SIZE: u64 = 0x8_0000;
    /// Common configuration.
    pub const COMMON: u64 = 0;
    /// Its length.
    pub const COMMON_LEN: u32 = 56;
    /// Interrupt status.
    pub const ISR: u64 = 0x2000;
    /// Its length.
    pub const ISR_LEN: u32 = 1;
    /// Device configuration.
    pub const DEVICE: u64 = 0x4000;
    /// Its length.
    pub const DEVICE_LEN: u32 = 0x1000;
    /// Notifications: queue `i` at `i * NOTIFY_MULTIPLIER`.
    pub const NOTIFY: u64 = 0x6000;
    /// Their length.
    pub const NOTIFY_LEN: u32 = 0x1000;
    /// Bytes between the notification addresses of two queues.
    pub const NOTIFY_MULTIPLIER: u32 = 4;
    /// MSI-X table.
    pub const MSIX_TABLE: u32 = 0x8000;
    /// MSI-X pending bits.
    pub const MSIX_PENDING: u32 = 0x4_8000;
    /// Most queues that there is room for.
    pub const MAX_QUEUES: usize = (NOTIFY_LEN / NOTIFY_MULTIPLIER) as usize;
}

/// Bits of the device status register (virtio 1.3, section 2.1).
pub mod status {
    /// The guest noticed the device.
    pub const ACKNOWLEDGE: u8 = 1;
    /// It knows how to drive it.
    pub const DRIVER: u8 = 2;
    /// The driver is ready: the device runs.
    pub const DRIVER_OK: u8 = 4;
    /// Features are agreed on.
    pub const FEATURES_OK: u8 = 8;
    /// The device cannot go on.
    pub const NEEDS_RESET: u8 = 64;
    /// The driver gave up.
    pub const FAILED: u8 = 128;
}

/// Modern device (virtio 1.3, section 6); without it no driver is accepted.
pub const VIRTIO_F_VERSION_1: u64 = 1 << 32;
/// Notification suppression by index (virtio 1.3, section 6).
pub const VIRTIO_F_EVENT_IDX: u64 = 1 << 29;
/// Reads and writes as "no MSI-X vector".
pub const NO_VECTOR: u16 = 0xffff;
