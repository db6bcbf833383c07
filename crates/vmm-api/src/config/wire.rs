//! What every type of a field can do, and the plain types.

use std::net::IpAddr;
use std::path::PathBuf;

use serde::Serialize;

use super::fault::{Fault, FaultKind, record};
use super::json::Node;
use super::path::Path;
use super::reader::Reader;
use super::table::{Shape, Status};

/// A type of the contract.
pub(crate) trait Wire: Sized + PartialEq + Serialize {
    /// Whether null is a value, and means that there is none.
    const NULLABLE: bool = false;

    /// How the contract sees the type.
    fn shape() -> Shape;

    /// Reads a value; a fault is recorded and answered with `None`.
    fn read(node: &Node, reader: &mut Reader) -> Option<Self>;

    /// Whether the value is not written at all.
    fn is_absent(&self) -> bool {
        false
    }

    /// Number of elements, if it is a list.
    fn items(&self) -> Option<usize> {
        None
    }

    /// Records each field below this value whose work is not built yet; plain values have none.
    fn refuse_later(&self, _walk: &mut Walk) {}
}

/// Collects what is not built yet.
#[derive(Debug)]
pub(crate) struct Walk {
    path: Path,
    faults: Vec<Fault>,
}

impl Walk {
    /// The parts of `object` that this build refuses.
    pub(crate) fn faults_of(object: &impl Wire) -> Vec<Fault> {
        let mut walk = Self { path: Path::default(), faults: Vec::new() };
        object.refuse_later(&mut walk);
        walk.faults
    }

    /// Looks at one field of an object.
    pub(crate) fn field<T: Wire>(&mut self, status: Status, name: &'static str, value: &T, default: &T) {
        self.path.enter_field(name);
        match status {
            Status::Current => value.refuse_later(self),
            Status::Later if value == default => {}
            Status::Later => match value.items() {
                None => self.refuse(),
                Some(items) => (0..items).for_each(|index| self.item(index, Self::refuse)),
            },
        }
        self.path.leave();
    }

    fn item(&mut self, index: usize, visit: impl FnOnce(&mut Self)) {
        self.path.enter_item(index);
        visit(self);
        self.path.leave();
    }

    fn refuse(&mut self) {
        let path = self.path.render();
        let message = format!("not supported by this build yet: {path}");
        record(&mut self.faults, Fault::new(path, FaultKind::NotBuilt, message));
    }
}

/// A number of bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct Bytes(pub u64);

impl Bytes {
    /// `n` MiB.
    #[must_use]
    pub const fn mib(n: u32) -> Self {
        Self((n as u64) << 20)
    }

    /// The number.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl std::fmt::Display for Bytes {
    /// The largest unit that divides it: `512M`, `4097`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (shift, suffix) in [(40, "T"), (30, "G"), (20, "M"), (10, "K")] {
            if self.0 != 0 && self.0.trailing_zeros() >= shift {
                return write!(f, "{}{suffix}", self.0 >> shift);
            }
        }
        write!(f, "{}", self.0)
    }
}

impl Wire for Bytes {
    fn shape() -> Shape {
        Shape::Bytes
    }

    fn read(node: &Node, reader: &mut Reader) -> Option<Self> {
        u64::read(node, reader).map(Self)
    }
}

impl Wire for bool {
    fn shape() -> Shape {
        Shape::Bool
    }

    fn read(node: &Node, reader: &mut Reader) -> Option<Self> {
        match node {
            Node::Bool(value) => Some(*value),
            other => reader.mismatch("true or false", other),
        }
    }
}

macro_rules! integer {
    ($($type:ty),+) => {$(
        impl Wire for $type {
            fn shape() -> Shape {
                #[allow(clippy::cast_lossless, clippy::unnecessary_cast, reason = "one body for all widths")]
                Shape::Integer { min: <$type>::MIN as i64, max: <$type>::MAX as u64 }
            }

            fn read(node: &Node, reader: &mut Reader) -> Option<Self> {
                let value = match node {
                    Node::Unsigned(value) => Self::try_from(*value).ok(),
                    Node::Negative(value) => Self::try_from(*value).ok(),
                    _ => None,
                };
                if value.is_none() {
                    let expected = format!("a whole number from {} to {}", Self::MIN, Self::MAX);
                    return reader.mismatch(&expected, node);
                }
                value
            }
        }
    )+};
}

integer!(u8, u16, u32, u64, i32);

impl Wire for String {
    fn shape() -> Shape {
        Shape::Text
    }

    fn read(node: &Node, reader: &mut Reader) -> Option<Self> {
        match node {
            Node::Text(text) => Some(text.clone()),
            other => reader.mismatch("a string", other),
        }
    }
}

impl Wire for PathBuf {
    fn shape() -> Shape {
        Shape::Path
    }

    fn read(node: &Node, reader: &mut Reader) -> Option<Self> {
        match node {
            Node::Text(text) if text.is_empty() => reader.invalid("an empty path"),
            Node::Text(text) if text.contains('\0') => reader.invalid("a path with a NUL byte"),
            Node::Text(text) => Some(Self::from(text)),
            other => reader.mismatch("a path", other),
        }
    }
}

impl Wire for IpAddr {
    fn shape() -> Shape {
        Shape::Address
    }

    fn read(node: &Node, reader: &mut Reader) -> Option<Self> {
        let address = match node {
            Node::Text(text) => text.parse().ok(),
            _ => None,
        };
        if address.is_none() {
            return reader.mismatch("an IPv4 or IPv6 address", node);
        }
        address
    }
}

impl<T: Wire> Wire for Option<T> {
    const NULLABLE: bool = true;

    fn shape() -> Shape {
        T::shape()
    }

    fn read(node: &Node, reader: &mut Reader) -> Option<Self> {
        match node {
            Node::Null => Some(None),
            other => T::read(other, reader).map(Some),
        }
    }

    fn is_absent(&self) -> bool {
        self.is_none()
    }

    fn items(&self) -> Option<usize> {
        self.as_ref().and_then(T::items)
    }

    fn refuse_later(&self, walk: &mut Walk) {
        if let Some(value) = self {
            value.refuse_later(walk);
        }
    }
}

impl<T: Wire> Wire for Vec<T> {
    fn shape() -> Shape {
        Shape::List(T::shape)
    }

    fn read(node: &Node, reader: &mut Reader) -> Option<Self> {
        match node {
            Node::List(items) => Some(reader.items(items)),
            other => reader.mismatch("an array", other),
        }
    }

    fn items(&self) -> Option<usize> {
        Some(self.len())
    }

    fn refuse_later(&self, walk: &mut Walk) {
        for (index, item) in self.iter().enumerate() {
            walk.item(index, |walk| item.refuse_later(walk));
        }
    }
}
