//! The thread that gets a VM: it listens, drives the protocol's [`Destination`], and answers what became of sessions.

mod connections;
mod steps;

use std::collections::BTreeMap;
use std::io;
use std::net::Shutdown;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vmm_api::spec::{Checked, ReceiveSpec};
use vmm_device_model::thread::{self, ThreadHook};
use vmm_memory_manager::map::HostMemory;
use vmm_migration_protocol::{
    Destination, DestinationAction, DestinationInput, DestinationOutcome, DestinationState, Failure, Fault,
    Features, FillerInput, Outcomes, Progress, Reason, SessionOutcome,
};
use vmm_snapshot::RecordSet;

use super::backlog::Place;
use super::landing::{Ground, Said};
use super::link::Socket;
use super::making::Made;
use super::opening::{Accepting, Opened};
use super::outgoing::PERIOD;
use super::postcopy::FillStep;
use super::postcopy::filling::{Filling, Numbered};
use super::tls::TlsError;
use super::{Clock, Host, LINGER, THREAD, opening};
use crate::vmm::PATIENCE;
use connections::Parting;
use steps::{Beside, Vm};

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
        driver.part_from_source();
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
    /// Whether memory is handed over by its descriptors.
    fn is_local(&self) -> bool {
        self.machine.accept().is_some_and(|accept| accept.features.contains(Features::LOCAL_MEMORY))
    }

    fn has_ended(&self) -> bool {
        self.machine.state() == DestinationState::Ended
    }

    /// Whether all is undone, and nobody has anything to say any more.
    fn is_over(&self) -> bool {
        self.has_ended() && self.until.is_some_and(|until| until <= Instant::now())
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

/// The receiver's thread: between connections, the protocol and the control thread.
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
            let heard = heard.recv_timeout(self.clock.until(wake));
            let is_quiet = matches!(heard, Err(RecvTimeoutError::Timeout));
            match heard {
                Ok(Heard::Said(Spoken(number, said, _place))) => self.said(number, said),
                Ok(Heard::Answer(input)) => self.answered(input),
                Ok(Heard::Ending) => self.filling.end_soon(),
                Ok(Heard::Made(number, made)) if self.beside.ends(number) => self.made(*made),
                // Nobody wants it any more.
                Ok(Heard::Made(..)) => {}
                Ok(Heard::Cancel) if self.live.as_ref().is_some_and(|live| !live.has_ended()) => {
                    self.handle(DestinationInput::Cancel("by this end's operator".to_owned()));
                }
                Ok(Heard::Cancel) => self.over(Err(ReceiveError::Cancelled)),
                // It was before there was a driver; or nothing was heard.
                Ok(Heard::Opened(_)) | Err(RecvTimeoutError::Timeout) => {}
                Ok(Heard::Gone) | Err(RecvTimeoutError::Disconnected) => return,
            }
            // A peer that always has something to say does not hold the clock.
            if is_quiet || self.clock.is_past(wake) {
                self.tick();
            }
            if last.elapsed() >= PERIOD {
                last = Instant::now();
                self.tell();
                self.tell_left();
            }
        }
    }

    fn tick(&mut self) {
        if self.ground.has_come() {
            self.note_heard();
        }
        self.handle(DestinationInput::Tick);
        self.fill(FillerInput::Tick);
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

    /// Gives the machine an input, and does what it then wants.
    pub(super) fn handle(&mut self, input: DestinationInput) {
        let now = self.clock.now();
        let Some(live) = &mut self.live else { return };
        live.machine.handle(now, input);
        if live.is_local() && live.machine.state() == DestinationState::Offered {
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
                    // What the source said before it closed is read first; a part of this may be on the link, and nobody waits for
                    // who does not read again.
                    log::debug!("migration: {:?} is not sent: {error}", frame.command());
                    live.socket.shutdown(Shutdown::Write);
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
}

#[cfg(test)]
mod tests;
