//! The end of a machine. Its memory goes back to the host and KVM waits for all that may still look at it, which takes from
//! parts of a millisecond to seconds: on a thread of its own, so that clients are served meanwhile.

use std::thread::{Builder, JoinHandle};

use super::apart::Left;
use crate::machine::Machine;

/// What is on its way out, if anything is. There is hardly ever a second: the next machine is built after its end.
#[derive(Debug, Default)]
pub(super) struct Teardown(Option<JoinHandle<()>>);

impl Teardown {
    /// Takes `machine` apart and then calls `done`.
    pub(super) fn begin(&mut self, machine: Machine, done: impl FnOnce() + Send + 'static) {
        self.spawn(move || {
            machine.end();
            done();
        });
    }

    /// Calls `done` when the thread of a boot has ended that nobody wants any more, or is not waited for any longer.
    pub(super) fn outlast(&mut self, left: Left, done: impl FnOnce() + Send + 'static) {
        self.spawn(move || {
            left.wait();
            done();
        });
    }

    fn spawn(&mut self, work: impl FnOnce() + Send + 'static) {
        let mut before = self.take();
        let work = move || {
            before.wait();
            work();
        };
        match Builder::new().name("teardown".to_owned()).spawn(work) {
            Ok(thread) => self.0 = Some(thread),
            // The machine went with the work; who waits is told that there is no answer.
            Err(error) => log::warn!("cannot start a thread to switch the machine off: {error}"),
        }
    }

    /// Waits for its end.
    pub(super) fn wait(&mut self) {
        if let Some(thread) = self.0.take() {
            let _ = thread.join();
        }
    }

    /// Hands it over, to whoever needs what it holds.
    pub(super) fn take(&mut self) -> Self {
        std::mem::take(self)
    }
}
