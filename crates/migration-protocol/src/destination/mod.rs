//! The end that gets the VM: [`Destination`].

mod read;
mod table;

use std::collections::VecDeque;
use std::time::Duration;

use crate::machine::{Link, Timer, Work};
use crate::{
    Accept, Cell, Command, DescriptorRange, End, Failure, Fault, Features, Filler, Frame, Hello, Limits,
    MemoryRange, Message, Offer, Outcomes, Output, Progress, Purpose, Reason, SessionId, SessionOutcome,
};

use read::Event;
pub use table::{DestinationKind, DestinationState};

/// What happens to a destination.
#[derive(Debug, Clone)]
pub enum DestinationInput {
    /// A frame on connection 0 that is not [about memory](Command::is_data).
    Frame(Frame),
    /// Bytes from the peer that are no frame, or memory that it must not send, on any connection, and what is wrong.
    Garbage(String),
    /// A connection is gone, and how.
    Lost(String),
    /// A pass has landed: its Mark has come on every connection.
    Landed {
        /// Which pass.
        pass: u32,
        /// Whether it is the last.
        last: bool,
    },
    /// Contents of this range arrived damaged.
    Damaged(MemoryRange),
    /// What it last gave the driver to do is done.
    Done(Output),
    /// It could not be done, and nothing of it is left; or memory could not land.
    Failed(Fault),
    /// A Query for this session has come, on another connection. Answer it from [`Outcomes`] once the actions that
    /// follow are done.
    Query,
    /// This side's operator wants it to end.
    Cancel(String),
    /// Time passes.
    Tick,
}

/// Something that the driver does, and answers with Done or Failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DestinationStep {
    /// Say whether a VM of this configuration can run here, with what the operator provides, and build nothing. What
    /// is missing goes into [`Fault::incompatible`].
    Check(Vec<u8>),
    /// Build the VM of that configuration, its memory zero; it takes no disk locks and nobody sees it.
    Build,
    /// Map the memory that the descriptors beside the frame hold.
    MapMemory(Vec<DescriptorRange>),
    /// Restore this saved state.
    Restore(Vec<u8>),
    /// Take the disk locks.
    TakeLocks,
    /// Run the guest.
    Run,
}

/// How a step is undone; the driver answers with Done or Failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DestinationUndo {
    /// Drop the VM and all that belongs to it.
    Discard,
    /// Release the disk locks.
    ReleaseLocks,
}

/// How a migration ended, for the destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DestinationOutcome {
    /// The VM is here.
    Received {
        /// Whether the guest runs; it does not if it was paused before, or if `trouble` came.
        running: bool,
        /// Why it could not be resumed.
        trouble: Option<Fault>,
    },
    /// A check-only run: this end would take the VM. It can be asked again.
    Checked,
    /// There is no VM here.
    Failed {
        /// Why.
        failure: Failure,
        /// What could not be undone.
        stuck: Vec<DestinationUndo>,
    },
}

/// What the driver is to do, in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DestinationAction {
    /// Send it on connection 0.
    Send(Frame),
    /// Do it, then answer with one [`DestinationInput::Done`] or [`DestinationInput::Failed`].
    Run(DestinationStep),
    /// Undo it, then answer likewise.
    Undo(DestinationUndo),
    /// End the step under way as soon as it can end; it is answered all the same. Memory need not land any more.
    Interrupt,
    /// Remember how the session ended, before anything else: [`Outcomes::remember`](Outcomes::remember).
    Remember(SessionId, SessionOutcome),
    /// The source knows: [`Outcomes::settle`](Outcomes::settle).
    Settle(SessionId),
    /// Close all connections, after everything that was to be sent.
    Close,
    /// Tell how it ended.
    Report(DestinationOutcome),
}

/// What the peer has said so far.
#[derive(Debug, Clone, Default)]
struct Heard {
    hello: Option<Hello>,
    accept: Option<Accept>,
    /// The saved state, until it can be restored.
    state: Vec<u8>,
    complete: bool,
    /// Whether contents of this pass arrived damaged.
    damaged: bool,
    /// How far the source says it is.
    progress: Progress,
    /// The guest is to run, and memory of it is at the source still.
    owed: bool,
}

/// The end that gets the VM, as a machine: inputs in, actions out.
///
/// It does nothing itself. `README.md`, "Driving the machines", says what a driver does.
#[derive(Debug, Clone)]
pub struct Destination {
    offer: Offer,
    /// Sessions that have ended: their ids are used up.
    over: Vec<SessionId>,
    limits: Limits,
    state: DestinationState,
    timer: Timer,
    /// The step under way with how it will be undone, or what is being undone.
    work: Option<Work<Option<DestinationUndo>, DestinationUndo>>,
    undo: Vec<DestinationUndo>,
    actions: VecDeque<DestinationAction>,
    heard: Heard,
    link: Link,
    /// Why it failed, and which command that was about.
    failure: Option<(Failure, Command)>,
    stuck: Vec<DestinationUndo>,
}

impl Destination {
    /// A destination whose connection 0 is open, and waits for Hello. A session that is among `outcomes` is refused.
    #[must_use]
    pub fn new(now: Duration, offer: Offer, limits: Limits, outcomes: &Outcomes) -> Self {
        let mut timer = Timer::new(now);
        timer.due_in(limits.answer);
        Self {
            offer,
            over: outcomes.sessions().collect(),
            limits,
            state: DestinationState::Greeting,
            timer,
            work: None,
            undo: Vec::new(),
            actions: VecDeque::new(),
            heard: Heard::default(),
            link: Link::Up,
            failure: None,
            stuck: Vec::new(),
        }
    }

    /// Takes one input that happened at `now`, on a clock that never goes back, and says what it was.
    pub fn handle(&mut self, now: Duration, input: DestinationInput) -> DestinationKind {
        self.timer.advance(now);
        let event = self.read(input);
        let kind = event.kind();
        // A result of nothing. Memory that could not land fails without having been asked for.
        let unasked = kind == DestinationKind::Done && self.work.is_none();
        if kind == DestinationKind::Lost && self.state == DestinationState::Resuming {
            self.link = Link::Lost;
        }
        match self.state.cell(kind) {
            _ if unasked => {}
            Cell::Go(_) => self.go(event),
            Cell::GiveUp => {
                if kind == DestinationKind::Lost {
                    self.link = Link::Lost;
                }
                if kind == DestinationKind::Failed {
                    self.work = None;
                }
                let about = self.about();
                let failure = event.into_failure(self.state);
                self.fail(failure, about);
            }
            Cell::Ask | Cell::Ignore => {}
        }
        if self.is_live() && self.timer.must_speak(&self.limits) {
            self.say(Message::Keepalive(Progress::default()));
        }
        kind
    }

    /// Something of memory has come, which is no input: until `now` the link is not silent, though frames may wait behind it.
    pub fn note_heard(&mut self, now: Duration) {
        self.timer.advance(now);
        self.timer.heard();
    }

    /// The next action, if there is one. Take all of them after every input.
    pub fn poll(&mut self) -> Option<DestinationAction> {
        self.actions.pop_front()
    }

    /// When a Tick changes something, if nothing else happens before.
    #[must_use]
    pub fn next_wake(&self) -> Option<Duration> {
        let link = self.is_live().then(|| self.timer.link_wake(&self.limits));
        let session =
            self.state.is_before_commit().then(|| self.timer.began.saturating_add(self.limits.session));
        [self.timer.due, link, session].into_iter().flatten().min()
    }

    /// Where it is.
    #[must_use]
    pub fn state(&self) -> DestinationState {
        self.state
    }

    /// What the source said first: its session, its memory, what its CPU needs.
    #[must_use]
    pub fn hello(&self) -> Option<&Hello> {
        self.heard.hello.as_ref()
    }

    /// In post-copy, once it has [received](DestinationOutcome::Received) the VM: the machine that goes on, for memory is at the source
    /// still.
    #[must_use]
    pub fn filler(&self) -> Option<Filler> {
        let session = self.session().filter(|_| self.heard.owed && self.state == DestinationState::Ended)?;
        Some(Filler::new(self.timer.now, session, self.limits, self.link == Link::Up))
    }

    /// What both ends use.
    #[must_use]
    pub fn accept(&self) -> Option<&Accept> {
        self.heard.accept.as_ref()
    }

    /// How far the source says it is.
    #[must_use]
    pub fn progress(&self) -> Progress {
        self.heard.progress
    }

    /// The next step of the way. The table has let through what is expected in this state only.
    fn go(&mut self, event: Event) {
        if let (Event::Done, Some(Work::Step(undo))) = (&event, self.work) {
            self.work = None;
            self.undo.extend(undo);
        }
        match (self.state, event) {
            (DestinationState::Greeting, Event::Hello(hello)) => self.greeted(*hello),
            (DestinationState::Offered, Event::Config(config)) => {
                self.run(DestinationState::Checking, DestinationStep::Check(config));
            }
            (DestinationState::Checking, Event::Done) => self.checked(),
            (DestinationState::Willing, Event::Start) => {
                self.run(DestinationState::Building, DestinationStep::Build);
            }
            (DestinationState::Building, Event::Done) => {
                self.say(Message::Ack(Command::Start));
                self.wait(DestinationState::Receiving, self.limits.session);
            }
            (DestinationState::Receiving, Event::Landed(pass, false)) => {
                self.heard.damaged = false;
                self.say(Message::Landed(pass));
            }
            (DestinationState::Receiving, Event::Damaged(range)) => {
                self.heard.damaged = true;
                self.say(Message::Again(range));
            }
            (DestinationState::Receiving | DestinationState::Draining, Event::Landed(_, true)) => {
                self.filled();
            }
            (DestinationState::Receiving, Event::Descriptors(list)) => {
                self.run(DestinationState::Mapping, DestinationStep::MapMemory(list));
            }
            (DestinationState::Mapping, Event::Done) => {
                self.say(Message::Ack(Command::Descriptors));
                self.wait(DestinationState::Filled, self.limits.prepare);
            }
            (DestinationState::Receiving, Event::State(state)) => {
                self.heard.state = state;
                self.state = DestinationState::Draining;
            }
            (DestinationState::Filled, Event::State(state)) => self.restore(state),
            (_, event) => self.go_on(event),
        }
    }

    /// The same for what comes once the state is there, or after a failure.
    fn go_on(&mut self, event: Event) {
        match (self.state, event) {
            (DestinationState::Draining | DestinationState::Restoring, Event::Complete) => {
                self.heard.complete = true;
            }
            (DestinationState::Restoring, Event::Done) => {
                if self.heard.complete {
                    self.run(DestinationState::Locking, DestinationStep::TakeLocks);
                } else {
                    self.wait(DestinationState::Restored, self.limits.answer);
                }
            }
            (DestinationState::Restored, Event::Complete) => {
                self.heard.complete = true;
                self.run(DestinationState::Locking, DestinationStep::TakeLocks);
            }
            (DestinationState::Locking, Event::Done) => {
                if let Some(session) = self.session() {
                    self.say(Message::Ready(session));
                }
                self.wait(DestinationState::Ready, self.limits.answer);
            }
            (DestinationState::Ready, Event::Commit(run)) => self.commit(run),
            (DestinationState::Resuming, Event::Done) => self.received(true, None),
            (DestinationState::Resuming, Event::Failed(fault)) => self.received(false, Some(fault)),
            (DestinationState::Resuming | DestinationState::Ended, Event::Settled) => {
                self.actions.extend(self.session().map(DestinationAction::Settle));
            }
            (DestinationState::Stopping | DestinationState::Undoing, Event::Lost(_))
                if self.link == Link::Up =>
            {
                self.link = Link::Lost;
            }
            (DestinationState::Stopping | DestinationState::Undoing, Event::Lost(_)) => {}
            (DestinationState::Stopping, _) => {
                self.work = None;
                self.roll_back();
            }
            (DestinationState::Undoing, event) => {
                if let (Event::Failed(_), Some(Work::Undo(undo))) = (&event, self.work) {
                    self.stuck.push(undo);
                }
                self.work = None;
                self.unwind();
            }
            _ => {}
        }
    }

    fn greeted(&mut self, hello: Hello) {
        let answer = if self.over.contains(&hello.session) {
            Err(Fault::new(Reason::Busy, "this session is over: a new one is needed"))
        } else {
            self.offer.answer(&hello)
        };
        self.heard.hello = Some(hello);
        match answer {
            Ok(accept) => {
                self.heard.accept = Some(accept.clone());
                self.say(Message::Accept(accept));
                self.wait(DestinationState::Offered, self.limits.prepare);
            }
            Err(fault) => self.fail(Failure { end: End::Here, fault }, Command::Hello),
        }
    }

    fn checked(&mut self) {
        self.say(Message::Ack(Command::Config));
        if self.hello().is_some_and(|hello| hello.purpose == Purpose::Check) {
            self.close();
            self.end(DestinationOutcome::Checked);
        } else {
            self.wait(DestinationState::Willing, self.limits.prepare);
        }
    }

    /// The last pass has landed.
    fn filled(&mut self) {
        if self.heard.damaged {
            let failure = Failure::new(End::Link, Reason::Damaged, "in the last pass");
            return self.fail(failure, Command::Memory);
        }
        if self.state == DestinationState::Draining {
            let state = std::mem::take(&mut self.heard.state);
            self.restore(state);
        } else {
            self.wait(DestinationState::Filled, self.limits.prepare);
        }
    }

    fn restore(&mut self, state: Vec<u8>) {
        self.run(DestinationState::Restoring, DestinationStep::Restore(state));
    }

    /// The point of no return: from here on the VM is this end's.
    fn commit(&mut self, run: bool) {
        let Some(session) = self.session() else { return };
        self.undo.clear();
        let postcopy = self.accept().is_some_and(|accept| accept.features.contains(Features::POST_COPY));
        self.heard.owed = run && postcopy;
        self.actions.push_back(DestinationAction::Remember(session, SessionOutcome::Committed));
        self.say(Message::Committed(session));
        if run {
            self.run(DestinationState::Resuming, DestinationStep::Run);
        } else {
            self.received(false, None);
        }
    }

    fn received(&mut self, running: bool, trouble: Option<Fault>) {
        self.work = None;
        if !self.heard.owed {
            self.close();
        }
        self.end(DestinationOutcome::Received { running, trouble });
    }

    /// Before Commit: decides that the VM stays with the source, ends the step under way, then undoes all.
    fn fail(&mut self, failure: Failure, about: Command) {
        self.timer.due = None;
        self.failure.get_or_insert((failure, about));
        if let (Some(session), false) = (self.session(), self.undo.is_empty()) {
            self.actions.push_back(DestinationAction::Remember(session, SessionOutcome::Aborted));
        }
        if self.work.is_some() {
            self.actions.push_back(DestinationAction::Interrupt);
            self.state = DestinationState::Stopping;
        } else {
            self.roll_back();
        }
    }

    fn roll_back(&mut self) {
        self.state = DestinationState::Undoing;
        self.unwind();
    }

    /// Locks go first, for the source wants them; then the source is told; then goes all else.
    fn unwind(&mut self) {
        if self.undo.last() != Some(&DestinationUndo::ReleaseLocks) {
            self.tell();
        }
        match self.undo.pop() {
            Some(undo) => {
                self.work = Some(Work::Undo(undo));
                self.actions.push_back(DestinationAction::Undo(undo));
            }
            None => {
                let failure = self.failure().0;
                let stuck = std::mem::take(&mut self.stuck);
                self.end(DestinationOutcome::Failed { failure, stuck });
            }
        }
    }

    /// Says why it gives up, unless the source said so first.
    fn tell(&mut self) {
        let (Failure { end, fault }, about) = self.failure();
        let told = end == End::Peer && fault.reason() != Reason::Violation;
        if self.link == Link::Up && !told {
            if fault.reason() == Reason::Cancelled {
                self.say(Message::Cancel(fault));
            } else {
                self.say(Message::Nack(about, fault));
            }
        }
        self.close();
    }

    fn run(&mut self, state: DestinationState, step: DestinationStep) {
        self.timer.due = None;
        self.state = state;
        self.work = Some(Work::Step(match step {
            DestinationStep::Build => Some(DestinationUndo::Discard),
            DestinationStep::TakeLocks => Some(DestinationUndo::ReleaseLocks),
            DestinationStep::Check(_)
            | DestinationStep::MapMemory(_)
            | DestinationStep::Restore(_)
            | DestinationStep::Run => None,
        }));
        self.actions.push_back(DestinationAction::Run(step));
    }

    fn wait(&mut self, state: DestinationState, time: Duration) {
        self.state = state;
        self.timer.due_in(time);
    }

    fn end(&mut self, outcome: DestinationOutcome) {
        self.timer.due = None;
        self.state = DestinationState::Ended;
        self.actions.push_back(DestinationAction::Report(outcome));
    }

    /// A message of a size that is known.
    fn say(&mut self, message: Message) {
        if let Ok(frame) = message.encode() {
            self.timer.said();
            self.actions.push_back(DestinationAction::Send(frame));
        }
    }

    fn close(&mut self) {
        if self.link != Link::Closed {
            self.link = Link::Closed;
            self.actions.push_back(DestinationAction::Close);
        }
    }

    /// Whether the link matters, and the source has spoken.
    fn is_live(&self) -> bool {
        self.state.is_before_commit() && self.state != DestinationState::Greeting
    }

    fn is_local(&self) -> bool {
        self.accept().is_some_and(|accept| accept.features.contains(Features::LOCAL_MEMORY))
    }

    fn session(&self) -> Option<SessionId> {
        self.hello().map(|hello| hello.session)
    }

    fn failure(&self) -> (Failure, Command) {
        let unknown = || (Failure::new(End::Here, Reason::Failed, ""), Command::Hello);
        self.failure.clone().unwrap_or_else(unknown)
    }

    /// Which command is being carried out, or waited for.
    fn about(&self) -> Command {
        match self.state {
            DestinationState::Greeting => Command::Hello,
            DestinationState::Offered | DestinationState::Checking => Command::Config,
            DestinationState::Willing | DestinationState::Building => Command::Start,
            DestinationState::Mapping => Command::Descriptors,
            DestinationState::Receiving | DestinationState::Draining => Command::Memory,
            DestinationState::Filled | DestinationState::Restoring => Command::State,
            DestinationState::Restored | DestinationState::Locking => Command::Complete,
            DestinationState::Ready
            | DestinationState::Resuming
            | DestinationState::Stopping
            | DestinationState::Undoing
            | DestinationState::Ended => Command::Commit,
        }
    }
}
