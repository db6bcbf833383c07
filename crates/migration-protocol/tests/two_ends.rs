//! Every mode, with every fault at every step: exactly one owner, nothing left behind, everything undone.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]

use std::collections::{BTreeMap, BTreeSet};

use vmm_fuzzing::{Random, rounds};
use vmm_migration_protocol::{
    Cell, DestinationKind, DestinationOutcome, DestinationState, DestinationUndo, Output, PAGE, Reason,
    SourceInput, SourceKind, SourceOutcome, SourceState, SourceUndo,
};

use world::destination::ABSENT;
use world::fault::{Fault, Plan};
use world::source::WALKED;
use world::{Holder, Mode, Order, World};

mod common;
mod world;

const NOTHING: Plan = Plan { at: usize::MAX, fault: Fault::None };

fn orders() -> Vec<Order> {
    vec![
        Order::SourceFirst,
        Order::DestinationFirst,
        Order::Random(Random::new(1)),
        Order::Random(Random::new(99)),
    ]
}

/// The guest is the source's, as it was before; nothing of it is anywhere else.
fn assert_undone(world: &World) {
    let source = &world.source;
    if !source.dead {
        assert_eq!(source.running, !world.mode.paused, "not in the phase it had");
        assert!(!source.log && source.throttle == 0 && !source.given_away, "something was not undone");
        assert_eq!(world.locks, Holder::Source, "the disk locks are not back");
    }
    assert!(!world.destination.owned(), "two owners");
    assert!(world.destination.vm.is_none(), "something of the guest is left at the destination");
}

fn is_sent(world: &World) -> bool {
    world.source.outcome == Some(SourceOutcome::Sent)
}

/// The guest is the destination's.
fn assert_sent(world: &World) {
    let destination = &world.destination;
    assert!(destination.owned() && !world.source.running, "not handed over");
    let Some(DestinationOutcome::Received { running, trouble }) = &destination.outcome else {
        panic!("{:?}", destination.outcome)
    };
    let vm = destination.vm.as_ref().unwrap();
    let absent = vm.memory.iter().filter(|page| **page == ABSENT).count();
    // What the guest has to ask for is with the source, and both go on with that.
    let pages = vm.memory.iter().zip(&world.source.memory);
    let same = pages.into_iter().all(|(there, here)| there == here || *there == ABSENT);
    assert!(vm.restored && same, "not the guest that it was");
    let owes = world.mode.postcopy && !world.mode.paused;
    assert!(absent == 0 || owes, "{absent} pages are absent");
    assert_eq!(world.source.machine.supplier().is_some(), owes && is_sent(world), "who supplies?");
    assert_eq!(destination.machine.filler().is_some(), owes, "who asks?");
    assert_eq!(vm.running, *running);
    assert_eq!(*running, !world.mode.paused && trouble.is_none(), "a paused guest arrives paused");
    assert_eq!(world.locks, Holder::Destination);
}

/// Both ends are done: nothing under way, nothing open.
fn assert_quiet(world: &World) {
    let (source, destination) = (&world.source, &world.destination);
    // In post-copy the connections are of use still.
    let closed = (
        source.closed || source.machine.supplier().is_some(),
        destination.closed || destination.machine.filler().is_some(),
    );
    assert!(source.dead || (source.work.is_none() && closed.0 && source.outcome.is_some()), "source leaks");
    let done = destination.work.is_none() && closed.1 && destination.outcome.is_some();
    assert!(destination.dead || done, "destination leaks");
}

/// What must hold at the end, and what the ends say of it.
fn assert_end(world: &mut World) {
    assert_quiet(world);
    match world.source.outcome.clone() {
        Some(SourceOutcome::Sent) if world.destination.dead => assert!(!world.source.running),
        Some(SourceOutcome::Sent) => assert_sent(world),
        Some(SourceOutcome::Accepted) => {
            assert!(world.mode.check);
            let received = matches!(world.destination.outcome, Some(DestinationOutcome::Received { .. }));
            assert!(!received, "{:?}", world.destination.outcome);
            assert_undone(world);
        }
        Some(SourceOutcome::Failed { failure, stuck }) => {
            assert_eq!(stuck, [], "{failure}");
            assert_undone(world);
        }
        Some(SourceOutcome::InDoubt(_)) => resolve(world),
        // A dead source: the destination has the guest, or nobody.
        None => {
            assert!(world.source.dead);
            match world.destination.owned() {
                true => assert_sent(world),
                false => assert_undone(world),
            }
        }
    }
}

/// In doubt: the guest stands still here until the operator says what is true.
fn resolve(world: &mut World) {
    assert!(!world.source.running && world.source.given_away && world.locks != Holder::Source);
    let there = world.destination.owned() && !world.destination.dead;
    world.kept = !there;
    world.source_input(if there { SourceInput::Yield } else { SourceInput::Keep });
    world.run(&NOTHING);
    match (there, &world.source.outcome) {
        (true, Some(SourceOutcome::Sent)) => assert_sent(world),
        (false, Some(SourceOutcome::Failed { stuck, .. })) if world.destination.dead => {
            assert!(stuck.is_empty() && world.source.running != world.mode.paused);
        }
        (false, Some(SourceOutcome::Failed { stuck, .. })) if stuck.is_empty() => assert_undone(world),
        other => panic!("{other:?}"),
    }
}

/// How many events a run without faults has; and that it succeeds.
fn length(mode: Mode, order: Order) -> usize {
    let mut world = World::new(mode, order);
    world.run(&NOTHING);
    let expected = if mode.check { SourceOutcome::Accepted } else { SourceOutcome::Sent };
    assert_eq!(world.source.outcome, Some(expected), "{}", mode.name);
    assert_end(&mut world);
    world.count
}

#[test]
fn every_fault_at_every_step_of_every_mode() {
    let mut cells: BTreeMap<&str, usize> = BTreeMap::new();
    let mut outcomes: BTreeMap<String, usize> = BTreeMap::new();
    for mode in Mode::ALL {
        for order in orders() {
            let random = matches!(order, Order::Random(_));
            for at in 0..length(mode, order.clone()) {
                // Messages out of place, of which there are many, in two orders.
                for fault in
                    Fault::all().into_iter().filter(|fault| random || !matches!(fault, Fault::Message(_)))
                {
                    let _cell = InCell(format!("{}, {order:?}, {fault:?} before event {at}", mode.name));
                    let mut world = World::new(mode, order.clone());
                    if world.run(&Plan { at, fault }) {
                        *cells.entry(mode.name).or_default() += 1;
                        let outcome = world.source.outcome.as_ref().map(name).unwrap_or("source dead");
                        *outcomes.entry(outcome.to_owned()).or_default() += 1;
                    }
                    assert_end(&mut world);
                    second(&mut world);
                }
            }
        }
    }
    println!("{} cells: {cells:?}", cells.values().sum::<usize>());
    println!("outcomes: {outcomes:?}");
    assert_eq!(cells.len(), Mode::ALL.len());
    assert_eq!(outcomes.len(), 5, "{outcomes:?}");
    for scenario in SCENARIOS {
        scenario();
    }
    every_arrow_was_walked();
}

/// What takes more than one fault; each also shows arrows to [`every_arrow_was_walked`].
const SCENARIOS: [fn(); 7] = [
    a_guest_that_writes_too_fast_stays,
    a_state_that_does_not_fit_fails,
    another_process_that_answers_proves_nothing,
    a_driver_without_an_answer_leads_to_doubt,
    doubt_ends_when_somebody_asks_again,
    an_undo_that_fails_is_told,
    a_refused_hello_ends_both,
];

fn failure(world: &World) -> &vmm_migration_protocol::Failure {
    match &world.source.outcome {
        Some(SourceOutcome::Failed { failure, .. } | SourceOutcome::InDoubt(failure)) => failure,
        other => panic!("{other:?}"),
    }
}

/// Event of the first `kind` of source state in a run without faults.
fn reach(mode: Mode, state: SourceState) -> usize {
    let mut world = World::new(mode, Order::SourceFirst);
    let mut found = None;
    world.run_watched(&[], &mut |world| {
        if found.is_none() && world.source.machine.state() == state {
            found = Some(world.count);
        }
    });
    found.unwrap()
}

#[test]
fn a_guest_that_writes_too_fast_stays() {
    let mode = Mode { passes: 3, budget: 100_000, writes: 3, ..Mode::PLAIN };
    let mut world = World::new(mode, Order::SourceFirst);
    world.run(&NOTHING);
    assert_eq!(failure(&world).fault.reason(), Reason::Diverges);
    assert_end(&mut world);
    let told = world.destination.outcome.clone();
    let Some(DestinationOutcome::Failed { failure, .. }) = told else { panic!("{told:?}") };
    assert_eq!(failure.to_string(), format!("the other end: {}: Passes after 3 passes", Reason::Diverges));
}

#[test]
fn a_state_that_does_not_fit_fails() {
    for mode in [Mode::PLAIN, Mode { paused: true, ..Mode::PLAIN }] {
        let mut world = World::new(mode, Order::SourceFirst);
        world.source.no_state = true;
        world.run(&NOTHING);
        assert!(failure(&world).to_string().contains("State frame announces 0 bytes"), "{}", failure(&world));
        assert_end(&mut world);
    }
}

#[test]
fn another_process_that_answers_proves_nothing() {
    let at = reach(Mode::PLAIN, SourceState::Committing);
    let mut world = World::new(Mode::PLAIN, Order::SourceFirst);
    world.links.stranger = true;
    world.run(&Plan { at, fault: Fault::Lost });
    assert!(matches!(world.source.outcome, Some(SourceOutcome::InDoubt(_))));
    assert_end(&mut world);
}

#[test]
fn a_driver_without_an_answer_leads_to_doubt() {
    let at = reach(Mode::PLAIN, SourceState::Committing);
    let mut world = World::new(Mode::PLAIN, Order::SourceFirst);
    world.source.mute = true;
    let began = world.now;
    world.run(&Plan { at, fault: Fault::LostForGood });
    assert!(matches!(world.source.outcome, Some(SourceOutcome::InDoubt(_))));
    assert!(world.now - began >= std::time::Duration::from_secs(60), "gave up early");
    assert_end(&mut world);
}

#[test]
fn doubt_ends_when_somebody_asks_again() {
    for at in [reach(Mode::PLAIN, SourceState::Committing), reach(Mode::PLAIN, SourceState::Committing) + 2] {
        let mut world = World::new(Mode::PLAIN, Order::DestinationFirst);
        world.run(&Plan { at, fault: Fault::LostForGood });
        if !matches!(world.source.outcome, Some(SourceOutcome::InDoubt(_))) {
            continue;
        }
        world.links.reachable = true;
        world.source_input(SourceInput::Ask);
        world.run(&NOTHING);
        assert!(!matches!(world.source.outcome, Some(SourceOutcome::InDoubt(_))));
        assert_end(&mut world);
    }
    // For certain: Commit is on its way when the link is cut.
    let at = reach(Mode::PLAIN, SourceState::Committing);
    let mut world = World::new(Mode::PLAIN, Order::SourceFirst);
    world.run(&Plan { at, fault: Fault::LostForGood });
    assert!(matches!(world.source.outcome, Some(SourceOutcome::InDoubt(_))));
    world.links.reachable = true;
    world.source_input(SourceInput::Ask);
    world.run(&NOTHING);
    assert_eq!(failure(&world).fault.reason(), Reason::Lost);
    assert_end(&mut world);
}

#[test]
fn an_undo_that_fails_is_told() {
    let all = [
        SourceUndo::TakeBack,
        SourceUndo::TakeLocks,
        SourceUndo::Resume,
        SourceUndo::Unthrottle,
        SourceUndo::StopDirtyLog,
    ];
    let mode = *Mode::ALL.iter().find(|mode| mode.converge).unwrap();
    let at = reach(mode, SourceState::Committing);
    for broken in all {
        let mut world = World::new(mode, Order::SourceFirst);
        world.source.broken_undo = Some(broken);
        world.run(&Plan { at, fault: Fault::Lost });
        let Some(SourceOutcome::Failed { stuck, .. }) = &world.source.outcome else { panic!("{broken:?}") };
        // Without its disks, or while it counts as given away, the guest stays paused.
        let held = matches!(broken, SourceUndo::TakeBack | SourceUndo::TakeLocks);
        let expected = if held { vec![broken, SourceUndo::Resume] } else { vec![broken] };
        assert_eq!(*stuck, expected);
        assert_eq!(world.source.running, !held && broken != SourceUndo::Resume);
        assert_eq!(world.source.log, broken == SourceUndo::StopDirtyLog, "all else is undone");
        assert_quiet(&world);
    }
    for broken in [DestinationUndo::ReleaseLocks, DestinationUndo::Discard] {
        let mut world = World::new(mode, Order::SourceFirst);
        world.destination.broken_undo = Some(broken);
        world.run(&Plan { at: at - 1, fault: Fault::Lost });
        let Some(DestinationOutcome::Failed { stuck, .. }) = &world.destination.outcome else {
            panic!("{broken:?}")
        };
        assert_eq!(*stuck, [broken]);
        assert_quiet(&world);
    }
}

#[test]
fn a_refused_hello_ends_both() {
    let mut world = World::new(Mode { connections: 0, ..Mode::PLAIN }, Order::SourceFirst);
    world.run(&NOTHING);
    assert_eq!(
        failure(&world).to_string(),
        "the other end: the peer broke the protocol: 0 connections, 1 to 128 are possible"
    );
    assert_end(&mut world);
}

#[test]
fn a_result_that_nobody_asked_for_takes_no_locks() {
    let mut waited = 0;
    for at in 0..length(Mode::PLAIN, Order::SourceFirst) {
        let mut world = World::new(Mode::PLAIN, Order::SourceFirst);
        world.run_watched(&[Plan { at, fault: Fault::LostAtSource }], &mut |world| {
            let source = &world.source;
            if source.machine.state() == SourceState::Undoing && source.work.is_none() {
                // The destination holds the locks still.
                let mut machine = source.machine.clone();
                machine.handle(world.now, SourceInput::Done(Output::Nothing));
                assert_eq!(machine.poll(), None);
                waited += 1;
            }
        });
    }
    assert!(waited > 0);
}

#[test]
fn progress_counts_each_byte_once() {
    let mut world = World::new(Mode::PLAIN, Order::SourceFirst);
    let mut seen = Vec::new();
    world.run_watched(&[], &mut |world| {
        let mut machine = world.source.machine.clone();
        machine.note_sent(5);
        let (sent, noted) = (world.source.machine.progress().sent, machine.progress().sent);
        seen.push((sent.pass, sent.bytes, noted.bytes - sent.bytes));
    });
    seen.dedup();
    // 12 pages, then what was written to; a note counts while a pass is being sent only.
    assert_eq!(seen[..3], [(0, 0, 0), (0, 0, 5), (0, 12 * PAGE, 0)]);
    let passes: Vec<u32> = seen.iter().map(|(pass, ..)| *pass).collect();
    assert!(passes.is_sorted() && passes.contains(&2), "{seen:?}");
    assert!(seen.is_sorted_by_key(|(_, bytes, _)| *bytes), "{seen:?}");
}

/// Two faults, anywhere, in any order of events.
#[test]
fn fuzz_two_faults_in_any_order() {
    let mut random = Random::new(0x0dd0_5eed);
    let faults = Fault::all();
    for _ in 0..rounds(4_000) {
        let mode = Mode::ALL[random.below(Mode::ALL.len())];
        let order = Order::Random(Random::new(random.next() | 1));
        let mut any = || Plan { at: random.below(90), fault: faults[random.below(faults.len())] };
        let plans = [any(), any()];
        let _cell = InCell(format!("{}, {order:?}, {plans:?}", mode.name));
        let mut world = World::new(mode, order);
        world.run_watched(&plans, &mut |_| {});
        assert_end(&mut world);
        second(&mut world);
    }
}

#[test]
fn a_session_cannot_be_used_twice() {
    let at = reach(Mode::PLAIN, SourceState::Committing);
    let mut world = World::new(Mode::PLAIN, Order::SourceFirst);
    world.run(&Plan { at, fault: Fault::Lost });
    assert_end(&mut world);
    world.again_with_session(1);
    world.run(&NOTHING);
    assert_eq!(failure(&world).fault.reason(), Reason::Busy);
    assert_end(&mut world);
}

/// Says which cell it is if it fails.
struct InCell(String);

impl Drop for InCell {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("in the cell: {}", self.0);
        }
    }
}

fn name(outcome: &SourceOutcome) -> &'static str {
    match outcome {
        SourceOutcome::Sent => "sent",
        SourceOutcome::Accepted => "accepted",
        SourceOutcome::Failed { .. } => "failed",
        SourceOutcome::InDoubt(_) => "in doubt",
    }
}

/// After a failure another migration succeeds.
fn second(world: &mut World) {
    let failed = matches!(world.source.outcome, Some(SourceOutcome::Failed { .. }));
    if !failed || world.source.dead || world.destination.dead {
        return;
    }
    world.again();
    world.run(&NOTHING);
    let expected = if world.mode.check { SourceOutcome::Accepted } else { SourceOutcome::Sent };
    assert_eq!(world.source.outcome, Some(expected), "the second migration");
    assert_end(world);
}

/// The tables promise nothing that does not happen.
fn every_arrow_was_walked() {
    let walked = WALKED.with_borrow(BTreeSet::clone);
    let mut missing = Vec::new();
    for (state, kind) in pairs(&SourceState::ALL, &SourceKind::ALL) {
        if let Cell::Go(to) = state.cell(kind) {
            let absent = to.iter().filter(|to| !walked.contains(&(0, state as u8, kind as u8, **to as u8)));
            missing.extend(absent.map(|to| format!("{state:?} {kind:?} {to:?}")));
        }
    }
    for (state, kind) in pairs(&DestinationState::ALL, &DestinationKind::ALL) {
        if let Cell::Go(to) = state.cell(kind) {
            let absent = to.iter().filter(|to| !walked.contains(&(1, state as u8, kind as u8, **to as u8)));
            missing.extend(absent.map(|to| format!("{state:?} {kind:?} {to:?}")));
        }
    }
    assert_eq!(missing, Vec::<String>::new(), "arrows that nobody walked");
}

fn pairs<A: Copy, B: Copy>(left: &[A], right: &[B]) -> impl Iterator<Item = (A, B)> {
    left.iter().flat_map(|a| right.iter().map(|b| (*a, *b)))
}
