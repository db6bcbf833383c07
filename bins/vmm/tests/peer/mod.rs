//! A receiver, driven by bytes: the whole of one end but KVM, with real sockets and threads. Shared with the fuzz target in fuzz/.
#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code; tests fail by panicking"
)]

#[path = "../rig/mod.rs"]
mod rig;

use std::cell::RefCell;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde_json::json;
use vmm_api::command::{Host, Outcome};
use vmm_hypervisor::fake::{Fake, Live};
use vmm_migration_protocol::{Command, Decoder, Frame, HEADER_LENGTH, Item};
use vmm_state::{Phase, Reactions};
use vmm_tests::harness::LIMIT;

use rig::Rig;

/// Most things that one input does.
const MOST: usize = 200;

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
}

/// A frame of a session that went well, as it travelled.
struct Sample {
    command: Command,
    bytes: Vec<u8>,
}

/// A VMM that receives again and again, and what a source says to it.
struct Bench {
    rig: Rig,
    fake: Fake,
    /// The source's files, which the guest's disk is among.
    source: Rig,
    session: Vec<Sample>,
    addresses: u32,
}

/// One attempt.
struct Attempt<'a> {
    rig: &'a mut Rig,
    session: &'a [Sample],
    path: PathBuf,
    link: UnixStream,
    /// Of the session, what comes next.
    next: usize,
    /// Whether a whole Commit of the session was sent.
    committed: bool,
    received: mpsc::Receiver<Outcome>,
    outcome: Option<Outcome>,
}

fn receive(rig: &mut Rig, path: &Path) -> mpsc::Receiver<Outcome> {
    let body = json!({ "receiver_url": format!("unix:{}", path.display()) });
    rig.begin_with("vm.receive-migration", body.to_string().into_bytes())
}

fn connect(path: &Path) -> UnixStream {
    let end = Instant::now() + LIMIT;
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => return stream,
            Err(error) => assert!(Instant::now() < end, "nobody listens: {error}"),
        }
        thread::yield_now();
    }
}

/// Passes one connection on, and gives what came from the source.
fn record(at: &Path, to: &Path) -> JoinHandle<Vec<u8>> {
    let (listener, to) = (UnixListener::bind(at).unwrap(), to.to_owned());
    thread::spawn(move || {
        let (mut source, _) = listener.accept().unwrap();
        let destination = connect(&to);
        let (mut from, mut back) = (destination.try_clone().unwrap(), source.try_clone().unwrap());
        let answers = thread::spawn(move || {
            drop(std::io::copy(&mut from, &mut back));
            drop(back.shutdown(Shutdown::Write));
        });
        let (mut all, mut buffer) = (Vec::new(), [0; 4096]);
        while let Ok(count @ 1..) = source.read(&mut buffer) {
            all.extend(&buffer[..count]);
            (&destination).write_all(&buffer[..count]).unwrap();
        }
        destination.shutdown(Shutdown::Write).unwrap();
        answers.join().unwrap();
        all
    })
}

fn samples(mut bytes: &[u8]) -> Vec<Sample> {
    let mut samples = Vec::new();
    while !bytes.is_empty() {
        let length = u64::from_le_bytes(bytes[8..HEADER_LENGTH].try_into().unwrap()) as usize;
        let (frame, rest) = bytes.split_at(HEADER_LENGTH + length);
        let command = match Decoder::new().push(&mut &*frame).unwrap().unwrap() {
            Item::Frame(frame) => frame.command(),
            Item::Bulk(bulk) => bulk.command(),
        };
        samples.push(Sample { command, bytes: frame.to_vec() });
        bytes = rest;
    }
    samples
}

impl Bench {
    fn new() -> Self {
        let rig = |fake: &Fake| Rig::with(fake.clone(), "Null", Reactions::default());
        let fake = Fake::new();
        let (mut source, mut destination) = (rig(&Fake::new()).brought_to(Phase::Running), rig(&fake));
        let folder = destination.folder.path().to_owned();
        let (between, path) = (folder.join("between"), folder.join("m"));
        let received = receive(&mut destination, &path);
        drop(connect(&path));
        let recorded = record(&between, &path);
        let body = json!({ "destination_url": format!("unix:{}", between.display()) });
        let sent = source.begin_with("vm.send-migration", body.to_string().into_bytes());
        let mut outcome = None;
        while outcome.is_none() {
            source.pump();
            destination.pump();
            outcome = received.recv_timeout(Duration::from_micros(100)).ok();
        }
        outcome.unwrap().unwrap();
        source.wait(&sent).unwrap();
        destination.ask("vm.delete").unwrap();
        let session = samples(&recorded.join().unwrap());
        Self { rig: destination, fake, source, session, addresses: 0 }
    }

    fn run(&mut self, bytes: &[u8]) -> bool {
        self.addresses += 1;
        // The session is the same each time, and no VMM takes one twice.
        self.fake = Fake::new();
        self.rig = Rig::with(self.fake.clone(), "Null", Reactions::default());
        let path = self.rig.folder.path().join(format!("m{}", self.addresses));
        let received = receive(&mut self.rig, &path);
        let link = connect(&path);
        link.set_read_timeout(Some(Duration::from_millis(2))).unwrap();
        link.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
        let (session, rig) = (&self.session[..], &mut self.rig);
        let attempt =
            Attempt { rig, session, path, link, next: 0, committed: false, received, outcome: None };
        let here = attempt.play(&mut Tape(bytes));
        if here {
            self.rig.ask("vm.delete").unwrap();
        }
        assert_eq!(self.rig.vmm.phase(), Phase::Empty);
        assert_eq!(self.fake.live(), Live::default());
        here
    }
}

impl Attempt<'_> {
    /// Whether the VM is there in the end.
    fn play(mut self, tape: &mut Tape<'_>) -> bool {
        for _ in 0..MOST {
            if tape.0.is_empty() {
                break;
            }
            self.act(tape);
            self.look();
        }
        let _ = self.link.shutdown(Shutdown::Both);
        self.rig.ask("vmm.ping").unwrap();
        let end = Instant::now() + LIMIT;
        let mut cancel = None;
        while self.outcome.is_none() {
            assert!(Instant::now() < end, "vm.receive-migration is not answered");
            self.look();
            // Who never said Hello was no source, and another is waited for.
            if self.outcome.is_none() && cancel.is_none() {
                cancel = Some(self.rig.begin("vm.cancel"));
            }
            thread::yield_now();
        }
        let phase = self.rig.vmm.phase();
        match self.outcome.take().unwrap() {
            Ok(_) => {
                assert!(self.committed, "a VM that nobody gave away");
                assert!([Phase::Running, Phase::Paused].contains(&phase), "{phase}");
                true
            }
            Err(error) => {
                assert_eq!(phase, Phase::Empty, "{error}");
                assert!(!error.to_string().is_empty());
                false
            }
        }
    }

    /// Does what the control thread does.
    fn look(&mut self) {
        self.rig.pump();
        self.outcome = self.outcome.take().or_else(|| self.received.try_recv().ok());
    }

    fn act(&mut self, tape: &mut Tape<'_>) {
        let sample = self.session.get(self.next);
        match tape.next() % 16 {
            0..=7 => {
                let Some(sample) = sample else { return };
                self.next += 1;
                self.committed |= sample.command == Command::Commit;
                self.send(&sample.bytes);
                self.await_answer(sample);
            }
            8 => self.next += 1,
            9 => self.next = usize::from(tape.next()) % self.session.len(),
            10 | 11 => self.send_changed(tape),
            12 => {
                let raw = tape.some();
                self.send(&raw);
            }
            13 => {
                let command = Command::ALL[usize::from(tape.next()) % Command::COUNT];
                if let Ok(frame) = Frame::new(command, tape.some()) {
                    self.committed |= command == Command::Commit;
                    self.send(&frame.encode());
                }
            }
            14 => {
                // Another connection.
                if let Ok(link) = UnixStream::connect(&self.path) {
                    let raw = tape.some();
                    let sample = &self.session[usize::from(tape.next()) % self.session.len()];
                    let _ = (&link).write_all(if raw.is_empty() { &sample.bytes } else { &raw });
                }
            }
            _ => match tape.next() % 3 {
                0 => drop(self.rig.begin("vm.cancel")),
                1 => drop(self.link.shutdown(Shutdown::Write)),
                _ => self.await_bytes(),
            },
        }
    }

    /// The next frame with bytes of its payload changed, under a checksum that is right.
    fn send_changed(&mut self, tape: &mut Tape<'_>) {
        let Some(sample) = self.session.get(self.next) else { return };
        self.next += 1;
        let mut payload = sample.bytes[HEADER_LENGTH..].to_vec();
        for _ in 0..=tape.next() % 4 {
            let at = usize::from(tape.next()) << 8 | usize::from(tape.next());
            if let Some(byte) = payload.len().checked_sub(1).and_then(|last| payload.get_mut(at % (last + 1)))
            {
                *byte = tape.next();
            }
        }
        self.committed |= sample.command == Command::Commit;
        match Frame::new(sample.command, payload.clone()) {
            Ok(frame) => self.send(&frame.encode()),
            // Memory: the first 24 bytes are covered, with the header.
            Err(_) => self.send(&[&sample.bytes[..HEADER_LENGTH], &payload].concat()),
        }
    }

    fn send(&mut self, bytes: &[u8]) {
        // It may have closed, and may have stopped to read.
        let _ = (&self.link).write_all(bytes);
    }

    /// What a source waits for before it goes on.
    fn await_answer(&mut self, Sample { command, bytes }: &Sample) {
        let is_answered = match command {
            // But for the last pass.
            Command::Mark => bytes[HEADER_LENGTH + 4] == 0,
            Command::Hello | Command::Config | Command::Start | Command::Complete | Command::Commit => true,
            _ => false,
        };
        if is_answered {
            self.await_bytes();
        }
    }

    /// Waits a while for something to come, or for the end of the link.
    fn await_bytes(&mut self) {
        let mut buffer = [0; 4096];
        for _ in 0..25 {
            self.look();
            match (&self.link).read(&mut buffer) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                _ => return,
            }
        }
    }
}

thread_local! {
    static BENCH: RefCell<Option<Bench>> = const { RefCell::new(None) };
}

/// A receiver under any input; whether the VM was there in the end.
pub(crate) fn receiver(bytes: &[u8]) -> bool {
    BENCH.with_borrow_mut(|bench| bench.get_or_insert_with(Bench::new).run(bytes))
}

/// How many frames a whole session has.
pub(crate) fn frames() -> usize {
    BENCH.with_borrow_mut(|bench| bench.get_or_insert_with(Bench::new).session.len())
}
