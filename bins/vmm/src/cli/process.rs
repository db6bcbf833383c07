//! The flags about this process.

use std::path::PathBuf;

use clap::ArgMatches;
use log::LevelFilter;
use vmm_api::config::{Fault, FaultKind, UnknownFields};
use vmm_state::{GuestEvent, Reaction, Reactions};

use super::command::{LATER, REACTIONS};
use super::{ApiSocketArg, SeccompMode};
use crate::events::MonitorTarget;
use crate::logger::{Filter, LogFormat, LogOptions};

/// Refuses the flags of the contract that this build does not serve.
pub(super) fn later(matches: &ArgMatches) -> Vec<Fault> {
    let given = LATER.iter().filter(|flag| matches.contains_id(flag.name));
    given.map(|flag| not_built(format!("--{}", flag.name), flag.doc)).collect()
}

/// `path=PATH`, `fd=NUMBER` or `PATH`.
pub(super) fn api_socket(matches: &ArgMatches, faults: &mut Vec<Fault>) -> Option<ApiSocketArg> {
    let text = matches.get_one::<String>("api-socket")?;
    let mut refuse = |key: &str, message: String| {
        faults.push(Fault::new(format!("--api-socket{key}"), FaultKind::Invalid, message));
        None
    };
    if let Some(number) = text.strip_prefix("fd=") {
        match number.parse::<i32>() {
            Ok(fd) if fd > libc::STDERR_FILENO => Some(ApiSocketArg::Fd(fd)),
            Ok(fd) => {
                refuse(" fd", format!("{fd} is not the number of an inherited socket: it must be above 2"))
            }
            Err(_) => refuse(" fd", format!("expected a file descriptor's number, found {number:?}")),
        }
    } else {
        match text.strip_prefix("path=").unwrap_or(text) {
            "" => refuse("", "expected path=<path>, fd=<number> or a path, found nothing".into()),
            path => Some(ApiSocketArg::Path(PathBuf::from(path))),
        }
    }
}

/// `path=PATH` or `fd=NUMBER`.
pub(super) fn event_monitor(matches: &ArgMatches, faults: &mut Vec<Fault>) -> Option<MonitorTarget> {
    let text = word(matches, "event-monitor")?;
    let mut refuse = |key: &str, message: String| {
        faults.push(Fault::new(format!("--event-monitor{key}"), FaultKind::Invalid, message));
        None
    };
    match text.split_once('=') {
        Some(("path", path)) if !path.is_empty() => Some(MonitorTarget::Path(PathBuf::from(path))),
        Some(("fd", number)) => match number.parse::<i32>() {
            Ok(fd) if fd > libc::STDERR_FILENO => Some(MonitorTarget::Fd(fd)),
            Ok(fd) => refuse(
                " fd",
                format!("{fd} is not the number of an inherited descriptor: it must be above 2"),
            ),
            Err(_) => refuse(" fd", format!("expected a file descriptor's number, found {number:?}")),
        },
        _ => refuse("", format!("expected path=<path> or fd=<number>, found {text:?}")),
    }
}

/// `true`, `false` or `log`.
pub(super) fn seccomp(matches: &ArgMatches, faults: &mut Vec<Fault>) -> SeccompMode {
    match word(matches, "seccomp") {
        None | Some("true") => SeccompMode::Enforce,
        Some("log") => SeccompMode::Log,
        Some("false") => SeccompMode::Off,
        Some("errno") => {
            faults.push(not_built("--seccomp".into(), "errno"));
            SeccompMode::Enforce
        }
        Some(other) => unexpected("seccomp", "true, false or log", other, faults),
    }
}

/// `refuse` or `warn`.
pub(super) fn unknown_fields(matches: &ArgMatches, faults: &mut Vec<Fault>) -> UnknownFields {
    match word(matches, "unknown-fields") {
        None | Some("refuse") => UnknownFields::Refuse,
        Some("warn") => UnknownFields::Warn,
        Some(other) => unexpected("unknown-fields", "refuse or warn", other, faults),
    }
}

/// `--on-reboot` and the others, and `--no-shutdown`.
pub(super) fn reactions(matches: &ArgMatches, faults: &mut Vec<Fault>) -> Reactions {
    let mut choose = |name: &str, event: GuestEvent| {
        let row = event.row();
        let Some(text) = word(matches, name) else { return row.default_reaction() };
        let chosen = row.reactions.iter().find(|reaction| reaction.name() == text);
        chosen.copied().unwrap_or_else(|| {
            let words: Vec<&str> = row.reactions.iter().map(|reaction| reaction.name()).collect();
            let message = format!("expected {}, found {text:?}", words.join(", "));
            faults.push(Fault::new(format!("--{name}"), FaultKind::Type, message));
            row.default_reaction()
        })
    };
    let [reboot, shutdown, panic, crash] = REACTIONS.map(|(name, event, _)| choose(name, event));
    let mut reactions = Reactions { reboot, shutdown, panic, crash };
    if matches.get_flag("no-shutdown") {
        if matches.contains_id("on-shutdown") && reactions.shutdown != Reaction::Stop {
            let message = format!("contradicts --on-shutdown {}", reactions.shutdown);
            faults.push(Fault::new("--no-shutdown", FaultKind::Invalid, message));
        }
        reactions.shutdown = Reaction::Stop;
    }
    reactions
}

/// `-v`, `--log-file`, `--log-format` and `--log-filter`.
pub(super) fn log_options(matches: &ArgMatches, faults: &mut Vec<Fault>) -> LogOptions {
    let format = match word(matches, "log-format") {
        None | Some("text") => LogFormat::Text,
        Some("json") => LogFormat::Json,
        Some(other) => unexpected("log-format", "text or json", other, faults),
    };
    let filter = word(matches, "log-filter").map(str::parse).unwrap_or_else(|| Ok(Filter::default()));
    let filter = filter.unwrap_or_else(|error| {
        faults.push(Fault::new("--log-filter".to_owned(), FaultKind::Type, error.to_string()));
        Filter::default()
    });
    let level = match matches.get_count("verbose") {
        0 => LevelFilter::Warn,
        1 => LevelFilter::Info,
        2 => LevelFilter::Debug,
        _ => LevelFilter::Trace,
    };
    LogOptions { level, filter, format, file: matches.get_one::<PathBuf>("log-file").cloned() }
}

fn word<'m>(matches: &'m ArgMatches, name: &str) -> Option<&'m str> {
    matches.get_one::<String>(name).map(String::as_str)
}

fn unexpected<T: Default>(name: &str, expected: &str, found: &str, faults: &mut Vec<Fault>) -> T {
    let message = format!("expected {expected}, found {found:?}");
    faults.push(Fault::new(format!("--{name}"), FaultKind::Type, message));
    T::default()
}

fn not_built(flag: String, what: &str) -> Fault {
    Fault::new(flag, FaultKind::NotBuilt, format!("not supported by this build yet: {what}"))
}
