//! What tests with seeded mutators share: how long they go on, their randomness, and two mutators.
//!
//! For `[dev-dependencies]` of any crate: it depends on none.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]

/// `count`, times the factor in `VMM_FUZZ_FACTOR`: how often to go round. CI's fuzz-smoke sets it.
///
/// # Panics
/// When the factor is no number.
#[must_use]
pub fn rounds(count: u32) -> u32 {
    count * std::env::var("VMM_FUZZ_FACTOR").map_or(1, |factor| factor.parse::<u32>().unwrap())
}

/// Marsaglia's xorshift64: the same sequence on every run.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// From a seed that is not 0.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        assert_ne!(seed, 0, "a seed of 0 would stay 0");
        Self(seed)
    }

    /// 64 bits.
    #[expect(clippy::should_implement_trait, reason = "an endless generator is no useful iterator here")]
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A number below `limit`, which is not 0.
    pub fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    /// A byte.
    pub fn byte(&mut self) -> u8 {
        (self.next() >> 32) as u8
    }

    /// One of `choices`.
    ///
    /// # Panics
    /// When there is none.
    pub fn pick<'a, T: ?Sized>(&mut self, choices: &[&'a T]) -> &'a T {
        choices[self.below(choices.len())]
    }
}

/// Changes one place of `bytes`: cuts, inserts, replaces, flips, doubles, or inserts one of `pieces`.
pub fn mutate(bytes: &mut Vec<u8>, random: &mut Random, pieces: &[&[u8]]) {
    let at = random.below(bytes.len() + 1);
    let byte = random.byte();
    match random.below(8) {
        0 => bytes.truncate(at),
        1 => bytes.insert(at, byte),
        2 if at < bytes.len() => bytes[at] = byte,
        3 if at < bytes.len() => bytes[at] ^= 1 << (byte & 7),
        4 => drop(bytes.drain(at..(at + usize::from(byte % 20)).min(bytes.len()))),
        5 => {
            let end = (at + usize::from(byte)).min(bytes.len());
            let copy = bytes[at..end].to_vec();
            bytes.splice(at..at, copy);
        }
        _ if pieces.is_empty() => drop(bytes.splice(at..at, [0xff; 8])),
        _ => drop(bytes.splice(at..at, random.pick(pieces).iter().copied())),
    }
}

/// `record`, a saved state in CBOR of definite lengths, with each of its unsigned integers in turn at each edge: 0, 1, around powers of two, its
/// own neighbours, the most.
#[must_use]
pub fn hostile_records(record: &[u8]) -> Vec<Vec<u8>> {
    const EDGES: [u64; 14] = [
        0,
        1,
        0x7f,
        0x80,
        0xff,
        0x100,
        0x7fff,
        0xffff,
        0x1_0000,
        u32::MAX as u64,
        1 << 32,
        i64::MAX as u64,
        u64::MAX - 1,
        u64::MAX,
    ];
    let mut hostile = Vec::new();
    for Integer { at, len, value } in integers(record) {
        let neighbours = [value.wrapping_sub(1), value.wrapping_add(1)];
        for edge in EDGES.into_iter().chain(neighbours).filter(|edge| *edge != value) {
            hostile.push([&record[..at], &encoded(edge), &record[at + len..]].concat());
        }
    }
    hostile
}

/// An unsigned integer of a record: where it lies, and what it says.
#[derive(Debug, PartialEq)]
struct Integer {
    at: usize,
    len: usize,
    value: u64,
}

/// Every unsigned integer in CBOR (RFC 8949, section 3) of definite lengths.
fn integers(bytes: &[u8]) -> Vec<Integer> {
    let mut found = Vec::new();
    let mut at = 0;
    while let Some(first) = bytes.get(at) {
        let extra = match first & 0x1f {
            0..=23 => 0,
            info @ 24..=27 => 1_usize << (info - 24),
            info => panic!("additional information {info}"),
        };
        let value = bytes[at + 1..=at + extra].iter().fold(0, |value, byte| value << 8 | u64::from(*byte));
        let value = if extra == 0 { u64::from(first & 0x1f) } else { value };
        let content = match first >> 5 {
            0 => {
                found.push(Integer { at, len: 1 + extra, value });
                0
            }
            2 | 3 => value as usize,
            // Arrays, maps, simple values.
            4 | 5 | 7 => 0,
            major => panic!("major type {major}"),
        };
        at += 1 + extra + content;
    }
    found
}

/// The shortest CBOR of an unsigned integer.
fn encoded(value: u64) -> Vec<u8> {
    let bytes = value.to_be_bytes();
    match value {
        0..24 => vec![bytes[7]],
        24..0x100 => vec![0x18, bytes[7]],
        0x100..0x1_0000 => [&[0x19], &bytes[6..]].concat(),
        0x1_0000..0x1_0000_0000 => [&[0x1a], &bytes[4..]].concat(),
        _ => [&[0x1b], bytes.as_slice()].concat(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_are_found_between_everything_else() {
        // [5, h'0102', "a", [300], true, null, 2^32]
        let mut record = vec![0x87, 5, 0x42, 1, 2, 0x61, b'a', 0x81, 0x19, 1, 44, 0xf5, 0xf6];
        record.extend(encoded(1 << 32));
        let values: Vec<u64> = integers(&record).iter().map(|integer| integer.value).collect();
        assert_eq!(values, [5, 300, 1 << 32]);
        let hostile = hostile_records(&record);
        assert!(hostile.iter().all(|bytes| *bytes != record));
        assert!(hostile.iter().any(|bytes| bytes[1] == 0 && bytes[2..] == record[2..]));
        assert_eq!(hostile.len(), 3 * 16 - 1, "2^32 is an edge itself");
    }

    #[test]
    fn numbers_read_back() {
        for value in [0, 23, 24, 0xff, 0x100, 0xffff, 0x1_0000, 0xffff_ffff, 0x1_0000_0000, u64::MAX] {
            let bytes = encoded(value);
            assert_eq!(integers(&bytes), [Integer { at: 0, len: bytes.len(), value }]);
        }
    }

    #[test]
    fn mutants_are_the_same_on_every_run_and_differ_from_each_other() {
        let mutants = || {
            let mut random = Random::new(7);
            let mutant = |_| {
                let mut bytes = b"0123456789".to_vec();
                mutate(&mut bytes, &mut random, &[b"piece"]);
                bytes
            };
            (0..200).map(mutant).collect::<Vec<_>>()
        };
        let all = mutants();
        assert_eq!(all, mutants());
        let mut different = all;
        different.sort();
        different.dedup();
        assert!(different.len() > 100, "{}", different.len());
    }
}
