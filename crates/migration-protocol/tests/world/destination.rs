//! The destination's side of the world: a driver of [`Destination`], and what it builds.

use std::sync::OnceLock;
use std::time::Duration;

use vmm_migration_protocol::{
    Barrier, Command, Destination, DestinationAction, DestinationInput, DestinationKind, DestinationOutcome,
    DestinationState, DestinationStep, DestinationUndo, Fault, Intake, MemoryLayout, Missing, MissingKind,
    Output, Reason, SessionId, SessionOutcome,
};

use super::source::WALKED;
use super::{Holder, Item, Outcomes, PAGES, World, allows, page};
use crate::common::samples;

/// What the driver has been given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum DestinationWork {
    Step(DestinationStep),
    Undo(DestinationUndo),
}

/// The content of a page that the guest has to ask for.
pub(crate) const ABSENT: u64 = u64::MAX;

/// A VM under construction, or more.
#[derive(Debug)]
pub(crate) struct Vm {
    pub(crate) memory: Vec<u64>,
    pub(crate) mapped: bool,
    pub(crate) restored: bool,
    pub(crate) running: bool,
}

/// The host of the destination.
pub(crate) struct DestinationEnd {
    pub(crate) machine: Destination,
    pub(crate) work: Option<DestinationWork>,
    pub(crate) outcome: Option<DestinationOutcome>,
    pub(crate) dead: bool,
    pub(crate) closed: bool,
    pub(crate) vm: Option<Vm>,
    pub(crate) outcomes: Outcomes,
    /// What the source said its session is, when it was committed.
    committed: bool,
    interrupted: bool,
    intakes: Vec<Intake<'static>>,
    barrier: Barrier,
    /// An undo that never succeeds.
    pub(crate) broken_undo: Option<DestinationUndo>,
    /// The next page that arrives is damaged.
    pub(crate) damage: bool,
}

fn layout() -> &'static MemoryLayout {
    static LAYOUT: OnceLock<MemoryLayout> = OnceLock::new();
    LAYOUT.get_or_init(samples::layout)
}

impl DestinationEnd {
    pub(crate) fn new(now: Duration, outcomes: Outcomes) -> Self {
        Self {
            machine: World::fresh_destination(now, &outcomes),
            work: None,
            outcome: None,
            dead: false,
            closed: false,
            vm: None,
            outcomes,
            committed: false,
            interrupted: false,
            intakes: Vec::new(),
            barrier: Barrier::new(0, 0),
            broken_undo: None,
            damage: false,
        }
    }

    pub(crate) fn owned(&self) -> bool {
        self.committed
    }

    pub(crate) fn running(&self) -> bool {
        self.vm.as_ref().is_some_and(|vm| vm.running)
    }

    pub(crate) fn is_ended(&self) -> bool {
        self.machine.state() == DestinationState::Ended
    }
}

impl World {
    pub(crate) fn destination_input(&mut self, input: DestinationInput) -> DestinationKind {
        let before = self.destination.machine.state();
        let kind = self.destination.machine.handle(self.now, input);
        let after = self.destination.machine.state();
        let failed = [DestinationState::Stopping, DestinationState::Undoing, DestinationState::Ended];
        let cell = before.cell(kind);
        assert!(allows((before, cell, after), &failed, None), "{kind:?} led from {before:?} to {after:?}");
        WALKED.with_borrow_mut(|walked| walked.insert((1, before as u8, kind as u8, after as u8)));
        self.destination_actions();
        kind
    }

    pub(crate) fn tick_destination(&mut self) {
        if !self.destination.dead {
            self.destination_input(DestinationInput::Tick);
        }
    }

    fn destination_actions(&mut self) {
        while let Some(action) = self.destination.machine.poll() {
            let destination = &mut self.destination;
            match action {
                DestinationAction::Send(frame) => {
                    assert!(!destination.closed, "{} after Close", frame.command());
                    // The source takes the disk locks as soon as it hears of it.
                    let gives_up = matches!(frame.command(), Command::Nack | Command::Cancel);
                    let held = self.locks == Holder::Destination && destination.broken_undo.is_none();
                    assert!(!(gives_up && held), "tells of a failure with the locks in its hands");
                    self.send_to_source(Item::Frame(frame));
                }
                DestinationAction::Run(step) => self.give_destination(DestinationWork::Step(step)),
                DestinationAction::Undo(undo) => self.give_destination(DestinationWork::Undo(undo)),
                DestinationAction::Interrupt => {
                    assert!(destination.work.is_some(), "nothing to interrupt");
                    destination.interrupted = true;
                }
                DestinationAction::Remember(session, outcome) => {
                    let known = destination.outcomes.answer(self.now, session);
                    assert_eq!(known, SessionOutcome::Unknown, "decided twice");
                    destination.outcomes.remember(self.now, session, outcome);
                    destination.committed |= outcome == SessionOutcome::Committed;
                }
                DestinationAction::Settle(session) => destination.outcomes.settle(session),
                DestinationAction::Close => {
                    assert!(!destination.closed, "closed twice");
                    destination.closed = true;
                    self.send_to_source(Item::End);
                }
                DestinationAction::Report(outcome) => {
                    assert_eq!(destination.outcome, None, "{outcome:?} as well");
                    destination.outcome = Some(outcome);
                }
            }
        }
    }

    fn give_destination(&mut self, work: DestinationWork) {
        assert_eq!(self.destination.work, None, "{work:?} on top");
        self.destination.interrupted = false;
        self.destination.work = Some(work);
    }

    pub(crate) fn send_to_source(&mut self, item: Item) {
        if self.links.up && !self.source.dead && !self.source.closed {
            self.links.to_source.push_back(item);
        }
    }

    pub(crate) fn arrives_at_destination(&mut self, connection: usize, item: Item) {
        let input = match item {
            Item::Frame(frame) => Some(DestinationInput::Frame(frame)),
            // The other connections end with the first.
            Item::End => (connection == 0).then(|| DestinationInput::Lost("closed".to_owned())),
            Item::Page(..) | Item::Absent(_) | Item::Mark(_) => self.memory_arrives(connection, &item),
        };
        if let Some(input) = input {
            self.destination_input(input);
        }
    }

    /// What the machine must know of memory that arrives.
    fn memory_arrives(&mut self, connection: usize, item: &Item) -> Option<DestinationInput> {
        let destination = &mut self.destination;
        if !destination.machine.state().takes_memory() {
            return Some(DestinationInput::Garbage("memory".to_owned()));
        }
        let intake = &mut destination.intakes[connection];
        let result = match item {
            Item::Page(bulk, _) => intake.bulk(bulk),
            Item::Absent(absent) => intake.absent(*absent),
            Item::Mark(mark) => intake.mark(*mark),
            Item::Frame(_) | Item::End => panic!("no memory"),
        };
        if let Err(error) = result {
            return Some(DestinationInput::Garbage(error.to_string()));
        }
        match item {
            Item::Page(bulk, _) if std::mem::take(&mut destination.damage) => {
                Some(DestinationInput::Damaged(bulk.range()))
            }
            Item::Page(bulk, value) => {
                let vm = destination.vm.as_mut().unwrap();
                vm.memory[page(bulk.range().gpa())] = *value;
                None
            }
            Item::Absent(absent) => {
                let vm = destination.vm.as_mut().unwrap();
                vm.memory[page(absent.range.gpa())] = ABSENT;
                None
            }
            Item::Mark(mark) => {
                // A connection that is a pass ahead of the others.
                let all = destination.barrier.mark(connection as u16, mark.last);
                let landed = DestinationInput::Landed { pass: mark.pass, last: mark.last };
                all.map_or_else(
                    |error| Some(DestinationInput::Garbage(error.to_string())),
                    |all| all.then_some(landed),
                )
            }
            Item::Frame(_) | Item::End => None,
        }
    }

    /// Does what the destination's driver was given; `fails`: it cannot.
    pub(crate) fn destination_work(&mut self, fails: bool) {
        let work = self.destination.work.take().unwrap();
        let cut_short = std::mem::take(&mut self.destination.interrupted) && self.count.is_multiple_of(2);
        let step = matches!(work, DestinationWork::Step(_));
        let done = !(fails || cut_short && step);
        let done = done
            && match &work {
                DestinationWork::Step(step) => self.destination_step(step),
                DestinationWork::Undo(undo) if self.destination.broken_undo == Some(*undo) => false,
                DestinationWork::Undo(undo) => {
                    self.destination_undo(*undo);
                    true
                }
            };
        let fault = match work {
            DestinationWork::Step(DestinationStep::Check(_)) => {
                Fault::incompatible(vec![Missing::new(MissingKind::Resource, "/disk.raw")])
            }
            _ => Fault::new(Reason::Failed, "injected"),
        };
        self.destination_input(if done {
            DestinationInput::Done(Output::Nothing)
        } else {
            DestinationInput::Failed(fault)
        });
    }

    fn destination_step(&mut self, step: &DestinationStep) -> bool {
        let destination = &mut self.destination;
        match step {
            DestinationStep::Check(config) => assert_eq!(config, b"{}"),
            DestinationStep::Build => {
                assert!(destination.vm.is_none());
                let connections = destination.machine.accept().unwrap().connections;
                destination.intakes = (0..connections).map(|_| Intake::new(layout())).collect();
                destination.barrier = Barrier::new(connections, layout().bytes());
                let memory = vec![0; PAGES];
                destination.vm = Some(Vm { memory, mapped: false, restored: false, running: false });
            }
            DestinationStep::MapMemory(_) => destination.vm.as_mut().unwrap().mapped = true,
            DestinationStep::Restore(state) => {
                let vm = destination.vm.as_mut().unwrap();
                vm.restored = state == b"state";
                if vm.mapped {
                    vm.memory.clone_from(&self.source.memory);
                }
                return vm.restored;
            }
            DestinationStep::TakeLocks => {
                if self.locks != Holder::Nobody {
                    return false;
                }
                self.locks = Holder::Destination;
            }
            DestinationStep::Run => destination.vm.as_mut().unwrap().running = true,
        }
        true
    }

    fn destination_undo(&mut self, undo: DestinationUndo) {
        match undo {
            DestinationUndo::Discard => assert!(self.destination.vm.take().is_some(), "nothing to discard"),
            DestinationUndo::ReleaseLocks => {
                assert_eq!(self.locks, Holder::Destination, "released though not held");
                self.locks = Holder::Nobody;
            }
        }
    }

    /// What the receiver's address answers.
    pub(crate) fn query(&mut self, session: SessionId) -> SessionOutcome {
        let live = self.destination.machine.hello().is_some_and(|hello| hello.session == session);
        if live && self.destination.machine.state().is_before_commit() {
            self.destination_input(DestinationInput::Query);
        }
        self.destination.outcomes.answer(self.now, session)
    }

    pub(crate) fn source_session(&self) -> SessionId {
        SessionId([self.sessions; 16])
    }
}
