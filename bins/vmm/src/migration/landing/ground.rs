//! Where memory is to land: what the driver opens, and connections look at.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_device_model::dma::GuestRam;
use vmm_migration_protocol::{Absent, Barrier, Features, MemoryLayout};

use super::Said;
use crate::migration::ahead::Ahead;
use crate::migration::backlog::Backlog;
use crate::migration::postcopy::arriving::Arriving;

/// Where memory is to land.
#[derive(Debug, Default)]
pub(in crate::migration) struct Ground {
    /// Empty while the destination takes none.
    open: Mutex<Option<Open>>,
    /// The connection on which descriptors of memory are to come; 0 for none.
    handed: AtomicU64,
    /// Memory that comes after the hand-over.
    late: Mutex<Option<Arc<Arriving>>>,
    /// The session's first connection; 0 for none.
    first: AtomicU64,
    /// What waits for the driver.
    pub(super) backlog: Arc<Backlog>,
    /// Something has come where memory does.
    pub(super) came: Arc<AtomicBool>,
}

#[derive(Debug)]
struct Open {
    target: Arc<Target>,
    /// The connections that it comes on, by their numbers here: their indices in the session.
    connections: BTreeMap<u64, u16>,
}

/// The memory of a session.
#[derive(Debug)]
pub(super) struct Target {
    pub(super) memory: Arc<GuestRam>,
    pub(super) layout: MemoryLayout,
    /// What was agreed on.
    pub(super) features: Features,
    /// Allocates ahead of what arrives, where there is a thread for it.
    pub(super) ahead: Option<Ahead>,
    barrier: Mutex<Barrier>,
    /// What is to come after the hand-over; `None` where nothing may.
    absent: Option<Mutex<Vec<Absent>>>,
}

impl Ground {
    /// Takes memory, laid out as in `layout`, on connection `number` and as many more as the session has, in the way that was agreed on.
    pub(in crate::migration) fn open(
        &self,
        memory: Arc<GuestRam>,
        layout: MemoryLayout,
        (number, connections): (u64, u16),
        features: Features,
        ahead: Option<Ahead>,
    ) {
        let barrier = Mutex::new(Barrier::new(connections, layout.bytes()));
        let absent = features.contains(Features::POST_COPY).then(Mutex::default);
        let target = Arc::new(Target { memory, layout, features, ahead, barrier, absent });
        *self.lock() = Some(Open { target, connections: BTreeMap::from([(number, 0)]) });
    }

    /// Takes it on connection `number`, too, which is `index` of the session, unless that one is there already.
    pub(in crate::migration) fn admit(&self, number: u64, index: u16) -> bool {
        let mut open = self.lock();
        let Some(Open { connections, .. }) = &mut *open else { return false };
        let is_free = !connections.values().any(|taken| *taken == index);
        if is_free {
            connections.insert(number, index);
        }
        is_free
    }

    pub(in crate::migration) fn close(&self) {
        *self.lock() = None;
    }

    /// What the last pass has left out.
    pub(in crate::migration) fn absent(&self) -> Vec<Absent> {
        let open = self.lock();
        let absent = open.as_ref().and_then(|open| open.target.absent.as_ref());
        absent.map(|all| all.lock().unwrap_or_else(PoisonError::into_inner).clone()).unwrap_or_default()
    }

    /// Memory that comes after the hand-over goes there.
    pub(in crate::migration) fn follow(&self, arriving: Option<Arc<Arriving>>) {
        *self.late.lock().unwrap_or_else(PoisonError::into_inner) = arriving;
    }

    /// Where it goes that comes on connection `number`.
    pub(super) fn late(&self, number: u64) -> Option<Arc<Arriving>> {
        let late = self.late.lock().unwrap_or_else(PoisonError::into_inner);
        late.clone().filter(|late| late.takes(number))
    }

    /// Descriptors of memory are to come on this connection, whose number is not 0.
    pub(in crate::migration) fn expect_files(&self, connection: u64) {
        self.handed.store(connection, Ordering::SeqCst);
    }

    /// No descriptors are to come any more.
    pub(in crate::migration) fn refuse_files(&self) {
        self.handed.store(0, Ordering::SeqCst);
    }

    /// A session has begun on this connection, whose number is not 0.
    pub(in crate::migration) fn begin(&self, connection: u64) {
        self.first.store(connection, Ordering::SeqCst);
    }

    /// Whether something has come where memory does since this was asked last. It need not be a frame yet: in what the link holds, others
    /// wait behind much memory.
    pub(in crate::migration) fn has_come(&self) -> bool {
        self.came.swap(false, Ordering::Relaxed)
    }

    pub(super) fn is_first(&self, connection: u64) -> bool {
        self.first.load(Ordering::SeqCst) == connection
    }

    pub(super) fn takes_files(&self, connection: u64) -> bool {
        self.handed.load(Ordering::SeqCst) == connection
    }

    fn lock(&self) -> MutexGuard<'_, Option<Open>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where memory of connection `number` lands, and which of the session's it is.
    pub(super) fn target(&self, number: u64) -> Option<(Arc<Target>, u16)> {
        let open = self.lock();
        let open = open.as_ref()?;
        open.connections.get(&number).map(|index| (Arc::clone(&open.target), *index))
    }
}

impl Target {
    /// Notes that this comes after the hand-over.
    pub(super) fn leave_out(&self, range: Absent) -> Option<Said> {
        let Some(absent) = &self.absent else {
            return Some(Said::Garbage("post-copy was not agreed on".to_owned()));
        };
        absent.lock().unwrap_or_else(PoisonError::into_inner).push(range);
        None
    }

    pub(super) fn barrier(&self) -> MutexGuard<'_, Barrier> {
        self.barrier.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
