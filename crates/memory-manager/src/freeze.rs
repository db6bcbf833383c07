//! Guest memory as it is at one moment, for a writer that reads it while the guest runs on.
//!
//! All of it is protected from writes at that moment. A write waits until its page is saved: the writer has read it, or
//! it was copied out ahead by the thread that [`serves`](Frozen::serve) faults. No page is copied twice, and only so much
//! ahead: after that a write waits for the writer.
//!
//! | memory | how it can be frozen |
//! |---|---|
//! | private, no file | protected where there are pages; what is written elsewhere was zero |
//! | shared (memfd, tmpfs) | all of it is protected |
//! | huge pages up to 2 MiB | as these, each as a whole |
//! | larger pages, a file of another file system, a private mapping of a file (a restored snapshot's) | it cannot |
//!
//! To discard a page (`madvise`, a hole in its file) is no write: no fault tells of it, and the writer would find zeroes.
//! Whoever gives guest memory back to the host, as a balloon does, does not do so while it is frozen.
//!
//! The thread that serves faults waits for nobody that may meet one: it reads guest memory, which is never a fault, holds
//! no lock meanwhile but its own, and waits for the writer alone.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, eventfd};
use vmm_snapshot::directory::{CHUNK, Extents, MemorySource, Place};

use crate::dirty::Changed;
use crate::map::MemoryMap;
use crate::pagemap::Own;
use crate::source::GuestMemorySource;
use crate::userfault::{Fault, FaultKind, Features, Mode, Userfault, UserfaultError};

/// Bytes of pages that are copied out ahead of the writer at most.
const MOST_AHEAD: u64 = 64 << 20;

/// Guest memory that can be frozen at once.
#[derive(Debug)]
pub struct Freezer {
    source: GuestMemorySource,
    userfault: Userfault,
}

/// Guest memory as it was when it was frozen. [`thaw`](Self::thaw), or the end of this, lets everybody go on. Nobody may
/// discard pages until then: see the [module](self).
#[derive(Debug)]
pub struct Frozen {
    source: GuestMemorySource,
    userfault: Userfault,
    state: Mutex<State>,
    /// Told whenever the state changes in a way that somebody may wait for.
    moved: Condvar,
    /// Readable once it is thawed.
    over: OwnedFd,
    most_ahead: u64,
}

#[derive(Debug)]
struct State {
    thawed: bool,
    /// Per region a bit for each page that is saved, and not protected any more.
    saved: Vec<Vec<u64>>,
    /// What the writer's threads read just now.
    reading: Vec<(usize, Range<u64>)>,
    /// Of those the ones that were zero when somebody wanted to write there.
    zero: Vec<Vec<u64>>,
    /// Other pages that were copied out, by region and offset.
    ahead: BTreeMap<(usize, u64), Box<[u8]>>,
    ahead_bytes: u64,
    /// Why it was thawed, if that was no wish.
    failure: Option<io::Error>,
}

impl MemoryMap {
    /// Prepares to freeze: what can be done while the guest runs.
    ///
    /// # Errors
    /// Memory of this kind cannot be frozen, or not on this host.
    pub fn freezer(&self) -> Result<Freezer, FreezeError> {
        if let Some(who) = self.shared_with() {
            return Err(FreezeError::Shared { who: who.to_owned() });
        }
        let source = self.source_of(Own::Protected).map_err(FreezeError::PageTables)?;
        // Of private memory the first would do, but only newer kernels tell in pagemap what is protected (Linux 5.14).
        let wanted = Features::WRITE_PROTECT | Features::WRITE_PROTECT_SHARED;
        let userfault = Userfault::new(self.memory().clone(), wanted)?;
        for (region, place) in source.places().into_iter().enumerate() {
            let unlike = |what| FreezeError::Kind { zone: place.zone.clone(), what };
            if source.is_overlay(region) {
                return Err(unlike("is a private mapping of a file"));
            }
            // A page that is merged is not protected any more, and looks as if it had never been there.
            if self.zones().iter().any(|zone| zone.mergeable && zone.id == place.zone) {
                return Err(unlike("may be merged with equal memory (mergeable)"));
            }
            // A writer reads a chunk at once, and a page is frozen as a whole.
            if userfault.unit(region) > CHUNK {
                return Err(unlike("is in huge pages of more than 2 MiB"));
            }
            userfault
                .register(region, Mode::WriteProtect)
                .map_err(|source| FreezeError::Refused { zone: place.zone.clone(), source })?;
        }
        Ok(Freezer { source, userfault })
    }
}

impl Freezer {
    /// Widens what an incremental snapshot of frozen memory is to hold to whole pages, which huge ones are only as such.
    pub fn widen(&self, changed: &mut Changed) {
        for (region, ranges) in changed.iter_mut().enumerate() {
            let unit = self.userfault.unit(region);
            ranges.iter_mut().for_each(|range| *range = widened(range, unit));
        }
    }

    /// Freezes all of memory, or only what an incremental snapshot of what `changed`, [widened](Self::widen), holds: nothing
    /// else may be read then. Nobody writes into it meanwhile: the guest is paused, and so are its devices.
    ///
    /// # Errors
    /// The host refuses; nothing is frozen then.
    pub fn freeze(self, changed: Option<&Changed>) -> Result<Frozen, FreezeError> {
        let Self { source, userfault } = self;
        let places = source.places();
        let mut saved = Vec::new();
        for (region, place) in places.iter().enumerate() {
            let unit = userfault.unit(region);
            match changed {
                None => userfault.protect(region, 0..place.size)?,
                Some(changed) => {
                    let changed = changed.get(region).map_or(&[][..], Vec::as_slice);
                    // What a writer reads besides, it has to find frozen, too.
                    let extents = Extents::incremental(changed, place.size).unwrap_or_default();
                    extents.ranges().iter().try_for_each(|range| userfault.protect(region, range.clone()))?;
                }
            }
            let words = place.size.div_ceil(unit).div_ceil(BITS);
            saved.push(vec![0; usize::try_from(words).unwrap_or(0)]);
        }
        let over = eventfd(0, EventfdFlags::CLOEXEC).map_err(|error| FreezeError::Bell(error.into()))?;
        let state = State {
            thawed: false,
            zero: saved.clone(),
            saved,
            reading: Vec::new(),
            ahead: BTreeMap::new(),
            ahead_bytes: 0,
            failure: None,
        };
        let (state, moved) = (Mutex::new(state), Condvar::new());
        Ok(Frozen { source, userfault, state, moved, over, most_ahead: MOST_AHEAD })
    }
}

impl Frozen {
    /// Serves faults until it is thawed: the work of a thread of its own. Until it has begun, and from its end on, who
    /// writes into frozen memory waits.
    pub fn serve(&self) {
        if let Err(error) = self.serve_until_thawed() {
            self.end(Some(error));
        }
    }

    fn serve_until_thawed(&self) -> io::Result<()> {
        loop {
            self.userfault.wait(&self.over)?;
            if self.lock().thawed {
                return Ok(());
            }
            for fault in self.userfault.faults()? {
                self.serve_one(&fault)?;
            }
        }
    }

    /// Copies the page out, unless it is saved already, and lets who waits write.
    fn serve_one(&self, fault: &Fault) -> io::Result<()> {
        let Fault { region, offset, kind: FaultKind::Protected } = *fault else { return Ok(()) };
        let unit = self.userfault.unit(region);
        let page = offset..offset + unit;
        let mut state = self.lock();
        while !state.thawed && !is_set(&state.saved, region, offset / unit) {
            let is_read = |(at, range): &(usize, Range<u64>)| *at == region && overlap(range, &page);
            if !state.reading.iter().any(is_read) && self.copy_out(&mut state, region, &page)? {
                break;
            }
            state = self.moved.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.thawed {
            return Ok(());
        }
        drop(state);
        self.userfault.release(region, page).map_err(io::Error::other)
    }

    /// Copies a page out, if there is room for it.
    fn copy_out(&self, state: &mut State, region: usize, page: &Range<u64>) -> io::Result<bool> {
        let unit = page.end - page.start;
        let mut bytes = vec![0; usize::try_from(unit).unwrap_or(0)];
        self.source.read(region, page.start, &mut bytes)?;
        let number = page.start / unit;
        if bytes.iter().all(|byte| *byte == 0) {
            set(&mut state.zero, region, number..number + 1);
        } else if state.ahead_bytes + unit <= self.most_ahead {
            state.ahead.insert((region, page.start), bytes.into_boxed_slice());
            state.ahead_bytes += unit;
        } else {
            return Ok(false);
        }
        set(&mut state.saved, region, number..number + 1);
        Ok(true)
    }

    /// Nothing is frozen any more, and everybody goes on. What is still to be read is lost.
    pub fn thaw(&self) {
        self.end(None);
    }

    /// Bytes that were copied out and not read yet.
    pub fn ahead(&self) -> u64 {
        self.lock().ahead_bytes
    }

    fn end(&self, failure: Option<io::Error>) {
        let mut state = self.lock();
        if state.thawed {
            return;
        }
        (state.thawed, state.failure) = (true, failure);
        drop(state);
        self.moved.notify_all();
        self.userfault.let_go(0..self.source.places().len());
        // It cannot be full.
        let _ = rustix::io::write(&self.over, &1_u64.to_ne_bytes());
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes what was copied out of `range` over into `bytes`, and lets everybody write there.
    fn finish(&self, region: usize, range: &Range<u64>, bytes: &mut [u8]) -> io::Result<()> {
        let unit = self.userfault.unit(region);
        let mut state = self.lock();
        state.check()?;
        let found: Vec<u64> =
            state.ahead.range((region, range.start)..(region, range.end)).map(|((_, at), _)| *at).collect();
        for at in found {
            let Some(page) = state.ahead.remove(&(region, at)) else { continue };
            state.ahead_bytes = state.ahead_bytes.saturating_sub(unit);
            let start = usize::try_from(at - range.start).unwrap_or(usize::MAX);
            let target = bytes.get_mut(start..).unwrap_or_default();
            target.iter_mut().zip(page.iter()).for_each(|(to, from)| *to = *from);
        }
        let pages = range.start / unit..range.end.div_ceil(unit);
        for (page, target) in pages.clone().zip(bytes.chunks_mut(usize::try_from(unit).unwrap_or(1))) {
            if is_set(&state.zero, region, page) {
                target.fill(0);
            }
        }
        set(&mut state.saved, region, pages);
        drop(state);
        self.userfault.release(region, range.clone()).map_err(io::Error::other)
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        self.thaw();
    }
}

impl MemorySource for Frozen {
    fn places(&self) -> Vec<Place> {
        self.source.places()
    }

    fn next_data(&self, region: usize, offset: u64) -> io::Result<Option<Range<u64>>> {
        self.lock().check()?;
        // In this order: a page that is copied out is so before it is not protected any more.
        let found = self.source.next_data(region, offset)?;
        let unit = self.userfault.unit(region);
        // Page tables tell of a huge page in parts.
        let found = found.map(|found| widened(&found, unit)).map(|found| found.start.max(offset)..found.end);
        let mut state = self.lock();
        // What was thawed meanwhile is not protected, and was not found.
        state.check()?;
        let ahead = state.ahead.range((region, offset / unit * unit)..(region + 1, 0)).next();
        let ahead = ahead.map(|((_, at), _)| (*at).max(offset)..at + unit);
        Ok(match (found, ahead) {
            (Some(found), Some(ahead)) if ahead.start < found.start => Some(ahead),
            (found, ahead) => found.or(ahead),
        })
    }

    /// Each page once: it is not frozen afterwards.
    fn read(&self, region: usize, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let range = offset..offset.saturating_add(bytes.len() as u64);
        if widened(&range, self.userfault.unit(region)) != range {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "part of a frozen page"));
        }
        let claim = Claim::new(self, region, range)?;
        self.source.read(region, offset, bytes)?;
        self.finish(region, &claim.range, bytes)
    }
}

/// A part that a thread reads: until then nothing of it is copied out or written.
struct Claim<'a> {
    frozen: &'a Frozen,
    region: usize,
    range: Range<u64>,
}

impl<'a> Claim<'a> {
    fn new(frozen: &'a Frozen, region: usize, range: Range<u64>) -> io::Result<Self> {
        let mut state = frozen.lock();
        state.check()?;
        state.reading.push((region, range.clone()));
        Ok(Self { frozen, region, range })
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let mut state = self.frozen.lock();
        let claim = state.reading.iter().position(|(at, range)| *at == self.region && *range == self.range);
        if let Some(claim) = claim {
            state.reading.swap_remove(claim);
        }
        drop(state);
        self.frozen.moved.notify_all();
    }
}

const BITS: u64 = u64::BITS as u64;

impl State {
    fn check(&mut self) -> io::Result<()> {
        match (self.thawed, self.failure.take()) {
            (_, Some(failure)) => Err(failure),
            (true, None) => {
                Err(io::Error::new(io::ErrorKind::Interrupted, "guest memory is not frozen any more"))
            }
            (false, None) => Ok(()),
        }
    }
}

/// Whether the bit of a page is set; of one that there is not, it is.
fn is_set(bits: &[Vec<u64>], region: usize, page: u64) -> bool {
    let word = usize::try_from(page / BITS).ok().and_then(|at| bits.get(region)?.get(at));
    word.is_none_or(|word| word >> (page % BITS) & 1 != 0)
}

/// Sets the bits of `pages`.
fn set(bits: &mut [Vec<u64>], region: usize, pages: Range<u64>) {
    for page in pages {
        let word = usize::try_from(page / BITS).ok().and_then(|at| bits.get_mut(region)?.get_mut(at));
        if let Some(word) = word {
            *word |= 1 << (page % BITS);
        }
    }
}

/// The whole pages of `unit` bytes that hold `range`.
fn widened(range: &Range<u64>, unit: u64) -> Range<u64> {
    range.start / unit * unit..range.end.next_multiple_of(unit)
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

/// Guest memory that cannot be frozen.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FreezeError {
    /// Another process writes into it.
    #[error("another process has mapped guest memory, for {who}")]
    Shared {
        /// On whose behalf.
        who: String,
    },
    /// Memory of a kind that cannot be frozen.
    #[error("memory zone {zone:?} {what}")]
    Kind {
        /// Id of the zone.
        zone: String,
        /// What stands against it.
        what: &'static str,
    },
    /// The kernel does not protect such memory.
    #[error("memory zone {zone:?} cannot be protected from writes")]
    Refused {
        /// Id of the zone.
        zone: String,
        /// What the kernel said.
        #[source]
        source: UserfaultError,
    },
    /// Faults cannot be handled.
    #[error("faults of guest memory")]
    Userfault(#[from] UserfaultError),
    /// The page tables cannot be asked.
    #[error("page tables")]
    PageTables(#[source] io::Error),
    /// Nobody could tell the thread that serves faults of its end.
    #[error("cannot make an eventfd")]
    Bell(#[source] io::Error),
}

#[cfg(test)]
mod tests;
