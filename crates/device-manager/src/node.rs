//! What a device took, as the device tree shows it.

use vmm_pci::bdf::Bdf;

/// A resource of the machine that a device has.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Resource {
    /// Ports.
    Pio {
        /// First port.
        base: u16,
        /// Number of ports.
        len: u16,
    },
    /// Guest physical addresses.
    Mmio {
        /// First address.
        base: u64,
        /// Bytes.
        len: u64,
    },
    /// A BAR's address at power-on.
    Bar {
        /// First address.
        base: u64,
        /// Bytes.
        len: u64,
    },
    /// A pin of the interrupt controller.
    Line {
        /// Its number.
        gsi: u32,
    },
    /// Message-signalled interrupt vectors.
    Msi {
        /// How many.
        count: u16,
    },
    /// A PCI device number.
    Slot {
        /// Device number on bus 0.
        device: u8,
    },
    /// A place on the PCI bus, with a function on it.
    Function {
        /// Where.
        bdf: Bdf,
    },
}

/// A device in the device tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceNode {
    /// The device's id.
    pub id: String,
    /// What it has, in the order in which it was taken.
    pub resources: Vec<Resource>,
}

impl DeviceNode {
    /// Where it is on the PCI bus.
    pub fn bdf(&self) -> Option<Bdf> {
        self.resources.iter().find_map(|resource| match resource {
            Resource::Function { bdf } => Some(*bdf),
            _ => None,
        })
    }
}
