//! Whether a VM of another VMM can be this one's: what is missing is all told at once, before any of its memory moves.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;

use vmm_api::config::{Fault as ConfigFault, FaultKind};
use vmm_api::spec::{Checked, ReceiveSpec};
use vmm_cpu_manager::compat;
use vmm_hypervisor::state::CpuidEntry;
use vmm_memory_manager::absent;
use vmm_migration_protocol::{CpuNeeds, CpuidLeaf, Fault, Features, Hello, Missing, MissingKind, Reason};

use crate::exit::chain;
use crate::{machine, preflight};

/// What this host gives a guest.
#[derive(Debug, Clone)]
pub(crate) struct Host {
    pub(crate) most_vcpus: u32,
    /// What its hypervisor supports of CPUID; `None` where that is not known, and not compared.
    pub(crate) cpuid: Option<Vec<CpuidEntry>>,
}

/// What a guest that was given `cpuid` needs of a host.
pub(crate) fn needs(vcpus: u32, phys_bits: u8, cpuid: &[CpuidEntry]) -> CpuNeeds {
    let leaf = |entry: &CpuidEntry| CpuidLeaf {
        leaf: entry.function,
        subleaf: entry.index,
        registers: [entry.eax, entry.ebx, entry.ecx, entry.edx],
    };
    CpuNeeds { vcpus, phys_bits, cpuid: cpuid.iter().map(leaf).collect(), ..CpuNeeds::default() }
}

/// The configuration of the VM here: `document` is what the source sent.
///
/// # Errors
/// What is wrong with it, or missing here.
pub(super) fn check(
    spec: &ReceiveSpec,
    host: &Host,
    hello: &Hello,
    document: &[u8],
) -> Result<Checked, Fault> {
    let checked = spec.configure(document).map_err(|faults| refused(&faults))?;
    let mut missing = lacking(host, hello, &checked);
    let mut lacks = |kind, name: &str| missing.push(Missing::new(kind, name));
    let zones: u64 = checked.spec.memory.total().get();
    if zones != hello.memory.bytes() {
        let name = format!("{} bytes, the configuration has {zones}", hello.memory.bytes());
        lacks(MissingKind::Memory, &name);
    }
    if hello.required.contains(Features::POST_COPY)
        && let Err(text) = absent(&checked)
    {
        lacks(MissingKind::Memory, &text);
    }
    let foreign = spec.foreign(&checked.spec);
    for (place, path) in &foreign {
        let name = format!("{place}: {} is not among this receiver's paths", path.display());
        lacks(MissingKind::Resource, &name);
    }
    // What the operator does not allow is not looked at either.
    if foreign.is_empty() {
        if !hello.required.contains(Features::LOCAL_MEMORY) {
            filled(&checked).iter().for_each(|name| lacks(MissingKind::Memory, name));
        }
        resources(&checked).iter().for_each(|name| lacks(MissingKind::Resource, name));
    }
    if missing.is_empty() { Ok(checked) } else { Err(Fault::incompatible(missing)) }
}

/// Whether its guest can run before its memory is there.
fn absent(checked: &Checked) -> Result<(), String> {
    let zones = machine::zones(&checked.spec).map_err(|error| chain(&error))?;
    absent::supported(&zones).map_err(|error| format!("for post-copy: {}", chain(&error)))
}

/// Memory that shows what is in a file instead of zeroes, which are not sent. It may be the file that the source's guest runs on.
fn filled(checked: &Checked) -> Vec<String> {
    let zones = machine::zones(&checked.spec).unwrap_or_default();
    let names = zones.iter().filter_map(|zone| {
        let path = zone.filled_file()?.display();
        Some(format!("zone {:?}: its file {path} holds something, and memory is copied (not local)", zone.id))
    });
    names.collect()
}

/// What the processor lacks.
fn lacking(host: &Host, hello: &Hello, checked: &Checked) -> Vec<Missing> {
    let mut names = Vec::new();
    if checked.spec.cpus.max > host.most_vcpus {
        names.push(format!("{} vCPUs, {} are possible", checked.spec.cpus.max, host.most_vcpus));
    }
    let entry = |leaf: &CpuidLeaf| {
        let [eax, ebx, ecx, edx] = leaf.registers;
        let (function, index) = (leaf.leaf, leaf.subleaf);
        CpuidEntry { function, index, index_significant: true, eax, ebx, ecx, edx }
    };
    let given: Vec<CpuidEntry> = hello.cpu.cpuid.iter().map(entry).collect();
    if let Some(supported) = host.cpuid.as_ref().filter(|_| !given.is_empty()) {
        names.extend(compat::lacking(&given, supported).iter().map(ToString::to_string));
    }
    names.iter().map(|name| Missing::new(MissingKind::Cpu, name)).collect()
}

/// Files and sockets that cannot be had. Images are the source's still: they are not locked.
fn resources(checked: &Checked) -> Vec<String> {
    let mut names = Vec::new();
    for (index, disk) in checked.spec.disks.iter().enumerate() {
        let opened = OpenOptions::new()
            .read(true)
            .write(!disk.image.readonly)
            .custom_flags(libc::O_NONBLOCK)
            .open(&disk.image.path);
        if let Err(error) = opened {
            names.push(format!("disks[{index}].path: {}: {error}", disk.image.path.display()));
        }
    }
    let consoles = preflight::consoles(&checked.spec);
    names.extend(consoles.iter().map(|fault| format!("{}: {}", fault.path, fault.message)));
    names
}

/// Parts that this build does not have are devices that are missing.
fn refused(faults: &[ConfigFault]) -> Fault {
    let text = |fault: &ConfigFault| format!("{}: {}", fault.path, fault.message);
    let is_absent = |fault: &&ConfigFault| matches!(fault.kind, FaultKind::NotBuilt | FaultKind::Unknown);
    let absent: Vec<&ConfigFault> = faults.iter().filter(is_absent).collect();
    if absent.len() == faults.len() && !absent.is_empty() {
        let missing = absent.iter().map(|fault| Missing::new(MissingKind::Device, &text(fault)));
        return Fault::incompatible(missing.collect());
    }
    let texts: Vec<String> = faults.iter().map(text).collect();
    Fault::new(Reason::Incompatible, &format!("the configuration is refused: {}", texts.join("; ")))
}

#[cfg(test)]
mod tests {
    use vmm_api::config::ReceiveMigrationData;
    use vmm_hypervisor::Hypervisor;
    use vmm_hypervisor::fake::Fake;
    use vmm_migration_protocol::{MemoryLayout, Purpose, Region, SessionId, Versions};

    use super::*;

    fn spec(json: &serde_json::Value) -> ReceiveSpec {
        let config: ReceiveMigrationData = serde_json::from_value(json.clone()).unwrap();
        ReceiveSpec::check(&config).unwrap()
    }

    fn host() -> Host {
        Host { most_vcpus: 4, cpuid: Some(Fake::new().supported_cpuid().unwrap()) }
    }

    fn hello(bytes: u64, cpu: CpuNeeds) -> Hello {
        let region = Region { gpa: 0, length: bytes, zone: "mem0".into() };
        Hello {
            versions: Versions::OURS,
            session: SessionId([1; 16]),
            purpose: Purpose::Check,
            features: Features::NONE,
            required: Features::NONE,
            connections: 1,
            memory: MemoryLayout::new(vec![region]).unwrap(),
            cpu,
            program: String::new(),
        }
    }

    fn document(disk: &std::path::Path, cpus: u32) -> serde_json::Value {
        serde_json::json!({
            "payload": { "kernel": "/k" },
            "cpus": { "boot_vcpus": cpus, "max_vcpus": cpus },
            "memory": { "size": 16 << 20 },
            "disks": [{ "path": disk, "image_type": "Raw", "id": "_disk0" }],
            "serial": { "mode": "Null" },
            "console": { "mode": "Off" },
        })
    }

    fn told(spec: &ReceiveSpec, hello: &Hello, document: &serde_json::Value) -> Option<String> {
        let result = check(spec, &host(), hello, document.to_string().as_bytes());
        result.err().map(|fault| fault.to_string())
    }

    #[test]
    fn all_that_is_missing_is_told_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let disk = folder.path().join("disk");
        std::fs::write(&disk, [0; 4096]).unwrap();
        let here = spec(&serde_json::json!({ "receiver_url": "unix:/m" }));
        let mut given = Fake::new().supported_cpuid().unwrap();
        let fits = hello(16 << 20, needs(1, 40, &given));
        assert_eq!(told(&here, &fits, &document(&disk, 1)), None);
        // A source of another build tells nothing of its CPUs: their state is compared later.
        assert_eq!(told(&here, &hello(16 << 20, CpuNeeds::default()), &document(&disk, 1)), None);

        let avx512 =
            CpuidEntry { function: 7, index_significant: true, ebx: 1 << 16, ..CpuidEntry::default() };
        given.push(avx512);
        let greedy = hello(32 << 20, needs(1, 40, &given));
        let text = told(&here, &greedy, &document(&folder.path().join("absent"), 5)).unwrap();
        for part in [
            "Cpu 5 vCPUs",
            "Cpu the guest was given AVX512F",
            "Memory 33554432 bytes",
            "disks[0].path",
            "absent",
        ] {
            assert!(text.contains(part), "{text} does not say {part:?}");
        }
        let mut with_net = document(&disk, 1);
        with_net["net"] = serde_json::json!([{ "tap": "tap0" }]);
        let text = told(&here, &fits, &with_net).unwrap();
        assert!(text.contains("Device net"), "{text}");
        let text = told(&here, &fits, &serde_json::json!({ "payload": 7 })).unwrap();
        assert!(text.contains("the configuration is refused: payload"), "{text}");
    }

    /// The guest's zeroes are not sent, and what is in the file may be the source's memory.
    #[test]
    fn memory_is_not_copied_into_a_file_that_holds_something() {
        let folder = tempfile::tempdir().unwrap();
        let (disk, file) = (folder.path().join("disk"), folder.path().join("memory"));
        std::fs::write(&disk, [0; 4096]).unwrap();
        let here = spec(&serde_json::json!({ "receiver_url": "unix:/m" }));
        let mut copied = hello(16 << 20, CpuNeeds::default());
        let mut document = document(&disk, 1);
        for shared in [false, true] {
            let zone = serde_json::json!({ "id": "z", "size": 16 << 20, "file": file, "shared": shared });
            document["memory"] = serde_json::json!({ "size": 0, "zones": [zone] });
            std::fs::File::create(&file).unwrap().set_len(16 << 20).unwrap();
            copied.required = Features::NONE;
            assert_eq!(told(&here, &copied, &document), None);
            std::fs::write(&file, [1; 4096]).unwrap();
            let text = told(&here, &copied, &document).unwrap();
            assert!(text.contains("zone \"z\": its file") && text.contains("holds something"), "{text}");
            copied.required = Features::LOCAL_MEMORY;
            assert_eq!(told(&here, &copied, &document), None);
        }
    }

    #[test]
    fn a_receiver_that_anybody_reaches_opens_only_what_its_operator_names() {
        let folder = tempfile::tempdir().unwrap();
        let disk = folder.path().join("disk");
        std::fs::write(&disk, [0; 4096]).unwrap();
        let hello = hello(16 << 20, CpuNeeds::default());
        let mut stolen = document(std::path::Path::new("/etc/shadow"), 1);
        stolen["serial"] = serde_json::json!({ "mode": "File", "file": "/root/.profile" });
        let open = spec(&serde_json::json!({ "receiver_url": "tcp:0.0.0.0:1" }));
        let text = told(&open, &hello, &stolen).unwrap();
        for place in ["payload.kernel: /k", "disks[0].path: /etc/shadow", "serial.file: /root/.profile"] {
            assert!(text.contains(place), "{text} does not say {place:?}");
        }
        assert!(!std::path::Path::new("/root/.profile.new").exists());
        let mapped = spec(&serde_json::json!({
            "receiver_url": "tcp:0.0.0.0:1", "paths": ["/k"],
            "disks": [{ "id": "_disk0", "path": disk }], "serial": { "mode": "Null" },
        }));
        assert_eq!(told(&mapped, &hello, &stolen), None);
    }
}
