//! Frames out of a stream that arrives in pieces: [`Decoder`].

use crate::frame::{BULK_PREFIX, Header};
use crate::{Bulk, Frame, FrameError, HEADER_LENGTH};

/// What a [`Decoder`] finds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Item {
    /// A frame, whole.
    Frame(Frame),
    /// The beginning of a bulk frame. The next [`Bulk::length`] bytes of the stream are its contents: take them
    /// from there to where they belong, past the decoder, and give their checksum to [`Bulk::check`].
    Bulk(Bulk),
}

/// Takes bytes as they arrive and gives frames.
///
/// Holds at most one incomplete frame: memory grows with the bytes that have arrived, never with a length
/// that a header announces. The first error is final; it is given again on every later call.
#[derive(Debug, Default)]
pub struct Decoder {
    state: State,
}

#[derive(Debug)]
enum State {
    /// Collecting a header; the first `have` bytes are there.
    Header { bytes: [u8; HEADER_LENGTH], have: usize },
    /// Collecting the part of the payload that the header's checksum covers.
    Payload { header: Header, checksum: u32, payload: Vec<u8> },
    /// The stream is lost.
    Failed(FrameError),
}

impl Default for State {
    fn default() -> Self {
        Self::Header { bytes: [0; HEADER_LENGTH], have: 0 }
    }
}

impl Decoder {
    /// A decoder at the beginning of a stream.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes bytes from the front of `input`, up to the end of one frame or of a bulk frame's beginning, and gives
    /// that.
    ///
    /// Call it until it gives `None`; then `input` is empty:
    ///
    /// ```
    /// # use vmm_migration_protocol::{Command, Decoder, Frame, FrameError, Item};
    /// # fn main() -> Result<(), FrameError> {
    /// # let received = Frame::new(Command::Start, Vec::new())?.encode();
    /// # let mut decoder = Decoder::new();
    /// let mut input = received.as_slice();
    /// while let Some(item) = decoder.push(&mut input)? {
    ///     match item {
    ///         Item::Frame(frame) => println!("{}", frame.command()),
    ///         // As many bytes of `input`, and of what arrives later, are guest memory.
    ///         Item::Bulk(bulk) => println!("{} bytes follow", bulk.length()),
    ///     }
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// What arrived is not a frame of this version. The stream cannot be read on.
    pub fn push(&mut self, input: &mut &[u8]) -> Result<Option<Item>, FrameError> {
        let result = self.step(input);
        if let Err(error) = result {
            self.state = State::Failed(error);
        }
        result
    }

    /// Bytes of the payload that is being collected, as its header announces them; 0 between frames. Contents of memory are not
    /// collected, and do not count.
    #[must_use]
    pub fn announced(&self) -> usize {
        match &self.state {
            State::Payload { header, .. } => header.covered(),
            State::Header { .. } | State::Failed(_) => 0,
        }
    }

    /// Ends the stream.
    ///
    /// # Errors
    /// [`FrameError::Truncated`] inside a frame, or the error the stream was lost by.
    pub fn finish(self) -> Result<(), FrameError> {
        match self.state {
            State::Header { have: 0, .. } => Ok(()),
            State::Header { have, .. } => Err(FrameError::Truncated { received: have }),
            State::Payload { payload, .. } => {
                Err(FrameError::Truncated { received: HEADER_LENGTH.saturating_add(payload.len()) })
            }
            State::Failed(error) => Err(error),
        }
    }

    fn step(&mut self, input: &mut &[u8]) -> Result<Option<Item>, FrameError> {
        if let State::Header { bytes, have } = &mut self.state {
            for place in bytes.iter_mut().skip(*have) {
                let Some(byte) = input.split_off_first() else { return Ok(None) };
                *place = *byte;
                *have = have.saturating_add(1);
            }
            let (header, checksum) = Header::read(bytes)?;
            self.state = State::Payload { header, checksum, payload: Vec::new() };
        }
        match &mut self.state {
            State::Payload { header, checksum, payload } => {
                let (header, checksum) = (*header, *checksum);
                let missing = header.covered().saturating_sub(payload.len());
                let part = input.split_off(..missing.min(input.len())).unwrap_or_default();
                payload.extend_from_slice(part);
                if part.len() < missing {
                    return Ok(None);
                }
                let payload = std::mem::take(payload);
                self.state = State::default();
                complete(header, checksum, payload).map(Some)
            }
            State::Failed(error) => Err(*error),
            State::Header { .. } => Ok(None),
        }
    }
}

fn complete(header: Header, found: u32, payload: Vec<u8>) -> Result<Item, FrameError> {
    let computed = header.checksum(&payload);
    if found != computed {
        return Err(FrameError::Checksum { command: header.command, found, computed });
    }
    match <[u8; BULK_PREFIX]>::try_from(payload.as_slice()) {
        Ok(prefix) if header.command.is_bulk() => Bulk::read(header, &prefix).map(Item::Bulk),
        _ => Frame::new(header.command, payload).map(Item::Frame),
    }
}
