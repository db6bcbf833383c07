//! Guest misbehaviour is logged once.

use std::sync::atomic::{AtomicBool, Ordering};

/// Lets the first of many equal messages through, so that a guest cannot flood the log.
///
/// ```
/// let once = vmm_device_model::once::Once::new();
/// assert!(once.first());
/// assert!(!once.first());
/// ```
#[derive(Debug, Default)]
pub struct Once(AtomicBool);

impl Once {
    /// Nothing logged yet.
    pub const fn new() -> Self {
        Self(AtomicBool::new(false))
    }

    /// Whether this is the first call.
    pub fn first(&self) -> bool {
        !self.0.swap(true, Ordering::Relaxed)
    }
}
