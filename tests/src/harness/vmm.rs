//! The process.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::time::Duration;

use super::linux::note_crash;
use super::terminal::Terminal;
use super::{Api, LIMIT, Output, Pending, Scratch, binary, wait_until};
use crate::confine::confine;

/// How long what is gone may be listed. Only failures wait for it.
const LEAK_LIMIT: Duration = Duration::from_secs(5);

/// What a process holds of the system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holdings {
    descriptors: Vec<String>,
    threads: usize,
}

/// A running VMM; killed when dropped.
#[derive(Debug)]
pub struct Vmm {
    child: Child,
    stdin: Option<ChildStdin>,
    /// What it prints on standard output.
    pub stdout: Output,
    /// What it prints on standard error.
    pub stderr: Output,
    socket: Option<PathBuf>,
}

impl Vmm {
    /// Starts it with `arguments`; its three standard streams are pipes.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn spawn<I>(arguments: I) -> Self
    where
        I: IntoIterator,
        I::Item: AsRef<OsStr>,
    {
        let mut command = Command::new(binary());
        command.args(arguments);
        Self::start(command)
    }

    /// The same, without the right of the superuser to write what may only be read.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn spawn_unprivileged(arguments: &[String]) -> Self {
        let root = fs::metadata("/proc/self").expect("a /proc").uid() == 0;
        let mut command = Command::new(if root { OsString::from("setpriv") } else { binary().into() });
        if root {
            command.args(["--bounding-set=-dac_override", "--inh-caps=-dac_override"]).arg(binary());
        }
        command.args(arguments);
        Self::start(command)
    }

    fn start(mut command: Command) -> Self {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the VMM starts");
        Self {
            stdin: child.stdin.take(),
            stdout: Output::capture(child.stdout.take().expect("a pipe")),
            stderr: Output::capture(child.stderr.take().expect("a pipe")),
            socket: None,
            child,
        }
    }

    /// Starts it with an API socket in `scratch` and `arguments`; returns when the API answers.
    ///
    /// # Panics
    /// When it cannot be started, or ends before it answers.
    pub fn with_api<I>(scratch: &Scratch, arguments: I) -> Self
    where
        I: IntoIterator,
        I::Item: AsRef<OsStr>,
    {
        let mut command = Command::new(binary());
        command.args(arguments);
        Self::serving(scratch, command)
    }

    /// The same, with nothing but the folder `scratch` to write in.
    ///
    /// # Panics
    /// When it cannot be started or confined, or ends before it answers.
    pub fn confined(scratch: &Scratch, arguments: &[&str]) -> Self {
        let binary = binary();
        let mut command = Command::new(&binary);
        command.args(arguments);
        confine(&mut command, &binary, scratch.folder()).expect("Landlock");
        Self::serving(scratch, command)
    }

    /// The same for a user without capabilities, who gets a userfaultfd from the device at most, and without it `hidden`
    /// only where `vm.unprivileged_userfaultfd` says so.
    ///
    /// # Panics
    /// When it cannot be started, or ends before it answers.
    #[must_use]
    pub fn without_capabilities(scratch: &Scratch, arguments: &[&str], hidden: bool) -> Self {
        let root = fs::metadata("/proc/self").expect("a /proc").uid() == 0;
        let mut command = Command::new(if root { "unshare".into() } else { binary() });
        if root {
            let hide = "test ! -e /dev/userfaultfd || mount --bind /dev/null /dev/userfaultfd || exit; ";
            let drop = "exec setpriv --bounding-set=-all --inh-caps=-all -- \"$@\"";
            let script = [if hidden { hide } else { "" }, drop].concat();
            command.args(["--mount", "sh", "-c", &script, "sh"]).arg(binary());
        }
        command.args(arguments);
        Self::serving(scratch, command)
    }

    /// The same in the network namespace `name`.
    ///
    /// # Panics
    /// When it cannot be started there, or ends before it answers.
    #[must_use]
    pub fn in_namespace(scratch: &Scratch, name: &str) -> Self {
        let mut command = Command::new("ip");
        // It becomes that program.
        command.args(["netns", "exec", name]).arg(binary());
        Self::serving(scratch, command)
    }

    /// Adds an API socket to the arguments; returns when the API answers.
    pub(super) fn serving(scratch: &Scratch, mut command: Command) -> Self {
        let socket = scratch.path(format!("api-{}.sock", unique()));
        command.arg("--api-socket").arg(format!("path={}", socket.display()));
        let mut vmm = Self::start(command);
        vmm.socket = Some(socket);
        vmm.wait_for_api();
        vmm
    }

    fn wait_for_api(&mut self) {
        let Self { child, stderr, socket, .. } = self;
        let socket = socket.as_deref().expect("a VMM with an API socket");
        let ready = || {
            let gone = child.try_wait().expect("its status");
            assert!(gone.is_none(), "the VMM ended at once ({gone:?}):\n{}", stderr.tail());
            std::os::unix::net::UnixStream::connect(socket).ok()
        };
        wait_until(LIMIT, ready, || "the API socket".to_owned());
    }

    /// Starts it with `terminal` as standard input and output, an API socket in `scratch`, and `arguments`; returns when
    /// the API answers. The terminal controls it (setsid(1)) if `controlled`.
    ///
    /// # Panics
    /// When it cannot be started, or ends before it answers.
    pub fn on_terminal(
        scratch: &Scratch,
        terminal: &Terminal,
        controlled: bool,
        arguments: &[String],
    ) -> Self {
        let socket = scratch.path(format!("api-{}.sock", unique()));
        let mut command = Command::new(if controlled { "setsid".into() } else { binary() });
        if controlled {
            command.arg("--ctty").arg(binary());
        }
        command.arg("--api-socket").arg(format!("path={}", socket.display())).args(arguments);
        let mut child = command
            .stdin(terminal.program_side())
            .stdout(terminal.program_side())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the VMM starts");
        let stderr = Output::capture(child.stderr.take().expect("a pipe"));
        let mut vmm = Self { stdin: None, stdout: Output::none(), stderr, socket: Some(socket), child };
        vmm.wait_for_api();
        vmm
    }

    /// A new connection to its API.
    ///
    /// # Panics
    /// When it was started without one, or does not answer.
    #[must_use]
    pub fn api(&self) -> Api {
        Api::connect(self.socket())
    }

    /// Sends a request without a body on a connection of its own, and does not wait for the answer.
    ///
    /// # Panics
    /// When it was started without an API, or does not take it.
    #[must_use]
    pub fn begin(&self, name: &str) -> Pending {
        Pending::send(self.socket(), name, b"")
    }

    /// The path of its API socket.
    ///
    /// # Panics
    /// When it was started without one.
    #[must_use]
    pub fn socket(&self) -> &Path {
        self.socket.as_deref().expect("a VMM with an API socket")
    }

    /// Writes to its standard input.
    ///
    /// # Panics
    /// When it does not take it.
    pub fn type_in(&mut self, text: &str) {
        let stdin = self.stdin.as_mut().expect("standard input is open");
        stdin.write_all(text.as_bytes()).and_then(|()| stdin.flush()).expect("standard input takes it");
    }

    /// Closes its standard input.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// Waits for its end; all that it printed is there then.
    ///
    /// # Panics
    /// When that takes longer than [`LIMIT`].
    pub fn wait(&mut self) -> ExitStatus {
        self.wait_within(LIMIT)
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// When that takes longer than `limit`.
    pub fn wait_within(&mut self, limit: Duration) -> ExitStatus {
        let (child, stdout, stderr) = (&mut self.child, &self.stdout, &self.stderr);
        let status = wait_until(
            limit,
            || child.try_wait().expect("its status"),
            || format!("the VMM's end; its output:\n{}\n{}", stdout.tail(), stderr.tail()),
        );
        stdout.wait_for_end();
        stderr.wait_for_end();
        status
    }

    /// Waits for its end, and checks its exit code.
    ///
    /// # Panics
    /// When it takes longer than [`LIMIT`], or ends otherwise.
    pub fn expect_exit(&mut self, code: i32) {
        let status = self.wait();
        assert_eq!(status.code(), Some(code), "{status}; standard error:\n{}", self.stderr.tail());
    }

    /// Whether it runs.
    ///
    /// # Panics
    /// When that cannot be told.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("its status").is_none()
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends it a signal, `TERM` say.
    ///
    /// # Panics
    /// When it cannot be sent.
    pub fn signal(&self, name: &str) {
        // The shell's own `kill`: no program of this name need be installed.
        let line = format!("kill -{name} {}", self.pid());
        let status = Command::new("sh").args(["-c", &line]).status().expect("a shell");
        assert!(status.success(), "{line}: {status}");
    }

    /// Processor time that it has used, to about 10 ms.
    ///
    /// # Panics
    /// When the process is gone.
    #[must_use]
    pub fn cpu_time(&self) -> Duration {
        // proc_pid_stat(5): user and system time are the fields 14 and 15; those after the name in parentheses begin with 3.
        let text = fs::read_to_string(format!("/proc/{}/stat", self.pid())).expect("the process is there");
        let (_, fields) = text.rsplit_once(')').expect("a name");
        let ticks: u64 =
            fields.split_whitespace().skip(11).take(2).filter_map(|n| n.parse::<u64>().ok()).sum();
        // USER_HZ is 100 on all machines that matter.
        Duration::from_millis(ticks * 10)
    }

    /// Memory that it has in RAM, in KiB.
    ///
    /// # Panics
    /// When the process is gone.
    #[must_use]
    pub fn resident_kib(&self) -> u64 {
        resident_kib(&self.pid().to_string())
    }

    /// Targets of its open descriptors, sorted.
    ///
    /// # Panics
    /// When the process is gone.
    #[must_use]
    pub fn descriptors(&self) -> Vec<String> {
        let mut names: Vec<String> = self
            .tasks("fd")
            .iter()
            .filter_map(|path| fs::read_link(path).ok())
            // Numbers of sockets and pipes differ.
            .map(|target| target.display().to_string().split(":[").next().unwrap_or_default().to_owned())
            .collect();
        names.sort();
        names
    }

    /// Names of its threads, sorted; not those that KVM adds in its own time.
    ///
    /// # Panics
    /// When the process is gone.
    #[must_use]
    pub fn threads(&self) -> Vec<String> {
        let mut names: Vec<String> = self
            .tasks("task")
            .iter()
            .filter_map(|path| fs::read_to_string(path.join("comm")).ok())
            .map(|name| name.trim_end().to_owned())
            .filter(|name| !name.starts_with("kvm-"))
            .collect();
        names.sort();
        names
    }

    /// What it holds of the system.
    ///
    /// # Panics
    /// When the process is gone.
    #[must_use]
    pub fn holdings(&self) -> Holdings {
        // Threads name themselves a moment after they began: only their number is telling.
        Holdings { descriptors: self.descriptors(), threads: self.threads().len() }
    }

    /// What it holds once it is up and no client is connected: of sockets, the one it listens on.
    ///
    /// # Panics
    /// When a client stays, or it has no API.
    #[must_use]
    pub fn holdings_at_rest(&self) -> Holdings {
        // It takes connections a moment before it answers.
        assert_eq!(self.api().get("vmm.ping").status, 200);
        let alone = || self.descriptors().iter().filter(|name| *name == "socket").count() == 1;
        wait_until(LIMIT, || alone().then_some(()), || "every client to be gone".to_owned());
        self.holdings()
    }

    /// Waits until it holds no more than it held `before`: a thread that was joined is listed a moment longer.
    ///
    /// # Panics
    /// When it holds something else for long.
    pub fn expect_holdings(&self, before: &Holdings, about: &str) {
        let no_more = |now: &Holdings| now.descriptors == before.descriptors && now.threads <= before.threads;
        wait_until(
            LEAK_LIMIT,
            || no_more(&self.holdings()).then_some(()),
            || format!("{about}: the VMM to hold no more than {before:?}; it holds {:?}", self.holdings()),
        );
    }

    fn tasks(&self, kind: &str) -> Vec<PathBuf> {
        let folder = format!("/proc/{}/{kind}", self.pid());
        fs::read_dir(folder).expect("the process is there").flatten().map(|entry| entry.path()).collect()
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        // A guest that hangs shows in what its vCPUs wait for, and in whether they are at work at all.
        if std::thread::panicking() && matches!(self.child.try_wait(), Ok(None)) {
            let before = threads(self.child.id());
            std::thread::sleep(Duration::from_secs(1));
            let after = threads(self.child.id());
            eprintln!("threads of the VMM:\n{before}and a second later:\n{after}");
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            note_crash(&self.stderr.text());
            eprintln!("standard error of the VMM ends with:\n{}", self.stderr.tail());
        }
    }
}

/// What each thread of a process does: its name, the fields of its `stat` from its state to its time in system mode (in ticks), and
/// for root where it is in the kernel. A line for each.
fn threads(pid: u32) -> String {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let line = |task: fs::DirEntry| {
        let read = |name: &str| fs::read_to_string(task.path().join(name)).unwrap_or_default();
        let (name, stat, stack) = (read("comm"), read("stat"), read("stack"));
        // proc_pid_stat(5): fields 3 to 15, behind the name.
        let fields: Vec<_> =
            stat.rsplit(')').next().unwrap_or_default().split_whitespace().take(13).collect();
        let at: Vec<_> = stack.lines().filter_map(|line| line.split(' ').nth(1)).take(6).collect();
        format!("  {} [{}] {}\n", name.trim_end(), fields.join(" "), at.join(" < "))
    };
    tasks.map(line).collect()
}

/// Memory that the process `pid` (or `self`) has in RAM, in KiB.
///
/// # Panics
/// When there is no such process.
#[must_use]
pub fn resident_kib(pid: &str) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).expect("the process is there");
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("its size");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

fn unique() -> u32 {
    use std::sync::atomic::{AtomicU32, Ordering};
    static NEXT: AtomicU32 = AtomicU32::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}
