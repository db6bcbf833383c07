//! The device tree as the contract shows it.

use std::collections::BTreeMap;

use serde_json::json;
use vmm_api::info::DeviceNode as WireNode;
use vmm_device_manager::node::{DeviceNode, Resource};

pub(super) fn wire(nodes: &[DeviceNode]) -> BTreeMap<String, WireNode> {
    let node = |node: &DeviceNode| {
        let wire = WireNode {
            id: node.id.clone(),
            resources: node.resources.iter().filter_map(resource).collect(),
            pci_bdf: node.bdf().map(|bdf| bdf.to_string()),
            ..WireNode::default()
        };
        (node.id.clone(), wire)
    };
    nodes.iter().map(node).collect()
}

fn resource(resource: &Resource) -> Option<serde_json::Value> {
    match resource {
        Resource::Pio { base, len } => Some(json!({ "PioAddressRange": { "base": base, "size": len } })),
        Resource::Mmio { base, len } | Resource::Bar { base, len } => {
            Some(json!({ "MmioAddressRange": { "base": base, "size": len } }))
        }
        Resource::Line { gsi } => Some(json!({ "LegacyIrq": gsi })),
        Resource::Msi { count } => Some(json!({ "MsiIrq": { "ty": "PciMsix", "base": 0, "size": count } })),
        // Both show as the node's address.
        _ => None,
    }
}
