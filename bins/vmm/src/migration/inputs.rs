//! What a source's driver hears: answers of this process, and what the destination says, which waits within a bound.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::time::Duration;

use vmm_migration_protocol::SourceInput;

use super::backlog::{Backlog, Place};

/// The driver has ended.
#[derive(Debug)]
pub(crate) struct Ended;

/// Tells the driver.
#[derive(Debug, Clone)]
pub(crate) struct Answers {
    to: Sender<(SourceInput, Option<Place>)>,
    backlog: Arc<Backlog>,
}

/// What it has been told.
#[derive(Debug)]
pub(crate) struct Inputs(Receiver<(SourceInput, Option<Place>)>);

/// Both ends.
pub(crate) fn inputs() -> (Answers, Inputs) {
    let (to, told) = channel();
    (Answers { to, backlog: Arc::default() }, Inputs(told))
}

impl Answers {
    /// Tells what this process has done, or wants: never waits.
    ///
    /// # Errors
    /// [`Ended`].
    pub(crate) fn send(&self, input: SourceInput) -> Result<(), Ended> {
        self.to.send((input, None)).map_err(|_| Ended)
    }

    /// Tells what the other end has said, as soon as there is room for it.
    ///
    /// # Errors
    /// [`Ended`].
    pub(super) fn pass_on(&self, input: SourceInput) -> Result<(), Ended> {
        let carried = match &input {
            SourceInput::Frame(frame) => frame.payload().len(),
            SourceInput::Garbage(text) | SourceInput::Lost(text) => text.len(),
            _ => 0,
        };
        let place = self.backlog.place(carried);
        self.to.send((input, Some(place))).map_err(|_| Ended)
    }
}

impl Inputs {
    /// The next, which takes no room any more.
    pub(super) fn recv_timeout(&self, time: Duration) -> Result<SourceInput, RecvTimeoutError> {
        self.0.recv_timeout(time).map(|(input, _)| input)
    }

    /// The next, if there is one.
    pub(super) fn try_recv(&self) -> Result<SourceInput, TryRecvError> {
        self.0.try_recv().map(|(input, _)| input)
    }

    /// All there are.
    pub(super) fn try_iter(&self) -> impl Iterator<Item = SourceInput> {
        self.0.try_iter().map(|(input, _)| input)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use vmm_migration_protocol::{Message, SessionId};

    use super::*;
    use crate::migration::backlog::MOST;
    use crate::migration::link::{Frames, Socket};
    use crate::migration::outgoing::{DONE, listen};

    #[test]
    fn a_destination_that_is_faster_than_the_driver_waits_and_memory_does_not_grow() {
        let (answers, told) = inputs();
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        ours.set_write_timeout(Some(Duration::from_millis(100))).unwrap();
        let (frames, heard) = (Frames::of(&Arc::new(Socket::Unix(theirs))), answers.clone());
        let reader = std::thread::spawn(move || listen(frames, &heard));
        let many = Message::Query(SessionId([1; 16])).encode().unwrap().encode().repeat(100);
        let mut sent = 0;
        while ours.write_all(&many).is_ok() {
            sent += many.len();
            assert!(sent < 16 << 20, "nobody stops it");
        }
        // This process is heard all the same.
        answers.send(DONE).unwrap();
        let held: Vec<_> = told.0.try_iter().collect();
        assert!((1000..=MOST / 256 + 1).contains(&held.len()), "{}", held.len());
        assert!(held.iter().any(|(input, place)| matches!(input, SourceInput::Done(_)) && place.is_none()));
        drop((held, ours));
        // What is left of it, up to its end.
        let rest = std::iter::from_fn(|| told.recv_timeout(Duration::from_secs(60)).ok());
        let rest = rest.take_while(|input| matches!(input, SourceInput::Frame(_))).count();
        assert!(rest > 1000, "{rest}: it goes on");
        reader.join().unwrap();
    }

    #[test]
    fn who_waits_for_room_ends_with_the_driver() {
        let (answers, told) = inputs();
        answers.pass_on(SourceInput::Lost("x".repeat(MOST))).unwrap();
        let waits = std::thread::spawn(move || answers.pass_on(SourceInput::Tick));
        drop(told);
        assert!(waits.join().unwrap().is_err());
    }
}
