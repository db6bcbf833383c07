//! How the process ends, and how errors are shown.

use std::error::Error;

/// How the process ends; the number is its exit status. The table in `docs/cli.md` says the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum ExitCode {
    /// The guest powered off, or the VMM was asked to end.
    Success = 0,
    /// The VMM failed.
    VmmError = 1,
    /// The command line is wrong.
    Usage = 2,
    /// No VMM answers.
    NoVmm = 3,
    /// A time limit passed.
    TimedOut = 4,
    /// A snapshot is not whole, or not the same as another.
    Mismatch = 5,
    /// The guest crashed.
    GuestCrashed = 10,
    /// A thread made a system call that its filter forbids.
    ForbiddenCall = 12,
    /// Guest memory is lost: that of a snapshot's file, or what the other end of a migration had.
    LostMemory = 13,
}

impl ExitCode {
    /// All of them, by number.
    pub const ALL: [Self; 9] = [
        Self::Success,
        Self::VmmError,
        Self::Usage,
        Self::NoVmm,
        Self::TimedOut,
        Self::Mismatch,
        Self::GuestCrashed,
        Self::ForbiddenCall,
        Self::LostMemory,
    ];

    /// What it means, for people.
    #[must_use]
    pub const fn meaning(self) -> &'static str {
        match self {
            Self::Success => {
                "The guest powered off, or a client or a signal ended the VMM; `doctor`: a VM can run here; `ctl`, `snapshot`: it is done."
            }
            Self::VmmError => {
                "The VMM could not start or go on; `doctor`: no VM can run here; `validate`: the VM would not boot; `ctl`: the VMM refuses, or the command failed; `snapshot`: it cannot be read or written."
            }
            Self::Usage => "The command line is wrong; nothing was started.",
            Self::NoVmm => "`ctl`: no VMM listens at the socket, or it went away before it answered.",
            Self::TimedOut => "`ctl`: the time limit passed.",
            Self::Mismatch => {
                "`snapshot verify`: the snapshot or one of its parents is damaged, missing or of another version; `snapshot diff`: the two differ."
            }
            Self::GuestCrashed => "The guest crashed: KVM could not go on with a vCPU.",
            Self::ForbiddenCall => {
                "A thread made a system call that its filter forbids; the log names both, see [security.md](security.md)."
            }
            Self::LostMemory => {
                "A snapshot's file that guest memory comes from has shrunk, is damaged or cannot be read; the log names it, see [snapshot.md](snapshot.md). Or some of a guest's memory was at the other end of a migration, see [migration.md](migration.md#post-copy)."
            }
        }
    }
}

impl From<ExitCode> for std::process::ExitCode {
    fn from(code: ExitCode) -> Self {
        (code as u8).into()
    }
}

/// An error and its causes, one a line.
#[must_use]
pub fn report(error: &dyn Error) -> String {
    let texts: Vec<String> = texts(error).iter().map(|text| text.replace('\n', "\n  ")).collect();
    format!("error: {}", texts.join("\n  caused by: "))
}

/// An error and its causes on one line.
#[must_use]
pub fn chain(error: &dyn Error) -> String {
    texts(error).join(": ")
}

/// The texts of an error and its causes; a cause that its error quotes is not said twice.
fn texts(error: &dyn Error) -> Vec<String> {
    let mut texts = vec![error.to_string()];
    let mut next = error.source();
    while let Some(cause) = next {
        let text = cause.to_string();
        if texts.last().is_none_or(|last| !last.ends_with(&text)) {
            texts.push(text);
        }
        next = cause.source();
    }
    texts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{text}")]
    struct Layer {
        text: &'static str,
        #[source]
        source: Option<Box<Layer>>,
    }

    fn layers(texts: &[&'static str]) -> Layer {
        let (text, rest) = texts.split_first().unwrap();
        let source = (!rest.is_empty()).then(|| Box::new(layers(rest)));
        Layer { text, source }
    }

    #[test]
    fn a_report_has_a_line_for_each_cause() {
        let error = layers(&["cannot boot the VM", "disk _disk0\nand _disk1", "no such file"]);
        let expected =
            "error: cannot boot the VM\n  caused by: disk _disk0\n  and _disk1\n  caused by: no such file";
        assert_eq!(report(&error), expected);
        assert_eq!(report(&layers(&["alone"])), "error: alone");
        assert_eq!(chain(&layers(&["a", "b", "c"])), "a: b: c");
    }

    #[test]
    fn what_an_error_quotes_is_not_repeated() {
        let error = layers(&["control loop", "cannot read: no such file", "no such file", "cause of that"]);
        assert_eq!(chain(&error), "control loop: cannot read: no such file: cause of that");
    }

    #[test]
    fn the_documented_table_is_this_one() {
        let page = include_str!("../../../docs/cli.md");
        let documented: Vec<&str> = page
            .lines()
            .skip_while(|line| *line != "## Exit status")
            .filter(|line| line.starts_with("| ") && line.contains(|c: char| c.is_ascii_digit()))
            .collect();
        let rows = ExitCode::ALL.map(|code| format!("| {} | {} |", code as u8, code.meaning()));
        assert_eq!(documented, rows);
    }
}
