//! Moves a guest, which is a `Vec<u8>` that is written to all the time, from one end to another over a pipe in memory.
//!
//! Both ends are drivers as small as they can be: they do each step at once and never fail. A real one has sockets,
//! does its steps on other threads, and passes time.
use std::collections::BTreeSet;
use std::error::Error;
use std::time::Duration;

use vmm_migration_protocol::{
    Barrier, Bulk, CHUNK, CpuNeeds, Decoder, Destination, DestinationAction, DestinationInput,
    DestinationStep, DestinationUndo, Features, Goals, Hello, Intake, Item, Limits, Mark, MemoryLayout,
    MemoryRange, Message, Offer, Outcomes, Output, PAGE, Purpose, Region, SessionId, Source, SourceAction,
    SourceInput, SourceSetup, SourceStep, SourceUndo, Versions, What, Zero, contents_checksum,
};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const MEMORY: u64 = 4 * CHUNK;

/// One guest, or the place for one.
#[derive(Default)]
struct Guest {
    memory: Vec<u8>,
    running: bool,
    /// Pages written to, while the log is on.
    log: Option<BTreeSet<u64>>,
}

impl Guest {
    /// Runs a little: writes to a page.
    fn run(&mut self, turn: u64) {
        let page = turn % 7;
        if self.running
            && let Ok(bytes) = slice(&mut self.memory, page * PAGE, PAGE)
        {
            bytes.fill(u8::try_from(turn % 256).unwrap_or(1));
            self.log.as_mut().map(|log| log.insert(page * PAGE));
        }
    }
}

fn slice(memory: &mut [u8], gpa: u64, length: u64) -> Result<&mut [u8]> {
    let (from, to) = (usize::try_from(gpa)?, usize::try_from(gpa.saturating_add(length))?);
    memory.get_mut(from..to).ok_or_else(|| "outside of memory".into())
}

/// The end that has the guest.
struct Giver {
    machine: Source,
    guest: Guest,
    /// Pages that the next pass sends.
    taken: BTreeSet<u64>,
    decoder: Decoder,
}

impl Giver {
    /// What arrived, then everything that follows from it; `to` is what goes to the other end.
    fn turn(&mut self, now: Duration, mut from: &[u8], to: &mut Vec<u8>) -> Result<()> {
        self.work(now, to)?;
        while let Some(item) = self.decoder.push(&mut from)? {
            let Item::Frame(frame) = item else { return Err("memory goes one way".into()) };
            self.machine.handle(now, SourceInput::Frame(frame));
            self.work(now, to)?;
        }
        Ok(())
    }

    fn work(&mut self, now: Duration, to: &mut Vec<u8>) -> Result<()> {
        while let Some(action) = self.machine.poll() {
            match action {
                SourceAction::Send(frame) => to.extend(frame.encode()),
                SourceAction::Run(step) => {
                    let output = self.step(step, to)?;
                    self.machine.handle(now, SourceInput::Done(output));
                }
                SourceAction::Undo(undo) => {
                    self.undo(undo);
                    self.machine.handle(now, SourceInput::Done(Output::Nothing));
                }
                SourceAction::Resend(range) => {
                    let pages = std::iter::successors(Some(range.gpa()), |gpa| gpa.checked_add(PAGE));
                    self.taken.extend(pages.take_while(|gpa| *gpa < range.end()));
                }
                SourceAction::Report(outcome) => println!("source: {outcome:?}"),
                // No step here can be interrupted, and a pipe in memory needs no closing.
                SourceAction::Interrupt | SourceAction::Close => {}
            }
        }
        Ok(())
    }

    fn step(&mut self, step: SourceStep, to: &mut Vec<u8>) -> Result<Output> {
        println!("source: {step:?}");
        match step {
            SourceStep::StartDirtyLog => self.guest.log = Some(BTreeSet::new()),
            SourceStep::SendMemory { pass, what, last, .. } => return self.send(pass, what, last, to),
            SourceStep::TakeDirty => {
                let log = self.guest.log.as_mut().map(std::mem::take);
                self.taken.extend(log.into_iter().flatten());
                return Ok(Output::Bytes(self.taken.iter().map(|_| PAGE).sum()));
            }
            SourceStep::Pause => self.guest.running = false,
            SourceStep::SaveState => return Ok(Output::State(b"registers".to_vec())),
            // This guest has no disks; one connection; nobody to ask.
            SourceStep::ReleaseLocks | SourceStep::GiveAway | SourceStep::Throttle { .. } => {}
            SourceStep::Connect { .. } | SourceStep::Ask => return Err("not in this example".into()),
        }
        Ok(Output::Nothing)
    }

    fn undo(&mut self, undo: SourceUndo) {
        match undo {
            SourceUndo::StopDirtyLog => self.guest.log = None,
            SourceUndo::Resume => self.guest.running = true,
            SourceUndo::Unthrottle | SourceUndo::TakeLocks | SourceUndo::TakeBack => {}
        }
    }

    fn send(&mut self, pass: u32, what: What, last: bool, to: &mut Vec<u8>) -> Result<Output> {
        let ranges: Vec<MemoryRange> = match what {
            What::All => MemoryRange::new(0, MEMORY)?.chunks().collect(),
            What::Taken | What::Absent => {
                let taken = std::mem::take(&mut self.taken);
                taken
                    .into_iter()
                    .map(|gpa| MemoryRange::new(gpa, PAGE))
                    .collect::<std::result::Result<_, _>>()?
            }
        };
        let (before, mut bytes) = (to.len(), 0_u64);
        for range in ranges {
            bytes = bytes.saturating_add(range.length());
            let contents = &*slice(&mut self.guest.memory, range.gpa(), range.length())?;
            if contents.iter().all(|byte| *byte == 0) {
                to.extend(Message::Zero(Zero { range, pass }).encode()?.encode());
            } else {
                to.extend(Bulk::memory(range, pass, contents_checksum([contents]))?.header());
                to.extend(contents);
            }
        }
        to.extend(Message::Mark(Mark { pass, last, bytes }).encode()?.encode());
        Ok(Output::Sent { link: u64::try_from(to.len().saturating_sub(before))?, memory: bytes })
    }
}

/// The end that gets the guest.
struct Taker<'a> {
    machine: Destination,
    guest: Guest,
    outcomes: Outcomes,
    intake: Intake<'a>,
    barrier: Barrier,
    decoder: Decoder,
}

impl Taker<'_> {
    fn turn(&mut self, now: Duration, mut from: &[u8], to: &mut Vec<u8>) -> Result<()> {
        while let Some(item) = self.decoder.push(&mut from)? {
            let input = match item {
                Item::Frame(frame) if frame.command().is_data() => self.data(&Message::decode(frame)?)?,
                Item::Frame(frame) => Some(DestinationInput::Frame(frame)),
                // All of the contents are there, for the source writes them at once.
                Item::Bulk(bulk) => {
                    self.land(&bulk, from.split_off(..bulk.length()).ok_or("a pipe that holds less")?)?
                }
            };
            if let Some(input) = input {
                self.machine.handle(now, input);
                self.work(now, to)?;
            }
        }
        Ok(())
    }

    fn data(&mut self, message: &Message) -> Result<Option<DestinationInput>> {
        if !self.machine.state().takes_memory() {
            return Ok(Some(DestinationInput::Garbage("memory out of place".to_owned())));
        }
        match message {
            Message::Zero(zero) => {
                self.intake.zero(*zero)?;
                slice(&mut self.guest.memory, zero.range.gpa(), zero.range.length())?.fill(0);
            }
            Message::Mark(mark) => {
                self.intake.mark(*mark)?;
                if self.barrier.mark(0, mark.last)? {
                    return Ok(Some(DestinationInput::Landed { pass: mark.pass, last: mark.last }));
                }
            }
            _ => {}
        }
        Ok(None)
    }

    fn land(&mut self, bulk: &Bulk, contents: &[u8]) -> Result<Option<DestinationInput>> {
        self.intake.bulk(bulk)?;
        let range = bulk.range();
        slice(&mut self.guest.memory, range.gpa(), range.length())?.copy_from_slice(contents);
        let damaged = bulk.check(contents_checksum([contents])).is_err();
        Ok(damaged.then_some(DestinationInput::Damaged(range)))
    }

    fn work(&mut self, now: Duration, to: &mut Vec<u8>) -> Result<()> {
        while let Some(action) = self.machine.poll() {
            match action {
                DestinationAction::Send(frame) => to.extend(frame.encode()),
                DestinationAction::Run(step) => {
                    println!("                         destination: {step:?}");
                    match step {
                        DestinationStep::Build => self.guest.memory = vec![0; usize::try_from(MEMORY)?],
                        DestinationStep::Run => self.guest.running = true,
                        DestinationStep::Check(_)
                        | DestinationStep::Restore(_)
                        | DestinationStep::TakeLocks => {}
                        DestinationStep::MapMemory(_) => return Err("not in this example".into()),
                    }
                    self.machine.handle(now, DestinationInput::Done(Output::Nothing));
                }
                DestinationAction::Undo(undo) => {
                    if undo == DestinationUndo::Discard {
                        self.guest = Guest::default();
                    }
                    self.machine.handle(now, DestinationInput::Done(Output::Nothing));
                }
                DestinationAction::Remember(session, outcome) => {
                    self.outcomes.remember(now, session, outcome);
                }
                DestinationAction::Settle(session) => self.outcomes.settle(session),
                DestinationAction::Report(outcome) => {
                    println!("                         destination: {outcome:?}");
                }
                DestinationAction::Interrupt | DestinationAction::Close => {}
            }
        }
        Ok(())
    }
}

fn main() -> Result<()> {
    let layout = MemoryLayout::new(vec![Region { gpa: 0, length: MEMORY, zone: "zone0".to_owned() }])?;
    let hello = Hello {
        versions: Versions::OURS,
        session: SessionId(*b"drawn at random."),
        purpose: Purpose::Migrate,
        features: Features::NONE,
        required: Features::NONE,
        connections: 1,
        memory: layout.clone(),
        cpu: CpuNeeds::default(),
        program: "example".to_owned(),
    };
    let setup = SourceSetup {
        hello,
        config: b"{}".to_vec(),
        descriptors: Vec::new(),
        paused: false,
        goals: Goals { downtime: Duration::from_millis(2), ..Goals::default() },
        limits: Limits::default(),
    };
    let mut memory = vec![0; usize::try_from(MEMORY)?];
    slice(&mut memory, CHUNK, CHUNK)?.fill(0x5a);
    let guest = Guest { memory, running: true, log: None };
    let mut now = Duration::ZERO;
    let machine = Source::new(now, setup)?;
    let mut giver = Giver { machine, guest, taken: BTreeSet::new(), decoder: Decoder::new() };

    let offer = Offer {
        versions: Versions::OURS,
        features: Features::NONE,
        connections: 1,
        program: "example".to_owned(),
    };
    let outcomes = Outcomes::new();
    let machine = Destination::new(now, offer, Limits::default(), &outcomes);
    let (intake, barrier) = (Intake::new(&layout), Barrier::new(1, layout.bytes()));
    let mut taker =
        Taker { machine, guest: Guest::default(), outcomes, intake, barrier, decoder: Decoder::new() };

    let (mut down, mut up) = (Vec::new(), Vec::new());
    for turn in 1.. {
        giver.guest.run(turn);
        now += Duration::from_millis(1);
        giver.turn(now, &std::mem::take(&mut up), &mut down)?;
        taker.turn(now, &std::mem::take(&mut down), &mut up)?;
        if taker.guest.running {
            break;
        }
    }
    giver.turn(now, &up, &mut down)?;
    if taker.guest.memory != giver.guest.memory || giver.guest.running {
        return Err("not the same guest".into());
    }
    println!("the guest has moved: {} KiB are the same", MEMORY >> 10);
    Ok(())
}
