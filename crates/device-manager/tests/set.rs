//! The set of devices with toy devices.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests fail by panicking")]

use std::sync::{Arc, Mutex};
use std::time::Instant;

use vmm_device_manager::machine::{Attentions, Lines, Machine, Parts};
use vmm_device_manager::node::Resource;
use vmm_device_manager::set::{AddError, DeviceSet, RestoreError};
use vmm_device_model::bus::{Bus, BusDevice};
use vmm_device_model::device::{
    Attention, Blocker, Blocks, DeviceChange, DeviceError, Lifecycle, SaveState, VmDevice,
};
use vmm_device_model::interrupt::InterruptLine;
use vmm_device_model::metrics::{Family, Kind, Measures, Metered, Value};
use vmm_device_model::recipe::{BuildError, Recipe};
use vmm_device_model::testing::{TestAttention, TestDoorbells, TestLine, TestMsi, TestResources};
use vmm_pci::config::BarKind;
use vmm_pci::host_bridge::HostBridge;
use vmm_pci::resources::PciResources;
use vmm_pci::windows::Windows;
use vmm_snapshot::RecordError;

type Log = Arc<Mutex<Vec<String>>>;

#[derive(Debug)]
struct ToyLines;

impl Lines for ToyLines {
    fn line(&self, gsi: u32) -> Option<Arc<dyn InterruptLine>> {
        (gsi < 24).then(|| Arc::new(TestLine::default()) as _)
    }
}

#[derive(Debug)]
struct ToyAttentions;

impl Attentions for ToyAttentions {
    fn of(&self, _: &str) -> Arc<dyn Attention> {
        Arc::new(TestAttention::default())
    }
}

struct World {
    set: DeviceSet,
    pio: Arc<Bus>,
    log: Log,
}

fn world() -> World {
    let base = TestResources::new(4096).unwrap();
    let windows = Windows { mmio32: 0xc000_0000..0xc100_0000, mmio64: 0x10_0000_0000..0x10_0010_0000 };
    let doorbells = Arc::new(TestDoorbells::default());
    let bridge = HostBridge::new(0, base.mmio.clone(), doorbells, windows.clone());
    let parts = Parts {
        pio: base.pio.clone(),
        mmio: base.mmio.clone(),
        memory: base.memory.clone(),
        lines: Box::new(ToyLines),
        msi: Arc::new(TestMsi::default()),
        attentions: Box::new(ToyAttentions),
        bridge,
        windows,
    };
    World { set: DeviceSet::new(Machine::new(parts).unwrap()), pio: base.pio, log: Log::default() }
}

#[derive(Debug, Clone, PartialEq, Eq, minicbor::Encode, minicbor::Decode)]
struct ToyV1 {
    #[n(0)]
    value: u8,
}

vmm_snapshot::schema!(ToyV1: "toy" v1);

#[derive(Debug)]
struct Toy {
    id: String,
    log: Log,
    value: u8,
    stubborn: bool,
}

impl Toy {
    fn note(&self, what: &str) {
        self.log.lock().unwrap().push(format!("{what} {}", self.id));
    }
}

static VALUES: Family = Family { name: "toy_value", help: "Value.", unit: "", kind: Kind::Gauge };

impl Metered for Toy {
    fn measure(&self, measures: &mut Measures) {
        if self.value != 0 {
            measures.counter("value", self.value.into());
        }
        measures.sample(&VALUES, &[], Value::Gauge(self.value.into()));
    }
}

impl Lifecycle for Toy {
    fn service(&mut self) -> Result<(), DeviceError> {
        self.note("service");
        Ok(())
    }
    fn quiesce_begin(&mut self) {
        self.note("begin");
    }
    fn quiesce_finish(&mut self, _: Instant) -> Result<(), DeviceError> {
        self.note("finish");
        if self.stubborn { Err(DeviceError::new("in flight")) } else { Ok(()) }
    }
    fn resume(&mut self) -> Result<(), DeviceError> {
        self.note("resume");
        Ok(())
    }
    fn reset(&mut self) -> Result<(), DeviceError> {
        self.value = 0;
        Ok(())
    }
    fn blockers(&self) -> Vec<Blocker> {
        let blocker = Blocker { blocks: Blocks::Migration, reason: "toy".to_owned() };
        if self.stubborn { vec![blocker] } else { Vec::new() }
    }
    fn take_changes(&mut self) -> Vec<DeviceChange> {
        if self.stubborn { vec![DeviceChange::NeedsReset, DeviceChange::Reset] } else { Vec::new() }
    }
}

impl SaveState for Toy {
    type State = ToyV1;
    fn save(&self) -> ToyV1 {
        ToyV1 { value: self.value }
    }
    fn restore(&mut self, state: ToyV1) -> Result<(), RecordError> {
        self.value = state.value;
        Ok(())
    }
}

struct Front;

impl BusDevice for Front {
    fn read(&mut self, _: u16, _: u64, _: &mut [u8]) {}
    fn write(&mut self, _: u16, _: u64, _: &[u8]) {}
}

#[derive(Debug)]
struct ToyRecipe {
    toy: Toy,
    port: u16,
    gsi: u32,
    fails_last: bool,
}

impl<R: PciResources + ?Sized> Recipe<R> for ToyRecipe {
    fn id(&self) -> &str {
        &self.toy.id
    }

    fn build(self: Box<Self>, resources: &mut R) -> Result<Box<dyn VmDevice>, BuildError> {
        resources.map_pio(self.port, 4, Arc::new(Mutex::new(Front)), 0)?;
        resources.interrupt_line(self.gsi)?;
        resources.bdf(None)?;
        resources.bar_address(BarKind::Memory64, 0x8_0000)?;
        if self.fails_last {
            return Err(BuildError::Exhausted { what: "luck" });
        }
        Ok(Box::new(self.toy))
    }
}

fn recipe(world: &World, id: &str, port: u16, gsi: u32) -> Box<ToyRecipe> {
    let toy = Toy { id: id.to_owned(), log: world.log.clone(), value: port as u8, stubborn: false };
    Box::new(ToyRecipe { toy, port, gsi, fails_last: false })
}

#[test]
fn a_failed_build_gives_everything_back() {
    let mut world = world();
    world.set.add(recipe(&world, "a", 0x10, 5)).unwrap();
    for (id, port, gsi) in [("b", 0x12, 6), ("c", 0x20, 5), ("d", 0x20, 24), ("a", 0x30, 7)] {
        world.set.add(recipe(&world, id, port, gsi)).unwrap_err();
    }
    // Two BARs of this size fit the 64-bit window; a leak in a hundred failures would show.
    for _ in 0..100 {
        let failing = ToyRecipe { fails_last: true, ..*recipe(&world, "e", 0x20, 6) };
        let error = world.set.add(Box::new(failing)).unwrap_err();
        assert!(matches!(error, AddError::Build { source: BuildError::Exhausted { what: "luck" }, .. }));
    }
    assert_eq!(world.pio.snapshot().iter().count(), 1);
    world.set.add(recipe(&world, "e", 0x20, 6)).unwrap();
    let nodes = world.set.nodes();
    assert_eq!(nodes[1].id, "e");
    assert!(nodes[1].resources.contains(&Resource::Slot { device: 2 }), "slot 2 is the lowest free one");
    let World { set, pio, .. } = world;
    drop(set);
    assert_eq!(pio.snapshot().iter().count(), 0);
}

#[test]
fn counts_are_told_by_device() {
    let mut world = world();
    for (id, port, gsi) in [("b", 0x10, 5), ("a", 0x200, 6), ("c", 0x22, 7)] {
        world.set.add(recipe(&world, id, port, gsi)).unwrap();
    }
    let found = world.set.measure();
    let value = |value| std::collections::BTreeMap::from([("value".to_owned(), value)]);
    // "a" counts nothing for clients: its value is 0 as a byte.
    assert_eq!(found.counters, [("b".to_owned(), value(0x10)), ("c".to_owned(), value(0x22))].into());
    let told: Vec<_> = found.samples.iter().map(|sample| (&*sample.labels[0].1, &sample.value)).collect();
    assert_eq!(told, [("b", &Value::Gauge(0x10)), ("a", &Value::Gauge(0)), ("c", &Value::Gauge(0x22))]);
}

#[test]
fn all_are_asked_before_any_is_waited_for() {
    let mut world = world();
    world.set.add(recipe(&world, "a", 0x10, 5)).unwrap();
    world.set.add(recipe(&world, "b", 0x20, 6)).unwrap();
    world.set.quiesce(Instant::now()).unwrap();
    world.set.resume().unwrap();
    world.set.service("b").unwrap();
    world.set.service("gone").unwrap();
    let log = std::mem::take(&mut *world.log.lock().unwrap());
    assert_eq!(log, ["begin b", "begin a", "finish b", "finish a", "resume a", "resume b", "service b"]);

    let mut stubborn = recipe(&world, "c", 0x30, 7);
    stubborn.toy.stubborn = true;
    world.set.add(stubborn).unwrap();
    let error = world.set.quiesce(Instant::now()).unwrap_err();
    assert_eq!(error.to_string(), "cannot quiesce device \"c\"");
    let log = world.log.lock().unwrap();
    assert_eq!(log[log.len() - 3..], ["resume a", "resume b", "resume c"], "all work again");
    assert_eq!(world.set.blockers().len(), 1);
    let changes = [DeviceChange::NeedsReset, DeviceChange::Reset].map(|change| ("c".to_owned(), change));
    drop(log);
    assert_eq!(world.set.take_changes(), changes);
}

#[test]
fn state_of_exactly_these_devices_is_restored() {
    let mut world = world();
    world.set.add(recipe(&world, "a", 0x10, 5)).unwrap();
    world.set.add(recipe(&world, "b", 0x20, 6)).unwrap();
    let saved = world.set.save().unwrap();
    world.set.reset().unwrap();
    assert_ne!(world.set.save().unwrap(), saved);
    world.set.restore(saved.clone()).unwrap();
    assert_eq!(world.set.save().unwrap(), saved);

    let mut missing = saved.clone();
    missing.take_record("b").unwrap();
    assert!(matches!(world.set.restore(missing), Err(RestoreError::Records(_))));
    let mut extra = saved.clone();
    extra.put("c", &ToyV1 { value: 1 }).unwrap();
    assert!(matches!(world.set.restore(extra), Err(RestoreError::Records(_))));
    let mut other = saved;
    other.take_record("b").unwrap();
    other.put("b", &vmm_snapshot::NoState {}).unwrap();
    assert!(matches!(world.set.restore(other), Err(RestoreError::Refused { .. })));
}
