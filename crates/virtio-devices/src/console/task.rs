//! The console's thread.

use std::io::{ErrorKind, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use virtio_queue::{Queue, QueueT};
use vmm_device_model::dma::{DmaMemory, GuestRam};
use vmm_device_model::limiter::Limiter;
use vmm_device_model::metrics::ConsoleCounter;

use super::QUEUE_SIZE;
use super::input::ConsoleInput;
use crate::chain::{self, Chain, RingError, Span, Table, take_head, wants_interrupt};
use crate::device::{StartQueue, VirtioInterrupt};
use crate::worker::{Next, Task};

/// Queue numbers (virtio 1.3, section 5.3.2).
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
/// Chains handled before the thread looks whether it is to stop.
const BATCH: usize = 64;
/// Bytes copied at a time.
const PIECE: usize = 4096;
/// Most bytes taken from one chain; drivers send a page or so.
const MAX_TRANSMIT: u64 = 1 << 20;

/// Where output goes.
pub(super) type Output = Arc<Mutex<Box<dyn Write + Send>>>;

pub(super) struct ConsoleTask {
    pub(super) id: String,
    pub(super) memory: DmaMemory,
    pub(super) queues: Vec<StartQueue>,
    pub(super) interrupt: Arc<dyn VirtioInterrupt>,
    pub(super) input: ConsoleInput,
    pub(super) output: Output,
    pub(super) limiter: Arc<Limiter>,
    pub(super) counts: Arc<ConsoleCounter>,
    pub(super) chain: Chain,
}

impl ConsoleTask {
    /// One queue's turn: handles chains until there is nothing to do. Returns how to go on.
    fn turn(&mut self, at: usize, memory: &GuestRam) -> Next {
        let mut news = false;
        let next = self.handle_chains(at, memory, &mut news);
        if let Some(StartQueue { index, queue, .. }) = self.queues.get_mut(at)
            && news
            && wants_interrupt(queue, memory)
        {
            self.interrupt.queue(*index);
        }
        next
    }

    fn handle_chains(&mut self, at: usize, memory: &GuestRam, news: &mut bool) -> Next {
        for _ in 0..BATCH {
            let Some(StartQueue { index, queue, .. }) = self.queues.get_mut(at) else { return Next::Wait };
            let index = *index;
            let receives = index == RECEIVE;
            if receives && self.input.is_empty() {
                // Buffers are not news; what is typed wakes the thread.
                return Next::Wait;
            }
            match take_head(queue, memory) {
                Ok(Some(head)) => {
                    let table = Table::of(queue, memory);
                    let len = self.handle(index, memory, &table, head);
                    let used = self.queues.get_mut(at).map(|q| q.queue.add_used(memory, head, len));
                    if let Some(Err(error)) = used {
                        self.warn(&error);
                    }
                    *news = true;
                }
                Ok(None) => match queue.enable_notification(memory) {
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

    /// Returns how much was written to the chain.
    fn handle(&mut self, index: u16, memory: &GuestRam, table: &Table<'_>, head: u16) -> u32 {
        if let Err(error) = self.chain.collect(table, head, QUEUE_SIZE.into()) {
            self.warn(&error);
            return 0;
        }
        match index {
            RECEIVE => self.receive(memory),
            TRANSMIT => {
                self.transmit(memory);
                0
            }
            _ => 0,
        }
    }

    /// Gives what was typed to the driver. Returns how much.
    fn receive(&self, memory: &GuestRam) -> u32 {
        let mut piece = [0; PIECE];
        let want = chain::len(&self.chain.writable).min(PIECE as u64) as usize;
        // Taken out of the ring only when it is in guest memory.
        let count = self.input.peek(piece.get_mut(..want).unwrap_or_default());
        match chain::write(memory, &self.chain.writable, piece.get(..count).unwrap_or_default()) {
            Ok(written) => {
                self.input.forget(written);
                self.counts.input.add(written as u64);
                // At most `PIECE`.
                written as u32
            }
            Err(error) => {
                self.warn(&error);
                0
            }
        }
    }

    fn transmit(&self, memory: &GuestRam) {
        if chain::len(&self.chain.readable) > MAX_TRANSMIT {
            self.warn(&"more output at once than a driver sends; the rest is lost");
        }
        let mut left = MAX_TRANSMIT;
        let mut piece = [0; PIECE];
        for span in &self.chain.readable {
            let mut at = *span;
            while at.len > 0 && left > 0 {
                let count = left.min(PIECE as u64).min(at.len.into()) as usize;
                let Some(bytes) = piece.get_mut(..count) else { return };
                if let Err(error) = chain::read(memory, &[Span { len: count as u32, ..at }], bytes) {
                    return self.warn(&error);
                }
                self.put(bytes);
                self.counts.output.add(bytes.len() as u64);
                left -= count as u64;
                at.len -= count as u32;
                // It was read, so it does not wrap.
                at.address.0 = at.address.0.wrapping_add(count as u64);
            }
        }
    }

    /// Hands bytes to the output, which takes what it can and loses the rest.
    fn put(&self, mut bytes: &[u8]) {
        let mut output = self.output.lock().unwrap_or_else(PoisonError::into_inner);
        while !bytes.is_empty() {
            match output.write(bytes) {
                Ok(0) => return,
                Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) => return self.warn(&error),
            }
        }
        // What cannot be flushed now goes with the next bytes.
        drop(output.flush());
    }

    fn warn(&self, what: &dyn std::fmt::Display) {
        if let Some(admitted) = self.limiter.admit(Instant::now()) {
            log::warn!(device = self.id.as_str(); "the console or its driver errs: {what}{admitted}");
        }
    }
}

impl Task for ConsoleTask {
    fn sources(&self) -> Vec<RawFd> {
        // Kicks first, as in `wake`.
        let kicks = self.queues.iter().map(|queue| queue.kick.as_raw_fd());
        kicks.chain([self.input.event().as_raw_fd()]).collect()
    }

    fn wake(&mut self, source: usize) {
        match self.queues.get(source) {
            Some(queue) => drop(queue.kick.read()),
            None => drop(self.input.event().read()),
        }
    }

    fn work(&mut self, stopping: bool) -> Next {
        if stopping {
            return Next::Idle;
        }
        let memory = self.memory.view();
        let mut next = Next::Wait;
        for at in 0..self.queues.len() {
            if self.turn(at, &memory) == Next::Again {
                next = Next::Again;
            }
        }
        next
    }

    fn into_queues(self) -> Vec<Queue> {
        self.queues.into_iter().map(|queue| queue.queue).collect()
    }
}
