//! One virtqueue of a disk, worked on by a thread of its own.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Instant;

use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, Permissions};
use vmm_device_model::dma::{DmaMemory, GuestRam};
use vmm_device_model::limiter::Limiter;
use vmm_disk_image::{Completion, Engine, Op, Request as Io};
use vmm_sys_util::eventfd::EventFd;

use super::config::{BlockConfig, F_CONFIG_WCE, F_FLUSH, segments};
use super::counters::{BlockCounters, QueueWatch};
use super::flight::{Flights, Kind, Request};
use super::memory::{BufferPool, prefetch};
use super::request::{Command, ID_LEN, Status, parse};
use crate::chain::{self, Chain, RingError, Span, Table, Used, take_heads};
use crate::device::VirtioInterrupt;
use crate::worker::{Next, Task};

/// Most requests that are begun in a round. What the page cache has is done at once, so a driver that keeps many in
/// flight prepares new ones while the next of the old are worked on.
const BATCH: usize = 16;
/// Rounds of work before the thread looks whether it is to stop.
const ROUNDS: usize = 64;
/// Looks at an empty queue before the thread sleeps; each gives the CPU to whoever wants it. A few microseconds,
/// which spare a busy driver its kick and the thread its wake-up.
const POLLS: usize = 16;
const KICK: usize = 0;

/// What all queues of a disk share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) id: String,
    pub(super) config: Arc<BlockConfig>,
    pub(super) counters: Arc<BlockCounters>,
    pub(super) serial: [u8; ID_LEN],
    /// The guest may give storage back.
    pub(super) discards: bool,
    pub(super) misuse: Limiter,
    pub(super) failure: Limiter,
    pub(super) breakage: Limiter,
}

impl Shared {
    fn misused(&self, what: &dyn std::fmt::Display) {
        if let Some(admitted) = self.misuse.admit(Instant::now()) {
            log::warn!(device = self.id.as_str(); "the disk's driver errs: {what}{admitted}");
        }
    }

    fn failed(&self, error: &std::io::Error) {
        if let Some(admitted) = self.failure.admit(Instant::now()) {
            log::warn!(device = self.id.as_str(); "I/O error: {error}{admitted}");
        }
    }
}

/// The driver's side of a queue.
#[derive(Debug)]
pub(super) struct Rings {
    pub(super) index: u16,
    pub(super) queue: Queue,
    pub(super) kick: EventFd,
    pub(super) interrupt: Arc<dyn VirtioInterrupt>,
}

/// One queue at work.
#[derive(Debug)]
pub(super) struct BlockQueue {
    shared: Arc<Shared>,
    watch: QueueWatch,
    memory: DmaMemory,
    features: u64,
    rings: Rings,
    /// `None` after it broke.
    engine: Option<Box<dyn Engine>>,
    flights: Flights,
    pool: BufferPool,
    heads: Vec<u16>,
    chain: Chain,
    completions: Vec<Completion>,
    used: Used,
}

impl BlockQueue {
    pub(super) fn new(
        shared: Arc<Shared>,
        memory: DmaMemory,
        features: u64,
        rings: Rings,
        engine: Box<dyn Engine>,
    ) -> Self {
        let flights = Flights::new(rings.queue.size());
        Self {
            watch: shared.counters.watch(rings.index),
            shared,
            memory,
            features,
            rings,
            engine: Some(engine),
            flights,
            pool: BufferPool::default(),
            heads: Vec::new(),
            chain: Chain::default(),
            completions: Vec::new(),
            used: Used::default(),
        }
    }

    /// Starts available requests as far as there is room. Returns how many.
    fn take(&mut self, memory: &Arc<GuestRam>) -> Result<usize, RingError> {
        // Fails only if the rings are not in memory, and then the next line tells.
        let _ = self.rings.queue.disable_notification(&**memory);
        let mut heads = std::mem::take(&mut self.heads);
        let most = self.flights.room().min(BATCH);
        let end = take_heads(&mut self.rings.queue, memory, most, &mut heads);
        let table = Table::of(&self.rings.queue, memory);
        let taken = heads.len();
        if taken > 0 {
            self.watch.look();
            // Headers have just been written by the driver's CPU: they come while others are looked at.
            for first in heads.iter().filter_map(|head| table.read(*head)) {
                prefetch(memory, first.addr());
            }
            for head in heads.drain(..) {
                self.begin(memory, &table, head);
            }
            self.kick(memory);
            self.watch.in_flight(self.flights.len());
        }
        self.heads = heads;
        match end {
            Ok(()) => Ok(taken),
            Err(error) => {
                self.shared.misused(&error);
                // An entry that was skipped is something done, too.
                if error == RingError::Head { Ok(taken.max(1)) } else { Err(error) }
            }
        }
    }

    fn begin(&mut self, memory: &Arc<GuestRam>, table: &Table<'_>, head: u16) {
        let limit = usize::from(segments(self.rings.queue.max_size())) + 2;
        if let Err(error) = self.chain.collect(table, head, limit) {
            self.shared.misused(&error);
            return self.used.add(head, 0);
        }
        let Some(status) = self.chain.take_last_byte() else {
            self.shared.misused(&"request without a status byte");
            return self.used.add(head, 0);
        };
        match parse(&mut self.chain, memory, self.features) {
            Ok(Command::GetId) => {
                let written = chain::write(memory, &self.chain.writable, &self.shared.serial);
                let len = written.as_ref().map_or(0, |len| *len as u32);
                let answer = if written.is_ok() { Status::Ok } else { Status::IoError };
                self.answer(memory, head, status, answer, len);
            }
            Ok(Command::WriteZeroes { offset, len, may_unmap }) => {
                // To unmap is a wish.
                let may_unmap = may_unmap && self.shared.discards;
                self.submit(memory, head, status, Command::WriteZeroes { offset, len, may_unmap });
            }
            Ok(command) => self.submit(memory, head, status, command),
            Err(answer) => self.answer(memory, head, status, answer, 0),
        }
    }

    fn submit(&mut self, memory: &Arc<GuestRam>, head: u16, status: GuestAddress, command: Command) {
        let fails = |queue: &mut Self| queue.answer(memory, head, status, Status::IoError, 0);
        let (kind, data, access) = match command {
            Command::Read { .. } => (Kind::Read, &mut self.chain.writable, Permissions::Write),
            Command::Write { .. } => (Kind::Write, &mut self.chain.readable, Permissions::Read),
            Command::WriteZeroes { .. } => (Kind::Zeroes, &mut self.chain.writable, Permissions::No),
            _ => (Kind::Other, &mut self.chain.writable, Permissions::No),
        };
        let (Some(engine), Some(op)) =
            (&mut self.engine, operation(command, &mut self.pool, memory, data, access))
        else {
            return fails(self);
        };
        let mut spans = self.flights.list();
        if kind == Kind::Read {
            std::mem::swap(&mut spans, data);
        }
        // `take` saw that there is room.
        let request = Request { head, status, kind, spans, taken: self.watch.now() };
        let Some(token) = self.flights.add(request) else { return fails(self) };
        if let Err(rejected) = engine.submit(Io { token, op }) {
            self.shared.misused(&rejected.reason);
            if let Op::Read { buffers, .. } | Op::Write { buffers, .. } = rejected.request.op {
                self.pool.give_back(buffers);
            }
            self.flights.remove(token);
            fails(self);
        }
    }

    /// Answers what the engine has done. Returns how many completions there were.
    fn reap(&mut self, memory: &Arc<GuestRam>) -> usize {
        if self.flights.is_empty() {
            return 0;
        }
        let mut completions = std::mem::take(&mut self.completions);
        let reaped = match &mut self.engine {
            Some(engine) => engine.reap(&mut completions),
            None => Ok(()),
        };
        let count = completions.len();
        if count > 0 {
            self.watch.look();
            // Before the driver can see that they are done.
            self.watch.in_flight(self.flights.len().saturating_sub(count));
        }
        let mut settling = false;
        for Completion { token, result, buffers } in completions.drain(..) {
            self.pool_back(buffers);
            if let Some(request) = self.flights.remove(token) {
                settling |= self.finish(memory, request, result);
            }
        }
        self.completions = completions;
        match reaped {
            Err(error) => self.give_up(memory, &error),
            Ok(()) if settling => {
                self.kick(memory);
                self.watch.in_flight(self.flights.len());
            }
            Ok(()) => {}
        }
        count
    }

    /// Returns whether the request goes on.
    fn finish(&mut self, memory: &GuestRam, request: Request, result: std::io::Result<u32>) -> bool {
        let Request { head, status, kind, spans, taken } = request;
        if kind == Kind::Read {
            // Of a read that failed, too: part of it may be there.
            spans.iter().for_each(|span| self.used.wrote(*span));
        }
        let settling = match (&result, kind) {
            (Ok(len), Kind::Write) if !self.writeback() => Some(Kind::Settling(*len)),
            (Ok(_), Kind::Zeroes) if !self.writeback() => Some(Kind::Other),
            _ => None,
        };
        if let Some(kind) = settling {
            return self.settle(memory, Request { head, status, kind, spans, taken });
        }
        self.flights.recycle(spans);
        match (&result, kind) {
            (Ok(len), Kind::Read) => self.watch.read(*len, taken),
            (Ok(len), Kind::Write) => self.watch.written(*len, taken),
            (Ok(_), Kind::Settling(len)) => self.watch.written(len, taken),
            (Ok(_), Kind::Zeroes | Kind::Other) => {}
            (Err(error), _) => {
                self.watch.failed();
                self.shared.failed(error);
            }
        }
        match (result, kind) {
            (Ok(len), Kind::Read) => self.answer(memory, head, status, Status::Ok, len),
            (Ok(_), _) => self.answer(memory, head, status, Status::Ok, 0),
            (Err(_), _) => self.answer(memory, head, status, Status::IoError, 0),
        }
        false
    }

    /// Whether writes may be answered before they are durable (virtio 1.3, section 5.2.5.2).
    fn writeback(&self) -> bool {
        if self.features & F_CONFIG_WCE != 0 {
            self.shared.config.writeback()
        } else {
            self.features & F_FLUSH != 0
        }
    }

    /// Makes what `request` wrote durable before it is answered. Returns whether that is under way.
    fn settle(&mut self, memory: &GuestRam, request: Request) -> bool {
        let (head, status) = (request.head, request.status);
        let token = self.flights.add(request);
        if let (Some(engine), Some(token)) = (&mut self.engine, token) {
            // The write has just left its place in the engine.
            if engine.submit(Io { token, op: Op::Flush }).is_ok() {
                return true;
            }
            self.flights.remove(token);
        }
        self.answer(memory, head, status, Status::IoError, 0);
        false
    }

    fn pool_back(&mut self, buffers: Option<vmm_disk_image::Buffers>) {
        if let Some(buffers) = buffers {
            self.pool.give_back(buffers);
        }
    }

    fn kick(&mut self, memory: &GuestRam) {
        if let Some(Err(error)) = self.engine.as_mut().map(|engine| engine.kick()) {
            self.give_up(memory, &error);
        }
    }

    /// The engine broke: from now on every request fails.
    fn give_up(&mut self, memory: &GuestRam, error: &std::io::Error) {
        // A driver that resets the device may see it break again and again.
        if let Some(admitted) = self.shared.breakage.admit(Instant::now()) {
            let (id, queue) = (self.shared.id.as_str(), self.rings.index);
            log::error!(device = id, queue = queue; "the engine broke: {error}{admitted}");
        }
        // Waits until the kernel has let go of guest memory.
        self.engine = None;
        self.watch.in_flight(0);
        while let Some(Request { head, status, spans, .. }) = self.flights.remove_any() {
            spans.iter().for_each(|span| self.used.wrote(*span));
            self.watch.failed();
            self.answer(memory, head, status, Status::IoError, 0);
        }
    }

    /// Writes the status byte and gives the chain back; `len` is what was written besides.
    fn answer(&mut self, memory: &GuestRam, head: u16, status: GuestAddress, answer: Status, len: u32) {
        match self.used.write_byte(memory, status, answer as u8) {
            Ok(()) => self.used.add(head, len.saturating_add(1)),
            Err(error) => {
                self.shared.misused(&error);
                self.used.add(head, 0);
            }
        }
    }

    fn publish(&mut self, memory: &GuestRam) {
        if let Err(error) = self.used.publish(&mut self.rings.queue, memory) {
            self.shared.misused(&error);
        }
    }

    fn interrupt(&mut self, memory: &GuestRam) {
        if self.used.wants_interrupt(&self.rings.queue, memory) {
            self.rings.interrupt.queue(self.rings.index);
        }
    }

    /// Rounds of work until there is nothing to do, or other things want to be looked at.
    fn rounds(&mut self, stopping: bool) -> Next {
        let memory = self.memory.view().into_inner();
        // How often in a row there was nothing to do.
        let mut idle = 0;
        for _ in 0..ROUNDS {
            let reaped = self.reap(&memory);
            // Before what is new is begun, which may take its time.
            self.publish(&memory);
            let taken = if stopping { Ok(0) } else { self.take(&memory) };
            self.publish(&memory);
            self.interrupt(&memory);
            match taken {
                _ if reaped > 0 => idle = 0,
                Ok(0) if stopping => return if self.flights.is_empty() { Next::Idle } else { Next::Wait },
                Ok(0) if self.flights.room() == 0 => return Next::Wait,
                // The driver has just been answered, and is likely to come back before a sleep is worth it.
                Ok(0) if idle < POLLS && self.flights.is_empty() => {
                    idle += 1;
                    std::thread::yield_now();
                }
                Ok(0) => match self.rings.queue.enable_notification(&*memory) {
                    Ok(true) if idle <= POLLS => idle = POLLS + 1,
                    _ => return Next::Wait,
                },
                Ok(_) => idle = 0,
                // The driver's next kick may come with sense.
                Err(_) => return Next::Wait,
            }
        }
        Next::Again
    }

    /// See [`Engine::announce`].
    fn announce(&mut self, on: bool) -> bool {
        self.engine.as_mut().is_some_and(|engine| engine.announce(on))
    }
}

/// The engine's operation; `None` if the data is not in guest memory.
fn operation(
    command: Command,
    pool: &mut BufferPool,
    memory: &Arc<GuestRam>,
    data: &[Span],
    access: Permissions,
) -> Option<Op> {
    match command {
        Command::Read { offset } => {
            pool.resolve(memory, data, access).map(|buffers| Op::Read { offset, buffers })
        }
        Command::Write { offset } => {
            pool.resolve(memory, data, access).map(|buffers| Op::Write { offset, buffers })
        }
        Command::Flush => Some(Op::Flush),
        Command::Discard { offset, len } => Some(Op::Discard { offset, len }),
        Command::WriteZeroes { offset, len, may_unmap } => Some(Op::WriteZeroes { offset, len, may_unmap }),
        // Needs no engine.
        Command::GetId => None,
    }
}

impl Task for BlockQueue {
    fn sources(&self) -> Vec<RawFd> {
        // The first is `KICK`.
        let completion = self.engine.iter().map(|engine| engine.completion_fd().as_raw_fd());
        std::iter::once(self.rings.kick.as_raw_fd()).chain(completion).collect()
    }

    fn wake(&mut self, source: usize) {
        // `reap` takes the signal of completions.
        if source == KICK {
            drop(self.rings.kick.read());
        }
    }

    fn work(&mut self, stopping: bool) -> Next {
        // As long as it works it looks by itself.
        self.announce(false);
        let next = self.rounds(stopping);
        self.pool.let_go();
        match next {
            Next::Wait if self.announce(true) => Next::Again,
            next => next,
        }
    }

    fn into_queues(self) -> Vec<Queue> {
        vec![self.rings.queue]
    }
}
