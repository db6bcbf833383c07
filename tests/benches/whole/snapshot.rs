//! A VM that is saved, and made of a snapshot.

use std::fs::File;
use std::io::Write;
use std::num::NonZeroUsize;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use vmm_api::client::Client;
use vmm_api::command::Method;
use vmm_api::commands::vm;
use vmm_api::events::StreamItem;
use vmm_snapshot::directory::{Chain, Contents, Draft, FileMemory, HostStorage, Work};
use vmm_tests::tiny::Guest;

use crate::figure::{Figure, Goal, median};
use crate::process::Process;
use crate::{Bench, MEMORY_MIB, MIB, Result, alternate, first_byte, micros};

const RESTORE_ROUNDS: usize = 100;
const CREATE_ROUNDS: usize = 5;
const LIVE_ROUNDS: usize = 9;
/// Where memory that is in use begins, beyond what the guest itself has.
pub(crate) const USED_FROM: u64 = 64 << 20;

impl Bench {
    /// From the start of the process with `--restore` to the guest's next byte on the serial port, with little and much of
    /// its memory in use; beside it the KVM calls of a boot.
    pub(crate) fn restore(&self) -> Result<Vec<Figure>> {
        let kernel = self.kernel.display().to_string();
        let floor = ["boot", &kernel, &MEMORY_MIB.to_string()];
        let mut figures = Vec::new();
        for (used, name) in
            [(4, "restore to first byte, 4 MiB in use"), (256, "restore to first byte, 256 MiB in use")]
        {
            let url = self.snapshot_of(Guest::Flood, used)?;
            let restore = format!("source_url=file://{},resume=true", url.display());
            let ours = ["--restore", &restore, "--serial", "tty"];
            let times = alternate(
                RESTORE_ROUNDS,
                || first_byte(&self.vmm, &ours),
                || first_byte(&self.floor, &floor),
            )?;
            figures.push(Figure::beside(name, "us", times, Goal::None));
        }
        Ok(figures)
    }

    /// From the request to the answer of vm.snapshot; beside it the same number of bytes written to a file and synced.
    pub(crate) fn snapshot(&self) -> Result<Vec<Figure>> {
        let mut figures = Vec::new();
        for (used, name) in [(64, "vm.snapshot, 64 MiB in use"), (256, "vm.snapshot, 256 MiB in use")] {
            let source = self.snapshot_of(Guest::Flood, used)?;
            let (vmm, mut client) = self.with_memory_of(&source)?;
            let (mut ours, mut floor) = (Vec::new(), Vec::new());
            for _ in 0..CREATE_ROUNDS {
                ours.push(micros(self.save(&mut client, false)?) / 1e3);
                floor.push(micros(plain_write(&self.folder.join("plain"), used << 20)?) / 1e3);
            }
            drop(vmm);
            figures.push(Figure::alone(name, "ms", median(&mut ours), Goal::None));
            figures.push(Figure::alone(
                "a plain write of as much, synced",
                "ms",
                median(&mut floor),
                Goal::None,
            ));
        }
        Ok(figures)
    }

    /// The same of a guest that writes to memory all the while: live beside plain, of the paused guest, in the same rounds; and how
    /// long the guest stands still for the live one.
    pub(crate) fn snapshot_live(&self) -> Result<Vec<Figure>> {
        let mut figures = Vec::new();
        for (used, [whole, blackout]) in [
            (64, ["live vm.snapshot, 64 MiB in use", "blackout of it, 64 MiB in use"]),
            (256, ["live vm.snapshot, 256 MiB in use", "blackout of it, 256 MiB in use"]),
        ] {
            let source = self.snapshot_of(Guest::Pages, used)?;
            let (vmm, mut client) = self.with_memory_of(&source)?;
            let (mut live, mut plain) = (Vec::new(), Vec::new());
            for _ in 0..LIVE_ROUNDS {
                client.call::<vm::Resume>(&())?;
                live.push(micros(self.save(&mut client, true)?) / 1e3);
                client.call::<vm::Pause>(&())?;
                plain.push(micros(self.save(&mut client, false)?) / 1e3);
            }
            let mut stood_still = blackouts(client)?;
            drop(vmm);
            if stood_still.len() != LIVE_ROUNDS {
                return Err(format!("{} blackouts were told, not {LIVE_ROUNDS}", stood_still.len()).into());
            }
            figures.push(Figure::beside(whole, "ms", (live, plain), Goal::None));
            figures.push(Figure::alone(blackout, "us", median(&mut stood_still), Goal::None));
        }
        Ok(figures)
    }

    /// A VMM with the paused guest of the snapshot `source`, all of whose memory is its own.
    fn with_memory_of(&self, source: &Path) -> Result<(Process, Client)> {
        let restore = format!("source_url=file://{},prefault=true", source.display());
        let (vmm, mut client) =
            self.serving("snapshot.sock", &["--restore", &restore, "--serial", "null"])?;
        client.set_timeout(Some(Duration::from_secs(60)))?;
        wait_for_phase(&mut client, "Paused")?;
        Ok((vmm, client))
    }

    /// Takes a snapshot, and removes it: how long that took from the request to the answer.
    fn save(&self, client: &mut Client, live: bool) -> Result<Duration> {
        let target = self.folder.join("target");
        let body = format!(r#"{{"destination_url":"file://{}","live":{live}}}"#, target.display());
        let start = Instant::now();
        let answer = client.request(Method::Put, "vm.snapshot", body.as_bytes(), &[])?;
        let time = start.elapsed();
        if answer.status != 204 {
            return Err(format!("vm.snapshot: {answer:?}").into());
        }
        std::fs::remove_dir_all(&target)?;
        Ok(time)
    }

    /// A snapshot of a guest that has printed something, `used` MiB of whose memory are not zero.
    pub(crate) fn snapshot_of(&self, guest: Guest, used: u64) -> Result<PathBuf> {
        self.snapshot_with(guest, used, &format!("size={MEMORY_MIB}M"))
    }

    /// The same with the memory of this option.
    pub(crate) fn snapshot_with(&self, guest: Guest, used: u64, memory: &str) -> Result<PathBuf> {
        let name = format!("{guest:?}-{used}-{}", memory.replace([',', '='], "-"));
        let path = self.folder.join(&name);
        if path.exists() {
            return Ok(path);
        }
        let (small, socket) = (self.folder.join(format!("small-{name}")), self.folder.join("make.sock"));
        let kernel = guest.write(&self.folder)?;
        let option = format!("path={}", socket.display());
        let kernel = kernel.display().to_string();
        let args = [
            "--api-socket",
            &option,
            "--kernel",
            &kernel,
            "--memory",
            memory,
            "--serial",
            "tty",
            "--console",
            "off",
        ];
        let mut vmm = Process::start(&self.vmm, &args)?;
        vmm.read_byte()?;
        let mut client = Client::connect_within(&socket, Duration::from_secs(20))?;
        client.call::<vm::Pause>(&())?;
        let body = format!(r#"{{"destination_url":"file://{}"}}"#, small.display());
        let answer = client.request(Method::Put, "vm.snapshot", body.as_bytes(), &[])?;
        if answer.status != 204 {
            return Err(format!("vm.snapshot: {answer:?}").into());
        }
        drop(vmm);
        let _ = std::fs::remove_file(&socket);
        fill(&small, &path, used)?;
        Ok(path)
    }
}

/// How long the guest stood still for each live snapshot, in microseconds. Memory in passes is another thing to measure.
fn blackouts(client: Client) -> Result<Vec<f64>> {
    let mut times = Vec::new();
    for item in client.events_so_far(1)? {
        let StreamItem::Event(event) = item? else { return Err("events are lost".into()) };
        if event.name() != "vm/snapshotted" {
            continue;
        }
        if let Some(why) = event.properties.get("in_passes") {
            return Err(format!("memory cannot be frozen: {why}").into());
        }
        times.extend(event.properties.get("blackout_us").and_then(serde_json::Value::as_f64));
    }
    Ok(times)
}

pub(crate) fn wait_for_phase(client: &mut Client, phase: &str) -> Result<()> {
    let start = Instant::now();
    while client.call::<vm::Info>(&()).map(|info| info.phase != phase).unwrap_or(true) {
        if start.elapsed() > Duration::from_secs(60) {
            return Err(format!("the restored VM is not {phase}").into());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// The snapshot `from` with `used` MiB more that are not zero, as the snapshot `to`.
fn fill(from: &Path, to: &Path, used: u64) -> Result<()> {
    let chain = Chain::open(from)?;
    let mut regions = Vec::new();
    for (region, place) in chain.regions().iter().enumerate() {
        let file = tempfile::tempfile()?;
        file.set_len(place.size)?;
        regions.push((region, place.place(), file));
    }
    chain.load(&Work::quiet(threads()), &|piece| {
        let (_, _, file) = regions.get(piece.region).ok_or(std::io::ErrorKind::NotFound)?;
        file.write_all_at(piece.bytes, piece.offset)
    })?;
    if let Some((_, _, file)) = regions.first() {
        let chunk: Vec<u8> = (0..MIB as usize).map(|at| (at * 7 + at / 4096) as u8 | 1).collect();
        for mib in 0..used {
            file.write_all_at(&chunk, USED_FROM + (mib << 20))?;
        }
    }
    let memory = FileMemory(regions.into_iter().map(|(_, place, file)| (place, file)).collect());
    let manifest = chain.manifest();
    let contents = Contents {
        vmm: &manifest.vmm,
        architecture: &manifest.architecture,
        created: SystemTime::now(),
        config: &manifest.config,
        state: &chain.state()?,
    };
    Draft::begin(&HostStorage, to)?.memory(&memory, None, &Work::quiet(threads()))?.commit(&contents)?;
    Ok(())
}

/// Bytes to a new file and to stable storage.
fn plain_write(path: &Path, bytes: u64) -> Result<Duration> {
    let chunk: Vec<u8> = (0..2 << 20).map(|at: usize| at as u8 | 1).collect();
    let start = Instant::now();
    let mut file = File::create(path)?;
    for _ in 0..bytes / chunk.len() as u64 {
        file.write_all(&chunk)?;
    }
    file.sync_all()?;
    let time = start.elapsed();
    std::fs::remove_file(path)?;
    Ok(time)
}

fn threads() -> NonZeroUsize {
    std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN)
}
