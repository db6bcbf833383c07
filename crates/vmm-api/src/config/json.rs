//! A bounded JSON reader that keeps what `serde_json::Value` loses: order and duplicate keys.

use std::fmt;

use serde::de::{Deserialize, DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};

use super::fault::{Fault, FaultKind};

/// The largest accepted document in bytes.
pub const MAX_DOCUMENT: usize = 1 << 20;
/// The deepest accepted nesting of arrays and objects.
pub const MAX_DEPTH: usize = 64;

/// A JSON value.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Node {
    Null,
    Bool(bool),
    Unsigned(u64),
    Negative(i64),
    Float(f64),
    Text(String),
    List(Vec<Node>),
    Object(Vec<(String, Node)>),
}

impl Node {
    /// Reads one document; a fault has line and column.
    pub(crate) fn parse(json: &[u8]) -> Result<Self, Fault> {
        if json.len() > MAX_DOCUMENT {
            let message = format!("document of {} bytes is larger than {MAX_DOCUMENT} bytes", json.len());
            return Err(Fault::new("$", FaultKind::Syntax, message));
        }
        let mut deserializer = serde_json::Deserializer::from_slice(json);
        NodeSeed { depth: 0 }
            .deserialize(&mut deserializer)
            .and_then(|node| deserializer.end().map(|()| node))
            .map_err(|error| Fault::new("$", FaultKind::Syntax, format!("broken JSON: {error}")))
    }

    /// What a message calls this value: its type, and the value itself where that is short.
    pub(crate) fn describe(&self) -> String {
        match self {
            Self::Null => "null".into(),
            Self::Bool(value) => value.to_string(),
            Self::Unsigned(value) => value.to_string(),
            Self::Negative(value) => value.to_string(),
            Self::Float(value) => value.to_string(),
            Self::Text(text) if text.chars().count() <= 40 => format!("the string {text:?}"),
            Self::Text(_) => "a string".into(),
            Self::List(_) => "an array".into(),
            Self::Object(_) => "an object".into(),
        }
    }

    /// Whether this scalar is written `text` in JSON (strings without their quotes).
    pub(crate) fn is_literal(&self, text: &str) -> bool {
        match self {
            Self::Text(value) => value == text,
            Self::List(items) => items.is_empty() && text == "[]",
            Self::Object(_) => false,
            other => other.describe() == text,
        }
    }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        NodeSeed { depth: 0 }.deserialize(deserializer)
    }
}

/// Builds a [`Node`] while counting the nesting.
#[derive(Clone, Copy)]
struct NodeSeed {
    depth: usize,
}

impl NodeSeed {
    fn deeper<E: Error>(self) -> Result<Self, E> {
        if self.depth >= MAX_DEPTH {
            return Err(E::custom(format_args!("nested deeper than {MAX_DEPTH} levels")));
        }
        Ok(Self { depth: self.depth + 1 })
    }
}

impl<'de> DeserializeSeed<'de> for NodeSeed {
    type Value = Node;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Node, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for NodeSeed {
    type Value = Node;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any JSON value")
    }

    fn visit_unit<E: Error>(self) -> Result<Node, E> {
        Ok(Node::Null)
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Node, E> {
        Ok(Node::Bool(value))
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Node, E> {
        Ok(Node::Unsigned(value))
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Node, E> {
        Ok(u64::try_from(value).map_or(Node::Negative(value), Node::Unsigned))
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Node, E> {
        Ok(Node::Float(value))
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Node, E> {
        Ok(Node::Text(value.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Node, A::Error> {
        let seed = self.deeper()?;
        let mut items = Vec::new();
        while let Some(item) = access.next_element_seed(seed)? {
            items.push(item);
        }
        Ok(Node::List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Node, A::Error> {
        let seed = self.deeper()?;
        let mut entries = Vec::new();
        while let Some(key) = access.next_key::<String>()? {
            entries.push((key, access.next_value_seed(seed)?));
        }
        Ok(Node::Object(entries))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_order_and_duplicates() {
        let node = Node::parse(br#"{"b": 1, "a": -2, "b": [null, 1.5, "x"]}"#).unwrap();
        let Node::Object(entries) = node else { panic!("not an object") };
        let keys: Vec<&str> = entries.iter().map(|(key, _)| key.as_str()).collect();
        assert_eq!(keys, ["b", "a", "b"]);
        assert_eq!(entries[1].1, Node::Negative(-2));
        assert_eq!(entries[2].1, Node::List(vec![Node::Null, Node::Float(1.5), Node::Text("x".into())]));
    }

    #[test]
    fn names_line_and_column() {
        for (json, place) in [
            ("{\n  \"a\": trux\n}", "line 2 column 11"),
            ("", "line 1 column 0"),
            ("{\"a\":1} x", "line 1 column 9"),
            ("{\"a\":1", "line 1 column 6"),
            ("{\"a\":1e999}", "line 1"),
        ] {
            let fault = Node::parse(json.as_bytes()).unwrap_err();
            assert_eq!((fault.path.as_str(), fault.kind), ("$", FaultKind::Syntax));
            assert!(fault.message.contains(place), "{json:?}: {fault}");
        }
        assert_eq!(Node::parse(b"\xff\xfe").unwrap_err().kind, FaultKind::Syntax);
    }

    #[test]
    fn bounds_nesting_and_size() {
        let nested = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        assert!(Node::parse(nested(MAX_DEPTH).as_bytes()).is_ok());
        let fault = Node::parse(nested(MAX_DEPTH + 1).as_bytes()).unwrap_err();
        assert!(fault.message.contains("deeper than 64 levels"), "{fault}");
        let objects = "{\"a\":".repeat(MAX_DEPTH + 1);
        assert!(Node::parse(objects.as_bytes()).unwrap_err().message.contains("deeper"));

        let padded = |len: usize| format!("[{}]", " ".repeat(len - 2));
        assert!(Node::parse(padded(MAX_DOCUMENT).as_bytes()).is_ok());
        assert!(Node::parse(padded(MAX_DOCUMENT + 1).as_bytes()).unwrap_err().message.contains("larger"));
    }
}
