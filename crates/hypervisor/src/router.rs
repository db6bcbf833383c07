//! The one table of interrupt routes of a VM.
//!
//! The table is shared by the IOAPIC's pins, which take the first GSIs (with an IOAPIC in user space KVM
//! reads from their routes which vectors' EOIs to report), and by blocks of MSI vectors. KVM replaces the
//! table as a whole, so one owner keeps it, and a change of many routes is one call.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::{Msi, MsiRoute, Vm};

/// Owner of a VM's interrupt routes.
#[derive(Debug)]
pub struct InterruptRouter {
    vm: Arc<dyn Vm>,
    pins: u32,
    capacity: u32,
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    /// Routes in force, by GSI.
    routes: BTreeMap<u32, Msi>,
    /// Which GSI of `first..` is given out; index 0 is the first after the pins.
    taken: Vec<bool>,
    /// Changes are written down, and told to the hypervisor together.
    held: bool,
}

/// While this is there, changes of routes wait for [`commit`](Self::commit). Dropped without, they wait for the next change.
#[derive(Debug)]
#[must_use]
pub struct HeldRoutes<'a>(&'a InterruptRouter);

impl HeldRoutes<'_> {
    /// Tells the hypervisor all that changed, in one call.
    ///
    /// # Errors
    /// The hypervisor refuses; the routes in force are those before.
    pub fn commit(self) -> io::Result<()> {
        let table = self.0.lock();
        self.0.tell(&table.routes)
    }
}

impl Drop for HeldRoutes<'_> {
    fn drop(&mut self) {
        self.0.lock().held = false;
    }
}

impl InterruptRouter {
    /// A router for `vm` with `pins` IOAPIC pins and GSIs below `capacity` in all (KVM: 4096).
    pub fn new(vm: Arc<dyn Vm>, pins: u32, capacity: u32) -> Arc<Self> {
        Arc::new(Self { vm, pins, capacity, table: Mutex::default() })
    }

    /// Gathers changes of routes, so that a restore of many devices is one call. No interrupt may be raised meanwhile.
    pub fn hold(&self) -> HeldRoutes<'_> {
        self.lock().held = true;
        HeldRoutes(self)
    }

    /// Sets or removes the routes of IOAPIC pins, all in one call.
    ///
    /// # Errors
    /// A pin does not exist, or the hypervisor refuses; the routes are then as before.
    pub fn set_pins(&self, routes: &[(u32, Option<Msi>)]) -> io::Result<()> {
        if let Some((pin, _)) = routes.iter().find(|(pin, _)| *pin >= self.pins) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("no IOAPIC pin {pin}")));
        }
        self.update(routes.iter().copied())
    }

    /// Raises `msi` at once, outside the table.
    ///
    /// # Errors
    /// The hypervisor refuses.
    pub fn signal(&self, msi: Msi) -> io::Result<()> {
        self.vm.signal_msi(msi).map_err(io::Error::other)
    }

    /// A block of `count` vectors with consecutive GSIs and no routes.
    ///
    /// # Errors
    /// No room in the table, or no descriptors left.
    pub fn allocate(self: &Arc<Self>, count: u16) -> io::Result<MsiBlock> {
        let events = (0..count).map(|_| EventFd::new(EFD_NONBLOCK)).collect::<io::Result<Vec<_>>>()?;
        let first = self.pins + self.take(usize::from(count))?;
        let attached = Mutex::new(vec![false; events.len()]);
        Ok(MsiBlock { router: Arc::clone(self), first, events, attached })
    }

    /// First free run of `count` GSIs, marked taken, counted from the first after the pins.
    fn take(&self, count: usize) -> io::Result<u32> {
        let mut table = self.lock();
        let taken = &mut table.taken;
        let mut start = 0;
        while let Some(at) = taken.iter().skip(start).take(count).position(|t| *t) {
            start += at + 1;
        }
        let end = start + count;
        if !u32::try_from(end).is_ok_and(|end| end <= self.capacity.saturating_sub(self.pins)) {
            return Err(io::Error::new(io::ErrorKind::StorageFull, "interrupt routing table is full"));
        }
        if taken.len() < end {
            taken.resize(end, false);
        }
        taken.iter_mut().take(end).skip(start).for_each(|t| *t = true);
        u32::try_from(start).map_err(io::Error::other)
    }

    fn give_back(&self, first: u32, count: u32) {
        let range = first..first + count;
        // Routes go first. If the hypervisor refuses, a stale route without an irqfd hurts nobody.
        let _ = self.update(range.clone().map(|gsi| (gsi, None)));
        let mut table = self.lock();
        for gsi in range {
            let index = (gsi - self.pins) as usize;
            if let Some(taken) = table.taken.get_mut(index) {
                *taken = false;
            }
        }
    }

    fn update(&self, changes: impl Iterator<Item = (u32, Option<Msi>)>) -> io::Result<()> {
        let mut table = self.lock();
        let mut routes = table.routes.clone();
        for (gsi, msi) in changes {
            match msi {
                Some(msi) => routes.insert(gsi, msi),
                None => routes.remove(&gsi),
            };
        }
        if routes == table.routes {
            return Ok(());
        }
        if !table.held {
            self.tell(&routes)?;
        }
        table.routes = routes;
        Ok(())
    }

    fn tell(&self, routes: &BTreeMap<u32, Msi>) -> io::Result<()> {
        let list: Vec<_> = routes.iter().map(|(gsi, msi)| MsiRoute { gsi: *gsi, msi: *msi }).collect();
        self.vm.set_routes(&list).map_err(io::Error::other)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Consecutive MSI vectors of one device. Dropped, they are free again.
#[derive(Debug)]
pub struct MsiBlock {
    router: Arc<InterruptRouter>,
    first: u32,
    events: Vec<EventFd>,
    /// Whose eventfd the hypervisor listens to: those that had a route once.
    attached: Mutex<Vec<bool>>,
}

impl MsiBlock {
    /// How many vectors.
    pub fn count(&self) -> u16 {
        // Built from a u16.
        u16::try_from(self.events.len()).unwrap_or(u16::MAX)
    }

    /// Sets or removes routes, all in one call.
    ///
    /// # Errors
    /// A vector is not of this block, or the hypervisor refuses; the routes are then as before.
    pub fn set_routes(&self, routes: &[(u16, Option<Msi>)]) -> io::Result<()> {
        for (index, msi) in routes {
            let event = self.event_of(*index)?;
            if msi.is_some() {
                self.attach(*index, event)?;
            }
        }
        self.router.update(routes.iter().map(|(index, msi)| (self.first + u32::from(*index), *msi)))
    }

    /// Raises a vector; nothing happens where it has no route.
    ///
    /// # Errors
    /// The vector is not of this block, or the eventfd could not be written.
    pub fn trigger(&self, index: u16) -> io::Result<()> {
        self.event_of(index)?.write(1)
    }

    /// The eventfd that raises vector `index`.
    ///
    /// # Errors
    /// The vector is not of this block, or no descriptor is left.
    pub fn event(&self, index: u16) -> io::Result<EventFd> {
        self.event_of(index)?.try_clone()
    }

    fn event_of(&self, index: u16) -> io::Result<&EventFd> {
        self.events
            .get(usize::from(index))
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, format!("no MSI vector {index}")))
    }

    fn attach(&self, index: u16, event: &EventFd) -> io::Result<()> {
        let mut attached = self.attached.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(done) = attached.get_mut(usize::from(index)).filter(|done| !**done) {
            self.router.vm.attach_irqfd(event, self.first + u32::from(index)).map_err(io::Error::other)?;
            *done = true;
        }
        Ok(())
    }
}

impl Drop for MsiBlock {
    fn drop(&mut self) {
        let attached = std::mem::take(&mut *self.attached.lock().unwrap_or_else(PoisonError::into_inner));
        for ((gsi, event), attached) in (self.first..).zip(&self.events).zip(attached) {
            if attached {
                // Nothing to be done about a refusal; closing the eventfd detaches it as well.
                let _ = self.router.vm.detach_irqfd(event, gsi);
            }
        }
        self.router.give_back(self.first, u32::from(self.count()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::Fake;
    use crate::{Hypervisor, VmOptions};

    fn router(capacity: u32) -> (Fake, Arc<InterruptRouter>) {
        let fake = Fake::new();
        let vm = fake.create_vm(&VmOptions { ioapic_pins: 24, tss_address: 0 }).unwrap();
        (fake, InterruptRouter::new(vm, 24, capacity))
    }

    const MSI: Msi = Msi { address: 0xfee0_0000, data: 0x41 };

    #[test]
    fn many_routes_are_one_call_and_no_change_is_none() {
        let (fake, router) = router(64);
        let block = router.allocate(3).unwrap();
        block.set_routes(&[(0, Some(MSI)), (2, Some(MSI)), (1, None)]).unwrap();
        assert_eq!(fake.count("KVM_SET_GSI_ROUTING"), 1);
        assert_eq!(fake.routes().iter().map(|r| r.gsi).collect::<Vec<_>>(), [24, 26]);
        block.set_routes(&[(0, Some(MSI))]).unwrap();
        assert_eq!(fake.count("KVM_SET_GSI_ROUTING"), 1);
    }

    #[test]
    fn blocks_are_given_back_and_reused() {
        let (fake, router) = router(30);
        let first = router.allocate(4).unwrap();
        let second = router.allocate(2).unwrap();
        assert_eq!(router.allocate(1).unwrap_err().kind(), io::ErrorKind::StorageFull);
        first.set_routes(&[(0, Some(MSI))]).unwrap();
        drop(first);
        assert!(fake.routes().is_empty());
        assert_eq!(fake.live().irqfds, 0);
        let third = router.allocate(3).unwrap();
        third.set_routes(&[(0, Some(MSI))]).unwrap();
        assert_eq!(fake.routes().first().unwrap().gsi, 24);
        second.set_routes(&[(1, Some(MSI))]).unwrap();
        assert_eq!(fake.routes().last().unwrap().gsi, 29);
    }

    #[test]
    fn held_changes_are_one_call() {
        let (fake, router) = router(64);
        let block = router.allocate(2).unwrap();
        let held = router.hold();
        router.set_pins(&[(4, Some(MSI))]).unwrap();
        block.set_routes(&[(0, Some(MSI))]).unwrap();
        block.set_routes(&[(1, Some(MSI))]).unwrap();
        assert_eq!(fake.count("KVM_SET_GSI_ROUTING"), 0);
        held.commit().unwrap();
        assert_eq!((fake.count("KVM_SET_GSI_ROUTING"), fake.routes().len()), (1, 3));
        block.set_routes(&[(1, None)]).unwrap();
        assert_eq!((fake.count("KVM_SET_GSI_ROUTING"), fake.routes().len()), (2, 2));
        fake.fail_nth_of("KVM_SET_GSI_ROUTING", 1);
        router.hold().commit().unwrap_err();
    }

    #[test]
    fn a_refused_change_leaves_the_routes() {
        let (fake, router) = router(64);
        router.set_pins(&[(4, Some(MSI))]).unwrap();
        fake.fail_nth_of("KVM_SET_GSI_ROUTING", 1);
        router.set_pins(&[(5, Some(MSI))]).unwrap_err();
        assert_eq!(fake.routes().len(), 1);
        router.set_pins(&[(5, Some(MSI))]).unwrap();
        assert_eq!(fake.routes().len(), 2, "a refused change is not remembered as done");
        router.set_pins(&[(24, Some(MSI))]).unwrap_err();
    }
}
