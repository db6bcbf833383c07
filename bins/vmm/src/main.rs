//! The `vmm` binary: see `vmm --help`.

use std::io::{self, Write};

use vmm::boot_trace::Startup;
use vmm::cli::{self, Invocation};
use vmm::exit::{self, ExitCode};
use vmm::{console, ctl, doctor, logger, run, signals, snapshot, validate};

fn main() -> std::process::ExitCode {
    let mut startup = Startup::begin();
    let code = match startup.time("command line", || cli::parse(std::env::args_os())) {
        Ok(Invocation::Run(options)) => start(*options, startup),
        Ok(Invocation::Doctor { json }) => doctor::run(json),
        Ok(Invocation::Validate { file, json }) => validate::run(file.as_deref(), json),
        Ok(Invocation::Ctl(job)) => ctl::run(*job),
        Ok(Invocation::Snapshot(job)) => {
            signals::ignore_file_size_limit();
            snapshot::run(&job)
        }
        Ok(Invocation::Print(text)) => {
            // Nobody may be listening any more; `print!` would panic.
            let _ = io::stdout().write_all(text.as_bytes());
            ExitCode::Success
        }
        Err(error) => {
            complain(&exit::report(&error));
            ExitCode::Usage
        }
    };
    code.into()
}

fn start(options: cli::RunOptions, startup: Startup) -> ExitCode {
    signals::ignore_file_size_limit();
    let result = logger::init(&options.log).map_err(|e| exit::report(&e)).and_then(|log| {
        run::confine(log).and_then(|()| run::run(options, startup)).map_err(|e| exit::report(&e))
    });
    console::restore_terminal();
    result.unwrap_or_else(|report| {
        complain(&report);
        ExitCode::VmmError
    })
}

fn complain(report: &str) {
    let _ = writeln!(io::stderr(), "{report}");
}
