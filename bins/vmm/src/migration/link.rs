//! Sockets, and frames out of them.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::addr::SocketAddrArg;
use rustix::net::sockopt::{self, Timeout};
use rustix::net::{AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType};
use vmm_api::spec::MigrationAddress;
use vmm_memory_manager::straight::GuestSlice;
use vmm_migration_protocol::{Decoder, Frame, Item};

use super::tls::{Client, Server, TlsError, TlsStream};
use super::{LOOK, descriptors, vectors};
use crate::sandbox::among_strangers;

/// Bytes read from a socket at a time, but for the contents of memory.
const BUFFER: usize = 64 << 10;

/// Contents of at least so many bytes are likely to be followed by such: little more is read with them than the frames in between,
/// for what is in the buffer is copied once more.
const LARGE: usize = 64 << 10;
const BETWEEN: usize = 512;

/// Payload of a frame, at most, but for the one that says all of a VM's state.
const PAYLOAD: usize = 1 << 20;

/// Bytes in a UNIX socket, as far as the host allows so many (net.core.wmem_max): with few, both ends wait for each other more often
/// than they work. TCP sees to that itself.
const UNDERWAY: usize = 1 << 20;

/// How long connecting, or an answer that is waited for at once, may take.
pub(super) const ANSWER: Duration = Duration::from_secs(5);

/// Why a connection is closed that has not said in time what it wants, or what it was asked.
const LATE: &str = "a frame was not whole in time";

/// A connection.
#[derive(Debug)]
pub(super) enum Socket {
    Unix(UnixStream),
    Tcp(TcpStream),
    Tls(Box<TlsStream>),
}

/// The other end's address, and what is shown there.
#[derive(Debug, Clone)]
pub(super) struct Way {
    address: MigrationAddress,
    tls: Option<Client>,
}

impl Way {
    /// With TLS, if there is a folder of certificates; they are read once.
    pub(super) fn new(address: MigrationAddress, tls_dir: Option<&Path>) -> Result<Self, TlsError> {
        Ok(Self { address, tls: tls_dir.map(Client::load).transpose()? })
    }

    /// A connection. A handshake ends when `wanted` says no.
    pub(super) fn connect(&self, wanted: &mut dyn FnMut() -> bool) -> io::Result<Socket> {
        match &self.address {
            MigrationAddress::Unix(path) => connect_unix(path, ANSWER).map(Socket::Unix),
            MigrationAddress::Tcp(address) => {
                let stream = connect_tcp(address)?;
                stream.set_nodelay(true)?;
                match &self.tls {
                    Some(tls) => Ok(Socket::Tls(Box::new(tls.greet(stream, address, wanted)?))),
                    None => Ok(Socket::Tcp(stream)),
                }
            }
        }
    }
}

impl Socket {
    /// The same as a receiver has it with `tls`: encrypted. A handshake ends when `wanted` says no.
    pub(super) fn secured(self, tls: Option<&Server>, wanted: &mut dyn FnMut() -> bool) -> io::Result<Self> {
        match (self, tls) {
            (Self::Tcp(stream), Some(tls)) => Ok(Self::Tls(Box::new(tls.greet(stream, wanted)?))),
            (socket, _) => Ok(socket),
        }
    }

    /// Whether the other end has closed it. It does not wait, and takes nothing of what has come.
    pub(super) fn is_gone(&self) -> bool {
        match self.peek(RecvFlags::DONTWAIT) {
            Ok(bytes) => bytes == 0,
            Err(error) => !matches!(error, Errno::AGAIN | Errno::INTR),
        }
    }

    /// Whether something has come, or it has ended: waits as long as a read does.
    pub(super) fn has_something(&self) -> bool {
        !matches!(self.peek(RecvFlags::empty()), Err(Errno::AGAIN | Errno::INTR))
    }

    /// The descriptor, where bytes go to it as they are.
    pub(super) fn plain(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Unix(stream) => Some(stream.as_fd()),
            Self::Tcp(stream) => Some(stream.as_fd()),
            Self::Tls(_) => None,
        }
    }

    fn peek(&self, flags: RecvFlags) -> Result<usize, Errno> {
        let fd = match self {
            Self::Unix(stream) => stream.as_fd(),
            Self::Tcp(stream) => stream.as_fd(),
            Self::Tls(stream) => stream.socket().as_fd(),
        };
        rustix::net::recv(fd, &mut [0], flags | RecvFlags::PEEK).map(|(_, bytes)| bytes)
    }

    pub(super) fn set_timeouts(&self, read: Option<Duration>, write: Option<Duration>) -> io::Result<()> {
        self.set_read_timeout(read)?;
        match self {
            Self::Unix(stream) => stream.set_write_timeout(write),
            Self::Tcp(stream) => stream.set_write_timeout(write),
            Self::Tls(stream) => stream.socket().set_write_timeout(write),
        }
    }

    fn set_read_timeout(&self, read: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Unix(stream) => stream.set_read_timeout(read),
            Self::Tcp(stream) => stream.set_read_timeout(read),
            Self::Tls(stream) => stream.socket().set_read_timeout(read),
        }
    }

    /// Where it is closed already, there is nothing to do.
    pub(super) fn shutdown(&self, how: Shutdown) {
        let _ = match self {
            Self::Unix(stream) => stream.shutdown(how),
            Self::Tcp(stream) => stream.shutdown(how),
            Self::Tls(stream) => stream.shutdown(how),
        };
    }

    /// Writes a frame, within the timeout.
    pub(super) fn send(&self, frame: &Frame) -> io::Result<()> {
        let mut to = self;
        to.write_all(&frame.encode())
    }

    /// Writes as much of `bytes` as goes, with `files` at its first byte.
    pub(super) fn write_with(&self, bytes: &[u8], files: &[File]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => descriptors::send(stream, bytes, files),
            Self::Tcp(_) | Self::Tls(_) => Err(ErrorKind::Unsupported.into()),
        }
    }

    /// Whether the process at the other end is this user's, or root's.
    fn is_ours(&self, user: u32) -> io::Result<bool> {
        match self {
            Self::Unix(stream) => {
                let peer = sockopt::socket_peercred(stream)?.uid.as_raw();
                Ok(peer == user || peer == 0)
            }
            Self::Tcp(_) | Self::Tls(_) => Ok(true),
        }
    }
}

impl Read for &Socket {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Socket::Unix(stream) => (&mut &*stream).read(bytes),
            Socket::Tcp(stream) => (&mut &*stream).read(bytes),
            Socket::Tls(stream) => (&mut &**stream).read(bytes),
        }
    }
}

impl Write for &Socket {
    /// What ends with [`ErrorKind::WouldBlock`] is to be called again with the same bytes.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Socket::Unix(stream) => (&mut &*stream).write(bytes),
            Socket::Tcp(stream) => (&mut &*stream).write(bytes),
            Socket::Tls(stream) => (&mut &**stream).write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Socket::Unix(_) | Socket::Tcp(_) => Ok(()),
            Socket::Tls(stream) => (&mut &**stream).flush(),
        }
    }
}

/// What `HOST:PORT` stands for. The C library asks the name services of this host (nsswitch.conf(5)): those that are not its own are
/// modules, which no filter lets it load.
fn addresses(name: &str) -> io::Result<Vec<SocketAddr>> {
    /// It tries to load a module once only.
    static REFUSED: AtomicBool = AtomicBool::new(false);
    let (found, refused) = among_strangers(|| name.to_socket_addrs());
    let refused = REFUSED.fetch_or(refused, Ordering::Relaxed) || refused;
    let found = found.map_err(|error| match refused {
        true => io::Error::new(error.kind(), format!("{error} ({LITTLE_IS_ASKED})")),
        false => error,
    });
    Ok(found?.collect())
}

/// Added to the failure of a lookup, where it may be the reason.
const LITTLE_IS_ASKED: &str =
    "of the name services in nsswitch.conf only files and dns are asked; an IP address needs none";

/// Each of the host's addresses is tried, for a while.
fn connect_tcp(address: &str) -> io::Result<TcpStream> {
    let mut last = io::Error::from(ErrorKind::AddrNotAvailable);
    for address in addresses(address)? {
        let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        match connect_within(family, &address, ANSWER) {
            Err(error) => last = error,
            Ok(socket) => return Ok(socket.into()),
        }
    }
    Err(last)
}

/// Not for ever: a receiver whose queue of connections is full does not take one before it has room.
fn connect_unix(path: &Path, time: Duration) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(path)?;
    let socket = connect_within(AddressFamily::UNIX, &address, time)?;
    sockopt::set_socket_send_buffer_size(&socket, UNDERWAY)?;
    Ok(socket.into())
}

/// As `TcpStream::connect_timeout`, without its system calls, and for all families.
fn connect_within(family: AddressFamily, to: &impl SocketAddrArg, time: Duration) -> io::Result<OwnedFd> {
    let socket = rustix::net::socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    sockopt::set_socket_timeout(&socket, Timeout::Send, Some(time))?;
    rustix::net::connect(&socket, to).map_err(|error| match error {
        // socket(7): what it gives where the timeout has passed.
        Errno::INPROGRESS | Errno::AGAIN => ErrorKind::TimedOut.into(),
        error => io::Error::from(error),
    })?;
    Ok(socket)
}

/// A receiver's address.
#[derive(Debug)]
pub(super) enum Listener {
    /// With the socket's path and owner.
    Unix(UnixListener, PathBuf, u32),
    Tcp(TcpListener),
}

impl Listener {
    /// A socket that another process has left behind is replaced.
    pub(super) fn bind(address: &MigrationAddress) -> io::Result<Self> {
        match address {
            MigrationAddress::Unix(path) => {
                let listener = match UnixListener::bind(path) {
                    Err(error) if error.kind() == ErrorKind::AddrInUse && is_left_behind(path) => {
                        fs::remove_file(path)?;
                        UnixListener::bind(path)?
                    }
                    other => other?,
                };
                let owner = fs::symlink_metadata(path)?.uid();
                Ok(Self::Unix(listener, path.clone(), owner))
            }
            MigrationAddress::Tcp(address) => TcpListener::bind(&*addresses(address)?).map(Self::Tcp),
        }
    }

    /// The next connection. One of another user's process is closed.
    pub(super) fn accept(&self) -> io::Result<Socket> {
        match self {
            Self::Unix(listener, _, owner) => loop {
                let socket = Socket::Unix(listener.accept()?.0);
                if socket.is_ours(*owner)? {
                    return Ok(socket);
                }
                log::warn!("migration: a process of another user has tried to connect");
            },
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nodelay(true)?;
                Ok(Socket::Tcp(stream))
            }
        }
    }

    /// Ends it: [`accept`](Self::accept) fails from now on, also where it waits.
    pub(super) fn close(&self) {
        let fd = match self {
            Self::Unix(listener, path, _) => {
                let _ = fs::remove_file(path);
                listener.as_fd()
            }
            Self::Tcp(listener) => listener.as_fd(),
        };
        let _ = rustix::net::shutdown(fd, rustix::net::Shutdown::Both);
    }
}

/// Whether `path` is a socket that nobody listens at. Who has no room for a connection just now does.
fn is_left_behind(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket())
        && connect_unix(path, LOOK).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
}

/// Why there are no more frames.
#[derive(Debug)]
pub(super) enum End {
    /// What came is no frame.
    Garbage(String),
    /// The connection is gone.
    Lost(String),
}

/// Frames that arrive on a connection.
#[derive(Debug)]
pub(super) struct Frames {
    from: Half,
    /// What has come and is not taken yet is between `start` and `end`.
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    decoder: Decoder,
    /// Something has come.
    begun: bool,
    /// A frame may be as large as its command allows.
    takes_large: bool,
    /// When a frame has to be whole.
    until: Option<Instant>,
}

#[derive(Debug)]
struct Half {
    socket: Arc<Socket>,
    /// Descriptors are wanted; else the kernel drops what comes.
    takes: bool,
    files: Vec<OwnedFd>,
    /// Set where something comes.
    came: Arc<AtomicBool>,
}

impl Read for Half {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let count = match &*self.socket {
            Socket::Unix(stream) if self.takes => descriptors::receive(stream, bytes, &mut self.files),
            _ => (&mut &*self.socket).read(bytes),
        }?;
        self.note(count);
        Ok(count)
    }
}

impl Half {
    fn note(&self, count: usize) {
        if count > 0 {
            self.came.store(true, Ordering::Relaxed);
        }
    }

    /// Reads wait until then, or for ever.
    fn wait(&self, until: Option<Instant>) -> Result<(), End> {
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            return Err(End::Lost(LATE.to_owned()));
        }
        self.socket.set_read_timeout(left).map_err(|error| End::Lost(error.to_string()))
    }
}

impl Frames {
    pub(super) fn of(socket: &Arc<Socket>) -> Self {
        let from = Half { socket: Arc::clone(socket), takes: false, files: Vec::new(), came: Arc::default() };
        Self {
            from,
            buffer: vec![0; BUFFER],
            start: 0,
            end: 0,
            decoder: Decoder::new(),
            begun: false,
            takes_large: false,
            until: None,
        }
    }

    /// The first frame, all of which has to come within so long, however it is cut. After that nothing is in a hurry.
    pub(super) fn first(&mut self, within: Duration) -> Result<Item, End> {
        let until = Instant::now() + within;
        self.until = Some(until);
        let item = self.next();
        self.until = None;
        match item {
            Err(End::Lost(_)) if Instant::now() >= until => Err(End::Lost(LATE.to_owned())),
            item => self.from.wait(None).and(item),
        }
    }

    /// Sets `came` from now on where something comes, be it a part of a frame.
    pub(super) fn note_in(&mut self, came: &Arc<AtomicBool>) {
        self.from.came = Arc::clone(came);
    }

    /// Whether descriptors that come beside frames are wanted from now on.
    pub(super) fn want_files(&mut self, takes: bool) {
        self.from.takes = takes;
    }

    /// Whether a frame may be as large as its command allows, from now on: only one connection's may, so that they do not
    /// need as much each.
    pub(super) fn take_large(&mut self, takes: bool) {
        self.takes_large = takes;
    }

    /// The descriptors that have come.
    pub(super) fn take_files(&mut self) -> Vec<OwnedFd> {
        std::mem::take(&mut self.from.files)
    }

    /// The next frame, or the beginning of one with memory.
    pub(super) fn next(&mut self) -> Result<Item, End> {
        loop {
            if self.start == self.end {
                (self.start, self.end) = (0, 0);
                if let Some(until) = self.until {
                    self.from.wait(Some(until))?;
                }
                match self.from.read(&mut self.buffer) {
                    Ok(count) => self.end = count,
                    Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                    Err(error) if error.kind() == ErrorKind::InvalidData => {
                        return Err(End::Garbage(error.to_string()));
                    }
                    Err(error) => return Err(End::Lost(error.to_string())),
                }
            }
            let available = self.buffer.get(self.start..self.end).unwrap_or_default();
            if available.is_empty() {
                let decoder = std::mem::take(&mut self.decoder);
                let text = match decoder.finish() {
                    Ok(()) => "the other end has closed the connection".to_owned(),
                    Err(error) => error.to_string(),
                };
                return Err(End::Lost(text));
            }
            if !std::mem::replace(&mut self.begun, true) && is_tls(available) {
                let text = "the other end speaks TLS: tls_dir is wanted at this one, too";
                return Err(End::Garbage(text.to_owned()));
            }
            let mut rest = available;
            let item = self.decoder.push(&mut rest);
            self.start = self.end - rest.len();
            match item {
                Ok(Some(item)) => return Ok(item),
                Ok(None) if !self.takes_large && self.decoder.announced() > PAYLOAD => {
                    return Err(End::Garbage("a frame that is too large on this connection".to_owned()));
                }
                Ok(None) => {}
                Err(error) => return Err(End::Garbage(error.to_string())),
            }
        }
    }

    /// The contents that follow the beginning of a frame with memory.
    pub(super) fn contents(&mut self, bytes: &mut [u8]) -> Result<(), End> {
        let there = self.buffer.get(self.start..self.end).unwrap_or_default();
        let (now, later) = bytes.split_at_mut(there.len().min(bytes.len()));
        now.copy_from_slice(there.get(..now.len()).unwrap_or_default());
        self.start += now.len();
        self.from.read_exact(later).map_err(|error| End::Lost(error.to_string()))
    }

    /// The same, straight into guest memory. `false`: the link has to be read into a buffer.
    pub(super) fn contents_into(&mut self, memory: &GuestSlice<'_>) -> Result<bool, End> {
        let lost = |error: &dyn std::error::Error| End::Lost(error.to_string());
        let Some(fd) = self.from.socket.plain() else { return Ok(false) };
        let there = self.buffer.get(self.start..self.end).unwrap_or_default();
        memory.copy_from(there);
        let mut filled = there.len().min(memory.len());
        self.start += filled;
        let room = if memory.len() < LARGE { BUFFER } else { BETWEEN };
        while filled < memory.len() {
            let rest = memory.offset(filled).map_err(|error| lost(&error))?;
            let ahead = self.buffer.get_mut(..room).unwrap_or_default();
            let count = match vectors::receive(fd, &rest, ahead) {
                Ok(0) => return Err(lost(&io::Error::from(ErrorKind::UnexpectedEof))),
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::Interrupted => 0,
                Err(error) => return Err(lost(&error)),
            };
            self.from.note(count);
            (self.start, self.end) = (0, count.saturating_sub(rest.len()));
            filled += count.min(rest.len());
        }
        Ok(true)
    }
}

/// Whether a stream begins as TLS does: with a record of an alert or a handshake (RFC 8446 section 5.1). No frame does.
fn is_tls(bytes: &[u8]) -> bool {
    matches!(bytes, [0x15 | 0x16, 0x03, ..])
}

#[cfg(test)]
mod tests {
    use vmm_migration_protocol::{Message, SessionId};

    use super::*;

    #[test]
    fn a_socket_that_nobody_listens_at_is_replaced_and_one_in_use_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m");
        let address = MigrationAddress::Unix(path.clone());
        drop(UnixListener::bind(&path).unwrap());
        let listener = Listener::bind(&address).unwrap();
        assert_eq!(Listener::bind(&address).unwrap_err().kind(), ErrorKind::AddrInUse);
        listener.accept().expect("it was looked whether somebody listens");
        listener.close();
        assert!(listener.accept().is_err() && !path.exists());
        fs::write(&path, "a file").unwrap();
        assert!(Listener::bind(&address).is_err());
        assert_eq!(fs::read(&path).unwrap(), b"a file");
    }

    #[test]
    fn a_first_frame_that_comes_byte_by_byte_does_not_take_for_ever() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let socket = Arc::new(Socket::Unix(ours));
        let (over, ended) = std::sync::mpsc::channel::<()>();
        let drip = std::thread::spawn(move || {
            // The beginning of a frame as long as they come.
            let mut bytes = Message::Query(SessionId([7; 16])).encode().unwrap().encode().into_iter().cycle();
            let pause = Duration::from_millis(5);
            while ended.recv_timeout(pause) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                let _ = theirs.write(&[bytes.next().unwrap()]);
            }
        });
        let item = Frames::of(&socket).first(Duration::from_millis(50));
        assert!(matches!(&item, Err(End::Lost(text)) if text == LATE), "{item:?}");
        drop(over);
        drip.join().unwrap();
    }

    #[test]
    fn a_receiver_that_takes_no_more_connections_is_not_waited_for_for_ever() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m");
        let listener =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None);
        let listener = listener.unwrap();
        rustix::net::bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        rustix::net::listen(&listener, 0).unwrap();
        let time = Duration::from_millis(20);
        let _queued = connect_unix(&path, time).unwrap();
        assert_eq!(connect_unix(&path, time).unwrap_err().kind(), ErrorKind::TimedOut);
        // Nor by one that would listen there, too.
        let taken = Listener::bind(&MigrationAddress::Unix(path)).unwrap_err();
        assert_eq!(taken.kind(), ErrorKind::AddrInUse);
    }
}
