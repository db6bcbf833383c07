//! pvpanic: a PCI function by which a guest's kernel says that it panicked (QEMU, `docs/specs/pvpanic.rst`).
//!
//! One register of a byte in BAR 0. Read, it shows the events that the device knows; written, it says which of them
//! happened. The guest goes on: what becomes of it is up to who gets the event.

use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use vmm_device_model::bus::BusDevice;
use vmm_device_model::device::{Blocker, DeviceChange, DeviceError, Lifecycle, SaveState, VmDevice};
use vmm_device_model::metrics::Metered;
use vmm_device_model::recipe::{BuildError, Recipe};
use vmm_pci::config::{BARS, Bar, BarKind, ConfigSpace, Identity};
use vmm_pci::endpoint::{Endpoint, EndpointV1};
use vmm_pci::function::{Attach, BarWindow, ConfigEffect, PciFunction};
use vmm_pci::host_bridge::Attachment;
use vmm_pci::resources::PciResources;
use vmm_snapshot::RecordError;

use crate::events::{Cause, SystemEvent, SystemEvents};
use crate::registers::lock;

/// The guest's kernel panicked and does nothing about it.
pub const PANICKED: u8 = 1 << 0;
/// The guest's kernel panicked, and a crash kernel takes over.
pub const CRASH_LOADED: u8 = 1 << 1;
/// The guest shut down, and has no other way to switch itself off.
pub const SHUTDOWN: u8 = 1 << 2;

const EVENTS: u8 = PANICKED | CRASH_LOADED | SHUTDOWN;
/// Red Hat's number for it; class "other system peripheral".
const IDENTITY: Identity = Identity {
    vendor: 0x1b36,
    device: 0x0011,
    subsystem_vendor: 0x1b36,
    subsystem: 0x0011,
    class: 0x08_8000,
    revision: 1,
};
const BAR: u8 = 0;
/// A page, so that nothing else is in it.
const BAR_SIZE: u64 = 0x1000;
/// Events told from one reset to the next. A kernel has one or two; a program that writes for ever must not fill the
/// memory of who is told.
const TOLD_MAX: u32 = 64;

/// What the guest touches: configuration space and the event register.
pub struct PvPanic {
    endpoint: Endpoint,
    events: Arc<dyn SystemEvents>,
    /// How many more events are told. Not saved: a new process has room for as many.
    left: u32,
}

impl PvPanic {
    fn say(&mut self, event: u8) {
        // One write is one event, the gravest that it names.
        let event = match event & EVENTS {
            0 => return,
            event if event & PANICKED != 0 => SystemEvent::Panicked,
            event if event & CRASH_LOADED != 0 => SystemEvent::CrashLoaded,
            _ => SystemEvent::Shutdown(Cause::PvPanic),
        };
        match self.left.checked_sub(1) {
            Some(left) => {
                self.left = left;
                self.events.request(event);
                if left == 0 {
                    log::warn!(
                        "pvpanic: {TOLD_MAX} events; further ones are dropped until the machine is reset"
                    );
                }
            }
            None => log::trace!("pvpanic: {event} dropped"),
        }
    }
}

impl fmt::Debug for PvPanic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PvPanic").field("left", &self.left).finish_non_exhaustive()
    }
}

impl BusDevice for PvPanic {
    fn read(&mut self, _: u16, offset: u64, data: &mut [u8]) {
        if let (0, Some(register)) = (offset, data.first_mut()) {
            *register = EVENTS;
        }
    }

    fn write(&mut self, _: u16, offset: u64, data: &[u8]) {
        if let (0, Some(event)) = (offset, data.first()) {
            self.say(*event);
        }
    }
}

impl PciFunction for PvPanic {
    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        self.endpoint.read(offset, data);
    }

    fn config_write(&mut self, offset: u16, data: &[u8]) -> ConfigEffect {
        self.endpoint.write(offset, data)
    }

    fn bar_addresses(&self) -> [Option<u64>; BARS] {
        self.endpoint.bar_addresses()
    }
}

/// The device as the thread that owns the VM sees it.
#[derive(Debug)]
struct Back {
    front: Arc<Mutex<PvPanic>>,
    attachment: Attachment,
}

impl Metered for Back {}

impl Lifecycle for Back {
    fn service(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }

    fn quiesce_begin(&mut self) {}

    fn quiesce_finish(&mut self, _: Instant) -> Result<(), DeviceError> {
        Ok(())
    }

    fn resume(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        {
            let mut front = lock(&self.front);
            front.endpoint.reset();
            front.left = TOLD_MAX;
        }
        self.attachment.sync_bars();
        Ok(())
    }

    fn blockers(&self) -> Vec<Blocker> {
        Vec::new()
    }

    fn take_changes(&mut self) -> Vec<DeviceChange> {
        Vec::new()
    }
}

/// Saved state of [`PvPanic`].
#[derive(Debug, Clone, PartialEq, Eq, minicbor::Encode, minicbor::Decode)]
pub struct PvPanicV1 {
    /// Configuration space.
    #[n(0)]
    pub endpoint: EndpointV1,
}

vmm_snapshot::schema!(PvPanicV1: "pvpanic" v1);

impl SaveState for Back {
    type State = PvPanicV1;

    fn save(&self) -> PvPanicV1 {
        let Self { front, attachment: _ } = self;
        let PvPanic { endpoint, events: _, left: _ } = &*lock(front);
        PvPanicV1 { endpoint: endpoint.save() }
    }

    fn restore(&mut self, state: PvPanicV1) -> Result<(), RecordError> {
        let PvPanicV1 { endpoint } = state;
        lock(&self.front).endpoint.restore(&endpoint)?;
        self.attachment.sync_bars();
        Ok(())
    }
}

/// Recipe of a pvpanic function.
#[derive(Debug)]
pub struct PvPanicRecipe {
    id: String,
    events: Arc<dyn SystemEvents>,
}

impl PvPanicRecipe {
    /// A function at the lowest free device number that posts to `events`.
    pub fn new(id: impl Into<String>, events: Arc<dyn SystemEvents>) -> Self {
        Self { id: id.into(), events }
    }
}

impl<R: PciResources + ?Sized> Recipe<R> for PvPanicRecipe {
    fn id(&self) -> &str {
        &self.id
    }

    fn build(self: Box<Self>, resources: &mut R) -> Result<Box<dyn VmDevice>, BuildError> {
        let bdf = resources.bdf(None)?;
        // Below 4 GiB, where a kernel without paging reaches it, too.
        let address = resources.bar_address(BarKind::Memory32, BAR_SIZE)?;
        let mut config = ConfigSpace::new(&IDENTITY);
        let bar = Bar { index: BAR, kind: BarKind::Memory32, size: BAR_SIZE, address };
        config.add_bar(bar).map_err(|e| BuildError::Device {
            what: "cannot lay out the BAR of pvpanic".to_owned(),
            source: e.into(),
        })?;
        let front = PvPanic { endpoint: Endpoint::new(config), events: self.events, left: TOLD_MAX };
        let front = Arc::new(Mutex::new(front));
        let (target, function) = (Arc::clone(&front) as _, Arc::clone(&front) as _);
        let bar = BarWindow { index: BAR, size: BAR_SIZE, target, region: BAR.into(), doorbells: Vec::new() };
        let attachment = resources.attach(bdf, Attach { function, bars: vec![bar] })?;
        Ok(Box::new(Back { front, attachment }))
    }
}

#[cfg(test)]
mod tests {
    use vmm_device_model::testing::{fuzz_registers, save_reset_restore};
    use vmm_pci::bdf::Bdf;
    use vmm_pci::testing::TestPciResources;

    use super::*;
    use crate::testing::TestEvents;

    struct Rig {
        machine: TestPciResources,
        device: Box<dyn VmDevice>,
        events: Arc<TestEvents>,
    }

    const PLACE: u8 = 1;

    fn rig() -> Rig {
        let mut machine = TestPciResources::new(0x1000).unwrap();
        let events = Arc::<TestEvents>::default();
        let recipe = Box::new(PvPanicRecipe::new("_pvpanic", events.clone()));
        let device = recipe.build(&mut machine).unwrap();
        Rig { machine, device, events }
    }

    impl Rig {
        fn config(&self, offset: u16) -> u32 {
            let mut data = [0; 4];
            self.machine.config_read(bdf(), offset, &mut data);
            u32::from_le_bytes(data)
        }

        /// Switches the BAR on; its address.
        fn enable(&self) -> u64 {
            self.machine.config_write(bdf(), 4, &[2]);
            u64::from(self.config(0x10) & !0xf)
        }

        fn read(&self, address: u64) -> u8 {
            let mut data = [0];
            self.machine.base.mmio.read(address, &mut data);
            data[0]
        }

        fn write(&self, address: u64, data: &[u8]) {
            self.machine.base.mmio.write(address, data);
        }
    }

    fn bdf() -> Bdf {
        Bdf::new(0, 0, PLACE, 0).unwrap()
    }

    #[test]
    fn a_driver_finds_it_and_what_it_knows() {
        let rig = rig();
        assert_eq!(rig.config(0), 0x0011_1b36);
        assert_eq!(rig.config(8), 0x0880_0001);
        let bar = u64::from(rig.config(0x10) & !0xf);
        assert_eq!(rig.read(bar), 0xff, "decoding is off");
        assert_eq!(rig.enable(), bar);
        assert_eq!(rig.read(bar), 7);
        assert_eq!(rig.read(bar + 1), 0xff);
    }

    #[test]
    fn a_write_is_one_event() {
        let rig = rig();
        let bar = rig.enable();
        for (event, told) in [
            (1, Some(SystemEvent::Panicked)),
            (2, Some(SystemEvent::CrashLoaded)),
            (4, Some(SystemEvent::Shutdown(Cause::PvPanic))),
            (7, Some(SystemEvent::Panicked)),
            (0xfa, Some(SystemEvent::CrashLoaded)),
            (0xf8, None),
            (0, None),
        ] {
            rig.write(bar, &[event]);
            assert_eq!(rig.events.take(), Vec::from_iter(told), "{event:#x}");
        }
        rig.write(bar, &[2, 1, 1, 1]);
        rig.write(bar + 1, &[1]);
        assert_eq!(rig.events.take(), [SystemEvent::CrashLoaded], "the register is the first byte alone");
    }

    #[test]
    fn endless_writes_are_told_a_bounded_number_of_times() {
        let mut rig = rig();
        let bar = rig.enable();
        for _ in 0..1000 {
            rig.write(bar, &[PANICKED]);
        }
        assert_eq!(rig.events.take().len(), TOLD_MAX as usize);
        rig.device.reset().unwrap();
        rig.enable();
        rig.write(bar, &[PANICKED]);
        assert_eq!(rig.events.take().len(), 1);
    }

    #[test]
    fn saved_where_the_guest_put_it() {
        let mut rig = rig();
        let home = rig.enable();
        let moved = home + 0x10_0000;
        rig.machine.config_write(bdf(), 0x10, &(moved as u32).to_le_bytes());
        assert_eq!((rig.read(home), rig.read(moved)), (0xff, 7));
        save_reset_restore(&mut *rig.device).unwrap();
        assert_eq!((rig.read(home), rig.read(moved)), (0xff, 7));
        rig.device.reset().unwrap();
        assert_eq!((rig.read(home), rig.read(moved)), (0xff, 0xff), "decoding is off");
        assert_eq!(rig.enable(), home);
        let other =
            vmm_snapshot::Record::of(&PvPanicV1 { endpoint: EndpointV1 { config: Vec::new(), msix: None } });
        rig.device.restore_record(&other).unwrap_err();
    }

    #[test]
    fn any_access_is_answered() {
        let rig = rig();
        let bar = rig.enable();
        let snapshot = rig.machine.base.mmio.snapshot();
        let target = snapshot.iter().find(|mapping| mapping.base == bar).unwrap().target.clone();
        fuzz_registers(&*target, 0, BAR_SIZE.min(64), 50, 5);
        fuzz_registers(&*rig.machine.bridge, vmm_pci::host_bridge::REGION_ECAM, 0x9000, 2, 6);
        assert!(rig.events.take().len() <= TOLD_MAX as usize);
    }
}
