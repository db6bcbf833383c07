//! `cargo xtask test`: every test of the project, with Linux guests where they can run.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::Duration;

use vmm_tests::hostkvm::KvmAbility;

use super::cargo::metadata;
use super::counts::Counts;
use super::run::{self, End, Watched};

const USAGE: &str = "usage: cargo xtask test [--host | --linux]\n\
    Runs every test. --host leaves the Linux guests out, --linux runs only them.";

/// The package and target whose tests boot Linux. It runs itself in the nested KVM where the host's cannot run Linux.
const LINUX: (&str, &str) = ("vmm-tests", "linux");

/// Runs the subcommand with the words after its name.
pub(crate) fn run(args: &[String]) -> ExitCode {
    let (host, linux) = match args {
        [] => (true, true),
        [word] if word == "--host" => (true, false),
        [word] if word == "--linux" => (false, true),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    let mut parts = Vec::new();
    if host {
        parts.push(part("no guest or tiny guests", "cargo test --workspace --no-fail-fast --locked"));
    }
    if linux {
        parts.push(linux_guests());
    }
    summarize(&parts)
}

struct Part {
    place: String,
    counts: Counts,
    failure: Option<String>,
}

fn part(place: &str, command: &str) -> Part {
    println!("$ {command}");
    let words: Vec<String> = command.split(' ').map(str::to_owned).collect();
    let mut counts = Counts::default();
    let watched = Watched { words: &words, env: &BTreeMap::new(), limit: Duration::from_secs(3600) };
    let end = watched.run(&mut |line| counts.add_line(line));
    let failure = (!matches!(end, Ok(End::Status(0)))).then(|| run::describe(&end));
    Part { place: place.to_owned(), counts, failure }
}

fn linux_guests() -> Part {
    let place = match KvmAbility::probe() {
        KvmAbility::Full => "Linux guests on the host's KVM".to_owned(),
        KvmAbility::TinyGuestsOnly(reason) | KvmAbility::None(reason) => {
            format!("Linux guests in the nested KVM ({reason})")
        }
    };
    println!("{place}");
    let (package, target) = LINUX;
    match has_target(package, target) {
        Ok(true) => part(&place, &format!("cargo test -p {package} --test {target} --locked")),
        Ok(false) => Part {
            place,
            counts: Counts::default(),
            failure: Some(format!("package {package} has no test target {target}")),
        },
        Err(failure) => Part { place, counts: Counts::default(), failure: Some(failure) },
    }
}

fn has_target(package: &str, target: &str) -> Result<bool, String> {
    let metadata = metadata()?;
    Ok(metadata
        .packages
        .iter()
        .filter(|candidate| candidate.name == package)
        .flat_map(|package| &package.targets)
        .any(|candidate| candidate.name == target && candidate.kind.iter().any(|kind| kind == "test")))
}

fn summarize(parts: &[Part]) -> ExitCode {
    let mut total = Counts::default();
    let mut failed = false;
    println!();
    for Part { place, counts, failure } in parts {
        println!("{place}: {counts}{}", failure.as_ref().map_or(String::new(), |why| format!(" ({why})")));
        total.add(*counts);
        failed |= failure.is_some() || counts.failed > 0;
    }
    println!("{total}");
    if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
