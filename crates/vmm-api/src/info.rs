//! What the VMM says of itself and of its VM.

use crate::command::{Decode, Encode, Incoming, JSON, decode_json, encode_json};
use crate::config::{VmConfig, read_vm_config};
use crate::error::{ApiError, Code, FaultReport};
use serde::{Deserialize, Serialize, Serializer};
use std::collections::BTreeMap;
use std::sync::Arc;
use vmm_state::Phase;

/// The reply of `vmm.ping`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PingReply {
    /// The version of this VMM.
    pub version: String,
    /// The version with what the build adds to it.
    #[serde(default)]
    pub build_version: String,
    /// The VMM's process id.
    #[serde(default)]
    pub pid: i64,
    /// Names of optional features that are built in.
    #[serde(default)]
    pub features: Vec<String>,
}

impl Decode for PingReply {
    fn decode(incoming: Incoming) -> Result<Self, ApiError> {
        decode_json(&incoming.body)
    }
}

impl Encode for PingReply {
    const MEDIA_TYPE: &'static str = JSON;

    fn encode(&self) -> Result<Vec<u8>, ApiError> {
        encode_json(self)
    }
}

/// The contract's words for the state of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VmState {
    /// Configured, never booted.
    Created,
    /// Running.
    Running,
    /// Switched off.
    Shutdown,
    /// Paused.
    Paused,
    /// Stopped by a debugger; this VMM does not say it yet.
    BreakPoint,
}

impl VmState {
    /// Every word.
    pub const ALL: [Self; 5] = [Self::Created, Self::Running, Self::Shutdown, Self::Paused, Self::BreakPoint];

    /// The word for `phase`; `None` without a VM.
    #[must_use]
    pub const fn from_phase(phase: Phase) -> Option<Self> {
        match phase {
            // A VM on its way here is nobody's to see.
            Phase::Empty | Phase::Receiving => None,
            // The contract has no word for a boot under way.
            Phase::Created | Phase::Booting => Some(Self::Created),
            Phase::Running => Some(Self::Running),
            // Nor for a snapshot or a migration under way: see `VmSlot::shown`.
            Phase::Paused | Phase::Saving | Phase::Migrating => Some(Self::Paused),
            Phase::Shutdown => Some(Self::Shutdown),
        }
    }
}

/// The reply of `vm.info`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct VmInfo {
    /// The configuration in force, defaults filled in.
    #[serde(serialize_with = "shared")]
    pub config: Arc<VmConfig>,
    /// The VM's state.
    pub state: VmState,
    /// Guest memory in bytes, less what a balloon holds.
    pub memory_actual_size: u64,
    /// The devices by id; absent while there is no machine.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device_tree: Option<BTreeMap<String, DeviceNode>>,
    /// The phase, which may be finer than the contract's word.
    pub phase: String,
    /// How often the VM was booted, reboots and the guest's resets included.
    pub boots: u64,
    /// What the guest did to its machine last: the name of a guest event of the life cycle's page.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_guest_event: Option<String>,
    /// What the VM was made of, if it was restored here.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub restored_from: Option<RestoredFrom>,
}

/// A snapshot that a VM was restored from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoredFrom {
    /// Its directory, as in the request.
    pub source_url: String,
    /// Its id: 64 hexadecimal digits.
    pub id: String,
    /// When it was written: milliseconds since 1970-01-01T00:00:00Z.
    pub created_ms: u64,
}

fn shared<S: Serializer>(config: &Arc<VmConfig>, serializer: S) -> Result<S::Ok, S::Error> {
    config.serialize(serializer)
}

impl Encode for VmInfo {
    const MEDIA_TYPE: &'static str = JSON;

    fn encode(&self) -> Result<Vec<u8>, ApiError> {
        encode_json(self)
    }
}

/// Through the configuration's own reader, which knows its older forms.
impl Decode for VmInfo {
    fn decode(incoming: Incoming) -> Result<Self, ApiError> {
        #[derive(Deserialize)]
        struct Raw {
            config: serde_json::Value,
            state: VmState,
            #[serde(default)]
            memory_actual_size: u64,
            #[serde(default)]
            device_tree: Option<BTreeMap<String, DeviceNode>>,
            #[serde(default)]
            phase: String,
            #[serde(default)]
            boots: u64,
            #[serde(default)]
            last_guest_event: Option<String>,
            #[serde(default)]
            restored_from: Option<RestoredFrom>,
        }
        let raw: Raw = decode_json(&incoming.body)?;
        let draft = read_vm_config(&encode_json(&raw.config)?, incoming.unknown_fields)?;
        if !draft.faults.is_empty() {
            return Err(draft.faults.into());
        }
        Ok(Self {
            config: Arc::new(draft.config),
            state: raw.state,
            memory_actual_size: raw.memory_actual_size,
            device_tree: raw.device_tree,
            phase: raw.phase,
            boots: raw.boots,
            last_guest_event: raw.last_guest_event,
            restored_from: raw.restored_from,
        })
    }
}

/// A device in `vm.info`'s device tree.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DeviceNode {
    /// The device's id.
    pub id: String,
    /// What the device occupies.
    #[serde(default)]
    pub resources: Vec<NodeResource>,
    /// Id of the device this one belongs to.
    #[serde(default)]
    pub parent: Option<String>,
    /// Ids of the devices that belong to this one.
    #[serde(default)]
    pub children: Vec<String>,
    /// The PCI address, `0000:00:01.0`.
    #[serde(default)]
    pub pci_bdf: Option<String>,
}

/// What a device occupies, in the contract's form, which its document leaves open.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum NodeResource {
    /// Ports.
    PioAddressRange {
        /// The first.
        base: u64,
        /// How many.
        size: u64,
    },
    /// Guest physical addresses.
    MmioAddressRange {
        /// The first.
        base: u64,
        /// Bytes.
        size: u64,
    },
    /// A pin of the interrupt controller.
    LegacyIrq(u32),
    /// Message-signalled interrupts.
    MsiIrq {
        /// Of which kind.
        ty: MsiKind,
        /// The first.
        base: u32,
        /// How many.
        size: u32,
    },
    /// What other VMMs say.
    #[serde(untagged)]
    Other(serde_json::Value),
}

/// Kinds of message-signalled interrupts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MsiKind {
    /// By the MSI capability.
    PciMsi,
    /// By the MSI-X capability.
    PciMsix,
    /// Otherwise.
    GenericMsi,
}

/// The reply of `vm.validate`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ValidateReply {
    /// Whether the VM would be created, and boot as far as can be told without trying.
    pub valid: bool,
    /// All that stands against it, by place in the document: of the document first, then of this host.
    pub faults: Vec<FaultReport>,
    /// What its author should know all the same.
    pub warnings: Vec<FaultReport>,
    /// The configuration with defaults and automatic ids, if the document itself is right.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub config: Option<VmConfig>,
}

impl Encode for ValidateReply {
    const MEDIA_TYPE: &'static str = JSON;

    fn encode(&self) -> Result<Vec<u8>, ApiError> {
        encode_json(self)
    }
}

impl Decode for ValidateReply {
    fn decode(incoming: Incoming) -> Result<Self, ApiError> {
        #[derive(Deserialize)]
        struct Raw {
            valid: bool,
            #[serde(default)]
            faults: Vec<FaultReport>,
            #[serde(default)]
            warnings: Vec<FaultReport>,
            #[serde(default)]
            config: Option<serde_json::Value>,
        }
        let Raw { valid, faults, warnings, config } = decode_json(&incoming.body)?;
        let config = match config {
            Some(config) => Some(read_vm_config(&encode_json(&config)?, incoming.unknown_fields)?.config),
            None => None,
        };
        Ok(Self { valid, faults, warnings, config })
    }
}

/// The reply of `vm.counters`: counters by name, by device id.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct CountersReply(pub BTreeMap<String, BTreeMap<String, u64>>);

impl Encode for CountersReply {
    const MEDIA_TYPE: &'static str = JSON;

    fn encode(&self) -> Result<Vec<u8>, ApiError> {
        encode_json(self)
    }
}

impl Decode for CountersReply {
    fn decode(incoming: Incoming) -> Result<Self, ApiError> {
        decode_json(&incoming.body)
    }
}

/// A JSON document of a form that others define, as text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JsonText(pub String);

impl Encode for JsonText {
    const MEDIA_TYPE: &'static str = JSON;

    fn encode(&self) -> Result<Vec<u8>, ApiError> {
        Ok(self.0.clone().into_bytes())
    }
}

impl Decode for JsonText {
    fn decode(incoming: Incoming) -> Result<Self, ApiError> {
        text(incoming).map(Self)
    }
}

fn text(incoming: Incoming) -> Result<String, ApiError> {
    String::from_utf8(incoming.body).map_err(|error| ApiError::from_error(Code::MalformedBody, &error))
}

/// Metrics as OpenMetrics 1.0 text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenMetrics(pub String);

impl Encode for OpenMetrics {
    const MEDIA_TYPE: &'static str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

    fn encode(&self) -> Result<Vec<u8>, ApiError> {
        Ok(self.0.clone().into_bytes())
    }
}

impl Decode for OpenMetrics {
    fn decode(incoming: Incoming) -> Result<Self, ApiError> {
        text(incoming).map(Self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_are_the_phases_contract_words() {
        for phase in Phase::ALL {
            let word = VmState::from_phase(phase).map(|state| serde_json::to_value(state).unwrap());
            assert_eq!(word.as_ref().and_then(|word| word.as_str()), phase.contract_word());
        }
    }

    #[test]
    fn info_survives_the_wire() {
        let resources = vec![
            NodeResource::PioAddressRange { base: 0x3f8, size: 8 },
            NodeResource::LegacyIrq(4),
            NodeResource::MsiIrq { ty: MsiKind::PciMsix, base: 0, size: 2 },
            NodeResource::Other(serde_json::json!({ "KvmMemSlot": 3 })),
        ];
        let node = DeviceNode {
            id: "_disk0".to_owned(),
            pci_bdf: Some("0000:00:01.0".to_owned()),
            resources,
            ..DeviceNode::default()
        };
        let text = serde_json::to_string(&node.resources).unwrap();
        let form = r#"[{"PioAddressRange":{"base":1016,"size":8}},{"LegacyIrq":4},{"MsiIrq":{"ty":"PciMsix","base":0,"size":2}},{"KvmMemSlot":3}]"#;
        assert_eq!(text, form);
        let info = VmInfo {
            config: Arc::default(),
            state: VmState::Paused,
            memory_actual_size: 512 << 20,
            device_tree: Some([("_disk0".to_owned(), node)].into()),
            phase: "Paused".to_owned(),
            boots: 2,
            last_guest_event: Some("reset".to_owned()),
            restored_from: Some(RestoredFrom {
                source_url: "file:///a".to_owned(),
                id: "b".to_owned(),
                created_ms: 1,
            }),
        };
        let body = info.encode().unwrap();
        assert_eq!(VmInfo::decode(Incoming { body, ..Incoming::default() }).unwrap(), info);
    }

    #[test]
    fn a_bare_reply_of_an_older_vmm_is_read() {
        let reply: PingReply = serde_json::from_str(r#"{"version": "16.0.0"}"#).unwrap();
        assert_eq!(reply.version, "16.0.0");
    }
}
