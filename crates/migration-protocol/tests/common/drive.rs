//! Both machines driven by bytes: any inputs in any order. A ledger of what was done holds what they promise.

use std::time::Duration;

use vmm_migration_protocol::{
    Accept, Command, Destination, DestinationAction, DestinationInput, DestinationOutcome, DestinationState,
    DestinationStep, DestinationUndo, Fault, Features, Frame, Goals, Hello, Limits, Message, Outcomes,
    Output, Purpose, Reason, SessionOutcome, Source, SourceAction, SourceInput, SourceOutcome, SourceSetup,
    SourceState, SourceStep, SourceUndo, TimeoutStrategy,
};

use super::samples::{SESSION, accept, hello, messages, offer};

/// Bytes as a tape of choices; 0 at the end.
struct Tape<'a>(&'a [u8]);

impl Tape<'_> {
    fn next(&mut self) -> u8 {
        self.0.split_off_first().copied().unwrap_or(0)
    }

    fn some(&mut self) -> Vec<u8> {
        let length = usize::from(self.next()).min(self.0.len());
        self.0.split_off(..length).unwrap_or_default().to_vec()
    }

    /// From nothing to years.
    fn time(&mut self) -> Duration {
        Duration::from_millis(1 << (self.next() % 40))
    }

    fn message(&mut self) -> Frame {
        let all = messages();
        let message = all[usize::from(self.next()) % all.len()].clone();
        let message = match message {
            Message::Landed(_) => Message::Landed(u32::from(self.next() % 3)),
            Message::Outcome(session, _) => Message::Outcome(session, self.outcome()),
            Message::Ack(_) => Message::Ack(
                [Command::Config, Command::Start, Command::Descriptors, Command::Committed]
                    [usize::from(self.next() % 4)],
            ),
            other => other,
        };
        message.encode().unwrap()
    }

    fn outcome(&mut self) -> SessionOutcome {
        match self.next() % 3 {
            0 => SessionOutcome::Unknown,
            1 => SessionOutcome::Committed,
            _ => SessionOutcome::Aborted,
        }
    }

    /// Any command with any payload that it allows.
    fn raw(&mut self) -> Option<Frame> {
        let command = Command::ALL[usize::from(self.next()) % Command::COUNT];
        Frame::new(command, self.some()).ok()
    }

    fn fault(&mut self) -> Fault {
        Fault::new(Reason::from_number(u16::from(self.next() % 14)), "driven")
    }
}

/// What a source's driver knows of what it did.
#[derive(Default)]
struct SourceLedger {
    work: Option<Result<SourceStep, SourceUndo>>,
    /// What was done and is to be undone.
    held: Vec<SourceUndo>,
    stuck: Vec<SourceUndo>,
    commit_sent: bool,
    /// The destination, or the operator, has said that the guest is the source's.
    released: bool,
    closed: bool,
    ended: bool,
}

impl SourceLedger {
    fn look(&mut self, source: &mut Source) {
        let mut count = 0;
        while let Some(action) = source.poll() {
            count += 1;
            assert!(count < 20, "no end of actions");
            assert!(!self.ended, "{action:?} after the end");
            match action {
                SourceAction::Send(frame) => {
                    assert!(!self.closed, "sent after Close");
                    self.commit_sent |= frame.command() == Command::Commit;
                }
                SourceAction::Run(step) => {
                    assert!(self.work.replace(Ok(step)).is_none(), "one at a time");
                }
                SourceAction::Undo(undo) => self.undo(undo),
                SourceAction::Interrupt => assert!(self.work.is_some()),
                SourceAction::Resend(_) => assert!(!self.commit_sent),
                SourceAction::Close => assert!(!std::mem::replace(&mut self.closed, true), "closed twice"),
                SourceAction::Report(outcome) => self.report(outcome),
            }
        }
    }

    fn undo(&mut self, undo: SourceUndo) {
        assert!(self.work.replace(Err(undo)).is_none(), "one at a time");
        assert!(!self.commit_sent || self.released, "undone though the destination may have the guest");
        let held = |undo: &SourceUndo| matches!(undo, SourceUndo::TakeLocks | SourceUndo::TakeBack);
        if self.stuck.iter().any(held) && self.held.last() == Some(&SourceUndo::Resume) {
            self.held.pop();
            self.stuck.push(SourceUndo::Resume);
        }
        assert_eq!(self.held.last(), Some(&undo), "in reverse order");
    }

    /// Before an input that answers the work.
    fn answer(&mut self, done: bool, tried_again: bool) {
        match self.work.take() {
            Some(Ok(step)) if done => self.held.extend(match step {
                SourceStep::StartDirtyLog => Some(SourceUndo::StopDirtyLog),
                SourceStep::Throttle { .. } if !self.held.contains(&SourceUndo::Unthrottle) => {
                    Some(SourceUndo::Unthrottle)
                }
                SourceStep::Pause => Some(SourceUndo::Resume),
                SourceStep::ReleaseLocks => Some(SourceUndo::TakeLocks),
                SourceStep::GiveAway => Some(SourceUndo::TakeBack),
                _ => None,
            }),
            Some(Err(_)) if done => drop(self.held.pop()),
            Some(Err(undo)) if !tried_again => {
                self.held.pop();
                self.stuck.push(undo);
            }
            _ => {}
        }
    }

    fn report(&mut self, outcome: SourceOutcome) {
        self.ended = !matches!(outcome, SourceOutcome::InDoubt(_));
        match outcome {
            SourceOutcome::Sent => assert!(self.commit_sent, "sent without Commit"),
            SourceOutcome::Accepted => assert!(self.held.is_empty()),
            SourceOutcome::InDoubt(_) => assert!(self.commit_sent && !self.released),
            SourceOutcome::Failed { stuck, .. } => {
                if self.held == [SourceUndo::Resume] && !stuck.is_empty() {
                    self.stuck.extend(self.held.pop());
                }
                assert_eq!(
                    (self.held.as_slice(), stuck),
                    (&[][..], std::mem::take(&mut self.stuck)),
                    "left behind"
                );
                assert!(!self.commit_sent || self.released);
            }
        }
    }
}

/// A source under any inputs, and where it ends.
pub(crate) fn source(bytes: &[u8]) -> SourceState {
    let mut tape = Tape(bytes);
    let choices = tape.next();
    let local = if choices & 1 == 1 { Features::LOCAL_MEMORY } else { Features::NONE };
    let setup = SourceSetup {
        hello: Hello {
            purpose: if choices & 14 == 14 { Purpose::Check } else { Purpose::Migrate },
            features: local,
            required: local,
            connections: u16::from(choices >> 4),
            ..hello()
        },
        config: b"{}".to_vec(),
        descriptors: vec![vmm_migration_protocol::DescriptorRange {
            range: super::samples::range(0, 4096),
            offset: 0,
            descriptor: 0,
        }],
        paused: choices & 2 == 2,
        goals: Goals {
            downtime: Duration::from_millis(1),
            strategy: if choices & 4 == 4 { TimeoutStrategy::Ignore } else { TimeoutStrategy::Cancel },
            auto_converge: choices & 8 == 8,
            ..Goals::default()
        },
        limits: Limits::default(),
    };
    let accept = Accept { features: local, connections: u16::from(choices >> 4).max(1), ..accept() };
    let mut now = Duration::ZERO;
    let mut source = Source::new(now, setup).unwrap();
    let mut ledger = SourceLedger::default();
    ledger.look(&mut source);
    while !tape.0.is_empty() {
        let input = source_input(&mut tape, &source, &accept, &mut now);
        let before = source.state();
        match &input {
            SourceInput::Done(_) | SourceInput::Failed(_) => {
                let done = matches!(input, SourceInput::Done(_));
                let undo = matches!(ledger.work, Some(Err(SourceUndo::TakeLocks)));
                ledger.answer(done, undo && !done && retried(&source, now, &input));
            }
            SourceInput::Keep => ledger.released |= before == SourceState::InDoubt,
            SourceInput::Frame(frame)
                if before == SourceState::Asking && frame.command() == Command::Outcome =>
            {
                let aborted = Message::Outcome(SESSION, SessionOutcome::Aborted).encode().unwrap();
                ledger.released |= *frame == aborted;
                ledger.work = None;
            }
            _ => {}
        }
        source.handle(now, input);
        ledger.look(&mut source);
    }
    source.state()
}

/// Whether the machine will try to take the locks again.
fn retried(source: &Source, now: Duration, input: &SourceInput) -> bool {
    let mut copy = source.clone();
    copy.handle(now, input.clone());
    copy.next_wake().is_some()
}

fn source_input(tape: &mut Tape<'_>, source: &Source, accept: &Accept, now: &mut Duration) -> SourceInput {
    let text = || "driven".to_owned();
    match tape.next() % 16 {
        0..=3 => SourceInput::Done(match (source.state(), tape.next() % 4) {
            (SourceState::Saving, 1..) => Output::State(tape.some()),
            (_, 0) => Output::Nothing,
            (SourceState::Copying | SourceState::Finishing, number) => {
                let bytes = u64::from(tape.next()) << (8 * number);
                Output::Sent { link: bytes, memory: bytes }
            }
            (_, number) => Output::Bytes(u64::from(tape.next()) << (8 * number)),
        }),
        4 => SourceInput::Failed(tape.fault()),
        // What the state waits for.
        5..=9 => SourceInput::Frame(next_for_source(source, accept).encode().unwrap()),
        10 => SourceInput::Frame(tape.message()),
        11 => tape.raw().map_or(SourceInput::Garbage(text()), SourceInput::Frame),
        12 | 13 => {
            *now = now.saturating_add(tape.time());
            SourceInput::Tick
        }
        14 => [SourceInput::Lost(text()), SourceInput::Garbage(text()), SourceInput::Cancel(text())]
            [usize::from(tape.next() % 3)]
        .clone(),
        _ => [SourceInput::Ask, SourceInput::Keep, SourceInput::Yield][usize::from(tape.next() % 3)].clone(),
    }
}

fn next_for_source(source: &Source, accept: &Accept) -> Message {
    match source.state() {
        SourceState::Greeting => Message::Accept(accept.clone()),
        SourceState::Offering => Message::Ack(Command::Config),
        SourceState::Starting => Message::Ack(Command::Start),
        SourceState::Sharing => Message::Ack(Command::Descriptors),
        SourceState::Copying | SourceState::Landing => Message::Landed(source.progress().sent.pass),
        SourceState::Completing => Message::Ready(SESSION),
        SourceState::Committing => Message::Committed(SESSION),
        SourceState::Asking => Message::Outcome(SESSION, SessionOutcome::Aborted),
        _ => Message::Keepalive(vmm_migration_protocol::Progress::default()),
    }
}

/// What a destination's driver knows of what it did.
#[derive(Default)]
struct DestinationLedger {
    work: Option<Result<DestinationStep, DestinationUndo>>,
    held: Vec<DestinationUndo>,
    stuck: Vec<DestinationUndo>,
    decided: Option<SessionOutcome>,
    closed: bool,
    ended: bool,
}

impl DestinationLedger {
    fn look(&mut self, destination: &mut Destination) {
        let mut count = 0;
        while let Some(action) = destination.poll() {
            count += 1;
            assert!(count < 20, "no end of actions");
            assert!(
                !self.ended || matches!(action, DestinationAction::Settle(_)),
                "{action:?} after the end"
            );
            match action {
                DestinationAction::Send(frame) => {
                    assert!(!self.closed, "sent after Close");
                    let committed = self.decided == Some(SessionOutcome::Committed);
                    assert_eq!(frame.command() == Command::Committed, committed, "Committed, and only then");
                }
                DestinationAction::Run(step) => {
                    let run = step == DestinationStep::Run;
                    assert_eq!(
                        run,
                        self.decided == Some(SessionOutcome::Committed),
                        "the guest runs after Commit"
                    );
                    assert!(self.work.replace(Ok(step)).is_none(), "one at a time");
                }
                DestinationAction::Undo(undo) => {
                    assert_ne!(self.decided, Some(SessionOutcome::Committed), "undone after Commit");
                    assert!(self.work.replace(Err(undo)).is_none(), "one at a time");
                    assert_eq!(self.held.last(), Some(&undo), "in reverse order");
                }
                DestinationAction::Interrupt => assert!(self.work.is_some()),
                DestinationAction::Remember(_, outcome) => {
                    assert_eq!(self.decided.replace(outcome), None, "decided twice");
                }
                DestinationAction::Settle(_) => {}
                DestinationAction::Close => {
                    assert!(!std::mem::replace(&mut self.closed, true), "closed twice");
                }
                DestinationAction::Report(outcome) => self.report(outcome),
            }
        }
    }

    fn answer(&mut self, done: bool) {
        match self.work.take() {
            Some(Ok(step)) if done => self.held.extend(match step {
                DestinationStep::Build => Some(DestinationUndo::Discard),
                DestinationStep::TakeLocks => Some(DestinationUndo::ReleaseLocks),
                _ => None,
            }),
            Some(Err(undo)) => {
                self.held.pop();
                self.stuck.extend((!done).then_some(undo));
            }
            _ => {}
        }
    }

    fn report(&mut self, outcome: DestinationOutcome) {
        self.ended = true;
        match outcome {
            DestinationOutcome::Received { .. } => assert_eq!(self.decided, Some(SessionOutcome::Committed)),
            DestinationOutcome::Checked => assert!(self.held.is_empty() && self.decided.is_none()),
            DestinationOutcome::Failed { stuck, .. } => {
                assert_eq!(
                    (self.held.as_slice(), stuck),
                    (&[][..], std::mem::take(&mut self.stuck)),
                    "left behind"
                );
                assert_ne!(self.decided, Some(SessionOutcome::Committed));
            }
        }
    }
}

/// A destination under any inputs, and where it ends.
pub(crate) fn destination(bytes: &[u8]) -> DestinationState {
    let mut tape = Tape(bytes);
    let choices = tape.next();
    let local = if choices & 1 == 1 { Features::LOCAL_MEMORY } else { Features::NONE };
    let purpose = if choices & 6 == 6 { Purpose::Check } else { Purpose::Migrate };
    let hello = Hello { purpose, features: local, required: local, ..hello() };
    let mut now = Duration::ZERO;
    let mut destination = Destination::new(now, offer(), Limits::default(), &Outcomes::new());
    let mut ledger = DestinationLedger::default();
    while !tape.0.is_empty() {
        let input = destination_input(&mut tape, &destination, &hello, &mut now);
        if let DestinationInput::Done(_) | DestinationInput::Failed(_) = &input {
            ledger.answer(matches!(input, DestinationInput::Done(_)));
        }
        destination.handle(now, input);
        ledger.look(&mut destination);
        let ready = destination.state() == DestinationState::Ready;
        assert!(!ready || ledger.held == [DestinationUndo::Discard, DestinationUndo::ReleaseLocks]);
    }
    destination.state()
}

fn destination_input(
    tape: &mut Tape<'_>,
    destination: &Destination,
    hello: &Hello,
    now: &mut Duration,
) -> DestinationInput {
    let text = || "driven".to_owned();
    match tape.next() % 16 {
        0..=3 => DestinationInput::Done(Output::Nothing),
        4 => DestinationInput::Failed(tape.fault()),
        // What the state waits for.
        5..=9 => next_for_destination(destination, hello, tape.next()),
        10 => DestinationInput::Frame(tape.message()),
        11 => tape.raw().map_or(DestinationInput::Garbage(text()), DestinationInput::Frame),
        12 | 13 => {
            *now = now.saturating_add(tape.time());
            DestinationInput::Tick
        }
        14 => [
            DestinationInput::Lost(text()),
            DestinationInput::Garbage(text()),
            DestinationInput::Cancel(text()),
        ][usize::from(tape.next() % 3)]
        .clone(),
        _ => match tape.next() % 3 {
            0 => DestinationInput::Query,
            1 => DestinationInput::Damaged(super::samples::range(0, 4096)),
            _ => {
                DestinationInput::Landed { pass: u32::from(tape.next()), last: tape.next().is_multiple_of(2) }
            }
        },
    }
}

fn next_for_destination(destination: &Destination, hello: &Hello, choice: u8) -> DestinationInput {
    let local = hello.required.contains(Features::LOCAL_MEMORY);
    let message = match destination.state() {
        DestinationState::Greeting => Message::Hello(Box::new(hello.clone())),
        DestinationState::Offered => Message::Config(b"{}".to_vec()),
        DestinationState::Willing => Message::Start,
        DestinationState::Receiving if local => messages().swap_remove(18),
        DestinationState::Receiving | DestinationState::Filled if choice.is_multiple_of(2) => {
            Message::State(b"state".to_vec())
        }
        DestinationState::Receiving | DestinationState::Draining if choice % 4 != 3 => {
            return DestinationInput::Landed { pass: 0, last: choice % 4 != 1 };
        }
        DestinationState::Ready => Message::Commit { session: SESSION, run: choice.is_multiple_of(2) },
        DestinationState::Resuming | DestinationState::Ended => Message::Ack(Command::Committed),
        _ => Message::Complete,
    };
    DestinationInput::Frame(message.encode().unwrap())
}
