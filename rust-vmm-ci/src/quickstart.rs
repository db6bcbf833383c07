//! `cargo xtask quickstart`: from a fresh checkout to a Debian guest, by one command.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Instant;

use vmm_tests::cache::Cache;
use vmm_tests::error::{Error, Result, describe};
use vmm_tests::hostkvm::KvmAbility;
use vmm_tests::image::{initramfs, rootfs};
use vmm_tests::kernels::{Kernel, KernelVersion};
use vmm_tests::nested::Nested;
use vmm_tests::progress::Step;
use vmm_tests::toolbox::Toolbox;

use crate::nested::run_command;

const USAGE: &str = "usage: cargo xtask quickstart [--interactive] [--vmm PROGRAM]\n\
    Builds the VMM, fetches a Debian guest and boots it: it tells its kernel, CPUs, disk and uptime and powers off.\n\
    With --interactive it stays at the guest's shell; `poweroff` there ends it.\n\
    --vmm takes PROGRAM instead of building it.";

/// What the guest runs.
const SCRIPT: &str = "echo; echo \"  A Debian guest in your VMM\"; echo \"  kernel: $(uname -sr)\"; echo \"  CPUs:   $(nproc)\"
echo \"  memory: $(sed -n 's/^MemTotal: *//p' /proc/meminfo)\"; echo \"  disk:   $(lsblk -dno NAME,SIZE /dev/vda)\"
echo \"  uptime: $(cut -d ' ' -f 1 /proc/uptime) s\"; echo";

/// Runs the subcommand with the words after its name.
pub(crate) fn run(args: &[String]) -> ExitCode {
    let mut interactive = false;
    let mut vmm = None;
    let mut words = args.iter();
    while let Some(word) = words.next() {
        match (word.as_str(), words.len()) {
            ("--interactive", _) => interactive = true,
            ("--vmm", 1..) => vmm = words.next().map(PathBuf::from),
            _ => {
                eprintln!("{USAGE}");
                return ExitCode::from(2);
            }
        }
    }
    let start = Instant::now();
    match quickstart(vmm, interactive) {
        Ok(code) => {
            let seconds = start.elapsed().as_secs();
            eprintln!("quickstart: the VMM ended with status {code}, {seconds} s after the start");
            ExitCode::from(code)
        }
        Err(error) => {
            eprintln!("error: {}", describe(&error));
            ExitCode::FAILURE
        }
    }
}

fn quickstart(vmm: Option<PathBuf>, interactive: bool) -> Result<u8> {
    let ability = KvmAbility::probe();
    let nested = match &ability {
        KvmAbility::Full => false,
        KvmAbility::None(reason) | KvmAbility::TinyGuestsOnly(reason) => {
            eprintln!("KVM here cannot run Linux, so a nested one in QEMU will (slower): {reason}");
            true
        }
    };
    let vmm = vmm.map_or_else(build_vmm, Ok)?;
    let cache = Cache::open()?;
    let tools = Toolbox::open(&cache)?;
    let kernel = Kernel::get(&cache, &tools, KernelVersion::Debian13)?;
    let initramfs = initramfs::guest(&cache, &tools, &kernel)?;
    let image = rootfs::image(&cache, &tools)?;
    let disk = Disk::copy_of(&cache, &image)?;
    let command = command_line(&vmm, &kernel, &initramfs, &disk.path, interactive);
    eprintln!("=> {}", command.join(" "));
    if interactive {
        eprintln!("=> the guest logs you in by itself; `poweroff` there ends it");
    }
    if nested && !Nested::is_inside() { run_command(&command, interactive) } else { run_here(&command) }
}

/// Builds the release binary; cargo shows its own progress.
fn build_vmm() -> Result<PathBuf> {
    let _step = Step::begin("building the VMM");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."));
    let status = Command::new(cargo)
        .args(["build", "--release", "--package", "vmm"])
        .current_dir(root)
        .status()
        .map_err(|source| Error::Spawn { program: "cargo".to_owned(), source })?;
    if !status.success() {
        return Err(Error::Failed { program: "cargo build".to_owned(), status, output: String::new() });
    }
    let target =
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), |path| root.join(path));
    Ok(target.join("release/vmm"))
}

fn command_line(
    vmm: &Path,
    kernel: &Kernel,
    initramfs: &Path,
    disk: &Path,
    interactive: bool,
) -> Vec<String> {
    let text = |path: &Path| path.display().to_string();
    let mut guest = String::from("console=ttyS0 quiet root=/dev/vda");
    if !interactive {
        guest.push_str(" vmm.report=no vmm.action=poweroff ");
        guest.push_str(&rootfs::script_word(SCRIPT));
    }
    let words = [
        ("--kernel", text(&kernel.vmlinux())),
        ("--initramfs", text(initramfs)),
        ("--cmdline", guest),
        ("--cpus", "boot=2".to_owned()),
        ("--memory", "size=1G".to_owned()),
        ("--disk", format!("path={},image_type=raw", text(disk))),
        ("--serial", "tty".to_owned()),
        ("--console", "off".to_owned()),
    ];
    let mut command = vec![text(vmm)];
    command.extend(words.into_iter().flat_map(|(option, value)| [option.to_owned(), value]));
    command
}

fn run_here(command: &[String]) -> Result<u8> {
    let (program, arguments) = command.split_first().map_or(("", [].as_slice()), |(p, a)| (p.as_str(), a));
    let status = Command::new(program)
        .args(arguments)
        .status()
        .map_err(|source| Error::Spawn { program: program.to_owned(), source })?;
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1))
}

/// The guest's own disk, removed at the end.
struct Disk {
    path: PathBuf,
}

impl Disk {
    fn copy_of(cache: &Cache, image: &Path) -> Result<Self> {
        let _step = Step::begin("copying the root file system");
        let disk =
            Self { path: cache.folder("work")?.join(format!("{}-quickstart.raw", std::process::id())) };
        rootfs::copy(image, &disk.path)?;
        Ok(disk)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_script_fits_a_kernel_command_line() {
        assert!(rootfs::script_word(SCRIPT).len() < 1500);
    }
}
