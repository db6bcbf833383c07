//! Guest memory that is not all there: its guest runs, and what is absent arrives from elsewhere.
//!
//! Until the guest may run nothing is absent yet: who restores its devices finds what was there before. [`AbsentMemory::leave`]
//! drops that, and from then on whoever touches an absent page waits for it. What was never there is zero, as ever.
//!
//! Memory whose end comes before it is whole is of no use: who waits goes on with zeros. See that nobody does.

use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, eventfd};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};
use vmm_device_model::dma::GuestRam;

use crate::pages::Pages;
use crate::sys;
use crate::userfault::{Fault, FaultKind, Features, Mode, Userfault, UserfaultError};
use crate::zone::ZoneConfig;

/// Memory of which some is absent.
#[derive(Debug)]
pub struct AbsentMemory {
    userfault: Userfault,
    places: Vec<Place>,
    state: Mutex<State>,
    /// Told when the stage changes.
    moved: Condvar,
    /// Readable once it is over.
    over: OwnedFd,
}

#[derive(Debug, Clone, Copy)]
struct Place {
    gpa: u64,
    size: u64,
    host: u64,
    shared: bool,
}

#[derive(Debug)]
struct State {
    absent: Pages,
    /// Absent pages that somebody waits for.
    wanted: BTreeSet<u64>,
    stage: Stage,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Before the guest runs: what is to be absent is there.
    Whole,
    /// It is absent, and arrives.
    Left,
    Over,
}

/// Whether memory of these zones can be absent on this host.
///
/// # Errors
/// [`AbsentError`]: why not.
pub fn supported(zones: &[ZoneConfig]) -> Result<(), AbsentError> {
    let features = crate::userfault::supported()?;
    for zone in zones {
        let refused = |what| AbsentError::Zone { zone: zone.id.clone(), what };
        if zone.huge_page.is_some() {
            return Err(refused("has huge pages"));
        }
        if zone.file.is_some() {
            return Err(refused("is a file"));
        }
        if zone.shared && features.lacking(Features::MISSING_SHARED) != Features::NONE {
            return Err(refused("is shared, and this kernel handles faults of private memory only"));
        }
    }
    Ok(())
}

impl AbsentMemory {
    /// Watches `memory`, of which `absent` is to be left out. Somebody has to [serve](Self::serve) from now on.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn watch(memory: Arc<GuestRam>, absent: Pages) -> Result<Self, AbsentError> {
        let place = |region: &crate::zone::Region| {
            let mapping = region.get_mmap();
            Place {
                gpa: region.start_addr().raw_value(),
                size: region.len(),
                host: mapping.as_ptr() as u64,
                shared: mapping.flags() & libc::MAP_SHARED != 0,
            }
        };
        let places: Vec<Place> = memory.iter().map(place).collect();
        let shared = places.iter().any(|place| place.shared);
        let userfault =
            Userfault::new(memory, if shared { Features::MISSING_SHARED } else { Features::NONE })?;
        for region in 0..places.len() {
            userfault.register(region, Mode::Missing)?;
        }
        let over = eventfd(0, EventfdFlags::CLOEXEC).map_err(|error| AbsentError::Bell(error.into()))?;
        let state = State { absent, wanted: BTreeSet::new(), stage: Stage::Whole };
        Ok(Self { userfault, places, state: Mutex::new(state), moved: Condvar::new(), over })
    }

    /// Drops what is to be absent. The guest may run then.
    ///
    /// # Errors
    /// The kernel refuses; some of it is dropped.
    pub fn leave(&self) -> Result<(), AbsentError> {
        let mut state = self.lock();
        for place in &self.places {
            for run in state.absent.runs(place.gpa..place.gpa + place.size) {
                let host = place.host + (run.start - place.gpa);
                sys::discard(host, run.end - run.start, place.shared).map_err(AbsentError::Discard)?;
            }
        }
        if state.stage == Stage::Whole {
            state.stage = Stage::Left;
        }
        drop(state);
        self.moved.notify_all();
        Ok(())
    }

    /// Serves who waits, until the [end](Self::end). Of an absent page that nobody has waited for yet, `want` is told the guest
    /// physical address.
    ///
    /// # Errors
    /// Faults cannot be told, or handled.
    pub fn serve(&self, want: &dyn Fn(u64)) -> Result<(), AbsentError> {
        while self.lock().stage != Stage::Over {
            self.userfault.wait(&self.over).map_err(AbsentError::Faults)?;
            for fault in self.userfault.faults().map_err(AbsentError::Faults)? {
                self.serve_one(fault, want)?;
            }
        }
        Ok(())
    }

    fn serve_one(&self, fault: Fault, want: &dyn Fn(u64)) -> Result<(), AbsentError> {
        let Fault { region, offset, kind: FaultKind::Missing } = fault else { return Ok(()) };
        let Some(gpa) = self.places.get(region).map(|place| place.gpa + offset) else { return Ok(()) };
        let mut state = self.lock();
        if state.stage == Stage::Left && state.absent.contains(gpa) {
            let is_new = state.wanted.insert(gpa);
            drop(state);
            if is_new {
                want(gpa);
            }
            return Ok(());
        }
        // Under the lock: after `leave` this page may be absent.
        Ok(self.userfault.zero(region, offset..offset + self.userfault.unit(region))?)
    }

    /// Puts `bytes`, whole pages at `gpa`, where pages are absent, and nowhere else; before [`leave`](Self::leave) it waits for
    /// that. Whether nothing is absent any more.
    ///
    /// # Errors
    /// The host has no memory.
    pub fn put(&self, gpa: u64, bytes: &[u8]) -> Result<bool, AbsentError> {
        self.fill(gpa..gpa.saturating_add(bytes.len() as u64), |region, offset, run| {
            let at = |address: u64| usize::try_from(address - gpa).unwrap_or(usize::MAX);
            let part = bytes.get(at(run.start)..at(run.end)).unwrap_or_default();
            self.userfault.copy(region, offset, part)
        })
    }

    /// The same with zeros.
    ///
    /// # Errors
    /// The host has no memory.
    pub fn zero(&self, range: Range<u64>) -> Result<bool, AbsentError> {
        self.fill(range, |region, offset, run| {
            self.userfault.zero(region, offset..offset + (run.end - run.start))
        })
    }

    fn fill(
        &self,
        range: Range<u64>,
        put: impl Fn(usize, u64, Range<u64>) -> Result<(), UserfaultError>,
    ) -> Result<bool, AbsentError> {
        let mut from = range.start;
        loop {
            let mut state = self.lock();
            while state.stage == Stage::Whole {
                state = self.moved.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            let Some(run) =
                state.absent.first(from..range.end, u64::MAX).filter(|_| state.stage == Stage::Left)
            else {
                return Ok(state.absent.is_empty());
            };
            drop(state);
            let within = |place: &Place| (place.gpa..place.gpa + place.size).contains(&run.start);
            let Some(region) = self.places.iter().position(within) else { return Ok(false) };
            let offset = self.places.get(region).map_or(0, |place| run.start - place.gpa);
            put(region, offset, run.clone())?;
            let mut state = self.lock();
            state.absent.remove(&run);
            state.wanted.retain(|gpa| !run.contains(gpa));
            from = run.end;
        }
    }

    /// Absent pages that somebody waits for.
    pub fn wanted(&self) -> Vec<u64> {
        self.lock().wanted.iter().copied().collect()
    }

    /// All that is absent.
    pub fn absent(&self) -> Vec<Range<u64>> {
        self.lock().absent.runs(0..u64::MAX).collect()
    }

    /// How much that is, in bytes.
    pub fn left(&self) -> u64 {
        self.lock().absent.bytes()
    }

    /// Nothing is watched any more: who waits goes on, and what is absent is zero.
    pub fn end(&self) {
        let mut state = self.lock();
        if std::mem::replace(&mut state.stage, Stage::Over) == Stage::Over {
            return;
        }
        drop(state);
        self.userfault.let_go(0..self.places.len());
        self.moved.notify_all();
        // It cannot be full.
        let _ = rustix::io::write(&self.over, &1_u64.to_ne_bytes());
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Memory that cannot be left out.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AbsentError {
    /// Faults of it are not to be had, or it cannot be filled.
    #[error("guest memory cannot arrive while its guest runs")]
    Userfault(#[from] UserfaultError),
    /// A zone of a kind that cannot.
    #[error("memory zone {zone:?} {what}, and so cannot arrive while its guest runs")]
    Zone {
        /// Id of the zone.
        zone: String,
        /// What stands against it.
        what: &'static str,
    },
    /// What was there cannot be dropped.
    #[error("cannot drop guest memory")]
    Discard(#[source] io::Error),
    /// Nobody can be served.
    #[error("cannot tell who waits for guest memory")]
    Faults(#[source] io::Error),
    /// Nobody could tell the thread that serves faults of its end.
    #[error("cannot make an eventfd")]
    Bell(#[source] io::Error),
}
