//! Upgrades, refusals and hostile bytes.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests fail by panicking")]

use proptest::prelude::*;
use vmm_fuzzing::{Random, mutate, rounds};
use vmm_snapshot::{NoState, Record, RecordError, RecordSet, Schema, golden};

use common::{UartV1, UartV2, UartV3, decode_all};

mod common;

fn v1() -> UartV1 {
    UartV1 { divisor: 0x1234, fifo: b"abc".to_vec() }
}

fn v2() -> UartV2 {
    UartV2 { divisor: 0x1234, fifo: b"abc".to_vec(), scratch: 7 }
}

fn v3() -> UartV3 {
    UartV3 { divisor: 0x1234, fifo: vec![97, 98, 99], scratch: 7, pending: Some(3) }
}

#[test]
fn every_version_parses_as_the_newest() {
    let upgraded = UartV3 { pending: None, ..v3() };
    assert_eq!(Record::of(&v1()).parse::<UartV3>().unwrap(), UartV3 { scratch: 0xa5, ..upgraded.clone() });
    assert_eq!(Record::of(&v2()).parse::<UartV3>().unwrap(), upgraded);
    assert_eq!(Record::of(&v3()).parse::<UartV3>().unwrap(), v3());
}

#[test]
fn golden_files_hold_every_version() {
    golden::check_state(&v1()).unwrap();
    golden::check_state(&v2()).unwrap();
    golden::check_state(&v3()).unwrap();
    assert_eq!(golden::load::<UartV3>(1).unwrap(), v1().into_newest());
    let mut set = RecordSet::new();
    set.put("_serial0", &v1()).unwrap();
    set.put("rng", &NoState {}).unwrap();
    golden::check_state(&set).unwrap();
}

impl UartV1 {
    fn into_newest(self) -> UartV3 {
        UartV2::from(self).into()
    }
}

#[test]
fn newer_is_refused_by_kind_and_version() {
    let error = Record::of(&v3()).parse::<UartV2>().unwrap_err();
    assert_eq!(error.to_string(), "uart record has version 3, this build knows versions up to 2");
    let mut record = Record::of(&v3());
    record.version = u16::MAX;
    assert!(matches!(record.parse::<UartV3>(), Err(RecordError::Newer { found: u16::MAX, known: 3, .. })));
}

#[test]
fn version_zero_is_older_than_all() {
    let mut record = Record::of(&v1());
    record.version = 0;
    let error = record.parse::<UartV3>().unwrap_err();
    assert_eq!(error.to_string(), "uart record has version 0, the oldest supported is 1");
}

#[test]
fn another_kind_is_refused() {
    let error = Record::of(&NoState {}).parse::<UartV1>().unwrap_err();
    assert_eq!(error.to_string(), "record is of kind \"none\", expected \"uart\"");
}

#[test]
fn one_versions_bytes_are_not_anothers() {
    for (version, bytes) in [(1, v2().encode()), (2, v1().encode()), (2, v3().encode()), (3, v2().encode())] {
        let record = Record { kind: "uart".to_owned(), version, bytes };
        let error = record.parse::<UartV3>().unwrap_err();
        assert!(matches!(error, RecordError::Malformed { version: v, .. } if v == version), "{error}");
    }
}

#[test]
fn truncated_at_every_length_is_refused() {
    let set = {
        let mut set = RecordSet::new();
        set.put("_serial0", &v3()).unwrap();
        set.put("vcpu/0", &v1()).unwrap();
        set
    };
    let (state, set) = (v3().encode(), set.encode());
    for length in 0..state.len() {
        assert!(UartV3::decode(&state[..length]).is_err(), "{length}");
    }
    for length in 0..set.len() {
        assert!(RecordSet::decode(&set[..length]).is_err(), "{length}");
    }
}

#[test]
fn trailing_bytes_are_refused() {
    for extra in [0x00, 0xf6, 0xff, 0x80] {
        let mut bytes = v2().encode();
        bytes.push(extra);
        assert!(UartV2::decode(&bytes).is_err(), "{extra:#x}");
    }
}

#[test]
fn unknown_fields_and_other_spellings_are_refused() {
    // 83 = array of 3: divisor, fifo, scratch.
    let good = [0x83, 0x01, 0x41, 0xaa, 0x02];
    assert!(UartV2::decode(&good).is_ok());
    let unknown_field = [0x84, 0x01, 0x41, 0xaa, 0x02, 0x03];
    let long_spelling = [0x83, 0x18, 0x01, 0x41, 0xaa, 0x02];
    let indefinite = [0x9f, 0x01, 0x41, 0xaa, 0x02, 0xff];
    for bytes in [&unknown_field[..], &long_spelling, &indefinite] {
        assert!(UartV2::decode(bytes).is_err(), "{bytes:02x?}");
    }
}

#[test]
fn deep_nesting_does_not_recurse() {
    // A fourth field of a version that has three, nested 4 million deep: skipped without the stack, then refused.
    for opening in [0x81, 0x9f, 0xa1, 0xc1] {
        let mut bytes = vec![0x84, 0x01, 0x41, 0xaa, 0x02];
        bytes.resize(4 << 20, opening);
        assert!(UartV2::decode(&bytes).is_err(), "{opening:#x}");
        // And where a known field is expected.
        bytes.drain(..5);
        assert!(UartV2::decode(&bytes).is_err(), "{opening:#x}");
        assert!(RecordSet::decode(&bytes).is_err(), "{opening:#x}");
    }
}

#[test]
fn fuzz_mutated_records_never_panic() {
    let mut set = RecordSet::new();
    set.put("_serial0", &v1()).unwrap();
    set.put("_serial1", &v3()).unwrap();
    let seeds = [v1().encode(), v2().encode(), v3().encode(), set.encode()];
    let mut random = Random::new(0x9e37_79b9_7f4a_7c15);
    // A length of 64 bits.
    let length: &[u8] = &[0x9b, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff];
    for round in 0..rounds(40_000) as usize {
        let mut bytes = seeds[round % seeds.len()].clone();
        for _ in 0..=random.below(4) {
            mutate(&mut bytes, &mut random, &[length]);
        }
        decode_all(&bytes);
    }
}

proptest! {
    #[test]
    fn any_state_survives(divisor: u16, fifo: Vec<u16>, scratch: u8, pending: Option<u8>) {
        let state = UartV3 { divisor, fifo, scratch, pending };
        prop_assert_eq!(UartV3::decode(&state.encode()).unwrap(), state);
    }

    #[test]
    fn any_bytes_are_answered(bytes: Vec<u8>) {
        decode_all(&bytes);
    }

    #[test]
    fn any_set_survives(owners in proptest::collection::btree_map(".{0,8}", any::<u16>(), 0..8)) {
        let mut set = RecordSet::new();
        for (owner, divisor) in &owners {
            set.put(owner, &UartV1 { divisor: *divisor, fifo: Vec::new() }).unwrap();
        }
        let mut read = RecordSet::decode(&set.encode()).unwrap();
        for (owner, divisor) in owners {
            prop_assert_eq!(read.take::<UartV1>(&owner).unwrap().divisor, divisor);
        }
        read.finish().unwrap();
    }
}
