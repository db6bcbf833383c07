//! `vmm doctor`: whether and how well this machine runs VMs, and what to do where it does not.
//!
//! Probing and judging are apart: `probe`, `syscalls` and `guest` find facts, `judge` is a function of them.

mod facts;
mod guest;
mod judge;
mod limits;
mod probe;
mod syscalls;

use std::fmt;
use std::io::{self, Write};
use std::path::Path;

use serde_json::json;

use crate::exit::ExitCode;

pub use syscalls::landlock_version;

/// What a check came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// As it should be.
    Ok,
    /// VMs run, but something that some of them want is missing.
    Warn,
    /// No VM can run.
    Fail,
}

impl Verdict {
    /// `ok`, `warn` or `fail`, as in the JSON.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fail => "fail",
        }
    }
}

/// One check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// What was checked.
    pub name: &'static str,
    /// What it came to.
    pub verdict: Verdict,
    /// What was found.
    pub found: String,
    /// What to do about it.
    pub advice: Option<String>,
}

/// All checks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// In the order of importance.
    pub checks: Vec<Check>,
}

impl Report {
    /// Whether any VM can run.
    #[must_use]
    pub fn can_run(&self) -> bool {
        self.checks.iter().all(|check| check.verdict != Verdict::Fail)
    }

    /// The exit status that tells so.
    #[must_use]
    pub fn status(&self) -> ExitCode {
        if self.can_run() { ExitCode::Success } else { ExitCode::VmmError }
    }

    /// For programs: `{"can_run", "checks": [{"name", "status", "found", "advice"}]}`, where `advice` may be null.
    #[must_use]
    pub fn json(&self) -> serde_json::Value {
        let check = |check: &Check| {
            let Check { name, verdict, found, advice } = check;
            json!({ "name": name, "status": verdict.word(), "found": found, "advice": advice })
        };
        json!({ "can_run": self.can_run(), "checks": self.checks.iter().map(check).collect::<Vec<_>>() })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Check { name, verdict, found, advice } in &self.checks {
            writeln!(f, "{:<6}{name:<15}{found}", verdict.word())?;
            if let Some(advice) = advice {
                writeln!(f, "{:21}-> {advice}", "")?;
            }
        }
        let warnings = self.checks.iter().filter(|check| check.verdict == Verdict::Warn).count();
        match (self.can_run(), warnings) {
            (false, _) => writeln!(f, "\nNo VM can run here."),
            (true, 0) => writeln!(f, "\nVMs can run here."),
            (true, 1) => writeln!(f, "\nVMs can run here, with the restriction above."),
            (true, _) => writeln!(f, "\nVMs can run here, with the {warnings} restrictions above."),
        }
    }
}

/// Checks this machine. It takes some milliseconds, and runs two guests of a few instructions.
#[must_use]
pub fn examine() -> Report {
    Report { checks: judge::judge(&probe::gather(Path::new("/"))) }
}

/// Checks this machine and prints what was found, in JSON if so asked.
#[must_use]
pub fn run(json: bool) -> ExitCode {
    let report = examine();
    let printed = print(&report, json, &mut io::stdout().lock());
    match printed {
        // A reader that has seen enough, such as `head`, does not change the result.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            // Not `eprintln`, which panics where standard error is closed.
            let _ = writeln!(io::stderr(), "error: cannot print the result\n  caused by: {error}");
            ExitCode::VmmError
        }
        _ => report.status(),
    }
}

fn print(report: &Report, json: bool, out: &mut dyn Write) -> io::Result<()> {
    if json {
        writeln!(out, "{:#}", report.json())?;
    } else {
        write!(out, "{report}")?;
    }
    out.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(verdicts: &[Verdict]) -> Report {
        let check = |verdict: &Verdict| Check {
            name: "kvm",
            verdict: *verdict,
            found: "found".into(),
            advice: (*verdict != Verdict::Ok).then(|| "do this".into()),
        };
        Report { checks: verdicts.iter().map(check).collect() }
    }

    #[test]
    fn only_a_failure_means_that_no_vm_runs() {
        assert_eq!(report(&[Verdict::Ok, Verdict::Warn]).status(), ExitCode::Success);
        assert_eq!(report(&[Verdict::Ok, Verdict::Fail, Verdict::Warn]).status(), ExitCode::VmmError);
    }

    #[test]
    fn the_table_is_for_people() {
        let text = report(&[Verdict::Ok, Verdict::Warn]).to_string();
        let expected = "\
ok    kvm            found
warn  kvm            found
                     -> do this

VMs can run here, with the restriction above.
";
        assert_eq!(text, expected);
        assert!(report(&[Verdict::Fail]).to_string().ends_with("\nNo VM can run here.\n"));
    }

    #[test]
    fn json_is_for_programs() {
        let mut out = Vec::new();
        print(&report(&[Verdict::Ok, Verdict::Fail]), true, &mut out).unwrap();
        let value: serde_json::Value = serde_json::from_slice(&out).unwrap();
        let expected = json!({ "can_run": false, "checks": [
            { "name": "kvm", "status": "ok", "found": "found", "advice": null },
            { "name": "kvm", "status": "fail", "found": "found", "advice": "do this" },
        ] });
        assert_eq!(value, expected);
    }

    #[test]
    fn this_machine_can_be_examined() {
        let report = examine();
        let names: Vec<_> = report.checks.iter().map(|check| check.name).collect();
        let expected = [
            "kvm",
            "guests",
            "io_uring",
            "huge pages",
            "userfaultfd",
            "seccomp",
            "landlock",
            "tun",
            "vhost",
            "open files",
            "locked memory",
            "memory",
        ];
        assert_eq!(names, expected);
        for check in &report.checks {
            assert!(!check.found.is_empty(), "{check:?}");
            assert_eq!(check.advice.is_some(), check.verdict != Verdict::Ok, "{check:?}");
        }
    }
}
