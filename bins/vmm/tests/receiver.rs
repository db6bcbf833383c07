//! A receiver under seeded random inputs, and under mutants of whole sessions.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]

use vmm_fuzzing::{Random, mutate, rounds};

mod peer;

/// What lies in the fuzz target's folder of that `kind`.
fn inputs(kind: &str) -> Vec<Vec<u8>> {
    let folder = format!("{}/../../fuzz/{kind}/receiver", env!("CARGO_MANIFEST_DIR"));
    let inputs =
        std::fs::read_dir(folder).unwrap().map(|entry| std::fs::read(entry.unwrap().path()).unwrap());
    inputs.collect()
}

#[test]
fn a_whole_session_brings_the_vm_and_a_part_of_it_does_not() {
    let frames = peer::frames();
    let arrives: Vec<_> = (0..=frames).map(|count| peer::receiver(&vec![0; count])).collect();
    let first = arrives.iter().position(|arrived| *arrived).unwrap();
    assert!(frames - 2 <= first && arrives[first..].iter().all(|arrived| *arrived), "{arrives:?}");
}

#[test]
fn fuzz_a_receiver_takes_no_vm_that_is_not_given() {
    let seeds = inputs("seeds");
    let mut random = Random::new(0x2545_f491_4f6c_dd1d);
    for round in 0..rounds(300) {
        let mut bytes = match round % 3 {
            0 => (0..random.below(60)).map(|_| random.byte()).collect(),
            1 => vec![0; random.below(peer::frames())],
            _ => seeds[random.below(seeds.len())].clone(),
        };
        for _ in 0..random.below(6) {
            mutate(&mut bytes, &mut random, &[]);
        }
        peer::receiver(&bytes);
    }
}

#[test]
fn what_long_runs_found_holds() {
    let inputs = inputs("corpora");
    assert!(!inputs.is_empty());
    for bytes in inputs {
        peer::receiver(&bytes);
    }
}
