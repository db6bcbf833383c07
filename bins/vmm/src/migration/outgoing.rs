//! The thread that gives a VM away: it drives the protocol's [`Source`].

use std::fmt;
use std::fs::File;
use std::net::Shutdown;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmm_api::spec::MigrationAddress;
use vmm_device_model::thread::{self, ThreadHook};
use vmm_memory_manager::source::GuestMemorySource;
use vmm_migration_protocol::{
    Command, Failure, Fault, Features, FrameError, Item, Message, Output, Reason, SessionId, Source,
    SourceAction, SourceInput, SourceOutcome, SourceProgress, SourceSetup, SourceState, SourceStep,
    SourceUndo, Supplier, What,
};

use super::course::Course;
use super::inputs::{Answers, Inputs};
use super::joining::Session;
use super::link::{ANSWER, End, Frames, Socket, Way};
use super::pace::Pace;
use super::postcopy::SupplyStep;
use super::postcopy::opening::{self, Wanted};
use super::postcopy::owed::Owed;
use super::postcopy::supplying::{Goods, Supplying};
use super::sender::{Out, PATIENCE, Pen, Shared, Writer};
use super::turn::Turn;
use super::{Aside, Clock, LINGER, LOOK, THREAD, TlsError};
use crate::exit::chain;

/// How long a failure to open a connection waits for what the other end says of it.
const GRACE: Duration = Duration::from_millis(250);

/// The least time between two tellings of progress.
pub(super) const PERIOD: Duration = Duration::from_millis(100);

/// What the driver tells the control thread, and asks of it.
#[derive(Debug)]
pub enum SendStep {
    /// Do it, and answer with Done or Failed.
    Run(SourceStep),
    /// Undo it, and answer likewise.
    Undo(SourceUndo),
    /// So far it is.
    Progress(Box<SourceProgress>),
    /// The destination has taken the VM; the end follows.
    Given,
    /// Nobody knows where the VM is.
    InDoubt(Failure),
    /// The destination has the VM, and not all of its memory.
    Supply(SupplyStep),
    /// It is over, and what is left of it is the thread. `Ok`: the VM is elsewhere.
    Over(Result<(), SendError>),
}

/// A VM was not given away.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SendError {
    /// The certificates of this end cannot be used.
    #[error("the migration's tls_dir")]
    Tls(#[source] TlsError),
    /// The other end is not to be reached.
    #[error("cannot connect to the receiver")]
    Connect(#[source] std::io::Error),
    /// The configuration does not fit the wire.
    #[error("the VM's configuration")]
    Setup(#[source] FrameError),
    /// A thread cannot be had.
    #[error("cannot start a thread of the migration")]
    Thread(#[source] std::io::Error),
    /// One end gave up, or the link is lost.
    #[error("the migration failed{}", Stuck(.stuck))]
    Failed {
        /// Why.
        #[source]
        failure: Failure,
        /// What could not be undone.
        stuck: Vec<SourceUndo>,
    },
    /// The link was lost during the hand-over.
    #[error("it is in doubt where the VM is: the guest stays paused here")]
    InDoubt(#[source] Failure),
    /// The link was lost after it.
    #[error(
        "the guest is the destination's and stands still there: it lacks memory that is here, and the link is lost"
    )]
    Severed(#[source] Failure),
    /// The destination had the VM, and does not get the rest of its memory.
    #[error("the guest is lost: it is the destination's, and some of its memory was here")]
    Lost(#[source] Failure),
    /// Something of the VM stands against it.
    #[error("the VM cannot be migrated")]
    Refused(#[source] Box<dyn std::error::Error + Send + Sync>),
}

struct Stuck<'a>(&'a [SourceUndo]);

impl fmt::Display for Stuck<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() { Ok(()) } else { write!(f, ", and this could not be undone: {:?}", self.0) }
    }
}

impl SendError {
    /// Whether somebody wanted it to end.
    pub(crate) fn is_cancelled(&self) -> bool {
        matches!(self, Self::Failed { failure, .. } if failure.fault.reason() == Reason::Cancelled)
    }
}

/// Tells the control thread.
pub(crate) type Desk = Box<dyn Fn(SendStep) + Send>;

/// All that the thread needs.
pub(crate) struct Outgoing {
    pub(crate) address: MigrationAddress,
    /// Bytes per second; 0 is no limit.
    pub(crate) max_bandwidth: u64,
    pub(crate) tls_dir: Option<PathBuf>,
    pub(crate) setup: SourceSetup,
    pub(crate) memory: GuestMemorySource,
    /// The files of memory that is handed over.
    pub(crate) files: Vec<File>,
    pub(crate) aside: Arc<Aside>,
    pub(crate) desk: Desk,
    pub(crate) threads: Arc<dyn ThreadHook>,
    pub(crate) inputs: (Answers, Inputs),
    /// The VM is gone, and nobody answers any more.
    pub(crate) gone: Arc<AtomicBool>,
}

impl Outgoing {
    /// Drives the migration to its end.
    pub(crate) fn run(self) {
        let place = (self.address, self.tls_dir);
        let (way, socket) = match connect(place, &self.threads, &self.inputs.1, &self.gone) {
            Ok(connected) => connected,
            Err(error) => return (self.desk)(SendStep::Over(Err(error))),
        };
        let clock = Clock::start();
        let id = self.setup.hello.session;
        let late = Late::new(&self.setup);
        let machine = match Source::new(clock.now(), self.setup) {
            Ok(machine) => machine,
            Err(error) => return (self.desk)(SendStep::Over(Err(SendError::Setup(error)))),
        };
        let shared = Arc::new(Shared { pace: Pace::new(self.max_bandwidth), ..Shared::default() });
        let (queue, queued) = channel();
        let (answers, inputs) = self.inputs;
        let (reads, read) = channel();
        let memory = Arc::new(self.memory);
        let session = Session {
            way,
            id,
            memory: Arc::clone(&memory),
            shared: Arc::clone(&shared),
            answers: answers.clone(),
            threads: self.threads,
            sockets: Arc::default(),
        };
        let (turn, packer, broken) = (Turn::new(), None, None);
        let pen = Pen { index: 0, socket: Arc::clone(&socket), memory, shared, packer, turn, broken };
        let writer = Writer { pen, files: self.files, queue: queued, answers, read, lanes: Vec::new() };
        let (frames, heard) = (Frames::of(&socket), session.answers.clone());
        let reading = move || {
            listen(frames, &heard);
            drop(reads);
        };
        let threads = &session.threads;
        let started = thread::spawn(threads, THREAD, "migration-in", reading).and_then(|reading| {
            let writing = thread::spawn(threads, THREAD, "migration-out", move || writer.run())?;
            Ok([reading, writing])
        });
        let on_zero = match started {
            Ok(both) => both,
            Err(error) => {
                socket.shutdown(Shutdown::Both);
                return (self.desk)(SendStep::Over(Err(SendError::Thread(error))));
            }
        };
        let (aside, desk) = (self.aside, self.desk);
        let driver = Driver { clock, machine, socket, queue, aside, desk, session, late };
        driver.run(&inputs, on_zero, &self.gone);
    }
}

/// The connection, unless the operator cancels or the VM goes. Certificates may be on a file system that does not answer, or a name
/// on such a server: nobody waits for the thread that asks them.
fn connect(
    (address, tls_dir): (MigrationAddress, Option<PathBuf>),
    threads: &Arc<dyn ThreadHook>,
    inputs: &Inputs,
    gone: &AtomicBool,
) -> Result<(Way, Arc<Socket>), SendError> {
    let (to, connected) = channel();
    let wanted = Arc::new(AtomicBool::new(true));
    let still_wanted = Arc::clone(&wanted);
    let work = move || {
        let connect = || {
            let way = Way::new(address, tls_dir.as_deref()).map_err(SendError::Tls)?;
            if !still_wanted.load(Ordering::SeqCst) {
                return Err(SendError::Connect(std::io::ErrorKind::Interrupted.into()));
            }
            let socket = way.connect(&mut || still_wanted.load(Ordering::SeqCst));
            let socket = socket.and_then(|socket| socket.set_timeouts(None, Some(PATIENCE)).map(|()| socket));
            Ok((way, Arc::new(socket.map_err(SendError::Connect)?)))
        };
        drop(to.send(connect()));
    };
    thread::spawn(threads, THREAD, "migration-open", work).map_err(SendError::Thread)?;
    loop {
        match connected.recv_timeout(LOOK) {
            Ok(connected) => return connected,
            Err(RecvTimeoutError::Timeout) if gone.load(Ordering::SeqCst) => break,
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
        if let Ok(SourceInput::Cancel(text)) = inputs.try_recv() {
            wanted.store(false, Ordering::SeqCst);
            let failure = Failure::new(vmm_migration_protocol::End::Here, Reason::Cancelled, &text);
            return Err(SendError::Failed { failure, stuck: Vec::new() });
        }
    }
    wanted.store(false, Ordering::SeqCst);
    Err(SendError::Connect(std::io::ErrorKind::Interrupted.into()))
}

/// Gives what arrives to the driver.
pub(super) fn listen(mut frames: Frames, heard: &Answers) {
    loop {
        let input = match frames.next() {
            Ok(Item::Frame(frame)) => SourceInput::Frame(frame),
            Ok(Item::Bulk(_)) => SourceInput::Garbage("memory comes the wrong way".to_owned()),
            Err(End::Garbage(text)) => SourceInput::Garbage(text),
            Err(End::Lost(text)) => SourceInput::Lost(text),
        };
        let goes_on = matches!(input, SourceInput::Frame(_));
        if heard.pass_on(input).is_err() || !goes_on {
            return;
        }
    }
}

struct Driver {
    clock: Clock,
    machine: Source,
    socket: Arc<Socket>,
    queue: Sender<Out>,
    aside: Arc<Aside>,
    desk: Desk,
    session: Session,
    late: Late,
}

/// What is for memory that follows the hand-over.
struct Late {
    /// The guest will go on without all of its memory.
    wanted: bool,
    owed: Arc<Owed>,
    /// The connection on which the destination asks for it.
    way: Arc<Mutex<Option<Wanted>>>,
    /// The number that it carries.
    pass: u32,
}

impl Late {
    fn new(setup: &SourceSetup) -> Self {
        Self {
            // One that is paused leaves nothing behind.
            wanted: setup.hello.required.contains(Features::POST_COPY) && !setup.paused,
            owed: Arc::new(Owed::none(setup.hello.memory.clone())),
            way: Arc::default(),
            pass: 0,
        }
    }

    fn way(&self) -> MutexGuard<'_, Option<Wanted>> {
        self.way.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Driver {
    /// `on_zero` reads and writes connection 0.
    fn run(mut self, inputs: &Inputs, on_zero: [JoinHandle<()>; 2], gone: &AtomicBool) {
        let (mut over, mut last) = (None, Instant::now());
        let mut sends_memory = false;
        while over.is_none() && !gone.load(Ordering::SeqCst) {
            while let Some(action) = self.machine.poll() {
                if let Some(end) = self.act(action) {
                    over = Some(end);
                }
            }
            if over.is_none() {
                let wake = self.machine.next_wake();
                let input = inputs.recv_timeout(self.clock.until(wake));
                let is_quiet = matches!(input, Err(RecvTimeoutError::Timeout));
                match input {
                    Ok(input) => self.take(input),
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => break,
                }
                // A peer that always has something to say does not hold the clock.
                if is_quiet || self.clock.is_past(wake) {
                    self.take(SourceInput::Tick);
                }
                // That memory begins is told at once, for what comes before may take long.
                let sends = matches!(self.machine.state(), SourceState::Copying | SourceState::Finishing);
                let begins = sends && !sends_memory;
                if begins || last.elapsed() >= PERIOD {
                    sends_memory |= begins;
                    last = Instant::now();
                    self.tell();
                }
            }
        }
        self.tell();
        if let (Some(Ok(())), Some(supplier)) = (&over, self.machine.supplier()) {
            return self.supply(supplier, inputs, on_zero, gone);
        }
        let [_, writing] = on_zero;
        match over {
            // The process may end as soon as that is known, so first it is seen to that the other end knows.
            Some(Ok(())) => {
                self.linger(inputs);
                self.session.shared.over.store(true, Ordering::SeqCst);
                // The last word is on the link, or the link takes nothing.
                let _ = writing.join();
                (self.desk)(SendStep::Over(Ok(())));
            }
            Some(error) => {
                (self.desk)(SendStep::Over(error));
                self.linger(inputs);
            }
            None => {}
        }
        self.session.shared.over.store(true, Ordering::SeqCst);
        self.socket.shutdown(Shutdown::Both);
    }

    /// Goes on until the destination has all of memory.
    fn supply(
        self,
        machine: Supplier,
        inputs: &Inputs,
        [reading, writing]: [JoinHandle<()>; 2],
        gone: &AtomicBool,
    ) {
        let Self { clock, machine: source, socket, queue, desk, session, late, .. } = self;
        // What was to be said before is on the link then.
        drop(queue);
        let _ = writing.join();
        let wanted = late.way().take().unwrap_or_else(|| Wanted::of(Arc::clone(&socket)));
        let goods = Goods {
            session,
            owed: late.owed,
            pass: late.pass,
            features: source.features(),
            sent: Arc::new(AtomicU64::new(source.progress().sent.bytes)),
        };
        Supplying::new((clock, machine), goods, (socket, wanted), reading, desk).run(inputs, gone);
    }

    fn take(&mut self, input: SourceInput) {
        if matches!(input, SourceInput::Done(_) | SourceInput::Failed(_)) {
            self.session.shared.interrupted.store(false, Ordering::SeqCst);
        }
        self.machine.note_sent(self.session.shared.sent.load(Ordering::Relaxed));
        self.machine.handle(self.clock.now(), input);
    }

    fn tell(&self) {
        (self.desk)(SendStep::Progress(Box::new(self.machine.progress())));
    }

    /// Reads on until the other end has closed.
    fn linger(&self, inputs: &Inputs) {
        let until = Instant::now() + LINGER;
        // One that says more and more is not read for longer.
        while let Some(rest) = until.checked_duration_since(Instant::now()) {
            match inputs.recv_timeout(rest) {
                Ok(SourceInput::Lost(_) | SourceInput::Garbage(_)) | Err(_) => return,
                Ok(_) => {}
            }
        }
    }

    /// Does what the machine wants; gives the end, if that is it.
    fn act(&mut self, action: SourceAction) -> Option<Result<(), SendError>> {
        match action {
            SourceAction::Send(frame) => self.write(Out::Frame(frame)),
            SourceAction::Run(SourceStep::SendMemory { pass, what, last, .. }) => {
                self.send_memory(pass, what, last);
            }
            SourceAction::Run(SourceStep::Ask) => self.ask(),
            SourceAction::Run(SourceStep::Connect { connections }) => self.connect(connections),
            SourceAction::Run(step) => (self.desk)(SendStep::Run(step)),
            SourceAction::Undo(undo) => (self.desk)(SendStep::Undo(undo)),
            SourceAction::Interrupt => self.session.shared.interrupted.store(true, Ordering::SeqCst),
            SourceAction::Resend(range) => self.aside.put_range(range),
            SourceAction::Close => self.write(Out::Close),
            SourceAction::Report(outcome) => return self.report(outcome),
        }
        None
    }

    fn send_memory(&mut self, pass: u32, what: What, last: bool) {
        self.session.shared.sent.store(0, Ordering::Relaxed);
        // Once agreed on, they stay.
        let _ = self.session.shared.features.set(self.machine.features());
        self.late.pass = pass.saturating_add(1);
        let course = Arc::new(match what {
            What::All => Course::new(pass, None, last),
            What::Taken => Course::new(pass, Some(self.aside.take()), last),
            What::Absent => Course::leaving(pass, self.late.owed.set(&self.aside.take())),
        });
        if !self.late.wanted || self.late.way().is_some() {
            return self.write(Out::Pass(course));
        }
        // Before anything else, the way for what the destination will want.
        let (queue, place) = (self.queue.clone(), Arc::clone(&self.late.way));
        self.beside("migration-join", move |session| match opening::wanted(session) {
            Ok(wanted) => {
                *place.lock().unwrap_or_else(PoisonError::into_inner) = Some(wanted);
                let _ = queue.send(Out::Pass(course));
                None
            }
            Err(fault) => {
                // The other end may say on connection 0 why it does not take it.
                std::thread::park_timeout(GRACE);
                Some(SourceInput::Failed(fault))
            }
        });
    }

    fn report(&self, outcome: SourceOutcome) -> Option<Result<(), SendError>> {
        match outcome {
            SourceOutcome::Sent => {
                (self.desk)(SendStep::Given);
                Some(Ok(()))
            }
            SourceOutcome::Accepted => Some(Ok(())),
            SourceOutcome::Failed { failure, stuck } => Some(Err(SendError::Failed { failure, stuck })),
            SourceOutcome::InDoubt(failure) => {
                (self.desk)(SendStep::InDoubt(failure));
                None
            }
        }
    }

    fn write(&self, out: Out) {
        // The thread ends only when this end of the queue is gone.
        let _ = self.queue.send(out);
    }

    fn answer(&self, input: SourceInput) {
        // The other end of the channel is this thread's.
        let _ = self.session.answers.send(input);
    }

    /// Opens the further connections.
    fn connect(&self, connections: u16) {
        let queue = self.queue.clone();
        self.beside("migration-join", move |session| match session.open(connections) {
            // They are there before a pass is.
            Ok(lanes) => Some(queue.send(Out::Lanes(lanes)).map_or(DONE, |()| DONE)),
            Err(fault) => {
                // The other end may say on connection 0 why it does not take them.
                std::thread::park_timeout(GRACE);
                Some(SourceInput::Failed(fault))
            }
        });
    }

    /// Asks what became of the session, on another connection.
    fn ask(&self) {
        debug_assert_eq!(self.machine.state(), SourceState::Asking);
        self.beside("migration-ask", |session| match outcome_of(&session.way, session.id) {
            Ok(frame) => Some(SourceInput::Frame(frame)),
            Err(text) => Some(SourceInput::Failed(Fault::new(Reason::Failed, &text))),
        });
    }

    /// Does a step that waits for the other end on a thread of its own; `None`: somebody else will answer.
    fn beside(&self, name: &str, step: impl FnOnce(&Session) -> Option<SourceInput> + Send + 'static) {
        let session = self.session.clone();
        let work = move || {
            if let Some(answer) = step(&session) {
                let _ = session.answers.send(answer);
            }
        };
        if let Err(error) = thread::spawn(&self.session.threads, THREAD, name, work) {
            self.answer(SourceInput::Failed(Fault::new(Reason::Failed, &error.to_string())));
        }
    }
}

/// The Outcome that the other end gives.
fn outcome_of(way: &Way, session: SessionId) -> Result<vmm_migration_protocol::Frame, String> {
    let failed = |error: std::io::Error| chain(&error).to_string();
    let socket = Arc::new(way.connect(&mut || true).map_err(failed)?);
    socket.set_timeouts(Some(ANSWER), Some(ANSWER)).map_err(failed)?;
    let query = Message::Query(session).encode().map_err(|error| error.to_string())?;
    socket.send(&query).map_err(failed)?;
    let frame = match Frames::of(&socket).first(ANSWER) {
        Ok(Item::Frame(frame)) => frame,
        Ok(Item::Bulk(_)) => return Err("memory comes the wrong way".to_owned()),
        Err(End::Garbage(text) | End::Lost(text)) => return Err(text),
    };
    match Message::decode(frame.clone()) {
        Ok(Message::Outcome(of, _)) if of == session => {}
        Ok(other) => return Err(format!("{} frame for an answer, or of another session", other.command())),
        Err(error) => return Err(error.to_string()),
    }
    if let Ok(ack) = Message::Ack(Command::Outcome).encode() {
        // It then need not remember.
        let _ = socket.send(&ack);
    }
    socket.shutdown(Shutdown::Write);
    Ok(frame)
}

/// What the control thread answers a step that gives nothing.
pub(crate) const DONE: SourceInput = SourceInput::Done(Output::Nothing);

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::{UnixListener, UnixStream};

    use vmm_migration_protocol::SessionOutcome;

    use super::*;

    const SESSION: SessionId = SessionId([1; 16]);

    /// What a source makes of a destination that does this when it is asked.
    fn asks(
        answer: impl FnOnce(UnixStream) + Send + 'static,
    ) -> Result<vmm_migration_protocol::Frame, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m");
        let listener = UnixListener::bind(&path).unwrap();
        let destination = std::thread::spawn(move || answer(listener.accept().unwrap().0));
        let way = Way::new(MigrationAddress::Unix(path), None).unwrap();
        let outcome = outcome_of(&way, SESSION);
        destination.join().unwrap();
        outcome
    }

    fn says(message: Message) -> Result<vmm_migration_protocol::Frame, String> {
        let bytes = message.encode().unwrap().encode();
        asks(move |mut source| source.write_all(&bytes).unwrap())
    }

    /// Another is no answer, and it is asked again.
    #[test]
    fn an_outcome_is_that_of_the_session_which_was_asked_about() {
        assert!(says(Message::Outcome(SESSION, SessionOutcome::Committed)).is_ok());
        let other = says(Message::Outcome(SessionId([2; 16]), SessionOutcome::Committed)).unwrap_err();
        assert!(other.contains("of another session"), "{other}");
        assert!(says(Message::Ack(Command::Config)).is_err());
    }

    #[test]
    fn an_answer_that_drips_is_not_waited_for() {
        let late = asks(|mut source| {
            let bytes = Message::Outcome(SESSION, SessionOutcome::Committed).encode().unwrap().encode();
            // Until nobody reads it.
            for byte in bytes.iter().cycle().take(36).chain(std::iter::repeat(&0)) {
                if source.write_all(&[*byte]).is_err() {
                    return;
                }
                std::thread::sleep(ANSWER / 16);
            }
        });
        assert!(late.unwrap_err().contains("not whole in time"));
    }
}
