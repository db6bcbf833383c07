//! Shared by the tests on stable Rust and the fuzz targets in fuzz/.
#![allow(dead_code, clippy::unwrap_used, clippy::panic, reason = "test code; each user takes a part")]

pub(crate) mod drive;
pub(crate) mod samples;

use vmm_migration_protocol::{Bulk, Decoder, Frame, FrameError, Item, Message, contents_checksum, unpack};

/// A frame of either kind, with all that belongs to it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Whole {
    Frame(Frame),
    Bulk(Bulk, Vec<u8>),
}

impl Whole {
    /// As it travels.
    pub(crate) fn encode(&self) -> Vec<u8> {
        match self {
            Self::Frame(frame) => frame.encode(),
            Self::Bulk(bulk, contents) => [&bulk.header()[..], contents].concat(),
        }
    }
}

/// Decodes `bytes` whole and in pieces: both must agree, frames must encode to what was read, and messages must
/// survive.
pub(crate) fn decode(bytes: &[u8]) {
    let (frames, end) = run(std::iter::once(bytes));
    let again: Vec<u8> = frames.iter().flat_map(Whole::encode).collect();
    assert!(bytes.starts_with(&again), "frames are not what was read");
    if end.is_ok() {
        assert_eq!(again.len(), bytes.len(), "bytes were dropped");
    }
    for frame in &frames {
        match frame {
            Whole::Frame(frame) => message(frame.clone()),
            Whole::Bulk(bulk, contents) => drop(bulk.check(contents_checksum([&contents[..]]))),
        }
    }
    let size = bytes.first().map_or(1, |byte| usize::from(byte % 32) + 1);
    assert_eq!(run(bytes.chunks(size)), (frames, end), "pieces of {size} bytes");
}

/// Decodes a payload: a message that is understood says the same when it is written and read again.
pub(crate) fn message(frame: Frame) {
    let command = frame.command();
    if let Ok(message) = Message::decode(frame) {
        assert_eq!(message.command(), command);
        // Texts may have been cut and cleaned, so that it is not always the same frame.
        let again = message.clone().encode().unwrap();
        assert_eq!(Message::decode(again).unwrap(), message);
    }
}

/// Decompresses `bytes` into ranges of several lengths, of which at most one fits: gives whether one did.
pub(crate) fn unpacked(bytes: &[u8]) -> bool {
    let lengths = [1, 2, 4, 64].map(|pages| pages * 4096);
    let fits = lengths.into_iter().filter(|length| {
        // With what is before and behind it, which stays.
        let mut room = vec![0x5a; length + 2];
        let result = unpack(bytes, room.get_mut(1..=*length).unwrap());
        assert_eq!((room.first(), room.last()), (Some(&0x5a), Some(&0x5a)));
        result.is_ok()
    });
    let fits = fits.count();
    assert!(fits <= 1, "a block has {fits} lengths");
    fits == 1
}

/// The frames in a stream that arrives in `pieces`, and how it ended.
pub(crate) fn run<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> (Vec<Whole>, Result<(), FrameError>) {
    let mut decoder = Decoder::new();
    let mut frames = Vec::new();
    let mut landing: Option<(Bulk, Vec<u8>)> = None;
    for mut piece in pieces {
        loop {
            if let Some((bulk, contents)) = &mut landing {
                let missing = bulk.length() - contents.len();
                contents.extend(piece.split_off(..missing.min(piece.len())).unwrap());
                if contents.len() < bulk.length() {
                    break;
                }
                frames.extend(landing.take().map(|(bulk, contents)| Whole::Bulk(bulk, contents)));
            }
            match decoder.push(&mut piece) {
                Ok(Some(Item::Frame(frame))) => frames.push(Whole::Frame(frame)),
                Ok(Some(Item::Bulk(bulk))) => landing = Some((bulk, Vec::new())),
                Ok(None) => break,
                Err(error) => return (frames, Err(error)),
            }
        }
        assert!(piece.is_empty(), "a decoder that waits has taken everything");
    }
    let end = match landing {
        Some((_, contents)) => Err(FrameError::Truncated { received: 40 + contents.len() }),
        None => decoder.finish(),
    };
    (frames, end)
}
