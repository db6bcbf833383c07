//! UNIX sockets that this process listens on at a path: for this user only, gone in the end.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::{Path, PathBuf};

/// A socket cannot be had at a path.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BindError {
    /// A process that lives has a socket at this path.
    #[error("socket {} is in use by another process", .0.display())]
    InUse(PathBuf),
    /// The path is something else than a socket, which is not removed.
    #[error("{} exists and is not a socket", .0.display())]
    NotASocket(PathBuf),
    /// The system refuses.
    #[error("cannot {what} socket {}", .path.display())]
    Io {
        /// What was attempted.
        what: &'static str,
        /// The path.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
}

/// A listening stream socket with a path. It does not block; its file is removed when this is dropped, if it is
/// still the one that was made.
#[derive(Debug)]
pub struct ListeningSocket {
    listener: UnixListener,
    _file: SocketFile,
}

impl ListeningSocket {
    /// Listens at `path`, for this user only. A file left behind by a process that has died is replaced.
    ///
    /// Between bind and chmod the umask decides who may connect: set it to 0077 before.
    ///
    /// # Errors
    /// Somebody else has a socket there, the path is not a socket, or the system refuses.
    pub fn bind(path: &Path) -> Result<Self, BindError> {
        let fail = |what| move |source| BindError::Io { what, path: path.to_owned(), source };
        remove_stale(path)?;
        let listener = UnixListener::bind(path).map_err(fail("bind"))?;
        let file = SocketFile::of(path).map_err(fail("find"))?;
        fs::set_permissions(path, Permissions::from_mode(0o600)).map_err(fail("restrict"))?;
        listener.set_nonblocking(true).map_err(fail("set up"))?;
        Ok(Self { listener, _file: file })
    }

    /// Whether [`bind`](Self::bind) would find somebody or something at `path`, or nowhere to make a socket; changes
    /// nothing.
    ///
    /// # Errors
    /// As there.
    pub fn check(path: &Path) -> Result<(), BindError> {
        let fail = |source| BindError::Io { what: "bind", path: path.to_owned(), source };
        if is_free(path)? {
            let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
            let folder = fs::metadata(parent.unwrap_or(Path::new("."))).map_err(fail)?;
            if !folder.is_dir() {
                return Err(fail(io::ErrorKind::NotADirectory.into()));
            }
        }
        Ok(())
    }

    /// The socket itself.
    pub const fn listener(&self) -> &UnixListener {
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

fn remove_stale(path: &Path) -> Result<(), BindError> {
    if is_free(path)? {
        return Ok(());
    }
    let fail = |source| BindError::Io { what: "remove the stale", path: path.to_owned(), source };
    fs::remove_file(path).map_err(fail)
}

/// Whether nothing is at `path`; if not, it is a socket that nobody has any more.
fn is_free(path: &Path) -> Result<bool, BindError> {
    let fail = |what| move |source| BindError::Io { what, path: path.to_owned(), source };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(true),
        Err(error) => return Err(fail("look at")(error)),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(BindError::NotASocket(path.to_owned()));
        }
        Ok(_) => {}
    }
    // Asked as a datagram socket: who lives is seen and, having a socket of another type, notices nothing (connect(2),
    // EPROTOTYPE). A console would take a connection for its client.
    match UnixDatagram::unbound().and_then(|probe| probe.connect(path)) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(false),
        Err(error) if error.raw_os_error() == Some(libc::EPROTOTYPE) => {
            Err(BindError::InUse(path.to_owned()))
        }
        Err(error) => Err(fail("probe")(error)),
        Ok(()) => Err(BindError::InUse(path.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_path_is_private_and_gone_in_the_end() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let socket = ListeningSocket::bind(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(matches!(ListeningSocket::bind(&path), Err(BindError::InUse(_))));
        assert!(path.exists(), "a refused bind takes nothing away");
        let nobody = socket.listener().accept().unwrap_err();
        assert_eq!(nobody.kind(), io::ErrorKind::WouldBlock, "a refused bind is no client");
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn a_dead_process_s_socket_is_replaced_and_other_files_are_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "the standard library leaves the file, as a crash does");
        let socket = ListeningSocket::bind(&path).unwrap();
        UnixStream::connect(&path).unwrap();
        drop(socket);
        fs::write(&path, "precious").unwrap();
        assert!(matches!(ListeningSocket::bind(&path), Err(BindError::NotASocket(_))));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn a_check_tells_what_a_bind_would_find_and_changes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        ListeningSocket::check(&path).unwrap();
        assert!(!path.exists());
        assert!(matches!(ListeningSocket::check(&path.join("x")), Err(BindError::Io { what: "bind", .. })));
        drop(UnixListener::bind(&path).unwrap());
        ListeningSocket::check(&path).unwrap();
        assert!(path.exists(), "a stale file is left for the bind");
        let socket = ListeningSocket::bind(&path).unwrap();
        assert!(matches!(ListeningSocket::check(&path), Err(BindError::InUse(_))));
        drop(socket);
        fs::write(&path, "precious").unwrap();
        assert!(matches!(ListeningSocket::check(&path), Err(BindError::NotASocket(_))));
    }

    #[test]
    fn a_live_socket_of_any_type_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let _theirs = UnixDatagram::bind(&path).unwrap();
        assert!(matches!(ListeningSocket::bind(&path), Err(BindError::InUse(_))));
        assert!(path.exists());
    }

    #[test]
    fn a_successor_s_socket_is_not_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let first = ListeningSocket::bind(&path).unwrap();
        fs::rename(&path, folder.path().join("moved")).unwrap();
        let second = ListeningSocket::bind(&path).unwrap();
        drop(first);
        assert!(path.exists());
        drop(second);
    }
}
