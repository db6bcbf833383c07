//! Reads a [`Node`] into wire types by their tables; every fault of the document is found in one pass.

use serde::de::{Deserialize, Deserializer, Error as _};

use super::fault::{Fault, FaultKind, MAX_FAULTS, UnknownFields, Warning, record};
use super::json::Node;
use super::nearest::nearest;
use super::path::Path;
use super::table::{Field, Need, Table, Word};
use super::wire::Wire;

/// The longest accepted array: an element takes far more memory than the bytes that ask for it.
const MAX_ITEMS: usize = 8192;

/// State of reading one source.
#[derive(Debug)]
pub(crate) struct Reader {
    path: Path,
    unknown: UnknownFields,
    faults: Vec<Fault>,
    warnings: Vec<Warning>,
}

/// The fields of one object that its source gives.
pub(crate) struct Found<'n> {
    table: &'static Table,
    entries: Vec<(&'static Field, &'n Node)>,
}

impl Reader {
    pub(crate) fn new(unknown: UnknownFields) -> Self {
        Self { path: Path::default(), unknown, faults: Vec::new(), warnings: Vec::new() }
    }

    /// What was found wrong or worth a warning.
    pub(crate) fn finish(self) -> (Vec<Fault>, Vec<Warning>) {
        (self.faults, self.warnings)
    }

    /// Records a fault at the present place.
    pub(crate) fn fault(&mut self, kind: FaultKind, message: impl Into<String>) {
        let path = self.path.render();
        record(&mut self.faults, Fault::new(path, kind, message));
    }

    /// Records a value of the wrong type.
    pub(crate) fn mismatch<T>(&mut self, expected: &str, found: &Node) -> Option<T> {
        self.fault(FaultKind::Type, format!("expected {expected}, found {}", found.describe()));
        None
    }

    /// Records a value that cannot be used.
    pub(crate) fn invalid<T>(&mut self, message: &str) -> Option<T> {
        self.fault(FaultKind::Invalid, message);
        None
    }

    /// Runs `read` at a place below the present one whose name comes from the source.
    pub(crate) fn at<R>(&mut self, name: &str, read: impl FnOnce(&mut Self) -> R) -> R {
        self.path.enter_foreign(name);
        let result = read(self);
        self.path.leave();
        result
    }

    /// Reads all elements; one with a fault is left out.
    pub(crate) fn items<T: Wire>(&mut self, nodes: &[Node]) -> Vec<T> {
        let mut items = Vec::new();
        if nodes.len() > MAX_ITEMS {
            self.fault(FaultKind::Invalid, format!("{} elements are more than {MAX_ITEMS}", nodes.len()));
            return items;
        }
        for (index, node) in nodes.iter().enumerate() {
            self.path.enter_item(index);
            items.extend(T::read(node, self));
            self.path.leave();
        }
        items
    }

    /// The JSON word that `node` says, if it is one of `words`.
    pub(crate) fn choice(&mut self, node: &Node, words: &'static [Word]) -> Option<&'static str> {
        let list = words.iter().map(|word| word.json).collect::<Vec<_>>().join(", ");
        let Node::Text(text) = node else {
            return self.mismatch(&format!("one of {list}"), node);
        };
        if let Some(word) = words.iter().find(|word| word.json == text) {
            return Some(word.json);
        }
        let hint = nearest(text, words.iter().map(|word| word.json)).map(hint).unwrap_or_default();
        self.fault(FaultKind::Type, format!("expected one of {list}, found {}{hint}", node.describe()));
        None
    }

    /// Sorts the entries of an object by its table.
    pub(crate) fn object<'n>(&mut self, node: &'n Node, table: &'static Table) -> Option<Found<'n>> {
        let Node::Object(entries) = node else {
            return self.mismatch("an object", node);
        };
        let mut found = Found { table, entries: Vec::new() };
        for (name, value) in entries {
            self.entry(name, value, &mut found);
        }
        Some(found)
    }

    /// Reads the field `name`, or answers with its default where it is absent or has a fault.
    pub(crate) fn field<T: Wire>(
        &mut self,
        found: &Found<'_>,
        name: &'static str,
        default: impl FnOnce() -> T,
    ) -> T {
        let value = self.enter(found, name).and_then(|node| T::read(node, self));
        self.path.leave();
        value.unwrap_or_else(default)
    }

    /// Goes to the field `name`, and says what is given for it. Apart from [`Self::field`], of which each field of the
    /// contract has a copy of its own.
    #[inline(never)]
    fn enter<'n>(&mut self, found: &Found<'n>, name: &'static str) -> Option<&'n Node> {
        self.path.enter_field(name);
        let field = found.table.by_name(name)?;
        let given = found.entries.iter().find(|(given, _)| given.name == field.name);
        if given.is_none() && field.need != Need::Optional {
            self.fault(FaultKind::Invalid, "is required, and missing");
        }
        given.map(|(_, node)| *node)
    }

    fn entry<'n>(&mut self, name: &str, value: &'n Node, found: &mut Found<'n>) {
        if let Some(field) = found.table.by_name(name) {
            if found.entries.iter().any(|(given, _)| given.name == field.name) {
                self.at(name, |reader| reader.fault(FaultKind::Invalid, "given twice"));
            } else {
                found.entries.push((field, value));
            }
        } else if let Some(retired) = found.table.retired(name) {
            if *value != Node::Null && !value.is_literal(retired.default) {
                let message = format!("no longer supported: {}", retired.why);
                self.at(name, |reader| reader.fault(FaultKind::Retired, message));
            }
        } else {
            self.unknown(name, found.table);
        }
    }

    fn unknown(&mut self, name: &str, table: &Table) {
        let warn = self.unknown == UnknownFields::Warn;
        // The search for the nearest name costs time; a full list has no use for it.
        let full = if warn { self.warnings.len() >= MAX_FAULTS } else { self.faults.len() > MAX_FAULTS };
        if full {
            return;
        }
        let names = table.fields.iter().flat_map(|field| field.aliases.iter().copied().chain([field.name]));
        let hint = nearest(name, names).map(hint).unwrap_or_default();
        self.at(name, |reader| {
            if warn {
                let path = reader.path.render();
                reader.warnings.push(Warning::new(path, format!("unknown field{hint} (ignored)")));
            } else {
                reader.fault(FaultKind::Unknown, format!("unknown field{hint}"));
            }
        });
    }
}

/// The tail of a message that names what was perhaps meant.
pub(crate) fn hint(name: &str) -> String {
    format!("; did you mean {name:?}?")
}

/// Reads a `T` through its table from any serde source; the error lists all faults.
pub(crate) fn deserialize<'de, T: Wire, D: Deserializer<'de>>(deserializer: D) -> Result<T, D::Error> {
    let node = Node::deserialize(deserializer)?;
    let mut reader = Reader::new(UnknownFields::Refuse);
    let value = T::read(&node, &mut reader);
    let (faults, _) = reader.finish();
    match value {
        Some(value) if faults.is_empty() => Ok(value),
        _ => {
            let faults: Vec<String> = faults.iter().map(Fault::to_string).collect();
            Err(D::Error::custom(faults.join("; ")))
        }
    }
}
