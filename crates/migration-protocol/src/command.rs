//! What a frame is about: [`Command`] and the bounds of its payload.

use std::fmt;
use std::ops::RangeInclusive;

const KIB: u32 = 1 << 10;
const MIB: u32 = 1 << 20;

/// Command of a frame; the number is what travels.
///
/// Roles and payloads are in `WIRE.md` beside this crate's README.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u16)]
#[non_exhaustive]
pub enum Command {
    /// Source asks to begin.
    Start = 1,
    /// The VM's configuration.
    Config = 2,
    /// The VM's saved state, all but its memory.
    State = 3,
    /// A range of guest memory and its bytes.
    Memory = 4,
    /// Source has sent everything and released what it held.
    Complete = 5,
    /// Source gives up; the destination discards the VM.
    Abandon = 6,
    /// First frame of each side: magic, versions, features, session, needs.
    Hello = 64,
    /// The command was carried out.
    Ack = 65,
    /// The command was not carried out, and why.
    Nack = 66,
    /// Destination holds everything and waits for the commit.
    Ready = 67,
    /// The VM is the destination's from now on.
    Commit = 68,
    /// How did this session end?
    Query = 69,
    /// This is how it ended.
    Outcome = 70,
}

impl Command {
    /// Every command, in the order of the numbers.
    pub const ALL: [Self; 13] = [
        Self::Start,
        Self::Config,
        Self::State,
        Self::Memory,
        Self::Complete,
        Self::Abandon,
        Self::Hello,
        Self::Ack,
        Self::Nack,
        Self::Ready,
        Self::Commit,
        Self::Query,
        Self::Outcome,
    ];

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

    /// Bounds of the payload's length, in bytes.
    #[must_use]
    pub const fn payload_lengths(self) -> RangeInclusive<u32> {
        match self {
            Self::Start | Self::Complete => 0..=0,
            Self::Config => 1..=MIB,
            // 64 KiB for each of 1024 vCPUs.
            Self::State => 1..=64 * MIB,
            // GPA and length, then at most 2 MiB.
            Self::Memory => 17..=16 + 2 * MIB,
            Self::Abandon => 0..=KIB,
            // At least the magic.
            Self::Hello => 8..=MIB,
            // The command that is answered; for a Nack with a text.
            Self::Ack => 2..=2,
            Self::Nack => 2..=2 + KIB,
            // The session; for an outcome with a code.
            Self::Ready | Self::Commit | Self::Query => 16..=16,
            Self::Outcome => 17..=17,
        }
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
        let numbers: Vec<u16> = Command::ALL.map(Command::number).to_vec();
        assert_eq!(numbers, [1, 2, 3, 4, 5, 6, 64, 65, 66, 67, 68, 69, 70]);
    }
}
