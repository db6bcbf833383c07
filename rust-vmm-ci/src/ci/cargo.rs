//! Checks that need more than one call of cargo, and what cargo knows about the workspace.

use std::ffi::OsStr;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Instant;

use serde::Deserialize;

/// What `cargo metadata` says about the workspace, as far as it is used here.
#[derive(Debug, Deserialize)]
pub(crate) struct Metadata {
    /// The workspace's packages, without its dependencies.
    pub(crate) packages: Vec<Package>,
    /// Where cargo builds.
    pub(crate) target_directory: PathBuf,
}

/// A package of the workspace.
#[derive(Debug, Deserialize)]
pub(crate) struct Package {
    /// Its name.
    pub(crate) name: String,
    /// What it builds.
    pub(crate) targets: Vec<Target>,
    /// The registries it may be published to; absent for any, empty for none.
    pub(crate) publish: Option<Vec<String>>,
}

/// A library, binary, test, example or benchmark of a package.
#[derive(Debug, Deserialize)]
pub(crate) struct Target {
    /// Its name.
    pub(crate) name: String,
    /// `lib`, `bin`, `test`...
    pub(crate) kind: Vec<String>,
}

/// Asks cargo about the workspace.
pub(crate) fn metadata() -> Result<Metadata, String> {
    let output = Command::new("cargo")
        .args(["metadata", "--no-deps", "--format-version", "1"])
        .current_dir(super::root())
        .output()
        .map_err(|error| format!("cargo metadata: {error}"))?;
    if !output.status.success() {
        return Err(format!("cargo metadata: {}", String::from_utf8_lossy(&output.stderr)));
    }
    serde_json::from_slice(&output.stdout).map_err(|error| format!("cargo metadata: {error}"))
}

/// Checks each package by itself: as its users build it, then with its tests and examples.
pub(crate) fn alone() -> ExitCode {
    end(metadata().and_then(|metadata| {
        let mut failed = Vec::new();
        for Package { name, .. } in &metadata.packages {
            let begin = Instant::now();
            let check = |targets: &[&str]| {
                cargo(&[&["check", "--quiet", "--locked", "-p", name], targets].concat()).is_ok()
            };
            let fine = check(&[]) && check(&["--all-targets"]);
            println!(
                "{name:<24}{:<8}{:>4} s",
                if fine { "builds" } else { "FAILS" },
                begin.elapsed().as_secs()
            );
            if !fine {
                failed.push(name.as_str());
            }
        }
        if failed.is_empty() { Ok(()) } else { Err(format!("cannot be built alone: {}", failed.join(", "))) }
    }))
}

/// Packages what can be published and builds it from its packages, in a target directory of its own.
pub(crate) fn package() -> ExitCode {
    end(metadata().and_then(|metadata| {
        let target = metadata.target_directory.join("publish");
        let (private, public): (Vec<_>, Vec<_>) =
            metadata.packages.iter().partition(|package| package.publish.as_ref().is_some_and(Vec::is_empty));
        forget(&target, &public)?;
        let target = target.display().to_string();
        let mut words = vec!["package", "--workspace", "--allow-dirty", "--locked", "--target-dir", &target];
        words.extend(private.iter().flat_map(|package| ["--exclude", package.name.as_str()]));
        cargo(&words)
    }))
}

/// Removes what an earlier run unpacked and built of `packages`: cargo takes one of a registry for unchanged
/// as long as its version is.
fn forget(target: &Path, packages: &[&Package]) -> Result<(), String> {
    let home = std::env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(std::env::home_dir()?.join(".cargo")))
        .ok_or("no home directory, and CARGO_HOME is not set")?;
    let of_ours = |path: &PathBuf| {
        let name = name_of(path);
        packages
            .iter()
            .any(|package| name.strip_prefix(&package.name).is_some_and(|rest| rest.starts_with('-')))
    };
    for registry in entries(&home.join("registry").join("src"))? {
        // Those of directories, as cargo package makes one, have no host in their names.
        if name_of(&registry).starts_with('-') {
            remove(entries(&registry)?.into_iter().filter(of_ours))?;
        }
    }
    remove(entries(&target.join("debug").join(".fingerprint"))?.into_iter().filter(of_ours))
}

/// What is in `directory`; nothing where there is none.
fn entries(directory: &Path) -> Result<Vec<PathBuf>, String> {
    match std::fs::read_dir(directory) {
        Ok(entries) => Ok(entries.filter_map(Result::ok).map(|entry| entry.path()).collect()),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(format!("{}: {error}", directory.display())),
    }
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn remove(mut directories: impl Iterator<Item = PathBuf>) -> Result<(), String> {
    directories.try_for_each(|path| {
        std::fs::remove_dir_all(&path).map_err(|error| format!("{}: {error}", path.display()))
    })
}

/// Builds the release binary and prints its size.
pub(crate) fn release() -> ExitCode {
    end(metadata().and_then(|metadata| {
        cargo(&["build", "--release", "--locked", "-p", "vmm", "--bin", "vmm"])?;
        let binary = metadata.target_directory.join("release").join("vmm");
        let size =
            std::fs::metadata(&binary).map_err(|error| format!("{}: {error}", binary.display()))?.len();
        println!("target/release/vmm: {size} bytes ({:.2} MiB)", size as f64 / f64::from(1 << 20));
        Ok(())
    }))
}

/// Runs cargo in the root of the repository.
pub(crate) fn cargo(words: &[&str]) -> Result<(), String> {
    perform(Command::new("cargo").args(words))
}

/// Runs a command in the root of the repository.
pub(crate) fn perform(command: &mut Command) -> Result<(), String> {
    let error = match command.current_dir(super::root()).status() {
        Ok(status) if status.success() => return Ok(()),
        Ok(status) => status.to_string(),
        Err(error) => error.to_string(),
    };
    let words: Vec<_> = std::iter::once(command.get_program()).chain(command.get_args()).collect();
    Err(format!("{}: {error}", words.join(OsStr::new(" ")).display()))
}

fn end(result: Result<(), String>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
