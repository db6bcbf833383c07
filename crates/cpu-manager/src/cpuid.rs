//! What CPUID tells a guest.
//!
//! The leaves that the hypervisor supports are the base; this module sets in them what depends on the
//! vCPU (APIC IDs, topology) and takes out what was not asked for. Sources: Intel SDM volume 2 "CPUID",
//! AMD APM volume 3 appendix E, Linux `Documentation/virt/kvm/x86/cpuid.rst`.

use vmm_hypervisor::state::CpuidEntry;

use crate::topology::Topology;

/// What a guest's CPUID is made from, apart from the vCPU's number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuidOptions {
    /// How the vCPUs are arranged.
    pub topology: Topology,
    /// Most bits of a guest physical address; the host's number where that is lower.
    pub max_phys_bits: Option<u8>,
    /// The guest may run guests of its own (VMX, SVM).
    pub nested: bool,
}

/// CPUID of every vCPU of a VM.
#[derive(Debug, Clone)]
pub struct Cpuid {
    source: Source,
}

#[derive(Debug, Clone)]
enum Source {
    /// The same for all vCPUs but for what follows from their place.
    Host { common: Vec<CpuidEntry>, topology: Topology },
    /// What a guest was given before, by vCPU.
    Saved(Vec<Vec<CpuidEntry>>),
}

const LEAF_FEATURES: u32 = 1;
const LEAF_CACHES: u32 = 4;
const LEAF_STRUCTURED: u32 = 7;
const LEAF_TOPOLOGY: u32 = 0xb;
const LEAF_TOPOLOGY_V2: u32 = 0x1f;
const LEAF_EXT_FEATURES: u32 = 0x8000_0001;
const LEAF_ADDRESS_SIZES: u32 = 0x8000_0008;
const LEAF_AMD_CACHES: u32 = 0x8000_001d;
const LEAF_AMD_TOPOLOGY: u32 = 0x8000_001e;

const ECX_VMX: u32 = 1 << 5;
const ECX_X2APIC: u32 = 1 << 21;
const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
const EDX_HTT: u32 = 1 << 28;
const STRUCTURED_ECX_SHSTK: u32 = 1 << 7;
const EXT_ECX_CMP_LEGACY: u32 = 1 << 1;
const EXT_ECX_SVM: u32 = 1 << 2;

/// Level types of leaves 0xb and 0x1f.
const LEVEL_SMT: u32 = 1;
const LEVEL_CORE: u32 = 2;
const LEVEL_DIE: u32 = 5;

impl Cpuid {
    /// From the leaves that the hypervisor supports.
    pub fn new(supported: &[CpuidEntry], options: &CpuidOptions) -> Self {
        let keep = |e: &&CpuidEntry| !matches!(e.function, LEAF_TOPOLOGY | LEAF_TOPOLOGY_V2);
        let mut common: Vec<_> = supported.iter().filter(keep).copied().collect();
        for entry in &mut common {
            adjust_common(entry, options);
        }
        Self { source: Source::Host { common, topology: options.topology } }
    }

    /// What a guest was given when it booted, by vCPU.
    pub fn saved(leaves: Vec<Vec<CpuidEntry>>) -> Self {
        Self { source: Source::Saved(leaves) }
    }

    /// Bits of a guest physical address (leaf 0x80000008); 36 where the leaf is missing.
    pub fn phys_bits(&self) -> u8 {
        let leaves = match &self.source {
            Source::Host { common, .. } => common.as_slice(),
            Source::Saved(leaves) => leaves.first().map(Vec::as_slice).unwrap_or_default(),
        };
        let leaf = leaves.iter().find(|e| e.function == LEAF_ADDRESS_SIZES);
        leaf.map_or(36, |e| e.eax.to_le_bytes()[0])
    }

    /// The leaves of vCPU `index`; none for one that was not there when they were saved.
    pub fn of(&self, index: u32) -> Vec<CpuidEntry> {
        match &self.source {
            Source::Host { common, topology } => of_place(common, topology, topology.apic_id(index)),
            Source::Saved(leaves) => {
                let leaves = usize::try_from(index).ok().and_then(|index| leaves.get(index));
                leaves.cloned().unwrap_or_default()
            }
        }
    }
}

fn of_place(common: &[CpuidEntry], topology: &Topology, apic_id: u32) -> Vec<CpuidEntry> {
    let mut entries = common.to_vec();
    for entry in &mut entries {
        match entry.function {
            LEAF_FEATURES => entry.ebx = entry.ebx & 0x00ff_ffff | apic_id << 24,
            LEAF_AMD_TOPOLOGY => amd_topology(topology, entry, apic_id),
            _ => {}
        }
    }
    let highest = entries.iter().find(|e| e.function == 0).map_or(0, |e| e.eax);
    if highest >= LEAF_TOPOLOGY {
        entries.extend(levels(topology, LEAF_TOPOLOGY, apic_id));
    }
    if highest >= LEAF_TOPOLOGY_V2 && topology.dies_per_package > 1 {
        entries.extend(levels(topology, LEAF_TOPOLOGY_V2, apic_id));
    }
    entries
}

/// Subleaves of 0xb (which knows no dies: a die's cores count as the package's) or 0x1f.
fn levels(t: &Topology, function: u32, apic_id: u32) -> Vec<CpuidEntry> {
    let mut levels = vec![(LEVEL_SMT, t.thread_bits(), t.core_threads())];
    if function == LEAF_TOPOLOGY_V2 {
        levels.push((LEVEL_CORE, t.core_bits(), t.threads_per_die()));
        levels.push((LEVEL_DIE, t.die_bits(), t.threads_per_package()));
    } else {
        levels.push((LEVEL_CORE, t.die_bits(), t.threads_per_package()));
    }
    levels.push((0, 0, 0));
    (0..)
        .zip(levels)
        .map(|(index, (kind, shift, threads))| CpuidEntry {
            function,
            index,
            index_significant: true,
            eax: shift,
            ebx: threads,
            ecx: kind << 8 | index,
            edx: apic_id,
        })
        .collect()
}

fn amd_topology(t: &Topology, entry: &mut CpuidEntry, apic_id: u32) {
    let core = apic_id >> t.thread_bits();
    entry.eax = apic_id;
    entry.ebx = core & 0xff | (t.core_threads() - 1) << 8;
    // One node per package.
    entry.ecx = apic_id >> t.die_bits() & 0xff;
}

/// What is the same for all vCPUs.
fn adjust_common(entry: &mut CpuidEntry, options: &CpuidOptions) {
    let t = &options.topology;
    let in_package = t.threads_per_package();
    let addressable = 1 << t.die_bits();
    match entry.function {
        LEAF_FEATURES => {
            entry.ecx |= ECX_X2APIC | ECX_TSC_DEADLINE | ECX_HYPERVISOR;
            entry.ebx = entry.ebx & 0xff00_ffff | (addressable & 0xff) << 16;
            set(&mut entry.edx, EDX_HTT, in_package > 1);
            if !options.nested {
                entry.ecx &= !ECX_VMX;
            }
        }
        LEAF_CACHES if entry.eax & 0x1f != 0 => {
            // Levels 1 and 2 belong to a core, the last to the package.
            let sharing = if entry.eax >> 5 & 7 < 3 { t.core_threads() } else { in_package };
            let cores = in_package / t.core_threads();
            entry.eax = entry.eax & 0x3fff
                | ((sharing.next_power_of_two() - 1) & 0xfff) << 14
                | ((cores.next_power_of_two() - 1) & 0x3f) << 26;
        }
        // The shadow stack pointer is no MSR, and no part of the saved state yet.
        LEAF_STRUCTURED if entry.index == 0 => entry.ecx &= !STRUCTURED_ECX_SHSTK,
        LEAF_EXT_FEATURES => {
            set(&mut entry.ecx, EXT_ECX_CMP_LEGACY, in_package > 1);
            if !options.nested {
                entry.ecx &= !EXT_ECX_SVM;
            }
        }
        LEAF_ADDRESS_SIZES => {
            let host = entry.eax & 0xff;
            let bits = options.max_phys_bits.map_or(host, |max| host.min(max.into()));
            entry.eax = entry.eax & !0xff | bits;
            entry.ecx = entry.ecx & !0xf0ff | ((in_package - 1) & 0xff) | t.die_bits() << 12;
        }
        LEAF_AMD_CACHES if entry.eax & 0x1f != 0 => {
            let sharing = if entry.eax >> 5 & 7 < 3 { t.core_threads() } else { in_package };
            entry.eax = entry.eax & 0x3fff | ((sharing - 1) & 0xfff) << 14;
        }
        _ => {}
    }
}

fn set(word: &mut u32, bit: u32, on: bool) {
    *word = if on { *word | bit } else { *word & !bit };
}

#[cfg(test)]
mod tests {
    use vmm_hypervisor::Hypervisor;
    use vmm_hypervisor::fake::Fake;

    use super::*;

    fn cpuid(topology: Topology, nested: bool) -> Cpuid {
        let options = CpuidOptions { topology, max_phys_bits: Some(40), nested };
        Cpuid::new(&Fake::new().supported_cpuid().unwrap(), &options)
    }

    fn leaf(entries: &[CpuidEntry], function: u32, index: u32) -> CpuidEntry {
        *entries.iter().find(|e| e.function == function && e.index == index).unwrap()
    }

    #[test]
    fn topology_leaves_follow_the_topology() {
        let t = Topology { threads_per_core: 2, cores_per_die: 3, dies_per_package: 2, packages: 2 };
        let cpuid = cpuid(t, true);
        let last = cpuid.of(t.vcpus() - 1);
        let id = t.apic_id(23);
        assert_eq!(leaf(&last, 1, 0).ebx >> 24, id);
        assert_eq!(leaf(&last, 1, 0).edx & EDX_HTT, EDX_HTT);
        let smt = leaf(&last, 0xb, 0);
        assert_eq!((smt.eax, smt.ebx, smt.ecx, smt.edx), (1, 2, 0x100, id));
        let core = leaf(&last, 0xb, 1);
        assert_eq!((core.eax, core.ebx, core.ecx, core.edx), (4, 12, 0x201, id));
        let die = leaf(&last, 0x1f, 2);
        assert_eq!((die.eax, die.ebx, die.ecx), (4, 12, 0x502));
        assert_eq!(leaf(&last, 0x1f, 3).ecx, 3, "an invalid level ends the list");
        let amd = leaf(&last, 0x8000_001e, 0);
        assert_eq!((amd.eax, amd.ebx, amd.ecx), (id, id >> 1 | 0x100, 1));
        let sizes = leaf(&last, 0x8000_0008, 0);
        assert_eq!((sizes.eax & 0xff, sizes.ecx), (40, 11 | 4 << 12));
    }

    #[test]
    fn one_vcpu_is_no_multiprocessor() {
        let entries = cpuid(Topology::flat(1), false).of(0);
        assert_eq!(leaf(&entries, 1, 0).edx & EDX_HTT, 0);
        assert!(!entries.iter().any(|e| e.function == 0x1f), "no dies, no leaf for them");
        let ecx = leaf(&entries, 1, 0).ecx;
        assert_eq!(
            ecx & (ECX_X2APIC | ECX_TSC_DEADLINE | ECX_HYPERVISOR | ECX_VMX),
            ecx & !ECX_VMX & 0x8120_0000
        );
    }

    #[test]
    fn a_level_of_none_counts_as_one() {
        let none = Topology { threads_per_core: 0, cores_per_die: 0, dies_per_package: 0, packages: 0 };
        assert_eq!(none.vcpus(), 1);
        assert_eq!(cpuid(none, false).of(0), cpuid(Topology::flat(1), false).of(0));
    }

    #[test]
    fn nested_virtualization_is_a_choice() {
        let mut supported = Fake::new().supported_cpuid().unwrap();
        for e in &mut supported {
            (e.ecx, e.edx) = (u32::MAX, u32::MAX);
        }
        for nested in [false, true] {
            let options = CpuidOptions { topology: Topology::flat(1), max_phys_bits: None, nested };
            let entries = Cpuid::new(&supported, &options).of(0);
            assert_eq!(leaf(&entries, 1, 0).ecx & ECX_VMX != 0, nested);
            assert_eq!(leaf(&entries, 0x8000_0001, 0).ecx & EXT_ECX_SVM != 0, nested);
        }
    }

    #[test]
    fn no_guest_gets_a_state_that_is_not_saved() {
        let all = CpuidEntry { function: 7, ecx: u32::MAX, ..CpuidEntry::default() };
        let supported = [all, CpuidEntry { index: 1, ..all }];
        let options = CpuidOptions { topology: Topology::flat(1), max_phys_bits: None, nested: false };
        let entries = Cpuid::new(&supported, &options).of(0);
        assert_eq!(leaf(&entries, 7, 0).ecx, !STRUCTURED_ECX_SHSTK);
        assert_eq!(leaf(&entries, 7, 1).ecx, u32::MAX);
    }
}
