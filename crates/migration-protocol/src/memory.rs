//! Guest memory on its way: [`MemoryRange`], [`MemoryLayout`], and what a receiver checks of each frame, [`Intake`]
//! and [`Barrier`].

use minicbor::decode::{Decoder, Error};
use minicbor::{Decode, Encode};

use crate::{Bulk, CHUNK, Command};

/// Ranges of guest memory begin and end at multiples of this many bytes.
pub const PAGE: u64 = 4096;

/// Most regions in a layout.
pub const MAX_REGIONS: usize = 1024;

/// A range of guest memory: whole pages, at least one, below the end of the address space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MemoryRange {
    gpa: u64,
    length: u64,
}

impl MemoryRange {
    /// `length` bytes from `gpa`, a guest physical address.
    ///
    /// # Errors
    /// [`MemoryError::NoRange`].
    pub fn new(gpa: u64, length: u64) -> Result<Self, MemoryError> {
        let whole = gpa.is_multiple_of(PAGE) && length.is_multiple_of(PAGE) && length != 0;
        match gpa.checked_add(length) {
            Some(_) if whole => Ok(Self { gpa, length }),
            _ => Err(MemoryError::NoRange { gpa, length }),
        }
    }

    /// Guest physical address of its first byte.
    #[must_use]
    pub fn gpa(&self) -> u64 {
        self.gpa
    }

    /// Length in bytes.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Address of the first byte after it.
    #[must_use]
    pub fn end(&self) -> u64 {
        // `new` has seen that the sum exists.
        self.gpa.saturating_add(self.length)
    }

    /// Whether all of `other` lies in it.
    #[must_use]
    pub fn contains(&self, other: &Self) -> bool {
        self.gpa <= other.gpa && other.end() <= self.end()
    }

    /// Its parts of at most [`CHUNK`] bytes, cut where addresses are multiples of that.
    pub fn chunks(self) -> impl Iterator<Item = Self> {
        let end = self.end();
        std::iter::successors(Some(self.gpa), move |at| Some(next_chunk(*at)))
            .take_while(move |at| *at < end)
            .map(move |at| Self { gpa: at, length: next_chunk(at).min(end).saturating_sub(at) })
    }
}

/// The first multiple of [`CHUNK`] after `at`, or the end of the address space.
fn next_chunk(at: u64) -> u64 {
    at.saturating_add(1).checked_next_multiple_of(CHUNK).unwrap_or(u64::MAX)
}

/// A stretch of the guest's memory, and the zone that backs it.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Region {
    /// Guest physical address of its first byte.
    #[n(0)]
    pub gpa: u64,
    /// Length in bytes.
    #[n(1)]
    pub length: u64,
    /// Id of its memory zone.
    #[n(2)]
    pub zone: String,
}

/// All of a guest's memory: regions in the order of their addresses, apart from each other.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MemoryLayout {
    regions: Vec<Region>,
    /// Sum of the lengths.
    bytes: u64,
}

impl MemoryLayout {
    /// From its regions.
    ///
    /// # Errors
    /// [`MemoryError`]: too many, no whole pages, out of order, or one in another.
    pub fn new(regions: Vec<Region>) -> Result<Self, MemoryError> {
        if regions.len() > MAX_REGIONS {
            return Err(MemoryError::Regions { count: regions.len() });
        }
        let (mut end, mut bytes) = (0, 0_u64);
        for Region { gpa, length, .. } in &regions {
            let range = MemoryRange::new(*gpa, *length)?;
            if range.gpa() < end {
                return Err(MemoryError::Overlap { gpa: *gpa });
            }
            end = range.end();
            // Apart from each other in 64 bits: the sum is no larger than the last end.
            bytes = bytes.saturating_add(*length);
        }
        Ok(Self { regions, bytes })
    }

    /// The regions, in the order of their addresses.
    #[must_use]
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// All of it, in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether `range` lies in one region.
    #[must_use]
    pub fn contains(&self, range: &MemoryRange) -> bool {
        let after = self.regions.partition_point(|region| region.gpa <= range.gpa());
        let region = after.checked_sub(1).and_then(|index| self.regions.get(index));
        region.is_some_and(|region| range.end() <= region.gpa.saturating_add(region.length))
    }
}

impl<C> Encode<C> for MemoryLayout {
    fn encode<W: minicbor::encode::Write>(
        &self,
        e: &mut minicbor::Encoder<W>,
        ctx: &mut C,
    ) -> Result<(), minicbor::encode::Error<W::Error>> {
        self.regions.encode(e, ctx)
    }
}

impl<'b, C> Decode<'b, C> for MemoryLayout {
    fn decode(d: &mut Decoder<'b>, ctx: &mut C) -> Result<Self, Error> {
        Self::new(Vec::decode(d, ctx)?).map_err(Error::custom)
    }
}

/// What one connection of the destination checks of the memory that arrives, before any of it lands.
///
/// It bounds what a peer can send: ranges inside the guest's memory only, in each pass at most as many bytes as the
/// guest has, and nothing after the last pass.
#[derive(Debug)]
pub struct Intake<'a> {
    layout: &'a MemoryLayout,
    pass: u32,
    /// Bytes of guest memory that this pass described so far.
    bytes: u64,
    /// The pass has left memory out.
    absent: bool,
    ended: bool,
    /// Checksums follow each [`Memory`](crate::Command::Memory) frame.
    summed: bool,
    /// They are to come about this range, and nothing else before.
    owed: Option<MemoryRange>,
}

impl<'a> Intake<'a> {
    /// For a guest with memory as in `layout`, before the first pass.
    #[must_use]
    pub fn new(layout: &'a MemoryLayout) -> Self {
        Self { layout, pass: 0, bytes: 0, absent: false, ended: false, summed: false, owed: None }
    }

    /// The same, for an end that has agreed on [`Features::PAGE_SUMS`](crate::Features::PAGE_SUMS), if it has.
    #[must_use]
    pub fn with_page_sums(self, agreed: bool) -> Self {
        Self { summed: agreed, ..self }
    }

    /// Whether `bulk` may land.
    ///
    /// # Errors
    /// [`MemoryError`]: the peer breaks the protocol.
    pub fn bulk(&mut self, bulk: &Bulk) -> Result<(), MemoryError> {
        self.take(bulk.range(), bulk.pass())?;
        self.owed = (self.summed && bulk.command() == Command::Memory).then(|| bulk.range());
        Ok(())
    }

    /// Whether `sums` are those of the bulk frame before.
    ///
    /// # Errors
    /// [`MemoryError`]: the peer breaks the protocol.
    pub fn sums(&mut self, sums: &Sums) -> Result<(), MemoryError> {
        if sums.pass != self.pass {
            return Err(MemoryError::Pass { found: sums.pass, now: self.pass });
        }
        match self.owed.take() {
            Some(range) if range == sums.range => Ok(()),
            _ => Err(MemoryError::Sums { gpa: sums.range.gpa() }),
        }
    }

    /// Whether `range` may be made zero.
    ///
    /// # Errors
    /// [`MemoryError`]: the peer breaks the protocol.
    pub fn zero(&mut self, zero: Zero) -> Result<(), MemoryError> {
        self.take(zero.range, zero.pass)
    }

    /// Whether `range` may be made absent.
    ///
    /// # Errors
    /// [`MemoryError`]: the peer breaks the protocol.
    pub fn absent(&mut self, absent: Absent) -> Result<(), MemoryError> {
        self.take(absent.range, absent.pass)?;
        self.absent = true;
        Ok(())
    }

    /// Whether the pass may end here.
    ///
    /// # Errors
    /// [`MemoryError`]: the peer breaks the protocol, or frames are missing.
    pub fn mark(&mut self, mark: Mark) -> Result<(), MemoryError> {
        self.check_pass(mark.pass)?;
        if mark.bytes != self.bytes {
            return Err(MemoryError::Missing { sent: mark.bytes, received: self.bytes });
        }
        if self.absent && !mark.last {
            return Err(MemoryError::Absent { pass: mark.pass });
        }
        let next = self.pass.checked_add(1).ok_or(MemoryError::Pass { found: mark.pass, now: self.pass })?;
        *self = Self { pass: next, bytes: 0, absent: false, ended: mark.last, ..*self };
        Ok(())
    }

    fn take(&mut self, range: MemoryRange, pass: u32) -> Result<(), MemoryError> {
        self.check_pass(pass)?;
        if !self.layout.contains(&range) {
            return Err(MemoryError::Outside { gpa: range.gpa(), length: range.length() });
        }
        let bytes = self.bytes.saturating_add(range.length());
        if bytes > self.layout.bytes() {
            return Err(MemoryError::Excess { pass });
        }
        self.bytes = bytes;
        Ok(())
    }

    fn check_pass(&self, found: u32) -> Result<(), MemoryError> {
        if let Some(range) = self.owed {
            return Err(MemoryError::Unsummed { gpa: range.gpa(), length: range.length() });
        }
        if self.ended || found != self.pass {
            return Err(MemoryError::Pass { found, now: self.pass });
        }
        Ok(())
    }
}

/// Waits until a pass has ended on every connection.
///
/// It also keeps connections together: memory of the next pass is refused until the pass has ended on all of them, so
/// that an old page never lands on a new one. And it bounds them together: a pass never has more bytes than the guest.
#[derive(Debug, Clone)]
pub struct Barrier {
    /// For each connection, whether it has ended.
    ended: Vec<bool>,
    pass: u32,
    /// Whether the pass is the last, as the first Mark of it says.
    last: Option<bool>,
    /// Bytes of guest memory that the pass may still describe.
    left: u64,
    /// Bytes that the guest has.
    most: u64,
}

impl Barrier {
    /// For a session with so many connections, and a guest with so many bytes of memory.
    #[must_use]
    pub fn new(connections: u16, bytes: u64) -> Self {
        let ended = vec![false; usize::from(connections)];
        Self { ended, pass: 0, last: None, left: bytes, most: bytes }
    }

    /// Whether `bytes` of memory of `pass` may land.
    ///
    /// # Errors
    /// [`MemoryError::Pass`]: the pass before has not ended on every connection. [`MemoryError::Excess`]: all of them
    /// together send more than the guest has.
    pub fn take(&mut self, pass: u32, bytes: u64) -> Result<(), MemoryError> {
        if pass != self.pass {
            return Err(MemoryError::Pass { found: pass, now: self.pass });
        }
        self.left = self.left.checked_sub(bytes).ok_or(MemoryError::Excess { pass })?;
        Ok(())
    }

    /// The pass has ended on `connection`, which says that it is the last one or not; `true` when it now has on all,
    /// and the next pass begins.
    ///
    /// # Errors
    /// [`MemoryError::Connection`]: there is none, or it had ended there already. [`MemoryError::Last`]: another
    /// connection said something else.
    pub fn mark(&mut self, connection: u16, last: bool) -> Result<bool, MemoryError> {
        if *self.last.get_or_insert(last) != last {
            return Err(MemoryError::Last { connection });
        }
        match self.ended.get_mut(usize::from(connection)) {
            Some(ended) if !*ended => *ended = true,
            _ => return Err(MemoryError::Connection { connection }),
        }
        let all = self.ended.iter().all(|ended| *ended);
        if all {
            self.ended.fill(false);
            self.pass = self.pass.saturating_add(1);
            self.last = None;
            self.left = self.most;
        }
        Ok(all)
    }
}

/// A range of guest memory is zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Zero {
    /// The range; of any length.
    pub range: MemoryRange,
    /// The pass it belongs to.
    pub pass: u32,
}

/// Checksums of contents that have gone before, one for each page: a guest that writes a page while it is sent makes
/// that page wrong, and no other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sums {
    /// The range of the frame before.
    pub range: MemoryRange,
    /// The pass it belongs to.
    pub pass: u32,
    /// [`page_checksum`](crate::page_checksum) of each page.
    pub sums: Vec<u32>,
}

impl Sums {
    /// The parts of the range that are not as they were sent, where they landed with the checksums `computed`.
    pub fn damaged(&self, computed: &[u32]) -> Vec<MemoryRange> {
        let mut parts: Vec<MemoryRange> = Vec::new();
        let (mut gpa, mut computed) = (self.range.gpa(), computed.iter());
        for sum in &self.sums {
            let page = MemoryRange { gpa, length: PAGE };
            gpa = page.end();
            if computed.next() == Some(sum) {
                continue;
            }
            match parts.last_mut() {
                Some(part) if part.end() == page.gpa => part.length = part.length.saturating_add(PAGE),
                _ => parts.push(page),
            }
        }
        parts
    }
}

/// A range of guest memory that the destination is to run without: it drops what it has of it, and asks for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Absent {
    /// The range; of any length.
    pub range: MemoryRange,
    /// The pass it belongs to, which is the last.
    pub pass: u32,
}

/// A connection's part of a pass ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark {
    /// Which pass; the first is 0.
    pub pass: u32,
    /// Whether it is the last: the guest stands still.
    pub last: bool,
    /// Bytes of guest memory that this pass described on this connection.
    pub bytes: u64,
}

/// Where a part of guest memory lies in a descriptor that travels beside the frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DescriptorRange {
    /// The range.
    pub range: MemoryRange,
    /// Where it begins in the descriptor's file, in bytes.
    pub offset: u64,
    /// Which of the descriptors, in the order in which they were attached.
    pub descriptor: u32,
}

/// Guest memory that no peer may describe.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// Not whole pages, none, or beyond the address space.
    #[error("{length} bytes at {gpa:#x} are no range of whole pages")]
    NoRange {
        /// Guest physical address.
        gpa: u64,
        /// Length in bytes.
        length: u64,
    },
    /// More regions than a layout may have.
    #[error("a memory layout of {count} regions, {MAX_REGIONS} are allowed")]
    Regions {
        /// How many.
        count: usize,
    },
    /// Regions out of order, or one in another.
    #[error("the memory region at {gpa:#x} is not after the one before it")]
    Overlap {
        /// Address of the later one.
        gpa: u64,
    },
    /// Not in one region of the guest's memory.
    #[error("{length} bytes at {gpa:#x} are not in the guest's memory")]
    Outside {
        /// Guest physical address.
        gpa: u64,
        /// Length in bytes.
        length: u64,
    },
    /// More bytes in a pass than the guest has.
    #[error("pass {pass} has more bytes than the guest")]
    Excess {
        /// Which pass.
        pass: u32,
    },
    /// A frame of another pass.
    #[error("memory of pass {found} arrives in pass {now}")]
    Pass {
        /// Pass of the frame.
        found: u32,
        /// Pass that is going on.
        now: u32,
    },
    /// Memory is left out before the last pass.
    #[error("pass {pass} leaves memory out and is not the last")]
    Absent {
        /// Which pass.
        pass: u32,
    },
    /// Checksums that are not of the frame before, or that nobody has agreed on.
    #[error("checksums of memory at {gpa:#x}, which is not what came before")]
    Sums {
        /// Guest physical address.
        gpa: u64,
    },
    /// Memory without its checksums.
    #[error("no checksums follow {length} bytes of memory at {gpa:#x}")]
    Unsummed {
        /// Guest physical address.
        gpa: u64,
        /// Length in bytes.
        length: u64,
    },
    /// Frames were lost.
    #[error("a pass of {sent} bytes ends after {received}")]
    Missing {
        /// As the mark says.
        sent: u64,
        /// As counted.
        received: u64,
    },
    /// A connection that is not there, or that is ahead.
    #[error("connection {connection} cannot end this pass")]
    Connection {
        /// Index of the connection.
        connection: u16,
    },
    /// Connections disagree on which pass is the last.
    #[error("connection {connection} and another do not agree whether the pass is the last")]
    Last {
        /// Index of the connection.
        connection: u16,
    },
}
