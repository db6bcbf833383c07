//! The sandbox in force: each thread of the real binary has its filter, what a filter forbids is caught and named, and
//! paths are confined.
//!
//! This program is also its own child, which puts a filter on itself and then does what it was told: see `child`.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]

mod calls;
mod child;
mod paths;
mod threads;
mod tracer;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Failed, Trial};

type Case = (&'static str, fn());

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if words.first().is_some_and(|word| word == child::WORD) {
        return child::main(&words[1..]);
    }
    let trial = |(name, case): &Case| {
        let case = *case;
        Trial::test(*name, move || {
            case();
            Ok::<(), Failed>(())
        })
    };
    let mut trials: Vec<Trial> = calls::ALL.iter().chain(threads::ALL).map(trial).collect();
    let landlock = paths::kernel_has_landlock();
    if !landlock {
        println!("this kernel has no Landlock: what needs it is not run");
    }
    trials.extend(paths::ALL.iter().map(trial).map(|trial| trial.with_ignored_flag(!landlock)));
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}
