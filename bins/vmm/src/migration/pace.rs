//! The operator's limit of bandwidth.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use vmm_migration_protocol::Pacer;

/// Shared by all that write to connections of a session.
#[derive(Debug)]
pub(super) struct Pace {
    began: Instant,
    pacer: Mutex<Pacer>,
}

impl Pace {
    /// Of so many bytes per second; 0 is no limit.
    pub(super) fn new(limit: u64) -> Self {
        Self { began: Instant::now(), pacer: Mutex::new(Pacer::new(limit)) }
    }

    /// When `bytes` may be sent.
    pub(super) fn take(&self, bytes: u64) -> Instant {
        let mut pacer = self.pacer.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let wait = pacer.take(now.duration_since(self.began), bytes);
        // A day is as good as never: whoever waits looks up often.
        now + wait.min(Duration::from_secs(24 * 3600))
    }
}

impl Default for Pace {
    fn default() -> Self {
        Self::new(0)
    }
}
