//! Migrations between two VMMs on scripted hypervisors: whatever call fails, exactly one of them has the guest.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]

use std::cell::RefCell;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use serde_json::json;
use vmm::exit::ExitCode;
use vmm::sandbox::{PathPolicy, Sandbox};
use vmm_api::command::{Host, Outcome};
use vmm_api::error::Code;
use vmm_cpu_manager::set;
use vmm_device_model::thread::{ThreadHook, ThreadKind};
use vmm_hypervisor::fake::{Answer, Exit, Fake, Live};
use vmm_state::{Phase, Reactions};
use vmm_tests::harness::LIMIT;
use vmm_virtio_devices::block;

use rig::Rig;

mod rig;

fn config_address(device: u8, register: u32) -> Exit {
    let address = 0x8000_0000 | u32::from(device) << 11 | register;
    Exit::PioWrite { port: 0xcf8, data: address.to_le_bytes().to_vec() }
}

const READ_CONFIG: Exit = Exit::PioRead { port: 0xcfc, size: 4, count: 1 };

/// A source whose guest runs or is paused, and a destination.
struct Ends {
    source: Rig,
    destination: Rig,
    addresses: u32,
    /// A source that fails may not have been heard: the destination then waits on, and is cancelled.
    is_lonely: bool,
}

impl Ends {
    fn new([source, destination]: &[Fake; 2], phase: Phase) -> Self {
        let rig = |fake: &Fake| Rig::with(fake.clone(), "Null", Reactions::default());
        let mut ends = Self {
            source: rig(source).brought_to(Phase::Running),
            destination: rig(destination),
            addresses: 0,
            is_lonely: false,
        };
        ends.drive_the_disk(source);
        if phase == Phase::Paused {
            ends.source.ask("vm.pause").unwrap();
        }
        ends
    }

    /// The guest's driver of the disk comes up: the device has something to start and to stop.
    fn drive_the_disk(&mut self, fake: &Fake) {
        let before = fake.answers().len();
        for device in 0..32 {
            for register in [0, 0x10, 0x14] {
                fake.script(0, [config_address(device, register), READ_CONFIG]);
            }
        }
        let answers = self.until(|| fake.answers().get(before..before + 96).map(<[Answer]>::to_vec));
        let value = |at: usize| u32::from_le_bytes(answers[at].data.as_slice().try_into().unwrap());
        let device = (0..32).find(|device| value(3 * device) == 0x1042_1af4).unwrap();
        let bar = u64::from(value(3 * device + 2)) << 32 | u64::from(value(3 * device + 1) & !0xf);
        let set = |offset: u64, bytes: &[u8]| Exit::MmioWrite { address: bar + offset, data: bytes.to_vec() };
        let ring = |offset, gpa: u32| [set(offset, &gpa.to_le_bytes()), set(offset + 4, &[0; 4])];
        let enable = Exit::PioWrite { port: 0xcfc, data: vec![6] };
        fake.script(0, [config_address(device as u8, 4), enable]);
        // Status, VIRTIO_F_VERSION_1, FEATURES_OK, queue 0 with 8 descriptors, DRIVER_OK: virtio 1.3, 4.1.4.3.
        fake.script(0, [set(0x14, &[3]), set(8, &[1, 0, 0, 0]), set(0xc, &[1, 0, 0, 0]), set(0x14, &[11])]);
        fake.script(0, [set(0x16, &[0, 0]), set(0x18, &[8, 0])]);
        fake.script(
            0,
            [(0x20, 0x20_0000), (0x28, 0x20_1000), (0x30, 0x20_2000)].map(|(a, b)| ring(a, b)).concat(),
        );
        fake.script(0, [set(0x1c, &[1, 0]), set(0x14, &[15])]);
        let status = Exit::MmioRead { address: bar + 0x14, size: 1 };
        fake.script(0, [status]);
        let status = self.until(|| fake.answers().get(before + 96).cloned());
        assert_eq!(status.data, [15], "the driver is up");
        // The device's thread starts on this one.
        self.source.pump();
    }

    fn until<T>(&mut self, mut look: impl FnMut() -> Option<T>) -> T {
        let end = Instant::now() + LIMIT;
        loop {
            if let Some(found) = look() {
                return found;
            }
            assert!(Instant::now() < end, "it does not happen");
            self.source.pump();
            std::thread::yield_now();
        }
    }

    /// A migration: what both ends answer, the source first.
    fn migrate(&mut self) -> [Outcome; 2] {
        self.addresses += 1;
        let path = self.destination.folder.path().join(format!("m{}", self.addresses));
        let url = format!("unix:{}", path.display());
        let body = json!({ "receiver_url": url }).to_string().into_bytes();
        let received = self.destination.begin_with("vm.receive-migration", body);
        let mut outcomes = [None, None];
        let end = Instant::now() + LIMIT;
        while UnixStream::connect(&path).is_err() && outcomes[1].is_none() {
            assert!(Instant::now() < end, "nobody listens");
            self.destination.pump();
            outcomes[1] = received.try_recv().ok();
        }
        let body = json!({ "destination_url": url }).to_string().into_bytes();
        let waiting = [self.source.begin_with("vm.send-migration", body), received];
        let mut cancelled = false;
        while outcomes.iter().any(Option::is_none) {
            assert!(Instant::now() < end, "no answer: {outcomes:?}");
            for (outcome, waiting) in outcomes.iter_mut().zip(&waiting) {
                *outcome = outcome.take().or_else(|| waiting.recv_timeout(Duration::from_micros(100)).ok());
            }
            self.source.pump();
            self.destination.pump();
            if self.is_lonely && matches!(outcomes, [Some(Err(_)), None]) && !cancelled {
                drop(self.destination.begin("vm.cancel"));
                cancelled = true;
            }
        }
        outcomes.map(Option::unwrap)
    }

    /// The guest is at its new place, and nowhere else.
    fn moved(&mut self, fakes: &[Fake; 2], phase: Phase, about: &str) {
        assert_eq!(self.source.vmm.ending(), Some(ExitCode::Success), "{about}");
        assert_eq!(fakes[0].live(), Live::default(), "{about}");
        assert_eq!(self.destination.vmm.phase(), phase, "{about}");
    }

    /// The guest is where it was, the destination is empty, and a migration succeeds.
    fn as_before(&mut self, fakes: &[Fake; 2], phase: Phase, live: Live, about: &str) {
        assert_eq!((self.source.vmm.phase(), self.destination.vmm.phase()), (phase, Phase::Empty), "{about}");
        assert_eq!(fakes[0].live(), live, "{about}");
        assert_eq!(fakes[1].live(), Live::default(), "{about}");
        self.source.ask("vm.info").unwrap();
        let outcomes = self.migrate();
        assert!(outcomes.iter().all(Result::is_ok), "{about}: {outcomes:?}");
        self.moved(fakes, phase, about);
    }
}

#[test]
fn whatever_call_fails_exactly_one_end_has_the_guest() {
    for (side, phase) in [(0, Phase::Running), (1, Phase::Running), (0, Phase::Paused), (1, Phase::Paused)] {
        let fakes = [Fake::new(), Fake::new()];
        let live = RefCell::new(Live::default());
        let ready = || {
            let ends = Ends::new(&fakes, phase);
            *live.borrow_mut() = fakes[0].live();
            ends
        };
        let mut noticed = 0;
        fakes[side].fail_each(ready, Ends::migrate, |failed, mut ends, outcomes| {
            let about = format!("{failed:?} failed at end {side}: {outcomes:?}");
            if failed == Some("KVM_RUN") {
                // The guest crashes, wherever it is.
                return;
            }
            match &outcomes {
                [Ok(_), Ok(_)] => ends.moved(&fakes, phase, &about),
                [Err(sent), Err(received)] => {
                    assert_eq!((sent.code, received.code), (Code::MigrationFailed, Code::MigrationFailed));
                    assert!(sent.causes.len() > 1 && received.causes.len() > 1, "{about}");
                    ends.as_before(&fakes, phase, *live.borrow(), &about);
                    noticed += 1;
                }
                _ => panic!("the ends do not agree: {about}"),
            }
            assert!(failed.is_some() || outcomes.iter().all(Result::is_ok), "{about}");
        });
        assert!(noticed > 5, "{phase}, end {side}: {noticed}");
    }
}

/// The kinds of threads that a migration starts at either end.
const KINDS: [ThreadKind; 3] = [ThreadKind("migration"), set::THREAD, block::THREAD];
/// No end starts as many threads of one kind, however they race.
const MOST: usize = 8;

/// Lets all threads begin but the `turn`th of one kind; 0: all.
#[derive(Debug)]
struct Doorman {
    kind: ThreadKind,
    turn: AtomicUsize,
}

impl Doorman {
    fn new(kind: ThreadKind) -> Arc<Self> {
        Arc::new(Self { kind, turn: AtomicUsize::new(0) })
    }
}

impl ThreadHook for Doorman {
    fn begin(&self, kind: ThreadKind) -> io::Result<()> {
        if kind != self.kind {
            return Ok(());
        }
        let before = self.turn.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1));
        if before == Ok(1) { Err(io::Error::other("told to refuse")) } else { Ok(()) }
    }
}

impl Ends {
    /// The same with a doorman at each end.
    fn guarded(fakes: &[Fake; 2], doormen: &[Arc<Doorman>; 2]) -> Self {
        let rig = |end: usize| {
            let rig = Rig::with(fakes[end].clone(), "Null", Reactions::default());
            let sandbox = Sandbox::new(Arc::clone(&doormen[end]) as _, PathPolicy::Never);
            rig.confined(sandbox)
        };
        let mut ends = Self { source: rig(0), destination: rig(1), addresses: 0, is_lonely: true };
        ends.source = ends.source.brought_to(Phase::Running);
        ends.drive_the_disk(&fakes[0]);
        ends
    }
}

#[test]
fn whatever_thread_cannot_begin_exactly_one_end_has_the_guest() {
    for side in 0..2 {
        let (mut before, mut after) = (0, 0);
        for (kind, nth) in KINDS.into_iter().flat_map(|kind| (1..=MOST).map(move |nth| (kind, nth))) {
            let fakes = [Fake::new(), Fake::new()];
            let doormen = [Doorman::new(kind), Doorman::new(kind)];
            let mut ends = Ends::guarded(&fakes, &doormen);
            let live = fakes[0].live();
            doormen[side].turn.store(nth, SeqCst);
            let outcomes = ends.migrate();
            let refused = doormen[side].turn.swap(0, SeqCst) == 0;
            let about = format!("{kind} thread {nth} of end {side}: {outcomes:?}");
            match &outcomes {
                [Ok(_), Ok(_)] => ends.moved(&fakes, Phase::Running, &about),
                [Err(_), Err(_)] => {
                    ends.as_before(&fakes, Phase::Running, live, &about);
                    before += 1;
                }
                [Ok(_), Err(error)] => {
                    assert!(error.to_string().contains("the VM is here"), "{about}");
                    ends.moved(&fakes, Phase::Paused, &about);
                    ends.destination.ask("vm.resume").unwrap();
                    after += 1;
                }
                [Err(_), Ok(_)] => panic!("two guests: {about}"),
            }
            assert!(nth < MOST || !refused, "more than {MOST} threads: {about}");
        }
        assert!(before > 2, "end {side}: {before} threads");
        assert_eq!(after, side, "the disk's thread, where the guest goes on");
    }
}

/// The destination cannot make the VM, and then the thread of the source's disk cannot begin.
#[test]
fn a_guest_that_cannot_be_resumed_where_it_was_is_kept_there_paused() {
    let fakes = [Fake::new(), Fake::new()];
    let doormen = [Doorman::new(block::THREAD), Doorman::new(block::THREAD)];
    let mut ends = Ends::guarded(&fakes, &doormen);
    fakes[1].fail_nth_of("KVM_CREATE_VM", 1);
    doormen[0].turn.store(1, SeqCst);
    let outcomes = ends.migrate();
    let about = format!("{outcomes:?}");
    let [Err(sent), Err(_)] = &outcomes else { panic!("{about}") };
    assert!(sent.to_string().contains("could not be undone: [Resume]"), "{about}");
    assert_eq!(ends.source.vmm.phase(), Phase::Paused, "{about}");
    ends.source.ask("vm.resume").unwrap();
    fakes[1].heal();
    ends.as_before(&fakes, Phase::Running, fakes[0].live(), &about);
}
