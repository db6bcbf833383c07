//! The tests that `docs/hardening.md` names are in the tree: the list does not outlive them.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// Names of all functions in the Rust files below `folder`.
fn functions(folder: &Path, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
        if entry.is_dir() {
            functions(&entry, found);
        } else if entry.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&entry).unwrap();
            let names = text.lines().filter_map(|line| line.trim_start().strip_prefix("fn "));
            found.extend(names.map(|name| name.split(['(', '<']).next().unwrap().to_owned()));
        }
    }
}

/// What is quoted in the third column of the tables.
fn tests_of(document: &str) -> Vec<&str> {
    let rows = document.lines().filter(|line| line.starts_with("| "));
    let cells = rows.filter_map(|row| row.split(" | ").nth(2));
    cells.flat_map(|cell| cell.split('`').skip(1).step_by(2)).collect()
}

#[test]
fn the_list_of_defects_names_tests_that_are_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut found = BTreeSet::new();
    for folder in ["bins", "crates", "tests"] {
        functions(&root.join(folder), &mut found);
    }
    let document = fs::read_to_string(root.join("docs/hardening.md")).unwrap();
    let named = tests_of(&document);
    assert!(named.len() > 20, "{named:?}");
    let absent: Vec<_> = named.iter().filter(|name| !found.contains(**name)).collect();
    assert!(absent.is_empty(), "tests that docs/hardening.md names and nobody has: {absent:?}");
}

#[test]
fn only_the_tests_column_counts() {
    let document =
        "| row | defect | tests | seen |\n| 1 | `a` | `b` (x), `c` | `d` |\ntext `e` | `f` | `g`\n";
    assert_eq!(tests_of(document), ["b", "c"]);
}
