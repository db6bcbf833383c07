//! One L1: its two processes, their files, and waiting for its end.
#![expect(
    unsafe_code,
    reason = "asks the kernel, between fork and exec, to end children together with this process"
)]

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::{Nested, Settings};
use crate::error::{Error, Result};
use crate::run::tail;

/// How often the files of a run are looked at.
const POLL: Duration = Duration::from_millis(50);
/// How long virtiofsd may take to listen.
const SHARE_LIMIT: Duration = Duration::from_secs(20);
/// How long L1 may take to power off after its command.
const OFF_LIMIT: Duration = Duration::from_secs(30);
/// How long a machine that is ready may give no sign of life; it gives one in five seconds of its own.
const STALL_LIMIT: Duration = Duration::from_secs(180);
const CONSOLE_LINES: usize = 30;

/// A running L1. Dropping it kills it.
pub(super) struct Machine {
    qemu: Process,
    /// Serves the host's root; ends by itself when QEMU hangs up.
    _share: Process,
    work: PathBuf,
    output: Vec<Tail>,
}

impl Machine {
    /// Starts the file server and QEMU.
    pub(super) fn start(nested: &Nested, work: &Path, command_line: &str, interactive: bool) -> Result<Self> {
        let socket = work.join("root.sock");
        let share = start_share(nested, work, &socket)?;
        let memory = nested.settings.memory_mib;
        let mut qemu = nested.tools.qemu()?;
        qemu.args([
            "-nodefaults",
            "-display",
            "none",
            "-no-reboot",
            "-accel",
            // Room for all translated code of a run: throwing it away stops both processors at any point.
            "tcg,thread=multi,tb-size=2047",
        ])
        .args(["-machine", "q35,memory-backend=ram", "-cpu", "EPYC-Milan"])
        .args(["-smp", &nested.settings.cpus.to_string(), "-m", &format!("{memory}M")])
        .args(["-object", &format!("memory-backend-memfd,id=ram,size={memory}M,share=on")])
        .arg("-kernel")
        .arg(&nested.kernel)
        .arg("-initrd")
        .arg(&nested.initramfs)
        .args(["-append", command_line])
        .args([
            "-device",
            "vhost-user-fs-pci,chardev=root,tag=host,queue-size=512",
            "-device",
            "virtio-rng-pci",
        ])
        .arg("-chardev")
        .arg(option_with_path("socket,id=root,path=", &socket));
        if interactive {
            // Ctrl-C and the like go to the command.
            qemu.args(["-chardev", "stdio,id=tty,signal=off", "-serial", "chardev:tty"]);
        } else {
            qemu.arg("-serial").arg(option_with_path("file:", &work.join("console")));
            qemu.stdin(Stdio::null()).stdout(log_file(work)?);
        }
        let qemu = Process::spawn(qemu.stderr(log_file(work)?), "qemu-system-x86_64")?;
        let output = vec![
            Tail::new(work.join("stdout"), Box::new(io::stdout())),
            Tail::new(work.join("stderr"), Box::new(io::stderr())),
        ];
        Ok(Self { qemu, _share: share, work: work.to_owned(), output })
    }

    /// Passes output on until the machine is off; the command's exit status.
    pub(super) fn wait(&mut self, settings: &Settings) -> Result<ExitStatus> {
        let start = Instant::now();
        let mut ready = false;
        let mut alive = Alive::default();
        let mut ended: Option<Instant> = None;
        loop {
            let end = self.qemu.end()?;
            self.output.iter_mut().for_each(Tail::pass_on);
            let status = self.status();
            if end.is_some() || ended.is_some_and(|at| at.elapsed() > OFF_LIMIT) {
                let console = self.console();
                let how = end.map_or_else(|| "still running".to_owned(), |end| end.to_string());
                return status.ok_or(Error::L1Died { ready, status: how, console });
            }
            if ended.is_none() && status.is_some() {
                ended = Some(Instant::now());
            }
            ready = ready || self.work.join("ready").exists();
            if !ready && start.elapsed() > settings.boot_limit {
                return Err(Error::L1NotReady { limit: settings.boot_limit, console: self.console() });
            }
            let sign = fs::metadata(self.work.join("alive")).map_or(0, |meta| meta.len());
            if ready && status.is_none() && alive.silent(sign, Instant::now()) > STALL_LIMIT {
                return Err(Error::L1Stalled { limit: STALL_LIMIT, console: self.console() });
            }
            if status.is_none() && start.elapsed() > settings.boot_limit + settings.run_limit {
                return Err(Error::L1Timeout { limit: settings.run_limit });
            }
            thread::sleep(POLL);
        }
    }

    /// What the command ended with, once it has.
    fn status(&self) -> Option<ExitStatus> {
        let text = fs::read_to_string(self.work.join("status")).ok()?;
        let code: u8 = text.trim().parse().ok()?;
        Some(ExitStatus::from_raw(i32::from(code) << 8))
    }

    fn console(&self) -> String {
        let read = |name: &str| fs::read(self.work.join(name)).unwrap_or_default();
        let text = [read("qemu.log"), read("console")].concat();
        tail(&String::from_utf8_lossy(&text), CONSOLE_LINES)
    }
}

/// When a machine's last sign of life came.
#[derive(Default)]
struct Alive {
    last: Option<(u64, Instant)>,
}

impl Alive {
    /// How long the sign of life has been what it is now.
    fn silent(&mut self, sign: u64, now: Instant) -> Duration {
        match self.last {
            Some((last, since)) if last == sign => now.duration_since(since),
            _ => {
                self.last = Some((sign, now));
                Duration::ZERO
            }
        }
    }
}

fn start_share(nested: &Nested, work: &Path, socket: &Path) -> Result<Process> {
    let mut command = nested.tools.command("virtiofsd")?;
    // No sandbox: the command in L1 is one that the caller would run here with the same rights.
    command
        .args(["--shared-dir=/", "--sandbox=none", "--cache=auto", "--allow-direct-io", "--log-level=error"])
        .arg("--socket-path")
        .arg(socket)
        .stdin(Stdio::null())
        .stdout(log_file(work)?)
        .stderr(log_file(work)?);
    let mut share = Process::spawn(&mut command, "virtiofsd")?;
    let start = Instant::now();
    while !socket.exists() {
        let end = share.end()?;
        if end.is_some() || start.elapsed() > SHARE_LIMIT {
            let log = fs::read_to_string(work.join("qemu.log")).unwrap_or_default();
            let status = end.map_or_else(|| "no socket yet".to_owned(), |end| end.to_string());
            let console = format!("virtiofsd: {}", tail(&log, CONSOLE_LINES));
            return Err(Error::L1Died { ready: false, status, console });
        }
        thread::sleep(Duration::from_millis(10));
    }
    Ok(share)
}

/// QEMU's options separate keys by commas, which a path doubles.
fn option_with_path(prefix: &str, path: &Path) -> String {
    format!("{prefix}{}", path.display().to_string().replace(',', ",,"))
}

fn log_file(work: &Path) -> Result<File> {
    let path = work.join("qemu.log");
    File::options().create(true).append(true).open(&path).map_err(Error::io("open", &path))
}

/// A child that dies with this process, however that ends, and when it is dropped.
struct Process {
    child: Child,
    name: &'static str,
}

impl Process {
    fn spawn(command: &mut Command, name: &'static str) -> Result<Self> {
        Self::spawn_under(std::process::id(), command, name)
    }

    fn spawn_under(parent: u32, command: &mut Command, name: &'static str) -> Result<Self> {
        // SAFETY: the closure runs between fork and exec and makes only async-signal-safe calls: prctl and getppid.
        unsafe { command.pre_exec(move || die_with(parent)) };
        let child = command.spawn().map_err(|source| Error::Spawn { program: name.to_owned(), source })?;
        Ok(Self { child, name })
    }

    /// How it ended, once it has.
    fn end(&mut self) -> Result<Option<ExitStatus>> {
        self.child.try_wait().map_err(Error::io("wait for", self.name))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Has the kernel kill this process when its parent ends; fails if the parent has gone already.
fn die_with(parent: u32) -> io::Result<()> {
    // SAFETY: prctl with PR_SET_PDEATHSIG takes a number and touches no memory.
    let result = unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    if std::os::unix::process::parent_id() != parent {
        return Err(io::ErrorKind::NotConnected.into());
    }
    Ok(())
}

/// Passes what is appended to a file on to a stream.
struct Tail {
    path: PathBuf,
    file: Option<File>,
    target: Box<dyn Write + Send>,
}

impl Tail {
    fn new(path: PathBuf, target: Box<dyn Write + Send>) -> Self {
        Self { path, file: None, target }
    }

    fn pass_on(&mut self) {
        if self.file.is_none() {
            self.file = File::open(&self.path).ok();
        }
        let Some(file) = &mut self.file else { return };
        let mut buffer = [0; 64 * 1024];
        while let Ok(count @ 1..) = file.read(&mut buffer) {
            // A caller that has closed its output does not want it; the command goes on.
            let _ = self.target.write_all(buffer.get(..count).unwrap_or_default());
        }
        let _ = self.target.flush();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_tail_passes_on_what_is_appended() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out");
        let sink = Sink::default();
        let mut tail = Tail::new(path.clone(), Box::new(sink.clone()));
        tail.pass_on();
        let mut file = File::create(&path).unwrap();
        for word in ["one ", "two"] {
            file.write_all(word.as_bytes()).unwrap();
            tail.pass_on();
        }
        tail.pass_on();
        assert_eq!(*sink.0.lock().unwrap(), b"one two");
    }

    #[test]
    fn silence_is_counted_from_the_last_sign() {
        let (start, second) = (Instant::now(), Duration::from_secs(1));
        let mut alive = Alive::default();
        assert_eq!(alive.silent(0, start), Duration::ZERO);
        assert_eq!(alive.silent(0, start + 7 * second), 7 * second);
        assert_eq!(alive.silent(1, start + 8 * second), Duration::ZERO);
        assert_eq!(alive.silent(1, start + 9 * second), second);
    }

    #[test]
    fn a_dropped_process_is_gone() {
        let process = Process::spawn(Command::new("sleep").arg("1000"), "sleep").unwrap();
        let path = PathBuf::from(format!("/proc/{}", process.child.id()));
        assert!(path.exists());
        drop(process);
        assert!(!path.exists());
    }

    #[test]
    fn a_child_of_a_gone_parent_does_not_start() {
        let result = Process::spawn_under(u32::MAX, &mut Command::new("true"), "true");
        assert!(matches!(result, Err(Error::Spawn { .. })));
    }

    #[test]
    fn commas_in_paths_are_doubled() {
        assert_eq!(option_with_path("file:", Path::new("/a,b")), "file:/a,,b");
    }
}
