//! Where devices take the time from.

use std::fmt;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// A clock; time since its own zero.
pub trait Clock: Send + Sync + fmt::Debug {
    /// Time since this clock's zero.
    fn now(&self) -> Duration;
}

/// The host's monotonic clock, zero at its creation.
#[derive(Debug, Clone, Copy)]
pub struct Monotonic(Instant);

impl Monotonic {
    /// Zero is now.
    pub fn new() -> Self {
        Self(Instant::now())
    }
}

impl Default for Monotonic {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for Monotonic {
    fn now(&self) -> Duration {
        self.0.elapsed()
    }
}

/// The host's wall clock: UTC, zero at 1970-01-01. A host clock set before that reads as zero.
#[derive(Debug, Clone, Copy, Default)]
pub struct Utc;

impl Clock for Utc {
    fn now(&self) -> Duration {
        SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO)
    }
}
