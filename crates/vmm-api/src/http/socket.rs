//! The listening socket: a path of ours, or a descriptor we were given.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;

use crate::http::descriptors::listens;
use crate::socket::{BindError, ListeningSocket};

/// The API's socket cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SocketError {
    /// Not at this path.
    #[error(transparent)]
    Path(#[from] BindError),
    /// The descriptor is not a UNIX socket.
    #[error("its descriptor cannot be used")]
    Descriptor(#[source] io::Error),
    /// The descriptor is a socket that was not put to listen.
    #[error("its descriptor is a socket that does not listen")]
    NotListening,
}

/// The socket on which clients of the API come in.
#[derive(Debug)]
pub struct ApiSocket(Source);

#[derive(Debug)]
enum Source {
    Path(ListeningSocket),
    Descriptor(UnixListener),
}

impl ApiSocket {
    /// Listens at `path`; see [`ListeningSocket::bind`].
    ///
    /// # Errors
    /// As there.
    pub fn bind(path: &Path) -> Result<Self, SocketError> {
        Ok(Self(Source::Path(ListeningSocket::bind(path)?)))
    }

    /// Listens on a descriptor that somebody else has bound and put to listen.
    ///
    /// # Errors
    /// It is not a UNIX socket, or does not listen.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, SocketError> {
        let listener = UnixListener::from(fd);
        listener.local_addr().map_err(SocketError::Descriptor)?;
        if !listens(&listener).map_err(SocketError::Descriptor)? {
            return Err(SocketError::NotListening);
        }
        listener.set_nonblocking(true).map_err(SocketError::Descriptor)?;
        Ok(Self(Source::Descriptor(listener)))
    }

    pub(crate) const fn listener(&self) -> &UnixListener {
        match &self.0 {
            Source::Path(socket) => socket.listener(),
            Source::Descriptor(listener) => listener,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_descriptor_must_be_a_unix_socket_that_listens() {
        let file = fs::File::open("/dev/null").unwrap();
        assert!(matches!(ApiSocket::from_fd(file.into()), Err(SocketError::Descriptor(_))));
        let (connected, _other) = UnixStream::pair().unwrap();
        assert!(matches!(ApiSocket::from_fd(connected.into()), Err(SocketError::NotListening)));
        let folder = tempfile::tempdir().unwrap();
        let listening = UnixListener::bind(folder.path().join("socket")).unwrap();
        ApiSocket::from_fd(listening.into()).unwrap();
    }
}
