//! Configurations and option strings under a seeded mutator.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "test code")]

mod fuzzing;

use serde_json::Value;
use vmm_api::commands::operations;
use vmm_api::openapi::document;
use vmm_api::options::FLAGS;
use vmm_fuzzing::{Random, mutate, rounds};

const FULL: &str = r#"{"cpus": {"boot_vcpus": 2, "max_vcpus": 4, "topology": {"threads_per_core": 1, "cores_per_die": 4,
"dies_per_package": 1, "packages": 1}, "affinity": [{"vcpu": 0, "host_cpus": [0, 1]}]}, "memory": {"size": 0, "zones":
[{"id": "a", "size": 1048576, "shared": true}]}, "payload": {"kernel": "/k", "cmdline": "console=ttyS0"}, "disks":
[{"path": "/d", "image_type": "Raw", "serial": "s", "id": "disk", "pci_device_id": 3}], "serial": {"mode": "File", "file":
"/s"}, "console": {"mode": "Null"}, "rng": {"src": "/dev/urandom"}, "platform": {"uuid": "x"}, "net": [{"ip": "10.0.0.1"}]}"#;
const OLD: &str = r#"{"kernel": {"path": "/k"}, "cmdline": {"args": "a"}, "sgx_epc": [], "memory": {"size": 1048576, "file": null}}"#;
const OPTIONS: [&str; 9] = [
    "boot=2,max=4,topology=1:4:1:1,affinity=[0@[0,1],1@[2-3]]",
    "size=512M,shared=on,hugepages=off",
    "id=a,size=1G",
    "path=/d,readonly=on,image_type=raw,bw_size=1000,bw_refill_time=10",
    "tap=,mac=52:54:00:00:00:01,ip=10.0.0.1,mask=255.255.255.0",
    "file=/tmp/x",
    "off",
    "\"quoted, text\"",
    "console=ttyS0 root=/dev/vda1",
];

#[test]
fn fuzz_configurations() {
    fuzzing::seeds("config").iter().for_each(|seed| fuzzing::documents::config(seed));
    let mut random = Random::new(0x1234_5678_9abc_def1);
    let schema = document(&operations())["components"]["schemas"].clone();
    let names: Vec<&str> = schema.as_object().into_iter().flatten().map(|(name, _)| name.as_str()).collect();
    for turn in 0..rounds(4000) {
        let mut text = match turn % 4 {
            0 => OLD.as_bytes().to_vec(),
            1 => FULL.as_bytes().to_vec(),
            // Every name of the document somewhere.
            _ => {
                let mut config: Value = serde_json::from_str(FULL).unwrap();
                let object = &schema[names[random.below(names.len())]]["properties"];
                for (name, _) in object.as_object().into_iter().flatten().take(1 + random.below(9)) {
                    config[name] = value(&mut random, 4);
                }
                config.to_string().into_bytes()
            }
        };
        for _ in 0..random.below(4) {
            mutate(&mut text, &mut random, &[]);
        }
        fuzzing::documents::config(&text);
    }
}

#[test]
fn fuzz_restored_configurations() {
    let seeds = fuzzing::seeds("restored_config");
    seeds.iter().for_each(|seed| fuzzing::documents::restored(seed));
    let mut random = Random::new(0x5eed_0f5a_7ed0_0001);
    for turn in 0..rounds(4000) as usize {
        let mut text = seeds[turn % seeds.len()].clone();
        for _ in 0..=random.below(4) {
            mutate(&mut text, &mut random, &[]);
        }
        fuzzing::documents::restored(&text);
    }
}

#[test]
fn fuzz_option_strings() {
    fuzzing::seeds("options").iter().for_each(|seed| fuzzing::documents::options(seed));
    let mut random = Random::new(0xfeed_beef_cafe_1235);
    for _ in 0..rounds(8000) {
        let mut text = Vec::new();
        for _ in 0..=random.below(5) {
            text.push(u8::try_from(random.below(FLAGS.len())).unwrap());
            text.extend_from_slice(OPTIONS[random.below(OPTIONS.len())].as_bytes());
            text.push(b'\n');
        }
        for _ in 0..random.below(4) {
            mutate(&mut text, &mut random, &[]);
        }
        fuzzing::documents::options(&text);
    }
}

/// Any JSON value.
fn value(random: &mut Random, depth: usize) -> Value {
    match random.below(if depth == 0 { 6 } else { 8 }) {
        0 => Value::Null,
        1 => Value::Bool(random.below(2) == 0),
        2 => random.below(5).into(),
        3 => random.next().into(),
        4 => ["", "Raw", "File", "/p", "10.0.0.1"][random.below(5)].into(),
        5 => Value::from(-1),
        6 => (0..random.below(3)).map(|_| value(random, depth - 1)).collect(),
        _ => {
            let keys = ["id", "path", "mode", "size", "socket", "file"];
            let pair = |random: &mut Random| (keys[random.below(6)].to_owned(), value(random, depth - 1));
            Value::Object((0..random.below(4)).map(|_| pair(random)).collect())
        }
    }
}
