//! What a virtio device is to its transport.
//!
//! A device runs or it does not. [`VirtioDevice::start`] hands it its queues; it works on them in threads
//! of its own until [`VirtioDevice::stop_begin`] and [`VirtioDevice::stop_finish`] take them back with
//! nothing in flight. Pause, snapshot and reset are all a stop; resume and restore are all a start. So there
//! is one owner of a queue at any time, and no state to keep in step.

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use virtio_queue::Queue;
use vmm_device_model::device::{Blocker, DeviceError, SaveRecord};
use vmm_device_model::dma::DmaMemory;
use vmm_device_model::metrics::Metered;
use vmm_sys_util::eventfd::EventFd;

/// A virtio device behind any transport. All methods are called by the thread that owns the VM.
pub trait VirtioDevice: SaveRecord + Metered + Send + fmt::Debug {
    /// Device ID (virtio 1.3, section 5).
    fn device_type(&self) -> u32;

    /// Feature bits offered, `VIRTIO_F_VERSION_1` among them.
    fn features(&self) -> u64;

    /// Largest size of each virtqueue, in descriptors; its length is the number of queues.
    fn queue_sizes(&self) -> Vec<u16>;

    /// The device configuration space, as vCPUs reach it without asking the device's owner.
    fn config(&self) -> Arc<dyn DeviceConfig>;

    /// Works from now on, and looks at every queue once at the start: a kick may have come before.
    ///
    /// # Errors
    /// The device does not run; the transport sets `DEVICE_NEEDS_RESET`.
    fn start(&mut self, start: Start) -> Result<(), DeviceError>;

    /// Takes no new request from now on. No effect when not started.
    fn stop_begin(&mut self);

    /// Waits until nothing is in flight and gives the queues back, in the order of `start`.
    ///
    /// # Errors
    /// Requests were still in flight at `deadline`; may be called again.
    fn stop_finish(&mut self, deadline: Instant) -> Result<Vec<Queue>, DeviceError>;

    /// The device's own state back to power-on. Stopped before.
    fn reset(&mut self);

    /// See [`vmm_device_model::device::Lifecycle::blockers`].
    fn blockers(&self) -> Vec<Blocker>;
}

/// What a device gets when its driver is ready (DRIVER_OK), or when it resumes.
#[derive(Debug)]
pub struct Start {
    /// Guest memory.
    pub memory: DmaMemory,
    /// Feature bits that both sides agreed on.
    pub features: u64,
    /// The queues that the driver enabled.
    pub queues: Vec<StartQueue>,
    /// How the driver is interrupted.
    pub interrupt: Arc<dyn VirtioInterrupt>,
}

/// One enabled virtqueue.
#[derive(Debug)]
pub struct StartQueue {
    /// Index among all of the device's queues.
    pub index: u16,
    /// The queue, its addresses validated against guest memory.
    pub queue: Queue,
    /// Readable after the driver kicked the queue.
    pub kick: EventFd,
}

/// Interrupts from a device to its driver.
pub trait VirtioInterrupt: Send + Sync + fmt::Debug {
    /// Buffers of queue `index` were used.
    fn queue(&self, index: u16);
    /// The configuration space changed.
    fn config_changed(&self);
}

/// A device configuration space (virtio 1.3, section 2.5). Any offset and length can come from the guest.
pub trait DeviceConfig: Send + Sync {
    /// Fills `data` from `offset`; what lies past the end stays 0.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Takes a write; what is not writable is dropped.
    fn write(&self, offset: u64, data: &[u8]);
}
