//! A writer of cpio archives in the `newc` format, as the kernel unpacks them (Linux
//! `Documentation/driver-api/early-userspace/buffer-format.rst`).

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;
const CHARACTER: u32 = 0o020_000;

/// An archive under construction, in memory.
#[derive(Debug, Default)]
pub struct Cpio {
    bytes: Vec<u8>,
    entries: u32,
}

/// A file of 4 GiB or more does not fit the format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a file of {0} bytes is too large for a cpio archive")]
pub struct TooLarge(usize);

struct Header<'a> {
    name: &'a str,
    mode: u32,
    device: (u32, u32),
    links: u32,
}

impl Cpio {
    /// An empty archive.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a directory with the permissions `mode`. Folders above it must have been added before.
    pub fn directory(&mut self, name: &str, mode: u32) {
        self.header(&Header { name, mode: DIRECTORY | mode, device: (0, 0), links: 2 }, 0);
    }

    /// Adds a file with the permissions `mode`.
    ///
    /// # Errors
    /// [`TooLarge`] at 4 GiB and more.
    pub fn file(&mut self, name: &str, mode: u32, content: &[u8]) -> Result<(), TooLarge> {
        let size = u32::try_from(content.len()).map_err(|_| TooLarge(content.len()))?;
        self.header(&Header { name, mode: REGULAR | mode, device: (0, 0), links: 1 }, size);
        self.data(content);
        Ok(())
    }

    /// Adds a symbolic link to `target`.
    ///
    /// # Errors
    /// [`TooLarge`] for a target that no path can be.
    pub fn symlink(&mut self, name: &str, target: &str) -> Result<(), TooLarge> {
        let size = u32::try_from(target.len()).map_err(|_| TooLarge(target.len()))?;
        self.header(&Header { name, mode: SYMLINK | 0o777, device: (0, 0), links: 1 }, size);
        self.data(target.as_bytes());
        Ok(())
    }

    /// Adds a character device.
    pub fn character_device(&mut self, name: &str, mode: u32, major: u32, minor: u32) {
        self.header(&Header { name, mode: CHARACTER | mode, device: (major, minor), links: 1 }, 0);
    }

    /// Ends the archive.
    #[must_use]
    pub fn finish(mut self) -> Vec<u8> {
        self.entries = 0;
        self.header(&Header { name: "TRAILER!!!", mode: 0, device: (0, 0), links: 1 }, 0);
        self.bytes
    }

    fn header(&mut self, header: &Header<'_>, size: u32) {
        let inode = self.entries;
        self.entries = self.entries.wrapping_add(1);
        let (major, minor) = header.device;
        // The name's length counts its ending zero; a `usize` beyond 32 bits is no file name.
        let name_size = u32::try_from(header.name.len() + 1).unwrap_or(u32::MAX);
        // inode, mode, uid, gid, links, mtime, size, device of the file (2), of the node (2), name's size, checksum
        let fields = [inode, header.mode, 0, 0, header.links, 0, size, 0, 0, major, minor, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(header.name.as_bytes());
        self.bytes.push(0);
        self.pad();
    }

    fn data(&mut self, content: &[u8]) {
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Mode, name, content and device numbers.
    type Entry = (u32, String, Vec<u8>, (usize, usize));

    /// Reads an archive back up to the trailer.
    fn read(archive: &[u8]) -> Vec<Entry> {
        let mut entries = Vec::new();
        let mut at = 0;
        loop {
            let header = &archive[at..at + 110];
            assert_eq!(&header[..6], b"070701");
            let field = |index: usize| {
                let digits = std::str::from_utf8(&header[6 + 8 * index..14 + 8 * index]).unwrap();
                usize::from_str_radix(digits, 16).unwrap()
            };
            let (size, name_size) = (field(6), field(11));
            let name = String::from_utf8(archive[at + 110..at + 110 + name_size - 1].to_vec()).unwrap();
            assert_eq!(archive[at + 110 + name_size - 1], 0);
            let start = (at + 110 + name_size).next_multiple_of(4);
            if name == "TRAILER!!!" {
                assert_eq!(start, archive.len());
                return entries;
            }
            let content = archive[start..start + size].to_vec();
            entries.push((field(1) as u32, name, content, (field(9), field(10))));
            at = (start + size).next_multiple_of(4);
        }
    }

    #[test]
    fn the_first_header_is_as_the_format_says() {
        let mut cpio = Cpio::new();
        cpio.file("ab", 0o644, b"hello").unwrap();
        let bytes = cpio.finish();
        let expected = [
            "070701", "00000000", "000081a4", "00000000", "00000000", "00000001", "00000000", "00000005",
            "00000000", "00000000", "00000000", "00000000", "00000003", "00000000",
        ]
        .concat();
        assert_eq!(&bytes[..110], expected.as_bytes());
        assert_eq!(&bytes[110..124], b"ab\0\0\0\0hello\0\0\0", "name and content, each padded to 4");
    }

    #[test]
    fn every_kind_of_entry_reads_back() {
        let mut cpio = Cpio::new();
        cpio.directory("dir", 0o755);
        cpio.file("dir/file", 0o600, b"content").unwrap();
        cpio.symlink("dir/link", "file").unwrap();
        cpio.character_device("dir/console", 0o600, 5, 1);
        let expected = vec![
            (0o040_755, "dir".to_owned(), Vec::new(), (0, 0)),
            (0o100_600, "dir/file".to_owned(), b"content".to_vec(), (0, 0)),
            (0o120_777, "dir/link".to_owned(), b"file".to_vec(), (0, 0)),
            (0o020_600, "dir/console".to_owned(), Vec::new(), (5, 1)),
        ];
        assert_eq!(read(&cpio.finish()), expected);
    }
}
