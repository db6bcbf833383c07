//! The life cycle of a device and its saved state.
//!
//! A device has two faces. The *front* is what the guest touches: register files on a bus
//! ([`BusTarget`](crate::bus::BusTarget)), each behind a small lock of its own. The *back*, a
//! [`VmDevice`], belongs to the thread that owns the VM, which alone calls the methods below. A front
//! never waits for its back: it posts [`Attention`] and lets a status register tell.
//!
//! ```text
//! built -> running <-> quiescing -> quiesced -> (save | restore | reset) -> running
//! ```

use std::fmt;
use std::time::Instant;

use vmm_snapshot::{Record, RecordError, Schema};

use crate::metrics::Metered;

/// What the thread that owns the VM does with a device. Every step is a decision: nothing has a default.
///
/// A method must not wait for a vCPU, and must not hold the front's lock while it waits for a thread.
pub trait Lifecycle: Send {
    /// Does what the guest asked for through registers (activation, reset), after [`Attention::request`].
    ///
    /// # Errors
    /// An activation failed. That shows in the device's status register; the error is for the log.
    fn service(&mut self) -> Result<(), DeviceError>;

    /// Starts no new work from now on; what is in flight goes on. vCPUs are paused.
    fn quiesce_begin(&mut self);

    /// Waits until nothing is in flight.
    ///
    /// # Errors
    /// Work is still in flight at `deadline`; the device stays quiescing, and [`resume`](Self::resume)
    /// brings it back.
    fn quiesce_finish(&mut self, deadline: Instant) -> Result<(), DeviceError>;

    /// Works again, after quiescing or a restore; rings that were active are looked at at once.
    ///
    /// # Errors
    /// What the device works with (a thread, a backend) could not be had again; it stays at rest.
    fn resume(&mut self) -> Result<(), DeviceError>;

    /// Back to the state after power-on. Quiesced before.
    ///
    /// # Errors
    /// What the device works with could not be brought back; it is of no use then.
    fn reset(&mut self) -> Result<(), DeviceError>;

    /// What stands against a snapshot, a migration or an unplug of the device, now.
    fn blockers(&self) -> Vec<Blocker>;

    /// What became of the device since the last call, oldest first: by its guest's will, not by the steps above.
    fn take_changes(&mut self) -> Vec<DeviceChange>;
}

/// What a guest made of a device, for whoever watches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum DeviceChange {
    /// Its driver has set it up, and it works.
    Activated,
    /// Its driver has reset it, which was active.
    Reset,
    /// It cannot work as its driver set it up, and waits for a reset.
    NeedsReset,
}

/// A device's saved state, as the device's own type.
pub trait SaveState {
    /// The newest version of the state.
    type State: Schema;

    /// The state. The device is quiesced. Implementations destructure themselves exhaustively, so that a
    /// new field does not compile until somebody decides whether it is saved.
    fn save(&self) -> Self::State;

    /// Takes the state over. The device is freshly built from the same configuration, or reset.
    ///
    /// # Errors
    /// The state is impossible for this device. It may be half-restored then: the VM is dropped.
    fn restore(&mut self, state: Self::State) -> Result<(), RecordError>;
}

/// [`SaveState`] without the type, for who keeps many devices.
pub trait SaveRecord {
    /// The state as a record.
    fn save_record(&self) -> Record;
    /// Takes a record over.
    ///
    /// # Errors
    /// As [`Record::parse`] and [`SaveState::restore`].
    fn restore_record(&mut self, record: &Record) -> Result<(), RecordError>;
}

impl<T: SaveState> SaveRecord for T {
    fn save_record(&self) -> Record {
        Record::of(&self.save())
    }

    fn restore_record(&mut self, record: &Record) -> Result<(), RecordError> {
        self.restore(record.parse()?)
    }
}

/// A device as the thread that owns the VM sees it.
pub trait VmDevice: Lifecycle + SaveRecord + Metered + fmt::Debug {}

impl<T: Lifecycle + SaveRecord + Metered + fmt::Debug> VmDevice for T {}

/// Asks the thread that owns the VM to call [`Lifecycle::service`] on one device; given to its front.
///
/// Never blocks; requests before the call coalesce into one.
pub trait Attention: Send + Sync + fmt::Debug {
    /// Posts the request.
    fn request(&self);
}

/// What something stands against.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Blocks {
    /// Snapshots (and, for the state is the same, migration).
    Snapshot,
    /// Migration only.
    Migration,
    /// Removal of the device.
    Unplug,
}

/// A reason why a device cannot take part in something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blocker {
    /// What is blocked.
    pub blocks: Blocks,
    /// Why, as a sentence that a user can act on.
    pub reason: String,
}

/// A step of a device's life cycle went wrong.
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
pub struct DeviceError {
    what: String,
    #[source]
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl DeviceError {
    /// An error without a deeper cause.
    pub fn new(what: impl Into<String>) -> Self {
        Self { what: what.into(), source: None }
    }

    /// An error that `source` caused.
    pub fn caused(
        what: impl Into<String>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self { what: what.into(), source: Some(source.into()) }
    }
}
