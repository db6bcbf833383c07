//! The compressed kernel inside a Linux/x86 bzImage (Linux `Documentation/arch/x86/boot.rst`).

/// What is wrong with a kernel image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// It ends before the setup header does, or before the payload that the header names.
    #[error("the file is cut short")]
    Truncated,
    /// The magic `HdrS` is not at 0x202.
    #[error("not a bzImage: no HdrS magic")]
    NotBzImage,
    /// The boot protocol is older than 2.08, which brought the payload fields.
    #[error("boot protocol {0:#06x} names no payload")]
    OldProtocol(u16),
    /// The payload begins with no magic that is known here.
    #[error("unknown compression, first bytes {0:02x?}")]
    UnknownCompression([u8; 4]),
}

/// How a payload is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// LZ4's legacy frame.
    Lz4,
    /// Zstandard.
    Zstd,
    /// XZ.
    Xz,
    /// gzip.
    Gzip,
}

impl Compression {
    /// The program that decompresses it with `-dc`.
    #[must_use]
    pub fn program(self) -> &'static str {
        match self {
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
            Self::Xz => "xz",
            Self::Gzip => "gzip",
        }
    }
}

/// A compressed ELF kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Payload<'a> {
    /// The compressed bytes, without the size that follows them.
    pub data: &'a [u8],
    /// How they are compressed.
    pub compression: Compression,
    /// Bytes of the ELF file within, as the build recorded them.
    pub size: u32,
}

/// Finds the payload of `image`.
///
/// # Errors
/// An [`Error`] for anything that is not a whole bzImage with a payload of a known kind.
pub fn payload(image: &[u8]) -> Result<Payload<'_>, Error> {
    if bytes::<4>(image, 0x202)? != *b"HdrS" {
        return Err(Error::NotBzImage);
    }
    let protocol = u16::from_le_bytes(bytes(image, 0x206)?);
    if protocol < 0x208 {
        return Err(Error::OldProtocol(protocol));
    }
    let [sectors] = bytes(image, 0x1f1)?;
    // 0 stands for 4, for the sake of very old loaders; the boot sector comes before them.
    let sectors = if sectors == 0 { 4 } else { usize::from(sectors) };
    let offset = u32::from_le_bytes(bytes(image, 0x248)?) as usize;
    let length = u32::from_le_bytes(bytes(image, 0x24c)?) as usize;
    let start = ((sectors + 1) * 512).checked_add(offset).ok_or(Error::Truncated)?;
    let end = start.checked_add(length).ok_or(Error::Truncated)?;
    let whole = image.get(start..end).ok_or(Error::Truncated)?;
    let (data, size) = whole.split_last_chunk::<4>().ok_or(Error::Truncated)?;
    let compression = match bytes::<4>(data, 0)? {
        [0x02, 0x21, 0x4c, 0x18] => Compression::Lz4,
        [0x28, 0xb5, 0x2f, 0xfd] => Compression::Zstd,
        [0xfd, b'7', b'z', b'X'] => Compression::Xz,
        [0x1f, 0x8b, ..] => Compression::Gzip,
        other => return Err(Error::UnknownCompression(other)),
    };
    // The size is a part of gzip's own format, and an addition to the others.
    let data = if compression == Compression::Gzip { whole } else { data };
    Ok(Payload { data, compression, size: u32::from_le_bytes(*size) })
}

fn bytes<const N: usize>(image: &[u8], offset: usize) -> Result<[u8; N], Error> {
    image.get(offset..).and_then(|rest| rest.first_chunk()).copied().ok_or(Error::Truncated)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 5 * 512];
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x20f_u16.to_le_bytes());
        image[0x248..0x24c].copy_from_slice(&16_u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        image.extend([0; 16]);
        image.extend(payload);
        image.extend([0xee; 100]);
        image
    }

    #[test]
    fn each_compression_is_known() {
        for (magic, compression) in [
            ([0x02, 0x21, 0x4c, 0x18], Compression::Lz4),
            ([0x28, 0xb5, 0x2f, 0xfd], Compression::Zstd),
            ([0xfd, 0x37, 0x7a, 0x58], Compression::Xz),
        ] {
            let mut content = magic.to_vec();
            content.extend([9; 8]);
            content.extend(77_u32.to_le_bytes());
            let image = image(&content);
            let found = payload(&image).unwrap();
            assert_eq!((found.compression, found.size), (compression, 77));
            assert_eq!(found.data, &content[..12]);
        }
        let gzip = image(&[0x1f, 0x8b, 8, 0, 5, 0, 0, 0]);
        let found = payload(&gzip).unwrap();
        assert_eq!((found.compression, found.size, found.data.len()), (Compression::Gzip, 5, 8));
    }

    #[test]
    fn setup_sectors_of_the_header_count() {
        let mut image = image(&[0x28, 0xb5, 0x2f, 0xfd, 1, 2, 3, 4]);
        image[0x1f1] = 3;
        image.drain(4 * 512..5 * 512);
        assert_eq!(payload(&image).unwrap().compression, Compression::Zstd);
    }

    #[test]
    fn bad_images_are_refused() {
        assert_eq!(payload(&[]), Err(Error::Truncated));
        assert_eq!(payload(&[0; 0x300]), Err(Error::NotBzImage));
        let good = image(&[0x28, 0xb5, 0x2f, 0xfd, 1, 2, 3, 4]);
        for length in 0..good.len() - 100 {
            assert!(payload(&good[..length]).is_err(), "cut to {length}");
        }
        let mut old = good.clone();
        old[0x206] = 7;
        old[0x207] = 2;
        assert_eq!(payload(&old), Err(Error::OldProtocol(0x207)));
        for field in [0x248, 0x24c] {
            let mut huge = good.clone();
            huge[field..field + 4].copy_from_slice(&u32::MAX.to_le_bytes());
            assert_eq!(payload(&huge), Err(Error::Truncated));
        }
        let mut empty = good;
        empty[0x24c..0x250].copy_from_slice(&3_u32.to_le_bytes());
        assert_eq!(payload(&empty), Err(Error::Truncated));
        assert_eq!(payload(&image(b"whatever")), Err(Error::UnknownCompression(*b"what")));
    }
}
