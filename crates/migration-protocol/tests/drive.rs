//! Both machines under seeded random inputs, and under mutants of those.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]

use vmm_fuzzing::{Random, mutate, rounds};
use vmm_migration_protocol::{DestinationState, SourceState};

use common::drive;

mod common;

fn seeds(target: &str) -> Vec<Vec<u8>> {
    inputs("seeds", target)
}

fn inputs(kind: &str, target: &str) -> Vec<Vec<u8>> {
    let folder = format!("{}/../../fuzz/{kind}/{target}", env!("CARGO_MANIFEST_DIR"));
    let seeds = std::fs::read_dir(folder).unwrap().map(|entry| std::fs::read(entry.unwrap().path()).unwrap());
    let seeds: Vec<_> = seeds.collect();
    assert!(!seeds.is_empty());
    seeds
}

/// Any bytes, and mutants of the seeds that lead to the end of the way.
fn drive<S>(target: &str, machine: impl Fn(&[u8]) -> S) {
    let seeds = seeds(target);
    let mut random = Random::new(0x9e37_79b9_7f4a_7c15);
    for round in 0..rounds(6_000) {
        let mut bytes = if round % 2 == 0 {
            (0..random.below(120)).map(|_| random.byte()).collect()
        } else {
            seeds[random.below(seeds.len())].clone()
        };
        for _ in 0..random.below(6) {
            mutate(&mut bytes, &mut random, &[]);
        }
        machine(&bytes);
    }
}

#[test]
fn fuzz_a_source_keeps_its_ledger() {
    drive("source", drive::source);
}

#[test]
fn fuzz_a_destination_keeps_its_ledger() {
    drive("destination", drive::destination);
}

#[test]
fn seeds_lead_to_the_end() {
    for seed in seeds("source") {
        assert_eq!(drive::source(&seed), SourceState::Ended, "{seed:?}");
    }
    for seed in seeds("destination") {
        assert_eq!(drive::destination(&seed), DestinationState::Ended, "{seed:?}");
    }
}

#[test]
fn fuzz_what_long_runs_found() {
    for bytes in inputs("corpora", "frames") {
        common::decode(&bytes);
    }
    for bytes in inputs("corpora", "source") {
        drive::source(&bytes);
    }
    for bytes in inputs("corpora", "destination") {
        drive::destination(&bytes);
    }
}
