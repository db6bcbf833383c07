//! A disk on a temporary file behind the in-process driver, and requests to it.
#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "shared by tests, each of which uses a part"
)]

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};
use vmm_device_model::device::Lifecycle;
use vmm_disk_image::{EngineKind, OpenOptions, open};
use vmm_virtio_devices::block::{BlockCounters, BlockDevice, BlockOptions};
use vmm_virtio_devices::testing::{Segment, TestDriver};

pub const MEMORY: usize = 8 << 20;
pub const LIMIT: Duration = Duration::from_secs(10);
pub const SECTOR: usize = 512;

pub const IN: u32 = 0;
pub const OUT: u32 = 1;
pub const FLUSH: u32 = 4;
pub const GET_ID: u32 = 8;
pub const DISCARD: u32 = 11;
pub const WRITE_ZEROES: u32 = 13;

pub const OK: u8 = 0;
pub const IO_ERROR: u8 = 1;
pub const UNSUPPORTED: u8 = 2;
/// What a status byte is before the device wrote it.
pub const UNTOUCHED: u8 = 0xee;

pub const ENGINES: [EngineKind; 2] = [EngineKind::Sync, EngineKind::IoUring];

/// What varies between tests.
pub struct Setup {
    pub sectors: u64,
    pub queues: u16,
    pub queue_size: u16,
    pub engine: EngineKind,
    pub read_only: bool,
    pub sparse: bool,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            sectors: 2048,
            queues: 1,
            queue_size: 128,
            engine: EngineKind::Sync,
            read_only: false,
            sparse: true,
        }
    }
}

pub struct TestDisk {
    pub driver: TestDriver,
    pub path: PathBuf,
    pub file: File,
    pub counters: Arc<BlockCounters>,
    _dir: TempDir,
    /// Header and status of the request at hand.
    header: u64,
    status: u64,
    pub data: u64,
}

impl Setup {
    /// The content of every byte is known: sector `n` is filled with `n + 1`, modulo 251.
    pub fn device(&self, dir: &TempDir) -> BlockDevice {
        let path = dir.path().join("disk.raw");
        if !path.exists() {
            let mut file = File::create(&path).unwrap();
            for sector in 0..self.sectors {
                file.write_all(&pattern(sector)).unwrap();
            }
        }
        let disk = open(&OpenOptions { read_only: self.read_only, ..OpenOptions::raw(&path) }).unwrap();
        let options = BlockOptions {
            id: "_disk0".into(),
            disk,
            queues: self.queues,
            queue_size: self.queue_size,
            engine: self.engine,
            serial: Some("serial-of-test".into()),
            sparse: self.sparse,
        };
        BlockDevice::new(options).unwrap()
    }

    pub fn on_bus(&self) -> TestDisk {
        let dir = tempfile::tempdir().unwrap();
        let device = self.device(&dir);
        let counters = device.counters();
        let path = dir.path().join("disk.raw");
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let driver = TestDriver::new(Box::new(device), MEMORY).unwrap();
        TestDisk { driver, path, file, counters, _dir: dir, header: 0, status: 0, data: 0 }
    }

    pub fn running(&self) -> TestDisk {
        let mut disk = self.on_bus();
        disk.start(!0);
        disk
    }
}

pub fn pattern(sector: u64) -> [u8; SECTOR] {
    [(sector % 251) as u8 + 1; SECTOR]
}

impl TestDisk {
    pub fn start(&mut self, features: u64) {
        self.driver.start(features).unwrap();
        self.header = self.driver.allocate(64, 16).unwrap();
        self.status = self.driver.allocate(1, 16).unwrap();
        self.data = self.driver.allocate(1 << 20, 4096).unwrap();
    }

    pub fn poke(&self, address: u64, bytes: &[u8]) {
        self.driver.memory().view().write_slice(bytes, GuestAddress(address)).unwrap();
    }

    /// Writes a header and resets the status; their segments.
    pub fn frame(&self, kind: u32, sector: u64) -> (Segment, Segment) {
        self.poke(self.header, &header(kind, sector));
        self.poke(self.status, &[UNTOUCHED]);
        (Segment::readable(self.header, 16), Segment::writable(self.status, 1))
    }

    pub fn status_byte(&self) -> u8 {
        self.driver.peek(self.status, 1).unwrap()[0]
    }

    /// A whole request with `data` between header and status: the status byte and the length used.
    pub fn request(&mut self, kind: u32, sector: u64, data: &[Segment]) -> (u8, u32) {
        let (header, status) = self.frame(kind, sector);
        let chain: Vec<_> = std::iter::once(header).chain(data.iter().copied()).chain([status]).collect();
        self.chain(&chain)
    }

    /// Any chain.
    pub fn chain(&mut self, chain: &[Segment]) -> (u8, u32) {
        let len = self.driver.request(0, chain).unwrap();
        (self.status_byte(), len)
    }

    pub fn read(&mut self, sector: u64, len: usize) -> Vec<u8> {
        let segment = Segment::writable(self.data, len as u32);
        assert_eq!(self.request(IN, sector, &[segment]), (OK, len as u32 + 1));
        self.driver.peek(self.data, len).unwrap()
    }

    pub fn write(&mut self, sector: u64, data: &[u8]) {
        self.poke(self.data, data);
        let segment = Segment::readable(self.data, data.len() as u32);
        assert_eq!(self.request(OUT, sector, &[segment]), (OK, 1));
    }

    /// A discard or write-zeroes.
    pub fn range(&mut self, kind: u32, sector: u64, sectors: u32, flags: u32) -> u8 {
        let mut range = sector.to_le_bytes().to_vec();
        range.extend(sectors.to_le_bytes());
        range.extend(flags.to_le_bytes());
        self.poke(self.data, &range);
        self.request(kind, 0, &[Segment::readable(self.data, 16)]).0
    }

    /// The image as the host sees it.
    pub fn on_host(&self, sector: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.file.read_exact_at(&mut bytes, sector * SECTOR as u64).unwrap();
        bytes
    }

    pub fn quiesce(&mut self) {
        self.driver.device.quiesce_begin();
        self.driver.device.quiesce_finish(Instant::now() + LIMIT).unwrap();
    }

    /// That the device still does what it is there for.
    pub fn works(&mut self) {
        assert_eq!(self.read(7, SECTOR), self.on_host(7, SECTOR));
    }
}

pub fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    header
}
