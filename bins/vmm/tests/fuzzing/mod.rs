//! Shared by the tests on stable Rust and the fuzz targets in fuzz/.
#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code; each user takes a part"
)]

use std::path::PathBuf;
use std::sync::Arc;

use vmm::machine::stages::Stages;
use vmm::machine::{
    ClockChoice, ClockV1, EventPost, Locks, Machine, MachineV1, Plan, Ports, Saved, SavedMemory,
};
use vmm_api::config::UnknownFields;
use vmm_api::spec::{MachineSpec, parse_and_check};
use vmm_cpu_manager::state::VcpuV1;
use vmm_device_manager::tree::DeviceTreeV1;
use vmm_device_model::thread::{ThreadHook, Unconfined};
use vmm_epoll::mailbox;
use vmm_hypervisor::fake::{Fake, Live};
use vmm_memory_manager::map::{MemoryLayoutV1, MemoryMap};
use vmm_pci::host_bridge::HostBridgeV1;
use vmm_pci::slots::SlotsV1;
use vmm_platform_devices::cmos::CmosV1;
use vmm_platform_devices::ged::GedV1;
use vmm_platform_devices::i8042::I8042V1;
use vmm_platform_devices::ioapic::IoApicV1;
use vmm_platform_devices::pm_timer::PmTimerV1;
use vmm_platform_devices::pvpanic::PvPanicV1;
use vmm_platform_devices::serial::SerialV1;
use vmm_platform_devices::vm_generation::VmGenerationV1;
use vmm_snapshot::{NoState, Record, RecordSet, Schema};
use vmm_tests::tiny::Guest;
use vmm_virtio_devices::block::BlockV1;
use vmm_virtio_devices::console::ConsoleV1;
use vmm_virtio_devices::rng::RngV1;
use vmm_virtio_devices::transport::VirtioPciV1;

/// A version of a kind of record.
pub(crate) struct Decoder {
    pub(crate) kind: &'static str,
    pub(crate) version: u16,
    decode: fn(&[u8]) -> bool,
}

const fn of<S: Schema>() -> Decoder {
    // Whatever decodes must encode to the same bytes.
    let decode = |bytes: &[u8]| match S::decode(bytes) {
        Ok(state) => {
            assert_eq!(state.encode(), bytes, "{}", S::KIND);
            true
        }
        Err(_) => false,
    };
    Decoder { kind: S::KIND, version: S::VERSION, decode }
}

/// Every record that a snapshot or a migration of this build may hold, old versions too.
pub(crate) const DECODERS: &[Decoder] = &[
    of::<RecordSet>(),
    of::<NoState>(),
    of::<MachineV1>(),
    of::<ClockV1>(),
    of::<MemoryLayoutV1>(),
    of::<DeviceTreeV1>(),
    of::<VcpuV1>(),
    of::<SlotsV1>(),
    of::<HostBridgeV1>(),
    of::<I8042V1>(),
    of::<VmGenerationV1>(),
    of::<SerialV1>(),
    of::<CmosV1>(),
    of::<IoApicV1>(),
    of::<GedV1>(),
    of::<PmTimerV1>(),
    of::<PvPanicV1>(),
    of::<VirtioPciV1>(),
    of::<BlockV1>(),
    of::<RngV1>(),
    of::<ConsoleV1>(),
];

/// Decodes `bytes` as every kind of record. Those that took them.
pub(crate) fn decode(bytes: &[u8]) -> Vec<&'static str> {
    DECODERS.iter().filter(|decoder| (decoder.decode)(bytes)).map(|decoder| decoder.kind).collect()
}

/// A machine's records, to be damaged, and a host to restore it on.
pub(crate) struct Rig {
    fake: Fake,
    spec: MachineSpec,
    threads: Arc<dyn ThreadHook>,
    /// By their way through the tree.
    leaves: Vec<(Vec<String>, Record)>,
    _folder: tempfile::TempDir,
}

impl Rig {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let kernel: PathBuf = Guest::Halt.write(folder.path()).unwrap();
        let disk = folder.path().join("disk");
        std::fs::write(&disk, vec![0; 1 << 20]).unwrap();
        let json = serde_json::json!({
            "payload": { "kernel": kernel },
            "cpus": { "boot_vcpus": 2, "max_vcpus": 3 },
            "memory": { "size": 16 << 20 },
            "disks": [{ "path": disk, "image_type": "Raw" }],
            "serial": { "mode": "Null" },
            "console": { "mode": "Null" },
            "debug_console": { "mode": "Null" },
            "pvpanic": true,
        });
        let spec = parse_and_check(json.to_string().as_bytes(), UnknownFields::Refuse).unwrap().spec;
        let (fake, threads) = (Fake::new(), Arc::new(Unconfined));
        let mut rig = Self { fake, spec, threads, leaves: Vec::new(), _folder: folder };
        let mut machine = rig.with_plan(|plan| Machine::build(plan, &mut Stages::default())).unwrap();
        machine.start();
        machine.pause().unwrap();
        leaves(&[], &machine.save().unwrap(), &mut rig.leaves);
        rig
    }

    /// Number of records, those of devices and vCPUs each of its own.
    pub(crate) fn records(&self) -> usize {
        self.leaves.len()
    }

    /// Changes bytes of records as `script` says, four bytes a change: which record, where (two bytes), and to what; then restores
    /// a machine. It is refused, or one that can be saved again, and either leaves nothing behind. Whether it was restored.
    pub(crate) fn restore(&self, script: &[u8]) -> bool {
        let mut damaged: Vec<Record> = self.leaves.iter().map(|(_, record)| record.clone()).collect();
        for [record, at @ .., to] in script.as_chunks::<4>().0.iter().take(16) {
            let record = usize::from(*record) % damaged.len();
            let bytes = &mut damaged[record].bytes;
            let at = usize::from(u16::from_le_bytes(*at));
            if let Some(byte) = at.checked_rem(bytes.len()).and_then(|at| bytes.get_mut(at)) {
                *byte = *to;
            }
        }
        let ways = self.leaves.iter().map(|(way, _)| way.as_slice());
        let records = tree(&ways.zip(damaged).collect::<Vec<_>>());
        let memory =
            Box::new(|saved: SavedMemory| Ok(MemoryMap::create(saved.vm, &saved.zones, saved.phys_bits)?));
        let saved = Saved { records, memory, clock: ClockChoice::StoodStill, another: true };
        let machine = self.with_plan(|plan| Machine::restore(plan, saved, &mut Stages::default()));
        let restored = machine.is_ok();
        if let Ok(machine) = machine {
            machine.save().unwrap();
        }
        assert_eq!(self.fake.live(), Live::default());
        restored
    }

    fn with_plan<T>(&self, work: impl FnOnce(&Plan<'_>) -> T) -> T {
        let (mailbox, _inbox) = mailbox().unwrap();
        work(&Plan {
            hypervisor: &self.fake,
            spec: &self.spec,
            ports: &Ports::default(),
            post: &EventPost::new(1, mailbox),
            threads: &self.threads,
            locks: Locks::Now,
            generation: None,
        })
    }
}

/// The records of `set` and of the sets in it.
fn leaves(way: &[String], set: &RecordSet, found: &mut Vec<(Vec<String>, Record)>) {
    for (owner, record) in set.iter() {
        let way = [way, &[owner.to_owned()]].concat();
        match record.parse::<RecordSet>() {
            Ok(set) => leaves(&way, &set, found),
            Err(_) => found.push((way, record.clone())),
        }
    }
}

/// Undoes [`leaves`].
fn tree(leaves: &[(&[String], Record)]) -> RecordSet {
    let mut set = RecordSet::new();
    let mut rest = leaves;
    while let [(way, record), ..] = rest {
        let (owner, below) = way.split_first().unwrap();
        let same = rest.iter().take_while(|(way, _)| way.first() == Some(owner)).count();
        let (group, others) = rest.split_at(same);
        if below.is_empty() {
            set.insert(owner, record.clone()).unwrap();
        } else {
            let group: Vec<_> = group.iter().map(|(way, record)| (&way[1..], record.clone())).collect();
            set.put(owner, &tree(&group)).unwrap();
        }
        rest = others;
    }
    set
}
