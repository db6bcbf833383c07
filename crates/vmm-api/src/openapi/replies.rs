//! The forms of what is not read by a table: replies and errors.
//!
//! A reply may have more properties in a later release, so it allows others than the listed ones. `tests/openapi.rs`
//! holds these lists to what is really written.

use crate::command::Encode;
use crate::commands::device::Added;
use crate::commands::vm::{CreateRequest, ValidateRequest};
use crate::config::{FaultKind, VmConfig};
use crate::error::{Code, Problem};
use crate::info::{CountersReply, JsonText, OpenMetrics, PingReply, ValidateReply, VmInfo, VmState};
use crate::openapi::{Components, Described, Form, TABLE_FAULTS};
use crate::progress::{MigrationProgressReply, MigrationRole, MigrationStatus};
use serde_json::{Map, Value, json};
use vmm_state::Phase;

const TEXT: fn() -> Value = || json!({ "type": "string" });
const TEXTS: fn() -> Value = || json!({ "type": "array", "items": { "type": "string" } });

/// An object with these properties: name, schema, documentation. Names that end with `!` are always there.
fn object<const N: usize>(description: &str, properties: [(&str, Value, &str); N]) -> Value {
    let mut required = Vec::new();
    let mut map = Map::new();
    for (name, mut schema, doc) in properties {
        let bare = name.strip_suffix('!').unwrap_or(name);
        if bare != name {
            required.push(bare.to_owned());
        }
        if schema.get("$ref").is_some() {
            schema = json!({ "allOf": [schema] });
        }
        if let Value::Object(schema) = &mut schema {
            schema.insert("description".to_owned(), json!(doc));
        }
        map.insert(bare.to_owned(), schema);
    }
    json!({ "type": "object", "description": description, "required": required, "properties": map })
}

impl Components {
    /// The form of an error for clients that do not ask for JSON by name.
    pub(super) fn causes(&mut self) -> Value {
        self.schema("Causes", |_| {
            json!({
                "type": "array",
                "description": "What failed, then what that came from, then all that is wrong with the document.",
                "items": { "type": "string" },
                "minItems": 1,
            })
        })
    }
}

impl Described for CreateRequest {
    const FAULTS: &'static [Code] = TABLE_FAULTS;

    fn form(components: &mut Components) -> Form {
        VmConfig::form(components)
    }
}

/// Whatever is wrong with the document is the answer, so anything may be sent.
impl Described for ValidateRequest {
    const FAULTS: &'static [Code] = &[Code::MalformedBody];

    fn form(components: &mut Components) -> Form {
        let config = components.object(VmConfig::TABLE);
        Form::Always(json!({ "anyOf": [config, {}] }))
    }
}

impl Described for PingReply {
    fn form(components: &mut Components) -> Form {
        Form::Always(components.schema("VmmPingResponse", |_| {
            object(
                "What the VMM says of itself.",
                [
                    ("version!", TEXT(), "The version of this VMM."),
                    ("build_version!", TEXT(), "The version with what the build adds to it."),
                    ("pid!", json!({ "type": "integer", "format": "int64" }), "The VMM's process id."),
                    ("features!", TEXTS(), "Names of optional features that are built in."),
                ],
            )
        }))
    }
}

impl Described for VmInfo {
    fn form(components: &mut Components) -> Form {
        Form::Always(components.schema("VmInfo", |components| {
            let config = components.object(VmConfig::TABLE);
            let state = components.schema("VmState", |_| vm_state());
            let node = components.schema("DeviceNode", |_| device_node());
            let origin = components.schema("RestoredFrom", |_| restored_from());
            let size = json!({ "type": "integer", "format": "int64", "minimum": 0 });
            let count = json!({ "type": "integer", "format": "uint64", "minimum": 0 });
            let phases = json!({ "type": "string", "enum": Phase::ALL.map(Phase::name) });
            let tree = json!({ "type": "object", "additionalProperties": node });
            object(
                "What the VMM says of its VM.",
                [
                    ("config!", config, "The configuration in force, defaults filled in."),
                    ("state!", state, "The VM's state."),
                    ("memory_actual_size!", size, "Guest memory in bytes, less what a balloon holds."),
                    ("device_tree", tree, "The devices by id; absent while there is no machine."),
                    ("phase!", phases, "The VM's phase, finer than its state."),
                    ("boots!", count, "How often the VM was booted."),
                    ("last_guest_event", TEXT(), "What the guest did to its machine last, if anything."),
                    ("restored_from", origin, "What the VM was made of, if it was restored here."),
                ],
            )
        }))
    }
}

fn vm_state() -> Value {
    let words = VmState::ALL.map(|state| serde_json::to_value(state).unwrap_or_default());
    json!({
        "type": "string",
        "enum": words,
        "description": "`BreakPoint` is for debuggers; this VMM does not say it yet.",
    })
}

fn restored_from() -> Value {
    let time = json!({ "type": "integer", "format": "uint64", "minimum": 0 });
    object(
        "A snapshot that a VM was restored from.",
        [
            ("source_url!", TEXT(), "Its directory, as in the request."),
            ("id!", TEXT(), "Its id: 64 hexadecimal digits."),
            ("created_ms!", time, "When it was written: milliseconds since 1970-01-01T00:00:00Z."),
        ],
    )
}

fn device_node() -> Value {
    let parent = json!({ "type": "string", "nullable": true });
    object(
        "A device.",
        [
            ("id!", TEXT(), "The device's id."),
            (
                "resources!",
                json!({ "type": "array", "items": { "type": "object" } }),
                "What the device occupies; free-form.",
            ),
            ("parent!", parent.clone(), "Id of the device this one belongs to."),
            ("children!", TEXTS(), "Ids of the devices that belong to this one."),
            ("pci_bdf!", parent, "The PCI address, `0000:00:01.0`."),
        ],
    )
}

impl Described for MigrationProgressReply {
    fn form(components: &mut Components) -> Form {
        Form::Always(components.schema("MigrationProgress", |_| migration_progress()))
    }
}

fn migration_progress() -> Value {
    let number = |format: &str| json!({ "type": "integer", "format": format, "minimum": 0 });
    let (count, small) = (number("uint64"), number("uint32"));
    let statuses = json!({ "type": "string", "enum": MigrationStatus::ALL });
    let roles = json!({ "type": "string", "enum": MigrationRole::ALL });
    let yes_no = json!({ "type": "boolean" });
    object(
        "How far a migration is, or how it ended.",
        [
            ("status!", statuses, "What became of it."),
            ("role", roles, "Which end this is; absent where there was no migration."),
            ("job!", count.clone(), "Its number, as in events."),
            ("check!", yes_no, "It only asks whether the destination would take the VM."),
            ("step", TEXT(), "What this end does: a state of the protocol, such as `Copying`."),
            ("elapsed_us!", count.clone(), "Microseconds since it began, or that it took."),
            ("memory_bytes!", count.clone(), "Bytes of guest memory there are."),
            ("sent_bytes!", count.clone(), "Bytes on the link so far, those sent again included."),
            ("passes!", small.clone(), "Passes over memory, the one under way included."),
            ("bandwidth", count.clone(), "Bytes per second on the link; absent while it is not known."),
            ("dirty_rate", count.clone(), "Bytes per second that the guest writes to; absent likewise."),
            ("throttle!", small, "By how much vCPUs are slowed down, in percent of their time."),
            (
                "expected_blackout_ms",
                count.clone(),
                "How long the guest would stand still now; absent likewise.",
            ),
            (
                "owed_bytes",
                count.clone(),
                "Bytes that the destination does not have yet, while its guest runs; absent before and after that.",
            ),
            ("blackout_us", count, "How long it stood still, as the source saw it; absent if it was paused."),
            ("causes", TEXTS(), "Why it failed, or stands still, outermost first."),
        ],
    )
}

impl Described for ValidateReply {
    fn form(components: &mut Components) -> Form {
        Form::Always(components.schema("VmValidation", |components| {
            let config = components.object(VmConfig::TABLE);
            let faults = json!({ "type": "array", "items": components.schema("Fault", |_| fault()) });
            object(
                "What stands against a configuration.",
                [
                    (
                        "valid!",
                        json!({ "type": "boolean" }),
                        "Whether it would boot, as far as can be told without trying.",
                    ),
                    (
                        "faults!",
                        faults.clone(),
                        "All that stands against it, of the document first, then of this host.",
                    ),
                    ("warnings!", faults, "What its author should know all the same."),
                    (
                        "config",
                        config,
                        "The configuration with defaults and automatic ids, if the document itself is right.",
                    ),
                ],
            )
        }))
    }
}

impl Described for CountersReply {
    fn form(components: &mut Components) -> Form {
        Form::Always(components.schema("VmCounters", |_| {
            let counter = json!({ "type": "integer", "format": "int64" });
            let of_device = json!({ "type": "object", "additionalProperties": counter });
            let description = "Counters by name, by device id.";
            json!({ "type": "object", "description": description, "additionalProperties": of_device })
        }))
    }
}

impl Described for Added {
    fn form(components: &mut Components) -> Form {
        Form::Sometimes(components.schema("PciDeviceInfo", |_| {
            object(
                "Where a device is, once it is on the bus.",
                [("id!", TEXT(), "The device's id."), ("bdf!", TEXT(), "Its PCI address, `0000:00:01.0`.")],
            )
        }))
    }
}

impl Described for JsonText {
    fn form(_components: &mut Components) -> Form {
        Form::Always(json!({ "type": "object", "description": "A document of a form that others define." }))
    }
}

impl Described for OpenMetrics {
    fn form(_components: &mut Components) -> Form {
        Form::Text { media_type: Self::MEDIA_TYPE }
    }
}

impl Described for Problem {
    fn form(components: &mut Components) -> Form {
        Form::Always(components.schema("Problem", |components| {
            let fault = components.schema("Fault", |_| fault());
            let codes = json!({ "type": "string", "enum": Code::ALL.map(Code::name) });
            let faults = json!({ "type": "array", "items": fault });
            object(
                "RFC 9457 problem details. The type is `about:blank`.",
                [
                    ("title!", TEXT(), "The phrase of the status."),
                    ("status!", json!({ "type": "integer" }), "The HTTP status."),
                    ("code!", codes, "The stable word for what failed."),
                    ("detail!", TEXT(), "What failed."),
                    ("causes!", TEXTS(), "What failed, then what that came from."),
                    ("faults", faults, "What is wrong with the document that was sent."),
                    ("phase", TEXT(), "The phase the VM is in, where that was the reason."),
                    ("allowed_phases", TEXTS(), "The phases in which the request would be accepted."),
                ],
            )
        }))
    }
}

fn fault() -> Value {
    // Those of the document; of the host; and what is no fault, though it is told in the same form.
    let kinds: Vec<&str> =
        FaultKind::ALL.map(FaultKind::code).into_iter().chain(["environment", "warning"]).collect();
    let kinds = json!({ "type": "string", "enum": kinds });
    object(
        "One thing that is wrong with a document.",
        [
            ("path!", TEXT(), "Where: a JSON path such as `disks[1].path`."),
            ("kind!", kinds, "The class of the fault."),
            ("message!", TEXT(), "What is wrong."),
        ],
    )
}
