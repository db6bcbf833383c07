//! The end that has the VM: [`Source`].

mod read;
mod table;

use std::collections::VecDeque;
use std::time::Duration;

use crate::machine::{Link, Timer, Work};
use crate::{
    Accept, Cell, Command, Decision, DescriptorRange, End, Failure, Fault, Features, Frame, FrameError,
    Goals, Hello, Limits, MemoryRange, Message, Output, Pass, Policy, Progress, Purpose, Reason,
    SessionOutcome, Supplier,
};

use read::Event;
pub use table::{SourceKind, SourceState};

/// All that a source is told at the begin.
#[derive(Debug, Clone)]
pub struct SourceSetup {
    /// What it says first. With [`Features::LOCAL_MEMORY`] required, memory goes by `descriptors`.
    pub hello: Hello,
    /// The VM's configuration, 1 byte to 1 MiB.
    pub config: Vec<u8>,
    /// Where the guest's memory lies in the descriptors that the driver attaches; empty unless memory goes that way.
    pub descriptors: Vec<DescriptorRange>,
    /// Whether the VM is paused already, and stays so.
    pub paused: bool,
    /// What the migration aims for.
    pub goals: Goals,
    /// How long it waits.
    pub limits: Limits,
}

/// What happens to a source.
#[derive(Debug, Clone)]
pub enum SourceInput {
    /// A frame on connection 0, or the Outcome that [`SourceStep::Ask`] got.
    Frame(Frame),
    /// Bytes from the peer that are no frame, on any connection, and what is wrong with them.
    Garbage(String),
    /// A connection is gone, and how.
    Lost(String),
    /// What it last gave the driver to do is done.
    Done(Output),
    /// It could not be done, and nothing of it is left.
    Failed(Fault),
    /// This side's operator wants it to end. Too late after Commit: see [`SourceState::is_before_commit`].
    Cancel(String),
    /// In doubt: ask again.
    Ask,
    /// In doubt: the operator says that the VM is here, and answers for it.
    Keep,
    /// In doubt: the operator says that the VM is at the destination.
    Yield,
    /// Time passes.
    Tick,
}

/// Which memory a pass sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum What {
    /// All of it; ranges that were never touched, or are zero, need no bytes.
    All,
    /// What [`SourceStep::TakeDirty`] and [`SourceAction::Resend`] have put aside since the pass before.
    Taken,
    /// The same, by Absent and without contents; it stays put aside, for the [`Supplier`] owes it. Post-copy only.
    Absent,
}

/// Something that the driver does, and answers with Done or Failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SourceStep {
    /// Open connections 1 and up, send Join on each, wait for its Ack.
    Connect {
        /// How many there are then, the first included.
        connections: u16,
    },
    /// Switch the dirty log on, of vCPUs and of devices.
    StartDirtyLog,
    /// Send memory, then Mark on each connection; [`Output::Sent`] is how much that was.
    SendMemory {
        /// Number of the pass.
        pass: u32,
        /// Which memory.
        what: What,
        /// Whether Mark says that it is the last pass.
        last: bool,
        /// Connections to spread it over.
        connections: u16,
    },
    /// Put aside what was written to since the last time; [`Output::Bytes`] is how much is put aside by now.
    TakeDirty,
    /// Slow the vCPUs down, to leave them so much less of their time.
    Throttle {
        /// In percent, 1 to 99.
        percent: u8,
    },
    /// Pause vCPUs, then devices: nothing writes to memory any more, and no I/O is under way.
    Pause,
    /// [`Output::State`]: the saved state.
    SaveState,
    /// Release the disk locks; everything that the guest wrote is with the disks.
    ReleaseLocks,
    /// Mark the VM given away: it cannot be resumed, unless forced.
    GiveAway,
    /// Open a new connection to the destination's address, send Query, and give the Outcome of this session as a frame; then send
    /// Ack(Outcome). Any other answer is Failed.
    Ask,
}

/// How a step is undone; the driver answers with Done or Failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SourceUndo {
    /// Switch the dirty log off, and forget what was put aside.
    StopDirtyLog,
    /// Give the vCPUs all of their time.
    Unthrottle,
    /// Resume devices and vCPUs.
    Resume,
    /// Take the disk locks. Tried again while it fails, for as long as [`Limits::locks`].
    TakeLocks,
    /// The VM is no longer given away.
    TakeBack,
}

/// How a migration ended, for the source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SourceOutcome {
    /// The VM is the destination's; what is here can be dropped, unless there is a [`supplier`](Source::supplier).
    Sent,
    /// A check-only run: the destination would take the VM.
    Accepted,
    /// The VM is here, in the phase it had, unless something is `stuck`.
    Failed {
        /// Why.
        failure: Failure,
        /// What could not be undone. After [`SourceUndo::TakeLocks`] or [`SourceUndo::TakeBack`] the guest is not
        /// resumed.
        stuck: Vec<SourceUndo>,
    },
    /// Nobody knows where the VM is: it stays paused and given away. Not the end: Ask, Keep or Yield follow.
    InDoubt(Failure),
}

/// What the driver is to do, in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SourceAction {
    /// Send it on connection 0, between two frames. Descriptors go with [`Command::Descriptors`].
    Send(Frame),
    /// Do it, then answer with one [`SourceInput::Done`] or [`SourceInput::Failed`].
    Run(SourceStep),
    /// Undo it, then answer likewise.
    Undo(SourceUndo),
    /// End the step under way as soon as it can end, between two frames; it is answered all the same.
    Interrupt,
    /// Put the range aside, to be sent with the next pass.
    Resend(MemoryRange),
    /// Close all connections, after everything that was to be sent.
    Close,
    /// Tell how it ended.
    Report(SourceOutcome),
}

/// What a source knows of how far it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SourceProgress {
    /// Where it is.
    pub state: SourceState,
    /// Passes and bytes, and the blackout to expect.
    pub sent: Progress,
    /// Bandwidth in bytes per second; 0 when it is not known.
    pub bandwidth: u64,
    /// Bytes per second that the guest writes to.
    pub dirty_rate: u64,
    /// By how much vCPUs are slowed down, in percent.
    pub throttle: u8,
}

/// The frames and choices that are fixed at the begin.
#[derive(Debug, Clone)]
struct Plan {
    hello: Hello,
    config: Frame,
    descriptors: Option<Frame>,
    paused: bool,
    limits: Limits,
}

/// The pass over memory that goes on.
#[derive(Debug, Clone, Default)]
struct Current {
    number: u32,
    began: Duration,
    /// Bytes on the link in this pass.
    sent: u64,
    /// Bytes of memory that it moved.
    memory: u64,
    landed: bool,
    /// Bytes on the link in the passes before.
    before: u64,
}

/// What is left to be told at the end.
#[derive(Debug, Clone, Default)]
struct Ending {
    failure: Option<Failure>,
    stuck: Vec<SourceUndo>,
    /// Until when asking, or taking locks, is tried again.
    until: Option<Duration>,
    /// The VM is the destination's.
    sent: bool,
}

/// The end that has the VM, as a machine: inputs in, actions out.
///
/// It does nothing itself. `README.md`, "Driving the machines", says what a driver does.
#[derive(Debug, Clone)]
pub struct Source {
    plan: Plan,
    state: SourceState,
    timer: Timer,
    work: Option<Work<SourceStep, SourceUndo>>,
    undo: Vec<SourceUndo>,
    actions: VecDeque<SourceAction>,
    /// What was agreed on; features and connections of nobody before that.
    agreed: (Features, u16),
    pass: Current,
    policy: Policy,
    link: Link,
    ending: Ending,
}

impl Source {
    /// A source whose connection 0 is open. Its first action sends Hello.
    ///
    /// # Errors
    /// [`FrameError::Length`]: Hello, the configuration or the descriptors do not fit the wire.
    pub fn new(now: Duration, setup: SourceSetup) -> Result<Self, FrameError> {
        let SourceSetup { hello, config, descriptors, paused, goals, limits } = setup;
        let first = Message::Hello(Box::new(hello.clone())).encode()?;
        let config = Message::Config(config).encode()?;
        let local = hello.required.contains(Features::LOCAL_MEMORY);
        let descriptors = local.then(|| Message::Descriptors(descriptors).encode()).transpose()?;
        let mut source = Self {
            plan: Plan { hello, config, descriptors, paused, limits },
            state: SourceState::Greeting,
            timer: Timer::new(now),
            work: None,
            undo: Vec::new(),
            actions: VecDeque::new(),
            agreed: (Features::NONE, 1),
            pass: Current::default(),
            policy: Policy::new(goals),
            link: Link::Up,
            ending: Ending::default(),
        };
        source.send(first);
        source.timer.due_in(limits.answer);
        Ok(source)
    }

    /// Takes one input that happened at `now`, on a clock that never goes back, and says what it was.
    pub fn handle(&mut self, now: Duration, input: SourceInput) -> SourceKind {
        self.timer.advance(now);
        let event = self.read(input);
        let kind = event.kind();
        // Results of nothing: locks that are to be taken again, say, are not taken.
        let unasked = matches!(kind, SourceKind::Done | SourceKind::Failed) && self.work.is_none();
        match self.state.cell(kind) {
            _ if unasked => {}
            Cell::Go(_) => self.go(event),
            Cell::GiveUp => {
                if kind == SourceKind::Lost {
                    self.link = Link::Lost;
                }
                if kind == SourceKind::Failed {
                    self.work = None;
                }
                let failure = event.into_failure(self.state);
                self.fail(failure);
            }
            Cell::Ask => {
                self.ending.failure = Some(event.into_failure(self.state));
                self.ask();
            }
            Cell::Ignore => {}
        }
        if self.is_live() && self.timer.must_speak(&self.plan.limits) {
            self.say(Message::Keepalive(self.progress().sent));
        }
        kind
    }

    /// The next action, if there is one. Take all of them after every input.
    pub fn poll(&mut self) -> Option<SourceAction> {
        self.actions.pop_front()
    }

    /// When a Tick changes something, if nothing else happens before.
    #[must_use]
    pub fn next_wake(&self) -> Option<Duration> {
        let link = self.is_live().then(|| self.timer.link_wake(&self.plan.limits));
        let goals = self.policy.goals();
        let ends = self.state.is_before_commit() && goals.strategy == crate::TimeoutStrategy::Cancel;
        let all = ends.then(|| self.timer.began.saturating_add(goals.timeout));
        [self.timer.due, link, all].into_iter().flatten().min()
    }

    /// Where it is.
    #[must_use]
    pub fn state(&self) -> SourceState {
        self.state
    }

    /// In post-copy, once it has [sent](SourceOutcome::Sent) the VM: the machine that goes on, for memory is here that is not there.
    #[must_use]
    pub fn supplier(&self) -> Option<Supplier> {
        let (now, session) = (self.timer.now, self.plan.hello.session);
        let owes = self.ending.sent && self.leaves_memory();
        owes.then(|| Supplier::new(now, session, self.plan.limits, self.link == Link::Up))
    }

    /// Features that both ends use, once they have agreed.
    #[must_use]
    pub fn features(&self) -> Features {
        self.agreed.0
    }

    /// Notes that [`SourceStep::SendMemory`], which is under way, has sent so many bytes by now.
    pub fn note_sent(&mut self, bytes: u64) {
        if matches!(self.work, Some(Work::Step(SourceStep::SendMemory { .. }))) {
            self.pass.sent = bytes;
        }
    }

    /// How far it is.
    #[must_use]
    pub fn progress(&self) -> SourceProgress {
        let blackout =
            self.policy.blackout().map(|blackout| u32::try_from(blackout.as_millis()).unwrap_or(u32::MAX));
        SourceProgress {
            state: self.state,
            sent: Progress {
                bytes: self.pass.before.saturating_add(self.pass.sent),
                pass: self.pass.number,
                blackout_ms: blackout.unwrap_or(u32::MAX),
            },
            bandwidth: self.policy.bandwidth(),
            dirty_rate: self.policy.dirty_rate(),
            throttle: self.policy.throttle(),
        }
    }

    /// The next step of the way. The table has let through what is expected in this state only.
    fn go(&mut self, event: Event) {
        if let (Event::Done(_), Some(Work::Step(step))) = (&event, self.work) {
            self.work = None;
            self.push_undo(step);
        }
        match (self.state, event) {
            (SourceState::Greeting, Event::Accept(accept)) => self.accepted(&accept),
            (SourceState::Offering, Event::Ack) => self.offered(),
            (SourceState::Starting, Event::Ack) => self.started(),
            (SourceState::Sharing, Event::Ack) if self.plan.paused => {
                self.run(SourceState::Saving, SourceStep::SaveState);
            }
            (SourceState::Sharing, Event::Ack) => self.run(SourceState::Pausing, SourceStep::Pause),
            (SourceState::Joining, Event::Done(_)) => self.begin_memory(),
            (SourceState::Logging, Event::Done(_)) => self.send_memory(What::All, false),
            (SourceState::Copying | SourceState::Landing, Event::Again(range)) => {
                self.actions.push_back(SourceAction::Resend(range));
            }
            (SourceState::Copying, Event::Landed) => self.pass.landed = true,
            (SourceState::Copying, Event::Done(output)) => self.copied(&output),
            (SourceState::Landing, Event::Landed) => self.landed(),
            (SourceState::Measuring, Event::Done(output)) => self.measured(&output),
            (SourceState::Throttling, Event::Done(_)) => self.next_pass(false),
            (SourceState::Pausing, Event::Done(_)) if self.is_local() => {
                self.run(SourceState::Saving, SourceStep::SaveState);
            }
            (SourceState::Pausing, Event::Done(_)) => {
                self.run(SourceState::Collecting, SourceStep::TakeDirty);
            }
            (SourceState::Collecting, Event::Done(_)) => self.next_pass(true),
            (SourceState::Finishing, Event::Done(output)) => {
                (self.pass.sent, self.pass.memory) = output.sent();
                self.run(SourceState::Saving, SourceStep::SaveState);
            }
            (SourceState::Saving, Event::Done(output)) => self.saved(output),
            (SourceState::Releasing, Event::Done(_)) => {
                self.hand_over(Message::Complete, SourceState::Completing);
            }
            (SourceState::Completing, Event::Ready) => self.run(SourceState::Yielding, SourceStep::GiveAway),
            (SourceState::Yielding, Event::Done(_)) => {
                let commit = Message::Commit { session: self.plan.hello.session, run: !self.plan.paused };
                self.hand_over(commit, SourceState::Committing);
            }
            (SourceState::Committing, Event::Committed) => {
                self.say(Message::Ack(Command::Committed));
                if !self.leaves_memory() {
                    self.close();
                }
                self.sent();
            }
            (_, event) => self.go_after(event),
        }
    }

    /// The same for what comes after a failure, or after Commit.
    fn go_after(&mut self, event: Event) {
        match (self.state, event) {
            (SourceState::Asking, Event::Outcome(outcome)) => self.answered(outcome),
            (SourceState::Asking, Event::Done(_) | Event::Failed(_)) => {
                self.work = None;
                self.unanswered();
            }
            (SourceState::Asking, Event::Late) => self.run(SourceState::Asking, SourceStep::Ask),
            (SourceState::InDoubt, Event::Ask) => self.ask(),
            (SourceState::InDoubt, Event::Keep) => self.roll_back(),
            (SourceState::InDoubt, Event::Yield) => self.sent(),
            (SourceState::Stopping, Event::Lost(_)) => self.link = Link::Lost,
            (SourceState::Stopping, _) => {
                self.work = None;
                self.roll_back();
            }
            (SourceState::Undoing, Event::Late) => self.run_undo(SourceUndo::TakeLocks),
            (SourceState::Undoing, event) => self.undone(matches!(event, Event::Failed(_))),
            _ => {}
        }
    }

    fn accepted(&mut self, accept: &Accept) {
        self.agreed = (accept.features, accept.connections);
        let config = self.plan.config.clone();
        self.send(config);
        self.wait(SourceState::Offering, self.plan.limits.prepare);
    }

    fn offered(&mut self) {
        match self.plan.hello.purpose {
            Purpose::Check => {
                self.close();
                self.end(SourceOutcome::Accepted);
            }
            Purpose::Migrate => {
                self.say(Message::Start);
                self.wait(SourceState::Starting, self.plan.limits.prepare);
            }
        }
    }

    fn started(&mut self) {
        if let Some(descriptors) = self.plan.descriptors.take() {
            self.send(descriptors);
            self.wait(SourceState::Sharing, self.plan.limits.prepare);
        } else if self.agreed.1 > 1 {
            self.run(SourceState::Joining, SourceStep::Connect { connections: self.agreed.1 });
        } else {
            self.begin_memory();
        }
    }

    fn begin_memory(&mut self) {
        if self.plan.paused {
            self.send_memory(What::All, true);
        } else {
            self.run(SourceState::Logging, SourceStep::StartDirtyLog);
        }
    }

    fn send_memory(&mut self, what: What, last: bool) {
        let Current { number, sent, before, .. } = self.pass;
        let before = before.saturating_add(sent);
        self.pass = Current { number, began: self.timer.now, sent: 0, memory: 0, landed: false, before };
        let state = if last { SourceState::Finishing } else { SourceState::Copying };
        self.run(state, SourceStep::SendMemory { pass: number, what, last, connections: self.agreed.1 });
    }

    fn next_pass(&mut self, last: bool) {
        self.pass.number = self.pass.number.saturating_add(1);
        let what = if last && self.leaves_memory() { What::Absent } else { What::Taken };
        self.send_memory(what, last);
    }

    fn copied(&mut self, output: &Output) {
        (self.pass.sent, self.pass.memory) = output.sent();
        if self.pass.landed {
            self.landed();
        } else {
            self.wait(SourceState::Landing, self.plan.limits.prepare);
        }
    }

    fn landed(&mut self) {
        self.run(SourceState::Measuring, SourceStep::TakeDirty);
    }

    fn measured(&mut self, output: &Output) {
        if self.leaves_memory() {
            return self.run(SourceState::Pausing, SourceStep::Pause);
        }
        let took = self.timer.now.saturating_sub(self.pass.began);
        let pass = Pass { sent: self.pass.sent, memory: self.pass.memory, took, dirty: output.bytes() };
        let slowed = self.policy.throttle();
        match self.policy.decide(pass, self.timer.elapsed()) {
            Decision::Again { throttle } if throttle != slowed => {
                self.run(SourceState::Throttling, SourceStep::Throttle { percent: throttle });
            }
            Decision::Again { .. } => self.next_pass(false),
            Decision::Finish(_) => self.run(SourceState::Pausing, SourceStep::Pause),
            Decision::GiveUp(stop) => {
                let text = format!("{stop:?} after {} passes", self.pass.number.saturating_add(1));
                self.fail(Failure::new(End::Here, Reason::Diverges, &text));
            }
        }
    }

    fn saved(&mut self, output: Output) {
        match Message::State(output.into_state()).encode() {
            Ok(state) => {
                self.send(state);
                self.run(SourceState::Releasing, SourceStep::ReleaseLocks);
            }
            Err(error) => self.fail(Failure::new(End::Here, Reason::Failed, &error.to_string())),
        }
    }

    fn hand_over(&mut self, message: Message, state: SourceState) {
        self.say(message);
        self.wait(state, self.plan.limits.answer);
    }

    /// The link is no longer of use: asks on another.
    fn ask(&mut self) {
        self.close();
        self.ending.until = Some(self.timer.now.saturating_add(self.plan.limits.doubt));
        self.run(SourceState::Asking, SourceStep::Ask);
    }

    fn answered(&mut self, outcome: SessionOutcome) {
        self.work = None;
        match outcome {
            SessionOutcome::Committed => self.sent(),
            SessionOutcome::Aborted => self.roll_back(),
            SessionOutcome::Unknown => self.doubt(),
        }
    }

    fn unanswered(&mut self) {
        if self.ending.until.is_some_and(|until| self.timer.now < until) {
            self.timer.due_in(self.plan.limits.ask);
        } else {
            self.doubt();
        }
    }

    fn doubt(&mut self) {
        self.timer.due = None;
        self.state = SourceState::InDoubt;
        self.actions.push_back(SourceAction::Report(SourceOutcome::InDoubt(self.failure())));
    }

    /// Before Commit: ends the step under way, then undoes all.
    fn fail(&mut self, failure: Failure) {
        self.timer.due = None;
        self.ending.failure.get_or_insert(failure);
        if self.work.is_some() {
            self.actions.push_back(SourceAction::Interrupt);
            self.state = SourceState::Stopping;
        } else {
            self.roll_back();
        }
    }

    fn roll_back(&mut self) {
        let Failure { end, fault } = self.failure();
        // Whoever said that it gives up need not be told.
        let told = end == End::Peer && fault.reason() != Reason::Violation;
        if self.link == Link::Up && !told {
            self.say(Message::Abandon(Fault::new(fault.reason(), fault.text())));
        }
        self.close();
        self.ending.until = Some(self.timer.now.saturating_add(self.plan.limits.locks));
        self.state = SourceState::Undoing;
        self.unwind();
    }

    fn unwind(&mut self) {
        while let Some(undo) = self.undo.pop() {
            let held = |undo| matches!(undo, &SourceUndo::TakeLocks | &SourceUndo::TakeBack);
            // A guest without its disks, or that may run elsewhere, stays paused.
            if undo == SourceUndo::Resume && self.ending.stuck.iter().any(held) {
                self.ending.stuck.push(undo);
                continue;
            }
            return self.run_undo(undo);
        }
        let stuck = std::mem::take(&mut self.ending.stuck);
        self.end(SourceOutcome::Failed { failure: self.failure(), stuck });
    }

    fn undone(&mut self, failed: bool) {
        let work = self.work.take();
        if let (true, Some(Work::Undo(undo))) = (failed, work) {
            if undo == SourceUndo::TakeLocks && self.ending.until.is_some_and(|until| self.timer.now < until)
            {
                return self.timer.due_in(self.plan.limits.relock);
            }
            self.ending.stuck.push(undo);
        }
        self.unwind();
    }

    /// Notes how `step`, which is done, is undone.
    fn push_undo(&mut self, step: SourceStep) {
        let undo = match step {
            SourceStep::StartDirtyLog => SourceUndo::StopDirtyLog,
            SourceStep::Throttle { .. } if !self.undo.contains(&SourceUndo::Unthrottle) => {
                SourceUndo::Unthrottle
            }
            SourceStep::Pause => SourceUndo::Resume,
            SourceStep::ReleaseLocks => SourceUndo::TakeLocks,
            SourceStep::GiveAway => SourceUndo::TakeBack,
            SourceStep::Throttle { .. }
            | SourceStep::Connect { .. }
            | SourceStep::SendMemory { .. }
            | SourceStep::TakeDirty
            | SourceStep::SaveState
            | SourceStep::Ask => return,
        };
        self.undo.push(undo);
    }

    fn sent(&mut self) {
        self.undo.clear();
        self.ending.sent = true;
        self.end(SourceOutcome::Sent);
    }

    fn end(&mut self, outcome: SourceOutcome) {
        self.timer.due = None;
        self.state = SourceState::Ended;
        self.actions.push_back(SourceAction::Report(outcome));
    }

    fn run(&mut self, state: SourceState, step: SourceStep) {
        self.timer.due = None;
        self.state = state;
        self.work = Some(Work::Step(step));
        self.actions.push_back(SourceAction::Run(step));
    }

    fn run_undo(&mut self, undo: SourceUndo) {
        self.timer.due = None;
        self.work = Some(Work::Undo(undo));
        self.actions.push_back(SourceAction::Undo(undo));
    }

    fn wait(&mut self, state: SourceState, time: Duration) {
        self.state = state;
        self.timer.due_in(time);
    }

    /// A message of a size that is known.
    fn say(&mut self, message: Message) {
        if let Ok(frame) = message.encode() {
            self.send(frame);
        }
    }

    fn send(&mut self, frame: Frame) {
        self.timer.said();
        self.actions.push_back(SourceAction::Send(frame));
    }

    fn close(&mut self) {
        if self.link != Link::Closed {
            self.link = Link::Closed;
            self.actions.push_back(SourceAction::Close);
        }
    }

    /// Whether the link matters.
    fn is_live(&self) -> bool {
        self.state.is_before_commit() || self.state == SourceState::Committing
    }

    /// Whether the guest runs elsewhere before all of its memory is there. One that is paused need not.
    fn leaves_memory(&self) -> bool {
        self.agreed.0.contains(Features::POST_COPY) && !self.plan.paused
    }

    fn is_local(&self) -> bool {
        self.agreed.0.contains(Features::LOCAL_MEMORY)
    }

    fn failure(&self) -> Failure {
        let unknown = || Failure::new(End::Here, Reason::Failed, "");
        self.ending.failure.clone().unwrap_or_else(unknown)
    }
}
