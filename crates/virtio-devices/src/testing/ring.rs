//! The driver's side of a split virtqueue (virtio 1.3, section 2.7).

use std::io;
use std::sync::atomic::{Ordering, fence};

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};
use vmm_device_model::dma::DmaMemory;
use vmm_sys_util::eventfd::EventFd;

/// Descriptor flag: the chain goes on at `next`.
pub const NEXT: u16 = 1;
/// Descriptor flag: the device writes the buffer.
pub const WRITE: u16 = 2;
/// Descriptor flag: the buffer is a table of descriptors.
pub const INDIRECT: u16 = 4;
const NO_NOTIFY: u16 = 1;

/// One buffer of a descriptor chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Guest physical address; need not be memory.
    pub address: u64,
    /// Bytes.
    pub len: u32,
    /// Whether the device writes it.
    pub writable: bool,
}

impl Segment {
    /// A buffer that the device reads.
    pub fn readable(address: u64, len: u32) -> Self {
        Self { address, len, writable: false }
    }

    /// A buffer that the device writes.
    pub fn writable(address: u64, len: u32) -> Self {
        Self { address, len, writable: true }
    }
}

/// One entry of a descriptor table, for tests that write what no driver would.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Descriptor {
    /// Guest physical address.
    pub address: u64,
    /// Bytes.
    pub len: u32,
    /// [`NEXT`], [`WRITE`], [`INDIRECT`].
    pub flags: u16,
    /// Index of the next descriptor, with [`NEXT`].
    pub next: u16,
}

#[derive(Debug)]
pub(super) struct Ring {
    memory: DmaMemory,
    size: u16,
    /// Descriptor table, available ring, used ring.
    addresses: [u64; 3],
    kick: EventFd,
    event_index: bool,
    free: Vec<u16>,
    /// Per descriptor: whether it is submitted, and the next of its chain, if any.
    links: Vec<(bool, Option<u16>)>,
    next_available: u16,
    /// `next_available` at the last kick.
    announced: u16,
    last_used: u16,
}

impl Ring {
    pub(super) fn new(
        memory: DmaMemory,
        size: u16,
        addresses: [u64; 3],
        kick: EventFd,
        event_index: bool,
    ) -> Result<Self, GuestMemoryError> {
        let [_, available, used] = addresses;
        let view = memory.view();
        view.write_slice(&vec![0; 6 + 2 * usize::from(size)], GuestAddress(available))?;
        view.write_slice(&vec![0; 6 + 8 * usize::from(size)], GuestAddress(used))?;
        Ok(Self {
            memory,
            size,
            addresses,
            kick,
            event_index,
            free: (0..size).rev().collect(),
            links: vec![(false, None); usize::from(size)],
            next_available: 0,
            announced: 0,
            last_used: 0,
        })
    }

    pub(super) fn addresses(&self) -> [u64; 3] {
        self.addresses
    }

    pub(super) fn submit(&mut self, chain: &[Segment]) -> io::Result<u16> {
        if chain.is_empty() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        if chain.len() > self.free.len() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let taken = self.free.split_off(self.free.len() - chain.len());
        // The free list is a stack: its end is the chain's head.
        let order = taken.iter().rev();
        let nexts = taken.iter().rev().skip(1).map(|next| Some(*next)).chain([None]);
        for ((index, segment), next) in order.zip(chain).zip(nexts) {
            let link = next.map_or(0, |_| NEXT);
            let flags = link | if segment.writable { WRITE } else { 0 };
            let Segment { address, len, .. } = *segment;
            self.write(*index, Descriptor { address, len, flags, next: next.unwrap_or(0) })?;
            if let Some(cell) = self.links.get_mut(usize::from(*index)) {
                *cell = (true, next);
            }
        }
        let head = taken.last().copied().unwrap_or(0);
        self.publish(head)?;
        Ok(head)
    }

    /// Writes a descriptor as it is.
    pub(super) fn write(&self, index: u16, descriptor: Descriptor) -> io::Result<()> {
        let [table, _, _] = self.addresses;
        let Descriptor { address, len, flags, next } = descriptor;
        let rest = u64::from(len) | u64::from(flags) << 32 | u64::from(next) << 48;
        let at = table + 16 * u64::from(index);
        let view = self.memory.view();
        view.write_obj(address, GuestAddress(at)).map_err(io::Error::other)?;
        view.write_obj(rest, GuestAddress(at + 8)).map_err(io::Error::other)
    }

    /// Makes a head available, whatever it is.
    pub(super) fn publish(&mut self, head: u16) -> io::Result<()> {
        let [_, available, _] = self.addresses;
        let slot = u64::from(self.next_available % self.size);
        let entry = GuestAddress(available + 4 + 2 * slot);
        self.memory.view().write_obj(head, entry).map_err(io::Error::other)?;
        self.advance(1)
    }

    /// Moves the available index on without writing entries.
    pub(super) fn advance(&mut self, by: u16) -> io::Result<()> {
        let [_, available, _] = self.addresses;
        self.next_available = self.next_available.wrapping_add(by);
        let index = GuestAddress(available + 2);
        self.memory.view().store(self.next_available, index, Ordering::Release).map_err(io::Error::other)
    }

    pub(super) fn notify(&mut self) -> io::Result<bool> {
        let [_, _, used] = self.addresses;
        let (old, new) = (self.announced, self.next_available);
        self.announced = new;
        // The index must be out before the device's wish is read.
        fence(Ordering::SeqCst);
        let wanted = if self.event_index {
            let event = self.load(used + 4 + 8 * u64::from(self.size))?;
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.load(used)? & NO_NOTIFY == 0
        };
        if wanted {
            self.kick.write(1)?;
        }
        Ok(wanted)
    }

    pub(super) fn used(&mut self) -> io::Result<Option<(u16, u32)>> {
        let [_, available, used] = self.addresses;
        if self.load(used + 2)? == self.last_used {
            return Ok(None);
        }
        let slot = u64::from(self.last_used % self.size);
        let element: u64 =
            self.memory.view().read_obj(GuestAddress(used + 4 + 8 * slot)).map_err(io::Error::other)?;
        let (id, len) = (element as u32, (element >> 32) as u32);
        let head = u16::try_from(id).ok().filter(|head| *head < self.size);
        let head = head.ok_or_else(|| io::Error::other(format!("descriptor {id} used")))?;
        self.release(head);
        self.last_used = self.last_used.wrapping_add(1);
        if self.event_index {
            let event = GuestAddress(available + 4 + 2 * u64::from(self.size));
            self.memory.view().store(self.last_used, event, Ordering::Release).map_err(io::Error::other)?;
        }
        Ok(Some((head, len)))
    }

    /// Frees the descriptors of a chain, if they are submitted: a test may have published others.
    fn release(&mut self, head: u16) {
        let mut next = Some(head);
        while let Some(index) = next {
            let link = self.links.get_mut(usize::from(index)).map(std::mem::take);
            let Some((true, link)) = link else { return };
            self.free.push(index);
            next = link;
        }
    }

    fn load(&self, address: u64) -> io::Result<u16> {
        self.memory.view().load(GuestAddress(address), Ordering::Acquire).map_err(io::Error::other)
    }
}
