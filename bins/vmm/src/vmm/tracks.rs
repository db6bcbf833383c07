//! What changes in guest memory: while a live snapshot is written, and since the snapshot that the next one may build on.

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use vmm_api::spec::SnapshotSpec;
use vmm_memory_manager::dirty::{Changed, DirtyCollector, DirtyError};
use vmm_memory_manager::map::MemoryMap;
use vmm_snapshot::directory::{Hash, Place};

use super::writer::Since;
use crate::machine::Machine;

/// Name of the tracker of a live snapshot.
const LIVE: &str = "live";
/// Name of the tracker of changes since a snapshot.
const SINCE: &str = "since";

/// The trackers of a machine.
#[derive(Debug, Default)]
pub(super) struct Tracks {
    collector: DirtyCollector,
    base: Option<Base>,
    /// What was taken from the tracker for a snapshot that is not written yet.
    taken: Changed,
    /// The tracker was started for it.
    fresh: bool,
    /// What a live snapshot has to write again is tracked.
    live: bool,
}

/// The snapshot that the next one may build on.
#[derive(Debug)]
struct Base {
    folder: PathBuf,
    id: Hash,
    by: By,
}

/// How changes since it are known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum By {
    /// By the tracker.
    Tracker,
    /// By the page tables: memory is a private mapping of the snapshot's files.
    PageTables,
}

impl Tracks {
    /// The machine was restored from the snapshot `id` in `folder`. Where memory is a mapping of its files, the page tables know
    /// what changes; else it is tracked if `track` is wanted.
    pub(super) fn restored(
        &mut self,
        memory: &mut MemoryMap,
        (folder, id): (&Path, Hash),
        track: bool,
    ) -> Result<(), TrackError> {
        let by = if memory.changed_since_restore()?.is_some() {
            By::PageTables
        } else if track {
            self.collector.start(memory, SINCE)?;
            // That is not in the snapshot.
            let Range { start, end } = Machine::renewed();
            let offset = |place: &Place, gpa: u64| gpa.saturating_sub(place.gpa).min(place.size);
            let renewed = |place: &Place| std::iter::once(offset(place, start)..offset(place, end)).collect();
            self.collector.give_back(memory, SINCE, &memory.places().iter().map(renewed).collect())?;
            By::Tracker
        } else {
            return Ok(());
        };
        self.base = Some(Base { folder: folder.to_owned(), id, by });
        Ok(())
    }

    /// A guest that stands still is to be saved so: what an incremental snapshot holds; what changes from here on is tracked
    /// if that is wanted.
    pub(super) fn at_rest(
        &mut self,
        memory: &mut MemoryMap,
        spec: &SnapshotSpec,
    ) -> Result<Option<Since>, TrackError> {
        let since = spec.incremental.then(|| self.since(memory)).transpose()?;
        if spec.track {
            self.begin(memory)?;
        }
        Ok(since)
    }

    /// What an incremental snapshot holds, so far.
    fn since(&mut self, memory: &MemoryMap) -> Result<Since, TrackError> {
        let Some(Base { folder, id, by }) = &self.base else { return Err(TrackError::NoBase) };
        let changed = match by {
            By::PageTables => memory.changed_since_restore()?.ok_or(TrackError::NoBase)?,
            By::Tracker => {
                let changed = self.collector.take_changed(memory, SINCE)?;
                join(&mut self.taken, &changed);
                changed
            }
        };
        Ok(Since { parent: folder.clone(), id: *id, changed })
    }

    /// The guest stands still: changes from here on are those since the snapshot.
    pub(super) fn begin(&mut self, memory: &mut MemoryMap) -> Result<(), TrackError> {
        if self.base.as_ref().is_some_and(|base| base.by == By::Tracker) {
            let changed = self.collector.take_changed(memory, SINCE)?;
            join(&mut self.taken, &changed);
        } else {
            self.collector.start(memory, SINCE)?;
            self.fresh = true;
        }
        Ok(())
    }

    /// The snapshot is written: what was begun holds from now on.
    pub(super) fn keep(&mut self, folder: &Path, id: Hash) {
        if self.fresh
            || !self.taken.is_empty()
            || self.base.as_ref().is_some_and(|base| base.by == By::Tracker)
        {
            self.base = Some(Base { folder: folder.to_owned(), id, by: By::Tracker });
        }
        (self.taken, self.fresh) = (Changed::new(), false);
    }

    /// The snapshot is not written: the one before is still what the next may build on.
    pub(super) fn give_back(&mut self, memory: &mut MemoryMap) -> Result<(), TrackError> {
        let (taken, fresh) = (std::mem::take(&mut self.taken), std::mem::take(&mut self.fresh));
        if fresh {
            self.collector.stop(memory, SINCE)?;
        } else if !taken.is_empty() {
            self.collector.give_back(memory, SINCE, &taken)?;
        }
        Ok(())
    }

    /// What a guest that runs on changes is tracked from now on.
    pub(super) fn begin_live(&mut self, memory: &mut MemoryMap) -> Result<(), TrackError> {
        self.collector.start(memory, LIVE)?;
        self.live = true;
        Ok(())
    }

    /// The same for a snapshot; an incremental one holds so far what is given.
    pub(super) fn begin_passes(
        &mut self,
        memory: &mut MemoryMap,
        spec: &SnapshotSpec,
    ) -> Result<Option<Since>, TrackError> {
        // In this order: what is written in between is in both, and not in neither.
        self.begin_live(memory)?;
        spec.incremental.then(|| self.since(memory)).transpose()
    }

    /// What changed since it began, or since the last call.
    pub(super) fn live(&mut self, memory: &MemoryMap) -> Result<Changed, TrackError> {
        Ok(self.collector.take_changed(memory, LIVE)?)
    }

    /// It is over, if it was tracked.
    pub(super) fn end_live(&mut self, memory: &mut MemoryMap) -> Result<(), TrackError> {
        match std::mem::take(&mut self.live) {
            true => Ok(self.collector.stop(memory, LIVE)?),
            false => Ok(()),
        }
    }
}

/// Adds `more`, per region.
fn join(all: &mut Changed, more: &Changed) {
    all.resize(all.len().max(more.len()), Vec::new());
    for (ranges, more) in all.iter_mut().zip(more) {
        ranges.extend(more.iter().cloned());
    }
}

/// What changed is not known.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrackError {
    /// Nothing is kept track of.
    #[error("there is no snapshot that changes are known since: take a full one with track first")]
    NoBase,
    /// A source cannot be asked.
    #[error("dirty pages")]
    Dirty(#[from] DirtyError),
    /// The page tables cannot be asked.
    #[error("page tables")]
    PageTables(#[from] io::Error),
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use vmm_device_model::dirty::DirtySource;
    use vmm_hypervisor::fake::Fake;
    use vmm_hypervisor::{Hypervisor, VmOptions};
    use vmm_memory_manager::layout::PAGE_SIZE;
    use vmm_memory_manager::zone::{ZoneConfig, ZoneOptions};

    use super::*;

    /// Between any two looks the guest writes a page that it has not written before.
    #[derive(Debug, Default)]
    struct Writing(AtomicU64);

    impl DirtySource for Writing {
        fn take(&self, mark: &mut dyn FnMut(u64, u64)) -> io::Result<()> {
            mark(self.0.fetch_add(1, Ordering::Relaxed) * PAGE_SIZE, 1);
            Ok(())
        }
    }

    #[test]
    fn what_is_written_as_a_snapshot_in_passes_begins_is_in_it() {
        let vm = Fake::new().create_vm(&VmOptions { ioapic_pins: 24, tss_address: 0 }).unwrap();
        let options = ZoneOptions::default();
        let zone =
            ZoneConfig { id: "z".into(), size: 1 << 20, file: None, shared: false, huge_page: None, options };
        let mut memory = MemoryMap::create(vm, &[zone], 40).unwrap();
        let (mut tracks, writing) = (Tracks::default(), Arc::new(Writing::default()));
        tracks.collector.add_source(Arc::clone(&writing) as Arc<dyn DirtySource>);
        tracks.restored(&mut memory, (Path::new("/a"), Hash([1; 32])), true).unwrap();
        let known = writing.0.load(Ordering::Relaxed);
        let spec = SnapshotSpec { folder: "/b".into(), live: true, incremental: true, track: true };
        let mut held = tracks.begin_passes(&mut memory, &spec).unwrap().unwrap();
        assert_eq!((held.parent.as_path(), held.id), (Path::new("/a"), Hash([1; 32])));
        // The guest stands still.
        join(&mut held.changed, &tracks.live(&memory).unwrap());
        let written = (known..writing.0.load(Ordering::Relaxed)).map(|page| page * PAGE_SIZE);
        for page in written {
            assert!(held.changed.iter().flatten().any(|range| range.contains(&page)), "{page:#x}: {held:?}");
        }
    }

    #[test]
    fn changes_are_joined_by_region() {
        let mut all = Changed::new();
        join(&mut all, &vec![vec![0..1], vec![]]);
        join(&mut all, &vec![vec![4..5], vec![2..3]]);
        assert_eq!(all, vec![vec![0..1, 4..5], vec![2..3]]);
    }
}
