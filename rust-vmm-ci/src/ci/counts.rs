//! Numbers of tests, from what test programs print.

use std::fmt;

/// How many tests ran, and how they ended.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Counts {
    /// Passed.
    pub(crate) passed: u64,
    /// Failed.
    pub(crate) failed: u64,
    /// Ignored.
    pub(crate) skipped: u64,
}

impl Counts {
    /// Adds the numbers of a line like `test result: ok. 9 passed; 0 failed; 1 ignored; 0 measured; ...`; other lines have
    /// none.
    pub(crate) fn add_line(&mut self, line: &str) {
        let Some((_, result)) = line.split_once("test result: ") else { return };
        let Some((_, numbers)) = result.split_once(". ") else { return };
        for part in numbers.split(';') {
            let mut words = part.split_whitespace();
            let number = words.next().and_then(|number| number.parse().ok()).unwrap_or(0);
            match words.next() {
                Some("passed") => self.passed += number,
                Some("failed") => self.failed += number,
                Some("ignored") => self.skipped += number,
                _ => {}
            }
        }
    }

    /// Adds another's numbers.
    pub(crate) fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }

    /// All tests that there are.
    pub(crate) fn all(self) -> u64 {
        self.passed + self.failed + self.skipped
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn result_lines_are_summed_and_others_are_not() {
        let mut counts = Counts::default();
        for line in [
            "running 12 tests",
            "test result: ok. 9 passed; 0 failed; 1 ignored; 0 measured; 3 filtered out; finished in 0.00s",
            "[guest] test result: FAILED. 2 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.5s\r",
            "test result: and nothing else",
            "5 passed; 5 failed",
        ] {
            counts.add_line(line);
        }
        assert_eq!(counts, Counts { passed: 11, failed: 1, skipped: 1 });
        assert_eq!(counts.all(), 13);
    }
}
