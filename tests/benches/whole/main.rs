//! The VMM as a process, measured beside the floors of `bench-floor`.
//!
//! `bench-whole VMM FLOOR NAME...` prints one JSON object per figure. The VMM and its floor alternate in each round; a figure is
//! the median over the rounds.

mod figure;
mod http;
mod latency;
mod local_migration;
mod migration;
mod process;
mod snapshot;

use std::error::Error;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use vmm_tests::tiny::Guest;

use figure::{Figure, Goal, median};
use http::{Connection, PING};
use process::{Process, outside_guest_memory};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const MEMORY_MIB: u64 = 512;
const START_ROUNDS: usize = 200;
const MEMORY_ROUNDS: usize = 5;
const MIB: f64 = (1 << 20) as f64;

fn main() -> Result<()> {
    let mut args = std::env::args_os().skip(1).map(PathBuf::from);
    let (Some(vmm), Some(floor)) = (args.next(), args.next()) else {
        return Err("usage: bench-whole VMM FLOOR NAME...".into());
    };
    let folder = tempfile::Builder::new().prefix("vmm-bench-").tempdir()?;
    let kernel = Guest::Halt.write(folder.path())?;
    let bench = Bench { vmm, floor, folder: folder.path().to_owned(), kernel };
    for name in args {
        let figures = match name.to_str() {
            Some("boot") => vec![bench.boot()?],
            Some("api-ready") => vec![bench.api_ready()?],
            Some("vm-info") => bench.vm_info()?,
            Some("vm-info-busy") => bench.vm_info_busy()?,
            Some("pause-resume") => vec![bench.pause_resume()?],
            Some("memory") => vec![bench.memory()?],
            Some("restore") => bench.restore()?,
            Some("snapshot") => bench.snapshot()?,
            Some("snapshot-live") => bench.snapshot_live()?,
            Some("local-migration") => bench.local_migration()?,
            Some("migration") => bench.migration()?,
            Some("migration-blackout") => bench.migration_blackout()?,
            Some("migration-info") => bench.migration_info()?,
            Some("size") => vec![bench.size()?],
            _ => return Err(format!("no benchmark has the name {}", name.display()).into()),
        };
        for figure in figures {
            println!("{}", figure.json());
        }
    }
    Ok(())
}

struct Bench {
    vmm: PathBuf,
    floor: PathBuf,
    folder: PathBuf,
    kernel: PathBuf,
}

impl Bench {
    /// From the start of the process to the guest's first byte on the serial port, seen from outside.
    fn boot(&self) -> Result<Figure> {
        let kernel = self.kernel.display().to_string();
        let memory = format!("size={MEMORY_MIB}M");
        let ours = ["--kernel", &kernel, "--memory", &memory, "--serial", "tty", "--console", "off"];
        let floor = ["boot", &kernel, &MEMORY_MIB.to_string()];
        let times =
            alternate(START_ROUNDS, || first_byte(&self.vmm, &ours), || first_byte(&self.floor, &floor))?;
        Ok(Figure::beside("boot to first guest instruction", "us", times, Goal::RatioAtMost(1.3)))
    }

    /// From the start of the process to the answer of vmm.ping.
    fn api_ready(&self) -> Result<Figure> {
        let socket = self.folder.join("ready.sock");
        let path = socket.display().to_string();
        let option = format!("path={path}");
        let times = alternate(
            START_ROUNDS,
            || first_answer(&self.vmm, &["--api-socket", &option], &socket),
            || first_answer(&self.floor, &["listen", &path], &socket),
        )?;
        Ok(Figure::beside("start to API ready", "us", times, Goal::None))
    }

    /// Memory of the process outside its guest's, 1 s after boot: one vCPU, disk, rng, console and serial port.
    fn memory(&self) -> Result<Figure> {
        let disk = self.folder.join("disk.raw");
        std::fs::File::create(&disk)?.set_len(64 << 20)?;
        let disk = format!("path={},image_type=raw", disk.display());
        let kernel = self.kernel.display().to_string();
        let console = format!("file={}", self.folder.join("console").display());
        let memory = format!("size={MEMORY_MIB}M");
        let args = [
            ["--kernel", &kernel],
            ["--memory", &memory],
            ["--disk", &disk],
            ["--rng", "src=/dev/urandom"],
            ["--console", &console],
            ["--serial", "tty"],
        ];
        let mut sizes = Vec::new();
        for _ in 0..MEMORY_ROUNDS {
            let mut vmm = Process::start(&self.vmm, args.as_flattened())?;
            vmm.read_byte()?;
            std::thread::sleep(Duration::from_secs(1));
            sizes.push(outside_guest_memory(vmm.id(), MEMORY_MIB << 20)? as f64 / MIB);
        }
        Ok(Figure::alone("memory outside the guest's", "MiB", median(&mut sizes), Goal::AtMost(4.0)))
    }

    fn size(&self) -> Result<Figure> {
        let size = std::fs::metadata(&self.vmm)?.len() as f64 / MIB;
        Ok(Figure::alone("release binary", "MiB", size, Goal::AtMost(4.5)))
    }
}

/// Medians need many values of each side, taken in turn, so that both see the same machine.
fn alternate(
    rounds: usize,
    mut ours: impl FnMut() -> Result<Duration>,
    mut floor: impl FnMut() -> Result<Duration>,
) -> Result<(Vec<f64>, Vec<f64>)> {
    let mut times = (Vec::new(), Vec::new());
    // The first round warms caches.
    for round in 0..=rounds {
        let (ours, floor) = (micros(ours()?), micros(floor()?));
        if round > 0 {
            times.0.push(ours);
            times.1.push(floor);
        }
    }
    Ok(times)
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

fn first_byte(program: &Path, args: &[&str]) -> Result<Duration> {
    let start = Instant::now();
    let mut process = Process::start(program, args)?;
    process.read_byte()?;
    Ok(start.elapsed())
}

fn first_answer(program: &Path, args: &[&str], socket: &Path) -> Result<Duration> {
    let start = Instant::now();
    let mut process = Process::start(program, args)?;
    Connection::wait_for(socket, &mut process)?.request(PING)?;
    let time = start.elapsed();
    drop(process);
    let _ = std::fs::remove_file(socket);
    Ok(time)
}
