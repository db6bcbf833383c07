//! One frame: [`Frame`], its header and what can be wrong with it.

use crate::Command;

/// Length of a frame's header, in bytes.
pub const HEADER_LENGTH: usize = 16;

/// The only version of the frame format so far.
pub const VERSION: u16 = 1;

/// A command and its payload, whose length the command allows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    command: Command,
    payload: Vec<u8>,
}

impl Frame {
    /// A frame to send.
    ///
    /// # Errors
    /// [`FrameError::Length`]: the command does not allow a payload of this length.
    pub fn new(command: Command, payload: Vec<u8>) -> Result<Self, FrameError> {
        let length = u64::try_from(payload.len()).unwrap_or(u64::MAX);
        check_length(command, length).map(|_| Self { command, payload })
    }

    /// The command.
    #[must_use]
    pub fn command(&self) -> Command {
        self.command
    }

    /// The payload, unread.
    #[must_use]
    pub fn payload(&self) -> &[u8] {
        &self.payload
    }

    /// The payload, unread, for keeping.
    #[must_use]
    pub fn into_payload(self) -> Vec<u8> {
        self.payload
    }

    /// The frame as it travels.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let header = Header { command: self.command, length: self.payload.len() };
        let mut bytes = Vec::with_capacity(HEADER_LENGTH.saturating_add(self.payload.len()));
        bytes.extend(header.sealed(&[&self.payload]));
        bytes.extend(&self.payload);
        bytes
    }
}

/// The header before a payload that stays where it is, in `parts`: for vectored writes of guest memory.
///
/// # Errors
/// [`FrameError::Length`]: the command does not allow a payload of this length.
pub fn header(command: Command, parts: &[&[u8]]) -> Result<[u8; HEADER_LENGTH], FrameError> {
    let length = parts
        .iter()
        .fold(0_u64, |sum, part| sum.saturating_add(u64::try_from(part.len()).unwrap_or(u64::MAX)));
    let length = check_length(command, length)?;
    Ok(Header { command, length }.sealed(parts))
}

/// What a received header says, checked.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Header {
    pub(crate) command: Command,
    /// Length of the payload; the command allows it.
    pub(crate) length: usize,
}

impl Header {
    /// Reads and checks all of a header but its checksum, which also covers the payload.
    pub(crate) fn read(bytes: &[u8; HEADER_LENGTH]) -> Result<(Self, u32), FrameError> {
        let [c0, c1, v0, v1, s0, s1, s2, s3, length @ ..] = *bytes;
        let version = u16::from_le_bytes([v0, v1]);
        if version != VERSION {
            // First, for another version may have other commands and lengths.
            return Err(FrameError::Version { found: version });
        }
        let number = u16::from_le_bytes([c0, c1]);
        let command = Command::from_number(number).ok_or(FrameError::Command { number })?;
        let length = check_length(command, u64::from_le_bytes(length))?;
        Ok((Self { command, length }, u32::from_le_bytes([s0, s1, s2, s3])))
    }

    /// CRC-32C of the header with a checksum of zero and of the payload.
    pub(crate) fn checksum(self, parts: &[&[u8]]) -> u32 {
        let header = crc32c::crc32c(&self.bytes(0));
        parts.iter().fold(header, |crc, part| crc32c::crc32c_append(crc, part))
    }

    fn sealed(self, parts: &[&[u8]]) -> [u8; HEADER_LENGTH] {
        self.bytes(self.checksum(parts))
    }

    fn bytes(self, checksum: u32) -> [u8; HEADER_LENGTH] {
        let [c0, c1] = self.command.number().to_le_bytes();
        let [v0, v1] = VERSION.to_le_bytes();
        let [s0, s1, s2, s3] = checksum.to_le_bytes();
        let [l0, l1, l2, l3, l4, l5, l6, l7] = u64::try_from(self.length).unwrap_or(u64::MAX).to_le_bytes();
        [c0, c1, v0, v1, s0, s1, s2, s3, l0, l1, l2, l3, l4, l5, l6, l7]
    }
}

fn check_length(command: Command, length: u64) -> Result<usize, FrameError> {
    let allowed = command.payload_lengths();
    let (least, most) = (*allowed.start(), *allowed.end());
    let fits = u32::try_from(length).ok().filter(|length| allowed.contains(length));
    fits.and_then(|length| usize::try_from(length).ok()).ok_or(FrameError::Length {
        command,
        length,
        least,
        most,
    })
}

/// What is wrong with a frame. The stream cannot be read on after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// Another version of the format, or another protocol.
    #[error("frame has version {found}, this build speaks {VERSION}; is the peer's protocol another one?")]
    Version {
        /// Version in the header.
        found: u16,
    },
    /// A command that this version does not have.
    #[error("frame has unknown command {number}")]
    Command {
        /// Number in the header.
        number: u16,
    },
    /// A payload that the command does not allow.
    #[error("{command} frame announces {length} bytes of payload, {least} to {most} are allowed")]
    Length {
        /// Command in the header.
        command: Command,
        /// Length in the header, in bytes.
        length: u64,
        /// Least that is allowed, in bytes.
        least: u32,
        /// Most that is allowed, in bytes.
        most: u32,
    },
    /// Header or payload were damaged on the way.
    #[error("{command} frame has checksum {found:#010x}, its bytes have {computed:#010x}")]
    Checksum {
        /// Command in the header.
        command: Command,
        /// CRC-32C in the header.
        found: u32,
        /// CRC-32C of what arrived.
        computed: u32,
    },
    /// The stream ended inside a frame.
    #[error("the stream ended inside a frame, after {received} of its bytes")]
    Truncated {
        /// Bytes of the frame that arrived, its header included.
        received: usize,
    },
}
