//! Saved state under a seeded mutator: every kind of record, and a machine of damaged ones.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]

mod fuzzing;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use vmm_fuzzing::{Random, hostile_records, mutate, rounds};

use fuzzing::{DECODERS, Rig, decode};

/// The repository's root.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// The packages that the VMM is made of.
fn packages() -> Vec<PathBuf> {
    let crates = fs::read_dir(root().join("crates")).unwrap().map(|entry| entry.unwrap().path());
    crates.chain([root().join("bins/vmm")]).collect()
}

/// Rust files below `folder` that are part of a program: not those of the test harnesses.
fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
        if entry.is_dir() && !entry.ends_with("testing") {
            sources(&entry, found);
        } else if entry.extension().is_some_and(|extension| extension == "rs") {
            found.push(entry);
        }
    }
}

/// Kinds and versions that `text` declares by `schema!`, outside its tests.
fn declared(text: &str) -> Vec<(String, u16)> {
    let program = text.split("#[cfg(test)]\nmod tests").next().unwrap();
    let of_line = |line: &str| {
        let (_, declared) = line.split_once("schema!(").filter(|(before, _)| !before.contains("//"))?;
        let (kind, rest) = declared.split_once(": \"")?.1.split_once("\" v")?;
        let version = rest.split(|c: char| !c.is_ascii_digit()).next()?;
        Some((kind.to_owned(), version.parse().ok()?))
    };
    program.lines().filter_map(of_line).collect()
}

#[test]
fn every_kind_of_record_is_fuzzed() {
    let mut found: BTreeSet<_> = [("record-set".to_owned(), 1)].into();
    for package in packages() {
        let mut files = Vec::new();
        sources(&package.join("src"), &mut files);
        found.extend(files.iter().flat_map(|file| declared(&fs::read_to_string(file).unwrap())));
    }
    let listed: BTreeSet<_> =
        DECODERS.iter().map(|decoder| (decoder.kind.to_owned(), decoder.version)).collect();
    assert_eq!(found, listed, "declared, and those of tests/fuzzing/mod.rs");
    let example = "schema!(A: \"a\" v1);\n// schema!(B: \"b\" v1);\nx::schema!(A2: \"a\" v12 after A);";
    assert_eq!(declared(example), [("a".to_owned(), 1), ("a".to_owned(), 12)]);
}

/// What shipped of `kind`.
fn golden(kind: &str, version: u16) -> Vec<u8> {
    let name = format!("tests/golden/{kind}-v{version}.bin");
    let file = packages().into_iter().map(|package| package.join(&name)).find(|file| file.exists());
    file.map_or_else(|| panic!("no {name}"), |file| fs::read(file).unwrap())
}

#[test]
fn fuzz_every_kind_of_record() {
    let mut random = Random::new(0x5a5e_d5a7_e000_0001);
    // A length of 64 bits.
    let length: &[u8] = &[0x9b, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff];
    for decoder in DECODERS {
        // The state of those that have none is an empty array.
        let stateless = ["none", "virtio-rng"].contains(&decoder.kind);
        let record = if stateless { vec![0x80] } else { golden(decoder.kind, decoder.version) };
        assert!(decode(&record).contains(&decoder.kind), "{}", decoder.kind);
        hostile_records(&record).iter().for_each(|bytes| drop(decode(bytes)));
        for _ in 0..rounds(200) {
            let mut bytes = record.clone();
            for _ in 0..=random.below(4) {
                mutate(&mut bytes, &mut random, &[length]);
            }
            decode(&bytes);
        }
    }
}

#[test]
fn fuzz_machines_of_damaged_records() {
    let rig = Rig::new();
    assert!(rig.restore(&[]), "nothing is damaged");
    assert!(rig.records() >= 18, "those of devices and vCPUs are damaged, too: {}", rig.records());
    let mut random = Random::new(0xdada_9ed0_0000_0001);
    let (mut restored, mut refused) = (0, 0);
    for _ in 0..rounds(600) {
        let script: Vec<u8> = (0..4 * (1 + random.below(3))).map(|_| random.byte()).collect();
        if rig.restore(&script) { restored += 1 } else { refused += 1 }
    }
    assert!(restored > 0 && refused > 0, "{restored} restored, {refused} refused");
}
