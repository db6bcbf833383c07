//! Saved states of all devices: their shipped bytes, and what hostile bytes do.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

use std::sync::Arc;
use std::time::Duration;

use vmm_device_model::device::VmDevice;
use vmm_device_model::recipe::Recipe;
use vmm_device_model::testing::{TestResources, Xorshift};
use vmm_fuzzing::{hostile_records, rounds};
use vmm_pci::testing::{TEST_ECAM, TestPciResources};
use vmm_platform_devices::acpi_pm::AcpiPm;
use vmm_platform_devices::cmos::{Cmos, RamSize};
use vmm_platform_devices::debug_port::{DebugConsole, PostPort};
use vmm_platform_devices::ged::{GedEvent, GedRecipe};
use vmm_platform_devices::i8042::I8042;
use vmm_platform_devices::ioapic::{IOAPIC_BASE, IoApic, IoApicRecipe};
use vmm_platform_devices::output::Discard;
use vmm_platform_devices::pm_timer::PmTimer;
use vmm_platform_devices::pvpanic::PvPanicRecipe;
use vmm_platform_devices::serial::SerialRecipe;
use vmm_platform_devices::testing::{TestClock, TestEvents, TestTarget};
use vmm_platform_devices::vm_generation::VmGenerationRecipe;
use vmm_snapshot::{Record, golden};

/// A device on buses of its own, and its registers.
struct Rig {
    resources: TestResources,
    device: Box<dyn VmDevice>,
    pio: std::ops::Range<u64>,
    mmio: std::ops::Range<u64>,
}

impl Rig {
    fn new(recipe: impl Recipe<TestResources>, pio: std::ops::Range<u64>) -> Self {
        let mut resources = TestResources::new(0x1000).unwrap();
        let device = Box::new(recipe).build(&mut resources).unwrap();
        Self { resources, device, pio, mmio: 0..0 }
    }

    fn with_mmio(mut self, mmio: std::ops::Range<u64>) -> Self {
        self.mmio = mmio;
        self
    }

    /// Reads and writes everything.
    fn poke(&self, random: &mut Xorshift) {
        for (bus, range) in [(&self.resources.pio, &self.pio), (&self.resources.mmio, &self.mmio)] {
            for address in range.clone().chain(range.clone().rev()) {
                let mut data = (random.next() as u32).to_le_bytes();
                bus.write(address, &data[..1]);
                bus.write(address, &data);
                bus.read(address, &mut data[..1]);
                bus.read(address, &mut data);
            }
        }
    }
}

fn clock() -> Arc<TestClock> {
    Arc::new(TestClock::new(Duration::from_secs(1_000_000_000)))
}

const GED: u64 = 0xfed0_0000;

fn serial() -> Rig {
    let recipe = SerialRecipe::com1("_serial", Arc::new(Discard), Arc::new(Discard));
    let input = recipe.input();
    let rig = Rig::new(recipe, 0x3f8..0x400);
    rig.resources.pio.write(0x3f9, &[3]);
    rig.resources.pio.write(0x3ff, &[0x5a]);
    assert_eq!(input.enqueue(b"input"), 5);
    rig
}

fn i8042() -> Rig {
    let rig = Rig::new(I8042::recipe("_i8042", Arc::<TestEvents>::default()), 0x60..0x65);
    rig.resources.pio.read(0x60, &mut [0]);
    rig.resources.pio.write(0x61, &[1]);
    rig
}

fn cmos() -> Rig {
    let ram = RamSize { below_4g: 512 << 20, above_4g: 0 };
    let rig = Rig::new(Cmos::recipe("_cmos", clock(), ram), 0x70..0x72);
    rig.resources.pio.write(0x70, &[0x0f, 0x0a]);
    rig
}

fn ioapic() -> Rig {
    let ioapic = IoApic::new(Arc::<TestTarget>::default());
    let line = ioapic.line(9).unwrap();
    let rig = Rig::new(IoApicRecipe::new("_ioapic", IOAPIC_BASE, ioapic), 0..0)
        .with_mmio(IOAPIC_BASE..IOAPIC_BASE + 0x20);
    for (register, value) in [(0_u32, 0x0200_0000), (0x18, 0x31), (0x23, 0x0100_0000), (0x22, 0x8051_u32)] {
        rig.resources.mmio.write(IOAPIC_BASE, &register.to_le_bytes());
        rig.resources.mmio.write(IOAPIC_BASE + 0x10, &value.to_le_bytes());
    }
    line.set(true);
    rig
}

fn pm_timer() -> Rig {
    let clock = clock();
    let rig = Rig::new(PmTimer::recipe("_pm_timer", clock.clone()), 0xb008..0xb00c);
    clock.advance(Duration::from_secs(1));
    rig
}

fn ged() -> Rig {
    let recipe = GedRecipe::new("_ged", GED, 5);
    let ged = recipe.ged();
    let rig = Rig::new(recipe, 0..0).with_mmio(GED..GED + 1);
    assert!(ged.raise(GedEvent::PowerButton));
    rig
}

/// Its registers are its configuration space: PCI device 1, the lowest free one.
fn pvpanic() -> Rig {
    const CONFIG: u64 = TEST_ECAM + (1 << 15);
    let mut machine = TestPciResources::new(0x1000).unwrap();
    let recipe = Box::new(PvPanicRecipe::new("_pvpanic", Arc::<TestEvents>::default()));
    let device = recipe.build(&mut machine).unwrap();
    let rig = Rig { resources: machine.base, device, pio: 0..0, mmio: CONFIG..CONFIG + 0x100 };
    rig.resources.mmio.write(CONFIG + 0x10, &0xd000_0000_u32.to_le_bytes());
    rig.resources.mmio.write(CONFIG + 4, &[2]);
    rig
}

/// No registers: what the guest sees of it is in its memory.
fn vm_generation() -> Rig {
    let ged = GedRecipe::new("_ged", GED, 5).ged();
    Rig::new(VmGenerationRecipe::new("_vm_generation", 0x800, ged), 0..0)
}

fn stateless() -> [Rig; 3] {
    let events = Arc::<TestEvents>::default();
    [
        Rig::new(AcpiPm::recipe("_acpi_pm", events), 0x3c0..0x3c1),
        Rig::new(PostPort::recipe("_post", clock(), Arc::new(Discard)), 0x80..0x81),
        Rig::new(DebugConsole::recipe("_debug", 0xe9, Arc::new(Discard)), 0xe9..0xea),
    ]
}

const RIGS: [fn() -> Rig; 7] = [serial, i8042, cmos, ioapic, pm_timer, ged, pvpanic];

#[test]
fn shipped_bytes() {
    for rig in RIGS {
        let record = rig().device.save_record();
        golden::check(&record.kind, record.version, &record.bytes).unwrap_or_else(|e| panic!("{e}"));
        // What shipped is still understood, and means the same.
        let mut fresh = rig();
        fresh.device.reset().unwrap();
        fresh.device.quiesce_begin();
        assert_ne!(fresh.device.save_record(), record, "a reset forgets");
        fresh.device.restore_record(&record).unwrap();
        assert_eq!(fresh.device.save_record(), record);
    }
    for rig in stateless() {
        assert_eq!(rig.device.save_record().kind, "none");
    }
}

/// Its state is a fact of the machine, so that a reset keeps it and only the same is taken.
#[test]
fn the_place_of_the_generation_id_is_kept() {
    let rig = vm_generation();
    let record = rig.device.save_record();
    golden::check(&record.kind, record.version, &record.bytes).unwrap_or_else(|e| panic!("{e}"));
    assert!(survives(vm_generation(), &record, record.bytes.clone()));
    for bytes in hostile_records(&record.bytes) {
        assert!(!survives(vm_generation(), &record, bytes), "another place");
    }
}

#[test]
fn fuzz_every_integer_at_its_edges() {
    for rig in RIGS {
        let record = rig().device.save_record();
        let (mut taken, mut refused) = (0, 0);
        for bytes in hostile_records(&record.bytes) {
            if survives(rig(), &record, bytes) { taken += 1 } else { refused += 1 }
        }
        assert!(taken > 0 && refused > 0, "{}: {taken} taken, {refused} refused", record.kind);
    }
}

#[test]
fn fuzz_truncated_and_random_records() {
    let mut random = Xorshift::new(11);
    for rig in RIGS.map(|rig| (rig, rig().device.save_record())) {
        let (rig, record) = rig;
        for len in 0..record.bytes.len() {
            assert!(!survives(rig(), &record, record.bytes[..len].to_vec()), "{} {len}", record.kind);
        }
        for _ in 0..rounds(300) {
            let mut bytes = record.bytes.clone();
            for _ in 0..1 + random.next() % 3 {
                let at = random.next() as usize % bytes.len();
                bytes[at] = random.next() as u8;
            }
            survives(rig(), &record, bytes);
        }
    }
}

/// Restores `bytes` into a device and uses it as a guest would, and its owner. Whether they were taken.
fn survives(mut rig: Rig, record: &Record, bytes: Vec<u8>) -> bool {
    rig.device.quiesce_begin();
    let taken = rig.device.restore_record(&Record { bytes, ..record.clone() }).is_ok();
    if taken {
        rig.device.resume().unwrap();
        rig.poke(&mut Xorshift::new(12));
        rig.device.save_record();
        rig.device.reset().unwrap();
    }
    taken
}
