//! Option strings into the JSON they stand for, by the tables of the objects.

use super::text::{bracketed, bytes, number, range, split, unquote};
use crate::config::json::Node;
use crate::config::nearest::nearest;
use crate::config::reader::hint;
use crate::config::table::{Field, Need, Shape, Table, Word};
use crate::config::{Fault, FaultKind};

/// Keys of a rate limiter, which option strings flatten: key, bucket, field of the bucket.
pub(super) const LIMITER: &[(&str, &str, &str)] = &[
    ("bw_size", "bandwidth", "size"),
    ("bw_one_time_burst", "bandwidth", "one_time_burst"),
    ("bw_refill_time", "bandwidth", "refill_time"),
    ("ops_size", "ops", "size"),
    ("ops_one_time_burst", "ops", "one_time_burst"),
    ("ops_refill_time", "ops", "refill_time"),
];
/// The field that the keys above make up.
pub(super) const LIMITER_FIELD: &str = "rate_limiter_config";

/// Reads the text of one flag; `place` names it (`--disk[1]`) in faults.
pub(super) struct OptionReader<'f> {
    place: String,
    faults: &'f mut Vec<Fault>,
}

impl<'f> OptionReader<'f> {
    pub(super) fn new(place: String, faults: &'f mut Vec<Fault>) -> Self {
        Self { place, faults }
    }

    /// The object that `text` stands for, with the defaults that only option strings have.
    pub(super) fn object(&mut self, text: &str, table: &'static Table) -> Node {
        let mut entries: Vec<(String, Node)> = Vec::new();
        let mut limiter: Vec<(&str, Node)> = Vec::new();
        for piece in self.split(None, text, ',') {
            let (key, value) = match piece.split_once('=') {
                Some((key, value)) => (key, Some(value)),
                None => (piece, None),
            };
            self.piece(key, value, table, &mut entries, &mut limiter);
        }
        if !limiter.is_empty() {
            entries.push((LIMITER_FIELD.into(), limiter_of(&limiter)));
        }
        defaults(table, &mut entries);
        Node::Object(entries)
    }

    fn piece(
        &mut self,
        key: &str,
        value: Option<&str>,
        table: &'static Table,
        entries: &mut Vec<(String, Node)>,
        limiter: &mut Vec<(&'static str, Node)>,
    ) {
        let mut push = |reader: &mut Self, name: &str, node: Node| {
            if entries.iter().any(|(given, _)| given == name) {
                reader.fault(Some(key), FaultKind::Invalid, "given twice");
            } else {
                entries.push((name.into(), node));
            }
        };
        if let Some((mode, place)) = console_mode(key, value, table) {
            push(self, "mode", Node::Text(mode.into()));
            if let Some(place) = place {
                push(self, key, Node::Text(unquote(place)));
            }
        } else if let Some((key, ..)) = LIMITER.iter().find(|(known, ..)| *known == key && has_limiter(table))
        {
            if let Some(node) = self.value(key, value, Shape::Integer { min: 0, max: u64::MAX }) {
                limiter.push((key, node));
            }
        } else if let Some(field) = table.by_key(key) {
            if let Some(node) = self.value(key, value, (field.shape)()) {
                push(self, field.name, node);
            }
        } else if table.retired(key).is_some() {
            push(self, key, retired_value(value.unwrap_or_default()));
        } else {
            self.unknown(key, table);
        }
    }

    fn value(&mut self, key: &str, value: Option<&str>, shape: Shape) -> Option<Node> {
        match value {
            Some(text) => self.convert(key, text, shape),
            None => {
                self.fault(Some(key), FaultKind::Invalid, "needs a value");
                None
            }
        }
    }

    /// The value that `text` stands for; a fault is recorded at `key`.
    fn convert(&mut self, key: &str, text: &str, shape: Shape) -> Option<Node> {
        match shape {
            Shape::Bool => match text {
                "on" | "true" => Some(Node::Bool(true)),
                "off" | "false" => Some(Node::Bool(false)),
                _ => self.mismatch(key, "on or off", text),
            },
            Shape::Integer { min, max } => {
                let node = number(text).map(Node::Unsigned).or_else(|| negative(text));
                node.or_else(|| self.mismatch(key, &format!("a whole number from {min} to {max}"), text))
            }
            Shape::Bytes => {
                let node = bytes(text).map(Node::Unsigned);
                node.or_else(|| self.mismatch(key, "a number of bytes such as 4096, 512M or 1G", text))
            }
            Shape::Text | Shape::Path | Shape::Address => Some(Node::Text(unquote(text))),
            Shape::Choice(choice) => self.word(key, text, choice.words),
            Shape::List(element) => self.list(key, text, element()),
            Shape::Object(table) => self.tuple(key, text, table),
        }
    }

    fn word(&mut self, key: &str, text: &str, words: &'static [Word]) -> Option<Node> {
        let lower = text.to_lowercase();
        let spelled =
            |word: &&Word| word.option.contains(&lower.as_str()) || word.json.eq_ignore_ascii_case(text);
        if let Some(word) = words.iter().find(spelled) {
            return Some(Node::Text(word.json.into()));
        }
        let usual: Vec<&str> = words.iter().filter_map(|word| word.option.first().copied()).collect();
        let hint = nearest(&lower, usual.iter().copied()).map(hint).unwrap_or_default();
        let message = format!("expected one of {}, found {text:?}{hint}", usual.join(", "));
        self.fault(Some(key), FaultKind::Type, message);
        None
    }

    /// `[1,2-4]`, `[a,b]`, or one element without brackets; older releases separated numbers by colons.
    fn list(&mut self, key: &str, text: &str, element: Shape) -> Option<Node> {
        let numeric = matches!(element, Shape::Integer { .. });
        let pieces = match bracketed(text) {
            Some("") => Vec::new(),
            Some(inner) => self.split(Some(key), inner, ','),
            None if numeric => text.split(':').collect(),
            None => vec![text],
        };
        let mut items = Vec::new();
        for piece in pieces {
            match numeric.then(|| range(piece)).flatten() {
                Some(numbers) => items.extend(numbers.map(Node::Unsigned)),
                None if numeric && negative(piece).is_none() => {
                    return self.mismatch(key, "numbers and ranges such as [1,3-5]", text);
                }
                None => items.push(self.convert(key, piece, element)?),
            }
        }
        Some(Node::List(items))
    }

    /// An object inside an option string: `1:2:1:1`, `0@[1,2]`, or the names of features that are on.
    fn tuple(&mut self, key: &str, text: &str, table: &'static Table) -> Option<Node> {
        if table.fields.iter().all(|field| matches!((field.shape)(), Shape::Bool)) {
            return self.features(key, text, table);
        }
        let text = text.strip_prefix('(').and_then(|text| text.strip_suffix(')')).unwrap_or(text);
        let separator = if table.fields.len() == 2 { '@' } else { ':' };
        let parts = self.split(Some(key), text, separator);
        if parts.len() != table.fields.len() {
            let names: Vec<&str> = table.fields.iter().map(|field| field.name).collect();
            return self.mismatch(key, &names.join(&separator.to_string()), text);
        }
        let mut entries = Vec::new();
        for (field, part) in table.fields.iter().zip(parts) {
            entries.push((field.name.to_owned(), self.convert(key, part, (field.shape)())?));
        }
        Some(Node::Object(entries))
    }

    fn features(&mut self, key: &str, text: &str, table: &'static Table) -> Option<Node> {
        let known = |name: &str| table.fields.iter().any(|field: &Field| field.name == name);
        let names = match bracketed(text).unwrap_or(text) {
            "" => Vec::new(),
            names => self.split(Some(key), names, ','),
        };
        if let Some(bad) = names.iter().find(|name| !known(name)) {
            let all: Vec<&str> = table.fields.iter().map(|field| field.name).collect();
            return self.mismatch(key, &format!("features out of [{}]", all.join(",")), bad);
        }
        Some(Node::Object(names.into_iter().map(|name| (name.to_owned(), Node::Bool(true))).collect()))
    }

    fn unknown(&mut self, key: &str, table: &'static Table) {
        let limiter = LIMITER.iter().map(|(key, ..)| *key).filter(|_| has_limiter(table));
        let keys: Vec<&str> = table.keys().map(|field| field.key).chain(limiter).collect();
        let hint = match nearest(key, keys.iter().copied()) {
            Some(name) => hint(name),
            None => format!("; the keys are {}", keys.join(", ")),
        };
        self.fault(Some(key), FaultKind::Unknown, format!("unknown key{hint}"));
    }

    fn split<'t>(&mut self, key: Option<&str>, text: &'t str, separator: char) -> Vec<&'t str> {
        split(text, separator).unwrap_or_else(|problem| {
            self.fault(key, FaultKind::Syntax, problem);
            Vec::new()
        })
    }

    fn mismatch<T>(&mut self, key: &str, expected: &str, found: &str) -> Option<T> {
        self.fault(Some(key), FaultKind::Type, format!("expected {expected}, found {found:?}"));
        None
    }

    fn fault(&mut self, key: Option<&str>, kind: FaultKind, message: impl Into<String>) {
        let path = self.path(key);
        self.faults.push(Fault::new(path, kind, message));
    }

    fn path(&self, key: Option<&str>) -> String {
        match key {
            Some(key) => format!("{} {}", self.place, key.escape_debug()),
            None => self.place.clone(),
        }
    }
}

/// Adds what only JSON has to say: the required fields that have a default here.
fn defaults(table: &'static Table, entries: &mut Vec<(String, Node)>) {
    for field in table.fields.iter().filter(|field| field.need == Need::InJson) {
        if entries.iter().any(|(name, _)| name == field.name) {
            continue;
        }
        // As many vCPUs as boot, not the table's one.
        let boot = entries.iter().find(|(name, _)| field.name == "max_vcpus" && name == "boot_vcpus");
        let node = match boot {
            Some((_, boot)) => boot.clone(),
            None => node_of((field.default)()),
        };
        entries.push((field.name.into(), node));
    }
}

/// What `tty`, `file=PATH` and the like say of a console: its mode, and the place.
fn console_mode<'v>(
    key: &str,
    value: Option<&'v str>,
    table: &Table,
) -> Option<(&'static str, Option<&'v str>)> {
    let mode = table.by_name("mode")?;
    let Shape::Choice(choice) = (mode.shape)() else {
        return None;
    };
    let word = choice.words.iter().find(|word| word.option.contains(&key))?;
    let has_place = matches!(key, "file" | "socket");
    // A debug console has no socket.
    (has_place == value.is_some() && (!has_place || table.by_name(key).is_some()))
        .then_some((word.json, value))
}

fn has_limiter(table: &Table) -> bool {
    table.by_name(LIMITER_FIELD).is_some()
}

/// The limiter that flat keys stand for; a bucket without size or refill time does not exist.
fn limiter_of(given: &[(&str, Node)]) -> Node {
    let bucket = |bucket: &str| {
        let field = |(key, of, field): &(&str, &str, &str)| {
            let (_, node) = given.iter().find(|(given, _)| *of == bucket && given == key)?;
            Some(((*field).to_owned(), node.clone()))
        };
        let fields: Vec<_> = LIMITER.iter().filter_map(field).collect();
        let set = |name: &str| fields.iter().any(|(field, node)| field == name && *node != Node::Unsigned(0));
        (set("size") && set("refill_time")).then_some(Node::Object(fields))
    };
    let buckets = ["bandwidth", "ops"].into_iter();
    Node::Object(buckets.filter_map(|name| Some((name.to_owned(), bucket(name)?))).collect())
}

fn negative(text: &str) -> Option<Node> {
    text.parse::<i64>().ok().filter(|number| *number < 0).map(Node::Negative)
}

/// The value of a key whose shape is no longer known.
fn retired_value(text: &str) -> Node {
    match text {
        "on" | "true" => Node::Bool(true),
        "off" | "false" => Node::Bool(false),
        _ => bytes(text).map_or_else(|| Node::Text(text.into()), Node::Unsigned),
    }
}

/// A default as a node; defaults of fields that option strings may leave out are scalars.
fn node_of(value: serde_json::Value) -> Node {
    match value {
        serde_json::Value::Number(number) => number.as_u64().map_or(Node::Null, Node::Unsigned),
        serde_json::Value::String(text) => Node::Text(text),
        serde_json::Value::Bool(value) => Node::Bool(value),
        _ => Node::Null,
    }
}
