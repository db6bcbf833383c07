//! `cargo xtask nested -- COMMAND...`: one command in a nested machine with a KVM that runs unmodified kernels.

use std::process::ExitCode;

use vmm_tests::cache::Cache;
use vmm_tests::error::{self, describe};
use vmm_tests::nested::{Job, Nested, Settings};

const USAGE: &str = "usage: cargo xtask nested [--interactive] -- COMMAND [ARGUMENT...]\n\
    Boots a machine in QEMU's emulation of an AMD processor, runs COMMAND in it with the files of this one, and ends with its status.";

/// Runs the subcommand with the words after its name.
pub(crate) fn run(args: &[String]) -> ExitCode {
    let Some(split) = args.iter().position(|word| word == "--") else { return usage() };
    let (options, rest) = args.split_at(split);
    let command = rest.get(1..).unwrap_or_default();
    let mut interactive = false;
    for option in options {
        match option.as_str() {
            "--interactive" => interactive = true,
            _ => return usage(),
        }
    }
    if command.is_empty() {
        return usage();
    }
    match run_command(command, interactive) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("error: {}", describe(&error));
            ExitCode::FAILURE
        }
    }
}

/// Runs `command` in L1; its exit status.
pub(crate) fn run_command(command: &[String], interactive: bool) -> error::Result<u8> {
    let nested = Nested::prepare(&Cache::open()?, Settings::default())?;
    let mut job = Job::new(command.iter().map(Into::into).collect())?;
    job.interactive = interactive;
    let status = nested.run(&job)?;
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1))
}

fn usage() -> ExitCode {
    eprintln!("{USAGE}");
    ExitCode::from(2)
}
