//! The one error of this boundary: which call, and what the system said.

use std::io;

/// A call to the hypervisor failed.
#[derive(Debug, thiserror::Error)]
#[error("{call} failed")]
pub struct HypervisorError {
    /// Name of the call, e.g. `KVM_CREATE_VM`.
    pub call: &'static str,
    /// What the system said.
    #[source]
    pub source: io::Error,
}

/// Result of a call to the hypervisor.
pub type Result<T> = std::result::Result<T, HypervisorError>;

impl HypervisorError {
    /// From a call's name and an `errno` value.
    pub fn from_errno(call: &'static str, errno: i32) -> Self {
        Self { call, source: io::Error::from_raw_os_error(errno) }
    }

    /// Whether this host's hypervisor does not know the call at all. For a state call that means "no such
    /// state": `KVM_GET_NESTED_STATE` answers EINVAL where nothing can be nested.
    pub fn is_unsupported(&self) -> bool {
        matches!(
            self.source.raw_os_error(),
            Some(libc::EINVAL | libc::ENXIO | libc::ENOTTY | libc::ENOSYS | libc::EOPNOTSUPP)
        )
    }
}
