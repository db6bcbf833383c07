//! Seeded random descriptor tables against every device of this crate: it may answer them as it likes, but it
//! stops when it is told to, keeps its memory bounded, and serves a good request after a reset.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "tests fail by panicking")]

mod common;

use std::path::Path;
use std::time::Instant;

use common::{ENGINES, LIMIT, SECTOR, Setup};
use vm_memory::{Bytes, GuestAddress};
use vmm_device_model::bus::BusTarget;
use vmm_device_model::device::{Lifecycle, SaveRecord, SaveState};
use vmm_device_model::testing::{Xorshift, fuzz_registers};
use vmm_fuzzing::{hostile_records, rounds};
use vmm_virtio_devices::console::ConsoleDevice;
use vmm_virtio_devices::rng::{DEFAULT_SOURCE, RngDevice};
use vmm_virtio_devices::testing::{Descriptor, Segment, TestDriver};
use vmm_virtio_devices::transport::VIRTIO_F_VERSION_1;

const ROUNDS: u32 = 10_000;
/// Rounds between two stops: as many heads as fit the queue.
const BATCH: usize = 16;
/// Rounds between two resets.
const LIFE: usize = 128;
/// What a process may grow by, with three devices and their tests at once.
const GROWTH: usize = 128 << 20;

/// Where buffers mostly lie: below what the driver gives out.
const AREA: u64 = 0x1000;
const AREA_LEN: u64 = 0xe000;

fn address(random: &mut Xorshift, memory: u64) -> u64 {
    let at = random.next();
    match at % 16 {
        0 => at,
        1 => memory - at % 0x1000,
        2 => at % memory,
        // Tables and rings.
        3 => 0x1_0000 + at % 0x4000,
        _ => AREA + at % AREA_LEN / 16 * 16,
    }
}

fn length(random: &mut Xorshift) -> u32 {
    let len = random.next() as u32;
    match len % 16 {
        0 => len,
        1 => 0,
        2 => len % 0x10_0000,
        3..=6 => 512 * (1 + len % 8),
        7..=9 => 1,
        _ => 16,
    }
}

/// One round: some descriptors, some of what they point to, some heads.
fn round(driver: &mut TestDriver, queue: u16, random: &mut Xorshift, memory: u64) {
    if random.next().is_multiple_of(2) {
        scatter(driver, queue, random, memory);
    } else {
        almost_good(driver, queue, random, memory);
    }
}

/// A chain as a disk's driver makes it, with one thing wrong or none. Other devices' chains are parts of it.
fn almost_good(driver: &mut TestDriver, queue: u16, random: &mut Xorshift, memory: u64) {
    let read = random.next().is_multiple_of(2);
    let header = AREA + random.next() % 64 * 16;
    let view = driver.memory().view();
    view.write_obj(u64::from(!read), GuestAddress(header)).unwrap();
    view.write_obj(random.next() % 2048, GuestAddress(header + 8)).unwrap();
    let direction = if read { 2 } else { 0 };
    let buffers = 1 + random.next() % 6;
    let mut chain = vec![Descriptor { address: header, len: 16, flags: 1, next: 1 }];
    for next in 2..2 + buffers as u16 {
        let address = AREA + 0x1000 + random.next() % 0x80 * 256;
        let len = 512 * (1 + random.next() as u32 % 4);
        chain.push(Descriptor { address, len, flags: 1 | direction, next });
    }
    chain.push(Descriptor { address: AREA + 0x800, len: 1, flags: 2, next: 0 });
    let wrong = random.next() as usize % chain.len();
    match random.next() % 12 {
        0 => chain[wrong].address = address(random, memory),
        1 => chain[wrong].len = length(random),
        2 => chain[wrong].flags ^= 1 << (random.next() % 3),
        3 => chain[wrong].next = random.next() as u16 % 16,
        4 => view.write_obj(random.next(), GuestAddress(header)).unwrap(),
        5 => view.write_obj(random.next(), GuestAddress(header + 8)).unwrap(),
        _ => {}
    }
    for (index, descriptor) in (0..).zip(chain) {
        driver.write_descriptor(queue, index, descriptor).unwrap();
    }
    driver.publish(queue, 0).unwrap();
    driver.kick(queue);
}

/// Descriptors, what they point to, and heads, all random.
fn scatter(driver: &mut TestDriver, queue: u16, random: &mut Xorshift, memory: u64) {
    let size = 128;
    for _ in 0..1 + random.next() % 8 {
        let index = (random.next() % 16) as u16;
        let flags = match random.next() % 16 {
            0 => random.next() as u16,
            1 => 4,
            2..=8 => 1 | (random.next() as u16 & 2),
            _ => random.next() as u16 & 2,
        };
        let next = if random.next().is_multiple_of(16) { random.next() as u16 } else { index + 1 };
        let descriptor = Descriptor { address: address(random, memory), len: length(random), flags, next };
        driver.write_descriptor(queue, index, descriptor).unwrap();
    }
    // Headers of requests, and descriptors of indirect tables.
    for _ in 0..8 {
        let at = GuestAddress(AREA + random.next() % AREA_LEN / 16 * 16);
        let kinds = [0, 1, 4, 8, 11, 13, random.next() as u32];
        let kind = u64::from(kinds[(random.next() % 7) as usize]);
        let rest = if random.next().is_multiple_of(8) { random.next() } else { random.next() % 2048 };
        let view = driver.memory().view();
        view.write_obj(kind, at).unwrap();
        view.write_obj(rest, GuestAddress(at.0 + 8)).unwrap();
    }
    for _ in 0..1 + random.next() % 4 {
        let head = if random.next().is_multiple_of(64) { random.next() } else { random.next() % 16 };
        driver.publish(queue, (head % (size + 1)) as u16).unwrap();
    }
    driver.kick(queue);
}

fn fuzz(driver: &mut TestDriver, queues: u16, memory: u64, seed: u64, mut good: impl FnMut(&mut TestDriver)) {
    let mut random = Xorshift::new(seed);
    let before = resident();
    for number in 0..rounds(ROUNDS) as usize {
        if number % LIFE == 0 {
            driver.start(!0).unwrap();
            good(driver);
            driver.start(if number % (2 * LIFE) == 0 { !0 } else { VIRTIO_F_VERSION_1 }).unwrap();
        }
        let queue = (random.next() % u64::from(queues)) as u16;
        round(driver, queue, &mut random, memory);
        if number % BATCH == BATCH - 1 {
            quiesce(driver);
            driver.device.resume().unwrap();
        }
    }
    driver.start(!0).unwrap();
    good(driver);
    let grown = resident().saturating_sub(before);
    assert!(grown < GROWTH, "grown by {grown} bytes");
}

/// Resident memory of this process in bytes.
fn resident() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

#[test]
fn fuzz_disk() {
    for (seed, engine) in (1..).zip(ENGINES) {
        let mut disk = Setup { engine, queues: 2, ..Setup::default() }.on_bus();
        let file = disk.file.try_clone().unwrap();
        fuzz(&mut disk.driver, 2, common::MEMORY as u64, seed, |driver| {
            let header = driver.place(&common::header(common::IN, 7)).unwrap();
            let data = driver.allocate(SECTOR, 16).unwrap();
            let status = driver.place(&[common::UNTOUCHED]).unwrap();
            let chain = [
                Segment::readable(header, 16),
                Segment::writable(data, SECTOR as u32),
                Segment::writable(status, 1),
            ];
            assert_eq!(driver.request(1, &chain).unwrap(), 513);
            assert_eq!(driver.peek(status, 1).unwrap(), [common::OK]);
            let mut expected = [0; SECTOR];
            std::os::unix::fs::FileExt::read_exact_at(&file, &mut expected, 7 * SECTOR as u64).unwrap();
            assert_eq!(driver.peek(data, SECTOR).unwrap(), expected);
        });
        let counts = disk.counters.get();
        assert!(counts.read_ops > 500 && counts.write_ops > 500, "it got to the image: {counts:?}");
        assert_eq!(disk.file.metadata().unwrap().len(), 2048 * 512, "the image keeps its size");
    }
}

#[test]
fn fuzz_entropy() {
    let memory = 1 << 20;
    let device = RngDevice::new("_rng", Path::new(DEFAULT_SOURCE)).unwrap();
    let mut driver = TestDriver::new(Box::new(device), memory).unwrap();
    fuzz(&mut driver, 1, memory as u64, 3, |driver| {
        let at = driver.allocate(64, 16).unwrap();
        assert_eq!(driver.request(0, &[Segment::writable(at, 64)]).unwrap(), 64);
    });
}

#[test]
fn fuzz_console() {
    let memory = 1 << 20;
    let device = ConsoleDevice::new("_console", Box::new(std::io::sink()), (80, 25)).unwrap();
    let input = device.input();
    let mut driver = TestDriver::new(Box::new(device), memory).unwrap();
    fuzz(&mut driver, 2, memory as u64, 4, |driver| {
        input.enqueue(&[b'x'; 100]);
        let at = driver.allocate(8, 16).unwrap();
        assert_eq!(driver.request(0, &[Segment::writable(at, 8)]).unwrap(), 8);
        assert_eq!(driver.request(1, &[Segment::readable(at, 8)]).unwrap(), 0);
    });
}

/// Every integer of a running device's saved state at its edges: a restore refuses it, or the device goes on with it, stops, and is
/// reset. Then it works as before.
fn hostile_states(driver: &mut TestDriver, mut good: impl FnMut(&mut TestDriver)) {
    driver.start(!0).unwrap();
    good(driver);
    quiesce(driver);
    let mut states: Vec<_> = hostile_records(&driver.device.save_record().bytes);
    let own = driver.device.save();
    states.extend(hostile_records(&own.device.bytes).into_iter().map(|bytes| {
        let mut state = own.clone();
        state.device.bytes = bytes;
        vmm_snapshot::Schema::encode(&state)
    }));
    let mut record = driver.device.save_record();
    let (mut taken, mut refused) = (0, 0);
    let before = resident();
    for bytes in states {
        driver.device.reset().unwrap();
        record.bytes = bytes;
        if driver.device.restore_record(&record).is_err() {
            refused += 1;
            continue;
        }
        taken += 1;
        // It may find its rings unusable, and says so.
        let _ = driver.device.resume();
        let _ = driver.service();
        quiesce(driver);
        driver.device.save_record();
    }
    assert!(taken > 0 && refused > 0, "{taken} taken, {refused} refused");
    let grown = resident().saturating_sub(before);
    assert!(grown < GROWTH, "grown by {grown} bytes");
    driver.device.reset().unwrap();
    driver.device.resume().unwrap();
    driver.probe().unwrap();
    driver.start(!0).unwrap();
    good(driver);
}

fn quiesce(driver: &mut TestDriver) {
    driver.device.quiesce_begin();
    driver.device.quiesce_finish(Instant::now() + LIMIT).unwrap();
}

#[test]
fn fuzz_states_of_a_disk() {
    for engine in ENGINES {
        let mut disk = Setup { engine, queues: 2, ..Setup::default() }.on_bus();
        hostile_states(&mut disk.driver, |driver| {
            let header = driver.place(&common::header(common::IN, 7)).unwrap();
            let data = driver.allocate(SECTOR, 16).unwrap();
            let status = driver.allocate(1, 1).unwrap();
            let chain = [
                Segment::readable(header, 16),
                Segment::writable(data, SECTOR as u32),
                Segment::writable(status, 1),
            ];
            assert_eq!(driver.request(1, &chain).unwrap(), 513);
        });
    }
}

#[test]
fn fuzz_states_of_an_entropy_source() {
    let device = RngDevice::new("_rng", Path::new(DEFAULT_SOURCE)).unwrap();
    let mut driver = TestDriver::new(Box::new(device), 1 << 20).unwrap();
    hostile_states(&mut driver, |driver| {
        let at = driver.allocate(64, 16).unwrap();
        assert_eq!(driver.request(0, &[Segment::writable(at, 64)]).unwrap(), 64);
    });
}

#[test]
fn fuzz_states_of_a_console() {
    let device = ConsoleDevice::new("_console", Box::new(std::io::sink()), (80, 25)).unwrap();
    let input = device.input();
    let mut driver = TestDriver::new(Box::new(device), 1 << 20).unwrap();
    hostile_states(&mut driver, |driver| {
        input.enqueue(b"typed");
        let at = driver.allocate(8, 16).unwrap();
        assert_eq!(driver.request(1, &[Segment::readable(at, 8)]).unwrap(), 0);
    });
}

/// What a guest can write anywhere in the BAR of each device: device configuration and all.
#[test]
fn fuzz_registers_of_every_device() {
    let disk = Setup::default().on_bus();
    let rng = RngDevice::new("_rng", Path::new(DEFAULT_SOURCE)).unwrap();
    let console = ConsoleDevice::new("_console", Box::new(std::io::sink()), (80, 25)).unwrap();
    let drivers = [
        disk.driver,
        TestDriver::new(Box::new(rng), 1 << 20).unwrap(),
        TestDriver::new(Box::new(console), 1 << 20).unwrap(),
    ];
    for mut driver in drivers {
        driver.start(!0).unwrap();
        let map = driver.resources.base.mmio.snapshot();
        let (_, bar) = driver.bar();
        let mapping = map.iter().find(|mapping| mapping.base == bar).unwrap().clone();
        for seed in 1..=u64::from(rounds(3)) {
            // The common, interrupt status and device configuration areas lie in the first four pages.
            fuzz_registers(&*mapping.target, mapping.region, 0x100, 3, seed);
            for page in 1..4 {
                let part = From(&*mapping.target, page * 0x1000);
                fuzz_registers(&part, mapping.region, 0x80, 3, seed);
            }
            driver.service().unwrap();
            driver.start(!0).unwrap();
        }
    }
}

/// A target from an offset on.
struct From<'a>(&'a dyn BusTarget, u64);

impl BusTarget for From<'_> {
    fn read(&self, region: u16, offset: u64, data: &mut [u8]) {
        self.0.read(region, self.1 + offset, data);
    }

    fn write(&self, region: u16, offset: u64, data: &[u8]) {
        self.0.write(region, self.1 + offset, data);
    }
}
