//! A range of guest-physical addresses that cannot wrap.

use std::fmt;

/// A range of guest-physical addresses, `start` included and `end` excluded; `start <= end` always.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    start: u64,
    end: u64,
}

impl Span {
    /// The span of `size` bytes at `start`, or `None` when its end does not fit in 64 bits.
    pub const fn new(start: u64, size: u64) -> Option<Self> {
        match start.checked_add(size) {
            Some(end) => Some(Self { start, end }),
            None => None,
        }
    }

    /// First address.
    pub const fn start(&self) -> u64 {
        self.start
    }

    /// One past the last address.
    pub const fn end(&self) -> u64 {
        self.end
    }

    /// Size in bytes.
    pub const fn size(&self) -> u64 {
        self.end - self.start
    }

    /// Whether the two spans share a byte; an empty span shares none.
    pub const fn overlaps(&self, other: &Self) -> bool {
        self.start < other.end && other.start < self.end && self.size() > 0 && other.size() > 0
    }

    /// Whether all of `other` lies inside this span.
    pub const fn contains(&self, other: &Self) -> bool {
        self.start <= other.start && other.end <= self.end
    }

    /// The smallest span that holds both.
    pub(crate) fn hull(&self, other: &Self) -> Self {
        Self { start: self.start.min(other.start), end: self.end.max(other.end) }
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..{:#x}", self.start, self.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_span_cannot_wrap() {
        assert!(Span::new(u64::MAX, 1).is_none());
        assert!(Span::new(1, u64::MAX).is_none());
        assert_eq!(Span::new(u64::MAX, 0).unwrap().size(), 0);
    }

    #[test]
    fn neighbours_and_empty_spans_do_not_overlap() {
        let a = Span::new(0x1000, 0x1000).unwrap();
        assert!(!a.overlaps(&Span::new(0x2000, 1).unwrap()));
        assert!(!a.overlaps(&Span::new(0, 0x1000).unwrap()));
        assert!(!a.overlaps(&Span::new(0x1800, 0).unwrap()));
        assert!(a.overlaps(&Span::new(0x1fff, 1).unwrap()));
        assert!(a.overlaps(&Span::new(0, u64::MAX).unwrap()));
    }
}
