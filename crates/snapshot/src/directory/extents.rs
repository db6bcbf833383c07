//! Which pages of a region a snapshot holds.

use std::ops::Range;

use super::PAGE;

/// Most extents of one region in a snapshot.
///
/// A writer that has more closes the smallest gaps between them: the pages in a gap are saved again.
pub const MAX_EXTENTS: usize = 1 << 16;

/// Byte ranges in a region: whole pages, ascending, with a gap between any two.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct Extents(Vec<Range<u64>>);

impl Extents {
    /// All of a region of `size` bytes.
    #[must_use]
    pub fn whole(size: u64) -> Self {
        if size == 0 { Self::default() } else { Self(std::iter::once(0..size).collect()) }
    }

    /// The pages that `ranges` touch, in any order; `None` if one of them is not inside `size` bytes.
    #[must_use]
    pub fn covering(ranges: &[Range<u64>], size: u64) -> Option<Self> {
        let mut pages = Vec::with_capacity(ranges.len());
        for range in ranges.iter().filter(|range| !range.is_empty()) {
            if range.end > size {
                return None;
            }
            pages.push(range.start / PAGE * PAGE..range.end.next_multiple_of(PAGE));
        }
        Some(Self::joining(pages))
    }

    /// What an incremental snapshot holds of a region of `size` bytes where `changed` did: those pages, and the smallest
    /// gaps between them if they were more than [`MAX_EXTENTS`]; `None` as above.
    #[must_use]
    pub fn incremental(changed: &[Range<u64>], size: u64) -> Option<Self> {
        Some(Self::covering(changed, size)?.at_most(MAX_EXTENTS))
    }

    /// Takes `ranges` as they are; `None` unless they are as this type promises.
    pub(super) fn exact(ranges: Vec<Range<u64>>, size: u64) -> Option<Self> {
        let mut free = 0;
        for range in &ranges {
            let whole = range.start.is_multiple_of(PAGE) && range.end.is_multiple_of(PAGE);
            let first = free == 0 && range.start == 0;
            if !whole || range.is_empty() || range.end > size || !(first || range.start > free) {
                return None;
            }
            free = range.end;
        }
        Some(Self(ranges))
    }

    /// At most `most` extents that hold all of these, and as little else as doubling a gap finds.
    #[must_use]
    pub(super) fn at_most(self, most: usize) -> Self {
        let (mut ranges, mut gap) = (self.0, PAGE);
        while ranges.len() > most.max(1) {
            ranges = joined(&ranges, gap);
            gap = gap.saturating_mul(2);
        }
        Self(ranges)
    }

    /// These and `more`, and what has to be saved for it: `more`, and the gaps that were closed.
    pub(super) fn grown(&self, more: &Self) -> (Self, Self) {
        let all: Vec<Range<u64>> = self.0.iter().chain(&more.0).cloned().collect();
        let grown = Self::joining(all).at_most(MAX_EXTENTS);
        let mut wanted = grown.without(self);
        wanted.extend_from_slice(&more.0);
        (grown, Self::joining(wanted))
    }

    /// Whole pages in any order.
    fn joining(mut ranges: Vec<Range<u64>>) -> Self {
        ranges.sort_unstable_by_key(|range| range.start);
        Self(joined(&ranges, 0))
    }

    /// What of these is not in `other`.
    fn without(&self, other: &Self) -> Vec<Range<u64>> {
        let mut left = Vec::new();
        for range in &self.0 {
            let mut at = range.start;
            for taken in other.within(range.clone()) {
                left.push(at..taken.start);
                at = taken.end;
            }
            left.push(at..range.end);
        }
        left.retain(|range| !range.is_empty());
        left
    }

    /// The ranges, ascending.
    #[must_use]
    pub fn ranges(&self) -> &[Range<u64>] {
        &self.0
    }

    /// Bytes in all of them.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.0.iter().map(|range| range.end - range.start).sum()
    }

    /// What of them lies in `window`, ascending.
    pub fn within(&self, window: Range<u64>) -> impl Iterator<Item = Range<u64>> {
        let first = self.0.partition_point(|range| range.end <= window.start);
        self.0
            .iter()
            .skip(first)
            .take_while(move |range| range.start < window.end)
            .map(move |range| range.start.max(window.start)..range.end.min(window.end))
    }
}

/// `ranges`, ascending by start, joined where at most `gap` bytes lie between them.
fn joined(ranges: &[Range<u64>], gap: u64) -> Vec<Range<u64>> {
    let mut all: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match all.last_mut() {
            Some(last) if range.start <= last.end.saturating_add(gap) => last.end = last.end.max(range.end),
            _ => all.push(range.clone()),
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 64 * PAGE;

    #[test]
    #[expect(clippy::single_range_in_vec_init, reason = "one extent")]
    fn covering_widens_sorts_and_joins() {
        let extents =
            Extents::covering(&[5 * PAGE + 1..5 * PAGE + 2, 0..1, 7..7, PAGE..2 * PAGE], SIZE).unwrap();
        assert_eq!(extents.ranges(), [0..2 * PAGE, 5 * PAGE..6 * PAGE]);
        assert_eq!(extents.bytes(), 3 * PAGE);
        assert_eq!(Extents::covering(&[0..SIZE + 1], SIZE), None);
        assert_eq!(Extents::whole(SIZE).ranges(), [0..SIZE]);
    }

    #[test]
    #[expect(clippy::single_range_in_vec_init, reason = "one extent")]
    fn exact_takes_only_the_one_spelling() {
        let exact = |ranges: &[Range<u64>]| Extents::exact(ranges.to_vec(), SIZE).is_some();
        assert!(exact(&[]) && exact(&[0..PAGE, 2 * PAGE..SIZE]) && exact(&[PAGE..2 * PAGE]));
        assert!(!exact(&[0..PAGE, PAGE..2 * PAGE]), "touching");
        assert!(!exact(&[0..0]) && !exact(&[0..1]) && !exact(&[1..PAGE]) && !exact(&[0..SIZE + PAGE]));
        assert!(!exact(&[2 * PAGE..3 * PAGE, 0..PAGE]), "descending");
    }

    #[test]
    fn at_most_closes_gaps_and_loses_nothing() {
        let ranges: Vec<_> = (0..32).map(|page| 2 * page * PAGE..(2 * page + 1) * PAGE).collect();
        let extents = Extents::covering(&ranges, SIZE).unwrap();
        assert_eq!(extents.clone().at_most(32), extents);
        let fewer = extents.at_most(3);
        assert!(fewer.ranges().len() <= 3);
        assert!(ranges.iter().all(|range| fewer.within(range.clone()).eq([range.clone()])));
        let many: Vec<_> = (0..2 * MAX_EXTENTS as u64).map(|n| 2 * n * PAGE..(2 * n + 1) * PAGE).collect();
        let extents = Extents::incremental(&many, 4 * MAX_EXTENTS as u64 * PAGE).unwrap();
        assert!(extents.ranges().len() <= MAX_EXTENTS);
        assert_eq!(Extents::incremental(extents.ranges(), u64::MAX), Some(extents), "and that is all");
    }

    #[test]
    #[expect(clippy::single_range_in_vec_init, reason = "one extent")]
    fn what_is_new_is_wanted_and_so_are_closed_gaps() {
        let extents = |ranges: &[Range<u64>]| Extents::covering(ranges, u64::MAX).unwrap();
        let (grown, wanted) = extents(&[0..2 * PAGE]).grown(&extents(&[PAGE..3 * PAGE, 5 * PAGE..6 * PAGE]));
        assert_eq!(grown.ranges(), [0..3 * PAGE, 5 * PAGE..6 * PAGE]);
        assert_eq!(wanted.ranges(), [PAGE..3 * PAGE, 5 * PAGE..6 * PAGE], "what is there already, too");
        let every_second = |from: u64, count: u64| {
            let ranges: Vec<_> =
                (0..count).map(|n| (from + 2 * n) * PAGE..(from + 2 * n + 1) * PAGE).collect();
            extents(&ranges)
        };
        let most = MAX_EXTENTS as u64;
        let (grown, wanted) = every_second(0, most).grown(&every_second(2 * most, 1));
        assert_eq!(grown.ranges(), [0..(2 * most + 1) * PAGE], "all gaps are closed");
        assert_eq!(wanted.bytes(), (most + 1) * PAGE, "each gap, and the new page");
    }

    #[test]
    fn within_clips() {
        let extents = Extents::covering(&[0..2 * PAGE, 4 * PAGE..8 * PAGE], SIZE).unwrap();
        let within = |window| extents.within(window).collect::<Vec<_>>();
        assert_eq!(within(PAGE..5 * PAGE), [PAGE..2 * PAGE, 4 * PAGE..5 * PAGE]);
        assert_eq!(within(2 * PAGE..4 * PAGE), []);
        assert_eq!(within(8 * PAGE..SIZE), []);
    }
}
