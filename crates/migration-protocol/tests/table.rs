//! Every input in every state of both machines does what the table says; the page is the table.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::Duration;

use vmm_migration_protocol::{
    Accept, Command, DescriptorRange, Destination, DestinationAction, DestinationInput, DestinationKind,
    DestinationState, Fault as Why, Frame, Hello, Limits, Message, Outcomes, Output, PAGE, Reason, SessionId,
    SessionOutcome, Source, SourceAction, SourceInput, SourceKind, SourceState, machines_markdown,
};

use common::samples;
use world::fault::{Fault, Plan};
use world::{Mode, Order, World, allows};

mod common;
mod world;

/// The session of a world's first migration.
const SESSION: SessionId = SessionId([1; 16]);

/// Every message that is no bulk, of this session and with what a state may wait for.
fn messages(hello: Hello) -> Vec<Message> {
    let list = vec![DescriptorRange { range: samples::range(0, PAGE), offset: 0, descriptor: 0 }];
    let accept = Accept { session: SESSION, ..samples::accept() };
    let mut messages = samples::messages();
    messages.extend((0..3).map(Message::Landed));
    messages.extend(
        [Command::Config, Command::Start, Command::Descriptors, Command::Committed].map(Message::Ack),
    );
    messages.extend([true, false].map(|run| Message::Commit { session: SESSION, run }));
    messages.extend([
        Message::Hello(Box::new(Hello { session: SESSION, ..hello })),
        Message::Accept(Accept { features: vmm_migration_protocol::Features::NONE, ..accept }),
        Message::Ready(SESSION),
        Message::Committed(SESSION),
        Message::Outcome(SESSION, SessionOutcome::Aborted),
        Message::Outcome(SESSION, SessionOutcome::Committed),
        Message::Outcome(SESSION, SessionOutcome::Unknown),
        Message::Again(samples::range(0, PAGE)),
        Message::Descriptors(list),
    ]);
    messages
}

fn frames() -> Vec<Frame> {
    messages(samples::hello()).into_iter().map(|message| message.encode().unwrap()).collect()
}

/// Every command with a payload that is too short, too long, absent, or of other bytes, where the codec lets it through.
fn broken() -> Vec<Frame> {
    let variants = |frame: Frame| {
        let good = frame.payload();
        let short = good.get(..good.len().saturating_sub(1)).unwrap_or_default().to_vec();
        let other = vec![0xff; good.len()];
        let payloads = [short, [good, &[0]].concat(), Vec::new(), other];
        payloads.into_iter().filter_map(move |payload| Frame::new(frame.command(), payload).ok())
    };
    frames().into_iter().flat_map(|frame| variants(frame).collect::<Vec<_>>()).collect()
}

/// Every input to a source, with how long after the one before it comes.
fn source_inputs() -> Vec<(Duration, SourceInput)> {
    let soon = Duration::ZERO;
    let why = || Why::new(Reason::Failed, "test");
    let mut inputs: Vec<_> =
        frames().into_iter().chain(broken()).map(|frame| (soon, SourceInput::Frame(frame))).collect();
    let text = || "test".to_owned();
    let outputs = [
        Output::Nothing,
        Output::Bytes(PAGE),
        Output::Bytes(u64::MAX),
        Output::Sent { link: PAGE, memory: u64::MAX },
        Output::State(vec![1]),
    ];
    inputs.extend(outputs.map(|output| (soon, SourceInput::Done(output))));
    inputs.extend([
        (soon, SourceInput::Garbage(text())),
        (soon, SourceInput::Lost(text())),
        (soon, SourceInput::Failed(why())),
        (soon, SourceInput::Cancel(text())),
        (soon, SourceInput::Ask),
        (soon, SourceInput::Keep),
        (soon, SourceInput::Yield),
        (soon, SourceInput::Tick),
        // Keepalive, timeout, silence, and every limit.
        (Duration::from_secs(2), SourceInput::Tick),
        (Duration::from_secs(6), SourceInput::Tick),
        (Duration::from_secs(11), SourceInput::Tick),
        (Duration::MAX / 2, SourceInput::Tick),
    ]);
    inputs
}

fn destination_inputs() -> Vec<(Duration, DestinationInput)> {
    let soon = Duration::ZERO;
    let mut inputs: Vec<_> =
        frames().into_iter().chain(broken()).map(|frame| (soon, DestinationInput::Frame(frame))).collect();
    let text = || "test".to_owned();
    inputs.extend(
        [(0, false), (1, false), (0, true)]
            .map(|(pass, last)| (soon, DestinationInput::Landed { pass, last })),
    );
    inputs.extend([
        (soon, DestinationInput::Garbage(text())),
        (soon, DestinationInput::Lost(text())),
        (soon, DestinationInput::Damaged(samples::range(0, PAGE))),
        (soon, DestinationInput::Done(Output::Nothing)),
        (soon, DestinationInput::Failed(Why::new(Reason::Failed, "test"))),
        (soon, DestinationInput::Query),
        (soon, DestinationInput::Cancel(text())),
        (soon, DestinationInput::Tick),
        (Duration::from_secs(2), DestinationInput::Tick),
        (Duration::from_secs(11), DestinationInput::Tick),
        (Duration::MAX / 2, DestinationInput::Tick),
    ]);
    inputs
}

/// The machines in every state that worlds come to, with and without faults; a few of each.
#[derive(Default)]
struct Found {
    sources: BTreeMap<u8, Vec<(Duration, Source)>>,
    destinations: BTreeMap<u8, Vec<(Duration, Destination)>>,
}

impl Found {
    fn look(&mut self, world: &World) {
        const FEW: usize = 12;
        let source = &world.source.machine;
        let sources = self.sources.entry(source.state() as u8).or_default();
        if sources.len() < FEW {
            sources.push((world.now, source.clone()));
        }
        let destination = &world.destination.machine;
        let destinations = self.destinations.entry(destination.state() as u8).or_default();
        if destinations.len() < FEW {
            destinations.push((world.now, destination.clone()));
        }
    }

    fn all() -> Self {
        let mut found = Self::default();
        let faults = [
            Fault::None,
            Fault::CancelSource,
            Fault::CancelDestination,
            Fault::LostForGood,
            Fault::StepFails,
        ];
        for mode in Mode::ALL {
            for fault in faults {
                for at in (0..60).step_by(3) {
                    let mut world = World::new(mode, Order::SourceFirst);
                    world.run_watched(&[Plan { at, fault }], &mut |world| found.look(world));
                    found.look(&world);
                }
            }
        }
        found
    }
}

#[test]
fn every_input_in_every_state() {
    let found = Found::all();
    let mut cells = BTreeSet::new();
    let states: Vec<u8> = SourceState::ALL.map(|state| state as u8).to_vec();
    assert_eq!(found.sources.keys().copied().collect::<Vec<_>>(), states, "every state was reached");
    for (now, source) in found.sources.into_values().flatten() {
        for (later, input) in source_inputs() {
            cells.insert((
                0,
                source.state() as u8,
                source_cell(now.saturating_add(later), source.clone(), input) as u8,
            ));
        }
    }
    let states: Vec<u8> = DestinationState::ALL.map(|state| state as u8).to_vec();
    assert_eq!(found.destinations.keys().copied().collect::<Vec<_>>(), states, "every state was reached");
    for (now, destination) in found.destinations.into_values().flatten() {
        for (later, input) in destination_inputs() {
            let kind = destination_cell(now.saturating_add(later), destination.clone(), input);
            cells.insert((1, destination.state() as u8, kind as u8));
        }
    }
    // The rest cannot be: an Ack that is not waited for is a stray frame, and so on.
    println!("{} cells of {}", cells.len(), 23 * 22 + 17 * 22);
    assert_eq!(cells.len(), 786);
}

fn source_cell(now: Duration, mut source: Source, input: SourceInput) -> SourceKind {
    let before = source.state();
    let kind = source.handle(now, input);
    let failed = [SourceState::Stopping, SourceState::Undoing, SourceState::Ended];
    let after = source.state();
    let allowed = allows((before, before.cell(kind), after), &failed, Some(SourceState::Asking));
    assert!(allowed, "{kind:?} led from {before:?} to {after:?}");
    let mut given = 0;
    while let Some(action) = source.poll() {
        given += usize::from(matches!(action, SourceAction::Run(_) | SourceAction::Undo(_)));
        // An answer that is not in the table's row has no consequence but a sign of life.
        if before == after && kind == SourceKind::Tick {
            assert!(matches!(action, SourceAction::Send(ref frame) if frame.command() == Command::Keepalive));
        }
    }
    assert!(given <= 1, "one piece of work at a time");
    assert!(source.next_wake().is_none_or(|wake| wake > now) || source.state() == before, "wakes at once");
    kind
}

fn destination_cell(now: Duration, mut destination: Destination, input: DestinationInput) -> DestinationKind {
    let before = destination.state();
    let kind = destination.handle(now, input);
    let failed = [DestinationState::Stopping, DestinationState::Undoing, DestinationState::Ended];
    let after = destination.state();
    assert!(
        allows((before, before.cell(kind), after), &failed, None),
        "{kind:?} led from {before:?} to {after:?}"
    );
    let mut given = 0;
    while let Some(action) = destination.poll() {
        given += usize::from(matches!(action, DestinationAction::Run(_) | DestinationAction::Undo(_)));
    }
    assert!(given <= 1, "one piece of work at a time");
    kind
}

#[test]
fn the_page_is_the_table() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/machines.md");
    let page = machines_markdown();
    if std::env::var_os("VMM_BLESS").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, &page).unwrap();
    }
    let committed =
        std::fs::read_to_string(&path).expect("docs/machines.md is missing: run with VMM_BLESS=1");
    assert_eq!(committed, page, "run with VMM_BLESS=1 and look at the difference");
}

#[test]
fn memory_that_comes_is_no_silence() {
    let seconds = Duration::from_secs;
    let new = || {
        let mut end = Destination::new(seconds(0), samples::offer(), Limits::default(), &Outcomes::new());
        let hello = Message::Hello(Box::new(samples::hello())).encode().unwrap();
        assert_eq!(end.handle(seconds(0), DestinationInput::Frame(hello)), DestinationKind::Hello);
        end
    };
    let mut silent = new();
    assert_eq!(silent.handle(seconds(10), DestinationInput::Tick), DestinationKind::Lost);
    let mut fed = new();
    fed.note_heard(seconds(9));
    assert_eq!(fed.handle(seconds(18), DestinationInput::Tick), DestinationKind::Tick);
    assert_eq!(fed.handle(seconds(19), DestinationInput::Tick), DestinationKind::Lost);
}
