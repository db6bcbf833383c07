//! MSI-X: the capability, the vector table and the pending bits (PCI local bus specification 3.0, 6.8.2).
//!
//! A vector goes to the hypervisor's routing table exactly while MSI-X is enabled and neither the
//! function nor the vector is masked. What is raised in between is pending and goes out on unmask.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use vmm_device_model::interrupt::{MsiMessage, MsiVectors};
use vmm_device_model::limiter::Limiter;
use vmm_snapshot::RecordError;

use crate::config::{CAP_MSIX, Capability};

/// Bytes of one table entry.
pub const ENTRY_SIZE: u64 = 16;
/// Most vectors that the capability can announce.
pub const MAX_VECTORS: u16 = 2048;

const CONTROL_ENABLE: u16 = 1 << 15;
const CONTROL_FUNCTION_MASK: u16 = 1 << 14;
const VECTOR_MASKED: u32 = 1;
/// What the guest can write of an entry: message address (aligned), its upper half, data, vector control.
const ENTRY_WRITABLE: [u32; 4] = [!0b11, !0, !0, VECTOR_MASKED];

/// Where a structure lies: in which BAR, and where in it (a multiple of 8).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BarPlace {
    /// Which BAR.
    pub bar: u8,
    /// Offset in it.
    pub offset: u32,
}

/// The MSI-X state of one function. Its front end keeps this; who raises interrupts keeps an [`MsixTrigger`].
#[derive(Debug)]
pub struct Msix {
    shared: Arc<Shared>,
}

/// Raises MSI-X vectors from any thread; cheap to clone.
#[derive(Debug, Clone)]
pub struct MsixTrigger {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    vectors: Arc<dyn MsiVectors>,
    state: Mutex<State>,
    route_failure: Limiter,
    trigger_failure: Limiter,
}

#[derive(Debug)]
struct State {
    enabled: bool,
    function_masked: bool,
    entries: Vec<Entry>,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    /// Address, upper address, data, vector control: as the guest sees them.
    words: [u32; 4],
    pending: bool,
    /// What the hypervisor was told.
    routed: Option<MsiMessage>,
}

impl Entry {
    const RESET: Self = Self { words: [0, 0, 0, VECTOR_MASKED], pending: false, routed: None };

    fn message(&self) -> Option<MsiMessage> {
        let [low, high, data, control] = self.words;
        let address = u64::from(high) << 32 | u64::from(low);
        (control & VECTOR_MASKED == 0).then_some(MsiMessage { address, data })
    }
}

impl Msix {
    /// As many table entries as `vectors` has, all masked, MSI-X disabled.
    ///
    /// # Errors
    /// No vectors, or more than 2048.
    pub fn new(vectors: Arc<dyn MsiVectors>) -> Result<Self, MsixError> {
        let count = vectors.count();
        if count == 0 || count > MAX_VECTORS {
            return Err(MsixError::Count { count });
        }
        let entries = vec![Entry::RESET; usize::from(count)];
        let state = Mutex::new(State { enabled: false, function_masked: false, entries });
        let (route_failure, trigger_failure) = (Limiter::for_guest(), Limiter::for_guest());
        Ok(Self { shared: Arc::new(Shared { vectors, state, route_failure, trigger_failure }) })
    }

    /// The capability that announces the table and the pending bits at these places. The message control
    /// word is the two bytes at offset 2 of the capability.
    pub fn capability(&self, table: BarPlace, pending: BarPlace) -> Capability {
        let last = self.count() - 1;
        let mut body = last.to_le_bytes().to_vec();
        for place in [table, pending] {
            body.extend((place.offset & !0b111 | u32::from(place.bar & 0b111)).to_le_bytes());
        }
        let writable = (CONTROL_ENABLE | CONTROL_FUNCTION_MASK).to_le_bytes().to_vec();
        Capability { id: CAP_MSIX, body, writable }
    }

    /// How many vectors.
    pub fn count(&self) -> u16 {
        self.shared.vectors.count()
    }

    /// A handle that raises vectors.
    pub fn trigger(&self) -> MsixTrigger {
        MsixTrigger { shared: Arc::clone(&self.shared) }
    }

    /// The guest may have changed the message control word.
    pub fn set_control(&self, control: u16) {
        let mut state = self.shared.lock();
        let (enabled, masked) = (control & CONTROL_ENABLE != 0, control & CONTROL_FUNCTION_MASK != 0);
        if (state.enabled, state.function_masked) == (enabled, masked) {
            return;
        }
        (state.enabled, state.function_masked) = (enabled, masked);
        if !enabled {
            state.entries.iter_mut().for_each(|e| e.pending = false);
        }
        self.shared.update(&mut state, 0..usize::from(self.count()));
    }

    /// Reads the table at `offset`; zeros past its end.
    pub fn table_read(&self, offset: u64, data: &mut [u8]) {
        let state = self.shared.lock();
        for (at, byte) in (offset..=u64::MAX).zip(data) {
            let (entry, word, shift) = position(at);
            let value = state.entries.get(entry).and_then(|e| e.words.get(word)).copied().unwrap_or(0);
            *byte = (value >> shift) as u8;
        }
    }

    /// Writes the table at `offset`; what lies past its end is dropped.
    pub fn table_write(&self, offset: u64, data: &[u8]) {
        let mut state = self.shared.lock();
        for (at, byte) in (offset..=u64::MAX).zip(data) {
            let (entry, word, shift) = position(at);
            let cell = state.entries.get_mut(entry).and_then(|e| e.words.get_mut(word));
            if let (Some(cell), Some(writable)) = (cell, ENTRY_WRITABLE.get(word)) {
                *cell = (*cell & !(0xff << shift) | u32::from(*byte) << shift) & writable;
            }
        }
        let (first, _, _) = position(offset);
        let (last, _, _) = position(offset.saturating_add(data.len() as u64).saturating_sub(1));
        self.shared.update(&mut state, first..last.saturating_add(1));
    }

    /// Reads the pending bits at `offset`; zeros past their end. Writes to them are undefined and dropped.
    pub fn pending_read(&self, offset: u64, data: &mut [u8]) {
        let state = self.shared.lock();
        for (at, byte) in (offset..=u64::MAX).zip(data) {
            let first = usize::try_from(at.saturating_mul(8)).unwrap_or(usize::MAX);
            let bits = state.entries.iter().skip(first).take(8).enumerate();
            *byte = bits.fold(0, |byte, (i, e)| byte | u8::from(e.pending) << i);
        }
    }

    /// Back to power-on: disabled, all masked, nothing pending.
    pub fn reset(&self) {
        let mut state = self.shared.lock();
        (state.enabled, state.function_masked) = (false, false);
        for entry in &mut state.entries {
            *entry = Entry { routed: entry.routed, ..Entry::RESET };
        }
        self.shared.update(&mut state, 0..usize::from(self.count()));
    }

    /// The table and the pending bits.
    pub fn save(&self) -> MsixV1 {
        let state = self.shared.lock();
        // What the hypervisor was told follows from the rest.
        let entry = |Entry { words, pending, routed: _ }: &Entry| {
            let [address_low, address_high, data, control] = *words;
            MsixEntryV1 { address_low, address_high, data, control, pending: *pending }
        };
        MsixV1 { entries: state.entries.iter().map(entry).collect() }
    }

    /// Takes over what [`save`](Self::save) gave, with the message control word that was saved with the
    /// configuration space. One update of the routing table.
    ///
    /// # Errors
    /// The table has another size, or bits that no guest could have set, or cannot be routed.
    pub fn restore(&self, saved: &MsixV1, control: u16) -> Result<(), RecordError> {
        let invalid = |what: String| RecordError::Invalid { kind: "msix", what };
        if saved.entries.len() != usize::from(self.count()) {
            return Err(invalid(format!("{} vectors, expected {}", saved.entries.len(), self.count())));
        }
        let words = |e: &MsixEntryV1| [e.address_low, e.address_high, e.data, e.control];
        for (i, entry) in saved.entries.iter().enumerate() {
            if words(entry).iter().zip(ENTRY_WRITABLE).any(|(word, writable)| word & !writable != 0) {
                return Err(invalid(format!("entry {i} has reserved bits set")));
            }
        }
        let mut state = self.shared.lock();
        (state.enabled, state.function_masked) =
            (control & CONTROL_ENABLE != 0, control & CONTROL_FUNCTION_MASK != 0);
        for (entry, from) in state.entries.iter_mut().zip(&saved.entries) {
            (entry.words, entry.pending) = (words(from), from.pending);
        }
        if self.shared.update(&mut state, 0..usize::from(self.count())) {
            Ok(())
        } else {
            Err(invalid("the hypervisor refuses its routes".to_owned()))
        }
    }
}

impl MsixTrigger {
    /// Raises vector `vector`, or makes it pending while it is masked. Nothing happens while MSI-X is
    /// disabled, or when there is no such vector.
    pub fn trigger(&self, vector: u16) {
        let mut state = self.shared.lock();
        if !state.enabled {
            return;
        }
        if let Some(entry) = state.entries.get_mut(usize::from(vector)) {
            // Under the lock: once a mask is written, no interrupt follows.
            entry.pending = entry.routed.is_none() || !self.shared.raise(vector);
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the hypervisor what changed among the vectors of `range`, and sends what was pending. Returns
    /// whether it took the changes.
    fn update(&self, state: &mut State, range: Range<usize>) -> bool {
        let open = state.enabled && !state.function_masked;
        let wanted = |entry: &Entry| if open { entry.message() } else { None };
        let in_range = |i: usize| range.contains(&i);
        let numbered = (0_u16..).zip(&state.entries).filter(|(i, _)| in_range(usize::from(*i)));
        let changes: Vec<_> =
            numbered.filter(|(_, e)| wanted(e) != e.routed).map(|(i, e)| (i, wanted(e))).collect();
        let mut taken = true;
        if !changes.is_empty() {
            match self.vectors.set_routes(&changes) {
                Ok(()) => {
                    for (vector, route) in changes {
                        if let Some(entry) = state.entries.get_mut(usize::from(vector)) {
                            entry.routed = route;
                        }
                    }
                }
                // The routes are as before and the next change tries again; what is raised meanwhile is
                // pending.
                Err(e) => {
                    taken = false;
                    if let Some(admitted) = self.route_failure.admit(Instant::now()) {
                        log::error!("cannot route MSI-X vectors: {e}{admitted}");
                    }
                }
            }
        }
        for (vector, entry) in (0_u16..).zip(&mut state.entries) {
            if entry.pending && open && entry.routed.is_some() {
                entry.pending = !self.raise(vector);
            }
        }
        taken
    }

    fn raise(&self, vector: u16) -> bool {
        let raised = self.vectors.trigger(vector);
        if let Err(e) = &raised
            && let Some(admitted) = self.trigger_failure.admit(Instant::now())
        {
            log::error!("cannot raise MSI-X vector {vector}: {e}{admitted}");
        }
        raised.is_ok()
    }
}

/// Entry, word in it, and shift in the word of the byte at `offset` of the table.
fn position(offset: u64) -> (usize, usize, u32) {
    let entry = usize::try_from(offset / ENTRY_SIZE).unwrap_or(usize::MAX);
    (entry, (offset % ENTRY_SIZE / 4) as usize, (offset % 4) as u32 * 8)
}

/// Saved state of an MSI-X table.
#[derive(Debug, Clone, PartialEq, Eq, minicbor::Encode, minicbor::Decode)]
pub struct MsixV1 {
    /// All vectors in order.
    #[n(0)]
    pub entries: Vec<MsixEntryV1>,
}

/// Saved state of one vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq, minicbor::Encode, minicbor::Decode)]
pub struct MsixEntryV1 {
    /// Message address, lower half.
    #[n(0)]
    pub address_low: u32,
    /// Message address, upper half.
    #[n(1)]
    pub address_high: u32,
    /// Message data.
    #[n(2)]
    pub data: u32,
    /// Vector control: bit 0 is the mask.
    #[n(3)]
    pub control: u32,
    /// Raised while masked.
    #[n(4)]
    pub pending: bool,
}

/// Why a function cannot have MSI-X.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MsixError {
    /// A table has 1 to 2048 entries.
    #[error("an MSI-X table cannot have {count} vectors")]
    Count {
        /// Vectors asked for.
        count: u16,
    },
}
