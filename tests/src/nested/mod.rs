//! A KVM that works everywhere: a Linux machine (L1) in QEMU's emulation of an AMD processor with SVM.
//!
//! L1 sees the root of the host file system through virtio-fs, so a command finds the files, libraries and programs that it would find on the
//! host, and a `/dev/kvm` on which unmodified kernels run. Everything is emulated: compare times in there with each other only.

mod machine;

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::base64;
use crate::cache::{Cache, remove_all};
use crate::error::{Error, Result};
use crate::image::initramfs::{self, Recipe};
use crate::kernels::{Kernel, KernelVersion};
use crate::run::shell_quote;
use crate::toolbox::Toolbox;

use machine::Machine;

const INIT: &str = include_str!("l1-init.sh");

/// How many L1s are tried for one command.
const MOST_MACHINES: u32 = 4;

/// How large L1 is and how long it may take.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Processors.
    pub cpus: u32,
    /// Bound of its boot; one that takes longer is tried once more.
    pub boot_limit: Duration,
    /// Bound of the command.
    pub run_limit: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            memory_mib: 6144,
            cpus: 2,
            boot_limit: Duration::from_secs(120),
            run_limit: Duration::from_secs(3600),
        }
    }
}

/// A command for L1.
#[derive(Debug, Clone)]
pub struct Job {
    /// The program and its arguments, with paths as on the host.
    pub command: Vec<OsString>,
    /// Its environment, whole; `VMM_IN_L1=1` is added.
    pub env: Vec<(OsString, OsString)>,
    /// Its current directory. L1 has an empty `/tmp` in memory, unless this folder, the program, an argument or the cache is in
    /// `/tmp`: then it sees the host's.
    pub cwd: PathBuf,
    /// Whether it talks to the caller's terminal; else it has no input, and its output goes to the caller's.
    pub interactive: bool,
}

impl Job {
    /// `command` with the caller's environment and current directory, not interactive.
    ///
    /// # Errors
    /// When there is no current directory.
    pub fn new(command: Vec<OsString>) -> Result<Self> {
        let cwd = std::env::current_dir().map_err(Error::io("find", "the current directory"))?;
        Ok(Self { command, env: std::env::vars_os().collect(), cwd, interactive: false })
    }
}

/// The means to run commands in L1.
#[derive(Debug)]
pub struct Nested {
    cache: Cache,
    tools: Toolbox,
    kernel: PathBuf,
    initramfs: PathBuf,
    settings: Settings,
}

impl Nested {
    /// Whether this process runs in L1 already.
    #[must_use]
    pub fn is_inside() -> bool {
        std::env::var_os("VMM_IN_L1").is_some()
    }

    /// Fetches and builds what L1 is made of, unless it is in the cache.
    ///
    /// # Errors
    /// Those of fetching.
    pub fn prepare(cache: &Cache, settings: Settings) -> Result<Self> {
        let tools = Toolbox::open(cache)?;
        let kernel = Kernel::get(cache, &tools, KernelVersion::Debian13)?;
        let modules = kernel.host_modules()?;
        let release = kernel.release()?;
        let recipe =
            Recipe { name: "initramfs-l1", release: &release, modules: &modules, init: INIT, extra: &[] };
        let initramfs = initramfs::build(cache, &tools, &recipe)?;
        Ok(Self { cache: cache.clone(), tools, kernel: kernel.vmlinux(), initramfs, settings })
    }

    /// Boots one L1, runs `job` in it and returns how that ended. Its output appears as it comes. L1 dies with this process.
    ///
    /// An L1 that does not come up, whose kernel panics, or that stands still is the emulator's fault, seen once in some dozens of
    /// guests: then the whole command is run again, at most four times in all, and that is said.
    ///
    /// # Errors
    /// When no L1 comes up, the last one dies, or a limit passes.
    pub fn run(&self, job: &Job) -> Result<ExitStatus> {
        self.run_prepared(|| Ok(job.clone()))
    }

    /// The same for a command that changes files: `prepare` makes them anew for each run.
    ///
    /// # Errors
    /// As [`run`](Self::run), and those of `prepare`.
    pub fn run_prepared(&self, mut prepare: impl FnMut() -> Result<Job>) -> Result<ExitStatus> {
        for _ in 1..MOST_MACHINES {
            let job = prepare()?;
            match self.run_once(&job) {
                Err(error) if is_emulators_fault(&error) && !job.interactive => {
                    eprintln!("{error}\nthis is a fault of the emulated machine: running the command again");
                }
                other => return other,
            }
        }
        self.run_once(&prepare()?)
    }

    fn run_once(&self, job: &Job) -> Result<ExitStatus> {
        let work = WorkFolder::create(&self.cache)?;
        let script = work.path.join("command.sh");
        fs::write(&script, command_script(job)).map_err(Error::io("write", &script))?;
        let mut machine =
            Machine::start(self, &work.path, &self.kernel_command_line(job, &work.path), job.interactive)?;
        machine.wait(&self.settings)
    }

    fn kernel_command_line(&self, job: &Job, work: &Path) -> String {
        // No watchdogs: the host may be busy. No mitigations: there is nothing to protect.
        let mut line = String::from(
            "console=ttyS0 loglevel=4 panic=-1 mitigations=off nowatchdog nosoftlockup rcupdate.rcu_cpu_stall_suppress=1 ",
        );
        line.push_str("vmm.work=");
        line.push_str(&base64::encode(work.as_os_str().as_encoded_bytes()));
        let words = job.command.iter().map(Path::new);
        if words.chain([job.cwd.as_path(), work, self.cache.root()]).any(|path| path.starts_with("/tmp")) {
            line.push_str(" vmm.tmp=host");
        }
        if job.interactive {
            line.push_str(" vmm.tty=1");
        }
        line
    }
}

fn is_emulators_fault(error: &Error) -> bool {
    match error {
        Error::L1NotReady { .. } | Error::L1Stalled { .. } => true,
        // A triple fault of its kernel leaves no word, only a machine that is off.
        Error::L1Died { ready, console, .. } => *ready || console.contains("Kernel panic - not syncing"),
        _ => false,
    }
}

/// A folder for one run, removed at the end.
struct WorkFolder {
    path: PathBuf,
}

impl WorkFolder {
    fn create(cache: &Cache) -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let parent = cache.folder("work")?;
        remove_stale(&parent);
        let path = parent.join(format!("{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed)));
        fs::create_dir_all(&path).map_err(Error::io("create", &path))?;
        Ok(Self { path })
    }
}

impl Drop for WorkFolder {
    fn drop(&mut self) {
        if std::env::var_os("VMM_KEEP_WORK").is_none() {
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

/// Removes folders of processes that were killed.
fn remove_stale(parent: &Path) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let process = name.to_string_lossy().split('-').next().map(|pid| Path::new("/proc").join(pid));
        if process.is_some_and(|path| !path.exists()) {
            let _ = remove_all(&entry.path());
        }
    }
}

/// The shell script that L1 runs in the host's root.
fn command_script(job: &Job) -> Vec<u8> {
    let mut script = Vec::new();
    let quote = |word: &std::ffi::OsStr| shell_quote_bytes(word.as_encoded_bytes());
    script.extend_from_slice(b"cd ");
    script.extend(quote(job.cwd.as_os_str()));
    script.extend_from_slice(b" || exit 125\n");
    for (name, value) in &job.env {
        if is_variable_name(name.as_encoded_bytes()) {
            script.extend_from_slice(b"export ");
            script.extend_from_slice(name.as_encoded_bytes());
            script.push(b'=');
            script.extend(quote(value));
            script.push(b'\n');
        }
    }
    script.extend_from_slice(b"export VMM_IN_L1=1\nexec");
    for word in &job.command {
        script.push(b' ');
        script.extend(quote(word));
    }
    script.push(b'\n');
    script
}

/// Names that a shell can export; others (exported functions of some shells) are left out.
fn is_variable_name(name: &[u8]) -> bool {
    name.first().is_some_and(|first| !first.is_ascii_digit())
        && name.iter().all(|byte| byte.is_ascii_alphanumeric() || *byte == b'_')
}

/// As [`shell_quote`], for words that may not be UTF-8.
fn shell_quote_bytes(word: &[u8]) -> Vec<u8> {
    if let Ok(text) = std::str::from_utf8(word) {
        return shell_quote(text).into_bytes();
    }
    let mut quoted = vec![b'\''];
    for byte in word {
        match byte {
            b'\'' => quoted.extend_from_slice(br"'\''"),
            other => quoted.push(*other),
        }
    }
    quoted.push(b'\'');
    quoted
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStringExt;
    use std::process::Command;

    use super::*;

    #[test]
    fn the_script_gives_words_and_variables_unchanged() {
        let odd = OsString::from_vec(b"\xff 'x' $y\n".to_vec());
        let job = Job {
            command: vec![
                "sh".into(),
                "-c".into(),
                "printf %s \"$A|$1|$VMM_IN_L1|$PWD\"".into(),
                "sh".into(),
                odd.clone(),
            ],
            env: vec![
                ("PATH".into(), std::env::var_os("PATH").unwrap()),
                ("A".into(), "it's".into()),
                ("BASH_FUNC_x%%".into(), "() { :; }".into()),
            ],
            cwd: PathBuf::from("/usr"),
            interactive: false,
        };
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("script");
        fs::write(&path, command_script(&job)).unwrap();
        let output = Command::new("sh").arg(&path).env_clear().output().unwrap();
        let expected = [b"it's|".as_slice(), odd.as_encoded_bytes(), b"|1|/usr"].concat();
        assert_eq!(output.stdout, expected, "{}", String::from_utf8_lossy(&output.stderr));
    }

    #[test]
    fn only_an_l1_that_crashed_by_itself_is_tried_again() {
        let died = |ready, console: &str| Error::L1Died {
            ready,
            status: "exit status: 0".to_owned(),
            console: console.to_owned(),
        };
        assert!(is_emulators_fault(&died(false, "[ 1.0] Kernel panic - not syncing: corrupted stack end")));
        assert!(!is_emulators_fault(&died(false, "VMM-L1: no command")));
        assert!(is_emulators_fault(&died(true, "VMM-L1: ready")));
        assert!(is_emulators_fault(&Error::L1NotReady { limit: Duration::ZERO, console: String::new() }));
        assert!(is_emulators_fault(&Error::L1Stalled { limit: Duration::ZERO, console: String::new() }));
        assert!(!is_emulators_fault(&Error::L1Timeout { limit: Duration::ZERO }));
    }

    #[test]
    fn stale_work_folders_go_and_live_ones_stay() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path()).unwrap();
        let stale = cache.folder("work").unwrap().join("4194999-0");
        fs::create_dir(&stale).unwrap();
        let file = cache.folder("work").unwrap().join("4194998-disk.raw");
        fs::write(&file, "").unwrap();
        let first = WorkFolder::create(&cache).unwrap();
        let second = WorkFolder::create(&cache).unwrap();
        assert!(!stale.exists() && !file.exists() && first.path.exists() && second.path.exists());
        let path = first.path.clone();
        drop(first);
        assert!(!path.exists());
    }
}
