//! Unmodified Linux guests: Debian's kernels, and a Debian with systemd.
//!
//! They run on this machine's KVM where it can run Linux, else all of them in one nested machine; which is said first and last.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]

mod control_plane;
mod migration;
mod serial;
mod snapshot;
mod worker;

use std::ffi::OsString;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use libtest_mimic::{Arguments, Failed, Trial};
use vmm_tests::cache::Cache;
use vmm_tests::error::{Error, Result, describe};
use vmm_tests::harness::linux::{Console, Images, LinuxGuest, take_crash};
use vmm_tests::harness::{Scratch, Vmm, binary};
use vmm_tests::hostkvm::KvmAbility;
use vmm_tests::image::rootfs;
use vmm_tests::kernels::KernelVersion;
use vmm_tests::nested::{Job, Nested, Settings};

/// From the start of a guest to user space, or from there to power-off. A nested guest on a busy machine is slow.
const BOOT_LIMIT: Duration = Duration::from_secs(300);
/// The same for a Debian with systemd.
const SYSTEM_LIMIT: Duration = Duration::from_secs(600);
/// How far a guest's clock may be off, in seconds. It counts whole ones.
const CLOCK_ERROR: u64 = 3;
/// Names the folder with the disks to a nested run.
const DISKS: &str = "VMM_TEST_DISKS";

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    match run(arguments) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {}", describe(&error));
            ExitCode::FAILURE
        }
    }
}

fn run(mut arguments: Arguments) -> Result<ExitCode> {
    if arguments.list {
        let trials = ALL.iter().map(|(name, _)| Trial::test(*name, || Ok(()))).collect();
        return Ok(libtest_mimic::run(&arguments, trials).exit_code());
    }
    // Said now, not at the end of a long preparation.
    let _ = binary();
    let ability = KvmAbility::probe();
    let cache = Cache::open()?;
    let images = Images::get(&cache)?;
    if let KvmAbility::None(reason) | KvmAbility::TinyGuestsOnly(reason) = ability {
        assert!(!Nested::is_inside(), "the nested KVM cannot run Linux: {reason}");
        println!("Linux guests: this machine's KVM cannot run them, so a nested one will: {reason}");
        return run_nested(&cache, &images);
    }
    let (place, disks) = match std::env::var_os(DISKS) {
        Some(folder) => ("the nested KVM", Disks::at(folder.into())),
        None => ("this machine's KVM", Disks::prepare(&cache)?.filled(&images)?),
    };
    // One after the other: they have the processors for themselves, and deadlines.
    arguments.test_threads = Some(1);
    let bench = Arc::new(Bench { images, disks, again: AtomicUsize::new(0) });
    let trials = ALL
        .iter()
        .map(|(name, case)| {
            let bench = Arc::clone(&bench);
            Trial::test(*name, move || {
                if !bench.disks.has_passed(name) {
                    attempt(name, *case, &bench);
                    bench.disks.note_passed(name);
                }
                Ok::<(), Failed>(())
            })
        })
        .collect();
    let conclusion = libtest_mimic::run(&arguments, trials);
    println!(
        "Linux guests: {} tests ran on {place}; {} times a case ran again, as its guest had crashed or hung in the emulator",
        conclusion.num_passed + conclusion.num_failed,
        bench.again.load(Ordering::SeqCst)
    );
    Ok(conclusion.exit_code())
}

/// Runs `case`. The nested KVM's emulator crashes or hangs a guest once in some dozens of boots (panics and triple faults, with
/// stacks and segment bases that no code of the guest's has set); its own kernel goes the same way. Such a case is run again,
/// which is said; what fails otherwise, more than [`MOST_TRIES`] times, or with more than [`MOST_AGAIN`] others has failed.
fn attempt(name: &str, case: Case, bench: &Bench) {
    for tried in 1.. {
        bench.disks.given.lock().unwrap().clear();
        let Err(panic) = catch_unwind(AssertUnwindSafe(|| case(bench))) else { return };
        let hung = panic.downcast_ref::<String>().is_some_and(|text| text.starts_with("waited "));
        let may_again =
            Nested::is_inside() && tried < MOST_TRIES && bench.again.load(Ordering::SeqCst) < MOST_AGAIN;
        if !((take_crash() || hung) && may_again && bench.disks.renew()) {
            resume_unwind(panic);
        }
        bench.again.fetch_add(1, Ordering::SeqCst);
        println!("\n{name}: its guest crashed or hung in the emulated machine; it is run again");
    }
}

/// How often one case may be run.
const MOST_TRIES: usize = 3;
/// How often cases of one nested machine may be run again.
const MOST_AGAIN: usize = 5;

/// Processors of the nested machine: with one the emulator has nothing to mix up.
const NESTED_CPUS: u32 = 1;

/// `VMM_NESTED_CPUS` is for who looks for what it mixes up.
fn settings() -> Settings {
    let cpus = std::env::var("VMM_NESTED_CPUS").ok().and_then(|n| n.parse().ok()).unwrap_or(NESTED_CPUS);
    Settings { cpus, ..Settings::default() }
}

fn run_nested(cache: &Cache, images: &Images) -> Result<ExitCode> {
    let nested = Nested::prepare(cache, settings())?;
    let disks = Disks::prepare(cache)?;
    let status = nested.run_prepared(|| {
        let passed = disks.passed();
        if !passed.is_empty() {
            println!(
                "these passed before that machine crashed, and are not run again: {}",
                passed.join(", ")
            );
        }
        disks.fill(images)?;
        let mut job = Job::new(std::env::args_os().collect())?;
        if let Ok(program) = std::env::current_exe() {
            job.command[0] = program.into();
        }
        job.env.push((OsString::from(DISKS), disks.folder.clone().into()));
        Ok(job)
    })?;
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from))
}

/// What the cases work on.
struct Bench {
    images: Images,
    disks: Disks,
    /// How often cases were run again.
    again: AtomicUsize,
}

/// A folder with a root disk for each case that writes one. On the host's file system, as L1's memory is small.
struct Disks {
    folder: PathBuf,
    /// Names of the root disks that the present case was given.
    given: Mutex<Vec<String>>,
    _mine: Option<tempfile::TempDir>,
}

const ROOT_DISKS: [&str; 6] = ["command-line", "api", "stress", "button", "snapshots", "migrations"];
/// Root disks that take the place of one whose guest crashed.
const SPARE_DISKS: [&str; MOST_AGAIN] = ["spare-1", "spare-2", "spare-3", "spare-4", "spare-5"];
/// The file in their folder that names, a line each, the cases that have passed.
const PASSED: &str = "passed";

impl Disks {
    fn prepare(cache: &Cache) -> Result<Self> {
        // By the number in its name the nested runner knows what a killed process left.
        let work = cache.folder("work")?;
        let prefix = format!("{}-linux-", std::process::id());
        let failed = |source| Error::Io { action: "create a folder in", path: work.clone(), source };
        let mine = tempfile::Builder::new().prefix(&prefix).tempdir_in(&work).map_err(failed)?;
        Ok(Self { folder: mine.path().to_owned(), given: Mutex::default(), _mine: Some(mine) })
    }

    fn filled(self, images: &Images) -> Result<Self> {
        self.fill(images)?;
        Ok(self)
    }

    /// Makes all root disks anew.
    fn fill(&self, images: &Images) -> Result<()> {
        let mut names = ROOT_DISKS.iter().chain(&SPARE_DISKS);
        names.try_for_each(|name| rootfs::copy(images.rootfs(), &self.folder.join(name)))
    }

    /// The cases that have passed, in this nested machine or one that crashed.
    fn passed(&self) -> Vec<String> {
        let text = fs::read_to_string(self.folder.join(PASSED)).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    fn has_passed(&self, name: &str) -> bool {
        self.passed().iter().any(|passed| passed == name)
    }

    fn note_passed(&self, name: &str) {
        use std::io::Write;
        let mut file = fs::File::options().create(true).append(true).open(self.folder.join(PASSED)).unwrap();
        writeln!(file, "{name}").unwrap();
        file.sync_all().unwrap();
    }

    fn at(folder: PathBuf) -> Self {
        Self { folder, given: Mutex::default(), _mine: None }
    }

    /// A console; in this folder a user of the host can watch it.
    fn console(&self, name: &str) -> Console {
        let path = self.folder.join(format!("{name}-console"));
        fs::remove_file(&path).ok();
        Console::new(path)
    }

    /// A folder that is not there yet.
    fn folder(&self, name: &str) -> PathBuf {
        let path = self.folder.join(name);
        fs::remove_dir_all(&path).ok();
        path
    }

    fn root(&self, name: &str) -> PathBuf {
        self.given.lock().unwrap().push(name.to_owned());
        self.folder.join(name)
    }

    /// Replaces what a crashed guest wrote on by fresh disks, if there are enough.
    fn renew(&self) -> bool {
        let given = self.given.lock().unwrap().pop();
        let Some(name) = given else { return true };
        SPARE_DISKS.iter().any(|spare| fs::rename(self.folder.join(spare), self.folder.join(&name)).is_ok())
    }

    fn data(&self, name: &str) -> PathBuf {
        let path = self.folder.join(format!("{name}-data"));
        fs::File::create(&path).and_then(|file| file.set_len(DATA_SIZE)).unwrap();
        path
    }
}

/// Bytes of the disk that fio works on.
const DATA_SIZE: u64 = 64 << 20;

type Case = fn(&Bench);

const ALL: &[(&str, Case)] = &[
    ("debian12_elf_1_cpu", |bench| kernel_boots(bench, KernelVersion::Debian12, Format::Elf, 1)),
    ("debian12_elf_2_cpus", |bench| kernel_boots(bench, KernelVersion::Debian12, Format::Elf, 2)),
    ("debian12_elf_4_cpus", |bench| kernel_boots(bench, KernelVersion::Debian12, Format::Elf, 4)),
    ("debian12_bzimage_1_cpu", |bench| kernel_boots(bench, KernelVersion::Debian12, Format::BzImage, 1)),
    ("debian12_bzimage_2_cpus", |bench| kernel_boots(bench, KernelVersion::Debian12, Format::BzImage, 2)),
    ("debian12_bzimage_4_cpus", |bench| kernel_boots(bench, KernelVersion::Debian12, Format::BzImage, 4)),
    ("debian13_elf_1_cpu", |bench| kernel_boots(bench, KernelVersion::Debian13, Format::Elf, 1)),
    ("debian13_elf_2_cpus", |bench| kernel_boots(bench, KernelVersion::Debian13, Format::Elf, 2)),
    ("debian13_elf_4_cpus", |bench| kernel_boots(bench, KernelVersion::Debian13, Format::Elf, 4)),
    ("debian13_bzimage_1_cpu", |bench| kernel_boots(bench, KernelVersion::Debian13, Format::BzImage, 1)),
    ("debian13_bzimage_2_cpus", |bench| kernel_boots(bench, KernelVersion::Debian13, Format::BzImage, 2)),
    ("debian13_bzimage_4_cpus", |bench| kernel_boots(bench, KernelVersion::Debian13, Format::BzImage, 4)),
    ("debian_system_by_command_line", system_by_command_line),
    ("debian_system_by_api", system_by_api),
    ("pause_and_resume_under_stress", pause_and_resume_under_stress),
    ("power_button", control_plane::power_button),
    ("reboot_loop", control_plane::reboot_loop),
    ("nmi_arrives", control_plane::nmi_arrives),
    ("panic_is_reported", control_plane::panic_is_reported),
    ("snapshots_survived", snapshot::snapshots_survived),
    ("migrations_survived", migration::migrations_survived),
    ("serial_port_over_a_pty", |bench| serial::carries(bench, "Pty")),
    ("serial_port_over_a_socket", |bench| serial::carries(bench, "Socket")),
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    Elf,
    BzImage,
}

/// A kernel boots to the user space of its initramfs, sees what it was given, and powers off.
fn kernel_boots(bench: &Bench, version: KernelVersion, format: Format, cpus: u32) {
    let (kernel, initramfs) = bench.images.kernel(version);
    let guest = LinuxGuest {
        kernel: if format == Format::Elf { kernel.vmlinux() } else { kernel.bzimage() },
        initramfs: initramfs.to_owned(),
        cmdline: "console=ttyS0 quiet".to_owned(),
        cpus,
        memory_mib: 512,
        disks: Vec::new(),
    };
    let console = bench.disks.console("kernel");
    let before = now();
    let mut vmm = Vmm::spawn(guest.arguments(console.path()));
    console.wait_for_power_off(&mut vmm, BOOT_LIMIT);
    assert_eq!(console.fact("kernel"), kernel.release().unwrap());
    assert_eq!(console.fact("cpus"), cpus.to_string());
    check_report(&console, before, 1);
    let kib: u64 = console.fact("mem-kib").parse().unwrap();
    assert!((400 << 10..512 << 10).contains(&kib), "{kib} KiB of memory");
}

/// What every boot of every guest must have reported.
fn check_report(console: &Console, before: u64, boots: usize) {
    assert!(console.report().is_complete());
    assert_eq!(console.facts("dmesg"), [""; 0], "complaints in the kernel's log");
    assert_eq!(console.facts("error"), [""; 0]);
    let epochs = console.facts("epoch");
    assert_eq!(epochs.len(), boots, "{epochs:?}");
    for epoch in epochs {
        let epoch: u64 = epoch.parse().unwrap();
        let good = before - CLOCK_ERROR..=now() + CLOCK_ERROR;
        assert!(good.contains(&epoch), "the guest's clock says {epoch}, the host's {good:?}");
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

/// At the first boot fio fills the second disk and reads it back, then the disk gets a qcow2 header; at the second boot header and
/// size must be what they were.
const DISK_CHECK: &str = r#"
say() { echo "VMM-TEST: $*"; }
say "data-size=$(blockdev --getsize64 /dev/vdb)"
if [ -e /var/lib/filled ]; then
    say "header=$(od -An -tx1 -N8 /dev/vdb | tr -d ' ')"
    exit
fi
fio --name=check --filename=/dev/vdb --direct=1 --rw=randwrite --bsrange=4k-128k --size=16M --ioengine=libaio --iodepth=16 \
    --verify=crc32c --do_verify=1 --verify_fatal=1 --randrepeat=0 --eta=never --output=/run/fio && say fio=good || cat /run/fio
printf 'QFI\373\0\0\0\003' | dd of=/dev/vdb bs=4096 conv=sync oflag=direct 2>/dev/null
touch /var/lib/filled
sync
"#;

fn system(bench: &Bench, name: &str, script: &str, action: &str) -> LinuxGuest {
    let (kernel, initramfs) = bench.images.kernel(KernelVersion::Debian13);
    let script = rootfs::script_word(script);
    LinuxGuest {
        kernel: kernel.vmlinux(),
        initramfs: initramfs.to_owned(),
        cmdline: format!("console=ttyS0 quiet root=/dev/vda vmm.action={action} {script}"),
        cpus: 2,
        memory_mib: 1024,
        disks: vec![bench.disks.root(name), bench.disks.data(name)],
    }
}

fn check_system(console: &Console, before: u64) {
    check_report(console, before, 2);
    assert_eq!(console.facts("cpus"), ["2", "2"]);
    assert_eq!(console.facts("multi-user"), ["active", "active"]);
    assert_eq!(console.facts("failed-unit"), [""; 0]);
    assert_eq!(console.facts("run-status"), ["0", "0"]);
    assert_eq!(console.facts("fio"), ["good"]);
    assert_eq!(console.facts("data-size"), [DATA_SIZE.to_string(), DATA_SIZE.to_string()]);
    assert_eq!(console.facts("header"), ["514649fb00000003"]);
    assert_eq!(console.facts("action"), ["reboot", "poweroff"]);
    for disk in ["vda", "vdb"] {
        let found = console.facts("disk").iter().filter(|line| line.starts_with(disk)).count();
        assert_eq!(found, 2, "{disk}");
    }
}

/// A Debian with systemd comes up, works on its disk, reboots once, and powers off.
fn system_by_command_line(bench: &Bench) {
    let guest = system(bench, "command-line", DISK_CHECK, "reboot-once");
    let console = bench.disks.console("command-line");
    let before = now();
    let mut vmm = Vmm::spawn(guest.arguments(console.path()));
    console.wait_for_power_off(&mut vmm, SYSTEM_LIMIT);
    check_system(&console, before);
    is_filled(&guest.disks[1]);
}

/// The same, with nothing but the API.
fn system_by_api(bench: &Bench) {
    let scratch = Scratch::new();
    let guest = system(bench, "api", DISK_CHECK, "reboot-once");
    let console = bench.disks.console("api");
    let before = now();
    let mut vmm = Vmm::with_api(&scratch, [""; 0]);
    let mut api = vmm.api();
    api.create(&guest.document(console.path()));
    api.puts(&["vm.boot"]);
    assert_eq!(api.state(), "Running");
    console.wait_for_power_off(&mut vmm, SYSTEM_LIMIT);
    check_system(&console, before);
    is_filled(&guest.disks[1]);
}

/// What the guest wrote is in the file.
fn is_filled(disk: &Path) {
    let content = fs::read(disk).unwrap();
    assert!(content.starts_with(b"QFI\xfb\0\0\0\x03"));
    assert_eq!(content.len() as u64, DATA_SIZE);
}

const PAUSES: u32 = 20;
const STRESS: &str = r#"
echo "VMM-TEST: stress=begin"
stress-ng --cpu 2 --vm 1 --vm-bytes 64m --hdd 1 --hdd-bytes 8m --temp-path /var/tmp --verify --timeout 30s --quiet
echo "VMM-TEST: stress=$?"
dmesg | grep -E 'Call Trace|lockup|stall|I/O error' | sed 's/^/VMM-TEST: complaint=/'
"#;

/// Pauses and resumes a guest that is busy with processors, memory and disk; it goes on each time.
fn pause_and_resume_under_stress(bench: &Bench) {
    let scratch = Scratch::new();
    let guest = system(bench, "stress", STRESS, "poweroff");
    let console = bench.disks.console("stress");
    let before = now();
    // Each pause saves all state, resets, restores and compares.
    let mut vmm = Vmm::with_api(&scratch, ["--verify-state"]);
    let mut api = vmm.api();
    api.create(&guest.document(console.path()));
    api.puts(&["vm.boot"]);
    console.wait_for(&mut vmm, SYSTEM_LIMIT, "stress", "begin");
    for _ in 0..PAUSES {
        thread::sleep(Duration::from_millis(300));
        api.puts(&["vm.pause"]);
        assert_eq!(api.state(), "Paused");
        thread::sleep(Duration::from_millis(100));
        api.puts(&["vm.resume"]);
    }
    assert_eq!(console.facts("stress"), ["begin"], "all pauses were under stress");
    console.wait_for_power_off(&mut vmm, SYSTEM_LIMIT);
    check_report(&console, before, 1);
    assert_eq!(console.facts("stress"), ["begin", "0"]);
    assert_eq!(console.facts("complaint"), [""; 0]);
    assert_eq!(console.facts("multi-user"), ["active"]);
}
