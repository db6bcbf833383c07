//! Devices that are nothing but registers: no thread, no queue, nothing in flight.
//!
//! One object behind one lock is both the front that the guest reaches and the back that the thread
//! owning the VM holds. [`Registers`] gives it the life cycle, [`Placed`] is its recipe.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Instant;

use vmm_device_model::bus::{BusDevice, BusTarget};
use vmm_device_model::device::{Blocker, DeviceChange, DeviceError, Lifecycle, SaveState, VmDevice};
use vmm_device_model::metrics::{Measures, Metered};
use vmm_device_model::recipe::{BuildError, Recipe, Resources};
use vmm_snapshot::RecordError;

/// A device that is nothing but its registers.
pub trait RegisterFile: BusDevice + SaveState + Metered + fmt::Debug {
    /// vCPUs are paused: time stands still for the guest from here on.
    fn pause(&mut self);
    /// Undoes [`pause`](Self::pause), also after a restore.
    fn resume(&mut self);
    /// Back to the state after power-on.
    fn reset(&mut self);
}

/// The back of a [`RegisterFile`]; its front is the same object, on a bus.
#[derive(Debug)]
pub struct Registers<D>(Arc<Mutex<D>>);

impl<D: RegisterFile> Registers<D> {
    /// The back of `device`.
    pub fn new(device: Arc<Mutex<D>>) -> Self {
        Self(device)
    }
}

impl<D: RegisterFile> Lifecycle for Registers<D> {
    fn service(&mut self) -> Result<(), DeviceError> {
        // Registers act at once and ask for nothing.
        Ok(())
    }

    fn quiesce_begin(&mut self) {
        lock(&self.0).pause();
    }

    fn quiesce_finish(&mut self, _: Instant) -> Result<(), DeviceError> {
        Ok(())
    }

    fn resume(&mut self) -> Result<(), DeviceError> {
        lock(&self.0).resume();
        Ok(())
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        lock(&self.0).reset();
        Ok(())
    }

    fn blockers(&self) -> Vec<Blocker> {
        Vec::new()
    }

    fn take_changes(&mut self) -> Vec<DeviceChange> {
        Vec::new()
    }
}

impl<D: RegisterFile> Metered for Registers<D> {
    fn measure(&self, measures: &mut Measures) {
        lock(&self.0).measure(measures);
    }
}

impl<D: RegisterFile> SaveState for Registers<D> {
    type State = D::State;

    fn save(&self) -> D::State {
        lock(&self.0).save()
    }

    fn restore(&mut self, state: D::State) -> Result<(), RecordError> {
        lock(&self.0).restore(state)
    }
}

/// Where a device's registers are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Window {
    /// Ports.
    Pio {
        /// First port.
        base: u16,
        /// Number of ports.
        len: u16,
    },
    /// Guest physical addresses.
    Mmio {
        /// First address.
        base: u64,
        /// Bytes.
        len: u64,
    },
}

impl Window {
    /// Puts region 0 of `target` here.
    pub(crate) fn map<R>(self, resources: &mut R, target: Arc<dyn BusTarget>) -> Result<(), BuildError>
    where
        R: Resources + ?Sized,
    {
        match self {
            Self::Pio { base, len } => resources.map_pio(base, len, target, 0),
            Self::Mmio { base, len } => resources.map_mmio(base, len, target, 0),
        }
    }
}

/// Recipe of a device that needs a place on a bus and nothing else.
#[derive(Debug)]
pub struct Placed<D> {
    id: String,
    window: Window,
    device: D,
}

impl<D> Placed<D> {
    pub(crate) fn new(id: impl Into<String>, window: Window, device: D) -> Self {
        Self { id: id.into(), window, device }
    }
}

impl<R, D> Recipe<R> for Placed<D>
where
    R: Resources + ?Sized,
    D: RegisterFile + 'static,
{
    fn id(&self) -> &str {
        &self.id
    }

    fn build(self: Box<Self>, resources: &mut R) -> Result<Box<dyn VmDevice>, BuildError> {
        let device = Arc::new(Mutex::new(self.device));
        self.window.map(resources, Arc::clone(&device) as _)?;
        Ok(Box::new(Registers::new(device)))
    }
}

/// A way to a device that is yet to be built, and that may be gone again.
#[derive(Debug)]
pub(crate) struct Late<D>(Arc<OnceLock<Weak<Mutex<D>>>>);

impl<D> Late<D> {
    pub(crate) fn new() -> Self {
        Self(Arc::default())
    }

    /// The device is there. Only the first call counts.
    pub(crate) fn set(&self, device: &Arc<Mutex<D>>) {
        self.0.get_or_init(|| Arc::downgrade(device));
    }

    pub(crate) fn get(&self) -> Option<Arc<Mutex<D>>> {
        self.0.get()?.upgrade()
    }
}

impl<D> Clone for Late<D> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

/// A poisoned lock is a thread that panicked; the process is about to end or is a test.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Splits an access into bytes, as the ISA bus does for 8-bit devices.
pub(crate) fn read_bytes(offset: u64, data: &mut [u8], mut read: impl FnMut(u64) -> u8) {
    for (i, byte) in (0..).zip(data) {
        *byte = read(offset.saturating_add(i));
    }
}

/// See [`read_bytes`].
pub(crate) fn write_bytes(offset: u64, data: &[u8], mut write: impl FnMut(u64, u8)) {
    for (i, byte) in (0..).zip(data) {
        write(offset.saturating_add(i), *byte);
    }
}

/// An access to part of a little-endian register: the bytes of `value` from `offset`, then zeros.
pub(crate) fn read_value(value: u64, offset: u64, data: &mut [u8]) {
    let bytes = value.to_le_bytes();
    let skip = usize::try_from(offset).unwrap_or(usize::MAX);
    let mut rest = bytes.iter().skip(skip);
    for byte in data {
        *byte = rest.next().copied().unwrap_or(0);
    }
}
