//! Every command against every fault, golden bytes, properties and seeded mutators.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests fail by panicking")]

use std::fs;
use std::path::Path;

use proptest::prelude::*;
use vmm_fuzzing::{Random, mutate, rounds};
use vmm_migration_protocol::{
    BULK_HEADER_LENGTH, Bulk, CHUNK, Command, Frame, FrameError, HEADER_LENGTH, Message, PAGE, Reason,
    contents_checksum, page_checksum,
};

use common::{Whole, decode, run, samples};

mod common;

/// A payload of `length` bytes with no two neighbours alike.
fn payload(length: u32) -> Vec<u8> {
    (0..length).map(|index| (index % 251) as u8).collect()
}

fn limits(command: Command) -> (u32, u32) {
    (*command.payload_lengths().start(), *command.payload_lengths().end())
}

/// Commands whose payload is all in the frame.
fn plain() -> Vec<Command> {
    Command::ALL.into_iter().filter(|command| !command.is_bulk()).collect()
}

/// A frame of each command, as bytes.
fn all() -> Vec<(Command, Vec<u8>)> {
    samples::frames().into_iter().map(|(command, frame)| (command, frame.encode())).collect()
}

fn smallest(command: Command) -> Vec<u8> {
    Frame::new(command, payload(limits(command).0)).unwrap().encode()
}

fn first_error(bytes: &[u8]) -> FrameError {
    let (frames, end) = run(std::iter::once(bytes));
    assert!(frames.is_empty());
    end.unwrap_err()
}

/// Makes the checksum right again, as a hostile peer would.
fn seal(mut bytes: Vec<u8>) -> Vec<u8> {
    let number = u16::from_le_bytes([bytes[0], bytes[1]]);
    let bulk = Command::from_number(number).is_some_and(Command::is_bulk);
    let end = if bulk { BULK_HEADER_LENGTH.min(bytes.len()) } else { bytes.len() };
    bytes[4..8].fill(0);
    let checksum = crc32c::crc32c(&bytes[..end]);
    bytes[4..8].copy_from_slice(&checksum.to_le_bytes());
    bytes
}

fn with_length(mut bytes: Vec<u8>, length: u64) -> Vec<u8> {
    bytes[8..16].copy_from_slice(&length.to_le_bytes());
    seal(bytes)
}

#[test]
fn the_document_has_this_table() {
    let rows = include_str!("../WIRE.md").lines().filter_map(|line| {
        let mut cells = line.trim_matches('|').split('|').map(str::trim);
        let number: u16 = cells.next()?.parse().ok()?;
        let (name, sender, lengths) = (cells.next()?.to_owned(), cells.next()?.to_owned(), cells.next()?);
        let (least, most) = lengths.split_once(" to ").unwrap_or((lengths, lengths));
        Some((number, name, sender, documented(least)..=documented(most)))
    });
    // The other tables also have a number first.
    let rows: Vec<_> =
        rows.filter(|(_, name, _, _)| Command::ALL.iter().any(|c| c.to_string() == *name)).collect();
    let code = Command::ALL.map(|command| {
        let sender = format!("{:?}", command.sender()).to_lowercase();
        (command.number(), command.to_string(), sender, command.payload_lengths())
    });
    assert_eq!(rows, code);
}

#[test]
fn the_document_has_these_reasons() {
    for reason in Reason::ALL.into_iter().filter(|reason| *reason != Reason::Lost) {
        let row = format!("\n| {} | {} |\n", reason.number(), reason.text());
        assert!(include_str!("../WIRE.md").contains(&row), "{row}");
    }
}

/// "2 MiB + 24" as a number; 0 for what is none.
fn documented(text: &str) -> u32 {
    let term = |term: &str| match term.trim().split_once(' ') {
        Some((count, "MiB")) => count.parse().unwrap_or(0) << 20,
        Some((count, "KiB")) => count.parse().unwrap_or(0) << 10,
        _ => term.trim().parse::<u32>().unwrap_or(0),
    };
    text.split('+').map(term).sum()
}

#[test]
fn allowed_payloads_pass() {
    for command in plain() {
        let (least, most) = limits(command);
        for length in [least, most] {
            let frame = Frame::new(command, payload(length)).unwrap();
            let bytes = [&frame.header()[..], frame.payload()].concat();
            assert_eq!(bytes, frame.encode());
            let (frames, end) = run(std::iter::once(&bytes[..]));
            assert_eq!((frames, end), (vec![Whole::Frame(frame)], Ok(())), "{command} of {length}");
        }
    }
}

#[test]
fn lengths_outside_the_bounds_are_refused_from_the_header_alone() {
    for (command, bytes) in all() {
        let (least, most) = limits(command);
        let mut wrong = vec![u64::from(most) + 1, 1 << 32, (1 << 32) + u64::from(least), 1 << 63, u64::MAX];
        wrong.extend(least.checked_sub(1).map(u64::from));
        for length in wrong {
            let bytes = with_length(bytes.clone(), length);
            let expected = FrameError::Length { command, length, least, most };
            assert_eq!(first_error(&bytes[..HEADER_LENGTH]), expected, "{command} of {length}");
        }
    }
}

#[test]
fn a_sender_cannot_build_them_either() {
    for command in plain() {
        let (least, most) = limits(command);
        for length in [least.checked_sub(1), most.checked_add(1)].into_iter().flatten() {
            assert!(Frame::new(command, payload(length)).is_err(), "{command} of {length}");
        }
    }
    assert_eq!(Frame::new(Command::Memory, payload(100)), Err(FrameError::Bulk { command: Command::Memory }));
    assert!(Bulk::memory(samples::range(0, CHUNK), 0, 0).is_ok());
    assert!(Bulk::memory(samples::range(0, CHUNK + PAGE), 0, 0).is_err());
    assert!(Bulk::packed(samples::range(0, CHUNK), 0, 0, 0).is_err());
    assert!(Bulk::packed(samples::range(0, CHUNK), 0, 0, CHUNK as usize + 1).is_err());
}

#[test]
fn a_short_or_absent_payload_is_waited_for_and_told_at_the_end() {
    for (command, bytes) in all() {
        for received in 1..bytes.len() {
            assert_eq!(first_error(&bytes[..received]), FrameError::Truncated { received }, "{command}");
        }
    }
}

#[test]
fn a_long_payload_is_the_next_frames_header() {
    for (command, mut bytes) in all() {
        bytes.extend([0xff; HEADER_LENGTH]);
        let (frames, end) = run(std::iter::once(&bytes[..]));
        assert_eq!(frames.len(), 1, "{command}");
        assert_eq!(end, Err(FrameError::Version { found: 0xffff }), "{command}");
    }
}

#[test]
fn damage_anywhere_is_found() {
    for (command, good) in all() {
        let whole = if command.is_bulk() { BULK_HEADER_LENGTH } else { good.len() };
        for at in 0..whole * 8 {
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
fn damaged_contents_are_found_and_the_stream_goes_on() {
    let (command, good) = all().into_iter().find(|(command, _)| *command == Command::Memory).unwrap();
    for at in [BULK_HEADER_LENGTH, good.len() - 1] {
        let mut bytes = good.clone();
        bytes[at] ^= 1;
        bytes.extend(&good);
        let (frames, end) = run(std::iter::once(&bytes[..]));
        assert_eq!(end, Ok(()));
        let checks: Vec<bool> = frames
            .iter()
            .map(|frame| match frame {
                Whole::Bulk(bulk, contents) => bulk.check(contents_checksum([&contents[..]])).is_ok(),
                Whole::Frame(_) => panic!("{command} is bulk"),
            })
            .collect();
        assert_eq!(checks, [false, true]);
    }
}

#[test]
fn ranges_that_disagree_are_refused_before_contents_land() {
    let (_, good) = all().into_iter().find(|(command, _)| *command == Command::Memory).unwrap();
    let beyond = u64::MAX - PAGE + 1;
    for (gpa, length) in [(1, PAGE), (0, PAGE + 1), (0, 2 * PAGE), (0, 0), (beyond, PAGE), (0, u64::MAX)] {
        let mut bytes = good.clone();
        bytes[16..24].copy_from_slice(&gpa.to_le_bytes());
        bytes[24..32].copy_from_slice(&length.to_le_bytes());
        assert_eq!(first_error(&seal(bytes)[..BULK_HEADER_LENGTH]), FrameError::Range { gpa, length });
    }
}

#[test]
fn other_versions_are_refused_even_when_whole() {
    for (command, good) in all() {
        for version in [0, 2, u16::MAX] {
            let mut bytes = good.clone();
            bytes[2..4].copy_from_slice(&u16::to_le_bytes(version));
            assert_eq!(first_error(&seal(bytes)), FrameError::Version { found: version }, "{command}");
        }
    }
}

#[test]
fn unknown_commands_are_refused_even_when_whole() {
    for number in [0, 7, 63, 83, 95, 101, u16::MAX] {
        let mut bytes = smallest(Command::Start);
        bytes[0..2].copy_from_slice(&u16::to_le_bytes(number));
        assert_eq!(first_error(&seal(bytes)), FrameError::Command { number });
    }
}

#[test]
fn an_error_is_final() {
    let mut decoder = vmm_migration_protocol::Decoder::new();
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
    // XXH3-64 as xxhash-rust 0.8 has it: of nothing, of a page of zeros, and of one that counts to 250.
    let counting: Vec<u8> = (0..4096).map(|at| (at % 251) as u8).collect();
    let sums = [&[][..], &[0; 4096], &counting].map(page_checksum);
    assert_eq!(sums, [0x38d3_94c2, 0x48c6_89ba, 0x04f1_bc71]);
    let start = Frame::new(Command::Start, Vec::new()).unwrap().encode();
    assert_eq!(start, [1, 0, 1, 0, 0x52, 0xc2, 0x7b, 0xe4, 0, 0, 0, 0, 0, 0, 0, 0]);

    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    for (command, frame) in samples::frames() {
        let path = folder.join(format!("{}-v1.bin", command.to_string().to_lowercase()));
        if std::env::var_os("VMM_BLESS").is_some_and(|value| value == "1") && !path.exists() {
            fs::write(&path, frame.encode()).unwrap();
        }
        let golden = fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        assert_eq!(frame.encode(), golden, "{command}: shipped bytes never change");
        assert_eq!(run(std::iter::once(&golden[..])), (vec![frame], Ok(())), "{command}");
    }
}

#[test]
fn golden_messages_are_understood() {
    for message in samples::messages() {
        let frame = message.clone().encode().unwrap();
        assert_eq!(Message::decode(frame).unwrap(), message);
    }
}

#[test]
fn keys_of_later_builds_are_skipped() {
    for (at, message) in [
        (8, samples::messages()[5].clone()),
        (0, Message::Accept(samples::accept())),
        (0, samples::messages()[7].clone()),
    ] {
        let command = message.command();
        let mut payload = message.clone().encode().unwrap().into_payload();
        // One entry more in the map: key 42, a list of a text.
        payload[at] += 1;
        payload.extend([0x18, 42, 0x81, 0x61, b'x']);
        assert_eq!(Message::decode(Frame::new(command, payload.clone()).unwrap()).unwrap(), message);
        payload.push(0);
        let error = Message::decode(Frame::new(command, payload).unwrap()).unwrap_err();
        assert_eq!(error.to_string(), format!("{command} frame has bytes after its end"));
    }
}

#[test]
fn fuzz_mutated_streams_never_panic() {
    let seeds: Vec<Vec<u8>> =
        all().into_iter().map(|(_, bytes)| bytes).filter(|bytes| bytes.len() < 1000).collect();
    let mut random = Random::new(0x2545_f491_4f6c_dd1d);
    for _ in 0..rounds(20_000) {
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

fn frame() -> impl Strategy<Value = Whole> {
    let plain = prop::sample::select(plain()).prop_flat_map(|command| {
        let (least, most) = limits(command);
        let lengths = least as usize..=most.min(least + 300) as usize;
        prop::collection::vec(any::<u8>(), lengths)
            .prop_map(move |payload| Whole::Frame(Frame::new(command, payload).unwrap()))
    });
    let bulk = (0_u64..1000, 1_u64..512, prop::collection::vec(any::<u8>(), 1..300), any::<u32>());
    let bulk = bulk.prop_map(|(page, pages, contents, pass)| {
        let checksum = contents_checksum([&contents[..]]);
        let range = samples::range(page * PAGE, pages * PAGE);
        Whole::Bulk(Bulk::packed(range, pass, checksum, contents.len()).unwrap(), contents)
    });
    prop_oneof![3 => plain, 1 => bulk]
}

proptest! {
    #[test]
    fn any_frames_survive_any_splits(
        frames in prop::collection::vec(frame(), 0..6),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
    ) {
        let stream: Vec<u8> = frames.iter().flat_map(Whole::encode).collect();
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

    #[test]
    fn any_payload_is_answered(
        command in prop::sample::select(plain()),
        payload in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        if let Ok(frame) = Frame::new(command, payload) {
            common::message(frame);
        }
    }
}
