//! Contents of Packed frames: [`Packer`], [`unpack`]. With the cargo feature `compression` they are blocks of LZ4.

use std::fmt;

use crate::Features;

impl Features {
    /// The ways to compress that this build has.
    pub const COMPRESSION: Self = if cfg!(feature = "compression") { Self::LZ4 } else { Self::NONE };
}

/// Makes contents smaller. It keeps what it needs for that, about as much as the contents, from one call to the next.
#[derive(Default)]
pub struct Packer {
    #[cfg(feature = "compression")]
    table: lz4_flex::block::CompressTable,
    #[cfg(feature = "compression")]
    packed: Vec<u8>,
}

impl fmt::Debug for Packer {
    /// Guest memory stays out of it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Packer").finish_non_exhaustive()
    }
}

impl Packer {
    /// A new one.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The contents compressed. `None`: they are to go as they are, for that saves less than a sixteenth.
    pub fn pack(&mut self, contents: &[u8]) -> Option<&[u8]> {
        #[cfg(feature = "compression")]
        {
            use lz4_flex::block::{compress_into_with_table, get_maximum_output_size};

            self.packed.resize(get_maximum_output_size(contents.len()), 0);
            // It has room for whatever becomes of them.
            let length = compress_into_with_table(contents, &mut self.packed, &mut self.table).ok()?;
            let worth = length <= contents.len() - contents.len() / 16;
            self.packed.get(..length).filter(|packed| worth && !packed.is_empty())
        }
        #[cfg(not(feature = "compression"))]
        {
            let _ = contents;
            None
        }
    }
}

/// Makes `contents` of `packed`: all of them, and no more. Nothing is allocated.
///
/// # Errors
/// [`UnpackError`]; `contents` are then anything.
pub fn unpack(packed: &[u8], contents: &mut [u8]) -> Result<(), UnpackError> {
    #[cfg(feature = "compression")]
    {
        use lz4_flex::block::{DecompressError, decompress_into};

        let expected = contents.len();
        match decompress_into(packed, contents) {
            Ok(found) if found == expected => Ok(()),
            Ok(found) => Err(UnpackError::Short { found, expected }),
            Err(DecompressError::OutputTooSmall { .. }) => Err(UnpackError::Long { expected }),
            Err(_) => Err(UnpackError::Block),
        }
    }
    #[cfg(not(feature = "compression"))]
    {
        let _ = (packed, contents);
        Err(UnpackError::Block)
    }
}

/// Compressed contents are not those of the range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum UnpackError {
    /// They are not compressed by a way that this build knows.
    #[error("the contents of a Packed frame do not decompress")]
    Block,
    /// They become too little.
    #[error("the contents of a Packed frame become {found} bytes, the range has {expected}")]
    Short {
        /// What they become, in bytes.
        found: usize,
        /// Length of the range, in bytes.
        expected: usize,
    },
    /// They become too much.
    #[error("the contents of a Packed frame become more than the range's {expected} bytes")]
    Long {
        /// Length of the range, in bytes.
        expected: usize,
    },
}
