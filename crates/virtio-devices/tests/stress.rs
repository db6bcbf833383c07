//! A disk that is stopped and started under load: every byte is compared.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "tests fail by panicking")]

mod common;

use std::collections::HashMap;

use common::{ENGINES, IN, LIMIT, OK, OUT, SECTOR, Setup, TestDisk, header, pattern};
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_device_model::device::Lifecycle;
use vmm_device_model::testing::{Xorshift, save_reset_restore};
use vmm_disk_image::EngineKind;
use vmm_virtio_devices::testing::Segment;
use vmm_virtio_devices::transport::{VIRTIO_F_EVENT_IDX, VIRTIO_F_VERSION_1};

const ROUNDS: usize = 200;
/// Requests in flight; each has a part of the disk for itself.
const DEPTH: usize = 40;
const SECTORS: u64 = 4096;
const AREA: u64 = SECTORS / DEPTH as u64;
const BLOCK: usize = 16 * SECTOR;

struct Load {
    disk: TestDisk,
    model: Vec<u8>,
    random: Xorshift,
    /// Header, data and status of each request.
    places: Vec<[u64; 3]>,
    /// By head: which request, and where and how much it reads or writes.
    pending: HashMap<u16, (usize, u32, usize, usize)>,
}

impl Load {
    fn new(engine: EngineKind, features: u64) -> Self {
        let mut disk = Setup { sectors: SECTORS, engine, ..Setup::default() }.on_bus();
        disk.start(features);
        let places = (0..DEPTH).map(|_| {
            let driver = &mut disk.driver;
            [driver.allocate(16, 16), driver.allocate(BLOCK, 512), driver.allocate(1, 1)].map(Result::unwrap)
        });
        let places = places.collect();
        let model = (0..SECTORS).flat_map(pattern).collect();
        Self { disk, model, random: Xorshift::new(7), places, pending: HashMap::new() }
    }

    /// Makes as many requests available as are free, with a kick now and then.
    fn submit(&mut self) {
        let busy: Vec<usize> = self.pending.values().map(|p| p.0).collect();
        for at in (0..DEPTH).filter(|at| !busy.contains(at)) {
            let sectors = 1 + self.random.next() % 16;
            let sector = AREA * at as u64 + self.random.next() % (AREA - sectors);
            let len = sectors as usize * SECTOR;
            let kind = if self.random.next().is_multiple_of(2) { IN } else { OUT };
            let [head_at, data, status] = self.places[at];
            self.disk.poke(head_at, &header(kind, sector));
            self.disk.poke(status, &[common::UNTOUCHED]);
            let bytes: Vec<u8> = (0..len / 8).flat_map(|_| self.random.next().to_le_bytes()).collect();
            if kind == OUT {
                self.disk.poke(data, &bytes);
            } else {
                self.disk.poke(data, &vec![0xcc; len]);
            }
            let half = (len / 2) as u32;
            let part =
                |offset: u32| Segment { address: data + u64::from(offset), len: half, writable: kind == IN };
            let chain = [Segment::readable(head_at, 16), part(0), part(half), Segment::writable(status, 1)];
            // Three descriptors of four are enough for DEPTH requests, so some have to wait.
            let Ok(head) = self.disk.driver.submit(0, &chain) else { break };
            if kind == OUT {
                self.model[sector as usize * SECTOR..][..len].copy_from_slice(&bytes);
            }
            self.pending.insert(head, (at, kind, sector as usize * SECTOR, len));
            if self.random.next().is_multiple_of(8) {
                self.disk.driver.notify(0).unwrap();
            }
        }
        self.disk.driver.notify(0).unwrap();
    }

    fn check(&mut self, used: (u16, u32)) {
        let (head, written) = used;
        let (at, kind, offset, len) = self.pending.remove(&head).unwrap();
        let [_, data, status] = self.places[at];
        assert_eq!(self.disk.driver.peek(status, 1).unwrap(), [OK]);
        if kind == IN {
            assert_eq!(written as usize, len + 1);
            assert!(self.disk.driver.peek(data, len).unwrap() == self.model[offset..offset + len]);
        } else {
            assert_eq!(written, 1);
        }
    }

    /// Takes what is there, or all.
    fn collect(&mut self, all: bool) {
        while !self.pending.is_empty() {
            let used = if all {
                Some(self.disk.driver.wait_used(0, LIMIT).unwrap())
            } else {
                self.disk.driver.used(0).unwrap()
            };
            match used {
                Some(used) => self.check(used),
                None => break,
            }
        }
    }
}

#[test]
fn stopped_and_started_under_load_no_byte_is_lost() {
    for engine in ENGINES {
        let event_index = VIRTIO_F_VERSION_1 | VIRTIO_F_EVENT_IDX;
        for (features, rounds) in [(!0, ROUNDS), (VIRTIO_F_VERSION_1, ROUNDS / 4), (event_index, ROUNDS / 4)]
        {
            let mut load = Load::new(engine, features);
            for round in 0..rounds {
                load.submit();
                if round % 3 == 0 {
                    load.collect(false);
                }
                if round % 20 == 19 {
                    save_reset_restore(&mut load.disk.driver.device).unwrap();
                } else {
                    load.disk.quiesce();
                    let view = load.disk.driver.memory().view();
                    let [_, _, used] = load.disk.driver.ring_addresses(0).unwrap();
                    let region = view.iter().next().unwrap();
                    assert!(region.bitmap().dirty_at(used as usize), "the used ring was written");
                    load.disk.driver.device.resume().unwrap();
                }
                load.collect(false);
            }
            load.collect(true);
            assert!(load.disk.on_host(0, load.model.len()) == load.model, "{engine}, {features:#x}");
        }
    }
}
