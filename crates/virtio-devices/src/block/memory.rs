//! Guest memory as the kernel's I/O sees it.
#![expect(unsafe_code, reason = "the kernel is given host addresses of guest memory")]

use std::any::Any;
use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
use std::sync::Arc;

use vm_memory::{GuestAddress, GuestMemory, Permissions};
use vmm_device_model::dma::GuestRam;
use vmm_disk_image::Buffers;

use crate::chain::{self, Span, in_one_piece};

/// Buffers whose lists of ranges are used again. They hold the memory of their last use until they are told to
/// [`let_go`](Self::let_go): a busy queue's next request is in the same.
#[derive(Debug, Default)]
pub(super) struct BufferPool {
    spare: Vec<Buffers>,
}

impl BufferPool {
    /// The host ranges of `spans`; `None` if a span is not in guest memory.
    pub(super) fn resolve(
        &mut self,
        memory: &Arc<GuestRam>,
        spans: &[Span],
        access: Permissions,
    ) -> Option<Buffers> {
        let len = chain::len(spans);
        // Nearly every buffer lies in one piece; the general way is slower.
        let pieces = spans.iter().map_while(|span| {
            let slice = in_one_piece(memory, span.address, span.len as usize)?;
            Some((slice.ptr_guard_mut().as_ptr(), slice.len()))
        });
        let buffers = self.fill(memory, pieces);
        if buffers.len() == len {
            return Some(buffers);
        }
        self.give_back(buffers);
        let pieces = spans.iter().flat_map(|span| {
            let slices = memory.get_slices(span.address, span.len as usize, access);
            slices.into_iter().flatten().flatten().map(|slice| (slice.ptr_guard_mut().as_ptr(), slice.len()))
        });
        let buffers = self.fill(memory, pieces);
        // What does not resolve is missing.
        if buffers.len() == len {
            return Some(buffers);
        }
        self.give_back(buffers);
        None
    }

    /// Buffers of these host ranges, which are slices of `memory`.
    fn fill(&mut self, memory: &Arc<GuestRam>, ranges: impl Iterator<Item = (*mut u8, usize)>) -> Buffers {
        match self.spare.pop() {
            Some(mut spare) => {
                // SAFETY: the ranges are slices of `memory`, mapped readable and writable for as long as the owner lives;
                // guest memory is only ever reached through volatile accesses, never through references.
                unsafe { spare.refill(memory, ranges) };
                spare
            }
            // SAFETY: as above.
            None => unsafe { Buffers::new(Arc::clone(memory) as Arc<dyn Any + Send + Sync>, ranges) },
        }
    }

    /// Takes buffers that no request uses any more.
    pub(super) fn give_back(&mut self, buffers: Buffers) {
        self.spare.push(buffers);
    }

    /// Lets go of guest memory.
    pub(super) fn let_go(&mut self) {
        self.spare.iter_mut().for_each(Buffers::clear);
    }
}

/// Asks the processor for what lies at `address`, which is read soon.
pub(super) fn prefetch(memory: &GuestRam, address: GuestAddress) {
    if let Some(slice) = in_one_piece(memory, address, 1) {
        // SAFETY: a hint to the processor, which reads nothing on behalf of the program; the address is mapped.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(slice.ptr_guard().as_ptr().cast()) };
    }
}
