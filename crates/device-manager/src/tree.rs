//! The device tree as saved state: a restored guest finds every device where it was, whatever the order or the number of
//! devices in the configuration is now.

use minicbor::{Decode, Encode};
use vmm_snapshot::RecordError;

use crate::node::{DeviceNode, Resource};

/// Which device has what of the machine.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct DeviceTreeV1 {
    /// The devices, in the order in which they were added.
    #[n(0)]
    pub devices: Vec<DeviceNodeV1>,
}

vmm_snapshot::schema!(DeviceTreeV1: "device-tree" v1);

/// A device and what it has.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct DeviceNodeV1 {
    /// The device's id.
    #[n(0)]
    pub id: String,
    /// In the order in which it was taken.
    #[n(1)]
    pub resources: Vec<ResourceV1>,
}

/// A resource that a guest knows by its number or address.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum ResourceV1 {
    /// Ports.
    #[n(0)]
    Pio {
        /// First port.
        #[n(0)]
        base: u16,
        /// Number of ports.
        #[n(1)]
        len: u16,
    },
    /// Guest physical addresses.
    #[n(1)]
    Mmio {
        /// First address.
        #[n(0)]
        base: u64,
        /// Bytes.
        #[n(1)]
        len: u64,
    },
    /// A BAR's address at power-on.
    #[n(2)]
    Bar {
        /// First address.
        #[n(0)]
        base: u64,
        /// Bytes.
        #[n(1)]
        len: u64,
    },
    /// A pin of the interrupt controller.
    #[n(3)]
    Line {
        /// Its number.
        #[n(0)]
        gsi: u32,
    },
    /// Message-signalled interrupt vectors; their GSIs are the host's affair.
    #[n(4)]
    Msi {
        /// How many.
        #[n(0)]
        count: u16,
    },
    /// A PCI device number.
    #[n(5)]
    Slot {
        /// Device number on bus 0.
        #[n(0)]
        device: u8,
    },
    /// A place on the PCI bus, with a function on it.
    #[n(6)]
    Function {
        /// Segment.
        #[n(0)]
        segment: u16,
        /// Bus.
        #[n(1)]
        bus: u8,
        /// Device in the upper five bits, function in the lower three.
        #[n(2)]
        devfn: u8,
    },
}

impl From<&Resource> for ResourceV1 {
    fn from(resource: &Resource) -> Self {
        match *resource {
            Resource::Pio { base, len } => Self::Pio { base, len },
            Resource::Mmio { base, len } => Self::Mmio { base, len },
            Resource::Bar { base, len } => Self::Bar { base, len },
            Resource::Line { gsi } => Self::Line { gsi },
            Resource::Msi { count } => Self::Msi { count },
            Resource::Slot { device } => Self::Slot { device },
            Resource::Function { bdf } => {
                Self::Function { segment: bdf.segment(), bus: bdf.bus(), devfn: bdf.devfn() }
            }
        }
    }
}

impl DeviceTreeV1 {
    /// The tree of these devices.
    pub(crate) fn of(nodes: &[DeviceNode]) -> Self {
        let node = |node: &DeviceNode| DeviceNodeV1 {
            id: node.id.clone(),
            resources: node.resources.iter().map(Into::into).collect(),
        };
        Self { devices: nodes.iter().map(node).collect() }
    }

    /// Checks that every device of `found` that is in this tree has what it had, and that none has gone.
    pub(crate) fn check(&self, found: &Self) -> Result<(), RecordError> {
        for DeviceNodeV1 { id, resources } in &self.devices {
            let node = found.devices.iter().find(|node| node.id == *id);
            let Some(node) = node else { return Err(invalid(format!("there is no device {id:?} here"))) };
            if let Some((had, has)) = first_difference(resources, &node.resources) {
                return Err(invalid(format!("device {id:?} had {had}, here it has {has}")));
            }
        }
        Ok(())
    }
}

fn first_difference(had: &[ResourceV1], has: &[ResourceV1]) -> Option<(String, String)> {
    let show =
        |resource: Option<&ResourceV1>| resource.map_or("nothing more".to_owned(), |r| format!("{r:x?}"));
    let at = (0..had.len().max(has.len())).find(|at| had.get(*at) != has.get(*at))?;
    Some((show(had.get(at)), show(has.get(at))))
}

pub(crate) fn invalid(what: impl Into<String>) -> RecordError {
    RecordError::invalid::<DeviceTreeV1>(what)
}

#[cfg(test)]
mod tests {
    use vmm_pci::bdf::Bdf;
    use vmm_snapshot::golden;

    use super::*;

    fn tree() -> DeviceTreeV1 {
        let resources = vec![
            Resource::Pio { base: 0x3f8, len: 8 },
            Resource::Mmio { base: 0xf900_0000, len: 1 },
            Resource::Bar { base: 1 << 32, len: 0x8_0000 },
            Resource::Line { gsi: 4 },
            Resource::Msi { count: 2 },
            Resource::Slot { device: 3 },
            Resource::Function { bdf: Bdf::new(0, 0, 3, 0).unwrap() },
        ];
        DeviceTreeV1::of(&[DeviceNode { id: "_disk0".to_owned(), resources }])
    }

    #[test]
    fn golden_record() {
        golden::check_state(&tree()).unwrap();
    }

    #[test]
    fn a_difference_is_named() {
        let (saved, mut found) = (tree(), tree());
        saved.check(&found).unwrap();
        found.devices[0].resources[5] = ResourceV1::Slot { device: 4 };
        let error = saved.check(&found).unwrap_err().to_string();
        assert!(
            error.ends_with(r#"device "_disk0" had Slot { device: 3 }, here it has Slot { device: 4 }"#),
            "{error}"
        );
        found.devices[0].resources.truncate(2);
        assert!(saved.check(&found).unwrap_err().to_string().ends_with("here it has nothing more"));
        found.devices.clear();
        saved.check(&found).unwrap_err();
        found.check(&saved).unwrap();
    }
}
