//! What two ends agree on before anything else: [`Hello`] is offered, [`Offer::answer`] gives [`Accept`] or why not.

use std::fmt;

use minicbor::{Decode, Encode};

use crate::{CpuNeeds, Fault, MemoryLayout, Reason, VERSION};

/// Most connections that a source may ask for.
pub const MAX_REQUESTED_CONNECTIONS: u16 = 128;

/// Most connections that are used, however many are asked for.
pub const MAX_CONNECTIONS: u16 = 16;

/// A migration's name: 16 random bytes, which the source draws.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(pub [u8; 16]);

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl<C> Encode<C> for SessionId {
    fn encode<W: minicbor::encode::Write>(
        &self,
        e: &mut minicbor::Encoder<W>,
        _: &mut C,
    ) -> Result<(), minicbor::encode::Error<W::Error>> {
        e.bytes(&self.0)?.ok()
    }
}

impl<'b, C> Decode<'b, C> for SessionId {
    fn decode(d: &mut minicbor::Decoder<'b>, _: &mut C) -> Result<Self, minicbor::decode::Error> {
        let bytes = d.bytes()?.try_into();
        bytes.map(Self).map_err(|_| minicbor::decode::Error::message("a session id has 16 bytes"))
    }
}

/// Features of the wire, a bit each. Bits that a build does not know are kept out of what is agreed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Encode, Decode)]
#[cbor(transparent)]
pub struct Features(#[n(0)] u64);

impl Features {
    /// None.
    pub const NONE: Self = Self(0);
    /// Contents of memory carry no checksum, for the link has integrity of its own (TLS).
    pub const UNCHECKED_MEMORY: Self = Self(1);
    /// [`Packed`](crate::Command::Packed) frames, in the LZ4 block format.
    pub const LZ4: Self = Self(1 << 1);
    /// [`Packed`](crate::Command::Packed) frames, a Zstandard frame each (RFC 8878).
    pub const ZSTD: Self = Self(1 << 2);
    /// Memory is handed over by its descriptors instead of its bytes. Both ends are on one host.
    pub const LOCAL_MEMORY: Self = Self(1 << 3);
    /// The guest runs at the destination before all of its memory is there. Never with
    /// [`LOCAL_MEMORY`](Self::LOCAL_MEMORY).
    pub const POST_COPY: Self = Self(1 << 4);
    /// [`Memory`](crate::Command::Memory) frames of passes are followed by [`Sums`](crate::Command::Sums) instead of carrying
    /// a checksum: contents need not stand still from their checksum to the link. Nothing is added to
    /// [`UNCHECKED_MEMORY`](Self::UNCHECKED_MEMORY).
    pub const PAGE_SUMS: Self = Self(1 << 6);

    /// Whether checksums follow memory.
    #[must_use]
    pub const fn sums_pages(self) -> bool {
        self.contains(Self::PAGE_SUMS) && !self.contains(Self::UNCHECKED_MEMORY)
    }

    /// Both sets.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// What is in both.
    #[must_use]
    pub const fn common(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// Whether all of `other` is in it.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// The same with at most one way to compress: LZ4, unless the other is among `required`.
    #[must_use]
    const fn one_compression(self, required: Self) -> Self {
        let drop = if required.contains(Self::ZSTD) { Self::LZ4 } else { Self::ZSTD };
        if self.contains(Self::LZ4.and(Self::ZSTD)) { Self(self.0 & !drop.0) } else { self }
    }

    /// As they travel.
    #[must_use]
    pub const fn bits(self) -> u64 {
        self.0
    }
}

/// What a source wants of a destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Encode, Decode)]
#[cbor(index_only)]
pub enum Purpose {
    /// It shall take the VM.
    #[n(0)]
    Migrate,
    /// It shall say whether it would, and do nothing.
    #[n(1)]
    Check,
}

/// Versions of the frame format that an end speaks, all between two.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct Versions {
    /// The lowest.
    #[n(0)]
    pub least: u16,
    /// The highest.
    #[n(1)]
    pub most: u16,
}

impl Versions {
    /// Those of this build.
    pub const OURS: Self = Self { least: VERSION, most: VERSION };

    /// The highest that both speak.
    #[must_use]
    pub fn common(self, other: Self) -> Option<u16> {
        let highest = self.most.min(other.most);
        (self.least.max(other.least) <= highest).then_some(highest)
    }
}

/// What a source has, wants and needs: the first frame.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Hello {
    /// Versions that it speaks.
    #[n(0)]
    pub versions: Versions,
    /// The session's id.
    #[n(1)]
    pub session: SessionId,
    /// What for.
    #[n(2)]
    pub purpose: Purpose,
    /// Features that it would use.
    #[n(3)]
    pub features: Features,
    /// Those of them without which it does not go on.
    #[n(4)]
    pub required: Features,
    /// Connections that it would use, this one included: 1 to [`MAX_REQUESTED_CONNECTIONS`].
    #[n(5)]
    pub connections: u16,
    /// The guest's memory.
    #[n(6)]
    pub memory: MemoryLayout,
    /// What its vCPUs need.
    #[n(7)]
    pub cpu: CpuNeeds,
    /// Name and version of the program, for logs.
    #[n(8)]
    pub program: String,
}

/// What both ends use from now on.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Accept {
    /// Version of every later frame.
    #[n(0)]
    pub version: u16,
    /// The session's id.
    #[n(1)]
    pub session: SessionId,
    /// Features in use.
    #[n(2)]
    pub features: Features,
    /// Connections in use, the first included: 1 to [`MAX_CONNECTIONS`].
    #[n(3)]
    pub connections: u16,
    /// Name and version of the program, for logs.
    #[n(4)]
    pub program: String,
}

impl Accept {
    /// Whether a source that said `hello` may be answered so.
    #[must_use]
    pub fn fits(&self, hello: &Hello) -> bool {
        (hello.versions.least..=hello.versions.most).contains(&self.version)
            && self.session == hello.session
            && hello.features.contains(self.features)
            && self.features.contains(hello.required)
            && !self.features.contains(Features::LZ4.and(Features::ZSTD))
            && !self.features.contains(Features::LOCAL_MEMORY.and(Features::POST_COPY))
            && (1..=hello.connections.min(MAX_CONNECTIONS)).contains(&self.connections)
    }
}

/// What a destination can do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offer {
    /// Versions that it speaks.
    pub versions: Versions,
    /// Features that it has.
    pub features: Features,
    /// Connections that it takes at most; never more than [`MAX_CONNECTIONS`] are used.
    pub connections: u16,
    /// Name and version of the program, for logs.
    pub program: String,
}

impl Offer {
    /// What both can use.
    ///
    /// # Errors
    /// No common version, a feature that the source requires, or a number of connections that nobody may ask for.
    pub fn answer(&self, hello: &Hello) -> Result<Accept, Fault> {
        let version = self.versions.common(hello.versions).ok_or_else(|| {
            let (theirs, ours) = (hello.versions, self.versions);
            let text = format!(
                "the source speaks {} to {}, the destination {} to {}",
                theirs.least, theirs.most, ours.least, ours.most
            );
            Fault::new(Reason::Version, &text)
        })?;
        let features = self.features.common(hello.features).one_compression(hello.required);
        if !features.contains(hello.required) {
            let text = format!("required {:#x}, common {:#x}", hello.required.bits(), features.bits());
            return Err(Fault::new(Reason::Features, &text));
        }
        if features.contains(Features::LOCAL_MEMORY.and(Features::POST_COPY)) {
            let text = "memory that is handed over is there at once: no post-copy";
            return Err(Fault::new(Reason::Features, text));
        }
        if !(1..=MAX_REQUESTED_CONNECTIONS).contains(&hello.connections) {
            let text =
                format!("{} connections, 1 to {MAX_REQUESTED_CONNECTIONS} are possible", hello.connections);
            return Err(Fault::new(Reason::Violation, &text));
        }
        let local = features.contains(Features::LOCAL_MEMORY);
        let most = if local { 1 } else { self.connections.clamp(1, MAX_CONNECTIONS) };
        let connections = hello.connections.min(most);
        Ok(Accept { version, session: hello.session, features, connections, program: self.program.clone() })
    }
}
