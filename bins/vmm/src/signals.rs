//! Signals as a descriptor, and descriptors that were inherited.
#![expect(unsafe_code, reason = "signal masks and foreign descriptors are C's")]

use std::fs::File;
use std::io::{self, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use crate::exit::ExitCode;
use crate::{console, lost_memory};

/// What ends the VMM in an orderly way.
const ENDING: [libc::c_int; 3] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP];

/// The user's terminal has another size.
pub const WINDOW_CHANGED: u32 = libc::SIGWINCH as u32;

/// Signals cannot be received.
#[derive(Debug, thiserror::Error)]
#[error("{call} failed")]
pub struct SignalError {
    call: &'static str,
    #[source]
    source: io::Error,
}

fn last(call: &'static str) -> SignalError {
    SignalError { call, source: io::Error::last_os_error() }
}

/// Blocks the signals that end the VMM and the one of its terminal's size, for this thread and all that it will
/// start, and gives the descriptor where they arrive (signalfd(2)). A hang-up that is ignored (nohup(1)) stays so.
///
/// # Errors
/// A call failed.
pub fn block() -> Result<File, SignalError> {
    let mut set = MaybeUninit::uninit();
    // SAFETY: a valid place to write to.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    let asked_for = ENDING.into_iter().filter(|signal| *signal != libc::SIGHUP || !is_ignored(*signal));
    for signal in asked_for.chain([libc::SIGWINCH]) {
        // SAFETY: the set was initialised above.
        unsafe { libc::sigaddset(set.as_mut_ptr(), signal) };
    }
    // SAFETY: initialised above.
    let set = unsafe { set.assume_init() };
    // SAFETY: `set` is initialised; the old mask is not asked for.
    if unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, ptr::null_mut()) } != 0 {
        return Err(last("pthread_sigmask"));
    }
    // SAFETY: `set` is initialised; a new descriptor is asked for.
    let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
    if fd < 0 {
        return Err(last("signalfd"));
    }
    // SAFETY: the call just returned the descriptor, and nobody else has it.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// Lets a write beyond the limit of a file's size (RLIMIT_FSIZE) fail with EFBIG, where it would end the process.
pub fn ignore_file_size_limit() {
    // SAFETY: no handler is installed, only the kernel's own disposition for the signal.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
}

/// Whether whoever started this process has it ignore the signal.
fn is_ignored(signal: libc::c_int) -> bool {
    // SAFETY: all zeroes is a valid sigaction.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: only asks; `action` is a valid place to write to.
    let asked = unsafe { libc::sigaction(signal, ptr::null(), &raw mut action) };
    asked == 0 && action.sa_sigaction == libc::SIG_IGN
}

/// Signals that have arrived.
///
/// # Errors
/// The descriptor cannot be read.
pub fn take(signals: &mut File) -> io::Result<Vec<u32>> {
    // `struct signalfd_siginfo` has 128 bytes, of which the first four are the signal's number.
    let mut info = [0_u8; 128];
    let mut taken = Vec::new();
    loop {
        match signals.read(&mut info) {
            Ok(read) if read == info.len() => {
                let [a, b, c, d, ..] = info;
                taken.push(u32::from_ne_bytes([a, b, c, d]));
            }
            Ok(_) => return Ok(taken),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(taken),
            Err(e) => return Err(e),
        }
    }
}

/// Signals by which a process dies without being asked to end: its own defects, and what others send to see a core dump.
const CRASHES: [libc::c_int; 7] =
    [libc::SIGABRT, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGQUIT, libc::SIGSEGV, libc::SIGTRAP];

/// What each of them led to before; the runtime tells of a stack overflow so.
static FORMER: [OnceLock<libc::sigaction>; CRASHES.len()] = [const { OnceLock::new() }; CRASHES.len()];

/// A process that crashes gives the user's terminal back first.
pub fn restore_terminal_in_crashes() {
    for (signal, former) in CRASHES.into_iter().zip(&FORMER) {
        // SAFETY: all zeroes is a valid sigaction.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        // SAFETY: as above.
        let mut old: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = crashed as extern "C" fn(_, _, _) as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        // SAFETY: the handler does only what signal-safety(7) allows; `old` is a valid place to write to.
        if unsafe { libc::sigaction(signal, &raw const action, &raw mut old) } == 0 {
            let _ = former.set(old);
        }
    }
}

/// Some thread is in its handler of SIGBUS.
static LOST: AtomicBool = AtomicBool::new(false);

extern "C" fn crashed(signal: libc::c_int, info: *const libc::siginfo_t, _: *const libc::c_void) {
    console::restore_terminal_in_handler();
    // SAFETY: the kernel gives a valid one with SA_SIGINFO.
    let info = unsafe { &*info };
    let code = info.si_code;
    if signal == libc::SIGBUS && code > 0 {
        // Another thread met it first, and ends the process in one way or the other.
        while LOST.swap(true, Ordering::SeqCst) {
            thread::yield_now();
        }
        // SAFETY: a SIGBUS of the kernel's has an address.
        let address = unsafe { info.si_addr() };
        if let Some(status) = lost_memory::in_handler(address as usize) {
            end_at_once(status);
        }
    }
    let former = CRASHES.iter().position(|crash| *crash == signal).and_then(|at| FORMER.get(at)?.get());
    match former {
        // A fault of the kernel's telling comes again when this returns.
        Some(former) if code > 0 && signal != libc::SIGTRAP => {
            // SAFETY: what the kernel gave for this signal before.
            unsafe { libc::sigaction(signal, former, ptr::null_mut()) };
        }
        _ => {
            // SAFETY: the call has no preconditions.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
            // SAFETY: as above. It arrives when this returns.
            unsafe { libc::raise(signal) };
        }
    }
}

/// Ends the process, whatever its other threads wait for. The terminal is given back.
pub(crate) fn end_at_once(status: ExitCode) -> ! {
    console::restore_terminal_in_handler();
    // SAFETY: ends the process; nothing of it is used any more.
    unsafe { libc::_exit(status as i32) }
}

/// All threads allocate from one heap. The C library would give each a heap of its own, which costs the start of
/// every vCPU a few pages and system calls; no thread of a VMM allocates so much that they would be worth it.
pub fn one_heap() {
    // Where it is refused, or there is no such choice, only memory is lost.
    #[cfg(target_env = "gnu")]
    // SAFETY: takes two integers, before any other thread is there.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1)
    };
}

/// Files and sockets that this process creates are for this user only (umask 0077), and no program that it
/// could be made to start gains privileges.
pub fn private_files() {
    // SAFETY: the call has no preconditions and cannot fail.
    unsafe { libc::umask(0o077) };
    // SAFETY: these arguments are what the call asks for; it only takes rights away.
    unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
}

/// Takes over a descriptor that the parent process left open.
///
/// # Errors
/// No such descriptor was left open, or it is one of the standard streams.
pub fn inherited(fd: RawFd) -> io::Result<OwnedFd> {
    let refused = |why| Err(io::Error::new(io::ErrorKind::InvalidInput, why));
    if fd < 3 {
        return refused("it is a standard stream");
    }
    // SAFETY: the call has no preconditions.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFD) };
    // What this process opened itself is close-on-exec; what lived through exec is not.
    if flags < 0 || flags & libc::FD_CLOEXEC != 0 {
        return refused("no such descriptor was passed to this process");
    }
    // SAFETY: the call has no preconditions.
    if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is open, not ours so far, named by the user for this purpose, and taken over
    // once: it is close-on-exec from now on.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Writes to a descriptor do not block from now on, whoever shares it.
///
/// # Errors
/// It is not open for writing, or a call failed.
pub fn write_without_blocking(fd: &OwnedFd) -> io::Result<()> {
    // SAFETY: a valid descriptor; the call takes nothing else.
    let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
    if flags < 0 {
        return Err(io::Error::last_os_error());
    }
    if !matches!(flags & libc::O_ACCMODE, libc::O_WRONLY | libc::O_RDWR) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not open for writing"));
    }
    // SAFETY: a valid descriptor and its own flags, with one more.
    if unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
