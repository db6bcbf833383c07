//! The disk through its registers and rings: what a good driver gets.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "tests fail by panicking")]

mod common;

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::time::Instant;

use common::{
    DISCARD, ENGINES, FLUSH, GET_ID, IN, IO_ERROR, LIMIT, OK, SECTOR, Setup, TestDisk, UNSUPPORTED,
    WRITE_ZEROES, pattern,
};
use vmm_device_model::metrics::{Measures, Metered, Sample, Value};
use vmm_device_model::testing::{Xorshift, save_reset_restore};
use vmm_virtio_devices::block::BlockCounts;
use vmm_virtio_devices::testing::Segment;
use vmm_virtio_devices::transport::{VIRTIO_F_EVENT_IDX, VIRTIO_F_VERSION_1};

const FLUSH_FEATURE: u64 = 1 << 9;

fn each_engine(test: impl Fn(TestDisk)) {
    for engine in ENGINES {
        test(Setup { engine, ..Setup::default() }.running());
    }
}

#[test]
fn reads_and_writes_reach_the_image() {
    each_engine(|mut disk| {
        assert_eq!(disk.read(5, SECTOR), pattern(5));
        let written: Vec<u8> = (0..8 * SECTOR).map(|i| (i % 241) as u8).collect();
        disk.write(100, &written);
        assert_eq!(disk.on_host(100, written.len()), written);
        assert_eq!(disk.read(100, written.len()), written);
        assert_eq!(disk.read(99, SECTOR), pattern(99));
        assert_eq!(disk.read(2047, SECTOR), pattern(2047));
        assert_eq!(disk.request(FLUSH, 0, &[]), (OK, 1));
    });
}

#[test]
fn the_serial_number_is_padded_to_twenty_bytes() {
    let mut disk = Setup::default().running();
    let data = disk.data;
    disk.poke(data, &[0xaa; 32]);
    assert_eq!(disk.request(GET_ID, 0, &[Segment::writable(data, 32)]), (OK, 21));
    let mut expected = b"serial-of-test".to_vec();
    expected.resize(20, 0);
    expected.resize(32, 0xaa);
    assert_eq!(disk.driver.peek(data, 32).unwrap(), expected);
    assert_eq!(disk.request(GET_ID, 0, &[Segment::writable(data, 19)]), (IO_ERROR, 1));
}

#[test]
fn zeroes_and_discards() {
    each_engine(|mut disk| {
        for (start, flags) in [(10, 0), (20, 1)] {
            assert_eq!(disk.range(WRITE_ZEROES, start, 3, flags), OK);
            assert_eq!(disk.on_host(start, 3 * SECTOR), vec![0; 3 * SECTOR]);
            assert_eq!(disk.on_host(start + 3, SECTOR), pattern(start + 3));
        }
        assert_eq!(disk.range(DISCARD, 40, 8, 0), OK);
        assert_eq!(disk.range(DISCARD, 40, 8, 1), UNSUPPORTED, "no unmap bit in a discard");
        assert_eq!(disk.range(WRITE_ZEROES, 40, 8, 2), UNSUPPORTED, "a reserved bit");
        assert_eq!(disk.range(WRITE_ZEROES, 2047, 2, 0), IO_ERROR, "past the end");
        assert_eq!(disk.range(WRITE_ZEROES, u64::MAX / 256, 2, 0), IO_ERROR);
        assert_eq!(disk.range(WRITE_ZEROES, 0, u32::MAX, 0), IO_ERROR);
        assert_eq!(disk.on_host(2047, SECTOR), pattern(2047));
    });
}

#[test]
fn counters_have_the_contracts_names_and_latencies_only_what_was_timed() {
    each_engine(|mut disk| {
        let told = |disk: &TestDisk| {
            let mut measures = Measures::of_device("_disk0");
            disk.driver.device.measure(&mut measures);
            let (counters, samples) = measures.into_parts();
            (BTreeMap::from_iter(counters), samples)
        };
        let names = |counters: &BTreeMap<&str, u64>| counters.keys().copied().collect::<Vec<_>>().join(" ");
        let (counters, samples) = told(&disk);
        assert_eq!(names(&counters), "read_bytes read_ops write_bytes write_ops");
        assert!(samples.iter().all(|sample| sample.value.kind() == sample.family.kind), "{samples:?}");
        for _ in 0..3 {
            disk.read(0, 2 * SECTOR);
        }
        let (counters, samples) = told(&disk);
        assert_eq!(
            names(&counters),
            "read_bytes read_latency_avg read_latency_max read_latency_min read_ops write_bytes write_ops"
        );
        assert_eq!((counters["read_ops"], counters["read_bytes"]), (3, 3072));
        let [min, avg, max] = ["min", "avg", "max"].map(|name| counters[&*format!("read_latency_{name}")]);
        assert!(min <= avg && avg <= max && max < 60_000_000, "{min} {avg} {max} us");
        disk.write(5, &[1; SECTOR]);
        assert!(told(&disk).0.contains_key("write_latency_max"));

        let find = |name: &str, label: (&str, &str)| {
            let has = |sample: &&Sample| {
                let label = (label.0, label.1.to_owned());
                sample.family.name == name && sample.labels.contains(&label)
            };
            samples.iter().find(has).unwrap_or_else(|| panic!("no {name} of {label:?}")).value.clone()
        };
        assert_eq!(find("vmm_block_bytes", ("op", "read")), Value::Counter(3072));
        assert_eq!(find("vmm_block_bytes", ("op", "write")), Value::Counter(0));
        assert_eq!(find("vmm_block_in_flight", ("queue", "0")), Value::Gauge(0));
        assert!(matches!(find("vmm_virtio_interrupts", ("queue", "0")), Value::Counter(1..=3)));
        match find("vmm_block_latency_seconds", ("op", "read")) {
            Value::Histogram { counts, sum, .. } => {
                assert_eq!(counts.iter().sum::<u64>(), 3);
                assert!(sum > 0.0, "{sum}");
            }
            other => panic!("{other:?}"),
        }
    });
}

#[test]
fn what_was_done_is_counted() {
    each_engine(|mut disk| {
        disk.read(0, 3 * SECTOR);
        disk.read(0, SECTOR);
        disk.write(5, &[1; 2 * SECTOR]);
        disk.request(IN, 1 << 40, &[]);
        let expected = BlockCounts { read_bytes: 2048, write_bytes: 1024, read_ops: 2, write_ops: 1 };
        assert_eq!(disk.counters.get(), expected, "without what failed");
        disk.driver.reset().unwrap();
        assert_eq!(disk.counters.get(), expected, "over a reset");
    });
}

#[test]
fn other_requests_are_unsupported() {
    let mut disk = Setup::default().running();
    for kind in [2, 3, 5, 14, 15, 0x8000_0000, u32::MAX] {
        assert_eq!(disk.request(kind, 0, &[]), (UNSUPPORTED, 1), "{kind}");
    }
}

#[test]
fn a_read_only_disk_says_so_and_stays_as_it_is() {
    let mut disk = Setup { read_only: true, ..Setup::default() }.running();
    assert_ne!(disk.driver.offered() & 1 << 5, 0);
    assert_eq!(disk.driver.offered() & (1 << 13 | 1 << 14), 0);
    let data = disk.data;
    assert_eq!(disk.request(common::OUT, 3, &[Segment::readable(data, 512)]), (IO_ERROR, 1));
    assert_eq!(disk.range(WRITE_ZEROES, 3, 1, 0), UNSUPPORTED);
    assert_eq!(disk.range(DISCARD, 3, 1, 0), UNSUPPORTED);
    assert_eq!(disk.read(3, SECTOR), pattern(3));
}

#[test]
fn a_disk_that_is_not_sparse_keeps_its_storage() {
    for engine in ENGINES {
        let mut disk = Setup { sparse: false, engine, ..Setup::default() }.running();
        assert_eq!(disk.driver.offered() & (1 << 13 | 1 << 14), 1 << 14, "zeroes, no discards");
        let mut space = [0xff; 60];
        disk.driver.read_config(0, &mut space);
        assert_eq!((&space[36..48], space[56]), (&[0; 12][..], 0), "nor are they described");
        disk.file.sync_all().unwrap();
        let blocks = |disk: &TestDisk| disk.file.metadata().unwrap().blocks();
        let before = blocks(&disk);
        assert_eq!(disk.range(DISCARD, 64, 64, 0), UNSUPPORTED);
        assert_eq!(disk.on_host(64, SECTOR), pattern(64));
        assert_eq!(disk.range(WRITE_ZEROES, 64, 64, 1), OK, "unmapping is a wish");
        assert_eq!(disk.on_host(64, 64 * SECTOR), vec![0; 64 * SECTOR]);
        disk.file.sync_all().unwrap();
        assert_eq!(blocks(&disk), before);
    }
}

#[test]
fn what_was_not_negotiated_is_unsupported() {
    let mut disk = Setup::default().on_bus();
    disk.start(!(1 << 13 | 1 << 14));
    assert_eq!(disk.range(DISCARD, 40, 8, 0), UNSUPPORTED);
    assert_eq!(disk.range(WRITE_ZEROES, 40, 8, 0), UNSUPPORTED);
    assert_eq!(disk.on_host(40, 8 * SECTOR)[..SECTOR], pattern(40));
    disk.works();
}

#[test]
fn the_configuration_space_describes_the_disk() {
    let disk = Setup { queues: 3, ..Setup::default() }.on_bus();
    let mut space = [0xff; 64];
    disk.driver.read_config(0, &mut space);
    let le = |at: usize, len: usize| space[at..at + len].iter().rev().fold(0, |n, b| n << 8 | u64::from(*b));
    assert_eq!(le(0, 8), 2048, "capacity in sectors");
    assert_eq!(le(12, 4), 126, "segments: the queue without header and status");
    assert_eq!(le(20, 4), 512, "block size");
    assert_eq!((le(32, 1), le(34, 2)), (1, 3), "writeback, queues");
    assert_eq!((le(40, 4), le(52, 4)), (1, 1), "ranges per request");
    assert_eq!(le(60, 4), 0, "past the end");
    disk.driver.write_config(0, &[0xff; 8]);
    disk.driver.write_config(32, &[0]);
    let mut after = [0; 64];
    disk.driver.read_config(0, &mut after);
    space[32] = 0;
    assert_eq!(after, space, "the cache mode alone can be written");
    assert_ne!(disk.driver.offered() & 1 << 12, 0, "multi-queue");
    assert_eq!(Setup::default().on_bus().driver.offered() & 1 << 12, 0, "one queue is not many");
}

#[test]
fn any_framing_of_a_request_is_understood() {
    each_engine(|mut disk| {
        // The header in three buffers, one of them empty, the data joined to it and to the status.
        let base = disk.data;
        let payload = vec![9_u8; SECTOR];
        disk.poke(base, &common::header(common::OUT, 60));
        disk.poke(base + 16, &payload);
        disk.poke(base + 0x1000, &[common::UNTOUCHED]);
        let chain = [
            Segment::readable(base, 3),
            Segment::readable(base + 3, 0),
            Segment::readable(base + 3, 13 + 100),
            Segment::readable(base + 116, 412),
            Segment::writable(base + 0x1000, 1),
        ];
        assert_eq!(disk.driver.request(0, &chain).unwrap(), 1);
        assert_eq!(disk.driver.peek(base + 0x1000, 1).unwrap(), [OK]);
        assert_eq!(disk.on_host(60, SECTOR), payload);
        // A read whose last buffer holds the status behind the data.
        disk.poke(base, &common::header(IN, 61));
        let chain = [
            Segment::readable(base, 16),
            Segment::writable(base + 0x1000, 500),
            Segment::writable(base + 0x2000, 13),
        ];
        assert_eq!(disk.driver.request(0, &chain).unwrap(), 513);
        assert_eq!(disk.driver.peek(base + 0x1000, 500).unwrap(), pattern(61)[..500]);
        let tail = disk.driver.peek(base + 0x2000, 13).unwrap();
        assert_eq!((&tail[..12], tail[12]), (&pattern(61)[..12], OK));
    });
}

#[test]
fn many_queues_work_side_by_side() {
    for engine in ENGINES {
        let mut disk = Setup { queues: 4, engine, ..Setup::default() }.running();
        let mut places = Vec::new();
        for queue in 0..4 {
            let header = disk.driver.place(&common::header(IN, u64::from(queue))).unwrap();
            let (data, status) =
                (disk.driver.allocate(SECTOR, 16).unwrap(), disk.driver.allocate(1, 1).unwrap());
            let chain = [
                Segment::readable(header, 16),
                Segment::writable(data, SECTOR as u32),
                Segment::writable(status, 1),
            ];
            disk.driver.submit(queue, &chain).unwrap();
            disk.driver.notify(queue).unwrap();
            places.push(data);
        }
        for (queue, data) in (0..4).zip(places) {
            disk.driver.wait_used(queue, LIMIT).unwrap();
            assert_eq!(disk.driver.peek(data, SECTOR).unwrap(), pattern(queue.into()));
        }
    }
}

#[test]
fn works_without_event_index_and_without_write_back() {
    for features in [VIRTIO_F_VERSION_1, VIRTIO_F_VERSION_1 | VIRTIO_F_EVENT_IDX, !FLUSH_FEATURE] {
        for engine in ENGINES {
            let mut disk = Setup { engine, ..Setup::default() }.on_bus();
            disk.start(features);
            // Through the cache mode of the configuration space, too, where it counts.
            disk.driver.write_config(32, &[0]);
            disk.write(9, &[0x5a; 1024]);
            assert_eq!(disk.on_host(9, 1024), [0x5a; 1024]);
            assert_eq!(disk.read(9, 1024), [0x5a; 1024]);
        }
    }
}

#[test]
fn state_survives_save_reset_restore() {
    let mut disk = Setup { queues: 2, ..Setup::default() }.running();
    disk.driver.write_config(32, &[0]);
    disk.write(1, &[7; SECTOR]);
    let record = save_reset_restore(&mut disk.driver.device).unwrap();
    disk.driver.probe().unwrap();
    assert_eq!(disk.read(1, SECTOR), [7; SECTOR]);
    let mut writeback = [9];
    disk.driver.read_config(32, &mut writeback);
    assert_eq!(writeback, [0]);
    assert_eq!(save_reset_restore(&mut disk.driver.device).unwrap().kind, record.kind);
}

#[test]
fn a_driver_is_interrupted_when_it_wants_to_be() {
    for features in [!0, VIRTIO_F_VERSION_1] {
        let mut disk = Setup::default().on_bus();
        disk.start(features);
        let (header, status) = disk.frame(IN, 0);
        let chain = [header, Segment::writable(disk.data, SECTOR as u32), status];
        for count in 1..=20 {
            disk.driver.submit(0, &chain).unwrap();
            disk.driver.notify(0).unwrap();
            // It looks at the ring only then: a driver that was quicker wants no interrupt any more.
            let end = Instant::now() + LIMIT;
            while disk.driver.interrupts(1) < count {
                assert!(Instant::now() < end, "request {count} has no interrupt");
                std::thread::yield_now();
            }
            assert!(disk.driver.used(0).unwrap().is_some());
            assert_eq!(disk.driver.interrupts(1), count);
        }
    }
}

#[test]
fn a_driver_that_polls_is_left_alone() {
    let mut disk = Setup::default().on_bus();
    disk.start(VIRTIO_F_VERSION_1);
    let [_, available, _] = disk.driver.ring_addresses(0).unwrap();
    disk.poke(available, &[1, 0]);
    for _ in 0..20 {
        disk.works();
    }
    disk.quiesce();
    assert_eq!(disk.driver.interrupts(1), 0);
}

/// Requests come at every moment of the thread's way to sleep; each kick is made only if the device asks for it.
#[test]
fn no_kick_is_lost_on_the_way_to_sleep() {
    for features in [!0, VIRTIO_F_VERSION_1] {
        let mut disk = Setup::default().on_bus();
        disk.start(features);
        let (header, status) = disk.frame(IN, 0);
        let chain = [header, Segment::writable(disk.data, SECTOR as u32), status];
        let mut random = Xorshift::new(5);
        for _ in 0..5_000 {
            disk.driver.submit(0, &chain).unwrap();
            disk.driver.notify(0).unwrap();
            disk.driver.wait_used(0, LIMIT).unwrap();
            for _ in 0..random.next() % 400 {
                std::hint::spin_loop();
            }
        }
    }
}
