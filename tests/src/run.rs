//! Running other programs: quietly, with their last words kept for the error.

use std::process::{Command, Output, Stdio};

use crate::error::{Error, Result};

/// How many lines of a failed program's output an error carries.
const TAIL_LINES: usize = 15;

/// Runs `command` with no input and its output captured; a failure carries the end of that output.
///
/// # Errors
/// [`Error::Spawn`] if it cannot be started, [`Error::Failed`] if it does not exit with 0.
pub fn run(command: &mut Command) -> Result<Output> {
    let program = name(command);
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|source| Error::Spawn { program: program.clone(), source })?;
    if output.status.success() {
        return Ok(output);
    }
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.push_str(&String::from_utf8_lossy(&output.stderr));
    Err(Error::Failed { program, status: output.status, output: tail(&text, TAIL_LINES) })
}

/// The last `lines` lines of `text`.
#[must_use]
pub fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all.get(all.len().saturating_sub(lines)..).unwrap_or_default().join("\n")
}

/// `text` as one word of a POSIX shell.
#[must_use]
pub fn shell_quote(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

fn name(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(command.get_args().take(6).map(|word| word.to_string_lossy().into_owned()));
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_carries_the_last_words() {
        let error = run(Command::new("sh").args(["-c", "echo one; echo two >&2; exit 3"])).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("one\ntwo") && text.contains('3'), "{text}");
        assert!(matches!(run(&mut Command::new("/no/such/program")), Err(Error::Spawn { .. })));
    }

    #[test]
    fn quoting_survives_a_shell() {
        let nasty = "a'b \"c\" $HOME `x` \\ \n*";
        let output =
            run(Command::new("sh").args(["-c", &format!("printf %s {}", shell_quote(nasty))])).unwrap();
        assert_eq!(String::from_utf8(output.stdout).unwrap(), nasty);
    }

    #[test]
    fn tail_takes_the_end() {
        assert_eq!(tail("a\nb\nc", 2), "b\nc");
        assert_eq!(tail("a", 2), "a");
    }
}
