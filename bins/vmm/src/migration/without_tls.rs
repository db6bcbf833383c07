//! What [`tls`](self) is in a build without it: there is nothing of these types.

use std::convert::Infallible;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::path::Path;

/// TLS cannot begin.
#[derive(Debug, thiserror::Error)]
#[error("this build has no TLS")]
pub struct TlsError;

#[derive(Debug, Clone)]
pub(super) struct Client(Infallible);

impl Client {
    pub(super) fn load(_: &Path) -> Result<Self, TlsError> {
        Err(TlsError)
    }

    pub(super) fn greet(&self, _: TcpStream, _: &str, _: &mut dyn FnMut() -> bool) -> io::Result<TlsStream> {
        match self.0 {}
    }
}

#[derive(Debug, Clone)]
pub(super) struct Server(Infallible);

impl Server {
    pub(super) fn load(_: &Path) -> Result<Self, TlsError> {
        Err(TlsError)
    }

    pub(super) fn greet(&self, _: TcpStream, _: &mut dyn FnMut() -> bool) -> io::Result<TlsStream> {
        match self.0 {}
    }
}

#[derive(Debug)]
pub(super) struct TlsStream(Infallible);

impl TlsStream {
    pub(super) fn socket(&self) -> &TcpStream {
        match self.0 {}
    }

    pub(super) fn shutdown(&self, _: Shutdown) -> io::Result<()> {
        match self.0 {}
    }
}

impl Read for &TlsStream {
    fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
        match self.0 {}
    }
}

impl Write for &TlsStream {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        match self.0 {}
    }

    fn flush(&mut self) -> io::Result<()> {
        match self.0 {}
    }
}
