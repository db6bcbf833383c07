//! The disk and what no good driver does: bad chains, the same head twice, engines that break.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "tests fail by panicking")]

mod common;

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{
    ENGINES, IN, IO_ERROR, LIMIT, OK, OUT, SECTOR, Setup, TestDisk, UNTOUCHED, WRITE_ZEROES, header, pattern,
};
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_device_model::device::Lifecycle;
use vmm_disk_image::{
    Completion, Disk, Engine, EngineError, EngineKind, Op, Rejected, Request, SubmitError, Topology,
};
use vmm_virtio_devices::block::{BlockDevice, BlockError, BlockOptions};
use vmm_virtio_devices::testing::{Descriptor, INDIRECT, NEXT, Segment, TestDriver, WRITE, hostile_chains};

const OUTSIDE: u64 = 1 << 40;

#[test]
fn chains_that_no_driver_would_make() {
    for engine in ENGINES {
        let mut disk = Setup { engine, ..Setup::default() }.running();
        hostile_chains(&mut disk.driver, 0).unwrap();
        disk.start(!0);
        disk.works();
    }
}

#[test]
fn requests_that_make_no_sense_fail_and_the_next_is_served() {
    for engine in ENGINES {
        let mut disk = Setup { engine, ..Setup::default() }.running();
        let data = disk.data;
        let readable = |len| Segment::readable(data, len);
        let writable = |len| Segment::writable(data, len);
        let cases: [(u32, u64, Vec<Segment>); 16] = [
            (IN, 0, vec![writable(511)]),
            (OUT, 0, vec![readable(513)]),
            (IN, 2048, vec![writable(512)]),
            (OUT, 2047, vec![readable(1024)]),
            (IN, u64::MAX, vec![writable(512)]),
            (IN, u64::MAX / 512, vec![writable(512)]),
            (IN, 0, vec![readable(512)]),
            (OUT, 0, vec![writable(512)]),
            (IN, 0, vec![readable(512), writable(512)]),
            (IN, 0, vec![Segment::writable(OUTSIDE, 512)]),
            (OUT, 0, vec![Segment::readable(OUTSIDE, 512)]),
            (OUT, 0, vec![readable(512), Segment::readable(u64::MAX - 511, 512)]),
            (IN, 0, vec![Segment::writable(common::MEMORY as u64 - 256, 512)]),
            (IN, 0, vec![Segment::writable(data, 0xffff_fe00)]),
            (common::GET_ID, 0, vec![Segment::writable(OUTSIDE, 20)]),
            (common::DISCARD, 0, vec![readable(15)]),
        ];
        for (kind, sector, segments) in cases {
            let answer = disk.request(kind, sector, &segments);
            assert_eq!(answer, (IO_ERROR, 1), "{kind} at {sector}: {segments:x?}");
            disk.works();
        }
        assert_eq!(disk.on_host(0, 4 * SECTOR), (0..4).flat_map(pattern).collect::<Vec<_>>());
    }
}

#[test]
fn without_a_status_byte_a_chain_comes_back_empty() {
    let mut disk = Setup::default().running();
    let (head, status) = disk.frame(IN, 0);
    let data = disk.data;
    let readable_status = Segment { writable: false, ..status };
    for chain in [
        vec![head],
        vec![head, readable_status],
        vec![head, Segment::writable(data, 0)],
        vec![head, Segment::writable(OUTSIDE, 1)],
        vec![status, head],
    ] {
        assert_eq!(disk.chain(&chain), (UNTOUCHED, 0), "{chain:x?}");
    }
    // A status byte, but no whole header.
    for chain in [
        vec![status],
        vec![Segment::readable(data, 15), status],
        vec![Segment::readable(OUTSIDE, 16), status],
    ] {
        disk.frame(IN, 0);
        assert_eq!(disk.chain(&chain), (IO_ERROR, 1), "{chain:x?}");
    }
    disk.works();
}

#[test]
fn an_indirect_chain_is_a_chain_but_no_longer_than_the_queue() {
    let mut disk = Setup { queue_size: 16, ..Setup::default() }.running();
    let table = disk.driver.allocate(16 * 64, 16).unwrap();
    for (buffers, expected) in [(14_u16, OK), (15, UNTOUCHED), (60, UNTOUCHED)] {
        let (head, status) = disk.frame(IN, 0);
        let mut descriptors = vec![(head.address, head.len, NEXT)];
        for i in 0..u64::from(buffers) {
            descriptors.push((disk.data + 0x200 * i, SECTOR as u32, NEXT | WRITE));
        }
        descriptors.push((status.address, 1, WRITE));
        for (i, (address, len, flags)) in (0_u16..).zip(descriptors) {
            let at = table + 16 * u64::from(i);
            disk.poke(at, &address.to_le_bytes());
            disk.poke(at + 8, &len.to_le_bytes());
            disk.poke(at + 12, &flags.to_le_bytes());
            disk.poke(at + 14, &(i + 1).to_le_bytes());
        }
        let len = 16 * (u32::from(buffers) + 2);
        let head = disk.driver.submit(0, &[Segment::readable(table, len)]).unwrap();
        let indirect = Descriptor { address: table, len, flags: INDIRECT, next: 0 };
        disk.driver.write_descriptor(0, head, indirect).unwrap();
        disk.driver.kick(0);
        disk.driver.wait_used(0, LIMIT).unwrap();
        assert_eq!(disk.status_byte(), expected, "{buffers} buffers");
    }
    assert_eq!(disk.driver.peek(disk.data + 0x200, SECTOR).unwrap(), pattern(1));
}

#[test]
fn impossible_queues_are_refused() {
    let options = |queues, queue_size| BlockOptions {
        id: "d".into(),
        disk: Arc::new(HeldDisk::default()),
        queues,
        queue_size,
        engine: EngineKind::Sync,
        serial: None,
        sparse: true,
    };
    assert!(matches!(BlockDevice::new(options(0, 16)), Err(BlockError::NoQueues { .. })));
    for size in [0, 3, 65535] {
        assert!(matches!(BlockDevice::new(options(1, size)), Err(BlockError::QueueSize { .. })));
    }
}

#[test]
fn what_the_kernel_read_into_memory_is_dirty() {
    for engine in ENGINES {
        let mut disk = Setup { engine, ..Setup::default() }.running();
        let at = disk.data + 0x4_0000;
        let dirty = |disk: &TestDisk, address: u64| {
            let view = disk.driver.memory().view();
            let region = view.find_region(GuestAddress(address)).unwrap();
            region.bitmap().dirty_at(address as usize)
        };
        assert!(!dirty(&disk, at));
        let segments = [Segment::writable(at + 0x1f00, 512), Segment::writable(at + 0x4000, 0x1000)];
        assert_eq!(disk.request(IN, 0, &segments).0, OK);
        let pages: Vec<_> = (0..6).map(|page| dirty(&disk, at + 0x1000 * page)).collect();
        assert_eq!(pages, [false, true, true, false, true, false], "{engine}");
    }
}

#[test]
fn the_same_head_twice_in_flight_is_two_requests() {
    let (mut driver, held) = on_held_disk();
    let [header_at, data, status] = place(&mut driver, OUT);
    let chain = [
        Segment::readable(header_at, 16),
        Segment::readable(data, SECTOR as u32),
        Segment::writable(status, 1),
    ];
    let head = driver.submit(0, &chain).unwrap();
    driver.publish(0, head).unwrap();
    driver.kick(0);
    held.wait_for(2);
    assert_eq!(used_index(&driver), 0);
    held.release(Ok(()));
    let end = Instant::now() + LIMIT;
    while used_index(&driver) < 2 {
        assert!(Instant::now() < end, "both come back");
        std::thread::yield_now();
    }
    let [_, _, used] = driver.ring_addresses(0).unwrap();
    for entry in [used + 4, used + 12] {
        let element = driver.peek(entry, 8).unwrap();
        assert_eq!(element, [u32::from(head).to_le_bytes(), 1_u32.to_le_bytes()].concat());
    }
    assert_eq!(driver.peek(status, 1).unwrap(), [OK]);
}

#[test]
fn no_more_is_in_flight_than_the_queue_is_long() {
    let (mut driver, held) = on_held_disk();
    let [header_at, data, status] = place(&mut driver, IN);
    let chain = [
        Segment::readable(header_at, 16),
        Segment::writable(data, SECTOR as u32),
        Segment::writable(status, 1),
    ];
    let head = driver.submit(0, &chain).unwrap();
    let mut sent = 1;
    while sent < 16 {
        driver.publish(0, head).unwrap();
        sent += 1;
    }
    driver.kick(0);
    held.wait_for(16);
    // As many again, which the ring allows, but not the table of requests.
    for _ in 0..16 {
        driver.publish(0, head).unwrap();
    }
    driver.kick(0);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(held.count(), 16);
    held.release(Ok(()));
    held.wait_for(16);
    held.release(Ok(()));
    let end = Instant::now() + LIMIT;
    while used_index(&driver) < 32 {
        assert!(Instant::now() < end, "all come back");
        std::thread::yield_now();
    }
}

#[test]
fn what_ends_just_before_the_thread_sleeps_is_answered() {
    let (mut driver, held) = on_held_disk();
    held.0.lock().unwrap().hasty = true;
    let [header_at, data, status] = place(&mut driver, IN);
    let chain = [
        Segment::readable(header_at, 16),
        Segment::writable(data, SECTOR as u32),
        Segment::writable(status, 1),
    ];
    for _ in 0..3 {
        // The thread sleeps by then, so that the kick is what it finds the request by, and nothing else wakes it.
        std::thread::sleep(Duration::from_millis(20));
        driver.submit(0, &chain).unwrap();
        driver.kick(0);
        driver.wait_used(0, LIMIT).unwrap();
        assert_eq!(driver.peek(status, 1).unwrap(), [OK]);
    }
}

#[test]
fn a_write_through_write_is_answered_after_its_flush() {
    let (mut driver, held) = on_held_disk();
    driver.write_config(32, &[0]);
    let [header_at, data, status] = place(&mut driver, OUT);
    let chain = [
        Segment::readable(header_at, 16),
        Segment::readable(data, SECTOR as u32),
        Segment::writable(status, 1),
    ];
    driver.submit(0, &chain).unwrap();
    driver.kick(0);
    held.wait_for(1);
    held.release(Ok(()));
    held.wait_for(1);
    assert!(held.holds_only_flushes());
    assert_eq!(used_index(&driver), 0);
    held.release(Err(io::ErrorKind::StorageFull));
    driver.wait_used(0, LIMIT).unwrap();
    assert_eq!(driver.peek(status, 1).unwrap(), [IO_ERROR], "a flush that fails fails the write");
}

#[test]
fn write_through_zeroes_are_answered_after_their_flush() {
    let (mut driver, held) = on_held_disk();
    driver.write_config(32, &[0]);
    let [header_at, _, status] = place(&mut driver, WRITE_ZEROES);
    let mut range = [0; 16];
    range[8] = 1;
    let range = driver.place(&range).unwrap();
    let chain =
        [Segment::readable(header_at, 16), Segment::readable(range, 16), Segment::writable(status, 1)];
    driver.submit(0, &chain).unwrap();
    driver.kick(0);
    held.wait_for(1);
    held.release(Ok(()));
    held.wait_for(1);
    assert!(held.holds_only_flushes());
    assert_eq!(used_index(&driver), 0);
    held.release(Ok(()));
    driver.wait_used(0, LIMIT).unwrap();
    assert_eq!(driver.peek(status, 1).unwrap(), [OK]);
}

#[test]
fn a_stop_waits_for_what_is_in_flight_and_may_be_asked_again() {
    let (mut driver, held) = on_held_disk();
    let [header_at, data, status] = place(&mut driver, IN);
    let chain = [
        Segment::readable(header_at, 16),
        Segment::writable(data, SECTOR as u32),
        Segment::writable(status, 1),
    ];
    driver.submit(0, &chain).unwrap();
    driver.kick(0);
    held.wait_for(1);
    driver.device.quiesce_begin();
    let soon = Instant::now() + Duration::from_millis(20);
    assert!(driver.device.quiesce_finish(soon).is_err());
    // What comes now waits for the resume.
    driver.submit(0, &chain).unwrap();
    driver.kick(0);
    held.release(Ok(()));
    driver.device.quiesce_finish(Instant::now() + LIMIT).unwrap();
    assert_eq!((used_index(&driver), held.count()), (1, 0));
    driver.device.resume().unwrap();
    held.wait_for(1);
    held.release(Ok(()));
    driver.wait_used(0, LIMIT).unwrap();
    driver.wait_used(0, LIMIT).unwrap();
}

#[test]
fn after_the_engine_broke_every_request_fails() {
    let (mut driver, held) = on_held_disk();
    let [header_at, data, status] = place(&mut driver, IN);
    let chain = [
        Segment::readable(header_at, 16),
        Segment::writable(data, SECTOR as u32),
        Segment::writable(status, 1),
    ];
    driver.submit(0, &chain).unwrap();
    driver.kick(0);
    held.wait_for(1);
    held.0.lock().unwrap().broken = true;
    for _ in 0..3 {
        driver.submit(0, &chain).unwrap();
        driver.kick(0);
        driver.wait_used(0, LIMIT).unwrap();
        assert_eq!(driver.peek(status, 1).unwrap(), [IO_ERROR]);
    }
    driver.wait_used(0, LIMIT).unwrap();
    driver.device.quiesce_begin();
    driver.device.quiesce_finish(Instant::now() + LIMIT).unwrap();
}

/// Header, data and status in guest memory.
fn place(driver: &mut TestDriver, kind: u32) -> [u64; 3] {
    let header_at = driver.place(&header(kind, 0)).unwrap();
    [header_at, driver.allocate(SECTOR, 512).unwrap(), driver.place(&[UNTOUCHED]).unwrap()]
}

fn used_index(driver: &TestDriver) -> u16 {
    let [_, _, used] = driver.ring_addresses(0).unwrap();
    driver.memory().view().read_obj(GuestAddress(used + 2)).unwrap()
}

/// A disk whose requests wait until the test releases them, in a queue of 16.
fn on_held_disk() -> (TestDriver, Held) {
    let disk = HeldDisk::default();
    let held = Held(Arc::clone(&disk.0));
    let options = BlockOptions {
        id: "held".into(),
        disk: Arc::new(disk),
        queues: 1,
        queue_size: 16,
        engine: EngineKind::Auto,
        serial: None,
        sparse: true,
    };
    let device = BlockDevice::new(options).unwrap();
    let mut driver = TestDriver::new(Box::new(device), common::MEMORY).unwrap();
    driver.start(!0).unwrap();
    (driver, held)
}

#[derive(Debug, Default)]
struct HeldState {
    requests: Vec<Request>,
    done: Vec<Completion>,
    broken: bool,
    /// The owner does not want to be told.
    silent: bool,
    /// Requests are done just before the owner wants to be told.
    hasty: bool,
    signal: Option<UnixStream>,
}

struct Held(Arc<Mutex<HeldState>>);

impl Held {
    fn count(&self) -> usize {
        self.0.lock().unwrap().requests.len()
    }

    fn wait_for(&self, count: usize) {
        let end = Instant::now() + LIMIT;
        while self.count() < count {
            assert!(Instant::now() < end, "{count} requests in flight");
            std::thread::yield_now();
        }
    }

    fn holds_only_flushes(&self) -> bool {
        self.0.lock().unwrap().requests.iter().all(|request| matches!(request.op, Op::Flush))
    }

    fn release(&self, result: Result<(), io::ErrorKind>) {
        let mut state = self.0.lock().unwrap();
        state.complete(result);
        if !state.silent {
            state.signal.as_mut().unwrap().write_all(&[1]).unwrap();
        }
    }
}

impl HeldState {
    fn complete(&mut self, result: Result<(), io::ErrorKind>) {
        for Request { token, op } in std::mem::take(&mut self.requests) {
            let (len, buffers) = match op {
                Op::Read { buffers, .. } | Op::Write { buffers, .. } => (buffers.len(), Some(buffers)),
                _ => (0, None),
            };
            let result = result.map(|()| len as u32).map_err(io::Error::from);
            self.done.push(Completion { token, result, buffers });
        }
    }
}

#[derive(Debug, Default)]
struct HeldDisk(Arc<Mutex<HeldState>>);

impl Disk for HeldDisk {
    fn size(&self) -> u64 {
        1 << 20
    }

    fn topology(&self) -> Topology {
        Topology { logical_block: 512, physical_block: 512, min_io: 0, opt_io: 0, discard_granularity: 512 }
    }

    fn read_only(&self) -> bool {
        false
    }

    fn supports_discard(&self) -> bool {
        true
    }

    fn engine(&self, _: EngineKind, _: u16) -> Result<Box<dyn Engine>, EngineError> {
        let (signal, completion) = UnixStream::pair().unwrap();
        completion.set_nonblocking(true).unwrap();
        self.0.lock().unwrap().signal = Some(signal);
        Ok(Box::new(HeldEngine { state: Arc::clone(&self.0), completion }))
    }

    fn release_lock(&self) -> io::Result<()> {
        Ok(())
    }

    fn reacquire_lock(&self) -> io::Result<()> {
        Ok(())
    }

    fn check_lock(&self) -> io::Result<()> {
        Ok(())
    }
}

#[derive(Debug)]
struct HeldEngine {
    state: Arc<Mutex<HeldState>>,
    completion: UnixStream,
}

impl Engine for HeldEngine {
    fn kind(&self) -> EngineKind {
        EngineKind::Sync
    }

    fn submit(&mut self, request: Request) -> Result<(), Rejected> {
        let mut state = self.state.lock().unwrap();
        if state.requests.len() + state.done.len() >= 16 {
            return Err(Rejected { request, reason: SubmitError::Full });
        }
        state.requests.push(request);
        Ok(())
    }

    fn kick(&mut self) -> io::Result<()> {
        if self.state.lock().unwrap().broken { Err(io::ErrorKind::BrokenPipe.into()) } else { Ok(()) }
    }

    fn completion_fd(&self) -> BorrowedFd<'_> {
        self.completion.as_fd()
    }

    fn announce(&mut self, on: bool) -> bool {
        let mut state = self.state.lock().unwrap();
        if state.hasty && on {
            state.complete(Ok(()));
        }
        state.silent = !on;
        !state.done.is_empty()
    }

    fn reap(&mut self, out: &mut Vec<Completion>) -> io::Result<()> {
        let mut state = self.state.lock().unwrap();
        let _ = (&self.completion).read(&mut [0; 64]);
        out.append(&mut state.done);
        Ok(())
    }

    fn in_flight(&self) -> usize {
        let state = self.state.lock().unwrap();
        state.requests.len() + state.done.len()
    }
}
