//! Commands under watch: their output passes through line by line, and their time is limited.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

/// A command to run in the repository's root.
pub(crate) struct Watched<'a> {
    /// Program and arguments.
    pub(crate) words: &'a [String],
    /// Environment variables on top of the caller's.
    pub(crate) env: &'a BTreeMap<String, String>,
    /// When to give up.
    pub(crate) limit: Duration,
}

/// How a command ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// With this status; 128 and the signal's number if a signal ended it.
    Status(i32),
    /// It took longer than allowed and was killed with its children.
    TooLong(Duration),
}

impl Watched<'_> {
    /// Runs the command, prints its standard output and shows each line of it to `see`.
    pub(crate) fn run(&self, see: &mut dyn FnMut(&str)) -> io::Result<End> {
        let mut child = self.spawn()?;
        let lines = child.stdout.take().map(read_lines);
        let deadline = Instant::now() + self.limit;
        let mut ended: Option<(ExitStatus, Instant)> = None;
        if let Some(lines) = lines {
            loop {
                match lines.recv_timeout(Duration::from_millis(100)) {
                    Ok(line) => {
                        println!("{line}");
                        see(&line);
                        continue;
                    }
                    Err(RecvTimeoutError::Disconnected) => break,
                    Err(RecvTimeoutError::Timeout) => {}
                }
                if ended.is_none() {
                    ended = child.try_wait()?.map(|status| (status, Instant::now()));
                }
                // A grandchild may keep the pipe open; its output is not waited for.
                if ended.is_some_and(|(_, when)| when.elapsed() > Duration::from_secs(2)) {
                    break;
                }
                if ended.is_none() && Instant::now() >= deadline {
                    break;
                }
            }
        }
        finish(child, deadline, self.limit)
    }

    fn spawn(&self) -> io::Result<Child> {
        let (program, args) = self
            .words
            .split_first()
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "no command"))?;
        Command::new(program)
            .args(args)
            .envs(self.env)
            .current_dir(super::root())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            // A group of its own, so that all of it can be ended.
            .process_group(0)
            .spawn()
    }
}

/// Whether a shell would find `program`.
pub(crate) fn is_on_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
}

/// The end of a command in words.
pub(crate) fn describe(end: &io::Result<End>) -> String {
    match end {
        Ok(End::Status(status)) => format!("exit status {status}"),
        Ok(End::TooLong(limit)) => format!("too long: more than {} minutes", limit.as_secs() / 60),
        Err(error) => format!("cannot be run: {error}"),
    }
}

fn read_lines(stdout: ChildStdout) -> Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut reader = BufReader::new(stdout);
        let mut line = Vec::new();
        while reader.read_until(b'\n', &mut line).is_ok_and(|count| count > 0) {
            let text = String::from_utf8_lossy(&line);
            if sender.send(text.trim_end_matches(['\n', '\r']).to_owned()).is_err() {
                return;
            }
            line.clear();
        }
    });
    receiver
}

/// Waits for the rest of the time, then kills the command's process group.
fn finish(mut child: Child, deadline: Instant, limit: Duration) -> io::Result<End> {
    loop {
        if let Some(status) = child.try_wait()? {
            let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
            return Ok(End::Status(code.unwrap_or(1)));
        }
        if Instant::now() >= deadline {
            let group = format!("-{}", child.id());
            Command::new("kill").args(["-KILL", "--", &group]).status()?;
            child.wait()?;
            return Ok(End::TooLong(limit));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}
