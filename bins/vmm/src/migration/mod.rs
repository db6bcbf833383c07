//! Live migration: sockets, threads and the clock around the machines of `vmm-migration-protocol`, which decide.
//!
//! | module | thread | what |
//! |---|---|---|
//! | `outgoing` | `migration`, `migration-open`, `migration-ask` | drives the source; finds the destination; asks what became of the session |
//! | `sender` | `migration-out`, one per connection | writes frames and memory, so that the driver never waits for the link |
//! | `straight`, `vectors` | | memory to and from a link without a copy |
//! | `course` | | what a pass sends, which these threads share |
//! | `joining` | `migration-join` | opens further connections |
//! | `incoming` | `migration` | drives the destination, and answers what became of sessions |
//! | `opening` | `migration-open`, `migration-all` | comes to a receiver's address; takes connections there |
//! | `landing` | `migration-in`, one per connection | reads a connection; memory lands from here |
//! | `ahead` | `migration-ahead` | allocates a destination's memory ahead of what arrives |
//! | `backlog` | | what connections have said and a driver has not heard yet |
//! | `inputs` | | what a source's driver hears |
//! | `fit` | | whether a VM can be this host's |
//! | `pace`, `slowing` | `migration-slow` | the limit of bandwidth; slower vCPUs |
//! | `making` | `migration-make` | steps of a destination that may take long |
//! | `link` | | sockets, and frames out of them |
//! | `descriptors` | | memory that is handed over instead of being sent |
//! | `postcopy` | | memory that follows the guest: see there |
//! | `tls` | | sockets that are encrypted, with the cargo feature of that name |
//!
//! What concerns the VM is the control thread's: `vmm::sending` and `vmm::receiving`.

mod ahead;
mod aside;
mod backlog;
mod course;
mod descriptors;
mod fit;
pub(crate) mod incoming;
pub(crate) mod inputs;
mod joining;
mod landing;
mod link;
mod making;
mod opening;
pub(crate) mod outgoing;
mod pace;
mod postcopy;
mod sender;
mod slowing;
mod straight;
#[cfg_attr(not(feature = "tls"), path = "without_tls.rs")]
mod tls;
mod turn;
mod vectors;

use std::path::Path;
use std::time::{Duration, Instant};

use vmm_api::config::{self, Compression, FaultKind};
use vmm_device_model::thread::ThreadKind;
use vmm_migration_protocol::Features;

pub(crate) use aside::Aside;
pub(crate) use descriptors::ranges;
pub(crate) use fit::{Host, needs};
pub use incoming::{Arrival, ReceiveError, ReceiveStep};
pub use outgoing::{SendError, SendStep};
pub use postcopy::{FillStep, SupplyStep};
pub(crate) use slowing::Slowing;
pub use tls::TlsError;
pub(crate) use turn::LOAD;

/// The threads of a migration.
pub(crate) const THREAD: ThreadKind = ThreadKind("migration");

/// How often a driver looks whether it is still wanted, at least.
const LOOK: Duration = Duration::from_millis(100);

/// How long a closed connection is read on.
const LINGER: Duration = Duration::from_secs(1);

/// Refuses compression in a build that has none.
pub(crate) fn check_compression(wanted: Compression) -> Result<(), Vec<config::Fault>> {
    if wanted == Compression::None || Features::COMPRESSION.contains(Features::LZ4) {
        return Ok(());
    }
    let message = "this build does not compress (cargo feature compression)";
    Err(vec![config::Fault::new("compression", FaultKind::NotBuilt, message)])
}

/// Refuses certificates in a build that can do nothing with them.
pub(crate) fn check_tls(tls_dir: Option<&Path>) -> Result<(), Vec<config::Fault>> {
    match tls_dir {
        Some(_) if cfg!(not(feature = "tls")) => {
            let message = "this build has no TLS (cargo feature tls)";
            Err(vec![config::Fault::new("tls_dir", FaultKind::NotBuilt, message)])
        }
        _ => Ok(()),
    }
}

/// What the machines' time is counted from.
#[derive(Debug, Clone, Copy)]
struct Clock(Instant);

impl Clock {
    fn start() -> Self {
        Self(Instant::now())
    }

    fn now(&self) -> Duration {
        self.0.elapsed()
    }

    /// Whether a machine that wanted to be woken at `wake` is late, whatever else it had to do.
    fn is_past(&self, wake: Option<Duration>) -> bool {
        wake.is_some_and(|wake| wake <= self.now())
    }

    /// How long to wait for a machine that wants to be woken at `wake`.
    fn until(&self, wake: Option<Duration>) -> Duration {
        wake.map_or(LOOK, |wake| wake.saturating_sub(self.now()).min(LOOK))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compression_is_refused_by_name_where_there_is_none() {
        assert!(check_compression(Compression::None).is_ok());
        let found = check_compression(Compression::Lz4);
        assert_eq!(found.is_ok(), cfg!(feature = "compression"));
        if let Err(faults) = found {
            assert_eq!((faults[0].path.as_str(), faults[0].kind), ("compression", FaultKind::NotBuilt));
        }
    }

    #[test]
    fn certificates_are_refused_by_name_where_there_is_no_tls() {
        assert!(check_tls(None).is_ok());
        let found = check_tls(Some(Path::new("/t")));
        assert_eq!(found.is_ok(), cfg!(feature = "tls"));
        if let Err(faults) = found {
            assert_eq!((faults[0].path.as_str(), faults[0].kind), ("tls_dir", FaultKind::NotBuilt));
        }
    }
}
