//! What the document says of one command.

use crate::command::{Command, Method};
use crate::error::{Code, Problem, reason_phrase};
use crate::events::{EventRoute, Journal};
use crate::http::stream::StreamRoute;
use crate::openapi::{Components, Described, Form};
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, BTreeSet};
use vmm_state::{Action, Admission, Phase, admit};

/// What any request can be answered, whatever its route: the bounds of the server, and failures nobody expects.
const ANY_REQUEST: &[Code] = &[
    Code::MalformedRequest,
    Code::TooManyDescriptors,
    Code::RequestTimeout,
    Code::LengthRequired,
    Code::BodyTooLarge,
    Code::ExpectationFailed,
    Code::HeadTooLarge,
    Code::UnsupportedCoding,
    Code::UnsupportedVersion,
    Code::TooManyRequests,
    Code::Internal,
];

/// One command as data, without its host.
#[derive(Clone, Copy, Debug)]
pub struct Operation {
    /// The route below `/api/v1/`.
    pub(super) name: &'static str,
    pub(super) method: Method,
    action: Action,
    doc: &'static str,
    request: fn(&mut Components) -> Form,
    reply: fn(&mut Components) -> Form,
    /// What is wrong with a request that does not decode.
    faults: &'static [Code],
    /// What the command itself can fail with.
    failures: &'static [Code],
}

impl Operation {
    /// The operation of `C`.
    #[must_use]
    pub const fn of<C: Command>() -> Self {
        Self {
            name: C::NAME,
            method: C::METHOD,
            action: C::ACTION,
            doc: C::DOC,
            request: C::Request::form,
            reply: C::Reply::form,
            faults: C::Request::FAULTS,
            failures: C::FAILURES,
        }
    }

    /// The contract's way to name operations: `bootVM`, `shutdownVMM`.
    fn id(&self) -> String {
        let verb = match self.method {
            Method::Get => "get-",
            Method::Put => "",
        };
        let (whose, what) = self.name.split_once('.').unwrap_or(("", self.name));
        format!("{verb}{what}{}", whose.to_ascii_uppercase())
    }

    /// Every code that this command can be answered with.
    #[must_use]
    pub fn codes(&self) -> BTreeSet<Code> {
        let refusals = Phase::ALL.into_iter().filter_map(|phase| match admit(phase, self.action) {
            Admission::Refused(refusal) => Some(Code::of(refusal.reason)),
            Admission::Run(_) | Admission::Nothing | Admission::Wait => None,
        });
        let lists = [ANY_REQUEST, self.faults, self.failures];
        lists.into_iter().flatten().copied().chain(refusals).collect()
    }

    /// The operation object.
    pub(super) fn describe(&self, components: &mut Components) -> Value {
        let phases: Vec<&str> = self.action.allowed().iter().map(Phase::name).collect();
        let mut operation = json!({
            "summary": self.doc,
            "operationId": self.id(),
            "x-phases": phases,
            "responses": self.responses(components),
        });
        if let Value::Object(operation) = &mut operation {
            if let Some(body) = request_body((self.request)(components)) {
                operation.insert("requestBody".to_owned(), body);
            }
            if self.action.is_later() {
                operation.insert("x-later".to_owned(), Value::Bool(true));
            }
        }
        operation
    }

    fn responses(&self, components: &mut Components) -> Map<String, Value> {
        let mut responses = Map::new();
        let mut add = |status: u16, response| responses.insert(status.to_string(), response);
        let nothing = || json!({ "description": "Done." });
        let content = |media_type: &str, schema: Value| json!({ "description": "Done.", "content": { media_type: { "schema": schema } } });
        match (self.reply)(components) {
            Form::Nothing => {
                add(204, nothing());
            }
            Form::Always(schema) => {
                add(200, content("application/json", schema));
            }
            Form::Sometimes(schema) => {
                add(200, content("application/json", schema));
                add(204, nothing());
            }
            Form::Text { media_type } => {
                add(200, content(media_type, json!({ "type": "string" })));
            }
        }
        responses.extend(errors(self.codes(), components));
        responses
    }
}

/// The stream of events. It is no command: it does not pass the host, and has parameters.
pub(super) fn events(components: &mut Components) -> Value {
    let parameter = |name: &str, description: &str, schema: Value| json!({ "name": name, "in": "query", "description": description, "schema": schema });
    let route = EventRoute(Journal::default());
    let codes = ANY_REQUEST.iter().chain(&[Code::TooManyStreams]).copied().collect();
    let mut responses = Map::new();
    responses.extend(errors(codes, components));
    responses.insert(
        "200".to_owned(),
        json!({
            "description": "A JSON object a line, for each event.",
            "content": { route.media_type(): { "schema": { "type": "string" } } },
        }),
    );
    json!({
        "summary": route.doc(),
        "operationId": "get-eventsVMM",
        "parameters": [
            parameter("from", "The number of the first event that is told, or `next`.", json!({ "type": "string", "pattern": "^([0-9]+|next)$", "default": "1" })),
            parameter("follow", "Whether the stream goes on after what is there.", json!({ "type": "boolean", "default": true })),
        ],
        "x-phases": Phase::ALL.map(Phase::name),
        "responses": responses,
    })
}

/// The responses for `codes`, by status.
fn errors(codes: BTreeSet<Code>, components: &mut Components) -> Vec<(String, Value)> {
    let mut by_status: BTreeMap<u16, Vec<Code>> = BTreeMap::new();
    for code in codes {
        by_status.entry(code.status()).or_default().push(code);
    }
    let response =
        |(status, codes): (u16, Vec<Code>)| (status.to_string(), error_response(status, &codes, components));
    by_status.into_iter().map(response).collect()
}

fn request_body(body: Form) -> Option<Value> {
    let (media_type, schema, required) = match body {
        Form::Nothing => return None,
        Form::Always(schema) => ("application/json", schema, true),
        Form::Sometimes(schema) => ("application/json", schema, false),
        Form::Text { media_type } => (media_type, json!({ "type": "string" }), true),
    };
    Some(json!({ "required": required, "content": { media_type: { "schema": schema } } }))
}

/// The response for `codes`, which share a status; equal ones are one component.
fn error_response(status: u16, codes: &[Code], components: &mut Components) -> Value {
    let words: Vec<&str> = codes.iter().map(|code| code.name()).collect();
    components.response(&words.join("."), |components| {
        let meanings: Vec<String> =
            codes.iter().map(|code| format!("`{}`: {}", code.name(), code.meaning())).collect();
        let problem = match Problem::form(components) {
            Form::Always(schema) => schema,
            _ => Value::Null,
        };
        let narrowed = json!({
            "allOf": [problem],
            "properties": { "code": { "enum": words }, "status": { "enum": [status] } },
        });
        json!({
            "description": format!("{}. {}", reason_phrase(status), meanings.join(" ")),
            "x-codes": words,
            "content": {
                "application/json": { "schema": components.causes() },
                "application/problem+json": { "schema": narrowed },
            },
        })
    })
}
