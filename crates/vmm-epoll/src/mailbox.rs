//! Messages to a loop: a channel and an eventfd that wakes its reader.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Most messages handed over at one wake-up; the rest wakes the reader again, so that other sources get their turn.
const BATCH: usize = 1024;

/// Makes a mailbox: the side to post to, and the side to read.
///
/// # Errors
/// The eventfd cannot be made.
pub fn mailbox<T>() -> io::Result<(Mailbox<T>, Inbox<T>)> {
    let waker = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
    let (sender, receiver) = mpsc::channel();
    Ok((Mailbox { sender, waker: Arc::clone(&waker) }, Inbox { receiver, waker }))
}

/// The posting side. Cloned freely, used from any thread, never blocks.
pub struct Mailbox<T> {
    sender: Sender<T>,
    waker: Arc<EventFd>,
}

/// The reader has gone; the message comes back.
#[derive(PartialEq, Eq, thiserror::Error)]
#[error("the mailbox's reader has gone")]
pub struct Undelivered<T>(pub T);

impl<T> Mailbox<T> {
    /// Posts a message and wakes the reader.
    ///
    /// # Errors
    /// The reader has gone.
    pub fn send(&self, message: T) -> Result<(), Undelivered<T>> {
        self.sender.send(message).map_err(|mpsc::SendError(message)| Undelivered(message))?;
        wake(&self.waker);
        Ok(())
    }
}

impl<T> Clone for Mailbox<T> {
    fn clone(&self) -> Self {
        Self { sender: self.sender.clone(), waker: Arc::clone(&self.waker) }
    }
}

/// The reading side: register it with [`Control::add_mailbox`](crate::Control::add_mailbox), or poll its descriptor
/// for input in a loop of your own.
pub struct Inbox<T> {
    receiver: Receiver<T>,
    waker: Arc<EventFd>,
}

impl<T> Inbox<T> {
    /// Takes what is queued, in order, and consumes the wake-up. Of a very long queue it takes a large batch and leaves
    /// the descriptor readable.
    pub fn take_all(&mut self) -> VecDeque<T> {
        // EAGAIN: somebody asked without a wake-up. The queue is looked at after the count is taken, so a message
        // posted in between is either seen now or wakes again.
        let _ = self.waker.read();
        let batch: VecDeque<T> = self.receiver.try_iter().take(BATCH).collect();
        if batch.len() == BATCH {
            self.wake();
        }
        batch
    }

    /// Makes the descriptor readable, as a message would.
    pub(crate) fn wake(&self) {
        wake(&self.waker);
    }
}

impl<T> AsRawFd for Inbox<T> {
    fn as_raw_fd(&self) -> RawFd {
        self.waker.as_raw_fd()
    }
}

/// The only failure is EAGAIN at the end of the counter's range, and then the reader is awake anyway.
fn wake(waker: &EventFd) {
    let _ = waker.write(1);
}

impl<T> fmt::Debug for Mailbox<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mailbox").finish_non_exhaustive()
    }
}

impl<T> fmt::Debug for Inbox<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inbox").finish_non_exhaustive()
    }
}

impl<T> fmt::Debug for Undelivered<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Undelivered(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_wake_up_takes_everything_in_order() {
        let (post, mut inbox) = mailbox().unwrap();
        (0..10).for_each(|n| post.send(n).unwrap());
        assert_eq!(inbox.take_all(), (0..10).collect::<VecDeque<_>>());
        assert!(inbox.waker.read().is_err(), "the count is consumed");
        assert!(inbox.take_all().is_empty());
    }

    #[test]
    fn a_long_queue_comes_in_batches_and_keeps_the_reader_awake() {
        let (post, mut inbox) = mailbox().unwrap();
        (0..=BATCH).for_each(|n| post.send(n).unwrap());
        assert_eq!(inbox.take_all().len(), BATCH);
        assert_eq!(inbox.take_all(), [BATCH]);
    }

    #[test]
    fn the_message_comes_back_when_nobody_reads() {
        let (post, inbox) = mailbox().unwrap();
        drop(inbox);
        assert_eq!(post.send(7), Err(Undelivered(7)));
    }
}
