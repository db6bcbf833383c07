//! What a machine needs to know of the hypervisor, asked before it is needed.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};

use vmm_hypervisor::state::CpuidEntry;
use vmm_hypervisor::{Hypervisor, Result, Vm, VmOptions};

/// A hypervisor that is being asked for the CPUID leaves that it supports, once, on a thread: KVM has to ask the processor,
/// which takes as long as making the VM does where KVM itself runs in a VM. Dropped, it waits for the answer.
pub(crate) struct Ahead {
    hypervisor: Arc<dyn Hypervisor>,
    /// Taken by whoever asks first.
    cpuid: Mutex<Option<JoinHandle<Result<Vec<CpuidEntry>>>>>,
}

impl Ahead {
    /// Begins to ask.
    pub(crate) fn ask(hypervisor: &Arc<dyn Hypervisor>) -> Self {
        let asked = Arc::clone(hypervisor);
        // Without a thread it is asked when the answer is wanted.
        let thread = Builder::new().name("cpuid".to_owned()).spawn(move || asked.supported_cpuid());
        Self { hypervisor: Arc::clone(hypervisor), cpuid: Mutex::new(thread.ok()) }
    }

    /// The answer, once. A thread that panicked has none.
    fn answer(&self) -> Option<Result<Vec<CpuidEntry>>> {
        let thread = self.cpuid.lock().unwrap_or_else(PoisonError::into_inner).take()?;
        thread.join().ok()
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        drop(self.answer());
    }
}

impl fmt::Debug for Ahead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ahead").field("hypervisor", &self.hypervisor).finish_non_exhaustive()
    }
}

impl Hypervisor for Ahead {
    fn name(&self) -> &'static str {
        self.hypervisor.name()
    }

    fn create_vm(&self, options: &VmOptions) -> Result<Arc<dyn Vm>> {
        self.hypervisor.create_vm(options)
    }

    fn supported_cpuid(&self) -> Result<Vec<CpuidEntry>> {
        self.answer().unwrap_or_else(|| self.hypervisor.supported_cpuid())
    }

    fn msr_indices(&self) -> Result<Vec<u32>> {
        self.hypervisor.msr_indices()
    }

    fn max_vcpus(&self) -> u32 {
        self.hypervisor.max_vcpus()
    }
}

#[cfg(test)]
mod tests {
    use vmm_hypervisor::fake::Fake;

    use super::*;

    #[test]
    fn what_was_asked_ahead_is_asked_once_and_then_again() {
        let fake = Arc::new(Fake::new());
        let direct = fake.supported_cpuid().unwrap();
        let ahead = Ahead::ask(&(Arc::clone(&fake) as _));
        assert_eq!(ahead.supported_cpuid().unwrap(), direct);
        assert_eq!(fake.count("KVM_GET_SUPPORTED_CPUID"), 2);
        assert_eq!(ahead.supported_cpuid().unwrap(), direct);
        assert_eq!(fake.count("KVM_GET_SUPPORTED_CPUID"), 3);
    }

    #[test]
    fn a_failure_is_told_to_whoever_wants_the_answer() {
        let fake = Arc::new(Fake::new());
        fake.fail_nth_of("KVM_GET_SUPPORTED_CPUID", 1);
        let ahead = Ahead::ask(&(Arc::clone(&fake) as _));
        ahead.create_vm(&VmOptions { ioapic_pins: 24, tss_address: 0 }).unwrap();
        assert_eq!(ahead.supported_cpuid().unwrap_err().call, "KVM_GET_SUPPORTED_CPUID");
    }

    #[test]
    fn nobody_is_left_who_asks() {
        let fake = Arc::new(Fake::new());
        drop(Ahead::ask(&(Arc::clone(&fake) as _)));
        assert_eq!((fake.count("KVM_GET_SUPPORTED_CPUID"), Arc::strong_count(&fake)), (1, 1));
    }
}
