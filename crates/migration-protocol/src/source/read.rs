//! Inputs of a source, understood: [`Event`].

use crate::{
    Accept, Command, End, Failure, Fault, Frame, MemoryRange, Message, Output, Reason, SessionOutcome,
    TimeoutStrategy,
};

use super::{Source, SourceInput, SourceKind, SourceState};

/// An input with what matters of it.
#[derive(Debug)]
pub(super) enum Event {
    Accept(Accept),
    Ack,
    Nack(Fault),
    Landed,
    Again(MemoryRange),
    Ready,
    Committed,
    Outcome(SessionOutcome),
    Cancelled(Fault),
    Keepalive,
    Stray(String),
    Garbage(String),
    Lost(String),
    Done(Output),
    Failed(Fault),
    Cancel(String),
    Late,
    Timeout,
    Ask,
    Keep,
    Yield,
    Tick,
}

impl Event {
    pub(super) const fn kind(&self) -> SourceKind {
        match self {
            Self::Accept(_) => SourceKind::Accept,
            Self::Ack => SourceKind::Ack,
            Self::Nack(_) => SourceKind::Nack,
            Self::Landed => SourceKind::Landed,
            Self::Again(_) => SourceKind::Again,
            Self::Ready => SourceKind::Ready,
            Self::Committed => SourceKind::Committed,
            Self::Outcome(_) => SourceKind::Outcome,
            Self::Cancelled(_) => SourceKind::Cancelled,
            Self::Keepalive => SourceKind::Keepalive,
            Self::Stray(_) => SourceKind::Stray,
            Self::Garbage(_) => SourceKind::Garbage,
            Self::Lost(_) => SourceKind::Lost,
            Self::Done(_) => SourceKind::Done,
            Self::Failed(_) => SourceKind::Failed,
            Self::Cancel(_) => SourceKind::Cancel,
            Self::Late => SourceKind::Late,
            Self::Timeout => SourceKind::Timeout,
            Self::Ask => SourceKind::Ask,
            Self::Keep => SourceKind::Keep,
            Self::Yield => SourceKind::Yield,
            Self::Tick => SourceKind::Tick,
        }
    }

    /// Why a migration fails by this, in `state`.
    pub(super) fn into_failure(self, state: SourceState) -> Failure {
        match self {
            Self::Nack(fault) | Self::Cancelled(fault) => Failure { end: End::Peer, fault },
            Self::Failed(fault) => Failure { end: End::Here, fault },
            Self::Cancel(text) => Failure::new(End::Here, Reason::Cancelled, &text),
            Self::Timeout => Failure::new(End::Here, Reason::Timeout, &format!("while {state:?}")),
            Self::Late => Failure::new(End::Link, Reason::Timeout, &format!("no answer while {state:?}")),
            Self::Lost(text) => Failure::new(End::Link, Reason::Lost, &text),
            Self::Garbage(text) => Failure::new(End::Link, Reason::Violation, &text),
            Self::Again(range) => {
                let text = format!("{} bytes at {:#x}, in the last pass", range.length(), range.gpa());
                Failure::new(End::Link, Reason::Damaged, &text)
            }
            Self::Stray(text) => Failure::new(End::Peer, Reason::Violation, &text),
            other => {
                let text = format!("{:?} while {state:?}", other.kind());
                Failure::new(End::Peer, Reason::Violation, &text)
            }
        }
    }
}

impl Source {
    pub(super) fn read(&mut self, input: SourceInput) -> Event {
        match input {
            SourceInput::Frame(frame) => {
                self.timer.heard();
                self.read_frame(frame)
            }
            SourceInput::Garbage(text) => Event::Garbage(text),
            SourceInput::Lost(text) => Event::Lost(text),
            SourceInput::Done(output) => Event::Done(output),
            SourceInput::Failed(fault) => Event::Failed(fault),
            SourceInput::Cancel(text) => Event::Cancel(text),
            SourceInput::Ask => Event::Ask,
            SourceInput::Keep => Event::Keep,
            SourceInput::Yield => Event::Yield,
            SourceInput::Tick => self.read_clock(),
        }
    }

    fn read_clock(&self) -> Event {
        let goals = self.policy.goals();
        let ends = self.state.is_before_commit() && goals.strategy == TimeoutStrategy::Cancel;
        if self.is_live() && self.timer.is_silent(&self.plan.limits) {
            Event::Lost("nothing was heard".to_owned())
        } else if ends && self.timer.elapsed() >= goals.timeout {
            Event::Timeout
        } else if self.timer.is_due() {
            Event::Late
        } else {
            Event::Tick
        }
    }

    fn read_frame(&self, frame: Frame) -> Event {
        let stray = |what: String| Event::Stray(format!("{what} while {:?}", self.state));
        let message = match Message::decode(frame) {
            Ok(message) => message,
            Err(error) => return stray(error.to_string()),
        };
        let session = self.plan.hello.session;
        match message {
            Message::Accept(accept) if accept.fits(&self.plan.hello) => Event::Accept(accept),
            Message::Ack(of) if Some(of) == self.awaited() => Event::Ack,
            Message::Nack(_, fault) => Event::Nack(fault),
            Message::Landed(pass) if pass == self.pass.number && !self.pass.landed => Event::Landed,
            Message::Again(range) if self.plan.hello.memory.contains(&range) => Event::Again(range),
            Message::Ready(of) if of == session => Event::Ready,
            Message::Committed(of) if of == session => Event::Committed,
            Message::Outcome(of, outcome) if of == session => Event::Outcome(outcome),
            Message::Cancel(fault) => Event::Cancelled(fault),
            Message::Keepalive(_) => Event::Keepalive,
            other => stray(format!("{} frame", other.command())),
        }
    }

    /// Which Ack is an answer now.
    fn awaited(&self) -> Option<Command> {
        match self.state {
            SourceState::Offering => Some(Command::Config),
            SourceState::Starting => Some(Command::Start),
            SourceState::Sharing => Some(Command::Descriptors),
            _ => None,
        }
    }
}
