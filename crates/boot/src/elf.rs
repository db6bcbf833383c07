//! 64-bit x86 ELF kernels that say where their 32-bit PVH entry point is.
//!
//! Follows the ELF-64 object file format 1.5 and the Xen note `XEN_ELFNOTE_PHYS32_ENTRY`.

use thiserror::Error;
use vm_memory::{GuestMemoryBackend, GuestMemoryError};
use zerocopy::{
    FromBytes, Immutable, KnownLayout, Unaligned,
    byteorder::little_endian::{U16, U32, U64},
};

use crate::{
    file::{self, FileError, Image},
    layout,
    memory_map::MemoryMap,
    span::Span,
};

/// First bytes of an ELF file.
pub(crate) const MAGIC: &[u8; 4] = b"\x7fELF";

/// Program headers that are looked at, at most; a kernel has about ten.
const MAX_PROGRAM_HEADERS: u16 = 128;
/// Bytes of one note segment, at most; a kernel's has about a thousand.
const MAX_NOTES_SIZE: u64 = 0x1_0000;

const CLASS_64: u8 = 2;
const DATA_LITTLE_ENDIAN: u8 = 1;
const TYPE_EXECUTABLE: u16 = 2;
const TYPE_SHARED: u16 = 3;
const MACHINE_X86_64: u16 = 62;
const SEGMENT_LOAD: u32 = 1;
const SEGMENT_NOTE: u32 = 4;
const NOTE_NAME: &[u8] = b"Xen\0";
const NOTE_PHYS32_ENTRY: u32 = 18;

/// Why an ELF file cannot be booted.
#[derive(Debug, Error)]
pub enum ElfError {
    /// Reading failed, or the file is too short.
    #[error(transparent)]
    File(#[from] FileError),
    /// A header field has a value that no 64-bit x86 kernel has.
    #[error("{field} is {value:#x}, {expected} is needed")]
    Unsupported {
        /// The field.
        field: &'static str,
        /// Its value.
        value: u64,
        /// What was expected.
        expected: &'static str,
    },
    /// The file has no segment to load.
    #[error("no loadable segment")]
    NoSegments,
    /// A segment's size in the file is larger than in memory, or its end wraps around.
    #[error(
        "segment {index} has an impossible size: {file_size:#x} bytes in the file, {memory_size:#x} at {address:#x}"
    )]
    SegmentSize {
        /// Index of the program header.
        index: usize,
        /// Bytes in the file.
        file_size: u64,
        /// Bytes in memory.
        memory_size: u64,
        /// Guest-physical address.
        address: u64,
    },
    /// Two segments want the same memory.
    #[error("segment {index} at {span} overlaps another one at {other}")]
    SegmentsOverlap {
        /// Index of the program header.
        index: usize,
        /// Where it goes.
        span: Span,
        /// Where the other one goes.
        other: Span,
    },
    /// A segment lies outside the guest's RAM.
    #[error("segment {index} at {span} is outside the guest's RAM")]
    OutsideRam {
        /// Index of the program header.
        index: usize,
        /// Where it goes.
        span: Span,
    },
    /// A segment would overwrite boot data.
    #[error("segment {index} at {span} overlaps the {name} at {other}")]
    OnBootData {
        /// Index of the program header.
        index: usize,
        /// Where it goes.
        span: Span,
        /// The boot data.
        name: &'static str,
        /// Where they are.
        other: Span,
    },
    /// A note segment is too large to be true.
    #[error("note segment {index} has {size:#x} bytes, the limit is {limit:#x}")]
    NotesTooLarge {
        /// Index of the program header.
        index: usize,
        /// Its size.
        size: u64,
        /// The limit.
        limit: u64,
    },
    /// The kernel was built without `CONFIG_PVH`.
    #[error(
        "no PVH entry point (note XEN_ELFNOTE_PHYS32_ENTRY): use a kernel built with CONFIG_PVH, or its bzImage"
    )]
    NoPvhNote,
    /// The note's value is neither 4 nor 8 bytes long.
    #[error("the PVH entry note has {0} bytes, 4 or 8 are needed")]
    NoteSize(usize),
    /// The entry point is in no segment or above 4 GiB.
    #[error("the PVH entry point {0:#x} is not in a loaded segment below 4 GiB")]
    Entry(u64),
    /// Clearing the part of a segment that is not in the file failed.
    #[error("cannot clear guest memory at {address:#x}")]
    Clear {
        /// Guest-physical address.
        address: u64,
        /// The reason.
        #[source]
        source: GuestMemoryError,
    },
}

#[derive(Debug, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Header {
    magic: [u8; 4],
    class: u8,
    data: u8,
    version: u8,
    _padding: [u8; 9],
    type_: U16,
    machine: U16,
    _version: U32,
    _entry: U64,
    program_header_offset: U64,
    _section_header_offset: U64,
    _flags: U32,
    _header_size: U16,
    program_header_size: U16,
    program_header_count: U16,
    _rest: [U16; 3],
}

#[derive(Debug, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct ProgramHeader {
    type_: U32,
    _flags: U32,
    offset: U64,
    _virtual_address: U64,
    address: U64,
    file_size: U64,
    memory_size: U64,
    align: U64,
}

#[derive(Debug, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct NoteHeader {
    name_size: U32,
    value_size: U32,
    type_: U32,
}

/// What to load where; checked against the file, the memory map and the boot data.
#[derive(Debug)]
pub(crate) struct Plan {
    segments: Vec<Segment>,
    /// The 32-bit entry point.
    pub(crate) entry: u32,
    /// From the first to the last byte of the kernel in memory.
    pub(crate) extent: Span,
}

#[derive(Debug)]
struct Segment {
    index: usize,
    offset: u64,
    file_size: u64,
    span: Span,
}

impl Plan {
    pub(crate) fn new(image: Image<'_>, map: &MemoryMap) -> Result<Self, ElfError> {
        let headers = read_program_headers(image)?;
        let mut segments = Vec::new();
        for (index, header) in headers.iter().enumerate() {
            if header.type_ == SEGMENT_LOAD && header.memory_size != 0 {
                let segment = Segment::new(index, header, image)?;
                segment.check_place(map, &segments)?;
                segments.push(segment);
            }
        }
        let extent = segments.iter().map(|s| s.span).reduce(|a, b| a.hull(&b)).ok_or(ElfError::NoSegments)?;
        let address = find_entry(image, &headers)?.ok_or(ElfError::NoPvhNote)?;
        let entry = match (u32::try_from(address), Span::new(address, 1)) {
            (Ok(entry), Some(byte)) if segments.iter().any(|s| s.span.contains(&byte)) => entry,
            _ => return Err(ElfError::Entry(address)),
        };
        Ok(Self { segments, entry, extent })
    }

    /// Copies the segments into guest memory and clears what of them is not in the file.
    pub(crate) fn load<M: GuestMemoryBackend>(&self, image: Image<'_>, memory: &M) -> Result<(), ElfError> {
        for segment in &self.segments {
            let start = segment.span.start();
            image.load("segment", segment.offset, segment.file_size, memory, start)?;
            let tail = start + segment.file_size;
            file::zero(memory, tail, segment.span.end() - tail)
                .map_err(|source| ElfError::Clear { address: tail, source })?;
        }
        Ok(())
    }
}

impl Segment {
    fn new(index: usize, header: &ProgramHeader, image: Image<'_>) -> Result<Self, ElfError> {
        let (address, file_size, memory_size) =
            (header.address.get(), header.file_size.get(), header.memory_size.get());
        let impossible = ElfError::SegmentSize { index, file_size, memory_size, address };
        let Some(span) = Span::new(address, memory_size).filter(|_| file_size <= memory_size) else {
            return Err(impossible);
        };
        image.check("segment", header.offset.get(), file_size)?;
        Ok(Self { index, offset: header.offset.get(), file_size, span })
    }

    fn check_place(&self, map: &MemoryMap, others: &[Self]) -> Result<(), ElfError> {
        let (index, span) = (self.index, self.span);
        if !map.is_ram(&span) {
            return Err(ElfError::OutsideRam { index, span });
        }
        if let Some(area) = layout::LAYOUT.iter().find(|area| area.span().overlaps(&span)) {
            return Err(ElfError::OnBootData { index, span, name: area.name, other: area.span() });
        }
        match others.iter().find(|other| other.span.overlaps(&span)) {
            Some(other) => Err(ElfError::SegmentsOverlap { index, span, other: other.span }),
            None => Ok(()),
        }
    }
}

fn read_program_headers(image: Image<'_>) -> Result<Vec<ProgramHeader>, ElfError> {
    let mut buffer = [0; size_of::<Header>()];
    image.read("ELF header", 0, &mut buffer)?;
    let header: Header = zerocopy::transmute!(buffer);
    let count = header.program_header_count.get();
    let require = |field, value: u64, good: bool, expected| match good {
        true => Ok(()),
        false => Err(ElfError::Unsupported { field, value, expected }),
    };
    let class = header.class;
    require("ELF class", class.into(), class == CLASS_64, "2 (64-bit)")?;
    require("ELF data encoding", header.data.into(), header.data == DATA_LITTLE_ENDIAN, "1 (little-endian)")?;
    let machine = header.machine.get();
    require("ELF machine", machine.into(), machine == MACHINE_X86_64, "62 (x86-64)")?;
    let type_ = header.type_.get();
    require("ELF type", type_.into(), matches!(type_, TYPE_EXECUTABLE | TYPE_SHARED), "2 or 3 (executable)")?;
    let entry_size = header.program_header_size.get();
    let good = usize::from(entry_size) == size_of::<ProgramHeader>();
    require("size of a program header", entry_size.into(), good, "56")?;
    require("number of program headers", count.into(), count <= MAX_PROGRAM_HEADERS, "at most 128")?;

    let mut bytes = vec![0; usize::from(count) * size_of::<ProgramHeader>()];
    image.read("program headers", header.program_header_offset.get(), &mut bytes)?;
    let headers = bytes.chunks_exact(size_of::<ProgramHeader>());
    Ok(headers.filter_map(|chunk| ProgramHeader::read_from_bytes(chunk).ok()).collect())
}

/// Looks for the PVH entry note in every note segment.
fn find_entry(image: Image<'_>, headers: &[ProgramHeader]) -> Result<Option<u64>, ElfError> {
    for (index, header) in headers.iter().enumerate().filter(|(_, header)| header.type_ == SEGMENT_NOTE) {
        let size = header.file_size.get();
        if size > MAX_NOTES_SIZE {
            return Err(ElfError::NotesTooLarge { index, size, limit: MAX_NOTES_SIZE });
        }
        let mut notes = vec![0; size as usize];
        image.read("notes", header.offset.get(), &mut notes)?;
        // Segments that say alignment 8 exist with notes padded to 4.
        let alignments: &[usize] = if header.align == 8 { &[8, 4] } else { &[4] };
        for &align in alignments {
            if let Some(value) = find_note(&notes, align) {
                return entry_value(value).map(Some);
            }
        }
    }
    Ok(None)
}

fn entry_value(value: &[u8]) -> Result<u64, ElfError> {
    if let Ok(bytes) = value.try_into() {
        return Ok(u32::from_le_bytes(bytes).into());
    }
    value.try_into().map(u64::from_le_bytes).map_err(|_| ElfError::NoteSize(value.len()))
}

/// The value of the first PVH entry note; malformed notes end the search.
fn find_note(mut notes: &[u8], align: usize) -> Option<&[u8]> {
    loop {
        let (header, rest) = NoteHeader::read_from_prefix(notes).ok()?;
        let name_size = usize::try_from(header.name_size.get()).ok()?;
        let value_size = usize::try_from(header.value_size.get()).ok()?;
        let name = rest.get(..name_size)?;
        // Padding counts from the start of the note.
        let value_at = padded(size_of::<NoteHeader>().checked_add(name_size)?, align)?;
        let value = notes.get(value_at..value_at.checked_add(value_size)?)?;
        if name == NOTE_NAME && header.type_ == NOTE_PHYS32_ENTRY {
            return Some(value);
        }
        notes = notes.get(padded(value_at.checked_add(value_size)?, align)?..)?;
    }
}

fn padded(size: usize, align: usize) -> Option<usize> {
    size.checked_next_multiple_of(align)
}

const _: () = assert!(size_of::<Header>() == 64 && size_of::<ProgramHeader>() == 56);

#[cfg(test)]
mod tests {
    use super::*;

    fn note(name: &[u8], type_: u32, value: &[u8], align: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend((name.len() as u32).to_le_bytes());
        bytes.extend((value.len() as u32).to_le_bytes());
        bytes.extend(type_.to_le_bytes());
        bytes.extend(name);
        bytes.resize(bytes.len().next_multiple_of(align), 0);
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(align), 0);
        bytes
    }

    #[test]
    fn the_note_is_found_among_others_at_both_alignments() {
        for align in [4, 8] {
            let mut notes = note(b"Linux\0", 0x101, b"abc", align);
            notes.extend(note(b"Xen\0", 5, b"2.6\0", align));
            notes.extend(note(b"Xen\0", NOTE_PHYS32_ENTRY, &7u64.to_le_bytes(), align));
            assert_eq!(find_note(&notes, align), Some(&7u64.to_le_bytes()[..]));
            assert_eq!(find_note(&note(b"xen\0", NOTE_PHYS32_ENTRY, b"1234", align), align), None);
        }
    }

    #[test]
    fn values_of_four_and_eight_bytes_are_taken() {
        assert_eq!(entry_value(&[1, 2, 0, 0]).unwrap(), 0x201);
        assert_eq!(entry_value(&[1, 2, 0, 0, 0, 0, 0, 1]).unwrap(), 0x0100_0000_0000_0201);
        assert!(matches!(entry_value(&[1, 2]), Err(ElfError::NoteSize(2))));
        assert!(matches!(entry_value(&[]), Err(ElfError::NoteSize(0))));
    }

    #[test]
    fn absurd_and_truncated_notes_end_the_search() {
        let good = note(b"Xen\0", NOTE_PHYS32_ENTRY, &7u32.to_le_bytes(), 4);
        for len in 0..good.len() {
            assert_eq!(find_note(&good[..len], 4), None, "{len} bytes");
        }
        for at in [0, 4] {
            for size in [u32::MAX, u32::MAX - 3, 0x8000_0000] {
                let mut bad = good.clone();
                bad[at..at + 4].copy_from_slice(&size.to_le_bytes());
                assert_eq!(find_note(&bad, 4), None);
                assert_eq!(find_note(&bad, 8), None);
            }
        }
    }
}
