//! Asks for what the guest waits for.

use std::net::Shutdown;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_memory_manager::absent::AbsentMemory;
use vmm_migration_protocol::{MemoryRange, Message, PAGE};

use crate::exit::{ExitCode, chain};
use crate::migration::link::Socket;
use crate::signals;

/// The way on which memory is asked for.
#[derive(Debug)]
pub(super) struct Wanting {
    memory: Arc<AbsentMemory>,
    socket: Mutex<Option<Arc<Socket>>>,
}

impl Wanting {
    pub(super) fn new(memory: Arc<AbsentMemory>) -> Self {
        Self { memory, socket: Mutex::default() }
    }

    /// The thread that hears of faults, until memory's end.
    pub(super) fn run(&self) {
        if let Err(error) = self.memory.serve(&|gpa| ask(&self.lock(), gpa)) {
            // vCPUs and devices may wait for it, so that nothing can be taken apart.
            log::error!("guest memory is lost: {}", chain(&error));
            signals::end_at_once(ExitCode::LostMemory);
        }
    }

    /// It is asked for here from now on, what is waited for first.
    pub(super) fn ask_on(&self, socket: Arc<Socket>) {
        let mut place = self.lock();
        *place = Some(socket);
        self.memory.wanted().into_iter().for_each(|gpa| ask(&place, gpa));
    }

    /// There is nobody to ask.
    pub(super) fn ask_nobody(&self) {
        *self.lock() = None;
    }

    fn lock(&self) -> MutexGuard<'_, Option<Arc<Socket>>> {
        self.socket.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn ask(socket: &Option<Arc<Socket>>, gpa: u64) {
    let (Some(socket), Ok(range)) = (socket, MemoryRange::new(gpa, PAGE)) else { return };
    let asked = Message::Want(range).encode().map_err(std::io::Error::other);
    if let Err(error) = asked.and_then(|frame| socket.send(&frame)) {
        // A part of a frame may be on it: nothing more can be said there. Whoever reads it hears of that.
        log::debug!("migration: memory is not asked for: {error}");
        socket.shutdown(Shutdown::Both);
    }
}
