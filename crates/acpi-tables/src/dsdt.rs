//! The DSDT: the devices that the guest cannot find by itself.

use aml::{
    Aml, AmlSink,
    aml::{
        AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Device, EISAName, Else, Equal,
        Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, IO, If, Interrupt, Local,
        Memory32Fixed, Method, Name, NotEqual, Notify, OpRegion, OpRegionSpace, Or, PackageBuilder, Path,
        ResourceTemplate, Return, Scope, Store, Uuid, ZERO,
    },
};

use crate::{
    Machine,
    check::ecam,
    fixed::{bytes, table},
    machine::{Cpu, Ged, GedEvent, PciSegment, S5_SLEEP_TYPE, Serial, Window},
};

/// Revision 2 makes integers 64 bits wide.
const REVISION: u8 = 2;

/// The configuration ports of PCI, taken out of the I/O window.
const CONFIG_PORT: u16 = 0xcf8;
const CONFIG_PORTS: u8 = 8;
const PM_TIMER_PORTS: u8 = 4;
const SERIAL_PORTS: u8 = 8;
const RTC_PORT: u16 = 0x70;

const DEVICES_PER_BUS: u32 = 32;
const PINS: u32 = 4;

/// `_STA`: present, enabled, shown, working.
const STATUS_PRESENT: u8 = 0xf;
const STATUS_ABSENT: u8 = 0;
/// Notification of a button: pressed; of the generation id: changed.
const NOTIFICATION: u8 = 0x80;

/// `_OSC` of a PCI host bridge (PCI Firmware 3.3, section 4.5).
const OSC_UUID: &str = "33db4d5b-1ff7-401c-9657-7441c03dd766";
const OSC_UNRECOGNIZED_UUID: u8 = 1 << 2;
const OSC_UNRECOGNIZED_REVISION: u8 = 1 << 3;
const OSC_CAPABILITIES_MASKED: u8 = 1 << 4;
/// What the guest may control: PME, AER and the PCIe capability; not hot-plug, which goes by ACPI.
const OSC_GRANTED: u8 = 0x1c;

/// AML that is bytes already.
struct Code(Vec<u8>);

impl Aml for Code {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

pub(crate) fn dsdt(machine: &Machine) -> Vec<u8> {
    let mut devices = motherboard(machine);
    for (index, pci) in machine.pci.iter().enumerate() {
        devices.extend(host_bridge(index, pci));
    }
    for (uid, cpu) in machine.cpus.iter().enumerate() {
        devices.extend(processor(uid, cpu));
    }
    if let Some(serial) = machine.serial {
        devices.extend(serial_port(serial));
    }
    if machine.rtc {
        devices.extend(rtc());
    }
    if machine.power_button {
        devices.extend(power_button());
    }
    if let Some(address) = machine.generation_id {
        devices.extend(generation_id(address));
    }
    devices.extend(event_device(machine));

    let mut body = bytes(&Scope::new("\\_SB_".into(), vec![&Code(devices)]));
    Name::new("\\_S5_".into(), &package(&[&S5_SLEEP_TYPE])).to_aml_bytes(&mut body);
    table(*b"DSDT", REVISION, &machine.oem, &body)
}

/// What is taken and belongs to no device: Linux wants the ECAM to be named here, and places no BAR on these ports.
fn motherboard(machine: &Machine) -> Vec<u8> {
    let mut resources = Vec::new();
    for window in machine.pci.iter().filter_map(ecam) {
        // `check` has seen to it that it lies below 4 GiB.
        Memory32Fixed::new(true, window.start as u32, window.size as u32).to_aml_bytes(&mut resources);
    }
    let ports = machine.ports;
    io(ports.control, 1).to_aml_bytes(&mut resources);
    io(ports.pm_timer, PM_TIMER_PORTS).to_aml_bytes(&mut resources);
    device("MBRD", &EISAName::new("PNP0C02"), 0, &[&current_resources(resources)])
}

fn host_bridge(index: usize, pci: &PciSegment) -> Vec<u8> {
    let compatible = Name::new("_CID".into(), &EISAName::new("PNP0A03"));
    let segment = Name::new("_SEG".into(), &pci.segment);
    let first_bus = Name::new("_BBN".into(), &pci.start_bus);
    let osc = Code(host_bridge_osc());
    let resources = current_resources(host_bridge_windows(pci));
    let routing = Code(pci.intx_gsis.as_ref().map(interrupt_routing).unwrap_or_default());
    let name = format!("PCI{index:X}");
    let uid = pci.segment.into();
    device(
        &name,
        &EISAName::new("PNP0A08"),
        uid,
        &[&compatible, &segment, &first_bus, &osc, &resources, &routing],
    )
}

fn host_bridge_windows(pci: &PciSegment) -> Vec<u8> {
    let mut windows = bytes(&AddressSpace::new_bus_number(u16::from(pci.start_bus), u16::from(pci.end_bus)));
    if pci.segment == 0 {
        io(CONFIG_PORT, CONFIG_PORTS).to_aml_bytes(&mut windows);
        AddressSpace::new_io(0, CONFIG_PORT - 1, None).to_aml_bytes(&mut windows);
        let after = CONFIG_PORT + u16::from(CONFIG_PORTS);
        AddressSpace::new_io(after, u16::MAX, None).to_aml_bytes(&mut windows);
    }
    let cacheable = AddressSpaceCacheable::NotCacheable;
    let (first, last) = bounds(pci.mmio32);
    // `check` has seen to it that it lies below 4 GiB.
    AddressSpace::new_memory(cacheable, true, first as u32, last as u32, None).to_aml_bytes(&mut windows);
    if let Some(window) = pci.mmio64 {
        let (first, last) = bounds(window);
        AddressSpace::new_memory(cacheable, true, first, last, None).to_aml_bytes(&mut windows);
    }
    windows
}

fn bounds(window: Window) -> (u64, u64) {
    (window.start, window.last().unwrap_or(window.start))
}

/// Hands the guest the control it asks for, as far as it is in [`OSC_GRANTED`].
fn host_bridge_osc() -> Vec<u8> {
    let status = Path::new("CDW1");
    let control = Path::new("CDW3");
    let add_status = |bit: u8| Code(bytes(&Or::new(&status, &status, &bit)));
    let unknown_revision = add_status(OSC_UNRECOGNIZED_REVISION);
    let masked = add_status(OSC_CAPABILITIES_MASKED);
    let unknown_uuid = add_status(OSC_UNRECOGNIZED_UUID);

    let known = If::new(
        &Equal::new(&Arg(0), &Uuid::new(OSC_UUID)),
        vec![
            &CreateDWordField::new(&control, &Arg(3), &8u8),
            &Store::new(&Local(0), &control),
            &And::new(&control, &Local(0), &OSC_GRANTED),
            &If::new(&NotEqual::new(&Arg(1), &1u8), vec![&unknown_revision]),
            &If::new(&NotEqual::new(&control, &Local(0)), vec![&masked]),
        ],
    )
    .to_code();
    bytes(&Method::new(
        "_OSC".into(),
        4,
        true,
        vec![
            &CreateDWordField::new(&status, &Arg(3), &ZERO),
            &known,
            &Else::new(vec![&unknown_uuid]),
            &Return::new(&Arg(3)),
        ],
    ))
}

/// `_PRT`: for each device of the root bus where its pins go.
fn interrupt_routing(gsis: &[u32; 4]) -> Vec<u8> {
    let mut routes = PackageBuilder::new();
    for device in 0..DEVICES_PER_BUS {
        for pin in 0..PINS {
            let wire = (device + pin) % PINS;
            let gsi = gsis.get(wire as usize).copied().unwrap_or_default();
            // Function 0xffff: all of them. Source 0: `gsi` is a GSI.
            let address = device << 16 | 0xffff;
            routes.add_element(&package(&[&address, &pin, &ZERO, &gsi]));
        }
    }
    bytes(&Name::new("_PRT".into(), &routes))
}

fn processor(uid: usize, cpu: &Cpu) -> Vec<u8> {
    let status = if cpu.enabled { STATUS_PRESENT } else { STATUS_ABSENT };
    device(&format!("C{uid:03X}"), &"ACPI0007", uid as u64, &[&Name::new("_STA".into(), &status)])
}

fn serial_port(serial: Serial) -> Vec<u8> {
    let mut resources = bytes(&Interrupt::new(true, true, false, false, serial.irq.into()));
    io(serial.port, SERIAL_PORTS).to_aml_bytes(&mut resources);
    let name = Name::new("_DDN".into(), &"COM1");
    device("COM1", &EISAName::new("PNP0501"), 0, &[&name, &current_resources(resources)])
}

/// No interrupt: alarms are not told to the guest.
fn rtc() -> Vec<u8> {
    device("RTC_", &EISAName::new("PNP0B00"), 0, &[&current_resources(bytes(&io(RTC_PORT, 2)))])
}

fn power_button() -> Vec<u8> {
    device("PWRB", &EISAName::new("PNP0C0C"), 0, &[])
}

/// The generation id, after Microsoft's "Virtual Machine Generation ID". Drivers know it by `_CID`.
fn generation_id(address: u64) -> Vec<u8> {
    let compatible = Name::new("_CID".into(), &"VM_Gen_Counter");
    let description = Name::new("_DDN".into(), &"VM_Gen_Counter");
    let (low, high) = (address as u32, (address >> 32) as u32);
    let place = Name::new("ADDR".into(), &package(&[&low, &high]));
    device("VGEN", &"VMRS0001", 0, &[&compatible, &description, &place])
}

/// The event device: its method reads the register, which clears it, and passes each event on. Without any event it would
/// have nothing to do, and is left out.
fn event_device(machine: &Machine) -> Vec<u8> {
    let mut events = Vec::new();
    if machine.power_button {
        events.push(pass_on(GedEvent::PowerButton, "\\_SB_.PWRB"));
    }
    if machine.generation_id.is_some() {
        events.push(pass_on(GedEvent::GenerationId, "\\_SB_.VGEN"));
    }
    if events.is_empty() {
        return Vec::new();
    }
    let Ged { address, gsi } = machine.ged;
    let resources = current_resources(bytes(&Interrupt::new(true, true, false, false, gsi)));
    let region = OpRegion::new("GDST".into(), OpRegionSpace::SystemMemory, &address, &1u8).to_code();
    let field = Field::new(
        "GDST".into(),
        FieldAccessType::Byte,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        vec![FieldEntry::Named(*b"GDAT", 8)],
    );
    let read = Store::new(&Local(0), &Path::new("GDAT")).to_code();
    let steps = [&read as &dyn Aml].into_iter().chain(events.iter().map(|event| event as &dyn Aml));
    let event = Method::new("_EVT".into(), 1, true, steps.collect());
    device("GED_", &"ACPI0013", 0, &[&resources, &region, &field, &event])
}

/// Notifies a device of its event, if that is among those read.
fn pass_on(event: GedEvent, device: &str) -> Code {
    let happened = And::new(&ZERO, &Local(0), &(event as u8)).to_code();
    let notify = Notify::new(&Path::new(device), &NOTIFICATION).to_code();
    If::new(&happened, vec![&notify]).to_code()
}

fn device(name: &str, hardware_id: &dyn Aml, uid: u64, children: &[&dyn Aml]) -> Vec<u8> {
    let hardware_id = Name::new("_HID".into(), hardware_id);
    let uid = Name::new("_UID".into(), &uid);
    let mut all: Vec<&dyn Aml> = vec![&hardware_id, &uid];
    all.extend_from_slice(children);
    bytes(&Device::new(name.into(), all))
}

fn current_resources(descriptors: Vec<u8>) -> Name {
    Name::new("_CRS".into(), &ResourceTemplate::new(vec![&Code(descriptors)]))
}

fn io(port: u16, count: u8) -> IO {
    IO::new(port, port, 1, count)
}

fn package(elements: &[&dyn Aml]) -> PackageBuilder {
    let mut package = PackageBuilder::new();
    for element in elements {
        package.add_element(*element);
    }
    package
}

/// Lets an object outlive what it borrows.
trait ToCode: Aml {
    fn to_code(&self) -> Code
    where
        Self: Sized,
    {
        Code(bytes(self))
    }
}

impl<T: Aml> ToCode for T {}
