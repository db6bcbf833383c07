//! One frame: [`Frame`], [`Bulk`], their header and what can be wrong with it.

use twox_hash::XxHash3_64;

use crate::{Command, MemoryRange};

/// Length of a frame's header, in bytes.
pub const HEADER_LENGTH: usize = 16;

/// Length of header and description of a bulk frame, in bytes; the contents follow.
pub const BULK_HEADER_LENGTH: usize = HEADER_LENGTH + BULK_PREFIX;

/// Range, checksum and pass of a bulk frame, in bytes.
pub(crate) const BULK_PREFIX: usize = 24;

/// Most bytes of guest memory that one bulk frame describes.
pub const CHUNK: u64 = 2 << 20;

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
    /// [`FrameError::Length`]: the command does not allow a payload of this length. [`FrameError::Bulk`]: the
    /// command is a [`Bulk`] one.
    pub fn new(command: Command, payload: Vec<u8>) -> Result<Self, FrameError> {
        if command.is_bulk() {
            return Err(FrameError::Bulk { command });
        }
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

    /// The header that goes before the payload, for vectored writes of a big one.
    #[must_use]
    pub fn header(&self) -> [u8; HEADER_LENGTH] {
        Header { command: self.command, length: self.payload.len() }.sealed(&self.payload)
    }

    /// The frame as it travels.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER_LENGTH.saturating_add(self.payload.len()));
        bytes.extend(self.header());
        bytes.extend(&self.payload);
        bytes
    }
}

/// A frame whose contents are guest memory and stay where they are: only its beginning is made here.
///
/// The header's checksum covers the beginning, so that a receiver knows the range to be right before it lets
/// contents land there; the contents have a checksum of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bulk {
    command: Command,
    range: MemoryRange,
    pass: u32,
    checksum: u32,
    /// Bytes of contents that travel.
    length: usize,
}

impl Bulk {
    /// The range and its bytes as they are. `checksum` is [`contents_checksum`] of the bytes; on links where
    /// [`Features::UNCHECKED_MEMORY`](crate::Features::UNCHECKED_MEMORY) or
    /// [`Features::PAGE_SUMS`](crate::Features::PAGE_SUMS) was agreed on it is 0.
    ///
    /// # Errors
    /// [`FrameError::Range`]: more than [`CHUNK`].
    pub fn memory(range: MemoryRange, pass: u32, checksum: u32) -> Result<Self, FrameError> {
        let length = usize::try_from(range.length()).unwrap_or(usize::MAX);
        Self::new(Command::Memory, range, (pass, checksum), length)
    }

    /// The range, and `length` compressed bytes that become it; `checksum` is of the compressed ones.
    ///
    /// # Errors
    /// [`FrameError::Range`]: more than [`CHUNK`]. [`FrameError::Length`]: no bytes, or more than [`CHUNK`].
    pub fn packed(range: MemoryRange, pass: u32, checksum: u32, length: usize) -> Result<Self, FrameError> {
        Self::new(Command::Packed, range, (pass, checksum), length)
    }

    fn new(
        command: Command,
        range: MemoryRange,
        (pass, checksum): (u32, u32),
        length: usize,
    ) -> Result<Self, FrameError> {
        if range.length() > CHUNK {
            return Err(FrameError::Range { gpa: range.gpa(), length: range.length() });
        }
        let payload = u64::try_from(length.saturating_add(BULK_PREFIX)).unwrap_or(u64::MAX);
        check_length(command, payload)?;
        Ok(Self { command, range, pass, checksum, length })
    }

    /// [`Command::Memory`] or [`Command::Packed`].
    #[must_use]
    pub fn command(&self) -> Command {
        self.command
    }

    /// The range of guest memory.
    #[must_use]
    pub fn range(&self) -> MemoryRange {
        self.range
    }

    /// The pass over memory that it belongs to.
    #[must_use]
    pub fn pass(&self) -> u32 {
        self.pass
    }

    /// How many bytes of contents follow the header.
    #[must_use]
    pub fn length(&self) -> usize {
        self.length
    }

    /// What goes before the contents.
    #[must_use]
    pub fn header(&self) -> [u8; BULK_HEADER_LENGTH] {
        let prefix = self.prefix();
        let header =
            Header { command: self.command, length: self.length.saturating_add(BULK_PREFIX) }.sealed(&prefix);
        let mut bytes = [0; BULK_HEADER_LENGTH];
        for (to, from) in bytes.iter_mut().zip(header.into_iter().chain(prefix)) {
            *to = from;
        }
        bytes
    }

    fn prefix(&self) -> [u8; BULK_PREFIX] {
        let fields = self.range.gpa().to_le_bytes().into_iter().chain(self.range.length().to_le_bytes());
        let fields = fields.chain(self.checksum.to_le_bytes()).chain(self.pass.to_le_bytes());
        let mut prefix = [0; BULK_PREFIX];
        for (to, from) in prefix.iter_mut().zip(fields) {
            *to = from;
        }
        prefix
    }

    /// What a prefix says whose checksum was right.
    pub(crate) fn read(header: Header, prefix: &[u8; BULK_PREFIX]) -> Result<Self, FrameError> {
        let [g0, g1, g2, g3, g4, g5, g6, g7, l0, l1, l2, l3, l4, l5, l6, l7, c0, c1, c2, c3, p0, p1, p2, p3] =
            *prefix;
        let gpa = u64::from_le_bytes([g0, g1, g2, g3, g4, g5, g6, g7]);
        let length = u64::from_le_bytes([l0, l1, l2, l3, l4, l5, l6, l7]);
        let checksum = u32::from_le_bytes([c0, c1, c2, c3]);
        let pass = u32::from_le_bytes([p0, p1, p2, p3]);
        let wrong = FrameError::Range { gpa, length };
        let range = MemoryRange::new(gpa, length).map_err(|_| wrong)?;
        let contents = header.length.saturating_sub(BULK_PREFIX);
        if header.command == Command::Memory && u64::try_from(contents).ok() != Some(length) {
            return Err(wrong);
        }
        Self::new(header.command, range, (pass, checksum), contents)
    }

    /// Whether contents with the checksum `computed` are what was sent. Not to be asked on links without: see
    /// [`Features::UNCHECKED_MEMORY`](crate::Features::UNCHECKED_MEMORY).
    ///
    /// # Errors
    /// [`FrameError::Checksum`]: they are not. The stream can be read on.
    pub fn check(&self, computed: u32) -> Result<(), FrameError> {
        if computed == self.checksum {
            return Ok(());
        }
        Err(FrameError::Checksum { command: self.command, found: self.checksum, computed })
    }
}

/// CRC-32C of a bulk frame's contents, which may lie in several parts.
#[must_use]
pub fn contents_checksum<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> u32 {
    parts.into_iter().fold(0, crc32c::crc32c_append)
}

/// Checksum of a page that [`Sums`](crate::Sums) tell: the lower half of its XXH3-64 with seed 0. Whole guests are summed at both
/// ends while memory moves, and a CRC-32C takes twice as long.
#[must_use]
pub fn page_checksum(page: &[u8]) -> u32 {
    // Each half is as good as the other.
    XxHash3_64::oneshot(page) as u32
}

/// What a received header says, checked.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Header {
    pub(crate) command: Command,
    /// Length of the payload; the command allows it.
    pub(crate) length: usize,
}

impl Header {
    /// Reads and checks all of a header but its checksum, which also covers what follows.
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

    /// How much of the payload the checksum covers, in bytes.
    pub(crate) fn covered(self) -> usize {
        if self.command.is_bulk() { BULK_PREFIX } else { self.length }
    }

    /// CRC-32C of the header with a checksum of zero and of the covered part of the payload.
    pub(crate) fn checksum(self, covered: &[u8]) -> u32 {
        crc32c::crc32c_append(crc32c::crc32c(&self.bytes(0)), covered)
    }

    fn sealed(self, covered: &[u8]) -> [u8; HEADER_LENGTH] {
        self.bytes(self.checksum(covered))
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

/// What is wrong with a frame. Unless it says otherwise, the stream cannot be read on after it.
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
        /// CRC-32C that it carries.
        found: u32,
        /// CRC-32C of what arrived.
        computed: u32,
    },
    /// A range that no bulk frame may have, or that disagrees with the frame's length.
    #[error("bulk frame is about {length} bytes at {gpa:#x}, which no bulk frame of its length may be")]
    Range {
        /// Guest physical address.
        gpa: u64,
        /// Length of the range, in bytes.
        length: u64,
    },
    /// A bulk command, whose contents do not go into a [`Frame`].
    #[error("{command} frames carry guest memory, not a payload")]
    Bulk {
        /// The command.
        command: Command,
    },
    /// The stream ended inside a frame.
    #[error("the stream ended inside a frame, after {received} of its bytes")]
    Truncated {
        /// Bytes of the frame that arrived, its header included.
        received: usize,
    },
}
