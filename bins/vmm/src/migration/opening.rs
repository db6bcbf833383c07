//! How a receiver comes to its address, and takes connections there. For the first, files of certificates are read, a name is looked
//! up, a socket is bound. A file system or a name server that does not answer holds that up for ever, so it has a thread of its own,
//! which nobody waits for who has other orders.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender};

use vmm_api::spec::ReceiveSpec;
use vmm_device_model::thread::{self, ThreadHook};

use super::incoming::{Heard, ReceiveError};
use super::landing::{Ground, WRITE, read};
use super::link::{Listener, Socket};
use super::tls::Server;
use super::{LOOK, THREAD};
use crate::exit::chain;

/// Connections at one time.
pub(super) const MOST_CONNECTIONS: usize = 32;

/// A receiver's address, and what is shown there. It is closed where nobody takes it.
#[derive(Debug)]
pub(crate) struct Opened(Option<(Listener, Option<Server>)>);

impl Opened {
    fn at(spec: &ReceiveSpec) -> Result<Self, ReceiveError> {
        let tls = spec.tls_dir.as_deref().map(Server::load).transpose().map_err(ReceiveError::Tls)?;
        let listener = Listener::bind(&spec.address).map_err(ReceiveError::Listen)?;
        Ok(Self(Some((listener, tls))))
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        if let Some((listener, _)) = &self.0 {
            listener.close();
        }
    }
}

/// Comes to the address of `spec`; `None` where it is not wanted any more, and nobody answers.
///
/// # Errors
/// It cannot be had, or an operator wants the end.
pub(super) fn open(
    spec: &ReceiveSpec,
    threads: &Arc<dyn ThreadHook>,
    (to, heard): (&Sender<Heard>, &Receiver<Heard>),
) -> Result<Option<(Listener, Option<Server>)>, ReceiveError> {
    let (spec, to) = (spec.clone(), to.clone());
    let work = move || drop(to.send(Heard::Opened(Box::new(Opened::at(&spec)))));
    thread::spawn(threads, THREAD, "migration-open", work).map_err(ReceiveError::Thread)?;
    loop {
        match heard.recv() {
            Ok(Heard::Opened(opened)) => return Ok((*opened)?.0.take()),
            Ok(Heard::Cancel) => return Err(ReceiveError::Cancelled),
            Ok(Heard::Gone) | Err(_) => return Ok(None),
            // Nobody is there yet.
            Ok(_) => {}
        }
    }
}

/// Takes connections, and starts a thread for each.
pub(super) struct Accepting {
    pub(super) listener: Arc<Listener>,
    pub(super) tls: Option<Server>,
    /// Nobody waits for a VM any more: handshakes are given up.
    pub(super) gone: Arc<AtomicBool>,
    pub(super) ground: Arc<Ground>,
    pub(super) to: Sender<Heard>,
    pub(super) threads: Arc<dyn ThreadHook>,
}

impl Accepting {
    pub(super) fn run(self) {
        let alive = Arc::new(());
        let mut number = 0;
        while let Some(socket) = next(&self.gone, || self.listener.accept()) {
            if Arc::strong_count(&alive) > MOST_CONNECTIONS {
                log::warn!("migration: too many connections, one more is closed");
                continue;
            }
            number += 1;
            let (to, token) = (self.to.clone(), Arc::clone(&alive));
            let (ground, gone, tls) = (Arc::clone(&self.ground), Arc::clone(&self.gone), self.tls.clone());
            let work = move || {
                let secured = socket.secured(tls.as_ref(), &mut || !gone.load(Ordering::SeqCst));
                match secured.and_then(|socket| socket.set_timeouts(None, Some(WRITE)).map(|()| socket)) {
                    Ok(socket) => read(number, &Arc::new(socket), &ground, &to),
                    Err(error) => log::warn!("migration: a connection is refused: {}", chain(&error)),
                }
                drop(token);
            };
            if let Err(error) = thread::spawn(&self.threads, THREAD, "migration-in", work) {
                log::warn!("migration: a connection is closed: {error}");
            }
        }
    }
}

/// The next connection, until nobody waits for a VM any more. One that cannot be had, as where there are too many descriptors, does
/// not keep out those that come later.
pub(super) fn next(gone: &AtomicBool, accept: impl Fn() -> io::Result<Socket>) -> Option<Socket> {
    let mut is_told = false;
    while !gone.load(Ordering::SeqCst) {
        match accept() {
            Ok(socket) => return Some(socket),
            // It has been closed.
            Err(_) if gone.load(Ordering::SeqCst) => {}
            Err(error) => {
                if !std::mem::replace(&mut is_told, true) {
                    log::warn!("migration: a connection cannot be taken: {error}");
                }
                std::thread::park_timeout(LOOK);
            }
        }
    }
    None
}
