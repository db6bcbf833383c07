//! The console through its registers and rings.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "tests fail by panicking")]

use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vmm_device_model::device::{Lifecycle, SaveState};
use vmm_device_model::metrics::{Measures, Metered, Value};
use vmm_device_model::testing::save_reset_restore;
use vmm_virtio_devices::console::{ConsoleDevice, ConsoleInput, ConsoleV1};
use vmm_virtio_devices::testing::{Segment, TestDriver, hostile_chains};
use vmm_virtio_devices::transport::VIRTIO_F_VERSION_1;

const MEMORY: usize = 4 << 20;
const LIMIT: Duration = Duration::from_secs(10);
const CAPACITY: usize = 64 * 1024;
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;

/// Takes at most 1000 bytes at a time, and none when it is stuck.
#[derive(Clone, Default)]
struct Screen(Arc<Mutex<(Vec<u8>, bool)>>);

impl Screen {
    fn text(&self) -> Vec<u8> {
        self.0.lock().unwrap().0.clone()
    }

    fn set_stuck(&self, stuck: bool) {
        self.0.lock().unwrap().1 = stuck;
    }
}

impl Write for Screen {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let (text, stuck) = &mut *self.0.lock().unwrap();
        if *stuck {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let count = bytes.len().min(1000);
        text.extend(&bytes[..count]);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn running(features: u64) -> (TestDriver, ConsoleInput, Screen) {
    let screen = Screen::default();
    let device = ConsoleDevice::new("_console", Box::new(screen.clone()), (80, 25)).unwrap();
    let input = device.input();
    let mut driver = TestDriver::new(Box::new(device), MEMORY).unwrap();
    driver.start(features).unwrap();
    (driver, input, screen)
}

fn print(driver: &mut TestDriver, text: &[u8]) {
    let at = driver.place(text).unwrap();
    assert_eq!(driver.request(TRANSMIT, &[Segment::readable(at, text.len() as u32)]).unwrap(), 0);
}

/// Gives the device a buffer and waits for what is typed into it.
fn typed(driver: &mut TestDriver, len: u32) -> Vec<u8> {
    let at = driver.allocate(len as usize, 16).unwrap();
    let count = driver.request(RECEIVE, &[Segment::writable(at, len)]).unwrap();
    driver.peek(at, count as usize).unwrap()
}

#[test]
fn bytes_are_counted_both_ways() {
    let (mut driver, input, _) = running(!0);
    print(&mut driver, &[b'x'; 5000]);
    assert_eq!(input.enqueue(b"abc"), 3);
    assert_eq!(typed(&mut driver, 2), b"ab");
    let mut measures = Measures::of_device("_console");
    driver.device.measure(&mut measures);
    let samples = measures.into_parts().1;
    let told: Vec<_> = samples.iter().map(|sample| (sample.family.name, sample.value.clone())).collect();
    assert_eq!(told[0], ("vmm_console_input_bytes", Value::Counter(2)), "the third is still the host's");
    assert_eq!(told[1], ("vmm_console_output_bytes", Value::Counter(5000)));
}

#[test]
fn output_reaches_the_screen_in_order() {
    for features in [!0, VIRTIO_F_VERSION_1] {
        let (mut driver, _, screen) = running(features);
        let mut expected = Vec::new();
        for i in 0..300_usize {
            let line = vec![b'a' + (i % 26) as u8; 1 + i * 37 % 5000];
            print(&mut driver, &line);
            expected.extend(line);
        }
        assert_eq!(screen.text(), expected);
    }
}

#[test]
fn a_stuck_screen_stalls_nobody() {
    let (mut driver, _, screen) = running(!0);
    screen.set_stuck(true);
    for _ in 0..1000 {
        print(&mut driver, b"lost");
    }
    screen.set_stuck(false);
    print(&mut driver, b"seen");
    assert_eq!(screen.text(), b"seen");
}

#[test]
fn input_waits_for_buffers_and_buffers_for_input() {
    for features in [!0, VIRTIO_F_VERSION_1] {
        let (mut driver, input, _) = running(features);
        assert_eq!(input.enqueue(b"typed ahead"), 11);
        assert_eq!(typed(&mut driver, 5), b"typed");
        assert_eq!(typed(&mut driver, 64), b" ahead");
        let at = driver.allocate(64, 16).unwrap();
        driver.submit(RECEIVE, &[Segment::writable(at, 64)]).unwrap();
        driver.kick(RECEIVE);
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(driver.used(RECEIVE).unwrap(), None);
        input.enqueue(b"x");
        assert_eq!(driver.wait_used(RECEIVE, LIMIT).unwrap().1, 1);
        assert_eq!(driver.interrupts(1), 3);
    }
}

#[test]
fn input_is_bounded_and_arrives_whole() {
    let (mut driver, input, _) = running(!0);
    let text: Vec<u8> = (0..CAPACITY + 100).map(|i| (i % 251) as u8).collect();
    assert_eq!(input.enqueue(&text), CAPACITY);
    assert_eq!((input.enqueue(b"more"), input.room()), (0, 0));
    let mut got = Vec::new();
    while got.len() < CAPACITY {
        got.extend(typed(&mut driver, 10_000));
    }
    assert_eq!(got, text[..CAPACITY]);
    assert_eq!(input.room(), CAPACITY);
}

#[test]
fn who_was_refused_is_told_once_there_is_room() {
    let told = Arc::new(AtomicU64::new(0));
    let device = ConsoleDevice::new("_console", Box::new(Screen::default()), (80, 25)).unwrap();
    let teller = Arc::clone(&told);
    device.on_room(Box::new(move || {
        teller.fetch_add(1, Ordering::SeqCst);
    }));
    let input = device.input();
    let mut driver = TestDriver::new(Box::new(device), MEMORY).unwrap();
    driver.start(!0).unwrap();
    let empty = |driver: &mut TestDriver| {
        while input.room() < CAPACITY {
            typed(driver, 4096);
        }
        told.swap(0, Ordering::SeqCst)
    };
    assert_eq!(input.enqueue(&[1; CAPACITY]), CAPACITY);
    assert_eq!(empty(&mut driver), 0, "nobody was refused");
    for _ in 0..2 {
        assert_eq!(input.enqueue(&[1; CAPACITY + 1]), CAPACITY);
        typed(&mut driver, 4096);
        assert_eq!(told.load(Ordering::SeqCst), 0, "not for every little room");
        assert_eq!(empty(&mut driver), 1);
    }
}

#[test]
fn a_restore_that_makes_room_tells_too() {
    let told = Arc::new(AtomicU64::new(0));
    let mut device = ConsoleDevice::new("_console", Box::new(Screen::default()), (80, 25)).unwrap();
    let teller = Arc::clone(&told);
    device.on_room(Box::new(move || {
        teller.fetch_add(1, Ordering::SeqCst);
    }));
    let empty = device.save();
    device.input().enqueue(&[1; CAPACITY + 1]);
    device.restore(empty).unwrap();
    assert_eq!(told.load(Ordering::SeqCst), 1);
}

#[test]
fn the_size_is_in_the_configuration_and_its_change_an_interrupt() {
    let (mut driver, input, _) = running(!0);
    let size = |driver: &TestDriver| {
        let mut space = [0xff; 16];
        driver.read_config(0, &mut space);
        assert_eq!(space[4..], [0; 12]);
        (u16::from_le_bytes([space[0], space[1]]), u16::from_le_bytes([space[2], space[3]]))
    };
    assert_eq!(size(&driver), (80, 25));
    driver.write_config(0, &[1; 8]);
    input.resize(80, 25);
    assert_eq!((size(&driver), driver.interrupts(0)), ((80, 25), 0), "no change, no interrupt");
    input.resize(132, 50);
    assert_eq!((size(&driver), driver.interrupts(0)), ((132, 50), 1));
    driver.device.quiesce_begin();
    driver.device.quiesce_finish(Instant::now() + LIMIT).unwrap();
    input.resize(100, 40);
    assert_eq!(driver.interrupts(0), 1, "not while the VM is paused");
    driver.device.resume().unwrap();
    assert_eq!((size(&driver), driver.interrupts(0)), ((100, 40), 2));
}

#[test]
fn a_driver_restored_elsewhere_looks_at_the_size_again() {
    let (mut driver, input, _) = running(!0);
    driver.device.quiesce_begin();
    driver.device.quiesce_finish(Instant::now() + LIMIT).unwrap();
    // The driver has seen 80 by 25 only.
    input.resize(132, 50);
    let state = driver.device.save();
    let device = ConsoleDevice::new("_console", Box::new(io::sink()), (132, 50)).unwrap();
    let mut target = TestDriver::new(Box::new(device), MEMORY).unwrap();
    target.device.restore(state).unwrap();
    target.device.resume().unwrap();
    assert_eq!(target.interrupts(0), 1);
}

#[test]
fn what_was_typed_survives_save_reset_restore() {
    let (mut driver, input, screen) = running(!0);
    input.enqueue(b"pending");
    save_reset_restore(&mut driver.device).unwrap();
    driver.probe().unwrap();
    assert_eq!(typed(&mut driver, 64), b"pending");
    print(&mut driver, b"still here");
    assert_eq!(screen.text(), b"still here");

    // To another device of the same kind.
    let mut other = ConsoleDevice::new("_console", Box::new(io::sink()), (1, 1)).unwrap();
    let state = ConsoleV1 { columns: 9, rows: 8, typed: b"text".to_vec() };
    other.restore(state.clone()).unwrap();
    assert_eq!(other.save(), state);
    assert!(other.restore(ConsoleV1 { typed: vec![0; CAPACITY + 1], ..state.clone() }).is_err());
    other.restore(ConsoleV1 { typed: vec![0; CAPACITY], ..state }).unwrap();
}

#[test]
fn hostile_chains_in_both_queues() {
    let (mut driver, input, screen) = running(!0);
    hostile_chains(&mut driver, TRANSMIT).unwrap();
    input.enqueue(&[b'x'; 4096]);
    hostile_chains(&mut driver, RECEIVE).unwrap();
    // What a bad chain could not take is still there, in order.
    let left = CAPACITY - input.room();
    let mut got = 0;
    while got < left {
        got += typed(&mut driver, 1000).len();
    }
    let before = screen.text().len();
    print(&mut driver, b"ok");
    assert_eq!(screen.text()[before..], *b"ok");
    // More at once than anybody sends: bounded, and the device goes on.
    let at = driver.allocate(1 << 20, 16).unwrap();
    let huge = vec![Segment::readable(at, 1 << 20); 200];
    assert_eq!(driver.request(TRANSMIT, &huge).unwrap(), 0);
    assert_eq!(screen.text().len(), before + 2 + (1 << 20));
}
