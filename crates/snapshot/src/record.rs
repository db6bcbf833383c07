//! One owner's saved state: [`Schema`] describes it, [`Record`] carries it.

use std::convert::Infallible;

/// A version of the saved state of one kind of owner.
///
/// Implement it with [`schema!`](crate::schema) on a struct that derives `minicbor::Encode` and
/// `minicbor::Decode`. To change a shipped version, add a new struct whose `Previous` is the old one and
/// an `impl From<Old> for New`: that is the upgrade path, walked by [`Record::parse`].
pub trait Schema: Sized {
    /// What is described, e.g. `"serial"`. Stable for ever, shared by all versions.
    const KIND: &'static str;
    /// Version of this layout, counted from 1.
    const VERSION: u16;
    /// The version before this one; [`Never`] for the first.
    type Previous: Schema + Into<Self>;

    /// The state as bytes. One state has one encoding.
    fn encode(&self) -> Vec<u8>;

    /// The state from bytes that may come from anywhere.
    ///
    /// Allocates in proportion to `bytes.len()`, whatever lengths the bytes announce.
    ///
    /// # Errors
    /// [`RecordError::Malformed`] for bytes that [`encode`](Self::encode) does not write.
    fn decode(bytes: &[u8]) -> Result<Self, RecordError>;
}

/// Saved state as it travels: what it is, in which version, and its bytes.
#[derive(Debug, Clone, PartialEq, Eq, minicbor::Encode, minicbor::Decode)]
pub struct Record {
    /// [`Schema::KIND`] of the content.
    #[n(0)]
    pub kind: String,
    /// [`Schema::VERSION`] of the content.
    #[n(1)]
    pub version: u16,
    /// The encoded content.
    #[cbor(n(2), with = "minicbor::bytes")]
    pub bytes: Vec<u8>,
}

impl Record {
    /// Packs `state`.
    pub fn of<S: Schema>(state: &S) -> Self {
        Self { kind: S::KIND.to_owned(), version: S::VERSION, bytes: state.encode() }
    }

    /// Unpacks the state, upgrading from older versions on the way.
    ///
    /// # Errors
    /// The record is of another kind, of a version this build does not know, or does not decode.
    pub fn parse<S: Schema>(&self) -> Result<S, RecordError> {
        if self.kind != S::KIND {
            return Err(RecordError::Kind { found: self.kind.clone(), expected: S::KIND });
        }
        if self.version > S::VERSION {
            return Err(RecordError::Newer { kind: S::KIND, found: self.version, known: S::VERSION });
        }
        self.parse_version::<S>()
    }

    fn parse_version<S: Schema>(&self) -> Result<S, RecordError> {
        if self.version == S::VERSION {
            return S::decode(&self.bytes);
        }
        if S::Previous::VERSION == 0 {
            return Err(RecordError::Older { kind: S::KIND, found: self.version, oldest: S::VERSION });
        }
        // Depth is the number of versions in this build, not anything the record says.
        self.parse_version::<S::Previous>().map(Into::into)
    }
}

/// Why a record could not be turned into state.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    /// Another owner's record.
    #[error("record is of kind {found:?}, expected {expected:?}")]
    Kind {
        /// Kind that the record carries.
        found: String,
        /// Kind that was asked for.
        expected: &'static str,
    },
    /// Written by a newer build.
    #[error("{kind} record has version {found}, this build knows versions up to {known}")]
    Newer {
        /// Kind of the record.
        kind: &'static str,
        /// Version that the record carries.
        found: u16,
        /// Newest version of this build.
        known: u16,
    },
    /// Older than the oldest version still in the tree.
    #[error("{kind} record has version {found}, the oldest supported is {oldest}")]
    Older {
        /// Kind of the record.
        kind: &'static str,
        /// Version that the record carries.
        found: u16,
        /// Oldest version of this build.
        oldest: u16,
    },
    /// The bytes are not what the version describes.
    #[error("{kind} record, version {version}, does not decode")]
    Malformed {
        /// Kind of the record.
        kind: &'static str,
        /// Version of the record.
        version: u16,
        /// What the decoder met.
        #[source]
        source: minicbor::decode::Error,
    },
    /// The bytes decode but describe something that cannot be.
    #[error("{kind} record: {what}")]
    Invalid {
        /// Kind of the record.
        kind: &'static str,
        /// The field and what is wrong with it.
        what: String,
    },
}

impl RecordError {
    /// A record of schema `S` whose field says something impossible.
    pub fn invalid<S: Schema>(what: impl Into<String>) -> Self {
        Self::Invalid { kind: S::KIND, what: what.into() }
    }
}

/// The version before the first.
#[derive(Debug)]
pub struct Never(Infallible);

impl Never {
    /// Proof that no value exists.
    pub fn absurd<T>(self) -> T {
        match self.0 {}
    }
}

impl Schema for Never {
    const KIND: &'static str = "never";
    const VERSION: u16 = 0;
    type Previous = Self;

    fn encode(&self) -> Vec<u8> {
        match self.0 {}
    }

    fn decode(_: &[u8]) -> Result<Self, RecordError> {
        Err(RecordError::Older { kind: Self::KIND, found: 0, oldest: 1 })
    }
}

/// State of an owner that has none; a decision, written down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, minicbor::Encode, minicbor::Decode)]
pub struct NoState {}

crate::schema!(NoState: "none" v1);

/// Implements [`Schema`] for a struct that derives minicbor's `Encode` and `Decode`.
///
/// `schema!(SerialV1: "serial" v1);` for a first version,
/// `schema!(SerialV2: "serial" v2 after SerialV1);` for a later one. A version that does not follow its
/// previous one, or is of another kind, does not compile.
#[macro_export]
macro_rules! schema {
    ($type:ty : $kind:literal v1) => {
        impl From<$crate::Never> for $type {
            fn from(never: $crate::Never) -> Self {
                never.absurd()
            }
        }
        $crate::schema!(@impl $type, $kind, 1, $crate::Never);
    };
    ($type:ty : $kind:literal v2 after $previous:ty) => { $crate::schema!(@next $type, $kind, 2, $previous); };
    ($type:ty : $kind:literal v3 after $previous:ty) => { $crate::schema!(@next $type, $kind, 3, $previous); };
    ($type:ty : $kind:literal v4 after $previous:ty) => { $crate::schema!(@next $type, $kind, 4, $previous); };
    ($type:ty : $kind:literal v5 after $previous:ty) => { $crate::schema!(@next $type, $kind, 5, $previous); };
    ($type:ty : $kind:literal v6 after $previous:ty) => { $crate::schema!(@next $type, $kind, 6, $previous); };
    ($type:ty : $kind:literal v7 after $previous:ty) => { $crate::schema!(@next $type, $kind, 7, $previous); };
    ($type:ty : $kind:literal v8 after $previous:ty) => { $crate::schema!(@next $type, $kind, 8, $previous); };
    ($type:ty : $kind:literal v9 after $previous:ty) => { $crate::schema!(@next $type, $kind, 9, $previous); };
    (@next $type:ty, $kind:literal, $version:literal, $previous:ty) => {
        const _: () = assert!($crate::follows::<$type, $previous>(), "a schema follows the version before it");
        $crate::schema!(@impl $type, $kind, $version, $previous);
    };
    (@impl $type:ty, $kind:literal, $version:literal, $previous:ty) => {
        impl $crate::Schema for $type {
            const KIND: &'static str = $kind;
            const VERSION: u16 = $version;
            type Previous = $previous;

            fn encode(&self) -> Vec<u8> {
                // A derived encoder that writes into a Vec does not fail. A hand-written one that does leaves
                // an empty record, which no version decodes.
                $crate::minicbor::to_vec(self).unwrap_or_default()
            }

            fn decode(bytes: &[u8]) -> ::core::result::Result<Self, $crate::RecordError> {
                let malformed = |source| $crate::RecordError::Malformed { kind: $kind, version: $version, source };
                let state: Self = $crate::minicbor::decode(bytes).map_err(malformed)?;
                // One state has one encoding: what the version does not describe (unknown fields, trailing
                // bytes, doubled fields) is refused, not dropped.
                if $crate::Schema::encode(&state) != bytes {
                    return Err(malformed($crate::minicbor::decode::Error::message("more or other than the version describes")));
                }
                Ok(state)
            }
        }
    };
}

/// Whether `S` may come right after `P`; used by [`schema!`](crate::schema) at compile time.
#[doc(hidden)]
#[must_use]
pub const fn follows<S: Schema, P: Schema>() -> bool {
    let (kind, previous) = (S::KIND.as_bytes(), P::KIND.as_bytes());
    if kind.len() != previous.len() || P::VERSION.checked_add(1).is_none() || P::VERSION + 1 != S::VERSION {
        return false;
    }
    let mut rest = (kind, previous);
    while let ([a, kind @ ..], [b, previous @ ..]) = rest {
        if *a != *b {
            return false;
        }
        rest = (kind, previous);
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(minicbor::Encode, minicbor::Decode)]
    struct A1 {}
    crate::schema!(A1: "a" v1);

    #[derive(minicbor::Encode, minicbor::Decode)]
    struct A2 {}
    crate::schema!(A2: "a" v2 after A1);

    #[derive(minicbor::Encode, minicbor::Decode)]
    struct A3 {}
    crate::schema!(A3: "a" v3 after A2);

    impl From<A1> for A2 {
        fn from(_: A1) -> Self {
            Self {}
        }
    }

    impl From<A2> for A3 {
        fn from(_: A2) -> Self {
            Self {}
        }
    }

    #[test]
    fn a_schema_follows_its_own_kind_by_one() {
        assert!(follows::<A2, A1>() && follows::<A3, A2>());
        assert!(!follows::<A3, A1>(), "a version is left out");
        assert!(!follows::<A2, A2>() && !follows::<A1, A2>());
        assert!(!follows::<A2, NoState>(), "another kind");
    }
}
