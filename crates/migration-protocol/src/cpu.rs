//! What a guest's vCPUs need of a host: [`CpuNeeds`].

use minicbor::{Decode, Encode};

use crate::{Missing, MissingKind};

/// One result of CPUID, as the guest sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct CpuidLeaf {
    /// EAX before the instruction.
    #[n(0)]
    pub leaf: u32,
    /// ECX before the instruction.
    #[n(1)]
    pub subleaf: u32,
    /// EAX, EBX, ECX and EDX after it.
    #[n(2)]
    pub registers: [u32; 4],
}

/// What a guest was given of a CPU; and for a host, what it could give.
#[derive(Debug, Clone, PartialEq, Eq, Default, Encode, Decode)]
pub struct CpuNeeds {
    /// How many vCPUs.
    #[n(0)]
    pub vcpus: u32,
    /// Width of a physical address, in bits.
    #[n(1)]
    pub phys_bits: u8,
    /// Frequency of the TSC, in kHz; 0 where it is not known.
    #[n(2)]
    pub tsc_khz: u32,
    /// CPUID, in any order.
    #[n(3)]
    pub cpuid: Vec<CpuidLeaf>,
}

/// Registers of CPUID whose bits are features, with the bits that are not: leaf, subleaf, register, mask of features.
/// Intel SDM volume 2A, CPUID; AMD APM volume 3, appendix E; Linux, Documentation/virt/kvm/x86/cpuid.rst.
const FEATURES: [(u32, u32, usize, u32); 16] = [
    // OSXSAVE mirrors CR4.
    (0x1, 0, 2, !(1 << 27)),
    (0x1, 0, 3, !0),
    (0x7, 0, 1, !0),
    // OSPKE mirrors CR4; bits 17 to 21 are a number.
    (0x7, 0, 2, !(1 << 4 | 0x1f << 17)),
    (0x7, 0, 3, !0),
    (0x7, 1, 0, !0),
    // State components of XCR0, then of XSAVE's kinds, then of IA32_XSS.
    (0xd, 0, 0, !0),
    (0xd, 0, 3, !0),
    (0xd, 1, 0, !0),
    (0xd, 1, 2, !0),
    (0x8000_0001, 0, 2, !0),
    (0x8000_0001, 0, 3, !0),
    (0x8000_0007, 0, 3, !0),
    (0x8000_0008, 0, 1, !0),
    // KVM's paravirtual features and hints.
    (0x4000_0001, 0, 0, !0),
    (0x4000_0001, 0, 3, !0),
];

impl CpuNeeds {
    /// What a guest with these needs would miss on `host`. An empty list: it can run there.
    ///
    /// Compares feature bits, the number of vCPUs and the address width. The TSC's frequency is no reason to refuse:
    /// hosts scale it, or the capability to do so is missing, which the destination knows.
    #[must_use]
    pub fn missing_on(&self, host: &Self) -> Vec<Missing> {
        let mut missing = Vec::new();
        let mut lacks = |name: String| missing.push(Missing::new(MissingKind::Cpu, &name));
        if self.vcpus > host.vcpus {
            lacks(format!("{} vCPUs, {} are possible", self.vcpus, host.vcpus));
        }
        if self.phys_bits > host.phys_bits {
            lacks(format!("{} bits of physical address, {} are there", self.phys_bits, host.phys_bits));
        }
        for (leaf, subleaf, register, mask) in FEATURES {
            let absent =
                self.register(leaf, subleaf, register) & mask & !host.register(leaf, subleaf, register);
            for bit in (0..u32::BITS).filter(|bit| absent >> bit & 1 == 1) {
                let register = ["eax", "ebx", "ecx", "edx"].get(register).unwrap_or(&"");
                lacks(format!("cpuid {leaf:#x}.{subleaf} {register} bit {bit}"));
            }
        }
        missing
    }

    /// 0 where the leaf is absent, as hardware answers.
    fn register(&self, leaf: u32, subleaf: u32, register: usize) -> u32 {
        let found = self.cpuid.iter().find(|entry| entry.leaf == leaf && entry.subleaf == subleaf);
        found.and_then(|entry| entry.registers.get(register)).copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn needs(leaf: u32, registers: [u32; 4]) -> CpuNeeds {
        let cpuid = vec![CpuidLeaf { leaf, subleaf: 0, registers }];
        CpuNeeds { vcpus: 2, phys_bits: 46, tsc_khz: 1, cpuid }
    }

    #[test]
    fn each_missing_bit_is_named() {
        let guest = needs(7, [0, 1 << 16 | 1 << 5, 1 << 4 | 1, 0]);
        let host = CpuNeeds { phys_bits: 39, ..needs(7, [0, 1 << 5, 0, 0]) };
        let names: Vec<String> = guest.missing_on(&host).into_iter().map(|missing| missing.name).collect();
        let expected =
            ["46 bits of physical address, 39 are there", "cpuid 0x7.0 ebx bit 16", "cpuid 0x7.0 ecx bit 0"];
        assert_eq!(names, expected);
        assert_eq!(guest.missing_on(&guest), []);
    }

    #[test]
    fn numbers_are_not_features() {
        let guest = needs(0x1, [0x000a_0652, 0x1234, 0, 0]);
        assert_eq!(guest.missing_on(&needs(0x1, [0; 4])), []);
        let more = CpuNeeds { vcpus: 3, ..guest.clone() };
        assert_eq!(more.missing_on(&guest).len(), 1);
    }
}
