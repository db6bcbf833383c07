//! Confining paths (landlock(7)).

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, BitFlags, CompatLevel, Compatible, LandlockStatus, PathBeneath, Ruleset,
    RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetError, RulesetStatus,
};
use vmm_api::spec::PathAccess;

use super::paths::{PathRule, STANDARD_OUTPUT, Usage};

/// The newest version whose rights this code knows. What an older kernel does not know, it does not restrict.
const KNOWN: ABI = ABI::V5;

/// The paths cannot be confined.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LandlockError {
    /// A path that the VM needs cannot be looked at, or its file not be made.
    #[error("cannot open {}", .path.display())]
    Path {
        /// The path.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The kernel refuses.
    #[error("landlock")]
    Landlock(#[from] RulesetError),
}

/// Confines this thread, and those that it will start, to `rules`. Whether that is in force: a kernel without Landlock
/// only leads to a warning.
///
/// # Errors
/// A path of the rules is not there, or the kernel refuses. Nothing is confined then.
pub fn restrict(rules: &[PathRule]) -> Result<bool, LandlockError> {
    let mut ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(KNOWN))?
        .create()?;
    for rule in rules {
        add(&mut ruleset, rule)?;
    }
    let status = ruleset.restrict_self()?;
    match (status.ruleset, status.landlock) {
        (RulesetStatus::NotEnforced, _)
        | (_, LandlockStatus::NotEnabled | LandlockStatus::NotImplemented) => {
            log::warn!("this kernel has no Landlock: paths are not confined");
            Ok(false)
        }
        (_, LandlockStatus::Available { effective_abi, .. }) => {
            log::info!("landlock ABI {effective_abi} confines paths to {} of the VM", rules.len());
            Ok(true)
        }
    }
}

fn add(ruleset: &mut RulesetCreated, rule: &PathRule) -> Result<(), LandlockError> {
    let path = rule.path.as_path();
    let failed = |source| LandlockError::Path { path: path.to_owned(), source };
    if path == Path::new(STANDARD_OUTPUT) && !is_named(path).map_err(failed)? {
        return Ok(());
    }
    if matches!(rule.usage, Usage::ReadLater | Usage::Faults) && !path.exists() {
        // Who wants it says so.
        return Ok(());
    }
    if rule.usage == Usage::Output && !path.exists() {
        // A rule is about a file that is there. Without it all of its folder would have to be writable.
        let mut options = OpenOptions::new();
        let made =
            options.write(true).create(true).mode(0o600).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
        made.open(path).map_err(failed)?;
    }
    let named = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(path).map_err(failed)?;
    let rights = match (named.metadata().map_err(failed)?.is_dir(), rule.usage) {
        (false, usage) => rights(usage) & AccessFs::from_file(KNOWN),
        (
            true,
            Usage::Terminal
            | Usage::Sockets
            | Usage::Memory
            | Usage::Snapshot
            | Usage::Itself
            | Usage::Granted(_),
        ) => rights(rule.usage),
        // It cannot be what it is for, which is told when it is opened.
        (true, Usage::Read | Usage::ReadLater | Usage::Disk { .. } | Usage::Output | Usage::Faults) => {
            AccessFs::ReadDir.into()
        }
    };
    ruleset.add_rule(PathBeneath::new(named, rights))?;
    Ok(())
}

/// Whether a stream of this process is a file that has a name: a pipe has none, and needs no rule.
fn is_named(stream: &Path) -> io::Result<bool> {
    Ok(std::fs::read_link(stream)?.is_absolute())
}

fn rights(usage: Usage) -> BitFlags<AccessFs> {
    let read = BitFlags::from(AccessFs::ReadFile);
    let write = AccessFs::WriteFile | AccessFs::Truncate;
    match usage {
        Usage::Read | Usage::ReadLater => read,
        Usage::Itself | Usage::Snapshot => read | AccessFs::ReadDir,
        Usage::Disk { writable: false } => read | AccessFs::IoctlDev,
        Usage::Disk { writable: true } => read | AccessFs::WriteFile | AccessFs::IoctlDev,
        Usage::Output => write,
        Usage::Terminal => read | write | AccessFs::IoctlDev,
        Usage::Faults => read | AccessFs::WriteFile | AccessFs::IoctlDev,
        Usage::Sockets => AccessFs::MakeSock | AccessFs::RemoveFile,
        Usage::Memory => read | write | AccessFs::MakeReg | AccessFs::RemoveFile,
        Usage::Granted(PathAccess { read, write }) => {
            let or_none = |granted: bool, rights| if granted { rights } else { BitFlags::empty() };
            or_none(read, AccessFs::from_read(KNOWN)) | or_none(write, AccessFs::from_write(KNOWN))
        }
    }
}
