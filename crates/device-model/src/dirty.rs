//! Sources of dirty guest pages.

/// Somebody who knows which guest pages were written by other than a vCPU: a vhost backend's log, an
/// out-of-process device.
///
/// Writes through [`DmaMemory`](crate::dma::DmaMemory) are seen by its own bitmap and need no source.
pub trait DirtySource: Send + Sync {
    /// Reports and forgets every dirty range since the last call, as guest physical address and bytes.
    ///
    /// # Errors
    /// The source could not be asked; nothing was forgotten.
    fn take(&self, mark: &mut dyn FnMut(u64, u64)) -> std::io::Result<()>;
}
