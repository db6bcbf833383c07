//! Requests per second of virtio-blk with the in-process driver, beside the same I/O straight on the engine.
//!
//! `cargo bench -p vmm-virtio-devices --bench block [-- --direct] [-- --sync]`. One JSON object per case: medians over
//! interleaved rounds, and the median of the rounds' ratios. The file is in the page cache, so that the cost
//! of the device shows; `--direct` opens it with `O_DIRECT`.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a benchmark fails by panicking")]

use std::error::Error;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm_device_model::testing::Xorshift;
use vmm_disk_image::{Buffers, Completion, Disk, Engine, EngineKind, Op, OpenOptions, Request, open};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_virtio_devices::block::{BlockDevice, BlockOptions};
use vmm_virtio_devices::testing::{Descriptor, NEXT, TestDriver, WRITE};

const FILE: u64 = 256 << 20;
const DEPTH: usize = 32;
const ROUNDS: usize = 15;
const ROUND: Duration = Duration::from_millis(150);
const MEMORY: usize = 16 << 20;
const QUEUE: u16 = 128;

struct Case {
    name: &'static str,
    size: usize,
    write: bool,
    random: bool,
    target: f64,
}

const CASES: [Case; 3] = [
    Case { name: "4 KiB random read", size: 4096, write: false, random: true, target: 0.8 },
    Case { name: "128 KiB sequential read", size: 128 << 10, write: false, random: false, target: 0.95 },
    Case { name: "128 KiB sequential write", size: 128 << 10, write: true, random: false, target: 0.95 },
];

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().collect();
    let has = |flag: &str| args.iter().any(|arg| arg == flag);
    let engine = if has("--sync") { EngineKind::Sync } else { EngineKind::IoUring };
    // Not in /tmp, which may be memory and know no direct I/O.
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let path = dir.path().join("disk.raw");
    fill(&path)?;
    let disk = open(&OpenOptions { direct: has("--direct"), ..OpenOptions::raw(&path) })?;
    let mut raw = RawSide::new(&*disk, engine)?;
    let mut virtio = VirtioSide::new(disk, engine)?;
    // A name, or a part of one, chooses cases.
    let wanted =
        |case: &&Case| args.iter().skip(1).all(|arg| arg.starts_with("--") || case.name.contains(arg));
    for case in CASES.iter().filter(wanted) {
        let mut rates = [Vec::new(), Vec::new()];
        // The first round warms caches.
        for round in 0..=ROUNDS {
            let measured = [raw.round(case)?, virtio.round(case)?];
            if round > 0 {
                rates.iter_mut().zip(measured).for_each(|(rates, rate)| rates.push(rate));
            }
        }
        let mut ratios: Vec<f64> = rates[1].iter().zip(&rates[0]).map(|(virtio, raw)| virtio / raw).collect();
        let [raw, virtio] = rates.map(|mut rates| median(&mut rates));
        let (ratio, target) = (median(&mut ratios), case.target);
        println!(
            "{{\"bench\":\"virtio-blk {}, depth {DEPTH}\",\"engine\":\"{engine}\",\"raw_per_s\":{raw:.0},\
             \"virtio_per_s\":{virtio:.0},\"ratio\":{ratio:.3},\"target\":{target}}}",
            case.name
        );
    }
    Ok(())
}

fn fill(path: &Path) -> std::io::Result<()> {
    let mut file = File::create(path)?;
    let chunk = vec![0x5a; 1 << 20];
    for _ in 0..FILE >> 20 {
        file.write_all(&chunk)?;
    }
    file.sync_all()
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Where the next request goes.
struct Offsets {
    random: Xorshift,
    next: u64,
}

impl Offsets {
    fn new() -> Self {
        Self { random: Xorshift::new(1), next: 0 }
    }

    fn next(&mut self, case: &Case) -> u64 {
        let blocks = FILE / case.size as u64;
        self.next = if case.random { self.random.next() } else { self.next + 1 } % blocks;
        self.next * case.size as u64
    }
}

/// An engine, as short as a program can be that keeps it busy.
struct RawSide {
    engine: Box<dyn Engine>,
    epoll: Epoll,
    offsets: Offsets,
}

impl RawSide {
    fn new(disk: &dyn Disk, kind: EngineKind) -> Result<Self, Box<dyn Error>> {
        let engine = disk.engine(kind, DEPTH as u16)?;
        let epoll = Epoll::new()?;
        let event = EpollEvent::new(EventSet::IN, 0);
        epoll.ctl(ControlOperation::Add, engine.completion_fd().as_raw_fd(), event)?;
        Ok(Self { engine, epoll, offsets: Offsets::new() })
    }

    fn round(&mut self, case: &Case) -> Result<f64, Box<dyn Error>> {
        let mut idle = Vec::new();
        for _ in 0..DEPTH {
            idle.push(Buffers::zeroed(case.size)?);
        }
        let mut done: Vec<Completion> = Vec::new();
        let mut count = 0_u64;
        let start = Instant::now();
        loop {
            let over = start.elapsed() > ROUND;
            for buffers in idle.drain(..).filter(|_| !over) {
                let offset = self.offsets.next(case);
                let op =
                    if case.write { Op::Write { offset, buffers } } else { Op::Read { offset, buffers } };
                self.engine.submit(Request { token: 0, op })?;
            }
            if self.engine.in_flight() == 0 {
                return Ok(count as f64 / start.elapsed().as_secs_f64());
            }
            self.engine.kick()?;
            // Interrupted by the kernel's own work at times, and then there is something to reap.
            let _ = self.epoll.wait(1000, &mut [EpollEvent::default()]);
            self.engine.reap(&mut done)?;
            for completion in done.drain(..) {
                completion.result?;
                count += 1;
                idle.extend(completion.buffers);
            }
        }
    }
}

/// The same through a virtqueue. Its driver is short, too: descriptors are written once, and used again.
struct VirtioSide {
    driver: TestDriver,
    /// Descriptor table, available ring, used ring.
    rings: [u64; 3],
    /// Header, data and status of each request; request `i` begins at descriptor `3 * i`.
    places: Vec<[u64; 3]>,
    available: u16,
    used: u16,
    offsets: Offsets,
}

impl VirtioSide {
    fn new(disk: Arc<dyn Disk>, engine: EngineKind) -> Result<Self, Box<dyn Error>> {
        let options = BlockOptions {
            id: "_disk0".into(),
            disk,
            queues: 1,
            queue_size: QUEUE,
            engine,
            serial: None,
            sparse: true,
        };
        let mut driver = TestDriver::new(Box::new(BlockDevice::new(options)?), MEMORY)?;
        driver.start(!0)?;
        let mut places = Vec::new();
        for _ in 0..DEPTH {
            places.push([
                driver.allocate(16, 16)?,
                driver.allocate(128 << 10, 4096)?,
                driver.allocate(1, 1)?,
            ]);
        }
        let rings = driver.ring_addresses(0).ok_or("no queue")?;
        Ok(Self { driver, rings, places, available: 0, used: 0, offsets: Offsets::new() })
    }

    fn prepare(&mut self, case: &Case) -> Result<(), Box<dyn Error>> {
        let data_flags = if case.write { NEXT } else { NEXT | WRITE };
        for (i, [header, data, status]) in (0..).zip(self.places.clone()) {
            let chain = [(header, 16, NEXT), (data, case.size as u32, data_flags), (status, 1, WRITE)];
            for (index, (address, len, flags)) in (3 * i..).zip(chain) {
                self.driver.write_descriptor(
                    0,
                    index,
                    Descriptor { address, len, flags, next: index + 1 },
                )?;
            }
            let kind = u64::from(case.write);
            self.driver.memory().view().write_obj(kind, GuestAddress(header))?;
        }
        Ok(())
    }

    fn round(&mut self, case: &Case) -> Result<f64, Box<dyn Error>> {
        self.prepare(case)?;
        let mut idle: Vec<u16> = (0..DEPTH as u16).collect();
        let mut in_flight = 0;
        let mut count = 0_u64;
        let start = Instant::now();
        loop {
            if start.elapsed() > ROUND {
                idle.clear();
            }
            in_flight += idle.len();
            self.submit(case, &mut idle)?;
            if in_flight == 0 {
                return Ok(count as f64 / start.elapsed().as_secs_f64());
            }
            self.collect(&mut idle)?;
            in_flight -= idle.len();
            count += idle.len() as u64;
        }
    }

    fn submit(&mut self, case: &Case, idle: &mut Vec<u16>) -> Result<(), Box<dyn Error>> {
        let view = self.driver.memory().view();
        let ram = view.get_slice(GuestAddress(0), MEMORY)?;
        let [_, available, used] = self.rings.map(|address| address as usize);
        let old = self.available;
        for place in idle.drain(..) {
            let [header, _, status] = self.places[usize::from(place)];
            ram.write_obj(self.offsets.next(case) / 512, header as usize + 8)?;
            ram.write_obj(0xff_u8, status as usize)?;
            let slot = usize::from(self.available % QUEUE);
            ram.write_obj(3 * place, available + 4 + 2 * slot)?;
            self.available = self.available.wrapping_add(1);
        }
        ram.store(self.available, available + 2, Ordering::Release)?;
        fence(Ordering::SeqCst);
        let event: u16 = ram.load(used + 4 + 8 * usize::from(QUEUE), Ordering::Relaxed)?;
        if self.available.wrapping_sub(event).wrapping_sub(1) < self.available.wrapping_sub(old) {
            self.driver.kick(0);
        }
        Ok(())
    }

    /// Waits for requests to end.
    fn collect(&mut self, idle: &mut Vec<u16>) -> Result<(), Box<dyn Error>> {
        let view = self.driver.memory().view();
        let ram = view.get_slice(GuestAddress(0), MEMORY)?;
        let [_, available, used] = self.rings.map(|address| address as usize);
        let index = loop {
            let index: u16 = ram.load(used + 2, Ordering::Acquire)?;
            if index != self.used {
                break index;
            }
            std::thread::yield_now();
        };
        while self.used != index {
            let slot = usize::from(self.used % QUEUE);
            let head: u32 = ram.read_obj(used + 4 + 8 * slot)?;
            let place = head as u16 / 3;
            let [_, _, status] = self.places[usize::from(place)];
            assert_eq!(ram.read_obj::<u8>(status as usize)?, 0);
            idle.push(place);
            self.used = self.used.wrapping_add(1);
        }
        ram.store(self.used, available + 4 + 2 * usize::from(QUEUE), Ordering::Release)?;
        Ok(())
    }
}
