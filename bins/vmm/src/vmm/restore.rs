//! Restores: a boot whose configuration and machine come of a snapshot, which a thread of its own looks at first.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use vmm_api::config::{Fault, GuestClock, RestoreConfig};
use vmm_api::error::{ApiError, Code};
use vmm_api::events::Event;
use vmm_api::info::RestoredFrom;
use vmm_api::spec::{Checked, RestoreSpec};
use vmm_device_model::thread::{self, ThreadHook};
use vmm_memory_manager::fill::Behind;
use vmm_memory_manager::map::{HostMemory, MemoryMap};
use vmm_memory_manager::restore::{Fill, Saved as SavedBytes};
use vmm_snapshot::RecordSet;
use vmm_snapshot::directory::{Chain, Hash, Manifest, ReadError, Work};

use super::apart::{BootThread, Made};
use super::boot::{Asker, Job};
use super::tracks::{TrackError, Tracks};
use super::writer::{self, ARCHITECTURE, THREAD, Watch};
use super::{Configured, Vmm, VmmError};
use crate::lost_memory;
use crate::machine::{ClockChoice, EventPost, Locks, Machine, Saved};

/// What a thread found in a snapshot.
#[derive(Debug)]
pub struct Loaded {
    checked: Checked,
    from: RestoredFrom,
    origin: Origin,
}

/// What a machine is made of.
#[derive(Debug)]
pub(super) enum Origin {
    /// A snapshot.
    Snapshot(Box<Snapshot>),
    /// What a migration brought.
    Arrived { records: RecordSet, memory: HostMemory },
}

/// A snapshot that was looked at.
#[derive(Debug)]
pub(super) struct Snapshot {
    chain: Chain,
    records: RecordSet,
    fill: Fill,
    clock: ClockChoice,
    watch: Watch,
}

/// A restore under way.
#[derive(Debug)]
pub(super) struct Restore {
    /// `None`: a VM arrives by migration.
    spec: Option<RestoreSpec>,
    /// The id of its snapshot, once that has been looked at.
    id: Option<Hash>,
    start: Instant,
    /// Set when nobody wants it any more.
    cancelled: Arc<AtomicBool>,
}

impl Restore {
    /// A VM that arrives, waited for since `start`.
    pub(super) fn arrival(start: Instant) -> Self {
        Self { spec: None, id: None, start, cancelled: Arc::default() }
    }

    /// Whether the guest is to run.
    pub(super) fn resumes(&self) -> bool {
        self.spec.as_ref().is_some_and(|spec| spec.resume)
    }

    /// When it began.
    pub(super) fn start(&self) -> Instant {
        self.start
    }

    /// What it does comes to its end soon, unless a file does not answer.
    pub(super) fn cancel(&self) {
        self.cancelled.store(true, Ordering::SeqCst);
    }

    /// Changes since the snapshot are known from now on.
    pub(super) fn track(&self, tracks: &mut Tracks, machine: &mut Machine) -> Result<(), TrackError> {
        match (&self.spec, self.id) {
            (Some(spec), Some(id)) => tracks.restored(machine.memory_mut(), (&spec.folder, id), spec.track),
            _ => Ok(()),
        }
    }
}

impl Vmm {
    /// Restores the VM that the command line asks for. If that fails the VMM ends, and
    /// [`take_failure`](Self::take_failure) says why.
    pub fn restore_at_start(&mut self, spec: RestoreSpec) {
        self.begin_restore(spec, Asker::CommandLine);
    }

    /// Restores a VM; `asker` is told of the end.
    pub(super) fn restore_for(&mut self, request: &RestoreConfig, asker: Asker) {
        match RestoreSpec::check(request) {
            Ok(spec) => self.begin_restore(spec, asker),
            Err(faults) => self.tell(asker, Err(LoadError::Config { faults }.into())),
        }
    }

    fn begin_restore(&mut self, spec: RestoreSpec, asker: Asker) {
        self.boot.machines += 1;
        let number = self.boot.machines;
        self.events.tell(number, &Event::Restoring);
        // Admission keeps this from failing.
        let _ = self.slot.begin_restore();
        let cancelled = Arc::new(AtomicBool::new(false));
        self.boot.restore = Some(Restore {
            spec: Some(spec.clone()),
            id: None,
            start: Instant::now(),
            cancelled: Arc::clone(&cancelled),
        });
        self.jobs.saving.jobs += 1;
        let watch =
            Watch { job: self.jobs.saving.jobs, machine: number, events: self.events.clone(), cancelled };
        if !self.policy.serves_clients {
            return self.take_over(load(&spec, watch), asker);
        }
        let post = EventPost::new(number, self.means.post.clone());
        let work = move || Made::Loaded(Box::new(load(&spec, watch)));
        match BootThread::start(post, work) {
            Ok(thread) => self.boot.job = Some(Job { asker, fresh: true, thread }),
            Err(source) => self.give_back(VmmError::Thread(source), asker),
        }
    }

    /// Goes on with what was found, as a boot does.
    pub(super) fn take_over(&mut self, result: Result<Loaded, LoadError>, asker: Asker) {
        let Loaded { checked, from, origin } = match result {
            Ok(loaded) => loaded,
            Err(error) => return self.give_back(error.into(), asker),
        };
        if let (Some(restore), Origin::Snapshot(snapshot)) = (&mut self.boot.restore, &origin) {
            restore.id = Some(snapshot.chain.newest().id());
        }
        super::warn(&checked.spec);
        let configured = Configured { restored_from: Some(from), ..Configured::new(checked) };
        let _ = self.slot.load(configured);
        self.build_for(asker, Some(origin));
    }

    /// There is no VM, as before.
    fn give_back(&mut self, error: VmmError, asker: Asker) {
        let _ = self.slot.fail_boot();
        let result = self.boot_ended(&crate::machine::stages::Stages::default(), Err(error));
        self.tell(asker, result);
    }
}

impl Origin {
    /// Folders of the snapshots that the machine is made of.
    pub(super) fn folders(&self) -> Vec<PathBuf> {
        match self {
            Self::Snapshot(snapshot) => {
                snapshot.chain.layers().map(|layer| layer.path().to_owned()).collect()
            }
            Self::Arrived { .. } => Vec::new(),
        }
    }

    /// When the images of its disks are locked.
    pub(super) fn locks(&self) -> Locks {
        match self {
            Self::Snapshot(_) => Locks::Now,
            Self::Arrived { .. } => Locks::Later,
        }
    }

    /// In the form that a machine takes; threads that fill memory later begin with `hook`.
    pub(super) fn saved(self, hook: &Arc<dyn ThreadHook>) -> Saved<'static> {
        let snapshot = match self {
            Self::Snapshot(snapshot) => snapshot,
            Self::Arrived { records, memory } => {
                let memory =
                    Box::new(move |saved: crate::machine::SavedMemory| Ok(memory.give_to(saved.vm)?));
                return Saved { records, memory, clock: ClockChoice::MovedOn, another: false };
            }
        };
        let Snapshot { chain, records, fill, clock, watch } = *snapshot;
        let hook = Arc::clone(hook);
        let memory = Box::new(move |saved: crate::machine::SavedMemory| {
            let chain = Arc::new(chain);
            let bytes = SavedBytes { layout: &saved.layout, chain: &chain, fill };
            let start = |work| thread::spawn(&hook, THREAD, THREAD.0, work);
            let behind =
                Behind { chain: Arc::clone(&chain), start: &start, lost: Arc::new(lost_memory::not_filled) };
            watch.over(|told| {
                let work = Work { threads: writer::threads(), watch: told };
                let map = MemoryMap::restore_behind(saved.vm, &saved.zones, &bytes, &work, &behind)?;
                // Devices may touch it at once. Where it is not wanted any more, another guest's may be watched by now.
                if !watch.is_cancelled() {
                    lost_memory::watch(map.mapped_files());
                }
                Ok(map)
            })
        });
        Saved { records, memory, clock, another: true }
    }
}

/// Looks at a snapshot; its memory is left alone.
fn load(spec: &RestoreSpec, watch: Watch) -> Result<Loaded, LoadError> {
    let chain = Chain::open(&spec.folder)?;
    chain.manifest().check_architecture(ARCHITECTURE)?;
    let records = chain.state()?;
    let checked = spec.configure(chain.manifest().config.get().as_bytes());
    let checked = checked.map_err(|faults| LoadError::Config { faults })?;
    let fill = if spec.eager { Fill::Eager } else { Fill::Lazy };
    let clock = match spec.clock {
        GuestClock::MovedOn => ClockChoice::MovedOn,
        GuestClock::StoodStill => ClockChoice::StoodStill,
    };
    let Manifest { id, created_ms, .. } = chain.manifest();
    let from = RestoredFrom { source_url: spec.source_url(), id: id.to_string(), created_ms: *created_ms };
    Ok(Loaded {
        checked,
        from,
        origin: Origin::Snapshot(Box::new(Snapshot { chain, records, fill, clock, watch })),
    })
}

/// A snapshot that no VM can be made of.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// It cannot be read.
    #[error("the snapshot")]
    Snapshot(#[from] ReadError),
    /// Its configuration, or what is to replace parts of it.
    #[error("the configuration is refused: {}", Listed(.faults))]
    Config {
        /// What is wrong.
        faults: Vec<Fault>,
    },
}

struct Listed<'a>(&'a [Fault]);

impl fmt::Display for Listed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let texts: Vec<_> = self.0.iter().map(|fault| format!("{}: {}", fault.path, fault.message)).collect();
        f.write_str(&texts.join("; "))
    }
}

/// The reply to a client whose restore failed by `error`.
pub(super) fn refusal(error: &VmmError) -> ApiError {
    let VmmError::Load(load) = error else {
        let cancelled =
            matches!(error, VmmError::Restore { source } if matches!(**source, VmmError::Cancelled));
        let code = if cancelled { Code::Cancelled } else { Code::RestoreFailed };
        return ApiError::from_error(code, error);
    };
    match &**load {
        LoadError::Config { faults } => faults.clone().into(),
        LoadError::Snapshot(
            ReadError::NoManifest { .. } | ReadError::NotASnapshot { .. } | ReadError::Missing { .. },
        ) => ApiError::from_error(Code::NoSnapshot, error),
        LoadError::Snapshot(_) => ApiError::from_error(Code::RestoreFailed, error),
    }
}
