//! A guest that runs is saved as it is at one moment: it stands still for its records, and until all of its memory is protected
//! from writes.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmm_api::spec::SnapshotSpec;
use vmm_device_model::thread::{self, ThreadHook};
use vmm_memory_manager::freeze::{Freezer, Frozen};

use super::saving::{Pace, still};
use super::tracks::Tracks;
use super::writer::{SaveError, Since, Still, THREAD};
use crate::exit::chain;
use crate::machine::{Machine, MachineError};

/// A guest at one moment. It runs on.
#[derive(Debug)]
pub(super) struct Moment {
    pub(super) memory: ServedMemory,
    pub(super) still: Still,
    /// What changed since another snapshot until then.
    pub(super) since: Option<Since>,
    /// How long it stood still.
    blackout: Duration,
    /// Why it does not run on, if it does not.
    stuck: Option<MachineError>,
}

/// Frozen memory, and the thread that serves its faults. Dropped, it is as any other.
#[derive(Debug)]
pub(super) struct ServedMemory {
    frozen: Arc<Frozen>,
    thread: Option<JoinHandle<()>>,
}

/// Freezes the guest of `machine`, which runs; `None` where memory cannot be frozen, or not on this host.
pub(super) fn freeze(
    machine: &mut Machine,
    tracks: &mut Tracks,
    spec: &SnapshotSpec,
    hook: &Arc<dyn ThreadHook>,
) -> Result<Option<Moment>, SaveError> {
    let freezer = match machine.memory().freezer() {
        Ok(freezer) => freezer,
        Err(why) => {
            log::info!("guest memory is saved in passes, for it cannot be frozen: {}", chain(&why));
            return Ok(None);
        }
    };
    machine.pause().map_err(SaveError::Guest)?;
    let start = Instant::now();
    let taken = take(machine, tracks, spec, freezer, hook);
    let stuck = machine.resume().err();
    let blackout = start.elapsed();
    match &stuck {
        None => log::info!("the guest runs on, its memory is saved as it was"),
        Some(error) => log::error!("the guest does not run on after its snapshot: {}", chain(error)),
    }
    match (taken, stuck) {
        (Ok((memory, still, since)), stuck) => Ok(Some(Moment { memory, still, since, blackout, stuck })),
        (Err(error), None) => Err(error),
        (Err(error), Some(resume)) => Err(error.stuck(resume)),
    }
}

/// What there is to be had while the guest stands still. Its memory comes last: after that nobody may write there before
/// faults are served.
fn take(
    machine: &mut Machine,
    tracks: &mut Tracks,
    spec: &SnapshotSpec,
    freezer: Freezer,
    hook: &Arc<dyn ThreadHook>,
) -> Result<(ServedMemory, Still, Option<Since>), SaveError> {
    let still = still(machine)?;
    let since = tracks.at_rest(machine.memory_mut(), spec)?;
    let frozen = freezer.freeze(since.as_ref().map(|since| &since.changed)).map_err(SaveError::Freeze)?;
    let memory = ServedMemory::new(frozen, hook)?;
    Ok((memory, still, since))
}

impl Moment {
    /// What the guest does while it is written.
    pub(super) fn pace(&mut self) -> Pace {
        Pace::after(self.blackout, self.stuck.take())
    }
}

impl ServedMemory {
    fn new(frozen: Frozen, hook: &Arc<dyn ThreadHook>) -> Result<Self, SaveError> {
        let frozen = Arc::new(frozen);
        let serving = Arc::clone(&frozen);
        let thread = thread::spawn(hook, THREAD, THREAD.0, move || serving.serve());
        let thread = Some(thread.map_err(SaveError::Thread)?);
        Ok(Self { frozen, thread })
    }

    pub(super) fn frozen(&self) -> &Arc<Frozen> {
        &self.frozen
    }
}

impl Drop for ServedMemory {
    fn drop(&mut self) {
        self.frozen.thaw();
        if let Some(thread) = self.thread.take() {
            // It ends once nothing is frozen.
            let _ = thread.join();
        }
    }
}
