//! Schemas from shapes and tables.

use crate::config::older_fields;
use crate::config::table::{Choice, Field, Need, Retired, Shape, Status, Table};
use serde_json::{Map, Value, json};

/// The parts of the document that others refer to.
#[derive(Clone, Debug, Default)]
pub struct Components {
    schemas: Map<String, Value>,
    responses: Map<String, Value>,
}

impl Components {
    /// A reference to the schema `name`, which `make` makes unless it is there.
    pub fn schema(&mut self, name: &str, make: impl FnOnce(&mut Self) -> Value) -> Value {
        if !self.schemas.contains_key(name) {
            // The place is taken first: a schema may refer to itself.
            self.schemas.insert(name.to_owned(), Value::Null);
            let schema = make(self);
            self.schemas.insert(name.to_owned(), schema);
        }
        json!({ "$ref": format!("#/components/schemas/{name}") })
    }

    /// A reference to the response `name`, which `make` makes unless it is there.
    pub(super) fn response(&mut self, name: &str, make: impl FnOnce(&mut Self) -> Value) -> Value {
        if !self.responses.contains_key(name) {
            let response = make(self);
            self.responses.insert(name.to_owned(), response);
        }
        json!({ "$ref": format!("#/components/responses/{name}") })
    }

    /// A reference to the object with this table.
    pub fn object(&mut self, table: &'static Table) -> Value {
        self.schema(table.name, |components| components.make_object(table))
    }

    /// The schema of a value of this shape.
    pub fn shape(&mut self, shape: Shape) -> Value {
        match shape {
            Shape::Bool => json!({ "type": "boolean" }),
            Shape::Integer { min, max } => {
                json!({ "type": "integer", "format": format_of(min, max), "minimum": min, "maximum": max })
            }
            Shape::Bytes => {
                json!({ "type": "integer", "format": "uint64", "minimum": 0, "maximum": u64::MAX })
            }
            Shape::Text => json!({ "type": "string" }),
            // Not empty, and without a NUL character.
            Shape::Path => json!({ "type": "string", "minLength": 1, "pattern": "^[^\\u0000]+$" }),
            Shape::Address => {
                json!({ "type": "string", "anyOf": [{ "format": "ipv4" }, { "format": "ipv6" }] })
            }
            Shape::Choice(choice) => self.choice(choice),
            Shape::List(element) => {
                let items = self.shape(element());
                json!({ "type": "array", "items": items })
            }
            Shape::Object(table) => self.object(table),
        }
    }

    pub(super) fn finish(self) -> Value {
        json!({ "schemas": self.schemas, "responses": self.responses })
    }

    fn choice(&mut self, choice: &'static Choice) -> Value {
        self.schema(choice.name, |_| {
            let words: Vec<&str> = choice.words.iter().map(|word| word.json).collect();
            let meanings: Vec<String> =
                choice.words.iter().map(|word| format!("`{}`: {}", word.json, word.doc)).collect();
            json!({
                "type": "string",
                "enum": words,
                "description": format!("{} {}", choice.doc, meanings.join(" ")),
            })
        })
    }

    fn make_object(&mut self, table: &'static Table) -> Value {
        let mut properties = Map::new();
        for field in table.fields {
            properties.insert(field.name.to_owned(), self.field(field));
            for alias in field.aliases {
                properties.insert((*alias).to_owned(), self.alias(field));
            }
        }
        for (name, older) in older_fields(table) {
            let object = self.object(older);
            let text = format!("Older form of `payload.{name}`.");
            properties.insert((*name).to_owned(), annotated(object, &text, true, true));
        }
        for retired in table.retired {
            properties.insert(retired.name.to_owned(), retired_field(retired));
        }
        let mut object = json!({
            "type": "object",
            "description": table.doc,
            "properties": properties,
            "additionalProperties": false,
        });
        let needed = || table.fields.iter().filter(|field| field.need != Need::Optional);
        let required: Vec<&str> =
            needed().filter(|field| field.aliases.is_empty()).map(|field| field.name).collect();
        // An empty list is not allowed.
        if !required.is_empty() {
            insert(&mut object, "required", json!(required));
        }
        // What has an older name may be given by that.
        let by_any_name = |field: &Field| {
            let names = field.aliases.iter().chain([&field.name]);
            json!({ "anyOf": names.map(|name| json!({ "required": [name] })).collect::<Vec<_>>() })
        };
        let named: Vec<Value> = needed().filter(|field| !field.aliases.is_empty()).map(by_any_name).collect();
        if !named.is_empty() {
            insert(&mut object, "allOf", json!(named));
        }
        object
    }

    fn field(&mut self, field: &Field) -> Value {
        let schema = self.shape((field.shape)());
        let mut schema = annotated(schema, field.doc.trim(), field.nullable, false);
        if let Some((least, most)) = field.range {
            insert(&mut schema, "minimum", json!(least));
            insert(&mut schema, "maximum", json!(most));
        }
        let default = (field.default)();
        // What must be given has a value to start from, but no default.
        if field.need == Need::Optional && !default.is_null() {
            insert(&mut schema, "default", default);
        }
        if field.status == Status::Later {
            insert(&mut schema, "x-later", Value::Bool(true));
        }
        schema
    }

    fn alias(&mut self, field: &Field) -> Value {
        let schema = self.shape((field.shape)());
        annotated(schema, &format!("Older name of `{}`.", field.name), field.nullable, true)
    }
}

/// `schema` with what is said of one use of it. Beside a reference nothing may stand, so that is wrapped.
fn annotated(schema: Value, description: &str, nullable: bool, deprecated: bool) -> Value {
    let mut schema = if schema.get("$ref").is_some() { json!({ "allOf": [schema] }) } else { schema };
    insert(&mut schema, "description", json!(description));
    if nullable {
        insert(&mut schema, "nullable", Value::Bool(true));
    }
    if deprecated {
        insert(&mut schema, "deprecated", Value::Bool(true));
    }
    schema
}

fn retired_field(retired: &Retired) -> Value {
    let value = match retired.default {
        // A string is told without its quotes.
        "[]" => json!([]),
        text => serde_json::from_str(text).unwrap_or_else(|_| json!(text)),
    };
    let values = if value.is_null() { json!([null]) } else { json!([value, null]) };
    json!({
        "description": format!("Of older releases; ignored at this value. Now: {}.", retired.why),
        "nullable": true,
        "deprecated": true,
        "enum": values,
    })
}

fn insert(schema: &mut Value, key: &str, value: Value) {
    if let Value::Object(schema) = schema {
        schema.insert(key.to_owned(), value);
    }
}

/// The format of the narrowest integer type with these bounds, by the names of the OpenAPI format registry.
fn format_of(min: i64, max: u64) -> &'static str {
    match (min, max) {
        (0, max) if max <= u8::MAX.into() => "uint8",
        (0, max) if max <= u16::MAX.into() => "uint16",
        (0, max) if max <= u32::MAX.into() => "uint32",
        (0, _) => "uint64",
        (min, max) if min >= i32::MIN.into() && max <= i32::MAX as u64 => "int32",
        _ => "int64",
    }
}
