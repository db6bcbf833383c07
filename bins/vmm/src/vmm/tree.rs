//! The device tree as the contract shows it.

use std::collections::BTreeMap;

use vmm_api::info::{DeviceNode as WireNode, MsiKind, NodeResource};
use vmm_device_manager::node::{DeviceNode, Resource};

pub(super) fn wire(nodes: Vec<DeviceNode>) -> BTreeMap<String, WireNode> {
    let node = |node: DeviceNode| {
        let wire = WireNode {
            resources: node.resources.iter().filter_map(resource).collect(),
            pci_bdf: node.bdf().map(|bdf| bdf.to_string()),
            id: node.id.clone(),
            ..WireNode::default()
        };
        (node.id, wire)
    };
    nodes.into_iter().map(node).collect()
}

fn resource(resource: &Resource) -> Option<NodeResource> {
    match *resource {
        Resource::Pio { base, len } => {
            Some(NodeResource::PioAddressRange { base: base.into(), size: len.into() })
        }
        Resource::Mmio { base, len } | Resource::Bar { base, len } => {
            Some(NodeResource::MmioAddressRange { base, size: len })
        }
        Resource::Line { gsi } => Some(NodeResource::LegacyIrq(gsi)),
        Resource::Msi { count } => {
            Some(NodeResource::MsiIrq { ty: MsiKind::PciMsix, base: 0, size: count.into() })
        }
        // Both show as the node's address.
        _ => None,
    }
}
