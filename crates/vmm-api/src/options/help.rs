//! Help texts from the tables.

use std::fmt::Write as _;

use serde_json::Value;

use super::value::LIMITER;
use super::{Flag, value};
use crate::config::Bytes;
use crate::config::table::{Field, Need, Shape, Status, Table};

/// The keys of a flag's option string with their values and defaults, one a line; `None` if it has none.
#[must_use]
pub fn help_for(flag: &str) -> Option<String> {
    let flag = Flag::by_name(flag)?;
    let table = flag.table()?;
    let mut text = String::new();
    // Writing to a String cannot fail.
    if let Some(mode) = table.by_name("mode") {
        let _ = writeln!(text, "off|null|tty|pty|file=<path>{}", sockets(table));
        let _ = writeln!(text, "    {}{}", mode.doc.trim(), default_of(mode));
    }
    let shown = |field: &&Field| {
        !(table.by_name("mode").is_some() && matches!(field.key, "mode" | "file" | "socket"))
    };
    for field in table.keys().filter(shown).filter(|field| field.status == Status::Current) {
        let _ = writeln!(text, "{}={}", field.key, values(field.key, (field.shape)()));
        let _ = writeln!(text, "    {}{}", field.doc.trim(), default_of(field));
    }
    if let Some(limiter) = table.by_name(value::LIMITER_FIELD).filter(|field| field.status == Status::Current)
    {
        let keys: Vec<&str> = LIMITER.iter().map(|(key, ..)| *key).collect();
        let _ = writeln!(text, "{}=<number>\n    {}", keys.join("=, "), limiter.doc.trim());
    }
    let later: Vec<&str> =
        table.keys().filter(|f| f.status == Status::Later).map(|field| field.key).collect();
    if !later.is_empty() {
        let _ = writeln!(text, "Not in this build yet, accepted at their defaults: {}", later.join(", "));
    }
    Some(text)
}

fn sockets(table: &Table) -> &'static str {
    if table.by_name("socket").is_some() { "|socket=<path>" } else { "" }
}

/// What may stand after the `=`.
fn values(key: &str, shape: Shape) -> String {
    match shape {
        Shape::Bool => "on|off".into(),
        Shape::Integer { .. } => "<number>".into(),
        Shape::Bytes => "<size>".into(),
        Shape::Text => format!("<{key}>"),
        Shape::Path => "<path>".into(),
        Shape::Address => "<address>".into(),
        Shape::Choice(choice) => {
            choice.words.iter().filter_map(|word| word.option.first().copied()).collect::<Vec<_>>().join("|")
        }
        Shape::List(element) => match element() {
            Shape::Integer { .. } => "[<number>,<first>-<last>,..]".into(),
            element => format!("[{},..]", values(key, element)),
        },
        Shape::Object(table) if table.fields.iter().all(|field| matches!((field.shape)(), Shape::Bool)) => {
            format!("[{}]", table.fields.iter().map(|field| field.name).collect::<Vec<_>>().join(","))
        }
        Shape::Object(table) => {
            let separator = if table.fields.len() == 2 { "@" } else { ":" };
            let part = |field: &Field| match (field.shape)() {
                Shape::List(_) => format!("[<{}>,..]", field.name),
                _ => format!("<{}>", field.name),
            };
            table.fields.iter().map(part).collect::<Vec<_>>().join(separator)
        }
    }
}

fn default_of(field: &Field) -> String {
    if field.need == Need::Always && field.name != "mode" {
        return " [required]".into();
    }
    let text = match (field.default)() {
        // As many as boot.
        _ if field.name == "max_vcpus" => "boot".into(),
        Value::Bool(true) => "on".into(),
        Value::Bool(false) => "off".into(),
        Value::Number(number) => match ((field.shape)(), number.as_u64()) {
            (Shape::Bytes, Some(bytes)) => Bytes(bytes).to_string(),
            _ => number.to_string(),
        },
        Value::String(text) => match (field.shape)() {
            Shape::Choice(choice) => {
                let word = choice.words.iter().find(|word| word.json == text);
                word.and_then(|word| word.option.first()).map_or(text, |option| (*option).to_owned())
            }
            _ => text,
        },
        _ => return String::new(),
    };
    format!(" [default: {text}]")
}
