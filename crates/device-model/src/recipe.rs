//! From a checked configuration to a device: recipes and the resources they are built from.

use std::fmt;
use std::io;
use std::sync::Arc;

use crate::bus::{BusError, BusTarget};
use crate::device::{Attention, VmDevice};
use crate::dma::DmaMemory;
use crate::interrupt::{InterruptLine, MsiVectors};
use crate::thread::ThreadHook;

/// A device that can be built: checked configuration, with files and sockets already open.
///
/// `R` is what it is built from: [`Resources`] for a platform device, more for a PCI function.
pub trait Recipe<R: ?Sized>: Send + fmt::Debug {
    /// The device's id, unique in the VM; the key of its saved state.
    fn id(&self) -> &str;

    /// Builds the device and puts its registers where the guest finds them.
    ///
    /// # Errors
    /// Something could not be had. What was taken from `resources` until then is given back by its owner.
    fn build(self: Box<Self>, resources: &mut R) -> Result<Box<dyn VmDevice>, BuildError>;
}

/// What a device is built from. All that is taken is booked under the device's id and shows in the
/// device tree; when the device goes, or its build fails, it is given back.
pub trait Resources {
    /// Puts `target`'s region number `region` at ports `base` to `base + len - 1`.
    ///
    /// # Errors
    /// Something answers there already.
    fn map_pio(
        &mut self,
        base: u16,
        len: u16,
        target: Arc<dyn BusTarget>,
        region: u16,
    ) -> Result<(), BuildError>;

    /// Puts `target`'s region number `region` at guest physical addresses `base` to `base + len - 1`.
    ///
    /// # Errors
    /// Something answers there already.
    fn map_mmio(
        &mut self,
        base: u64,
        len: u64,
        target: Arc<dyn BusTarget>,
        region: u16,
    ) -> Result<(), BuildError>;

    /// Pin `gsi` of the interrupt controller.
    ///
    /// # Errors
    /// No such pin, or it is taken.
    fn interrupt_line(&mut self, gsi: u32) -> Result<Arc<dyn InterruptLine>, BuildError>;

    /// A block of `count` MSI vectors.
    ///
    /// # Errors
    /// None left.
    fn msi_vectors(&mut self, count: u16) -> Result<Arc<dyn MsiVectors>, BuildError>;

    /// Guest memory.
    fn dma(&self) -> DmaMemory;

    /// How the device's front calls for the thread that owns the VM.
    fn attention(&self) -> Arc<dyn Attention>;

    /// What every thread of the device goes through before it begins.
    fn threads(&self) -> Arc<dyn ThreadHook>;
}

/// Why a device could not be built.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// An address range is taken or impossible.
    #[error("cannot place the device's registers")]
    Bus(#[from] BusError),
    /// A resource of which there are only so many.
    #[error("no {what} left")]
    Exhausted {
        /// What there is none of, e.g. `MSI vectors`.
        what: &'static str,
    },
    /// A resource that another device has.
    #[error("{what} is taken")]
    Taken {
        /// What was asked for, e.g. `GSI 4`.
        what: String,
    },
    /// The operating system or the hypervisor refused.
    #[error("cannot {what}")]
    Io {
        /// What was attempted.
        what: &'static str,
        /// The refusal.
        #[source]
        source: io::Error,
    },
    /// The device's own reason.
    #[error("{what}")]
    Device {
        /// What was attempted.
        what: String,
        /// The cause.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}
