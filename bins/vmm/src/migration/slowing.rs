//! The thread that slows vCPUs down, so that memory is written to less fast than the link carries it.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use vmm_cpu_manager::set::Brake;
use vmm_device_model::thread::{self, ThreadHook};

use super::THREAD;

/// vCPUs are kept out of the guest for a share of each. Long beside a turn of the host's scheduler, short for people.
const PERIOD: Duration = Duration::from_millis(50);

/// Slows vCPUs down while it is there.
#[derive(Debug)]
pub(crate) struct Slowing {
    percent: Option<Sender<u8>>,
    thread: Option<JoinHandle<()>>,
}

impl Slowing {
    /// Begins with nothing.
    ///
    /// # Errors
    /// There is no thread to be had.
    pub(crate) fn start(threads: &Arc<dyn ThreadHook>, brake: Brake) -> io::Result<Self> {
        let (percent, percents) = channel();
        let thread = thread::spawn(threads, THREAD, "migration-slow", move || run(&brake, &percents))?;
        Ok(Self { percent: Some(percent), thread: Some(thread) })
    }

    /// Takes so many percent of their time from the vCPUs.
    pub(crate) fn set(&self, percent: u8) {
        if let Some(to) = &self.percent {
            let _ = to.send(percent);
        }
    }
}

impl Drop for Slowing {
    fn drop(&mut self) {
        self.percent = None;
        if let Some(thread) = self.thread.take() {
            // It sees that at once.
            let _ = thread.join();
        }
    }
}

fn run(brake: &Brake, percents: &Receiver<u8>) {
    let mut percent = 0;
    loop {
        match percents.recv_timeout(PERIOD) {
            Ok(new) => percent = new,
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
        if percent > 0 {
            brake.rest(share(percent));
        }
    }
}

/// How long vCPUs rest in a period.
fn share(percent: u8) -> Duration {
    PERIOD * u32::from(percent.min(99)) / 100
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_of_each_period_is_left() {
        assert_eq!((share(0), share(20), share(50)), (Duration::ZERO, PERIOD / 5, PERIOD / 2));
        assert!(share(99) < PERIOD && share(255) == share(99));
    }
}
