//! A VM that moves to another process over a UNIX socket, memory and all.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use vmm_api::client::Client;
use vmm_api::command::Method;
use vmm_api::progress::MigrationProgressReply;
use vmm_tests::tiny::Guest;

use crate::figure::{Figure, Goal, median, percentile};
use crate::http::{Connection, VM_INFO};
use crate::latency::Pace;
use crate::local_migration::{LIMIT, wait_for};
use crate::process::Process;
use crate::{Bench, MIB, Result, micros, snapshot};

const ROUNDS: usize = 9;
const BLACKOUTS: usize = 100;
const INFO_ROUNDS: usize = 20;
/// What the floor writes and reads at a time.
const CHUNK: usize = 256 << 10;
/// Of memory in use, in MiB: what both of two VMs have is not counted.
const LITTLE: u64 = 4;
const MUCH: u64 = 256;
/// What the source does before it sends memory.
const STEPS_BEFORE: [&str; 6] = ["Greeting", "Offering", "Starting", "Joining", "Sharing", "Logging"];

/// A migration that has been.
struct Moved {
    /// From the request to the answer of vm.send-migration.
    took: Duration,
    /// Of which it sent memory.
    sent_for: Duration,
    progress: MigrationProgressReply,
}

/// Two VMMs, of which the first has a VM.
struct Pair {
    source: Client,
    watch: Client,
    destination: Client,
    processes: [Process; 2],
    socket: PathBuf,
}

impl Bench {
    /// Bytes per second of one connection, beside a plain copy of as many through a pair of sockets into memory that is there: into
    /// memory that is there, too, and into memory whose pages have to be made meanwhile. What a migration costs beside its memory is
    /// taken off. And how long a whole one takes.
    pub(crate) fn migration(&self) -> Result<Vec<Figure>> {
        let bytes = (MUCH - LITTLE) << 20;
        let (from, mut to) = (vec![1; bytes as usize], vec![2; bytes as usize]);
        let mut times = [const { Vec::new() }; 6];
        // The first round warms caches.
        for round in 0..=ROUNDS {
            let round_times = [
                plain_copy(&from, &mut to)?,
                self.prefaulted(MUCH)?.send()?.sent_for,
                self.prefaulted(LITTLE)?.send()?.sent_for,
                self.restored(MUCH, false)?.send()?.took,
                self.restored(LITTLE, false)?.send()?.took,
                self.restored(MUCH, true)?.send()?.took,
            ];
            if round > 0 {
                times.iter_mut().zip(round_times).for_each(|(times, time)| times.push(time.as_secs_f64()));
            }
        }
        let [floor, mut much_there, mut little_there, mut much, mut little, mut whole] = times;
        let mib = bytes as f64 / MIB;
        let floor = floor.into_iter().map(|time| mib / time).collect::<Vec<_>>();
        let memory = |name, much: &mut [f64], little: &mut [f64], goal| {
            let ours = mib / (median(much) - median(little));
            Figure::beside(name, "MiB/s", (vec![ours], floor.clone()), goal)
        };
        let there = "migration: memory over one UNIX connection, prefault=on";
        let made = "migration: memory over one UNIX connection";
        let name = "migration of a running guest, 512 MiB, 256 in use";
        Ok(vec![
            memory(there, &mut much_there, &mut little_there, Goal::RatioAtLeast(0.8)),
            memory(made, &mut much, &mut little, Goal::None),
            Figure::alone(name, "ms", median(&mut whole) * 1e3, Goal::AtMost(140.0)),
        ])
    }

    /// How long an idle guest stands still.
    pub(crate) fn migration_blackout(&self) -> Result<Vec<Figure>> {
        let mut times = Vec::new();
        for _ in 0..BLACKOUTS {
            let moved = self.booted("size=64M")?.send()?;
            times.push(moved.progress.blackout_us.ok_or("a migration without a blackout")? as f64 / 1e3);
        }
        let figure = |name, part, most, times: &mut [f64]| {
            Figure::alone(name, "ms", percentile(times, part), Goal::AtMost(most))
        };
        Ok(vec![
            figure("blackout of an idle guest, median", 0.5, 5.0, &mut times),
            figure("blackout of an idle guest, p99", 0.99, 10.0, &mut times),
        ])
    }

    /// Latency of vm.info at the source while all of its memory is sent as fast as it goes: of the median migration, and of all
    /// requests together, in which one migration decides whose memory the host had taken away.
    pub(crate) fn migration_info(&self) -> Result<Vec<Figure>> {
        let (mut all, mut slow) = (Vec::new(), Vec::new());
        for _ in 0..INFO_ROUNDS {
            let mut times = Vec::new();
            let mut pair = self.restored(MUCH, true)?;
            let api = self.folder.join("source.sock");
            let mut info = Connection::wait_for(&api, &mut pair.processes[0])?;
            let sending = std::thread::spawn(move || pair.send().map_err(|error| error.to_string()));
            let mut pace = Pace::new();
            while !sending.is_finished() {
                let start = pace.next();
                // It has gone.
                if info.request(VM_INFO).is_err() {
                    break;
                }
                times.push(micros(start.elapsed()));
            }
            sending.join().map_err(|_| "the sender's client panicked")??;
            slow.push(percentile(&mut times, 0.99));
            all.append(&mut times);
        }
        let figure = |name, value, goal| Figure::alone(name, "us", value, goal);
        let goal = || Goal::AtMost(1000.0);
        Ok(vec![
            figure("vm.info p50, memory is migrated", percentile(&mut all, 0.5), Goal::None),
            figure("vm.info p99, in the median migration", median(&mut slow), goal()),
            figure("vm.info p99, in all migrations", percentile(&mut all, 0.99), goal()),
        ])
    }

    /// A VM of a snapshot, `used` MiB of whose memory are in use and its own.
    fn restored(&self, used: u64, running: bool) -> Result<Pair> {
        self.restored_from(&self.snapshot_of(Guest::Halt, used)?, running)
    }

    /// A paused one, all of whose memory but for the first part is in use, and is there at both ends before any is sent.
    fn prefaulted(&self, used: u64) -> Result<Pair> {
        let size = snapshot::USED_FROM + (used << 20);
        self.restored_from(
            &self.snapshot_with(Guest::Halt, used, &format!("size={size},prefault=on"))?,
            false,
        )
    }

    fn restored_from(&self, snapshot: &Path, running: bool) -> Result<Pair> {
        let restore = format!("source_url=file://{},prefault=true,resume={running}", snapshot.display());
        let mut pair = self.pair(&["--restore", &restore, "--serial", "null"])?;
        snapshot::wait_for_phase(&mut pair.source, if running { "Running" } else { "Paused" })?;
        Ok(pair)
    }

    /// A guest that has halted.
    fn booted(&self, memory: &str) -> Result<Pair> {
        let kernel = self.kernel.display().to_string();
        let vm = ["--kernel", &kernel, "--memory", memory, "--serial", "tty", "--console", "off"];
        let mut pair = self.pair(&vm)?;
        pair.processes[0].read_byte()?;
        Ok(pair)
    }

    fn pair(&self, vm: &[&str]) -> Result<Pair> {
        let (source, from) = self.serving("source.sock", vm)?;
        let watch = Client::connect_within(self.folder.join("source.sock"), LIMIT)?;
        let (destination, to) = self.serving("destination.sock", &[])?;
        let socket = self.folder.join("migration.sock");
        Ok(Pair { source: from, watch, destination: to, processes: [source, destination], socket })
    }
}

impl Pair {
    /// Sends the VM. The process that had it stays until it has been asked how it went.
    fn send(mut self) -> Result<Moved> {
        let socket = self.socket.display().to_string();
        let receive = format!(r#"{{"receiver_url":"unix:{socket}","serial":{{"mode":"Null"}}}}"#);
        let (mut to, processes) = (self.destination, self.processes);
        let receiving = std::thread::spawn(move || {
            let answer = to.request(Method::Put, "vm.receive-migration", receive.as_bytes(), &[]);
            answer.map(|answer| answer.status).map_err(|error| error.to_string())
        });
        wait_for(&self.socket)?;
        let body = format!(r#"{{"destination_url":"unix:{socket}","preserve_source":true}}"#);
        let mut watch = self.watch;
        let watching =
            std::thread::spawn(move || sends_memory(&mut watch).map_err(|error| error.to_string()));
        let start = Instant::now();
        let answer = self.source.request(Method::Put, "vm.send-migration", body.as_bytes(), &[])?;
        let took = start.elapsed();
        let began = watching.join().map_err(|_| "the watching client panicked")??;
        let received = receiving.join().map_err(|_| "the receiver's client panicked")??;
        if (answer.status, received) != (204, 204) {
            return Err(format!("migration: {received}: {answer:?}").into());
        }
        let progress = self.source.call::<vmm_api::commands::vm::MigrationProgress>(&())?;
        drop(processes);
        Ok(Moved { took, sent_for: (start + took).saturating_duration_since(began), progress })
    }
}

/// Waits until the source sends memory, or has done so.
fn sends_memory(source: &mut Client) -> Result<Instant> {
    loop {
        let progress = source.call::<vmm_api::commands::vm::MigrationProgress>(&())?;
        let now = Instant::now();
        if progress.step.is_some_and(|step| !STEPS_BEFORE.contains(&step.as_str())) {
            return Ok(now);
        }
        std::thread::sleep(Duration::from_micros(100));
    }
}

/// As many bytes through a pair of sockets, from memory to memory, both of which are there.
fn plain_copy(from: &[u8], to: &mut [u8]) -> Result<Duration> {
    let (mut ours, mut theirs) = UnixStream::pair()?;
    let start = Instant::now();
    std::thread::scope(|scope| {
        let sending = scope.spawn(move || from.chunks(CHUNK).try_for_each(|chunk| ours.write_all(chunk)));
        to.chunks_mut(CHUNK).try_for_each(|chunk| theirs.read_exact(chunk))?;
        sending.join().map_err(|_| "the sender panicked")??;
        Ok(start.elapsed())
    })
}
