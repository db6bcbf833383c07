//! The real binary against its own OpenAPI document, by schemathesis: valid, invalid and made-up requests, while another
//! client walks the VM through its life.
//!
//! Schemathesis makes up paths of files that a VMM would write, so the VMM is confined to a scratch folder.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]

use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vmm_tests::bridge::Bridge;
use vmm_tests::cache::Cache;
use vmm_tests::harness::{Api, Scratch, Vmm, vm_config};
use vmm_tests::python;
use vmm_tests::run::tail;
use vmm_tests::tiny::Guest;

/// How long one run may take.
const LIMIT: Duration = Duration::from_secs(600);

/// What the life of the VM is made of; in any order some are refused, which is an answer, too.
const LIFE: [&str; 7] =
    ["vm.boot", "vm.pause", "vm.resume", "vm.boot", "vm.reboot", "vm.shutdown", "vm.delete"];

#[test]
fn the_confinement_holds() {
    let (scratch, outside) = (Scratch::new(), Scratch::new());
    let vmm = Vmm::confined(&scratch, &[]);
    let mut api = vmm.api();
    let precious = outside.write("precious", "p");
    for file in [precious.clone(), outside.path("new")] {
        let mut config = vm_config(&scratch.guest(Guest::Halt), &file);
        api.create(&config);
        let answer = api.put("vm.boot");
        assert!(answer.status >= 400 && answer.body.contains("denied"), "{answer:?}");
        api.puts(&["vm.delete"]);
        // The same in its folder works.
        config["serial"]["file"] = json!(scratch.path("serial"));
        api.create(&config);
        api.puts(&["vm.boot", "vm.delete"]);
    }
    assert_eq!(std::fs::read_to_string(precious).unwrap(), "p");
    assert!(!outside.path("new").exists());
}

#[test]
fn schemathesis_finds_nothing() {
    let tool = python::environment(&Cache::open().unwrap(), "schemathesis", &read("requirements.txt"));
    let tool = tool.unwrap_or_else(|error| panic!("{}", vmm_tests::error::describe(&error)));
    let scratch = Scratch::new();
    let guest = vm_config(&scratch.guest(Guest::Halt), &scratch.path("serial"));
    let mut vmm = Vmm::confined(&scratch, &[]);
    let mut missing = guest.clone();
    missing["payload"]["kernel"] = json!(scratch.path("missing"));
    vmm.api().create(&guest);
    vmm.api().puts(&["vm.boot"]);
    let document = scratch.write("openapi.json", document(&mut vmm.api(), &guest).to_string());
    vmm.api().puts(&["vm.delete"]);
    let before = vmm.holdings_at_rest();
    for accept in ["*/*", "application/json"] {
        let left = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut random = Random(1);
                while !left.load(Ordering::SeqCst) {
                    let vm = if random.next(4) == 0 { &missing } else { &guest };
                    walk(&mut vmm.api(), vm, &[random.next(LIFE.len())]);
                    std::thread::sleep(Duration::from_millis(20));
                }
            });
            let bridge = Bridge::to(vmm.socket()).unwrap();
            let run = Run { tool: &tool, document: &document, bridge: &bridge, accept };
            let outcome = run.outcome(&scratch);
            left.store(true, Ordering::SeqCst);
            outcome.unwrap_or_else(|what| panic!("with Accept {accept}: {what}"));
        });
    }
    assert!(vmm.is_running(), "the VMM ended:\n{}", vmm.stderr.tail());
    vmm.api().puts(&["vm.delete"]);
    vmm.expect_holdings(&before, "after schemathesis");
    vmm.api().puts(&["vmm.shutdown"]);
    vmm.expect_exit(0);
}

fn files() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("schemathesis")
}

fn read(name: &str) -> String {
    std::fs::read_to_string(files().join(name)).unwrap()
}

/// The document that the VMM serves, without what is not built, the end of the VMM and the stream of events; with a VM that boots
/// as the example.
fn document(api: &mut Api, guest: &Value) -> Value {
    let answer = api.get("vmm.openapi");
    assert_eq!(answer.status, 200, "{answer:?}");
    let mut document = answer.json();
    let paths = document["paths"].as_object_mut().unwrap();
    paths.remove("/vmm.shutdown").unwrap();
    // It never ends.
    paths.remove("/vmm.events").unwrap();
    paths.retain(|_, item| item.as_object().unwrap().values().all(|operation| operation["x-later"] != true));
    assert!(paths.len() >= 26, "{paths:?}");
    for path in ["/vm.create", "/vm.validate"] {
        paths[path]["put"]["requestBody"]["content"]["application/json"]["example"] = guest.clone();
    }
    document
}

/// Takes steps of a VM's life, creating `vm` where there is none.
fn walk(api: &mut Api, vm: &Value, steps: &[usize]) {
    let created = api.try_create(vm);
    assert!(matches!(created.status, 204 | 409), "{created:?}");
    for step in steps.iter().copied() {
        let answer = api.put(LIFE[step]);
        // The VM of another may be there instead, whose boot fails.
        assert!(matches!(answer.status, 204 | 404 | 409 | 500), "{}: {answer:?}", LIFE[step]);
    }
}

/// One run of schemathesis.
struct Run<'a> {
    tool: &'a Path,
    document: &'a Path,
    bridge: &'a Bridge,
    accept: &'a str,
}

impl Run<'_> {
    /// What is wrong, if anything; what it printed is printed.
    fn outcome(&self, scratch: &Scratch) -> Result<(), String> {
        let output = scratch.path("schemathesis.txt");
        let file = std::fs::File::create(&output).map_err(|error| error.to_string())?;
        let mut command = Command::new(self.tool);
        command
            .args(["-m", "schemathesis.cli", "--config-file"])
            .arg(files().join("schemathesis.toml"))
            .arg("run")
            .arg(self.document)
            .arg(format!("--url=http://{}/api/v1", self.bridge.address()))
            .arg(format!("--header=Accept: {}", self.accept))
            .arg("--no-color")
            .env("SCHEMATHESIS_HOOKS", files().join("checks.py"))
            .current_dir(scratch.folder())
            .stdin(Stdio::null())
            .stdout(file.try_clone().map_err(|error| error.to_string())?)
            .stderr(file);
        let status = status_within(LIMIT, &mut command);
        println!("{}", said(&output));
        match status? {
            status if status.success() => Ok(()),
            status => Err(format!("schemathesis found something ({status}), see above")),
        }
    }
}

fn status_within(limit: Duration, command: &mut Command) -> Result<ExitStatus, String> {
    let mut child = command.spawn().map_err(|error| error.to_string())?;
    let start = Instant::now();
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Ok(status),
            Ok(None) if start.elapsed() < limit => std::thread::sleep(Duration::from_millis(100)),
            other => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(format!("it did not end within {limit:?} ({other:?})"));
            }
        }
    }
}

fn said(output: &Path) -> String {
    tail(&String::from_utf8_lossy(&std::fs::read(output).unwrap_or_default()), 400)
}

/// xorshift64.
struct Random(u64);

impl Random {
    fn next(&mut self, below: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % below as u64).unwrap()
    }
}
