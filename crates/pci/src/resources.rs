//! What a PCI function is built from.

use vmm_device_model::recipe::{BuildError, Resources};

use crate::bdf::Bdf;
use crate::config::BarKind;
use crate::function::Attach;
use crate::host_bridge::Attachment;

/// Resources of a machine with a PCI bus. All that is taken is booked under the device's id, as in
/// [`Resources`], and given back when the device goes or its build fails: that takes the function off the
/// bus, too.
pub trait PciResources: Resources {
    /// A place on the bus, function 0: device number `slot`, or the one that the device has from
    /// saved state, or the lowest free one.
    ///
    /// # Errors
    /// The slot is taken or does not exist, or none is free.
    fn bdf(&mut self, slot: Option<u8>) -> Result<Bdf, BuildError>;

    /// A guest physical address for a BAR of `size` bytes, aligned to its size.
    ///
    /// # Errors
    /// No room in the windows.
    fn bar_address(&mut self, kind: BarKind, size: u64) -> Result<u64, BuildError>;

    /// Puts the function on the bus.
    ///
    /// # Errors
    /// See [`HostBridge::attach`](crate::host_bridge::HostBridge::attach).
    fn attach(&mut self, bdf: Bdf, attach: Attach) -> Result<Attachment, BuildError>;
}
