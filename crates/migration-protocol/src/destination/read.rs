//! Inputs of a destination, understood: [`Event`].

use crate::{Command, DescriptorRange, End, Failure, Fault, Frame, Hello, MemoryRange, Message, Reason};

use super::{Destination, DestinationInput, DestinationKind, DestinationState};

/// An input with what matters of it.
#[derive(Debug)]
pub(super) enum Event {
    Hello(Box<Hello>),
    Config(Vec<u8>),
    Start,
    Descriptors(Vec<DescriptorRange>),
    State(Vec<u8>),
    Complete,
    /// Whether the guest shall run.
    Commit(bool),
    Abandon(Fault),
    Settled,
    Keepalive,
    Stray(String),
    Garbage(String),
    Lost(String),
    /// Which pass, and whether it is the last.
    Landed(u32, bool),
    Damaged(MemoryRange),
    Done,
    Failed(Fault),
    Query,
    Cancel(String),
    Late,
    Tick,
}

impl Event {
    pub(super) const fn kind(&self) -> DestinationKind {
        match self {
            Self::Hello(_) => DestinationKind::Hello,
            Self::Config(_) => DestinationKind::Config,
            Self::Start => DestinationKind::Start,
            Self::Descriptors(_) => DestinationKind::Descriptors,
            Self::State(_) => DestinationKind::State,
            Self::Complete => DestinationKind::Complete,
            Self::Commit(_) => DestinationKind::Commit,
            Self::Abandon(_) => DestinationKind::Abandon,
            Self::Settled => DestinationKind::Settled,
            Self::Keepalive => DestinationKind::Keepalive,
            Self::Stray(_) => DestinationKind::Stray,
            Self::Garbage(_) => DestinationKind::Garbage,
            Self::Lost(_) => DestinationKind::Lost,
            Self::Landed(_, false) => DestinationKind::Landed,
            Self::Landed(_, true) => DestinationKind::LandedLast,
            Self::Damaged(_) => DestinationKind::Damaged,
            Self::Done => DestinationKind::Done,
            Self::Failed(_) => DestinationKind::Failed,
            Self::Query => DestinationKind::Query,
            Self::Cancel(_) => DestinationKind::Cancel,
            Self::Late => DestinationKind::Late,
            Self::Tick => DestinationKind::Tick,
        }
    }

    /// Why a migration fails by this, in `state`.
    pub(super) fn into_failure(self, state: DestinationState) -> Failure {
        match self {
            Self::Abandon(fault) => Failure { end: End::Peer, fault },
            Self::Failed(fault) => Failure { end: End::Here, fault },
            Self::Cancel(text) => Failure::new(End::Here, Reason::Cancelled, &text),
            Self::Late => Failure::new(End::Link, Reason::Timeout, &format!("while {state:?}")),
            Self::Lost(text) => Failure::new(End::Link, Reason::Lost, &text),
            Self::Query => Failure::new(End::Link, Reason::Lost, "the source asks for the outcome"),
            Self::Garbage(text) => Failure::new(End::Link, Reason::Violation, &text),
            Self::Damaged(range) => {
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

impl Destination {
    pub(super) fn read(&mut self, input: DestinationInput) -> Event {
        match input {
            DestinationInput::Frame(frame) => {
                self.timer.heard();
                self.read_frame(frame)
            }
            DestinationInput::Garbage(text) => Event::Garbage(text),
            DestinationInput::Lost(text) => Event::Lost(text),
            DestinationInput::Landed { pass, last } => Event::Landed(pass, last),
            DestinationInput::Damaged(range) => Event::Damaged(range),
            DestinationInput::Done(_) => Event::Done,
            DestinationInput::Failed(fault) => Event::Failed(fault),
            DestinationInput::Query => Event::Query,
            DestinationInput::Cancel(text) => Event::Cancel(text),
            DestinationInput::Tick => self.read_clock(),
        }
    }

    fn read_clock(&self) -> Event {
        if self.is_live() && self.timer.is_silent(&self.limits) {
            return Event::Lost("nothing was heard".to_owned());
        }
        let over = self.state.is_before_commit() && self.timer.elapsed() >= self.limits.session;
        if over || self.timer.is_due() { Event::Late } else { Event::Tick }
    }

    fn read_frame(&mut self, frame: Frame) -> Event {
        let state = self.state;
        let stray = |what: String| Event::Stray(format!("{what} while {state:?}"));
        let message = match Message::decode(frame) {
            Ok(message) => message,
            Err(error) => return stray(error.to_string()),
        };
        // State without the memory that it is about.
        let unmapped = self.is_local() && state == DestinationState::Receiving;
        match message {
            Message::Hello(hello) => Event::Hello(hello),
            Message::Config(config) => Event::Config(config),
            Message::Start => Event::Start,
            Message::Descriptors(list) if self.is_local() => Event::Descriptors(list),
            Message::State(bytes) if !unmapped => Event::State(bytes),
            Message::Complete if !self.heard.complete => Event::Complete,
            Message::Commit { session, run } if Some(session) == self.session() => Event::Commit(run),
            Message::Abandon(fault) => Event::Abandon(fault),
            Message::Ack(Command::Committed) => Event::Settled,
            Message::Keepalive(progress) => {
                self.heard.progress = progress;
                Event::Keepalive
            }
            other => stray(format!("{} frame", other.command())),
        }
    }
}
