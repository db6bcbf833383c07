//! Where a console's output goes: always to the same file, or to the client of a socket, if there is one.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::sys::{self, Interest};

/// What the output thread writes to.
#[derive(Debug)]
pub(super) enum Outlet {
    /// A terminal, pty, pipe or file.
    Fixed(Arc<File>),
    /// A socket's client.
    Client(Arc<Link>),
}

impl Outlet {
    /// The file to write to now; `None` while no client is connected.
    pub(super) fn current(&self) -> Option<Arc<File>> {
        match self {
            Self::Fixed(file) => Some(Arc::clone(file)),
            Self::Client(link) => link.current(),
        }
    }

    /// Readable when there may be another file to write to.
    pub(super) fn changes(&self) -> Option<RawFd> {
        match self {
            Self::Fixed(_) => None,
            Self::Client(link) => Some(link.changed.as_raw_fd()),
        }
    }

    /// The change is noticed.
    pub(super) fn noticed(&self) {
        if let Self::Client(link) = self {
            let _ = link.changed.read();
        }
    }

    /// `file` cannot be written to. Whether what was to be written waits for another one.
    pub(super) fn failed(&self, file: &Arc<File>) -> bool {
        match self {
            Self::Fixed(_) => false,
            Self::Client(link) => {
                link.leave(file);
                true
            }
        }
    }

    /// Most bytes written at once: a client's socket does not block; a writable pipe takes this much without blocking
    /// (PIPE_BUF is 4096), a terminal may take less.
    pub(super) fn piece(&self) -> usize {
        match self {
            Self::Fixed(_) => 512,
            Self::Client(_) => 4096,
        }
    }
}

/// The client of a console that is a socket. The control thread brings it, the output thread writes to it until it has
/// gone.
#[derive(Debug)]
pub struct Link {
    client: Mutex<Option<Arc<File>>>,
    changed: EventFd,
}

impl Link {
    pub(super) fn new() -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self { client: Mutex::default(), changed: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)? }))
    }

    /// Takes `client` in and returns what it sends. If another one is connected it is sent away: `None`.
    ///
    /// # Errors
    /// The system refuses; the client is sent away.
    pub fn admit(&self, client: UnixStream) -> io::Result<Option<ClientInput>> {
        client.set_nonblocking(true)?;
        let client = Arc::new(File::from(OwnedFd::from(client)));
        let mut current = self.client.lock().unwrap_or_else(PoisonError::into_inner);
        if current.as_ref().is_some_and(|client| !has_left(client)) {
            return Ok(None);
        }
        *current = Some(Arc::clone(&client));
        drop(current);
        // A full counter is a signal already.
        let _ = self.changed.write(1);
        Ok(Some(ClientInput(client)))
    }

    /// The client, unless it has left.
    fn current(&self) -> Option<Arc<File>> {
        let mut client = self.client.lock().unwrap_or_else(PoisonError::into_inner);
        client.take_if(|client| has_left(client));
        client.clone()
    }

    /// `gone` does not listen any more; what it sends is not waited for either.
    fn leave(&self, gone: &Arc<File>) {
        let mut client = self.client.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = client.take_if(|client| Arc::ptr_eq(client, gone)) {
            sys::hang_up(&client);
        }
    }
}

/// What a client sends.
#[derive(Debug)]
pub struct ClientInput(Arc<File>);

impl Read for ClientInput {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        (&*self.0).read(buffer)
    }
}

impl AsFd for ClientInput {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Whether the other end is closed in both directions: a client that only has nothing more to send may still listen.
fn has_left(client: &File) -> bool {
    sys::wait(&[(client.as_raw_fd(), Interest::HangUp)], Some(std::time::Duration::ZERO)).unwrap_or(true)
}

#[cfg(test)]
mod tests {
    use std::net::Shutdown;

    use super::*;

    #[test]
    fn one_client_at_a_time() {
        let link = Link::new().unwrap();
        let outlet = Outlet::Client(Arc::clone(&link));
        assert!(outlet.current().is_none());
        let (first, ours) = UnixStream::pair().unwrap();
        assert!(link.admit(ours).unwrap().is_some());
        assert!(outlet.current().is_some());

        let (second, ours) = UnixStream::pair().unwrap();
        assert!(link.admit(ours).unwrap().is_none(), "it is taken");
        assert!(has_left(&File::from(OwnedFd::from(second))), "who is sent away sees it");
        first.shutdown(Shutdown::Write).unwrap();
        assert!(outlet.current().is_some(), "it still listens");

        drop(first);
        // Nobody has looked yet.
        let (third, ours) = UnixStream::pair().unwrap();
        assert!(link.admit(ours).unwrap().is_some());
        let current = outlet.current().unwrap();
        assert!(outlet.failed(&Arc::new(current.try_clone().unwrap())));
        assert!(outlet.current().is_some(), "another one's failure is not the client's");
        assert!(outlet.failed(&current));
        assert!(outlet.current().is_none());
        drop(third);
    }
}
