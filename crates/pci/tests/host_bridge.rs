//! Configuration mechanisms, attaching, and BARs that move under running vCPUs.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests fail by panicking")]

mod common;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use common::{IDENTITY, SIZE, attach, bells, enable, function, machine, move_bar0, read_u32, who};
use vmm_device_model::bus::BusTarget;
use vmm_device_model::device::{Lifecycle, SaveRecord, SaveState};
use vmm_device_model::testing::{fuzz_registers, save_reset_restore};
use vmm_fuzzing::{hostile_records, rounds};
use vmm_pci::bdf::{BUS_CONFIG_SIZE, Bdf};
use vmm_pci::host_bridge::{
    CONFIG_PORTS, CONFIG_PORTS_LEN, HostBridgeDevice, HostBridgeV1, PciError, REGION_ECAM, REGION_PORTS,
};
use vmm_pci::resources::PciResources;
use vmm_pci::slots::{SlotAllocator, SlotsV1};
use vmm_snapshot::{RecordError, Schema, golden};

const HIGH: u64 = 0x12_0000_0000;

fn port_read(machine: &vmm_pci::testing::TestPciResources, port: u16, len: usize) -> Vec<u8> {
    let mut data = vec![0; len];
    machine.base.pio.read(port.into(), &mut data);
    data
}

#[test]
fn both_mechanisms_reach_the_same_registers() {
    let (machine, functions) = machine(2);
    for bdf in [functions[0].bdf(), functions[1].bdf()] {
        assert_eq!(read_u32(&machine, bdf, 0), 0x5678_1234);
        for register in 0..64_u32 {
            let address = 1 << 31 | u32::from(bdf.devfn()) << 8 | register << 2;
            machine.base.pio.write(CONFIG_PORTS.into(), &address.to_le_bytes());
            assert_eq!(port_read(&machine, CONFIG_PORTS, 4), address.to_le_bytes());
            let whole = read_u32(&machine, bdf, register as u16 * 4).to_le_bytes();
            for (offset, len) in [(0, 4), (0, 2), (2, 2), (0, 1), (1, 1), (2, 1), (3, 1)] {
                let read = port_read(&machine, CONFIG_PORTS + 4 + offset, len);
                assert_eq!(read, whole[usize::from(offset)..][..len]);
            }
        }
    }
    let cache_line = 1 << 31 | u32::from(functions[1].bdf().devfn()) << 8 | 0x0c;
    machine.base.pio.write(CONFIG_PORTS.into(), &cache_line.to_le_bytes());
    machine.base.pio.write(u64::from(CONFIG_PORTS) + 4, &[0x40]);
    assert_eq!(read_u32(&machine, functions[1].bdf(), 0x0c), 0x40);
    assert_eq!(read_u32(&machine, functions[0].bdf(), 0x0c), 0);
}

#[test]
fn the_address_latch_takes_whole_words_only() {
    let (machine, _) = machine(1);
    machine.base.pio.write(CONFIG_PORTS.into(), &0xffff_ffff_u32.to_le_bytes());
    let latch = 0x80ff_fffc_u32.to_le_bytes();
    assert_eq!(port_read(&machine, CONFIG_PORTS, 4), latch, "reserved bits read as zero");
    for (port, data) in [(0, &[0][..]), (1, &[6]), (0, &[0, 0]), (2, &[0, 0])] {
        machine.base.pio.write(u64::from(CONFIG_PORTS) + port, data);
        assert_eq!(port_read(&machine, CONFIG_PORTS, 4), latch);
    }
    assert_eq!(port_read(&machine, CONFIG_PORTS, 2), [0xff; 2]);
    assert_eq!(port_read(&machine, CONFIG_PORTS + 4, 4), [0xff; 4], "bus 255");
    machine.base.pio.write(CONFIG_PORTS.into(), &0_u32.to_le_bytes());
    assert_eq!(port_read(&machine, CONFIG_PORTS + 4, 4), [0xff; 4], "not enabled");
    machine.base.pio.write(CONFIG_PORTS.into(), &(1_u32 << 31).to_le_bytes());
    assert_eq!(port_read(&machine, CONFIG_PORTS + 4, 4), [0x36, 0x1b, 8, 0], "the host bridge");
    assert_eq!(port_read(&machine, CONFIG_PORTS + 6, 4), [0xff; 4], "over the end");
}

#[test]
fn absent_functions_and_extended_space() {
    let (machine, functions) = machine(1);
    let present = functions[0].bdf();
    for bdf in ["0000:00:02.0", "0000:00:01.1", "0000:00:1f.7"] {
        let bdf: Bdf = bdf.parse().unwrap();
        assert_eq!(read_u32(&machine, bdf, 0), !0);
        machine.config_write(bdf, 4, &[0xff; 4]);
        assert_eq!(read_u32(&machine, bdf, 0x100), !0);
    }
    assert_eq!(read_u32(&machine, present, 0x100), 0, "no extended capability");
    assert_eq!(read_u32(&machine, present, 0xffc), 0);
    let mut data = [0xff; 4];
    let last = present.ecam_offset() + 0xffe;
    machine.bridge.read(REGION_ECAM, last, &mut data);
    assert_eq!(data, [0xff; 4], "no access spans two functions");
    machine.bridge.read(REGION_ECAM, BUS_CONFIG_SIZE, &mut data);
    assert_eq!(data, [0xff; 4], "bus 1");
    machine.bridge.read(REGION_ECAM, u64::MAX, &mut data);
    assert_eq!(data, [0xff; 4]);
}

#[test]
fn attach_and_detach_under_a_running_guest() {
    let (mut machine, functions) = machine(1);
    let bdf = functions[0].bdf();
    enable(&machine, bdf, true);
    let at = functions[0].bar_address(0).unwrap();
    assert_eq!(who(&machine, at), 0x10);
    machine.bridge.detach(bdf).unwrap();
    assert_eq!((read_u32(&machine, bdf, 0), who(&machine, at)), (!0, 0xff));
    assert!(bells(&machine).is_empty());
    assert_eq!(machine.bridge.detach(bdf).unwrap_err(), PciError::NotAttached { bdf });
    let parts = function(&mut machine, 0x50);
    let again = machine.attach(bdf, parts).unwrap();
    enable(&machine, bdf, true);
    assert_eq!(who(&machine, again.bar_address(0).unwrap()), 0x50);
}

#[test]
fn impossible_attachments_are_refused() {
    let (mut machine, functions) = machine(1);
    let good = function(&mut machine, 0);
    let bridge = &machine.bridge;
    let at = |text: &str| text.parse::<Bdf>().unwrap();
    let taken = functions[0].bdf();
    assert_eq!(bridge.attach(taken, &good).unwrap_err(), PciError::Taken { bdf: taken });
    assert_eq!(
        bridge.attach(at("0000:00:00.0"), &good).unwrap_err(),
        PciError::Taken { bdf: at("0000:00:00.0") }
    );
    for bdf in [at("0001:00:02.0"), at("0000:01:02.0")] {
        assert_eq!(bridge.attach(bdf, &good).unwrap_err(), PciError::NoSuchBus { bdf });
        assert!(bridge.detach(bdf).is_err());
    }
    assert!(bridge.detach(at("0000:00:00.0")).is_err(), "the host bridge stays");
    let bdf = at("0000:00:02.0");
    let mut twice = good.clone();
    twice.bars.push(twice.bars[0].clone());
    let mut beyond = good.clone();
    beyond.bars[0].index = 6;
    let mut empty = good.clone();
    empty.bars[0].size = 0;
    let mut bell = good.clone();
    bell.bars[0].doorbells[0].offset = SIZE;
    for bad in [twice, beyond, empty, bell] {
        assert!(matches!(bridge.attach(bdf, &bad), Err(PciError::BadBar { .. })));
    }
    bridge.attach(bdf, &good).unwrap();
}

#[test]
fn decoding_off_takes_bars_and_doorbells_away() {
    let (machine, functions) = machine(1);
    let bdf = functions[0].bdf();
    assert_eq!(functions[0].bar_address(0), None, "off at power-on");
    enable(&machine, bdf, true);
    let (high, low) = (functions[0].bar_address(0).unwrap(), functions[0].bar_address(2).unwrap());
    assert_eq!((who(&machine, high), who(&machine, low + SIZE - 1)), (0x10, 0x12));
    assert_eq!(bells(&machine), [low + 0x10, high + 0x10]);
    enable(&machine, bdf, false);
    assert_eq!((who(&machine, high), who(&machine, low)), (0xff, 0xff));
    assert!(bells(&machine).is_empty());
}

#[test]
fn a_bar_in_the_wrong_place_reads_back_but_answers_nowhere() {
    let (machine, functions) = machine(1);
    let bdf = functions[0].bdf();
    enable(&machine, bdf, true);
    let home = functions[0].bar_address(0).unwrap();
    for wrong in [0, 0x1000, 0xe800_0000, 0xfee0_0000, 0xffff_ffff_ffff_f000, 1 << 63] {
        move_bar0(&machine, bdf, wrong);
        let read = u64::from(read_u32(&machine, bdf, 0x14)) << 32 | u64::from(read_u32(&machine, bdf, 0x10));
        assert_eq!(read, wrong | 4);
        assert_eq!(functions[0].bar_address(0), None, "{wrong:#x}");
        assert_eq!(who(&machine, home), 0xff);
        assert_eq!(bells(&machine).len(), 1, "the other BAR's");
        move_bar0(&machine, bdf, home);
        assert_eq!(who(&machine, home), 0x10);
        assert_eq!(bells(&machine).len(), 2);
    }
}

#[test]
fn a_bar_on_another_devices_place_waits_for_it_to_leave() {
    let (machine, functions) = machine(2);
    let (a, b) = (functions[0].bdf(), functions[1].bdf());
    enable(&machine, a, true);
    enable(&machine, b, true);
    let place_of_b = functions[1].bar_address(0).unwrap();
    move_bar0(&machine, a, place_of_b);
    assert_eq!(who(&machine, place_of_b), 0x20, "first come");
    assert_eq!(functions[0].bar_address(0), None);
    move_bar0(&machine, b, HIGH);
    assert_eq!((who(&machine, place_of_b), who(&machine, HIGH)), (0x10, 0x20));
    move_bar0(&machine, a, HIGH);
    machine.bridge.detach(b).unwrap();
    assert_eq!(who(&machine, HIGH), 0x10, "also when it is unplugged");
}

/// vCPUs read a BAR all the while another moves it: they see the device or nothing, never another's answer,
/// and it is always at one of its two places.
#[test]
fn relocation_under_concurrent_readers() {
    let (machine, functions) = machine(2);
    let (a, b) = (functions[0].bdf(), functions[1].bdf());
    enable(&machine, a, true);
    enable(&machine, b, true);
    let home = functions[0].bar_address(0).unwrap();
    let other = functions[1].bar_address(0).unwrap();
    let away = home + 0x10_0000;
    let (done, hits) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    for address in [home, away] {
                        match who(&machine, address) {
                            0x10 => drop(hits.fetch_add(1, Ordering::Relaxed)),
                            answer => assert_eq!(answer, 0xff),
                        }
                    }
                    assert_eq!(who(&machine, other), 0x20);
                }
            });
        }
        let mut moves = 0;
        while moves < 500 || hits.load(Ordering::Relaxed) < 100 {
            // The low half alone: one write is one move.
            machine.config_write(a, 0x10, &(away as u32).to_le_bytes());
            machine.config_write(a, 0x10, &(home as u32).to_le_bytes());
            moves += 1;
        }
        done.store(true, Ordering::Relaxed);
    });
    assert_eq!(who(&machine, home), 0x10);
    assert_eq!(bells(&machine).len(), 4);
}

/// Whoever comes last, map, doorbells and registers agree.
#[test]
fn racing_movers_end_consistent() {
    let (machine, functions) = machine(2);
    for round in 0..50 {
        std::thread::scope(|scope| {
            for thread in 0..4_u64 {
                let (machine, function) = (&machine, &functions[thread as usize % 2]);
                scope.spawn(move || {
                    for i in 0..10 {
                        enable(machine, function.bdf(), (i + thread + round) % 3 != 0);
                        let address = HIGH + 0x1000 * ((i * 7 + thread * 3) % 4);
                        machine.config_write(function.bdf(), 0x10, &(address as u32).to_le_bytes());
                    }
                });
            }
        });
        let mut expected = Vec::new();
        for (function, tag) in functions.iter().zip([0x10, 0x20]) {
            for index in [0, 2] {
                if let Some(address) = function.bar_address(index) {
                    assert_eq!(who(&machine, address), tag + index);
                    let register = read_u32(&machine, function.bdf(), 0x10 + 4 * u16::from(index)) & !0xf;
                    assert_eq!(address as u32, register);
                    expected.push(address + 0x10);
                }
            }
        }
        expected.sort_unstable();
        assert_eq!(bells(&machine), expected);
    }
}

#[test]
fn host_bridge_state() {
    let (machine, _) = machine(1);
    let mut device = HostBridgeDevice(machine.bridge.clone());
    machine.base.pio.write(CONFIG_PORTS.into(), &0x8000_0804_u32.to_le_bytes());
    machine.config_write(Bdf::new(0, 0, 0, 0).unwrap(), 4, &[6]);
    save_reset_restore(&mut device).unwrap();
    assert_eq!(port_read(&machine, CONFIG_PORTS, 4), 0x8000_0804_u32.to_le_bytes());
    let good = device.save();
    for bad in [
        HostBridgeV1 { address: 1, ..good.clone() },
        HostBridgeV1 { address: 1 << 24, ..good.clone() },
        HostBridgeV1 { config: Vec::new(), ..good },
    ] {
        assert!(device.restore(bad).is_err());
    }
    device.quiesce_finish(Instant::now()).unwrap();
    device.reset().unwrap();
    assert_eq!(port_read(&machine, CONFIG_PORTS, 4), [0; 4]);
}

#[test]
fn fuzz_segment() {
    let (mut machine, _) = machine(3);
    attach(&mut machine, 12);
    fuzz_registers(&*machine.bridge, REGION_PORTS, CONFIG_PORTS_LEN.into(), rounds(2000), 7);
    fuzz_registers(&*machine.bridge, REGION_ECAM, 0x1_0140, rounds(2), 8);
    fuzz_registers(&*machine.bridge, 9, 16, rounds(3), 9);
    assert_eq!(
        read_u32(&machine, Bdf::new(0, 0, 1, 0).unwrap(), 0),
        u32::from(IDENTITY.device) << 16 | 0x1234
    );
}

/// Every integer of the saved states at its edges: refused, or taken as if it had been so.
#[test]
fn fuzz_states() {
    let (machine, _) = machine(2);
    machine.base.pio.write(CONFIG_PORTS.into(), &0x8000_0804_u32.to_le_bytes());
    let mut device = HostBridgeDevice(machine.bridge.clone());
    let mut record = device.save_record();
    let (mut taken, mut refused) = (0, 0);
    for bytes in hostile_records(&record.bytes.clone()) {
        record.bytes = bytes;
        device.quiesce_begin();
        device.reset().unwrap();
        if device.restore_record(&record).is_err() {
            refused += 1;
            continue;
        }
        taken += 1;
        assert_eq!(device.save_record(), record);
        let latch = u32::from_le_bytes(port_read(&machine, CONFIG_PORTS, 4).try_into().unwrap());
        assert_eq!(latch & !0x80ff_fffc, 0, "reserved bits read as zero");
        fuzz_registers(&*machine.bridge, REGION_PORTS, CONFIG_PORTS_LEN.into(), 2, 7);
    }
    assert!(taken > 0 && refused > 0, "{taken} taken, {refused} refused");

    let mut slots = SlotAllocator::new();
    slots.take("_disk0", Some(3)).unwrap();
    slots.take("_rng", None).unwrap();
    let restored = |bytes: Vec<u8>| {
        let state = SlotsV1::decode(&bytes)?;
        let slots = SlotAllocator::restore(state.clone())?;
        assert_eq!(slots.save(), state, "all of it was taken");
        Ok::<_, RecordError>(())
    };
    let restored: Vec<_> = hostile_records(&slots.save().encode()).into_iter().map(restored).collect();
    assert!(restored.iter().any(Result::is_ok) && restored.iter().any(Result::is_err));
}

#[test]
fn golden_records() {
    let (machine, _) = machine(2);
    machine.base.pio.write(CONFIG_PORTS.into(), &0x8000_0804_u32.to_le_bytes());
    golden::check_state(&HostBridgeDevice(machine.bridge.clone()).save()).unwrap();
    let mut slots = SlotAllocator::new();
    slots.take("_disk0", Some(3)).unwrap();
    slots.take("_rng", None).unwrap();
    golden::check_state(&slots.save()).unwrap();
}
