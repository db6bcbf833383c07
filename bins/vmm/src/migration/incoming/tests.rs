use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Mutex;

use vmm_api::config::ReceiveMigrationData;
use vmm_device_model::thread::{ThreadKind, Unconfined};
use vmm_memory_manager::zone::{ZoneConfig, ZoneOptions};
use vmm_migration_protocol::{
    Command, CpuNeeds, Decoder, Hello, Item, Limits, MemoryLayout, Message, Offer, Output, Purpose, Region,
    SessionId, Versions,
};

use super::super::LOOK;
use super::super::opening::{MOST_CONNECTIONS, next};
use super::*;

/// Long: only for what hangs.
const LIMIT: Duration = Duration::from_secs(60);

fn driver(to: &Sender<Heard>, live: Live) -> Driver {
    let config = ReceiveMigrationData { receiver_url: "unix:/m".to_owned(), ..Default::default() };
    Driver {
        clock: Clock::start(),
        spec: ReceiveSpec::check(&config).unwrap(),
        host: Host { most_vcpus: 1, cpuid: None },
        desk: Box::new(drop),
        ground: Arc::default(),
        to: to.clone(),
        threads: Arc::new(Unconfined),
        past: Past::default(),
        live: Some(live),
        vm: Vm::default(),
        parting: BTreeMap::new(),
        filling: Filling::default(),
        beside: Beside::default(),
        told: false,
    }
}

fn hello(features: Features) -> Hello {
    let region = Region { gpa: 0, length: 1 << 20, zone: "mem0".into() };
    Hello {
        versions: Versions::OURS,
        session: SessionId([1; 16]),
        purpose: Purpose::Migrate,
        features,
        required: features,
        connections: 1,
        memory: MemoryLayout::new(vec![region]).unwrap(),
        cpu: CpuNeeds::default(),
        program: String::new(),
    }
}

/// A destination that has been asked to check a configuration, after these features were agreed on.
fn checking(limits: Limits, features: Features) -> Destination {
    checking_for(Purpose::Migrate, limits, features)
}

fn checking_for(purpose: Purpose, limits: Limits, features: Features) -> Destination {
    let offer = Offer { versions: Versions::OURS, features, connections: 1, program: String::new() };
    let mut machine = Destination::new(Duration::ZERO, offer, limits, &Outcomes::new());
    let hello = Hello { purpose, ..hello(features) };
    for message in [Message::Hello(Box::new(hello)), Message::Config(vec![1])] {
        machine.handle(Duration::ZERO, DestinationInput::Frame(message.encode().unwrap()));
    }
    while machine.poll().is_some() {}
    assert_eq!(machine.state(), DestinationState::Checking);
    machine
}

/// The session of that machine, on connection 1.
fn live(machine: Destination, ours: UnixStream) -> Live {
    let (socket, joined) = (Arc::new(Socket::Unix(ours)), BTreeMap::new());
    Live { machine, connection: 1, socket, wanted: None, joined, lost: false, until: None }
}

#[test]
fn the_source_hears_of_a_destination_that_is_busy() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.set_read_timeout(Some(LIMIT)).unwrap();
    let limits = Limits { keepalive: Duration::from_millis(5), ..Limits::default() };
    let (to, heard) = std::sync::mpsc::channel();
    let mut driver = driver(&to, live(checking(limits, Features::NONE), ours));
    let (done, busy) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || {
        driver.make(move || {
            let _ = busy.recv_timeout(LIMIT);
            Made::Checked(Err(Fault::new(Reason::Failed, "at last")))
        });
        driver.run(&heard);
    });
    let mut decoder = Decoder::new();
    let mut next = || {
        let mut byte = [0];
        loop {
            theirs.read_exact(&mut byte).unwrap();
            if let Some(Item::Frame(frame)) = decoder.push(&mut byte.as_slice()).unwrap() {
                return frame.command();
            }
        }
    };
    for _ in 0..3 {
        assert_eq!(next(), Command::Keepalive, "while it works");
    }
    done.send(()).unwrap();
    while next() != Command::Nack {}
    to.send(Heard::Gone).unwrap();
    thread.join().unwrap();
}

/// It looks for a guest that another receiver got at this address.
#[test]
fn a_source_that_comes_again_for_another_guest_does_not_end_the_wait() {
    let (to, _heard) = std::sync::mpsc::channel();
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let mut driver = driver(&to, live(checking(Limits::default(), Features::NONE), ours));
    driver.live = None;
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.set_read_timeout(Some(LIMIT)).unwrap();
    let rejoin = Message::Rejoin(SessionId([2; 16])).encode().unwrap();
    driver.said(2, Said::First(Arc::new(Socket::Unix(ours)), rejoin));
    assert!(driver.live.is_none() && !driver.told, "it waits for a source still");
    assert_eq!(theirs.read(&mut [0]).unwrap(), 0, "nothing is said to that one");
}

/// The names of threads that have begun.
#[derive(Debug, Default)]
struct Names(Mutex<Vec<String>>);

impl ThreadHook for Names {
    fn begin(&self, _: ThreadKind) -> io::Result<()> {
        self.0.lock().unwrap().extend(std::thread::current().name().map(str::to_owned));
        Ok(())
    }
}

/// It could not be told from what has come.
#[test]
fn nothing_is_allocated_ahead_of_memory_that_may_come_after_the_guest() {
    for (features, wanted) in [(Features::NONE, vec!["migration-ahead"]), (Features::POST_COPY, vec![])] {
        let (to, _heard) = std::sync::mpsc::channel();
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let names = Arc::new(Names::default());
        let mut driver = driver(&to, live(checking(Limits::default(), features), ours));
        driver.threads = Arc::clone(&names) as Arc<dyn ThreadHook>;
        let (id, options) = ("mem0".into(), ZoneOptions::default());
        let zone = ZoneConfig { id, size: 1 << 20, file: None, shared: false, huge_page: None, options };
        driver.land(HostMemory::create(&[zone], 40).unwrap());
        assert!(driver.vm.memory.is_some());
        assert_eq!(*names.0.lock().unwrap(), wanted, "{features:?}");
    }
}

#[test]
fn a_connection_that_cannot_be_taken_keeps_out_none_that_comes_later() {
    let errors = Mutex::new(vec![rustix::io::Errno::MFILE, rustix::io::Errno::NOMEM]);
    let gone = AtomicBool::new(false);
    let accept = || match errors.lock().unwrap().pop() {
        Some(error) => Err(error.into()),
        None => Ok(Socket::Unix(UnixStream::pair().unwrap().0)),
    };
    assert!(next(&gone, accept).is_some());
    let close = || {
        gone.store(true, Ordering::SeqCst);
        Err(rustix::io::Errno::INVAL.into())
    };
    assert!(next(&gone, close).is_none());
}

/// A receiver at its address, and what its control thread hears.
fn receiver(path: &Path) -> (Sender<Heard>, Receiver<ReceiveStep>, std::thread::JoinHandle<()>) {
    let url = format!("unix:{}", path.display());
    let config = ReceiveMigrationData { receiver_url: url, ..Default::default() };
    let (to, heard) = std::sync::mpsc::channel();
    let (post, steps) = std::sync::mpsc::channel();
    let incoming = Incoming {
        spec: ReceiveSpec::check(&config).unwrap(),
        host: Host { most_vcpus: 1, cpuid: None },
        desk: Box::new(move |step| drop(post.send(step))),
        threads: Arc::new(Unconfined),
        heard: (to.clone(), heard),
        past: Past::default(),
    };
    let thread = std::thread::spawn(move || incoming.run());
    assert!(matches!(steps.recv_timeout(LIMIT), Ok(ReceiveStep::Listening)));
    (to, steps, thread)
}

/// A connection with this first frame.
fn says(path: &Path, message: &Message) -> io::Result<UnixStream> {
    let mut socket = UnixStream::connect(path)?;
    socket.set_read_timeout(Some(LIMIT))?;
    socket.write_all(&message.clone().encode().unwrap().encode())?;
    Ok(socket)
}

#[test]
fn who_keeps_a_connection_that_was_answered_keeps_nobody_out() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m");
    let (to, _steps, thread) = receiver(&path);
    // The session under way.
    let hello = Message::Hello(Box::new(hello(Features::NONE)));
    let mut first = says(&path, &hello).unwrap();
    let mut header = [0; 16];
    first.read_exact(&mut header).unwrap();
    for message in [Message::Query(SessionId([2; 16])), hello] {
        let kept: Vec<_> = (1..MOST_CONNECTIONS)
            .map(|_| {
                let mut kept = says(&path, &message).unwrap();
                kept.read_to_end(&mut Vec::new()).unwrap();
                kept
            })
            .collect();
        let end = Instant::now() + LIMIT;
        loop {
            assert!(Instant::now() < end, "{message:?}: nobody else is let in");
            let late = says(&path, &Message::Query(SessionId([3; 16])));
            if late.and_then(|mut late| late.read_to_end(&mut Vec::new())).is_ok_and(|bytes| bytes > 0) {
                break;
            }
            std::thread::sleep(LOOK);
        }
        drop(kept);
    }
    to.send(Heard::Gone).unwrap();
    thread.join().unwrap();
}

#[test]
fn a_step_that_does_not_end_is_left_to_itself_when_it_is_cancelled() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let (to, heard) = std::sync::mpsc::channel();
    let (post, steps) = std::sync::mpsc::channel();
    let mut driver = driver(&to, live(checking(Limits::default(), Features::NONE), ours));
    driver.desk = Box::new(move |step| drop(post.send(step)));
    let (goes_on, held) = std::sync::mpsc::channel::<()>();
    driver.make(move || {
        let _ = held.recv();
        Made::Memory(Ok(None))
    });
    to.send(Heard::Cancel).unwrap();
    let thread = std::thread::spawn(move || driver.run(&heard));
    let end = Instant::now() + LIMIT;
    loop {
        assert!(Instant::now() < end, "it is waited for");
        if let Ok(ReceiveStep::Over(Ok(DestinationOutcome::Failed { failure, .. }))) =
            steps.recv_timeout(LIMIT)
        {
            break assert_eq!(failure.fault.reason(), Reason::Cancelled);
        }
    }
    drop(goes_on);
    to.send(Heard::Gone).unwrap();
    thread.join().unwrap();
}

/// What a driver tells the control thread that hears all of `inputs` at once, and how the session stands then.
fn hears(live: Live, inputs: Vec<Heard>) -> (Vec<ReceiveStep>, Driver) {
    let (to, heard) = std::sync::mpsc::channel();
    let (post, steps) = std::sync::mpsc::channel();
    let mut driver = driver(&to, live);
    driver.desk = Box::new(move |step| drop(post.send(step)));
    inputs.into_iter().chain([Heard::Gone]).for_each(|input| to.send(input).unwrap());
    driver.run(&heard);
    (steps.try_iter().collect(), driver)
}

#[test]
fn a_peer_that_always_has_something_to_say_does_not_hold_the_clock() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let limits = Limits { session: Duration::ZERO, ..Limits::default() };
    let stale = || Heard::Made(99, Box::new(Made::Checked(Err(Fault::new(Reason::Failed, "of before")))));
    let inputs = std::iter::repeat_with(stale).take(3).collect();
    let (_, driver) = hears(live(checking(limits, Features::NONE), ours), inputs);
    assert_eq!(driver.live.unwrap().machine.state(), DestinationState::Stopping, "its time was over");
}

#[test]
fn a_cancel_after_a_check_ends_the_wait_for_a_vm() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let mut machine = checking_for(Purpose::Check, Limits::default(), Features::NONE);
    machine.handle(Duration::ZERO, DestinationInput::Done(Output::Nothing));
    assert_eq!(machine.state(), DestinationState::Ended);
    let (steps, _) = hears(live(machine, ours), vec![Heard::Cancel]);
    let cancelled = |step: &ReceiveStep| matches!(step, ReceiveStep::Over(Err(ReceiveError::Cancelled)));
    assert!(steps.iter().any(cancelled), "{steps:?}");
}

#[test]
fn nothing_more_is_written_to_who_does_not_read() {
    let (mut ours, mut theirs) = UnixStream::pair().unwrap();
    ours.set_write_timeout(Some(Duration::from_millis(1))).unwrap();
    while ours.write(&[0; 4096]).is_ok() {}
    let (to, _heard) = std::sync::mpsc::channel();
    let mut driver = driver(&to, live(checking(Limits::default(), Features::NONE), ours));
    let frame = Message::Ack(Command::Config).encode().unwrap();
    driver.act(DestinationAction::Send(frame));
    theirs.set_read_timeout(Some(LIMIT)).unwrap();
    theirs.read_to_end(&mut Vec::new()).expect("its end");
}

#[test]
fn a_source_hears_that_the_receivers_vmm_ends() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m");
    let (to, _steps, thread) = receiver(&path);
    let mut source = says(&path, &Message::Hello(Box::new(hello(Features::NONE)))).unwrap();
    let mut begin = [0];
    source.read_exact(&mut begin).unwrap();
    to.send(Heard::Gone).unwrap();
    thread.join().unwrap();
    let mut rest = Vec::new();
    source.read_to_end(&mut rest).unwrap();
    let (bytes, mut decoder) = ([&begin[..], &rest].concat(), Decoder::new());
    let mut left = bytes.as_slice();
    let frames = std::iter::from_fn(|| decoder.push(&mut left).unwrap());
    let Some(Item::Frame(last)) = frames.last() else { panic!("{bytes:?}") };
    let Ok(Message::Cancel(fault)) = Message::decode(last) else { panic!("{bytes:?}") };
    assert!(fault.text().contains("VMM has ended"), "{fault}");
}
