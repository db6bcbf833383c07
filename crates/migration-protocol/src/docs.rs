//! The tables as a page for people.

use std::fmt::{Debug, Write as _};

use crate::{
    Cell, DestinationKind, DestinationState, FillerKind, FillerState, SourceKind, SourceState, SupplierKind,
    SupplierState,
};

/// Both machines as Markdown: a state diagram and a table each. `docs/machines.md` is this text.
#[must_use]
pub fn machines_markdown() -> String {
    let mut page = String::from(
        "# The machines of both ends\n\n\
         Generated from the tables in the code; do not edit. A cell names the states that an input may lead to. \
         `undo`: the migration has failed; the step under way is ended (Stopping), what was done is undone (Undoing), \
         and it ends. `ask`: to Asking. `-`: nothing happens.\n",
    );
    let source = |state: SourceState, kind| cell(state.cell(kind), &[SourceState::Asking]);
    machine(&mut page, "Source", (&SourceState::ALL, &SourceKind::ALL), source);
    let destination = |state: DestinationState, kind| cell(state.cell(kind), &[]);
    machine(&mut page, "Destination", (&DestinationState::ALL, &DestinationKind::ALL), destination);
    page.push_str("\nPost-copy goes on after Commit with these two; there is nothing to undo.\n");
    let supplier = |state: SupplierState, kind| cell(state.cell(kind), &[]);
    machine(&mut page, "Supplier", (&SupplierState::ALL, &SupplierKind::ALL), supplier);
    let filler = |state: FillerState, kind| cell(state.cell(kind), &[]);
    machine(&mut page, "Filler", (&FillerState::ALL, &FillerKind::ALL), filler);
    page
}

/// A cell of a migration that has failed.
const UNDO: &str = "undo";

/// How a cell is written, and where its arrows go.
fn cell<S: Copy + Debug>(cell: Cell<S>, ask: &[S]) -> (String, Vec<S>) {
    match cell {
        Cell::Go(to) => {
            let names: Vec<String> = to.iter().map(|state| format!("{state:?}")).collect();
            (names.join(" / "), to.to_vec())
        }
        Cell::GiveUp => (UNDO.to_owned(), Vec::new()),
        Cell::Ask => ("ask".to_owned(), ask.to_vec()),
        Cell::Ignore => ("-".to_owned(), Vec::new()),
    }
}

fn machine<S: Copy + Debug + PartialEq, K: Copy + Debug>(
    page: &mut String,
    name: &str,
    (states, kinds): (&[S], &[K]),
    cell: impl Fn(S, K) -> (String, Vec<S>),
) {
    // Writing to a String cannot fail.
    let _ = write!(page, "\n## {name}\n\n```mermaid\nstateDiagram-v2\n");
    if let Some(first) = states.first() {
        let _ = writeln!(page, "    [*] --> {first:?}");
    }
    for from in states {
        for (to, names) in arrows(*from, states, kinds, &cell) {
            let _ = writeln!(page, "    {from:?} --> {to:?} : {}", names.join(", "));
        }
    }
    page.push_str("```\n\n");
    let undoes = |from: &S| kinds.iter().any(|kind| cell(*from, *kind).0 == UNDO);
    if states.iter().any(undoes) {
        page.push_str(
            "Before Commit each state also leads to Stopping, Undoing or Ended by what says `undo` below.\n\n",
        );
    }
    page.push_str("| state |");
    for kind in kinds {
        let _ = write!(page, " {kind:?} |");
    }
    let _ = writeln!(page, "\n|---|{}", "---|".repeat(kinds.len()));
    for state in states {
        let _ = write!(page, "| {state:?} |");
        for kind in kinds {
            let _ = write!(page, " {} |", cell(*state, *kind).0);
        }
        page.push('\n');
    }
}

/// The arrows from a state to others, each with the inputs that lead along it.
fn arrows<S: Copy + Debug + PartialEq, K: Copy + Debug>(
    from: S,
    states: &[S],
    kinds: &[K],
    cell: impl Fn(S, K) -> (String, Vec<S>),
) -> Vec<(S, Vec<String>)> {
    let mut arrows = Vec::new();
    for to in states.iter().filter(|to| **to != from) {
        let leads = |kind: &&K| cell(from, **kind).1.contains(to);
        let names: Vec<String> = kinds.iter().filter(leads).map(|kind| format!("{kind:?}")).collect();
        if !names.is_empty() {
            arrows.push((*to, names));
        }
    }
    arrows
}
