//! Has a thread of another process make a system call (ptrace(2)): a filter is provoked without a word about it in
//! the program that is confined.
#![expect(unsafe_code, reason = "ptrace is C's")]

use std::io;
use std::ptr;

use libc::{c_long, c_void, pid_t, user_regs_struct};
use vmm_tests::harness::{LIMIT, wait_until};

/// `syscall`, as little-endian bytes.
const SYSCALL: c_long = 0x050f;

/// A thread that stands still until this is dropped.
struct Stopped(pid_t);

impl Stopped {
    /// In a system call: a thread that is doing something is let go and tried again.
    fn in_call(thread: pid_t) -> Self {
        let stopped = || Some(Self::new(thread)).filter(Self::is_in_call);
        wait_until(LIMIT, stopped, || format!("thread {thread} to wait in a system call"))
    }

    fn is_in_call(&self) -> bool {
        // All ones where there is none.
        self.registers().orig_rax as i64 >= 0
    }

    fn new(thread: pid_t) -> Self {
        // SAFETY: takes a thread only.
        check(unsafe { libc::ptrace(libc::PTRACE_ATTACH, thread, 0, 0) });
        let stopped = Self(thread);
        stopped.wait();
        stopped
    }

    fn wait(&self) {
        let mut status = 0;
        // SAFETY: a valid place to write to.
        let waited = unsafe { libc::waitpid(self.0, &raw mut status, libc::__WALL) };
        assert!(waited == self.0 && libc::WIFSTOPPED(status), "{waited} {status:#x}");
    }

    fn registers(&self) -> user_regs_struct {
        // SAFETY: all zeroes is a valid set of registers.
        let mut registers: user_regs_struct = unsafe { std::mem::zeroed() };
        // SAFETY: a valid place to write to.
        check(unsafe {
            libc::ptrace(libc::PTRACE_GETREGS, self.0, ptr::null_mut::<c_void>(), &raw mut registers)
        });
        registers
    }

    fn set(&self, registers: &user_regs_struct) {
        let from = ptr::from_ref(registers);
        // SAFETY: a valid set of registers.
        check(unsafe { libc::ptrace(libc::PTRACE_SETREGS, self.0, ptr::null_mut::<c_void>(), from) });
    }

    /// Points the thread at the `syscall` that it came from, with `number` and no arguments. Returns what it was like.
    fn point_at_call(&self, number: c_long) -> user_regs_struct {
        let before = self.registers();
        let mut registers = before;
        registers.rip -= 2;
        // SAFETY: reads a word of the other process.
        let word = unsafe { libc::ptrace(libc::PTRACE_PEEKTEXT, self.0, registers.rip as *mut c_void, 0) };
        assert_eq!(word & 0xffff, SYSCALL);
        registers.rax = number as u64;
        // Not the call that was interrupted, so that nothing is restarted.
        registers.orig_rax = u64::MAX;
        [registers.rdi, registers.rsi, registers.rdx, registers.r10] = [0; 4];
        self.set(&registers);
        before
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        // SAFETY: takes a thread and no signal. The thread may be gone.
        unsafe { libc::ptrace(libc::PTRACE_DETACH, self.0, 0, 0) };
    }
}

fn check(result: c_long) {
    assert!(result >= 0, "ptrace: {}", io::Error::last_os_error());
}

/// Has `thread`, which waits in a system call, make another instead, and leaves it alone.
pub(crate) fn force(thread: pid_t, number: c_long) {
    Stopped::in_call(thread).point_at_call(number);
}

/// Has `thread`, which waits in a system call, make another first; returns that call's result.
pub(crate) fn insert(thread: pid_t, number: c_long) -> c_long {
    let stopped = Stopped::in_call(thread);
    let before = stopped.point_at_call(number);
    // SAFETY: takes a thread and no signal.
    check(unsafe { libc::ptrace(libc::PTRACE_SINGLESTEP, thread, 0, 0) });
    stopped.wait();
    let result = stopped.registers().rax as c_long;
    stopped.set(&before);
    result
}
