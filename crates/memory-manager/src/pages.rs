//! Sets of pages of guest memory.

use std::ops::Range;

use crate::layout::PAGE_SIZE;

/// Pages of the guest's memory, named by guest physical address. It takes a bit for each page there is.
#[derive(Debug, Clone, Default)]
pub struct Pages {
    regions: Vec<Region>,
    count: u64,
}

#[derive(Debug, Clone)]
struct Region {
    gpa: u64,
    size: u64,
    words: Vec<u64>,
}

impl Pages {
    /// None of memory whose regions begin at these guest physical addresses and have so many bytes, whole pages, in the order of
    /// their addresses.
    #[must_use]
    pub fn none(regions: impl IntoIterator<Item = (u64, u64)>) -> Self {
        let region = |(gpa, size): (u64, u64)| {
            let words = (size / PAGE_SIZE).div_ceil(64);
            Region { gpa, size, words: vec![0; usize::try_from(words).unwrap_or(0)] }
        };
        Self { regions: regions.into_iter().map(region).collect(), count: 0 }
    }

    /// How much memory they are, in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.count.saturating_mul(PAGE_SIZE)
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Whether the page of `gpa` is among them.
    #[must_use]
    pub fn contains(&self, gpa: u64) -> bool {
        self.regions.iter().any(|region| region.bit(gpa).is_some_and(|(at, bit)| region.word(at) & bit != 0))
    }

    /// Adds the pages of `range`; what is not the guest's memory is left out.
    pub fn insert(&mut self, range: Range<u64>) {
        for region in &mut self.regions {
            self.count += region.change(&range, true);
        }
    }

    /// Takes the pages of `range` out.
    pub fn remove(&mut self, range: &Range<u64>) {
        for region in &mut self.regions {
            self.count -= region.change(range, false);
        }
    }

    /// The first pages that follow each other and lie in `within`, of one region; at most `most` bytes, if that is a page.
    #[must_use]
    pub fn first(&self, within: Range<u64>, most: u64) -> Option<Range<u64>> {
        self.regions.iter().find_map(|region| region.first(&within, most))
    }

    /// All runs of pages in `within`.
    pub fn runs(&self, within: Range<u64>) -> impl Iterator<Item = Range<u64>> {
        let end = within.end;
        let next = move |from: u64| self.first(from..end, u64::MAX);
        std::iter::successors(next(within.start), move |run| next(run.end))
    }
}

impl Region {
    fn word(&self, at: usize) -> u64 {
        self.words.get(at).copied().unwrap_or(0)
    }

    /// Which word holds the page of `gpa`, and where.
    fn bit(&self, gpa: u64) -> Option<(usize, u64)> {
        let offset = gpa.checked_sub(self.gpa).filter(|offset| *offset < self.size)?;
        let page = offset / PAGE_SIZE;
        Some((usize::try_from(page / 64).ok()?, 1 << (page % 64)))
    }

    /// The part of `range` that is in it.
    fn cut(&self, range: &Range<u64>) -> Range<u64> {
        let start = (range.start / PAGE_SIZE * PAGE_SIZE).max(self.gpa);
        start..range.end.min(self.gpa.saturating_add(self.size))
    }

    /// Adds or takes out; gives how many pages that changed.
    fn change(&mut self, range: &Range<u64>, add: bool) -> u64 {
        let pages = self.numbers(&self.cut(range));
        let (mut page, mut changed) = (pages.start, 0);
        while page < pages.end {
            let (bit, left) = (page % 64, pages.end - page);
            let count = left.min(64 - bit);
            let mask = (u64::MAX >> (64 - count)) << bit;
            if let Some(word) = usize::try_from(page / 64).ok().and_then(|at| self.words.get_mut(at)) {
                let others = mask & if add { !*word } else { *word };
                *word ^= others;
                changed += u64::from(others.count_ones());
            }
            page += count;
        }
        changed
    }

    /// The numbers of the pages of a range that lies in it.
    fn numbers(&self, range: &Range<u64>) -> Range<u64> {
        let from = |gpa: u64| gpa.saturating_sub(self.gpa);
        from(range.start) / PAGE_SIZE..from(range.end).div_ceil(PAGE_SIZE)
    }

    /// How many of `pages` are there without a gap, from the first of them on.
    fn run(&self, pages: Range<u64>) -> u64 {
        let mut page = pages.start;
        while page < pages.end {
            let bit = page % 64;
            let word = usize::try_from(page / 64).map_or(0, |at| self.word(at));
            let ones = u64::from((word >> bit).trailing_ones());
            page += ones;
            if ones < 64 - bit {
                break;
            }
        }
        page.min(pages.end) - pages.start
    }

    fn first(&self, within: &Range<u64>, most: u64) -> Option<Range<u64>> {
        let Range { start, end } = self.cut(within);
        let mut gpa = start;
        while gpa < end {
            let (at, bit) = self.bit(gpa)?;
            // What comes in this word from there on.
            let rest = self.word(at) & !(bit - 1);
            if rest == 0 {
                let left = 64 - u64::from(bit.trailing_zeros());
                gpa = gpa.saturating_add(left * PAGE_SIZE);
                continue;
            }
            let start = gpa + u64::from(rest.trailing_zeros() - bit.trailing_zeros()) * PAGE_SIZE;
            let end = end.min(start.saturating_add(most.max(PAGE_SIZE)));
            let run = self.run(self.numbers(&(start..end)));
            return (run > 0).then(|| start..start + run * PAGE_SIZE);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const P: u64 = PAGE_SIZE;

    #[test]
    fn pages_come_and_go_as_in_a_plain_set() {
        let regions = [(0, 200 * P), (0x1000_0000, 70 * P)];
        let (mut pages, mut plain) = (Pages::none(regions), BTreeSet::new());
        let is_ram =
            |page: u64| regions.iter().any(|(gpa, size)| (*gpa / P..(gpa + size) / P).contains(&page));
        let mut seed = 7_u64;
        let mut random = |below: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) % below
        };
        for _ in 0..500 {
            let base = if random(2) == 0 { 0 } else { 0x1000_0000 / P };
            let range = base + random(210)..base + random(230);
            if random(2) == 0 {
                pages.insert(range.start * P..range.end * P);
                plain.extend(range.filter(|page| is_ram(*page)));
            } else {
                pages.remove(&(range.start * P..range.end * P));
                plain.retain(|page| !range.contains(page));
            }
            assert_eq!(pages.bytes(), plain.len() as u64 * P);
            let found: Vec<u64> =
                pages.runs(0..u64::MAX).flat_map(|run| run.start / P..run.end / P).collect();
            assert_eq!(found, plain.iter().copied().collect::<Vec<_>>());
        }
        assert!(pages.contains(*plain.first().unwrap() * P + 5) && !pages.contains(205 * P));
    }

    #[test]
    fn a_run_is_of_one_region_and_no_longer_than_wanted() {
        let mut pages = Pages::none([(0, 100 * P), (100 * P, 10 * P)]);
        pages.insert(0..u64::MAX);
        assert_eq!(pages.first(0..u64::MAX, u64::MAX), Some(0..100 * P));
        assert_eq!(pages.first(98 * P..u64::MAX, u64::MAX), Some(98 * P..100 * P));
        assert_eq!(pages.first(0..3 * P, 2 * P), Some(0..2 * P));
        assert_eq!(pages.first(7 * P..u64::MAX, 1), Some(7 * P..8 * P));
        pages.remove(&(0..105 * P));
        assert_eq!(pages.first(0..u64::MAX, u64::MAX), Some(105 * P..110 * P));
        assert_eq!(pages.first(0..105 * P, u64::MAX), None);
    }
}
