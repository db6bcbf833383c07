//! The command line of `vmm ctl`, and the job that it means.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::{PossibleValuesParser, ValueParser};
use clap::{Arg, ArgAction, ArgMatches, Command};
use vmm_api::command::Method;
use vmm_api::config::{Fault, FaultKind};

use super::rows::Body;
use super::words::{GOALS, Goal, seconds};
use super::{Job, ROWS, SOCKET_VARIABLE, Step, events};
use crate::cli::{self, Invocation, UsageError};

/// How the program is called by its own name.
pub(crate) const NAME: &str = "vmm ctl";

const CREATE: &str = "create";
const CALL: &str = "call";
const WAIT: &str = "wait";

/// The command line, for a program that is called `name`.
pub(crate) fn command(name: &'static str) -> Command {
    let mut command = Command::new(name)
        .about("Send a command to a VMM by its API socket")
        .long_about(
            "Send a command to a VMM by its API socket. Paths in commands are the VMM's: it opens them, in its \
             working directory.",
        )
        .subcommand_required(true)
        .subcommand_value_name("COMMAND")
        .subcommand_help_heading("Commands")
        .disable_help_subcommand(true)
        .max_term_width(110)
        .after_help(AFTER)
        .args(common());
    let mut rows = ROWS.iter().peekable();
    while let Some(row) = rows.next() {
        let mut about = row.doc.trim_end_matches('.').to_owned();
        // The second of two rows with one word takes the same arguments, and sets what the first gives.
        if rows.next_if(|next| next.word == row.word).is_some() {
            about.push_str(", or sets it");
        }
        let subcommand = Command::new(row.word).about(about).args(row.arguments());
        command =
            command.subcommand(if row.word == CREATE { of_flags(subcommand, name) } else { subcommand });
    }
    command.subcommands([events::command(), wait(), call()])
}

/// `create` takes a document, or the flags of a VM.
fn of_flags(create: Command, name: &str) -> Command {
    create
        .override_usage(format!("{name} {CREATE} [FILE|-]\n       {name} {CREATE} --kernel <PATH> [OPTIONS]"))
        .after_help("`vmm --help` lists the keys of each flag.")
}

const AFTER: &str = "\
Exit status: 0 done, 1 the VMM refuses or the command failed, 2 the command line is wrong, 3 no VMM answers, 4 the \
time limit passed.";

/// The options of all subcommands.
fn common() -> [Arg; 5] {
    let words = PossibleValuesParser::new(GOALS.map(|(word, _)| word));
    let time = |name: &'static str| Arg::new(name).long(name).value_name("SECONDS").value_parser(seconds);
    [
        Arg::new("api-socket")
            .long("api-socket")
            .value_name("PATH")
            .help(format!("Where the VMM listens [default: ${SOCKET_VARIABLE}]")),
        Arg::new("json").long("json").action(ArgAction::SetTrue).help("Print the reply as it comes"),
        Arg::new("wait")
            .long("wait")
            .value_name("STATE")
            .value_parser(words)
            .ignore_case(true)
            .hide_possible_values(true)
            .help("After the command wait for this state of the VM, as `wait` does"),
        time("timeout").help("The longest that all of it may take [default: no limit]"),
        time("connect-within").help("Wait this long for the socket to appear [default: 0]"),
    ]
    .map(|arg| arg.global(true).help_heading("Common options"))
}

fn wait() -> Command {
    let words = PossibleValuesParser::new(GOALS.map(|(word, _)| word));
    let state = Arg::new("state").value_name("STATE").required(true).value_parser(words).ignore_case(true);
    Command::new(WAIT)
        .about("Waits for a state of the VM, or (ended) for the end of the VMM")
        .arg(state.help("The state; none is that there is no VM"))
}

fn call() -> Command {
    let file = Arg::new("body").value_name("FILE").value_parser(ValueParser::path_buf());
    let get = Arg::new("get").long("get").action(ArgAction::SetTrue);
    Command::new(CALL)
        .about("Sends any command by its name in the API, and prints the reply as it comes")
        .arg(Arg::new("name").value_name("NAME").required(true).help("The command, such as vm.info"))
        .arg(file.help("The body; - is standard input, nothing is none"))
        .arg(get.help("By GET instead of PUT"))
}

/// Reads the arguments after the program's name or the word `ctl`. `contract` means that the program is called by the
/// contract's name for it.
///
/// # Errors
///
/// All that is wrong with them.
pub(crate) fn parse(arguments: &[OsString], contract: bool) -> Result<Invocation, UsageError> {
    let name = if contract { cli::CH_REMOTE } else { NAME };
    let mut command = command(name).bin_name(name).no_binary_name(true);
    if contract {
        command = command.version(cli::CONTRACT_VERSION);
    }
    let matches = match command.try_get_matches_from(arguments) {
        Ok(matches) => matches,
        Err(error) => return cli::by_clap(&error),
    };
    let Some((word, given)) = matches.subcommand() else { return Err(UsageError::NothingToDo) };
    let step = step(word, given).map_err(UsageError::Faults)?;
    let wait = goal(given, "wait");
    if let (Step::Events(_), Some(_)) = (&step, wait) {
        let fault = Fault::new("--wait", FaultKind::Invalid, "events go on until the VMM ends");
        return Err(UsageError::Faults(vec![fault]));
    }
    let socket = given.get_one::<String>("api-socket").map(|text| text.strip_prefix("path=").unwrap_or(text));
    let time = |name: &str| given.get_one::<Duration>(name).copied();
    Ok(Invocation::Ctl(Box::new(Job {
        socket: socket.map(PathBuf::from),
        // The contract's program prints replies as they come, and is read by programs.
        json: contract || given.get_flag("json"),
        timeout: time("timeout"),
        connect_within: time("connect-within").unwrap_or_default(),
        step,
        wait,
    })))
}

fn step(word: &str, given: &ArgMatches) -> Result<Step, Vec<Fault>> {
    if word == CALL {
        let method = if given.get_flag("get") { Method::Get } else { Method::Put };
        let body = match given.get_one::<PathBuf>("body") {
            None => Body::Bytes(Vec::new()),
            Some(path) => Body::File((path.as_os_str() != "-").then(|| path.clone())),
        };
        return Ok(Step::Any(given.get_one::<String>("name").cloned().unwrap_or_default(), method, body));
    }
    let unknown = || vec![Fault::new(word, FaultKind::Unknown, "no such command")];
    if word == events::EVENTS {
        return events::range(given).map(Step::Events);
    }
    if word == WAIT {
        return goal(given, "state").map(Step::Wait).ok_or_else(unknown);
    }
    let row = ROWS.iter().find(|row| row.word == word && row.applies(given)).ok_or_else(unknown)?;
    Ok(Step::Command(row, row.payload(given)?))
}

fn goal(given: &ArgMatches, name: &str) -> Option<Goal> {
    given.get_one::<String>(name).and_then(|word| Goal::from_word(word))
}
