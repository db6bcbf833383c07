//! The smallest bzImage with a 64-bit entry point (Linux `Documentation/arch/x86/boot.rst`).

const SETUP_SECTORS: u8 = 4;
const SECTOR: usize = 512;
/// Where the protected-mode part begins in the file.
pub const CODE_OFFSET: usize = (SETUP_SECTORS as usize + 1) * SECTOR;
/// Where in it the 64-bit entry point is.
const ENTRY_OFFSET: usize = 0x200;
const PARAGRAPH: usize = 16;

/// A kernel of `code`, loaded at `address`, that needs `memory_size` bytes there.
pub(super) fn file(code: &[u8], address: u64, memory_size: u32) -> Vec<u8> {
    let mut part = vec![0; ENTRY_OFFSET];
    part.extend_from_slice(code);
    part.resize(part.len().next_multiple_of(PARAGRAPH), 0);

    let mut file = vec![0; CODE_OFFSET];
    let mut put = |offset: usize, bytes: &[u8]| {
        for (to, from) in file.iter_mut().skip(offset).zip(bytes) {
            *to = *from;
        }
    };
    put(0x1f1, &[SETUP_SECTORS]);
    put(0x1f4, &((part.len() / PARAGRAPH) as u32).to_le_bytes());
    put(0x1fe, &0xaa55_u16.to_le_bytes());
    // The header ends at 0x26c: a jump leads over it.
    put(0x200, &[0xeb, 0x6a]);
    put(0x202, b"HdrS");
    put(0x206, &0x20f_u16.to_le_bytes());
    // Loaded high.
    put(0x211, &[1]);
    // initrd_addr_max, kernel_alignment.
    put(0x22c, &0x7fff_ffff_u32.to_le_bytes());
    put(0x230, &0x1000_u32.to_le_bytes());
    // xloadflags: has a 64-bit entry point. Then cmdline_size.
    put(0x236, &1_u16.to_le_bytes());
    put(0x238, &2047_u32.to_le_bytes());
    // pref_address, init_size.
    put(0x258, &address.to_le_bytes());
    put(0x260, &memory_size.to_le_bytes());
    file.extend(part);
    file
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_is_at_the_entry_point_and_the_header_tells_its_size() {
        let file = file(&[0xf4; 20], 0x10_0000, 0x1000);
        assert_eq!(file[CODE_OFFSET + ENTRY_OFFSET..][..20], [0xf4; 20]);
        let size = u32::from_le_bytes(file[0x1f4..0x1f8].try_into().unwrap()) as usize * PARAGRAPH;
        assert_eq!(CODE_OFFSET + size, file.len());
    }
}
