//! Migrations between two VMMs on scripted hypervisors: whatever call fails, exactly one of them has the guest.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]

use std::cell::RefCell;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::json;
use vmm::exit::ExitCode;
use vmm::sandbox::{PathPolicy, Sandbox};
use vmm_api::command::{Host, Outcome};
use vmm_api::error::Code;
use vmm_cpu_manager::set;
use vmm_device_model::thread::ThreadKind;
use vmm_hypervisor::fake::{Fake, Live};
use vmm_state::{Phase, Reactions};
use vmm_tests::harness::LIMIT;
use vmm_virtio_devices::block;

use rig::Rig;
use rig::doorman::Doorman;

mod rig;

/// A source whose guest runs or is paused, and a destination.
struct Ends {
    source: Rig,
    destination: Rig,
    addresses: u32,
    /// A source that fails may not have been heard: the destination then waits on, and is cancelled.
    is_lonely: bool,
    /// The guest goes on before its memory is there.
    is_late: bool,
}

impl Ends {
    fn new([source, destination]: &[Fake; 2], phase: Phase) -> Self {
        let rig = |fake: &Fake| Rig::with(fake.clone(), "Null", Reactions::default());
        let mut ends = Self {
            source: rig(source).brought_to(Phase::Running),
            destination: rig(destination),
            addresses: 0,
            is_lonely: false,
            is_late: false,
        };
        ends.source.drive_the_disk(source);
        if phase == Phase::Paused {
            ends.source.ask("vm.pause").unwrap();
        }
        ends
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
        let mode = if self.is_late { "Postcopy" } else { "Precopy" };
        let body = json!({ "destination_url": url, "memory_mode": mode }).to_string().into_bytes();
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
        let end = Instant::now() + LIMIT;
        while self.is_late && self.destination.vmm.phase() == Phase::Migrating {
            assert!(Instant::now() < end, "memory does not come: {about}");
            self.destination.pump();
        }
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
    fail_each_call(
        &[(0, Phase::Running), (1, Phase::Running), (0, Phase::Paused), (1, Phase::Paused)],
        false,
    );
}

#[test]
fn whatever_call_fails_a_guest_that_leaves_its_memory_is_at_one_end() {
    fail_each_call(&[(0, Phase::Running), (1, Phase::Running), (0, Phase::Paused)], true);
}

fn fail_each_call(cases: &[(usize, Phase)], is_late: bool) {
    for (side, phase) in cases.iter().copied() {
        let fakes = [Fake::new(), Fake::new()];
        let live = RefCell::new(Live::default());
        let ready = || {
            let ends = Ends { is_late, ..Ends::new(&fakes, phase) };
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
const MOST: usize = 9;
/// The same where memory follows the guest.
const MOST_LATE: usize = 16;

impl Ends {
    /// The same with a doorman at each end.
    fn guarded(fakes: &[Fake; 2], doormen: &[Arc<Doorman>; 2]) -> Self {
        let rig = |end: usize| {
            let rig = Rig::with(fakes[end].clone(), "Null", Reactions::default());
            let sandbox = Sandbox::new(Arc::clone(&doormen[end]) as _, PathPolicy::Never);
            rig.confined(sandbox)
        };
        let mut ends =
            Self { source: rig(0), destination: rig(1), addresses: 0, is_lonely: true, is_late: false };
        ends.source = ends.source.brought_to(Phase::Running);
        ends.source.drive_the_disk(&fakes[0]);
        ends
    }
}

#[test]
fn whatever_thread_cannot_begin_exactly_one_end_has_the_guest() {
    refuse_each_thread(MOST, false);
}

/// After the hand-over the source comes again.
#[test]
fn whatever_thread_cannot_begin_a_guest_that_leaves_its_memory_gets_it() {
    refuse_each_thread(MOST_LATE, true);
}

fn refuse_each_thread(most: usize, is_late: bool) {
    for side in 0..2 {
        let (mut before, mut after) = (0, 0);
        for (kind, nth) in KINDS.into_iter().flat_map(|kind| (1..=most).map(move |nth| (kind, nth))) {
            let fakes = [Fake::new(), Fake::new()];
            let doormen = [Arc::new(Doorman::default()), Arc::new(Doorman::default())];
            let mut ends = Ends { is_late, ..Ends::guarded(&fakes, &doormen) };
            let live = fakes[0].live();
            doormen[side].refuse(kind, nth);
            let outcomes = ends.migrate();
            let refused = doormen[side].relent();
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
            assert!(nth < most || !refused, "more than {most} threads: {about}");
        }
        assert!(before > 2, "end {side}: {before} threads");
        assert_eq!(after, side, "the disk's thread, where the guest goes on");
    }
}

/// The destination cannot make the VM, and then the thread of the source's disk cannot begin.
#[test]
fn a_guest_that_cannot_be_resumed_where_it_was_is_kept_there_paused() {
    let fakes = [Fake::new(), Fake::new()];
    let doormen = [Arc::new(Doorman::default()), Arc::new(Doorman::default())];
    let mut ends = Ends::guarded(&fakes, &doormen);
    fakes[1].fail_nth_of("KVM_CREATE_VM", 1);
    doormen[0].refuse(block::THREAD, 1);
    let outcomes = ends.migrate();
    let about = format!("{outcomes:?}");
    let [Err(sent), Err(_)] = &outcomes else { panic!("{about}") };
    assert!(sent.to_string().contains("could not be undone: [Resume]"), "{about}");
    assert_eq!(ends.source.vmm.phase(), Phase::Paused, "{about}");
    ends.source.ask("vm.resume").unwrap();
    fakes[1].heal();
    ends.as_before(&fakes, Phase::Running, fakes[0].live(), &about);
}
