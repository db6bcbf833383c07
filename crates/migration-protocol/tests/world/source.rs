//! The source's side of the world: a guest, and a driver of [`Source`].

use std::cell::RefCell;
use std::collections::BTreeSet;

use vmm_migration_protocol::{
    Absent, Bulk, Command, Fault, Mark, Message, Output, PAGE, Reason, SessionOutcome, Source, SourceAction,
    SourceInput, SourceKind, SourceOutcome, SourceState, SourceStep, SourceUndo, What,
};

use super::{Holder, Item, Mode, PAGES, World, address, allows, page};
use crate::common::samples::range;

/// What the driver has been given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SourceWork {
    Step(SourceStep),
    Undo(SourceUndo),
}

/// The host of the source.
pub(crate) struct SourceEnd {
    pub(crate) machine: Source,
    pub(crate) work: Option<SourceWork>,
    pub(crate) interrupted: bool,
    pub(crate) outcome: Option<SourceOutcome>,
    pub(crate) dead: bool,
    pub(crate) closed: bool,
    pub(crate) running: bool,
    pub(crate) given_away: bool,
    pub(crate) log: bool,
    pub(crate) throttle: u8,
    pub(crate) memory: Vec<u64>,
    dirty: BTreeSet<usize>,
    taken: BTreeSet<usize>,
    pub(crate) written: usize,
    pub(crate) share: usize,
    /// An undo that never succeeds.
    pub(crate) broken_undo: Option<SourceUndo>,
    /// The saved state is larger, or smaller, than the wire allows.
    pub(crate) no_state: bool,
    /// The driver says Done to Ask, and gives no answer.
    pub(crate) mute: bool,
}

thread_local! {
    /// Every arrow that was walked: which machine, state, kind, state.
    pub(crate) static WALKED: RefCell<BTreeSet<(u8, u8, u8, u8)>> = const { RefCell::new(BTreeSet::new()) };
}

impl SourceEnd {
    pub(crate) fn new(machine: Source, mode: &Mode) -> Self {
        Self {
            machine,
            work: None,
            interrupted: false,
            outcome: None,
            dead: false,
            closed: false,
            running: !mode.paused,
            given_away: false,
            log: false,
            throttle: 0,
            memory: (0..PAGES as u64).collect(),
            dirty: BTreeSet::new(),
            taken: BTreeSet::new(),
            written: 0,
            share: 0,
            broken_undo: None,
            no_state: false,
            mute: false,
        }
    }

    pub(crate) fn restart(&mut self, machine: Source) {
        self.machine = machine;
        self.outcome = None;
        self.interrupted = false;
        self.closed = false;
        self.written = 0;
    }

    pub(crate) fn write(&mut self, value: usize) {
        // A few pages, in an order that is no order.
        let page = self.written * 7 % 5;
        self.written += 1;
        self.memory[page] += value as u64 + 1;
        if self.log {
            self.dirty.insert(page);
        }
    }
}

impl World {
    pub(crate) fn source_input(&mut self, input: SourceInput) -> SourceKind {
        let before = self.source.machine.state();
        let kind = self.source.machine.handle(self.now, input);
        let after = self.source.machine.state();
        let cell = before.cell(kind);
        let failed = [SourceState::Stopping, SourceState::Undoing, SourceState::Ended];
        assert!(
            allows((before, cell, after), &failed, Some(SourceState::Asking)),
            "{kind:?} led from {before:?} to {after:?}"
        );
        WALKED.with_borrow_mut(|walked| walked.insert((0, before as u8, kind as u8, after as u8)));
        self.source_actions();
        kind
    }

    pub(crate) fn tick_source(&mut self) {
        if !self.source.dead {
            self.source_input(SourceInput::Tick);
        }
    }

    pub(crate) fn source_actions(&mut self) {
        while let Some(action) = self.source.machine.poll() {
            match action {
                SourceAction::Send(frame) => {
                    assert!(!self.source.closed, "{} after Close", frame.command());
                    self.send_to_destination(0, Item::Frame(frame));
                }
                SourceAction::Run(step) => self.give_source(SourceWork::Step(step)),
                SourceAction::Undo(undo) => self.give_source(SourceWork::Undo(undo)),
                SourceAction::Interrupt => {
                    assert!(self.source.work.is_some(), "nothing to interrupt");
                    self.source.interrupted = true;
                }
                SourceAction::Resend(range) => {
                    self.source.taken.insert(page(range.gpa()));
                }
                SourceAction::Close => {
                    assert!(!self.source.closed, "closed twice");
                    self.source.closed = true;
                    self.links.to_source.clear();
                    for connection in 0..16 {
                        self.send_to_destination(connection, Item::End);
                    }
                }
                SourceAction::Report(outcome) => {
                    let again = !matches!(self.source.outcome, None | Some(SourceOutcome::InDoubt(_)));
                    assert!(!again, "{outcome:?} after {:?}", self.source.outcome);
                    self.source.outcome = Some(outcome);
                }
            }
        }
    }

    fn give_source(&mut self, work: SourceWork) {
        assert_eq!(self.source.work, None, "{work:?} on top");
        self.source.interrupted = false;
        self.source.work = Some(work);
    }

    pub(crate) fn send_to_destination(&mut self, connection: usize, item: Item) {
        // A destination that has closed reads on until the source has closed, too.
        if self.links.up && !self.destination.dead {
            self.links.to_destination[connection].push_back(item);
        }
    }

    pub(crate) fn arrives_at_source(&mut self, item: Item) {
        match item {
            _ if self.source.closed => {}
            Item::Frame(frame) => drop(self.source_input(SourceInput::Frame(frame))),
            Item::End => drop(self.source_input(SourceInput::Lost("closed".to_owned()))),
            Item::Page(..) | Item::Absent(_) | Item::Mark(_) => panic!("memory goes one way"),
        }
    }

    /// Does what the source's driver was given; `fails`: it cannot.
    pub(crate) fn source_work(&mut self, fails: bool) {
        let work = self.source.work.take().unwrap();
        let cut_short = std::mem::take(&mut self.source.interrupted) && self.count.is_multiple_of(2);
        let input = match work {
            SourceWork::Step(SourceStep::Ask) => self.ask(fails),
            _ if fails || (cut_short && matches!(work, SourceWork::Step(_))) => None,
            SourceWork::Step(step) => Some(SourceInput::Done(self.source_step(step))),
            SourceWork::Undo(undo) => self.source_undo(undo).then_some(SourceInput::Done(Output::Nothing)),
        };
        let failed = SourceInput::Failed(Fault::new(Reason::Failed, "injected"));
        self.source_input(input.unwrap_or(failed));
    }

    fn source_step(&mut self, step: SourceStep) -> Output {
        let source = &mut self.source;
        match step {
            SourceStep::Connect { connections } => assert!((2..=16).contains(&connections)),
            SourceStep::StartDirtyLog => {
                assert!(!source.log && source.running);
                (source.log, source.dirty) = (true, BTreeSet::new());
            }
            SourceStep::SendMemory { pass, what, last, connections } => {
                let bytes = self.send_memory(pass, what, last, usize::from(connections));
                return Output::Sent { link: bytes, memory: bytes };
            }
            SourceStep::TakeDirty => {
                let dirty = std::mem::take(&mut source.dirty);
                source.taken.extend(dirty);
                return Output::Bytes(source.taken.len() as u64 * PAGE);
            }
            SourceStep::Throttle { percent } => source.throttle = percent,
            SourceStep::Pause => assert!(std::mem::take(&mut source.running), "paused twice"),
            SourceStep::SaveState => {
                assert!(!source.running, "saved while it runs");
                return Output::State(if source.no_state { Vec::new() } else { b"state".to_vec() });
            }
            SourceStep::ReleaseLocks => {
                assert!(self.locks == Holder::Source && !source.running);
                self.locks = Holder::Nobody;
            }
            SourceStep::GiveAway => {
                assert!(!source.given_away && !source.running);
                source.given_away = true;
            }
            SourceStep::Ask => panic!("asked elsewhere"),
        }
        Output::Nothing
    }

    fn send_memory(&mut self, pass: u32, what: What, last: bool, connections: usize) -> u64 {
        assert!(!last || !self.source.running, "the last pass of a running guest");
        let pages: Vec<usize> = match what {
            What::All => (0..PAGES).collect(),
            What::Taken => std::mem::take(&mut self.source.taken).into_iter().collect(),
            What::Absent => self.source.taken.iter().copied().collect(),
        };
        let mut bytes = vec![0; connections];
        for page in &pages {
            let connection = page % connections;
            let bulk = Bulk::memory(range(address(*page), PAGE), pass, 0).unwrap();
            let value = self.source.memory[*page];
            let item = match what {
                What::Absent => Item::Absent(Absent { range: bulk.range(), pass }),
                What::All | What::Taken => Item::Page(bulk, value),
            };
            self.send_to_destination(connection, item);
            bytes[connection] += PAGE;
        }
        for (connection, bytes) in bytes.into_iter().enumerate() {
            self.send_to_destination(connection, Item::Mark(Mark { pass, last, bytes }));
        }
        pages.len() as u64 * PAGE
    }

    fn source_undo(&mut self, undo: SourceUndo) -> bool {
        if self.source.broken_undo == Some(undo) {
            return false;
        }
        let source = &mut self.source;
        match undo {
            SourceUndo::StopDirtyLog => {
                assert!(std::mem::take(&mut source.log), "the log was off");
                source.taken.clear();
            }
            SourceUndo::Unthrottle => assert_ne!(std::mem::take(&mut source.throttle), 0, "not slowed down"),
            SourceUndo::Resume => {
                assert!(!source.running && !source.given_away && self.locks == Holder::Source);
                source.running = true;
            }
            SourceUndo::TakeLocks => {
                if self.locks != Holder::Nobody {
                    return false;
                }
                self.locks = Holder::Source;
            }
            SourceUndo::TakeBack => assert!(std::mem::take(&mut source.given_away), "not given away"),
        }
        true
    }

    /// A new connection with Query, and its answer; `None` where there is none.
    fn ask(&mut self, fails: bool) -> Option<SourceInput> {
        if self.source.mute {
            return Some(SourceInput::Done(Output::Nothing));
        }
        let session = self.source_session();
        if self.links.stranger {
            let unknown = Message::Outcome(session, SessionOutcome::Unknown);
            return Some(SourceInput::Frame(unknown.encode().unwrap()));
        }
        if fails || !self.links.reachable || self.destination.dead {
            return None;
        }
        let query = Message::Query(session).encode().unwrap();
        assert_eq!(query.command(), Command::Query);
        let outcome = self.query(session);
        if outcome == SessionOutcome::Committed {
            self.destination.outcomes.settle(session);
        }
        Some(SourceInput::Frame(Message::Outcome(session, outcome).encode().unwrap()))
    }
}
