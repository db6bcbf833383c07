//! Where in its memory file a page of a region lies.

use super::{Extents, SPARSE};

/// How the memory file of a region is laid out.
#[derive(Debug)]
pub(super) enum Layout {
    /// As the region, of this many bytes: what is not held is a hole.
    Sparse(u64),
    /// What is held, and nothing between it.
    Packed(Packed),
}

/// The extents of a region one after the other.
#[derive(Debug)]
pub(super) struct Packed {
    /// Per extent its first byte in the region and in the file.
    starts: Vec<(u64, u64)>,
    /// Bytes in all of them.
    size: u64,
}

impl Layout {
    /// That of a region of `size` bytes, of which `extents` are held, in a snapshot of format `format`.
    pub(super) fn new(format: u32, extents: &Extents, size: u64) -> Self {
        if format == SPARSE { Self::Sparse(size) } else { Self::Packed(Packed::new(extents)) }
    }

    /// Bytes of the file.
    pub(super) fn file_size(&self) -> u64 {
        match self {
            Self::Sparse(size) => *size,
            Self::Packed(packed) => packed.size,
        }
    }

    /// Where in the file the first byte is that is held from `offset` in the region on.
    pub(super) fn position(&self, offset: u64) -> u64 {
        match self {
            Self::Sparse(_) => offset,
            Self::Packed(packed) => packed.position(offset),
        }
    }

    /// Where in the region the byte at `position` in the file is.
    pub(super) fn offset(&self, position: u64) -> u64 {
        match self {
            Self::Sparse(_) => position,
            Self::Packed(packed) => packed.offset(position),
        }
    }
}

impl Packed {
    fn new(extents: &Extents) -> Self {
        let mut size = 0;
        let starts = extents.ranges().iter().map(|range| {
            let position = size;
            size += range.end - range.start;
            (range.start, position)
        });
        Self { starts: starts.collect(), size }
    }

    fn position(&self, offset: u64) -> u64 {
        let next = self.starts.partition_point(|(start, _)| *start <= offset);
        let end = self.starts.get(next).map_or(self.size, |(_, position)| *position);
        let last = next.checked_sub(1).and_then(|last| self.starts.get(last));
        last.map_or(0, |(start, position)| end.min(position.saturating_add(offset - start)))
    }

    fn offset(&self, position: u64) -> u64 {
        let next = self.starts.partition_point(|(_, at)| *at <= position);
        let last = next.checked_sub(1).and_then(|last| self.starts.get(last));
        last.map_or(0, |(start, at)| start.saturating_add(position - at))
    }
}

#[cfg(test)]
mod tests {
    use super::super::{PACKED, PAGE};
    use super::*;

    #[test]
    fn packed_extents_follow_each_other() {
        let extents = Extents::covering(&[PAGE..3 * PAGE, 8 * PAGE..9 * PAGE], 16 * PAGE).unwrap();
        let layout = Layout::new(PACKED, &extents, 16 * PAGE);
        assert_eq!(layout.file_size(), 3 * PAGE);
        for (offset, position) in [(PAGE, 0), (2 * PAGE + 5, PAGE + 5), (8 * PAGE, 2 * PAGE)] {
            assert_eq!((layout.position(offset), layout.offset(position)), (position, offset));
        }
        // What is not held is where the next that is would be.
        for (offset, position) in [(0, 0), (3 * PAGE, 2 * PAGE), (7 * PAGE, 2 * PAGE), (9 * PAGE, 3 * PAGE)] {
            assert_eq!(layout.position(offset), position, "{offset:#x}");
        }
        let none = Layout::new(PACKED, &Extents::default(), PAGE);
        assert_eq!((none.file_size(), none.position(5), none.offset(0)), (0, 0, 0));
    }

    #[test]
    fn sparse_is_as_it_is() {
        let layout = Layout::new(SPARSE, &Extents::default(), 7 * PAGE);
        assert_eq!((layout.file_size(), layout.position(5), layout.offset(6)), (7 * PAGE, 5, 6));
    }
}
