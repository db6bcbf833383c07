//! The virtio-pci transport through its registers, with a device that echoes.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "tests fail by panicking")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use vmm_device_model::device::{
    Blocker, Blocks, DeviceChange, DeviceError, Lifecycle, SaveRecord, SaveState,
};
use vmm_device_model::doorbell::DoorbellAddress;
use vmm_device_model::metrics::Metered;
use vmm_device_model::testing::{Xorshift, fuzz_registers, save_reset_restore};
use vmm_fuzzing::rounds;
use vmm_pci::bdf::FUNCTION_CONFIG_SIZE;
use vmm_pci::host_bridge::{CONFIG_PORTS_LEN, REGION_ECAM, REGION_PORTS};
use vmm_snapshot::{NoState, RecordError};
use vmm_virtio_devices::device::{DeviceConfig, Start, VirtioDevice};
use vmm_virtio_devices::testing::{EchoDevice, Segment, TestDriver, hostile_chains};
use vmm_virtio_devices::transport::layout::{BAR_SIZE, COMMON, ISR, NOTIFY};
use vmm_virtio_devices::transport::status::{
    ACKNOWLEDGE, DRIVER, DRIVER_OK, FAILED, FEATURES_OK, NEEDS_RESET,
};
use vmm_virtio_devices::transport::{NO_VECTOR, Phase, VIRTIO_F_EVENT_IDX, VIRTIO_F_VERSION_1, VirtioPciV1};

const MEMORY: usize = 1 << 20;
const ALL: u64 = VIRTIO_F_VERSION_1 | VIRTIO_F_EVENT_IDX;
const LIMIT: Duration = Duration::from_secs(10);

fn driver() -> TestDriver {
    TestDriver::new(Box::new(EchoDevice::new()), MEMORY).unwrap()
}

fn running() -> TestDriver {
    let mut driver = driver();
    driver.start(ALL).unwrap();
    driver
}

/// One request that must come back as it was sent.
fn echo(driver: &mut TestDriver, queue: u16, text: &[u8]) {
    let from = driver.place(text).unwrap();
    let to = driver.allocate(text.len(), 16).unwrap();
    let len = text.len() as u32;
    let chain = [Segment::readable(from, len), Segment::writable(to, len)];
    assert_eq!(driver.request(queue, &chain).unwrap(), len);
    assert_eq!(driver.peek(to, text.len()).unwrap(), text);
}

fn quiesce(driver: &mut TestDriver) {
    driver.device.quiesce_begin();
    driver.device.quiesce_finish(Instant::now() + LIMIT).unwrap();
}

#[test]
fn identity_and_capabilities() {
    let driver = driver();
    let bdf = driver.device.bdf();
    let mut head = [0; 64];
    driver.resources.config_read(bdf, 0, &mut head);
    assert_eq!(head[..4], [0xf4, 0x1a, 0x7f, 0x10], "vendor, device 0x1040 + type");
    assert_eq!(head[8], 1, "revision of a modern device");
    assert_eq!(head[0x3d], 0, "no INTx pin");
    let mut kinds = Vec::new();
    let mut at = u16::from(head[0x34]);
    while at != 0 {
        let mut cap = [0; 20];
        driver.resources.config_read(bdf, at, &mut cap);
        let place = |i: usize| u32::from_le_bytes(cap[i..i + 4].try_into().unwrap());
        if cap[0] == 9 {
            kinds.push((cap[3], cap[2], place(8), place(12)));
        } else {
            assert_eq!((cap[0], place(4), place(8)), (0x11, 0x8000, 0x4_8000), "MSI-X in BAR 0");
            assert_eq!(cap[2..4], [2, 0x80], "three vectors, enabled");
        }
        at = u16::from(cap[1]);
    }
    let expected =
        [(1, 16, 0, 56), (3, 16, 0x2000, 1), (4, 16, 0x4000, 0x1000), (2, 20, 0x6000, 0x1000), (5, 20, 0, 0)];
    assert_eq!(kinds, expected);
}

#[test]
fn a_driver_negotiates_runs_and_is_interrupted() {
    let mut driver = driver();
    assert_eq!(driver.device.phase(), Phase::Reset);
    assert_eq!(driver.start(!0).unwrap(), ALL);
    assert!(driver.device.is_started());
    for queue in [0, 1] {
        echo(&mut driver, queue, b"one request");
        assert_eq!(driver.interrupts(queue + 1), 1);
    }
    for i in 0..1000_u32 {
        echo_with_doorbell(&mut driver, i);
    }
    assert_eq!(driver.interrupts(0), 0);
}

fn echo_with_doorbell(driver: &mut TestDriver, i: u32) {
    let view = driver.memory().view();
    vm_memory::Bytes::write_obj(&*view, i, vm_memory::GuestAddress(0x100)).unwrap();
    driver.submit(0, &[Segment::readable(0x100, 4), Segment::writable(0x200, 4)]).unwrap();
    driver.notify(0).unwrap();
    driver.wait_used(0, LIMIT).unwrap();
    assert_eq!(driver.peek(0x200, 4).unwrap(), i.to_le_bytes());
}

#[test]
fn features_not_offered_or_not_modern_do_not_stick() {
    for features in [0, VIRTIO_F_EVENT_IDX, ALL | 1, ALL | 1 << 63, !0] {
        let driver = driver();
        driver.set_status(ACKNOWLEDGE | DRIVER);
        driver.accept(features);
        driver.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
        assert_eq!(driver.status(), ACKNOWLEDGE | DRIVER, "{features:#x}");
        driver.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        assert_eq!(driver.status() & DRIVER_OK, 0, "no DRIVER_OK without FEATURES_OK");
        assert_eq!(driver.device.phase(), Phase::Configuring);
        assert_eq!(driver.resources.base.attention.take(), 0);
    }
}

#[test]
fn features_are_frozen_by_features_ok() {
    let mut driver = driver();
    driver.negotiate(VIRTIO_F_VERSION_1).unwrap();
    driver.accept(ALL);
    driver.write(COMMON + 8, &0_u32.to_le_bytes());
    assert_eq!(driver.read_u32(COMMON + 12), 0);
    driver.write(COMMON + 8, &1_u32.to_le_bytes());
    assert_eq!(driver.read_u32(COMMON + 12), 1);
    driver.write(COMMON, &2_u32.to_le_bytes());
    assert_eq!(driver.read_u32(COMMON + 4), 0, "no features beyond 64");
}

#[test]
fn status_bits_are_added_only_and_needs_reset_is_the_devices() {
    let mut driver = running();
    let all = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;
    for written in [ACKNOWLEDGE, DRIVER_OK, NEEDS_RESET, 0x30] {
        driver.set_status(written);
        assert_eq!(driver.status(), all);
    }
    driver.set_status(FAILED);
    assert_eq!(driver.status(), all | FAILED);
    driver.reset().unwrap();
}

#[test]
fn reset_takes_its_time_and_forgets_everything() {
    let mut driver = running();
    driver.write_config(0, &[7]);
    echo(&mut driver, 0, b"before");
    driver.set_status(0);
    assert_ne!(driver.status(), 0, "not done until the device's owner did it");
    driver.set_status(ACKNOWLEDGE);
    assert_eq!(driver.device.phase(), Phase::Resetting, "nothing overtakes a reset");
    driver.write(COMMON + 22, &1_u16.to_le_bytes());
    driver.service().unwrap();
    assert_eq!(driver.status(), 0);
    assert!(!driver.device.is_started());
    for queue in 0..2_u16 {
        driver.write(COMMON + 22, &queue.to_le_bytes());
        assert_eq!(driver.read_u16(COMMON + 28), 0, "not enabled");
        assert_eq!(driver.read_u16(COMMON + 26), NO_VECTOR);
        assert_eq!(driver.read_u32(COMMON + 32), 0);
    }
    let mut config = [1];
    driver.read_config(0, &mut config);
    assert_eq!(config, [0]);
    driver.start(ALL).unwrap();
    echo(&mut driver, 0, b"after");
}

#[test]
fn a_reset_that_overtakes_a_start_wins() {
    let mut driver = driver();
    driver.negotiate(ALL).unwrap();
    driver.set_up_queue(0, None).unwrap();
    driver.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    assert_eq!(driver.device.phase(), Phase::Starting);
    driver.set_status(0);
    assert_eq!(driver.device.phase(), Phase::Resetting);
    driver.service().unwrap();
    assert_eq!((driver.device.phase(), driver.status()), (Phase::Reset, 0));
    assert!(!driver.device.is_started());
}

#[test]
fn a_device_that_does_not_start_needs_reset_and_recovers() {
    let device = EchoDevice::new();
    let failing = device.failing();
    let mut driver = TestDriver::new(Box::new(device), MEMORY).unwrap();
    *failing.lock().unwrap() = true;
    assert!(driver.start(ALL).is_err());
    assert_eq!(driver.status() & NEEDS_RESET, NEEDS_RESET);
    assert_eq!(driver.interrupts(0), 1, "the driver is told");
    driver.start(ALL).unwrap();
    echo(&mut driver, 0, b"again");
}

#[test]
fn what_drivers_make_of_the_device_is_told_and_pauses_are_not() {
    use DeviceChange::{Activated, NeedsReset, Reset};
    let device = EchoDevice::new();
    let failing = device.failing();
    let mut driver = TestDriver::new(Box::new(device), MEMORY).unwrap();
    // Drivers reset what they find before they set it up: that is no reset of an active device.
    driver.negotiate(ALL).unwrap();
    driver.reset().unwrap();
    assert_eq!(driver.device.take_changes(), []);
    driver.start(ALL).unwrap();
    assert_eq!(driver.device.take_changes(), [Activated]);
    assert_eq!(driver.device.take_changes(), [], "each is told once");
    quiesce(&mut driver);
    driver.device.resume().unwrap();
    save_reset_restore(&mut driver.device).unwrap();
    assert_eq!(driver.device.take_changes(), []);
    driver.reset().unwrap();
    assert_eq!(driver.device.take_changes(), [Reset]);
    *failing.lock().unwrap() = true;
    assert!(driver.start(ALL).is_err());
    driver.reset().unwrap();
    driver.start(ALL).unwrap();
    assert_eq!(driver.device.take_changes(), [NeedsReset, Activated]);
    // One that is asked for just before a pause comes with the resume.
    driver.reset().unwrap();
    driver.negotiate(ALL).unwrap();
    driver.set_up_queue(0, None).unwrap();
    driver.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    quiesce(&mut driver);
    assert_eq!(driver.device.take_changes(), [Reset]);
    driver.device.resume().unwrap();
    assert_eq!(driver.device.take_changes(), [Activated]);
    // A driver that is never listened to fills nothing.
    for _ in 0..200 {
        driver.start(ALL).unwrap();
    }
    let told = driver.device.take_changes();
    assert!(told.len() < 100 && told.starts_with(&[Reset, Activated, Reset, Activated]), "{told:?}");
}

/// CVE-2026-5747: queue registers that could be written while the device ran.
#[test]
fn queue_registers_are_frozen_once_enabled_and_after_driver_ok() {
    let mut driver = driver();
    driver.negotiate(ALL).unwrap();
    driver.set_up_queue(0, Some(128)).unwrap();
    let frozen = |driver: &TestDriver, queue: u16| {
        driver.write(COMMON + 22, &queue.to_le_bytes());
        let mut image = [0; 34];
        driver.read(COMMON + 22, &mut image);
        image
    };
    let before = frozen(&driver, 0);
    let attack = |driver: &TestDriver| {
        let mut random = Xorshift::new(42);
        for offset in 24..56 {
            for width in [1, 2, 4, 8] {
                driver.write(COMMON + offset, &random.next().to_le_bytes()[..width]);
            }
        }
    };
    attack(&driver);
    assert_eq!(frozen(&driver, 0), before, "enabled");
    driver.driver_ok().unwrap();
    attack(&driver);
    assert_eq!(frozen(&driver, 0), before, "running");
    let other = frozen(&driver, 1);
    attack(&driver);
    assert_eq!(frozen(&driver, 1), other, "a queue that was not enabled in time");
    driver.write(COMMON + 16, &1_u16.to_le_bytes());
    assert_eq!(driver.read_u16(COMMON + 16), 0, "the configuration's vector");
    echo(&mut driver, 0, b"still well");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Whatever is written to the common configuration of a running device, short of a reset, changes no queue.
    #[test]
    fn no_write_reaches_a_running_queue(
        writes in proptest::collection::vec((0_u64..64, 1_usize..9, any::<u64>()), 1..200)
    ) {
        let mut driver = running();
        quiesce(&mut driver);
        let before = driver.device.save();
        for (offset, width, value) in writes {
            let bytes = value.to_le_bytes();
            let is_reset = offset == 20 && width == 1 && bytes[0] == 0;
            if !is_reset {
                driver.write(COMMON + offset, &bytes[..width]);
            }
        }
        let after = driver.device.save();
        prop_assert_eq!(after.queues, before.queues);
        prop_assert_eq!(after.driver_features, before.driver_features);
        prop_assert_eq!(after.phase, Phase::Running);
    }
}

#[test]
fn impossible_queues_fail_at_start_not_before() {
    // Offset and value of a 64-bit queue address.
    for (register, address) in [
        (32, 8),
        (32, MEMORY as u64),
        (32, u64::MAX - 15),
        (40, 1),
        (40, MEMORY as u64 - 2),
        (48, 2),
        (48, 1 << 40),
    ] {
        let mut driver = driver();
        driver.negotiate(ALL).unwrap();
        driver.write(COMMON + 22, &0_u16.to_le_bytes());
        for (offset, good) in [(32, 0x1000_u64), (40, 0x3000), (48, 0x4000)] {
            let value = if offset == register { address } else { good };
            driver.write(COMMON + offset, &value.to_le_bytes());
        }
        driver.write(COMMON + 28, &1_u16.to_le_bytes());
        assert!(driver.driver_ok().is_err(), "{register} {address:#x}");
        assert_eq!(driver.status() & NEEDS_RESET, NEEDS_RESET);
        driver.start(ALL).unwrap();
    }
}

#[test]
fn queue_sizes_that_are_none_do_not_stick() {
    let mut driver = driver();
    driver.negotiate(ALL).unwrap();
    driver.write(COMMON + 22, &1_u16.to_le_bytes());
    for size in [0_u16, 3, 17, 32, 0xffff] {
        driver.write(COMMON + 24, &size.to_le_bytes());
        assert_eq!(driver.read_u16(COMMON + 24), 16);
    }
    driver.write(COMMON + 24, &8_u16.to_le_bytes());
    assert_eq!(driver.read_u16(COMMON + 24), 8);
    driver.write(COMMON + 22, &2_u16.to_le_bytes());
    assert_eq!(driver.read_u16(COMMON + 24), 0, "no such queue");
    driver.write(COMMON + 28, &1_u16.to_le_bytes());
    assert_eq!(driver.read_u16(COMMON + 28), 0);
}

#[test]
fn a_vector_that_does_not_exist_reads_back_as_none() {
    let mut driver = driver();
    driver.negotiate(ALL).unwrap();
    for (vector, reads) in [(2_u16, 2), (3, NO_VECTOR), (1, 1), (0x7ff, NO_VECTOR), (NO_VECTOR, NO_VECTOR)] {
        for register in [16, 26] {
            driver.write(COMMON + register, &vector.to_le_bytes());
            assert_eq!(driver.read_u16(COMMON + register), reads);
        }
    }
}

#[test]
fn without_a_vector_the_isr_byte_tells_and_reading_clears_it() {
    let mut driver = driver();
    driver.negotiate(ALL).unwrap();
    driver.set_up_queue(0, None).unwrap();
    driver.set_status(0);
    driver.service().unwrap();
    driver.negotiate(VIRTIO_F_VERSION_1).unwrap();
    driver.write(COMMON + 22, &0_u16.to_le_bytes());
    for (offset, address) in [(32, 0x1000_u64), (40, 0x3000), (48, 0x4000)] {
        driver.write(COMMON + offset, &address.to_le_bytes());
    }
    driver.write(COMMON + 28, &1_u16.to_le_bytes());
    driver.driver_ok().unwrap();
    let view = driver.memory().view();
    let put = |at: u64, bytes: &[u8]| {
        vm_memory::Bytes::write_slice(&*view, bytes, vm_memory::GuestAddress(at)).unwrap();
    };
    // One descriptor with nothing to echo, made available.
    put(0x1000, &[0; 16]);
    put(0x3000, &[0, 0, 1, 0, 0, 0]);
    driver.kick(0);
    let end = Instant::now() + LIMIT;
    let mut isr = [0];
    while isr == [0] && Instant::now() < end {
        driver.read(ISR, &mut isr);
    }
    assert_eq!(isr, [1]);
    driver.read(ISR, &mut isr);
    assert_eq!(isr, [0]);
    assert_eq!(driver.interrupts(1), 0);
}

#[test]
fn masked_vectors_are_pending_and_delivered_on_unmask() {
    let mut driver = running();
    let entry = 0x8000 + 16;
    driver.write(entry + 12, &1_u32.to_le_bytes());
    echo(&mut driver, 0, b"masked");
    let end = Instant::now() + LIMIT;
    let mut pending = [0];
    while pending == [0] && Instant::now() < end {
        driver.read(0x4_8000, &mut pending);
    }
    assert_eq!((pending, driver.interrupts(1)), ([2], 0));
    driver.write(entry + 12, &0_u32.to_le_bytes());
    driver.read(0x4_8000, &mut pending);
    assert_eq!((pending, driver.interrupts(1)), ([0], 1));
}

#[test]
fn doorbells_follow_the_bar() {
    let mut driver = running();
    let bdf = driver.device.bdf();
    let bells = |driver: &TestDriver| -> Vec<_> {
        driver.resources.doorbells.attached.lock().unwrap().iter().map(|(address, _)| *address).collect()
    };
    let at = |bar: u64| vec![DoorbellAddress::Mmio(bar + NOTIFY), DoorbellAddress::Mmio(bar + NOTIFY + 4)];
    let (_, old) = driver.bar();
    assert_eq!(bells(&driver), at(old));
    driver.resources.config_write(bdf, 4, &[0]);
    assert_eq!(bells(&driver), [], "decoding is off");
    assert_eq!(driver.read_u32(COMMON), !0, "nothing answers");
    let new = old + 16 * BAR_SIZE;
    driver.resources.config_write(bdf, 0x10, &(new as u32).to_le_bytes());
    driver.resources.config_write(bdf, 0x14, &((new >> 32) as u32).to_le_bytes());
    assert_eq!(bells(&driver), []);
    driver.probe().unwrap();
    assert_eq!(driver.bar().1, new);
    assert_eq!(bells(&driver), at(new));
    echo(&mut driver, 0, b"moved");
    // Onto the ECAM window: not mapped, no harm, and back again.
    driver.resources.config_write(bdf, 0x14, &[0; 4]);
    driver.resources.config_write(bdf, 0x10, &0xe800_0000_u32.to_le_bytes());
    assert_eq!(bells(&driver), []);
    driver.resources.config_write(bdf, 0x10, &(new as u32).to_le_bytes());
    driver.resources.config_write(bdf, 0x14, &((new >> 32) as u32).to_le_bytes());
    echo(&mut driver, 1, b"back");
}

#[test]
fn the_window_in_configuration_space_reaches_the_bar() {
    let driver = driver();
    let bdf = driver.device.bdf();
    let mut at = u16::from({
        let mut first = [0];
        driver.resources.config_read(bdf, 0x34, &mut first);
        first[0]
    });
    loop {
        let mut cap = [0; 4];
        driver.resources.config_read(bdf, at, &mut cap);
        if cap[0] == 9 && cap[3] == 5 {
            break;
        }
        at = u16::from(cap[1]);
    }
    let aim = |bar: u8, offset: u32, length: u32| {
        driver.resources.config_write(bdf, at + 4, &[bar]);
        driver.resources.config_write(bdf, at + 8, &offset.to_le_bytes());
        driver.resources.config_write(bdf, at + 12, &length.to_le_bytes());
    };
    aim(0, 20, 1);
    driver.resources.config_write(bdf, at + 16, &[ACKNOWLEDGE | DRIVER]);
    assert_eq!(driver.status(), ACKNOWLEDGE | DRIVER);
    let mut data = [0xaa; 4];
    driver.resources.config_read(bdf, at + 16, &mut data);
    assert_eq!(data[0], ACKNOWLEDGE | DRIVER);
    aim(0, 18, 2);
    driver.resources.config_read(bdf, at + 16, &mut data);
    assert_eq!(data[..2], [2, 0], "two queues");
    for (bar, offset, length) in [(1, 0, 4), (0, BAR_SIZE as u32, 4), (0, 2, 4), (0, 0, 3), (0, u32::MAX, 1)]
    {
        aim(bar, offset, length);
        driver.resources.config_write(bdf, at + 16, &[0; 4]);
        driver.resources.config_read(bdf, at + 16, &mut data);
        assert_eq!(data, [0; 4], "no target: reads as the register file");
    }
    assert_eq!(driver.status(), ACKNOWLEDGE | DRIVER);
}

#[test]
fn a_kick_while_paused_is_served_on_resume() {
    let mut driver = running();
    quiesce(&mut driver);
    assert!(!driver.device.is_started());
    let from = driver.place(b"late").unwrap();
    let to = driver.allocate(4, 16).unwrap();
    driver.submit(0, &[Segment::readable(from, 4), Segment::writable(to, 4)]).unwrap();
    driver.kick(0);
    driver.device.service().unwrap();
    assert!(!driver.device.is_started(), "a paused device does nothing");
    driver.device.resume().unwrap();
    assert_eq!(driver.wait_used(0, LIMIT).unwrap().1, 4);
    assert_eq!(driver.peek(to, 4).unwrap(), b"late");
}

#[test]
fn a_restored_driver_is_interrupted_once_for_what_may_have_been_lost() {
    let mut driver = running();
    let before = [driver.interrupts(1), driver.interrupts(2)];
    save_reset_restore(&mut driver.device).unwrap();
    assert_eq!([driver.interrupts(1), driver.interrupts(2)], before.map(|count| count + 1));
    driver.device.quiesce_begin();
    driver.device.quiesce_finish(Instant::now() + LIMIT).unwrap();
    driver.device.resume().unwrap();
    assert_eq!(
        [driver.interrupts(1), driver.interrupts(2)],
        before.map(|count| count + 1),
        "not after a pause"
    );
    assert_eq!(driver.interrupts(0), 0);
}

#[test]
fn save_reset_restore_in_every_phase() {
    let mut fresh = driver();
    save_reset_restore(&mut fresh.device).unwrap();

    let mut configuring = driver();
    configuring.negotiate(ALL).unwrap();
    configuring.set_up_queue(0, Some(8)).unwrap();
    save_reset_restore(&mut configuring.device).unwrap();
    configuring.driver_ok().unwrap();
    echo(&mut configuring, 0, b"went on");

    let mut starting = driver();
    starting.negotiate(ALL).unwrap();
    starting.set_up_queue(0, None).unwrap();
    starting.set_status(DRIVER_OK);
    assert_eq!(starting.device.phase(), Phase::Starting);
    save_reset_restore(&mut starting.device).unwrap();
    assert_eq!(starting.device.phase(), Phase::Running, "a pending start is done on resume");
    echo(&mut starting, 0, b"started late");

    let mut running = running();
    for _ in 0..20 {
        echo(&mut running, 0, b"before");
    }
    save_reset_restore(&mut running.device).unwrap();
    assert!(running.device.is_started());
    echo(&mut running, 0, b"after");
    echo(&mut running, 1, b"the other queue");

    running.set_status(0);
    save_reset_restore(&mut running.device).unwrap();
    assert_eq!((running.device.phase(), running.status()), (Phase::Reset, 0), "a pending reset, too");
}

#[test]
fn state_moves_to_another_process() {
    let mut source = running();
    for _ in 0..300 {
        echo(&mut source, 0, b"round the ring");
    }
    quiesce(&mut source);
    let record = source.device.save_record();
    let mut target = driver();
    target.device.restore_record(&record).unwrap();
    assert_eq!(target.device.save_record(), record);
    assert!(!target.device.is_started(), "not before resume");
    let (_, bar) = source.bar();
    let rung = target
        .resources
        .doorbells
        .attached
        .lock()
        .unwrap()
        .iter()
        .any(|(a, _)| *a == DoorbellAddress::Mmio(bar + NOTIFY));
    assert!(rung, "BARs are mapped by the restore");
    target.device.resume().unwrap();
    assert_eq!(target.device.phase(), Phase::Running);
}

#[test]
fn hostile_state_is_refused() {
    let mut driver = running();
    quiesce(&mut driver);
    let good = driver.device.save();
    type Damage = fn(&mut VirtioPciV1);
    let damages: &[(&str, Damage)] = &[
        ("device type", |s| s.device_type = 2),
        ("status without phase", |s| s.status = 0),
        ("unknown status", |s| s.status |= 0x20),
        ("phase without status", |s| s.phase = Phase::Reset),
        ("failed without bit", |s| s.phase = Phase::Failed),
        ("features", |s| s.driver_features |= 1 << 5),
        ("not modern", |s| s.driver_features &= !VIRTIO_F_VERSION_1),
        ("config vector", |s| s.config_vector = 3),
        ("isr", |s| s.isr = 4),
        ("no queues", |s| s.queues.clear()),
        ("a queue more", |s| s.queues.push(s.queues[0])),
        ("size 0", |s| s.queues[0].size = 0),
        ("size 3", |s| s.queues[0].size = 3),
        ("size above max", |s| s.queues[0].size = 512),
        ("queue vector", |s| s.queues[1].vector = 0x7fff),
        ("descriptors outside", |s| s.queues[0].descriptors = MEMORY as u64),
        ("descriptors wrap", |s| s.queues[0].descriptors = u64::MAX - 15),
        ("descriptors unaligned", |s| s.queues[0].descriptors |= 8),
        ("available outside", |s| s.queues[0].available = 1 << 50),
        ("used outside", |s| s.queues[0].used = MEMORY as u64 - 4),
        ("vectors", |s| s.endpoint.msix.as_mut().unwrap().entries.truncate(1)),
        ("msix reserved bits", |s| s.endpoint.msix.as_mut().unwrap().entries[0].control = 2),
        ("no msix", |s| s.endpoint.msix = None),
        ("BAR flag bits", |s| s.endpoint.config[2].value |= 1),
        ("config registers", |s| s.endpoint.config.truncate(3)),
        ("device record", |s| s.device.version = 9),
        ("device kind", |s| s.device.kind = "virtio-blk".to_owned()),
    ];
    for (what, damage) in damages {
        let mut state = good.clone();
        damage(&mut state);
        assert_ne!(state, good, "{what}");
        let mut target = TestDriver::new(Box::new(EchoDevice::new()), MEMORY).unwrap();
        assert!(target.device.restore(state).is_err(), "{what}");
    }
    let mut target = TestDriver::new(Box::new(EchoDevice::new()), MEMORY).unwrap();
    target.device.restore(good).unwrap();
}

#[test]
fn restore_into_a_running_device_is_refused() {
    let mut driver = running();
    quiesce(&mut driver);
    let state = driver.device.save();
    driver.device.resume().unwrap();
    assert!(driver.device.restore(state).is_err());
    assert!(driver.device.reset().is_err(), "and so is a reset");
    echo(&mut driver, 0, b"unharmed");
}

#[test]
fn fuzz_bar_and_configuration_space() {
    let mut driver = running();
    let map = driver.resources.base.mmio.snapshot();
    let (_, bar) = driver.bar();
    let mapping = map.iter().find(|m| m.base == bar).unwrap().clone();
    // The interesting parts; the MSI-X table is 256 KiB of the same, so its start and its end.
    fuzz_registers(&*mapping.target, mapping.region, 0x100, rounds(6), 1);
    for start in [ISR, 0x4000, NOTIFY, 0x8000, 0x4_8000 - 16, 0x4_8000, BAR_SIZE - 64] {
        let part = Part(&*mapping.target, start);
        fuzz_registers(&part, 0, 64.min(BAR_SIZE - start), rounds(6), 2);
        driver.service().unwrap();
    }
    let bridge = driver.resources.bridge.clone();
    let ecam = Part(&*bridge, driver.device.bdf().ecam_offset());
    fuzz_registers(&ecam, REGION_ECAM, 0x140, rounds(6), 3);
    fuzz_registers(&ecam, REGION_ECAM, FUNCTION_CONFIG_SIZE, rounds(1), 4);
    fuzz_registers(&*bridge, REGION_PORTS, CONFIG_PORTS_LEN.into(), rounds(200), 5);
    driver.service().unwrap();
    save_reset_restore(&mut driver.device).unwrap();
    quiesce(&mut driver);
    driver.device.reset().unwrap();
    driver.device.resume().unwrap();
    driver.probe().unwrap();
    driver.start(ALL).unwrap();
    echo(&mut driver, 0, b"survived");
}

/// A target from an offset on.
struct Part<'a>(&'a dyn vmm_device_model::bus::BusTarget, u64);

impl vmm_device_model::bus::BusTarget for Part<'_> {
    fn read(&self, region: u16, offset: u64, data: &mut [u8]) {
        self.0.read(region, self.1 + offset, data);
    }

    fn write(&self, region: u16, offset: u64, data: &[u8]) {
        self.0.write(region, self.1 + offset, data);
    }
}

#[test]
fn a_driver_races_with_its_device() {
    let mut driver = running();
    let bus = driver.resources.base.mmio.clone();
    let (_, bar) = driver.bar();
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        for seed in 1..3 {
            let (bus, done) = (&bus, &done);
            scope.spawn(move || {
                let mut random = Xorshift::new(seed);
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    let status = [0, 1, 3, 11, 15, 15][random.next() as usize % 6];
                    bus.write(bar + COMMON + 20, &[status]);
                    bus.write(bar + COMMON + 8, &1_u32.to_le_bytes());
                    bus.write(bar + COMMON + 12, &1_u32.to_le_bytes());
                    bus.write(bar + NOTIFY, &[0, 0]);
                }
            });
        }
        for round in 0..300 {
            driver.service().unwrap();
            if round % 7 == 0 {
                quiesce(&mut driver);
                driver.device.resume().unwrap();
            }
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    driver.start(ALL).unwrap();
    echo(&mut driver, 0, b"settled");
}

#[test]
fn chains_that_no_driver_would_make() {
    for queue in [0, 1] {
        let mut driver = driver();
        hostile_chains(&mut driver, queue).unwrap();
        echo(&mut driver, queue, b"still there");
    }
}

#[test]
fn golden_record() {
    let mut driver = driver();
    driver.negotiate(ALL).unwrap();
    driver.set_up_queue(0, Some(64)).unwrap();
    driver.driver_ok().unwrap();
    driver.write_config(0, &[9]);
    echo(&mut driver, 0, b"one");
    quiesce(&mut driver);
    vmm_snapshot::golden::check_state(&driver.device.save()).unwrap();
}

/// Gives its queues back only at the third time of asking, or later.
#[derive(Debug, Default)]
struct Slow {
    queues: Vec<virtio_queue::Queue>,
    asked: u32,
    refusals: u32,
}

impl Metered for Slow {}

impl VirtioDevice for Slow {
    fn device_type(&self) -> u32 {
        4
    }

    fn features(&self) -> u64 {
        VIRTIO_F_VERSION_1
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![16]
    }

    fn config(&self) -> Arc<dyn DeviceConfig> {
        Arc::new(NoConfig)
    }

    fn start(&mut self, start: Start) -> Result<(), DeviceError> {
        assert!(self.queues.is_empty(), "started twice");
        self.queues = start.queues.into_iter().map(|q| q.queue).collect();
        Ok(())
    }

    fn stop_begin(&mut self) {
        self.asked = 0;
    }

    fn stop_finish(&mut self, _: Instant) -> Result<Vec<virtio_queue::Queue>, DeviceError> {
        self.asked += 1;
        if self.asked < 3 + self.refusals {
            return Err(DeviceError::new("requests are in flight"));
        }
        Ok(std::mem::take(&mut self.queues))
    }

    fn reset(&mut self) {
        assert!(self.queues.is_empty(), "reset while started");
    }

    fn blockers(&self) -> Vec<Blocker> {
        vec![Blocker { blocks: Blocks::Unplug, reason: "slow".to_owned() }]
    }
}

impl SaveState for Slow {
    type State = NoState;

    fn save(&self) -> NoState {
        NoState {}
    }

    fn restore(&mut self, _: NoState) -> Result<(), RecordError> {
        Ok(())
    }
}

struct NoConfig;

impl DeviceConfig for NoConfig {
    fn read(&self, _: u64, _: &mut [u8]) {}

    fn write(&self, _: u64, _: &[u8]) {}
}

#[test]
fn a_slow_device_resets_in_slices() {
    let mut driver = TestDriver::new(Box::new(Slow::default()), MEMORY).unwrap();
    driver.start(!0).unwrap();
    assert_eq!(driver.device.blockers().len(), 1);
    driver.set_status(0);
    let attention = driver.resources.base.attention.clone();
    for _ in 0..2 {
        assert_eq!(attention.take(), 1, "asks to be called again");
        driver.device.service().unwrap();
        assert_ne!(driver.status(), 0);
    }
    assert_eq!(attention.take(), 1);
    driver.device.service().unwrap();
    assert_eq!((driver.status(), attention.take()), (0, 0));
    driver.start(!0).unwrap_or_else(|e| panic!("{e}"));
}

#[test]
fn a_quiesce_that_is_given_up_can_be_resumed() {
    let mut driver = TestDriver::new(Box::new(Slow::default()), MEMORY).unwrap();
    driver.start(!0).unwrap();
    driver.device.quiesce_begin();
    for _ in 0..2 {
        driver.device.quiesce_finish(Instant::now()).unwrap_err();
    }
    driver.device.resume().unwrap();
    assert!(driver.device.is_started());
    assert_eq!(driver.device.phase(), Phase::Running);
}

#[test]
fn a_device_stuck_over_a_resume_runs_once_it_lets_go() {
    let slow = Slow { refusals: 3, ..Slow::default() };
    let mut driver = TestDriver::new(Box::new(slow), MEMORY).unwrap();
    driver.start(!0).unwrap();
    let attention = driver.resources.base.attention.clone();
    attention.take();
    driver.device.quiesce_begin();
    driver.device.quiesce_finish(Instant::now()).unwrap_err();
    driver.device.resume().unwrap();
    let mut slices = 0;
    while !driver.device.is_started() {
        assert_eq!(attention.take(), 1, "asks to be called again");
        driver.device.service().unwrap();
        slices += 1;
    }
    assert_eq!((slices, attention.take()), (4, 0));
    assert_eq!(driver.device.phase(), Phase::Running);
}

/// A driver's mistake is the driver's to see; it does not keep the VM from running.
#[test]
fn an_impossible_queue_does_not_fail_a_resume() {
    let mut driver = driver();
    driver.negotiate(ALL).unwrap();
    driver.write(COMMON + 22, &0_u16.to_le_bytes());
    driver.write(COMMON + 32, &u64::MAX.to_le_bytes());
    driver.write(COMMON + 28, &1_u16.to_le_bytes());
    driver.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    assert_eq!(driver.device.phase(), Phase::Starting);
    quiesce(&mut driver);
    driver.device.resume().unwrap();
    assert_eq!((driver.device.phase(), driver.status() & NEEDS_RESET), (Phase::Failed, NEEDS_RESET));
    driver.start(ALL).unwrap();
    echo(&mut driver, 0, b"again");
}
