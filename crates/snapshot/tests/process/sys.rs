//! What the tests ask of Linux beyond the standard library: ptrace(2), mounts, limits.
#![expect(unsafe_code, reason = "ptrace, wait, unshare, mount and limits are C's")]

use std::ffi::CString;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::{mem, ptr};

/// What became of a traced process.
#[derive(Debug)]
pub(crate) struct Run {
    /// The counted system calls that it began, the last one not done if it was killed.
    pub(crate) calls: Vec<u64>,
    /// As wait(2) tells it.
    status: i32,
}

impl Run {
    /// Its exit status, unless a signal ended it.
    pub(crate) fn code(&self) -> Option<i32> {
        libc::WIFEXITED(self.status).then(|| libc::WEXITSTATUS(self.status))
    }

    /// Whether SIGKILL ended it.
    pub(crate) fn killed(&self) -> bool {
        libc::WIFSIGNALED(self.status) && libc::WTERMSIG(self.status) == libc::SIGKILL
    }
}

/// Runs `command` with all its threads traced, and kills it where it begins call number `at` of those that `counted`
/// says, counted from its first getppid(2) on. That call is not done.
pub(crate) fn kill_at(command: &mut Command, at: usize, counted: fn(u64) -> bool) -> io::Result<Run> {
    let traced = || check(trace(libc::PTRACE_TRACEME, 0, 0));
    // SAFETY: the closure makes one system call and touches no memory.
    unsafe { command.pre_exec(traced) };
    let main = command.spawn()?.id() as i32;
    let (tid, _) = wait()?;
    if tid != main {
        return Err(io::Error::other("an unknown child"));
    }
    let options = libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_TRACECLONE | libc::PTRACE_O_EXITKILL;
    check(trace(libc::PTRACE_SETOPTIONS, main, options as usize))?;
    check(trace(libc::PTRACE_SYSCALL, main, 0))?;
    let (mut calls, mut armed) = (Vec::new(), false);
    loop {
        let (tid, status) = wait()?;
        if !libc::WIFSTOPPED(status) {
            if tid == main {
                return Ok(Run { calls, status });
            }
            continue;
        }
        let mut signal = libc::WSTOPSIG(status);
        if signal == libc::SIGTRAP | 0x80 {
            signal = 0;
            match entered(tid) {
                Some(call) if armed && counted(call) => {
                    calls.push(call);
                    if calls.len() == at + 1 {
                        // SAFETY: the process is a child that was not waited for yet.
                        check(unsafe { libc::kill(main, libc::SIGKILL) }.into())?;
                        continue;
                    }
                }
                Some(call) => armed |= call == libc::SYS_getppid as u64,
                None => {}
            }
        } else if signal == libc::SIGTRAP || signal == libc::SIGSTOP {
            // A new thread, of its creator and of itself.
            signal = 0;
        }
        // A thread that was killed meanwhile is none any more.
        let _ = check(trace(libc::PTRACE_SYSCALL, tid, signal as usize));
    }
}

/// The system call that a stopped thread is about to begin.
fn entered(tid: i32) -> Option<u64> {
    // SAFETY: all zeros are a value of this C structure.
    let mut info: libc::ptrace_syscall_info = unsafe { mem::zeroed() };
    let size = size_of_val(&info);
    // SAFETY: the kernel writes at most `size` bytes to `info`.
    let read = unsafe { libc::ptrace(libc::PTRACE_GET_SYSCALL_INFO, tid, size, &raw mut info) };
    if read <= 0 || info.op != libc::PTRACE_SYSCALL_INFO_ENTRY {
        return None;
    }
    // SAFETY: `op` says that this is the member that was written.
    Some(unsafe { info.u.entry.nr })
}

fn trace(request: u32, tid: i32, data: usize) -> i64 {
    // SAFETY: none of the requests made here has the kernel write to memory of ours.
    unsafe { libc::ptrace(request, tid, ptr::null_mut::<u8>(), data) }
}

/// A child of this thread alone, for other tests have theirs.
fn wait() -> io::Result<(i32, i32)> {
    let mut status = 0;
    // SAFETY: a valid place to write to.
    let tid = unsafe { libc::waitpid(-1, &raw mut status, libc::__WALL | libc::__WNOTHREAD) };
    check(tid.into()).map(|()| (tid, status))
}

fn check(outcome: i64) -> io::Result<()> {
    if outcome < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Gives this process, of one thread, mounts of its own; without privileges in a user namespace.
pub(crate) fn own_mounts() -> io::Result<()> {
    // SAFETY: no pointers.
    let root = unsafe { libc::geteuid() } == 0;
    let flags = if root { libc::CLONE_NEWNS } else { libc::CLONE_NEWNS | libc::CLONE_NEWUSER };
    // SAFETY: no pointers.
    check(unsafe { libc::unshare(flags) }.into())?;
    mount("none", "/", "", libc::MS_REC | libc::MS_PRIVATE, "")
}

/// A file system in memory of so many bytes.
pub(crate) fn mount_memory(path: &str, bytes: u64) -> io::Result<()> {
    mount("none", path, "tmpfs", 0, &format!("size={bytes}"))
}

fn mount(source: &str, target: &str, kind: &str, flags: libc::c_ulong, data: &str) -> io::Result<()> {
    let text = |text: &str| CString::new(text).map_err(io::Error::other);
    let (source, target, kind, data) = (text(source)?, text(target)?, text(kind)?, text(data)?);
    // SAFETY: four strings that end with a zero.
    let outcome =
        unsafe { libc::mount(source.as_ptr(), target.as_ptr(), kind.as_ptr(), flags, data.as_ptr().cast()) };
    check(outcome.into())
}

pub(crate) fn unmount(path: &str) -> io::Result<()> {
    let path = CString::new(path).map_err(io::Error::other)?;
    // SAFETY: a string that ends with a zero.
    check(unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) }.into())
}

/// Limits the size of files (RLIMIT_FSIZE); what goes beyond is an error, or the end by SIGXFSZ.
pub(crate) fn limit_files(bytes: u64, is_error: bool) -> io::Result<()> {
    let handler = if is_error { libc::SIG_IGN } else { libc::SIG_DFL };
    // SAFETY: no handler is installed, only dispositions of the kernel's own.
    unsafe { libc::signal(libc::SIGXFSZ, handler) };
    let limit = libc::rlimit { rlim_cur: bytes, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: a valid structure to read.
    check(unsafe { libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit) }.into())
}
