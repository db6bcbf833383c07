//! `cargo xtask bench`: every benchmark, as one table and as JSON.
//!
//! Nothing fails by being slow: a missed target shows in the table.

mod figure;
mod sources;

use std::path::PathBuf;
use std::process::ExitCode;

use figure::Figure;
use sources::Source;

const USAGE: &str = "\
usage: cargo xtask bench [--json FILE] [--only NAME]... [--list]

Builds with the release profile, measures, and prints a table. Ours and its floor alternate in the same run; a figure is
the median of its rounds. The machine should have nothing else to do. --only may be repeated.";

/// What can be named in `--only`, in the order in which it runs.
const BENCHES: &[(&str, Source)] = &[
    ("boot", Source::Whole),
    ("api-ready", Source::Whole),
    ("vm-info", Source::Whole),
    ("vm-info-busy", Source::Whole),
    ("pause-resume", Source::Whole),
    ("memory", Source::Whole),
    ("size", Source::Whole),
    ("bus", Source::Criterion { package: "vmm-device-model", bench: "bus", at_most_ns: Some(150.0) }),
    ("pci", Source::Criterion { package: "vmm-pci", bench: "config", at_most_ns: None }),
    ("block", Source::Block),
    ("restore", Source::Whole),
    ("snapshot", Source::Whole),
    ("snapshot-live", Source::Whole),
    ("local-migration", Source::Whole),
    ("migration", Source::Whole),
    ("migration-blackout", Source::Whole),
    ("migration-info", Source::Whole),
    ("zero-scan", Source::Printed { package: "vmm-memory-manager", bench: "scan", case: "zeros" }),
    ("dirty-ranges", Source::Printed { package: "vmm-memory-manager", bench: "dirty", case: "ranges" }),
    ("snapshot-create", Source::Printed { package: "vmm-snapshot", bench: "create", case: "create" }),
    (
        "snapshot-incremental",
        Source::Printed { package: "vmm-snapshot", bench: "create", case: "incremental" },
    ),
];

/// Runs the subcommand with the words after its name.
pub(crate) fn run(args: &[String]) -> ExitCode {
    let (json, names) = match parse(args) {
        Ok(Wanted::Run { json, names }) => (json, names),
        Ok(Wanted::List) => {
            BENCHES.iter().for_each(|(name, _)| println!("{name}"));
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprintln!("{error}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match measure(&names).and_then(|figures| report(&figures, json)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

#[derive(Debug, PartialEq)]
enum Wanted {
    List,
    Run { json: Option<PathBuf>, names: Vec<String> },
}

fn parse(args: &[String]) -> Result<Wanted, String> {
    let mut json = None;
    let mut names = Vec::new();
    let mut args = args.iter();
    while let Some(word) = args.next() {
        let mut value = || args.next().ok_or(format!("{word} needs a value"));
        match word.as_str() {
            "--list" => return Ok(Wanted::List),
            "--json" => json = Some(PathBuf::from(value()?)),
            "--only" => names.push(value()?.clone()),
            _ => return Err(format!("what is {word}?")),
        }
    }
    let unknown = names.iter().find(|name| !BENCHES.iter().any(|(known, _)| known == name));
    match unknown {
        Some(name) => Err(format!("no benchmark has the name {name}")),
        None => Ok(Wanted::Run { json, names }),
    }
}

/// Those of `names`; all if it is empty.
fn measure(names: &[String]) -> Result<Vec<Figure>, String> {
    let wanted =
        BENCHES.iter().filter(|(name, _)| names.is_empty() || names.iter().any(|wanted| wanted == name));
    let mut figures = Vec::new();
    for (name, source) in wanted {
        eprintln!("{name}...");
        figures.extend(source.measure(name).map_err(|error| format!("{name}: {error}"))?);
    }
    Ok(figures)
}

fn report(figures: &[Figure], json: Option<PathBuf>) -> Result<(), String> {
    print!("{}", figure::table(figures));
    let Some(path) = json else { return Ok(()) };
    let text = serde_json::to_string_pretty(figures).map_err(|error| error.to_string())?;
    std::fs::write(&path, text + "\n").map_err(|error| format!("{}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Wanted, String> {
        parse(&line.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn arguments_are_read_and_unknown_ones_refused() {
        let run = |json: Option<&str>, names: &[&str]| {
            Ok(Wanted::Run {
                json: json.map(PathBuf::from),
                names: names.iter().map(|&name| name.to_owned()).collect(),
            })
        };
        assert_eq!(parsed(""), run(None, &[]));
        assert_eq!(parsed("--json f --only bus --only boot"), run(Some("f"), &["bus", "boot"]));
        assert_eq!(parsed("--list"), Ok(Wanted::List));
        for wrong in ["--json", "--only", "--only nothing", "bus"] {
            assert!(parsed(wrong).is_err(), "{wrong}");
        }
    }
}
