//! The structures that the PVH boot ABI hands to the kernel.
//!
//! Source: Xen's `docs/misc/pvh.pandoc` and `xen/include/public/arch-x86/hvm/start_info.h`, version 1.

use zerocopy::{
    Immutable, IntoBytes,
    byteorder::little_endian::{U32, U64},
};

use crate::{layout, memory_map::MemoryMap, span::Span};

const MAGIC: u32 = 0x336e_c578;
/// Version 1 has the memory map.
const VERSION: u32 = 1;

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct StartInfo {
    magic: U32,
    version: U32,
    flags: U32,
    module_count: U32,
    modules: U64,
    command_line: U64,
    rsdp: U64,
    memory_map: U64,
    memory_map_entries: U32,
    reserved: U32,
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Module {
    address: U64,
    size: U64,
    command_line: U64,
    reserved: U64,
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct MapEntry {
    address: U64,
    size: U64,
    type_: U32,
    reserved: U32,
}

const _: () = assert!(size_of::<StartInfo>() as u64 == layout::START_INFO.size);
const _: () = assert!(size_of::<Module>() as u64 == layout::MODULE_LIST.size);
const _: () =
    assert!((size_of::<MapEntry>() * layout::MAX_MAP_ENTRIES) as u64 == layout::PVH_MEMORY_MAP.size);

/// The structures, each with the place it goes to.
pub(crate) fn structures(
    map: &MemoryMap,
    initramfs: Option<Span>,
    rsdp: Option<u64>,
) -> Vec<(layout::Area, Vec<u8>)> {
    let start_info = StartInfo {
        magic: MAGIC.into(),
        version: VERSION.into(),
        flags: 0.into(),
        module_count: u32::from(initramfs.is_some()).into(),
        modules: initramfs.map_or(0, |_| layout::MODULE_LIST.start).into(),
        command_line: layout::COMMAND_LINE.start.into(),
        rsdp: rsdp.unwrap_or(0).into(),
        memory_map: layout::PVH_MEMORY_MAP.start.into(),
        // At most MAX_MAP_ENTRIES, see MemoryMap::new.
        memory_map_entries: (map.ranges().len() as u32).into(),
        reserved: 0.into(),
    };
    let entries: Vec<MapEntry> = map
        .ranges()
        .iter()
        .map(|range| MapEntry {
            address: range.start.into(),
            size: range.size.into(),
            type_: range.kind.e820_type().into(),
            reserved: 0.into(),
        })
        .collect();

    let mut structures = vec![
        (layout::START_INFO, start_info.as_bytes().to_vec()),
        (layout::PVH_MEMORY_MAP, entries.as_bytes().to_vec()),
    ];
    if let Some(span) = initramfs {
        let module = Module {
            address: span.start().into(),
            size: span.size().into(),
            command_line: 0.into(),
            reserved: 0.into(),
        };
        structures.push((layout::MODULE_LIST, module.as_bytes().to_vec()));
    }
    structures
}
