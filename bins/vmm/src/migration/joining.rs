//! Opens the further connections of a source, which carry memory only.

use std::net::Shutdown;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use vmm_device_model::thread::{self, ThreadHook};
use vmm_memory_manager::source::GuestMemorySource;
use vmm_migration_protocol::{Command, Fault, Item, Join, Message, Reason, SessionId};

use super::THREAD;
use super::inputs::Answers;
use super::link::{ANSWER, End, Frames, Socket, Way};
use super::sender::{Lane, LaneWriter, PATIENCE, Pen, Shared};
use super::turn::Turn;

/// What the connections of a session have in common.
#[derive(Clone)]
pub(super) struct Session {
    pub(super) way: Way,
    pub(super) id: SessionId,
    pub(super) memory: Arc<GuestMemorySource>,
    pub(super) shared: Arc<Shared>,
    pub(super) answers: Answers,
    pub(super) threads: Arc<dyn ThreadHook>,
    /// The further connections: open for as long as connection 0, where the ends say why they close.
    pub(super) sockets: Arc<Mutex<Vec<Arc<Socket>>>>,
}

impl Session {
    /// Opens connections 1 up to `connections`, which the destination has to accept, and starts a thread for each.
    ///
    /// # Errors
    /// One of them cannot be had; none is left open.
    pub(super) fn open(&self, connections: u16) -> Result<Vec<Lane>, Fault> {
        let mut sockets = Vec::new();
        for index in 1..connections {
            self.check()?;
            sockets.push((
                index,
                self.connect(index, Join::MEMORY).map_err(|error| cannot(index, &error.to_string()))?,
            ));
        }
        // All have been asked for by now.
        for (index, socket) in &sockets {
            let since = Instant::now();
            while !socket.has_something() && since.elapsed() < ANSWER {
                self.check()?;
            }
            let timeouts = socket.set_timeouts(Some(ANSWER), Some(ANSWER));
            timeouts.map_err(|error| cannot(*index, &error.to_string()))?;
            // Nothing more is said there.
            joined(socket).map(drop).map_err(|text| cannot(*index, &text))?;
        }
        let mut all = self.sockets.lock().unwrap_or_else(PoisonError::into_inner);
        all.extend(sockets.iter().map(|(_, socket)| Arc::clone(socket)));
        sockets.into_iter().map(|(index, socket)| self.start(index, socket)).collect()
    }

    /// Closes the further connections.
    pub(super) fn close(&self) {
        let all = self.sockets.lock().unwrap_or_else(PoisonError::into_inner);
        all.iter().for_each(|socket| socket.shutdown(Shutdown::Both));
    }

    pub(super) fn check(&self) -> Result<(), Fault> {
        if self.shared.interrupted.load(Ordering::SeqCst) || self.shared.over.load(Ordering::SeqCst) {
            return Err(Fault::new(Reason::Cancelled, "interrupted"));
        }
        Ok(())
    }

    /// A connection that has asked to be the session's, in `role`.
    pub(super) fn connect(&self, index: u16, role: u16) -> std::io::Result<Arc<Socket>> {
        let socket = self.way.connect(&mut || self.check().is_ok())?;
        socket.set_timeouts(Some(PATIENCE), Some(ANSWER))?;
        let join = Message::Join(Join { session: self.id, index, role });
        socket.send(&join.encode().map_err(std::io::Error::other)?)?;
        Ok(Arc::new(socket))
    }

    fn start(&self, index: u16, socket: Arc<Socket>) -> Result<Lane, Fault> {
        socket.set_timeouts(None, Some(PATIENCE)).map_err(|error| cannot(index, &error.to_string()))?;
        let (work, taken): (_, Receiver<_>) = channel();
        let (tell, done) = channel();
        let pen = Pen {
            index,
            socket,
            memory: Arc::clone(&self.memory),
            shared: Arc::clone(&self.shared),
            packer: None,
            turn: Turn::new(),
            broken: None,
        };
        let writer = LaneWriter { pen, work: taken, done: tell, answers: self.answers.clone() };
        thread::spawn(&self.threads, THREAD, "migration-out", move || writer.run())
            .map_err(|error| cannot(index, &error.to_string()))?;
        Ok(Lane { work, done })
    }
}

/// Waits until the destination has taken the connection. What it says next may have been read with that: it is in what is given.
pub(super) fn joined(socket: &Arc<Socket>) -> Result<Frames, String> {
    let mut frames = Frames::of(socket);
    let answer = match frames.first(ANSWER) {
        Ok(Item::Frame(frame)) => Message::decode(frame).map_err(|error| error.to_string())?,
        Ok(Item::Bulk(_)) => return Err("memory comes the wrong way".to_owned()),
        Err(End::Garbage(text) | End::Lost(text)) => return Err(text),
    };
    if answer == Message::Ack(Command::Join) {
        return Ok(frames);
    }
    socket.shutdown(Shutdown::Both);
    Err("another answer than Ack".to_owned())
}

fn cannot(index: u16, text: &str) -> Fault {
    Fault::new(Reason::Failed, &format!("connection {index}: {text}"))
}
