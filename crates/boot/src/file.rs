//! Bounded reading of a kernel or initramfs: headers into small buffers, contents straight into guest memory.

use std::{
    fs::{File, FileType},
    io::{self, Seek, SeekFrom},
    os::unix::fs::{FileExt, FileTypeExt},
};

use thiserror::Error;
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, ReadVolatile, VolatileMemoryError,
};

/// Why a file could not be read.
#[derive(Debug, Error)]
pub enum FileError {
    /// The file's metadata cannot be had.
    #[error("cannot inspect the file")]
    Inspect(#[source] io::Error),
    /// It is something else than a regular file.
    #[error("not a regular file but a {0}")]
    NotRegular(&'static str),
    /// The file has less than what is needed from it.
    #[error("file of {size} bytes is too short for the {what}: {len} bytes at offset {offset}")]
    TooShort {
        /// What was to be read.
        what: &'static str,
        /// Where.
        offset: u64,
        /// How many bytes.
        len: u64,
        /// The size of the file.
        size: u64,
    },
    /// Reading failed.
    #[error("cannot read the {what} at offset {offset}")]
    Read {
        /// What was to be read.
        what: &'static str,
        /// Where.
        offset: u64,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// Reading into guest memory failed.
    #[error("cannot read the {what} at offset {offset} into guest memory")]
    Copy {
        /// What was to be read.
        what: &'static str,
        /// Where in the file.
        offset: u64,
        /// The reason.
        #[source]
        source: VolatileMemoryError,
    },
    /// Guest memory does not have the place.
    #[error("no guest memory for the {what}: {len} bytes at {address:#x}")]
    Memory {
        /// What was to be written.
        what: &'static str,
        /// Guest-physical address.
        address: u64,
        /// How many bytes.
        len: u64,
        /// The reason.
        #[source]
        source: GuestMemoryError,
    },
}

/// A regular file whose length was taken once, at the beginning.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Image<'a> {
    file: &'a File,
    size: u64,
}

impl<'a> Image<'a> {
    pub(crate) fn new(file: &'a File) -> Result<Self, FileError> {
        let metadata = file.metadata().map_err(FileError::Inspect)?;
        if !metadata.is_file() {
            return Err(FileError::NotRegular(kind_name(metadata.file_type())));
        }
        Ok(Self { file, size: metadata.len() })
    }

    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// Fills `buffer` from `offset`.
    pub(crate) fn read(&self, what: &'static str, offset: u64, buffer: &mut [u8]) -> Result<(), FileError> {
        self.check(what, offset, buffer.len() as u64)?;
        self.file.read_exact_at(buffer, offset).map_err(|source| FileError::Read { what, offset, source })
    }

    /// The first bytes, as many as there are up to `N`.
    pub(crate) fn head<const N: usize>(&self) -> Result<([u8; N], usize), FileError> {
        let mut buffer = [0; N];
        let len = usize::try_from(self.size).map_or(N, |size| size.min(N));
        if let Some(part) = buffer.get_mut(..len) {
            self.read("first bytes", 0, part)?;
        }
        Ok((buffer, len))
    }

    /// Reads `len` bytes at `offset` straight into guest memory at `address`.
    pub(crate) fn load<M: GuestMemoryBackend>(
        &self,
        what: &'static str,
        offset: u64,
        len: u64,
        memory: &M,
        address: u64,
    ) -> Result<(), FileError> {
        self.check(what, offset, len)?;
        let mut file = self.file;
        file.seek(SeekFrom::Start(offset)).map_err(|source| FileError::Read { what, offset, source })?;
        // The check above bounds `len` by the file's size, and a file of more than `usize` does not exist here.
        let count = usize::try_from(len).unwrap_or(usize::MAX);
        let slices = GuestMemoryBackend::get_slices(memory, GuestAddress(address), count);
        for slice in slices {
            let mut slice = slice.map_err(|source| FileError::Memory { what, address, len, source })?;
            file.read_exact_volatile(&mut slice).map_err(|source| FileError::Copy {
                what,
                offset,
                source,
            })?;
        }
        Ok(())
    }

    /// Refuses a piece that goes beyond the end of the file.
    pub(crate) fn check(&self, what: &'static str, offset: u64, len: u64) -> Result<(), FileError> {
        match offset.checked_add(len) {
            Some(end) if end <= self.size => Ok(()),
            _ => Err(FileError::TooShort { what, offset, len, size: self.size }),
        }
    }
}

/// Writes zeros to guest memory.
pub(crate) fn zero<M: GuestMemoryBackend>(memory: &M, start: u64, len: u64) -> Result<(), GuestMemoryError> {
    static ZEROS: [u8; 0x1_0000] = [0; 0x1_0000];
    let mut done = 0;
    while done < len {
        let count = (len - done).min(ZEROS.len() as u64);
        // `count` is at most the length of the array, so this never falls back.
        let zeros = ZEROS.get(..count as usize).unwrap_or(&ZEROS);
        memory.write_slice(zeros, GuestAddress(start.saturating_add(done)))?;
        done += count;
    }
    Ok(())
}

fn kind_name(kind: FileType) -> &'static str {
    if kind.is_dir() {
        "directory"
    } else if kind.is_fifo() {
        "pipe"
    } else if kind.is_socket() {
        "socket"
    } else if kind.is_block_device() {
        "block device"
    } else {
        "character device"
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestMemoryMmap;

    use super::*;

    #[test]
    fn directories_and_devices_are_named() {
        let dir = File::open("/").unwrap();
        assert_eq!(Image::new(&dir).unwrap_err().to_string(), "not a regular file but a directory");
        let null = File::open("/dev/null").unwrap();
        assert_eq!(Image::new(&null).unwrap_err().to_string(), "not a regular file but a character device");
    }

    #[test]
    fn a_load_may_cross_regions_but_not_a_hole() {
        let memory: GuestMemoryMmap<()> = GuestMemoryMmap::from_ranges(&[
            (GuestAddress(0), 0x1000),
            (GuestAddress(0x1000), 0x1000),
            (GuestAddress(0x3000), 0x1000),
        ])
        .unwrap();
        let file = tempfile::tempfile().unwrap();
        let bytes: Vec<u8> = (0..0x1800u32).map(|i| i as u8).collect();
        file.write_all_at(&bytes, 0).unwrap();
        let image = Image::new(&file).unwrap();

        image.load("test", 0x100, 0x1000, &memory, 0x800).unwrap();
        let mut back = vec![0; 0x1000];
        memory.read_slice(&mut back, GuestAddress(0x800)).unwrap();
        assert_eq!(back, bytes[0x100..0x1100]);

        assert!(matches!(image.load("test", 0, 0x1800, &memory, 0x1000), Err(FileError::Memory { .. })));
        assert!(matches!(image.load("test", 0x1000, 0x801, &memory, 0), Err(FileError::TooShort { .. })));
        assert!(matches!(image.load("test", u64::MAX, 1, &memory, 0), Err(FileError::TooShort { .. })));
    }

    #[test]
    fn a_file_that_shrinks_meanwhile_is_an_error() {
        let memory: GuestMemoryMmap<()> = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(0x800).unwrap();
        let image = Image::new(&file).unwrap();
        file.set_len(0x400).unwrap();
        assert!(matches!(image.load("test", 0, 0x800, &memory, 0), Err(FileError::Copy { .. })));
    }
}
