//! How long a snapshot takes, beside the least that the same effect takes.
//!
//! `cargo bench -p vmm-snapshot --bench create [-- create|incremental]`. One JSON object per case: medians over
//! interleaved rounds, and the median of the rounds' ratios. Memory is a memfd of 512 MiB, part of it in use; the disk
//! is that of Cargo's target folder.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a benchmark fails by panicking")]

use std::error::Error;
use std::fs::File;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use sha2::{Digest, Sha256};
use vmm_snapshot::directory::{
    CHUNK, Contents, Draft, FileMemory, HostStorage, Increment, PAGE, Place, Work,
};
use vmm_snapshot::{NoState, RecordSet};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 512 * MIB;
const ROUNDS: usize = 7;
const THREADS: NonZeroUsize = NonZeroUsize::MIN.saturating_add(1);

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with("--")).collect();
    let wanted = |name: &str| args.is_empty() || args.iter().any(|arg| arg == name);
    // Not in /tmp, which may be memory.
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    if wanted("create") {
        for used in [256, 64] {
            create(folder.path(), used)?;
        }
    }
    if wanted("incremental") {
        for run in [1, 16] {
            incremental(folder.path(), run)?;
        }
    }
    Ok(())
}

/// Seeded (Marsaglia's xorshift, shifts 13, 7, 17).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// Guest memory, and which runs of it are in use.
struct Guest {
    memory: FileMemory,
    used: Vec<Range<u64>>,
}

impl Guest {
    /// `used` MiB are in use, in runs of 64 KiB to 4 MiB with gaps between them.
    fn new(used: u64) -> Result<Self> {
        let file = File::from(rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC)?);
        file.set_len(SIZE)?;
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        let (mut at, mut left, mut runs) = (0, used * MIB, Vec::new());
        while left > 0 {
            let run = (65536 << (random.next() % 7)).min(left).min(SIZE - at);
            let bytes: Vec<u8> = (0..run / 8).flat_map(|_| random.next().to_le_bytes()).collect();
            file.write_all_at(&bytes, at)?;
            runs.push(at..at + run);
            // All that is not in use is spread evenly.
            left -= run;
            at += run + (run * (SIZE - used * MIB) / (used * MIB)) / PAGE * PAGE;
            at = at.min(SIZE - left);
        }
        let place = Place { zone: "mem0".to_owned(), gpa: 0, size: SIZE };
        Ok(Self { memory: FileMemory(vec![(place, file)]), used: runs })
    }

    fn file(&self) -> &File {
        &self.memory.0[0].1
    }

    fn snapshot(&self, path: &Path, increment: Option<&Increment<'_>>) -> Result<Duration> {
        let config = serde_json::value::to_raw_value(&())?;
        let mut state = RecordSet::new();
        state.put("none", &NoState {})?;
        let created = SystemTime::now();
        let contents =
            Contents { vmm: "bench", architecture: "x86_64", created, config: &config, state: &state };
        let start = Instant::now();
        let draft = Draft::begin(&HostStorage, path)?;
        draft.memory(&self.memory, increment, &Work::quiet(THREADS))?.commit(&contents)?;
        Ok(start.elapsed())
    }

    /// The bytes in use are read, hashed and written at their places by as many threads, and synced.
    fn plain(&self, path: &Path) -> Result<Duration> {
        let start = Instant::now();
        let file = File::create(path)?;
        file.set_len(SIZE)?;
        let next = AtomicUsize::new(0);
        let chunks: Vec<Range<u64>> = self.used.iter().flat_map(pieces).collect();
        let worker = || -> std::io::Result<()> {
            let mut buffer = vec![0; CHUNK as usize];
            while let Some(range) = chunks.get(next.fetch_add(1, Ordering::Relaxed)) {
                let bytes = &mut buffer[..(range.end - range.start) as usize];
                self.file().read_exact_at(bytes, range.start)?;
                std::hint::black_box(Sha256::digest(&*bytes));
                file.write_all_at(bytes, range.start)?;
            }
            Ok(())
        };
        thread::scope(|scope| {
            let workers: Vec<_> = (0..THREADS.get()).map(|_| scope.spawn(worker)).collect();
            workers.into_iter().try_for_each(|worker| worker.join().unwrap())
        })?;
        file.sync_all()?;
        Ok(start.elapsed())
    }
}

/// A range, cut at the borders of chunks.
fn pieces(range: &Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let Range { start, end } = *range;
    (start / CHUNK..end.div_ceil(CHUNK))
        .map(move |chunk| (chunk * CHUNK).max(start)..((chunk + 1) * CHUNK).min(end))
}

fn create(folder: &Path, used: u64) -> Result<()> {
    let guest = Guest::new(used)?;
    let (snapshot, plain) = (folder.join("snapshot"), folder.join("plain"));
    let mut blocks = 0;
    let figure = alternate(
        || {
            let time = guest.snapshot(&snapshot, None)?;
            blocks = std::fs::read_dir(&snapshot)?
                .map(|entry| Ok(entry?.metadata()?.blocks() * 512))
                .sum::<std::io::Result<u64>>()?;
            std::fs::remove_dir_all(&snapshot)?;
            Ok(time)
        },
        || {
            let time = guest.plain(&plain)?;
            std::fs::remove_file(&plain)?;
            Ok(time)
        },
    )?;
    figure.print(&format!("snapshot of 512 MiB, {used} MiB in use"), 1.2);
    let (bytes, least) = (blocks as f64 / MIB as f64, used as f64);
    let space = Figure { ours: bytes, floor: least, ratio: bytes / least };
    space.print_as(&format!("its space, {used} MiB in use"), "MiB", 1.01);
    Ok(())
}

/// After 1 % of all pages changed, in runs of `run` pages anywhere in what is in use.
fn incremental(folder: &Path, run: u64) -> Result<()> {
    let guest = Guest::new(256)?;
    let (full, child) = (folder.join("full"), folder.join("child"));
    let mut random = Random(0x2545_f491_4f6c_dd1d);
    let whole = |used: &Range<u64>| (used.start..used.end).step_by((run * PAGE) as usize);
    let runs: Vec<u64> = guest.used.iter().flat_map(whole).collect();
    let dirty = SIZE / PAGE / 100 / run;
    let mut any = || runs[(random.next() % runs.len() as u64) as usize];
    let changed = [(0..dirty).map(|_| any()).map(|at| at..at + run * PAGE).collect::<Vec<_>>()];
    let parent = folder.join("parent");
    guest.snapshot(&parent, None)?;
    let increment = Increment { parent: Path::new("../parent"), id: None, changed: &changed, packed: true };
    let figure = alternate(
        || {
            let time = guest.snapshot(&child, Some(&increment))?;
            std::fs::remove_dir_all(&child)?;
            Ok(time)
        },
        || {
            let time = guest.snapshot(&full, None)?;
            std::fs::remove_dir_all(&full)?;
            Ok(time)
        },
    )?;
    std::fs::remove_dir_all(&parent)?;
    let pages = if run == 1 { "single pages".to_owned() } else { format!("runs of {run} pages") };
    figure.print(&format!("incremental snapshot, 1 % dirty in {pages}, beside a full one"), 0.05);
    Ok(())
}

/// Medians in milliseconds.
struct Figure {
    ours: f64,
    floor: f64,
    ratio: f64,
}

impl Figure {
    fn print(&self, name: &str, target: f64) {
        self.print_as(name, "ms", target);
    }

    fn print_as(&self, name: &str, unit: &str, target: f64) {
        let Self { ours, floor, ratio } = self;
        println!(
            "{{\"name\":\"{name}\",\"unit\":\"{unit}\",\"ours\":{ours:.3},\"floor\":{floor:.3},\
             \"ratio\":{ratio:.3},\"goal\":\"ratio-at-most\",\"target\":{target}}}"
        );
    }
}

/// Runs the two in turn; the first round of each warms up.
fn alternate(
    mut ours: impl FnMut() -> Result<Duration>,
    mut floor: impl FnMut() -> Result<Duration>,
) -> Result<Figure> {
    let (mut left, mut right) = (Vec::new(), Vec::new());
    for round in 0..=ROUNDS {
        let pair = (ours()?.as_secs_f64() * 1000.0, floor()?.as_secs_f64() * 1000.0);
        if round > 0 {
            left.push(pair.0);
            right.push(pair.1);
        }
    }
    let ratio = median(left.iter().zip(&right).map(|(ours, floor)| ours / floor).collect());
    Ok(Figure { ours: median(left), floor: median(right), ratio })
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values[values.len() / 2]
}
