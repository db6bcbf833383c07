//! Shared by the tests on stable Rust and the fuzz target in fuzz/.

use vmm_migration_protocol::{Decoder, Frame, FrameError, header};

/// Decodes `bytes` whole and in pieces: both must agree, and frames must encode to what was read.
pub(crate) fn decode(bytes: &[u8]) {
    let (frames, end) = run(std::iter::once(bytes));
    let again: Vec<u8> = frames.iter().flat_map(Frame::encode).collect();
    assert!(bytes.starts_with(&again), "frames are not what was read");
    if end.is_ok() {
        assert_eq!(again.len(), bytes.len(), "bytes were dropped");
    }
    for frame in &frames {
        let (left, right) = frame.payload().split_at(frame.payload().len() / 2);
        let header = header(frame.command(), &[left, right]);
        assert!(header.is_ok_and(|header| frame.encode().starts_with(&header)));
    }
    let size = bytes.first().map_or(1, |byte| usize::from(byte % 32) + 1);
    assert_eq!(run(bytes.chunks(size)), (frames, end), "pieces of {size} bytes");
}

/// The frames in a stream that arrives in `pieces`, and how it ended.
pub(crate) fn run<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> (Vec<Frame>, Result<(), FrameError>) {
    let mut decoder = Decoder::new();
    let mut frames = Vec::new();
    for mut piece in pieces {
        loop {
            match decoder.push(&mut piece) {
                Ok(Some(frame)) => frames.push(frame),
                Ok(None) => break,
                Err(error) => return (frames, Err(error)),
            }
        }
        assert!(piece.is_empty(), "a decoder that waits has taken everything");
    }
    (frames, decoder.finish())
}
