//! Guest memory that is filled from a snapshot while its guest runs: shared memory, which cannot be a private mapping of the
//! snapshot's files.
//!
//! One thread goes through the snapshot from its start to its end; another one serves who touches what is not there yet, and
//! comes first. Memory goes in by chunks, each verified. Pages that are zero are made when they are touched; after the end the
//! host makes them, as always.
//!
//! What cannot be read is lost: the guest cannot go on, and who waits for it waits for ever, or until nothing is filled any
//! more. Who waits then gets zeroes, which are for nobody who goes on.

use std::fmt;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use vmm_device_model::dma::GuestRam;
use vmm_snapshot::directory::{CHUNK, Chain, ReadError};

use crate::restore::RestoreError;
use crate::userfault::{Fault, FaultKind, Features, Mode, Userfault, UserfaultError};

/// How long a thread that fills is waited for at the end: it may read a file that does not answer.
const JOIN: Duration = Duration::from_secs(2);

/// What a thread does.
pub type FillWork = Box<dyn FnOnce() + Send>;

/// What guest memory is filled behind the guest by.
pub struct Behind<'a> {
    /// The snapshot.
    pub chain: Arc<Chain>,
    /// Starts a thread.
    pub start: &'a dyn Fn(FillWork) -> io::Result<JoinHandle<()>>,
    /// Is told what cannot be read once the guest [is there](crate::map::MemoryMap::settle); it had better not return.
    pub lost: Arc<dyn Fn(&FillError) + Send + Sync>,
}

impl fmt::Debug for Behind<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Behind").finish_non_exhaustive()
    }
}

/// Memory that is being filled.
pub(crate) struct Filling {
    userfault: Userfault,
    chain: Arc<Chain>,
    state: Mutex<State>,
    /// Told whenever a chunk is done, and at the end.
    moved: Condvar,
    /// Readable once it is over.
    over: OwnedFd,
    lost: Arc<dyn Fn(&FillError) + Send + Sync>,
}

#[derive(Debug)]
struct State {
    /// Of each region its chunks; none of what is not filled here.
    chunks: Vec<Vec<Step>>,
    /// Somebody waits for a page.
    urgent: bool,
    stage: Stage,
    /// What went wrong while the guest was not there.
    failure: Option<FillError>,
    /// Threads that have not ended.
    working: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Todo,
    /// A thread reads it.
    Busy,
    Done,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Before the guest is there.
    Quiet,
    /// With the guest.
    Live,
    /// Nothing is filled any more.
    Over,
}

/// One of the threads, until it has ended.
struct Worker(Arc<Filling>);

impl Worker {
    fn new(filling: &Arc<Filling>) -> Self {
        filling.lock().working += 1;
        Self(Arc::clone(filling))
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.0.lock().working -= 1;
        self.0.moved.notify_all();
    }
}

/// The threads that fill memory. Dropped, they end, and what is missing is zero. One that is stuck is left behind.
#[derive(Debug)]
pub(crate) struct FillThreads {
    filling: Arc<Filling>,
    threads: Vec<JoinHandle<()>>,
}

impl Filling {
    /// Watches the regions that are filled `later`; nothing is in them yet.
    pub(crate) fn new(memory: Arc<GuestRam>, later: &[bool], behind: &Behind<'_>) -> Result<Self, FillError> {
        let userfault = Userfault::new(memory, Features::MISSING_SHARED)?;
        let mut chunks = Vec::new();
        for (number, (region, later)) in behind.chain.regions().iter().zip(later).enumerate() {
            let count = if *later { region.size.div_ceil(CHUNK) } else { 0 };
            if *later {
                userfault.register(number, Mode::Missing)?;
            }
            chunks.push(vec![Step::Todo; usize::try_from(count).unwrap_or(0)]);
        }
        let state = State { chunks, urgent: false, stage: Stage::Quiet, failure: None, working: 0 };
        Ok(Self {
            userfault,
            chain: Arc::clone(&behind.chain),
            state: Mutex::new(state),
            moved: Condvar::new(),
            over: eventfd(0, EventfdFlags::CLOEXEC).map_err(|error| FillError::Bell(error.into()))?,
            lost: Arc::clone(&behind.lost),
        })
    }

    pub(crate) fn is_over(&self) -> bool {
        self.lock().stage == Stage::Over
    }

    /// Somebody waits for a page that is being read.
    pub(crate) fn is_awaited(&self) -> bool {
        self.lock().urgent
    }

    /// The guest is there.
    pub(crate) fn settle(&self) -> Result<(), FillError> {
        let mut state = self.lock();
        if let Some(failure) = state.failure.take() {
            return Err(failure);
        }
        if state.stage == Stage::Quiet {
            state.stage = Stage::Live;
        }
        Ok(())
    }

    /// Serves who waits, until it is over.
    fn serve(&self) {
        let mut buffer = Vec::new();
        while !self.is_over() {
            let served = self.userfault.wait(&self.over).and_then(|()| self.userfault.faults());
            let served = served
                .map_err(FillError::Faults)
                .and_then(|faults| faults.iter().try_for_each(|fault| self.serve_one(fault, &mut buffer)));
            if let Err(error) = served {
                self.fail(error);
            }
        }
    }

    fn serve_one(&self, fault: &Fault, buffer: &mut Vec<u8>) -> Result<(), FillError> {
        let Fault { region, offset, kind: FaultKind::Missing } = *fault else { return Ok(()) };
        let unit = self.userfault.unit(region);
        self.lock().urgent = true;
        let filled = self.fill(region, offset / CHUNK, buffer);
        self.lock().urgent = false;
        self.moved.notify_all();
        if !filled? {
            return Ok(());
        }
        // A page of zeroes, or one that is there already.
        Ok(self.userfault.zero(region, offset..offset + unit)?)
    }

    /// Fills all that is not zero.
    fn fill_all(&self) {
        match self.fill_each() {
            Ok(()) => self.end(),
            Err(error) => self.fail(error),
        }
    }

    fn fill_each(&self) -> Result<(), FillError> {
        let (mut buffer, regions) = (Vec::new(), self.chain.regions().len());
        for region in 0..regions {
            let mut from = 0;
            while let Some(chunk) = self.chain.next_chunk(region, from) {
                let mut state = self.lock();
                while state.urgent && state.stage != Stage::Over {
                    state = self.moved.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
                drop(state);
                if !self.fill(region, chunk, &mut buffer)? {
                    break;
                }
                from = chunk + 1;
            }
        }
        Ok(())
    }

    /// Fills a chunk, unless that is done or nothing is filled any more; whether it is filled.
    fn fill(&self, region: usize, chunk: u64, buffer: &mut Vec<u8>) -> Result<bool, FillError> {
        let mut state = self.lock();
        loop {
            match (state.stage, state.step(region, chunk)) {
                (Stage::Over, _) | (_, None) => return Ok(false),
                (_, Some(Step::Done)) => return Ok(true),
                (_, Some(Step::Busy)) => {
                    state = self.moved.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
                (_, Some(step @ Step::Todo)) => {
                    *step = Step::Busy;
                    break;
                }
            }
        }
        drop(state);
        let filled = self.put(region, chunk, buffer);
        if let Some(step) = self.lock().step(region, chunk) {
            *step = if filled.is_ok() { Step::Done } else { Step::Todo };
        }
        self.moved.notify_all();
        filled.map(|()| true)
    }

    /// Reads a chunk, and puts its pages in that are not zero.
    fn put(&self, region: usize, chunk: u64, buffer: &mut Vec<u8>) -> Result<(), FillError> {
        self.chain.chunk(region, chunk, buffer)?;
        let unit = usize::try_from(self.userfault.unit(region)).unwrap_or(1);
        for run in used(buffer, unit) {
            let bytes = buffer.get(run.clone()).unwrap_or_default();
            self.userfault.copy(region, chunk * CHUNK + run.start as u64, bytes)?;
        }
        Ok(())
    }

    /// What cannot be had is lost.
    fn fail(&self, error: FillError) {
        let mut state = self.lock();
        match state.stage {
            Stage::Over => return,
            // Who makes the guest may be waiting, and has to end before it can be told.
            Stage::Quiet => state.failure = Some(error),
            Stage::Live => {
                drop(state);
                return (self.lost)(&error);
            }
        }
        drop(state);
        self.end();
    }

    /// Nothing is filled any more, and everybody goes on.
    pub(crate) fn end(&self) {
        let mut state = self.lock();
        if std::mem::replace(&mut state.stage, Stage::Over) == Stage::Over {
            return;
        }
        let regions: Vec<_> =
            state.chunks.iter().enumerate().filter(|(_, all)| !all.is_empty()).map(|(at, _)| at).collect();
        drop(state);
        self.userfault.let_go(regions);
        self.moved.notify_all();
        // It cannot be full.
        let _ = rustix::io::write(&self.over, &1_u64.to_ne_bytes());
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn step(&mut self, region: usize, chunk: u64) -> Option<&mut Step> {
        self.chunks.get_mut(region)?.get_mut(usize::try_from(chunk).ok()?)
    }
}

impl fmt::Debug for Filling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Filling").field("state", &self.state).finish_non_exhaustive()
    }
}

impl FillThreads {
    /// Begins to fill.
    pub(crate) fn start(filling: Filling, behind: &Behind<'_>) -> Result<Self, RestoreError> {
        let filling = Arc::new(filling);
        let mut all = Self { filling: Arc::clone(&filling), threads: Vec::new() };
        for work in [Filling::serve, Filling::fill_all] {
            let worker = Worker::new(&filling);
            let thread = (behind.start)(Box::new(move || work(&worker.0)));
            all.threads.push(thread.map_err(RestoreError::Threads)?);
        }
        Ok(all)
    }

    pub(crate) fn filling(&self) -> &Filling {
        &self.filling
    }
}

impl Drop for FillThreads {
    fn drop(&mut self) {
        self.filling.end();
        let is_working = |state: &mut State| state.working > 0;
        let waited = self.filling.moved.wait_timeout_while(self.filling.lock(), JOIN, is_working);
        if waited.unwrap_or_else(PoisonError::into_inner).1.timed_out() {
            // The memory stays mapped until it has ended.
            return log::warn!("a thread that fills guest memory is stuck in a read of the snapshot");
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// The runs of whole units in `bytes` that are not zero.
fn used(bytes: &[u8], unit: usize) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (number, page) in bytes.chunks(unit).enumerate() {
        let start = number * unit;
        if page.iter().all(|byte| *byte == 0) {
            continue;
        }
        match runs.last_mut() {
            Some(last) if last.end == start => last.end += page.len(),
            _ => runs.push(start..start + page.len()),
        }
    }
    runs
}

/// Guest memory that cannot be filled.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FillError {
    /// The snapshot cannot be read, or is damaged.
    #[error("cannot read guest memory from the snapshot")]
    Read(#[from] ReadError),
    /// The host has no memory, or does not handle faults of it.
    #[error("cannot fill guest memory")]
    Userfault(#[from] UserfaultError),
    /// Nobody can be served.
    #[error("cannot tell who waits for guest memory")]
    Faults(#[source] io::Error),
    /// Nobody could tell the thread that serves faults of its end.
    #[error("cannot make an eventfd")]
    Bell(#[source] io::Error),
}

impl FillError {
    /// Logs why memory is filled before its guest runs.
    pub(crate) fn log(&self) {
        let (mut why, mut next) = (self.to_string(), std::error::Error::source(self));
        while let Some(cause) = next {
            why = format!("{why}: {cause}");
            next = cause.source();
        }
        log::info!("shared memory is not filled behind the guest: {why}");
    }
}
