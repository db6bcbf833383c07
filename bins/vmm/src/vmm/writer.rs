//! The thread `snapshot`: it writes what the control thread gave it, and has no part in the machine.

use std::io;
use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use serde_json::value::RawValue;
use vmm_api::events::Event;
use vmm_device_model::thread::ThreadKind;
use vmm_memory_manager::dirty::Changed;
use vmm_memory_manager::freeze::{FreezeError, Frozen};
use vmm_memory_manager::source::GuestMemorySource;
use vmm_snapshot::RecordSet;
use vmm_snapshot::directory::{
    Contents, Draft, Filled, Hash, HostStorage, Increment, MemorySource, Progress, Work, WriteError,
};
use vmm_state::GuestEvent;

use super::freezing::ServedMemory;
use super::tracks::TrackError;
use crate::events::Events;
use crate::exit::chain;
use crate::machine::{EventPost, MachineError, MachineEvent};

/// The thread that writes a snapshot, and those that help it.
pub(crate) const THREAD: ThreadKind = ThreadKind("snapshot");

/// The architecture of guests, as in a target triple.
pub(super) const ARCHITECTURE: &str = "x86_64";

/// The least time between two events of progress.
const PERIOD: Duration = Duration::from_millis(100);

/// Most threads that write memory.
const MOST_THREADS: usize = 8;

/// As many threads as are worth while on this host.
pub(super) fn threads() -> NonZeroUsize {
    let most = NonZeroUsize::new(MOST_THREADS).unwrap_or(NonZeroUsize::MIN);
    std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN).min(most)
}

/// Most passes over memory while the guest runs, the first included.
const MOST_PASSES: usize = 8;

/// So few bytes that are left are written while the guest stands still: 16 MiB take some milliseconds.
const LITTLE: u64 = 16 << 20;

/// What the thread tells the control thread, and asks of it.
#[derive(Debug)]
pub enum SaveStep {
    /// A pass over a running guest's memory is written. What changed meanwhile?
    Changed,
    /// Little is left: the guest is to stand still.
    Still,
    /// All of its memory is written: it may run on.
    Written,
    /// It is over, and what is left of it is the thread.
    Over(Result<Hash, SaveError>),
}

/// What it is answered.
#[derive(Debug)]
pub(super) enum Answer {
    /// What changed since it asked last.
    Changed(Changed),
    /// The same, and the guest stands still.
    Still(Still, Changed),
}

/// The state of a guest that stands still.
#[derive(Debug)]
pub(super) struct Still {
    pub(super) records: RecordSet,
    pub(super) at: SystemTime,
}

/// What a snapshot builds on: the parent's folder, and what may have changed since.
#[derive(Debug, Clone)]
pub(super) struct Since {
    pub(super) parent: PathBuf,
    pub(super) id: Hash,
    pub(super) changed: Changed,
}

/// Tells how far the job is, and is told to stop.
#[derive(Debug, Clone)]
pub(super) struct Watch {
    pub(super) job: u64,
    pub(super) machine: u64,
    pub(super) events: Events,
    pub(super) cancelled: Arc<AtomicBool>,
}

/// Guest memory, to be written.
#[derive(Debug)]
pub(super) enum Memory {
    /// As it is: of a guest that stands still, or that changes it meanwhile.
    AsIs(GuestMemorySource),
    /// As it was at one moment.
    Frozen(ServedMemory),
}

impl Memory {
    fn source(&self) -> &dyn MemorySource {
        match self {
            Self::AsIs(source) => source,
            Self::Frozen(served) => &**served.frozen(),
        }
    }

    /// What the guest may wait for.
    pub(super) fn frozen(&self) -> Option<Arc<Frozen>> {
        match self {
            Self::AsIs(_) => None,
            Self::Frozen(served) => Some(Arc::clone(served.frozen())),
        }
    }

    /// It is read.
    fn thaw(&self) {
        if let Self::Frozen(served) = self {
            served.frozen().thaw();
        }
    }
}

/// A snapshot, to be written by a thread.
#[derive(Debug)]
pub(super) struct Writer {
    pub(super) folder: PathBuf,
    pub(super) memory: Memory,
    pub(super) config: Box<RawValue>,
    pub(super) since: Option<Since>,
    /// `None`: the guest runs, and its memory is as it is.
    pub(super) still: Option<Still>,
    pub(super) threads: NonZeroUsize,
    pub(super) watch: Watch,
    pub(super) post: EventPost,
    pub(super) answers: Receiver<Answer>,
    /// Set when the snapshot is there.
    pub(super) committed: Arc<AtomicBool>,
}

impl Writer {
    /// Writes the snapshot, and tells the control thread how it ended.
    pub(super) fn run(mut self) {
        let still = self.still.take();
        let result = self.write(still);
        self.committed.store(result.is_ok(), Ordering::SeqCst);
        self.tell(SaveStep::Over(result));
    }

    fn tell(&self, step: SaveStep) {
        self.post.post(MachineEvent::Save(Box::new(step)));
    }

    /// A control thread that does not answer has its reasons, and tells them.
    fn ask(&self, step: SaveStep) -> Result<Answer, SaveError> {
        self.tell(step);
        self.answers.recv().map_err(|_| SaveError::Cancelled)
    }

    fn write(&self, still: Option<Still>) -> Result<Hash, SaveError> {
        let since = self.since.as_ref();
        let since = since.map(|Since { parent, id, changed }| Increment {
            parent,
            id: Some(*id),
            changed,
            packed: still.is_some(),
        });
        // Whatever waits for it does not wait until what was written is removed.
        let (memory, post) = (&self.memory, &self.post);
        let failed = || {
            memory.thaw();
            post.post(MachineEvent::Save(Box::new(SaveStep::Written)));
        };
        let filled = self.watch.over(|told| {
            let work = Work { threads: self.threads, watch: told };
            let draft = Draft::begin(&HostStorage, &self.folder)?.on_failure(&failed);
            draft.memory(self.memory.source(), since.as_ref(), &work)
        })?;
        let (filled, still) = match still {
            Some(still) => (filled, still),
            None => self.catch_up(filled)?,
        };
        self.memory.thaw();
        let watch = &self.watch;
        let cancel = |_| watch.unless_cancelled();
        let filled = filled.rehash(&Work { threads: self.threads, watch: &cancel })?;
        let contents = Contents {
            vmm: env!("CARGO_PKG_VERSION"),
            architecture: ARCHITECTURE,
            created: still.at,
            config: &self.config,
            state: &still.records,
        };
        let finished = filled.finish(&contents)?;
        if self.watch.is_cancelled() {
            return Err(SaveError::Cancelled);
        }
        Ok(finished.commit()?)
    }

    /// Writes what a running guest changes until little is left or it does not get less, then the rest while it stands still.
    fn catch_up<'s>(&self, mut filled: Filled<'s>) -> Result<(Filled<'s>, Still), SaveError> {
        let watch = &self.watch;
        let cancel = |_| watch.unless_cancelled();
        let work = Work { threads: self.threads, watch: &cancel };
        let mut before = u64::MAX;
        for _ in 1..MOST_PASSES {
            let Answer::Changed(changed) = self.ask(SaveStep::Changed)? else { break };
            let left = bytes(&changed);
            filled = filled.again(self.memory.source(), &changed, &work)?;
            if left <= LITTLE || left > before / 4 * 3 {
                break;
            }
            before = left;
        }
        let Answer::Still(still, changed) = self.ask(SaveStep::Still)? else {
            return Err(SaveError::Cancelled);
        };
        let filled = filled.again(self.memory.source(), &changed, &work)?;
        self.tell(SaveStep::Written);
        Ok((filled, still))
    }
}

fn bytes(changed: &Changed) -> u64 {
    changed.iter().flatten().map(|range| range.end.saturating_sub(range.start)).sum()
}

impl Watch {
    pub(super) fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::SeqCst)
    }

    fn unless_cancelled(&self) -> ControlFlow<()> {
        if self.is_cancelled() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    /// Does work that is watched: what it is given tells how far it is.
    pub(super) fn over<R>(&self, work: impl FnOnce(&(dyn Fn(Progress) -> ControlFlow<()> + Sync)) -> R) -> R {
        let last = Mutex::new(Instant::now());
        work(&|progress| self.told(&last, progress))
    }

    /// Is called by one thread at a time.
    fn told(&self, last: &Mutex<Instant>, progress: Progress) -> ControlFlow<()> {
        if self.is_cancelled() {
            return ControlFlow::Break(());
        }
        let Progress { done, total } = progress;
        let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
        if done == total || last.elapsed() >= PERIOD {
            *last = Instant::now();
            let event = Event::JobProgress { job: self.job, done, total: Some(total) };
            self.events.tell(self.machine, &event);
        }
        ControlFlow::Continue(())
    }
}

/// A snapshot was not taken.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SaveError {
    /// The machine's state cannot be had.
    #[error("the machine's state")]
    Machine(#[from] MachineError),
    /// Its memory cannot be read.
    #[error("guest memory")]
    Memory(#[source] io::Error),
    /// Its memory cannot be kept as it was while it runs on.
    #[error("guest memory cannot be frozen")]
    Freeze(#[source] FreezeError),
    /// What changed since cannot be told.
    #[error("what changed in guest memory")]
    Changes(#[from] TrackError),
    /// The directory cannot be written.
    #[error("the snapshot's directory")]
    Write(#[source] WriteError),
    /// The thread that writes cannot be started.
    #[error("cannot start the snapshot's thread")]
    Thread(#[source] io::Error),
    /// The configuration has no JSON form.
    #[error("the configuration")]
    Config(#[source] serde_json::Error),
    /// There is no machine any more.
    #[error("there is no machine")]
    NoMachine,
    /// The guest cannot stand still, or not run on.
    #[error("the guest does not obey")]
    Guest(#[source] MachineError),
    /// Neither was it taken nor does the guest run on.
    #[error("the guest cannot run on and stays paused ({})", chain(&**.resume))]
    Stuck {
        /// Why it cannot.
        resume: Box<MachineError>,
        /// Why the snapshot was not taken.
        #[source]
        source: Box<SaveError>,
    },
    /// The guest ended before it was saved, or meanwhile.
    #[error("the guest has ended: {0}")]
    Ended(GuestEvent),
    /// It was cancelled.
    #[error("the snapshot was cancelled")]
    Cancelled,
}

impl SaveError {
    /// The same, and the guest does not run on.
    pub(super) fn stuck(self, resume: MachineError) -> Self {
        Self::Stuck { resume: Box::new(resume), source: Box::new(self) }
    }
}

impl From<WriteError> for SaveError {
    fn from(error: WriteError) -> Self {
        match error {
            WriteError::Cancelled => Self::Cancelled,
            error => Self::Write(error),
        }
    }
}
