//! virtio-blk: a disk (virtio 1.3, section 5.2).
//!
//! Each virtqueue has a thread and an I/O engine of its own. Data goes between the image and guest memory
//! without a copy of ours; what a request says is read once, into memory of ours, before it is believed.
//! A request in flight is known by a token of ours, and its buffers belong to the engine until it has ended.

mod config;
mod counters;
mod flight;
mod memory;
mod queue;
mod request;

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use virtio_queue::{Queue, QueueT};
use vmm_device_model::device::{Blocker, DeviceError, SaveState};
use vmm_device_model::limiter::Limiter;
use vmm_device_model::metrics::{Measures, Metered};
use vmm_disk_image::{Disk, EngineKind};
use vmm_snapshot::RecordError;

use config::{BlockConfig, SECTOR, features};
pub use counters::{BlockCounters, BlockCounts};
use queue::{BlockQueue, Rings, Shared};
use request::ID_LEN;

use crate::device::{DeviceConfig, Start, StartQueue, VirtioDevice};
use crate::worker::Workers;

const DEVICE_TYPE: u32 = 2;

/// What a disk is made of.
#[derive(Debug)]
pub struct BlockOptions {
    /// Device id; its threads are called `<id>_q<queue>`.
    pub id: String,
    /// The open image.
    pub disk: Arc<dyn Disk>,
    /// How many virtqueues, at least 1.
    pub queues: u16,
    /// Size of each virtqueue in descriptors: a power of two up to 32,768.
    pub queue_size: u16,
    /// How I/O is done.
    pub engine: EngineKind,
    /// Serial number, of which the guest sees the first 20 bytes; the id if there is none.
    pub serial: Option<String>,
    /// Whether the guest may give storage back to the host, by discards and zeroes.
    pub sparse: bool,
}

/// Why a disk cannot be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BlockError {
    /// A disk without a queue.
    #[error("disk {id}: the number of queues is 0")]
    NoQueues {
        /// Device id.
        id: String,
    },
    /// A size that no virtqueue has.
    #[error("disk {id}: queue size {size} is not a power of two up to 32768")]
    QueueSize {
        /// Device id.
        id: String,
        /// The size asked for.
        size: u16,
    },
}

/// A virtio disk.
pub struct BlockDevice {
    shared: Arc<Shared>,
    disk: Arc<dyn Disk>,
    queues: u16,
    queue_size: u16,
    engine: EngineKind,
    workers: Workers,
}

impl BlockDevice {
    /// A disk that is not started.
    ///
    /// # Errors
    /// The virtqueues are impossible.
    pub fn new(options: BlockOptions) -> Result<Self, BlockError> {
        let BlockOptions { id, disk, queues, queue_size, engine, serial, sparse } = options;
        if queues == 0 {
            return Err(BlockError::NoQueues { id });
        }
        if !queue_size.is_power_of_two() {
            return Err(BlockError::QueueSize { id, size: queue_size });
        }
        let discards = sparse && disk.supports_discard();
        let shared = Shared {
            serial: serial_bytes(serial.as_ref().unwrap_or(&id)),
            id,
            config: Arc::new(BlockConfig::new(&*disk, queues, queue_size, discards)),
            counters: Arc::new(BlockCounters::new(queues)),
            discards,
            misuse: Limiter::for_guest(),
            failure: Limiter::for_guest(),
            breakage: Limiter::for_guest(),
        };
        let workers = Workers::default();
        Ok(Self { shared: Arc::new(shared), disk, queues, queue_size, engine, workers })
    }

    /// The counts, for whoever reports them while the device runs.
    pub fn counters(&self) -> Arc<BlockCounters> {
        Arc::clone(&self.shared.counters)
    }

    fn start_queue(
        &self,
        start: &Start,
        queue: StartQueue,
        workers: &mut Workers,
    ) -> Result<(), DeviceError> {
        let StartQueue { index, queue, kick } = queue;
        let id = &self.shared.id;
        let engine = self.disk.engine(self.engine, queue.size());
        let engine = engine.map_err(|e| {
            DeviceError::caused(format!("disk {id}: cannot make an engine for queue {index}"), e)
        })?;
        let rings = Rings { index, queue, kick, interrupt: Arc::clone(&start.interrupt) };
        let shared = Arc::clone(&self.shared);
        let task = BlockQueue::new(shared, start.memory.clone(), start.features, rings, engine);
        workers.spawn(&format!("{id}_q{index}"), task)
    }
}

impl Metered for BlockDevice {
    fn measure(&self, measures: &mut Measures) {
        self.shared.counters.measure(measures);
    }
}

impl VirtioDevice for BlockDevice {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        features(&*self.disk, self.queues, self.shared.discards)
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![self.queue_size; usize::from(self.queues)]
    }

    fn config(&self) -> Arc<dyn DeviceConfig> {
        Arc::clone(&self.shared.config) as _
    }

    fn start(&mut self, mut start: Start) -> Result<(), DeviceError> {
        // If one queue fails, dropping the others' threads stops them.
        let mut workers = Workers::default();
        for queue in std::mem::take(&mut start.queues) {
            self.start_queue(&start, queue, &mut workers)?;
        }
        self.workers = workers;
        Ok(())
    }

    fn stop_begin(&mut self) {
        self.workers.stop_begin();
    }

    fn stop_finish(&mut self, deadline: Instant) -> Result<Vec<Queue>, DeviceError> {
        self.workers.stop_finish(deadline)
    }

    fn reset(&mut self) {
        self.shared.config.set_writeback(true);
    }

    fn blockers(&self) -> Vec<Blocker> {
        Vec::new()
    }
}

impl SaveState for BlockDevice {
    type State = BlockV1;

    fn save(&self) -> BlockV1 {
        let Self { shared, disk, queues: _, queue_size: _, engine: _, workers: _ } = self;
        let Shared { id: _, config, counters: _, serial, discards: _, misuse: _, failure: _, breakage: _ } =
            &**shared;
        BlockV1 {
            writeback: config.writeback(),
            sectors: disk.size() / SECTOR,
            logical_block: disk.topology().logical_block,
            serial: serial.to_vec(),
        }
    }

    fn restore(&mut self, state: BlockV1) -> Result<(), RecordError> {
        let BlockV1 { writeback, sectors, logical_block, serial } = state;
        let here = self.save();
        let differs = |what: &str, was: &dyn fmt::Display, is: &dyn fmt::Display| {
            let id = &self.shared.id;
            RecordError::invalid::<BlockV1>(format!("disk {id}: {what} was {was} and is {is}: another disk"))
        };
        if sectors != here.sectors {
            return Err(differs("size in sectors", &sectors, &here.sectors));
        }
        if logical_block != here.logical_block {
            return Err(differs("block size", &logical_block, &here.logical_block));
        }
        if serial != here.serial {
            let text = |serial: &[u8]| format!("{:?}", String::from_utf8_lossy(serial));
            return Err(differs("serial number", &text(&serial), &text(&here.serial)));
        }
        self.shared.config.set_writeback(writeback);
        Ok(())
    }
}

impl fmt::Debug for BlockDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlockDevice")
            .field("id", &self.shared.id)
            .field("disk", &self.disk)
            .field("queues", &self.queues)
            .finish_non_exhaustive()
    }
}

/// Saved state of a [`BlockDevice`]: what the driver set, and by which the disk is known again.
#[derive(Debug, Clone, PartialEq, Eq, minicbor::Encode, minicbor::Decode)]
pub struct BlockV1 {
    /// Cache mode in the configuration space.
    #[n(0)]
    pub writeback: bool,
    /// Size in sectors of 512 bytes.
    #[n(1)]
    pub sectors: u64,
    /// Logical block size in bytes.
    #[n(2)]
    pub logical_block: u32,
    /// Serial number as the guest sees it, 20 bytes.
    #[cbor(n(3), with = "minicbor::bytes")]
    pub serial: Vec<u8>,
}

vmm_snapshot::schema!(BlockV1: "virtio-blk" v1);

/// As much of a serial number as there is room for.
fn serial_bytes(serial: &str) -> [u8; ID_LEN] {
    let mut bytes = [0; ID_LEN];
    for (to, from) in bytes.iter_mut().zip(serial.bytes()) {
        *to = from;
    }
    bytes
}
