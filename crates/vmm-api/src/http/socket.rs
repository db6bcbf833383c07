//! The listening socket: a path of ours, or a descriptor we were given.

use crate::http::descriptors::listens;
use std::fs::{self, Permissions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// The socket cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Another process answers at this path.
    #[error("API socket {} is in use by another process", .0.display())]
    InUse(PathBuf),
    /// The path is something else than a socket, which is not removed.
    #[error("API socket path {} exists and is not a socket", .0.display())]
    NotASocket(PathBuf),
    /// The system refuses.
    #[error("cannot {what} API socket {}", .path.display())]
    Io {
        /// What was attempted.
        what: &'static str,
        /// The path.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The descriptor is not a UNIX socket.
    #[error("the API socket's descriptor cannot be used")]
    Descriptor(#[source] io::Error),
    /// The descriptor is a socket that was not put to listen.
    #[error("the API socket's descriptor is a socket that does not listen")]
    NotListening,
}

/// A listening socket. If it has a path of ours, the file is removed when this is dropped.
#[derive(Debug)]
pub struct ApiSocket {
    listener: UnixListener,
    _file: Option<SocketFile>,
}

impl ApiSocket {
    /// Listens at `path`, for this user only. A file left behind by a process that has died is replaced.
    ///
    /// Between bind and chmod the umask decides who may connect: set it to 0077 before.
    ///
    /// # Errors
    /// Somebody else listens there, the path is not a socket, or the system refuses.
    pub fn bind(path: &Path) -> Result<Self, SocketError> {
        let fail = |what| move |source| SocketError::Io { what, path: path.to_owned(), source };
        remove_stale(path)?;
        let listener = UnixListener::bind(path).map_err(fail("bind"))?;
        let file = SocketFile::of(path).map_err(fail("find"))?;
        fs::set_permissions(path, Permissions::from_mode(0o600)).map_err(fail("restrict"))?;
        listener.set_nonblocking(true).map_err(fail("set up"))?;
        Ok(Self { listener, _file: Some(file) })
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
        Ok(Self { listener, _file: None })
    }

    pub(crate) const fn listener(&self) -> &UnixListener {
        &self.listener
    }
}

/// A socket file that is removed in the end, if it is still the one that was made.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl SocketFile {
    fn of(path: &Path) -> io::Result<Self> {
        let metadata = fs::symlink_metadata(path)?;
        Ok(Self { path: path.to_owned(), device: metadata.dev(), inode: metadata.ino() })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let now = fs::symlink_metadata(&self.path);
        if now.is_ok_and(|now| (now.dev(), now.ino()) == (self.device, self.inode)) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn remove_stale(path: &Path) -> Result<(), SocketError> {
    let fail = |what| move |source| SocketError::Io { what, path: path.to_owned(), source };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(fail("look at")(error)),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(SocketError::NotASocket(path.to_owned()));
        }
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(fail("remove the stale"))
        }
        Err(error) => Err(fail("probe")(error)),
        Ok(_) => Err(SocketError::InUse(path.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_private_and_gone_in_the_end() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("api.sock");
        let socket = ApiSocket::bind(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(matches!(ApiSocket::bind(&path), Err(SocketError::InUse(_))));
        assert!(path.exists(), "a refused bind takes nothing away");
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn a_dead_process_s_socket_is_replaced_and_other_files_are_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("api.sock");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "the standard library leaves the file, as a crash does");
        let socket = ApiSocket::bind(&path).unwrap();
        UnixStream::connect(&path).unwrap();
        drop(socket);
        fs::write(&path, "precious").unwrap();
        assert!(matches!(ApiSocket::bind(&path), Err(SocketError::NotASocket(_))));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn a_successor_s_socket_is_not_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("api.sock");
        let first = ApiSocket::bind(&path).unwrap();
        fs::rename(&path, folder.path().join("moved")).unwrap();
        let second = ApiSocket::bind(&path).unwrap();
        drop(first);
        assert!(path.exists());
        drop(second);
    }

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
