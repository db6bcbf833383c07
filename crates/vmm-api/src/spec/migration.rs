//! What is asked of the two ends of a migration, in checked form.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::snapshot::Overrides;
use super::{Checked, MachineSpec, foreign};
use crate::config::wire::Walk;
use crate::config::{
    Compression, Fault, FaultKind, MigrationMode, ReceiveMigrationData, SendMigrationData, TimeoutStrategy,
};

/// The most connections that may be asked for.
const MAX_CONNECTIONS: u64 = 128;

/// Where the two ends of a migration meet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MigrationAddress {
    /// A UNIX socket.
    Unix(PathBuf),
    /// `host:port`.
    Tcp(String),
}

impl MigrationAddress {
    fn parse(field: &str, url: &str) -> Result<Self, Fault> {
        if let Some(path) = url.strip_prefix("unix:").filter(|path| is_path(path)) {
            return Ok(Self::Unix(Path::new(path).to_owned()));
        }
        let port = |address: &&str| {
            let found = address.rsplit_once(':').map(|(host, port)| (host, port.parse::<u16>()));
            matches!(found, Some((host, Ok(port))) if !host.is_empty() && port != 0)
        };
        if let Some(address) = url.strip_prefix("tcp:").filter(port) {
            return Ok(Self::Tcp(address.to_owned()));
        }
        let message = format!("expected unix:/path or tcp:host:port, found {url:?}");
        Err(Fault::new(field, FaultKind::Invalid, message))
    }
}

fn is_path(path: &str) -> bool {
    !path.is_empty() && !path.contains('\0')
}

/// A VM to be given away.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SendSpec {
    /// Where the other end listens.
    pub address: MigrationAddress,
    /// Whether memory passes by descriptors; the address is a UNIX socket's.
    pub local: bool,
    /// Longest that the guest should stand still.
    pub downtime: Duration,
    /// Longest that all should take.
    pub timeout: Duration,
    /// What happens after that.
    pub strategy: TimeoutStrategy,
    /// Connections to ask for, 1 to 128.
    pub connections: u16,
    /// Folder of the certificates. `None`: no TLS. Of TCP only.
    pub tls_dir: Option<PathBuf>,
    /// Only ask whether the destination would take it.
    pub check: bool,
    /// Who asks is not told of the end.
    pub detach: bool,
    /// The VMM goes on, without a VM.
    pub preserve: bool,
    /// Most bytes per second; 0 is no limit.
    pub max_bandwidth: u64,
    /// Whether memory is compressed.
    pub compression: Compression,
    /// vCPUs may be slowed down.
    pub auto_converge: bool,
    /// The guest goes on at the destination before all of its memory is there.
    pub postcopy: bool,
}

impl SendSpec {
    /// Checks a request.
    ///
    /// # Errors
    /// All faults, with their JSON paths.
    pub fn check(config: &SendMigrationData) -> Result<Self, Vec<Fault>> {
        let mut faults = Walk::faults_of(config);
        let postcopy = config.memory_mode == MigrationMode::Postcopy;
        if postcopy && config.local {
            let message = "contradicts local, with which all memory is there at once";
            faults.push(Fault::new("memory_mode", FaultKind::Invalid, message));
        }
        let connections = u16::try_from(config.connections).unwrap_or(u16::MAX);
        if !(1..=MAX_CONNECTIONS).contains(&config.connections) {
            let message = format!("expected 1 to {MAX_CONNECTIONS}, found {}", config.connections);
            faults.push(Fault::new("connections", FaultKind::Invalid, message));
        }
        if config.check && config.detach {
            faults.push(Fault::new(
                "detach",
                FaultKind::Invalid,
                "contradicts check, whose answer is all of it",
            ));
        }
        let address = MigrationAddress::parse("destination_url", &config.destination_url)
            .map_err(|fault| faults.push(fault));
        if config.local && matches!(address, Ok(MigrationAddress::Tcp(_))) {
            let message = "memory passes by descriptors through UNIX sockets only".to_owned();
            faults.push(Fault::new("local", FaultKind::Invalid, message));
        }
        let tls_dir = check_tls(config.tls_dir.as_deref(), address.as_ref().ok(), &mut faults);
        match address {
            Ok(address) if faults.is_empty() => Ok(Self {
                address,
                tls_dir,
                local: config.local,
                downtime: Duration::from_millis(config.downtime_ms),
                timeout: Duration::from_secs(config.timeout_s),
                strategy: config.timeout_strategy,
                connections,
                check: config.check,
                detach: config.detach,
                preserve: config.preserve_source,
                max_bandwidth: config.max_bandwidth,
                compression: config.compression,
                auto_converge: config.auto_converge,
                postcopy,
            }),
            _ => Err(faults),
        }
    }
}

/// A VM to be waited for.
#[derive(Clone, Debug, PartialEq)]
pub struct ReceiveSpec {
    /// Where to listen.
    pub address: MigrationAddress,
    /// Folder of the certificates. `None`: no TLS. Of TCP only.
    pub tls_dir: Option<PathBuf>,
    /// The client does not wait for the VM.
    pub detach: bool,
    /// What the source may name; `None`: the default of the address.
    paths: Option<Vec<PathBuf>>,
    overrides: Overrides,
}

impl ReceiveSpec {
    /// Checks a request.
    ///
    /// # Errors
    /// All faults, with their JSON paths.
    pub fn check(config: &ReceiveMigrationData) -> Result<Self, Vec<Fault>> {
        let mut faults = Walk::faults_of(config);
        let address =
            MigrationAddress::parse("receiver_url", &config.receiver_url).map_err(|fault| faults.push(fault));
        let tls_dir = check_tls(config.tls_dir.as_deref(), address.as_ref().ok(), &mut faults);
        let overrides = Overrides {
            disks: config.disks.clone().unwrap_or_default(),
            serial: config.serial.clone(),
            console: config.console.clone(),
            debug_console: config.debug_console.clone(),
        };
        match address {
            Ok(address) if faults.is_empty() => {
                Ok(Self { address, tls_dir, detach: config.detach, paths: config.paths.clone(), overrides })
            }
            _ => Err(faults),
        }
    }

    /// What the source of a VM of `spec` names without being allowed to: places in the document, and paths.
    ///
    /// Whoever connects to a UNIX socket is of this end's user, and so could open those files itself: if no paths are
    /// given, it may name any. Elsewhere it may name none.
    #[must_use]
    pub fn foreign(&self, spec: &MachineSpec) -> Vec<(String, PathBuf)> {
        let allowed = match (&self.paths, &self.address) {
            (Some(paths), _) => paths.as_slice(),
            (None, MigrationAddress::Tcp(_)) => &[],
            (None, MigrationAddress::Unix(_)) => return Vec::new(),
        };
        let mut found = foreign::paths(spec);
        let index = |id: &String| spec.disks.iter().position(|disk| disk.identity.id.as_str() == id.as_str());
        let disks = self.overrides.disks.iter().filter_map(|disk| index(&disk.id));
        let mut own: Vec<String> = disks.map(|index| format!("disks[{index}].path")).collect();
        for (name, to) in [
            ("serial", &self.overrides.serial),
            ("console", &self.overrides.console),
            ("debug_console", &self.overrides.debug_console),
        ] {
            if to.is_some() {
                own.extend([format!("{name}.file"), format!("{name}.socket")]);
            }
        }
        found.retain(|(place, path)| !own.contains(place) && !foreign::is_allowed(path, allowed));
        found
    }

    /// The configuration of the VM here: `document` is what the source sent.
    ///
    /// # Errors
    /// What is wrong with the document, or with what is to replace parts of it.
    pub fn configure(&self, document: &[u8]) -> Result<Checked, Vec<Fault>> {
        self.overrides.configure(document)
    }
}

/// TLS is for TCP.
fn check_tls(
    folder: Option<&Path>,
    address: Option<&MigrationAddress>,
    faults: &mut Vec<Fault>,
) -> Option<PathBuf> {
    if let (Some(_), Some(MigrationAddress::Unix(_))) = (folder, address) {
        let message = "TLS is for tcp:host:port; a UNIX socket is this host's";
        faults.push(Fault::new("tls_dir", FaultKind::Invalid, message));
    }
    folder.map(Path::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn send(json: &str) -> Result<SendSpec, Vec<String>> {
        let config: SendMigrationData = serde_json::from_str(json).unwrap();
        SendSpec::check(&config).map_err(|faults| faults.into_iter().map(|fault| fault.path).collect())
    }

    #[test]
    fn addresses_are_sockets_or_hosts_with_ports() {
        let of = |url: &str| MigrationAddress::parse("u", url).ok();
        assert_eq!(of("unix:/run/m"), Some(MigrationAddress::Unix("/run/m".into())));
        assert_eq!(of("tcp:host:70"), Some(MigrationAddress::Tcp("host:70".into())));
        assert_eq!(of("tcp:[::1]:70"), Some(MigrationAddress::Tcp("[::1]:70".into())));
        for wrong in
            ["", "unix:", "tcp:host", "tcp::70", "tcp:host:0", "tcp:host:70000", "file:///x", "unix:a\0b"]
        {
            assert_eq!(of(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn all_faults_of_a_request_are_told() {
        assert!(send(r#"{"destination_url": "unix:/m"}"#).is_ok());
        let faults = send(
            r#"{"destination_url": "x", "connections": 129, "memory_mode": "Postcopy", "local": true,
                "tls_dir": "/t"}"#,
        );
        let mut faults = faults.unwrap_err();
        faults.sort();
        assert_eq!(faults, ["connections", "destination_url", "memory_mode"]);
        assert!(send(r#"{"destination_url": "unix:/m", "memory_mode": "Postcopy"}"#).unwrap().postcopy);
        let faults = send(r#"{"destination_url": "unix:/m", "check": true, "detach": true}"#);
        assert_eq!(faults.unwrap_err(), ["detach"]);
    }

    #[test]
    fn memory_passes_by_descriptors_through_unix_sockets_only() {
        assert!(send(r#"{"destination_url": "unix:/m", "local": true}"#).unwrap().local);
        assert_eq!(send(r#"{"destination_url": "tcp:a:1", "local": true}"#).unwrap_err(), ["local"]);
    }

    #[test]
    fn tls_is_for_tcp() {
        let spec = send(r#"{"destination_url": "tcp:h:1", "tls_dir": "/t"}"#).unwrap();
        assert_eq!(spec.tls_dir.as_deref(), Some(Path::new("/t")));
        assert_eq!(send(r#"{"destination_url": "tcp:h:1"}"#).unwrap().tls_dir, None);
        let faults = send(r#"{"destination_url": "unix:/m", "tls_dir": "/t"}"#).unwrap_err();
        assert_eq!(faults, ["tls_dir"]);
        let config = r#"{"receiver_url": "unix:/m", "tls_dir": "/t"}"#;
        let faults = ReceiveSpec::check(&serde_json::from_str(config).unwrap()).unwrap_err();
        assert_eq!((faults.len(), faults[0].path.as_str()), (1, "tls_dir"));
    }
}
