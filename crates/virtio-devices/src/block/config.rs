//! What a driver sees of a disk: feature bits and configuration space (virtio 1.3, sections 5.2.3 and 5.2.4).

use std::sync::atomic::{AtomicBool, Ordering};

use vmm_disk_image::Disk;

use crate::device::DeviceConfig;
use crate::transport::{VIRTIO_F_EVENT_IDX, VIRTIO_F_VERSION_1};

/// Bytes in a sector, the unit of the wire whatever the block size.
pub(super) const SECTOR: u64 = 512;
/// Most sectors of one discard: 1 GiB.
pub(super) const MAX_DISCARD_SECTORS: u32 = 1 << 21;
/// Most sectors of one write-zeroes: 128 MiB, for where zeroes have to be written.
pub(super) const MAX_ZERO_SECTORS: u32 = 1 << 18;
/// Most data buffers of one request.
const MAX_SEGMENTS: u16 = 254;

const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
pub(super) const F_FLUSH: u64 = 1 << 9;
const F_TOPOLOGY: u64 = 1 << 10;
pub(super) const F_CONFIG_WCE: u64 = 1 << 11;
const F_MQ: u64 = 1 << 12;
pub(super) const F_DISCARD: u64 = 1 << 13;
pub(super) const F_WRITE_ZEROES: u64 = 1 << 14;
const F_INDIRECT_DESC: u64 = 1 << 28;

const LEN: usize = 60;
const WRITEBACK: usize = 32;

/// The features that a device with this disk offers. `discards`: the guest may give storage back.
pub(super) fn features(disk: &dyn Disk, queues: u16, discards: bool) -> u64 {
    let when = |condition: bool, feature: u64| if condition { feature } else { 0 };
    let read_only = disk.read_only();
    VIRTIO_F_VERSION_1
        | VIRTIO_F_EVENT_IDX
        | F_INDIRECT_DESC
        | F_SEG_MAX
        | F_BLK_SIZE
        | F_TOPOLOGY
        | F_FLUSH
        | F_CONFIG_WCE
        | when(read_only, F_RO)
        | when(queues > 1, F_MQ)
        | when(discards, F_DISCARD)
        | when(!read_only, F_WRITE_ZEROES)
}

/// Most data buffers of a request on queues of this size.
pub(super) fn segments(queue_size: u16) -> u16 {
    // Header and status have a descriptor each.
    queue_size.saturating_sub(2).clamp(1, MAX_SEGMENTS)
}

/// The configuration space. All of it is fixed, but for the cache mode.
#[derive(Debug)]
pub(super) struct BlockConfig {
    bytes: [u8; LEN],
    writeback: AtomicBool,
}

impl BlockConfig {
    pub(super) fn new(disk: &dyn Disk, queues: u16, queue_size: u16, discards: bool) -> Self {
        Self { bytes: layout(disk, queues, queue_size, discards), writeback: AtomicBool::new(true) }
    }

    /// Whether a write may be answered before it is durable.
    pub(super) fn writeback(&self) -> bool {
        self.writeback.load(Ordering::Acquire)
    }

    pub(super) fn set_writeback(&self, writeback: bool) {
        self.writeback.store(writeback, Ordering::Release);
    }
}

impl DeviceConfig for BlockConfig {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut bytes = self.bytes;
        if let Some(byte) = bytes.get_mut(WRITEBACK) {
            *byte = self.writeback().into();
        }
        read_at(&bytes, offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let ([value], true) = (data, offset == WRITEBACK as u64) {
            self.set_writeback(value & 1 != 0);
        }
    }
}

/// Copies what lies at `offset` of a configuration space, and no more.
fn read_at(space: &[u8], offset: u64, data: &mut [u8]) {
    let rest = usize::try_from(offset).ok().and_then(|offset| space.get(offset..));
    for (to, from) in data.iter_mut().zip(rest.unwrap_or_default()) {
        *to = *from;
    }
}

fn layout(disk: &dyn Disk, queues: u16, queue_size: u16, discards: bool) -> [u8; LEN] {
    let topology = disk.topology();
    let block = topology.logical_block.max(1);
    let in_blocks = |bytes: u32| bytes / block;
    let physical_exponent = in_blocks(topology.physical_block).max(1).ilog2() as u8;
    let min_io = u16::try_from(in_blocks(topology.min_io)).unwrap_or(u16::MAX);
    let alignment = (topology.discard_granularity / SECTOR as u32).max(1);
    let zeroes = !disk.read_only();
    let when = |condition: bool, value: u32| if condition { value } else { 0 };

    let mut space = [0; LEN];
    let mut put = |at: usize, field: &[u8]| {
        for (to, from) in space.iter_mut().skip(at).zip(field) {
            *to = *from;
        }
    };
    put(0, &(disk.size() / SECTOR).to_le_bytes());
    put(12, &u32::from(segments(queue_size)).to_le_bytes());
    put(20, &block.to_le_bytes());
    put(24, &[physical_exponent]);
    put(26, &min_io.to_le_bytes());
    put(28, &in_blocks(topology.opt_io).to_le_bytes());
    put(34, &queues.to_le_bytes());
    put(36, &when(discards, MAX_DISCARD_SECTORS).to_le_bytes());
    put(40, &when(discards, 1).to_le_bytes());
    put(44, &when(discards, alignment).to_le_bytes());
    put(48, &when(zeroes, MAX_ZERO_SECTORS).to_le_bytes());
    put(52, &when(zeroes, 1).to_le_bytes());
    put(56, &[u8::from(zeroes && discards)]);
    space
}
