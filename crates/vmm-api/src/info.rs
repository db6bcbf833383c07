//! What the VMM says of itself and of its VM.

use crate::command::{Decode, Encode, Incoming, decode_json, encode_json};
use crate::config::{VmConfig, read_vm_config};
use crate::error::ApiError;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
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
    /// The word for `phase`; `None` without a VM.
    #[must_use]
    pub const fn from_phase(phase: Phase) -> Option<Self> {
        match phase {
            Phase::Empty => None,
            Phase::Created => Some(Self::Created),
            Phase::Running => Some(Self::Running),
            Phase::Paused => Some(Self::Paused),
            Phase::Shutdown => Some(Self::Shutdown),
        }
    }
}

/// The reply of `vm.info`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct VmInfo {
    /// The configuration in force, defaults filled in.
    pub config: VmConfig,
    /// The VM's state.
    pub state: VmState,
    /// Guest memory in bytes, less what a balloon holds.
    pub memory_actual_size: u64,
    /// The devices by id; absent while there is no machine.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device_tree: Option<BTreeMap<String, DeviceNode>>,
}

impl Encode for VmInfo {
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
        }
        let raw: Raw = decode_json(&incoming.body)?;
        let draft = read_vm_config(&encode_json(&raw.config)?, incoming.unknown_fields)?;
        if !draft.faults.is_empty() {
            return Err(draft.faults.into());
        }
        let Raw { state, memory_actual_size, device_tree, .. } = raw;
        Ok(Self { config: draft.config, state, memory_actual_size, device_tree })
    }
}

/// A device in `vm.info`'s device tree.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DeviceNode {
    /// The device's id.
    pub id: String,
    /// What the device occupies; free-form, as in the contract.
    #[serde(default)]
    pub resources: Vec<serde_json::Value>,
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
        let node = DeviceNode {
            id: "_disk0".to_owned(),
            pci_bdf: Some("0000:00:01.0".to_owned()),
            ..DeviceNode::default()
        };
        let info = VmInfo {
            config: VmConfig::default(),
            state: VmState::Paused,
            memory_actual_size: 512 << 20,
            device_tree: Some([("_disk0".to_owned(), node)].into()),
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
