//! The pages that are made of the command line are what it says: manual pages and `docs/ctl.md`.
//!
//! `VMM_BLESS=1 cargo test -p vmm --test pages` writes them.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use clap::{Arg, Command};
use roff::{Roff, bold, roman};
use vmm::cli::whole_command;
use vmm::exit::ExitCode;

/// What a page is committed as, and its text.
type Page = (String, String);

fn subcommand(whole: &Command, name: &str) -> Command {
    let found = whole.get_subcommands().find(|command| command.get_name() == name);
    found.unwrap_or_else(|| panic!("{name}")).clone()
}

/// The whole command line as it is when it has been used: names and usages are filled in.
fn whole() -> Command {
    let mut whole = whole_command();
    whole.build();
    whole
}

const SUBCOMMANDS: [&str; 5] = ["ctl", "validate", "snapshot", "doctor", "completion"];

fn manual_pages() -> Vec<Page> {
    let whole = whole();
    let page = |name: &str, command: &Command| (format!("docs/man/{name}.1"), manual_page(command, name));
    let of_subcommand = |name| page(&format!("vmm-{name}"), &subcommand(&whole, name));
    [page("vmm", &whole)].into_iter().chain(SUBCOMMANDS.map(of_subcommand)).collect()
}

fn manual_page(command: &Command, name: &str) -> String {
    let mut page = Roff::new();
    page.control("TH", [name.to_uppercase().as_str(), "1", "\"\"", "vmm", "User commands"]);
    page.control("SH", ["NAME"]);
    page.text([roman(format!("{name} - {}", about(command).trim_end_matches('.')))]);
    page.control("SH", ["SYNOPSIS"]);
    let usage = command.clone().render_usage().to_string();
    lines(&mut page, &usage.trim_start_matches("Usage: ").replace("\n       ", "\n"));
    page.control("SH", ["DESCRIPTION"]);
    page.text([roman(command.get_long_about().map_or_else(|| about(command), ToString::to_string))]);
    options(&mut page, command);
    if command.has_subcommands() && name != "vmm" {
        commands(&mut page, command);
    }
    if let Some(end) = command.get_after_long_help().or(command.get_after_help()) {
        page.control("SH", ["NOTES"]);
        lines(&mut page, &end.to_string());
    }
    page.control("SH", ["SEE ALSO"]);
    let others = SUBCOMMANDS.map(|name| format!("vmm-{name}")).into_iter().chain(["vmm".to_owned()]);
    let others: Vec<_> = others.filter(|other| other != name).map(|other| format!("{other}(1)")).collect();
    page.text([roman(others.join(", "))]);
    page.to_roff()
}

/// Lines that stay as they are.
fn lines(page: &mut Roff, text: &str) {
    page.control("nf", []);
    text.lines().for_each(|line| {
        page.text([roman(line)]);
    });
    page.control("fi", []);
}

/// The arguments by their headings, in the order of the help.
fn options(page: &mut Roff, command: &Command) {
    let shown: Vec<&Arg> = command.get_arguments().filter(|arg| !arg.is_hide_set()).collect();
    let heading = |arg: &Arg| arg.get_help_heading().unwrap_or("Options").to_uppercase();
    let mut headings: Vec<String> = shown.iter().map(|arg| heading(arg)).collect();
    headings.sort_by_key(|heading| heading == "OPTIONS");
    headings.dedup();
    let mut seen = Vec::new();
    for title in headings {
        if seen.contains(&title) {
            continue;
        }
        page.control("SH", [title.as_str()]);
        shown.iter().filter(|arg| heading(arg) == title).for_each(|arg| argument(page, arg));
        seen.push(title);
    }
}

fn argument(page: &mut Roff, arg: &Arg) {
    let help = arg.get_long_help().or(arg.get_help()).map(ToString::to_string).unwrap_or_default();
    let (first, rest) = help.split_once('\n').unwrap_or((&help, ""));
    page.control("TP", []);
    page.text([bold(spelled(arg))]);
    page.text([roman(first)]);
    if !rest.is_empty() {
        lines(page, rest.trim_start_matches('\n'));
    }
}

/// Each command of a subcommand with what it takes.
fn commands(page: &mut Roff, parent: &Command) {
    page.control("SH", ["COMMANDS"]);
    for command in parent.get_subcommands() {
        page.control("SS", [usage(command).as_str()]);
        page.text([roman(about(command))]);
        // The flags of a VM are in the page of `vmm`.
        let own = own_arguments(command).filter(|arg| command.get_name() != "create" || arg.is_positional());
        own.for_each(|arg| argument(page, arg));
    }
}

fn about(command: &Command) -> String {
    let about = command.get_about().map(ToString::to_string).unwrap_or_default();
    format!("{}.", about.trim_end_matches('.'))
}

fn usage(command: &Command) -> String {
    let usage = command.clone().render_usage().to_string();
    let first = usage.trim_start_matches("Usage: ").lines().next().unwrap_or_default();
    let of_parent = first.strip_prefix("vmm ctl ").or(first.strip_prefix("vmm snapshot "));
    of_parent.unwrap_or(first).replace(" [OPTIONS]", "")
}

/// What only this subcommand takes.
fn own_arguments(command: &Command) -> impl Iterator<Item = &Arg> {
    command.get_arguments().filter(|arg| !arg.is_global_set() && !arg.is_hide_set() && arg.get_id() != "help")
}

fn spelled(arg: &Arg) -> String {
    let value = arg.get_value_names().and_then(|names| names.first()).map(|name| format!("<{name}>"));
    let takes = arg.get_action().takes_values();
    let short = arg.get_short().map(|short| format!("-{short}"));
    let names: Vec<String> =
        short.into_iter().chain(arg.get_long().map(|long| format!("--{long}"))).collect();
    let value = value.filter(|_| takes);
    [names.join(", ")]
        .into_iter()
        .filter(|names| !names.is_empty())
        .chain(value)
        .collect::<Vec<_>>()
        .join(" ")
}

const INTRODUCTION: &str = "\
# `vmm ctl`

Made of the command line by `VMM_BLESS=1 cargo test -p vmm --test pages`; do not edit.

    vmm ctl --api-socket PATH COMMAND ...

sends a command to a VMM that runs, by its API socket, and prints its reply. Every command of the API has one; `vmm ctl COMMAND
--help` explains each, with the keys of option strings (`create` takes a
document, or the flags of a VM as `vmm` does). The names are those of Cloud Hypervisor's `ch-remote`: started under that
name the program is the same, and prints replies as they come.

    export VMM_API_SOCKET=/run/vmm.sock
    vmm --api-socket $VMM_API_SOCKET &
    vmm ctl --connect-within 5 create --kernel vmlinuz --initramfs initrd.img --cpus boot=2 --cmdline console=ttyS0
    vmm ctl add-disk path=data.raw,image_type=raw
    vmm ctl boot --wait running
    vmm ctl info
    vmm ctl shutdown-vmm --wait ended --timeout 30

- Paths in commands are the VMM's: it opens them, in its working directory.
- A command that has nothing to say prints nothing. `--json` prints the reply as it comes.
- `--timeout` is for all of it: the wait for the socket, the command, and `--wait`. A command that is not waited for any
  more goes on in the VMM.
- On a terminal a call of more than half a second shows how long it takes, and how far the VMM says it is.
- `events` prints the events of [events.md](events.md), an event a line, until the VMM ends.
- Descriptors (`add-net fd=[3]`, `restore net_fds=[n@[3]]`) are those passed to `vmm ctl`; they are sent, not their numbers.

## Exit status

| status | meaning |
|---|---|
| 0 | It is done; `validate`: the VM would boot; `wait`: the state is reached. |
| 1 | The VMM refuses, or the command failed. Standard error says why: the causes, the code in brackets, the faults of the document by their places, and the phases in which the VMM would do it. |
| 2 | The command line is wrong; nothing was sent. |
| 3 | No VMM listens at the socket, or it went away before it answered. |
| 4 | The time limit passed. |

## Completion and manual pages

`vmm completion bash` (or `zsh`, `fish`) prints what makes the shell complete all command lines of `vmm`:

    vmm completion bash > /usr/share/bash-completion/completions/vmm
    vmm completion zsh > /usr/share/zsh/site-functions/_vmm
    vmm completion fish > /usr/share/fish/vendor_completions.d/vmm.fish

Manual pages are in `docs/man`: `man docs/man/vmm-ctl.1`.
";

fn markdown() -> Page {
    let ctl = subcommand(&whole(), "ctl");
    let mut text = INTRODUCTION.to_owned();
    let mut table = |title: &str, head: &str, rows: Vec<(String, String)>| {
        write!(text, "\n{title}\n\n| {head} | |\n|---|---|\n").unwrap();
        for (what, meaning) in rows {
            writeln!(text, "| `{}` | {} |", what.replace('|', "\\|"), meaning.replace('|', "\\|")).unwrap();
        }
    };
    let row = |arg: &Arg| (spelled(arg), arg.get_help().map(ToString::to_string).unwrap_or_default());
    let common = ctl.get_arguments().filter(|arg| arg.is_global_set()).map(row).collect();
    table("## Options of all commands", "option", common);
    let commands = ctl.get_subcommands().map(|command| (usage(command), about(command))).collect();
    table("## Commands", "command", commands);
    for command in ctl.get_subcommands() {
        // What stands alone is explained by its name, or by `--help` at length; `create` takes what `vmm` takes.
        let own: Vec<_> = own_arguments(command).filter(|arg| !arg.is_positional()).map(row).collect();
        if !own.is_empty() && command.get_name() != "create" {
            table(&format!("### {}", command.get_name()), "argument", own);
        }
    }
    ("docs/ctl.md".to_owned(), text)
}

#[test]
fn pages_are_what_the_command_line_says() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let bless = std::env::var_os("VMM_BLESS").is_some();
    for (name, text) in manual_pages().into_iter().chain([markdown()]) {
        let path = root.join(&name);
        if bless {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, &text).unwrap();
        }
        let committed = fs::read_to_string(&path).unwrap_or_default();
        assert!(committed == text, "{name} differs: run with VMM_BLESS=1 and look at the difference");
    }
}

#[test]
fn the_page_has_each_exit_status_of_the_client() {
    let of_others =
        [ExitCode::Mismatch, ExitCode::GuestCrashed, ExitCode::ForbiddenCall, ExitCode::LostMemory];
    for code in ExitCode::ALL.into_iter().filter(|code| !of_others.contains(code)) {
        assert!(INTRODUCTION.contains(&format!("\n| {} | ", code as u8)), "{code:?}");
    }
}
