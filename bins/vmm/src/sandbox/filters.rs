//! Filters of system calls (seccomp(2)), one for each kind of thread, compiled at build time from `seccomp/*.json`.
//!
//! A thread inherits the filters of the thread that started it, and a call must pass all of them. So the control
//! thread's allows all that those of its children do.

use std::io;
use std::sync::Arc;

use seccompiler::{BpfProgram, sock_filter};
use vmm_device_model::thread::{ThreadHook, ThreadKind, Unconfined};

use crate::cli::SeccompMode;

/// One filter.
#[derive(Debug)]
pub struct Filter {
    /// Which threads it is for.
    pub kind: &'static str,
    /// How many system calls it allows.
    pub syscalls: usize,
    /// Refuses by SECCOMP_RET_TRAP.
    program: &'static [sock_filter],
}

include!(concat!(env!("OUT_DIR"), "/filters.rs"));

/// `BPF_RET | BPF_K`: the end of a filter.
const RETURN: u16 = 0x06;

impl Filter {
    /// All of them, by kind.
    pub fn all() -> &'static [Self] {
        FILTERS
    }

    /// The one for threads of `kind`.
    pub fn of(kind: &str) -> Option<&'static Self> {
        FILTERS.iter().find(|filter| filter.kind == kind)
    }

    /// Its program, which does `refusal` (SECCOMP_RET_*) where a call is not allowed.
    fn program(&self, refusal: u32) -> BpfProgram {
        let changed = |instruction: &sock_filter| {
            let mut instruction = instruction.clone();
            if (instruction.code, instruction.k) == (RETURN, libc::SECCOMP_RET_TRAP) {
                instruction.k = refusal;
            }
            instruction
        };
        self.program.iter().map(changed).collect()
    }
}

/// What every thread begins with.
pub fn hook(mode: SeccompMode) -> Arc<dyn ThreadHook> {
    let refusal = match mode {
        SeccompMode::Enforce => libc::SECCOMP_RET_TRAP,
        SeccompMode::Errno => libc::SECCOMP_RET_ERRNO | libc::EPERM.unsigned_abs(),
        SeccompMode::Log => libc::SECCOMP_RET_LOG,
        SeccompMode::Off => return Arc::new(Unconfined),
    };
    Arc::new(Filters { refusal })
}

/// Puts the filter of its kind on each thread.
#[derive(Debug)]
struct Filters {
    /// What happens to a call that is not allowed (SECCOMP_RET_*).
    refusal: u32,
}

impl ThreadHook for Filters {
    fn begin(&self, kind: ThreadKind) -> io::Result<()> {
        let filter = Filter::of(kind.0).ok_or_else(|| {
            io::Error::new(io::ErrorKind::NotFound, format!("there is no filter for threads of kind {kind}"))
        })?;
        let applied = match self.refusal {
            libc::SECCOMP_RET_TRAP => seccompiler::apply_filter(filter.program),
            other => seccompiler::apply_filter(&filter.program(other)),
        };
        applied.map_err(|error| io::Error::other(format!("cannot filter system calls: {error}")))
    }
}

/// The name of a system call.
pub(super) fn name(number: i32) -> &'static str {
    let name = usize::try_from(number).ok().and_then(|number| NAMES.get(number));
    name.filter(|name| !name.is_empty()).copied().unwrap_or("unknown")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn system_calls_have_their_names() {
        for (number, expected) in [
            (libc::SYS_read, "read"),
            (libc::SYS_ioctl, "ioctl"),
            (libc::SYS_io_uring_enter, "io_uring_enter"),
            (libc::SYS_landlock_restrict_self, "landlock_restrict_self"),
            (libc::SYS_clone3, "clone3"),
            (libc::SYS_futex_waitv, "futex_waitv"),
        ] {
            assert_eq!(name(i32::try_from(number).unwrap()), expected);
        }
        for nobody in [-1, 400, i32::MAX] {
            assert_eq!(name(nobody), "unknown");
        }
    }

    #[test]
    fn each_kind_of_thread_has_a_small_filter_of_its_own() {
        use vmm_cpu_manager::set;
        use vmm_virtio_devices::{block, console, rng};

        use crate::sandbox::{API_THREAD, CONTROL_THREAD, MONITOR_THREAD, OUTPUT_THREAD};
        let limits = [
            (CONTROL_THREAD, 91),
            (crate::migration::THREAD, 64),
            (crate::vmm::writer::THREAD, 50),
            (API_THREAD, 36),
            (set::THREAD, 30),
            (block::THREAD, 35),
            (rng::THREAD, 30),
            (console::THREAD, 30),
            (OUTPUT_THREAD, 30),
            (MONITOR_THREAD, 30),
        ];
        for (kind, most) in limits {
            let filter = Filter::of(kind.0).unwrap_or_else(|| panic!("{kind} has no filter"));
            assert!(filter.syscalls <= most, "{kind} may make {} system calls", filter.syscalls);
        }
    }

    /// What the machine of seccomp(2) does with a program; the instructions that ours are made of.
    fn verdict(program: &[sock_filter], number: u32, arguments: [u64; 6]) -> u32 {
        let (mut at, mut value) = (0, 0);
        loop {
            let sock_filter { code, jt, jf, k } = program[at].clone();
            at += 1;
            let jump = |taken| usize::from(if taken { jt } else { jf });
            match (code, k) {
                (0x20, 0) => value = number,
                (0x20, 4) => value = 0xc000_003e,
                (0x20, _) => value = arguments[(k as usize - 16) / 8] as u32,
                (0x05, _) => at += k as usize,
                (0x15, _) => at += jump(value == k),
                (0x35, _) => at += jump(value >= k),
                (0x45, _) => at += jump(value & k != 0),
                (RETURN, _) => return k,
                _ => panic!("instruction {code:#x}"),
            }
        }
    }

    fn json(stem: &str) -> serde_json::Value {
        let path = format!("{}/seccomp/{stem}.json", env!("CARGO_MANIFEST_DIR"));
        serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
    }

    /// Names of calls that are always allowed; rules for others.
    fn collect(stem: &str, always: &mut Vec<String>, rules: &mut Vec<serde_json::Value>) {
        let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
        let file = json(stem);
        for names in file["allow"].as_object().into_iter().flat_map(|groups| groups.values()) {
            always.extend(names.as_array().unwrap().iter().map(text));
        }
        rules.extend(file["allow_if"].as_array().into_iter().flatten().cloned());
        for included in file["includes"].as_array().into_iter().flatten() {
            collect(included.as_str().unwrap(), always, rules);
        }
    }

    /// Arguments of which number `index` is `value` in its low half; all else is noise.
    fn with(index: &serde_json::Value, value: u64) -> [u64; 6] {
        let mut arguments = [0xdddd_dddd_dddd_dddd; 6];
        arguments[index.as_u64().unwrap() as usize] = 0xdddd_dddd_0000_0000 | value;
        arguments
    }

    #[test]
    fn programs_allow_what_their_files_say_and_trap_everything_else() {
        let constants = json("constants");
        let constant = |name: &serde_json::Value| {
            let text = constants[name.as_str().unwrap()].as_str().unwrap();
            u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap()
        };
        for filter in Filter::all() {
            let (mut always, mut rules) = (Vec::new(), Vec::new());
            collect(filter.kind, &mut always, &mut rules);
            for number in (0..1024).chain([1 << 30, u32::MAX]) {
                let name = name(number.cast_signed());
                let verdict = |arguments| verdict(filter.program, number, arguments);
                let listed = always.iter().any(|listed| listed == name);
                let noise = if listed { libc::SECCOMP_RET_ALLOW } else { libc::SECCOMP_RET_TRAP };
                assert_eq!(verdict([0xdddd_dddd_dddd_dddd; 6]), noise, "{}: {name}", filter.kind);
                for rule in rules.iter().filter(|rule| rule["syscall"] == name) {
                    for value in rule["one_of"].as_array().into_iter().flatten().map(constant) {
                        let allowed = verdict(with(&rule["argument"], value));
                        assert_eq!(allowed, libc::SECCOMP_RET_ALLOW, "{}: {name} {value:#x}", filter.kind);
                        let other = verdict(with(&rule["argument"], value ^ 0x1000_0000));
                        assert_eq!(other, libc::SECCOMP_RET_TRAP, "{}: {name} {value:#x}", filter.kind);
                    }
                    if let Some(bits) = rule.get("without").map(constant) {
                        let allowed = verdict(with(&rule["argument"], !bits & 0xffff_ffff));
                        assert_eq!(allowed, libc::SECCOMP_RET_ALLOW, "{}: {name}", filter.kind);
                        let trapped = verdict(with(&rule["argument"], bits));
                        assert_eq!(trapped, libc::SECCOMP_RET_TRAP, "{}: {name}", filter.kind);
                    }
                }
            }
        }
    }

    #[test]
    fn the_mode_changes_what_is_refused_and_nothing_else() {
        for filter in Filter::all() {
            let (trap, log) = (filter.program(libc::SECCOMP_RET_TRAP), filter.program(libc::SECCOMP_RET_LOG));
            assert_eq!(trap, filter.program);
            let ends =
                |program: &[sock_filter], k| program.iter().filter(|i| (i.code, i.k) == (RETURN, k)).count();
            let refusals = ends(&trap, libc::SECCOMP_RET_TRAP);
            assert!(refusals > 0, "{}", filter.kind);
            assert_eq!(ends(&log, libc::SECCOMP_RET_LOG), refusals);
            assert_eq!(ends(&log, libc::SECCOMP_RET_TRAP), 0);
            assert_eq!(ends(&log, libc::SECCOMP_RET_ALLOW), ends(&trap, libc::SECCOMP_RET_ALLOW));
        }
    }

    #[test]
    fn a_thread_without_a_filter_does_not_begin() {
        let error = hook(SeccompMode::Enforce).begin(ThreadKind("stranger")).unwrap_err();
        assert_eq!(error.to_string(), "there is no filter for threads of kind stranger");
        hook(SeccompMode::Off).begin(ThreadKind("stranger")).unwrap();
    }

    #[test]
    fn the_documented_table_is_this_one() {
        let page = include_str!("../../../../docs/security.md");
        for filter in Filter::all() {
            let row = |line: &&str| line.starts_with(&format!("| `{}` |", filter.kind));
            let row = page.lines().find(row).unwrap_or_else(|| panic!("{} is not documented", filter.kind));
            assert!(row.ends_with(&format!("| {} |", filter.syscalls)), "{row} has not {}", filter.syscalls);
        }
    }
}
