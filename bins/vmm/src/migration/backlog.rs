//! What connections have said and the driver has not heard yet: bounded over all of them, so that a peer that is faster than the driver
//! waits, and memory does not grow.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// Bytes that may wait. One message may be larger where no other waits.
pub(super) const MOST: usize = 1 << 20;

/// What a message costs beside what it carries.
const EACH: usize = 256;

/// Messages that wait, of all connections.
#[derive(Debug, Default)]
pub(super) struct Backlog {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Bytes that wait.
    used: usize,
    /// The number that the next one gets who wants to say something.
    next: u64,
    /// Whose turn it is: they come in order, so that no connection keeps another from being heard.
    turn: u64,
}

/// A message's place among those that wait; given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Place {
    backlog: Arc<Backlog>,
    bytes: usize,
}

impl Backlog {
    /// Waits until there is room for a message that carries so many bytes.
    pub(super) fn place(self: &Arc<Self>, carried: usize) -> Place {
        let bytes = carried.saturating_add(EACH);
        let mut state = self.lock();
        let number = state.next;
        state.next += 1;
        let must_wait = |state: &mut State| {
            state.turn != number || state.used != 0 && state.used.saturating_add(bytes) > MOST
        };
        state = self.changed.wait_while(state, must_wait).unwrap_or_else(PoisonError::into_inner);
        state.turn += 1;
        state.used = state.used.saturating_add(bytes);
        drop(state);
        self.changed.notify_all();
        Place { backlog: Arc::clone(self), bytes }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = self.backlog.lock();
        state.used = state.used.saturating_sub(self.bytes);
        drop(state);
        self.backlog.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use super::*;

    #[test]
    fn who_comes_first_is_first_and_a_large_one_waits_alone() {
        let backlog = Arc::new(Backlog::default());
        let small = backlog.place(1);
        let (to, entered) = channel();
        for (number, bytes) in [(0, MOST * 2), (1, 1)] {
            let (theirs, to) = (Arc::clone(&backlog), to.clone());
            std::thread::spawn(move || to.send((number, theirs.place(bytes))));
            while backlog.lock().next < number + 2 {
                std::thread::yield_now();
            }
        }
        assert!(entered.recv_timeout(Duration::from_millis(20)).is_err(), "not beside another");
        drop(small);
        let (number, large) = entered.recv().unwrap();
        assert_eq!(number, 0);
        assert!(entered.recv_timeout(Duration::from_millis(20)).is_err(), "nor another beside it");
        drop(large);
        assert_eq!(entered.recv().unwrap().0, 1);
        let state = backlog.lock();
        assert_eq!((state.used, state.turn), (0, 3));
    }
}
