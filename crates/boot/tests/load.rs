//! Handmade kernels, good and bad, loaded into a small guest memory.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests fail by panicking"
)]

use std::{error::Error as _, fs::File, os::unix::fs::FileExt};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_boot::{
    Cmdline, CmdlineError, Error, InitramfsError, KernelFormat, Loaded, MemoryKind, MemoryMap, MemoryRange,
    Source, Span, layout, load,
};
use vmm_fuzzing::{Random, rounds};

type Memory = GuestMemoryMmap<()>;

const RAM: u64 = 8 << 20;
const KERNEL: u64 = 2 << 20;
const RSDP: u64 = 0xa_0000;

struct Machine {
    memory: Memory,
    map: MemoryMap,
    cmdline: Cmdline,
}

impl Machine {
    fn new() -> Self {
        let memory = Memory::from_ranges(&[(GuestAddress(0), RAM as usize)]).unwrap();
        let map = MemoryMap::new(&[
            MemoryRange { start: 0, size: RAM, kind: MemoryKind::Ram },
            MemoryRange { start: RSDP, size: 0x1_0000, kind: MemoryKind::Acpi },
            MemoryRange { start: 0xe800_0000, size: 0x10_0000, kind: MemoryKind::Reserved },
        ])
        .unwrap();
        Self { memory, map, cmdline: Cmdline::new("console=ttyS0 quiet").unwrap() }
    }

    fn load(&self, kernel: &[u8]) -> Result<Loaded, Error> {
        self.load_files(&file(kernel), None)
    }

    fn load_files(&self, kernel: &File, initramfs: Option<&File>) -> Result<Loaded, Error> {
        load(
            &self.memory,
            &Source { kernel, initramfs, cmdline: &self.cmdline, map: &self.map, rsdp: Some(RSDP) },
        )
    }

    fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    fn read_u64(&self, address: u64) -> u64 {
        self.memory.read_obj(GuestAddress(address)).unwrap()
    }
}

fn file(bytes: &[u8]) -> File {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(bytes, 0).unwrap();
    file
}

/// The error and all its causes.
fn chain(error: &Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

fn span(start: u64, size: u64) -> Span {
    Span::new(start, size).unwrap()
}

/// One program header: type, file offset, address, size in the file, size in memory, alignment.
type Header = (u32, u64, u64, u64, u64, u64);

const PHDRS: usize = 64;
const PHDR_SIZE: usize = 56;
const NOTE_AT: u64 = 0x180;
const TEXT_AT: u64 = 0x200;
const TEXT_SIZE: u64 = 0x40;
const DATA_AT: u64 = 0x240;
const DATA_SIZE: u64 = 0x21;
const ENTRY: u64 = KERNEL + 0x10;

fn note(value: &[u8], align: usize) -> Vec<u8> {
    let mut note = [4u32.to_le_bytes(), (value.len() as u32).to_le_bytes(), 18u32.to_le_bytes()].concat();
    note.extend(b"Xen\0");
    note.resize(note.len().next_multiple_of(align), 0);
    note.extend(value);
    note.resize(note.len().next_multiple_of(align), 0);
    note
}

fn elf_with(headers: &[Header], note: &[u8]) -> Vec<u8> {
    let mut elf = vec![0; (DATA_AT + DATA_SIZE) as usize];
    put(&mut elf, 0, b"\x7fELF\x02\x01\x01");
    put(&mut elf, 16, &2u16.to_le_bytes());
    put(&mut elf, 18, &62u16.to_le_bytes());
    put(&mut elf, 20, &1u32.to_le_bytes());
    put(&mut elf, 32, &(PHDRS as u64).to_le_bytes());
    put(&mut elf, 52, &64u16.to_le_bytes());
    put(&mut elf, 54, &(PHDR_SIZE as u16).to_le_bytes());
    put(&mut elf, 56, &(headers.len() as u16).to_le_bytes());
    for (i, &(type_, offset, address, file_size, memory_size, align)) in headers.iter().enumerate() {
        let at = PHDRS + i * PHDR_SIZE;
        put(&mut elf, at, &type_.to_le_bytes());
        for (field, value) in [(8, offset), (24, address), (32, file_size), (40, memory_size), (48, align)] {
            put(&mut elf, at + field, &value.to_le_bytes());
        }
    }
    put(&mut elf, NOTE_AT as usize, note);
    elf[TEXT_AT as usize..].iter_mut().enumerate().for_each(|(i, byte)| *byte = i as u8 | 1);
    elf
}

fn elf_headers(note_len: usize) -> [Header; 3] {
    [
        (4, NOTE_AT, 0, note_len as u64, note_len as u64, 4),
        (1, TEXT_AT, KERNEL, TEXT_SIZE, TEXT_SIZE, 0x1000),
        (1, DATA_AT, KERNEL + 0x1000, DATA_SIZE, 0x2_0000, 0x1000),
    ]
}

/// A kernel with a text and a data segment (with bss); the file ends with the data.
fn elf() -> Vec<u8> {
    let note = note(&(ENTRY as u32).to_le_bytes(), 4);
    elf_with(&elf_headers(note.len()), &note)
}

/// The kernel of `elf` with one program header changed.
fn elf_with_header(index: usize, change: impl FnOnce(&mut Header)) -> Vec<u8> {
    let note = note(&(ENTRY as u32).to_le_bytes(), 4);
    let mut headers = elf_headers(note.len());
    change(&mut headers[index]);
    elf_with(&headers, &note)
}

const CODE_SIZE: usize = 0x400;
const INIT_SIZE: u32 = 0x1_0000;

/// A bzImage with one sector of setup code; the file ends with the protected-mode code.
fn bzimage() -> Vec<u8> {
    let mut image = vec![0; 1024 + CODE_SIZE];
    image[..1024].iter_mut().enumerate().for_each(|(i, byte)| *byte = i as u8);
    image[0x1f1] = 1;
    put(&mut image, 0x1f4, &(CODE_SIZE as u32 / 16).to_le_bytes());
    put(&mut image, 0x1fe, &0xaa55u16.to_le_bytes());
    put(&mut image, 0x200, &[0xeb, 0x6a]);
    put(&mut image, 0x202, b"HdrS");
    put(&mut image, 0x206, &0x020fu16.to_le_bytes());
    image[0x211] = 1;
    put(&mut image, 0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(&mut image, 0x230, &0x20_0000u32.to_le_bytes());
    image[0x234] = 1;
    put(&mut image, 0x236, &0x3fu16.to_le_bytes());
    put(&mut image, 0x238, &2047u32.to_le_bytes());
    put(&mut image, 0x250, &0u64.to_le_bytes());
    put(&mut image, 0x258, &KERNEL.to_le_bytes());
    put(&mut image, 0x260, &INIT_SIZE.to_le_bytes());
    image[1024..].iter_mut().enumerate().for_each(|(i, byte)| *byte = i as u8 ^ 0x5a);
    image
}

#[test]
fn an_elf_kernel_is_loaded_with_its_bss_cleared() {
    let machine = Machine::new();
    machine.memory.write_slice(&[0xff; 0x3_0000], GuestAddress(KERNEL)).unwrap();
    let kernel = elf();
    let loaded = machine.load(&kernel).unwrap();

    assert_eq!(loaded.format, KernelFormat::ElfPvh);
    assert_eq!(loaded.kernel, span(KERNEL, 0x2_1000));
    assert_eq!(loaded.initramfs, None);
    assert_eq!(loaded.registers.general.rip, ENTRY);
    assert_eq!(loaded.registers.general.rbx, layout::START_INFO.start);
    assert_eq!(machine.read(KERNEL, TEXT_SIZE as usize), kernel[TEXT_AT as usize..DATA_AT as usize]);
    let data = machine.read(KERNEL + 0x1000, 0x2_0000);
    assert_eq!(data[..DATA_SIZE as usize], kernel[DATA_AT as usize..]);
    assert!(data[DATA_SIZE as usize..].iter().all(|byte| *byte == 0));
    assert_eq!(machine.read(KERNEL + 0x2_1000, 1), [0xff]);
    assert_eq!(machine.read(layout::COMMAND_LINE.start, 20), b"console=ttyS0 quiet\0");
    let code = machine.read_u64(layout::GDT.start + u64::from(loaded.registers.cs.selector));
    assert_eq!(code, 0x00cf_9b00_0000_ffff);
}

#[test]
fn start_info_module_list_and_memory_map_are_the_abi_byte_for_byte() {
    let machine = Machine::new();
    let loaded = machine.load_files(&file(&elf()), Some(&file(&[7; 5000]))).unwrap();
    #[rustfmt::skip]
    let start_info = [
        0x78, 0xc5, 0x6e, 0x33, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, // magic, version, flags, modules
        0x40, 0x60, 0, 0, 0, 0, 0, 0, 0, 0, 0x02, 0, 0, 0, 0, 0, // module list, command line
        0, 0, 0x0a, 0, 0, 0, 0, 0, 0, 0x70, 0, 0, 0, 0, 0, 0, // RSDP, memory map
        5, 0, 0, 0, 0, 0, 0, 0, // entries
    ];
    assert_eq!(machine.read(0x6000, 56), start_info);
    let module = [RAM - 0x2000, 5000, 0, 0].map(u64::to_le_bytes).concat();
    assert_eq!(machine.read(0x6040, 32), module);
    assert_eq!(loaded.initramfs, Some(span(RAM - 0x2000, 5000)));
    assert_eq!(machine.read(RAM - 0x2000, 5000), [7; 5000]);

    let entries: [(u64, u64, u64); 5] = [
        (0, 0xa_0000, 1),
        (0xa_0000, 0x1_0000, 3),
        (0xb_0000, 0x5_0000, 2),
        (0x10_0000, RAM - 0x10_0000, 1),
        (0xe800_0000, 0x10_0000, 2),
    ];
    for (i, (start, size, type_)) in entries.into_iter().enumerate() {
        let entry = [start, size, type_].map(u64::to_le_bytes).concat();
        assert_eq!(machine.read(0x7000 + i as u64 * 24, 24), entry, "entry {i}");
    }
}

#[test]
fn the_note_may_have_four_or_eight_bytes_and_either_alignment() {
    let values: [&[u8]; 2] = [&(ENTRY as u32).to_le_bytes(), &ENTRY.to_le_bytes()];
    for value in values {
        // A segment may say 8 and hold notes padded to 4.
        for (padding, align) in [(4, 4), (8, 8), (4, 8), (4, 1), (4, 0)] {
            let mut notes = note(&[1; 3], padding);
            notes[8] = 17;
            notes.extend(note(value, padding));
            let mut headers = elf_headers(notes.len());
            headers[0].5 = align;
            let loaded = Machine::new().load(&elf_with(&headers, &notes)).unwrap();
            assert_eq!(loaded.registers.general.rip, ENTRY);
        }
    }
}

#[test]
fn a_bzimage_is_loaded_with_its_page_tables() {
    let machine = Machine::new();
    let kernel = bzimage();
    let loaded = machine.load(&kernel).unwrap();

    assert_eq!(loaded.format, KernelFormat::BzImage);
    assert_eq!(loaded.kernel, span(KERNEL, INIT_SIZE.into()));
    assert_eq!(loaded.registers.general.rip, KERNEL + 0x200);
    assert_eq!(loaded.registers.general.rsi, layout::ZERO_PAGE.start);
    assert_eq!(machine.read(KERNEL, CODE_SIZE), kernel[1024..]);
    assert_eq!(machine.read(layout::COMMAND_LINE.start, 20), b"console=ttyS0 quiet\0");
    assert_eq!(machine.read_u64(loaded.registers.control.cr3), layout::PDPT.start | 3);
    assert_eq!(machine.read_u64(layout::PDPT.start + 24), layout::PAGE_DIRECTORIES.start + 0x3003);
    assert_eq!(machine.read_u64(layout::PAGE_DIRECTORIES.start + 0x3ff8), 0xffe0_0083);
    assert_eq!(machine.read_u64(layout::GDT.start + 0x10), 0x00af_9b00_0000_ffff);
}

#[test]
fn the_zero_page_is_the_protocol_byte_for_byte() {
    let machine = Machine::new();
    let kernel = bzimage();
    let loaded = machine.load_files(&file(&kernel), Some(&file(&[7; 5000]))).unwrap();
    assert_eq!(loaded.initramfs, Some(span(RAM - 0x2000, 5000)));

    let mut expected = vec![0; 0x1000];
    put(&mut expected, 0x70, &RSDP.to_le_bytes());
    expected[0x1e8] = 5;
    put(&mut expected, 0x1f1, &kernel[0x1f1..0x26c]);
    expected[0x210] = 0xff;
    put(&mut expected, 0x214, &(KERNEL as u32).to_le_bytes());
    put(&mut expected, 0x218, &(RAM as u32 - 0x2000).to_le_bytes());
    put(&mut expected, 0x21c, &5000u32.to_le_bytes());
    put(&mut expected, 0x228, &0x2_0000u32.to_le_bytes());
    let entries: [(u64, u64, u32); 5] = [
        (0, 0xa_0000, 1),
        (0xa_0000, 0x1_0000, 3),
        (0xb_0000, 0x5_0000, 2),
        (0x10_0000, RAM - 0x10_0000, 1),
        (0xe800_0000, 0x10_0000, 2),
    ];
    for (i, (start, size, type_)) in entries.into_iter().enumerate() {
        let at = 0x2d0 + i * 20;
        put(&mut expected, at, &start.to_le_bytes());
        put(&mut expected, at + 8, &size.to_le_bytes());
        put(&mut expected, at + 16, &type_.to_le_bytes());
    }
    let page = machine.read(layout::ZERO_PAGE.start, 0x1000);
    for (at, (got, wanted)) in page.iter().zip(&expected).enumerate() {
        assert_eq!(got, wanted, "at {at:#x}");
    }
}

#[test]
fn what_lies_behind_a_short_setup_header_is_not_told() {
    let machine = Machine::new();
    let mut kernel = bzimage();
    kernel[0x201] = 0x66;
    put(&mut kernel, 0x250, &[0xff; 8]);
    machine.load(&kernel).unwrap();
    assert_eq!(machine.read(layout::ZERO_PAGE.start + 0x268, 4), [0; 4]);
    assert_eq!(machine.read(layout::ZERO_PAGE.start + 0x250, 8), [0; 8]);
}

#[test]
fn setup_sects_0_means_4() {
    let machine = Machine::new();
    let mut kernel = bzimage();
    let code = kernel.split_off(1024);
    kernel[0x1f1] = 0;
    kernel.resize(5 * 512, 0xee);
    kernel.extend(&code);
    machine.load(&kernel).unwrap();
    assert_eq!(machine.read(KERNEL, CODE_SIZE), code);
}

#[test]
fn no_truncated_kernel_is_loaded() {
    let machine = Machine::new();
    for whole in [elf(), bzimage()] {
        let file = file(&whole);
        assert!(machine.load_files(&file, None).is_ok());
        for len in (0..whole.len()).rev() {
            file.set_len(len as u64).unwrap();
            assert!(machine.load_files(&file, None).is_err(), "{len} of {} bytes", whole.len());
        }
    }
}

/// A refusal names its reason, and nothing was written.
#[track_caller]
fn refused(kernel: &[u8], reason: &str) {
    let machine = Machine::new();
    let text = chain(&machine.load(kernel).unwrap_err());
    assert!(text.contains(reason), "{text}");
    assert!(machine.read(0, RAM as usize).iter().all(|byte| *byte == 0), "memory was written");
}

#[test]
fn segments_in_wrong_places_are_refused() {
    refused(&elf_with_header(1, |h| h.2 = RAM - 0x20), "is outside the guest's RAM");
    refused(&elf_with_header(1, |h| h.2 = 0xa_0000), "is outside the guest's RAM");
    refused(&elf_with_header(2, |h| h.4 = RAM), "segment 2 at 0x201000..0xa01000 is outside the guest's RAM");
    refused(&elf_with_header(1, |h| h.2 = 0x6010), "overlaps the PVH start info at 0x6000..0x6038");
    refused(&elf_with_header(1, |h| h.2 = 0x1_ffe0), "overlaps the command line");
    refused(&elf_with_header(1, |h| h.2 = 0x4e0), "overlaps the GDT");
    refused(&elf_with_header(2, |h| h.2 = KERNEL + 0x3f), "overlaps another one at 0x200000..0x200040");
    refused(&elf_with_header(2, |h| h.2 = KERNEL - 0x1_ffff), "overlaps another one");
    refused(&elf_with_header(1, |h| h.2 = u64::MAX - 0x10), "segment 1 has an impossible size");
    refused(&elf_with_header(2, |h| h.4 = u64::MAX), "segment 2 has an impossible size");
    refused(&elf_with_header(2, |h| h.4 = DATA_SIZE - 1), "0x21 bytes in the file, 0x20 at 0x201000");
    refused(&elf_with_header(2, |h| h.1 += 1), "file of 609 bytes is too short for the segment");
    refused(&elf_with_header(2, |h| h.1 = u64::MAX), "too short for the segment");
}

#[test]
fn absurd_elf_headers_are_refused() {
    let change = |at: usize, value: &[u8]| {
        let mut kernel = elf();
        put(&mut kernel, at, value);
        kernel
    };
    refused(&change(4, &[1]), "ELF class is 0x1, 2 (64-bit) is needed");
    refused(&change(5, &[2]), "ELF data encoding is 0x2");
    refused(&change(16, &[1, 0]), "ELF type is 0x1");
    refused(&change(18, &[183, 0]), "ELF machine is 0xb7, 62 (x86-64) is needed");
    refused(&change(54, &[55, 0]), "size of a program header is 0x37");
    refused(&change(56, &[0xff, 0xff]), "number of program headers is 0xffff, at most 128 is needed");
    refused(&change(56, &[128, 0]), "too short for the program headers");
    refused(&change(32, &[0xff; 8]), "too short for the program headers");
    refused(&change(56, &[0, 0]), "no loadable segment");
    refused(&change(PHDRS, &[5]), "no PVH entry point (note XEN_ELFNOTE_PHYS32_ENTRY)");
}

#[test]
fn absurd_notes_are_refused() {
    refused(
        &elf_with_header(0, |h| h.3 = 0x1_0001),
        "note segment 0 has 0x10001 bytes, the limit is 0x10000",
    );
    refused(&elf_with_header(0, |h| h.3 = 0x8000), "too short for the notes");
    refused(&elf_with_header(0, |h| h.1 = u64::MAX), "too short for the notes");
    refused(&elf_with_header(0, |h| h.3 = 0), "no PVH entry point");
    refused(&elf_with_header(0, |h| h.3 = 19), "no PVH entry point");

    let with_value = |value: &[u8]| {
        let note = note(value, 4);
        elf_with(&elf_headers(note.len()), &note)
    };
    refused(&with_value(&[0; 5]), "the PVH entry note has 5 bytes, 4 or 8 are needed");
    refused(&with_value(&(KERNEL - 1).to_le_bytes()), "entry point 0x1fffff is not in a loaded segment");
    refused(&with_value(&(KERNEL + TEXT_SIZE).to_le_bytes()), "entry point 0x200040 is not in");
    refused(&with_value(&(ENTRY | 1 << 32).to_le_bytes()), "entry point 0x100200010 is not in");
    refused(&with_value(&u64::MAX.to_le_bytes()), "entry point 0xffffffffffffffff is not in");
}

#[test]
fn absurd_setup_headers_are_refused() {
    let change = |at: usize, value: &[u8]| {
        let mut kernel = bzimage();
        put(&mut kernel, at, value);
        kernel
    };
    refused(&change(0x1fe, &[0, 0]), "boot flag in the setup header is 0x0");
    refused(&change(0x206, &0x020bu16.to_le_bytes()), "protocol version in the setup header is 0x20b");
    refused(&change(0x201, &[0x65]), "end of the header");
    refused(&change(0x211, &[0]), "LOADED_HIGH");
    refused(&change(0x236, &[0xfe]), "xloadflags in the setup header is 0xfe, a 64-bit entry point");
    refused(&change(0x1f1, &[0xff]), "too short for the protected-mode code");
    refused(&change(0x1f4, &[0xff; 4]), "too short for the protected-mode code");
    refused(&change(0x1f4, &0u32.to_le_bytes()), "syssize in the setup header is 0x0");
    refused(&change(0x1f4, &0x20u32.to_le_bytes()), "syssize in the setup header is 0x20");
    refused(&change(0x260, &(CODE_SIZE as u32 - 1).to_le_bytes()), "init_size in the setup header is 0x3ff");
    refused(&change(0x260, &[0xff; 4]), "the kernel needs 0xffffffff bytes at 0x200000");
    refused(&change(0x258, &(RAM - 0x1000).to_le_bytes()), "not all RAM below 4 GiB");
    refused(&change(0x258, &u64::MAX.to_le_bytes()), "not all RAM below 4 GiB");
    refused(&change(0x258, &0u64.to_le_bytes()), "the kernel at 0x0..0x10000 overlaps the GDT");
}

#[test]
fn what_is_not_a_kernel_is_named() {
    let at_38 = [&[0; 0x38][..], b"ARM\x64"].concat();
    for (bytes, found) in [
        (&b""[..], "found an empty file"),
        (b"\x1f\x8b\x08", "found a gzip file"),
        (b"QFI\xfb\0\0\0\x03", "found a qcow2 disk image"),
        (b"#!/bin/sh\n", "found a script"),
        (b"070701", "found a cpio archive"),
        (b"\x28\xb5\x2f\xfd", "found a zstd file"),
        (&at_38, "found an arm64 Linux image"),
        (b"\x7fEL", "found a file that starts with 7f 45 4c"),
        (&[0xab; 4096], "found a file that starts with ab ab ab ab ab ab ab ab"),
    ] {
        refused(bytes, found);
        refused(bytes, "an ELF file with a PVH entry point or a bzImage is needed");
    }
    let machine = Machine::new();
    let folder = File::open("/").unwrap();
    let error = machine.load_files(&folder, None).unwrap_err();
    assert_eq!(chain(&error), "cannot read the kernel: not a regular file but a directory");
}

#[test]
fn an_initramfs_that_cannot_be_loaded_is_refused_with_numbers() {
    let machine = Machine::new();
    for kernel in [elf(), bzimage()] {
        let kernel = file(&kernel);
        let large = file(&[]);
        large.set_len(RAM).unwrap();
        let error = machine.load_files(&kernel, Some(&large)).unwrap_err();
        assert!(
            matches!(error, Error::Initramfs(InitramfsError::TooLarge { size: RAM, available, .. }) if available < RAM),
            "{error:?}"
        );
        let error = machine.load_files(&kernel, Some(&file(&[]))).unwrap_err();
        assert_eq!(chain(&error), "cannot load the initramfs: the file is empty");
        let error = machine.load_files(&kernel, Some(&File::open("/").unwrap())).unwrap_err();
        assert_eq!(chain(&error), "cannot load the initramfs: not a regular file but a directory");
    }
    assert!(machine.read(0, RAM as usize).iter().all(|byte| *byte == 0), "memory was written");
}

#[test]
fn the_limits_that_a_bzimage_states_are_kept() {
    let machine = Machine::new();
    let initramfs = file(&[1; 4096]);
    let mut kernel = bzimage();
    put(&mut kernel, 0x22c, &0x3f_ffffu32.to_le_bytes());
    put(&mut kernel, 0x238, &19u32.to_le_bytes());
    let loaded = machine.load_files(&file(&kernel), Some(&initramfs)).unwrap();
    assert_eq!(loaded.initramfs, Some(span(0x3f_f000, 4096)));
    put(&mut kernel, 0x238, &18u32.to_le_bytes());
    let error = machine.load(&kernel).unwrap_err();
    assert!(matches!(error, Error::Cmdline(CmdlineError::TooLong { len: 19, limit: 18 })), "{error:?}");
}

/// Changes a few bytes or whole numbers of the first `len` bytes, often to values at an edge.
fn mutate_numbers(random: &mut Random, bytes: &mut [u8], from: usize, to: usize) {
    const EDGES: [u64; 10] =
        [0, 1, 0x7f, 0xff, 0xffff, 0x1_0000, u32::MAX as u64, i64::MAX as u64, u64::MAX, RAM - 0x40];
    for _ in 0..=random.below(3) {
        let at = from + random.below(to - from);
        let width = [1, 2, 4, 8][random.below(4)].min(bytes.len() - at);
        let value = match random.below(3) {
            0 => random.next(),
            1 => EDGES[random.below(EDGES.len())],
            _ => u64::from(bytes[at]).wrapping_add(random.next() % 64),
        };
        put(bytes, at, &value.to_le_bytes()[..width]);
    }
}

/// Whatever a header says, there is no panic, and a kernel that is taken lies in RAM and off the boot data.
fn mutated_kernels_are_safe(whole: &[u8], from: usize, to: usize, seed: u64) {
    let machine = Machine::new();
    let file = file(whole);
    let initramfs = self::file(&[1; 5000]);
    let mut random = Random::new(seed);
    let (mut taken, mut refused) = (0, 0);
    for case in 0..rounds(10_000) {
        let mut kernel = whole.to_vec();
        mutate_numbers(&mut random, &mut kernel, from, to);
        file.write_all_at(&kernel, 0).unwrap();
        match machine.load_files(&file, Some(&initramfs)) {
            Ok(loaded) => {
                taken += 1;
                assert!(loaded.kernel.end() <= RAM, "case {case}");
                let entry = span(loaded.registers.general.rip, 1);
                assert!(loaded.kernel.contains(&entry), "case {case}");
                let initramfs = loaded.initramfs.unwrap();
                assert!(machine.map.is_ram(&initramfs) && !initramfs.overlaps(&loaded.kernel), "case {case}");
                assert_eq!(machine.read(layout::COMMAND_LINE.start, 7), b"console", "case {case}");
            }
            Err(error) => {
                refused += 1;
                assert!(!chain(&error).is_empty());
            }
        }
    }
    assert!(taken > 100 && refused > 100, "{taken} taken, {refused} refused: the mutations miss their point");
}

#[test]
fn fuzz_elf_headers() {
    mutated_kernels_are_safe(&elf(), 0, TEXT_AT as usize, 0x9e37_79b9_7f4a_7c15);
}

#[test]
fn fuzz_setup_headers() {
    mutated_kernels_are_safe(&bzimage(), 0x1f1, 0x26c, 0xd1b5_4a32_d192_ed03);
}
