//! Configuration space: every register, every BAR size, and random accesses against a byte-mask model.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests fail by panicking")]

mod common;

use common::IDENTITY;
use proptest::prelude::*;
use vmm_pci::config::{Bar, BarKind, Capability, ConfigError, ConfigSpace, ConfigWordV1};

/// All of the configuration space, written with ones and read back.
fn ones() -> (ConfigSpace, [u8; 256], [u8; 256]) {
    let mut config = full();
    let (mut reset, mut written) = ([0; 256], [0; 256]);
    config.read(0, &mut reset);
    config.write(0, &[0xff; 256]);
    config.read(0, &mut written);
    (config, reset, written)
}

fn full() -> ConfigSpace {
    let mut config = ConfigSpace::new(&IDENTITY);
    let bar = |index, kind, size, address| Bar { index, kind, size, address };
    config.add_bar(bar(0, BarKind::Memory64, 0x8_0000, 0x12_3408_0000)).unwrap();
    config.add_bar(bar(2, BarKind::Memory32, 0x1000, 0xc000_1000)).unwrap();
    config.add_bar(bar(4, BarKind::Memory64Prefetchable, 1 << 33, 0)).unwrap();
    let capability = Capability { id: 9, body: vec![1, 2, 3, 4, 5], writable: vec![0, 0xf0] };
    assert_eq!(config.add_capability(&capability).unwrap(), 0x40);
    assert_eq!(config.add_capability(&capability).unwrap(), 0x48, "aligned to four");
    config
}

#[test]
fn every_register_of_the_header() {
    let (_, reset, written) = ones();
    let word = |bytes: &[u8; 256], at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    // Offset, value at reset, value after all ones were written.
    let table = [
        (0x00, 0x5678_1234, 0x5678_1234),
        (0x04, 0x0010_0000, 0x0010_0547),
        (0x08, 0xff00_0003, 0xff00_0003),
        (0x0c, 0, 0xff),
        (0x10, 0x3408_0004, 0xfff8_0004),
        (0x14, 0x12, 0xffff_ffff),
        (0x18, 0xc000_1000, 0xffff_f000),
        (0x1c, 0, 0),
        (0x20, 0xc, 0xc),
        (0x24, 0, 0xffff_fffe),
        (0x28, 0, 0),
        (0x2c, 0xdef0_9abc, 0xdef0_9abc),
        (0x30, 0, 0),
        (0x34, 0x40, 0x40),
        (0x38, 0, 0),
        (0x3c, 0, 0xff),
        (0x40, 0x0201_4809, 0xf201_4809),
        (0x44, 0x0005_0403, 0x0005_0403),
        (0x48, 0x0201_0009, 0xf201_0009),
    ];
    for (offset, at_reset, after) in table {
        assert_eq!(word(&reset, offset), at_reset, "{offset:#x} at reset");
        assert_eq!(word(&written, offset), after, "{offset:#x} after ones");
    }
    assert_eq!(reset[0x50..], [0; 0xb0]);
    assert_eq!(written[0x50..], [0; 0xb0], "nothing there");
}

#[test]
fn sizing_of_every_size() {
    for shift in 4..63 {
        for kind in [BarKind::Memory32, BarKind::Memory64, BarKind::Memory64Prefetchable] {
            if kind == BarKind::Memory32 && shift > 31 {
                continue;
            }
            let size = 1_u64 << shift;
            let mut config = ConfigSpace::new(&IDENTITY);
            config
                .add_bar(Bar { index: 0, kind, size, address: size & 0xffff_ffff & !(size - 1) })
                .unwrap_or_else(|_| {
                    config.add_bar(Bar { index: 0, kind, size, address: 0 }).unwrap();
                });
            config.write(0x10, &[0xff; 8]);
            let (low, high) = (config.u32_at(0x10) & !0xf, config.u32_at(0x14));
            let mask = if kind == BarKind::Memory32 {
                assert_eq!(high, 0);
                u64::from(low) | 0xffff_ffff << 32
            } else {
                u64::from(high) << 32 | u64::from(low)
            };
            assert_eq!(!mask + 1, size, "{kind:?} {size:#x}");
        }
    }
}

#[test]
fn impossible_bars_and_capabilities_are_refused() {
    let mut config = full();
    let good = Bar { index: 3, kind: BarKind::Memory32, size: 0x1000, address: 0 };
    let bad = [
        Bar { index: 6, ..good },
        Bar { index: 5, kind: BarKind::Memory64, ..good },
        Bar { index: 0, ..good },
        Bar { index: 1, ..good },
        Bar { kind: BarKind::Memory64, ..good },
        Bar { size: 0, ..good },
        Bar { size: 8, ..good },
        Bar { size: 0x1800, ..good },
        Bar { size: 1 << 32, ..good },
        Bar { address: 0x800, ..good },
        Bar { address: 1 << 32, ..good },
        Bar { address: 0xffff_ffff_ffff_f000, ..good },
    ];
    for bar in bad {
        assert!(matches!(config.add_bar(bar), Err(ConfigError::Bar { .. })), "{bar:?}");
    }
    config.add_bar(good).unwrap();
    let large = Capability { id: 9, body: vec![0; 0xc0], writable: Vec::new() };
    assert_eq!(config.add_capability(&large).unwrap_err(), ConfigError::NoRoom { id: 9 });
    let rest = Capability { id: 9, body: vec![0; 0xae], writable: Vec::new() };
    assert_eq!(config.add_capability(&rest).unwrap(), 0x50);
    assert!(config.add_capability(&Capability { id: 9, body: Vec::new(), writable: Vec::new() }).is_err());
}

#[test]
fn decoding_follows_the_command_register() {
    let mut config = full();
    assert_eq!(config.bar_addresses(), [None; 6]);
    assert!(config.write(4, &[2]));
    assert_eq!(config.bar_addresses(), [Some(0x12_3408_0000), None, Some(0xc000_1000), None, Some(0), None]);
    assert!(!config.write(4, &[6]), "bus master moves nothing");
    assert!(config.write(0x14, &[0x13]), "one byte of the upper half");
    assert_eq!(config.bar_addresses()[0], Some(0x13_3408_0000));
    assert!(!config.write(0x11, &[0xff]), "bits below the size");
    assert!(config.write(4, &[0]));
    assert!(!config.write(0x14, &[0x12]), "not decoded: not moved");
    config.write(4, &[2]);
    config.reset();
    assert_eq!(config.bar_addresses(), [None; 6]);
}

#[test]
fn saved_words_restore_and_impossible_ones_are_refused() {
    let mut config = full();
    config.write(0, &[0xa5; 256]);
    let saved = config.save();
    let mut target = full();
    target.restore(&saved).unwrap();
    let (mut a, mut b) = ([0; 256], [0; 256]);
    config.read(0, &mut a);
    target.read(0, &mut b);
    assert_eq!(a, b);
    assert_eq!(target.save(), saved);

    assert!(target.restore(&saved[1..]).is_err());
    assert!(target.restore(&[]).is_err());
    let mut moved = saved.clone();
    moved[0].offset += 1;
    assert!(target.restore(&moved).is_err());
    for i in 0..saved.len() {
        let mut bad: Vec<ConfigWordV1> = saved.clone();
        bad[i].value = !0;
        // Registers of which all bits are writable take anything.
        let free = matches!(bad[i].offset, 0x14);
        assert_eq!(target.restore(&bad).is_err(), !free, "{:#x}", bad[i].offset);
    }
}

proptest! {
    /// Any sequence of accesses of any width at any offset behaves as bytes with a mask.
    #[test]
    fn accesses_match_the_byte_model(
        accesses in proptest::collection::vec((0_u16..0x120, 1_usize..9, any::<u64>(), any::<bool>()), 1..100)
    ) {
        let (_, reset, ones) = ones();
        let zeros = {
            let mut config = full();
            config.write(0, &[0; 256]);
            let mut bytes = [0; 256];
            config.read(0, &mut bytes);
            bytes
        };
        let mut config = full();
        let mut model = reset;
        for (offset, width, value, write) in accesses {
            let data = &value.to_le_bytes()[..width];
            if write {
                config.write(offset, data);
                for (i, byte) in data.iter().enumerate().filter(|(i, _)| usize::from(offset) + i < 256) {
                    let at = usize::from(offset) + i;
                    let mask = ones[at] ^ zeros[at];
                    model[at] = model[at] & !mask | byte & mask;
                }
            }
            let mut read = vec![0xee; width];
            config.read(offset, &mut read);
            let expected: Vec<u8> = (0..width).map(|i| model.get(usize::from(offset) + i).copied().unwrap_or(0)).collect();
            prop_assert_eq!(read, expected);
        }
    }
}
