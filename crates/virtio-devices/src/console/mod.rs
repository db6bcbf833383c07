//! virtio-console: one port (virtio 1.3, section 5.3).
//!
//! Output goes to a writer that does not block: what it does not take is lost, for a guest must neither stall
//! nor fill the host's memory. Input waits in a bounded ring until the driver has buffers for it.

mod input;
mod task;

use std::fmt;
use std::io::{self, Write};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use virtio_queue::Queue;
use vmm_device_model::device::{Blocker, DeviceError, SaveState};
use vmm_device_model::limiter::Limiter;
use vmm_device_model::metrics::{ConsoleCounter, Measures, Metered};
use vmm_snapshot::RecordError;

pub use input::ConsoleInput;
use input::INPUT_CAPACITY;
use task::{ConsoleTask, Output};

use crate::chain::Chain;
use crate::device::{DeviceConfig, Start, VirtioDevice};
use crate::transport::{VIRTIO_F_EVENT_IDX, VIRTIO_F_VERSION_1};
use crate::worker::Workers;

const DEVICE_TYPE: u32 = 3;
const F_SIZE: u64 = 1;
const F_INDIRECT_DESC: u64 = 1 << 28;
const QUEUE_SIZE: u16 = 256;

/// A virtio console with one port.
pub struct ConsoleDevice {
    id: String,
    input: ConsoleInput,
    output: Output,
    limiter: Arc<Limiter>,
    counts: Arc<ConsoleCounter>,
    workers: Workers,
}

impl ConsoleDevice {
    /// A console that is not started; `id` is what its thread is called. `output` must not block: it takes
    /// what it can, or says [`WouldBlock`](io::ErrorKind::WouldBlock).
    ///
    /// # Errors
    /// No descriptor could be had.
    pub fn new(id: impl Into<String>, output: Box<dyn Write + Send>, size: (u16, u16)) -> io::Result<Self> {
        let (columns, rows) = size;
        Ok(Self {
            id: id.into(),
            input: ConsoleInput::new(columns, rows)?,
            output: Arc::new(Mutex::new(output)),
            limiter: Arc::default(),
            counts: Arc::default(),
            workers: Workers::default(),
        })
    }

    /// The host's handle, for who reads the keyboard.
    pub fn input(&self) -> ConsoleInput {
        self.input.clone()
    }

    /// Has `tell` called when input is taken again after [`ConsoleInput::enqueue`] took less than it was given.
    /// It is called by the console's thread or the device's owner, and must not block. Only the first call counts.
    pub fn on_room(&self, tell: Box<dyn Fn() + Send + Sync>) {
        self.input.on_room(tell);
    }
}

impl Metered for ConsoleDevice {
    fn measure(&self, measures: &mut Measures) {
        self.counts.measure(measures);
    }
}

impl VirtioDevice for ConsoleDevice {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        VIRTIO_F_VERSION_1 | VIRTIO_F_EVENT_IDX | F_INDIRECT_DESC | F_SIZE
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 2]
    }

    fn config(&self) -> Arc<dyn DeviceConfig> {
        Arc::new(self.input.clone())
    }

    fn start(&mut self, start: Start) -> Result<(), DeviceError> {
        let Start { memory, features, queues, interrupt } = start;
        let task = ConsoleTask {
            id: self.id.clone(),
            memory,
            queues,
            interrupt: Arc::clone(&interrupt),
            input: self.input.clone(),
            output: Arc::clone(&self.output),
            limiter: Arc::clone(&self.limiter),
            counts: Arc::clone(&self.counts),
            chain: Chain::default(),
        };
        self.workers.spawn(&self.id, task)?;
        if features & F_SIZE != 0 {
            self.input.attach(interrupt);
        }
        Ok(())
    }

    fn stop_begin(&mut self) {
        self.input.detach();
        self.workers.stop_begin();
    }

    fn stop_finish(&mut self, deadline: Instant) -> Result<Vec<Queue>, DeviceError> {
        self.workers.stop_finish(deadline)
    }

    /// What was typed and the window's size are the host's, and stay.
    fn reset(&mut self) {}

    fn blockers(&self) -> Vec<Blocker> {
        Vec::new()
    }
}

impl SaveState for ConsoleDevice {
    type State = ConsoleV1;

    fn save(&self) -> ConsoleV1 {
        let Self { id: _, input, output: _, limiter: _, counts: _, workers: _ } = self;
        let (columns, rows) = input.size();
        ConsoleV1 { columns, rows, typed: input.save() }
    }

    fn restore(&mut self, state: ConsoleV1) -> Result<(), RecordError> {
        let ConsoleV1 { columns, rows, typed } = state;
        if typed.len() > INPUT_CAPACITY {
            let what = format!("{} bytes of input, at most {INPUT_CAPACITY} are kept", typed.len());
            return Err(RecordError::invalid::<ConsoleV1>(what));
        }
        self.input.restore(columns, rows, typed);
        Ok(())
    }
}

impl fmt::Debug for ConsoleDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConsoleDevice")
            .field("id", &self.id)
            .field("input", &self.input)
            .finish_non_exhaustive()
    }
}

/// Saved state of a [`ConsoleDevice`].
#[derive(Debug, Clone, PartialEq, Eq, minicbor::Encode, minicbor::Decode)]
pub struct ConsoleV1 {
    /// Columns of the window.
    #[n(0)]
    pub columns: u16,
    /// Its rows.
    #[n(1)]
    pub rows: u16,
    /// What was typed and has not reached the driver, at most 64 KiB.
    #[cbor(n(2), with = "minicbor::bytes")]
    pub typed: Vec<u8>,
}

vmm_snapshot::schema!(ConsoleV1: "virtio-console" v1);
