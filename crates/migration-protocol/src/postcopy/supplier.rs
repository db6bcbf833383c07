//! The end that has given the VM away, and has memory of it still: [`Supplier`].

use std::collections::VecDeque;
use std::time::Duration;

use crate::machine::{Link, Timer};
use crate::{
    Cell, Command, End, Failure, Fault, Frame, Limits, Message, Output, Progress, Reason, SessionId,
};

/// How far a supplier is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SupplierState {
    /// Sends what the destination has not, what it asks for first.
    Pushing,
    /// All is sent; waits for Whole.
    Waiting,
    /// The link is lost; waits for the end of the step under way.
    Halting,
    /// The link is lost; will try again.
    Severed,
    /// Takes up the session on new connections.
    Rejoining,
    /// Has tried for long: the operator decides.
    Stranded,
    /// All is reported.
    Ended,
}

use SupplierState as S;

impl SupplierState {
    /// Every state.
    pub const ALL: [Self; 7] =
        [S::Pushing, S::Waiting, S::Halting, S::Severed, S::Rejoining, S::Stranded, S::Ended];

    /// Whether the link matters.
    #[must_use]
    pub const fn is_live(self) -> bool {
        matches!(self, S::Pushing | S::Waiting)
    }

    /// What `kind` means in this state.
    #[must_use]
    pub const fn cell(self, kind: SupplierKind) -> Cell<Self> {
        Cell::Go(match (self, kind) {
            (S::Pushing, K::Done) => &[S::Waiting, S::Ended],
            (S::Pushing, K::Whole) => &[S::Pushing],
            (S::Pushing, K::Failed) => &[S::Severed, S::Ended],
            (S::Pushing, K::Lost | K::Garbage | K::Stray) => &[S::Halting],
            (S::Waiting, K::Whole) => &[S::Ended],
            (S::Waiting, K::Lost | K::Garbage | K::Stray) => &[S::Severed],
            (S::Halting, K::Done | K::Failed) => &[S::Severed, S::Ended],
            (S::Severed, K::Late | K::Retry) => &[S::Rejoining],
            (S::Rejoining, K::Done) => &[S::Pushing],
            (S::Rejoining, K::Failed) => &[S::Severed, S::Stranded],
            (S::Stranded, K::Retry) => &[S::Rejoining],
            (S::Pushing | S::Waiting | S::Halting | S::Rejoining, K::Refused) => &[S::Halting, S::Ended],
            (S::Rejoining, K::Whole) | (S::Severed | S::Stranded, K::Drop) => &[S::Ended],
            _ => return Cell::Ignore,
        })
    }
}

/// What an input is to a supplier.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SupplierKind {
    /// Whole, of this session.
    Whole,
    /// Nack of Rejoin, or Cancel: the destination has given the guest up.
    Refused,
    /// Keepalive.
    Keepalive,
    /// A frame that cannot be right.
    Stray,
    /// Bytes that are no frame.
    Garbage,
    /// The link is lost, or has been silent for too long.
    Lost,
    /// The driver has done what it was given.
    Done,
    /// The driver could not.
    Failed,
    /// The operator wants it to try again.
    Retry,
    /// The operator says that nobody needs the memory any more.
    Drop,
    /// It is time to try again.
    Late,
    /// Time passes.
    Tick,
}

use SupplierKind as K;

impl SupplierKind {
    /// Every kind.
    pub const ALL: [Self; 12] = [
        K::Whole,
        K::Refused,
        K::Keepalive,
        K::Stray,
        K::Garbage,
        K::Lost,
        K::Done,
        K::Failed,
        K::Retry,
        K::Drop,
        K::Late,
        K::Tick,
    ];
}

/// What happens to a supplier.
#[derive(Debug, Clone)]
pub enum SupplierInput {
    /// A frame on connection 0 that is not Want; or Whole or Nack, which [`SupplierStep::Rejoin`] got for an answer, and which ends
    /// that step.
    Frame(Frame),
    /// Bytes from the peer that are no frame, on any connection.
    Garbage(String),
    /// A connection is gone, and how.
    Lost(String),
    /// The step under way is done.
    Done(Output),
    /// It could not be done.
    Failed(Fault),
    /// The operator wants it to look for the destination now.
    Retry,
    /// The operator says that the guest does not need the memory any more. Only while the link is lost.
    Drop,
    /// Time passes.
    Tick,
}

/// Something that the driver does, and answers with Done or Failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SupplierStep {
    /// Send what is owed: ranges that Want names on the connection that it came on, all others on connection 0, until nothing is
    /// owed. Nothing that was sent on a lost link counts, but for what the destination does not name after Rejoin.
    Push,
    /// Connect to the destination's address, send Rejoin, take Lacks until Ack(Rejoin): that is what is owed now. Then open the
    /// connection for Want: Join in role 1, and wait for its Ack. Whole or Nack instead of an answer is given as a frame; anything
    /// else that is wrong is Failed.
    Rejoin,
}

/// What is told of a supplier.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SupplierOutcome {
    /// All of memory is there, and what is here can be dropped. The end.
    Supplied,
    /// The link is lost, and the guest stands still. Not the end.
    Severed(Failure),
    /// The link is there again. Not the end.
    Restored,
    /// It is not tried any more, until Retry or Drop. Not the end.
    Stranded(Failure),
    /// The operator has dropped the memory. The end.
    Dropped,
    /// The destination has given the guest up. The end.
    Refused(Failure),
}

/// What the driver is to do, in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SupplierAction {
    /// Send it on connection 0, between two frames.
    Send(Frame),
    /// Do it, then answer with one Done or Failed.
    Run(SupplierStep),
    /// End the step under way as soon as it can end; it is answered all the same.
    Interrupt,
    /// Close all connections, after everything that was to be sent.
    Close,
    /// Tell.
    Report(SupplierOutcome),
}

/// An input with what matters of it.
#[derive(Debug)]
enum Event {
    Whole,
    Refused(Failure),
    /// The link is of no use: as which kind, and why.
    Broken(SupplierKind, Failure),
    Done,
    Failed(Fault),
    Plain(SupplierKind),
}

/// The end that has memory of a VM that it has given away, as a machine: inputs in, actions out.
#[derive(Debug, Clone)]
pub struct Supplier {
    session: SessionId,
    limits: Limits,
    state: SupplierState,
    timer: Timer,
    link: Link,
    /// The destination has all of memory.
    whole: bool,
    /// Why the link was lost last, or why the destination gave up.
    failure: Option<Failure>,
    /// The destination has given up.
    refused: bool,
    /// Until when it is tried again by itself.
    until: Duration,
    actions: VecDeque<SupplierAction>,
}

impl Supplier {
    /// After Commit of `session` was taken; over the connections of the migration if `link`, else it looks for the destination.
    #[must_use]
    pub fn new(now: Duration, session: SessionId, limits: Limits, link: bool) -> Self {
        let mut supplier = Self {
            session,
            limits,
            state: SupplierState::Pushing,
            timer: Timer::new(now),
            link: Link::Up,
            whole: false,
            failure: None,
            refused: false,
            until: now,
            actions: VecDeque::new(),
        };
        if link {
            supplier.run(SupplierState::Pushing, SupplierStep::Push);
        } else {
            supplier.cut(Failure::new(End::Link, Reason::Lost, "during the hand-over"));
            supplier.sever();
        }
        supplier
    }

    /// Takes one input that happened at `now`, on a clock that never goes back, and says what it was.
    pub fn handle(&mut self, now: Duration, input: SupplierInput) -> SupplierKind {
        self.timer.advance(now);
        let event = self.read(input);
        let kind = event.kind();
        if matches!(self.state.cell(kind), Cell::Go(_)) {
            self.go(event);
        }
        if self.state.is_live() && self.timer.must_speak(&self.limits) {
            self.say(Message::Keepalive(Progress::default()));
        }
        kind
    }

    /// The next action, if there is one. Take all of them after every input.
    pub fn poll(&mut self) -> Option<SupplierAction> {
        self.actions.pop_front()
    }

    /// When a Tick changes something, if nothing else happens before.
    #[must_use]
    pub fn next_wake(&self) -> Option<Duration> {
        let link = self.state.is_live().then(|| self.timer.link_wake(&self.limits));
        [self.timer.due, link].into_iter().flatten().min()
    }

    /// Where it is.
    #[must_use]
    pub fn state(&self) -> SupplierState {
        self.state
    }

    fn go(&mut self, event: Event) {
        let in_step = matches!(self.state, S::Pushing | S::Halting | S::Rejoining);
        match event {
            Event::Whole => {
                self.whole = true;
                // While it pushes, the end of that comes first; there is nothing left to push.
                if self.state != S::Pushing {
                    self.supplied();
                }
            }
            Event::Refused(failure) => {
                (self.refused, self.failure) = (true, Some(failure));
                self.close();
                match self.state {
                    S::Pushing => self.halt(),
                    S::Halting => {}
                    _ => self.end_refused(),
                }
            }
            Event::Broken(_, failure) => {
                self.cut(failure);
                if in_step { self.halt() } else { self.sever() }
            }
            Event::Failed(fault) if self.state == S::Rejoining => {
                self.not_rejoined(Failure { end: End::Here, fault });
            }
            Event::Failed(fault) => {
                if self.state == S::Pushing {
                    self.cut(Failure { end: End::Here, fault });
                }
                self.step_over();
            }
            Event::Done => self.step_over(),
            Event::Plain(K::Drop) => self.end(SupplierOutcome::Dropped),
            // Late or Retry: now.
            Event::Plain(kind) => {
                if kind == K::Retry || self.state == S::Severed {
                    if kind == K::Retry {
                        self.until = self.timer.now.saturating_add(self.limits.doubt);
                    }
                    self.run(SupplierState::Rejoining, SupplierStep::Rejoin);
                }
            }
        }
    }

    /// The step under way has ended, and nothing is known against its result.
    fn step_over(&mut self) {
        match self.state {
            _ if self.whole => self.supplied(),
            _ if self.refused => self.end_refused(),
            S::Rejoining => {
                self.link = Link::Up;
                self.timer.heard();
                self.timer.said();
                self.failure = None;
                self.actions.push_back(SupplierAction::Report(SupplierOutcome::Restored));
                self.run(SupplierState::Pushing, SupplierStep::Push);
            }
            S::Pushing if self.link == Link::Up => {
                self.state = SupplierState::Waiting;
                self.timer.due = None;
            }
            _ => self.sever(),
        }
    }

    fn supplied(&mut self) {
        if self.link == Link::Up || self.state == S::Rejoining {
            self.say(Message::Ack(Command::Whole));
        }
        self.link = if self.state == S::Rejoining { Link::Up } else { self.link };
        self.close();
        self.end(SupplierOutcome::Supplied);
    }

    fn end_refused(&mut self) {
        let failure = self.failure();
        self.end(SupplierOutcome::Refused(failure));
    }

    fn not_rejoined(&mut self, failure: Failure) {
        self.failure = Some(failure.clone());
        // What was opened for it is of no use.
        self.actions.push_back(SupplierAction::Close);
        if self.timer.now < self.until {
            self.state = SupplierState::Severed;
            self.timer.due_in(self.limits.ask);
        } else {
            self.state = SupplierState::Stranded;
            self.timer.due = None;
            self.actions.push_back(SupplierAction::Report(SupplierOutcome::Stranded(failure)));
        }
    }

    /// The link is of no use any more.
    fn cut(&mut self, failure: Failure) {
        self.failure = Some(failure);
        self.close();
    }

    fn halt(&mut self) {
        self.timer.due = None;
        self.state = SupplierState::Halting;
        self.actions.push_back(SupplierAction::Interrupt);
    }

    fn sever(&mut self) {
        self.state = SupplierState::Severed;
        self.until = self.timer.now.saturating_add(self.limits.doubt);
        self.timer.due_in(self.limits.ask);
        let failure = self.failure();
        self.actions.push_back(SupplierAction::Report(SupplierOutcome::Severed(failure)));
    }

    fn failure(&self) -> Failure {
        self.failure.clone().unwrap_or_else(|| Failure::new(End::Link, Reason::Lost, ""))
    }

    fn run(&mut self, state: SupplierState, step: SupplierStep) {
        self.timer.due = None;
        self.state = state;
        self.actions.push_back(SupplierAction::Run(step));
    }

    fn end(&mut self, outcome: SupplierOutcome) {
        self.timer.due = None;
        self.state = SupplierState::Ended;
        self.actions.push_back(SupplierAction::Report(outcome));
    }

    fn close(&mut self) {
        if self.link == Link::Up {
            self.link = Link::Closed;
            self.actions.push_back(SupplierAction::Close);
        }
    }

    fn say(&mut self, message: Message) {
        if let Ok(frame) = message.encode() {
            self.timer.said();
            self.actions.push_back(SupplierAction::Send(frame));
        }
    }

    fn read(&mut self, input: SupplierInput) -> Event {
        let lost = |text: &str| Event::Broken(K::Lost, Failure::new(End::Link, Reason::Lost, text));
        match input {
            SupplierInput::Frame(frame) => {
                self.timer.heard();
                self.read_frame(frame)
            }
            SupplierInput::Garbage(text) => {
                Event::Broken(K::Garbage, Failure::new(End::Link, Reason::Violation, &text))
            }
            SupplierInput::Lost(text) => lost(&text),
            SupplierInput::Done(_) => Event::Done,
            SupplierInput::Failed(fault) => Event::Failed(fault),
            SupplierInput::Retry => Event::Plain(K::Retry),
            SupplierInput::Drop => Event::Plain(K::Drop),
            SupplierInput::Tick if self.state.is_live() && self.timer.is_silent(&self.limits) => {
                lost("nothing was heard")
            }
            SupplierInput::Tick if self.timer.is_due() => Event::Plain(K::Late),
            SupplierInput::Tick => Event::Plain(K::Tick),
        }
    }

    fn read_frame(&self, frame: Frame) -> Event {
        let answers = matches!(frame.command(), Command::Whole | Command::Nack);
        let stray = |text: &str| match self.state {
            // Somebody else is at the address by now, it may be.
            S::Rejoining if answers => Event::Failed(Fault::new(Reason::Violation, text)),
            _ => Event::Broken(K::Stray, Failure::new(End::Peer, Reason::Violation, text)),
        };
        match Message::decode(frame) {
            Ok(Message::Whole(of)) if of == self.session => Event::Whole,
            Ok(Message::Nack(about, fault)) if about != Command::Rejoin => {
                stray(&format!("Nack of {about}: {}", fault.text()))
            }
            Ok(Message::Nack(_, fault) | Message::Cancel(fault)) => {
                Event::Refused(Failure { end: End::Peer, fault })
            }
            Ok(Message::Keepalive(_)) => Event::Plain(K::Keepalive),
            // Of what was under way before Commit was acknowledged.
            Ok(Message::Ack(_)) => Event::Plain(K::Keepalive),
            Ok(other) => stray(&format!("{} frame while {:?}", other.command(), self.state)),
            Err(error) => stray(&error.to_string()),
        }
    }
}

impl Event {
    const fn kind(&self) -> SupplierKind {
        match self {
            Self::Whole => K::Whole,
            Self::Refused(_) => K::Refused,
            Self::Broken(kind, _) | Self::Plain(kind) => *kind,
            Self::Done => K::Done,
            Self::Failed(_) => K::Failed,
        }
    }
}
