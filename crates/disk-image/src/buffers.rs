//! Memory that a request reads into or writes from.
#![expect(unsafe_code, reason = "guest memory is reached through raw host addresses")]

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::any::Any;
use std::fmt;
use std::io;
use std::ptr::{self, NonNull};
use std::sync::Arc;

/// Alignment of memory this crate allocates, in bytes: enough for `O_DIRECT` on every common device.
const OWN_ALIGN: usize = 4096;

/// One host range, laid out as the kernel's `struct iovec`.
///
/// Safe code holds an `IoRange` only beside the [`Buffers`] or [`AlignedMemory`] it came from, whose memory is mapped
/// for as long as they live. Every system call that takes ranges relies on that.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct IoRange {
    pub(crate) base: *mut u8,
    pub(crate) len: usize,
}

const _: () = assert!(size_of::<IoRange>() == size_of::<libc::iovec>());
const _: () = assert!(align_of::<IoRange>() == align_of::<libc::iovec>());

// SAFETY: an address and a length; who may use them on which thread is the contract of `Buffers::new`.
unsafe impl Send for IoRange {}

/// A scatter-gather list of host memory, together with what keeps that memory mapped.
///
/// An engine owns the buffers of a request from `submit` until it gives them back in the completion, so the memory
/// cannot go away while the kernel may still touch it. Take a `Buffers` out of a completion and
/// [`refill`](Self::refill) it to spare the allocation of its list; [`clear`](Self::clear) it to let go of the memory.
pub struct Buffers {
    ranges: Vec<IoRange>,
    len: u64,
    memory: Memory,
}

enum Memory {
    Nobodys,
    /// Held so that the memory stays mapped.
    Shared(Arc<dyn Any + Send + Sync>),
    Owned(AlignedMemory),
}

impl Buffers {
    /// Describes the host `ranges` (address, length in bytes), which `owner` keeps mapped. Empty ranges are left out.
    ///
    /// # Safety
    ///
    /// Until the last clone of `owner` is dropped, each range must be mapped, readable, and (for use in a read) writable
    /// from any thread. No Rust reference to the memory may exist while a request uses it; others, such as a running
    /// guest, may access it at any time, and then the bytes moved are unspecified.
    pub unsafe fn new(
        owner: Arc<dyn Any + Send + Sync>,
        ranges: impl IntoIterator<Item = (*mut u8, usize)>,
    ) -> Self {
        let mut buffers = Self { ranges: Vec::new(), len: 0, memory: Memory::Shared(owner) };
        buffers.collect(ranges);
        buffers
    }

    /// Replaces memory and ranges, keeping the allocation of the list. An owner that is held already is not cloned again:
    /// counting references is a locked operation.
    ///
    /// # Safety
    ///
    /// As for [`Buffers::new`].
    pub unsafe fn refill<T: Any + Send + Sync>(
        &mut self,
        owner: &Arc<T>,
        ranges: impl IntoIterator<Item = (*mut u8, usize)>,
    ) {
        let same = |held| ptr::addr_eq(Arc::as_ptr(held), Arc::as_ptr(owner));
        if !matches!(&self.memory, Memory::Shared(held) if same(held)) {
            self.memory = Memory::Shared(Arc::clone(owner) as _);
        }
        self.collect(ranges);
    }

    /// Lets go of the memory. The allocation of the list stays.
    pub fn clear(&mut self) {
        self.collect([]);
        self.memory = Memory::Nobodys;
    }

    /// Allocates `len` zeroed bytes, page-aligned, as one range.
    ///
    /// # Errors
    ///
    /// `OutOfMemory` if the allocation fails.
    pub fn zeroed(len: usize) -> io::Result<Self> {
        let memory = AlignedMemory::zeroed(len)?;
        let ranges = [(memory.base.as_ptr(), len)];
        let mut buffers = Self { ranges: Vec::new(), len: 0, memory: Memory::Owned(memory) };
        buffers.collect(ranges);
        Ok(buffers)
    }

    /// Allocates page-aligned memory as one range and copies `bytes` into it.
    ///
    /// # Errors
    ///
    /// `OutOfMemory` if the allocation fails.
    pub fn from_slice(bytes: &[u8]) -> io::Result<Self> {
        let mut buffers = Self::zeroed(bytes.len())?;
        buffers.copy_in(0, bytes);
        Ok(buffers)
    }

    /// Cuts every range into pieces of at most `size` bytes (at least one); the memory stays where it is.
    #[must_use]
    pub fn chunked(mut self, size: usize) -> Self {
        let size = size.max(1);
        let mut pieces = Vec::new();
        for range in &self.ranges {
            for start in (0..range.len).step_by(size) {
                pieces.push((range.base.wrapping_add(start), size.min(range.len - start)));
            }
        }
        self.collect(pieces);
        self
    }

    /// The bytes, if this crate allocated them ([`zeroed`](Self::zeroed), [`from_slice`](Self::from_slice)); `None` for
    /// memory of others.
    #[must_use]
    pub fn as_slice(&self) -> Option<&[u8]> {
        match &self.memory {
            Memory::Owned(memory) => Some(memory.as_slice()),
            Memory::Shared(_) | Memory::Nobodys => None,
        }
    }

    /// Sum of the ranges in bytes, saturating.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is no byte to move.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The ranges as address and length in bytes, for instance to mark guest pages dirty after a read.
    pub fn ranges(&self) -> impl Iterator<Item = (*mut u8, usize)> + '_ {
        self.ranges.iter().map(|range| (range.base, range.len))
    }

    pub(crate) fn io_ranges(&self) -> &[IoRange] {
        &self.ranges
    }

    /// The ranges that remain after the first `skip` bytes, at most `max` of them.
    pub(crate) fn rest(&self, skip: u64, max: usize) -> Vec<IoRange> {
        self.after(skip).take(max).collect()
    }

    /// Copies from the ranges, starting `skip` bytes in, until `dst` is full or the ranges end.
    pub(crate) fn copy_out(&self, skip: u64, mut dst: &mut [u8]) {
        for range in self.after(skip) {
            let Some((head, tail)) = dst.split_at_mut_checked(range.len.min(dst.len())) else { return };
            // SAFETY: the range is mapped (contract of `new`) and at least as long as `head`; `head` is memory of Rust's
            // and cannot overlap it.
            unsafe { ptr::copy_nonoverlapping(range.base, head.as_mut_ptr(), head.len()) };
            dst = tail;
        }
    }

    /// Copies `src` into the ranges, starting `skip` bytes in, until `src` or the ranges end.
    pub(crate) fn copy_in(&mut self, skip: u64, mut src: &[u8]) {
        for range in self.after(skip) {
            let Some((head, tail)) = src.split_at_checked(range.len.min(src.len())) else { return };
            // SAFETY: as in `copy_out`, the other way; a caller who reads into the ranges promised them writable.
            unsafe { ptr::copy_nonoverlapping(head.as_ptr(), range.base, head.len()) };
            src = tail;
        }
    }

    fn after(&self, mut skip: u64) -> impl Iterator<Item = IoRange> + '_ {
        self.ranges.iter().filter_map(move |range| {
            let len = range.len as u64;
            let cut = skip.min(len);
            skip -= cut;
            // `cut` is at most the length of the range, which is a usize.
            let cut = cut as usize;
            (cut < range.len).then(|| IoRange { base: range.base.wrapping_add(cut), len: range.len - cut })
        })
    }

    fn collect(&mut self, ranges: impl IntoIterator<Item = (*mut u8, usize)>) {
        self.ranges.clear();
        self.ranges
            .extend(ranges.into_iter().filter(|&(_, len)| len > 0).map(|(base, len)| IoRange { base, len }));
        self.len = self.ranges.iter().fold(0, |sum, range| sum.saturating_add(range.len as u64));
    }
}

impl fmt::Debug for Buffers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let owned = matches!(self.memory, Memory::Owned(_));
        f.debug_struct("Buffers")
            .field("ranges", &self.ranges.len())
            .field("len", &self.len)
            .field("owned", &owned)
            .finish()
    }
}

/// Zeroed heap memory, page-aligned so that `O_DIRECT` takes it.
#[derive(Debug)]
pub(crate) struct AlignedMemory {
    base: NonNull<u8>,
    len: usize,
    layout: Layout,
}

// SAFETY: it owns its allocation alone; shared access only reads.
unsafe impl Send for AlignedMemory {}
// SAFETY: as above.
unsafe impl Sync for AlignedMemory {}

impl AlignedMemory {
    pub(crate) fn zeroed(len: usize) -> io::Result<Self> {
        let out_of_memory = || io::Error::from(io::ErrorKind::OutOfMemory);
        let layout = Layout::from_size_align(len.max(1), OWN_ALIGN).map_err(|_| out_of_memory())?;
        // SAFETY: the layout's size is not zero.
        let base = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or_else(out_of_memory)?;
        Ok(Self { base, len, layout })
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        // SAFETY: the allocation has `len` initialized bytes; while `self` is borrowed here no kernel operation writes to
        // it, for an engine has its memory in its own hands until the operation ends.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.len) }
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as in `as_slice`, and `self` is borrowed uniquely.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr(), self.len) }
    }

    /// The first `len` bytes as a range.
    pub(crate) fn io_range(&self, len: usize) -> IoRange {
        IoRange { base: self.base.as_ptr(), len: len.min(self.len) }
    }
}

impl Drop for AlignedMemory {
    fn drop(&mut self) {
        // SAFETY: allocated in `zeroed` with this layout and freed only here.
        unsafe { dealloc(self.base.as_ptr(), self.layout) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_cover_the_same_bytes_in_order() {
        let data: Vec<u8> = (0..=255).collect();
        let buffers = Buffers::from_slice(&data).unwrap().chunked(7);
        assert_eq!(buffers.len(), 256);
        assert_eq!(buffers.io_ranges().len(), 37);
        let mut copy = vec![0; 256];
        buffers.copy_out(0, &mut copy);
        assert_eq!(copy, data);
    }

    #[test]
    fn copies_start_inside_a_range_and_end_inside_another() {
        let mut buffers = Buffers::zeroed(20).unwrap().chunked(6);
        buffers.copy_in(4, &[1; 11]);
        let mut expected = [0; 20];
        expected[4..15].fill(1);
        assert_eq!(buffers.as_slice().unwrap(), expected);
        let mut out = [9; 6];
        buffers.copy_out(12, &mut out);
        assert_eq!(out, [1, 1, 1, 0, 0, 0]);
    }

    #[test]
    fn the_rest_begins_where_the_skip_ends() {
        let buffers = Buffers::zeroed(20).unwrap().chunked(6);
        let rest = buffers.rest(7, 2);
        let base = buffers.io_ranges()[0].base;
        assert_eq!(rest.len(), 2);
        assert_eq!((rest[0].base, rest[0].len), (base.wrapping_add(7), 5));
        assert_eq!((rest[1].base, rest[1].len), (base.wrapping_add(12), 6));
        assert!(buffers.rest(20, 9).is_empty());
    }

    #[test]
    fn refill_replaces_owner_and_ranges_and_drops_empty_ones_and_clear_all_of_them() {
        let memory = Arc::new(AlignedMemory::zeroed(64).unwrap());
        let base = memory.io_range(64).base;
        let mut buffers = Buffers::zeroed(8).unwrap();
        // SAFETY: both ranges lie in `memory`, which the buffers share.
        unsafe { buffers.refill(&memory, [(base, 16), (base, 0), (base.wrapping_add(32), 8)]) };
        assert_eq!(buffers.len(), 24);
        assert_eq!(buffers.ranges().count(), 2);
        assert!(buffers.as_slice().is_none());
        assert_eq!(Arc::strong_count(&memory), 2);
        // SAFETY: as above.
        unsafe { buffers.refill(&memory, [(base, 1)]) };
        assert_eq!((buffers.len(), Arc::strong_count(&memory)), (1, 2), "held once");
        let other = Arc::new(AlignedMemory::zeroed(1).unwrap());
        // SAFETY: the range lies in `other`, which the buffers share.
        unsafe { buffers.refill(&other, [(other.io_range(1).base, 1)]) };
        assert_eq!((Arc::strong_count(&memory), Arc::strong_count(&other)), (1, 2));
        buffers.clear();
        assert_eq!((Arc::strong_count(&other), buffers.ranges().count()), (1, 0));
        assert!(buffers.is_empty() && buffers.as_slice().is_none());
    }
}
