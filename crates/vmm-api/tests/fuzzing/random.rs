//! Seeded randomness for the tests on stable Rust.

/// How much longer than usual to go on; set by the fuzz-smoke check.
pub(crate) fn factor() -> usize {
    std::env::var("VMM_FUZZ_FACTOR").map_or(1, |factor| factor.parse().unwrap())
}

/// xorshift64.
pub(crate) struct Xorshift(pub(crate) u64);

impl Xorshift {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(crate) fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % (bound as u64)).unwrap()
    }

    pub(crate) fn byte(&mut self) -> u8 {
        (self.next() >> 32) as u8
    }
}

/// Changes one place of `bytes`.
pub(crate) fn mutate(bytes: &mut Vec<u8>, random: &mut Xorshift) {
    let at = random.below(bytes.len() + 1);
    let byte = random.byte();
    match random.below(6) {
        0 => bytes.truncate(at),
        1 => bytes.insert(at, byte),
        2 if at < bytes.len() => bytes[at] = byte,
        3 if at < bytes.len() => bytes[at] ^= 1 << (byte & 7),
        4 if at < bytes.len() => drop(bytes.remove(at)),
        _ => {
            let end = (at + usize::from(byte)).min(bytes.len());
            let copy = bytes[at..end].to_vec();
            bytes.splice(at..at, copy);
        }
    }
}
