//! Mutual TLS 1.3: who both ends are is in files of a folder, and each wants to see the other's.

mod stream;

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::{ClientConfig, ClientConnection, Resumption};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::{ServerConfig, ServerConnection, VerifierBuilderError, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{AlertDescription, Error, RootCertStore};

pub(super) use stream::TlsStream;

/// Certificates of those that the other end's must be issued by.
const CA: &str = "ca-cert.pem";

/// Certificate and key of an end: this name and these endings.
const CERTIFICATE: &str = "-cert.pem";
const KEY: &str = "-key.pem";

/// Most bytes of a file that are read.
const MOST: u64 = 1 << 20;

/// What a source shows, and expects of a receiver.
#[derive(Debug, Clone)]
pub(super) struct Client(Arc<ClientConfig>);

impl Client {
    /// From the files of `folder`.
    pub(super) fn load(folder: &Path) -> Result<Self, TlsError> {
        let ours = Identity::load(folder, "client")?;
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])
            .map_err(TlsError::Setup)?
            .with_root_certificates(roots(folder)?)
            .with_client_auth_cert(ours.chain, ours.key)
            .map_err(|why| TlsError::Unusable { path: ours.path, why })?;
        // Each connection shows certificates anew.
        config.resumption = Resumption::disabled();
        Ok(Self(Arc::new(config)))
    }

    /// Greets the receiver at `address`, `host:port`, whose certificate must be for that host.
    pub(super) fn greet(
        &self,
        socket: TcpStream,
        address: &str,
        wanted: &mut dyn FnMut() -> bool,
    ) -> io::Result<TlsStream> {
        let name = ServerName::try_from(host_of(address).to_owned())
            .map_err(|_| TlsError::Name(address.to_owned()))?;
        let connection = ClientConnection::new(Arc::clone(&self.0), name).map_err(TlsError::Setup)?;
        TlsStream::greet(socket, connection.into(), wanted)
    }
}

/// What a receiver shows, and expects of a source.
#[derive(Debug, Clone)]
pub(super) struct Server(Arc<ServerConfig>);

impl Server {
    /// From the files of `folder`.
    pub(super) fn load(folder: &Path) -> Result<Self, TlsError> {
        let ours = Identity::load(folder, "server")?;
        let clients = WebPkiClientVerifier::builder_with_provider(Arc::new(roots(folder)?), provider())
            .build()
            .map_err(|source| TlsError::Roots { path: folder.join(CA), source })?;
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])
            .map_err(TlsError::Setup)?
            .with_client_cert_verifier(clients)
            .with_single_cert(ours.chain, ours.key)
            .map_err(|why| TlsError::Unusable { path: ours.path, why })?;
        config.send_tls13_tickets = 0;
        Ok(Self(Arc::new(config)))
    }

    /// Greets a source.
    pub(super) fn greet(&self, socket: TcpStream, wanted: &mut dyn FnMut() -> bool) -> io::Result<TlsStream> {
        let connection = ServerConnection::new(Arc::clone(&self.0)).map_err(TlsError::Setup)?;
        TlsStream::greet(socket, connection.into(), wanted)
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

/// The host of `host:port`, without the brackets of an IPv6 address.
fn host_of(address: &str) -> &str {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host)
}

/// An end's certificate, with those between it and its issuer, and its key.
struct Identity {
    path: PathBuf,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

impl Identity {
    fn load(folder: &Path, end: &str) -> Result<Self, TlsError> {
        let path = folder.join(format!("{end}{CERTIFICATE}"));
        let chain = certificates(&path)?;
        let at = folder.join(format!("{end}{KEY}"));
        let key = PrivateKeyDer::from_pem_slice(&read(&at)?);
        let key =
            key.map_err(|source| TlsError::Pem { path: at, what: "private key", source: Pem(source) })?;
        Ok(Self { path, chain, key })
    }
}

fn roots(folder: &Path) -> Result<RootCertStore, TlsError> {
    let path = folder.join(CA);
    let mut roots = RootCertStore::empty();
    for certificate in certificates(&path)? {
        roots.add(certificate).map_err(|why| TlsError::Unusable { path: path.clone(), why })?;
    }
    Ok(roots)
}

/// All certificates of a file, of which there is at least one.
fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let bytes = read(path)?;
    let all = CertificateDer::pem_slice_iter(&bytes).collect::<Result<Vec<_>, _>>();
    let all = all.and_then(|all| if all.is_empty() { Err(pem::Error::NoItemsFound) } else { Ok(all) });
    all.map_err(|source| TlsError::Pem { path: path.to_owned(), what: "certificate", source: Pem(source) })
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|file| file.take(MOST).read_to_end(&mut bytes));
    read.map_err(|source| TlsError::File { path: path.to_owned(), source })?;
    Ok(bytes)
}

/// TLS cannot begin, or go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// A file of the folder cannot be read.
    #[error("TLS: cannot read {}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file of the folder is not what its name says.
    #[error("TLS: there is no {what} to be read in {}", path.display())]
    Pem {
        /// Which.
        path: PathBuf,
        /// What ought to be in it.
        what: &'static str,
        /// What is wrong.
        source: Pem,
    },
    /// A certificate cannot be used, or its key is another's.
    #[error("TLS: the certificate in {} cannot be used: {}", path.display(), Unusable(.why))]
    Unusable {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        why: Error,
    },
    /// The issuers of the other end's certificate cannot be used.
    #[error("TLS: the certificates in {}", path.display())]
    Roots {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        source: VerifierBuilderError,
    },
    /// The library refuses what this build asks of it.
    #[error("TLS cannot be set up")]
    Setup(#[source] Error),
    /// No certificate can be for that host.
    #[error("TLS: {0:?} has no host that a certificate can be for")]
    Name(String),
    /// The other end does not speak TLS.
    #[error("the other end does not speak TLS: tls_dir is wanted there, too")]
    Plain,
    /// The handshake took too long.
    #[error("the other end has not finished the TLS handshake in time")]
    Slow,
    /// The connection went down in the handshake.
    #[error("the other end has closed the connection in the TLS handshake: does it speak TLS?")]
    Lost(#[source] io::Error),
    /// An end does not accept the other.
    #[error("{}", Refusal(.0))]
    Refused(Error),
    /// What came later is not this connection's.
    #[error("{}", Refusal(.0))]
    Broken(Error),
}

impl TlsError {
    /// Why a handshake ended.
    fn handshake(error: Error) -> Self {
        match error {
            // The first bytes were none of TLS.
            Error::InvalidMessage(_) => Self::Plain,
            other => Self::Refused(other),
        }
    }
}

impl From<TlsError> for io::Error {
    fn from(error: TlsError) -> Self {
        Self::new(io::ErrorKind::InvalidData, error)
    }
}

/// What is wrong with PEM.
#[derive(Debug)]
pub struct Pem(pem::Error);

impl fmt::Display for Pem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            pem::Error::NoItemsFound => f.write_str("it has none in PEM"),
            pem::Error::MissingSectionEnd { .. } => f.write_str("it ends before its end marker"),
            pem::Error::IllegalSectionStart { .. } => f.write_str("a marker in it is malformed"),
            other => write!(f, "{other}"),
        }
    }
}

impl std::error::Error for Pem {}

/// What is wrong with a certificate of this end's.
struct Unusable<'a>(&'a Error);

impl fmt::Display for Unusable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            // The library takes every certificate for the other end's.
            Error::InvalidCertificate(error) => write!(f, "{error}"),
            Error::InconsistentKeys(_) => f.write_str("the key is another's"),
            other => write!(f, "{other}"),
        }
    }
}

/// Which end does not accept what, as an operator reads it.
struct Refusal<'a>(&'a Error);

impl fmt::Display for Refusal<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Error::InvalidCertificate(error) => {
                write!(f, "TLS: the other end's certificate is refused: {error}")
            }
            Error::NoCertificatesPresented => f.write_str("TLS: the other end shows no certificate"),
            Error::AlertReceived(alert) => {
                let why = match alert {
                    AlertDescription::UnknownCA => "it does not know its issuer",
                    AlertDescription::CertificateExpired => "it is expired there, or not valid yet",
                    AlertDescription::CertificateRequired => "it wants one",
                    AlertDescription::ProtocolVersion => "it speaks no TLS 1.3",
                    _ => return write!(f, "TLS: the other end refuses this one: alert {alert:?}"),
                };
                write!(f, "TLS: the other end refuses this end's certificate: {why} (alert {alert:?})")
            }
            other => write!(f, "TLS: {other}"),
        }
    }
}

#[cfg(test)]
mod tests;
