//! What is wrong with a configuration, and where.

use std::fmt;

/// Why a part of a configuration is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum FaultKind {
    /// The bytes are not JSON, or exceed the bounds on size or nesting.
    Syntax,
    /// A value has the wrong JSON type, or does not fit the type of its field.
    Type,
    /// A name that no release of the contract knows.
    Unknown,
    /// The value is of the right type but cannot be used.
    Invalid,
    /// A field of an older release that no longer exists, away from its old default.
    Retired,
    /// Part of the contract, but not of this build yet.
    NotBuilt,
}

impl FaultKind {
    /// Every kind.
    pub const ALL: [Self; 6] =
        [Self::Syntax, Self::Type, Self::Unknown, Self::Invalid, Self::Retired, Self::NotBuilt];

    /// A stable word for machines, as it appears in the body of an error reply.
    #[must_use]
    pub const fn code(self) -> &'static str {
        match self {
            Self::Syntax => "syntax",
            Self::Type => "type",
            Self::Unknown => "unknown-field",
            Self::Invalid => "invalid",
            Self::Retired => "retired",
            Self::NotBuilt => "not-built",
        }
    }
}

/// One thing wrong with a configuration.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Fault {
    /// JSON path of the value (`disks[1].path`; `$` is the document itself), or flag and key
    /// (`--disk[1] path`) for an option string.
    pub path: String,
    /// The class of the fault.
    pub kind: FaultKind,
    /// What is wrong, for people; it does not repeat the path.
    pub message: String,
}

impl Fault {
    /// A fault of `kind` at `path`.
    pub fn new(path: impl Into<String>, kind: FaultKind, message: impl Into<String>) -> Self {
        Self { path: path.into(), kind, message: message.into() }
    }
}

/// Faults (and warnings) recorded of one document; what is beyond is not listed, for the reply is bounded.
pub(crate) const MAX_FAULTS: usize = 100;

/// Adds a fault to a bounded list.
pub(crate) fn record(faults: &mut Vec<Fault>, fault: Fault) {
    match faults.len() {
        ..MAX_FAULTS => faults.push(fault),
        MAX_FAULTS => {
            let message = "this and further faults are not listed".into();
            faults.push(Fault { message, ..fault });
        }
        _ => {}
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path, self.message)
    }
}

impl std::error::Error for Fault {}

/// Something a user should know although the configuration is accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warning {
    /// Where, in the form of [`Fault::path`].
    pub path: String,
    /// What, for people.
    pub message: String,
}

impl Warning {
    /// A warning about the value at `path`.
    pub fn new(path: impl Into<String>, message: impl Into<String>) -> Self {
        Self { path: path.into(), message: message.into() }
    }
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path, self.message)
    }
}

/// What happens to a name that no release of the contract knows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum UnknownFields {
    /// The document is refused, with the nearest known name.
    #[default]
    Refuse,
    /// The field is ignored, with a [`Warning`] (`--unknown-fields=warn`).
    Warn,
}
