//! The end of a machine. Its memory goes back to the host and KVM waits for all that may still look at it, which takes from
//! parts of a millisecond to seconds: on a thread of its own, so that clients are served meanwhile.

use std::sync::{Arc, Mutex, PoisonError};
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
        self.0 = spawn_or_do(Builder::new().name("teardown".to_owned()), work);
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

/// Does `work` on a thread. Where there is none, here: somebody waits for it.
fn spawn_or_do(builder: Builder, work: impl FnOnce() + Send + 'static) -> Option<JoinHandle<()>> {
    let work = Arc::new(Mutex::new(Some(work)));
    let shared = Arc::clone(&work);
    let take = |work: &Mutex<Option<_>>| work.lock().unwrap_or_else(PoisonError::into_inner).take();
    match builder.spawn(move || take(&shared).into_iter().for_each(|work| work())) {
        Ok(thread) => Some(thread),
        Err(error) => {
            log::warn!("no thread to switch the machine off, so clients wait for that: {error}");
            take(&work).into_iter().for_each(|work| work());
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn who_waits_for_the_end_hears_of_it_though_there_is_no_thread() {
        // No host has so much for a stack.
        for (builder, spawned) in [(Builder::new(), true), (Builder::new().stack_size(1 << 50), false)] {
            let (to, hears) = channel();
            let thread = spawn_or_do(builder, move || to.send(()).unwrap());
            assert_eq!(thread.is_some(), spawned);
            thread.into_iter().for_each(|thread| thread.join().unwrap());
            hears.try_recv().unwrap();
        }
    }
}
