//! How a receiver comes to its address: files of certificates are read, a name is looked up, a socket is bound. A file system or a name
//! server that does not answer holds that up for ever, so it has a thread of its own, which nobody waits for who has other orders.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};

use vmm_api::spec::ReceiveSpec;
use vmm_device_model::thread::{self, ThreadHook};

use super::THREAD;
use super::incoming::{Heard, ReceiveError};
use super::link::Listener;
use super::tls::Server;

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
