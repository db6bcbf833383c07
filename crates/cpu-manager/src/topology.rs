//! Threads, cores, dies, packages, and the APIC IDs that follow from them.

/// How the vCPUs are arranged. Every part is at least 1; a 0 counts as 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Topology {
    /// Hardware threads of a core.
    pub threads_per_core: u8,
    /// Cores of a die.
    pub cores_per_die: u8,
    /// Dies of a package.
    pub dies_per_package: u8,
    /// Packages.
    pub packages: u8,
}

impl Topology {
    /// One package with one die and `vcpus` single-threaded cores: what a guest gets that was not told
    /// otherwise.
    pub fn flat(vcpus: u8) -> Self {
        Self { threads_per_core: 1, cores_per_die: vcpus.max(1), dies_per_package: 1, packages: 1 }
    }

    /// vCPUs in all.
    pub fn vcpus(&self) -> u32 {
        self.threads_per_package() * u32::from(self.packages.max(1))
    }

    /// Threads of one package.
    pub fn threads_per_package(&self) -> u32 {
        self.threads_per_die() * u32::from(self.dies_per_package.max(1))
    }

    /// Threads of one die.
    pub(crate) fn threads_per_die(&self) -> u32 {
        self.core_threads() * u32::from(self.cores_per_die.max(1))
    }

    /// Threads of one core.
    pub(crate) fn core_threads(&self) -> u32 {
        u32::from(self.threads_per_core.max(1))
    }

    /// Bits of the APIC ID below the core's number.
    pub fn thread_bits(&self) -> u32 {
        bits(self.threads_per_core)
    }

    /// Bits of the APIC ID below the die's number.
    pub fn core_bits(&self) -> u32 {
        self.thread_bits() + bits(self.cores_per_die)
    }

    /// Bits of the APIC ID below the package's number.
    pub fn die_bits(&self) -> u32 {
        self.core_bits() + bits(self.dies_per_package)
    }

    /// The x2APIC ID of vCPU `index`: each level's number in the fewest bits that hold it (Intel SDM
    /// volume 3, "Hierarchical Mapping of Shared Resources"). Equal to `index` where every level is a
    /// power of two.
    pub fn apic_id(&self, index: u32) -> u32 {
        let threads = self.core_threads();
        let cores = u32::from(self.cores_per_die.max(1));
        let dies = u32::from(self.dies_per_package.max(1));
        let thread = index % threads;
        let core = index / threads % cores;
        let die = index / (threads * cores) % dies;
        let package = index / (threads * cores * dies);
        thread | core << self.thread_bits() | die << self.core_bits() | package << self.die_bits()
    }
}

/// Bits that hold the numbers below `count`.
fn bits(count: u8) -> u32 {
    u32::from(count.max(1)).next_power_of_two().trailing_zeros()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn powers_of_two_leave_no_holes() {
        let t = Topology { threads_per_core: 2, cores_per_die: 4, dies_per_package: 1, packages: 2 };
        assert_eq!((0..16).map(|i| t.apic_id(i)).collect::<Vec<_>>(), (0..16).collect::<Vec<_>>());
        assert_eq!((t.thread_bits(), t.core_bits(), t.die_bits(), t.vcpus()), (1, 3, 3, 16));
    }

    #[test]
    fn odd_counts_leave_holes_and_ids_stay_unique() {
        let t = Topology { threads_per_core: 1, cores_per_die: 3, dies_per_package: 1, packages: 2 };
        assert_eq!((0..6).map(|i| t.apic_id(i)).collect::<Vec<_>>(), [0, 1, 2, 4, 5, 6]);
    }

    proptest::proptest! {
        #[test]
        fn ids_are_unique_and_grow(threads in 1_u8..5, cores in 1_u8..9, dies in 1_u8..4, packages in 1_u8..4) {
            let t = Topology {
                threads_per_core: threads, cores_per_die: cores, dies_per_package: dies, packages,
            };
            let ids: Vec<_> = (0..t.vcpus()).map(|i| t.apic_id(i)).collect();
            proptest::prop_assert!(ids.windows(2).all(|w| w[0] < w[1]));
        }
    }
}
