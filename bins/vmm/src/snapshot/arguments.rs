//! The command line of `vmm snapshot`.

use std::path::PathBuf;

use clap::builder::ValueParser;
use clap::{Arg, ArgAction, ArgMatches, Command};

use super::{Job, Task};

const VERIFY: &str = "verify";
const INSPECT: &str = "inspect";
const MERGE: &str = "merge";
const DIFF: &str = "diff";

/// The subcommand, under its name in what stands around it.
pub(crate) fn command(name: &'static str) -> Command {
    let of = |name: &'static str, about: &'static str| Command::new(name).about(about).arg(json());
    Command::new(name)
        .about("Check, show, fold or compare snapshot directories; no VMM is needed")
        .subcommand_required(true)
        .arg_required_else_help(true)
        .disable_help_subcommand(true)
        .subcommands([
            of(VERIFY, "Compare a snapshot and its parents with their hashes, all of memory included")
                .arg(directory("dir", "DIR", "The snapshot's directory")),
            of(INSPECT, "Show what a snapshot is: chain, memory, records, configuration").arg(directory(
                "dir",
                "DIR",
                "The snapshot's directory",
            )),
            of(MERGE, "Fold a snapshot and its parents into a new one without parents")
                .arg(directory("chain", "DIR", "The newest snapshot's directory"))
                .arg(directory("target", "NEW", "The directory to be written: absent or empty")),
            of(DIFF, "Say what two snapshots differ in: configuration, records, memory")
                .arg(directory("before", "BEFORE", "One directory"))
                .arg(directory("after", "AFTER", "The other one")),
        ])
}

fn json() -> Arg {
    Arg::new("json").long("json").action(ArgAction::SetTrue).help("Answer in JSON")
}

fn directory(name: &'static str, value: &'static str, help: &'static str) -> Arg {
    Arg::new(name).value_name(value).value_parser(ValueParser::path_buf()).required(true).help(help)
}

/// What the arguments ask for.
pub(crate) fn job(matches: &ArgMatches) -> Job {
    // clap lets nothing else through than the subcommands above with what they require.
    let (name, given) = matches.subcommand().unwrap_or((VERIFY, matches));
    let path = |name: &str| given.get_one::<PathBuf>(name).cloned().unwrap_or_default();
    let task = match name {
        INSPECT => Task::Inspect(path("dir")),
        MERGE => Task::Merge { chain: path("chain"), target: path("target") },
        DIFF => Task::Diff { before: path("before"), after: path("after") },
        _ => Task::Verify(path("dir")),
    };
    Job { task, json: given.get_flag("json") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Option<Job> {
        let words = line.split_whitespace();
        command("snapshot").no_binary_name(true).try_get_matches_from(words).ok().map(|given| job(&given))
    }

    #[test]
    fn each_subcommand_takes_its_directories() {
        let job = |task, json| Some(Job { task, json });
        assert_eq!(parsed("verify a"), job(Task::Verify("a".into()), false));
        assert_eq!(parsed("inspect --json a"), job(Task::Inspect("a".into()), true));
        assert_eq!(parsed("merge a b"), job(Task::Merge { chain: "a".into(), target: "b".into() }, false));
        assert_eq!(
            parsed("diff a b --json"),
            job(Task::Diff { before: "a".into(), after: "b".into() }, true)
        );
        for wrong in ["", "verify", "verify a b", "merge a", "diff a", "check a"] {
            assert_eq!(parsed(wrong), None, "{wrong}");
        }
    }
}
