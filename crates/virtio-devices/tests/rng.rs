//! The entropy source through its registers and rings.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "tests fail by panicking")]

use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use vmm_device_model::device::Lifecycle;
use vmm_device_model::metrics::{Measures, Metered, Value};
use vmm_device_model::testing::save_reset_restore;
use vmm_virtio_devices::rng::{DEFAULT_SOURCE, RngDevice};
use vmm_virtio_devices::testing::{Segment, TestDriver, hostile_chains};

const MEMORY: usize = 1 << 20;
const LIMIT: Duration = Duration::from_secs(10);

fn on_bus(source: &Path) -> TestDriver {
    TestDriver::new(Box::new(RngDevice::new("_rng", source).unwrap()), MEMORY).unwrap()
}

fn running(source: &Path) -> TestDriver {
    let mut driver = on_bus(source);
    driver.start(!0).unwrap();
    driver
}

#[test]
fn buffers_are_filled_and_differ() {
    let mut driver = running(Path::new(DEFAULT_SOURCE));
    let at = driver.allocate(0x1000, 16).unwrap();
    let chain = [Segment::writable(at, 64), Segment::writable(at + 0x100, 64)];
    assert_eq!(driver.request(0, &chain).unwrap(), 128);
    let (first, second) = (driver.peek(at, 64).unwrap(), driver.peek(at + 0x100, 64).unwrap());
    assert_ne!(first, second);
    assert_ne!(first, [0; 64]);
    assert_eq!(driver.peek(at + 64, 64).unwrap(), [0; 64], "nothing besides");
    assert_eq!(driver.interrupts(1), 1);
}

#[test]
fn one_request_gets_a_bounded_amount() {
    let mut driver = running(Path::new(DEFAULT_SOURCE));
    let at = driver.allocate(0x2_0000, 16).unwrap();
    assert_eq!(driver.request(0, &[Segment::writable(at, 0x2_0000)]).unwrap(), 0x1_0000);
    assert_eq!(driver.peek(at + 0x1_0000, 64).unwrap(), [0; 64]);
}

#[test]
fn a_source_that_ends_or_cannot_be_read_gives_nothing() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&[7; 10]).unwrap();
    let mut driver = running(file.path());
    let at = driver.allocate(64, 16).unwrap();
    assert_eq!(driver.request(0, &[Segment::writable(at, 64)]).unwrap(), 10);
    assert_eq!(driver.request(0, &[Segment::writable(at, 64)]).unwrap(), 0);
    assert_eq!(driver.peek(at, 10).unwrap(), [7; 10]);
    assert!(RngDevice::new("_rng", Path::new("/nonexistent/source")).is_err());
    assert!(RngDevice::new("_rng", Path::new("/")).is_err(), "a directory");
}

#[test]
fn a_source_with_nothing_yet_keeps_the_request_over_a_pause() {
    // An empty FIFO stands for an empty pool.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("fifo");
    let made = std::process::Command::new("mkfifo").arg(&path).status().unwrap();
    assert!(made.success());
    let device = RngDevice::new("_rng", &path).unwrap();
    let mut pool = std::fs::File::options().write(true).open(&path).unwrap();
    let mut driver = TestDriver::new(Box::new(device), MEMORY).unwrap();
    driver.start(!0).unwrap();
    let at = driver.allocate(64, 16).unwrap();
    driver.submit(0, &[Segment::writable(at, 64)]).unwrap();
    driver.kick(0);
    for _ in 0..3 {
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(driver.used(0).unwrap(), None);
        driver.device.quiesce_begin();
        driver.device.quiesce_finish(Instant::now() + LIMIT).unwrap();
        driver.device.resume().unwrap();
    }
    pool.write_all(b"entropy").unwrap();
    let (_, len) = driver.wait_used(0, LIMIT).unwrap();
    assert_eq!((len, driver.peek(at, 7).unwrap()), (7, b"entropy".to_vec()));
}

#[test]
fn state_and_hostile_chains() {
    let mut driver = running(Path::new(DEFAULT_SOURCE));
    save_reset_restore(&mut driver.device).unwrap();
    driver.probe().unwrap();
    let at = driver.allocate(64, 16).unwrap();
    assert_eq!(driver.request(0, &[Segment::writable(at, 64)]).unwrap(), 64);
    hostile_chains(&mut driver, 0).unwrap();
    assert_eq!(driver.request(0, &[Segment::writable(1 << 40, 64)]).unwrap(), 0, "outside memory");
    assert_eq!(driver.request(0, &[Segment::readable(0x4000, 64)]).unwrap(), 0, "not writable");
}

#[test]
fn what_the_guest_got_is_counted_over_a_reset() {
    let mut driver = running(Path::new(DEFAULT_SOURCE));
    let at = driver.allocate(64, 16).unwrap();
    driver.request(0, &[Segment::writable(at, 50)]).unwrap();
    driver.request(0, &[Segment::writable(1 << 40, 64)]).unwrap();
    save_reset_restore(&mut driver.device).unwrap();
    driver.request(0, &[Segment::writable(at, 7)]).unwrap();
    let mut measures = Measures::of_device("_rng");
    driver.device.measure(&mut measures);
    let samples = measures.into_parts().1;
    assert_eq!((samples[0].family.name, &samples[0].value), ("vmm_rng_bytes", &Value::Counter(57)));
}
