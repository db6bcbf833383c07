//! A TCP port on the loopback interface that leads to a UNIX socket: for programs that speak HTTP over TCP only.

use std::io;
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

/// A running bridge; it takes no more connections once dropped.
#[derive(Debug)]
pub struct Bridge {
    address: SocketAddr,
    ends: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Bridge {
    /// A bridge from a free port to `socket`.
    ///
    /// # Errors
    /// There is no port to listen on.
    pub fn to(socket: &Path) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let address = listener.local_addr()?;
        let ends = Arc::new(AtomicBool::new(false));
        let (told, socket) = (Arc::clone(&ends), socket.to_owned());
        let thread = thread::spawn(move || serve(&listener, &socket, &told));
        Ok(Self { address, ends, thread: Some(thread) })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::SeqCst);
        // It waits for a connection.
        let _ = TcpStream::connect(self.address);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(listener: &TcpListener, socket: &Path, ends: &AtomicBool) {
    for client in listener.incoming() {
        if ends.load(Ordering::SeqCst) {
            return;
        }
        let Ok(client) = client else { continue };
        let socket: PathBuf = socket.to_owned();
        // A client that cannot be served sees its connection closed.
        thread::spawn(move || {
            let _ = carry(&client, &socket);
        });
    }
}

fn carry(client: &TcpStream, socket: &Path) -> io::Result<()> {
    let server = UnixStream::connect(socket)?;
    client.set_nodelay(true)?;
    let (from_client, to_server) = (client.try_clone()?, server.try_clone()?);
    let upward = thread::spawn(move || {
        let _ = io::copy(&mut &from_client, &mut &to_server);
        let _ = to_server.shutdown(Shutdown::Write);
    });
    let _ = io::copy(&mut &server, &mut &*client);
    let _ = client.shutdown(Shutdown::Both);
    let _ = upward.join();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;

    #[test]
    fn bytes_go_both_ways_and_the_end_too() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let echo = thread::spawn(move || {
            let (mut client, _) = listener.accept().unwrap();
            let mut text = String::new();
            client.read_to_string(&mut text).unwrap();
            client.write_all(text.to_uppercase().as_bytes()).unwrap();
        });
        let bridge = Bridge::to(&path).unwrap();
        assert!(bridge.address().ip().is_loopback());
        let mut client = TcpStream::connect(bridge.address()).unwrap();
        client.write_all(b"hello").unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let mut text = String::new();
        client.read_to_string(&mut text).unwrap();
        assert_eq!(text, "HELLO");
        echo.join().unwrap();
    }
}
