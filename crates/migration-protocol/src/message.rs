//! What frames say: [`Message`], one variant for each command, read from a [`Frame`] and written into one.

use crate::{
    Absent, Accept, Command, DescriptorRange, Fault, Frame, FrameError, Hello, Mark, MemoryError,
    MemoryRange, Missing, PAGE, Reason, SessionId, Sums, Zero,
};

/// What the payload of a connection's first frame begins with, whichever of Hello, Join, Query and Rejoin it is.
pub const MAGIC: [u8; 8] = *b"VMMigrat";

/// How far a sender is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// Bytes of guest memory sent so far, those sent again included.
    pub bytes: u64,
    /// Pass over memory that is going on.
    pub pass: u32,
    /// Blackout to expect if the guest stood still now, in ms; [`u32::MAX`] where it is not known.
    pub blackout_ms: u32,
}

/// How a session ended, as a destination remembers it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SessionOutcome {
    /// Never heard of, or too long ago: it proves nothing.
    Unknown,
    /// The VM is the destination's.
    Committed,
    /// The destination has discarded what it had, and will not take the VM in this session any more.
    Aborted,
}

impl SessionOutcome {
    const ALL: [Self; 3] = [Self::Unknown, Self::Committed, Self::Aborted];

    const fn code(self) -> u8 {
        match self {
            Self::Unknown => 0,
            Self::Committed => 1,
            Self::Aborted => 2,
        }
    }
}

/// A further connection's first words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Join {
    /// The session that it belongs to.
    pub session: SessionId,
    /// Which connection it is; the one with Hello is 0.
    pub index: u16,
    /// What it carries: [`MEMORY`](Self::MEMORY) or [`WANTED`](Self::WANTED).
    pub role: u16,
}

impl Join {
    /// Role of a connection that carries passes over memory.
    pub const MEMORY: u16 = 0;
    /// Role of the connection on which a destination asks for ranges, and gets them, in post-copy.
    pub const WANTED: u16 = 1;
}

/// What a frame says. Bulk frames are [`Bulk`](crate::Bulk).
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Message {
    /// [`Command::Start`].
    Start,
    /// [`Command::Config`]: the document, which only the ends understand.
    Config(Vec<u8>),
    /// [`Command::State`]: the records, which only the ends understand.
    State(Vec<u8>),
    /// [`Command::Complete`].
    Complete,
    /// [`Command::Abandon`].
    Abandon(Fault),
    /// [`Command::Hello`].
    Hello(Box<Hello>),
    /// [`Command::Ack`]: of what.
    Ack(Command),
    /// [`Command::Nack`]: of what, and why.
    Nack(Command, Fault),
    /// [`Command::Ready`].
    Ready(SessionId),
    /// [`Command::Commit`].
    Commit {
        /// The session.
        session: SessionId,
        /// Whether the guest shall run; `false` for one that was paused before.
        run: bool,
    },
    /// [`Command::Query`].
    Query(SessionId),
    /// [`Command::Outcome`].
    Outcome(SessionId, SessionOutcome),
    /// [`Command::Accept`].
    Accept(Accept),
    /// [`Command::Join`].
    Join(Join),
    /// [`Command::Mark`].
    Mark(Mark),
    /// [`Command::Landed`]: which pass.
    Landed(u32),
    /// [`Command::Zero`].
    Zero(Zero),
    /// [`Command::Again`].
    Again(MemoryRange),
    /// [`Command::Descriptors`].
    Descriptors(Vec<DescriptorRange>),
    /// [`Command::Keepalive`].
    Keepalive(Progress),
    /// [`Command::Cancel`].
    Cancel(Fault),
    /// [`Command::Committed`].
    Committed(SessionId),
    /// [`Command::Sums`].
    Sums(Sums),
    /// [`Command::Absent`].
    Absent(Absent),
    /// [`Command::Want`].
    Want(MemoryRange),
    /// [`Command::Whole`].
    Whole(SessionId),
    /// [`Command::Rejoin`].
    Rejoin(SessionId),
    /// [`Command::Lacks`].
    Lacks(MemoryRange),
}

/// What Nack carries.
#[derive(minicbor::Encode, minicbor::Decode)]
#[cbor(map)]
struct NackPayload {
    #[n(0)]
    about: u16,
    #[n(1)]
    reason: Reason,
    #[n(2)]
    text: String,
    #[n(3)]
    missing: Vec<Missing>,
}

impl Message {
    /// The message in a frame.
    ///
    /// # Errors
    /// [`MessageError`]: the payload is not what the command has.
    pub fn decode(frame: Frame) -> Result<Self, MessageError> {
        let command = frame.command();
        match command {
            Command::Start => Ok(Self::Start),
            Command::Complete => Ok(Self::Complete),
            Command::Config => Ok(Self::Config(frame.into_payload())),
            Command::State => Ok(Self::State(frame.into_payload())),
            _ => {
                let mut fields = Fields { command, rest: frame.payload() };
                let message = Self::read(&mut fields)?;
                fields.end().map(|()| message)
            }
        }
    }

    fn read(fields: &mut Fields<'_>) -> Result<Self, MessageError> {
        Ok(match fields.command {
            Command::Abandon => Self::Abandon(fields.fault()?),
            Command::Cancel => Self::Cancel(fields.fault()?),
            Command::Hello => Self::Hello(Box::new(fields.magic()?.cbor()?)),
            Command::Accept => Self::Accept(fields.cbor()?),
            Command::Ack => Self::Ack(fields.command()?),
            Command::Nack => {
                let NackPayload { about, reason, text, missing } = fields.cbor()?;
                let about =
                    Command::from_number(about).ok_or_else(|| fields.invalid("a command that is none"))?;
                Self::Nack(about, Fault::new(reason, &text).with_missing(missing))
            }
            Command::Sums => Self::Sums(fields.sums()?),
            Command::Absent => Self::Absent(Absent { range: fields.range()?, pass: fields.u32()? }),
            Command::Want => Self::Want(fields.range()?),
            Command::Whole => Self::Whole(fields.session()?),
            Command::Rejoin => Self::Rejoin(fields.magic()?.session()?),
            Command::Lacks => Self::Lacks(fields.range()?),
            Command::Ready => Self::Ready(fields.session()?),
            Command::Committed => Self::Committed(fields.session()?),
            Command::Commit => Self::Commit { session: fields.session()?, run: fields.flag()? },
            Command::Query => Self::Query(fields.magic()?.session()?),
            Command::Outcome => {
                let (session, code) = (fields.session()?, fields.u8()?);
                let outcome = SessionOutcome::ALL.into_iter().find(|outcome| outcome.code() == code);
                Self::Outcome(session, outcome.ok_or_else(|| fields.invalid("an outcome that is none"))?)
            }
            Command::Join => {
                let session = fields.magic()?.session()?;
                Self::Join(Join { session, index: fields.u16()?, role: fields.u16()? })
            }
            Command::Mark => {
                Self::Mark(Mark { pass: fields.u32()?, last: fields.flag()?, bytes: fields.u64()? })
            }
            Command::Landed => Self::Landed(fields.u32()?),
            Command::Zero => Self::Zero(Zero { range: fields.range()?, pass: fields.u32()? }),
            Command::Again => Self::Again(fields.range()?),
            Command::Descriptors => Self::Descriptors(fields.descriptors()?),
            Command::Keepalive => Self::Keepalive(Progress {
                bytes: fields.u64()?,
                pass: fields.u32()?,
                blackout_ms: fields.u32()?,
            }),
            // `decode` has taken those with nothing to read; a `Frame` is never bulk.
            Command::Start
            | Command::Config
            | Command::State
            | Command::Complete
            | Command::Memory
            | Command::Packed => return Err(fields.invalid("a payload of its own kind")),
        })
    }

    /// Its command.
    #[must_use]
    pub const fn command(&self) -> Command {
        match self {
            Self::Start => Command::Start,
            Self::Config(_) => Command::Config,
            Self::State(_) => Command::State,
            Self::Complete => Command::Complete,
            Self::Abandon(_) => Command::Abandon,
            Self::Hello(_) => Command::Hello,
            Self::Ack(_) => Command::Ack,
            Self::Nack(..) => Command::Nack,
            Self::Ready(_) => Command::Ready,
            Self::Commit { .. } => Command::Commit,
            Self::Query(_) => Command::Query,
            Self::Outcome(..) => Command::Outcome,
            Self::Accept(_) => Command::Accept,
            Self::Join(_) => Command::Join,
            Self::Mark(_) => Command::Mark,
            Self::Landed(_) => Command::Landed,
            Self::Zero(_) => Command::Zero,
            Self::Again(_) => Command::Again,
            Self::Descriptors(_) => Command::Descriptors,
            Self::Keepalive(_) => Command::Keepalive,
            Self::Cancel(_) => Command::Cancel,
            Self::Committed(_) => Command::Committed,
            Self::Sums(_) => Command::Sums,
            Self::Absent(_) => Command::Absent,
            Self::Want(_) => Command::Want,
            Self::Whole(_) => Command::Whole,
            Self::Rejoin(_) => Command::Rejoin,
            Self::Lacks(_) => Command::Lacks,
        }
    }

    /// The frame that says it.
    ///
    /// # Errors
    /// [`FrameError::Length`]: a configuration, a saved state, a Hello or a list of descriptors or checksums is larger
    /// than the wire allows, or empty.
    pub fn encode(self) -> Result<Frame, FrameError> {
        let command = self.command();
        let mut out = Out(Vec::new());
        match self {
            Self::Start | Self::Complete => {}
            Self::Config(bytes) | Self::State(bytes) => out.0 = bytes,
            Self::Abandon(fault) | Self::Cancel(fault) => {
                out.put(&fault.reason().number().to_le_bytes()).put(fault.text().as_bytes());
            }
            Self::Hello(hello) => out.put(&MAGIC).cbor(&hello),
            Self::Accept(accept) => out.cbor(&accept),
            Self::Ack(of) => drop(out.put(&of.number().to_le_bytes())),
            Self::Nack(about, fault) => out.cbor(&NackPayload {
                about: about.number(),
                reason: fault.reason(),
                text: fault.text().to_owned(),
                missing: fault.missing().to_vec(),
            }),
            Self::Ready(session) | Self::Committed(session) | Self::Whole(session) => {
                out.put(&session.0);
            }
            Self::Commit { session, run } => drop(out.put(&session.0).put(&[u8::from(run)])),
            Self::Query(session) | Self::Rejoin(session) => drop(out.put(&MAGIC).put(&session.0)),
            Self::Outcome(session, outcome) => drop(out.put(&session.0).put(&[outcome.code()])),
            Self::Join(Join { session, index, role }) => {
                out.put(&MAGIC).put(&session.0).put(&index.to_le_bytes()).put(&role.to_le_bytes());
            }
            Self::Mark(Mark { pass, last, bytes }) => {
                out.put(&pass.to_le_bytes()).put(&[u8::from(last)]).put(&bytes.to_le_bytes());
            }
            Self::Landed(pass) => drop(out.put(&pass.to_le_bytes())),
            Self::Zero(Zero { range, pass }) | Self::Absent(Absent { range, pass }) => {
                out.range(range).put(&pass.to_le_bytes());
            }
            Self::Sums(Sums { range, pass, sums }) => {
                out.range(range).put(&pass.to_le_bytes());
                out.0.extend(sums.iter().flat_map(|sum| sum.to_le_bytes()));
            }
            Self::Again(range) | Self::Want(range) | Self::Lacks(range) => drop(out.range(range)),
            Self::Descriptors(list) => {
                for DescriptorRange { range, offset, descriptor } in list {
                    out.range(range).put(&offset.to_le_bytes()).put(&descriptor.to_le_bytes());
                }
            }
            Self::Keepalive(Progress { bytes, pass, blackout_ms }) => {
                out.put(&bytes.to_le_bytes()).put(&pass.to_le_bytes()).put(&blackout_ms.to_le_bytes());
            }
        }
        Frame::new(command, out.0)
    }
}

/// A payload being written.
struct Out(Vec<u8>);

impl Out {
    fn put(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }

    fn range(&mut self, range: MemoryRange) -> &mut Self {
        self.put(&range.gpa().to_le_bytes()).put(&range.length().to_le_bytes())
    }

    fn cbor<T: minicbor::Encode<()>>(&mut self, value: &T) {
        // A derived encoder that writes into a Vec does not fail.
        self.0.extend(minicbor::to_vec(value).unwrap_or_default());
    }
}

/// A payload being read.
struct Fields<'a> {
    command: Command,
    rest: &'a [u8],
}

impl Fields<'_> {
    fn invalid(&self, what: &'static str) -> MessageError {
        MessageError::Invalid { command: self.command, what }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], MessageError> {
        let Some((bytes, rest)) = self.rest.split_first_chunk() else {
            return Err(self.invalid("too few bytes"));
        };
        self.rest = rest;
        Ok(*bytes)
    }

    fn u8(&mut self) -> Result<u8, MessageError> {
        self.array().map(u8::from_le_bytes)
    }

    fn u16(&mut self) -> Result<u16, MessageError> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Result<u32, MessageError> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, MessageError> {
        self.array().map(u64::from_le_bytes)
    }

    fn flag(&mut self) -> Result<bool, MessageError> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(self.invalid("a flag that is neither 0 nor 1")),
        }
    }

    fn session(&mut self) -> Result<SessionId, MessageError> {
        self.array().map(SessionId)
    }

    fn magic(&mut self) -> Result<&mut Self, MessageError> {
        if self.array()? == MAGIC { Ok(self) } else { Err(self.invalid("another protocol's magic")) }
    }

    fn command(&mut self) -> Result<Command, MessageError> {
        Command::from_number(self.u16()?).ok_or_else(|| self.invalid("a command that is none"))
    }

    fn range(&mut self) -> Result<MemoryRange, MessageError> {
        let (gpa, length) = (self.u64()?, self.u64()?);
        MemoryRange::new(gpa, length).map_err(|source| MessageError::Range { command: self.command, source })
    }

    /// A reason, and a text up to the end.
    fn fault(&mut self) -> Result<Fault, MessageError> {
        let reason = Reason::from_number(self.u16()?);
        let text = std::str::from_utf8(std::mem::take(&mut self.rest));
        text.map(|text| Fault::new(reason, text)).map_err(|_| self.invalid("a text that is not UTF-8"))
    }

    fn descriptors(&mut self) -> Result<Vec<DescriptorRange>, MessageError> {
        let mut list = Vec::new();
        while !self.rest.is_empty() {
            let (range, offset, descriptor) = (self.range()?, self.u64()?, self.u32()?);
            list.push(DescriptorRange { range, offset, descriptor });
        }
        Ok(list)
    }

    /// A checksum for each page of a range.
    fn sums(&mut self) -> Result<Sums, MessageError> {
        let (range, pass) = (self.range()?, self.u32()?);
        let (sums, rest) = std::mem::take(&mut self.rest).as_chunks();
        let whole = rest.is_empty() && u64::try_from(sums.len()).ok() == Some(range.length() / PAGE);
        if !whole {
            return Err(self.invalid("another number of checksums than its range has pages"));
        }
        Ok(Sums { range, pass, sums: sums.iter().map(|sum| u32::from_le_bytes(*sum)).collect() })
    }

    fn cbor<T: for<'b> minicbor::Decode<'b, ()>>(&mut self) -> Result<T, MessageError> {
        let mut decoder = minicbor::Decoder::new(self.rest);
        let value =
            decoder.decode().map_err(|source| MessageError::Cbor { command: self.command, source })?;
        self.rest = self.rest.get(decoder.position()..).unwrap_or_default();
        Ok(value)
    }

    fn end(&self) -> Result<(), MessageError> {
        if self.rest.is_empty() { Ok(()) } else { Err(self.invalid("bytes after its end")) }
    }
}

/// What is wrong with a payload.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MessageError {
    /// A field says what it cannot.
    #[error("{command} frame has {what}")]
    Invalid {
        /// The frame's command.
        command: Command,
        /// What it has.
        what: &'static str,
    },
    /// A range of guest memory that is none.
    #[error("{command} frame names a range")]
    Range {
        /// The frame's command.
        command: Command,
        /// What is wrong with it.
        #[source]
        source: MemoryError,
    },
    /// Not the CBOR that the command has.
    #[error("{command} frame does not decode")]
    Cbor {
        /// The frame's command.
        command: Command,
        /// What the decoder met.
        #[source]
        source: minicbor::decode::Error,
    },
}
