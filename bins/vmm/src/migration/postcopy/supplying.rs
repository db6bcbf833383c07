//! The end that has given the VM away, and owes memory: it drives the protocol's [`Supplier`].

use std::collections::VecDeque;
use std::net::Shutdown;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmm_device_model::thread;
use vmm_migration_protocol::{
    End, Failure, Fault, Features, Packer, Reason, SourceInput, Supplier, SupplierAction, SupplierInput,
    SupplierOutcome, SupplierState, SupplierStep,
};

use super::SupplyStep;
use super::opening::{self, Again, Reader, Wanted, Ways};
use super::owed::Owed;
use super::pushing::{Out, Pusher, Quill, serve};
use crate::migration::inputs::Inputs;
use crate::migration::joining::Session;
use crate::migration::link::Socket;
use crate::migration::outgoing::{DONE, Desk, PERIOD, SendError, SendStep, listen};
use crate::migration::sender::PATIENCE;
use crate::migration::{Clock, LINGER, THREAD};

/// How often it is looked whether threads have ended that say nothing of it.
const LOOK_FOR_END: Duration = Duration::from_millis(2);

/// What all links of a session send.
#[derive(Clone)]
pub(in crate::migration) struct Goods {
    pub(in crate::migration) session: Session,
    pub(in crate::migration) owed: Arc<Owed>,
    pub(in crate::migration) pass: u32,
    pub(in crate::migration) features: Features,
    pub(in crate::migration) sent: Arc<AtomicU64>,
}

/// Connections, and the threads on them.
struct Link {
    /// 0, and that for wanted memory.
    sockets: [Arc<Socket>; 2],
    queue: Sender<Out>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

/// The driver.
pub(in crate::migration) struct Supplying {
    clock: Clock,
    machine: Supplier,
    goods: Goods,
    link: Option<Link>,
    /// What looking for the destination found.
    found: Arc<Mutex<Option<Again>>>,
    desk: Desk,
    /// What came while a link was closed.
    kept: VecDeque<SourceInput>,
    /// The operator says that nobody needs the memory: so be it if the destination is not found.
    unneeded: bool,
}

impl Supplying {
    /// Goes on with `machine` over the connections of the migration: 0, which is read by `reading`, and that for wanted memory.
    pub(in crate::migration) fn new(
        (clock, machine): (Clock, Supplier),
        goods: Goods,
        (main, wanted): (Arc<Socket>, Wanted),
        reading: JoinHandle<()>,
        desk: Desk,
    ) -> Self {
        let answers = goods.session.answers.clone();
        let link = goods.link(Ways { main, reader: Reader::Thread(reading), wanted }).map_err(|error| {
            let _ = answers.send(SourceInput::Lost(format!("a thread: {error}")));
        });
        Self {
            clock,
            machine,
            goods,
            link: link.ok(),
            found: Arc::default(),
            desk,
            kept: VecDeque::new(),
            unneeded: false,
        }
    }

    /// Until nothing is owed, or the VM is gone, and nobody answers any more.
    pub(in crate::migration) fn run(mut self, inputs: &Inputs, gone: &AtomicBool) {
        let mut last = Instant::now();
        let end = 'end: loop {
            while let Some(action) = self.machine.poll() {
                if let Some(end) = self.act(action, inputs) {
                    break 'end Some(end);
                }
            }
            if gone.load(Ordering::SeqCst) {
                break None;
            }
            let wake = self.machine.next_wake();
            let input = match self.kept.pop_front() {
                Some(input) => input,
                None => match inputs.recv_timeout(self.clock.until(wake)) {
                    Ok(input) => input,
                    Err(RecvTimeoutError::Timeout) => SourceInput::Tick,
                    Err(RecvTimeoutError::Disconnected) => break None,
                },
            };
            self.take(input);
            // A peer that always has something to say does not hold the clock.
            if self.clock.is_past(wake) {
                self.take(SourceInput::Tick);
            }
            if last.elapsed() >= PERIOD {
                last = Instant::now();
                self.tell();
            }
        };
        self.tell();
        self.close(false, inputs);
        self.goods.session.shared.over.store(true, Ordering::SeqCst);
        self.goods.session.close();
        if let Some(result) = end {
            (self.desk)(SendStep::Over(result));
        }
    }

    fn take(&mut self, input: SourceInput) {
        let mut input = match input {
            SourceInput::Frame(frame) => SupplierInput::Frame(frame),
            SourceInput::Garbage(text) => SupplierInput::Garbage(text),
            SourceInput::Lost(text) => SupplierInput::Lost(text),
            SourceInput::Done(output) => SupplierInput::Done(output),
            SourceInput::Failed(fault) => SupplierInput::Failed(fault),
            // Nothing can be taken back: the destination is looked for, if it is not there.
            SourceInput::Cancel(_) | SourceInput::Ask => SupplierInput::Retry,
            SourceInput::Yield => {
                self.unneeded = true;
                SupplierInput::Tick
            }
            SourceInput::Keep => return,
            SourceInput::Tick => SupplierInput::Tick,
        };
        if matches!(input, SupplierInput::Done(_)) && self.machine.state() == SupplierState::Rejoining {
            let found = self.found().take();
            if let Some(Again::Lacks(pages, ways)) = found {
                self.goods.owed.replace(pages);
                match self.goods.link(*ways) {
                    Ok(link) => self.link = Some(link),
                    Err(error) => {
                        let fault = Fault::new(Reason::Failed, &format!("a thread: {error}"));
                        input = SupplierInput::Failed(fault);
                    }
                }
            }
        }
        self.machine.handle(self.clock.now(), input);
        match self.machine.state() {
            SupplierState::Severed | SupplierState::Stranded if self.unneeded => {
                self.machine.handle(self.clock.now(), SupplierInput::Drop);
            }
            SupplierState::Pushing => self.unneeded = false,
            _ => {}
        }
    }

    fn tell(&self) {
        let step = SupplyStep::Owes(self.goods.owed.bytes(), self.goods.sent.load(Ordering::Relaxed));
        (self.desk)(SendStep::Supply(step));
    }

    /// Does what the machine wants; gives the end, if that is it.
    fn act(&mut self, action: SupplierAction, inputs: &Inputs) -> Option<Result<(), SendError>> {
        match action {
            SupplierAction::Send(frame) => match (&self.link, &*self.found()) {
                (Some(link), _) => drop(link.queue.send(Out::Frame(frame))),
                // If that fails, the destination asks no more all the same.
                (None, Some(Again::Over(_, socket))) => drop(socket.send(&frame)),
                (None, _) => {}
            },
            SupplierAction::Run(SupplierStep::Push) => match &self.link {
                Some(link) => drop(link.queue.send(Out::Push)),
                None => self.answer(SourceInput::Failed(Fault::new(Reason::Lost, "there is no link"))),
            },
            SupplierAction::Run(SupplierStep::Rejoin) => self.rejoin(),
            SupplierAction::Interrupt => {
                self.link.iter().for_each(|link| link.stop.store(true, Ordering::SeqCst));
            }
            SupplierAction::Close => {
                let ended = self.machine.state() == SupplierState::Ended;
                self.close(ended, inputs);
            }
            SupplierAction::Report(outcome) => return self.report(outcome),
        }
        None
    }

    fn report(&self, outcome: SupplierOutcome) -> Option<Result<(), SendError>> {
        let tell = |step| (self.desk)(SendStep::Supply(step));
        match outcome {
            SupplierOutcome::Supplied => return Some(Ok(())),
            SupplierOutcome::Severed(failure) => {
                self.tell();
                tell(SupplyStep::Severed(failure));
            }
            SupplierOutcome::Restored => tell(SupplyStep::Restored),
            SupplierOutcome::Stranded(failure) => tell(SupplyStep::Stranded(failure)),
            SupplierOutcome::Dropped => {
                let why = "the memory that was left here is dropped, as the operator said";
                let failure = Failure::new(End::Here, Reason::Cancelled, why);
                return Some(Err(SendError::Lost(failure)));
            }
            SupplierOutcome::Refused(failure) => return Some(Err(SendError::Lost(failure))),
        }
        None
    }

    fn answer(&self, input: SourceInput) {
        // The other end of the channel is this thread's.
        let _ = self.goods.session.answers.send(input);
    }

    fn found(&self) -> std::sync::MutexGuard<'_, Option<Again>> {
        self.found.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks for the destination, on a thread of its own.
    fn rejoin(&self) {
        let (goods, found) = (self.goods.clone(), Arc::clone(&self.found));
        let work = move || {
            let again = opening::again(&goods.session, &goods.owed);
            let answer = match &again {
                Ok(Again::Lacks(..)) => DONE,
                Ok(Again::Over(frame, _)) => SourceInput::Frame(frame.clone()),
                Err(fault) => SourceInput::Failed(fault.clone()),
            };
            *found.lock().unwrap_or_else(PoisonError::into_inner) = again.ok();
            let _ = goods.session.answers.send(answer);
        };
        if let Err(error) = thread::spawn(&self.goods.session.threads, THREAD, "migration-join", work) {
            self.answer(SourceInput::Failed(Fault::new(Reason::Failed, &error.to_string())));
        }
    }

    /// Waits until the other end has read what was said last, and closes.
    fn linger(&mut self, inputs: &Inputs) {
        let until = Instant::now() + LINGER;
        // One that says more and more is not read for longer.
        while let Some(rest) = until.checked_duration_since(Instant::now()) {
            match inputs.recv_timeout(rest) {
                Ok(SourceInput::Lost(_) | SourceInput::Garbage(_)) | Err(_) => return,
                Ok(input) => self.keep(input),
            }
        }
    }

    /// Closes the link; `gently`, after what was said last. What is heard of it afterwards is of no link any more.
    fn close(&mut self, gently: bool, inputs: &Inputs) {
        if let Some(Again::Over(_, socket)) = &*self.found() {
            socket.shutdown(Shutdown::Write);
        }
        let Some(Link { sockets, queue, stop, threads }) = self.link.take() else { return };
        let _ = queue.send(Out::Close);
        // Who interrupts itself for that may not see it.
        drop(queue);
        if gently {
            self.linger(inputs);
        }
        stop.store(true, Ordering::SeqCst);
        sockets.iter().for_each(|socket| socket.shutdown(Shutdown::Both));
        // Who reads it may wait for room.
        while threads.iter().any(|thread| !thread.is_finished()) {
            inputs.recv_timeout(LOOK_FOR_END).into_iter().for_each(|input| self.keep(input));
        }
        threads.into_iter().for_each(|thread| drop(thread.join()));
        inputs.try_iter().for_each(|input| self.keep(input));
        self.kept.retain(|input| !is_of_a_link(input));
    }

    /// Keeps what is still to be heard when the link is closed.
    fn keep(&mut self, input: SourceInput) {
        if !is_of_a_link(&input) {
            self.kept.push_back(input);
        }
    }
}

fn is_of_a_link(input: &SourceInput) -> bool {
    matches!(input, SourceInput::Frame(_) | SourceInput::Garbage(_) | SourceInput::Lost(_))
}

impl Goods {
    /// Begins to send over these connections.
    fn link(&self, ways: Ways) -> std::io::Result<Link> {
        let stop = Arc::new(AtomicBool::new(false));
        let (queue, queued) = channel();
        let sockets = [Arc::clone(&ways.main), Arc::clone(&ways.wanted.socket)];
        let mut link = Link { sockets, queue, stop, threads: Vec::new() };
        if let Err(error) = self.begin(&mut link, ways, queued) {
            link.stop.store(true, Ordering::SeqCst);
            link.sockets.iter().for_each(|socket| socket.shutdown(Shutdown::Both));
            return Err(error);
        }
        Ok(link)
    }

    fn begin(&self, link: &mut Link, ways: Ways, queue: Receiver<Out>) -> std::io::Result<()> {
        let Session { threads, answers, shared, .. } = &self.session;
        let Ways { main, reader, wanted: Wanted { socket: wanted, frames: wants } } = ways;
        for socket in &link.sockets {
            socket.set_timeouts(None, Some(PATIENCE))?;
        }
        match reader {
            Reader::Thread(thread) => link.threads.push(thread),
            Reader::None(frames) => {
                let heard = answers.clone();
                let read = move || listen(frames, &heard);
                link.threads.push(thread::spawn(threads, THREAD, "migration-in", read)?);
            }
        }
        let (quill, owed, answers) = (self.quill(&wanted, &link.stop), &self.owed, answers.clone());
        let (owed_too, answers_too) = (Arc::clone(owed), answers.clone());
        let serving = move || serve(quill, wants, &owed_too, &answers_too);
        link.threads.push(thread::spawn(threads, THREAD, "migration-want", serving)?);
        let (quill, owed, shared) = (self.quill(&main, &link.stop), Arc::clone(owed), Arc::clone(shared));
        let pushing = move || Pusher { quill, owed, pace: &shared.pace, queue, answers }.run();
        link.threads.push(thread::spawn(threads, THREAD, "migration-out", pushing)?);
        Ok(())
    }

    fn quill(&self, socket: &Arc<Socket>, stop: &Arc<AtomicBool>) -> Quill {
        Quill {
            socket: Arc::clone(socket),
            memory: Arc::clone(&self.session.memory),
            stop: Arc::clone(stop),
            sent: Arc::clone(&self.sent),
            pass: self.pass,
            features: self.features,
            packer: self.features.contains(Features::LZ4).then(Packer::new),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::{UnixListener, UnixStream};

    use vmm_api::spec::MigrationAddress;
    use vmm_device_model::thread::Unconfined;
    use vmm_migration_protocol::{Bulk, Command, Join, MemoryRange, Message, PAGE, SessionId};

    use super::super::pushing::tests::{LIMIT, arrived, map, owing};
    use super::*;
    use crate::migration::inputs::inputs;
    use crate::migration::link::Way;
    use crate::migration::sender::Shared;

    const SESSION: SessionId = SessionId([3; 16]);

    /// Takes the connection of a source, and its first frame; answers with these in one piece.
    fn answer(listener: &UnixListener, first: Message, answers: [Message; 3]) -> UnixStream {
        let bytes = |message: Message| message.encode().unwrap().encode();
        let first = bytes(first);
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let mut came = vec![0; first.len()];
        stream.read_exact(&mut came).unwrap();
        assert_eq!(came, first);
        stream.write_all(&answers.map(bytes).concat()).unwrap();
        stream
    }

    #[test]
    fn what_comes_with_the_answer_to_who_rejoins_is_heard() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m");
        let listener = UnixListener::bind(&path).unwrap();
        let (map, (answers, told)) = (map(), inputs());
        let session = Session {
            way: Way::new(MigrationAddress::Unix(path), None).unwrap(),
            id: SESSION,
            memory: Arc::new(map.source().unwrap()),
            shared: Arc::new(Shared::default()),
            answers,
            threads: Arc::new(Unconfined),
            sockets: Arc::default(),
        };
        let owed = owing();
        let goods = Goods { session, owed, pass: 2, features: Features::NONE, sent: Arc::default() };
        let range = |page| MemoryRange::new(page * PAGE, PAGE).unwrap();
        let destination = std::thread::spawn(move || {
            let lacks = MemoryRange::new(0, 9 * PAGE).unwrap();
            let said = [Message::Lacks(lacks), Message::Ack(Command::Rejoin), Message::Whole(SESSION)];
            let main = answer(&listener, Message::Rejoin(SESSION), said);
            let join = Join { session: SESSION, index: 0, role: Join::WANTED };
            let said = [Message::Ack(Command::Join), Message::Want(range(7)), Message::Want(range(3))];
            let mut wanted = answer(&listener, Message::Join(join), said);
            let header = Bulk::memory(range(7), 2, 0).unwrap().header().len();
            let mut came = vec![0; 2 * (header + PAGE as usize)];
            wanted.read_exact(&mut came).unwrap();
            (came, main)
        });
        let Ok(Again::Lacks(_, ways)) = opening::again(&goods.session, &goods.owed) else {
            panic!("it lacks memory");
        };
        let link = goods.link(*ways).unwrap();
        let (came, main) = destination.join().unwrap();
        assert_eq!(arrived(&came), [(7, 1, 7), (3, 1, 3)]);
        match told.recv_timeout(LIMIT) {
            Ok(SourceInput::Frame(frame)) => assert_eq!(frame.command(), Command::Whole),
            other => panic!("{other:?}"),
        }
        drop(link.queue);
        link.sockets.iter().for_each(|socket| socket.shutdown(Shutdown::Both));
        link.threads.into_iter().for_each(|thread| thread.join().unwrap());
        drop(main);
    }
}
