//! The thread that gets a VM: it listens, drives the protocol's [`Destination`], and answers what became of sessions.

use std::collections::BTreeMap;
use std::io;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vmm_api::spec::{Checked, MigrationAddress, ReceiveSpec};
use vmm_device_model::thread::{self, ThreadHook};
use vmm_memory_manager::map::HostMemory;
use vmm_migration_protocol::{
    Command, DescriptorRange, Destination, DestinationAction, DestinationInput, DestinationOutcome,
    DestinationState, DestinationStep, DestinationUndo, Failure, Fault, Features, FillerInput, Frame, Hello,
    Join, Limits, MAX_CONNECTIONS, Message, Offer, Outcomes, Output, Progress, Reason, SessionId,
    SessionOutcome, Versions,
};
use vmm_snapshot::{Record, RecordSet};

use super::ahead::Ahead;
use super::backlog::Place;
use super::landing::{Ground, Said};
use super::link::Socket;
use super::making::Made;
use super::opening::{Accepting, Opened};
use super::outgoing::PERIOD;
use super::postcopy::FillStep;
use super::postcopy::filling::{Filling, Numbered};
use super::tls::TlsError;
use super::{Clock, Host, LINGER, THREAD, descriptors, fit, making, opening};
use crate::exit::chain;
use crate::machine;
use crate::vmm::PATIENCE;

/// A VM whose memory and state have arrived.
#[derive(Debug)]
pub struct Arrival {
    pub(crate) checked: Checked,
    pub(crate) records: RecordSet,
    pub(crate) memory: HostMemory,
}

/// What the driver tells the control thread, and asks of it.
#[derive(Debug)]
pub enum ReceiveStep {
    /// A source can come from now on.
    Listening,
    /// Make a machine of it, which nobody sees; answer with Done or Failed.
    Restore(Box<Arrival>),
    /// That machine is not wanted any more: answer soon, if it is still being made.
    GiveUp,
    /// Take the locks of its disks; answer likewise.
    TakeLocks,
    /// The VM is here: show it, and run it; answer likewise. So many bytes of its memory are to come, if that is how it goes.
    Run(Option<u64>),
    /// About memory that is to come.
    Fill(FillStep),
    /// Drop all of it; answer likewise.
    Discard,
    /// Give the locks back; answer likewise.
    ReleaseLocks,
    /// So far it is: what this end does, how much memory there is, what the source says.
    Progress(DestinationState, u64, Progress),
    /// It is over.
    Over(Result<DestinationOutcome, ReceiveError>),
}

/// A VM did not arrive.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReceiveError {
    /// The certificates of this end cannot be used.
    #[error("the migration's tls_dir")]
    Tls(#[source] TlsError),
    /// It cannot be waited for there.
    #[error("cannot listen for the source")]
    Listen(#[source] io::Error),
    /// A thread cannot be had.
    #[error("cannot start a thread of the migration")]
    Thread(#[source] io::Error),
    /// One end gave up, or the link is lost.
    #[error("the VM did not arrive")]
    Failed(#[source] Failure),
    /// The VM is here, and does not run.
    #[error("the VM is here, but its guest does not run on: {0}")]
    Trouble(Fault),
    /// It was cancelled before a source came.
    #[error("cancelled")]
    Cancelled,
}

impl ReceiveError {
    /// Whether somebody wanted it to end.
    pub(crate) fn is_cancelled(&self) -> bool {
        match self {
            Self::Cancelled => true,
            Self::Failed(failure) => failure.fault.reason() == Reason::Cancelled,
            _ => false,
        }
    }
}

/// What the thread hears.
#[derive(Debug)]
pub(crate) enum Heard {
    /// From a connection.
    Said(Spoken),
    /// The control thread's answer to a step.
    Answer(DestinationInput),
    /// The receiver is at its address, or cannot be.
    Opened(Box<Result<Opened, ReceiveError>>),
    /// A step that may take long has been done: which, and what it gave.
    Made(u64, Box<Made>),
    /// An operator wants it to end.
    Cancel,
    /// The VMM is to end as soon as the VM has.
    Ending,
    /// It is not wanted any more, and nobody answers.
    Gone,
}

/// What came on which connection.
#[derive(Debug)]
pub(crate) struct Spoken(u64, Said, Place);

impl From<(u64, Said, Place)> for Heard {
    fn from((number, said, place): (u64, Said, Place)) -> Self {
        Self::Said(Spoken(number, said, place))
    }
}

/// What became of sessions: each receiver of this process answers for those of the ones before, too.
#[derive(Debug, Clone)]
pub(crate) struct Past {
    clock: Clock,
    outcomes: Arc<Mutex<Outcomes>>,
}

impl Default for Past {
    fn default() -> Self {
        Self { clock: Clock::start(), outcomes: Arc::default() }
    }
}

impl Past {
    fn outcomes(&self) -> MutexGuard<'_, Outcomes> {
        self.outcomes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All that the thread needs.
pub(crate) struct Incoming {
    pub(crate) spec: ReceiveSpec,
    pub(crate) host: Host,
    pub(crate) desk: Box<dyn Fn(ReceiveStep) + Send>,
    pub(crate) threads: Arc<dyn ThreadHook>,
    pub(crate) heard: (Sender<Heard>, Receiver<Heard>),
    pub(crate) past: Past,
}

impl Incoming {
    /// Waits for a VM, and after that for sources that ask what became of it.
    pub(crate) fn run(self) {
        let (to, heard) = self.heard;
        let (listener, tls) = match opening::open(&self.spec, &self.threads, (&to, &heard)) {
            Ok(Some((listener, tls))) => (Arc::new(listener), tls),
            Ok(None) => return,
            Err(error) => return (self.desk)(ReceiveStep::Over(Err(error))),
        };
        let (ground, gone) = (Arc::new(Ground::default()), Arc::new(AtomicBool::new(false)));
        let accepting = Accepting {
            listener: Arc::clone(&listener),
            tls,
            gone: Arc::clone(&gone),
            ground: Arc::clone(&ground),
            to: to.clone(),
            threads: Arc::clone(&self.threads),
        };
        if let Err(error) = thread::spawn(&self.threads, THREAD, "migration-all", move || accepting.run()) {
            listener.close();
            return (self.desk)(ReceiveStep::Over(Err(ReceiveError::Thread(error))));
        }
        let mut driver = Driver {
            clock: self.past.clock,
            spec: self.spec,
            host: self.host,
            desk: self.desk,
            ground,
            to,
            threads: self.threads,
            past: self.past,
            live: None,
            vm: Vm::default(),
            parting: BTreeMap::new(),
            filling: Filling::default(),
            beside: Beside::default(),
            told: false,
        };
        (driver.desk)(ReceiveStep::Listening);
        driver.run(&heard);
        driver.filling.give_up();
        gone.store(true, Ordering::SeqCst);
        listener.close();
        driver.ground.close();
        driver.ground.follow(None);
        driver.live.iter().for_each(Live::shutdown);
        driver.parting.values().for_each(|parting| parting.socket.shutdown(Shutdown::Both));
    }
}

/// The session under way.
pub(super) struct Live {
    pub(super) machine: Destination,
    pub(super) connection: u64,
    pub(super) socket: Arc<Socket>,
    /// Where memory is asked for after the hand-over.
    pub(super) wanted: Option<Numbered>,
    /// The further connections, by number.
    joined: BTreeMap<u64, (u16, Arc<Socket>)>,
    /// It has been read to its end.
    lost: bool,
    /// Read on until then, at most.
    pub(super) until: Option<Instant>,
}

impl Live {
    /// Whether all is undone, and nobody has anything to say any more.
    fn is_over(&self) -> bool {
        let ended = self.machine.state() == DestinationState::Ended;
        ended && self.until.is_some_and(|until| until <= Instant::now())
    }

    /// Connection 0 goes first, so that what is said there comes before the others are seen to be gone.
    fn shutdown(&self) {
        self.socket.shutdown(Shutdown::Both);
        let joined = self.joined.values().map(|(_, socket)| socket);
        joined
            .chain(self.wanted.as_ref().map(|(_, socket)| socket))
            .for_each(|socket| socket.shutdown(Shutdown::Both));
    }
}

/// A connection on which nothing more is said here, and little there.
struct Parting {
    socket: Arc<Socket>,
    /// What it asked for.
    session: Option<SessionId>,
    /// Read on until then, at most: who keeps it open keeps nobody out.
    until: Instant,
}

/// Steps that are done beside the driver, one at a time.
#[derive(Default)]
struct Beside {
    /// The last one's number.
    begun: u64,
    /// It is under way.
    goes_on: bool,
    /// It is to end, and is waited for until then.
    until: Option<Instant>,
}

impl Beside {
    /// The number of one that begins.
    fn begin(&mut self) -> u64 {
        *self = Self { begun: self.begun + 1, goes_on: true, until: None };
        self.begun
    }

    /// Whether that is the end of the one under way.
    fn ends(&mut self, number: u64) -> bool {
        self.begun == number && std::mem::take(&mut self.goes_on)
    }

    /// Whether the one under way is not to be waited for any longer. It is not under way then.
    fn is_overdue(&mut self) -> bool {
        let is_late = self.until.is_some_and(|until| until <= Instant::now());
        is_late && std::mem::take(&mut self.goes_on)
    }
}

/// What is there of the VM.
#[derive(Default)]
struct Vm {
    checked: Option<Checked>,
    memory: Option<HostMemory>,
    /// What came to map it from.
    files: Vec<OwnedFd>,
    /// The control thread has it.
    handed_over: bool,
}

pub(super) struct Driver {
    pub(super) clock: Clock,
    spec: ReceiveSpec,
    host: Host,
    pub(super) desk: Box<dyn Fn(ReceiveStep) + Send>,
    pub(super) ground: Arc<Ground>,
    to: Sender<Heard>,
    pub(super) threads: Arc<dyn ThreadHook>,
    past: Past,
    pub(super) live: Option<Live>,
    vm: Vm,
    /// Connections that have had their answer.
    parting: BTreeMap<u64, Parting>,
    pub(super) filling: Filling,
    beside: Beside,
    /// The control thread knows how it ended.
    told: bool,
}

impl Driver {
    fn run(&mut self, heard: &Receiver<Heard>) {
        let mut last = Instant::now();
        while !self.is_done() {
            self.close_parted();
            self.leave_step();
            let wake = self.live.as_ref().and_then(|live| live.machine.next_wake());
            let wake = wake.into_iter().chain(self.filling.next_wake()).min();
            match heard.recv_timeout(self.clock.until(wake)) {
                Ok(Heard::Said(Spoken(number, said, _place))) => self.said(number, said),
                Ok(Heard::Answer(input)) => self.answered(input),
                Ok(Heard::Ending) => self.filling.end_soon(),
                Ok(Heard::Made(number, made)) if self.beside.ends(number) => self.made(*made),
                // Nobody wants it any more.
                Ok(Heard::Made(..)) => {}
                Ok(Heard::Cancel) if self.live.is_some() => {
                    self.handle(DestinationInput::Cancel("by this end's operator".to_owned()));
                }
                Ok(Heard::Cancel) => self.over(Err(ReceiveError::Cancelled)),
                Err(RecvTimeoutError::Timeout) => {
                    if self.ground.has_come() {
                        self.note_heard();
                    }
                    self.handle(DestinationInput::Tick);
                    self.fill(FillerInput::Tick);
                }
                // It was before there was a driver.
                Ok(Heard::Opened(_)) => {}
                Ok(Heard::Gone) | Err(RecvTimeoutError::Disconnected) => return,
            }
            if last.elapsed() >= PERIOD {
                last = Instant::now();
                self.tell();
                self.tell_left();
            }
        }
    }

    fn tell(&self) {
        let Some(machine) = self.live.as_ref().map(|live| &live.machine).filter(|_| !self.told) else {
            return;
        };
        let memory = machine.hello().map_or(0, |hello| hello.memory.bytes());
        (self.desk)(ReceiveStep::Progress(machine.state(), memory, machine.progress()));
    }

    /// Whether nobody needs the thread any more.
    fn is_done(&mut self) -> bool {
        if let Some(live) = self.live.take_if(|live| live.is_over()) {
            live.shutdown();
        }
        let now = self.clock.now();
        let outcomes = self.past.outcomes();
        let known = |session| outcomes.answer(now, session) != SessionOutcome::Unknown;
        self.told && self.live.is_none() && self.filling.is_over() && !outcomes.sessions().any(known)
    }

    fn said(&mut self, number: u64, said: Said) {
        let Some(said) = self.filling_says(number, said) else { return };
        let is_wanted = |live: &Live| live.wanted.as_ref().is_some_and(|(wanted, _)| *wanted == number);
        if self.live.as_ref().is_some_and(is_wanted) {
            return self.said_where_memory_is_wanted(said);
        }
        let ours = self.live.as_ref().is_some_and(|live| live.connection == number);
        let joined = self.live.as_ref().and_then(|live| live.joined.get(&number)).map(|(index, _)| *index);
        match (said, joined) {
            (said, Some(index)) => self.said_beside(index, said),
            (said, None) => self.said_first(number, ours, said),
        }
    }

    /// On connection `index` of the session, which is not the first.
    fn said_beside(&mut self, index: u16, said: Said) {
        if self.filling.is_live() {
            // Nothing goes there any more.
            return;
        }
        let about = |text: &str| format!("connection {index}: {text}");
        self.handle(match said {
            Said::Lost(text) => DestinationInput::Lost(about(&text)),
            Said::Garbage(text) => DestinationInput::Garbage(about(&text)),
            Said::Frame(frame) | Said::First(_, frame) | Said::Files(frame, _) => {
                DestinationInput::Garbage(about(&format!("{} frame, where memory goes", frame.command())))
            }
            Said::Landed { pass, last } => DestinationInput::Landed { pass, last },
            Said::Damaged(range) => DestinationInput::Damaged(range),
            Said::Failed(fault) => DestinationInput::Failed(fault),
            Said::Whole => return,
        });
    }

    fn said_first(&mut self, number: u64, ours: bool, said: Said) {
        match said {
            Said::First(socket, frame) => self.first(number, socket, frame),
            Said::Lost(text) if ours => {
                if let Some(live) = &mut self.live {
                    live.lost = true;
                    live.until = live.until.map(|_| Instant::now());
                }
                self.handle(DestinationInput::Lost(text));
            }
            Said::Frame(frame) if ours => self.handle(DestinationInput::Frame(frame)),
            Said::Files(frame, files) if ours => {
                self.vm.files = files;
                self.handle(DestinationInput::Frame(frame));
            }
            Said::Garbage(text) if ours => self.handle(DestinationInput::Garbage(text)),
            Said::Landed { pass, last } if ours => self.handle(DestinationInput::Landed { pass, last }),
            Said::Damaged(range) if ours => self.handle(DestinationInput::Damaged(range)),
            Said::Failed(fault) if ours => self.handle(DestinationInput::Failed(fault)),
            Said::Frame(frame) => {
                let asked = self.parting.get(&number).and_then(|parting| parting.session);
                if let (Some(session), Ok(Message::Ack(Command::Outcome))) = (asked, Message::decode(frame)) {
                    self.past.outcomes().settle(session);
                }
            }
            _ => {
                if let Some(parting) = self.parting.remove(&number) {
                    parting.socket.shutdown(Shutdown::Both);
                }
            }
        }
    }

    fn first(&mut self, number: u64, socket: Arc<Socket>, frame: Frame) {
        match frame.command() {
            Command::Query => return self.asked(number, socket, frame),
            Command::Join => return self.join(number, socket, frame),
            Command::Rejoin => {
                log::warn!("migration: a connection that belongs to no session is closed");
                return socket.shutdown(Shutdown::Both);
            }
            _ => {}
        }
        // One that only asked is done with.
        let told = self.told;
        let ended = |live: &mut Live| !told && live.machine.state() == DestinationState::Ended;
        if let Some(live) = self.live.take_if(ended) {
            self.part(live.connection, live.socket, None);
        }
        if self.live.is_some() || self.told {
            let fault = Fault::new(Reason::Busy, "another session is under way, or has been");
            if let Ok(nack) = Message::Nack(Command::Hello, fault).encode() {
                let _ = socket.send(&nack);
            }
            return self.part(number, socket, None);
        }
        let offer = Offer {
            versions: Versions::OURS,
            features: offered(&self.spec),
            connections: MAX_CONNECTIONS,
            program: concat!("vmm ", env!("CARGO_PKG_VERSION")).to_owned(),
        };
        let machine = Destination::new(self.clock.now(), offer, Limits::default(), &self.past.outcomes());
        let (joined, wanted) = (BTreeMap::new(), None);
        self.ground.begin(number);
        let live = Live { machine, connection: number, socket, wanted, joined, lost: false, until: None };
        self.live = Some(live);
        self.handle(DestinationInput::Frame(frame));
    }

    /// A further connection, if it is one of the session's: whoever knows its id was told by its source.
    fn join(&mut self, number: u64, socket: Arc<Socket>, frame: Frame) {
        let index = match Message::decode(frame) {
            Ok(Message::Join(join)) if self.expects_wanted(&join) => {
                if let (Ok(ack), Some(live)) = (Message::Ack(Command::Join).encode(), &mut self.live) {
                    // If that fails, it is lost, and read so.
                    let _ = socket.send(&ack);
                    live.wanted = Some((number, socket));
                }
                return;
            }
            Ok(Message::Join(join)) => self.expected(&join).filter(|index| self.ground.admit(number, *index)),
            _ => None,
        };
        let (Some(index), Some(live)) = (index, &mut self.live) else {
            log::warn!("migration: a connection that belongs to no session is closed");
            return socket.shutdown(Shutdown::Both);
        };
        if let Ok(ack) = Message::Ack(Command::Join).encode() {
            // If that fails, it is lost, and read so.
            let _ = socket.send(&ack);
        }
        live.joined.insert(number, (index, socket));
    }

    /// The index of a connection that may come.
    fn expected(&self, join: &Join) -> Option<u16> {
        let machine = &self.live.as_ref()?.machine;
        let connections = machine.accept()?.connections;
        let ours = machine.hello()?.session == join.session && machine.state().takes_memory();
        (ours && join.role == Join::MEMORY && (1..connections).contains(&join.index)).then_some(join.index)
    }

    /// A source asks what became of its session.
    fn asked(&mut self, number: u64, socket: Arc<Socket>, frame: Frame) {
        let Ok(Message::Query(session)) = Message::decode(frame) else {
            return socket.shutdown(Shutdown::Both);
        };
        let undecided = self.live.as_ref().is_some_and(|live| {
            let is_its = live.machine.hello().is_some_and(|hello| hello.session == session);
            is_its && live.machine.state().is_before_commit()
        });
        if undecided {
            self.handle(DestinationInput::Query);
        }
        let outcome = self.past.outcomes().answer(self.clock.now(), session);
        if let Ok(frame) = (Message::Outcome(session, outcome)).encode() {
            let _ = socket.send(&frame);
        }
        self.part(number, socket, Some(session));
    }

    /// A connection has had its answer, and is closed when the other end has read it, or soon.
    fn part(&mut self, number: u64, socket: Arc<Socket>, session: Option<SessionId>) {
        socket.shutdown(Shutdown::Write);
        self.parting.insert(number, Parting { socket, session, until: Instant::now() + LINGER });
    }

    fn close_parted(&mut self) {
        let now = Instant::now();
        for (_, parting) in self.parting.extract_if(.., |_, parting| parting.until <= now) {
            parting.socket.shutdown(Shutdown::Both);
        }
    }

    /// The link is not silent while memory comes.
    fn note_heard(&mut self) {
        let now = self.clock.now();
        self.live.iter_mut().for_each(|live| live.machine.note_heard(now));
        self.filling.note_heard(now);
    }

    /// Gives the machine an input, and does what it then wants.
    pub(super) fn handle(&mut self, input: DestinationInput) {
        let now = self.clock.now();
        let Some(live) = &mut self.live else { return };
        live.machine.handle(now, input);
        if is_local(live) && live.machine.state() == DestinationState::Offered {
            self.ground.expect_files(live.connection);
        }
        while let Some(action) = self.live.as_mut().and_then(|live| live.machine.poll()) {
            self.act(action);
        }
        let takes = self.live.as_ref().is_some_and(|live| live.machine.state().takes_memory());
        if !takes && self.vm.memory.is_none() {
            self.ground.close();
        }
    }

    fn act(&mut self, action: DestinationAction) {
        match action {
            DestinationAction::Send(frame) => {
                let Some(live) = &self.live else { return };
                if let Err(error) = live.socket.send(&frame) {
                    // What the source said before it closed is read first.
                    log::debug!("migration: {:?} is not sent: {error}", frame.command());
                }
            }
            DestinationAction::Run(step) => self.step(step),
            DestinationAction::Undo(undo) => self.undo(undo),
            // Other steps are short.
            DestinationAction::Interrupt => {
                self.beside.until = Some(Instant::now() + PATIENCE);
                (self.desk)(ReceiveStep::GiveUp);
            }
            DestinationAction::Remember(session, outcome) => {
                self.past.outcomes().remember(self.clock.now(), session, outcome);
            }
            DestinationAction::Settle(session) => self.past.outcomes().settle(session),
            DestinationAction::Close => {
                if let Some(live) = &mut self.live {
                    live.socket.shutdown(Shutdown::Write);
                    live.until = Some(Instant::now() + if live.lost { Duration::ZERO } else { LINGER });
                }
            }
            // The next may be the VM.
            DestinationAction::Report(DestinationOutcome::Checked) => self.vm = Vm::default(),
            DestinationAction::Report(outcome) => {
                self.over(Ok(outcome));
                self.begin_filling();
            }
        }
    }

    fn over(&mut self, result: Result<DestinationOutcome, ReceiveError>) {
        self.tell();
        if !std::mem::replace(&mut self.told, true) {
            (self.desk)(ReceiveStep::Over(result));
        }
    }

    fn step(&mut self, step: DestinationStep) {
        let result = match step {
            DestinationStep::Check(config) => return self.check(config),
            DestinationStep::Build => return self.build(),
            DestinationStep::Restore(state) => match self.arrival(&state) {
                Ok(arrival) => {
                    self.vm.handed_over = true;
                    return (self.desk)(ReceiveStep::Restore(Box::new(arrival)));
                }
                Err(fault) => Err(fault),
            },
            DestinationStep::TakeLocks => return (self.desk)(ReceiveStep::TakeLocks),
            DestinationStep::Run => match self.filling.leave() {
                Ok(()) => return (self.desk)(ReceiveStep::Run(self.to_come())),
                Err(fault) => Err(fault),
            },
            DestinationStep::MapMemory(ranges) => return self.map(&ranges),
        };
        self.answer(result);
    }

    fn undo(&mut self, undo: DestinationUndo) {
        match undo {
            DestinationUndo::Discard => {
                self.ground.close();
                self.ground.refuse_files();
                self.ground.follow(None);
                self.filling = Filling::default();
                let handed_over = std::mem::take(&mut self.vm).handed_over;
                if handed_over {
                    return (self.desk)(ReceiveStep::Discard);
                }
                self.answer(Ok(()));
            }
            DestinationUndo::ReleaseLocks => (self.desk)(ReceiveStep::ReleaseLocks),
        }
    }

    /// The answer to a step that is done here. Its actions come after those that are there.
    fn answer(&mut self, result: Result<(), Fault>) {
        let now = self.clock.now();
        if let Some(live) = &mut self.live {
            live.machine.handle(now, input(result));
        }
    }

    /// Looks whether a VM of this configuration can run here.
    fn check(&mut self, config: Vec<u8>) {
        let (spec, host) = (self.spec.clone(), self.host.clone());
        let Some(hello) = self.hello().cloned() else {
            return self.answer(Err(Fault::new(Reason::Violation, "no Hello")));
        };
        self.make(move || Made::Checked(fit::check(&spec, &host, &hello, &config).map(Box::new)));
    }

    fn build(&mut self) {
        let (Some(checked), Some(live)) = (&self.vm.checked, &self.live) else {
            return self.answer(Err(Fault::new(Reason::Failed, "there is no configuration")));
        };
        let Some(hello) = live.machine.hello().cloned() else {
            return self.answer(Err(Fault::new(Reason::Violation, "no Hello")));
        };
        let (spec, local) = (checked.spec.clone(), is_local(live));
        self.make(move || Made::Memory(making::memory(&spec, &hello, local)));
    }

    /// Does `work` beside this thread, which hears of its end.
    fn make(&mut self, work: impl FnOnce() -> Made + Send + 'static) {
        let (to, number) = (self.to.clone(), self.beside.begin());
        let work = move || drop(to.send(Heard::Made(number, Box::new(work()))));
        if let Err(error) = thread::spawn(&self.threads, THREAD, "migration-make", work) {
            self.beside.ends(number);
            self.answer(Err(Fault::new(Reason::Failed, &format!("a thread: {error}"))));
        }
    }

    /// A step that was to end, and has not for so long, is left to itself: what it gives is dropped.
    fn leave_step(&mut self) {
        if self.beside.is_overdue() {
            log::warn!("migration: a step that was given up does not end yet: it is left to itself");
            self.handle(input(Err(Fault::new(Reason::Failed, "it does not end"))));
        }
    }

    fn hello(&self) -> Option<&Hello> {
        self.live.as_ref().and_then(|live| live.machine.hello())
    }

    /// A step that may take long has been done.
    fn made(&mut self, made: Made) {
        let result = match made {
            Made::Checked(result) => result.map(|checked| self.vm.checked = Some(*checked)),
            Made::Memory(result) => {
                // What was handed over is there.
                let is_local = self.live.as_ref().is_some_and(is_local);
                result.map(|memory| match memory {
                    Some(memory) if is_local => self.vm.memory = Some(memory),
                    Some(memory) => self.land(memory),
                    None => {}
                })
            }
        };
        self.handle(input(result));
    }

    /// The source's memory goes there.
    fn land(&mut self, memory: HostMemory) {
        let Some(live) = &self.live else { return };
        let Some(hello) = live.machine.hello() else { return };
        let accept = live.machine.accept();
        let (connections, features) =
            accept.map_or((1, Features::NONE), |accept| (accept.connections, accept.features));
        // What has been allocated could not be told from what came, where some comes after the hand-over.
        let ahead = if features.contains(Features::POST_COPY) {
            None
        } else {
            Ahead::start(&self.threads, Arc::clone(memory.memory()), connections)
                .inspect_err(|error| log::debug!("migration: nothing is allocated ahead: {error}"))
                .ok()
        };
        let (memory_too, layout) = (Arc::clone(memory.memory()), hello.memory.clone());
        self.ground.open(memory_too, layout, (live.connection, connections), features, ahead);
        self.vm.memory = Some(memory);
    }

    /// Maps the memory whose descriptors have come. Nobody writes to it before it is this end's.
    fn map(&mut self, ranges: &[DescriptorRange]) {
        self.ground.refuse_files();
        let files = std::mem::take(&mut self.vm.files);
        let (Some(checked), Some(hello)) = (&self.vm.checked, self.hello()) else {
            return self.answer(Err(Fault::new(Reason::Failed, "there is no configuration")));
        };
        let (spec, bits, pieces) = (checked.spec.clone(), hello.cpu.phys_bits, descriptors::pieces(ranges));
        self.make(move || {
            let failed = |error: &dyn std::error::Error| Fault::new(Reason::Incompatible, &chain(error));
            let zones = machine::zones(&spec).map_err(|error| failed(&error));
            let memory = zones.and_then(|zones| {
                HostMemory::adopt(&zones, bits, files, &pieces).map_err(|error| failed(&error))
            });
            Made::Memory(memory.map(Some))
        });
    }

    fn arrival(&mut self, state: &[u8]) -> Result<Arrival, Fault> {
        // Nothing may write to it any more.
        let absent = self.ground.absent();
        self.ground.close();
        let (Some(checked), Some(memory)) = (self.vm.checked.take(), self.vm.memory.take()) else {
            return Err(Fault::new(Reason::Failed, "there is no memory"));
        };
        let record: Record = minicbor::decode(state)
            .map_err(|error| Fault::new(Reason::Violation, &format!("the state: {error}")))?;
        let records = record.parse().map_err(|error| Fault::new(Reason::Incompatible, &chain(&error)))?;
        self.watch(&memory, &absent)?;
        Ok(Arrival { checked, records, memory })
    }
}

/// What a source may use of what this end can do at its address.
fn offered(spec: &ReceiveSpec) -> Features {
    let any = Features::COMPRESSION.and(Features::PAGE_SUMS).and(Features::POST_COPY);
    match spec.address {
        MigrationAddress::Unix(_) => any.and(Features::LOCAL_MEMORY),
        // TLS sees to it that memory is what was sent.
        MigrationAddress::Tcp(_) if spec.tls_dir.is_some() => any.and(Features::UNCHECKED_MEMORY),
        MigrationAddress::Tcp(_) => any,
    }
}

/// A step's result, for the machine.
fn input(result: Result<(), Fault>) -> DestinationInput {
    match result {
        Ok(()) => DestinationInput::Done(Output::Nothing),
        Err(fault) => DestinationInput::Failed(fault),
    }
}

/// Whether memory is handed over by its descriptors.
fn is_local(live: &Live) -> bool {
    live.machine.accept().is_some_and(|accept| accept.features.contains(Features::LOCAL_MEMORY))
}

#[cfg(test)]
mod tests;
