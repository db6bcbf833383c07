//! What happens when a thread makes a system call that its filter does not allow: SIGSYS, whose handler says which call
//! and which thread, gives the terminal back, and ends the process with a status of its own. Within [`among_strangers`] the call
//! fails instead.
#![expect(unsafe_code, reason = "signal handlers and what they may call are C's")]

use std::cell::Cell;
use std::ffi::CStr;
use std::fmt::{self, Write};
use std::os::fd::RawFd;
use std::sync::OnceLock;

use vmm_sys_util::signal::register_signal_handler;

use super::{CONTROL_THREAD, filters};
use crate::console::restore_terminal_in_handler;
use crate::exit::ExitCode;
use crate::logger::LogPlace;

/// `si_code` of a SIGSYS that a filter raised (asm-generic/siginfo.h).
const SYS_SECCOMP: i32 = 1;

/// Where the handler writes to: a handler has no other way to know.
static PLACE: OnceLock<LogPlace> = OnceLock::new();

thread_local! {
    /// Whether a call that is not allowed fails on this thread, and does no more, and whether one has.
    static LENIENCE: Cell<Lenience> = const { Cell::new(Lenience::None) };
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Lenience {
    None,
    Unused,
    Used,
}

/// Does `work`, which runs code of the host's that nobody here knows, and says whether a system call was refused meanwhile: one that
/// the thread's filter does not allow fails with EPERM, and does not end the process.
pub fn among_strangers<R>(work: impl FnOnce() -> R) -> (R, bool) {
    let before = LENIENCE.replace(Lenience::Unused);
    let result = work();
    (result, LENIENCE.replace(before) == Lenience::Used)
}

/// From now on a system call that a filter does not allow is told in the log at `place`, and ends the process.
///
/// # Errors
/// The signal's handler cannot be set.
pub fn report_violations(place: LogPlace) -> std::io::Result<()> {
    let _ = PLACE.set(place);
    Ok(register_signal_handler(libc::SIGSYS, on_sigsys)?)
}

/// Only what is async-signal-safe is called here (signal-safety(7)), and only what each filter allows: a call that
/// is not allowed would be the end, without a word.
extern "C" fn on_sigsys(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a whole `siginfo_t`, which is 128 bytes and aligned for integers.
    let info: &[i32; 32] = unsafe { &*info.cast() };
    // `si_code` and `si_syscall` (asm-generic/siginfo.h, 64 bits).
    let [_, _, code, _, _, _, number, ..] = *info;
    if code != SYS_SECCOMP {
        // Sent by somebody. What that does without a handler is done when this one returns.
        // SAFETY: SIG_DFL is a valid disposition.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
        // SAFETY: takes a number.
        unsafe { libc::raise(signal) };
        return;
    }
    if LENIENCE.get() != Lenience::None {
        LENIENCE.set(Lenience::Used);
        // SAFETY: the kernel passes the thread's registers, which it takes back when this handler returns; nobody else has them.
        let context = unsafe { &mut *context.cast::<libc::ucontext_t>() };
        if let Some(result) =
            usize::try_from(libc::REG_RAX).ok().and_then(|at| context.uc_mcontext.gregs.get_mut(at))
        {
            *result = -i64::from(libc::EPERM);
        }
        return;
    }
    restore_terminal_in_handler();
    let name = filters::name(number);
    last_words(
        module_path!(),
        format_args!("forbidden system call {name} ({number}): the process ends (see docs/security.md)"),
    );
    // SAFETY: ends the process; nothing of it is used any more.
    unsafe { libc::_exit(ExitCode::ForbiddenCall as i32) }
}

/// Writes an error of `module` into the log, for a signal's handler that ends the process: without a heap, a lock, or a system
/// call that some filter forbids.
pub(crate) fn last_words(module: &str, text: fmt::Arguments<'_>) {
    if let Some(place) = PLACE.get() {
        let mut line = Line { bytes: [0; LINE], length: 0 };
        line.say(place, thread_name(&mut [0; 16]), module, text);
        write_all(place.descriptor, line.bytes());
    }
}

/// As the log has it: the first thread is `vmm`, whatever the program was started as.
fn thread_name(buffer: &mut [u8; 16]) -> &str {
    // SAFETY: the call has no preconditions.
    let process = unsafe { libc::getpid() };
    // SAFETY: as above.
    if process == unsafe { libc::gettid() } {
        return CONTROL_THREAD.0;
    }
    // SAFETY: PR_GET_NAME writes 16 bytes, the last of them 0.
    unsafe { libc::prctl(libc::PR_GET_NAME, buffer.as_mut_ptr()) };
    CStr::from_bytes_until_nul(buffer).ok().and_then(|name| name.to_str().ok()).unwrap_or("?")
}

fn write_all(descriptor: RawFd, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        // SAFETY: a valid range of memory.
        let written = unsafe { libc::write(descriptor, bytes.as_ptr().cast(), bytes.len()) };
        match usize::try_from(written) {
            Ok(count @ 1..) => bytes = bytes.get(count..).unwrap_or_default(),
            // Nobody is left to be told.
            _ => return,
        }
    }
}

/// Room for a path. It is on a handler's stack, which is small.
const LINE: usize = 512;

/// A line of text without a heap; what is too long for it is cut off.
struct Line {
    bytes: [u8; LINE],
    length: usize,
}

impl Line {
    fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or_default()
    }

    /// As the log has it.
    fn say(&mut self, place: &LogPlace, thread: &str, module: &str, text: fmt::Arguments<'_>) {
        let elapsed = place.start.elapsed();
        let (seconds, micros) = (elapsed.as_secs(), elapsed.subsec_micros());
        let _ = writeln!(self, "vmm: {seconds}.{micros:06}s: <{thread}> ERROR:{module} -- {text}");
    }
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for (to, from) in self.bytes.iter_mut().skip(self.length).zip(text.bytes()) {
            *to = from;
            self.length += 1;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn a_line_is_like_those_of_the_log_and_bounded() {
        let place = LogPlace { descriptor: 2, start: Instant::now() };
        let text = |thread: &str| {
            let mut line = Line { bytes: [0; LINE], length: 0 };
            line.say(&place, thread, "vmm::x", format_args!("forbidden"));
            String::from_utf8(line.bytes().to_vec()).unwrap()
        };
        let (time, rest) =
            text("vcpu0").split_once("s: ").map(|(a, b)| (a.to_owned(), b.to_owned())).unwrap();
        assert!(time.starts_with("vmm: 0.") && time.len() == "vmm: 0.000000".len(), "{time}");
        let expected = "<vcpu0> ERROR:vmm::x -- forbidden\n";
        assert_eq!(rest, expected);
        assert_eq!(text(&"x".repeat(2000)).len(), LINE);
    }
}
