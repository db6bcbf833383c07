//! What a frame is about: [`Command`], who sends it, and the bounds of its payload.

use std::fmt;
use std::ops::RangeInclusive;

const KIB: u32 = 1 << 10;
const MIB: u32 = 1 << 20;
/// A session's id.
const SESSION: u32 = 16;
/// A reason and its text.
const REASON: RangeInclusive<u32> = 2..=2 + KIB;
/// A range, a checksum and a pass, then at most 2 MiB.
const BULK: RangeInclusive<u32> = 25..=24 + 2 * MIB;

/// Who may send a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sender {
    /// The side that has the VM.
    Source,
    /// The side that gets it.
    Destination,
    /// Either.
    Both,
}

/// Declares the commands with all that is fixed about them.
macro_rules! commands {
    ($($(#[doc = $doc:literal])+ $name:ident = $number:literal, $sender:ident, $lengths:expr;)+) => {
        /// Command of a frame; the number is what travels.
        ///
        /// Roles and payloads are in `WIRE.md` beside this crate's README.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u16)]
        #[non_exhaustive]
        pub enum Command {
            $($(#[doc = $doc])+ $name = $number,)+
        }

        impl Command {
            /// How many there are.
            pub const COUNT: usize = [$($number),+].len();

            /// Every command, in the order of the numbers.
            pub const ALL: [Self; Self::COUNT] = [$(Self::$name),+];

            /// Who may send it.
            #[must_use]
            pub const fn sender(self) -> Sender {
                match self {
                    $(Self::$name => Sender::$sender,)+
                }
            }

            /// Bounds of the payload's length, in bytes.
            #[must_use]
            pub const fn payload_lengths(self) -> RangeInclusive<u32> {
                match self {
                    $(Self::$name => $lengths,)+
                }
            }
        }
    };
}

commands! {
    /// Source asks to begin: the destination builds the VM.
    Start = 1, Source, 0..=0;
    /// The VM's configuration.
    Config = 2, Source, 1..=MIB;
    /// The VM's saved state, all but its memory. 64 KiB for each of 1024 vCPUs.
    State = 3, Source, 1..=64 * MIB;
    /// A range of guest memory and its bytes.
    Memory = 4, Source, BULK;
    /// Source has sent everything and released what it held.
    Complete = 5, Source, 0..=0;
    /// Source gives up; the destination discards the VM.
    Abandon = 6, Source, REASON;
    /// First frame: magic, versions, features, session, needs.
    Hello = 64, Source, 9..=MIB;
    /// The command was carried out.
    Ack = 65, Both, 2..=2;
    /// The command was not carried out, and why.
    Nack = 66, Destination, 1..=64 * KIB;
    /// Destination holds everything and waits for the commit.
    Ready = 67, Destination, SESSION..=SESSION;
    /// The VM is the destination's from now on.
    Commit = 68, Source, SESSION + 1..=SESSION + 1;
    /// First frame of a connection that asks: how did this session end?
    Query = 69, Source, 8 + SESSION..=8 + SESSION;
    /// This is how it ended.
    Outcome = 70, Destination, SESSION + 1..=SESSION + 1;
    /// Answer to Hello: what was agreed on.
    Accept = 71, Destination, 1..=4 * KIB;
    /// First frame of a further connection: which session, which connection.
    Join = 72, Source, 12 + SESSION..=12 + SESSION;
    /// A connection's part of a pass over memory ends here.
    Mark = 73, Source, 13..=13;
    /// All of a pass has arrived and is in place.
    Landed = 74, Destination, 4..=4;
    /// A range of guest memory is zero.
    Zero = 75, Source, 20..=20;
    /// A range arrived damaged: send it with the next pass.
    Again = 76, Destination, 16..=16;
    /// Descriptors of the memory itself travel beside this frame.
    Descriptors = 77, Source, 28..=28 * KIB;
    /// Still here; how far.
    Keepalive = 78, Both, 16..=16;
    /// Destination gives up, by its operator's wish.
    Cancel = 79, Destination, REASON;
    /// The commit was taken: the VM is here.
    Committed = 80, Destination, SESSION..=SESSION;
    /// A range of guest memory and its bytes, compressed.
    Packed = 81, Source, BULK;
    /// Checksums of the pages of the [`Memory`](Self::Memory) frame before it.
    Sums = 82, Source, 24..=20 + 4 * 512;
    /// The destination is to run without this range, and to ask for it.
    Absent = 96, Source, 20..=20;
    /// A range that is wanted before all others.
    Want = 97, Destination, 16..=16;
    /// All of memory is there: the source can drop it.
    Whole = 98, Destination, SESSION..=SESSION;
    /// First frame of a connection that takes a lost one's place after Commit.
    Rejoin = 99, Source, 8 + SESSION..=8 + SESSION;
    /// A range that is still absent; Ack of Rejoin follows the last.
    Lacks = 100, Destination, 16..=16;
}

impl Command {
    /// The command that travels as `number`, if there is one.
    #[must_use]
    pub fn from_number(number: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|command| command.number() == number)
    }

    /// The number that travels.
    #[must_use]
    pub const fn number(self) -> u16 {
        self as u16
    }

    /// Whether contents of guest memory follow the first 24 bytes of its payload: such frames are
    /// [`Bulk`](crate::Bulk), never [`Frame`](crate::Frame).
    #[must_use]
    pub const fn is_bulk(self) -> bool {
        matches!(self, Self::Memory | Self::Packed)
    }

    /// Whether it is about guest memory on its way, and so for the receiver of memory and not for a state machine.
    #[must_use]
    pub const fn is_data(self) -> bool {
        self.is_bulk() || matches!(self, Self::Zero | Self::Mark | Self::Absent | Self::Sums)
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_are_found_by_number_and_nothing_else_is() {
        let found: Vec<Command> = (0..=u16::MAX).filter_map(Command::from_number).collect();
        assert_eq!(found, Command::ALL);
        let numbers = Command::ALL.map(Command::number);
        let expected: Vec<u16> = (1..=6).chain(64..=82).chain(96..=100).collect();
        assert_eq!(numbers.to_vec(), expected);
    }
}
