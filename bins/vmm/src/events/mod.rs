//! Where the VMM's events go: into the journal of the API's stream, and into the contract's event monitor.

mod monitor;
mod pace;

use std::time::{Instant, SystemTime};

use vmm_api::events::{Event, Journal, Stamp, stream_line};

pub use monitor::{Monitor, MonitorError, MonitorTarget};
use pace::Line;

/// An event that is about no machine.
pub const NO_MACHINE: u64 = 0;

/// Tells events. Cloned freely, used from any thread, never blocks.
#[derive(Clone, Debug)]
pub struct Events {
    start: Instant,
    stream: Journal,
    monitor: Option<Journal>,
}

impl Events {
    /// Events from now on, without an event monitor.
    #[must_use]
    pub fn new() -> Self {
        Self { start: Instant::now(), stream: Journal::default(), monitor: None }
    }

    /// The same with an event monitor, which reads the journal.
    #[must_use]
    pub fn with_monitor(self, monitor: Option<Journal>) -> Self {
        Self { monitor, ..self }
    }

    /// Tells that `event` happened to the machine of this number, or to [none](NO_MACHINE).
    pub fn tell(&self, machine: u64, event: &Event) {
        if let Some(monitor) = &self.monitor
            && event.kind().monitor.is_some()
        {
            monitor.push(|_| Line::of(self.start.elapsed(), event).map(Line::packed).unwrap_or_default());
        }
        self.stream.push(|seq| {
            // Before 1970 there is no time to tell.
            let time = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
            stream_line(&Stamp { seq, time, machine }, event)
        });
    }

    /// What the stream of the API reads.
    #[must_use]
    pub fn stream(&self) -> Journal {
        self.stream.clone()
    }
}

impl Default for Events {
    fn default() -> Self {
        Self::new()
    }
}
