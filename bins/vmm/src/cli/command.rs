//! The flags as clap knows them, and their help.

use std::ffi::OsStr;
use std::path::Path;

use clap::builder::ValueParser;
use clap::{Arg, ArgAction, Command, value_parser};
use clap_complete::Shell;
use vmm_api::options::{Arity, FLAGS, Flag, help_for};
use vmm_state::GuestEvent;

use super::CONTRACT_VERSION;
use crate::{ctl, snapshot};

/// Name of the subcommand that checks the machine.
pub(super) const DOCTOR: &str = "doctor";

/// Name of the subcommand that checks a configuration.
pub(super) const VALIDATE: &str = "validate";

/// Name of the subcommand that talks to a VMM.
pub(super) const CTL: &str = "ctl";

/// Name of the subcommand that works on snapshots.
pub(super) const SNAPSHOT: &str = "snapshot";

/// Name of the subcommand that prints a shell's completion.
pub(super) const COMPLETION: &str = "completion";

/// The contract's name for the program that `ctl` is.
pub(crate) const CH_REMOTE: &str = "ch-remote";

/// The flags that choose what follows guest events, and the events.
pub(super) const REACTIONS: [(&str, GuestEvent, &str); 4] = [
    ("on-reboot", GuestEvent::Reset, "What follows a reset or triple fault of the guest"),
    ("on-shutdown", GuestEvent::Shutdown, "What follows when the guest powers off"),
    ("on-panic", GuestEvent::Panic, "What follows when the guest's kernel reports its panic (--pvpanic)"),
    ("on-crash", GuestEvent::Crash, "What follows when KVM cannot go on with a vCPU"),
];

/// The VM flags that help shows, by heading, in the order that a newcomer needs them. The others are part of the
/// contract but not of this build: they are refused by name.
pub(super) const SHOWN: &[(&str, &[&str])] = &[
    ("What the VM boots", &["kernel", "initramfs", "cmdline", "firmware"]),
    ("CPUs and memory", &["cpus", "memory", "memory-zone"]),
    ("Devices", &["disk", "rng", "serial", "console", "debug-console", "pvpanic", "platform"]),
    ("The sandbox", &["landlock", "landlock-rules"]),
];
const THIS_PROCESS: &str = "This process";

/// A flag of the contract about the process, which this build does not serve.
pub(super) struct LaterFlag {
    pub(super) name: &'static str,
    pub(super) doc: &'static str,
    pub(super) has_value: bool,
}

macro_rules! later {
    ($($name:literal $has_value:literal $doc:literal;)*) => {
        /// The flags of the contract, of any release, that are about the process and that this build does not serve.
        pub(super) const LATER: &[LaterFlag] =
            &[$(LaterFlag { name: $name, doc: $doc, has_value: $has_value },)*];
    };
}

later! {
    "gdb" true "the GDB stub";
    "dbus-object-path" true "the D-Bus API";
    "dbus-service-name" true "the D-Bus API";
    "dbus-system-bus" false "the D-Bus API";
    "pvmemcontrol" false "guest control of host memory";
    "tdx" true "Intel TDX";
    "sgx-epc" true "Intel SGX";
}

/// How much help [`command`] carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Help {
    /// None of the texts that are made from tables: making them takes longer than all the rest, at each start.
    Brief,
    /// All that `--help` prints.
    Full,
}

/// The name that management software starts its VMM under, to read the version of the contract.
const CONTRACT_NAME: &str = "cloud-hypervisor";

/// The command line of a program that was started as `name`, without what only a subcommand takes: that is made when
/// there is one.
pub(super) fn command(help: Help, name: &OsStr) -> Command {
    let command = command_of_vmm(help);
    let file_name = Path::new(name).file_name();
    if file_name == Some(OsStr::new(CONTRACT_NAME)) {
        // libvirt wants `cloud-hypervisor v53.0.0`: the name, a space, an optional v, one to three numbers.
        command.name(CONTRACT_NAME).version(CONTRACT_VERSION)
    } else {
        command
    }
}

fn command_of_vmm(help: Help) -> Command {
    let command = base()
        .args(vm_flags(help))
        .args(process_flags())
        .args(reaction_flags())
        .args(LATER.iter().map(later_flag));
    match help {
        Help::Brief => command,
        Help::Full => command
            .subcommands(subcommands())
            .after_help(format!("{EXAMPLES}\n`vmm --help` lists the keys of each flag."))
            .after_long_help(format!("{SYNTAX}\n{}\n{EXAMPLES}", not_built())),
    }
}

fn base() -> Command {
    Command::new("vmm")
        .version(concat!("v", env!("CARGO_PKG_VERSION")))
        .about("Runs a virtual machine on Linux KVM.")
        .override_usage(
            "vmm --kernel <PATH> [OPTIONS]        run a VM\n       \
             vmm --restore source_url=<URL>       go on with a VM from a snapshot\n       \
             vmm --api-socket <PATH> [OPTIONS]    wait for commands\n       \
             vmm ctl COMMAND ...                  send a command to a VMM\n       \
             vmm validate FILE [--json]           check a configuration\n       \
             vmm snapshot COMMAND DIR ...         check, show, fold or compare snapshots\n       \
             vmm doctor [--json]                  check this machine",
        )
        .max_term_width(110)
        .args_conflicts_with_subcommands(true)
        .disable_help_subcommand(true)
}

fn subcommands() -> [Command; 5] {
    [
        ctl::command(ctl::NAME).name(CTL),
        validate(VALIDATE),
        snapshot::command(SNAPSHOT),
        doctor(DOCTOR),
        completion(COMPLETION),
    ]
}

/// The whole command line with all its subcommands and texts, for manual pages.
#[must_use]
pub fn whole_command() -> Command {
    command_of_vmm(Help::Full)
}

/// The whole command line as shells complete it: without what is refused.
#[must_use]
pub fn shell_command() -> Command {
    base().args(shown_flags(Help::Brief)).args(process_flags()).args(reaction_flags()).subcommands([
        ctl::command(CTL),
        completion(COMPLETION),
        validate(VALIDATE),
        snapshot::command(SNAPSHOT),
        doctor(DOCTOR),
    ])
}

/// What makes the shell complete command lines.
pub(super) fn script(shell: Shell) -> String {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut shell_command(), "vmm", &mut script);
    String::from_utf8_lossy(&script).into_owned()
}

/// The flags of a VM, for a subcommand that takes them too.
pub(crate) fn vm_arguments() -> impl Iterator<Item = Arg> {
    vm_flags(Help::Brief)
}

pub(super) fn doctor(name: &'static str) -> Command {
    Command::new(name)
        .about("Check whether and how well this machine runs VMs, and say what to do where it does not")
        .arg(Arg::new("json").long("json").action(ArgAction::SetTrue).help("Answer in JSON"))
}

pub(super) fn validate(name: &'static str) -> Command {
    Command::new(name)
        .about("Check a VM's configuration (the JSON of vm.create) against this build and this machine")
        .arg(valued(Arg::new("file"), "FILE", ValueParser::path_buf()).required(true).help("The file, or -"))
        .arg(Arg::new("json").long("json").action(ArgAction::SetTrue).help("Answer in JSON"))
}

pub(super) fn completion(name: &'static str) -> Command {
    let shell = Arg::new("shell").value_name("SHELL").required(true).value_parser(value_parser!(Shell));
    Command::new(name)
        .about("Print what makes a shell complete the command lines of vmm")
        .arg(shell.hide_possible_values(true).help("bash, fish or zsh"))
}

const EXAMPLES: &str = "\
Examples:
  A kernel and its first programs, at this terminal:
    vmm --kernel vmlinuz --initramfs initrd.img --cmdline console=hvc0

  Two CPUs, 2 GiB, and a root file system:
    vmm --kernel vmlinuz --cpus boot=2 --memory size=2G \\
        --disk path=root.raw,image_type=raw --cmdline \"console=hvc0 root=/dev/vda rw\"

  The output of the serial port in a file; commands by HTTP:
    vmm --kernel vmlinux --cmdline console=ttyS0 --serial file=guest.log --console off \\
        --api-socket path=/tmp/vmm.sock
    curl --unix-socket /tmp/vmm.sock http://localhost/api/v1/vm.info
";

const SYNTAX: &str = "\
Option strings:
  key=value,key=value. Sizes take a suffix K, M, G or T; switches are on or off; lists are [a,b], with ranges for
  numbers ([0,2-4]); tuples are written as shown (1:2:1:1, 0@[1,2]); \"quotes\" protect commas inside a value.
  Flags that may be repeated also take several values: --disk path=a.raw path=b.raw.
";

/// The flags about the VM: those that help shows first, in its order.
fn vm_flags(help: Help) -> impl Iterator<Item = Arg> {
    let hidden = FLAGS.iter().filter(|flag| !is_shown(flag.name));
    shown_flags(help).chain(hidden.map(move |flag| vm_flag(flag, help).hide(true)))
}

fn shown_flags(help: Help) -> impl Iterator<Item = Arg> {
    SHOWN.iter().flat_map(move |(heading, names)| {
        names.iter().filter_map(move |name| Some(vm_flag(Flag::by_name(name)?, help).help_heading(*heading)))
    })
}

fn is_shown(name: &str) -> bool {
    SHOWN.iter().any(|(_, names)| names.contains(&name))
}

fn vm_flag(flag: &Flag, help: Help) -> Arg {
    let arg = Arg::new(flag.name).long(flag.name).help(flag.doc().trim_end_matches('.'));
    let arg = match (help == Help::Full).then(|| help_for(flag.name)).flatten() {
        Some(keys) => arg.long_help(format!("{}\n\n{keys}", flag.doc())),
        None => arg,
    };
    match flag.arity() {
        Arity::Switch => arg.action(ArgAction::SetTrue),
        // A second one is not overlooked but refused, together with all other faults.
        Arity::Once => valued(arg, flag.value, ValueParser::string()).action(ArgAction::Append),
        Arity::Many => valued(arg, flag.value, ValueParser::string()).action(ArgAction::Append).num_args(1..),
    }
}

fn process_flags() -> [Arg; 12] {
    let text = |name: &'static str, value, help: &'static str| {
        let arg = Arg::new(name).long(name).help(help).help_heading(THIS_PROCESS);
        valued(arg, value, ValueParser::string())
    };
    let path = |name: &'static str, help: &'static str| {
        let arg = Arg::new(name).long(name).help(help).help_heading(THIS_PROCESS);
        valued(arg, "PATH", ValueParser::path_buf())
    };
    [
        text(
            "api-socket",
            "path=PATH|fd=NUMBER|PATH",
            "Take commands by HTTP on a UNIX socket: one that is made, or one that was inherited",
        ),
        text(
            "event-monitor",
            "path=PATH|fd=NUMBER",
            "Write what happens to a file, a FIFO or an inherited descriptor, a JSON object a line",
        ),
        text(
            "restore",
            "source_url=URL,...",
            "Go on with a VM from a snapshot",
        )
        .long_help(
            "Go on with a VM from a snapshot: source_url=file:///FOLDER, prefault=on|off, resume=on|off, track=on|off. \
             --disk id=ID,path=PATH, --serial, --console and --debug-console replace parts of it; other flags about the \
             VM cannot be given. Without resume=on the VM is paused.",
        ),
        Arg::new("verbose")
            .short('v')
            .action(ArgAction::Count)
            .help_heading(THIS_PROCESS)
            .help("Log more than warnings: -v information, -vv debugging, -vvv all"),
        path("log-file", "Append the log to this file [default: standard error]"),
        text("log-format", "text|json", "Form of the log [default: text]").hide_short_help(true),
        text("log-filter", "MODULE=LEVEL,...", "Levels of single modules, such as vmm_pci=debug")
            .hide_short_help(true),
        path("boot-trace", "Write the stages of the boot to this file, for Perfetto or chrome://tracing")
            .hide_short_help(true),
        text(
            "seccomp",
            "true|false|log|errno",
            "What a system call outside its thread's filter leads to: the end (true), nothing (false: there are no \
             filters), a line in the kernel's audit log, or the error EPERM [default: true]",
        )
        .hide_short_help(true),
        Arg::new("no-landlock")
            .long("no-landlock")
            .action(ArgAction::SetTrue)
            .conflicts_with("landlock")
            .help_heading(THIS_PROCESS)
            .help("Do not confine paths, as is done by default if there is no API socket")
            .hide_short_help(true),
        text(
            "unknown-fields",
            "refuse|warn",
            "What happens to unknown fields in a request of the API [default: refuse]",
        )
        .hide_short_help(true),
        Arg::new("verify-state")
            .long("verify-state")
            .action(ArgAction::SetTrue)
            .help_heading(THIS_PROCESS)
            .help(
                "At every pause save the state of devices and vCPUs, reset, restore and compare, for tests; \
                 the guest must not notice",
            )
            .hide_short_help(true),
    ]
}

/// One flag for each event, and the contract's short form of one of them.
fn reaction_flags() -> impl Iterator<Item = Arg> {
    let flag = |(name, event, help): (&'static str, GuestEvent, &'static str)| {
        let row = event.row();
        let words: Vec<&str> = row.reactions.iter().map(|reaction| reaction.name()).collect();
        let help = format!("{help}: {} [default: {}]", words.join(", "), row.default_reaction());
        valued(Arg::new(name).long(name), "WHAT", ValueParser::string())
            .help(help)
            .help_heading(THIS_PROCESS)
            .hide_short_help(true)
    };
    let no_shutdown = Arg::new("no-shutdown")
        .long("no-shutdown")
        .action(ArgAction::SetTrue)
        .help_heading(THIS_PROCESS)
        .help("Stay when the guest powers off; the same as --on-shutdown stop")
        .hide_short_help(true);
    REACTIONS.into_iter().map(flag).chain([no_shutdown])
}

fn later_flag(flag: &LaterFlag) -> Arg {
    let arg = Arg::new(flag.name).long(flag.name).hide(true);
    // No default value, so that its presence means that the user gave it.
    if flag.has_value {
        arg.num_args(1..).action(ArgAction::Append)
    } else {
        arg.num_args(0).action(ArgAction::Append)
    }
}

fn valued(arg: Arg, value: &'static str, parser: ValueParser) -> Arg {
    arg.value_name(value).value_parser(parser)
}

/// Names what the contract has and this build refuses.
fn not_built() -> String {
    let of_vm = FLAGS.iter().map(|flag| flag.name).filter(|name| !is_shown(name));
    let names: Vec<String> =
        of_vm.chain(LATER.iter().map(|flag| flag.name)).map(|name| format!("--{name}")).collect();
    format!("Not in this build yet, refused by name:\n  {}\n", names.join(" "))
}
