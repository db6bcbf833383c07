//! Every command against every fault, golden bytes, properties and seeded mutators.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests fail by panicking")]

use std::fs;
use std::path::Path;

use proptest::prelude::*;
use vmm_fuzzing::{Random, mutate, rounds};
use vmm_migration_protocol::{Command, Decoder, Frame, FrameError, HEADER_LENGTH, header};

use common::{decode, run};

mod common;

/// A payload of `length` bytes with no two neighbours alike.
fn payload(length: u32) -> Vec<u8> {
    (0..length).map(|index| (index % 251) as u8).collect()
}

fn limits(command: Command) -> (u32, u32) {
    (*command.payload_lengths().start(), *command.payload_lengths().end())
}

/// The frame of the smallest payload, as bytes.
fn smallest(command: Command) -> Vec<u8> {
    Frame::new(command, payload(limits(command).0)).unwrap().encode()
}

fn first_error(bytes: &[u8]) -> FrameError {
    let (frames, end) = run(std::iter::once(bytes));
    assert!(frames.is_empty());
    end.unwrap_err()
}

/// Puts `length` into the header and makes the checksum right again, as a hostile peer would.
fn with_length(mut bytes: Vec<u8>, length: u64) -> Vec<u8> {
    bytes[8..16].copy_from_slice(&length.to_le_bytes());
    seal(bytes)
}

fn seal(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes[4..8].fill(0);
    let checksum = crc32c::crc32c(&bytes);
    bytes[4..8].copy_from_slice(&checksum.to_le_bytes());
    bytes
}

#[test]
fn the_document_has_this_table() {
    let rows = include_str!("../WIRE.md").lines().filter_map(|line| {
        let mut cells = line.trim_matches('|').split('|').map(str::trim);
        let number: u16 = cells.next()?.parse().ok()?;
        let name = cells.next()?.to_owned();
        let lengths = cells.nth(1)?;
        let (least, most) = lengths.split_once(" to ").unwrap_or((lengths, lengths));
        Some((number, name, documented(least)..=documented(most)))
    });
    // The table of the header's fields also has a number first, but none in its place for lengths.
    let rows: Vec<_> = rows.filter(|(_, name, _)| name.starts_with(char::is_uppercase)).collect();
    let code = Command::ALL.map(|command| (command.number(), command.to_string(), command.payload_lengths()));
    assert_eq!(rows, code);
}

/// "2 MiB + 16" as a number; 0 for what is none.
fn documented(text: &str) -> u32 {
    let term = |term: &str| match term.trim().split_once(' ') {
        Some((count, "MiB")) => count.parse().unwrap_or(0) << 20,
        _ => term.trim().parse::<u32>().unwrap_or(0),
    };
    text.split('+').map(term).sum()
}

#[test]
fn allowed_payloads_pass() {
    for command in Command::ALL {
        let (least, most) = limits(command);
        for length in [least, most] {
            let frame = Frame::new(command, payload(length)).unwrap();
            let bytes = frame.encode();
            let (frames, end) = run(std::iter::once(&bytes[..]));
            assert_eq!((frames, end), (vec![frame], Ok(())), "{command} of {length}");
        }
    }
}

#[test]
fn lengths_outside_the_bounds_are_refused_from_the_header_alone() {
    for command in Command::ALL {
        let (least, most) = limits(command);
        let mut wrong = vec![u64::from(most) + 1, 1 << 32, (1 << 32) + u64::from(least), 1 << 63, u64::MAX];
        wrong.extend(least.checked_sub(1).map(u64::from));
        for length in wrong {
            let bytes = with_length(smallest(command), length);
            let expected = FrameError::Length { command, length, least, most };
            assert_eq!(first_error(&bytes[..HEADER_LENGTH]), expected, "{command} of {length}");
        }
    }
}

#[test]
fn a_sender_cannot_build_them_either() {
    for command in Command::ALL {
        let (least, most) = limits(command);
        for length in [least.checked_sub(1), most.checked_add(1)].into_iter().flatten() {
            let payload = payload(length);
            assert!(Frame::new(command, payload.clone()).is_err(), "{command} of {length}");
            assert!(header(command, &[&payload]).is_err(), "{command} of {length}");
        }
    }
}

#[test]
fn a_short_or_absent_payload_is_waited_for_and_told_at_the_end() {
    for command in Command::ALL {
        let length = limits(command).0.max(1).min(limits(command).1);
        let bytes = Frame::new(command, payload(length)).unwrap().encode();
        for received in 1..bytes.len() {
            assert_eq!(first_error(&bytes[..received]), FrameError::Truncated { received }, "{command}");
        }
    }
}

#[test]
fn a_long_payload_is_the_next_frames_header() {
    for command in Command::ALL {
        let mut bytes = smallest(command);
        bytes.extend([0xff; HEADER_LENGTH]);
        let (frames, end) = run(std::iter::once(&bytes[..]));
        assert_eq!(frames.len(), 1, "{command}");
        assert_eq!(end, Err(FrameError::Version { found: 0xffff }), "{command}");
    }
}

#[test]
fn damage_anywhere_is_found() {
    for command in Command::ALL {
        let good = smallest(command);
        for at in 0..good.len() * 8 {
            let mut bytes = good.clone();
            bytes[at / 8] ^= 1 << (at % 8);
            let error = first_error(&bytes);
            match at / 8 {
                2..=3 => assert!(matches!(error, FrameError::Version { .. }), "{command}, bit {at}: {error}"),
                4..=7 | 16.. => {
                    assert!(matches!(error, FrameError::Checksum { .. }), "{command}, bit {at}: {error}");
                }
                // Command and length: whatever is noticed first.
                _ => {}
            }
        }
    }
}

#[test]
fn other_versions_are_refused_even_when_whole() {
    for command in Command::ALL {
        for version in [0, 2, u16::MAX] {
            let mut bytes = smallest(command);
            bytes[2..4].copy_from_slice(&version.to_le_bytes());
            assert_eq!(first_error(&seal(bytes)), FrameError::Version { found: version }, "{command}");
        }
    }
}

#[test]
fn unknown_commands_are_refused_even_when_whole() {
    for number in [0, 7, 63, 71, u16::MAX] {
        let mut bytes = smallest(Command::Start);
        bytes[0..2].copy_from_slice(&number.to_le_bytes());
        assert_eq!(first_error(&seal(bytes)), FrameError::Command { number });
    }
}

#[test]
fn an_error_is_final() {
    let mut decoder = Decoder::new();
    let mut bad = smallest(Command::Start);
    bad[4] ^= 1;
    let error = decoder.push(&mut &bad[..]).unwrap_err();
    let good = smallest(Command::Start);
    let mut input = &good[..];
    assert_eq!(decoder.push(&mut input), Err(error));
    assert_eq!(input.len(), good.len(), "nothing is taken any more");
    assert_eq!(decoder.finish(), Err(error));
}

#[test]
fn golden_bytes() {
    // CRC-32C's check value, and a header whose checksum a second implementation computed.
    assert_eq!(crc32c::crc32c(b"123456789"), 0xe306_9283);
    let start = Frame::new(Command::Start, Vec::new()).unwrap().encode();
    assert_eq!(start, [1, 0, 1, 0, 0x52, 0xc2, 0x7b, 0xe4, 0, 0, 0, 0, 0, 0, 0, 0]);

    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    for command in Command::ALL {
        let bytes = smallest(command);
        let path = folder.join(format!("{}-v1.bin", command.to_string().to_lowercase()));
        if std::env::var_os("VMM_BLESS").is_some_and(|value| value == "1") && !path.exists() {
            fs::write(&path, &bytes).unwrap();
        }
        let golden = fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        assert_eq!(bytes, golden, "{command}: shipped bytes never change");
    }
}

#[test]
fn fuzz_mutated_streams_never_panic() {
    let seeds: Vec<Vec<u8>> = Command::ALL.map(smallest).to_vec();
    let mut random = Random::new(0x2545_f491_4f6c_dd1d);
    for _ in 0..rounds(40_000) {
        let mut bytes: Vec<u8> =
            (0..=random.below(3)).flat_map(|_| seeds[random.below(seeds.len())].clone()).collect();
        for _ in 0..random.below(4) {
            mutate(&mut bytes, &mut random, &[]);
        }
        if random.below(2) == 0 && bytes.len() >= HEADER_LENGTH {
            // Past the checksum.
            bytes = seal(bytes);
        }
        decode(&bytes);
    }
}

fn frame() -> impl Strategy<Value = Frame> {
    prop::sample::select(Command::ALL.to_vec()).prop_flat_map(|command| {
        let (least, most) = limits(command);
        let lengths = least as usize..=most.min(least + 300) as usize;
        prop::collection::vec(any::<u8>(), lengths)
            .prop_map(move |payload| Frame::new(command, payload).unwrap())
    })
}

proptest! {
    #[test]
    fn any_frames_survive_any_splits(
        frames in prop::collection::vec(frame(), 0..6),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
    ) {
        let stream: Vec<u8> = frames.iter().flat_map(Frame::encode).collect();
        let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.index(stream.len() + 1)).collect();
        cuts.sort_unstable();
        cuts.push(stream.len());
        let pieces = cuts.into_iter().scan(0, |begin, end| {
            let piece = &stream[*begin..end];
            *begin = end;
            Some(piece)
        });
        prop_assert_eq!(run(pieces), (frames, Ok(())));
    }

    #[test]
    fn any_bytes_are_answered(bytes: Vec<u8>) {
        decode(&bytes);
    }
}
