//! Descriptor chains, taken out of the guest's hands: what it wrote is read once, into memory of ours.

use std::num::Wrapping;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering, fence};

use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::bitmap::{AtomicBitmap, Bitmap, RefSlice};
use vm_memory::{
    Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, VolatileMemory, VolatileSlice,
};
use vmm_device_model::dma::GuestRam;

/// The driver does not want interrupts (virtio 1.3, section 2.7.7).
const NO_INTERRUPT: u16 = 1;
const DESCRIPTOR_LEN: u32 = 16;

type RamSlice<'m> = VolatileSlice<'m, RefSlice<'m, AtomicBitmap>>;

/// A descriptor table, a queue's or an indirect one.
#[derive(Debug)]
pub(crate) struct Table<'m> {
    memory: &'m GuestRam,
    address: GuestAddress,
    len: u32,
    /// All of it, where it lies in one piece.
    whole: Option<RamSlice<'m>>,
}

impl<'m> Table<'m> {
    /// The table of a queue.
    pub(crate) fn of(queue: &Queue, memory: &'m GuestRam) -> Self {
        Self::new(memory, GuestAddress(queue.desc_table()), queue.size().into())
    }

    fn new(memory: &'m GuestRam, address: GuestAddress, len: u32) -> Self {
        let bytes = len.checked_mul(DESCRIPTOR_LEN);
        let whole = bytes.and_then(|bytes| in_one_piece(memory, address, bytes as usize));
        Self { memory, address, len, whole }
    }

    /// `None` if it is not in the table, or not in memory.
    pub(crate) fn read(&self, index: u16) -> Option<Descriptor> {
        if u32::from(index) >= self.len {
            return None;
        }
        let offset = u32::from(index) * DESCRIPTOR_LEN;
        match &self.whole {
            Some(whole) => whole.read_obj(offset as usize).ok(),
            None => {
                let address = self.address.0.checked_add(offset.into())?;
                self.memory.read_obj(GuestAddress(address)).ok()
            }
        }
    }

    /// The table that an indirect descriptor points to.
    fn indirect(&self, descriptor: Descriptor) -> Option<Self> {
        let len = descriptor.len();
        let whole = len.is_multiple_of(DESCRIPTOR_LEN);
        whole.then(|| Self::new(self.memory, descriptor.addr(), len / DESCRIPTOR_LEN))
    }
}

/// One buffer of a chain. Foreign numbers: it need not lie in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) address: GuestAddress,
    /// Bytes, not 0.
    pub(crate) len: u32,
}

/// The buffers of a chain. Reused from chain to chain for its allocations.
#[derive(Debug, Default)]
pub(crate) struct Chain {
    /// What the device reads.
    pub(crate) readable: Vec<Span>,
    /// What the device writes.
    pub(crate) writable: Vec<Span>,
}

/// Why a chain cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ChainError {
    #[error("descriptor chain leaves its table or memory, or passes 4 GiB")]
    Broken,
    #[error("descriptor chain loops, or is longer than the virtqueue")]
    TooLong,
    #[error("descriptor chain has a readable buffer behind a writable one")]
    Order,
}

impl Chain {
    /// Takes the chain that begins at `head`, of at most `limit` buffers.
    pub(crate) fn collect(&mut self, table: &Table<'_>, head: u16, limit: usize) -> Result<(), ChainError> {
        self.readable.clear();
        self.writable.clear();
        let mut indirect = None;
        let mut index = head;
        let mut total = 0_u32;
        // The limit ends loops, too.
        let mut count = 0;
        loop {
            let place = indirect.as_ref().unwrap_or(table);
            let descriptor = place.read(index).ok_or(ChainError::Broken)?;
            if descriptor.refers_to_indirect_table() {
                if indirect.is_some() {
                    return Err(ChainError::Broken);
                }
                indirect = Some(table.indirect(descriptor).ok_or(ChainError::Broken)?);
                index = 0;
                continue;
            }
            if count == limit {
                return Err(ChainError::TooLong);
            }
            count += 1;
            total = total.checked_add(descriptor.len()).ok_or(ChainError::Broken)?;
            self.push(descriptor)?;
            if !descriptor.has_next() {
                return Ok(());
            }
            index = descriptor.next();
        }
    }

    fn push(&mut self, descriptor: Descriptor) -> Result<(), ChainError> {
        let span = Span { address: descriptor.addr(), len: descriptor.len() };
        let writable = descriptor.is_write_only();
        if !writable && !self.writable.is_empty() {
            return Err(ChainError::Order);
        }
        if span.len > 0 {
            if writable { &mut self.writable } else { &mut self.readable }.push(span);
        }
        Ok(())
    }

    /// Takes the last writable byte away; its address.
    pub(crate) fn take_last_byte(&mut self) -> Option<GuestAddress> {
        let last = self.writable.last_mut()?;
        last.len = last.len.checked_sub(1)?;
        let address = last.address.0.checked_add(last.len.into())?;
        if last.len == 0 {
            self.writable.pop();
        }
        Some(GuestAddress(address))
    }

    /// Takes the first `N` readable bytes away; `None` if there are fewer.
    pub(crate) fn take_front<const N: usize>(
        &mut self,
        memory: &GuestRam,
    ) -> Result<Option<[u8; N]>, GuestMemoryError> {
        let mut bytes = [0; N];
        let count = read(memory, &self.readable, &mut bytes)?;
        if count < N {
            return Ok(None);
        }
        let mut left = N as u64;
        self.readable.retain_mut(|span| {
            let cut = left.min(span.len.into());
            left -= cut;
            // `cut` is at most the length, and the bytes were read: nothing overflows.
            span.len -= cut as u32;
            span.address.0 = span.address.0.wrapping_add(cut);
            span.len > 0
        });
        Ok(Some(bytes))
    }
}

/// Sum of the spans in bytes.
pub(crate) fn len(spans: &[Span]) -> u64 {
    spans.iter().map(|span| u64::from(span.len)).sum()
}

/// Copies from the front of the spans until `to` is full or they end. Returns how much.
pub(crate) fn read(memory: &GuestRam, spans: &[Span], to: &mut [u8]) -> Result<usize, GuestMemoryError> {
    let mut done = 0;
    for span in spans {
        let rest = to.get_mut(done..).unwrap_or_default();
        let count = rest.len().min(span.len as usize);
        let Some(part) = rest.get_mut(..count).filter(|part| !part.is_empty()) else { break };
        match in_one_piece(memory, span.address, count) {
            Some(slice) => slice.read_slice(part, 0)?,
            None => memory.read_slice(part, span.address)?,
        }
        done += count;
    }
    Ok(done)
}

/// Copies to the front of the spans until `from` or they end. Returns how much.
pub(crate) fn write(memory: &GuestRam, spans: &[Span], from: &[u8]) -> Result<usize, GuestMemoryError> {
    let mut done = 0;
    for span in spans {
        let rest = from.get(done..).unwrap_or_default();
        let count = rest.len().min(span.len as usize);
        let Some(part) = rest.get(..count).filter(|part| !part.is_empty()) else { break };
        match in_one_piece(memory, span.address, count) {
            Some(slice) => slice.write_slice(part, 0)?,
            None => memory.write_slice(part, span.address)?,
        }
        done += count;
    }
    Ok(done)
}

/// The range as one slice; `None` if it is not in memory, or in several regions. Quicker than the general way.
pub(crate) fn in_one_piece(memory: &GuestRam, address: GuestAddress, len: usize) -> Option<RamSlice<'_>> {
    memory.get_slice(address, len).ok()
}

/// Takes up to `most` available chains: their heads are appended to `heads`.
///
/// # Errors
/// The available ring makes no sense. What was appended is good all the same.
pub(crate) fn take_heads(
    queue: &mut Queue,
    memory: &GuestRam,
    most: usize,
    heads: &mut Vec<u16>,
) -> Result<(), RingError> {
    let (size, start) = (queue.size(), queue.avail_ring());
    if !queue.ready() || start == 0 {
        return Err(RingError::Index);
    }
    let whole = in_one_piece(memory, GuestAddress(start), AVAILABLE_HEADER as usize + 2 * usize::from(size));
    let read = |offset: u64| {
        let value = match &whole {
            Some(whole) => whole.load(offset as usize, Ordering::Acquire).ok(),
            None => memory.load(GuestAddress(start.checked_add(offset)?), Ordering::Acquire).ok(),
        };
        value.map(u16::from_le)
    };
    let mut next = Wrapping(queue.next_avail());
    let available = Wrapping(read(AVAILABLE_INDEX).ok_or(RingError::Index)?) - next;
    if available.0 > size {
        return Err(RingError::Index);
    }
    let mut end = Ok(());
    for _ in 0..most.min(available.0.into()) {
        let Some(head) = read(AVAILABLE_HEADER + 2 * u64::from(next.0 % size)) else { break };
        next += 1;
        if head < size {
            heads.push(head);
        } else {
            end = Err(RingError::Head);
        }
    }
    queue.set_next_avail(next.0);
    end
}

/// Takes the next available chain: its head.
///
/// # Errors
/// As [`take_heads`].
pub(crate) fn take_head(queue: &mut Queue, memory: &GuestRam) -> Result<Option<u16>, RingError> {
    let size = queue.size();
    let mut available = queue.iter(memory).map_err(|_| RingError::Index)?;
    let Some(chain) = available.next() else { return Ok(None) };
    if chain.head_index() < size { Ok(Some(chain.head_index())) } else { Err(RingError::Head) }
}

/// Chains that are done, until the driver is told of all of them at once: it watches the ring's index, which each
/// change takes away from its CPU.
///
/// Pages are marked dirty just before that, all at once: each mark is a locked operation, which waits until what was
/// written before, in memory that the driver's CPU had, is there.
#[derive(Debug, Default)]
pub(crate) struct Used {
    /// Head and bytes written.
    chains: Vec<(u16, u32)>,
    /// Memory that was written for them and is not marked dirty yet.
    written: Vec<Span>,
    /// Published since the driver was last interrupted, or found not to want it.
    news: u16,
}

impl Used {
    /// A chain is done. Its head is one that the queue has.
    pub(crate) fn add(&mut self, head: u16, len: u32) {
        self.chains.push((head, len));
    }

    /// What the device wrote for a chain that is done without marking it dirty.
    pub(crate) fn wrote(&mut self, span: Span) {
        self.written.push(span);
    }

    /// Writes one byte for such a chain.
    ///
    /// # Errors
    /// It is not in memory.
    pub(crate) fn write_byte(
        &mut self,
        memory: &GuestRam,
        address: GuestAddress,
        value: u8,
    ) -> Result<(), GuestMemoryError> {
        let slice = memory.get_slice(address, 1)?;
        slice.get_atomic_ref::<AtomicU8>(0)?.store(value, Ordering::Relaxed);
        self.wrote(Span { address, len: 1 });
        Ok(())
    }

    /// Puts all that is done into the used ring, and its new end last.
    ///
    /// # Errors
    /// The ring does not lie in memory.
    pub(crate) fn publish(&mut self, queue: &mut Queue, memory: &GuestRam) -> Result<(), GuestMemoryError> {
        if self.chains.is_empty() {
            return Ok(());
        }
        mark_dirty(memory, &self.written);
        self.written.clear();
        let (size, mut next) = (queue.size(), Wrapping(queue.next_used()));
        // The rings were validated: nothing wraps.
        let ring = GuestAddress(queue.used_ring());
        let len = USED_HEADER + USED_ELEMENT * usize::from(size);
        let whole = in_one_piece(memory, ring, len);
        for (head, len) in self.chains.drain(..) {
            let offset = USED_HEADER + USED_ELEMENT * usize::from(next.0 % size);
            let element = (u64::from(head) | u64::from(len) << 32).to_le();
            match &whole {
                Some(whole) => {
                    // Only aligned to four bytes.
                    let [low, high] = [element as u32, (element >> 32) as u32];
                    whole.get_atomic_ref::<AtomicU32>(offset)?.store(low, Ordering::Relaxed);
                    whole.get_atomic_ref::<AtomicU32>(offset + 4)?.store(high, Ordering::Relaxed);
                }
                None => memory.write_obj(element, ring.unchecked_add(offset as u64))?,
            }
            next += 1;
            self.news = self.news.saturating_add(1);
        }
        if let Some(whole) = whole {
            whole.bitmap().mark_dirty(0, whole.len());
        }
        queue.set_next_used(next.0);
        memory.store(next.0.to_le(), ring.unchecked_add(USED_INDEX), Ordering::Release)
    }

    /// Whether there is news since the last call and the driver wants to be interrupted for it.
    pub(crate) fn wants_interrupt(&mut self, queue: &Queue, memory: &GuestRam) -> bool {
        let news = std::mem::take(&mut self.news);
        if news == 0 {
            return false;
        }
        // What was published is seen before the driver's wish is read (virtio 1.3, section 2.7.10).
        fence(Ordering::SeqCst);
        // The rings were validated; without an answer an interrupt too many does no harm.
        let read = |offset: u64| -> u16 {
            let at = GuestAddress(queue.avail_ring().wrapping_add(offset));
            memory.load::<u16>(at, Ordering::Relaxed).map_or(0, u16::from_le)
        };
        if queue.event_idx_enabled() {
            // Behind the ring's entries; whether the driver waits for one of the news.
            let event = read(AVAILABLE_HEADER + 2 * u64::from(queue.size()));
            return queue.next_used().wrapping_sub(event).wrapping_sub(1) < news;
        }
        read(0) & NO_INTERRUPT == 0
    }
}

/// Marks what was written past guest memory's bitmap, for that sees only what this process writes in the usual way.
pub(crate) fn mark_dirty(memory: &GuestRam, spans: &[Span]) {
    for span in spans {
        if let Some(slice) = in_one_piece(memory, span.address, span.len as usize) {
            slice.bitmap().mark_dirty(0, slice.len());
            continue;
        }
        let slices = memory.get_slices(span.address, span.len as usize);
        for slice in slices.flatten() {
            slice.bitmap().mark_dirty(0, slice.len());
        }
    }
}

/// Bytes before the elements of a used ring, of one of them, and where in front is the index of its end
/// (virtio 1.3, section 2.7.8).
const USED_HEADER: usize = 4;
const USED_ELEMENT: usize = 8;
const USED_INDEX: u64 = 2;
/// Bytes before the entries of an available ring, and where among them is the index of its end (virtio 1.3, section 2.7.6).
const AVAILABLE_HEADER: u64 = 4;
const AVAILABLE_INDEX: u64 = 2;

/// Why an available ring makes no sense.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RingError {
    /// Nothing more can be taken until the driver repairs it.
    #[error("available ring holds more chains than the virtqueue has descriptors")]
    Index,
    /// One entry was skipped.
    #[error("available ring names a descriptor that the virtqueue does not have")]
    Head,
}

/// Whether the driver wants to be interrupted for what was used since the last call.
pub(crate) fn wants_interrupt(queue: &mut Queue, memory: &GuestRam) -> bool {
    let wanted = queue.needs_notification(memory).unwrap_or(true);
    if queue.event_idx_enabled() {
        return wanted;
    }
    // The rings were validated; without an answer an interrupt too many does no harm.
    let flags = memory.load::<u16>(GuestAddress(queue.avail_ring()), Ordering::Relaxed);
    u16::from_le(flags.unwrap_or(0)) & NO_INTERRUPT == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> GuestRam {
        GuestRam::from_ranges(&[(GuestAddress(0), 0x2000), (GuestAddress(0x2000), 0x1000)]).unwrap()
    }

    const NEXT: u16 = 1;
    const WRITE: u16 = 2;
    const INDIRECT: u16 = 4;

    /// Puts descriptors (address, length, flags, next) at `table` and collects the chain of the first.
    fn collect(
        table: u64,
        descriptors: &[(u64, u32, u16, u16)],
        limit: usize,
    ) -> (Result<(), ChainError>, Chain) {
        let memory = memory();
        for (at, (address, len, flags, next)) in (table..).step_by(16).zip(descriptors) {
            let descriptor = Descriptor::new(*address, *len, *flags, *next);
            memory.write_obj(descriptor, GuestAddress(at)).unwrap();
        }
        let mut chain = Chain::default();
        let result = chain.collect(&Table::new(&memory, GuestAddress(table), 8), 0, limit);
        (result, chain)
    }

    #[test]
    fn directions_are_kept_apart_and_empty_buffers_left_out() {
        let good = [(0x10, 16, NEXT, 1), (0x20, 0, NEXT, 2), (0x30, 5, NEXT | WRITE, 3), (0x40, 1, WRITE, 0)];
        // In one region, and across two.
        for table in [0x100, 0x2000 - 40] {
            let (result, chain) = collect(table, &good, 4);
            result.unwrap();
            assert_eq!(chain.readable, [Span { address: GuestAddress(0x10), len: 16 }]);
            assert_eq!(len(&chain.writable), 6);
        }
        assert_eq!(collect(0x100, &good, 3).0, Err(ChainError::TooLong));
        let swapped = [(0x30, 5, NEXT | WRITE, 1), (0x10, 16, 0, 0)];
        assert_eq!(collect(0x100, &swapped, 9).0, Err(ChainError::Order));
    }

    #[test]
    fn broken_chains_are_told_from_ended_ones() {
        for bad in [[(0x10, 16, NEXT, 8), (0, 0, 0, 0)], [(0x10, u32::MAX, NEXT, 1), (0x10, 1, 0, 0)]] {
            assert_eq!(collect(0x100, &bad, 9).0, Err(ChainError::Broken), "{bad:?}");
        }
        assert_eq!(collect(0x100, &[(0x10, 16, NEXT, 0)], 1000).0, Err(ChainError::TooLong), "a loop");
        assert_eq!(
            collect(0x3000 - 16, &[(0x10, 16, NEXT, 1)], 9).0,
            Err(ChainError::Broken),
            "end of memory"
        );
    }

    #[test]
    fn indirect_tables_are_followed_once() {
        let table =
            [(0x100 + 32, 32, INDIRECT | WRITE, 0), (0, 0, 0, 0), (0x10, 7, NEXT, 1), (0x20, 9, WRITE, 0)];
        let (result, chain) = collect(0x100, &table, 9);
        result.unwrap();
        assert_eq!((len(&chain.readable), len(&chain.writable)), (7, 9));
        let bad = [
            (0x100, 16, INDIRECT, 0),
            (0x100 + 32, 33, INDIRECT, 0),
            (0x100 + 32, 0, INDIRECT, 0),
            (0x100 + 32, 16, INDIRECT, 0),
            (u64::MAX - 15, 32, INDIRECT, 0),
        ];
        for first in bad {
            let table = [first, table[1], table[2], table[3]];
            assert_eq!(collect(0x100, &table, 9).0, Err(ChainError::Broken), "{first:?}");
        }
    }

    #[test]
    fn the_last_byte_and_the_first_are_taken_across_buffers() {
        let memory = memory();
        memory.write_slice(&[1, 2, 3, 4, 5], GuestAddress(0x1ffe)).unwrap();
        let span = |address, len| Span { address: GuestAddress(address), len };
        let mut chain = Chain {
            readable: vec![span(0x1ffe, 1), span(0x1fff, 4)],
            writable: vec![span(0x100, 8), span(0x200, 1)],
        };
        assert_eq!(chain.take_front::<3>(&memory).unwrap(), Some([1, 2, 3]));
        assert_eq!(chain.readable, [span(0x2001, 2)]);
        assert_eq!(chain.take_front::<3>(&memory).unwrap(), None);
        assert_eq!(chain.take_last_byte(), Some(GuestAddress(0x200)));
        assert_eq!(chain.take_last_byte(), Some(GuestAddress(0x107)));
        assert_eq!(chain.writable, [span(0x100, 7)]);
        chain.writable = vec![span(u64::MAX - 1, 9)];
        assert_eq!(chain.take_last_byte(), None, "past the end of addresses");
        chain.readable = vec![span(0x2fff, 2)];
        assert!(chain.take_front::<2>(&memory).is_err(), "past the end of memory");
    }

    /// A queue of 4 with its used ring at `used`, about to wrap around.
    fn queue(used: u64, event_index: bool) -> Queue {
        let mut queue = Queue::new(4).unwrap();
        queue.set_avail_ring_address(Some(0x40), Some(0));
        queue.set_used_ring_address(Some(used as u32), Some(0));
        queue.set_event_idx(event_index);
        queue.set_next_used(0xfffe);
        queue
    }

    #[test]
    fn chains_that_are_done_are_published_together_and_the_index_last() {
        // In one region, and across two.
        for ring in [0x100, 0x2000 - 12] {
            let (memory, mut queue, mut used) = (memory(), queue(ring, true), Used::default());
            let index = |memory: &GuestRam| memory.read_obj::<u16>(GuestAddress(ring + 2)).unwrap();
            memory.write_obj(0xfffe_u16, GuestAddress(ring + 2)).unwrap();
            for (head, len) in [(3, 513), (0, 1), (2, u32::MAX)] {
                used.add(head, len);
            }
            assert_eq!(index(&memory), 0xfffe, "not yet");
            used.publish(&mut queue, &memory).unwrap();
            assert_eq!((index(&memory), queue.next_used()), (1, 1));
            let elements: [u32; 8] = memory.read_obj(GuestAddress(ring + 4)).unwrap();
            assert_eq!(elements, [2, u32::MAX, 0, 0, 3, 513, 0, 1], "head and length of each");
            used.publish(&mut queue, &memory).unwrap();
            assert_eq!(index(&memory), 1, "nothing new");
            let dirty =
                |address| in_one_piece(&memory, GuestAddress(address), 1).unwrap().bitmap().dirty_at(0);
            assert!(dirty(ring + 4) && dirty(ring + 35), "where elements were written");
        }
        let (memory, mut queue, mut used) = (memory(), queue(0x3000 - 8, true), Used::default());
        used.add(1, 1);
        assert!(used.publish(&mut queue, &memory).is_err(), "past the end of memory");
    }

    #[test]
    fn what_was_written_for_chains_is_dirty_once_they_are_published() {
        let (memory, mut queue, mut used) = (memory(), queue(0x100, true), Used::default());
        let dirty = |address| in_one_piece(&memory, GuestAddress(address), 1).unwrap().bitmap().dirty_at(0);
        used.write_byte(&memory, GuestAddress(0x2800), 7).unwrap();
        used.wrote(Span { address: GuestAddress(0x1fff), len: 1 });
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0x2800)).unwrap(), 7);
        used.add(0, 1);
        assert!(!dirty(0x2800) && !dirty(0x1fff), "not yet");
        used.publish(&mut queue, &memory).unwrap();
        assert!(dirty(0x2800) && dirty(0x1fff) && dirty(0x104));
        assert!(used.write_byte(&memory, GuestAddress(0x3000), 7).is_err(), "past the end of memory");
    }

    #[test]
    fn the_driver_is_interrupted_for_what_it_waits_for() {
        let memory = memory();
        let interrupts = |event_index: bool, published: u16| {
            let (mut queue, mut used) = (queue(0x100, event_index), Used::default());
            (0..published).for_each(|_| used.add(0, 1));
            used.publish(&mut queue, &memory).unwrap();
            let wanted = used.wants_interrupt(&queue, &memory);
            assert!(!used.wants_interrupt(&queue, &memory), "once");
            wanted
        };
        // The driver waits for the end of the chain at this index of the used ring; published are 0xfffe and on.
        for (event, published, wanted) in [
            (0xfffe_u16, 0, false),
            (0xfffe, 1, true),
            (0xffff, 1, false),
            (0xffff, 2, true),
            (0, 2, false),
            (0, 3, true),
            (0xfffd, 3, false),
        ] {
            memory.write_obj(event, GuestAddress(0x40 + 4 + 8)).unwrap();
            assert_eq!(interrupts(true, published), wanted, "{event:#x} after {published}");
        }
        for (flags, wanted) in [(0_u16, true), (NO_INTERRUPT, false)] {
            memory.write_obj(flags, GuestAddress(0x40)).unwrap();
            assert_eq!((interrupts(false, 1), interrupts(false, 0)), (wanted, false));
        }
    }

    #[test]
    fn copies_stop_where_the_shorter_side_ends() {
        let memory = memory();
        let span = |address, len| Span { address: GuestAddress(address), len };
        let spans = [span(0x10, 3), span(0x20, 3)];
        assert_eq!(write(&memory, &spans, &[1, 2, 3, 4]).unwrap(), 4);
        let mut back = [0; 8];
        assert_eq!(read(&memory, &spans, &mut back).unwrap(), 6);
        assert_eq!(back, [1, 2, 3, 4, 0, 0, 0, 0]);
        assert!(write(&memory, &[span(0x3000, 1)], &[1]).is_err());
    }
}
