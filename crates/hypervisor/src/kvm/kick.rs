//! Interrupting a vCPU's thread without losing the kick.
//!
//! A signal alone is lost when it arrives just before KVM_RUN. Its handler therefore sets the vCPU's
//! `immediate_exit` byte, which KVM looks at on entry (KVM_CAP_IMMEDIATE_EXIT): whenever the signal comes,
//! the next or the current KVM_RUN returns with EINTR.
#![expect(unsafe_code, reason = "signal handlers and the page that is shared with KVM")]

use std::cell::Cell;
use std::ptr;
use std::sync::{Mutex, Once, PoisonError};
use std::thread::{self, ThreadId};

use crate::{HypervisorError, Kick, Result};

thread_local! {
    /// `immediate_exit` of the vCPU bound to this thread. Constant initialisation and no destructor, so
    /// that a signal handler may touch it.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

extern "C" fn on_kick(_: libc::c_int) {
    let byte = IMMEDIATE_EXIT.get();
    if !byte.is_null() {
        // SAFETY: non-null only from `Binding::new` until this thread drops the binding; so long the page that
        // KVM shares is mapped. KVM reads the byte; nobody else on this thread writes it meanwhile.
        unsafe { byte.write_volatile(1) };
    }
}

fn signal() -> libc::c_int {
    libc::SIGRTMIN()
}

fn install_handler() {
    static INSTALL: Once = Once::new();
    INSTALL.call_once(|| {
        // SAFETY: all zeroes is a valid sigaction.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = on_kick as *const () as usize;
        // SAFETY: `action` is initialised; the handler is async-signal-safe. No SA_RESTART: a blocked
        // system call of the thread must return.
        unsafe { libc::sigaction(signal(), &raw const action, ptr::null_mut()) };
    });
}

/// The tie between a vCPU and the thread that created this value.
#[derive(Debug)]
pub(super) struct Binding {
    kicker: std::sync::Arc<ThreadKick>,
    thread: ThreadId,
}

/// A vCPU has one thread and a thread one vCPU.
pub(super) fn bound_already() -> HypervisorError {
    HypervisorError::from_errno("tie of a vCPU to a thread", libc::EBUSY)
}

impl Binding {
    /// Ties the calling thread to the vCPU whose `immediate_exit` byte is at `immediate_exit`. A thread
    /// that has a vCPU already is refused.
    ///
    /// # Safety
    /// The byte stays valid until this thread drops the binding; for ever if it never does.
    pub(super) unsafe fn new(immediate_exit: *mut u8) -> Result<Self> {
        if !IMMEDIATE_EXIT.get().is_null() {
            return Err(bound_already());
        }
        install_handler();
        unblock()?;
        IMMEDIATE_EXIT.set(immediate_exit);
        // SAFETY: the call has no preconditions.
        let tid = unsafe { libc::gettid() };
        let kicker = std::sync::Arc::new(ThreadKick { tid: Mutex::new(Some(tid)) });
        Ok(Self { kicker, thread: thread::current().id() })
    }

    /// Whether the calling thread is the one that is tied.
    pub(super) fn is_here(&self) -> bool {
        self.thread == thread::current().id()
    }

    pub(super) fn kicker(&self) -> std::sync::Arc<dyn Kick> {
        std::sync::Arc::clone(&self.kicker) as _
    }
}

fn unblock() -> Result<()> {
    // SAFETY: all zeroes is a valid sigset_t.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: `set` is a valid set and SIGRTMIN a valid signal.
    unsafe { libc::sigaddset(&raw mut set, signal()) };
    // SAFETY: `set` is initialised; the old mask is not asked for.
    match unsafe { libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, ptr::null_mut()) } {
        0 => Ok(()),
        errno => Err(HypervisorError::from_errno("pthread_sigmask", errno)),
    }
}

impl Drop for Binding {
    fn drop(&mut self) {
        *self.kicker.tid.lock().unwrap_or_else(PoisonError::into_inner) = None;
        if self.is_here() {
            IMMEDIATE_EXIT.set(ptr::null_mut());
        }
    }
}

#[derive(Debug)]
struct ThreadKick {
    /// Kernel's id of the thread; `None` once it is not the vCPU's any more, for ids are used again.
    tid: Mutex<Option<libc::pid_t>>,
}

impl Kick for ThreadKick {
    fn kick(&self) {
        let tid = self.tid.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(tid) = *tid {
            // SAFETY: the call has no preconditions; the lock keeps the thread bound meanwhile.
            unsafe { libc::syscall(libc::SYS_tgkill, std::process::id(), tid, signal()) };
        }
    }
}
