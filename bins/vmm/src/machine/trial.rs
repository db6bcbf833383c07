//! Parts of a machine, tried without one.

use std::sync::Arc;

use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm_api::spec::{DiskSpec, MachineSpec};
use vmm_disk_image::Disk;
use vmm_memory_manager::layout::Layout;

use super::Locks;
use super::kernel::{BootError, Payload, load_kernel};
use super::recipes::open_image;

/// Loads what a guest would boot into scratch memory. What fails comes with its field of the payload.
///
/// Memory that a loader does not touch costs nothing.
pub(crate) fn payload(spec: &MachineSpec) -> Vec<(&'static str, BootError)> {
    let payload = Payload::of(spec);
    let mut faults: Vec<(&'static str, BootError)> = payload.unreadable();
    if !faults.is_empty() {
        return faults;
    }
    let sizes: Vec<u64> = spec.memory.zones.iter().map(|zone| zone.size.get()).collect();
    // What is wrong with the memory is told elsewhere.
    let Ok(layout) = Layout::new(&sizes, spec.cpus.max_phys_bits) else { return faults };
    let ranges: Vec<_> = layout
        .ram
        .iter()
        .filter_map(|piece| Some((GuestAddress(piece.range.start), usize::try_from(piece.range.size).ok()?)))
        .collect();
    let Ok(memory) = GuestMemoryMmap::<()>::from_ranges(&ranges) else { return faults };
    if let Err(error) = load_kernel(&payload, &memory, &layout, None) {
        faults.push((error.field(), error));
    }
    faults
}

/// Opens and locks a disk's image, until what comes back is dropped.
pub(crate) fn disk(spec: &DiskSpec) -> Result<Arc<dyn Disk>, vmm_disk_image::OpenError> {
    open_image(spec, Locks::Now)
}
