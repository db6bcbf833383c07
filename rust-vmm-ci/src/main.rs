//! The project's commands.

mod bench;
mod ci;
mod images;
mod nested;
mod quickstart;
mod soak;

use std::process::ExitCode;

const USAGE: &str = "\
usage: cargo xtask COMMAND [ARGUMENT...]

  ci          run the checks of rust-vmm-ci/checks.json (--list, --only NAME)
  test        run every test; Linux guests run in the nested KVM where the host's cannot
  quickstart  from nothing to a Linux guest that introduces itself and shuts down
  bench       measure, and print a table (--json FILE, --only NAME, --list)
  soak        long tests in batches whose counts add up over runs (--list, --only NAME)
  images      fetch and build what guests boot
  nested      run one command in a machine with a KVM that runs unmodified kernels

Single checks, which ci runs too:
  alone       check each crate by itself
  package     package the library crates and build them from their packages
  previous    migrate virtual machines between this build and the one before it
  release     build the release binary and print its size";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let rest = args.get(1..).unwrap_or_default();
    match args.first().map(String::as_str) {
        Some("ci") => ci::run(rest),
        Some("test") => ci::test::run(rest),
        Some("alone") => ci::cargo::alone(),
        Some("package") => ci::cargo::package(),
        Some("previous") => ci::previous::run(),
        Some("release") => ci::cargo::release(),
        Some("soak") => soak::run(rest),
        Some("bench") => bench::run(rest),
        Some("images") => images::run(rest),
        Some("quickstart") => quickstart::run(rest),
        Some("nested") => nested::run(rest),
        Some("help" | "--help" | "-h") => {
            println!("{USAGE}");
            ExitCode::SUCCESS
        }
        _ => {
            eprintln!("{USAGE}");
            ExitCode::from(2)
        }
    }
}
