//! Golden files for the tests of crates that define schemas.
//!
//! One file per kind and version, `tests/golden/<kind>-v<version>.bin` under the calling crate, written once
//! (`VMM_BLESS=1 cargo test`) and never changed: it is what shipped. Bytes that differ mean that a version
//! changed its layout; that needs a new version instead.

use std::path::{Path, PathBuf};
use std::{env, fmt, fs, io};

use crate::{Record, RecordError, Schema};

/// Compares `bytes` with the golden file of `kind` and `version` of the crate under test.
///
/// With `VMM_BLESS=1` in the environment an absent file is written; an existing one never is.
///
/// # Errors
/// The file is absent, differs, or cannot be read or written.
pub fn check(kind: &str, version: u16, bytes: &[u8]) -> Result<(), GoldenError> {
    let bless = env::var_os("VMM_BLESS").is_some_and(|value| value == "1");
    check_in(&folder(), bless, kind, version, bytes)
}

/// Compares the encoding of `state` with its golden file, and what this build reads from the file with
/// `state`.
///
/// # Errors
/// As [`check`], and when the file does not decode to `state`.
pub fn check_state<S: Schema + PartialEq>(state: &S) -> Result<(), GoldenError> {
    check(S::KIND, S::VERSION, &state.encode())?;
    if load::<S>(S::VERSION)? != *state {
        return Err(GoldenError::OtherState { kind: S::KIND });
    }
    Ok(())
}

/// Reads the golden file of an older (or this) version as the current state `S`: the test of an upgrade.
///
/// # Errors
/// The file cannot be read, or does not parse as `S`.
pub fn load<S: Schema>(version: u16) -> Result<S, GoldenError> {
    let path = file(&folder(), S::KIND, version)?;
    let bytes = fs::read(&path).map_err(|source| GoldenError::Io { path, source })?;
    let record = Record { kind: S::KIND.to_owned(), version, bytes };
    record.parse().map_err(|source| GoldenError::Parse { kind: S::KIND, version, source })
}

/// Cargo runs tests with the package's folder in this variable and as the current one.
fn folder() -> PathBuf {
    let package = env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| PathBuf::from("."), PathBuf::from);
    package.join("tests").join("golden")
}

fn file(folder: &Path, kind: &str, version: u16) -> Result<PathBuf, GoldenError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
    if kind.is_empty() || !kind.chars().all(plain) {
        return Err(GoldenError::Name { kind: kind.to_owned() });
    }
    Ok(folder.join(format!("{kind}-v{version}.bin")))
}

fn check_in(folder: &Path, bless: bool, kind: &str, version: u16, bytes: &[u8]) -> Result<(), GoldenError> {
    let path = file(folder, kind, version)?;
    let golden = match fs::read(&path) {
        Ok(golden) => golden,
        Err(error) if error.kind() == io::ErrorKind::NotFound && bless => {
            let write = fs::create_dir_all(folder).and_then(|()| fs::write(&path, bytes));
            return write.map_err(|source| GoldenError::Io { path, source });
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(GoldenError::Absent { path }),
        Err(source) => return Err(GoldenError::Io { path, source }),
    };
    if golden == bytes {
        return Ok(());
    }
    let offset = golden.iter().zip(bytes).take_while(|(a, b)| a == b).count();
    Err(GoldenError::Differs { path, offset, golden: Hex(golden), found: Hex(bytes.to_vec()) })
}

/// Why a golden file does not agree.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GoldenError {
    /// A kind that cannot be part of a file's name.
    #[error("kind {kind:?} cannot name a golden file: letters, digits, '-' and '_' only")]
    Name {
        /// The kind.
        kind: String,
    },
    /// Never written.
    #[error("{} is absent: run the test once with VMM_BLESS=1 and commit the file", path.display())]
    Absent {
        /// Where it should be.
        path: PathBuf,
    },
    /// The layout changed.
    #[error("{} differs from byte {offset}: a new layout needs a new version\n golden {golden}\n  found {found}", path.display())]
    Differs {
        /// The golden file.
        path: PathBuf,
        /// First byte that differs.
        offset: usize,
        /// What shipped.
        golden: Hex,
        /// What this build writes.
        found: Hex,
    },
    /// The bytes agree, what they decode to does not.
    #[error("the golden file of {kind} decodes to another state than the one that was encoded")]
    OtherState {
        /// Kind of the state.
        kind: &'static str,
    },
    /// What shipped is not understood any more.
    #[error("golden file of {kind}, version {version}")]
    Parse {
        /// Kind of the state.
        kind: &'static str,
        /// Version of the file.
        version: u16,
        /// What the parser met.
        #[source]
        source: RecordError,
    },
    /// The file cannot be read or written.
    #[error("golden file {}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}

/// Bytes that print as hexadecimal digits.
#[derive(Clone, PartialEq, Eq)]
pub struct Hex(pub Vec<u8>);

impl fmt::Display for Hex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Hex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blessing_writes_absent_files_only() {
        let folder = tempfile::tempdir().unwrap();
        let check = |bless, bytes: &[u8]| check_in(folder.path(), bless, "timer", 1, bytes);
        assert!(matches!(check(false, b"one"), Err(GoldenError::Absent { .. })));
        check(true, b"one").unwrap();
        check(false, b"one").unwrap();
        for bless in [false, true] {
            let error = check(bless, b"onX").unwrap_err();
            assert!(matches!(error, GoldenError::Differs { offset: 2, .. }), "{error}");
            assert!(error.to_string().contains("6f6e58"), "{error}");
        }
        assert_eq!(fs::read(folder.path().join("timer-v1.bin")).unwrap(), b"one");
    }

    #[test]
    fn names_stay_in_the_folder() {
        for kind in ["", "../x", "a/b", "a b"] {
            assert!(matches!(check(kind, 1, b""), Err(GoldenError::Name { .. })), "{kind:?}");
        }
    }
}
