//! bzImage kernels by Linux's 64-bit boot protocol.
//!
//! Source: the kernel's `Documentation/arch/x86/boot.rst` and `zero-page.rst`.

use std::mem::offset_of;

use thiserror::Error;
use vm_memory::GuestMemoryBackend;
use zerocopy::{
    FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned,
    byteorder::little_endian::{U16, U32, U64},
};

use crate::{
    file::{FileError, Image},
    layout::{self, FOUR_GIB},
    memory_map::MemoryMap,
    span::Span,
};

/// Where the setup header starts, in the file as in the zero page.
const HEADER_OFFSET: usize = 0x1f1;
/// Where the setup header's magic is.
pub(crate) const MAGIC_OFFSET: usize = 0x202;
/// The magic.
pub(crate) const MAGIC: &[u8; 4] = b"HdrS";

const SECTOR: u64 = 512;
/// Sectors of setup code when the header says 0.
const DEFAULT_SETUP_SECTS: u8 = 4;
const BOOT_FLAG: u16 = 0xaa55;
/// The first version whose header says whether there is a 64-bit entry point.
const MIN_VERSION: u16 = 0x020c;
/// Protected-mode code loads high.
const LOADED_HIGH: u8 = 1;
const XLF_KERNEL_64: u16 = 1;
/// The 64-bit entry point, from the start of the loaded code.
const ENTRY_OFFSET: u64 = 0x200;
/// "A boot loader without an assigned number".
const LOADER_UNDEFINED: u8 = 0xff;
/// Unit of `syssize`.
const PARAGRAPH: u64 = 16;

/// Why a bzImage cannot be booted.
#[derive(Debug, Error)]
pub enum BzImageError {
    /// Reading failed, or the file is too short.
    #[error(transparent)]
    File(#[from] FileError),
    /// A field of the setup header has a value that this loader cannot work with.
    #[error("{field} in the setup header is {value:#x}, {expected} is needed")]
    Unsupported {
        /// The field.
        field: &'static str,
        /// Its value.
        value: u64,
        /// What was expected.
        expected: &'static str,
    },
    /// The memory that the kernel needs while it decompresses itself is not all RAM below 4 GiB.
    #[error("the kernel needs {size:#x} bytes at {address:#x}, which is not all RAM below 4 GiB")]
    OutsideRam {
        /// Preferred load address.
        address: u64,
        /// `init_size`, in bytes.
        size: u64,
    },
    /// The kernel would overwrite boot data.
    #[error("the kernel at {span} overlaps the {name} at {other}")]
    OnBootData {
        /// Where it goes.
        span: Span,
        /// The boot data.
        name: &'static str,
        /// Where they are.
        other: Span,
    },
}

/// `struct setup_header`.
#[derive(Clone, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct SetupHeader {
    setup_sects: u8,
    root_flags: U16,
    syssize: U32,
    ram_size: U16,
    vid_mode: U16,
    root_dev: U16,
    boot_flag: U16,
    jump_opcode: u8,
    jump_offset: u8,
    magic: [u8; 4],
    version: U16,
    realmode_swtch: U32,
    start_sys_seg: U16,
    kernel_version: U16,
    type_of_loader: u8,
    loadflags: u8,
    setup_move_size: U16,
    code32_start: U32,
    ramdisk_image: U32,
    ramdisk_size: U32,
    bootsect_kludge: U32,
    heap_end_ptr: U16,
    ext_loader_ver: u8,
    ext_loader_type: u8,
    cmd_line_ptr: U32,
    initrd_addr_max: U32,
    kernel_alignment: U32,
    relocatable_kernel: u8,
    min_alignment: u8,
    xloadflags: U16,
    cmdline_size: U32,
    hardware_subarch: U32,
    hardware_subarch_data: U64,
    payload_offset: U32,
    payload_length: U32,
    setup_data: U64,
    pref_address: U64,
    init_size: U32,
    handover_offset: U32,
    kernel_info_offset: U32,
}

/// `struct boot_e820_entry`.
#[derive(Clone, Copy, IntoBytes, FromZeros, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct E820Entry {
    address: U64,
    size: U64,
    type_: U32,
}

/// `struct boot_params`, the parts of it that are filled in.
#[derive(IntoBytes, FromZeros, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct BootParams {
    _before_rsdp: [u8; 0x70],
    acpi_rsdp_addr: U64,
    _before_entries: [u8; 0x170],
    e820_entries: u8,
    _before_header: [u8; 8],
    header: SetupHeader,
    _before_table: [u8; 0x64],
    e820_table: [E820Entry; layout::MAX_MAP_ENTRIES],
    _rest: [u8; 0x330],
}

const _: () = assert!(size_of::<SetupHeader>() == 0x26c - HEADER_OFFSET);
const _: () = assert!(size_of::<BootParams>() as u64 == layout::ZERO_PAGE.size);
const _: () = assert!(offset_of!(BootParams, acpi_rsdp_addr) == 0x70);
const _: () = assert!(offset_of!(BootParams, e820_entries) == 0x1e8);
const _: () = assert!(offset_of!(BootParams, header) == HEADER_OFFSET);
const _: () = assert!(offset_of!(BootParams, e820_table) == 0x2d0);

/// What to load where; checked against the file, the memory map and the boot data.
#[derive(Debug)]
pub(crate) struct Plan {
    header: SetupHeader,
    code_offset: u64,
    code_size: u64,
    /// The memory that the kernel uses until it has decompressed itself.
    pub(crate) extent: Span,
}

impl Plan {
    pub(crate) fn new(image: Image<'_>, map: &MemoryMap) -> Result<Self, BzImageError> {
        let mut bytes = [0; size_of::<SetupHeader>()];
        image.read("setup header", HEADER_OFFSET as u64, &mut bytes)?;
        let header: SetupHeader = zerocopy::transmute!(bytes);
        check_header(&header)?;

        let setup_sects = match header.setup_sects {
            0 => DEFAULT_SETUP_SECTS,
            sects => sects,
        };
        let code_offset = (u64::from(setup_sects) + 1) * SECTOR;
        let code_size = u64::from(header.syssize.get()) * PARAGRAPH;
        image.check("protected-mode code", code_offset, code_size)?;

        let init_size = u64::from(header.init_size.get());
        require("syssize", header.syssize.get(), code_size > ENTRY_OFFSET, "more than 0x20")?;
        require(
            "init_size",
            header.init_size.get(),
            init_size >= code_size,
            "at least the size of the code",
        )?;
        let extent = place(&header, map)?;
        Ok(Self { header, code_offset, code_size, extent })
    }

    /// The 64-bit entry point.
    pub(crate) fn entry(&self) -> u64 {
        self.extent.start() + ENTRY_OFFSET
    }

    /// Longest command line that the kernel takes, without the NUL.
    pub(crate) fn command_line_limit(&self) -> usize {
        self.header.cmdline_size.get() as usize
    }

    /// One past the highest address that the initramfs may use.
    pub(crate) fn initramfs_limit(&self) -> u64 {
        u64::from(self.header.initrd_addr_max.get()) + 1
    }

    /// Copies the protected-mode code into guest memory.
    pub(crate) fn load<M: GuestMemoryBackend>(
        &self,
        image: Image<'_>,
        memory: &M,
    ) -> Result<(), BzImageError> {
        let address = self.extent.start();
        Ok(image.load("protected-mode code", self.code_offset, self.code_size, memory, address)?)
    }

    /// The zero page.
    pub(crate) fn zero_page(&self, map: &MemoryMap, initramfs: Option<Span>, rsdp: Option<u64>) -> Vec<u8> {
        let mut params = BootParams::new_zeroed();
        params.acpi_rsdp_addr = rsdp.unwrap_or(0).into();
        for (entry, range) in params.e820_table.iter_mut().zip(map.ranges()) {
            *entry = E820Entry {
                address: range.start.into(),
                size: range.size.into(),
                type_: range.kind.e820_type().into(),
            };
            params.e820_entries += 1;
        }
        params.header = self.patched_header(initramfs);
        params.as_bytes().to_vec()
    }

    fn patched_header(&self, initramfs: Option<Span>) -> SetupHeader {
        // Both lie below 4 GiB: `place` and `initramfs_limit` see to it.
        let low = |address: u64| U32::new(address as u32);
        let mut header = self.header.clone();
        header.type_of_loader = LOADER_UNDEFINED;
        header.code32_start = low(self.extent.start());
        header.cmd_line_ptr = low(layout::COMMAND_LINE.start);
        header.ramdisk_image = low(initramfs.map_or(0, |span| span.start()));
        header.ramdisk_size = low(initramfs.map_or(0, |span| span.size()));
        // Of a list in guest memory that nobody has written.
        header.setup_data = 0.into();
        // What lies behind a shorter header is code.
        if header_end(&header) < 0x26c {
            header.kernel_info_offset = 0.into();
        }
        header
    }
}

fn check_header(header: &SetupHeader) -> Result<(), BzImageError> {
    require("boot flag", header.boot_flag.get(), header.boot_flag == BOOT_FLAG, "0xaa55")?;
    require("magic", u32::from_le_bytes(header.magic), &header.magic == MAGIC, "\"HdrS\"")?;
    let version = header.version.get();
    require("protocol version", version, version >= MIN_VERSION, "0x20c (Linux 3.8) or later")?;
    let end = header_end(header);
    require("end of the header", end, end >= 0x268, "0x268 or later")?;
    require("loadflags", header.loadflags, header.loadflags & LOADED_HIGH != 0, "LOADED_HIGH (bit 0)")?;
    let flags = header.xloadflags.get();
    require("xloadflags", flags, flags & XLF_KERNEL_64 != 0, "a 64-bit entry point (bit 0)")
}

/// The end of the header in the file: the jump instruction at its start leads there.
fn header_end(header: &SetupHeader) -> u32 {
    0x202 + u32::from(header.jump_offset)
}

fn require(
    field: &'static str,
    value: impl Into<u64>,
    good: bool,
    expected: &'static str,
) -> Result<(), BzImageError> {
    match good {
        true => Ok(()),
        false => Err(BzImageError::Unsupported { field, value: value.into(), expected }),
    }
}

/// The kernel goes to the address it prefers: there it need not move itself.
fn place(header: &SetupHeader, map: &MemoryMap) -> Result<Span, BzImageError> {
    let (address, size) = (header.pref_address.get(), u64::from(header.init_size.get()));
    let span = match Span::new(address, size) {
        Some(span) if span.end() <= FOUR_GIB && map.is_ram(&span) => span,
        _ => return Err(BzImageError::OutsideRam { address, size }),
    };
    match layout::LAYOUT.iter().find(|area| area.span().overlaps(&span)) {
        Some(area) => Err(BzImageError::OnBootData { span, name: area.name, other: area.span() }),
        None => Ok(span),
    }
}
