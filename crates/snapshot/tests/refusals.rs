//! What is said of each snapshot that is refused: the message and its causes, word for word.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "tests fail by panicking")]
#![allow(clippy::single_range_in_vec_init, reason = "one range")]

use std::error::Error;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use fixture::*;
use vmm_snapshot::directory::{
    CHUNK, Chain, Hash, HostStorage, Increment, MAX_STATE, PAGE, Snapshot, diff, merge,
};
use vmm_snapshot::{NoState, Record, RecordSet, minicbor};

mod fixture;

/// An error and its causes; the folder is `DIR`.
fn told(error: &dyn Error, folder: &Path) -> String {
    let (mut text, mut next) = (error.to_string(), error.source());
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text.replace(folder.to_str().unwrap(), "DIR")
}

/// What is said of the snapshot `b`, built on `a`, after `change` was done to their folder.
fn after(change: impl FnOnce(&Path)) -> String {
    after_as(false, change)
}

/// The same; `b` is packed or not.
fn after_as(packed: bool, change: impl FnOnce(&Path)) -> String {
    let folder = tempfile::tempdir().unwrap();
    let mut memory = memory(600, &[(1, 0x11), (520, 0x22), (606, 0x33)]);
    write(&folder.path().join("a"), &memory);
    write_child_as(packed, &folder.path().join("b"), "../a", &mut memory, &[(1, 0), (520, 0x44)]);
    change(folder.path());
    let path = folder.path().join("b");
    let error = match Chain::open(&path) {
        Err(error) => error,
        Ok(chain) => match chain.state() {
            Err(error) => error,
            Ok(_) => chain.verify(&work()).unwrap_err(),
        },
    };
    told(&error, folder.path())
}

/// The same after a text in the manifest of `b` was replaced, with an id that belongs to it.
fn forged(from: &str, to: &str) -> String {
    after(|folder| forge(&folder.join("b"), |text| text.replace(from, to)))
}

/// The same with other bytes in a file that the manifest vouches for.
fn vouched(name: &str, bytes: &[u8]) -> String {
    after(|folder| {
        let path = folder.join("b");
        let text = fs::read_to_string(path.join("manifest.json")).unwrap();
        let start = text.find(&format!("\"file\":\"{name}\"")).unwrap();
        let old = &text[start..start + text[start..].find('}').unwrap()];
        let hash = Hash::of(bytes);
        let new = format!("\"file\":\"{name}\",\"size\":{},\"sha256\":\"{hash}\"", bytes.len());
        forge(&path, |text| text.replace(old, &new));
        edit(&path.join(name), |old| *old = bytes.to_vec());
    })
}

#[test]
fn missing() {
    let gone = |name: &'static str| after(|folder| fs::remove_file(folder.join(name)).unwrap());
    assert_eq!(gone("b/manifest.json"), "DIR/b is no snapshot: it has no manifest.json");
    assert_eq!(gone("b/state.cbor"), "DIR/b/state.cbor is missing");
    assert_eq!(gone("b/chunks.bin"), "DIR/b/chunks.bin is missing");
    assert_eq!(gone("b/memory-1.bin"), "DIR/b/memory-1.bin is missing");
    assert_eq!(gone("a/memory-1.bin"), "DIR/b/../a/memory-1.bin is missing");
    assert_eq!(after(|folder| fs::remove_dir_all(folder.join("b")).unwrap()), "DIR/b is missing");
    let file = after(|folder| {
        fs::rename(folder.join("b"), folder.join("c")).unwrap();
        fs::write(folder.join("b"), "").unwrap();
    });
    assert_eq!(file, "DIR/b is no snapshot: it has no manifest.json");
}

#[test]
fn truncated() {
    let cut = |name: &'static str, bytes: usize| {
        after(|folder| edit(&folder.join(name), |old| old.truncate(bytes)))
    };
    assert_eq!(cut("b/manifest.json", 0), "DIR/b/manifest.json is not the manifest of a snapshot");
    assert_eq!(cut("b/manifest.json", 300), "DIR/b/manifest.json is damaged: its hash is wrong");
    assert_eq!(cut("b/state.cbor", 7), "DIR/b/state.cbor has 7 bytes, expected 54");
    assert_eq!(cut("b/chunks.bin", 0), "DIR/b/chunks.bin has 0 bytes, expected 100");
    assert_eq!(cut("b/memory-0.bin", 4096), "DIR/b/memory-0.bin has 4096 bytes, expected 2457600");
    // After it was opened, as a mapping of it would meet.
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a");
    write(&path, &memory(600, &[(520, 1)]));
    let chain = Chain::open(&path).unwrap();
    fs::File::options().write(true).open(path.join("memory-0.bin")).unwrap().set_len(CHUNK + 1).unwrap();
    let error = chain.verify(&work()).unwrap_err();
    assert_eq!(told(&error, folder.path()), "DIR/a/memory-0.bin has 2097153 bytes, expected 2457600");
}

#[test]
fn flipped_bits() {
    let flip =
        |name: &'static str, at: usize| after(|folder| edit(&folder.join(name), |old| old[at] ^= 0x20));
    assert_eq!(flip("b/manifest.json", 40), "DIR/b/manifest.json is damaged: its hash is wrong");
    assert_eq!(flip("b/state.cbor", 20), "DIR/b/state.cbor is damaged: its hash is wrong");
    assert_eq!(flip("b/chunks.bin", 20), "DIR/b/chunks.bin is damaged: its hash is wrong");
    let chunk = "is damaged: the hash of chunk 1 (byte 0x200000) is wrong";
    let page = 520 * PAGE as usize;
    assert_eq!(flip("b/memory-0.bin", page), format!("DIR/b/memory-0.bin {chunk}"));
    assert_eq!(flip("a/memory-0.bin", page), format!("DIR/b/../a/memory-0.bin {chunk}"));
    // Where the table says that all is zero.
    let zero = "DIR/b/memory-1.bin is damaged: the hash of chunk 0 (byte 0x0) is wrong";
    assert_eq!(flip("b/memory-1.bin", 0), zero);
    // What is read of a damaged source is verified by the tools, too.
    let folder = tempfile::tempdir().unwrap();
    let (path, other) = (folder.path().join("a"), folder.path().join("b"));
    write(&path, &memory(600, &[(520, 1)]));
    write(&other, &memory(600, &[]));
    edit(&path.join("memory-0.bin"), |old| old[page] ^= 1);
    let damaged = format!("DIR/a/memory-0.bin {chunk}");
    let error = merge(&path, &HostStorage, &folder.path().join("m"), &work()).unwrap_err();
    let expected = format!("memory region 0 at 0x200000 could not be read: {damaged}");
    assert_eq!(told(&error, folder.path()), expected);
    let (a, b) = (Chain::open(&path).unwrap(), Chain::open(&other).unwrap());
    assert_eq!(told(&diff(&a, &b, &work()).unwrap_err(), folder.path()), damaged);
    assert_eq!(told(&load(&a).err().unwrap(), folder.path()), damaged);
}

#[test]
fn packed_memory() {
    let change = |name: &'static str, change: fn(&mut Vec<u8>)| {
        after_as(true, |folder| edit(&folder.join("b").join(name), change))
    };
    let size = |bytes| format!("DIR/b/memory-0.bin has {bytes} bytes, expected 8192");
    assert_eq!(change("memory-0.bin", |bytes| bytes.truncate(8191)), size(8191));
    assert_eq!(change("memory-0.bin", |bytes| bytes.push(0)), size(8193));
    assert_eq!(change("memory-1.bin", |bytes| bytes.push(0)), "DIR/b/memory-1.bin has 1 bytes, expected 0");
    // A page that became zero, in a chunk that has no hash, and one that has.
    let chunk = |number, byte| {
        format!("DIR/b/memory-0.bin is damaged: the hash of chunk {number} (byte {byte}) is wrong")
    };
    assert_eq!(change("memory-0.bin", |bytes| bytes[4095] = 1), chunk(0, "0x0"));
    assert_eq!(change("memory-0.bin", |bytes| bytes[4096] ^= 1), chunk(1, "0x200000"));
    // What is sparse is not packed because the manifest says so.
    let forged =
        after(|folder| forge(&folder.join("b"), |text| text.replace("{\"format\":1", "{\"format\":2")));
    assert_eq!(forged, size(2_457_600));
    // After it was opened.
    let folder = tempfile::tempdir().unwrap();
    let mut memory = memory(600, &[]);
    write(&folder.path().join("a"), &memory);
    let path = folder.path().join("b");
    write_child(&path, "../a", &mut memory, &[(520, 1)]);
    let chain = Chain::open(&path).unwrap();
    fs::File::options().write(true).open(path.join("memory-0.bin")).unwrap().set_len(7).unwrap();
    let error = told(&load(&chain).err().unwrap(), folder.path());
    assert_eq!(error, "DIR/b/memory-0.bin has 7 bytes, expected 4096");
}

#[test]
fn older_newer_and_other_versions() {
    let format = |to| forged(r#"{"format":1,"#, to);
    assert_eq!(
        format(r#"{"format":3,"#),
        "DIR/b/manifest.json has format 3, this build knows formats up to 2"
    );
    assert_eq!(format(r#"{"format":0,"#), "DIR/b/manifest.json has format 0, the oldest supported is 1");
    assert_eq!(format(r#"{"format":"1","#), "DIR/b/manifest.json is not the manifest of a snapshot");
    let set = |kind: &str, version| {
        let bytes = RecordSet::new();
        let mut record = Record::of(&bytes);
        (record.kind, record.version) = (kind.to_owned(), version);
        vouched("state.cbor", &minicbor::to_vec(record).unwrap())
    };
    let state = "state in DIR/b/state.cbor";
    let newer = "record-set record has version 2, this build knows versions up to 1";
    assert_eq!(set("record-set", 2), format!("{state}: {newer}"));
    let older = "record-set record has version 0, the oldest supported is 1";
    assert_eq!(set("record-set", 0), format!("{state}: {older}"));
    let other = "record is of kind \"none\", expected \"record-set\"";
    assert_eq!(set("none", 1), format!("{state}: {other}"));
    let mut table =
        fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/directory-v1/chunks.bin")).unwrap();
    table[8] = 2;
    let expected = "DIR/b/chunks.bin does not parse: table version 2, expected 1";
    assert_eq!(vouched("chunks.bin", &table), expected);
    // What a device's record says of itself.
    let mut set = RecordSet::new();
    set.insert("rng", Record { version: 9, ..Record::of(&NoState {}) }).unwrap();
    let error = set.take::<NoState>("rng").unwrap_err();
    let expected = "state of \"rng\": none record has version 9, this build knows versions up to 1";
    assert_eq!(told(&error, Path::new("/nothing")), expected);
}

#[test]
fn another_architecture() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a");
    write(&path, &memory(4, &[]));
    let chain = Chain::open(&path).unwrap();
    chain.manifest().check_architecture("x86_64").unwrap();
    let error = chain.manifest().check_architecture("aarch64").unwrap_err();
    let expected = "the snapshot is of architecture \"x86_64\", expected \"aarch64\"";
    assert_eq!(error.to_string(), expected);
}

#[test]
fn files_that_are_no_records_or_tables() {
    assert!(vouched("state.cbor", b"\xff").starts_with("DIR/b/state.cbor does not parse: unexpected type"));
    let expected = "DIR/b/chunks.bin does not parse: the magic number is not that of a chunk table";
    assert_eq!(vouched("chunks.bin", b"VMMSTUFF"), expected);
    let expected = "DIR/b/chunks.bin does not parse: the length does not fit what the table announces";
    assert_eq!(vouched("chunks.bin", b"VMM"), expected);
    let table = |words: &[u32]| {
        let words = words.iter().flat_map(|word| word.to_le_bytes());
        vouched("chunks.bin", &b"VMMCHNKS".iter().copied().chain(words).collect::<Vec<u8>>())
    };
    let told = |what: &str| format!("DIR/b/chunks.bin does not parse: {what}");
    assert_eq!(table(&[1, 7]), told("7 regions, the manifest has 2"));
    assert_eq!(table(&[1, 2, 65537, 0]), told("extents of region 0 are not in order"));
    assert_eq!(table(&[1, 2, 1, 0, 0, 0, 601, 0]), told("extents of region 0 are not in order"));
    assert_eq!(table(&[1, 2, 0, u32::MAX]), told("the length does not fit what the table announces"));
    let chunk = [&[1, 2, 0, 1, 0][..], &[0; 8]].concat();
    assert_eq!(table(&chunk), told("chunks of region 0 are not in order"));
    let wrong = forged(r#""vmm":"#, r#""wmm":"#);
    assert!(
        wrong.starts_with("DIR/b/manifest.json does not parse: unknown field `wmm`, expected one of"),
        "{wrong}"
    );
    assert!(wrong.ends_with("at line 1 column 17"), "{wrong}");
}

#[test]
fn parents() {
    let id = |path: &Path| Snapshot::open(path).unwrap().id().to_string();
    let mut ids = Vec::new();
    let gone = after(|folder| {
        ids.push(id(&folder.join("a")));
        fs::remove_dir_all(folder.join("a")).unwrap();
    });
    assert_eq!(gone, format!("parent {} is missing: no snapshot at DIR/b/../a", ids[0]));
    let unfinished = after(|folder| fs::remove_file(folder.join("a/manifest.json")).unwrap());
    assert_eq!(unfinished, format!("parent {} is missing: no snapshot at DIR/b/../a", ids[0]));
    let other = after(|folder| {
        fs::remove_dir_all(folder.join("a")).unwrap();
        write(&folder.join("a"), &memory(600, &[(2, 2)]));
        ids.push(id(&folder.join("a")));
    });
    assert_eq!(other, format!("DIR/b/../a is snapshot {}, expected the parent {}", ids[1], ids[0]));
    assert_eq!(forged("../a", "../b"), "DIR/b/../b is its own ancestor");
    let zone = forged(r#""zone":"mem0","gpa":0"#, r#""zone":"m","gpa":0"#);
    assert_eq!(zone, "DIR/b has other memory regions than DIR/b/../a");
    let alone = after(|folder| {
        forge(&folder.join("b"), |text| {
            let (start, end) = (text.find("\"parent\":{").unwrap(), text.find(",\"state\"").unwrap());
            format!("{}\"parent\":null{}", &text[..start], &text[end..])
        });
    });
    assert_eq!(alone, "DIR/b has no parent and does not hold all memory");
}

#[test]
fn absurd_counts() {
    let manifest = |what: &str| format!("DIR/b/manifest.json: {what}");
    let size = |to: &str| forged(r#""gpa":0,"size":2457600"#, &format!(r#""gpa":0,"size":{to}"#));
    for (bytes, shown) in [("0", "0x0"), ("1", "0x1"), ("18446744073709547520", "0xfffffffffffff000")] {
        let expected = manifest(&format!("region of zone \"mem0\" at 0x0 cannot have {shown} bytes"));
        assert_eq!(size(bytes), expected);
    }
    let overlap = forged(r#""gpa":4294967296"#, r#""gpa":4096"#);
    assert_eq!(overlap, manifest("region of zone \"mem0\" at 0x1000 is not behind the one before it"));
    let far = forged(r#""gpa":4294967296"#, r#""gpa":4503599627370496"#);
    assert_eq!(far, manifest("region of zone \"mem0\" at 0x10000000000000 cannot have 0x258000 bytes"));
    assert_eq!(size("2461696"), "DIR/b/memory-0.bin has 2457600 bytes, expected 2461696");
    let many = after(|folder| {
        forge(&folder.join("b"), |text| {
            let region = |n: u64| format!(r#"{{"zone":"m","gpa":{},"size":4096,"file":"x{n}"}},"#, n * PAGE);
            let regions: String = (0..300).map(region).collect();
            text.replace(r#""memory":["#, &format!(r#""memory":[{regions}"#))
        });
    });
    assert_eq!(many, manifest("302 memory regions, at most 256 are possible"));
    let state = forged(r#""file":"state.cbor","size":54"#, r#""file":"state.cbor","size":268435457"#);
    assert_eq!(state, manifest(&format!("268435457 bytes in state.cbor, at most {MAX_STATE} are possible")));
    let twice = forged("memory-1.bin", "memory-0.bin");
    assert_eq!(twice, manifest("file \"memory-0.bin\" has two purposes"));
    let huge = after(|folder| {
        fs::remove_file(folder.join("b/manifest.json")).unwrap();
        fs::File::create(folder.join("b/manifest.json")).unwrap().set_len(1 << 40).unwrap();
    });
    assert_eq!(huge, manifest("1099511627776 bytes, at most 4194304 are possible"));
}

#[test]
fn links_and_paths_that_leave_the_directory() {
    for name in ["manifest.json", "state.cbor", "chunks.bin", "memory-0.bin"] {
        let link = after(|folder| {
            fs::rename(folder.join("b").join(name), folder.join("real")).unwrap();
            symlink("../real", folder.join("b").join(name)).unwrap();
        });
        assert_eq!(link, format!("DIR/b/{name} is a symbolic link"));
        let pipe = after(|folder| {
            let path = folder.join("b").join(name);
            fs::remove_file(&path).unwrap();
            let mode = rustix::fs::Mode::RUSR;
            let kind = rustix::fs::FileType::Fifo;
            rustix::fs::mknodat(rustix::fs::CWD, &path, kind, mode, 0).unwrap();
        });
        assert_eq!(pipe, format!("DIR/b/{name} is not a regular file"), "and nobody waited for a writer");
        let directory = after(|folder| {
            fs::remove_file(folder.join("b").join(name)).unwrap();
            fs::create_dir(folder.join("b").join(name)).unwrap();
        });
        assert_eq!(directory, format!("DIR/b/{name} is not a regular file"));
    }
    for name in ["../a/memory-0.bin", "/etc/passwd", "..", ".", "", ".hidden", "a/b", "a b", "manifest.json"]
    {
        let expected = format!("DIR/b/manifest.json names {name:?}, which cannot be a file of the snapshot");
        assert_eq!(forged("memory-0.bin", name), expected);
    }
}

#[test]
fn destinations() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a");
    let refused = |path: &Path| {
        let error = write_on(&HostStorage, path, &memory(4, &[(1, 1)]), None, &work()).unwrap_err();
        told(&error, folder.path())
    };
    write(&path, &memory(4, &[]));
    assert_eq!(refused(&path), "DIR/a holds a snapshot already");
    let foreign = folder.path().join("f");
    fs::create_dir(&foreign).unwrap();
    fs::write(foreign.join("x"), "").unwrap();
    assert_eq!(refused(&foreign), "DIR/f is not empty: it holds \"x\"");
    assert_eq!(
        refused(&folder.path().join("no/b")),
        "cannot make directory DIR/no/b: No such file or directory (os error 2)"
    );
    assert_eq!(refused(&foreign.join("x")), "cannot open directory DIR/f/x: Not a directory (os error 20)");
    let empty = folder.path().join("e");
    fs::create_dir(&empty).unwrap();
    let lock = fs::File::open(&empty).unwrap();
    lock.lock().unwrap();
    assert_eq!(refused(&empty), "DIR/e is being written by another snapshot");
    let increment = |parent: &str, changed| {
        let increment = Increment { parent: Path::new(parent), id: None, changed, packed: true };
        let path = folder.path().join("n");
        let error = write_on(&HostStorage, &path, &memory(4, &[]), Some(&increment), &work()).unwrap_err();
        assert!(!path.exists());
        told(&error, folder.path())
    };
    let none = &[Vec::new(), Vec::new()][..];
    let (path, other) = (folder.path().join("n"), Hash([0xab; 32]));
    let replaced = Increment { parent: Path::new("../a"), id: Some(other), changed: none, packed: true };
    let error = write_on(&HostStorage, &path, &memory(4, &[]), Some(&replaced), &work()).unwrap_err();
    let found = Chain::open(&folder.path().join("a")).unwrap().newest().id();
    assert_eq!(
        told(&error, folder.path()),
        format!("parent of the snapshot: DIR/n/../a is snapshot {found}, expected the parent {other}")
    );
    assert_eq!(increment("../x", none), "parent of the snapshot: DIR/n/../x is missing");
    let invalid = "cannot write such a snapshot";
    let outside = [Vec::new(), vec![4 * PAGE..4 * PAGE + 1]];
    assert_eq!(increment("../a", &outside), format!("{invalid}: changes outside the region at 0x100000000"));
    assert_eq!(
        increment("../a", &none[..1]),
        format!("{invalid}: a list of changes per memory region is needed")
    );
}
