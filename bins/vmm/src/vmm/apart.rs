//! Threads beside the control thread: of a boot or restore, of a snapshot, of a receiver. Files that they open and read may be on a
//! file system that does not answer, so nobody who wants their end has to wait for it: then they are left to themselves.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use vmm_device_model::thread::{self, ThreadHook, ThreadKind};

use super::restore::{LoadError, Loaded};
use crate::machine::stages::Stages;
use crate::machine::{EventPost, Machine, MachineError, MachineEvent};

/// How long a thread that nobody wants any more is waited for. Longer takes what holds nothing up: a file that does not answer, or
/// a lot of memory to be touched.
pub(crate) const PATIENCE: Duration = Duration::from_secs(3);

/// A thread that is waited for only so long as is worth while.
#[derive(Debug)]
pub(super) struct Apart {
    handle: JoinHandle<()>,
    /// Says nothing, and ends with it.
    ended: Receiver<Infallible>,
}

impl Apart {
    /// Does `work` on one of `kind`.
    pub(super) fn start(
        hook: &Arc<dyn ThreadHook>,
        kind: ThreadKind,
        work: impl FnOnce() + Send + 'static,
    ) -> io::Result<Self> {
        let (alive, ended) = channel();
        let work = move || {
            let _alive: Sender<Infallible> = alive;
            work();
        };
        Ok(Self { handle: thread::spawn(hook, kind, kind.0, work)?, ended })
    }

    /// Waits for its end, which it has said is near.
    pub(super) fn join(self) {
        let _ = self.handle.join();
    }

    /// Nobody wants what it does any more, which is `what`.
    pub(super) fn leave(self, what: &str) {
        match self.ended.recv_timeout(PATIENCE) {
            Err(RecvTimeoutError::Timeout) => {
                log::warn!("{what} that was given up does not end yet: it is left to itself");
            }
            _ => self.join(),
        }
    }
}

/// What the boot thread made.
#[derive(Debug)]
pub(super) enum Made {
    /// It looked at a snapshot.
    Loaded(Box<Result<Loaded, LoadError>>),
    /// It built a machine, or could not; how long its stages took.
    Built(Box<(Result<Machine, MachineError>, Stages)>),
}

impl Made {
    /// Nothing of it stays, not even a guest that waits for memory.
    fn discard(self) {
        if let Self::Built(built) = self
            && let (Ok(machine), _) = *built
        {
            machine.end();
        }
    }
}

/// The thread `boot`.
#[derive(Debug)]
pub(super) struct BootThread {
    handle: JoinHandle<()>,
    made: Receiver<Made>,
}

impl BootThread {
    /// Does `work` on it, and then says so by `post`.
    pub(super) fn start(post: EventPost, work: impl FnOnce() -> Made + Send + 'static) -> io::Result<Self> {
        let (to, made) = channel();
        let handle = Builder::new().name("boot".to_owned()).spawn(move || run(work, &to, &post))?;
        Ok(Self { handle, made })
    }

    /// What it made, once it says that it has.
    pub(super) fn take(&self) -> Option<Made> {
        self.made.try_recv().ok()
    }

    /// Waits for its end. What it made is taken: it has nothing left to do, and what it leaves is gone then.
    pub(super) fn join(self) {
        let _ = self.handle.join();
    }

    /// Nobody wants what it makes any more.
    pub(super) fn leave(self) -> Left {
        Left(self.made)
    }
}

fn run(work: impl FnOnce() -> Made, to: &Sender<Made>, post: &EventPost) {
    // What nobody takes is dropped here.
    if to.send(work()).is_ok() {
        post.post(MachineEvent::Made);
    }
}

/// A thread whose work nobody wants.
#[derive(Debug)]
pub(super) struct Left(Receiver<Made>);

impl Left {
    /// Waits until it is at its end, or for so long as is worth while. What it made is dropped: here, or there when it comes to it.
    pub(super) fn wait(self) {
        let end = Instant::now() + PATIENCE;
        loop {
            match self.0.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(made) => made.discard(),
                Err(RecvTimeoutError::Disconnected) => return,
                Err(RecvTimeoutError::Timeout) => {
                    return log::warn!("a boot that was given up does not end yet: it is left to itself");
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use vmm_device_model::thread::Unconfined;

    use super::*;

    #[test]
    fn a_thread_that_does_not_end_is_left_to_itself_and_one_that_does_is_joined() {
        let hook: Arc<dyn ThreadHook> = Arc::new(Unconfined);
        let (goes_on, held) = channel::<()>();
        let (done, over) = channel();
        let work = move || {
            let _ = held.recv();
            let _ = done.send(());
        };
        Apart::start(&hook, ThreadKind("held"), work).unwrap().leave("a test");
        assert!(over.try_recv().is_err(), "it still waits");
        drop(goes_on);
        over.recv().unwrap();
        let (done, over) = channel();
        Apart::start(&hook, ThreadKind("short"), move || done.send(()).unwrap_or_default())
            .unwrap()
            .leave("a test");
        over.try_recv().expect("it is over");
    }
}
