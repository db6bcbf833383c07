//! Threads that may not begin.

use std::io;
use std::sync::Mutex;

use vmm_device_model::thread::{ThreadHook, ThreadKind};

/// Lets all threads begin but those that it was told to refuse.
#[derive(Debug, Default)]
pub(crate) struct Doorman(Mutex<Vec<(ThreadKind, usize)>>);

impl Doorman {
    /// The `nth` thread of `kind` from now (1 is the next) may not begin.
    pub(crate) fn refuse(&self, kind: ThreadKind, nth: usize) {
        self.0.lock().unwrap().push((kind, nth));
    }

    /// Lets all begin again. Returns whether nobody is left who was to be refused.
    pub(crate) fn relent(&self) -> bool {
        std::mem::take(&mut *self.0.lock().unwrap()).is_empty()
    }
}

impl ThreadHook for Doorman {
    fn begin(&self, kind: ThreadKind) -> io::Result<()> {
        let (mut waiting, mut refused) = (self.0.lock().unwrap(), false);
        waiting.retain_mut(|(of, left)| {
            let is_its_turn = *of == kind && *left == 1;
            refused |= is_its_turn;
            *left -= usize::from(*of == kind && !is_its_turn);
            !is_its_turn
        });
        if refused { Err(io::Error::other("told to refuse")) } else { Ok(()) }
    }
}
