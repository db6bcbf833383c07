//! Compiles the filters of system calls, `seccomp/*.json`, into the programs that the binary holds, so that nothing of
//! it is left to be done at run time. `docs/security.md` explains the files. And says how the binary is linked.

mod bpf;
mod link;

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;

use bpf::{Permissions, Test, Tests};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Only included by others.
const BASE: &str = "base";
const SYSCALLS: &str = "syscalls";
const CONSTANTS: &str = "constants";

/// One file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Source {
    /// For its reader, as all reasons.
    #[serde(rename = "about")]
    _about: String,
    /// Files whose permissions it has, too.
    #[serde(default)]
    includes: Vec<String>,
    /// System calls by reason.
    #[serde(default)]
    allow: BTreeMap<String, Vec<String>>,
    /// System calls for some arguments only.
    #[serde(default)]
    allow_if: Vec<Conditional>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Conditional {
    #[serde(rename = "why")]
    _why: String,
    syscall: String,
    argument: u8,
    /// The argument's low 32 bits are one of these constants.
    #[serde(default)]
    one_of: Vec<String>,
    /// The argument has none of this constant's bits.
    without: Option<String>,
}

struct Sources {
    files: BTreeMap<String, Source>,
    syscalls: BTreeMap<String, u32>,
    constants: BTreeMap<String, String>,
}

fn main() -> Result<()> {
    println!("cargo::rerun-if-changed=seccomp");
    link::set()?;
    let sources = Sources::read(Path::new("seccomp"))?;
    let mut text = String::from("pub(super) static FILTERS: &[Filter] = &[\n");
    for kind in sources.files.keys().filter(|kind| *kind != BASE) {
        let mut permissions = Permissions::new();
        sources.collect(kind, &mut permissions).map_err(|error| format!("seccomp/{kind}.json: {error}"))?;
        let count = permissions.len();
        writeln!(text, "Filter {{ kind: {kind:?}, syscalls: {count}, program: &[")?;
        for (code, jt, jf, k) in bpf::program(&permissions) {
            write!(text, "sock_filter {{ code: {code}, jt: {jt}, jf: {jf}, k: {k} }},")?;
        }
        writeln!(text, "] }},")?;
    }
    writeln!(text, "];")?;
    writeln!(text, "/// Names of system calls, by number.")?;
    writeln!(text, "static NAMES: &[&str] = &{:?};", names(&sources.syscalls)?)?;
    fs::write(PathBuf::from(std::env::var_os("OUT_DIR").ok_or("no OUT_DIR")?).join("filters.rs"), text)?;
    Ok(())
}

impl Sources {
    fn read(folder: &Path) -> Result<Self> {
        let mut files = BTreeMap::new();
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            let stem = path.file_stem().and_then(|stem| stem.to_str()).ok_or("a name that is no text")?;
            if ![SYSCALLS, CONSTANTS].contains(&stem) {
                files.insert(stem.to_owned(), parse(folder, stem)?);
            }
        }
        let sources =
            Self { files, syscalls: parse(folder, SYSCALLS)?, constants: parse(folder, CONSTANTS)? };
        sources.refuse_unused_constants()?;
        Ok(sources)
    }

    /// What is listed and not used is left over from something, or a misspelling of it.
    fn refuse_unused_constants(&self) -> Result<()> {
        let rules = || self.files.values().flat_map(|file| &file.allow_if);
        let used: BTreeSet<_> = rules().flat_map(|rule| rule.one_of.iter().chain(&rule.without)).collect();
        match self.constants.keys().find(|name| !used.contains(name)) {
            Some(name) => Err(format!("seccomp/{CONSTANTS}.json: nothing uses {name}").into()),
            None => Ok(()),
        }
    }

    /// Adds what `file` and the files that it includes allow. Tests are made in this order.
    fn collect(&self, file: &str, all: &mut Permissions) -> Result<()> {
        let source = self.files.get(file).ok_or_else(|| format!("there is no {file}.json"))?;
        let twice = |name: &str| format!("{name} is allowed always, and for some arguments");
        for name in source.allow.values().flatten() {
            if !all.entry(self.number(name)?).or_default().is_empty() {
                return Err(twice(name).into());
            }
        }
        for rule in &source.allow_if {
            let tests = self.tests(rule)?;
            match all.entry(self.number(&rule.syscall)?) {
                Entry::Vacant(entry) => drop(entry.insert(tests)),
                Entry::Occupied(entry) if entry.get().is_empty() => return Err(twice(&rule.syscall).into()),
                Entry::Occupied(mut entry) => {
                    let known = entry.get_mut();
                    let new: Tests = tests.into_iter().filter(|test| !known.contains(test)).collect();
                    known.extend(new);
                }
            }
        }
        source.includes.iter().try_for_each(|included| self.collect(included, all))
    }

    fn tests(&self, rule: &Conditional) -> Result<Tests> {
        let mut tests = Tests::new();
        for constant in &rule.one_of {
            tests.push((rule.argument, Test::Equals(self.constant(constant)?)));
        }
        if let Some(constant) = &rule.without {
            tests.push((rule.argument, Test::Without(self.constant(constant)?)));
        }
        match tests.is_empty() || rule.argument > 5 {
            true => Err(format!("a rule for {} tests nothing that there is", rule.syscall).into()),
            false => Ok(tests),
        }
    }

    fn number(&self, name: &str) -> Result<u32> {
        Ok(*self.syscalls.get(name).ok_or_else(|| format!("there is no system call {name}"))?)
    }

    fn constant(&self, name: &str) -> Result<u32> {
        let text = self.constants.get(name).ok_or_else(|| format!("{CONSTANTS}.json lacks {name}"))?;
        Ok(u32::from_str_radix(text.trim_start_matches("0x"), 16)?)
    }
}

fn parse<T: DeserializeOwned>(folder: &Path, stem: &str) -> Result<T> {
    let path = folder.join(format!("{stem}.json"));
    let text = fs::read_to_string(&path)?;
    serde_json::from_str(&text).map_err(|error| format!("{}: {error}", path.display()).into())
}

/// Names by number; numbers without a system call have none.
fn names(syscalls: &BTreeMap<String, u32>) -> Result<Vec<&str>> {
    let mut names = Vec::new();
    for (name, number) in syscalls {
        let number = usize::try_from(*number)?;
        if names.len() <= number {
            names.resize(number + 1, "");
        }
        match names.get_mut(number) {
            Some(slot) if slot.is_empty() => *slot = name.as_str(),
            _ => return Err(format!("seccomp/{SYSCALLS}.json: {name} has the number of another").into()),
        }
    }
    Ok(names)
}
