//! Golden files, table structure, iasl, and descriptions that make no sense.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests fail by panicking"
)]

use std::{collections::HashMap, env, fs, path::Path, process::Command};

use proptest::prelude::*;
use vmm_acpi_tables::{
    Blob, Cpu, Error, Ged, IoApic, Machine, Oem, PciSegment, PowerPorts, RESET_VALUE, S5_VALUE, Serial,
    Tables, Window, build,
};

const BASE: u64 = 0xa_0000;
const SPACE: u64 = 0x6_0000;

fn machine(cpus: u32) -> Machine {
    Machine {
        oem: Oem::default(),
        cpus: (0..cpus).map(|apic_id| Cpu { apic_id, enabled: true }).collect(),
        lapic_address: 0xfee0_0000,
        ioapic: IoApic { id: 0, address: 0xfec0_0000, gsi_base: 0 },
        pci: vec![segment(0)],
        serial: Some(Serial { port: 0x3f8, irq: 4 }),
        ged: Ged { address: 0xfd00_0000, gsi: 5 },
        power_button: true,
        ports: PowerPorts { pm_timer: 0xb008, control: 0x3c0 },
        rtc: true,
        generation_id: Some(0xf_e000),
    }
}

fn segment(number: u16) -> PciSegment {
    PciSegment {
        segment: number,
        ecam_base: 0xe800_0000 + (u64::from(number) << 20),
        start_bus: 0,
        end_bus: 0,
        mmio32: Window { start: 0xc000_0000 + (u64::from(number) << 24), size: 1 << 24 },
        mmio64: Some(Window { start: (16 + u64::from(number)) << 32, size: 1 << 32 }),
        intx_gsis: (number == 0).then_some([16, 17, 18, 19]),
    }
}

/// More than the xAPIC can name, every other processor absent, two segments, no devices.
fn large_machine() -> Machine {
    let mut machine = machine(0);
    machine.cpus = (0..300).map(|i| Cpu { apic_id: i * 2, enabled: i % 2 == 0 }).collect();
    machine.pci.push(segment(1));
    machine.serial = None;
    machine.power_button = false;
    machine.rtc = false;
    machine.generation_id = None;
    machine
}

fn name(blob: &Blob) -> String {
    let signature = &blob.bytes[..4];
    if signature == b"RSD " { "RSDP".to_string() } else { String::from_utf8(signature.to_vec()).unwrap() }
}

fn table<'a>(tables: &'a Tables, wanted: &str) -> &'a [u8] {
    &tables.blobs.iter().find(|blob| name(blob) == wanted).unwrap().bytes
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

#[test]
fn tables_are_as_in_the_golden_files() {
    let bless = env::var_os("VMM_BLESS").is_some();
    for cpus in [1, 2, 4] {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/{cpus}cpu"));
        fs::create_dir_all(&folder).unwrap();
        for blob in build(&machine(cpus), BASE, SPACE).unwrap().blobs {
            let path = folder.join(format!("{}.aml", name(&blob)));
            if bless {
                fs::write(&path, &blob.bytes).unwrap();
            }
            let golden = fs::read(&path).unwrap_or_default();
            assert!(
                blob.bytes == golden,
                "{} differs; look at it with iasl -d, and run with VMM_BLESS=1 if that is meant",
                path.display()
            );
        }
    }
}

#[test]
fn pointers_lengths_and_checksums_hold() {
    for machine in [machine(1), machine(255), large_machine()] {
        let tables = build(&machine, BASE, SPACE).unwrap();
        let by_address: HashMap<u64, &Blob> = tables.blobs.iter().map(|blob| (blob.address, blob)).collect();

        let mut free = BASE;
        let mut in_order: Vec<&Blob> = tables.blobs.iter().collect();
        in_order.sort_by_key(|blob| blob.address);
        for blob in in_order {
            assert!(blob.address >= free && blob.address.is_multiple_of(64), "{} overlaps", name(blob));
            free = blob.address + blob.bytes.len() as u64;
            if name(blob) != "RSDP" {
                assert_eq!(u32_at(&blob.bytes, 4) as usize, blob.bytes.len(), "{} length", name(blob));
            }
            assert_eq!(sum(&blob.bytes), 0, "{} checksum", name(blob));
        }
        assert!(free <= BASE + SPACE);

        let rsdp = by_address[&tables.rsdp_address];
        assert_eq!((tables.rsdp_address, &rsdp.bytes[..8]), (BASE, &b"RSD PTR "[..]));
        assert_eq!(sum(&rsdp.bytes[..20]), 0);
        let xsdt = by_address[&u64_at(&rsdp.bytes, 24)];
        let listed: Vec<String> =
            (36..xsdt.bytes.len()).step_by(8).map(|at| name(by_address[&u64_at(&xsdt.bytes, at)])).collect();
        assert_eq!(listed, ["FACP", "APIC", "MCFG"]);
        let fadt = table(&tables, "FACP");
        assert_eq!(name(by_address[&u64_at(fadt, 140)]), "DSDT");
    }
}

/// Offsets of ACPI 6.5, table 5.9.
#[test]
fn fadt_says_hardware_reduced_with_the_registers() {
    let fadt_of = |machine: &Machine| table(&build(machine, BASE, SPACE).unwrap(), "FACP").to_vec();
    let mut machine = machine(1);
    let fadt = fadt_of(&machine);
    assert_eq!((fadt[8], fadt[131], fadt.len()), (6, 5, 276));
    let flags = u32_at(&fadt, 112);
    for bit in [0, 2, 4, 5, 8, 10, 20] {
        assert!(flags & (1 << bit) != 0, "flag {bit}");
    }
    let control = [1, 8, 0, 1, 0xc0, 3, 0, 0, 0, 0, 0, 0];
    assert_eq!(fadt[116..128], control, "reset register");
    assert_eq!(fadt[128], RESET_VALUE);
    assert_eq!(fadt[244..256], control, "sleep control");
    assert_eq!(fadt[256..268], control, "sleep status");
    assert_eq!(fadt[208..220], [1, 32, 0, 3, 0x08, 0xb0, 0, 0, 0, 0, 0, 0], "PM timer");
    assert_eq!((u32_at(&fadt, 76), fadt[91]), (0xb008, 4));
    assert_eq!(S5_VALUE, 0x34);

    assert_eq!(fadt[109], 1 << 2);
    machine.rtc = false;
    assert_eq!(fadt_of(&machine)[109], 1 << 2 | 1 << 5);
}

#[test]
fn madt_names_large_ids_as_x2apic() {
    let mut machine = machine(0);
    machine.cpus = [(0, true), (254, false), (255, true), (0x1_0000, false)]
        .map(|(apic_id, enabled)| Cpu { apic_id, enabled })
        .to_vec();
    let tables = build(&machine, BASE, SPACE).unwrap();
    let madt = table(&tables, "APIC");
    assert_eq!((u32_at(madt, 36), u32_at(madt, 40)), (0xfee0_0000, 0));
    let expected: [&[u8]; 6] = [
        &[0, 8, 0, 0, 1, 0, 0, 0],
        &[0, 8, 1, 254, 2, 0, 0, 0],
        &[9, 16, 0, 0, 255, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0],
        &[9, 16, 0, 0, 0, 0, 1, 0, 2, 0, 0, 0, 3, 0, 0, 0],
        &[1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0],
        &[2, 10, 0, 4, 4, 0, 0, 0, 0, 0],
    ];
    assert_eq!(madt[44..], expected.concat());
}

/// A processor whose UID does not fit in 8 bits is told as x2APIC though its APIC id would fit.
#[test]
fn madt_never_cuts_a_uid() {
    let mut machine = machine(300);
    machine.cpus.reverse();
    let tables = build(&machine, BASE, SPACE).unwrap();
    let madt = table(&tables, "APIC");
    let mut uids = Vec::new();
    let mut at = 44;
    while at < madt.len() {
        match madt[at] {
            0 => uids.push((u32::from(madt[at + 2]), u32::from(madt[at + 3]))),
            9 => uids.push((u32_at(madt, at + 12), u32_at(madt, at + 4))),
            _ => {}
        }
        at += usize::from(madt[at + 1]);
    }
    uids.sort_unstable();
    assert_eq!(uids, (0..300).map(|uid| (uid, 299 - uid)).collect::<Vec<_>>());
}

#[test]
fn mcfg_lists_every_segment() {
    let tables = build(&large_machine(), BASE, SPACE).unwrap();
    let mcfg = table(&tables, "MCFG");
    assert_eq!(mcfg.len(), 36 + 8 + 2 * 16);
    assert_eq!((u64_at(mcfg, 44), &mcfg[52..56]), (0xe800_0000, &[0, 0, 0, 0][..]));
    assert_eq!((u64_at(mcfg, 60), &mcfg[68..72]), (0xe810_0000, &[1, 0, 0, 0][..]));

    let mut machine = machine(1);
    machine.pci.clear();
    let tables = build(&machine, BASE, SPACE).unwrap();
    assert!(tables.blobs.iter().all(|blob| name(blob) != "MCFG"));
}

#[test]
fn iasl_takes_every_table_without_error_or_warning() {
    for machine in [machine(1), machine(2), machine(4), large_machine()] {
        for blob in build(&machine, BASE, SPACE).unwrap().blobs {
            // The RSDP has no table header; iasl does not take it.
            if name(&blob) != "RSDP" {
                check_with_iasl(&blob);
            }
        }
    }
}

fn check_with_iasl(blob: &Blob) {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("table.aml"), &blob.bytes).unwrap();
    let disassembled = iasl(folder.path(), &["-d", "table.aml"]);
    let source = fs::read_to_string(folder.path().join("table.dsl"));
    let source = source.unwrap_or_else(|_| panic!("{} does not disassemble:\n{disassembled}", name(blob)));
    for word in ["Warning", "Error", "Invalid", "Incorrect"] {
        assert!(!disassembled.contains(word), "{}: {word} in disassembly:\n{disassembled}", name(blob));
    }
    assert!(!source.contains("Incorrect checksum") && !source.contains("External ("), "{source}");
    let compiled = iasl(folder.path(), &["-p", "again", "table.dsl"]);
    assert!(compiled.contains("0 Errors, 0 Warnings, 0 Remarks"), "{}:\n{compiled}", name(blob));
}

fn iasl(folder: &Path, arguments: &[&str]) -> String {
    let output = Command::new("iasl")
        .args(arguments)
        .current_dir(folder)
        .output()
        .expect("this test needs iasl: apt-get install acpica-tools");
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// ACPICA, the interpreter that Linux has, loads the tables and runs the host bridge's `_OSC`.
#[test]
fn acpica_loads_the_tables_and_runs_the_host_bridge_control_method() {
    for machine in [machine(2), large_machine()] {
        let tables = build(&machine, BASE, SPACE).unwrap();
        // The UUID, its bytes as they lie in memory; hot-plug (bits 0 and 1) is asked for and must not be given.
        let known = "5B 4D DB 33 F7 1F 1C 40 96 57 74 41 C0 3D D7 66";
        let osc = |uuid: &str, control: &str| {
            let capabilities = format!("01 00 00 00 1F 00 00 00 {control} 00 00 00");
            acpiexec(&tables, &format!("evaluate \\_SB.PCI0._OSC ({uuid}) 1 3 ({capabilities})"))
        };
        let masked = osc(known, "1F");
        assert!(masked.contains("0C =     0000: 11 00 00 00 1F 00 00 00 1C 00 00 00"), "{masked}");
        let granted = osc(known, "14");
        assert!(granted.contains("0C =     0000: 01 00 00 00 1F 00 00 00 14 00 00 00"), "{granted}");
        let unknown = osc(&known.replace("5B", "5C"), "1F");
        assert!(unknown.contains("0C =     0000: 05 00 00 00 1F 00 00 00 1F 00 00 00"), "{unknown}");
    }
}

fn acpiexec(tables: &Tables, command: &str) -> String {
    let folder = tempfile::tempdir().unwrap();
    // acpiexec brings its own RSDP and XSDT.
    let blobs = tables.blobs.iter().filter(|blob| !["RSDP", "XSDT"].contains(&name(blob).as_str()));
    let names: Vec<String> = blobs
        .map(|blob| {
            let file = format!("{}.aml", name(blob));
            fs::write(folder.path().join(&file), &blob.bytes).unwrap();
            file
        })
        .collect();
    let output = Command::new("acpiexec")
        .args(["-b", command])
        .args(names)
        .current_dir(folder.path())
        .output()
        .expect("this test needs acpiexec: apt-get install acpica-tools");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("successfully acquired and loaded"), "{text}");
    for word in ["Warning", "Error", "Exception", "AE_"] {
        assert!(!text.contains(word), "{word} in:\n{text}");
    }
    text
}

#[test]
fn contradictions_are_refused() {
    let error = |change: fn(&mut Machine)| {
        let mut machine = machine(2);
        change(&mut machine);
        build(&machine, BASE, SPACE).unwrap_err()
    };
    assert_eq!(error(|m| m.cpus.clear()), Error::CpuCount { count: 0, limit: 4096 });
    assert_eq!(error(|m| m.cpus[1].apic_id = 0), Error::DuplicateApicId(0));
    assert!(matches!(
        error(|m| m.cpus = (0..4097).map(|apic_id| Cpu { apic_id, enabled: true }).collect()),
        Error::CpuCount { count: 4097, .. }
    ));
    assert_eq!(error(|m| m.pci.push(segment(0))), Error::DuplicateSegment(0));
    assert!(matches!(
        error(|m| m.pci = (0..17).map(segment).collect()),
        Error::SegmentCount { count: 17, .. }
    ));
    assert_eq!(error(|m| m.pci[0].start_bus = 1), Error::Buses { segment: 0, start: 1, end: 0 });
    for address in [0xe800_0001, 1 << 32, u64::MAX << 20] {
        let mut machine = machine(1);
        machine.pci[0].ecam_base = address;
        assert_eq!(build(&machine, BASE, SPACE), Err(Error::Ecam { segment: 0, address }));
    }
    for (start, size) in [(0xc000_0000, 0), (0xc000_0000, 0x4000_0001), (u64::MAX, 2)] {
        let mut machine = machine(1);
        machine.pci[0].mmio32 = Window { start, size };
        assert_eq!(
            build(&machine, BASE, SPACE),
            Err(Error::Window { segment: 0, what: "32-bit MMIO", start, size })
        );
    }
    assert!(matches!(
        error(|m| m.pci[0].mmio64 = Some(Window { start: u64::MAX, size: 2 })),
        Error::Window { what: "64-bit MMIO", .. }
    ));
    for address in [0xc000_0000, 0xe800_0000, 0x10_ffff_ffff] {
        let mut machine = machine(1);
        machine.ged.address = address;
        assert_eq!(build(&machine, BASE, SPACE), Err(Error::GedInWindow { segment: 0, address }));
    }
}

#[test]
fn the_space_is_respected() {
    let machine = machine(4);
    let whole = build(&machine, BASE, SPACE).unwrap();
    let last = whole.blobs.iter().map(|blob| blob.address + blob.bytes.len() as u64).max().unwrap();
    let needed = last - BASE;
    assert_eq!(build(&machine, BASE, needed).unwrap(), whole);
    for space in 0..needed {
        assert!(matches!(build(&machine, BASE, space), Err(Error::Space { .. })), "{space}");
    }
    assert!(matches!(build(&machine, BASE + 8, SPACE), Err(Error::Space { .. })));
    assert!(matches!(build(&machine, !63, SPACE), Err(Error::Space { .. })));
}

fn any_window() -> impl Strategy<Value = Window> {
    (any::<u64>(), any::<u64>(), 0u32..64, 0u32..64)
        .prop_map(|(start, size, a, b)| Window { start: start >> a, size: size >> b })
}

fn any_segment() -> impl Strategy<Value = PciSegment> {
    let numbers = (any::<u16>(), 0u64..8192, any::<u8>(), any::<u8>());
    (numbers, any_window(), prop::option::of(any_window()), any::<Option<[u32; 4]>>()).prop_map(
        |((segment, ecam, start_bus, end_bus), mmio32, mmio64, intx_gsis)| PciSegment {
            segment,
            ecam_base: ecam << 20,
            start_bus,
            end_bus,
            mmio32,
            mmio64,
            intx_gsis,
        },
    )
}

proptest! {
    /// Whatever the description, there is no panic, the result is the same twice, and what is built fits.
    #[test]
    fn any_description_is_built_or_refused(
        cpus in prop::collection::vec((any::<u32>(), any::<bool>()), 0..20),
        pci in prop::collection::vec(any_segment(), 0..4),
        ged in any::<u64>(),
        ports in any::<(u16, u16, u16)>(),
        base in any::<u64>(),
    ) {
        let mut machine = machine(0);
        machine.cpus = cpus.into_iter().map(|(apic_id, enabled)| Cpu { apic_id, enabled }).collect();
        machine.pci = pci;
        machine.ged.address = ged;
        machine.ports = PowerPorts { pm_timer: ports.0, control: ports.1 };
        machine.serial = Some(Serial { port: ports.2, irq: 255 });
        for base in [BASE, base, base & !63] {
            let tables = build(&machine, base, SPACE);
            prop_assert_eq!(&tables, &build(&machine, base, SPACE));
            for blob in tables.iter().flat_map(|tables| &tables.blobs) {
                prop_assert!(blob.address >= base && blob.address - base + blob.bytes.len() as u64 <= SPACE);
            }
        }
    }
}
