//! Certificates for migrations over TLS, made for one test.
#![allow(clippy::expect_used, reason = "tests fail by panicking")]

use std::fs;
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, Issuer, KeyPair, date_time_ymd,
};

/// Until when a certificate is good.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Good {
    /// For longer than the test takes.
    Still,
    /// It expired years ago.
    Expired,
}

/// An issuer of certificates.
#[derive(Debug)]
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Authority {
    /// A new one, with a key of its own.
    ///
    /// # Panics
    /// When it cannot be made.
    #[must_use]
    pub fn new(name: &str) -> Self {
        let key = KeyPair::generate().expect("a key");
        let mut params = parameters(name, &[]);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let pem = params.self_signed(&key).expect("a certificate").pem();
        Self { issuer: Issuer::new(params, key), pem }
    }

    /// Its own certificate, in PEM.
    #[must_use]
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// A certificate for hosts, and its key, both in PEM.
    ///
    /// # Panics
    /// When it cannot be made.
    #[must_use]
    pub fn issue(&self, hosts: &[&str], good: Good) -> (String, String) {
        let key = KeyPair::generate().expect("a key");
        let mut params = parameters("an end", hosts);
        if good == Good::Expired {
            params.not_before = date_time_ymd(2001, 1, 1);
            params.not_after = date_time_ymd(2002, 1, 1);
        }
        let certificate = params.signed_by(&key, &self.issuer).expect("a certificate");
        (certificate.pem(), key.serialize_pem())
    }

    /// Makes the folder `at` with all that both ends need, at `hosts`, and gives it.
    ///
    /// # Panics
    /// When it cannot be made.
    #[must_use]
    pub fn folder(&self, at: PathBuf, hosts: &[&str]) -> PathBuf {
        fs::create_dir_all(&at).expect("a folder");
        fs::write(at.join("ca-cert.pem"), &self.pem).expect("a file");
        write(&at, "server", &self.issue(hosts, Good::Still));
        write(&at, "client", &self.issue(&["source.example"], Good::Still));
        at
    }
}

/// Puts certificate and key of `end`, which is `server` or `client`, into `folder`.
///
/// # Panics
/// When they cannot be written.
pub fn write(folder: &Path, end: &str, (certificate, key): &(String, String)) {
    fs::write(folder.join(format!("{end}-cert.pem")), certificate).expect("a file");
    fs::write(folder.join(format!("{end}-key.pem")), key).expect("a file");
}

fn parameters(name: &str, hosts: &[&str]) -> CertificateParams {
    let hosts: Vec<_> = hosts.iter().map(|host| (*host).to_owned()).collect();
    let mut params = CertificateParams::new(hosts).expect("names of hosts");
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params
}
