//! The OpenAPI 3.0 document of the API, made from the command table and the wire types, and the page of error codes.
//!
//! Nothing here is a second list: routes, phases and refusals come from the commands and from `vmm-state`, names, types,
//! defaults and bounds from the tables that read configurations, codes and statuses from [`Code`]. What a type looks
//! like is said by [`Described`].

mod errors;
mod operation;
mod replies;
mod schema;

pub use errors::errors_markdown;
pub use operation::Operation;
pub use schema::Components;

use crate::config::wire::Wire;
use crate::error::Code;
use crate::events::EVENTS_ROUTE;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

/// A payload whose form on the wire can be told.
pub trait Described {
    /// What a client is answered whose payload is not of this type.
    const FAULTS: &'static [Code] = &[];

    /// The form.
    fn form(components: &mut Components) -> Form;
}

/// The form of a payload.
#[derive(Clone, Debug, PartialEq)]
pub enum Form {
    /// There is none.
    Nothing,
    /// Always JSON of this schema.
    Always(Value),
    /// JSON of this schema, or nothing.
    Sometimes(Value),
    /// Text.
    Text {
        /// Its media type.
        media_type: &'static str,
    },
}

/// What can be wrong with an object that is read by its table.
pub const TABLE_FAULTS: &[Code] =
    &[Code::MalformedBody, Code::UnknownField, Code::InvalidConfig, Code::NotBuilt];

impl Described for () {
    fn form(_components: &mut Components) -> Form {
        Form::Nothing
    }
}

/// The objects of the contract.
impl<T: Wire> Described for T {
    const FAULTS: &'static [Code] = TABLE_FAULTS;

    fn form(components: &mut Components) -> Form {
        Form::Always(components.shape(T::shape()))
    }
}

/// The document of a table, and of the stream of events: the same rows in any order give the same document.
#[must_use]
pub fn document(operations: &[Operation]) -> Value {
    let mut components = Components::default();
    let mut paths: BTreeMap<String, Map<String, Value>> = BTreeMap::new();
    for operation in operations {
        let path = paths.entry(format!("/{}", operation.name)).or_default();
        path.insert(operation.method.name().to_ascii_lowercase(), operation.describe(&mut components));
    }
    let events = Map::from_iter([("get".to_owned(), operation::events(&mut components))]);
    paths.insert(format!("/{EVENTS_ROUTE}"), events);
    json!({
        "openapi": "3.0.3",
        "info": {
            "title": "VMM API",
            "description": "The REST API of the VMM over HTTP on a UNIX socket. Paths, methods and names are Cloud \
                Hypervisor's. `x-phases` lists the phases of the VM in which a request is accepted, `x-codes` the \
                stable codes of an answer, `x-later` marks what this build does not have yet. Errors are an array \
                of strings, or RFC 9457 problem details for a client that accepts JSON by name.",
            "license": { "name": "Apache-2.0 OR BSD-3-Clause" },
            "version": env!("CARGO_PKG_VERSION"),
        },
        "servers": [{ "url": "http://localhost/api/v1" }],
        "paths": paths,
        "components": components.finish(),
    })
}
