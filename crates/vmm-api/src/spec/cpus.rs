//! vCPUs.

use std::collections::BTreeMap;

use super::check::Checker;
use super::{CpuSpec, MAX_VCPUS, Topology};
use crate::config::{CpuAffinity, CpuTopology, CpusConfig};

pub(super) fn check(config: &CpusConfig, checker: &mut Checker) -> Option<CpuSpec> {
    let (boot, max) = (config.boot_vcpus, config.max_vcpus);
    if boot == 0 {
        checker.invalid("cpus.boot_vcpus", "at least one vCPU must boot");
    }
    if max < boot {
        checker.invalid("cpus.max_vcpus", format!("{max} is less than boot_vcpus, {boot}"));
    }
    if max.max(boot) > MAX_VCPUS {
        let path = if max > MAX_VCPUS { "cpus.max_vcpus" } else { "cpus.boot_vcpus" };
        checker.not_built(path, format_args!("more than {MAX_VCPUS} vCPUs"));
    }
    if !(32..=52).contains(&config.max_phys_bits) {
        checker.invalid("cpus.max_phys_bits", format!("{} is not in 32 to 52", config.max_phys_bits));
    }
    Some(CpuSpec {
        boot,
        max,
        topology: topology(config.topology.as_ref(), max, checker),
        affinity: config.affinity.iter().flatten().enumerate().fold(
            BTreeMap::new(),
            |mut pinned, (index, affinity)| {
                pin(index, affinity, max, &mut pinned, checker);
                pinned
            },
        ),
        nested: config.nested,
        max_phys_bits: config.max_phys_bits,
        core_scheduling: config.core_scheduling,
    })
}

fn topology(config: Option<&CpuTopology>, max: u32, checker: &mut Checker) -> Topology {
    let Some(config) = config else {
        return Topology { threads_per_core: 1, cores_per_die: max, dies_per_package: 1, packages: 1 };
    };
    let parts = [
        ("threads_per_core", config.threads_per_core),
        ("cores_per_die", config.cores_per_die),
        ("dies_per_package", config.dies_per_package),
        ("packages", config.packages),
    ];
    for (name, _) in parts.iter().filter(|(_, part)| *part == 0) {
        checker.invalid(format!("cpus.topology.{name}"), "no part of the topology may be 0");
    }
    let product = parts.iter().try_fold(1u64, |product, (_, part)| product.checked_mul(u64::from(*part)));
    if product != Some(u64::from(max)) && product != Some(0) {
        let product = product.map_or_else(|| "far more".to_owned(), |product| product.to_string());
        checker.invalid("cpus.topology", format!("its parts multiply to {product}, but max_vcpus is {max}"));
    }
    Topology {
        threads_per_core: config.threads_per_core,
        cores_per_die: config.cores_per_die,
        dies_per_package: config.dies_per_package,
        packages: config.packages,
    }
}

fn pin(
    index: usize,
    config: &CpuAffinity,
    max: u32,
    pinned: &mut BTreeMap<u32, std::collections::BTreeSet<u32>>,
    checker: &mut Checker,
) {
    let vcpu = config.vcpu;
    if vcpu >= max {
        checker.invalid(
            format!("cpus.affinity[{index}].vcpu"),
            format!("there is no vCPU {vcpu}: max_vcpus is {max}"),
        );
    }
    if config.host_cpus.is_empty() {
        checker.invalid(format!("cpus.affinity[{index}].host_cpus"), "at least one host CPU is needed");
    }
    if pinned.insert(vcpu, config.host_cpus.iter().copied().collect()).is_some() {
        checker.invalid(format!("cpus.affinity[{index}].vcpu"), format!("vCPU {vcpu} is given twice"));
    }
}
