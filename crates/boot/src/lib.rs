#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod bzimage;
mod cmdline;
mod elf;
mod file;
mod initramfs;
pub mod layout;
mod memory_map;
mod pvh;
mod registers;
mod span;

use std::fs::File;

use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError};

pub use crate::{
    bzimage::BzImageError,
    cmdline::{Cmdline, CmdlineError, MAX_LEN as MAX_CMDLINE_LEN},
    elf::ElfError,
    file::FileError,
    initramfs::InitramfsError,
    memory_map::{MAX_INPUT_RANGES, MemoryKind, MemoryMap, MemoryMapError, MemoryRange},
    registers::{BootRegisters, ControlRegisters, GeneralRegisters, Segment, TableRegister},
    span::Span,
};

use crate::{file::Image, layout::FOUR_GIB};

/// Why a guest could not be loaded.
#[derive(Debug, Error)]
pub enum Error {
    /// The kernel file cannot be read.
    #[error("cannot read the kernel")]
    Kernel(#[source] FileError),
    /// The kernel file is in no format that can be booted.
    #[error("not a kernel: found {0}; an ELF file with a PVH entry point or a bzImage is needed")]
    NotAKernel(String),
    /// The kernel is an ELF file that cannot be booted.
    #[error("cannot boot the ELF kernel")]
    Elf(#[from] ElfError),
    /// The kernel is a bzImage that cannot be booted.
    #[error("cannot boot the bzImage kernel")]
    BzImage(#[from] BzImageError),
    /// The initramfs cannot be loaded.
    #[error("cannot load the initramfs")]
    Initramfs(#[from] InitramfsError),
    /// The kernel takes a shorter command line.
    #[error("the kernel does not take the command line")]
    Cmdline(#[from] CmdlineError),
    /// Boot data cannot be written.
    #[error("cannot write the {what} to guest memory at {address:#x}")]
    Memory {
        /// Which data.
        what: &'static str,
        /// Guest-physical address.
        address: u64,
        /// The reason.
        #[source]
        source: GuestMemoryError,
    },
}

/// What to boot.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    /// The kernel, a regular file.
    pub kernel: &'a File,
    /// The initramfs, a regular file.
    pub initramfs: Option<&'a File>,
    /// The command line.
    pub cmdline: &'a Cmdline,
    /// The memory map.
    pub map: &'a MemoryMap,
    /// Guest-physical address of the ACPI root pointer.
    pub rsdp: Option<u64>,
}

/// The format of a kernel, and with it the boot protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KernelFormat {
    /// ELF, entered by the PVH ABI.
    ElfPvh,
    /// bzImage, entered by Linux's 64-bit boot protocol.
    BzImage,
}

/// A guest that is in memory, ready for its first instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loaded {
    /// The state to give the boot vCPU.
    pub registers: BootRegisters,
    /// How it boots.
    pub format: KernelFormat,
    /// The memory that the kernel takes.
    pub kernel: Span,
    /// The memory that the initramfs takes.
    pub initramfs: Option<Span>,
}

/// Loads kernel, initramfs and boot data into guest memory. Everything is checked before the first byte is written;
/// the contents of the files are read straight into guest memory.
///
/// # Errors
/// [`enum@Error`] when a file cannot be booted or does not fit. Guest memory is then to be thrown away.
pub fn load<M: GuestMemoryBackend>(memory: &M, source: &Source<'_>) -> Result<Loaded, Error> {
    let kernel = Image::new(source.kernel).map_err(Error::Kernel)?;
    match detect(kernel)? {
        KernelFormat::ElfPvh => load_elf(memory, source, kernel),
        KernelFormat::BzImage => load_bzimage(memory, source, kernel),
    }
}

fn load_elf<M: GuestMemoryBackend>(
    memory: &M,
    source: &Source<'_>,
    kernel: Image<'_>,
) -> Result<Loaded, Error> {
    let plan = elf::Plan::new(kernel, source.map)?;
    // Linux keeps the address that it finds in the module list in 32 bits.
    let initramfs = Initramfs::new(source, plan.extent, FOUR_GIB)?;

    plan.load(kernel, memory)?;
    let initramfs = initramfs.map(|initramfs| initramfs.load(memory)).transpose()?;
    for (area, bytes) in pvh::structures(source.map, initramfs, source.rsdp) {
        write(memory, area, &bytes)?;
    }
    let registers = BootRegisters::pvh(plan.entry);
    write_common(memory, source, &registers)?;
    Ok(Loaded { registers, format: KernelFormat::ElfPvh, kernel: plan.extent, initramfs })
}

fn load_bzimage<M: GuestMemoryBackend>(
    memory: &M,
    source: &Source<'_>,
    kernel: Image<'_>,
) -> Result<Loaded, Error> {
    let plan = bzimage::Plan::new(kernel, source.map)?;
    let (len, limit) = (source.cmdline.as_str().len(), plan.command_line_limit());
    if len > limit {
        return Err(CmdlineError::TooLong { len, limit }.into());
    }
    let initramfs = Initramfs::new(source, plan.extent, plan.initramfs_limit())?;

    plan.load(kernel, memory)?;
    let initramfs = initramfs.map(|initramfs| initramfs.load(memory)).transpose()?;
    write(memory, layout::ZERO_PAGE, &plan.zero_page(source.map, initramfs, source.rsdp))?;
    for (area, bytes) in registers::identity_page_tables() {
        write(memory, area, &bytes)?;
    }
    let registers = BootRegisters::linux64(plan.entry());
    write_common(memory, source, &registers)?;
    Ok(Loaded { registers, format: KernelFormat::BzImage, kernel: plan.extent, initramfs })
}

/// An initramfs that has its place.
struct Initramfs<'a> {
    image: Image<'a>,
    span: Span,
}

impl<'a> Initramfs<'a> {
    fn new(source: &Source<'a>, kernel: Span, limit: u64) -> Result<Option<Self>, InitramfsError> {
        let Some(file) = source.initramfs else { return Ok(None) };
        let image = Image::new(file)?;
        let span = initramfs::place(image.size(), source.map, kernel, limit)?;
        Ok(Some(Self { image, span }))
    }

    fn load<M: GuestMemoryBackend>(&self, memory: &M) -> Result<Span, InitramfsError> {
        initramfs::load(self.image, self.span, memory)?;
        Ok(self.span)
    }
}

/// What both protocols need: command line and descriptor tables.
fn write_common<M: GuestMemoryBackend>(
    memory: &M,
    source: &Source<'_>,
    registers: &BootRegisters,
) -> Result<(), Error> {
    write(memory, layout::COMMAND_LINE, &source.cmdline.to_bytes_with_nul())?;
    write(memory, layout::GDT, &registers.gdt_bytes())?;
    write(memory, layout::IDT, &[0; layout::IDT.size as usize])
}

fn write<M: GuestMemoryBackend>(memory: &M, area: layout::Area, bytes: &[u8]) -> Result<(), Error> {
    memory.write_slice(bytes, GuestAddress(area.start)).map_err(|source| Error::Memory {
        what: area.name,
        address: area.start,
        source,
    })
}

/// Tells the format by the magic numbers.
fn detect(kernel: Image<'_>) -> Result<KernelFormat, Error> {
    let (head, len) = kernel.head::<0x240>().map_err(Error::Kernel)?;
    let head = head.get(..len).unwrap_or_default();
    if head.starts_with(elf::MAGIC) {
        Ok(KernelFormat::ElfPvh)
    } else if head.get(bzimage::MAGIC_OFFSET..).is_some_and(|rest| rest.starts_with(bzimage::MAGIC)) {
        Ok(KernelFormat::BzImage)
    } else {
        Err(Error::NotAKernel(describe(head)))
    }
}

/// Names what a file seems to be, for somebody who gave the wrong one.
fn describe(head: &[u8]) -> String {
    const KNOWN: [(usize, &[u8], &str); 10] = [
        (0x38, b"ARM\x64", "an arm64 Linux image"),
        (0, b"\x1f\x8b", "a gzip file"),
        (0, b"\xfd7zXZ\0", "an xz file"),
        (0, b"\x28\xb5\x2f\xfd", "a zstd file"),
        (0, b"\x02\x21\x4c\x18", "an LZ4 file"),
        (0, b"QFI\xfb", "a qcow2 disk image"),
        (0, b"070701", "a cpio archive (an initramfs?)"),
        (0, b"#!", "a script"),
        (0, b"MZ", "a PE executable"),
        (0, b"!<arch>\n", "an archive (a Debian package?)"),
    ];
    if head.is_empty() {
        return "an empty file".to_string();
    }
    let known =
        KNOWN.iter().find(|(at, magic, _)| head.get(*at..).is_some_and(|rest| rest.starts_with(magic)));
    match known {
        Some((_, _, name)) => (*name).to_string(),
        None => {
            let bytes: Vec<String> = head.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
            format!("a file that starts with {}", bytes.join(" "))
        }
    }
}
