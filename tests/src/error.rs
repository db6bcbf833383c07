//! What can go wrong while tools, kernels and images are fetched and guests are run.

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

use crate::kernel_image;

/// Result of this crate's functions.
pub type Result<T> = std::result::Result<T, Error>;

/// An error of the test support.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or directory could not be used.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried, as a verb.
        action: &'static str,
        /// On which file or directory.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// A program could not be started.
    #[error("cannot start `{program}`")]
    Spawn {
        /// The program.
        program: String,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// A program ended with a failure.
    #[error("`{program}` failed ({status}):\n{output}")]
    Failed {
        /// The program and its first arguments.
        program: String,
        /// How it ended.
        status: ExitStatus,
        /// The last lines that it printed.
        output: String,
    },
    /// No cache folder can be named: neither `VMM_CACHE`, `XDG_CACHE_HOME` nor `HOME` is set.
    #[error("no place for the cache: set VMM_CACHE, XDG_CACHE_HOME or HOME")]
    NoCacheFolder,
    /// The machine's apt sources name no Debian archive.
    #[error(
        "the apt sources of this machine name no Debian archive; set VMM_DEBIAN_MIRROR to the URI of one \
         (and install debian-archive-keyring)"
    )]
    NoDebianMirror,
    /// A package or a file in it that a recipe needs is not there.
    #[error("{what} not found in {place}")]
    NotFound {
        /// What was looked for.
        what: String,
        /// Where.
        place: String,
    },
    /// A package that must be installed system-wide is missing and cannot be installed by this user.
    #[error("missing on this machine: {packages}; install with: apt-get install {packages}")]
    MissingTools {
        /// The packages, separated by spaces.
        packages: String,
    },
    /// A kernel image could not be read.
    #[error("kernel image {}", path.display())]
    Kernel {
        /// The image.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: kernel_image::Error,
    },
    /// The nested machine did not come up.
    #[error("the L1 machine did not start its command within {} s; end of its console:\n{console}", limit.as_secs())]
    L1NotReady {
        /// How long was waited.
        limit: Duration,
        /// The end of its console.
        console: String,
    },
    /// The nested machine ended without an exit status of its command.
    #[error("the L1 machine ended before its command did ({status}); end of its console:\n{console}")]
    L1Died {
        /// It had begun its command.
        ready: bool,
        /// How its process ended.
        status: String,
        /// The end of its console.
        console: String,
    },
    /// The nested machine stands still.
    #[error("the L1 machine has given no sign of life for {} s; end of its console:\n{console}", limit.as_secs())]
    L1Stalled {
        /// How long was waited.
        limit: Duration,
        /// The end of its console.
        console: String,
    },
    /// The command in the nested machine took too long.
    #[error("the command in L1 did not end within {} s and was killed", limit.as_secs())]
    L1Timeout {
        /// How long was waited.
        limit: Duration,
    },
}

impl Error {
    /// For `map_err`: an I/O error with what was tried and where.
    pub(crate) fn io(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> Self {
        let path = path.as_ref().to_owned();
        move |source| Self::Io { action, path, source }
    }

    /// A thing that a recipe needs is missing.
    pub(crate) fn not_found(what: impl Into<String>, place: impl Into<String>) -> Self {
        Self::NotFound { what: what.into(), place: place.into() }
    }
}

/// The error and its causes on one line, for people.
#[must_use]
pub fn describe(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        text.push_str(": ");
        text.push_str(&next.to_string());
        cause = next.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_are_named_after_the_error() {
        let error = Error::io("read", "/nowhere")(io::Error::other("gone"));
        assert_eq!(describe(&error), "cannot read /nowhere: gone");
    }
}
