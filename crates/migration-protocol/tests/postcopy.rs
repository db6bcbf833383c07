//! Post-copy after Commit: both ends on a fake clock, every fault at every step, and every input in every state.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]

use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

use vmm_fuzzing::Random;
use vmm_migration_protocol::{
    Cell, Command, Fault, Filler, FillerAction, FillerInput, FillerOutcome, FillerState, FillerStep, Frame,
    Limits, Message, Output, PAGE, Progress, Reason, SessionId, Supplier, SupplierAction, SupplierInput,
    SupplierOutcome, SupplierState, SupplierStep,
};

const SESSION: SessionId = SessionId([1; 16]);
const PAGES: u64 = 5;
/// All is over after so many, where nothing happens.
const STEPS: u64 = 68;

/// What travels.
#[derive(Debug, Clone)]
enum Item {
    Frame(Frame),
    Page(u64),
    Rejoin,
}

/// What the world does to the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Trouble {
    /// The link breaks, and both see it.
    Cut,
    /// It breaks, and only one sees it.
    CutUnseen {
        by_supplier: bool,
    },
    /// It carries nothing any more, and nobody is told.
    Silence,
    /// And for so long that the supplier gives up.
    Outage,
    Garbage {
        at_supplier: bool,
    },
    Stray {
        at_supplier: bool,
    },
    /// The step under way fails.
    StepFails {
        of_supplier: bool,
    },
    /// A page cannot be put into memory.
    CannotLand,
    Retry,
    Drop,
    Cancel,
}

const TROUBLES: [Trouble; 15] = [
    Trouble::Cut,
    Trouble::CutUnseen { by_supplier: true },
    Trouble::CutUnseen { by_supplier: false },
    Trouble::Silence,
    Trouble::Outage,
    Trouble::Garbage { at_supplier: true },
    Trouble::Garbage { at_supplier: false },
    Trouble::Stray { at_supplier: true },
    Trouble::Stray { at_supplier: false },
    Trouble::StepFails { of_supplier: true },
    Trouble::StepFails { of_supplier: false },
    Trouble::CannotLand,
    Trouble::Retry,
    Trouble::Drop,
    Trouble::Cancel,
];

/// The newest connection. Older ones that an end still believes in carry nothing.
#[derive(Debug, Default)]
struct Link {
    up: bool,
    /// The filler knows it.
    known: bool,
    /// An end has closed it, after what it had sent.
    closed: (bool, bool),
    down_queue: VecDeque<Item>,
    up_queue: VecDeque<Item>,
}

struct World {
    now: Duration,
    supplier: Supplier,
    filler: Filler,
    link: Link,
    /// Nothing gets through until then.
    outage: Duration,
    owed: BTreeSet<u64>,
    absent: BTreeSet<u64>,
    supplier_step: Option<SupplierStep>,
    filler_step: Option<FillerStep>,
    interrupted: bool,
    /// Lacks that have come since Rejoin.
    lacks: BTreeSet<u64>,
    held: bool,
    /// Whole, once it is there at last.
    filled_told: bool,
    supplied: Vec<SupplierOutcome>,
    told: Vec<FillerOutcome>,
}

impl World {
    fn new() -> Self {
        let now = Duration::from_secs(1);
        let limits = Limits::default();
        let all: BTreeSet<u64> = (0..PAGES).collect();
        let mut world = Self {
            now,
            supplier: Supplier::new(now, SESSION, limits, true),
            filler: Filler::new(now, SESSION, limits, true),
            link: Link { up: true, known: true, ..Link::default() },
            outage: Duration::ZERO,
            owed: all.clone(),
            absent: all,
            supplier_step: None,
            filler_step: None,
            interrupted: false,
            lacks: BTreeSet::new(),
            held: false,
            filled_told: false,
            supplied: Vec::new(),
            told: Vec::new(),
        };
        world.drain();
        world
    }

    fn tell_supplier(&mut self, input: SupplierInput) {
        self.supplier.handle(self.now, input);
        self.drain();
    }

    fn tell_filler(&mut self, input: FillerInput) {
        self.filler.handle(self.now, input);
        self.drain();
    }

    fn is_up(&self) -> bool {
        self.link.up && self.now >= self.outage
    }

    fn drain(&mut self) {
        while let Some(action) = self.supplier.poll() {
            match action {
                SupplierAction::Send(frame) if self.is_up() => {
                    self.link.down_queue.push_back(Item::Frame(frame));
                }
                SupplierAction::Send(_) => {}
                SupplierAction::Run(step) => {
                    assert!(self.supplier_step.replace(step).is_none(), "one step at a time");
                    self.interrupted = false;
                    if step == SupplierStep::Rejoin {
                        self.lacks.clear();
                        self.link = Link { up: self.now >= self.outage, ..Link::default() };
                        if self.link.up {
                            self.link.down_queue.push_back(Item::Rejoin);
                        }
                    }
                }
                SupplierAction::Interrupt => self.interrupted = true,
                // What is on its way still arrives, and then the end of it.
                SupplierAction::Close => self.link.closed.0 = true,
                SupplierAction::Report(outcome) => {
                    if outcome == SupplierOutcome::Supplied {
                        assert!(self.absent.is_empty(), "memory is dropped that is needed");
                    }
                    self.supplied.push(outcome);
                }
            }
        }
        while let Some(action) = self.filler.poll() {
            match action {
                FillerAction::Send(frame) if self.is_up() => self.link.up_queue.push_back(Item::Frame(frame)),
                FillerAction::Send(_) => {}
                FillerAction::Run(step) => {
                    assert!(self.filler_step.replace(step).is_none(), "one step at a time");
                }
                FillerAction::Close => self.link.closed.1 |= self.link.known,
                FillerAction::Report(outcome) => {
                    if matches!(outcome, FillerOutcome::Complete { .. }) {
                        assert!(self.absent.is_empty() && !self.held, "complete and held");
                    }
                    self.told.push(outcome);
                }
            }
        }
        let severed = matches!(self.filler.state(), FillerState::Severed | FillerState::Answering);
        assert!(!severed || self.held, "the guest runs without its memory");
    }

    /// One thing happens: whatever `choice` picks of what can.
    fn step(&mut self, choice: u64) {
        match choice % 6 {
            0 => self.deliver_down(),
            1 => self.deliver_up(),
            2 => self.supplier_works(),
            3 => self.filler_works(),
            4 => self.guest(),
            _ => self.tick(),
        }
    }

    fn deliver_down(&mut self) {
        if !self.is_up() {
            return;
        }
        match self.link.down_queue.pop_front() {
            Some(Item::Frame(frame)) => self.tell_filler(FillerInput::Frame(frame)),
            Some(Item::Page(page)) => {
                self.absent.remove(&page);
                if self.absent.is_empty() && !std::mem::replace(&mut self.filled_told, true) {
                    self.tell_filler(FillerInput::Filled);
                }
            }
            Some(Item::Rejoin) => {
                self.tell_filler(FillerInput::Rejoin);
                self.link.known = true;
            }
            None if self.link.closed.0 => {
                self.link.up = false;
                if self.link.known {
                    self.tell_filler(FillerInput::Lost("closed".to_owned()));
                }
            }
            None => {}
        }
    }

    fn deliver_up(&mut self) {
        if !self.is_up() {
            return;
        }
        let rejoining = self.supplier_step == Some(SupplierStep::Rejoin);
        let Some(Item::Frame(frame)) = self.link.up_queue.pop_front() else {
            if self.link.closed.1 {
                // `supplier_works` sees it, too.
                self.link.up = false;
                if !rejoining {
                    self.tell_supplier(SupplierInput::Lost("closed".to_owned()));
                }
            }
            return;
        };
        match Message::decode(frame.clone()).unwrap() {
            Message::Lacks(range) if rejoining => drop(self.lacks.insert(range.gpa() / PAGE)),
            Message::Ack(Command::Rejoin) if rejoining => {
                self.supplier_step = None;
                self.owed = std::mem::take(&mut self.lacks);
                self.tell_supplier(SupplierInput::Done(Output::Nothing));
            }
            Message::Whole(_) | Message::Nack(..) if rejoining => {
                self.supplier_step = None;
                self.tell_supplier(SupplierInput::Frame(frame));
            }
            Message::Keepalive(_) if rejoining => {}
            Message::Want(range) => {
                // Sent before all others.
                if self.owed.remove(&(range.gpa() / PAGE)) {
                    self.link.down_queue.push_back(Item::Page(range.gpa() / PAGE));
                }
            }
            _ => self.tell_supplier(SupplierInput::Frame(frame)),
        }
    }

    fn supplier_works(&mut self) {
        match self.supplier_step {
            Some(SupplierStep::Push) if self.interrupted => {
                self.supplier_step = None;
                self.tell_supplier(SupplierInput::Failed(Fault::new(Reason::Cancelled, "interrupted")));
            }
            Some(SupplierStep::Push) => match self.owed.pop_first() {
                Some(page) if self.is_up() => self.link.down_queue.push_back(Item::Page(page)),
                Some(_) => {}
                None => {
                    self.supplier_step = None;
                    self.tell_supplier(SupplierInput::Done(Output::Nothing));
                }
            },
            Some(SupplierStep::Rejoin) if !self.is_up() => {
                self.supplier_step = None;
                self.tell_supplier(SupplierInput::Failed(Fault::new(Reason::Failed, "nobody is there")));
            }
            _ => {}
        }
    }

    fn filler_works(&mut self) {
        let Some(step) = self.filler_step.take() else { return };
        match step {
            FillerStep::Hold => self.held = true,
            FillerStep::Release => self.held = false,
            FillerStep::Answer => {
                if self.is_up() {
                    for page in self.absent.clone() {
                        self.wire_up(Message::Lacks(range(page)));
                    }
                }
            }
        }
        self.tell_filler(FillerInput::Done(Output::Nothing));
    }

    fn wire_up(&mut self, message: Message) {
        self.link.up_queue.push_back(Item::Frame(message.encode().unwrap()));
    }

    /// The guest touches the last page that it has not got.
    fn guest(&mut self) {
        let wanted = self.absent.last().copied().filter(|_| !self.held && self.is_up());
        if let Some(page) = wanted {
            self.wire_up(Message::Want(range(page)));
        }
    }

    fn tick(&mut self) {
        self.now += Duration::from_millis(700);
        self.tell_supplier(SupplierInput::Tick);
        self.tell_filler(FillerInput::Tick);
    }

    fn trouble(&mut self, trouble: Trouble) {
        let cut = |world: &mut Self| world.link = Link::default();
        let text = || "test".to_owned();
        match trouble {
            Trouble::Cut => {
                cut(self);
                self.tell_supplier(SupplierInput::Lost(text()));
                self.tell_filler(FillerInput::Lost(text()));
            }
            Trouble::CutUnseen { by_supplier } => {
                cut(self);
                if by_supplier {
                    self.tell_filler(FillerInput::Lost(text()));
                } else {
                    self.tell_supplier(SupplierInput::Lost(text()));
                }
            }
            Trouble::Silence => cut(self),
            Trouble::Outage => {
                cut(self);
                self.outage = self.now + Duration::from_secs(300);
            }
            Trouble::Garbage { at_supplier: true } => self.tell_supplier(SupplierInput::Garbage(text())),
            Trouble::Garbage { at_supplier: false } => self.tell_filler(FillerInput::Garbage(text())),
            Trouble::Stray { at_supplier: true } => {
                self.tell_supplier(SupplierInput::Frame(Message::Ready(SESSION).encode().unwrap()));
            }
            Trouble::Stray { at_supplier: false } => {
                self.tell_filler(FillerInput::Frame(Message::Complete.encode().unwrap()));
            }
            Trouble::StepFails { of_supplier: true } => {
                if self.supplier_step.take().is_some() {
                    self.tell_supplier(SupplierInput::Failed(Fault::new(Reason::Failed, "test")));
                }
            }
            Trouble::StepFails { of_supplier: false } => {
                if let Some(step) = self.filler_step.take() {
                    // A vCPU that waits for a page stands still, too.
                    self.held = step != FillerStep::Release;
                    self.tell_filler(FillerInput::Failed(Fault::new(Reason::Failed, "test")));
                }
            }
            Trouble::CannotLand => {
                if self.filler_step.is_none() {
                    self.tell_filler(FillerInput::Failed(Fault::new(Reason::Failed, "no memory")));
                }
            }
            Trouble::Retry => self.tell_supplier(SupplierInput::Retry),
            Trouble::Drop => self.tell_supplier(SupplierInput::Drop),
            Trouble::Cancel => self.tell_filler(FillerInput::Cancel(text())),
        }
    }

    fn is_over(&self) -> bool {
        self.supplier.state() == SupplierState::Ended && self.filler.state() == FillerState::Ended
    }

    /// Lets things happen until it is over, or nothing changes any more.
    fn finish(&mut self, about: &str) {
        for choice in 0..6 * 2000_u64 {
            if self.is_over() {
                return;
            }
            if self.supplier.state() == SupplierState::Stranded && self.now >= self.outage {
                self.tell_supplier(SupplierInput::Retry);
            }
            let dropped = self.supplied.contains(&SupplierOutcome::Dropped);
            if dropped && self.filler.state() == FillerState::Severed {
                // Nobody has the memory any more.
                self.tell_filler(FillerInput::Cancel("test".to_owned()));
            }
            // Old memory that is on its way when the link breaks is lost with it; a new link carries what is told then.
            self.step(choice);
        }
        panic!(
            "{about}: not over: {:?}, {:?}, absent {:?}, owed {:?}, {:?} {:?}",
            self.supplier.state(),
            self.filler.state(),
            self.absent,
            self.owed,
            self.supplied,
            self.told
        );
    }

    fn judge(&self, about: &str) {
        let given_up = self.told.iter().any(|told| matches!(told, FillerOutcome::Abandoned(_)));
        let dropped = self.supplied.contains(&SupplierOutcome::Dropped);
        let complete = self.told.iter().any(|told| matches!(told, FillerOutcome::Complete { .. }));
        assert!(complete != given_up, "{about}: {:?}", self.told);
        if complete {
            assert!(self.absent.is_empty() && !self.held, "{about}");
            assert!(
                dropped || self.supplied.contains(&SupplierOutcome::Supplied),
                "{about}: {:?}",
                self.supplied
            );
        } else {
            let refused = self.supplied.iter().any(|outcome| matches!(outcome, SupplierOutcome::Refused(_)));
            assert!(dropped || refused, "{about}: {:?}", self.supplied);
        }
    }
}

fn range(page: u64) -> vmm_migration_protocol::MemoryRange {
    vmm_migration_protocol::MemoryRange::new(page * PAGE, PAGE).unwrap()
}

#[test]
fn all_of_memory_arrives_and_then_only_the_source_lets_go() {
    let mut world = World::new();
    let steps = (0..).find(|choice| {
        world.step(*choice);
        world.is_over()
    });
    assert!(steps.unwrap() < STEPS, "{steps:?}");
    assert_eq!(world.supplied, [SupplierOutcome::Supplied]);
    assert_eq!(world.told, [FillerOutcome::Complete { trouble: None }]);
}

/// Once, and once more while the first is being mended.
#[test]
fn every_trouble_at_every_step_holds_the_guest_and_is_mended() {
    let mut cells = 0;
    for first in TROUBLES {
        for second in TROUBLES.map(Some).into_iter().chain([None]) {
            for at in 0..STEPS {
                let later = 1 + at % 7;
                let mut world = World::new();
                let about = format!("{first:?} at {at}, {second:?} {later} later");
                (0..at).for_each(|choice| world.step(choice));
                world.trouble(first);
                (at..at + later).for_each(|choice| world.step(choice));
                second.into_iter().for_each(|second| world.trouble(second));
                world.finish(&about);
                world.judge(&about);
                cells += 1;
            }
        }
    }
    assert_eq!(cells, 15 * 16 * STEPS);
}

#[test]
fn fuzz_any_order_of_things() {
    let mut random = Random::new(5);
    for round in 0..vmm_fuzzing::rounds(300) {
        let mut world = World::new();
        for _ in 0..200 {
            match random.below(20) {
                0 => {
                    let which = random.below(TROUBLES.len());
                    // The end of these is another test's.
                    if ![Trouble::Drop, Trouble::Cancel].contains(&TROUBLES[which]) {
                        world.trouble(TROUBLES[which]);
                    }
                }
                choice => world.step(choice as u64),
            }
        }
        world.finish(&format!("round {round}"));
        world.judge(&format!("round {round}"));
    }
}

/// A guest that was lost for good is so told at the other end, when that finds the way again.
#[test]
fn who_has_given_the_guest_up_says_so_to_who_comes_again() {
    let mut world = World::new();
    world.trouble(Trouble::Cut);
    while world.filler.state() != FillerState::Severed {
        world.filler_works();
    }
    world.trouble(Trouble::Cancel);
    assert!(matches!(world.told.last(), Some(FillerOutcome::Abandoned(_))));
    world.finish("abandoned");
    assert!(matches!(world.supplied.last(), Some(SupplierOutcome::Refused(_))), "{:?}", world.supplied);
}

/// Another receiver has the destination's address, it may be: it says nothing about the guest.
#[test]
fn only_a_nack_of_rejoin_gives_the_guest_up() {
    let fault = || Fault::new(Reason::Busy, "test");
    let nacks = [Command::Hello, Command::Join, Command::Commit].map(|about| Message::Nack(about, fault()));
    for other in nacks.into_iter().chain([Message::Whole(SessionId([2; 16]))]) {
        let frame = other.clone().encode().unwrap();
        let mut world = World::new();
        world.trouble(Trouble::Cut);
        let rejoins = |world: &World| world.supplier.state() == SupplierState::Rejoining;
        assert!((0..600).any(|choice| {
            world.step(choice);
            rejoins(&world)
        }));
        let (mut machine, now) = (world.supplier.clone(), world.now);
        machine.handle(now, SupplierInput::Frame(frame.clone()));
        assert_eq!(machine.state(), SupplierState::Severed, "{other:?}");
        let later = now + machine.next_wake().unwrap().saturating_sub(now);
        machine.handle(later, SupplierInput::Tick);
        assert_eq!(machine.state(), SupplierState::Rejoining, "{other:?}: it looks again");
        // On a link that is there it is nothing that a destination says.
        let mut world = World::new();
        world.tell_supplier(SupplierInput::Frame(frame));
        world.finish("another receiver");
        assert_eq!(world.supplied.last(), Some(&SupplierOutcome::Supplied), "{other:?}");
    }
}

#[test]
fn memory_that_is_whole_is_told_again_to_a_source_that_missed_it() {
    let mut world = World::new();
    let frames = |world: &World| world.link.up_queue.len();
    let mut choices = (0..4).cycle();
    while world.filler.state() != FillerState::Settling {
        world.step(choices.next().unwrap());
    }
    assert!(frames(&world) > 0, "Whole is on its way");
    world.trouble(Trouble::Cut);
    assert_eq!(world.filler.state(), FillerState::Ended);
    assert_ne!(world.supplied.last(), Some(&SupplierOutcome::Supplied));
    world.finish("whole");
    assert_eq!(world.supplied.last(), Some(&SupplierOutcome::Supplied));
}

fn frames() -> Vec<Frame> {
    [
        Message::Whole(SESSION),
        Message::Whole(SessionId([2; 16])),
        Message::Ack(Command::Whole),
        Message::Ack(Command::Committed),
        Message::Nack(Command::Rejoin, Fault::new(Reason::Cancelled, "test")),
        Message::Nack(Command::Hello, Fault::new(Reason::Busy, "test")),
        Message::Cancel(Fault::new(Reason::Cancelled, "test")),
        Message::Keepalive(Progress::default()),
        Message::Ready(SESSION),
        Message::Complete,
    ]
    .map(|message| message.encode().unwrap())
    .to_vec()
}

/// The tables say where an input may lead, and all of it is seen.
#[test]
fn every_input_in_every_state_does_what_the_table_says() {
    let (mut suppliers, mut fillers) = (BTreeSet::new(), BTreeSet::new());
    for first in TROUBLES.map(Some).into_iter().chain([None]) {
        for at in (0..60).chain([400, 800]) {
            let mut world = World::new();
            (0..at % 13).for_each(|choice| world.step(choice));
            first.into_iter().for_each(|first| world.trouble(first));
            (0..at).for_each(|choice| world.step(choice));
            suppliers.insert(format!("{:?}", world.supplier.state()));
            fillers.insert(format!("{:?}", world.filler.state()));
            for (later, input) in supplier_inputs() {
                let (mut machine, before) = (world.supplier.clone(), world.supplier.state());
                let kind = machine.handle(world.now + later, input.clone());
                match before.cell(kind) {
                    Cell::Go(to) => {
                        assert!(to.contains(&machine.state()), "{before:?} {input:?} {:?}", machine.state());
                    }
                    Cell::Ignore => assert_eq!(machine.state(), before, "{input:?}"),
                    other => panic!("{other:?}"),
                }
            }
            for (later, input) in filler_inputs() {
                let (mut machine, before) = (world.filler.clone(), world.filler.state());
                let kind = machine.handle(world.now + later, input.clone());
                match before.cell(kind) {
                    Cell::Go(to) => {
                        assert!(to.contains(&machine.state()), "{before:?} {input:?} {:?}", machine.state());
                    }
                    Cell::Ignore => assert_eq!(machine.state(), before, "{input:?}"),
                    other => panic!("{other:?}"),
                }
            }
        }
    }
    assert_eq!(suppliers.len(), SupplierState::ALL.len(), "{suppliers:?}");
    assert_eq!(fillers.len(), FillerState::ALL.len(), "{fillers:?}");
}

const WAITS: [u64; 5] = [0, 2, 6, 11, 1_000_000];

fn supplier_inputs() -> Vec<(Duration, SupplierInput)> {
    let mut inputs: Vec<_> = frames().into_iter().map(SupplierInput::Frame).collect();
    let text = || "test".to_owned();
    inputs.extend([
        SupplierInput::Garbage(text()),
        SupplierInput::Lost(text()),
        SupplierInput::Done(Output::Nothing),
        SupplierInput::Failed(Fault::new(Reason::Failed, "test")),
        SupplierInput::Retry,
        SupplierInput::Drop,
    ]);
    let ticks = WAITS.map(|seconds| (Duration::from_secs(seconds), SupplierInput::Tick));
    inputs.into_iter().map(|input| (Duration::ZERO, input)).chain(ticks).collect()
}

fn filler_inputs() -> Vec<(Duration, FillerInput)> {
    let mut inputs: Vec<_> = frames().into_iter().map(FillerInput::Frame).collect();
    let text = || "test".to_owned();
    inputs.extend([
        FillerInput::Rejoin,
        FillerInput::Garbage(text()),
        FillerInput::Lost(text()),
        FillerInput::Filled,
        FillerInput::Done(Output::Nothing),
        FillerInput::Failed(Fault::new(Reason::Failed, "test")),
        FillerInput::Cancel(text()),
    ]);
    let ticks = WAITS.map(|seconds| (Duration::from_secs(seconds), FillerInput::Tick));
    inputs.into_iter().map(|input| (Duration::ZERO, input)).chain(ticks).collect()
}
