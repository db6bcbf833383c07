//! Whether a host's processor can give a guest what it was given elsewhere.
//!
//! A guest looks at CPUID once and relies on it. So every feature bit that it was given must be one that this host supports,
//! and the XSAVE components must lie where they did. Sources: Intel SDM volume 2 "CPUID", AMD APM volume 3 appendix E,
//! Linux `Documentation/virt/kvm/x86/cpuid.rst`.

use std::fmt;

use vmm_hypervisor::state::CpuidEntry;

/// A register of a CPUID leaf.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are the registers' names")]
pub enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

impl Register {
    fn of(self, entry: &CpuidEntry) -> u32 {
        match self {
            Self::Eax => entry.eax,
            Self::Ebx => entry.ebx,
            Self::Ecx => entry.ecx,
            Self::Edx => entry.edx,
        }
    }
}

use Register::{Eax, Ebx, Ecx, Edx};

/// A word of feature bits.
struct Features {
    leaf: u32,
    subleaf: u32,
    register: Register,
    /// Bits that are not the processor's to give: the hypervisor emulates them, they follow from the guest's own registers,
    /// or they describe its topology.
    always: u32,
}

const fn features(leaf: u32, subleaf: u32, register: Register, always: u32) -> Features {
    Features { leaf, subleaf, register, always }
}

/// x2APIC, TSC deadline, OSXSAVE, "hypervisor"; MONITOR follows from a model-specific register.
const ALWAYS_1_ECX: u32 = 1 << 21 | 1 << 24 | 1 << 27 | 1 << 31 | 1 << 3;
/// The local APIC follows from its base register, HTT from the topology.
const ALWAYS_1_EDX: u32 = 1 << 9 | 1 << 28;
/// OSPKE.
const ALWAYS_7_ECX: u32 = 1 << 4;
/// CMP_LEGACY.
const ALWAYS_EXT_ECX: u32 = 1 << 1;

const FEATURES: [Features; 24] = [
    features(1, 0, Ecx, ALWAYS_1_ECX),
    features(1, 0, Edx, ALWAYS_1_EDX),
    features(6, 0, Eax, 0),
    features(7, 0, Ebx, 0),
    features(7, 0, Ecx, ALWAYS_7_ECX),
    features(7, 0, Edx, 0),
    features(7, 1, Eax, 0),
    features(7, 1, Ebx, 0),
    features(7, 1, Ecx, 0),
    features(7, 1, Edx, 0),
    features(7, 2, Edx, 0),
    // XCR0 and XSS.
    features(0xd, 0, Eax, 0),
    features(0xd, 0, Edx, 0),
    features(0xd, 1, Eax, 0),
    features(0xd, 1, Ecx, 0),
    features(0xd, 1, Edx, 0),
    features(0x4000_0001, 0, Eax, 0),
    features(0x8000_0001, 0, Ecx, ALWAYS_EXT_ECX),
    features(0x8000_0001, 0, Edx, ALWAYS_1_EDX),
    features(0x8000_0007, 0, Edx, 0),
    features(0x8000_0008, 0, Ebx, 0),
    features(0x8000_000a, 0, Edx, 0),
    features(0x8000_0021, 0, Eax, 0),
    features(0x8000_0022, 0, Eax, 0),
];

/// Bits that people know by a name.
const NAMES: &[(u32, Register, u32, &str)] = &[
    (1, Ecx, 0, "SSE3"),
    (1, Ecx, 1, "PCLMULQDQ"),
    (1, Ecx, 5, "VMX"),
    (1, Ecx, 9, "SSSE3"),
    (1, Ecx, 12, "FMA"),
    (1, Ecx, 13, "CMPXCHG16B"),
    (1, Ecx, 17, "PCID"),
    (1, Ecx, 19, "SSE4.1"),
    (1, Ecx, 20, "SSE4.2"),
    (1, Ecx, 22, "MOVBE"),
    (1, Ecx, 23, "POPCNT"),
    (1, Ecx, 25, "AES"),
    (1, Ecx, 26, "XSAVE"),
    (1, Ecx, 28, "AVX"),
    (1, Ecx, 29, "F16C"),
    (1, Ecx, 30, "RDRAND"),
    (7, Ebx, 0, "FSGSBASE"),
    (7, Ebx, 1, "TSC_ADJUST"),
    (7, Ebx, 3, "BMI1"),
    (7, Ebx, 4, "HLE"),
    (7, Ebx, 5, "AVX2"),
    (7, Ebx, 7, "SMEP"),
    (7, Ebx, 8, "BMI2"),
    (7, Ebx, 9, "ERMS"),
    (7, Ebx, 10, "INVPCID"),
    (7, Ebx, 11, "RTM"),
    (7, Ebx, 16, "AVX512F"),
    (7, Ebx, 17, "AVX512DQ"),
    (7, Ebx, 18, "RDSEED"),
    (7, Ebx, 19, "ADX"),
    (7, Ebx, 20, "SMAP"),
    (7, Ebx, 23, "CLFLUSHOPT"),
    (7, Ebx, 24, "CLWB"),
    (7, Ebx, 28, "AVX512CD"),
    (7, Ebx, 29, "SHA"),
    (7, Ebx, 30, "AVX512BW"),
    (7, Ebx, 31, "AVX512VL"),
    (7, Ecx, 1, "AVX512_VBMI"),
    (7, Ecx, 2, "UMIP"),
    (7, Ecx, 3, "PKU"),
    (7, Ecx, 5, "WAITPKG"),
    (7, Ecx, 7, "CET_SS"),
    (7, Ecx, 8, "GFNI"),
    (7, Ecx, 9, "VAES"),
    (7, Ecx, 10, "VPCLMULQDQ"),
    (7, Ecx, 11, "AVX512_VNNI"),
    (7, Ecx, 16, "LA57"),
    (7, Ecx, 22, "RDPID"),
    (7, Edx, 4, "FSRM"),
    (7, Edx, 22, "AMX_BF16"),
    (7, Edx, 23, "AVX512_FP16"),
    (7, Edx, 24, "AMX_TILE"),
    (7, Edx, 26, "SPEC_CTRL"),
    (7, Edx, 27, "STIBP"),
    (7, Edx, 29, "ARCH_CAPABILITIES"),
    (7, Edx, 31, "SSBD"),
    (0x8000_0001, Ecx, 2, "SVM"),
    (0x8000_0001, Ecx, 5, "LZCNT"),
    (0x8000_0001, Ecx, 6, "SSE4a"),
    (0x8000_0001, Ecx, 8, "PREFETCHW"),
    (0x8000_0001, Edx, 20, "NX"),
    (0x8000_0001, Edx, 26, "1 GiB pages"),
    (0x8000_0001, Edx, 27, "RDTSCP"),
    (0x8000_0001, Edx, 29, "long mode"),
    (0x8000_0007, Edx, 8, "invariant TSC"),
    (0x4000_0001, Eax, 0, "KVM clock (old)"),
    (0x4000_0001, Eax, 3, "KVM clock"),
    (0x4000_0001, Eax, 4, "KVM asynchronous page faults"),
    (0x4000_0001, Eax, 5, "KVM steal time"),
    (0x4000_0001, Eax, 6, "KVM paravirtual EOI"),
    (0x4000_0001, Eax, 24, "stable KVM clock"),
];

/// What this host's processor lacks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Lacks {
    /// Another maker's processor: instructions and MSRs differ beyond what CPUID tells.
    #[error("the guest was given a processor of {given}, this host's is of {here}")]
    Vendor {
        /// Vendor string that the guest was given.
        given: String,
        /// Vendor string of this host.
        here: String,
    },
    /// A feature.
    #[error("the guest was given {0}, which this host does not support")]
    Feature(Feature),
    /// Bits of physical address.
    #[error("the guest was given {given} bits of physical address, this host has {here}")]
    PhysBits {
        /// Bits that the guest was given.
        given: u32,
        /// Bits of this host.
        here: u32,
    },
    /// A component of the XSAVE area is elsewhere or of another size.
    #[error("XSAVE component {component} had {given:?} (size and offset), on this host it has {here:?}")]
    XsaveComponent {
        /// Its number.
        component: u32,
        /// Size and offset that the guest was given.
        given: (u32, u32),
        /// Size and offset on this host.
        here: (u32, u32),
    },
}

/// A feature bit of CPUID.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Feature {
    /// EAX on input.
    pub leaf: u32,
    /// ECX on input.
    pub subleaf: u32,
    /// The register on output.
    pub register: Register,
    /// The bit.
    pub bit: u32,
}

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { leaf, subleaf, register, bit } = *self;
        let named = NAMES.iter().find(|(l, r, b, _)| (*l, *r, *b, subleaf) == (leaf, register, bit, 0));
        if let Some((.., name)) = named {
            write!(f, "{name} (")?;
        }
        write!(f, "CPUID {leaf:#x}.{subleaf} {register:?} bit {bit}")?;
        if named.is_some() { f.write_str(")") } else { Ok(()) }
    }
}

/// Checks that a host which supports `supported` can give a guest what it was given.
///
/// # Errors
/// The first thing that the host lacks.
pub fn check(given: &[CpuidEntry], supported: &[CpuidEntry]) -> Result<(), Lacks> {
    lacking(given, supported).into_iter().next().map_or(Ok(()), Err)
}

/// All that a host which supports `supported` lacks to give a guest what it was given. Of another maker's processor that
/// is all that is said.
#[must_use]
pub fn lacking(given: &[CpuidEntry], supported: &[CpuidEntry]) -> Vec<Lacks> {
    let (own, here) = (vendor(given), vendor(supported));
    if own != here {
        return vec![Lacks::Vendor { given: own, here }];
    }
    let mut lacking = Vec::new();
    for Features { leaf, subleaf, register, always } in FEATURES {
        let word = |entries| find(entries, leaf, subleaf).map_or(0, |entry| register.of(entry));
        let missing = word(given) & !(word(supported) | always);
        let bits = (0..u32::BITS).filter(|bit| missing >> bit & 1 == 1);
        lacking.extend(bits.map(|bit| Lacks::Feature(Feature { leaf, subleaf, register, bit })));
    }
    let bits = |entries| find(entries, 0x8000_0008, 0).map_or(36, |entry| entry.eax & 0xff);
    if bits(given) > bits(supported) {
        lacking.push(Lacks::PhysBits { given: bits(given), here: bits(supported) });
    }
    let components = given.iter().filter(|entry| entry.function == 0xd && entry.index >= 2);
    lacking.extend(components.filter_map(|entry| lacks_component(entry, supported)));
    lacking
}

fn lacks_component(entry: &CpuidEntry, supported: &[CpuidEntry]) -> Option<Lacks> {
    let here = find(supported, 0xd, entry.index).map_or((0, 0), |entry| (entry.eax, entry.ebx));
    let given = (entry.eax, entry.ebx);
    (given != here).then_some(Lacks::XsaveComponent { component: entry.index, given, here })
}

fn find(entries: &[CpuidEntry], leaf: u32, subleaf: u32) -> Option<&CpuidEntry> {
    entries.iter().find(|e| e.function == leaf && (e.index == subleaf || !e.index_significant))
}

fn vendor(entries: &[CpuidEntry]) -> String {
    let words = find(entries, 0, 0).map_or([0; 3], |leaf| [leaf.ebx, leaf.edx, leaf.ecx]);
    let bytes: Vec<u8> = words.into_iter().flat_map(u32::to_le_bytes).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use vmm_hypervisor::Hypervisor;
    use vmm_hypervisor::fake::Fake;

    use super::*;
    use crate::cpuid::{Cpuid, CpuidOptions};
    use crate::topology::Topology;

    fn supported() -> Vec<CpuidEntry> {
        Fake::new().supported_cpuid().unwrap()
    }

    fn leaf(entries: &mut [CpuidEntry], leaf: u32) -> &mut CpuidEntry {
        entries.iter_mut().find(|entry| entry.function == leaf).unwrap()
    }

    #[test]
    fn every_guest_fits_the_host_that_it_booted_on() {
        let topology = Topology { threads_per_core: 2, cores_per_die: 3, dies_per_package: 2, packages: 2 };
        for nested in [true, false] {
            let options = CpuidOptions { topology, max_phys_bits: Some(40), nested };
            let cpuid = Cpuid::new(&supported(), &options);
            (0..4).for_each(|vcpu| check(&cpuid.of(vcpu), &supported()).unwrap());
        }
    }

    #[test]
    fn what_is_lacking_is_named() {
        let lacks = |change: &dyn Fn(&mut Vec<CpuidEntry>)| {
            let mut given = supported();
            change(&mut given);
            check(&given, &supported()).unwrap_err().to_string()
        };
        let extended = CpuidEntry { function: 7, index_significant: true, ..CpuidEntry::default() };
        assert_eq!(
            lacks(&|given| given.push(CpuidEntry { ebx: 1 << 16, ..extended })),
            "the guest was given AVX512F (CPUID 0x7.0 Ebx bit 16), which this host does not support"
        );
        assert_eq!(
            lacks(&|given| given.push(CpuidEntry { index: 1, eax: 1 << 16, ..extended })),
            "the guest was given CPUID 0x7.1 Eax bit 16, which this host does not support"
        );
        assert_eq!(
            lacks(&|given| leaf(given, 0).ebx = 0x756e_6547),
            "the guest was given a processor of GenuenticAMD, this host's is of AuthenticAMD"
        );
        assert_eq!(
            lacks(&|given| leaf(given, 0x8000_0008).eax = 0x3034),
            "the guest was given 52 bits of physical address, this host has 48"
        );
        let tiles = CpuidEntry {
            function: 0xd,
            index: 18,
            index_significant: true,
            eax: 8192,
            ebx: 2816,
            ..extended
        };
        assert_eq!(
            lacks(&|given| given.push(tiles)),
            "XSAVE component 18 had (8192, 2816) (size and offset), on this host it has (0, 0)"
        );
    }

    #[test]
    fn all_that_is_lacking_is_listed() {
        let mut given = supported();
        assert_eq!(lacking(&given, &supported()), []);
        let extended = CpuidEntry { function: 7, index_significant: true, ..CpuidEntry::default() };
        given.push(CpuidEntry { ebx: 1 << 16 | 1 << 30, ..extended });
        leaf(&mut given, 0x8000_0008).eax = 0x3034;
        let names: Vec<String> = lacking(&given, &supported()).iter().map(ToString::to_string).collect();
        assert_eq!(names.len(), 3, "{names:?}");
        assert!(
            names[0].contains("AVX512F") && names[1].contains("AVX512BW") && names[2].contains("52 bits")
        );
        leaf(&mut given, 0).ebx = 0x756e_6547;
        assert!(matches!(lacking(&given, &supported())[..], [Lacks::Vendor { .. }]));
    }

    #[test]
    fn what_follows_from_the_guests_registers_is_not_asked_for() {
        let mut given = supported();
        leaf(&mut given, 1).ecx |= 1 << 27;
        check(&given, &supported()).unwrap();
        let mut more = supported();
        leaf(&mut more, 1).ecx |= 1 << 28;
        check(&supported(), &more).unwrap();
        check(&more, &supported()).unwrap_err();
    }
}
