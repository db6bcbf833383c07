//! Long work over the chunks of memory: threads, progress, cancellation.

use std::num::NonZeroUsize;
use std::ops::{ControlFlow, Range};
use std::sync::{Mutex, PoisonError};
use std::thread;

use super::{CHUNK, chunk_range};

/// How far long work has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Bytes of guest memory that are done, skipped ones included.
    pub done: u64,
    /// Bytes of guest memory in all.
    pub total: u64,
}

/// How long work is to be done.
#[derive(Clone, Copy)]
pub struct Work<'a> {
    /// Threads, the caller's own included. Each holds a buffer or two of [`CHUNK`] bytes.
    pub threads: NonZeroUsize,
    /// Told before each chunk, by one thread at a time, and once at the end; `Break` cancels.
    pub watch: &'a (dyn Fn(Progress) -> ControlFlow<()> + Sync),
}

impl std::fmt::Debug for Work<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Work").field("threads", &self.threads).finish_non_exhaustive()
    }
}

impl Work<'static> {
    /// With `threads` threads; nobody watches.
    #[must_use]
    pub fn quiet(threads: NonZeroUsize) -> Self {
        Self { threads, watch: &|_| ControlFlow::Continue(()) }
    }
}

/// Why work ended before its end.
#[derive(Debug)]
pub(super) enum Stop<E> {
    Cancelled,
    Failed(E),
}

/// One chunk to be looked at.
#[derive(Debug, Clone, Copy)]
pub(super) struct Job {
    pub(super) region: usize,
    pub(super) chunk: u64,
}

/// Finds the first chunk of a region from the given one on that is worth a job.
type Find<'a, E> = &'a (dyn Fn(usize, u64) -> Result<Option<u64>, E> + Sync);

struct Cursor {
    region: usize,
    chunk: u64,
    before: u64,
}

impl Work<'_> {
    /// Runs `each` on every chunk of regions of `sizes` bytes that `find` finds, with two buffers per thread.
    ///
    /// The first failure ends it; what runs is finished.
    pub(super) fn run<E: Send>(
        &self,
        sizes: &[u64],
        find: Find<'_, E>,
        each: &(dyn Fn(Job, &mut Buffers) -> Result<(), E> + Sync),
    ) -> Result<(), Stop<E>> {
        let cursor = Mutex::new(Ok(Cursor { region: 0, chunk: 0, before: 0 }));
        let worker = || {
            let mut buffers = Buffers::default();
            while let Some(job) = self.next(&cursor, sizes, find) {
                if let Err(error) = each(job, &mut buffers) {
                    let mut cursor = cursor.lock().unwrap_or_else(PoisonError::into_inner);
                    if cursor.is_ok() {
                        *cursor = Err(Stop::Failed(error));
                    }
                }
            }
        };
        thread::scope(|scope| {
            for _ in 1..self.threads.get() {
                // A host that gives no more threads gets the work done by those that are.
                let _ = thread::Builder::new().name("snapshot".to_owned()).spawn_scoped(scope, worker);
            }
            worker();
        });
        let total = sizes.iter().sum();
        cursor.into_inner().unwrap_or_else(PoisonError::into_inner)?;
        match (self.watch)(Progress { done: total, total }) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(Stop::Cancelled),
        }
    }

    fn next<E>(
        &self,
        cursor: &Mutex<Result<Cursor, Stop<E>>>,
        sizes: &[u64],
        find: Find<'_, E>,
    ) -> Option<Job> {
        let mut guard = cursor.lock().unwrap_or_else(PoisonError::into_inner);
        let Ok(at) = guard.as_mut() else { return None };
        let stop = loop {
            let size = *sizes.get(at.region)?;
            match find(at.region, at.chunk) {
                Ok(Some(chunk)) if chunk.saturating_mul(CHUNK) < size => {
                    at.chunk = chunk + 1;
                    let job = Job { region: at.region, chunk };
                    let done = at.before + chunk_range(chunk, size).start;
                    match (self.watch)(Progress { done, total: sizes.iter().sum() }) {
                        ControlFlow::Continue(()) => return Some(job),
                        ControlFlow::Break(()) => break Stop::Cancelled,
                    }
                }
                Ok(_) => *at = Cursor { region: at.region + 1, chunk: 0, before: at.before + size },
                Err(error) => break Stop::Failed(error),
            }
        };
        *guard = Err(stop);
        None
    }
}

/// A thread's buffers of one chunk each, made when they are first used.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    /// What the job makes.
    pub(super) chunk: Vec<u8>,
    /// What it needs on the way.
    pub(super) scratch: Vec<u8>,
}

/// The first bytes of `buffer`, as many as `range` has; their content is left over from before.
pub(super) fn sized(buffer: &mut Vec<u8>, range: &Range<u64>) {
    // Never more than a chunk.
    let bytes = usize::try_from((range.end - range.start).min(CHUNK)).unwrap_or(0);
    buffer.resize(bytes, 0);
}
