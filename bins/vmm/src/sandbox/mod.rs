//! What the process denies itself: system calls by thread ([`filters`]), paths ([`paths`], [`landlock`]).
//!
//! `docs/security.md` says it to operators.

pub mod filters;
pub mod landlock;
pub mod paths;
mod violation;

use std::error::Error;
use std::io;
use std::sync::Arc;

use vmm_api::spec::MachineSpec;
use vmm_device_model::thread::{ThreadHook, ThreadKind, Unconfined};

use landlock::LandlockError;
use paths::Beginning;
pub(crate) use violation::last_words;
pub use violation::{among_strangers, report_violations};

/// The thread that owns the VM.
pub const CONTROL_THREAD: ThreadKind = ThreadKind("vmm");
/// The API's thread.
pub const API_THREAD: ThreadKind = ThreadKind("http-server");
/// Threads that write consoles' output out.
pub const OUTPUT_THREAD: ThreadKind = ThreadKind("console-output");

/// The thread that writes events out.
pub const MONITOR_THREAD: ThreadKind = ThreadKind("event-monitor");

/// Whether the paths that the process can reach are those of its VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PathPolicy {
    /// If the VM's configuration says so.
    #[default]
    AsConfigured,
    /// In any case: all of the configuration is known.
    Always,
    /// In no case.
    Never,
}

/// How the threads of this process are confined.
#[derive(Debug)]
pub struct Sandbox {
    threads: Arc<dyn ThreadHook>,
    paths: PathPolicy,
    /// Landlock is in force. There is no way back.
    confined: bool,
    /// Why it is not, where it ought to be.
    failure: Option<LandlockError>,
}

impl Default for Sandbox {
    /// Confines nothing.
    fn default() -> Self {
        Self::new(Arc::new(Unconfined), PathPolicy::Never)
    }
}

impl Sandbox {
    /// Threads begin with `threads`; the paths of the first VM that boots are confined as `paths` says.
    pub fn new(threads: Arc<dyn ThreadHook>, paths: PathPolicy) -> Self {
        Self { threads, paths, confined: false, failure: None }
    }

    /// What every thread begins with.
    pub fn threads(&self) -> &Arc<dyn ThreadHook> {
        &self.threads
    }

    /// Confines the paths of this thread, and of those that it will start, to those of a VM of `spec` that has this
    /// `beginning`, if that is wanted and not done yet. What can be opened then stays the same for the life of the process. If it
    /// fails nothing is confined, and the boot must not succeed: see [`confined`](Self::confined).
    pub fn confine_paths(&mut self, spec: &MachineSpec, beginning: &Beginning) {
        let wanted = match self.paths {
            PathPolicy::AsConfigured => spec.landlock.enable,
            PathPolicy::Always => true,
            PathPolicy::Never => false,
        };
        self.failure = None;
        if wanted && !self.confined {
            match landlock::restrict(&paths::rules(spec, beginning)) {
                Ok(confined) => self.confined = confined,
                Err(error) => self.failure = Some(error),
            }
        }
    }

    /// Whether paths are as confined as they ought to be.
    ///
    /// # Errors
    /// A path was not there, or the kernel refused.
    pub fn confined(&mut self) -> Result<(), LandlockError> {
        self.failure.take().map_or(Ok(()), Err)
    }

    /// Whether Landlock may be why `error` happened: a path was refused while it is in force.
    pub fn may_have_refused(&self, error: &(dyn Error + 'static)) -> bool {
        let mut cause = Some(error);
        while let Some(error) = cause.filter(|_| self.confined) {
            let failed = error.downcast_ref::<io::Error>();
            if failed.is_some_and(|failed| failed.kind() == io::ErrorKind::PermissionDenied) {
                return true;
            }
            cause = error.source();
        }
        false
    }
}
