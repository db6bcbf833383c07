//! Writes a snapshot and an incremental one on top, verifies the chain, and folds it.
//!
//! `cargo run -p vmm-snapshot --example roundtrip -- DIR`, where DIR is to be made.

use std::error::Error;
use std::num::NonZeroUsize;
use std::path::Path;
use std::time::SystemTime;

use vmm_snapshot::directory::{
    BytesMemory, Chain, Contents, Draft, HostStorage, Increment, PAGE, Place, Work, inspect, merge,
};
use vmm_snapshot::{NoState, RecordSet};

fn main() -> Result<(), Box<dyn Error>> {
    let folder = std::env::args_os().nth(1).ok_or("usage: roundtrip DIR")?;
    let folder = Path::new(&folder);
    std::fs::create_dir(folder)?;
    let work = Work::quiet(NonZeroUsize::MIN.saturating_add(1));

    let mut ram = vec![0; 4 << 20];
    ram.iter_mut().take(PAGE as usize).for_each(|byte| *byte = 1);
    let place = Place { zone: "mem0".to_owned(), gpa: 0, size: ram.len() as u64 };
    let mut state = RecordSet::new();
    state.put("_rng", &NoState {})?;
    let config = serde_json::value::to_raw_value(&serde_json::json!({ "memory": { "size": ram.len() } }))?;
    let contents = Contents {
        vmm: "example",
        architecture: "x86_64",
        created: SystemTime::now(),
        config: &config,
        state: &state,
    };

    let memory = BytesMemory(vec![(place.clone(), ram.clone())]);
    let id =
        Draft::begin(&HostStorage, &folder.join("full"))?.memory(&memory, None, &work)?.commit(&contents)?;
    println!("full snapshot {id}");

    // One page changes.
    let page = 2 * PAGE..3 * PAGE;
    ram.iter_mut().skip(2 * PAGE as usize).take(PAGE as usize).for_each(|byte| *byte = 2);
    let memory = BytesMemory(vec![(place, ram)]);
    let increment =
        Increment { parent: Path::new("../full"), id: None, changed: &[vec![page]], packed: true };
    let draft = Draft::begin(&HostStorage, &folder.join("later"))?;
    let id = draft.memory(&memory, Some(&increment), &work)?.commit(&contents)?;
    println!("incremental snapshot {id}");

    Chain::open(&folder.join("later"))?.verify(&work)?;
    merge(&folder.join("later"), &HostStorage, &folder.join("merged"), &work)?;
    println!("{}", serde_json::to_string_pretty(&inspect(&folder.join("merged"))?)?);
    Ok(())
}
