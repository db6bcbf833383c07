//! Linux KVM.

mod convert;
mod kick;
mod nested;
mod vcpu;
mod vm;

use std::ffi::CString;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::{Cap, Kvm as KvmFd};

use crate::state::CpuidEntry;
use crate::{Hypervisor, HypervisorError, Result, Vm, VmOptions};

pub(crate) fn failed(call: &'static str) -> impl Fn(kvm_ioctls::Error) -> HypervisorError {
    move |e| HypervisorError::from_errno(call, e.errno())
}

/// KVM, by its device node.
#[derive(Debug)]
pub struct Kvm {
    fd: KvmFd,
}

/// Why KVM cannot be used here.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The device node could not be opened.
    #[error("cannot open {path}", path = .path.display())]
    Open {
        /// The device node.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// Not the API that Linux has had since 2.6.22.
    #[error("KVM has API version {found}, version 12 is needed")]
    ApiVersion {
        /// What it has.
        found: i32,
    },
    /// This KVM lacks something that the VMM cannot do without.
    #[error("KVM lacks {}", .missing.join(", "))]
    Missing {
        /// Names of the missing capabilities.
        missing: Vec<&'static str>,
    },
}

/// What the VMM cannot do without.
const REQUIRED: &[(Cap, &str)] = &[
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SplitIrqchip, "KVM_CAP_SPLIT_IRQCHIP"),
    (Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::IrqRouting, "KVM_CAP_IRQ_ROUTING"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::TscDeadlineTimer, "KVM_CAP_TSC_DEADLINE_TIMER"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
];

impl Kvm {
    /// Opens `/dev/kvm`.
    ///
    /// # Errors
    /// As [`Kvm::open_path`].
    pub fn open() -> std::result::Result<Self, OpenError> {
        Self::open_path(Path::new("/dev/kvm"))
    }

    /// Opens KVM's device node at `path` and checks that it can do what is needed.
    ///
    /// # Errors
    /// It cannot be opened, or lacks something; all that it lacks is named.
    pub fn open_path(path: &Path) -> std::result::Result<Self, OpenError> {
        let open = |source| OpenError::Open { path: path.to_owned(), source };
        let name = CString::new(path.as_os_str().as_encoded_bytes()).map_err(|e| open(e.into()))?;
        let fd =
            KvmFd::new_with_path(name).map_err(|e| open(std::io::Error::from_raw_os_error(e.errno())))?;
        match fd.get_api_version() {
            12 => {}
            found => return Err(OpenError::ApiVersion { found }),
        }
        let missing: Vec<_> =
            REQUIRED.iter().filter(|(cap, _)| !fd.check_extension(*cap)).map(|(_, name)| *name).collect();
        if missing.is_empty() { Ok(Self { fd }) } else { Err(OpenError::Missing { missing }) }
    }
}

impl Hypervisor for Kvm {
    fn name(&self) -> &'static str {
        "KVM"
    }

    fn create_vm(&self, options: &VmOptions) -> Result<Arc<dyn Vm>> {
        Ok(Arc::new(vm::KvmVm::create(&self.fd, options)?))
    }

    fn supported_cpuid(&self) -> Result<Vec<CpuidEntry>> {
        let list =
            self.fd.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(failed("KVM_GET_SUPPORTED_CPUID"))?;
        Ok(list.as_slice().iter().map(convert::cpuid_entry).collect())
    }

    fn msr_indices(&self) -> Result<Vec<u32>> {
        let list = self.fd.get_msr_index_list().map_err(failed("KVM_GET_MSR_INDEX_LIST"))?;
        Ok(list.as_slice().to_vec())
    }

    fn max_vcpus(&self) -> u32 {
        u32::try_from(self.fd.get_max_vcpus()).unwrap_or(u32::MAX)
    }
}
