//! Two ends in one process: a fake clock, links of queues, guests of a few pages, and one disk lock.
#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code; each user takes a part"
)]

pub(crate) mod destination;
pub(crate) mod fault;
pub(crate) mod source;

use std::collections::VecDeque;
use std::time::Duration;

use vmm_fuzzing::Random;
use vmm_migration_protocol::{
    Absent, Bulk, Cell, Destination, Features, Frame, Goals, Hello, Limits, Mark, Outcomes, PAGE, Purpose,
    SessionId, Source, SourceOutcome, SourceSetup, SourceState, TimeoutStrategy,
};

use crate::common::samples;
use destination::DestinationEnd;
use fault::Plan;
use source::SourceEnd;

/// Pages of the guest.
pub(crate) const PAGES: usize = 12;

/// The address of a page: the layout has a hole.
pub(crate) fn address(page: usize) -> u64 {
    PAGE * if page < 8 { page as u64 } else { 256 + page as u64 - 8 }
}

/// The page at an address.
pub(crate) fn page(gpa: u64) -> usize {
    (0..PAGES).find(|page| address(*page) == gpa).unwrap()
}

/// What kind of migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mode {
    pub(crate) name: &'static str,
    pub(crate) paused: bool,
    pub(crate) local: bool,
    pub(crate) postcopy: bool,
    pub(crate) check: bool,
    pub(crate) connections: u16,
    /// Pages that a guest which is not slowed down writes to in each event.
    pub(crate) writes: usize,
    /// Of those, how many there are in all.
    pub(crate) budget: usize,
    pub(crate) strategy: TimeoutStrategy,
    pub(crate) converge: bool,
    pub(crate) timeout: Duration,
    pub(crate) passes: u32,
}

impl Mode {
    pub(crate) const PLAIN: Self = Self {
        name: "plain",
        paused: false,
        local: false,
        postcopy: false,
        check: false,
        connections: 1,
        writes: 1,
        budget: 70,
        strategy: TimeoutStrategy::Cancel,
        converge: false,
        // Less than it takes for silence to be a lost link.
        timeout: Duration::from_secs(5),
        passes: u32::MAX,
    };

    pub(crate) const ALL: [Self; 11] = [
        Self::PLAIN,
        Self { name: "paused", paused: true, ..Self::PLAIN },
        Self { name: "local", local: true, ..Self::PLAIN },
        Self { name: "local and paused", local: true, paused: true, ..Self::PLAIN },
        Self { name: "post-copy", postcopy: true, writes: 3, ..Self::PLAIN },
        Self { name: "post-copy, paused", postcopy: true, paused: true, ..Self::PLAIN },
        Self { name: "several connections", connections: 4, ..Self::PLAIN },
        Self { name: "several connections, paused", connections: 3, paused: true, ..Self::PLAIN },
        Self { name: "check only", check: true, ..Self::PLAIN },
        Self { name: "slowed down", converge: true, budget: 100_000, ..Self::PLAIN },
        Self {
            name: "out of time, and goes on",
            budget: 100_000,
            strategy: TimeoutStrategy::Ignore,
            timeout: Duration::from_millis(90),
            ..Self::PLAIN
        },
    ];
}

/// What travels.
#[derive(Debug, Clone)]
pub(crate) enum Item {
    Frame(Frame),
    Page(Bulk, u64),
    Absent(Absent),
    Mark(Mark),
    /// The sender has closed.
    End,
}

/// Who holds the disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Holder {
    Nobody,
    Source,
    Destination,
}

/// What can happen next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event {
    /// The first item of a connection arrives at the destination.
    ToDestination(usize),
    /// The first item arrives at the source.
    ToSource,
    SourceWork,
    DestinationWork,
}

/// The links between both ends.
#[derive(Debug)]
pub(crate) struct Links {
    pub(crate) to_destination: Vec<VecDeque<Item>>,
    pub(crate) to_source: VecDeque<Item>,
    /// Whether what is sent arrives.
    pub(crate) up: bool,
    /// Whether a new connection, for Query, is possible.
    pub(crate) reachable: bool,
    /// Whether another process answers there, which knows nothing.
    pub(crate) stranger: bool,
}

impl Links {
    fn new() -> Self {
        Self {
            to_destination: vec![VecDeque::new(); 16],
            to_source: VecDeque::new(),
            up: true,
            reachable: true,
            stranger: false,
        }
    }

    pub(crate) fn cut(&mut self) {
        self.up = false;
        self.to_destination.iter_mut().for_each(VecDeque::clear);
        self.to_source.clear();
    }
}

/// Everything.
pub(crate) struct World {
    pub(crate) mode: Mode,
    pub(crate) now: Duration,
    pub(crate) source: SourceEnd,
    pub(crate) destination: DestinationEnd,
    pub(crate) links: Links,
    pub(crate) locks: Holder,
    /// Events so far.
    pub(crate) count: usize,
    /// The operator has said that the destination is no more.
    pub(crate) kept: bool,
    order: Order,
    sessions: u8,
}

/// Which of the events that are possible comes next.
#[derive(Debug, Clone)]
pub(crate) enum Order {
    SourceFirst,
    DestinationFirst,
    Random(Random),
}

impl World {
    pub(crate) fn new(mode: Mode, order: Order) -> Self {
        let now = Duration::from_secs(5);
        let links = Links::new();
        let outcomes = Outcomes::new();
        let source = SourceEnd::new(machine(now, &mode, 1), &mode);
        let destination = DestinationEnd::new(now, outcomes);
        let mut world = Self {
            mode,
            now,
            source,
            destination,
            links,
            locks: Holder::Source,
            count: 0,
            order,
            kept: false,
            sessions: 1,
        };
        world.source_actions();
        world
    }

    /// Another migration of the same guest, after one that failed.
    pub(crate) fn again(&mut self) {
        self.again_with_session(self.sessions + 1);
    }

    /// The same, in a session of a chosen name.
    pub(crate) fn again_with_session(&mut self, session: u8) {
        self.sessions = session;
        self.kept = false;
        self.links = Links::new();
        self.mode.timeout = self.mode.timeout.max(Duration::from_secs(1));
        self.mode.budget = 20;
        self.source.restart(machine(self.now, &self.mode, self.sessions));
        let outcomes = std::mem::take(&mut self.destination.outcomes);
        self.destination = DestinationEnd::new(self.now, outcomes);
        self.source_actions();
    }

    /// Runs to the end, with the fault of `plan`; `false`: there was nothing that it could happen to.
    pub(crate) fn run(&mut self, plan: &Plan) -> bool {
        self.run_watched(std::slice::from_ref(plan), &mut |_| {})
    }

    /// The same, and lets `watch` look before each event.
    pub(crate) fn run_watched(&mut self, plans: &[Plan], watch: &mut dyn FnMut(&Self)) -> bool {
        let mut applied = false;
        for _ in 0..20_000 {
            watch(self);
            while let Some(plan) = plans.iter().find(|plan| plan.at == self.count) {
                applied |= self.inject(plan.fault);
                watch(self);
                self.check();
            }
            match self.next_event() {
                Some(event) => {
                    self.count += 1;
                    self.now += Duration::from_millis(1);
                    self.happen(event);
                    self.guest_writes();
                }
                None if self.is_over() => return applied,
                None => self.pass_time(),
            }
            self.check();
        }
        panic!("no end: {:?} and {:?}", self.source.machine.state(), self.destination.machine.state());
    }

    fn is_over(&self) -> bool {
        let source = matches!(self.source.machine.state(), SourceState::Ended | SourceState::InDoubt);
        (source || self.source.dead) && (self.destination.is_ended() || self.destination.dead)
    }

    pub(crate) fn possible(&self) -> Vec<Event> {
        let mut events = Vec::new();
        if !self.source.dead {
            events.extend(self.source.work.is_some().then_some(Event::SourceWork));
            events.extend((!self.links.to_source.is_empty()).then_some(Event::ToSource));
        }
        if !self.destination.dead {
            events.extend(self.destination.work.is_some().then_some(Event::DestinationWork));
            let queues = self.links.to_destination.iter().enumerate();
            events.extend(
                queues.filter(|(_, queue)| !queue.is_empty()).map(|(at, _)| Event::ToDestination(at)),
            );
        }
        events
    }

    pub(crate) fn next_event(&mut self) -> Option<Event> {
        let events = self.possible();
        match &mut self.order {
            Order::SourceFirst => events.first().copied(),
            Order::DestinationFirst => events.last().copied(),
            Order::Random(_) if events.is_empty() => None,
            Order::Random(random) => Some(events[random.below(events.len())]),
        }
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::ToDestination(connection) => {
                let item = self.links.to_destination[connection].pop_front().unwrap();
                self.arrives_at_destination(connection, item);
            }
            Event::ToSource => {
                let item = self.links.to_source.pop_front().unwrap();
                self.arrives_at_source(item);
            }
            Event::SourceWork => self.source_work(false),
            Event::DestinationWork => self.destination_work(false),
        }
    }

    fn pass_time(&mut self) {
        let wakes = [
            (!self.source.dead).then(|| self.source.machine.next_wake()).flatten(),
            (!self.destination.dead).then(|| self.destination.machine.next_wake()).flatten(),
        ];
        let next = wakes.into_iter().flatten().min();
        let next = next.unwrap_or_else(|| {
            panic!(
                "waits forever: {:?} and {:?}",
                self.source.machine.state(),
                self.destination.machine.state()
            )
        });
        self.now = self.now.max(next);
        self.tick();
    }

    pub(crate) fn tick(&mut self) {
        self.tick_source();
        self.tick_destination();
    }

    /// The guest writes to pages while it runs at the source.
    fn guest_writes(&mut self) {
        if !self.source.running {
            return;
        }
        self.source.share += self.mode.writes * usize::from(100 - self.source.throttle);
        while self.source.share >= 100 {
            self.source.share -= 100;
            if self.source.written < self.mode.budget {
                self.source.write(self.count);
            }
        }
    }

    /// What must hold at any time.
    pub(crate) fn check(&self) {
        let (source, destination) = (&self.source, &self.destination);
        let here = source.running && !source.dead;
        let there = destination.running() && !destination.dead;
        assert!(!(here && there), "the guest runs twice");
        if here {
            assert_eq!(self.locks, Holder::Source, "the guest runs without its disks");
            assert!(!source.given_away, "the guest runs though given away");
            assert!(!destination.owned() || destination.dead, "the guest runs though the destination has it");
        }
        if there {
            assert!(destination.owned(), "the guest runs before Commit");
            assert_eq!(self.locks, Holder::Destination, "the guest runs without its disks");
        }
        // What a dead destination had decided is the operator's to overrule, and nobody else's.
        if destination.owned() && !source.dead && !(self.kept && destination.dead) {
            let known = source.given_away || source.outcome == Some(SourceOutcome::Sent);
            assert!(known, "a Commit that the source has not decided");
        }
    }
}

/// The source's machine for a mode.
fn machine(now: Duration, mode: &Mode, session: u8) -> Source {
    let features = match mode {
        Mode { local: true, .. } => Features::LOCAL_MEMORY,
        Mode { postcopy: true, .. } => Features::POST_COPY,
        _ => Features::NONE,
    };
    let hello = Hello {
        session: SessionId([session; 16]),
        purpose: if mode.check { Purpose::Check } else { Purpose::Migrate },
        features,
        required: features,
        connections: mode.connections,
        ..samples::hello()
    };
    let setup = SourceSetup {
        hello,
        config: b"{}".to_vec(),
        descriptors: vec![vmm_migration_protocol::DescriptorRange {
            range: samples::range(0, 8 * PAGE),
            offset: 0,
            descriptor: 0,
        }],
        paused: mode.paused,
        goals: Goals {
            downtime: Duration::from_millis(4),
            overhead: Duration::ZERO,
            timeout: mode.timeout,
            strategy: mode.strategy,
            auto_converge: mode.converge,
            passes: mode.passes,
        },
        limits: Limits::default(),
    };
    Source::new(now, setup).unwrap()
}

/// Whether the table allows that `before` became `after` by something with `cell`.
pub(crate) fn allows<S: PartialEq + Copy + std::fmt::Debug>(
    (before, cell, after): (S, Cell<S>, S),
    failed: &[S],
    ask: Option<S>,
) -> bool {
    match cell {
        Cell::Go(to) => to.contains(&after),
        Cell::GiveUp => failed.contains(&after),
        Cell::Ask => Some(after) == ask,
        Cell::Ignore => before == after,
    }
}

impl World {
    /// A destination's machine that nobody has talked to.
    pub(crate) fn fresh_destination(now: Duration, outcomes: &Outcomes) -> Destination {
        Destination::new(now, samples::offer(), Limits::default(), outcomes)
    }
}
