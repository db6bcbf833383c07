//! The list of checks as data.

use std::collections::BTreeMap;

use serde::Deserialize;

/// One entry of `checks.json`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Check {
    /// How it is called in `--only`.
    pub(crate) name: String,
    /// What is known when it passes.
    pub(crate) proves: String,
    /// Program and arguments, run in the repository's root. This program's own subcommands go
    /// through cargo: the build check replaces the file that runs.
    #[serde(default)]
    pub(crate) command: Vec<String>,
    /// Environment variables on top of the caller's.
    #[serde(default)]
    pub(crate) env: BTreeMap<String, String>,
    /// Time after which it has failed.
    #[serde(default)]
    pub(crate) minutes: u64,
    /// Programs that must be there, and how to get them.
    #[serde(default)]
    pub(crate) needs: Vec<Need>,
    /// Whether its tests are the ones that the closing line counts.
    #[serde(default)]
    pub(crate) counts: bool,
    /// Fewer tests than this are a failure.
    #[serde(default)]
    pub(crate) min_tests: u64,
    /// Why it cannot run; reported, never passed over.
    pub(crate) not_run: Option<String>,
}

/// A program that a check needs.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Need {
    /// Its name on the path.
    pub(crate) program: String,
    /// The command that installs it.
    pub(crate) install: Vec<String>,
}

/// The checks of this tree.
pub(crate) fn load() -> serde_json::Result<Vec<Check>> {
    serde_json::from_str(include_str!("../../checks.json"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_is_sound() {
        let checks = load().unwrap();
        let mut names: Vec<&str> = checks.iter().map(|check| check.name.as_str()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), checks.len(), "names are unique");
        for check in &checks {
            assert!(!check.proves.is_empty(), "{}", check.name);
            // Either it runs, within some time, or it says why not.
            assert_eq!(check.command.is_empty(), check.not_run.is_some(), "{}", check.name);
            assert_eq!(check.minutes == 0, check.not_run.is_some(), "{}", check.name);
        }
        assert_eq!(checks.iter().filter(|check| check.counts).count(), 1, "one check counts the tests");
    }
}
