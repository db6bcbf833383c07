//! `cargo xtask previous`: virtual machines that migrate between this build and the one before it.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use super::NOT_RUN;
use super::cargo::{cargo, metadata, perform};

/// The build that this one must understand, and be understood by: the last one from before the wire or a saved state
/// changed. With the next change of either, it becomes the commit before that change; of a release, its tag.
const PREVIOUS: &str = "e77d48f9b13902ba3832c20915289eb4470805ff";

/// Programs whose tests move virtual machines from one process to another.
const PROGRAMS: [&str; 5] =
    ["tiny_migrations", "tiny_postcopy", "tiny_tls", "tiny_migration_control", "tiny_local_migrations"];

/// Parts of the names of tests in which all that is looked at is true of both builds.
const TESTS: [&str; 10] = [
    "a_guest_goes",
    "a_paused_guest",
    "a_check_says_yes",
    "exactly_one_guest_runs",
    "memory_goes_over",
    "compressed_memory",
    "a_guest_and_the_memory",
    "a_lost_link_holds",
    "a_disk_goes_along",
    "disks_go_along",
];

/// Runs the tests twice: out of the build before into this one, and the other way.
pub(crate) fn run() -> ExitCode {
    let result = metadata().and_then(|metadata| {
        let folder = metadata.target_directory.join("previous");
        if !is_in_history() {
            println!(
                "the commit {PREVIOUS} is not in this clone: its history is cut off (git fetch --unshallow)"
            );
            return Ok(ExitCode::from(NOT_RUN));
        }
        let previous = build(&folder)?;
        cargo(&["build", "--locked", "-p", "vmm"])?;
        let this = metadata.target_directory.join("debug").join("vmm");
        migrate(&previous, &this)?;
        migrate(&this, &previous)?;
        Ok(ExitCode::SUCCESS)
    });
    result.unwrap_or_else(|error| super::fail(&error))
}

fn is_in_history() -> bool {
    let commit = format!("{PREVIOUS}^{{commit}}");
    perform(Command::new("git").args(["cat-file", "-e", &commit]).stderr(Stdio::null())).is_ok()
}

/// Builds the earlier binary in `folder`, with what it depended on then.
fn build(folder: &Path) -> Result<PathBuf, String> {
    let source = folder.join(PREVIOUS);
    if !source.is_dir() {
        let (archive, part) = (folder.join("source.tar"), folder.join("part"));
        // What is left of a run that was broken off.
        let _ = std::fs::remove_dir_all(&part);
        std::fs::create_dir_all(&part).map_err(|error| format!("{}: {error}", part.display()))?;
        perform(Command::new("git").args(["archive", "--output"]).arg(&archive).arg(PREVIOUS))?;
        perform(
            Command::new("tar").arg("--extract").arg("--file").arg(&archive).arg("--directory").arg(&part),
        )?;
        std::fs::rename(&part, &source).map_err(|error| format!("{}: {error}", source.display()))?;
    }
    let target = folder.join("target");
    let mut command = Command::new("cargo");
    command.args(["build", "--locked", "-p", "vmm", "--target-dir"]).arg(&target);
    perform(command.arg("--manifest-path").arg(source.join("Cargo.toml")))?;
    Ok(target.join("debug").join("vmm"))
}

/// Runs the tests with `first` as each test's first VMM, `second` as its second, and so on in turns.
fn migrate(first: &Path, second: &Path) -> Result<(), String> {
    let binaries = std::env::join_paths([first, second]).map_err(|error| error.to_string())?;
    println!("VMM_BIN={}", binaries.display());
    let mut command = Command::new("cargo");
    command.args(["test", "--locked", "--no-fail-fast", "-p", "vmm-tests"]).env("VMM_BIN", binaries);
    perform(command.args(PROGRAMS.iter().flat_map(|program| ["--test", program])).arg("--").args(TESTS))
}
