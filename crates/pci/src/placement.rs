//! Keeps the bus map in line with what the BARs say.
//!
//! Nothing is told what moved: after a change every function is asked where its BARs should be, and the
//! difference to where they are is made good. So it does not matter in which order racing vCPUs arrive, and
//! a BAR that could not be mapped for another stood there is tried again whenever anything moves.
//!
//! Lock order: the table of placements, then either one function (to ask it) or the bus map (to change it),
//! never both.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use vmm_device_model::bus::{Bus, BusError, BusMap, Mapping};
use vmm_device_model::doorbell::{DoorbellAddress, Doorbells};
use vmm_device_model::limiter::Limiter;

use crate::bdf::Bdf;
use crate::config::BARS;
use crate::function::{Attach, BarWindow, PciFunction};
use crate::windows::Windows;

#[derive(Debug)]
pub(crate) struct Placement {
    bus: Arc<Bus>,
    doorbells: Arc<dyn Doorbells>,
    windows: Windows,
    placed: Mutex<Vec<Placed>>,
    stuck: Limiter,
}

/// One BAR and where it answers now.
#[derive(Debug)]
struct Placed {
    bdf: Bdf,
    window: BarWindow,
    function: FunctionRef,
    at: Option<u64>,
    /// Where its doorbells are attached, and which they are.
    rung: Vec<(u64, usize)>,
    refusal: Limiter,
    /// A doorbell could not be moved; a guest can move its BAR as often as it likes.
    unheard: Limiter,
}

struct FunctionRef(Arc<Mutex<dyn PciFunction>>);

impl std::fmt::Debug for FunctionRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("function")
    }
}

impl Placement {
    pub(crate) fn new(bus: Arc<Bus>, doorbells: Arc<dyn Doorbells>, windows: Windows) -> Self {
        Self { bus, doorbells, windows, placed: Mutex::default(), stuck: Limiter::for_guest() }
    }

    /// From now on the BARs of a function are kept in line.
    pub(crate) fn add(&self, bdf: Bdf, attach: &Attach) {
        let placed = attach.bars.iter().map(|window| Placed {
            bdf,
            window: window.clone(),
            function: FunctionRef(Arc::clone(&attach.function)),
            at: None,
            rung: Vec::new(),
            refusal: Limiter::for_guest(),
            unheard: Limiter::for_guest(),
        });
        let mut table = self.lock();
        table.extend(placed);
        self.bring_in_line(&mut table);
    }

    /// Takes the BARs of a function off the bus.
    pub(crate) fn remove(&self, bdf: Bdf) {
        let mut table = self.lock();
        let (mut gone, rest) =
            std::mem::take(&mut *table).into_iter().partition::<Vec<_>, _>(|p| p.bdf == bdf);
        *table = rest;
        let moves: Vec<_> = gone.iter_mut().map(|p| (p, None)).collect();
        self.apply(moves);
        self.bring_in_line(&mut table);
    }

    /// Some function said that its BARs moved.
    pub(crate) fn reconcile(&self) {
        self.bring_in_line(&mut self.lock());
    }

    /// Where a BAR answers now.
    pub(crate) fn address(&self, bdf: Bdf, index: u8) -> Option<u64> {
        self.lock().iter().find(|p| p.bdf == bdf && p.window.index == index)?.at
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Placed>> {
        self.placed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn bring_in_line(&self, table: &mut [Placed]) {
        let mut moves = Vec::new();
        // BARs of one function follow each other, so it is asked once.
        let mut asked: Option<(Bdf, [Option<u64>; BARS])> = None;
        for placed in table {
            let wanted = match asked {
                Some((bdf, wanted)) if bdf == placed.bdf => wanted,
                _ => placed.function.0.lock().unwrap_or_else(PoisonError::into_inner).bar_addresses(),
            };
            asked = Some((placed.bdf, wanted));
            let wanted = wanted.get(usize::from(placed.window.index)).copied().flatten();
            if wanted != placed.at {
                moves.push((placed, wanted));
            }
        }
        if !moves.is_empty() {
            self.apply(moves);
        }
    }

    /// Moves BARs: doorbells off, one change of the map, doorbells on. A kick in between goes through the
    /// bus and is not lost.
    fn apply(&self, mut moves: Vec<(&mut Placed, Option<u64>)>) {
        for (placed, _) in &mut moves {
            self.silence(placed);
        }
        let moved = self.bus.update(|map| {
            for (placed, _) in &moves {
                if let Some(base) = placed.at {
                    map.remove(base)?;
                }
            }
            let insert = |(placed, wanted): &(&mut Placed, Option<u64>)| self.insert(map, placed, *wanted);
            Ok(moves.iter().map(insert).collect::<Vec<_>>())
        });
        match moved {
            Ok(addresses) => {
                for ((placed, _), at) in moves.iter_mut().zip(addresses) {
                    placed.at = at;
                }
            }
            // Only our own bookkeeping can be wrong here; the map did not change.
            Err(e) => {
                if let Some(admitted) = self.stuck.admit(Instant::now()) {
                    log::error!("PCI BARs did not move: {e}{admitted}");
                }
            }
        }
        for (placed, _) in &mut moves {
            self.ring(placed);
        }
    }

    /// Maps a BAR where it should be; where that cannot be, it answers nowhere.
    fn insert(&self, map: &mut BusMap, placed: &Placed, wanted: Option<u64>) -> Option<u64> {
        let (base, len) = (wanted?, placed.window.size);
        let (target, region) = (Arc::clone(&placed.window.target), placed.window.region);
        let inserted = if self.windows.contain(base, len) {
            map.insert(Mapping { base, len, target, region })
        } else {
            Err(BusError::BadRange { base, len })
        };
        match inserted {
            Ok(()) => Some(base),
            Err(e) => {
                if let Some(admitted) = placed.refusal.admit(Instant::now()) {
                    let bar = placed.window.index;
                    log::warn!(bdf:% = placed.bdf; "BAR {bar} is not mapped: {e}{admitted}");
                }
                None
            }
        }
    }

    fn silence(&self, placed: &mut Placed) {
        for (address, bell) in placed.rung.drain(..) {
            let Some(bell) = placed.window.doorbells.get(bell) else { continue };
            if let Err(e) = self.doorbells.detach(DoorbellAddress::Mmio(address), &bell.event)
                && let Some(admitted) = placed.unheard.admit(Instant::now())
            {
                log::error!(bdf:% = placed.bdf; "a doorbell stays at {address:#x}: {e}{admitted}");
            }
        }
    }

    fn ring(&self, placed: &mut Placed) {
        let Some(base) = placed.at else { return };
        for (i, bell) in placed.window.doorbells.iter().enumerate() {
            // The BAR is mapped and the offset was checked at attach, so this does not wrap.
            let address = base.saturating_add(bell.offset);
            match self.doorbells.attach(DoorbellAddress::Mmio(address), &bell.event) {
                Ok(()) => placed.rung.push((address, i)),
                // It works without: the write goes through the bus.
                Err(e) => {
                    if let Some(admitted) = placed.unheard.admit(Instant::now()) {
                        log::error!(bdf:% = placed.bdf; "no doorbell at {address:#x}: {e}{admitted}");
                    }
                }
            }
        }
    }
}
