//! A connection that is encrypted: one end may be read by one thread and written by another.
//!
//! A `rustls` connection is one object, and both directions change it. It is behind a lock that is held for the work on
//! bytes alone, never while the socket is waited for: reader and writer have what came from, and what goes to, the socket
//! in buffers of their own. So a reader that waits holds nobody, and the socket's shutdown and timeouts work as on any.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustls::{Connection, Error};

use super::TlsError;

/// Bytes taken from the socket at a time.
const BUFFER: usize = 64 << 10;

/// How long a handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// How often a handshake that waits looks whether it is still wanted.
const STEP: Duration = Duration::from_millis(50);

/// How long one waits for a peer that was told why it is refused.
const FAREWELL: Duration = Duration::from_secs(1);

/// An encrypted connection.
#[derive(Debug)]
pub(crate) struct TlsStream {
    socket: TcpStream,
    /// Locked last, and for no longer than it takes to work on bytes that are there.
    connection: Mutex<Connection>,
    /// The reader's.
    arrived: Mutex<Arrived>,
    /// The writer's.
    leaving: Mutex<Leaving>,
}

/// What came from the socket and is not decrypted yet.
#[derive(Debug)]
struct Arrived {
    buffer: Vec<u8>,
    start: usize,
    end: usize,
}

/// What is encrypted and not on the socket yet.
#[derive(Debug, Default)]
struct Leaving {
    sealed: Vec<u8>,
    /// So much of `sealed` is on the socket.
    gone: usize,
    /// So many bytes of the last call's are in it, and the caller does not know.
    taken: usize,
}

impl TlsStream {
    /// Greets the other end. It ends when `wanted` says no, or at the time limit.
    ///
    /// # Errors
    /// What either end does not accept, in a [`TlsError`]; the other end is told why.
    pub(super) fn greet(
        socket: TcpStream,
        mut connection: Connection,
        wanted: &mut dyn FnMut() -> bool,
    ) -> io::Result<Self> {
        socket.set_read_timeout(Some(STEP))?;
        socket.set_write_timeout(Some(STEP))?;
        let until = Instant::now() + HANDSHAKE;
        while connection.is_handshaking() || connection.wants_write() {
            let step = step(&socket, &mut connection);
            match step {
                Ok(()) => {}
                Err(Step::Waits) if !wanted() => return Err(ErrorKind::Interrupted.into()),
                Err(Step::Waits) => {}
                Err(Step::Lost(error)) => return Err(TlsError::Lost(error).into()),
                Err(Step::Refused(error)) => {
                    say_farewell(&socket, &mut connection, wanted);
                    return Err(TlsError::handshake(error).into());
                }
            }
            if Instant::now() >= until {
                return Err(TlsError::Slow.into());
            }
        }
        socket.set_read_timeout(None)?;
        socket.set_write_timeout(None)?;
        Ok(Self {
            socket,
            connection: Mutex::new(connection),
            arrived: Mutex::new(Arrived { buffer: vec![0; BUFFER], start: 0, end: 0 }),
            leaving: Mutex::default(),
        })
    }

    /// The socket under it, for timeouts.
    pub(crate) fn socket(&self) -> &TcpStream {
        &self.socket
    }

    /// Where nothing more is to be written, the other end is told so.
    pub(crate) fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        if how == Shutdown::Write {
            let mut leaving = lock(&self.leaving);
            let mut connection = lock(&self.connection);
            connection.send_close_notify();
            leaving.seal(&mut connection)?;
            drop(connection);
            // One that does not take it sees the end of the stream.
            let _ = leaving.drain(&self.socket);
        }
        self.socket.shutdown(how)
    }

    /// Decrypts what has arrived, up to the first bytes that can be read. Gives whether there was anything.
    fn decrypt(&self, arrived: &mut Arrived) -> io::Result<bool> {
        let mut connection = lock(&self.connection);
        let mut bytes = arrived.buffer.get(arrived.start..arrived.end).unwrap_or_default();
        if bytes.is_empty() {
            return Ok(false);
        }
        connection.read_tls(&mut bytes)?;
        arrived.start = arrived.end - bytes.len();
        let result = connection.process_new_packets();
        drop(connection);
        result.map_err(|error| {
            // The other end is told, if the writer is not at it.
            if let Ok(mut leaving) = self.leaving.try_lock() {
                let sealed = leaving.seal(&mut lock(&self.connection));
                let _ = sealed.and_then(|()| leaving.drain(&self.socket));
            }
            io::Error::from(TlsError::Broken(error))
        })?;
        Ok(true)
    }
}

impl Read for &TlsStream {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let mut arrived = lock(&self.arrived);
        loop {
            let result = lock(&self.connection).reader().read(bytes);
            match result {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                // There is no end that was told of, and this is one.
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(0),
                other => return other,
            }
            if self.decrypt(&mut arrived)? {
                continue;
            }
            arrived.start = 0;
            arrived.end = 0;
            arrived.end = (&self.socket).read(&mut arrived.buffer)?;
            if arrived.end == 0 {
                // Told so, the connection gives an end.
                lock(&self.connection).read_tls(&mut io::empty())?;
            }
        }
    }
}

impl Write for &TlsStream {
    /// What ends with [`ErrorKind::WouldBlock`] is to be called again with the same bytes: some may be on the way.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut leaving = lock(&self.leaving);
        if leaving.taken == 0 {
            let mut connection = lock(&self.connection);
            leaving.taken = connection.writer().write(bytes)?;
            leaving.seal(&mut connection)?;
        }
        leaving.drain(&self.socket)?;
        Ok(std::mem::take(&mut leaving.taken).min(bytes.len()))
    }

    fn flush(&mut self) -> io::Result<()> {
        lock(&self.leaving).drain(&self.socket)
    }
}

impl Leaving {
    /// Takes over what is encrypted.
    fn seal(&mut self, connection: &mut Connection) -> io::Result<()> {
        while connection.wants_write() {
            connection.write_tls(&mut self.sealed)?;
        }
        Ok(())
    }

    /// Gives it to the socket.
    fn drain(&mut self, mut socket: &TcpStream) -> io::Result<()> {
        while let Some(rest) = self.sealed.get(self.gone..).filter(|rest| !rest.is_empty()) {
            match socket.write(rest) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(count) => self.gone += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.sealed.clear();
        self.gone = 0;
        Ok(())
    }
}

/// Why a step of a handshake is not done.
enum Step {
    /// The other end is slow.
    Waits,
    Lost(io::Error),
    Refused(Error),
}

/// Writes what is to be written, or reads.
fn step(mut socket: &TcpStream, connection: &mut Connection) -> Result<(), Step> {
    let moved = if connection.wants_write() {
        connection.write_tls(&mut socket)
    } else {
        connection.read_tls(&mut socket).and_then(|count| match count {
            0 => Err(ErrorKind::UnexpectedEof.into()),
            count => Ok(count),
        })
    };
    match moved {
        Ok(_) => connection.process_new_packets().map(drop).map_err(Step::Refused),
        Err(error) if error.kind() == ErrorKind::Interrupted => Ok(()),
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => Err(Step::Waits),
        Err(error) => Err(Step::Lost(error)),
    }
}

/// Tells the other end why it is refused, and reads on: what it has sent meanwhile would else reset the connection, and
/// what it was told be lost.
fn say_farewell(mut socket: &TcpStream, connection: &mut Connection, wanted: &mut dyn FnMut() -> bool) {
    let until = Instant::now() + FAREWELL;
    while connection.wants_write() && connection.write_tls(&mut socket).is_ok() {}
    let _ = socket.shutdown(Shutdown::Write);
    let mut buffer = [0; 4096];
    while Instant::now() < until && wanted() {
        match socket.read(&mut buffer) {
            Ok(0) => return,
            Ok(_) => {}
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(_) => return,
        }
    }
}

/// What a panicking thread has left is as good as what an error leaves.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
