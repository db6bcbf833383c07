//! Saved states of the devices: their golden encodings, and states that cannot be.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "tests fail by panicking")]

mod common;

use std::path::Path;

use common::Setup;
use vmm_device_model::device::{SaveRecord, SaveState};
use vmm_virtio_devices::block::BlockV1;
use vmm_virtio_devices::console::{ConsoleDevice, ConsoleV1};
use vmm_virtio_devices::rng::{DEFAULT_SOURCE, RngDevice, RngV1};

fn block_state() -> BlockV1 {
    let mut serial = b"serial-of-test".to_vec();
    serial.resize(20, 0);
    BlockV1 { writeback: false, sectors: 2048, logical_block: 512, serial }
}

#[test]
fn golden_records() {
    vmm_snapshot::golden::check_state(&block_state()).unwrap();
    vmm_snapshot::golden::check_state(&RngV1 {}).unwrap();
    let console = ConsoleV1 { columns: 80, rows: 25, typed: b"typed".to_vec() };
    vmm_snapshot::golden::check_state(&console).unwrap();
}

#[test]
fn a_disk_knows_its_state_from_another_disk_s() {
    let dir = tempfile::tempdir().unwrap();
    let mut device = Setup::default().device(&dir);
    device.restore(block_state()).unwrap();
    assert_eq!(device.save(), block_state());
    let good = block_state();
    let strangers = [
        BlockV1 { sectors: 2047, ..good.clone() },
        BlockV1 { sectors: 0, ..good.clone() },
        BlockV1 { sectors: u64::MAX, ..good.clone() },
        BlockV1 { logical_block: 4096, ..good.clone() },
        BlockV1 { logical_block: 0, ..good.clone() },
        BlockV1 { serial: vec![0; 20], ..good.clone() },
        BlockV1 { serial: Vec::new(), ..good.clone() },
        BlockV1 { serial: vec![b'x'; 1 << 20], ..good },
    ];
    for state in strangers {
        let error = device.restore(state.clone()).unwrap_err().to_string();
        assert!(error.contains("_disk0"), "{error}");
        assert_eq!(device.save(), block_state(), "nothing was taken of {state:?}");
    }
}

#[test]
fn records_of_other_devices_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut block = Setup::default().device(&dir);
    let mut rng = RngDevice::new("_rng", Path::new(DEFAULT_SOURCE)).unwrap();
    let mut console = ConsoleDevice::new("_console", Box::new(std::io::sink()), (80, 25)).unwrap();
    let records = [block.save_record(), rng.save_record(), console.save_record()];
    for (at, record) in records.iter().enumerate() {
        let taken = [
            block.restore_record(record).is_ok(),
            rng.restore_record(record).is_ok(),
            console.restore_record(record).is_ok(),
        ];
        assert_eq!(taken, [at == 0, at == 1, at == 2], "{}", record.kind);
    }
}
