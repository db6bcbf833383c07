//! Round trips, chains, golden directories, every refusal, seeded mutators.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "tests fail by panicking")]
#![allow(clippy::single_range_in_vec_init, reason = "one range")]

use std::fs;
use std::ops::ControlFlow;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use fixture::*;
use proptest::prelude::*;
use vmm_snapshot::directory::{
    CHUNK, Chain, Draft, Extents, FileMemory, HostStorage, Increment, MAX_DEPTH, PAGE, Place, ReadError,
    Snapshot, Work, WriteError, diff, inspect, merge,
};

mod fixture;

const FILES: [&str; 5] = ["manifest.json", "state.cbor", "chunks.bin", "memory-0.bin", "memory-1.bin"];

fn folder() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("snapshot");
    (folder, path)
}

/// Two regions of one and a half chunks.
const PAGES: u64 = CHUNK / PAGE * 3 / 2;

#[test]
fn what_is_written_is_read() {
    let (_folder, path) = folder();
    let memory = memory(PAGES, &[(0, 1), (511, 2), (512, 3), (PAGES - 1, 4), (PAGES, 5), (2 * PAGES - 1, 6)]);
    write(&path, &memory);
    let chain = Chain::open(&path).unwrap();
    chain.verify(&work()).unwrap();
    assert!(same(&load(&chain).unwrap(), &memory));
    assert_eq!(chain.state().unwrap(), state());
    assert_eq!(chain.manifest().config.get(), r#"{"cpus":{"boot":2}}"#);
    chain.manifest().check_architecture("x86_64").unwrap();
    let error = chain.manifest().check_architecture("aarch64").unwrap_err();
    assert!(matches!(error, ReadError::Architecture { .. }), "{error}");
    for name in FILES {
        let metadata = fs::symlink_metadata(path.join(name)).unwrap();
        assert_eq!(metadata.permissions().mode() & 0o777, 0o400, "{name}");
    }
    let mut names: Vec<_> = fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["chunks.bin", "manifest.json", "memory-0.bin", "memory-1.bin", "state.cbor"]);
}

#[test]
fn zero_pages_take_no_space_and_holes_are_not_read() {
    let (folder, path) = folder();
    let file =
        fs::File::options().read(true).write(true).create_new(true).open(folder.path().join("ram")).unwrap();
    // A TiB would take minutes if holes were read.
    let size = 1 << 40;
    file.set_len(size).unwrap();
    file.write_all_at(&[7; PAGE as usize], size - PAGE).unwrap();
    file.write_all_at(&[0; 64 * PAGE as usize], 0).unwrap();
    let place = Place { zone: "mem0".to_owned(), gpa: 0, size };
    let memory = FileMemory(vec![(place, file)]);
    let filled = Draft::begin(&HostStorage, &path).unwrap().memory(&memory, None, &work()).unwrap();
    let config = serde_json::value::to_raw_value(&()).unwrap();
    let created = std::time::SystemTime::now();
    let contents = vmm_snapshot::directory::Contents {
        vmm: "",
        architecture: "x86_64",
        created,
        config: &config,
        state: &state(),
    };
    filled.commit(&contents).unwrap();
    let metadata = fs::metadata(path.join("memory-0.bin")).unwrap();
    assert_eq!(metadata.len(), size);
    assert!(metadata.blocks() * 512 <= 16 * PAGE, "{} blocks", metadata.blocks());
    let chain = Chain::open(&path).unwrap();
    chain.verify(&work()).unwrap();
    let pieces = Mutex::new(Vec::new());
    let sink = |piece: vmm_snapshot::directory::Piece<'_>| {
        pieces.lock().unwrap().push((piece.offset, piece.bytes.len()));
        Ok(())
    };
    chain.load(&work(), &sink).unwrap();
    assert_eq!(*pieces.lock().unwrap(), [(size - CHUNK, CHUNK as usize)]);
}

#[test]
fn a_chain_gives_the_newest_page() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let mut memory = memory(PAGES, &[(0, 1), (1, 2), (600, 3), (PAGES + 5, 4)]);
    let first = memory.clone();
    write(&path("a"), &memory);
    // A page changes, one becomes zero, one that was zero becomes something.
    write_child(&path("b"), "../a", &mut memory, &[(0, 9), (1, 0), (700, 8)]);
    let absolute = path("b");
    write_child(&path("c"), absolute.to_str().unwrap(), &mut memory, &[(700, 7), (PAGES + 5, 0)]);
    let chain = Chain::open(&path("c")).unwrap();
    assert_eq!(chain.depth(), 3);
    chain.verify(&work()).unwrap();
    assert!(same(&load(&chain).unwrap(), &memory));

    // What a lazy restore does: the base as it is, the overlay copied over it.
    let mapped = Mutex::new(first.clone());
    chain
        .load_overlay(&work(), &|piece| {
            let start = piece.offset as usize;
            let mut mapped = mapped.lock().unwrap();
            mapped.0[piece.region].1[start..start + piece.bytes.len()].copy_from_slice(piece.bytes);
            Ok(())
        })
        .unwrap();
    assert!(same(&mapped.into_inner().unwrap(), &memory));
    for region in [0, 1] {
        let pieces = Mutex::new(0);
        let count = |piece: vmm_snapshot::directory::Piece<'_>| {
            *pieces.lock().unwrap() += 1;
            assert_eq!(piece.region, region);
            Ok(())
        };
        chain.load_of(&|wanted| wanted == region, &work(), &count).unwrap();
        chain.load_overlay_of(&|wanted| wanted == region, &work(), &count).unwrap();
        // Chunks 0 and 1 of the first region are in use, and chunk 0 of the second; it changed by 0, 1, 700 and by 5.
        assert_eq!(pieces.into_inner().unwrap(), [2 + 2, 1 + 1][region]);
    }
    assert_eq!(chain.overlay().iter().map(Extents::bytes).sum::<u64>(), 4 * PAGE);

    merge(&path("c"), &HostStorage, &path("m"), &work()).unwrap();
    let merged = Chain::open(&path("m")).unwrap();
    assert_eq!(merged.depth(), 1);
    merged.verify(&work()).unwrap();
    assert!(same(&load(&merged).unwrap(), &memory));
    let none = diff(&chain, &merged, &work()).unwrap();
    assert!(none.is_none(), "{none:?}");
    let parent = Chain::open(&path("a")).unwrap();
    let some = diff(&parent, &chain, &work()).unwrap();
    assert!(!some.is_none());
    let some = some.memory.unwrap();
    assert_eq!(some[0].ranges(), [0..2 * PAGE, 700 * PAGE..701 * PAGE]);
    assert_eq!(some[1].ranges(), [5 * PAGE..6 * PAGE]);

    let inspection = inspect(&path("c")).unwrap();
    assert_eq!(inspection.layers.len(), 3);
    assert_eq!(inspection.layers[1].total.held_bytes, 3 * PAGE);
    assert_eq!(inspection.layers[2].regions.iter().map(|of| of.held_bytes).collect::<Vec<_>>(), [PAGE; 2]);
    let [devices] = &inspection.records[..] else { panic!("{:?}", inspection.records) };
    assert_eq!((devices.owner.as_str(), devices.kind.as_str()), ("devices", "record-set"));
    let owners: Vec<_> = devices.records.iter().map(|record| record.owner.as_str()).collect();
    assert_eq!(owners, ["rng"]);
    assert!(serde_json::to_string(&inspection).unwrap().contains(r#""config":{"cpus":{"boot":2}}"#));
}

#[test]
fn many_random_changes_stay_within_the_extents() {
    let folder = tempfile::tempdir().unwrap();
    // Every second page of 1 GiB and a bit: twice the extents that fit.
    let size = 300_000 * PAGE;
    let file =
        fs::File::options().read(true).write(true).create_new(true).open(folder.path().join("ram")).unwrap();
    file.set_len(size).unwrap();
    let ranges: Vec<_> = (0..150_000).map(|page| 2 * page * PAGE..2 * page * PAGE + 1).collect();
    let memory = FileMemory(vec![(Place { zone: "mem0".to_owned(), gpa: 0, size }, file)]);
    let config = serde_json::value::to_raw_value(&()).unwrap();
    let write = |name: &str, increment: Option<&Increment<'_>>| {
        let draft = Draft::begin(&HostStorage, &folder.path().join(name)).unwrap();
        let contents = vmm_snapshot::directory::Contents {
            vmm: "",
            architecture: "x86_64",
            created: std::time::UNIX_EPOCH,
            config: &config,
            state: &state(),
        };
        draft.memory(&memory, increment, &work()).unwrap().commit(&contents).unwrap();
    };
    write("a", None);
    write(
        "b",
        Some(&Increment {
            parent: Path::new("../a"),
            id: None,
            changed: std::slice::from_ref(&ranges),
            packed: true,
        }),
    );
    let chain = Chain::open(&folder.path().join("b")).unwrap();
    let extents = &chain.newest().table().regions[0].extents;
    assert!(extents.ranges().len() <= vmm_snapshot::directory::MAX_EXTENTS);
    assert!(ranges.iter().all(|range| extents.within(range.clone()).eq([range.clone()])));
}

#[test]
fn work_is_told_and_stopped() {
    let (_folder, path) = folder();
    let memory = memory(PAGES, &[(0, 1), (600, 1), (PAGES, 1)]);
    let (calls, last) = (AtomicU64::new(0), AtomicU64::new(0));
    let watch = |progress: vmm_snapshot::directory::Progress| {
        assert_eq!(progress.total, 2 * PAGES * PAGE);
        assert!(last.swap(progress.done, Ordering::Relaxed) <= progress.done);
        if calls.fetch_add(1, Ordering::Relaxed) == 2 {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    };
    let work = Work { watch: &watch, ..work() };
    let error = write_on(&HostStorage, &path, &memory, None, &work).unwrap_err();
    assert!(matches!(error, WriteError::Cancelled), "{error}");
    assert!(!path.exists(), "what was written is gone");
    write(&path, &memory);
    for at in 0..2 {
        let stop = |_| {
            if calls.fetch_add(1, Ordering::Relaxed) == at {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        };
        calls.store(0, Ordering::Relaxed);
        let error = Chain::open(&path).unwrap().verify(&Work { watch: &stop, ..work }).unwrap_err();
        assert!(matches!(error, ReadError::Cancelled), "{error}");
    }
}

#[test]
fn a_destination_is_empty_absent_or_a_failed_attempts() {
    let (_folder, path) = folder();
    let memory = memory(4, &[(0, 1)]);
    let refused = || write_on(&HostStorage, &path, &memory, None, &work()).unwrap_err();
    fs::create_dir(&path).unwrap();
    for foreign in ["file", "state.cbor", "memory-0.bin.partial"] {
        fs::write(path.join(foreign), "mine").unwrap();
        assert!(matches!(refused(), WriteError::NotEmpty { name, .. } if name == foreign));
        assert_eq!(fs::read(path.join(foreign)).unwrap(), b"mine");
        fs::remove_file(path.join(foreign)).unwrap();
    }
    fs::write(path.join("manifest.json.partial"), "").unwrap();
    fs::write(path.join("file"), "mine").unwrap();
    assert!(matches!(refused(), WriteError::NotEmpty { name, .. } if name == "file"));
    fs::remove_file(path.join("file")).unwrap();
    for name in ["state.cbor", "chunks.bin.partial", "memory-0.bin", "memory-7.bin.partial"] {
        fs::write(path.join(name), "left").unwrap();
    }
    let busy = fs::File::open(&path).unwrap();
    busy.lock().unwrap();
    assert!(matches!(refused(), WriteError::Busy { .. }));
    drop(busy);
    write(&path, &memory);
    assert!(!path.join("memory-7.bin.partial").exists());
    assert!(matches!(refused(), WriteError::Exists { .. }));
    assert!(same(&load(&Chain::open(&path).unwrap()).unwrap(), &memory));
}

#[test]
fn golden_directories_are_written_and_read() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let folder = tempfile::tempdir().unwrap();
    let mut memory = memory(4, &[(1, 0x11), (6, 0x22)]);
    write(&folder.path().join("directory-v1"), &memory);
    let children = [("directory-v1-child", false), ("directory-v2-child", true)];
    for (name, packed) in children {
        let changes = [(1, 0), (7, 0x33)];
        write_child_as(packed, &folder.path().join(name), "../directory-v1", &mut memory, &changes);
    }
    let bless = std::env::var_os("VMM_BLESS").is_some_and(|value| value == "1");
    for name in ["directory-v1", children[0].0, children[1].0] {
        if bless && !golden.join(name).exists() {
            fs::create_dir(golden.join(name)).unwrap();
            for file in FILES {
                fs::write(
                    golden.join(name).join(file),
                    fs::read(folder.path().join(name).join(file)).unwrap(),
                )
                .unwrap();
            }
        }
        for file in FILES {
            let (shipped, written) = (golden.join(name).join(file), folder.path().join(name).join(file));
            assert_eq!(fs::read(&shipped).unwrap(), fs::read(written).unwrap(), "{}", shipped.display());
        }
    }
    for (name, packed) in children {
        let chain = Chain::open(&golden.join(name)).unwrap();
        chain.verify(&work()).unwrap();
        assert!(same(&load(&chain).unwrap(), &memory));
        assert_eq!(chain.state().unwrap(), state());
        // What is zero counts, too.
        let size = if packed { PAGE } else { 4 * PAGE };
        for file in ["memory-0.bin", "memory-1.bin"] {
            assert_eq!(fs::metadata(golden.join(name).join(file)).unwrap().len(), size, "{name}");
        }
    }
}

/// The refusal of a good snapshot that `change` made bad.
fn after(change: impl FnOnce(&Path)) -> ReadError {
    let (_folder, path) = folder();
    write(&path, &memory(4, &[(1, 0x11), (6, 0x22)]));
    change(&path);
    refusal(&path)
}

#[test]
fn truncation_and_every_flipped_bit_are_told() {
    for name in FILES {
        let error = after(|path| edit(&path.join(name), |bytes| bytes.truncate(bytes.len() - 1)));
        match name {
            "manifest.json" => assert!(matches!(error, ReadError::Hash { .. }), "{error}"),
            _ => assert!(matches!(&error, ReadError::Size { path, .. } if path.ends_with(name)), "{error}"),
        }
    }
    let (_folder, path) = folder();
    write(&path, &memory(4, &[(1, 0x11), (6, 0x22)]));
    for name in FILES {
        let file = path.join(name);
        let bytes = fs::read(&file).unwrap();
        // Memory: pages that hold something and pages that do not.
        for at in (0..bytes.len()).step_by(if name.starts_with("memory") { 1021 } else { 1 }) {
            edit(&file, |bytes| bytes[at] ^= 1 << (at % 8));
            let error = refusal(&path);
            let (manifest, memory) = (name == "manifest.json", name.starts_with("memory"));
            assert!(
                match &error {
                    ReadError::Hash { path } => path.ends_with(name) && !memory,
                    ReadError::Chunk { path, chunk: 0, .. } => path.ends_with(name) && memory,
                    ReadError::NotASnapshot { .. } | ReadError::Newer { .. } | ReadError::Older { .. } =>
                        manifest,
                    _ => false,
                },
                "{name}, byte {at}: {error}"
            );
            edit(&file, |changed| changed.clone_from(&bytes));
        }
    }
    Chain::open(&path).unwrap().verify(&work()).unwrap();
}

#[test]
fn a_chain_has_an_end() {
    let folder = tempfile::tempdir().unwrap();
    let path = |index: usize| folder.path().join(index.to_string());
    let mut memory = memory(1, &[]);
    write(&path(1), &memory);
    for index in 2..=MAX_DEPTH {
        write_child(
            &path(index),
            &format!("../{}", index - 1),
            &mut memory,
            &[(index as u64 % 2, index as u8)],
        );
    }
    let chain = Chain::open(&path(MAX_DEPTH)).unwrap();
    assert!(same(&load(&chain).unwrap(), &memory));
    let (parent, changed) = (format!("../{MAX_DEPTH}"), [vec![], vec![]]);
    let increment = Increment { parent: Path::new(&parent), id: None, changed: &changed, packed: true };
    let next = path(MAX_DEPTH + 1);
    let error = write_on(&HostStorage, &next, &memory, Some(&increment), &work()).unwrap_err();
    assert!(matches!(error, WriteError::Invalid { .. }), "{error}");
    // A copy of the last one that says to be its own child.
    fs::create_dir(&next).unwrap();
    for name in FILES {
        fs::copy(path(MAX_DEPTH).join(name), next.join(name)).unwrap();
    }
    let id = chain.newest().id().to_string();
    let old = chain.manifest().parent.clone().unwrap();
    forge(&next, |text| text.replace(&old.id.to_string(), &id).replace(&old.location, &parent));
    assert!(matches!(refusal(&next), ReadError::TooDeep { .. }));
}

#[test]
fn a_memory_file_that_grows_is_read_as_far_as_it_was_there() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let mut memory = memory(4096, &[(1, 1)]);
    write(&path("parent"), &memory);
    for (name, packed) in [("sparse", false), ("packed", true)] {
        write_child_as(packed, &path(name), "../parent", &mut memory, &[(2, 2)]);
        let chain = Chain::open(&path(name)).unwrap();
        let file = path(name).join("memory-0.bin");
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
        let end = fs::metadata(&file).unwrap().len();
        let grows = fs::OpenOptions::new().write(true).open(&file).unwrap();
        grows.write_all_at(&[9; 1 << 16], end).unwrap();
        let (told, hears) = std::sync::mpsc::channel();
        let verifying = std::thread::spawn(move || told.send(chain.verify(&work()).is_ok()));
        assert!(hears.recv_timeout(std::time::Duration::from_secs(60)).expect("its end"), "{name}");
        drop(verifying);
    }
}

#[test]
fn states_are_read_where_they_are_wanted() {
    let (_folder, path) = folder();
    write(&path, &memory(4, &[]));
    let snapshot = Snapshot::open(&path).unwrap();
    snapshot.state().unwrap();
    let file = path.join("state.cbor");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    let size = fs::metadata(&file).unwrap().len() as usize;
    fs::write(&file, vec![0; size]).unwrap();
    assert!(matches!(snapshot.state(), Err(ReadError::Hash { .. })));
}

#[test]
fn fuzz_decoders_never_panic() {
    let (_folder, path) = folder();
    write(&path, &memory(4, &[(1, 0x11), (6, 0x22)]));
    let seeds = ["manifest.json", "chunks.bin"].map(|name| fs::read(path.join(name)).unwrap());
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for round in 0..rounds(20_000) as usize {
        let seed = &seeds[round % 2];
        let mut bytes = if round % 2 == 0 { body(seed).to_vec() } else { seed.clone() };
        for _ in 0..=random.below(4) {
            mutate(&mut bytes, &mut random);
        }
        decode_files(&bytes);
    }
}

#[test]
fn fuzz_scripts_of_damage_never_panic() {
    assert!(open_damaged(&[]), "nothing is damaged");
    // The magic number of a table that the manifest vouches for; a byte of memory that is hashed.
    assert!(!open_damaged(&[1, 3, 0, 0x10, 1]) && !open_damaged(&[0, 8, 5, 0, 1]));
    assert!(open_damaged(&[2]) && !open_damaged(&[2, 8, 5, 0, 1]), "and of the packed child");
    let mut random = Random(0x9fb2_1c65_1e98_df25);
    let mut whole = 0;
    for _ in 0..rounds(500) {
        let script: Vec<u8> = (0..1 + 4 * (1 + random.below(3))).map(|_| random.below(256) as u8).collect();
        whole += u32::from(open_damaged(&script));
    }
    assert!(whole > 0, "some changes are none, such as a bit mask of 0");
}

#[test]
fn fuzz_damaged_directories_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (base, path) = (folder.path().join("a"), folder.path().join("b"));
    let mut memory = memory(4, &[(1, 0x11), (6, 0x22)]);
    write(&base, &memory);
    write_child(&path, "../a", &mut memory, &[(1, 0), (7, 0x33)]);
    let mut random = Random(0x2545_f491_4f6c_dd1d);
    for _ in 0..rounds(1_500) {
        let name = FILES[random.below(FILES.len())];
        let file = [&base, &path][random.below(2)].join(name);
        let good = fs::read(&file).unwrap();
        edit(&file, |bytes| (0..=random.below(3)).for_each(|_| mutate(bytes, &mut random)));
        if fs::read(&file).unwrap() != good {
            let error = refusal(&path);
            assert!(!matches!(error, ReadError::Cancelled), "{error}");
            // With a manifest that agrees with the damage it may pass; then it must load, too.
            if name != "manifest.json" || random.below(2) == 0 {
                agree_with(&file, name);
            }
            let _ = Chain::open(&path).and_then(|chain| load(&chain));
            let _ = Snapshot::open(file.parent().unwrap()).and_then(|snapshot| snapshot.state().map(|_| ()));
        }
        restore(&file, good);
    }
    fs::remove_file(base.join("kept")).unwrap_or_default();
    assert!(same(&load(&Chain::open(&path).unwrap()).unwrap(), &memory));
}

/// Makes the manifest agree with a damaged file.
fn agree_with(file: &Path, name: &str) {
    let manifest = file.with_file_name("manifest.json");
    let text = fs::read(&manifest).unwrap();
    let kept = file.with_file_name("kept");
    if !kept.exists() && name != "manifest.json" {
        fs::write(&kept, &text).unwrap();
    }
    let bytes = fs::read(file).unwrap();
    let mut body = String::from_utf8_lossy(body(&text)).into_owned();
    if let Some(at) = body.find(&format!("\"file\":\"{name}\",\"size\":")).filter(|_| name != "manifest.json")
    {
        let end = at + body[at..].find('}').unwrap();
        let hash = vmm_snapshot::directory::Hash::of(&bytes);
        body.replace_range(
            at..end,
            &format!("\"file\":\"{name}\",\"size\":{},\"sha256\":\"{hash}\"", bytes.len()),
        );
    }
    edit(&manifest, |manifest| *manifest = signed(body.as_bytes()));
}

fn restore(file: &Path, good: Vec<u8>) {
    edit(file, |bytes| *bytes = good);
    let kept = file.with_file_name("kept");
    if kept.exists() {
        fs::rename(kept, file.with_file_name("manifest.json")).unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn any_chain_survives(
        first in prop::collection::vec((0..2 * PAGES, any::<u8>()), 0..20),
        rest in prop::collection::vec(prop::collection::vec((0..2 * PAGES, any::<u8>()), 0..10), 0..4),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let mut memory = memory(PAGES, &first);
        write(&folder.path().join("0"), &memory);
        for (index, changes) in rest.iter().enumerate() {
            let path = folder.path().join((index + 1).to_string());
            write_child(&path, &format!("../{index}"), &mut memory, changes);
        }
        let path = folder.path().join(rest.len().to_string());
        let chain = Chain::open(&path).unwrap();
        chain.verify(&work()).unwrap();
        prop_assert!(same(&load(&chain).unwrap(), &memory));
        merge(&path, &HostStorage, &folder.path().join("merged"), &work()).unwrap();
        let merged = Chain::open(&folder.path().join("merged")).unwrap();
        prop_assert!(same(&load(&merged).unwrap(), &memory));
    }
}
