//! Where the initramfs goes: as high as it can, so that the kernel has the low memory to itself.

use thiserror::Error;
use vm_memory::GuestMemoryBackend;

use crate::{
    file::{FileError, Image},
    layout::{FOUR_GIB, LEGACY_HOLE},
    memory_map::MemoryMap,
    span::Span,
};

const PAGE: u64 = 0x1000;

/// Why an initramfs cannot be loaded.
#[derive(Debug, Error)]
pub enum InitramfsError {
    /// Reading failed.
    #[error(transparent)]
    File(#[from] FileError),
    /// The file has no bytes.
    #[error("the file is empty")]
    Empty,
    /// No free range of RAM is large enough.
    #[error("{size} bytes do not fit: the largest free RAM below {limit:#x} has {available} bytes")]
    TooLarge {
        /// Size of the file in bytes.
        size: u64,
        /// The largest free range in bytes.
        available: u64,
        /// One past the highest address the kernel allows.
        limit: u64,
    },
}

/// The highest page-aligned place below `limit`, and below 4 GiB, that is RAM and not the kernel's.
pub(crate) fn place(size: u64, map: &MemoryMap, kernel: Span, limit: u64) -> Result<Span, InitramfsError> {
    if size == 0 {
        return Err(InitramfsError::Empty);
    }
    let limit = limit.min(FOUR_GIB);
    let floor = LEGACY_HOLE.span().end();
    let mut available = 0;
    for ram in map.ram().rev() {
        // The part above the kernel first, then the one below it.
        for (start, end) in
            [(ram.start().max(kernel.end()), ram.end()), (ram.start(), ram.end().min(kernel.start()))]
        {
            let start = start.max(floor).checked_next_multiple_of(PAGE).unwrap_or(u64::MAX);
            let end = end.min(limit) & !(PAGE - 1);
            let room = end.saturating_sub(start);
            let pages = size.checked_next_multiple_of(PAGE).filter(|pages| *pages <= room);
            if let Some(span) = pages.and_then(|pages| Span::new(end - pages, size)) {
                return Ok(span);
            }
            available = available.max(room);
        }
    }
    Err(InitramfsError::TooLarge { size, available, limit })
}

pub(crate) fn load<M: GuestMemoryBackend>(
    image: Image<'_>,
    span: Span,
    memory: &M,
) -> Result<(), InitramfsError> {
    Ok(image.load("initramfs", 0, span.size(), memory, span.start())?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory_map::{MemoryKind, MemoryRange};

    const MIB: u64 = 1 << 20;

    fn map(ranges: &[(u64, u64)]) -> MemoryMap {
        let ranges: Vec<_> =
            ranges.iter().map(|&(start, size)| MemoryRange { start, size, kind: MemoryKind::Ram }).collect();
        MemoryMap::new(&ranges).unwrap()
    }

    fn span(start: u64, size: u64) -> Span {
        Span::new(start, size).unwrap()
    }

    #[test]
    fn it_goes_to_the_top() {
        let kernel = span(16 * MIB, 32 * MIB);
        let small = map(&[(0, 512 * MIB)]);
        assert_eq!(place(5000, &small, kernel, FOUR_GIB).unwrap(), span(512 * MIB - 8192, 5000));
        let large = map(&[(0, 3072 * MIB), (4096 * MIB, 4096 * MIB)]);
        assert_eq!(place(5000, &large, kernel, u64::MAX).unwrap(), span(3072 * MIB - 8192, 5000));
        assert_eq!(place(4096, &large, kernel, 0x8000_0000).unwrap(), span(0x7fff_f000, 4096));
        assert_eq!(place(1, &large, kernel, 0x7fff_ffff).unwrap(), span(0x7fff_e000, 1));
    }

    #[test]
    fn it_goes_below_a_kernel_at_the_top() {
        let map = map(&[(0, 64 * MIB)]);
        let kernel = span(32 * MIB, 32 * MIB - 4096);
        assert_eq!(place(4096, &map, kernel, FOUR_GIB).unwrap(), span(64 * MIB - 4096, 4096));
        assert_eq!(place(4097, &map, kernel, FOUR_GIB).unwrap(), span(32 * MIB - 8192, 4097));
        assert_eq!(place(31 * MIB, &map, kernel, FOUR_GIB).unwrap(), span(MIB, 31 * MIB));
        let error = place(31 * MIB + 1, &map, kernel, FOUR_GIB).unwrap_err();
        assert!(
            matches!(error, InitramfsError::TooLarge { size, available, .. } if size == 31 * MIB + 1 && available == 31 * MIB)
        );
        assert_eq!(
            error.to_string(),
            "32505857 bytes do not fit: the largest free RAM below 0x100000000 has 32505856 bytes"
        );
    }

    #[test]
    fn absurd_sizes_and_limits_are_refused() {
        let map = map(&[(0, 64 * MIB)]);
        let kernel = span(16 * MIB, MIB);
        assert!(matches!(place(0, &map, kernel, FOUR_GIB), Err(InitramfsError::Empty)));
        assert!(matches!(
            place(u64::MAX, &map, kernel, FOUR_GIB),
            Err(InitramfsError::TooLarge { available, .. }) if available == 47 * MIB
        ));
        assert!(matches!(place(1, &map, kernel, 1), Err(InitramfsError::TooLarge { available: 0, .. })));
    }
}
