//! Compiles the filters of system calls, `seccomp/*.json`, into the programs that the binary holds, so that nothing of
//! it is left to be done at run time. `docs/security.md` explains the files.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};
use serde::Deserialize;
use serde::de::DeserializeOwned;

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

/// When a call is allowed: one of these holds for its argument; an empty set is always.
type Tests = BTreeSet<(u8, Test)>;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Test {
    Equals(u32),
    Without(u32),
}

/// What a thread may do, by number of the system call.
type Permissions = BTreeMap<i64, Tests>;

struct Sources {
    files: BTreeMap<String, Source>,
    syscalls: BTreeMap<String, i64>,
    constants: BTreeMap<String, String>,
}

fn main() -> Result<()> {
    println!("cargo::rerun-if-changed=seccomp");
    let sources = Sources::read(Path::new("seccomp"))?;
    let mut text = String::from("pub(super) static FILTERS: &[Filter] = &[\n");
    for kind in sources.files.keys().filter(|kind| *kind != BASE) {
        let mut permissions = Permissions::new();
        sources.collect(kind, &mut permissions).map_err(|error| format!("seccomp/{kind}.json: {error}"))?;
        let count = permissions.len();
        let program = compile(permissions)?;
        writeln!(text, "Filter {{ kind: {kind:?}, syscalls: {count}, program: &[")?;
        for seccompiler::sock_filter { code, jt, jf, k } in program {
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

    /// Adds what `file` and the files that it includes allow.
    fn collect(&self, file: &str, all: &mut Permissions) -> Result<()> {
        let source = self.files.get(file).ok_or_else(|| format!("there is no {file}.json"))?;
        for included in &source.includes {
            self.collect(included, all)?;
        }
        for name in source.allow.values().flatten() {
            let tests = all.entry(self.number(name)?).or_default();
            if !tests.is_empty() {
                return Err(format!("{name} is allowed always, and for some arguments").into());
            }
        }
        for rule in &source.allow_if {
            let name = &rule.syscall;
            let tests = all.entry(self.number(name)?);
            let new = matches!(tests, std::collections::btree_map::Entry::Vacant(_));
            let tests = tests.or_default();
            if !new && tests.is_empty() {
                return Err(format!("{name} is allowed always, and for some arguments").into());
            }
            for constant in &rule.one_of {
                tests.insert((rule.argument, Test::Equals(self.constant(constant)?)));
            }
            if let Some(constant) = &rule.without {
                tests.insert((rule.argument, Test::Without(self.constant(constant)?)));
            }
            if tests.is_empty() {
                return Err(format!("a rule for {name} says neither one_of nor without").into());
            }
        }
        Ok(())
    }

    fn number(&self, name: &str) -> Result<i64> {
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

/// The program that allows these and traps all others.
fn compile(permissions: Permissions) -> Result<BpfProgram> {
    let mut rules = BTreeMap::new();
    for (number, tests) in permissions {
        let tests: Result<Vec<SeccompRule>> = tests.into_iter().map(rule).collect();
        rules.insert(number, tests?);
    }
    let filter = SeccompFilter::new(rules, SeccompAction::Trap, SeccompAction::Allow, TargetArch::x86_64)?;
    Ok(filter.try_into()?)
}

fn rule((argument, test): (u8, Test)) -> Result<SeccompRule> {
    let (operator, value) = match test {
        Test::Equals(value) => (SeccompCmpOp::Eq, value),
        Test::Without(bits) => (SeccompCmpOp::MaskedEq(bits.into()), 0),
    };
    let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value.into())?;
    Ok(SeccompRule::new(vec![condition])?)
}

/// Names by number; numbers without a system call have none.
fn names(syscalls: &BTreeMap<String, i64>) -> Result<Vec<&str>> {
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
