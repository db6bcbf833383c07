//! How a thread that moves memory shares its processor.

use std::thread::park_timeout;
use std::time::{Duration, Instant};

/// Linux looks anew at who runs when somebody wakes, and then at its next tick (4 ms at 250 Hz): whom it did not find next at that
/// moment, as the API's thread or its client, waits for the tick if nobody blocks. Short enough for them, and long enough to cost
/// little.
const MOST: Duration = Duration::from_micros(800);

/// The time since a thread last let others run. To yield is no way: up to Linux 6.17 it puts the thread's own deadline off, each
/// time, until it is not run for seconds.
#[derive(Debug)]
pub(super) struct Turn(Instant);

impl Default for Turn {
    /// It begins now.
    fn default() -> Self {
        Self(Instant::now())
    }
}

impl Turn {
    /// Lets others run, for as short as the kernel's timers are (50 us, prctl(PR_SET_TIMERSLACK)), if it has been long enough.
    pub(super) fn give_way(&mut self) {
        if self.0.elapsed() >= MOST {
            park_timeout(Duration::from_nanos(1));
            *self = Self::default();
        }
    }
}
