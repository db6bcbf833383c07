//! `vmm snapshot` as a process: what it prints, and how it ends.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]
#![allow(clippy::single_range_in_vec_init, reason = "one range")]

use std::fs;
use std::num::NonZeroUsize;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, UNIX_EPOCH};

use serde_json::{Value, json};
use vmm_snapshot::directory::{
    BytesMemory, Chain, Contents, Draft, HostStorage, Increment, PAGE, Place, Work,
};
use vmm_snapshot::{NoState, RecordSet};

/// A snapshot in `a`, and one in `b` that is built on it: page 1 changes, vCPU 1 comes, a disk's path changes.
struct Scene {
    folder: tempfile::TempDir,
}

impl Scene {
    fn new() -> Self {
        let scene = Self { folder: tempfile::tempdir().unwrap() };
        scene.write("a", 1, &["0"], "old.raw", None);
        let changed = [vec![PAGE..PAGE + 1], vec![]];
        let increment = Increment { parent: Path::new("../a"), id: None, changed: &changed, packed: true };
        scene.write("b", 2, &["0", "1"], "new.raw", Some(&increment));
        scene
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, byte: u8, vcpus: &[&str], disk: &str, increment: Option<&Increment<'_>>) {
        let place = |zone: &str, gpa| Place { zone: zone.to_owned(), gpa, size: 4 * PAGE };
        let mut bytes = vec![0; 4 * PAGE as usize];
        bytes[PAGE as usize] = byte;
        let zero = vec![0; 4 * PAGE as usize];
        let memory = BytesMemory(vec![(place("low", 0), bytes), (place("high\u{1b}", 1 << 32), zero)]);
        let mut cpus = RecordSet::new();
        vcpus.iter().for_each(|id| cpus.put(id, &NoState {}).unwrap());
        let mut state = RecordSet::new();
        state.put("vcpus", &cpus).unwrap();
        let config = json!({ "cpus": { "boot_vcpus": vcpus.len() }, "disks": [{ "path": disk }] });
        let config = serde_json::value::to_raw_value(&config).unwrap();
        let contents = Contents {
            vmm: "0.1.0",
            architecture: "x86_64",
            created: UNIX_EPOCH + Duration::from_millis(1_700_000_000_123),
            config: &config,
            state: &state,
        };
        let work = Work::quiet(NonZeroUsize::MIN);
        let draft = Draft::begin(&HostStorage, &self.path(name)).unwrap();
        draft.memory(&memory, increment, &work).unwrap().commit(&contents).unwrap();
    }

    /// Runs the command in the folder; gives its exit status and what it printed on the two outputs.
    fn run(&self, line: &str) -> (i32, String, String) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmm"));
        command.arg("snapshot").args(line.split(' ')).current_dir(self.folder.path());
        let output = command.output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
    }

    fn json(&self, line: &str) -> (i32, Value) {
        let (code, out, _) = self.run(line);
        (code, serde_json::from_str(&out).unwrap())
    }

    fn id(&self, name: &str) -> String {
        Chain::open(&self.path(name)).unwrap().newest().id().to_string()
    }

    fn damage(&self, name: &str) {
        let path = self.path(name);
        let mut bytes = fs::read(&path).unwrap();
        bytes[5] ^= 4;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        fs::write(&path, bytes).unwrap();
    }
}

#[test]
fn verify_says_what_it_checked_and_what_is_wrong() {
    let scene = Scene::new();
    let (code, out, err) = scene.run("verify b");
    let expected = "\
b/../a: manifest, state, chunk table and 1 chunk of memory (32K held) are as written
b: manifest, state, chunk table and 1 chunk of memory (4K held) are as written
whole: 2 snapshots
";
    assert_eq!((code, out.as_str(), err.as_str()), (0, expected, ""));
    let (code, json) = scene.json("verify a --json");
    let one = json!([{ "id": scene.id("a"), "path": "a", "chunks": 1, "held_bytes": 8 * PAGE }]);
    assert_eq!((code, json), (0, json!({ "whole": true, "snapshots": one, "causes": [] })));

    scene.damage("b/memory-0.bin");
    let (code, out, err) = scene.run("verify b");
    assert_eq!((code, out.lines().count()), (5, 1), "the parent is whole: {out}");
    let damaged = "b/memory-0.bin is damaged: the hash of chunk 0 (byte 0x0) is wrong";
    assert_eq!(err, format!("error: {damaged}\n"));
    let (code, json) = scene.json("verify b --json");
    assert_eq!((code, &json["whole"], &json["causes"]), (5, &json!(false), &json!([damaged])));

    fs::rename(scene.path("a"), scene.path("moved")).unwrap();
    let (code, out, err) = scene.run("verify b");
    assert_eq!((code, out.as_str()), (5, ""));
    assert!(
        err.starts_with("error: parent ") && err.ends_with("is missing: no snapshot at b/../a\n"),
        "{err}"
    );
    assert_eq!(scene.run("verify nothing").0, 5);
    // Not about what is there.
    fs::create_dir_all(scene.path("x")).unwrap();
    assert_eq!(scene.run(&format!("verify {}", "n".repeat(300))).0, 1);
}

#[test]
fn inspect_shows_chain_memory_records_and_configuration() {
    let scene = Scene::new();
    let (code, out, err) = scene.run("inspect b");
    assert_eq!((code, err.as_str()), (0, ""));
    let (a, b) = (scene.id("a"), scene.id("b"));
    let expected = format!(
        "\
snapshot      {b}
format        2
written by    vmm 0.1.0
created       2023-11-14T22:13:20.123000Z
architecture  x86_64
memory        32K in 2 regions

LAYER  ID            CREATED                      STATE  DIRECTORY
1      {}  2023-11-14T22:13:20.123000Z     50  b/../a
2      {}  2023-11-14T22:13:20.123000Z     63  b

REGION      ADDRESS      SIZE  LAYER  EXTENTS  HELD  CHUNKS  ON DISK
low         0x0          16K       1        1  16K        1  4K
low         0x0          16K       2        1  4K         1  4K
high\\u{{1b}}  0x100000000  16K       1        1  16K        0  0
high\\u{{1b}}  0x100000000  16K       2        0  0          0  0

RECORD  KIND        VERSION  BYTES
vcpus   record-set        1     25
  0     none              1      1
  1     none              1      1

CONFIG
{{
  \"cpus\": {{
    \"boot_vcpus\": 2
  }},
  \"disks\": [
    {{
      \"path\": \"new.raw\"
    }}
  ]
}}
",
        &a[..12],
        &b[..12]
    );
    assert_eq!(out, expected);
    let (code, json) = scene.json("inspect b --json");
    assert_eq!((code, &json["id"]), (0, &json!(b)));
    assert_eq!(json["records"][0]["records"][1]["owner"], "1");
    assert_eq!(json["layers"][1]["regions"][0]["held_bytes"], PAGE);
    assert_eq!(json["config"]["cpus"]["boot_vcpus"], 2);
    let (code, out, err) = scene.run("inspect nothing");
    assert_eq!((code, out.as_str(), err.as_str()), (1, "", "error: nothing is missing\n"));
}

#[test]
fn merge_folds_into_a_new_directory_and_refuses_one_that_is_in_use() {
    let scene = Scene::new();
    let (code, out, err) = scene.run("merge b m");
    assert_eq!((code, out, err.as_str()), (0, format!("m is snapshot {}\n", scene.id("m")), ""));
    assert_eq!(scene.run("diff b m").0, 0, "the same content");
    assert_eq!(Chain::open(&scene.path("m")).unwrap().depth(), 1);
    let (code, _, err) = scene.run("merge b a");
    assert_eq!((code, err.as_str()), (1, "error: a holds a snapshot already\n"));
    fs::create_dir(scene.path("full")).unwrap();
    fs::write(scene.path("full/file"), "").unwrap();
    let (code, _, err) = scene.run("merge b full");
    assert_eq!((code, err.as_str()), (1, "error: full is not empty: it holds \"file\"\n"));
    scene.damage("a/memory-0.bin");
    let (code, _, err) = scene.run("merge b again");
    let expected = "error: memory region 0 at 0x0 could not be read\n  \
                    caused by: b/../a/memory-0.bin is damaged: the hash of chunk 0 (byte 0x0) is wrong\n";
    assert_eq!((code, err.as_str()), (1, expected));
    assert!(!scene.path("again").exists());
}

#[test]
fn diff_says_what_differs() {
    let scene = Scene::new();
    let (code, out, err) = scene.run("diff a b");
    let expected = "\
config cpus.boot_vcpus: 1 -> 2
config disks[0].path: \"old.raw\" -> \"new.raw\"
record vcpus/1: absent -> none v1, 1 bytes
memory low at 0x0: 4K in 1 range
  0x1000 to 0x2000, 4K
";
    assert_eq!((code, out.as_str(), err.as_str()), (5, expected, ""));
    assert_eq!(scene.run("diff b b"), (0, "no difference\n".to_owned(), String::new()));
    let (code, json) = scene.json("diff a b --json");
    assert_eq!(code, 5);
    assert_eq!(json["memory"], json!([[{ "start": 4096, "end": 8192 }], []]));
    assert_eq!(json["config"][1]["path"], "disks[0].path");
    assert_eq!(json["records"][0]["before"], Value::Null);
    assert_eq!(scene.run("diff a nothing").0, 1);
}
