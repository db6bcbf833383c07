//! Contents that are compressed, by this crate and by hand, and what hostile ones do.
#![cfg(feature = "compression")]
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests fail by panicking")]

use std::fs;
use std::path::Path;

use vmm_fuzzing::{Random, mutate, rounds};
use vmm_migration_protocol::{
    Bulk, CHUNK, Features, MemoryRange, PAGE, Packer, UnpackError, contents_checksum, unpack,
};

use common::{Whole, run, unpacked};

mod common;

/// A page of `a`, compressed by hand: one literal, a match of 4090 bytes one byte back, five literals.
fn page_of_a() -> Vec<u8> {
    [&[0x1f, b'a', 1, 0][..], &[0xff; 15], &[246, 0x50], b"aaaaa"].concat()
}

/// Bytes that do not compress.
fn noise(length: usize) -> Vec<u8> {
    let mut random = Random::new(1);
    (0..length).map(|_| random.next().to_le_bytes()[3]).collect()
}

/// Bytes as memory has them: pointers, texts, zeros.
fn memory(length: usize) -> Vec<u8> {
    let mut random = Random::new(2);
    let words = std::iter::repeat_with(|| match random.next() % 4 {
        0 => [0; 8],
        1 => *b"kthreadd",
        2 => 0xffff_8880_0000_0000_u64.wrapping_add(random.next() % 4096).to_le_bytes(),
        _ => random.next().to_le_bytes(),
    });
    words.flatten().take(length).collect()
}

#[test]
fn what_is_packed_becomes_itself_again() {
    let mut packer = Packer::new();
    // Small and large in turn: it keeps a table.
    for length in [PAGE as usize, 256 << 10, PAGE as usize, 2 * PAGE as usize, CHUNK as usize] {
        let contents = memory(length);
        let packed = packer.pack(&contents).unwrap();
        assert!(packed.len() < length * 15 / 16, "{} of {length} bytes", packed.len());
        let mut again = vec![0xee; length];
        unpack(packed, &mut again).unwrap();
        assert!(again == contents, "{length} bytes");
    }
}

#[test]
fn what_does_not_get_smaller_goes_as_it_is() {
    let mut packer = Packer::new();
    for length in [PAGE as usize, CHUNK as usize] {
        assert_eq!(packer.pack(&noise(length)), None);
        assert!(packer.pack(&vec![7; length]).is_some());
    }
    assert_eq!(packer.pack(&[]), None);
    // A page of which an eighth compresses away pays, one of which a thirtieth does not.
    let mut contents = noise(PAGE as usize);
    contents[..PAGE as usize / 30].fill(0);
    assert_eq!(packer.pack(&contents), None);
    contents[..PAGE as usize / 8].fill(0);
    assert!(packer.pack(&contents).is_some());
}

#[test]
fn golden_bytes_become_what_they_were() {
    let mut contents = vec![0; PAGE as usize];
    unpack(&page_of_a(), &mut contents).unwrap();
    assert_eq!(contents, vec![b'a'; PAGE as usize]);

    let range = MemoryRange::new(PAGE, PAGE).unwrap();
    let bulk = Bulk::packed(range, 1, contents_checksum([&page_of_a()[..]]), page_of_a().len()).unwrap();
    let whole = Whole::Bulk(bulk, page_of_a());
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/packed-lz4-v1.bin");
    if std::env::var_os("VMM_BLESS").is_some_and(|value| value == "1") && !path.exists() {
        fs::write(&path, whole.encode()).unwrap();
    }
    let golden = fs::read(&path).unwrap();
    assert_eq!(whole.encode(), golden, "shipped bytes never change");
    assert_eq!(run(std::iter::once(&golden[..])), (vec![whole], Ok(())));
}

#[test]
fn contents_are_all_of_the_range_and_nothing_else() {
    let packed = page_of_a();
    let page = PAGE as usize;
    let into = |length| unpack(&packed, &mut vec![0; length]);
    assert_eq!(into(page), Ok(()));
    assert_eq!(into(page + 1), Err(UnpackError::Short { found: page, expected: page + 1 }));
    for shorter in [0, 1, 100, page - 1] {
        assert_eq!(into(shorter), Err(UnpackError::Long { expected: shorter }));
    }
    let mut out = vec![0; page];
    for (hostile, why) in [
        (&[][..], "nothing"),
        (&[0x1f, b'a', 0, 0, 0], "offset 0"),
        (&[0x1f, b'a', 2, 0, 0], "an offset before the beginning"),
        (&[0x1f, b'a', 0xff, 0xff, 0], "an offset far before the beginning"),
        (&[0xf0, 0xff, 0xff], "literals that are not there"),
        (&[0x1f, b'a', 1], "half an offset"),
        (&[0x1f, b'a', 1, 0, 0xff, 0xff], "a length without end"),
    ] {
        assert!(unpack(hostile, &mut out).is_err(), "{why}");
    }
    // A length that grows by 255 with each byte, up to the largest frame.
    let bomb = [&[0x1f, b'a', 1, 0][..], &vec![0xff; CHUNK as usize - 4]].concat();
    assert!(unpack(&bomb, &mut vec![0; CHUNK as usize]).is_err());
}

#[test]
fn this_build_has_lz4() {
    assert_eq!(Features::COMPRESSION, Features::LZ4);
}

#[test]
fn fuzz_contents_are_refused_or_fill_the_range() {
    let mut packer = Packer::new();
    let small = packer.pack(&memory(PAGE as usize)).unwrap().to_vec();
    let seeds = [page_of_a(), small.clone(), packer.pack(&memory(4 * PAGE as usize)).unwrap().to_vec()];
    let mut random = Random::new(3);
    let mut fine = 0;
    for round in 0..rounds(1500) {
        let mut bytes = seeds[usize::try_from(round).unwrap() % seeds.len()].clone();
        mutate(&mut bytes, &mut random, &[&small, &[0xff; 40], &page_of_a()]);
        fine += u32::from(unpacked(&bytes));
    }
    assert!(fine > 0, "no mutant was ever a block");
}
