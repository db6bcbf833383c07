//! virtio-rng: an entropy source (virtio 1.3, section 5.4).

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vmm_device_model::device::{Blocker, DeviceError, SaveState};
use vmm_device_model::dma::{DmaMemory, GuestRam};
use vmm_device_model::limiter::Limiter;
use vmm_device_model::metrics::{Counter, Family, Kind, Measures, Metered, Value};
use vmm_snapshot::RecordError;

use crate::chain::{self, Chain, RingError, Table, take_head, wants_interrupt};
use crate::device::{DeviceConfig, Start, StartQueue, VirtioDevice, VirtioInterrupt};
use crate::transport::{VIRTIO_F_EVENT_IDX, VIRTIO_F_VERSION_1};
use crate::worker::{Next, Task, Workers};

/// Where entropy comes from unless something else is asked for.
pub const DEFAULT_SOURCE: &str = "/dev/urandom";

const DEVICE_TYPE: u32 = 4;
const F_INDIRECT_DESC: u64 = 1 << 28;
const QUEUE_SIZE: u16 = 256;
/// Most bytes that one request gets.
const MAX_REQUEST: usize = 64 * 1024;
/// Requests served before the thread looks whether it is to stop.
const BATCH: usize = 64;
/// How long a source that has nothing now is left alone.
const PAUSE: Duration = Duration::from_millis(20);

/// Why an entropy source cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("cannot open entropy source {path:?}")]
pub struct RngError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// A virtio entropy source, which reads a file of the host.
#[derive(Debug)]
pub struct RngDevice {
    id: String,
    source: Arc<File>,
    limiter: Arc<Limiter>,
    given: Arc<Counter>,
    workers: Workers,
}

impl RngDevice {
    /// A device that is not started; `id` is what its thread is called.
    ///
    /// # Errors
    /// The source cannot be opened for reading.
    pub fn new(id: impl Into<String>, source: &Path) -> Result<Self, RngError> {
        // Neither opening nor reading may wait: a FIFO has no other end yet, a pool may be empty.
        let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(source);
        let failed = |e| RngError { path: source.to_owned(), source: e };
        let file = file.map_err(failed)?;
        if file.metadata().map_err(failed)?.is_dir() {
            return Err(failed(io::ErrorKind::IsADirectory.into()));
        }
        let (limiter, given, workers) = Default::default();
        Ok(Self { id: id.into(), source: Arc::new(file), limiter, given, workers })
    }
}

static RANDOM: Family = Family {
    name: "vmm_rng_bytes",
    help: "Random bytes that the guest got.",
    unit: "bytes",
    kind: Kind::Counter,
};

impl Metered for RngDevice {
    fn measure(&self, measures: &mut Measures) {
        measures.sample(&RANDOM, &[], Value::Counter(self.given.get()));
    }
}

impl VirtioDevice for RngDevice {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        VIRTIO_F_VERSION_1 | VIRTIO_F_EVENT_IDX | F_INDIRECT_DESC
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn config(&self) -> Arc<dyn DeviceConfig> {
        Arc::new(NoConfig)
    }

    fn start(&mut self, start: Start) -> Result<(), DeviceError> {
        let Start { memory, features: _, queues, interrupt } = start;
        for queue in queues {
            let (id, source) = (self.id.clone(), Arc::clone(&self.source));
            let limiter = Arc::clone(&self.limiter);
            let (memory, interrupt) = (memory.clone(), Arc::clone(&interrupt));
            let (chain, bytes) = (Chain::default(), vec![0; MAX_REQUEST]);
            let given = Arc::clone(&self.given);
            let task = RngTask { id, memory, queue, interrupt, source, limiter, given, chain, bytes };
            self.workers.spawn(&self.id, task)?;
        }
        Ok(())
    }

    fn stop_begin(&mut self) {
        self.workers.stop_begin();
    }

    fn stop_finish(&mut self, deadline: Instant) -> Result<Vec<Queue>, DeviceError> {
        self.workers.stop_finish(deadline)
    }

    fn reset(&mut self) {}

    fn blockers(&self) -> Vec<Blocker> {
        Vec::new()
    }
}

/// An empty configuration space.
struct NoConfig;

impl DeviceConfig for NoConfig {
    fn read(&self, _: u64, _: &mut [u8]) {}

    fn write(&self, _: u64, _: &[u8]) {}
}

struct RngTask {
    id: String,
    memory: DmaMemory,
    queue: StartQueue,
    interrupt: Arc<dyn VirtioInterrupt>,
    source: Arc<File>,
    limiter: Arc<Limiter>,
    given: Arc<Counter>,
    chain: Chain,
    bytes: Vec<u8>,
}

impl RngTask {
    /// Serves one request. Returns `None` if the source has nothing now.
    fn serve(&mut self, memory: &GuestRam, head: u16) -> Option<()> {
        let table = Table::of(&self.queue.queue, memory);
        let len = match self.chain.collect(&table, head, QUEUE_SIZE.into()) {
            Ok(()) => self.fill(memory)?,
            Err(error) => {
                self.warn(&error);
                0
            }
        };
        if let Err(error) = self.queue.queue.add_used(memory, head, len) {
            self.warn(&error);
        }
        Some(())
    }

    /// Fills the chain's buffers as far as a request goes. Returns how much; `None` for "not now".
    fn fill(&mut self, memory: &GuestRam) -> Option<u32> {
        let want = chain::len(&self.chain.writable).min(MAX_REQUEST as u64) as usize;
        let room = self.bytes.get_mut(..want).unwrap_or_default();
        let got = match (&*self.source).read(room) {
            Ok(0) if want > 0 => {
                self.warn(&"the source has ended");
                0
            }
            Ok(got) => got,
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                return None;
            }
            Err(error) => {
                self.warn(&error);
                0
            }
        };
        let bytes = self.bytes.get(..got).unwrap_or_default();
        match chain::write(memory, &self.chain.writable, bytes) {
            Ok(written) => {
                self.given.add(written as u64);
                // At most `MAX_REQUEST`.
                Some(written as u32)
            }
            Err(error) => {
                self.warn(&error);
                Some(0)
            }
        }
    }

    fn warn(&self, what: &dyn std::fmt::Display) {
        if let Some(admitted) = self.limiter.admit(Instant::now()) {
            log::warn!(device = self.id.as_str(); "the entropy source or its driver errs: {what}{admitted}");
        }
    }

    /// Serves what is there. Returns how to go on.
    fn serve_all(&mut self, memory: &GuestRam, news: &mut bool) -> Next {
        for _ in 0..BATCH {
            match take_head(&mut self.queue.queue, memory) {
                Ok(Some(head)) => {
                    if self.serve(memory, head).is_none() {
                        self.queue.queue.go_to_previous_position();
                        return Next::WaitAtMost(PAUSE);
                    }
                    *news = true;
                }
                Ok(None) => match self.queue.queue.enable_notification(memory) {
                    Ok(true) => return Next::Again,
                    _ => return Next::Wait,
                },
                Err(error @ RingError::Head) => self.warn(&error),
                Err(error @ RingError::Index) => {
                    self.warn(&error);
                    return Next::Wait;
                }
            }
        }
        Next::Again
    }
}

impl Task for RngTask {
    fn sources(&self) -> Vec<RawFd> {
        vec![self.queue.kick.as_raw_fd()]
    }

    fn wake(&mut self, _: usize) {
        drop(self.queue.kick.read());
    }

    fn work(&mut self, stopping: bool) -> Next {
        if stopping {
            return Next::Idle;
        }
        let memory = self.memory.view();
        let mut news = false;
        // Fails only if the rings are not in memory, which the next step finds, too.
        let _ = self.queue.queue.disable_notification(&*memory);
        let next = self.serve_all(&memory, &mut news);
        if news && wants_interrupt(&mut self.queue.queue, &memory) {
            self.interrupt.queue(self.queue.index);
        }
        next
    }

    fn into_queues(self) -> Vec<Queue> {
        vec![self.queue.queue]
    }
}

impl SaveState for RngDevice {
    type State = RngV1;

    fn save(&self) -> RngV1 {
        let Self { id: _, source: _, limiter: _, given: _, workers: _ } = self;
        RngV1 {}
    }

    fn restore(&mut self, RngV1 {}: RngV1) -> Result<(), RecordError> {
        Ok(())
    }
}

/// Saved state of an [`RngDevice`]: none of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, minicbor::Encode, minicbor::Decode)]
pub struct RngV1 {}

vmm_snapshot::schema!(RngV1: "virtio-rng" v1);
