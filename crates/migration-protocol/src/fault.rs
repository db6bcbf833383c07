//! Why something was not done, as it travels and as it is told: [`Fault`].

use std::fmt;

use minicbor::{Decode, Encode};

/// Most bytes of a fault's text.
const TEXT: usize = 1024;
/// Most things that a fault says are missing, and most bytes of each name.
const MISSING: usize = 64;
const NAME: usize = 256;

/// Declares the reasons with their numbers and texts.
macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $name:ident = $number:literal, $text:literal;)+) => {
        /// Why, in one word; the number is what travels.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum Reason {
            $($(#[doc = $doc])+ $name,)+
            /// A reason of a later build.
            Other(u16),
        }

        impl Reason {
            /// Every reason that this build knows.
            pub const ALL: [Self; [$($number),+].len()] = [$(Self::$name),+];

            /// The number that travels.
            #[must_use]
            pub const fn number(self) -> u16 {
                match self {
                    $(Self::$name => $number,)+
                    Self::Other(number) => number,
                }
            }

            /// The reason that travels as `number`.
            #[must_use]
            pub const fn from_number(number: u16) -> Self {
                match number {
                    $($number => Self::$name,)+
                    other => Self::Other(other),
                }
            }

            /// The reason in words.
            #[must_use]
            pub const fn text(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)+
                    Self::Other(_) => "a reason that this build does not know",
                }
            }
        }
    };
}

reasons! {
    /// An operator's wish.
    Cancelled = 1, "cancelled";
    /// The time for the whole migration, or for an answer, has passed.
    Timeout = 2, "out of time";
    /// The peer sent what it must not.
    Violation = 3, "the peer broke the protocol";
    /// No version in common.
    Version = 4, "no common version of the protocol";
    /// A feature is required that the other end lacks.
    Features = 5, "a required feature is missing";
    /// Another migration is under way, or there is a VM.
    Busy = 6, "the destination is not free";
    /// The destination lacks what the VM needs.
    Incompatible = 7, "the destination lacks what the VM needs";
    /// A step of the peer's own did not succeed.
    Failed = 8, "a step failed";
    /// Memory arrived damaged when nothing could be sent again.
    Damaged = 9, "memory arrived damaged";
    /// The guest writes memory faster than the link carries it.
    Diverges = 10, "the guest changes memory faster than the link carries it";
    /// The link went down. Never sent.
    Lost = 11, "the link is lost";
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Other(number) => write!(f, "reason {number}, which this build does not know"),
            known => f.write_str(known.text()),
        }
    }
}

impl<C> Encode<C> for Reason {
    fn encode<W: minicbor::encode::Write>(
        &self,
        e: &mut minicbor::Encoder<W>,
        ctx: &mut C,
    ) -> Result<(), minicbor::encode::Error<W::Error>> {
        self.number().encode(e, ctx)
    }
}

impl<'b, C> Decode<'b, C> for Reason {
    fn decode(d: &mut minicbor::Decoder<'b>, _: &mut C) -> Result<Self, minicbor::decode::Error> {
        d.u16().map(Self::from_number)
    }
}

/// What kind of thing is missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Encode, Decode)]
#[cbor(index_only)]
#[non_exhaustive]
pub enum MissingKind {
    /// A CPU feature.
    #[n(0)]
    Cpu,
    /// A device.
    #[n(1)]
    Device,
    /// A file, socket or tap that the receiver's operator must provide.
    #[n(2)]
    Resource,
    /// A capability of the host or its kernel.
    #[n(3)]
    Capability,
    /// Memory.
    #[n(4)]
    Memory,
}

/// One thing that the destination lacks.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Missing {
    /// Its kind.
    #[n(0)]
    pub kind: MissingKind,
    /// Its name: a CPUID bit, a device's id, a path.
    #[n(1)]
    pub name: String,
}

impl Missing {
    /// A thing with a name, which is cut if it is very long.
    #[must_use]
    pub fn new(kind: MissingKind, name: &str) -> Self {
        Self { kind, name: clean(name, NAME) }
    }
}

/// Why something was not done: the reason, a text for people, and what is missing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    reason: Reason,
    text: String,
    missing: Vec<Missing>,
}

impl Fault {
    /// A fault; a very long text is cut, and control characters in it become spaces, for it may come from a peer and
    /// end in a log.
    #[must_use]
    pub fn new(reason: Reason, text: &str) -> Self {
        Self { reason, text: clean(text, TEXT), missing: Vec::new() }
    }

    /// [`Reason::Incompatible`] with what is missing, of which the first 64 are kept.
    #[must_use]
    pub fn incompatible(missing: Vec<Missing>) -> Self {
        let text = format!("{} missing", missing.len());
        Self::new(Reason::Incompatible, &text).with_missing(missing)
    }

    pub(crate) fn with_missing(self, missing: Vec<Missing>) -> Self {
        let cut = missing.into_iter().take(MISSING);
        let missing = cut.map(|missing| Missing::new(missing.kind, &missing.name)).collect();
        Self { missing, ..self }
    }

    /// The reason.
    #[must_use]
    pub fn reason(&self) -> Reason {
        self.reason
    }

    /// For people; may be empty.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }

    /// What the destination lacks.
    #[must_use]
    pub fn missing(&self) -> &[Missing] {
        &self.missing
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.reason)?;
        if !self.text.is_empty() {
            write!(f, ": {}", self.text)?;
        }
        let mut before = ": ";
        for Missing { kind, name } in &self.missing {
            write!(f, "{before}{kind:?} {name}")?;
            before = ", ";
        }
        Ok(())
    }
}

/// At most `most` bytes of `text`, without control characters.
fn clean(text: &str, most: usize) -> String {
    let fits = text.char_indices().take_while(|(at, c)| at.saturating_add(c.len_utf8()) <= most);
    // A control character above U+007F takes two bytes, a space one: it does not get longer.
    fits.map(|(_, c)| if c.is_control() { ' ' } else { c }).collect()
}

/// Which end a migration failed at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum End {
    /// This one.
    Here,
    /// The other one, which said so.
    Peer,
    /// In between: the link, or silence.
    Link,
}

/// Why a migration failed, and at which end.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}{fault}", match .end { End::Here => "", End::Peer => "the other end: ", End::Link => "the link: " })]
pub struct Failure {
    /// At which end.
    pub end: End,
    /// Why.
    pub fault: Fault,
}

impl Failure {
    /// A failure at `end`.
    #[must_use]
    pub fn new(end: End, reason: Reason, text: &str) -> Self {
        Self { end, fault: Fault::new(reason, text) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_reasons_are_each_others() {
        for number in 0..=u16::MAX {
            assert_eq!(Reason::from_number(number).number(), number);
        }
        let known =
            (0..=u16::MAX).map(Reason::from_number).filter(|reason| !matches!(reason, Reason::Other(_)));
        assert_eq!(known.collect::<Vec<_>>(), Reason::ALL);
    }

    #[test]
    fn texts_are_cut_between_characters_and_hold_no_control() {
        assert_eq!(clean("añb", 2), "a");
        assert_eq!(clean("añb", 3), "añ");
        assert_eq!(clean("a\n\u{1b}[2Jb\u{85}", 99), "a  [2Jb ");
        let fault = Fault::new(Reason::Failed, &"é".repeat(2000));
        assert_eq!(fault.text().len(), TEXT);
    }

    #[test]
    fn a_failure_says_where_and_what() {
        let missing = vec![Missing::new(MissingKind::Cpu, "cpuid 7.0 ebx bit 16")];
        let failure = Failure { end: End::Peer, fault: Fault::incompatible(missing) };
        let text =
            "the other end: the destination lacks what the VM needs: 1 missing: Cpu cpuid 7.0 ebx bit 16";
        assert_eq!(failure.to_string(), text);
    }
}
