//! SHA-256 (FIPS 180-4) of files and of chunks of memory.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::{Digest, Sha256};

use super::PAGE;

/// A SHA-256; 64 lower-case hexadecimal digits as text.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Hash(pub [u8; 32]);

impl Hash {
    /// The hash of `bytes`.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }
}

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Text that is not 64 lower-case hexadecimal digits.
#[derive(Debug, thiserror::Error)]
#[error("not a SHA-256: 64 lower-case hexadecimal digits")]
pub struct NotAHash;

impl FromStr for Hash {
    type Err = NotAHash;

    fn from_str(text: &str) -> Result<Self, NotAHash> {
        let digits = text.as_bytes();
        let plain = |digit: &u8| matches!(digit, b'0'..=b'9' | b'a'..=b'f');
        if digits.len() != 64 || !digits.iter().all(plain) {
            return Err(NotAHash);
        }
        let mut hash = [0; 32];
        for (byte, at) in hash.iter_mut().zip((0..64).step_by(2)) {
            let pair = text.get(at..at + 2).ok_or(NotAHash)?;
            *byte = u8::from_str_radix(pair, 16).map_err(|_| NotAHash)?;
        }
        Ok(Self(hash))
    }
}

impl Serialize for Hash {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Hash {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// The hash of a chunk: of the index (u32, little-endian, counted in the chunk) and bytes of each page that
/// is not all zero. A chunk without such a page has none.
#[derive(Debug, Default)]
pub(super) struct ChunkHasher(Option<Sha256>);

impl ChunkHasher {
    /// Adds the page at `offset` in the chunk, which is not all zero.
    pub(super) fn page(&mut self, offset: u64, bytes: &[u8]) {
        let index = u32::try_from(offset / PAGE).unwrap_or(u32::MAX);
        let hasher = self.0.get_or_insert_default();
        hasher.update(index.to_le_bytes());
        hasher.update(bytes);
    }

    /// Adds those of the pages from `offset` on that are not all zero.
    pub(super) fn pages(&mut self, mut offset: u64, bytes: &[u8]) {
        for page in bytes.chunks(PAGE as usize) {
            if !is_zero(page) {
                self.page(offset, page);
            }
            offset += PAGE;
        }
    }

    pub(super) fn finish(self) -> Option<Hash> {
        self.0.map(|hasher| Hash(hasher.finalize().into()))
    }
}

/// Whether every byte is zero: the first is, and each is as the one before it. The C library compares fast, whatever this crate
/// is optimized for.
pub(super) fn is_zero(bytes: &[u8]) -> bool {
    let (Some((first, after)), Some((_, before))) = (bytes.split_first(), bytes.split_last()) else {
        return true;
    };
    *first == 0 && after == before
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_is_sha_256() {
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(Hash::of(b"abc").to_string(), abc);
        assert_eq!(abc.parse::<Hash>().unwrap(), Hash::of(b"abc"));
        for wrong in ["", "ba", &abc.to_uppercase(), &abc.replace('b', "+"), &format!("{abc}0")] {
            assert!(wrong.parse::<Hash>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_chunks_hash_is_of_its_non_zero_pages_and_their_places() {
        let of = |chunk: &[u8]| {
            let mut hasher = ChunkHasher::default();
            hasher.pages(0, chunk);
            hasher.finish()
        };
        let mut chunk = vec![0; 3 * PAGE as usize];
        assert_eq!(of(&chunk), None);
        chunk[PAGE as usize + 7] = 1;
        let mut bytes = vec![1, 0, 0, 0];
        bytes.extend_from_slice(&chunk[PAGE as usize..2 * PAGE as usize]);
        assert_eq!(of(&chunk), Some(Hash::of(&bytes)));
        chunk.rotate_left(PAGE as usize);
        assert_ne!(of(&chunk), Some(Hash::of(&bytes)), "the same page elsewhere");
    }

    #[test]
    fn one_bit_anywhere_is_not_zero() {
        let mut page = vec![0; PAGE as usize];
        assert!(is_zero(&page));
        for at in [0, 1, 127, 128, 4095] {
            page[at] = 0x80;
            assert!(!is_zero(&page), "{at}");
            page[at] = 0;
        }
    }
}
