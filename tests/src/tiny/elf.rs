//! The smallest ELF kernel: one segment, and the note that names its 32-bit PVH entry point.
//!
//! After the ELF-64 object file format 1.5 and Xen's `XEN_ELFNOTE_PHYS32_ENTRY`.

const HEADER_SIZE: u64 = 64;
const PROGRAM_HEADER_SIZE: u64 = 56;
const NOTE_OFFSET: u64 = HEADER_SIZE + 2 * PROGRAM_HEADER_SIZE;
const CODE_OFFSET: u64 = 0x1000;
const TYPE_EXECUTABLE: u16 = 2;
const MACHINE_X86_64: u16 = 62;
const SEGMENT_LOAD: u32 = 1;
const SEGMENT_NOTE: u32 = 4;
const READ_WRITE_EXECUTE: u32 = 7;
const PHYS32_ENTRY: u32 = 18;

/// A kernel of `code` at the guest-physical address `address`, followed by zeros up to `memory_size` bytes in all.
pub(super) fn file(code: &[u8], address: u64, memory_size: u64, entry: u32) -> Vec<u8> {
    let note = note(entry);
    let mut file = header(entry);
    let size = code.len() as u64;
    file.extend(program_header(SEGMENT_LOAD, CODE_OFFSET, address, size, memory_size));
    file.extend(program_header(SEGMENT_NOTE, NOTE_OFFSET, 0, note.len() as u64, note.len() as u64));
    file.extend(note);
    file.resize(CODE_OFFSET as usize, 0);
    file.extend_from_slice(code);
    file
}

fn header(entry: u32) -> Vec<u8> {
    // 64-bit, little-endian, version 1.
    let mut bytes = b"\x7fELF\x02\x01\x01".to_vec();
    bytes.resize(16, 0);
    bytes.extend(TYPE_EXECUTABLE.to_le_bytes());
    bytes.extend(MACHINE_X86_64.to_le_bytes());
    bytes.extend(1_u32.to_le_bytes());
    bytes.extend(u64::from(entry).to_le_bytes());
    bytes.extend(HEADER_SIZE.to_le_bytes());
    // No section headers, no flags.
    bytes.extend([0; 12]);
    for value in [HEADER_SIZE as u16, PROGRAM_HEADER_SIZE as u16, 2, 0, 0, 0] {
        bytes.extend(value.to_le_bytes());
    }
    bytes
}

fn program_header(kind: u32, offset: u64, address: u64, file_size: u64, memory_size: u64) -> Vec<u8> {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend(READ_WRITE_EXECUTE.to_le_bytes());
    for value in [offset, address, address, file_size, memory_size, 4] {
        bytes.extend(value.to_le_bytes());
    }
    bytes
}

fn note(entry: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    for value in [4, 4, PHYS32_ENTRY] {
        bytes.extend(value.to_le_bytes());
    }
    bytes.extend(b"Xen\0");
    bytes.extend(entry.to_le_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_have_their_sizes_and_the_code_its_place() {
        assert_eq!(header(0).len() as u64, HEADER_SIZE);
        assert_eq!(program_header(1, 2, 3, 4, 5).len() as u64, PROGRAM_HEADER_SIZE);
        let file = file(b"code", 0x10_0000, 0x1000, 0x10_0002);
        assert_eq!(&file[CODE_OFFSET as usize..], b"code");
        assert_eq!(file[NOTE_OFFSET as usize + 16..][..4], 0x10_0002_u32.to_le_bytes());
    }
}
