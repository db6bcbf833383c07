//! The end whose guest runs without all of its memory: it drives the protocol's [`Filler`].

use std::net::Shutdown;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmm_device_model::thread;
use vmm_memory_manager::absent::AbsentMemory;
use vmm_memory_manager::map::HostMemory;
use vmm_migration_protocol::{
    Absent as Left, Command, DestinationInput, Fault, Features, Filler, FillerAction, FillerInput,
    FillerKind, FillerOutcome, FillerState, FillerStep, Frame, Join, MemoryRange, Message, Output, Reason,
    SessionId,
};

use super::FillStep;
use super::arriving::Arriving;
use super::owed::pages_of;
use super::wanting::Wanting;
use crate::exit::{ExitCode, chain};
use crate::migration::incoming::{Driver, Live, ReceiveStep};
use crate::migration::landing::Said;
use crate::migration::link::Socket;
use crate::migration::{LINGER, THREAD};
use crate::signals;

/// How long a source that did not hear of the end is answered.
const REMEMBERED: Duration = Duration::from_secs(600);

/// How often it is looked whether the source has heard the last word.
const LOOK_FOR_END: Duration = Duration::from_millis(2);

/// A connection, by its number here.
pub(in crate::migration) type Numbered = (u64, Arc<Socket>);

/// A guest that runs, or will, before its memory is there.
#[derive(Default)]
pub(in crate::migration) struct Filling {
    absent: Option<Absent>,
    /// Once the guest is this end's.
    machine: Option<Filler>,
    session: Option<SessionId>,
    main: Option<Numbered>,
    wanted: Option<Numbered>,
    /// It has said Rejoin, and takes the place of both.
    offered: Option<Numbered>,
    /// The VMM ends, and waits for the guest's end only.
    ending: bool,
    /// Until when the source is answered, after all memory has come.
    until: Option<Instant>,
}

/// Memory of which some is to come.
struct Absent {
    memory: Arc<AbsentMemory>,
    arriving: Arc<Arriving>,
    wanting: Arc<Wanting>,
    serving: Option<JoinHandle<()>>,
}

impl Drop for Absent {
    fn drop(&mut self) {
        self.memory.end();
        if let Some(thread) = self.serving.take() {
            let _ = thread.join();
        }
    }
}

impl Filling {
    /// Whether nobody needs it any more.
    pub(in crate::migration) fn is_over(&self) -> bool {
        let ended = self.machine.as_ref().is_none_or(|machine| machine.state() == FillerState::Ended);
        ended && self.until.is_none_or(|until| until <= Instant::now())
    }

    /// When it has to be looked after.
    pub(in crate::migration) fn next_wake(&self) -> Option<Duration> {
        self.machine.as_ref().and_then(Filler::next_wake)
    }

    pub(in crate::migration) fn note_heard(&mut self, now: Duration) {
        self.machine.iter_mut().for_each(|machine| machine.note_heard(now));
    }

    /// Whether the guest is this end's.
    pub(in crate::migration) fn is_live(&self) -> bool {
        self.machine.is_some()
    }

    /// Bytes that are to come; `None` where all has.
    pub(in crate::migration) fn left(&self) -> Option<u64> {
        self.absent.as_ref().map(|absent| absent.memory.left())
    }

    /// Drops what is to be absent: the guest is to run.
    pub(in crate::migration) fn leave(&self) -> Result<(), Fault> {
        let left = self.absent.as_ref().map_or(Ok(()), |absent| absent.memory.leave());
        left.map_err(|error| Fault::new(Reason::Failed, &chain(&error)))
    }

    fn lacks_memory(&self) -> bool {
        self.left().is_some_and(|left| left > 0)
    }

    /// What is to be said last, where the VMM ends before all has come. Who waits for memory then waits until the process is gone: a
    /// write to a disk would go on with zeros.
    pub(in crate::migration) fn give_up(&mut self) {
        if self.machine.as_ref().is_none_or(|machine| machine.state() == FillerState::Ended) {
            return;
        }
        if let Some(left @ 1..) = self.left() {
            log::error!("the guest is lost: {left} bytes of its memory are at the source, and this VMM ends");
            std::mem::forget(self.absent.take());
        }
        let fault = Fault::new(Reason::Cancelled, "the destination's VMM has ended");
        if let (Some((_, socket)), Ok(frame)) = (&self.main, Message::Cancel(fault).encode()) {
            let _ = socket.send(&frame);
            socket.shutdown(Shutdown::Write);
            // Another connection that ends would come before it, and be a lost link.
            let until = Instant::now() + LINGER;
            while !socket.is_gone() && Instant::now() < until {
                std::thread::park_timeout(LOOK_FOR_END);
            }
        }
    }

    /// The VMM is to end: a guest that cannot, for its memory is missing, is not waited for.
    pub(in crate::migration) fn end_soon(&mut self) {
        self.ending = true;
        let state = self.machine.as_ref().map(Filler::state);
        let waits = state.is_some_and(|state| !matches!(state, FillerState::Filling | FillerState::Settling));
        if waits && self.lacks_memory() {
            self.end_at_once();
        }
    }

    fn end_at_once(&self) -> ! {
        let left = self.left().unwrap_or(0);
        log::error!("the guest is lost: {left} bytes of its memory are at the source, and the link is lost");
        signals::end_at_once(ExitCode::LostMemory);
    }

    fn is_of(&self, number: u64) -> bool {
        [&self.main, &self.wanted, &self.offered].into_iter().flatten().any(|(ours, _)| *ours == number)
    }

    /// Connection 0, which is the newest that has said Rejoin.
    fn promote(&mut self) -> Option<Arc<Socket>> {
        if let Some(offered) = self.offered.take() {
            self.main = Some(offered);
        }
        self.main.as_ref().map(|(_, socket)| Arc::clone(socket))
    }

    fn send(&mut self, frame: &Frame) {
        let Some(socket) = self.promote() else { return };
        if let Err(error) = socket.send(frame) {
            // A part of it may be on the link, where nothing more can be said.
            log::debug!("migration: {:?} is not sent: {error}", frame.command());
            socket.shutdown(Shutdown::Both);
        }
    }

    /// Says all that is absent.
    fn answer(&mut self) -> Result<(), Fault> {
        let lost = |text: &str| Fault::new(Reason::Lost, text);
        let socket = self.promote().ok_or_else(|| lost("there is no connection"))?;
        let Some(absent) = &self.absent else { return Ok(()) };
        for run in absent.memory.absent() {
            let range = MemoryRange::new(run.start, run.end - run.start);
            let frame = range
                .map_err(|error| lost(&error.to_string()))
                .and_then(|range| Message::Lacks(range).encode().map_err(|error| lost(&error.to_string())))?;
            socket.send(&frame).map_err(|error| {
                socket.shutdown(Shutdown::Both);
                lost(&error.to_string())
            })?;
        }
        if let Some((number, _)) = &self.main {
            absent.arriving.admit(*number);
        }
        Ok(())
    }
}

impl Driver {
    /// Memory that the last pass has `left` out will come under a guest that runs.
    pub(in crate::migration) fn watch(&mut self, memory: &HostMemory, left: &[Left]) -> Result<(), Fault> {
        let Some(pass) = left.first().map(|left| left.pass.saturating_add(1)) else { return Ok(()) };
        let violation = |text: &str| Fault::new(Reason::Violation, text);
        let failed = |error: &dyn std::error::Error| Fault::new(Reason::Failed, &chain(error));
        let Some((hello, accept, main, wanted)) = self.live.as_ref().and_then(|live| {
            let (hello, accept) = (live.machine.hello()?.clone(), live.machine.accept()?.features);
            Some((hello, accept, (live.connection, Arc::clone(&live.socket)), live.wanted.clone()))
        }) else {
            return Err(violation("there is no session"));
        };
        let wanted =
            wanted.ok_or_else(|| violation("memory is left out, and there is no connection for it"))?;
        let mut pages = pages_of(&hello.memory);
        left.iter().for_each(|left| pages.insert(left.range.gpa()..left.range.end()));
        let memory =
            AbsentMemory::watch(Arc::clone(memory.memory()), pages).map_err(|error| failed(&error))?;
        let memory = Arc::new(memory);
        let arriving = Arc::new(Arriving::new(Arc::clone(&memory), hello.memory, accept, pass));
        let wanting = Arc::new(Wanting::new(Arc::clone(&memory)));
        let mut absent = Absent { memory, arriving, wanting, serving: None };
        let serving = Arc::clone(&absent.wanting);
        let thread = thread::spawn(&self.threads, THREAD, "migration-fault", move || serving.run());
        absent.serving = Some(thread.map_err(|error| failed(&error))?);
        absent.wanting.ask_on(Arc::clone(&wanted.1));
        [main.0, wanted.0].into_iter().for_each(|number| absent.arriving.admit(number));
        self.ground.follow(Some(Arc::clone(&absent.arriving)));
        self.filling.absent = Some(absent);
        Ok(())
    }

    /// How much memory is to come when the guest runs; `None` without post-copy.
    pub(in crate::migration) fn to_come(&self) -> Option<u64> {
        let agreed = self.live.as_ref()?.machine.accept()?.features;
        agreed.contains(Features::POST_COPY).then(|| self.filling.left().unwrap_or(0))
    }

    /// The guest is this end's, and memory may be to come.
    pub(in crate::migration) fn begin_filling(&mut self) {
        let Some(live) = &self.live else { return };
        let Some(machine) = live.machine.filler() else { return };
        self.filling.machine = Some(machine);
        self.filling.session = live.machine.hello().map(|hello| hello.session);
        self.filling.main = Some((live.connection, Arc::clone(&live.socket)));
        self.filling.wanted.clone_from(&live.wanted);
        self.do_filling();
        if self.filling.left().is_none_or(|left| left == 0) {
            self.fill(FillerInput::Filled);
        }
    }

    /// Whether what was said on connection `number` is about that; does what follows.
    pub(in crate::migration) fn filling_says(&mut self, number: u64, said: Said) -> Option<Said> {
        if !self.filling.is_live() {
            return Some(said);
        }
        if let Said::First(socket, frame) = said {
            return self.filling_first(number, socket, frame);
        }
        if !self.filling.is_of(number) {
            return Some(said);
        }
        let is_wanted = self.filling.wanted.as_ref().is_some_and(|(wanted, _)| *wanted == number);
        let input = match said {
            Said::Frame(frame) if !is_wanted => {
                // It may be about the hand-over still.
                self.handle(DestinationInput::Frame(frame.clone()));
                FillerInput::Frame(frame)
            }
            Said::Whole => FillerInput::Filled,
            Said::Failed(fault) => FillerInput::Failed(fault),
            Said::Lost(text) => FillerInput::Lost(text),
            Said::Garbage(text) => FillerInput::Garbage(text),
            other => FillerInput::Garbage(format!("{other:?} after the hand-over")),
        };
        self.fill(input);
        None
    }

    /// A new connection; gives back what is not for this.
    fn filling_first(&mut self, number: u64, socket: Arc<Socket>, frame: Frame) -> Option<Said> {
        match (frame.command(), Message::decode(frame.clone())) {
            (Command::Rejoin, Ok(Message::Rejoin(session))) if self.filling.session == Some(session) => {
                // The newest counts.
                if let Some((_, before)) = self.filling.offered.replace((number, socket)) {
                    before.shutdown(Shutdown::Both);
                }
                self.fill(FillerInput::Rejoin);
                None
            }
            (Command::Join, Ok(Message::Join(join))) => {
                let ours = self.filling.session == Some(join.session) && join.role == Join::WANTED;
                let (true, true, Some(absent), Ok(ack)) = (
                    ours,
                    self.filling.wanted.is_none() && self.filling.main.is_some(),
                    &self.filling.absent,
                    Message::Ack(Command::Join).encode(),
                ) else {
                    log::warn!("migration: a connection that belongs to no session is closed");
                    socket.shutdown(Shutdown::Both);
                    return None;
                };
                absent.arriving.admit(number);
                // If that fails, it is lost, and read so.
                let _ = socket.send(&ack);
                absent.wanting.ask_on(Arc::clone(&socket));
                self.filling.wanted = Some((number, socket));
                None
            }
            _ => Some(Said::First(socket, frame)),
        }
    }

    /// Gives the machine an input, and does what it then wants.
    pub(in crate::migration) fn fill(&mut self, input: FillerInput) {
        if let (FillerInput::Filled, Some(absent)) = (&input, &self.filling.absent) {
            absent.memory.end();
        }
        let now = self.clock.now();
        let Some(machine) = &mut self.filling.machine else { return };
        let before = machine.state();
        let kind = machine.handle(now, input);
        let ended = machine.state() == FillerState::Ended && before != FillerState::Ended;
        if ended {
            let known = kind == FillerKind::Settled;
            self.filling.until = Some(Instant::now() + if known { Duration::ZERO } else { REMEMBERED });
        }
        self.do_filling();
    }

    fn do_filling(&mut self) {
        while let Some(action) = self.filling.machine.as_mut().and_then(Filler::poll) {
            match action {
                FillerAction::Send(frame) => self.filling.send(&frame),
                FillerAction::Close => self.close_filling(),
                FillerAction::Run(FillerStep::Hold) => {
                    if self.filling.ending && self.filling.lacks_memory() {
                        self.filling.end_at_once();
                    }
                    self.tell_fill(FillStep::Hold);
                }
                FillerAction::Run(FillerStep::Release) => self.tell_fill(FillStep::Release),
                FillerAction::Run(FillerStep::Answer) => {
                    let input = match self.filling.answer() {
                        Ok(()) => FillerInput::Done(Output::Nothing),
                        Err(fault) => FillerInput::Failed(fault),
                    };
                    let now = self.clock.now();
                    if let Some(machine) = &mut self.filling.machine {
                        machine.handle(now, input);
                    }
                }
                FillerAction::Report(outcome) => self.fill_outcome(outcome),
            }
        }
    }

    fn close_filling(&mut self) {
        let Filling { machine, absent, main, wanted, .. } = &mut self.filling;
        let ended = machine.as_ref().is_some_and(|machine| machine.state() == FillerState::Ended);
        let link: Vec<Numbered> = [main.take(), wanted.take()].into_iter().flatten().collect();
        if let Some(absent) = absent {
            link.iter().for_each(|(number, _)| absent.arriving.refuse(*number));
            absent.wanting.ask_nobody();
        }
        for (number, socket) in link {
            if ended {
                // The source reads what was said last.
                self.part(number, socket, None);
            } else {
                socket.shutdown(Shutdown::Both);
            }
        }
    }

    fn fill_outcome(&mut self, outcome: FillerOutcome) {
        let step = match outcome {
            FillerOutcome::Complete { trouble } => {
                self.ground.follow(None);
                self.filling.absent = None;
                if let Some(live) = &mut self.live {
                    live.until = Some(Instant::now());
                }
                FillStep::Whole(trouble)
            }
            FillerOutcome::Severed(failure) | FillerOutcome::Abandoned(failure) => FillStep::Severed(failure),
            FillerOutcome::Restored => FillStep::Restored,
        };
        self.tell_fill(step);
    }

    fn tell_fill(&self, step: FillStep) {
        (self.desk)(ReceiveStep::Fill(step));
    }

    /// The control thread's answer to a step, of whichever machine is at work.
    pub(in crate::migration) fn answered(&mut self, input: DestinationInput) {
        match input {
            DestinationInput::Done(output) if self.filling.is_live() => self.fill(FillerInput::Done(output)),
            DestinationInput::Failed(fault) if self.filling.is_live() => {
                self.fill(FillerInput::Failed(fault));
            }
            input => self.handle(input),
        }
    }

    /// On the connection on which nothing may come yet.
    pub(in crate::migration) fn said_where_memory_is_wanted(&mut self, said: Said) {
        self.handle(match said {
            Said::Lost(text) => DestinationInput::Lost(format!("the connection for wanted memory: {text}")),
            Said::Garbage(text) => DestinationInput::Garbage(text),
            other => DestinationInput::Garbage(format!("{other:?}, where memory is wanted")),
        });
    }

    /// Whether the connection for wanted memory is to come.
    pub(in crate::migration) fn expects_wanted(&self, join: &Join) -> bool {
        self.live.as_ref().is_some_and(|Live { machine, wanted, .. }| {
            let agreed = machine.accept().is_some_and(|accept| accept.features.contains(Features::POST_COPY));
            let ours = machine.hello().is_some_and(|hello| hello.session == join.session);
            agreed && ours && join.role == Join::WANTED && wanted.is_none() && machine.state().takes_memory()
        })
    }

    /// Tells how much is to come.
    pub(in crate::migration) fn tell_left(&self) {
        if let (true, Some(left)) = (self.filling.is_live(), self.filling.left()) {
            self.tell_fill(FillStep::Lacks(left));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use vm_memory::{Bytes, GuestAddress};
    use vmm_device_model::dma::GuestRam;
    use vmm_memory_manager::pages::Pages;
    use vmm_migration_protocol::{Limits, MemoryLayout, PAGE, Region};

    use super::*;

    const SIZE: u64 = 16 * PAGE;

    /// A guest that lacks its first `pages` pages.
    fn lacking(pages: u64) -> (Filling, Arc<GuestRam>) {
        let memory = GuestRam::from_ranges(&[(GuestAddress(0), usize::try_from(SIZE).unwrap())]).unwrap();
        let memory = Arc::new(memory);
        let mut lacks = Pages::none([(0, SIZE)]);
        lacks.insert(0..pages * PAGE);
        let absent = Arc::new(AbsentMemory::watch(Arc::clone(&memory), lacks).unwrap());
        absent.leave().unwrap();
        let layout = MemoryLayout::new(vec![Region { gpa: 0, length: SIZE, zone: "z".into() }]).unwrap();
        let arriving = Arc::new(Arriving::new(Arc::clone(&absent), layout, Features::NONE, 2));
        let wanting = Arc::new(Wanting::new(Arc::clone(&absent)));
        let machine = Filler::new(Duration::ZERO, SessionId([1; 16]), Limits::default(), true);
        let absent = Some(Absent { memory: absent, arriving, wanting, serving: None });
        (Filling { absent, machine: Some(machine), ..Filling::default() }, memory)
    }

    /// What a disk's thread waits for would be written to the image.
    #[test]
    fn who_waits_for_memory_when_the_vmm_ends_does_not_go_on_with_zeros() {
        let (mut filling, memory) = lacking(1);
        let (read, has_read) = channel();
        // It ends with the process.
        std::thread::spawn(move || read.send(memory.read_obj::<u8>(GuestAddress(0)).unwrap()));
        filling.give_up();
        drop(filling);
        let waits = has_read.recv_timeout(Duration::from_millis(500));
        assert!(waits.is_err(), "{waits:?}");
    }

    /// Or the process would end here.
    #[test]
    fn a_guest_that_has_all_of_its_memory_is_not_lost_with_the_link() {
        let (mut filling, _memory) = lacking(0);
        let machine = filling.machine.as_mut().unwrap();
        machine.handle(Duration::ZERO, FillerInput::Lost("cut".to_owned()));
        assert_eq!(machine.state(), FillerState::Holding);
        filling.end_soon();
        assert!(filling.ending);
    }
}
