//! The tables of fixed shape: FADT, MADT, MCFG. Source: ACPI 6.5, sections 5.2.9 and 5.2.12; PCI Firmware 3.3 for MCFG.

use aml::{
    Aml,
    fadt::{FADTBuilder, Flags},
    gas::{AccessSize, AddressSpace, GAS},
    madt::{EnabledStatus, IoApic, ProcessorLocalApic},
    mcfg::MCFG,
    sdt::Sdt,
};

use crate::{
    Machine, Oem,
    machine::{Cpu, RESET_VALUE, Serial},
};

/// No VGA to be probed (IA-PC boot architecture flags, ACPI 6.5 section 5.2.9.3).
const BOOT_ARCH_NO_VGA: u16 = 1 << 2;
/// No CMOS clock.
const BOOT_ARCH_NO_RTC: u16 = 1 << 5;

const PM_TIMER_BYTES: u8 = 4;
const MADT_REVISION: u8 = 5;
const SDT_HEADER: u32 = 36;

const ENTRY_INTERRUPT_OVERRIDE: u8 = 2;
const ENTRY_LOCAL_X2APIC: u8 = 9;
const CPU_ENABLED: u32 = 1;
const CPU_ONLINE_CAPABLE: u32 = 2;
/// Highest id that an entry of the old kind can hold; 255 means all.
const MAX_XAPIC_ID: u32 = 254;

/// A system description table with this body.
pub(crate) fn table(signature: [u8; 4], revision: u8, oem: &Oem, body: &[u8]) -> Vec<u8> {
    let mut sdt = Sdt::new(signature, SDT_HEADER, revision, oem.id, oem.table_id, oem.revision);
    sdt.append_slice(body);
    sdt.as_slice().to_vec()
}

pub(crate) fn bytes(aml: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    aml.to_aml_bytes(&mut bytes);
    bytes
}

/// Hardware-reduced: no SCI, no PM1 registers, no FACS. Sleep and reset go through one I/O port. The PM timer is
/// outside of what such a machine must have, but Linux uses it when it is told.
pub(crate) fn fadt(machine: &Machine, dsdt: u64) -> Vec<u8> {
    let oem = &machine.oem;
    let flags = [
        Flags::Wbinvd,
        Flags::ProcC1,
        Flags::PwrButton,
        Flags::SlpButton,
        Flags::FixRtc,
        Flags::TmrValExt,
        Flags::ResetRegSup,
        Flags::Headless,
        Flags::HwReducedAcpi,
    ];
    let new = FADTBuilder::new(oem.id, oem.table_id, oem.revision).dsdt_64(dsdt);
    let mut fadt = flags.into_iter().fold(new, FADTBuilder::flag);

    let no_rtc = if machine.rtc { 0 } else { BOOT_ARCH_NO_RTC };
    fadt.iapc_boot_arch = (BOOT_ARCH_NO_VGA | no_rtc).into();

    let ports = machine.ports;
    fadt.pm_tmr_blk = u32::from(ports.pm_timer).into();
    fadt.pm_tmr_len = PM_TIMER_BYTES;
    fadt.x_pm_tmr_blk = io_register(ports.pm_timer, PM_TIMER_BYTES * 8, AccessSize::DwordAccess);

    let control = io_register(ports.control, 8, AccessSize::ByteAccess);
    fadt.sleep_control_reg = control;
    fadt.sleep_status_reg = control;
    fadt.reset_reg = control;
    fadt.reset_value = RESET_VALUE;
    bytes(&fadt.finalize())
}

fn io_register(port: u16, bits: u8, access: AccessSize) -> GAS {
    GAS::new(AddressSpace::SystemIo, bits, 0, access, port.into())
}

pub(crate) fn madt(machine: &Machine) -> Vec<u8> {
    let mut body = Vec::new();
    body.extend(machine.lapic_address.to_le_bytes());
    // Flags: no PIC.
    body.extend(0u32.to_le_bytes());
    for (uid, cpu) in (0u32..).zip(&machine.cpus) {
        body.extend(processor(uid, cpu));
    }
    let ioapic = machine.ioapic;
    IoApic::new(ioapic.id, ioapic.address, ioapic.gsi_base).to_aml_bytes(&mut body);
    if let Some(serial) = machine.serial {
        body.extend(interrupt_override(serial));
    }
    table(*b"APIC", MADT_REVISION, &machine.oem, &body)
}

fn processor(uid: u32, cpu: &Cpu) -> Vec<u8> {
    match (u8::try_from(uid), u8::try_from(cpu.apic_id)) {
        (Ok(uid8), Ok(id8)) if uid <= MAX_XAPIC_ID && cpu.apic_id <= MAX_XAPIC_ID => {
            let status =
                if cpu.enabled { EnabledStatus::Enabled } else { EnabledStatus::DisabledOnlineCapable };
            bytes(&ProcessorLocalApic::new(uid8, id8, status))
        }
        _ => {
            let flags = if cpu.enabled { CPU_ENABLED } else { CPU_ONLINE_CAPABLE };
            let mut entry = vec![ENTRY_LOCAL_X2APIC, 16, 0, 0];
            for field in [cpu.apic_id, flags, uid] {
                entry.extend(field.to_le_bytes());
            }
            entry
        }
    }
}

/// Without a PIC Linux knows no ISA interrupt unless it is told of it.
fn interrupt_override(serial: Serial) -> Vec<u8> {
    let mut entry = vec![ENTRY_INTERRUPT_OVERRIDE, 10, 0, serial.irq];
    entry.extend(u32::from(serial.irq).to_le_bytes());
    // Flags: polarity and trigger as on ISA, high and edge.
    entry.extend(0u16.to_le_bytes());
    entry
}

pub(crate) fn mcfg(machine: &Machine) -> Vec<u8> {
    let oem = &machine.oem;
    let mut mcfg = MCFG::new(oem.id, oem.table_id, oem.revision);
    for pci in &machine.pci {
        mcfg.add_ecam(pci.ecam_base, pci.segment, pci.start_bus, pci.end_bus);
    }
    bytes(&mcfg)
}
