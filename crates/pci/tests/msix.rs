//! MSI-X: masks, pending bits, routes and saved state.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests fail by panicking")]

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use vmm_device_model::interrupt::{MsiMessage, MsiVectors};
use vmm_device_model::testing::{TestVectors, Xorshift};
use vmm_pci::config::{ConfigSpace, Identity};
use vmm_pci::endpoint::Endpoint;
use vmm_pci::msix::{BarPlace, Msix, MsixError};
use vmm_sys_util::eventfd::EventFd;

const ENABLE: u16 = 0x8000;
const MASK: u16 = 0x4000;

type Routes = Vec<(u16, Option<MsiMessage>)>;

/// Counts updates of the routing table and fails them on demand.
#[derive(Debug)]
struct Counting {
    inner: TestVectors,
    updates: AtomicU64,
    fail: AtomicBool,
    log: Mutex<Vec<Routes>>,
}

impl Counting {
    fn new(count: u16) -> Arc<Self> {
        let inner = TestVectors::new(count).unwrap();
        Arc::new(Self {
            inner,
            updates: AtomicU64::new(0),
            fail: AtomicBool::new(false),
            log: Mutex::default(),
        })
    }

    fn take_updates(&self) -> u64 {
        self.updates.swap(0, Ordering::Relaxed)
    }
}

impl MsiVectors for Counting {
    fn count(&self) -> u16 {
        self.inner.count()
    }

    fn set_routes(&self, routes: &[(u16, Option<MsiMessage>)]) -> io::Result<()> {
        self.updates.fetch_add(1, Ordering::Relaxed);
        if self.fail.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        self.log.lock().unwrap().push(routes.to_vec());
        self.inner.set_routes(routes)
    }

    fn trigger(&self, index: u16) -> io::Result<()> {
        self.inner.trigger(index)
    }

    fn event(&self, index: u16) -> io::Result<EventFd> {
        self.inner.event(index)
    }
}

fn msix(count: u16) -> (Arc<Counting>, Msix) {
    let vectors = Counting::new(count);
    let msix = Msix::new(vectors.clone()).unwrap();
    (vectors, msix)
}

fn set_entry(msix: &Msix, vector: u64, address: u64, data: u32, masked: bool) {
    msix.table_write(16 * vector, &address.to_le_bytes());
    msix.table_write(16 * vector + 8, &(u64::from(masked) << 32 | u64::from(data)).to_le_bytes());
}

fn pending(msix: &Msix) -> u64 {
    let mut data = [0; 8];
    msix.pending_read(0, &mut data);
    u64::from_le_bytes(data)
}

/// Enabled x function mask x vector mask: where an interrupt goes.
#[test]
fn mask_and_pending_matrix() {
    for enabled in [false, true] {
        for function_masked in [false, true] {
            for masked in [false, true] {
                let (vectors, msix) = msix(2);
                set_entry(&msix, 1, 0xfee0_1000, 0x41, masked);
                let control = (u16::from(enabled) * ENABLE) | (u16::from(function_masked) * MASK);
                msix.set_control(control);
                msix.trigger().trigger(1);
                let open = !function_masked && !masked;
                let case = format!("enabled {enabled}, function masked {function_masked}, masked {masked}");
                assert_eq!(vectors.inner.raised(1), u64::from(enabled && open), "{case}");
                assert_eq!(pending(&msix), if enabled && !open { 0b10 } else { 0 }, "{case}");
                set_entry(&msix, 1, 0xfee0_1000, 0x41, false);
                msix.set_control(ENABLE);
                assert_eq!(vectors.inner.raised(1), u64::from(enabled), "{case}: delivered on unmask, once");
                assert_eq!((pending(&msix), vectors.inner.raised(0)), (0, 0), "{case}");
            }
        }
    }
}

#[test]
fn pending_interrupts_merge_and_disabling_forgets_them() {
    let (vectors, msix) = msix(64);
    msix.set_control(ENABLE);
    for _ in 0..3 {
        msix.trigger().trigger(63);
        msix.trigger().trigger(7);
    }
    assert_eq!(pending(&msix), 1 << 63 | 1 << 7);
    set_entry(&msix, 7, 0xfee0_0000, 1, false);
    assert_eq!((pending(&msix), vectors.inner.raised(7)), (1 << 63, 1));
    msix.set_control(0);
    assert_eq!(pending(&msix), 0);
    msix.trigger().trigger(64);
    msix.trigger().trigger(u16::MAX);
}

#[test]
fn routes_change_only_when_something_did_and_in_batches() {
    let (vectors, msix) = msix(8);
    for vector in 0..8 {
        set_entry(&msix, vector, 0xfee0_0000, 0x30 + vector as u32, false);
    }
    assert_eq!(vectors.take_updates(), 0, "disabled: nobody is told");
    msix.set_control(ENABLE);
    assert_eq!(vectors.take_updates(), 1, "eight vectors, one update");
    msix.set_control(ENABLE);
    set_entry(&msix, 3, 0xfee0_0000, 0x33, false);
    assert_eq!(vectors.take_updates(), 0, "the same again");
    msix.table_write(16 * 2 + 12, &[1]);
    assert_eq!(vectors.take_updates(), 1);
    assert_eq!(vectors.inner.vectors.lock().unwrap()[2].0, None, "a masked vector has no route");
    // Linux changes a masked entry in three writes.
    msix.table_write(16 * 2, &0xfee0_2000_u32.to_le_bytes());
    msix.table_write(16 * 2 + 8, &0x77_u32.to_le_bytes());
    assert_eq!(vectors.take_updates(), 0);
    msix.table_write(16 * 2 + 12, &[0]);
    assert_eq!(vectors.take_updates(), 1);
    assert_eq!(
        vectors.inner.vectors.lock().unwrap()[2].0,
        Some(MsiMessage { address: 0xfee0_2000, data: 0x77 })
    );
    msix.set_control(ENABLE | MASK);
    assert_eq!(vectors.log.lock().unwrap().last().unwrap().len(), 8);
    assert_eq!(vectors.take_updates(), 1);
}

#[test]
fn a_refused_route_makes_interrupts_pending_not_lost() {
    let (vectors, msix) = msix(1);
    vectors.fail.store(true, Ordering::Relaxed);
    set_entry(&msix, 0, 0xfee0_0000, 0x30, false);
    msix.set_control(ENABLE);
    msix.trigger().trigger(0);
    assert_eq!((pending(&msix), vectors.inner.raised(0)), (1, 0));
    vectors.fail.store(false, Ordering::Relaxed);
    msix.set_control(ENABLE | MASK);
    msix.set_control(ENABLE);
    assert_eq!((pending(&msix), vectors.inner.raised(0)), (0, 1));
}

#[test]
fn table_accesses_of_every_width_match_a_byte_model() {
    const WRITABLE: [u8; 16] =
        [0xfc, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0];
    let (_, msix) = msix(4);
    msix.set_control(ENABLE);
    let mut model = [0_u8; 64];
    (0..4).for_each(|v| model[16 * v + 12] = 1);
    let mut random = Xorshift::new(11);
    for _ in 0..3000 {
        let (offset, width) = (random.next() % 80, random.next() as usize % 8 + 1);
        let value = random.next().to_le_bytes();
        msix.table_write(offset, &value[..width]);
        for (at, byte) in (offset as usize..64).zip(&value[..width]) {
            model[at] = byte & WRITABLE[at % 16];
        }
        let mut read = [0xee; 80];
        msix.table_read(0, &mut read);
        assert_eq!(read[..64], model);
        assert_eq!(read[64..], [0; 16], "past the end");
    }
    for offset in [u64::MAX, u64::MAX - 3, 1 << 40] {
        msix.table_write(offset, &[0xff; 8]);
        let mut data = [1; 8];
        msix.table_read(offset, &mut data);
        msix.pending_read(offset, &mut data);
        assert_eq!(data[0], 0);
    }
}

#[test]
fn state_round_trips_with_one_update_and_bad_state_is_refused() {
    let (_, source) = msix(5);
    for vector in 0..5 {
        set_entry(&source, vector, 0xfee0_0000 | vector << 12, 0x50, vector == 4);
    }
    source.set_control(ENABLE);
    source.trigger().trigger(4);
    let state = source.save();
    let (vectors, target) = msix(5);
    target.restore(&state, ENABLE).unwrap();
    assert_eq!((target.save(), vectors.take_updates()), (state.clone(), 1));
    target.table_write(16 * 4 + 12, &[0]);
    assert_eq!(vectors.inner.raised(4), 1, "pending survives");
    target.reset();
    assert!(vectors.inner.vectors.lock().unwrap().iter().all(|v| v.0.is_none()));
    assert_eq!(target.save(), msix(5).1.save());

    let mut short = state.clone();
    short.entries.pop();
    let mut address = state.clone();
    address.entries[0].address_low |= 1;
    let mut control = state.clone();
    control.entries[3].control = 2;
    for bad in [short, address, control] {
        assert!(target.restore(&bad, ENABLE).is_err());
    }
    assert!(msix(6).1.restore(&state, ENABLE).is_err());
}

#[test]
fn endpoint_couples_the_control_word() {
    let identity =
        Identity { vendor: 1, device: 2, subsystem_vendor: 0, subsystem: 0, class: 0, revision: 0 };
    let vectors = Counting::new(3);
    let (table, pba) = (BarPlace { bar: 2, offset: 0x1000 }, BarPlace { bar: 2, offset: 0x1800 });
    let endpoint = || Endpoint::with_msix(ConfigSpace::new(&identity), vectors.clone(), table, pba).unwrap();
    let mut endpoint_a = endpoint();
    let mut capability = [0; 12];
    endpoint_a.read(0x40, &mut capability);
    assert_eq!(capability, [0x11, 0, 2, 0, 2, 0x10, 0, 0, 2, 0x18, 0, 0]);
    set_entry(endpoint_a.msix().unwrap(), 0, 0xfee0_0000, 0x30, false);
    let _ = endpoint_a.write(0x43, &[0x80]);
    endpoint_a.msix().unwrap().trigger().trigger(0);
    assert_eq!(vectors.inner.raised(0), 1);
    let state = endpoint_a.save();
    let mut endpoint_b = endpoint();
    endpoint_b.restore(&state).unwrap();
    assert_eq!(endpoint_b.save(), state);
    endpoint_b.msix().unwrap().trigger().trigger(0);
    assert_eq!(vectors.inner.raised(0), 2);
    let mut without = Endpoint::new(ConfigSpace::new(&identity));
    assert!(without.restore(&state).is_err());
}

#[test]
fn impossible_tables_are_refused() {
    for count in [0, 2049] {
        assert_eq!(Msix::new(Counting::new(count)).unwrap_err(), MsixError::Count { count });
    }
    let (_, msix) = msix(2048);
    let place = BarPlace { bar: 0, offset: 0 };
    assert_eq!(msix.capability(place, place).body[..2], [0xff, 0x07]);
}

/// Device threads raise a vector while the guest masks and unmasks it: what was raised last arrives.
#[test]
fn nothing_is_lost_between_mask_and_trigger() {
    let (vectors, msix) = msix(1);
    set_entry(&msix, 0, 0xfee0_0000, 0x30, true);
    msix.set_control(ENABLE);
    for _ in 0..500 {
        let before = vectors.inner.raised(0);
        let trigger = msix.trigger();
        std::thread::scope(|scope| {
            scope.spawn(move || trigger.trigger(0));
            msix.table_write(12, &[0]);
            msix.table_write(12, &[1]);
        });
        msix.table_write(12, &[0]);
        assert_eq!((vectors.inner.raised(0), pending(&msix)), (before + 1, 0));
        msix.table_write(12, &[1]);
    }
}

#[test]
fn a_restore_without_its_routes_is_an_error() {
    let (_, source) = msix(2);
    source.set_control(ENABLE);
    set_entry(&source, 0, 0xfee0_0000, 0x41, false);
    let (vectors, target) = msix(2);
    vectors.fail.store(true, Ordering::Relaxed);
    assert!(target.restore(&source.save(), ENABLE).is_err());
    target.restore(&source.save(), 0).unwrap();
    vectors.fail.store(false, Ordering::Relaxed);
    target.restore(&source.save(), ENABLE).unwrap();
}
