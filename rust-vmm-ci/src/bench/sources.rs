//! Where figures come from: programs that are built, run, and read.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use serde::Deserialize;

use super::figure::{Figure, Goal};
use crate::ci::cargo;

/// How a benchmark is run.
#[derive(Debug, Clone, Copy)]
pub(super) enum Source {
    /// `bench-whole` with its name: the VMM as a process.
    Whole,
    /// A criterion benchmark of a package: its estimates of the median.
    Criterion {
        /// Of what package.
        package: &'static str,
        /// Which of its benchmarks.
        bench: &'static str,
        /// Target for each of its functions, in nanoseconds.
        at_most_ns: Option<f64>,
    },
    /// A benchmark of a package that prints its figures.
    Printed {
        /// Of what package.
        package: &'static str,
        /// Which of its benchmarks.
        bench: &'static str,
        /// What of it.
        case: &'static str,
    },
    /// virtio-blk with an in-process driver beside the same requests on the raw file.
    Block,
}

impl Source {
    pub(super) fn measure(self, name: &str) -> Result<Vec<Figure>, String> {
        let figures = match self {
            Self::Whole => whole(name),
            Self::Criterion { package, bench, at_most_ns } => criterion(name, package, bench, at_most_ns),
            Self::Printed { package, bench, case } => {
                json_lines(&output(cargo_bench(package, bench).args(["--", case]))?)
            }
            Self::Block => block(),
        }?;
        if figures.is_empty() {
            return Err("it printed no figure".to_owned());
        }
        Ok(figures.into_iter().map(Figure::judged).collect())
    }
}

fn whole(name: &str) -> Result<Vec<Figure>, String> {
    // One package at a time: cargo would unite their features in the VMM, too.
    cargo::cargo(&["build", "--quiet", "--release", "--locked", "-p", "vmm", "--bin", "vmm"])?;
    let tools = ["--bin", "bench-whole", "--bin", "bench-floor"];
    cargo::cargo(
        &[&["build", "--quiet", "--release", "--locked", "-p", "vmm-tests"], tools.as_slice()].concat(),
    )?;
    let folder = cargo::metadata()?.target_directory.join("release");
    let mut command = Command::new(folder.join("bench-whole"));
    command.arg(folder.join("vmm")).arg(folder.join("bench-floor")).arg(name);
    json_lines(&output(&mut command)?)
}

/// Reads what criterion leaves behind, for it prints for people only.
fn criterion(name: &str, package: &str, bench: &str, at_most_ns: Option<f64>) -> Result<Vec<Figure>, String> {
    let home = cargo::metadata()?.target_directory.join("bench").join(name);
    // What an earlier run left must not pass for this one's.
    let _ = fs::remove_dir_all(&home);
    let mut command = cargo_bench(package, bench);
    command.args(["--", "--noplot", "--quiet"]).env("CRITERION_HOME", &home);
    output(&mut command)?;
    let mut figures = Vec::new();
    for group in folders(&home)? {
        for function in folders(&home.join(&group))?.iter().filter(|name| *name != "report") {
            let path = home.join(&group).join(function).join("new").join("estimates.json");
            figures.push(Figure {
                name: format!("{group} {function}"),
                unit: "ns".to_owned(),
                ours: median(&path)?,
                floor: None,
                ratio: None,
                goal: at_most_ns.map(|_| Goal::AtMost),
                target: at_most_ns,
                verdict: String::new(),
            });
        }
    }
    Ok(figures)
}

/// Names of the folders in `path`, sorted.
fn folders(path: &Path) -> Result<Vec<String>, String> {
    let entries = fs::read_dir(path).map_err(|error| format!("{}: {error}", path.display()))?;
    let mut names: Vec<String> = entries
        .flatten()
        .filter(|entry| entry.path().is_dir())
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    Ok(names)
}

fn median(path: &Path) -> Result<f64, String> {
    #[derive(Deserialize)]
    struct Estimates {
        median: Estimate,
    }
    #[derive(Deserialize)]
    struct Estimate {
        point_estimate: f64,
    }
    let error = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
    let text = fs::read_to_string(path).map_err(|e| error(&e))?;
    let estimates: Estimates = serde_json::from_str(&text).map_err(|e| error(&e))?;
    Ok(estimates.median.point_estimate)
}

fn block() -> Result<Vec<Figure>, String> {
    let text = output(&mut cargo_bench("vmm-virtio-devices", "block"))?;
    text.lines()
        .filter(|line| line.starts_with('{'))
        .map(|line| {
            serde_json::from_str::<BlockLine>(line).map(Figure::from).map_err(|e| format!("{e}: {line}"))
        })
        .collect()
}

/// A line of the virtio-blk benchmark.
#[derive(Debug, Deserialize)]
struct BlockLine {
    bench: String,
    engine: String,
    raw_per_s: f64,
    virtio_per_s: f64,
    ratio: f64,
    target: f64,
}

impl From<BlockLine> for Figure {
    fn from(line: BlockLine) -> Self {
        Self {
            name: format!("{} ({})", line.bench, line.engine),
            unit: "/s".to_owned(),
            ours: line.virtio_per_s,
            floor: Some(line.raw_per_s),
            ratio: Some(line.ratio),
            goal: Some(Goal::RatioAtLeast),
            target: Some(line.target),
            verdict: String::new(),
        }
    }
}

fn cargo_bench(package: &str, bench: &str) -> Command {
    let mut command = Command::new("cargo");
    command.args(["bench", "--quiet", "--locked", "-p", package, "--bench", bench]);
    command.current_dir(crate::ci::root());
    command
}

fn json_lines(text: &str) -> Result<Vec<Figure>, String> {
    // `cargo bench` has an empty line of its own.
    let lines = text.lines().filter(|line| !line.is_empty());
    lines.map(|line| serde_json::from_str(line).map_err(|error| format!("{error}: {line}"))).collect()
}

/// What the program prints; on an error it has said why itself.
fn output(command: &mut Command) -> Result<String, String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.stdin(Stdio::null()).stderr(Stdio::inherit()).output();
    let output = output.map_err(|error| format!("{program}: {error}"))?;
    if !output.status.success() {
        return Err(format!("{program}: {}", output.status));
    }
    String::from_utf8(output.stdout).map_err(|error| format!("{program}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_the_block_benchmark_becomes_a_figure() {
        let line = r#"{"bench":"b","engine":"io_uring","raw_per_s":100,"virtio_per_s":90,"ratio":0.91,"target":0.95}"#;
        let figure = Figure::from(serde_json::from_str::<BlockLine>(line).unwrap()).judged();
        assert_eq!((figure.ours, figure.floor, figure.ratio), (90.0, Some(100.0), Some(0.91)));
        assert_eq!(figure.verdict, "short by 0.04 x");
    }

    #[test]
    fn lines_that_are_no_figures_are_errors() {
        let line =
            r#"{"name":"n","unit":"us","ours":2.5,"floor":null,"ratio":null,"goal":"at-most","target":3.0}"#;
        assert_eq!(json_lines(line).unwrap()[0].goal, Some(Goal::AtMost));
        assert!(json_lines("{}").is_err());
        assert!(json_lines("halted").is_err());
    }
}
