//! The table as a page for people.

use crate::guest::{EventCell, GUEST_EVENTS, Reaction};
use crate::phase::COUNT;
use crate::table::{ACTIONS, Cell, Step};
use crate::{Phase, Reason};
use std::fmt::Write as _;

/// The life cycle as Markdown: both tables, the reasons, and a state diagram. `docs/lifecycle.md` is this text.
#[must_use]
pub fn lifecycle_markdown() -> String {
    let mut page = String::from(
        "# Life cycle of the VM\n\nGenerated from the table in `vmm-state`; do not edit. \
         `A` alone: runs and leaves the VM in A. `A / B`: A after success, B after failure. \
         `ok`: success, nothing to do. \
         `waits`: until the boot or snapshot under way has ended. Words in parentheses: refused (404 without a VM, \
         501 for what this build does not have yet, else 409).\n\n## Requests\n\n",
    );
    let actions = ACTIONS.iter().map(|row| (row.name, row.cells.map(cell)));
    grid(&mut page, "request", actions);
    page.push_str(
        "\n## Guest events\n\n`now`: see below. `later`: kept until the VM runs again. `-`: nothing.\n\n",
    );
    let events = GUEST_EVENTS.iter().map(|row| (row.name, row.cells.map(event_cell)));
    grid(&mut page, "event", events);
    reactions(&mut page);
    page.push_str("\n## Diagram\n\n```mermaid\nstateDiagram-v2\n    [*] --> Empty\n");
    diagram(&mut page);
    page.push_str("```\n");
    page
}

fn grid<'a>(page: &mut String, corner: &str, rows: impl Iterator<Item = (&'a str, [String; COUNT])>) {
    let names = Phase::ALL.map(Phase::name).join(" | ");
    // Writing to a String cannot fail.
    let _ = writeln!(page, "| {corner} | {names} |\n|---|{}", "---|".repeat(COUNT));
    for (name, cells) in rows {
        let _ = writeln!(page, "| {name} | {} |", cells.join(" | "));
    }
}

fn cell(cell: Cell) -> String {
    match cell {
        Cell::Run(step) => arrow(step),
        Cell::Nothing => "ok".to_owned(),
        Cell::Wait => "waits".to_owned(),
        Cell::Refuse(reason) => format!("({})", short(reason)),
    }
}

fn event_cell(cell: EventCell) -> String {
    match cell {
        EventCell::React => "now",
        EventCell::Defer => "later",
        EventCell::Ignore => "-",
    }
    .to_owned()
}

/// What may follow an event, and where that leads.
fn reactions(page: &mut String) {
    page.push_str(
        "\nWhat then happens is chosen when the VMM is started; the first of an event's choices is the default.\n\n\
         | event | choices |\n|---|---|\n",
    );
    for row in &GUEST_EVENTS {
        let names: Vec<&str> = row.reactions.iter().map(|reaction| reaction.name()).collect();
        let _ = writeln!(page, "| {} | {} |", row.name, names.join(", "));
    }
    page.push_str("\n| choice | leads to |\n|---|---|\n");
    for reaction in Reaction::ALL {
        let note = if reaction == Reaction::Exit { ", and the VMM ends" } else { "" };
        let _ = writeln!(page, "| {reaction} | {}{note} |", arrow(reaction.step()));
    }
}

fn arrow(step: Step) -> String {
    if step.done == step.failed { step.done.to_string() } else { format!("{} / {}", step.done, step.failed) }
}

const fn short(reason: Reason) -> &'static str {
    match reason {
        Reason::NoVm => "no VM",
        Reason::AlreadyCreated => "exists",
        Reason::NotBooted => "not booted",
        Reason::AlreadyRunning => "running",
        Reason::AlreadyPaused => "paused",
        Reason::NotPaused => "not paused",
        Reason::NoJob => "no job",
        Reason::Migrating => "migration",
        Reason::NotMigrating => "no migration",
        Reason::NotBuilt => "not built",
    }
}

fn diagram(page: &mut String) {
    let mut arrow = |from: Phase, step: Step, name: &str| {
        if step.done != from || from != step.failed {
            let _ = writeln!(page, "    {from} --> {} : {name}", step.done);
        }
    };
    for row in &ACTIONS {
        for from in Phase::ALL {
            if let Cell::Run(step) = row.cell(from) {
                arrow(from, step, row.name);
            }
        }
    }
    for row in &GUEST_EVENTS {
        for from in Phase::ALL {
            if row.cell(from) == EventCell::React {
                for reaction in row.reactions {
                    arrow(from, reaction.step(), &format!("guest {}: {reaction}", row.name));
                }
            }
        }
    }
}
