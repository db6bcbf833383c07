//! The command line.
//!
//! Its flags are those of the REST contract's reference VMM. What they say of a VM is read by
//! [`vmm_api::options`], from the same tables as the API's JSON; what they say of this process is read here.
//! [`parse`] decides all that the arguments alone can decide and touches nothing outside.

mod command;
mod error;
mod process;
mod restore;

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use clap::error::ErrorKind;
use clap::{ArgMatches, Command};
use clap_complete::Shell;
use vmm_api::config::{Fault, UnknownFields, Warning};
use vmm_api::options::{Arity, FLAGS, VmFlags};
use vmm_api::spec::{Checked, MachineSpec, RestoreSpec, fill_ids};
use vmm_state::Reactions;

use crate::events::MonitorTarget;
use crate::logger::LogOptions;
use crate::{ctl, snapshot};

use command::Help;
pub(crate) use command::{CH_REMOTE, vm_arguments};
pub use command::{shell_command, whole_command};
pub use error::UsageError;
pub(crate) use restore::{OVERRIDES, overrides};

/// The newest release of the contract that is followed, as its version is printed.
pub const CONTRACT_VERSION: &str = "v53.0.0";

/// What the user asked for.
#[derive(Debug)]
pub enum Invocation {
    /// Run a VM, or wait for commands, or both.
    Run(Box<RunOptions>),
    /// Check this machine.
    Doctor {
        /// Answer in JSON.
        json: bool,
    },
    /// Check a configuration without booting it.
    Validate {
        /// The file that holds it; `None` is standard input.
        file: Option<PathBuf>,
        /// Answer in JSON.
        json: bool,
    },
    /// Send a command to a VMM.
    Ctl(Box<ctl::Job>),
    /// Work on snapshot directories.
    Snapshot(snapshot::Job),
    /// Print this text on standard output, and be done: help, version, a shell's completion.
    Print(String),
}

/// How to run.
#[derive(Debug)]
pub struct RunOptions {
    /// The VM of the command line; `None` if it names none.
    pub config: Option<Checked>,
    /// The snapshot that a VM is made of; then there is no other VM.
    pub restore: Option<RestoreSpec>,
    /// Where commands are taken.
    pub api_socket: Option<ApiSocketArg>,
    /// Where the contract's events are written.
    pub event_monitor: Option<MonitorTarget>,
    /// What is logged, and where.
    pub log: LogOptions,
    /// Where the stages of the boot are written.
    pub boot_trace: Option<PathBuf>,
    /// What a system call outside the filters leads to.
    pub seccomp: SeccompMode,
    /// Paths are not confined where nobody asks for it.
    pub no_landlock: bool,
    /// What happens to unknown fields in the bodies of requests.
    pub unknown_fields: UnknownFields,
    /// At every pause, all state is saved, reset, restored and compared.
    pub verify_state: bool,
    /// What follows a guest event.
    pub reactions: Reactions,
}

/// The API's socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ApiSocketArg {
    /// A UNIX socket to be made at this path.
    Path(PathBuf),
    /// A listening UNIX socket that was inherited under this number, above standard error's.
    Fd(i32),
}

/// What a system call outside the filters leads to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SeccompMode {
    /// The end of the process, with a status of its own.
    #[default]
    Enforce,
    /// The error EPERM.
    Errno,
    /// A line in the kernel's audit log.
    Log,
    /// Nothing: there are no filters.
    Off,
}

/// Reads the arguments, the program's name first.
///
/// # Errors
///
/// All that is wrong with them, by flag and key. What clap cannot split into flags and values is reported alone.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Invocation, UsageError> {
    let args: Vec<OsString> = args.into_iter().collect();
    if let Some(answer) = subcommand(&args) {
        return answer;
    }
    let name = args.first().map_or(OsStr::new(""), OsString::as_os_str);
    let read = |help| command::command(help, name).try_get_matches_from(&args);
    let matches = match read(Help::Brief) {
        Ok(matches) => matches,
        // The whole command line also knows what is nearest to a mistake.
        Err(_) => match read(Help::Full) {
            Ok(matches) => matches,
            Err(error) => return by_clap(&error),
        },
    };

    let mut faults = process::later(&matches);
    let api_socket = process::api_socket(&matches, &mut faults);
    let event_monitor = process::event_monitor(&matches, &mut faults);
    let seccomp = process::seccomp(&matches, &mut faults);
    let unknown_fields = process::unknown_fields(&matches, &mut faults);
    let log = process::log_options(&matches, &mut faults);
    let reactions = process::reactions(&matches, &mut faults);
    let flags = vm_flags(&matches);
    let restores = matches.contains_id(restore::RESTORE);
    if flags.is_empty() && !restores && api_socket.is_none() && faults.is_empty() {
        return Err(UsageError::NothingToDo);
    }
    let restore = restore::restore(&matches, &mut faults);
    let config = if flags.is_empty() || restores { None } else { checked(&flags, &mut faults) };
    if faults.is_empty() {
        let boot_trace = matches.get_one::<PathBuf>("boot-trace").cloned();
        let verify_state = matches.get_flag("verify-state");
        let no_landlock = matches.get_flag("no-landlock");
        let options = RunOptions {
            config,
            restore,
            api_socket,
            event_monitor,
            log,
            boot_trace,
            seccomp,
            no_landlock,
            unknown_fields,
            verify_state,
            reactions,
        };
        Ok(Invocation::Run(Box::new(options)))
    } else {
        Err(UsageError::Faults(faults))
    }
}

/// What a subcommand comes to, if there is one: only then its command line is made.
fn subcommand(args: &[OsString]) -> Option<Result<Invocation, UsageError>> {
    let (program, rest) = args.split_first()?;
    if Path::new(program).file_name().is_some_and(|name| name == CH_REMOTE) {
        return Some(ctl::parse(rest, true));
    }
    let (word, rest) = rest.split_first()?;
    let read = |command: Command, then: fn(&ArgMatches) -> Invocation| {
        let name = command.get_name().to_owned();
        let matches = command.bin_name(name).no_binary_name(true).try_get_matches_from(rest);
        Some(matches.map(|matches| then(&matches)).or_else(|error| by_clap(&error)))
    };
    match word.to_str()? {
        command::DOCTOR => {
            read(command::doctor("vmm doctor"), |given| Invocation::Doctor { json: given.get_flag("json") })
        }
        command::VALIDATE => read(command::validate("vmm validate"), |given| {
            let file = given.get_one::<PathBuf>("file").filter(|file| file.as_os_str() != "-").cloned();
            Invocation::Validate { file, json: given.get_flag("json") }
        }),
        command::COMPLETION => read(command::completion("vmm completion"), |given| {
            let shell = given.get_one::<Shell>("shell").copied().unwrap_or(Shell::Bash);
            Invocation::Print(command::script(shell))
        }),
        command::SNAPSHOT => {
            read(snapshot::command("vmm snapshot"), |given| Invocation::Snapshot(snapshot::job(given)))
        }
        command::CTL => Some(ctl::parse(rest, false)),
        _ => None,
    }
}

/// Help and version are answers; the rest is an error.
pub(crate) fn by_clap(error: &clap::Error) -> Result<Invocation, UsageError> {
    let text = error.render().to_string();
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => Ok(Invocation::Print(text)),
        _ => Err(UsageError::Arguments(text.trim_start_matches("error: ").trim_end().to_owned())),
    }
}

/// The flags about the VM.
fn vm_flags(matches: &ArgMatches) -> VmFlags {
    let mut flags = VmFlags::new();
    let mut add = |name: &str, value: &str| {
        // The name is one of FLAGS.
        let _ = flags.add(name, value);
    };
    for flag in FLAGS {
        if flag.arity() == Arity::Switch {
            if matches.get_flag(flag.name) {
                add(flag.name, "");
            }
        } else {
            for value in matches.get_many::<String>(flag.name).into_iter().flatten() {
                add(flag.name, value);
            }
        }
    }
    flags
}

/// The VM that the flags among the arguments describe, if there are any.
pub(crate) fn vm_of(matches: &ArgMatches, faults: &mut Vec<Fault>) -> Option<Checked> {
    let flags = vm_flags(matches);
    if flags.is_empty() { None } else { checked(&flags, faults) }
}

/// The VM that the flags describe; faults and warnings name flags and keys.
fn checked(flags: &VmFlags, faults: &mut Vec<Fault>) -> Option<Checked> {
    let parsed = match flags.parse() {
        Ok(parsed) => parsed,
        Err(found) => {
            faults.extend(found);
            return None;
        }
    };
    let (mut config, mut warnings) = (parsed.config, parsed.warnings);
    match MachineSpec::check(&config) {
        Ok(mut spec) => {
            fill_ids(&mut config);
            let by_flag = |warning: Warning| Warning { path: flags.name(&warning.path), ..warning };
            warnings.extend(spec.warnings.into_iter().map(by_flag));
            spec.warnings = warnings;
            Some(Checked { config, spec })
        }
        Err(found) => {
            faults.extend(found.into_iter().map(|fault| Fault { path: flags.name(&fault.path), ..fault }));
            None
        }
    }
}

#[cfg(test)]
mod tests;
