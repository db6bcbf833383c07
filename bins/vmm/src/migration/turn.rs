//! How a thread that moves memory shares its processor.

use std::fs::File;
use std::num::NonZero;
use std::os::unix::fs::FileExt;
use std::thread::{available_parallelism, park_timeout};
use std::time::{Duration, Instant};

/// Linux looks anew at who runs when somebody wakes, and then at its next tick (4 ms at 250 Hz): whom it did not find next at that
/// moment, as the API's thread or its client, waits for the tick if nobody blocks. Short enough for them, and long enough to cost
/// little where somebody always waits.
const MOST: Duration = Duration::from_micros(800);

/// And how soon it is looked again whether somebody does.
const LOOK: Duration = Duration::from_micros(200);

/// Load of the host (proc_loadavg(5)). To read it takes a microsecond.
pub(crate) const LOAD: &str = "/proc/loadavg";

/// When a thread next lets others run. To yield is no way: up to Linux 6.17 it puts the thread's own deadline off, each
/// time, until it is not run for seconds.
#[derive(Debug)]
pub(super) struct Turn {
    next: Instant,
    /// Not where the host keeps it to itself.
    load: Option<File>,
    /// On which this thread may run.
    processors: usize,
}

impl Turn {
    /// Of a thread that may run where the caller may.
    pub(super) fn new() -> Self {
        let processors = available_parallelism().map_or(1, NonZero::get);
        Self { next: Instant::now() + LOOK, load: File::open(LOAD).ok(), processors }
    }

    /// Lets others run, for as short as the kernel's timers are (50 us, prctl(PR_SET_TIMERSLACK)), if it has been long enough and
    /// somebody may wait for it.
    pub(super) fn give_way(&mut self) {
        if Instant::now() < self.next {
            return;
        }
        let wanted = self.is_wanted();
        if wanted {
            park_timeout(Duration::from_nanos(1));
        }
        self.next = Instant::now() + if wanted { MOST } else { LOOK };
    }

    fn is_wanted(&self) -> bool {
        let mut text = [0; 64];
        let read = self.load.as_ref().and_then(|load| load.read_at(&mut text, 0).ok());
        let running = text.get(..read.unwrap_or(0)).and_then(running);
        running.is_none_or(|running| running > self.processors)
    }
}

/// How many threads of the host run or wait for a processor, this one included.
fn running(load: &[u8]) -> Option<usize> {
    let counts = std::str::from_utf8(load).ok()?.split(' ').nth(3)?;
    counts.split_once('/')?.0.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_load_tells_how_many_run() {
        assert_eq!(running(b"0.20 0.18 0.12 3/80 11206\n"), Some(3));
        for other in ["", "0.20 0.18 0.12", "0.20 0.18 0.12 x/80 1", "0.20 0.18 0.12 3", "\u{ff}"] {
            assert_eq!(running(other.as_bytes()), None, "{other}");
        }
        assert!(running(&std::fs::read(LOAD).unwrap()).unwrap() >= 1, "this thread");
    }

    #[test]
    fn one_that_cannot_know_gives_way() {
        let turn = |load: Option<&str>| {
            let load = load.map(|text| {
                let mut file = tempfile::tempfile().unwrap();
                std::io::Write::write_all(&mut file, text.as_bytes()).unwrap();
                file
            });
            Turn { load, processors: 2, ..Turn::new() }
        };
        assert!(turn(None).is_wanted() && turn(Some("")).is_wanted());
        assert!(turn(Some("0.20 0.18 0.12 3/80 11206\n")).is_wanted());
        assert!(!turn(Some("0.20 0.18 0.12 2/80 11206\n")).is_wanted());
    }
}
