//! What the program does as its own child: `child MODE KIND DEED`. A thread called like the kind gets the filter of the
//! kind, does the deed and ends; then the process ends with status 0.
#![expect(unsafe_code, reason = "system calls by number")]

use std::process::{Command, ExitCode, Output};
use std::time::Instant;

use vmm::cli::SeccompMode;
use vmm::logger::LogPlace;
use vmm::sandbox::among_strangers;
use vmm::sandbox::filters::{self, Filter};
use vmm_device_model::thread::{ThreadKind, spawn};

/// The first argument of a child.
pub(crate) const WORD: &str = "child";

/// What a confined thread does.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Deed {
    /// Calls getppid(2), which no filter allows. It must not be what it is where it is not trapped.
    GetPpid,
    /// Maps a page of code.
    MapCode,
    /// An ioctl(2) that no filter allows.
    Ioctl,
    /// Three of these and what is allowed, by code that nobody here knows; then the first one as itself.
    Stranger,
    /// Panics, and aborts as release builds do.
    Panic,
    /// Allocates, logs, looks at the time, and ends.
    Live,
}

impl Deed {
    const ALL: [(&str, Self); 6] = [
        ("getppid", Self::GetPpid),
        ("map-code", Self::MapCode),
        ("ioctl", Self::Ioctl),
        ("stranger", Self::Stranger),
        ("panic", Self::Panic),
        ("live", Self::Live),
    ];

    fn word(self) -> &'static str {
        Self::ALL[self as usize].0
    }

    fn done(self) {
        match self {
            // SAFETY: the call has no arguments.
            Self::GetPpid => report(unsafe { libc::syscall(libc::SYS_getppid) }),
            // SAFETY: a new mapping wherever the kernel likes.
            Self::MapCode => report(unsafe {
                let prot = libc::PROT_READ | libc::PROT_EXEC;
                libc::syscall(libc::SYS_mmap, 0, 4096, prot, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)
            }),
            // SAFETY: TIOCSTI takes the byte that it is given.
            Self::Ioctl => report(unsafe { libc::syscall(libc::SYS_ioctl, 0, libc::TIOCSTI, c"x".as_ptr()) }),
            Self::Stranger => {
                for deed in [Self::GetPpid, Self::MapCode, Self::Ioctl, Self::Live] {
                    let ((), refused) = among_strangers(|| deed.done());
                    eprintln!("refused: {refused}");
                }
                Self::GetPpid.done();
            }
            Self::Panic => {
                let _ = std::panic::catch_unwind(|| panic!("told to panic"));
                std::process::abort();
            }
            Self::Live => {
                let mut kept: Vec<Vec<u8>> = Vec::new();
                for size in [1 << 4, 1 << 12, 1 << 20, 1 << 26] {
                    kept.push(vec![1; size]);
                }
                eprintln!("alive after {:?}", Instant::now().elapsed());
            }
        }
    }
}

fn report(result: libc::c_long) {
    let error = (result < 0).then(std::io::Error::last_os_error);
    eprintln!("came back: {:?}", error.and_then(|error| error.raw_os_error()));
}

/// Runs a child.
pub(crate) fn run(mode: &str, kind: &str, deed: Deed) -> Output {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([WORD, mode, kind, deed.word()]).env_remove("RUST_BACKTRACE").output().unwrap()
}

pub(crate) fn main(words: &[String]) -> ExitCode {
    let [mode, kind, deed] = words else { panic!("child MODE KIND DEED, not {words:?}") };
    let mode = match mode.as_str() {
        "true" => SeccompMode::Enforce,
        "log" => SeccompMode::Log,
        "errno" => SeccompMode::Errno,
        _ => SeccompMode::Off,
    };
    let kind = ThreadKind(Filter::of(kind).unwrap().kind);
    let deed = Deed::ALL.into_iter().find(|(word, _)| word == deed).unwrap().1;
    vmm::run::confine(LogPlace { descriptor: 2, start: Instant::now() }).unwrap();
    let hook = filters::hook(mode);
    spawn(&hook, kind, kind.0, move || deed.done()).unwrap().join().unwrap();
    ExitCode::SUCCESS
}
