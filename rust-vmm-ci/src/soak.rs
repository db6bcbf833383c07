//! `cargo xtask soak`: long tests in batches whose counts add up over runs, however often they are broken off.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use vmm_tests::cache::Cache;
use vmm_tests::error::describe;

use crate::ci::run::{End, Watched};

const USAGE: &str = "\
usage: cargo xtask soak [--only NAME]... [--record FILE] [--list]
Runs long tests in batches until each has reached its goal. Every batch that passed is recorded at once, so that the next run goes on
where this one was broken off. A batch that failed is recorded, too, and counts nothing. --list shows what was reached.
The record is soak.json in the cache unless FILE is given; remove it to begin anew.";

/// One entry of `soaks.json`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Soak {
    name: String,
    /// What is known when it has reached its goal.
    proves: String,
    /// What is counted.
    unit: String,
    goal: u64,
    /// How many one run of the command does.
    batch: u64,
    /// Environment variable that tells the command how many.
    variable: String,
    /// Others that it is given.
    #[serde(default)]
    env: BTreeMap<String, String>,
    command: Vec<String>,
    /// Time after which a batch has failed.
    minutes: u64,
}

/// One batch that was run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Batch {
    /// Which soak's.
    name: String,
    /// When it ended, in seconds since 1970.
    ended: u64,
    /// The commit of the tree; with a `+` if it had changes.
    commit: String,
    passed: bool,
    count: u64,
    seconds: u64,
}

/// All batches that were run, in a file.
#[derive(Debug)]
struct Record {
    path: PathBuf,
    batches: Vec<Batch>,
}

impl Record {
    fn open(path: &Path) -> io::Result<Self> {
        let batches = match fs::read(path) {
            Ok(bytes) => serde_json::from_slice(&bytes)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(error),
        };
        Ok(Self { path: path.to_owned(), batches })
    }

    /// Adds a batch; the file is whole at any time.
    fn add(&mut self, batch: Batch) -> io::Result<()> {
        self.batches.push(batch);
        let part = self.path.with_extension("part");
        fs::write(&part, serde_json::to_vec_pretty(&self.batches)?)?;
        fs::rename(part, &self.path)
    }

    fn reached(&self, name: &str) -> u64 {
        self.batches.iter().filter(|batch| batch.name == name && batch.passed).map(|batch| batch.count).sum()
    }

    fn failures(&self, name: &str) -> usize {
        self.batches.iter().filter(|batch| batch.name == name && !batch.passed).count()
    }
}

/// Runs the subcommand with the words after its name.
pub(crate) fn run(args: &[String]) -> ExitCode {
    match soak(args) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn soak(args: &[String]) -> Result<ExitCode, Box<dyn std::error::Error>> {
    let all: Vec<Soak> = serde_json::from_str(include_str!("../soaks.json"))?;
    let (mut only, mut file, mut list) = (Vec::new(), None, false);
    let mut words = args.iter();
    while let Some(word) = words.next() {
        match word.as_str() {
            "--list" => list = true,
            "--only" => only.extend(words.next().cloned()),
            "--record" => file = words.next().map(PathBuf::from),
            _ => return Ok(usage()),
        }
    }
    if let Some(unknown) = only.iter().find(|name| all.iter().all(|soak| soak.name != **name)) {
        eprintln!("there is no soak {unknown:?}");
        return Ok(usage());
    }
    let file = match file {
        Some(file) => file,
        None => Cache::open().map_err(|error| describe(&error))?.root().join("soak.json"),
    };
    let mut record = Record::open(&file).map_err(|error| format!("record {}: {error}", file.display()))?;
    let chosen = || all.iter().filter(|soak| only.is_empty() || only.contains(&soak.name));
    let mut failed = false;
    if !list {
        for soak in chosen() {
            failed |= !soak.run(&mut record)?;
        }
    }
    println!(
        "{:<15} {:>10} {:>10} {:<15} {:>8}  it proves that",
        "soak", "reached", "goal", "unit", "failures"
    );
    for Soak { name, proves, unit, goal, .. } in chosen() {
        println!(
            "{name:<15} {:>10} {goal:>10} {unit:<15} {:>8}  {proves}",
            record.reached(name),
            record.failures(name)
        );
    }
    println!("recorded in {}", file.display());
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

impl Soak {
    /// Builds the VMM of this tree; whether it could.
    fn build(&self) -> io::Result<bool> {
        let built = Command::new("cargo").args(building(&self.command)).status()?.success();
        if !built {
            println!("=== {}: the VMM cannot be built", self.name);
        }
        Ok(built)
    }

    /// Runs batches up to the goal; whether none failed.
    fn run(&self, record: &mut Record) -> io::Result<bool> {
        while let Some(count) = next_batch(record.reached(&self.name), self.goal, self.batch) {
            println!(
                "=== {}: {} of {} {}; {count} more",
                self.name,
                record.reached(&self.name),
                self.goal,
                self.unit
            );
            if !self.build()? {
                return Ok(false);
            }
            let mut env = self.env.clone();
            env.insert(self.variable.clone(), count.to_string());
            let limit = Duration::from_secs(self.minutes * 60);
            let start = Instant::now();
            let end = Watched { words: &self.command, env: &env, limit }.run(&mut |_| ())?;
            let passed = end == End::Status(0);
            record.add(Batch {
                name: self.name.clone(),
                ended: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
                commit: commit(),
                passed,
                count,
                seconds: start.elapsed().as_secs(),
            })?;
            if !passed {
                println!("=== {} failed: {end:?}", self.name);
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// Words of the command that builds the VMM that `command` tests.
fn building(command: &[String]) -> Vec<&str> {
    let profile = command.iter().map(String::as_str).find(|word| *word == "--release");
    ["build", "--quiet", "-p", "vmm"].into_iter().chain(profile).collect()
}

/// How many the next batch is to do; `None` at the goal.
fn next_batch(reached: u64, goal: u64, batch: u64) -> Option<u64> {
    goal.checked_sub(reached).filter(|left| *left > 0).map(|left| left.min(batch))
}

/// The commit of the tree.
fn commit() -> String {
    let git = |args: &[&str]| {
        let output = Command::new("git").args(args).output().ok().filter(|output| output.status.success())?;
        Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let commit = git(&["rev-parse", "--short=12", "HEAD"]).unwrap_or_else(|| "unknown".to_owned());
    let changed =
        git(&["status", "--porcelain", "--untracked-files=no"]).is_some_and(|text| !text.is_empty());
    if changed { commit + "+" } else { commit }
}

fn usage() -> ExitCode {
    eprintln!("{USAGE}");
    ExitCode::from(2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_is_sound() {
        let all: Vec<Soak> = serde_json::from_str(include_str!("../soaks.json")).unwrap();
        let mut names: Vec<_> = all.iter().map(|soak| &soak.name).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), all.len());
        for soak in &all {
            assert!(
                0 < soak.batch && soak.batch <= soak.goal && soak.minutes > 0 && !soak.command.is_empty(),
                "{soak:?}"
            );
        }
    }

    #[test]
    fn the_vmm_is_of_the_profile_of_the_test() {
        let words = |line: &str| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(building(&words("cargo test -p a")), ["build", "--quiet", "-p", "vmm"]);
        assert_eq!(
            building(&words("cargo test --release -p a")),
            ["build", "--quiet", "-p", "vmm", "--release"]
        );
    }

    #[test]
    fn batches_add_up_to_the_goal_and_no_further() {
        assert_eq!(next_batch(0, 20, 8), Some(8));
        assert_eq!(next_batch(16, 20, 8), Some(4));
        assert_eq!(next_batch(20, 20, 8), None);
        assert_eq!(next_batch(30, 20, 8), None, "the goal was lowered");
    }

    #[test]
    fn a_record_survives_and_counts_what_passed() {
        let path = std::env::temp_dir().join(format!("soak-record-{}", std::process::id()));
        let batch = |name: &str, passed, count| Batch {
            name: name.to_owned(),
            ended: 1,
            commit: "c".to_owned(),
            passed,
            count,
            seconds: 2,
        };
        let mut record = Record::open(&path).unwrap();
        for (name, passed, count) in [("a", true, 5), ("a", false, 7), ("b", true, 1), ("a", true, 3)] {
            record.add(batch(name, passed, count)).unwrap();
        }
        let again = Record::open(&path).unwrap();
        assert_eq!((again.reached("a"), again.failures("a"), again.reached("b")), (8, 1, 1));
        fs::write(&path, "[{").unwrap();
        assert!(Record::open(&path).is_err(), "a broken record is not taken for an empty one");
        fs::remove_file(path).unwrap();
    }
}
