//! Snapshots of memory that changes while it is written are those of memory that stood still.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "tests fail by panicking")]
#![allow(clippy::single_range_in_vec_init, reason = "one range")]

use std::fs;
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use fixture::*;
use proptest::prelude::*;
use vmm_snapshot::directory::{
    BytesMemory, CHUNK, Chain, Draft, HostStorage, Increment, MemorySource, PAGE, Place, WriteError,
};

mod fixture;

/// Two regions of two and a half chunks.
const PAGES: u64 = CHUNK / PAGE * 5 / 2;

/// Memory that is changed while it is read: these ranges give what is nowhere at the end.
struct Torn<'a> {
    memory: &'a BytesMemory,
    torn: &'a [Vec<Range<u64>>],
}

impl MemorySource for Torn<'_> {
    fn places(&self) -> Vec<Place> {
        self.memory.places()
    }

    /// Pages of one byte value are skipped where it is zero, so that there are holes to be seen.
    fn next_data(&self, region: usize, offset: u64) -> io::Result<Option<Range<u64>>> {
        let bytes = &self.memory.0[region].1;
        let page = |at: u64| &bytes[at as usize..(at + PAGE) as usize];
        let torn = |at: u64| self.torn[region].iter().any(|range| range.start <= at && at < range.end);
        let some = |at: &u64| torn(*at) || page(*at).iter().any(|byte| *byte != 0);
        let end = bytes.len() as u64;
        let first = (offset / PAGE * PAGE..end).step_by(PAGE as usize).find(some);
        Ok(first.map(|start| start.max(offset)..start + PAGE))
    }

    fn read(&self, region: usize, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.memory.read(region, offset, bytes)?;
        for range in &self.torn[region] {
            let (start, end) = (range.start.max(offset), range.end.min(offset + bytes.len() as u64));
            if start < end {
                bytes[(start - offset) as usize..(end - offset) as usize].fill(0x5a);
            }
        }
        Ok(())
    }
}

/// Pages that change, and what they become.
type Changes = Vec<(u64, u8)>;

/// Writes a snapshot of memory that changes once after each pass, and leaves `memory` as it is at the end.
fn write_live(path: &Path, parent: Option<&Increment<'_>>, memory: &mut BytesMemory, passes: &[Changes]) {
    let nothing = || vec![Vec::new(), Vec::new()];
    let mut changed = passes.iter().map(|changes| {
        let mut ranges = nothing();
        for (page, byte) in changes {
            let (region, range) = set(memory, *page, *byte);
            ranges[region].push(range);
        }
        (memory.clone(), ranges)
    });
    // What a pass reads while it changes is told to the next one.
    let steps: Vec<_> = changed.by_ref().collect();
    let torn = |pass: usize| steps.get(pass).map_or_else(nothing, |(_, ranges)| ranges.clone());
    let first = steps.first().map_or(&*memory, |(after, _)| after);
    let draft = Draft::begin(&HostStorage, path).unwrap();
    let mut filled = draft.memory(&Torn { memory: first, torn: &torn(0) }, parent, &work()).unwrap();
    for (pass, (after, ranges)) in steps.iter().enumerate() {
        let memory = steps.get(pass + 1).map_or(after, |(next, _)| next);
        filled = filled.again(&Torn { memory, torn: &torn(pass + 1) }, ranges, &work()).unwrap();
    }
    let filled = if passes.len().is_multiple_of(2) { filled.rehash(&work()).unwrap() } else { filled };
    commit(filled).unwrap();
}

fn changes() -> impl Strategy<Value = Changes> {
    // Bytes are often zero, and pages often the same.
    let byte = prop_oneof![Just(0), 1..4u8];
    let page = prop_oneof![0..2 * PAGES, 0..8u64, 2 * PAGES - 4..2 * PAGES];
    prop::collection::vec((page, byte), 0..12)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_passes_give_what_one_pass_gives(
        before in changes(),
        since in changes(),
        passes in prop::collection::vec(changes(), 0..4),
        incremental in any::<bool>(),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let mut memory = memory(PAGES, &before);
        write(&path("parent"), &memory);
        let mut changed = vec![Vec::new(), Vec::new()];
        for (page, byte) in &since {
            let (region, range) = set(&mut memory, *page, *byte);
            changed[region].push(range);
        }
        let increment = Increment { parent: Path::new("../parent"), id: None, changed: &changed, packed: false };
        write_live(&path("live"), incremental.then_some(&increment), &mut memory, &passes);
        let live = Chain::open(&path("live")).unwrap();
        live.verify(&work()).unwrap();
        prop_assert!(same(&load(&live).unwrap(), &memory));

        let mut all = changed.clone();
        for (page, _) in passes.iter().flatten() {
            let (region, page) = ((page / PAGES) as usize, page % PAGES);
            all[region].push(page * PAGE..(page + 1) * PAGE);
        }
        let increment = Increment { parent: Path::new("../parent"), id: None, changed: &all, packed: false };
        write_on(&HostStorage, &path("still"), &memory, incremental.then_some(&increment), &work()).unwrap();
        let still = Chain::open(&path("still")).unwrap();
        prop_assert_eq!(live.newest().table(), still.newest().table());
        for file in ["memory-0.bin", "memory-1.bin", "chunks.bin", "state.cbor", "manifest.json"] {
            prop_assert!(fs::read(path("live").join(file)).unwrap() == fs::read(path("still").join(file)).unwrap());
        }
        // Packed, it holds the same in as many bytes.
        let increment = Increment { packed: true, ..increment };
        write_on(&HostStorage, &path("packed"), &memory, Some(&increment), &work()).unwrap();
        let packed = Chain::open(&path("packed")).unwrap();
        packed.verify(&work()).unwrap();
        prop_assert!(same(&load(&packed).unwrap(), &memory));
        if incremental {
            prop_assert_eq!(packed.newest().table(), still.newest().table());
        }
        for (region, table) in packed.newest().table().regions.iter().enumerate() {
            let file = fs::metadata(path("packed").join(format!("memory-{region}.bin"))).unwrap();
            prop_assert_eq!(file.len(), table.extents.bytes());
        }
    }
}

#[test]
fn what_became_zero_takes_no_space_and_no_hash() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("live");
    let mut memory = memory(PAGES, &[]);
    for page in 0..600 {
        set(&mut memory, page, 1);
    }
    let mut zero = fixture::memory(PAGES, &[(599, 1)]);
    let filled = Draft::begin(&HostStorage, &path).unwrap().memory(&memory, None, &work()).unwrap();
    let filled = filled.again(&zero, &[vec![0..600 * PAGE], vec![]], &work()).unwrap();
    // Something comes where nothing was.
    let (_, range) = set(&mut zero, 2 * PAGES - 1, 7);
    commit(filled.again(&zero, &[vec![], vec![range]], &work()).unwrap()).unwrap();
    let chain = Chain::open(&path).unwrap();
    chain.verify(&work()).unwrap();
    assert!(same(&load(&chain).unwrap(), &zero));
    let numbers = |region: usize| {
        let chunks = chain.newest().table().regions[region].chunks.iter();
        chunks.map(|(number, _)| *number).collect::<Vec<_>>()
    };
    assert_eq!((numbers(0), numbers(1)), (vec![1], vec![2]));
    let blocks = fs::metadata(path.join("memory-0.bin")).unwrap().blocks();
    assert!(blocks * 512 <= 8 * PAGE, "{blocks} blocks");
}

#[test]
fn a_pass_that_fails_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("live");
    let first = memory(4, &[(1, 1)]);
    let begin = || Draft::begin(&HostStorage, &path).unwrap().memory(&first, None, &work()).unwrap();
    let error = begin().again(&first, &[vec![0..5 * PAGE], vec![]], &work()).unwrap_err();
    assert_eq!(error.to_string(), "cannot write such a snapshot: changes outside the region at 0x0");
    let error = begin().again(&first, &[vec![]], &work()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "cannot write such a snapshot: a list of changes per memory region is needed"
    );
    write(&folder.path().join("parent"), &first);
    let none = [vec![], vec![]];
    let increment = Increment { parent: Path::new("../parent"), id: None, changed: &none, packed: true };
    let packed =
        Draft::begin(&HostStorage, &path).unwrap().memory(&first, Some(&increment), &work()).unwrap();
    let error = packed.again(&first, &none, &work()).unwrap_err();
    assert_eq!(error.to_string(), "cannot write such a snapshot: what is packed cannot be written again");
    let error = begin().again(&memory(5, &[]), &[vec![], vec![]], &work()).unwrap_err();
    let expected = "cannot write such a snapshot: the memory has other regions than before";
    assert_eq!(error.to_string(), expected);
    let stop = vmm_snapshot::directory::Work { watch: &|_| std::ops::ControlFlow::Break(()), ..work() };
    let error = begin().again(&first, &[vec![0..1], vec![]], &stop).unwrap_err();
    assert!(matches!(error, WriteError::Cancelled), "{error}");
    let filled = begin().again(&first, &[vec![0..1], vec![]], &work()).unwrap();
    assert!(matches!(filled.rehash(&stop), Err(WriteError::Cancelled)));
    assert!(!path.exists());
}

#[test]
fn who_waits_for_a_snapshot_that_fails_hears_of_it_before_anything_is_removed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("live");
    let first = memory(4, &[(1, 1)]);
    let there = std::sync::Mutex::new(Vec::new());
    let failed = || there.lock().unwrap().push(path.join("memory-0.bin.partial").exists());
    let begin = || Draft::begin(&HostStorage, &path).unwrap().on_failure(&failed);
    let stop = vmm_snapshot::directory::Work { watch: &|_| std::ops::ControlFlow::Break(()), ..work() };
    assert!(matches!(begin().memory(&first, None, &stop), Err(WriteError::Cancelled)));
    let filled = begin().memory(&first, None, &work()).unwrap();
    filled.again(&first, &[vec![0..5 * PAGE], vec![]], &work()).unwrap_err();
    assert_eq!(*there.lock().unwrap(), [true, true]);
    commit(begin().memory(&first, None, &work()).unwrap()).unwrap();
    assert_eq!(there.lock().unwrap().len(), 2, "that one is there");
}

#[test]
fn a_snapshot_whose_manifest_is_not_wanted_any_more_is_none() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("live");
    let first = memory(4, &[(1, 1)]);
    let filled = Draft::begin(&HostStorage, &path).unwrap().memory(&first, None, &work()).unwrap();
    let config = serde_json::value::RawValue::from_string("{}".to_owned()).unwrap();
    let finished = filled.finish(&vmm_snapshot::directory::Contents {
        vmm: "",
        architecture: "",
        created: std::time::UNIX_EPOCH,
        config: &config,
        state: &vmm_snapshot::RecordSet::new(),
    });
    assert!(path.join("memory-0.bin").exists() && !path.join("manifest.json").exists());
    drop(finished.unwrap());
    assert!(!path.exists());
}
