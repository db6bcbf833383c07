//! `cargo xtask ci`: the checks of `checks.json`, for people and machines.

pub(crate) mod cargo;
mod checks;
mod counts;
pub(crate) mod previous;
pub(crate) mod run;
pub(crate) mod test;

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use checks::Check;
use counts::Counts;
use run::{End, Watched};

const USAGE: &str = "usage: cargo xtask ci [--list | --only NAME]...\n\
    Runs the checks in order, all of them even if one fails; --only runs the ones that are named.";

/// Runs the subcommand with the words after its name.
pub(crate) fn run(args: &[String]) -> ExitCode {
    let mut checks = match checks::load() {
        Ok(checks) => checks,
        Err(error) => return fail(&format!("rust-vmm-ci/checks.json: {error}")),
    };
    match args {
        [word] if word == "--list" => {
            checks.iter().for_each(|check| println!("{:<14}{}", check.name, check.proves));
            return ExitCode::SUCCESS;
        }
        _ => match only(args) {
            Some(names) => {
                if let Some(name) = names.iter().find(|name| !checks.iter().any(|check| check.name == **name))
                {
                    return fail(&format!("no check is called {name}; --list shows them"));
                }
                checks.retain(|check| names.is_empty() || names.contains(&check.name));
            }
            None => {
                eprintln!("{USAGE}");
                return ExitCode::from(2);
            }
        },
    }
    let reports: Vec<Report<'_>> = checks.iter().map(report).collect();
    summarize(&reports)
}

/// The names after each `--only`, or nothing if the words are others.
fn only(args: &[String]) -> Option<Vec<String>> {
    args.chunks(2)
        .map(|pair| match pair {
            [option, name] if option == "--only" => Some(name.clone()),
            _ => None,
        })
        .collect()
}

/// The repository's root.
pub(crate) fn root() -> &'static Path {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here)
}

/// The exit status of a check that could not be run here. Its last line says why.
const NOT_RUN: u8 = 77;

fn fail(message: &str) -> ExitCode {
    eprintln!("error: {message}");
    ExitCode::FAILURE
}

/// How a check ended.
enum Outcome {
    Passed,
    Failed(String),
    NotRun(String),
}

struct Report<'a> {
    check: &'a Check,
    outcome: Outcome,
    counts: Counts,
    time: Duration,
}

fn report(check: &Check) -> Report<'_> {
    println!("\n=== {}: {}", check.name, check.proves);
    let begin = Instant::now();
    let mut counts = Counts::default();
    let outcome = match &check.not_run {
        Some(reason) => Outcome::NotRun(reason.clone()),
        None => perform(check, &mut counts).unwrap_or_else(Outcome::Failed),
    };
    let time = begin.elapsed();
    match &outcome {
        Outcome::Passed => println!("=== {} passed in {} s", check.name, time.as_secs()),
        Outcome::Failed(reason) => println!("=== {} FAILED after {} s: {reason}", check.name, time.as_secs()),
        Outcome::NotRun(reason) => println!("=== {} NOT RUN: {reason}", check.name),
    }
    Report { check, outcome, counts, time }
}

fn perform(check: &Check, counts: &mut Counts) -> Result<Outcome, String> {
    let limit = Duration::from_secs(check.minutes.saturating_mul(60));
    for need in &check.needs {
        if !run::is_on_path(&need.program) {
            println!("installing {}: {}", need.program, need.install.join(" "));
            let install = Watched { words: &need.install, env: &check.env, limit: Duration::from_secs(1200) };
            match install.run(&mut |_| {}) {
                Ok(End::Status(0)) => {}
                other => {
                    return Err(format!(
                        "{} could not be installed: {}",
                        need.program,
                        run::describe(&other)
                    ));
                }
            }
        }
    }
    println!("$ {}", check.command.join(" "));
    let command = Watched { words: &check.command, env: &check.env, limit };
    let mut last = String::new();
    let end = command.run(&mut |line| {
        counts.add_line(line);
        line.clone_into(&mut last);
    });
    if matches!(end, Ok(End::Status(status)) if status == i32::from(NOT_RUN)) {
        return Ok(Outcome::NotRun(last));
    }
    if !matches!(end, Ok(End::Status(0))) {
        // A test binary that crashes has no line that counts it.
        counts.failed = counts.failed.max(u64::from(check.counts));
        return Err(run::describe(&end));
    }
    if counts.failed > 0 {
        return Err(format!("{} tests failed", counts.failed));
    }
    if counts.passed < check.min_tests {
        return Err(format!("{} tests ran, at least {} were expected", counts.passed, check.min_tests));
    }
    Ok(Outcome::Passed)
}

fn summarize(reports: &[Report<'_>]) -> ExitCode {
    println!("\n{:<14}{:<9}{:>7}  {:>7}", "check", "result", "time", "tests");
    let (mut total, mut time, mut failed) = (None, Duration::ZERO, false);
    for Report { check, outcome, counts, time: took } in reports {
        let (result, note) = match outcome {
            Outcome::Passed => ("passed", ""),
            Outcome::Failed(reason) => ("FAILED", reason.as_str()),
            Outcome::NotRun(reason) => ("NOT RUN", reason.as_str()),
        };
        let tests = if counts.all() > 0 { counts.all().to_string() } else { String::new() };
        println!("{:<14}{result:<9}{:>5} s  {tests:>7}  {note}", check.name, took.as_secs());
        failed |= matches!(outcome, Outcome::Failed(_));
        time += *took;
        if check.counts {
            total.get_or_insert_with(Counts::default).add(*counts);
        }
    }
    println!("{} checks in {} min {} s", reports.len(), time.as_secs() / 60, time.as_secs() % 60);
    if let Some(total) = total {
        println!("{total}");
    }
    if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<String> {
        line.split_whitespace().map(str::to_owned).collect()
    }

    fn check(command: &[&str]) -> Check {
        Check {
            name: "x".to_owned(),
            proves: String::new(),
            command: command.iter().map(|word| (*word).to_owned()).collect(),
            env: std::collections::BTreeMap::new(),
            minutes: 1,
            needs: Vec::new(),
            counts: true,
            min_tests: 0,
            not_run: None,
        }
    }

    #[test]
    fn only_takes_names() {
        assert_eq!(only(&[]), Some(Vec::new()));
        assert_eq!(only(&words("--only fmt --only docs")), Some(words("fmt docs")));
        assert_eq!(only(&words("--only")), None);
        assert_eq!(only(&words("fmt")), None);
    }

    #[test]
    fn a_check_fails_by_status_by_counted_failure_and_by_too_few_tests() {
        let perform = |check: &Check| {
            let mut counts = Counts::default();
            (matches!(perform(check, &mut counts), Ok(Outcome::Passed)), counts)
        };
        let result = "echo 'test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured'";
        let (passed, counts) = perform(&check(&["sh", "-c", result]));
        assert!(passed);
        assert_eq!(counts.to_string(), "3 passed, 0 failed, 1 skipped");

        let few = Check { min_tests: 4, ..check(&["sh", "-c", result]) };
        assert!(!perform(&few).0);

        let hidden = "echo 'test result: FAILED. 3 passed; 2 failed; 0 ignored; 0 measured'";
        assert!(!perform(&check(&["sh", "-c", hidden])).0);

        let (passed, counts) = perform(&check(&["sh", "-c", "exit 7"]));
        assert!(!passed);
        assert_eq!(counts.failed, 1, "a crash counts");
        assert!(!perform(&check(&["no-such-program-anywhere"])).0);
    }

    #[test]
    fn a_check_that_cannot_be_run_says_why() {
        let cannot = check(&["sh", "-c", "echo 'looking'; echo 'nothing to look at'; exit 77"]);
        let outcome = perform(&cannot, &mut Counts::default());
        assert!(matches!(outcome, Ok(Outcome::NotRun(why)) if why == "nothing to look at"));
    }

    #[test]
    fn a_check_that_takes_too_long_is_ended() {
        let endless = Check { minutes: 0, ..check(&["sh", "-c", "sleep 1000 & sleep 1000"]) };
        assert!(matches!(perform(&endless, &mut Counts::default()), Err(why) if why.contains("too long")));
    }
}
