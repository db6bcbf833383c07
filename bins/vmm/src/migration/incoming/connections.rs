//! What comes on connections, and who may speak on them.

use std::collections::BTreeMap;
use std::net::Shutdown;
use std::sync::Arc;
use std::time::Instant;

use vmm_api::spec::{MigrationAddress, ReceiveSpec};
use vmm_migration_protocol::{
    Command, Destination, DestinationInput, Fault, Features, Frame, Join, Limits, MAX_CONNECTIONS, Message,
    Offer, Reason, SessionId, Versions,
};

use super::{Driver, Live};
use crate::migration::LINGER;
use crate::migration::landing::Said;
use crate::migration::link::Socket;

/// A connection on which nothing more is said here, and little there.
pub(super) struct Parting {
    pub(super) socket: Arc<Socket>,
    /// What it asked for.
    session: Option<SessionId>,
    /// Read on until then, at most: who keeps it open keeps nobody out.
    until: Instant,
}

impl Driver {
    pub(super) fn said(&mut self, number: u64, said: Said) {
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
        let ended = |live: &mut Live| !told && live.has_ended();
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
    pub(in crate::migration) fn part(
        &mut self,
        number: u64,
        socket: Arc<Socket>,
        session: Option<SessionId>,
    ) {
        socket.shutdown(Shutdown::Write);
        self.parting.insert(number, Parting { socket, session, until: Instant::now() + LINGER });
    }

    /// This VMM ends: says so to a source that still has its VM.
    pub(super) fn part_from_source(&self) {
        let Some(live) = self.live.as_ref().filter(|live| live.machine.state().is_before_commit()) else {
            return;
        };
        let fault = Fault::new(Reason::Cancelled, "the destination's VMM has ended");
        if let (Some(_), Ok(frame)) = (live.machine.hello(), Message::Cancel(fault).encode()) {
            let _ = live.socket.send(&frame);
            live.socket.shutdown(Shutdown::Write);
        }
    }

    pub(super) fn close_parted(&mut self) {
        let now = Instant::now();
        for (_, parting) in self.parting.extract_if(.., |_, parting| parting.until <= now) {
            parting.socket.shutdown(Shutdown::Both);
        }
    }

    /// The link is not silent while memory comes.
    pub(super) fn note_heard(&mut self) {
        let now = self.clock.now();
        self.live.iter_mut().for_each(|live| live.machine.note_heard(now));
        self.filling.note_heard(now);
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
