//! Parts of a machine, tried without one.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;

use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm_api::spec::{DiskSpec, MachineSpec};
use vmm_disk_image::OpenError;
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

/// Opens the images of `disks`, each as if those before it were locked already. No lock is taken: a boot may be about to.
pub(crate) fn disks(disks: &[DiskSpec]) -> Vec<Result<(), OpenError>> {
    let mut before = Vec::new();
    disks.iter().map(|disk| open(disk, &mut before)).collect()
}

/// Opens one, and adds it to what was opened `before`: files, and whether they are only read.
fn open(spec: &DiskSpec, before: &mut Vec<((u64, u64), bool)>) -> Result<(), OpenError> {
    let path = || spec.image.path.clone();
    open_image(spec, Locks::Later)?.check_lock().map_err(|source| match source.kind() {
        ErrorKind::WouldBlock => OpenError::Locked { path: path() },
        _ => OpenError::Lock { path: path(), source },
    })?;
    let file = fs::metadata(path()).map_err(|source| OpenError::Open { path: path(), source })?;
    let (file, shared) = ((file.dev(), file.ino()), spec.image.readonly);
    if before.iter().any(|(other, read)| *other == file && !(*read && shared)) {
        return Err(OpenError::Locked { path: path() });
    }
    before.push((file, shared));
    Ok(())
}
