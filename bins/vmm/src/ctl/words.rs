//! Words and numbers of arguments.

use std::time::Duration;

use vmm_api::options;
use vmm_state::Phase;

/// What can be waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Goal {
    /// The VM is in this phase.
    Phase(Phase),
    /// The VMM has ended.
    Ended,
}

/// The words for them.
pub(super) const GOALS: [(&str, Goal); 10] = [
    ("none", Goal::Phase(Phase::Empty)),
    ("created", Goal::Phase(Phase::Created)),
    ("booting", Goal::Phase(Phase::Booting)),
    ("running", Goal::Phase(Phase::Running)),
    ("paused", Goal::Phase(Phase::Paused)),
    ("saving", Goal::Phase(Phase::Saving)),
    ("migrating", Goal::Phase(Phase::Migrating)),
    ("receiving", Goal::Phase(Phase::Receiving)),
    ("shutdown", Goal::Phase(Phase::Shutdown)),
    ("ended", Goal::Ended),
];

impl Goal {
    /// The goal of a word, in any case of letters.
    pub(super) fn from_word(word: &str) -> Option<Self> {
        GOALS.iter().find(|(known, _)| known.eq_ignore_ascii_case(word)).map(|(_, goal)| *goal)
    }

    /// For the line that shows progress.
    pub(super) fn about(self) -> &'static str {
        match self {
            Self::Ended => "waiting for the end of the VMM",
            Self::Phase(_) => "waiting for the VM",
        }
    }
}

/// `512M`, `4096`.
pub(super) fn size(text: &str) -> Result<u64, String> {
    options::size(text).ok_or_else(|| "expected a number of bytes such as 4096, 512M or 1G".to_owned())
}

/// Seconds, with a fraction if need be.
pub(super) fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse::<f64>().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    seconds.ok_or_else(|| "expected a number of seconds such as 10 or 0.5".to_owned())
}

/// A path becomes a URL.
pub(super) fn file_url(text: &str) -> String {
    if text.starts_with('/') { format!("file://{text}") } else { text.to_owned() }
}

/// Whether it is a URL or a path, and no option string.
pub(super) fn is_url(text: &str) -> bool {
    text.starts_with('/')
        || text.find([':', '=']).is_some_and(|at| text.get(at..).unwrap_or_default().starts_with(':'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_phase_has_a_word() {
        for phase in Phase::ALL {
            assert!(GOALS.iter().any(|(_, goal)| *goal == Goal::Phase(phase)), "{phase}");
        }
        assert_eq!(Goal::from_word("Running"), Some(Goal::Phase(Phase::Running)));
        assert_eq!(Goal::from_word("run"), None);
    }

    #[test]
    fn urls_and_option_strings_are_told_apart() {
        for url in ["file:///a=b", "unix:/a", "tcp:host:1", "/a", "/a=b"] {
            assert!(is_url(url), "{url}");
        }
        for options in ["source_url=file:///a", "destination_url=tcp:host:1", "a", ""] {
            assert!(!is_url(options), "{options}");
        }
        assert_eq!(file_url("/a"), "file:///a");
        assert_eq!(file_url("file:///a"), "file:///a");
    }

    #[test]
    fn times_and_sizes() {
        assert_eq!(seconds("0.5"), Ok(Duration::from_millis(500)));
        for bad in ["", "-1", "x", "NaN", "1e300", "inf"] {
            assert!(seconds(bad).is_err(), "{bad}");
        }
        assert_eq!(size("1G"), Ok(1 << 30));
        assert!(size("1GB").is_err());
    }
}
