//! Where the host runs a thread: on which CPUs, and beside whom on a core.
#![expect(unsafe_code, reason = "sched_setaffinity and prctl are C calls")]

use std::io;

/// Restricts the calling thread to `cpus` (sched_setaffinity(2)).
pub(crate) fn pin_current_thread(cpus: &[usize]) -> io::Result<()> {
    // SAFETY: all zeroes is an empty cpu_set_t.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    for cpu in cpus {
        if *cpu >= libc::CPU_SETSIZE as usize {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("no host CPU {cpu}")));
        }
        // SAFETY: the bit is inside the set.
        unsafe { libc::CPU_SET(*cpu, &mut set) };
    }
    // SAFETY: `set` is initialised and of the size given; 0 is the calling thread.
    match unsafe { libc::sched_setaffinity(0, size_of_val(&set), &raw const set) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Which vCPU threads may run on the threads of one core at the same time (Linux
/// `Documentation/admin-guide/hw-vuln/core-scheduling.rst`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CoreScheduling {
    /// Anybody beside anybody.
    #[default]
    Off,
    /// vCPUs of this VM beside each other, and beside nobody else.
    Vm,
    /// No vCPU beside anybody.
    Vcpu,
}

impl CoreScheduling {
    /// Puts the calling thread into its group; `first` is the thread of vCPU 0, once that runs.
    ///
    /// A host that does not know core scheduling, or has one thread per core, needs none.
    pub(crate) fn join(self, first: Option<libc::pid_t>) -> io::Result<()> {
        let result = match (self, first) {
            (Self::Off, _) => return Ok(()),
            (Self::Vm, Some(first)) => core_sched(libc::PR_SCHED_CORE_SHARE_FROM, first),
            (Self::Vm, None) | (Self::Vcpu, _) => core_sched(libc::PR_SCHED_CORE_CREATE, 0),
        };
        match result {
            Err(e) if matches!(e.raw_os_error(), Some(libc::EINVAL | libc::ENODEV)) => Ok(()),
            other => other,
        }
    }
}

fn core_sched(command: libc::c_int, thread: libc::pid_t) -> io::Result<()> {
    // SAFETY: plain numbers; the call changes the scheduling of the calling thread only.
    let result =
        unsafe { libc::prctl(libc::PR_SCHED_CORE, command, thread, libc::PR_SCHED_CORE_SCOPE_THREAD, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The calling thread's number.
pub(crate) fn thread_id() -> libc::pid_t {
    // SAFETY: the call has no preconditions.
    unsafe { libc::gettid() }
}

#[cfg(test)]
mod tests {
    use super::CoreScheduling;

    #[test]
    fn core_scheduling_is_had_or_not_needed() {
        let first = std::thread::spawn(|| {
            CoreScheduling::Vm.join(None).unwrap();
            let first = super::thread_id();
            std::thread::spawn(move || CoreScheduling::Vm.join(Some(first))).join().unwrap()
        });
        first.join().unwrap().unwrap();
        std::thread::spawn(|| CoreScheduling::Vcpu.join(None)).join().unwrap().unwrap();
        CoreScheduling::Off.join(None).unwrap();
    }

    #[test]
    fn refuses_what_does_not_exist() {
        std::thread::spawn(|| {
            super::pin_current_thread(&[0]).unwrap();
            super::pin_current_thread(&[100_000]).unwrap_err();
            super::pin_current_thread(&[1023]).unwrap_err();
        })
        .join()
        .unwrap();
    }
}
