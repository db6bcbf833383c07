//! Checks that need more than one call of cargo, and what cargo knows about the workspace.

use std::path::PathBuf;
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

/// Packages what can be published and builds it from its packages.
///
/// One target directory for all of them, the workspace's: dependencies are there already.
pub(crate) fn package() -> ExitCode {
    end(metadata().and_then(|metadata| {
        let target = metadata.target_directory.display().to_string();
        let mut words = vec!["package", "--workspace", "--allow-dirty", "--locked", "--target-dir", &target];
        let private =
            metadata.packages.iter().filter(|package| package.publish.as_ref().is_some_and(Vec::is_empty));
        words.extend(private.flat_map(|package| ["--exclude", package.name.as_str()]));
        cargo(&words)
    }))
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
    let status = Command::new("cargo").args(words).current_dir(super::root()).status();
    match status {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("cargo {}: {status}", words.join(" "))),
        Err(error) => Err(format!("cargo {}: {error}", words.join(" "))),
    }
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
