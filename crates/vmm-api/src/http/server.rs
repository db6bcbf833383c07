//! The API thread.

use crate::command::{ApiRequest, Command, Endpoint, Incoming, Outcome, ReplySlot};
use crate::config::UnknownFields;
use crate::error::{ApiError, Code};
use crate::http::board::{Board, Posted};
use crate::http::connection::{Connection, Step};
use crate::http::counts::{Counts, UNKNOWN};
use crate::http::parser::{Limits, Manner, Request};
use crate::http::response::{answer, refusal, status, stream_head};
use crate::http::route::{Misrouted, ROOT, route, stream_route};
use crate::http::socket::ApiSocket;
use crate::http::stream::{Query, Stream, StreamRoute, Streams};
use std::collections::HashMap;
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use vmm_device_model::limiter::Limiter;
use vmm_epoll::{Inbox, Mailbox, mailbox};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

const LISTENER: u64 = 0;
const INBOX: u64 = 1;
const READY: u64 = 2;
const FIRST_CLIENT: u64 = 3;

/// Bytes received at one time.
const RECEIVE_SIZE: usize = 64 * 1024;

/// How long no connection is accepted after accepting one failed (out of descriptors, out of memory).
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// The bounds of the server.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Bytes of one request.
    pub limits: Limits,
    /// Connections that are open at one time. Further ones wait in the kernel's queue.
    pub max_connections: usize,
    /// Streams that are open at one time. Fewer than the connections: whoever reads streams keeps nobody out.
    pub max_streams: usize,
    /// Descriptors that may come with one request.
    pub max_descriptors: usize,
    /// Time for a request to arrive after its first byte, and for an answer to be taken.
    pub request_timeout: Duration,
    /// Time a connection may be idle.
    pub idle_timeout: Duration,
    /// When all connections are in use, one that was idle for this long gives way to a new one.
    pub eviction_age: Duration,
    /// Time for the last answers when the server is stopped.
    pub stop_grace: Duration,
    /// What happens to fields nobody knows, in configurations.
    pub unknown_fields: UnknownFields,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            limits: Limits::default(),
            max_connections: 256,
            max_streams: 64,
            max_descriptors: 64,
            request_timeout: Duration::from_secs(30),
            idle_timeout: Duration::from_secs(300),
            eviction_age: Duration::from_secs(1),
            stop_grace: Duration::from_secs(1),
            unknown_fields: UnknownFields::Refuse,
        }
    }
}

/// The server cannot be set up.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what} for the API server")]
pub struct ServerError {
    what: &'static str,
    #[source]
    source: io::Error,
}

/// The API server of a host `H`. Everything that can fail is done before its thread starts.
pub struct Server<H: 'static> {
    config: Config,
    table: &'static [Endpoint<H>],
    streams: Streams,
    boards: Vec<Box<dyn Posted>>,
    requests: Mailbox<ApiRequest<H>>,
    counts: Arc<Counts>,
    notes: Mailbox<Note>,
    inbox: Inbox<Note>,
    epoll: Epoll,
    door: Option<Door>,
    clients: HashMap<u64, Connection>,
    next_client: u64,
    /// Set once the server is to end: when, at the latest.
    ends_at: Option<Instant>,
}

/// The listening socket.
#[derive(Debug)]
struct Door {
    socket: ApiSocket,
    state: DoorState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum DoorState {
    /// Watched.
    Open,
    /// All places are taken. Looked at again when one is free, when a client becomes idle, or when one is idle enough.
    Full { evictable: Option<Instant> },
    /// Accepting failed; not looked at before then.
    Resting { until: Instant },
}

/// What other threads tell the server.
enum Note {
    Reply { client: u64, outcome: Outcome },
    Stop,
}

/// A running server.
#[derive(Debug)]
pub struct ServerHandle {
    notes: Mailbox<Note>,
    thread: Option<JoinHandle<()>>,
}

impl ServerHandle {
    /// Ends the server: answers given before this call are still sent, for a bounded time; the socket's file goes.
    ///
    /// Requests that the host has taken but not answered go without an answer; drop the host's inbox first, and they
    /// are answered with an error.
    pub fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        let _ = self.notes.send(Note::Stop);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the API thread has panicked");
        }
    }
}

impl Drop for ServerHandle {
    fn drop(&mut self) {
        self.end();
    }
}

impl<H: 'static> Server<H> {
    /// A server on `socket` that posts requests for `table`'s commands to `requests`.
    ///
    /// # Errors
    /// A kernel object cannot be made.
    pub fn new(
        socket: ApiSocket,
        table: &'static [Endpoint<H>],
        requests: Mailbox<ApiRequest<H>>,
        config: Config,
    ) -> Result<Self, ServerError> {
        let fail = |what| move |source| ServerError { what, source };
        let (notes, inbox) = mailbox().map_err(fail("create a mailbox"))?;
        let epoll = Epoll::new().map_err(fail("create an epoll instance"))?;
        watch(&epoll, socket.listener().as_raw_fd(), LISTENER).map_err(fail("watch the socket"))?;
        watch(&epoll, inbox.as_raw_fd(), INBOX).map_err(fail("watch a mailbox"))?;
        let ready = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(fail("create an eventfd"))?;
        watch(&epoll, ready.as_raw_fd(), READY).map_err(fail("watch an eventfd"))?;
        Ok(Self {
            config,
            table,
            streams: Streams { routes: Vec::new(), ready: Arc::new(ready) },
            boards: Vec::new(),
            requests,
            counts: Arc::default(),
            notes,
            inbox,
            epoll,
            door: Some(Door { socket, state: DoorState::Open }),
            clients: HashMap::new(),
            next_client: FIRST_CLIENT,
            ends_at: None,
        })
    }

    /// Where it counts its answers.
    #[must_use]
    pub fn counts(&self) -> Arc<Counts> {
        Arc::clone(&self.counts)
    }

    /// The server has a stream, too.
    #[must_use]
    pub fn with_stream(mut self, stream: impl StreamRoute + 'static) -> Self {
        self.streams.routes.push(Box::new(stream));
        self
    }

    /// The server answers `C` from a board, where the host has posted its answer. `C` takes nothing.
    #[must_use]
    pub fn with_board<C: Command<Request = (), Reply: Sync>>(mut self, board: Board<C>) -> Self {
        self.boards.push(Box::new(board));
        self
    }

    /// Starts the thread `http-server`, which calls `prologue` first (to confine itself, for instance), and serves only
    /// if that succeeds.
    ///
    /// # Errors
    /// The thread cannot be started, or its prologue failed.
    pub fn start(
        self,
        prologue: impl FnOnce() -> io::Result<()> + Send + 'static,
    ) -> Result<ServerHandle, ServerError> {
        let notes = self.notes.clone();
        let (begun, verdict) = sync_channel(1);
        let thread = thread::Builder::new().name("http-server".to_owned()).spawn(move || {
            let may = prologue();
            let goes_on = may.is_ok();
            // The channel has room for it, and the caller waits.
            let _ = begun.send(may);
            if goes_on {
                self.run();
            }
        });
        let thread = thread.map_err(|source| ServerError { what: "start the thread", source })?;
        // Without a verdict the thread has ended, by a panic that was reported.
        let may = verdict.recv().unwrap_or_else(|_| Err(io::ErrorKind::BrokenPipe.into()));
        if let Err(source) = may {
            let _ = thread.join();
            return Err(ServerError { what: "prepare the thread", source });
        }
        Ok(ServerHandle { notes, thread: Some(thread) })
    }

    fn run(mut self) {
        let mut events = [EpollEvent::default(); 64];
        let mut buffer = vec![0; RECEIVE_SIZE];
        while !self.is_done(Instant::now()) {
            let timeout = self.timeout(Instant::now());
            let count = match self.epoll.wait(timeout, &mut events) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
                Err(error) => return log::error!("the API server ends: cannot wait for events: {error}"),
            };
            let now = Instant::now();
            for event in events.iter().take(count) {
                match event.data() {
                    LISTENER => self.accept(now),
                    INBOX => self.read_notes(now),
                    READY => self.feed_streams(now),
                    client => self.on_client(client, event.event_set(), &mut buffer, now),
                }
            }
            self.expire(now);
            self.reopen(now);
        }
    }

    fn is_done(&self, now: Instant) -> bool {
        self.ends_at.is_some_and(|end| now >= end || !self.clients.values().any(Connection::owes))
    }

    /// Milliseconds until the next deadline, rounded up; -1 for none.
    fn timeout(&self, now: Instant) -> i32 {
        let clients = self.clients.values().filter_map(|client| client.deadline(&self.config));
        let door = self.door.as_ref().and_then(|door| match door.state {
            DoorState::Open => None,
            DoorState::Full { evictable } => evictable,
            DoorState::Resting { until } => Some(until),
        });
        let Some(next) = clients.chain(door).chain(self.ends_at).min() else { return -1 };
        let millis = next.saturating_duration_since(now).as_micros().div_ceil(1000);
        i32::try_from(millis).unwrap_or(i32::MAX)
    }

    fn on_client(&mut self, id: u64, events: EventSet, buffer: &mut [u8], now: Instant) {
        // A stale event of a client that was dropped in this very turn finds nobody.
        let Some(client) = self.clients.get_mut(&id) else { return };
        let hung_up = events.intersects(EventSet::HANG_UP | EventSet::ERROR);
        if client.parked().is_some() {
            // What it sends has to wait; if it has gone, so does its answer.
            return if hung_up { self.drop_client(id) } else { self.watch_client(id, EventSet::empty()) };
        }
        if events.contains(EventSet::IN) {
            if client.receive(buffer, now).is_err() {
                return self.drop_client(id);
            }
        } else if hung_up {
            return self.drop_client(id);
        }
        self.advance(id, now);
    }

    /// Takes the client as far as it goes without waiting.
    fn advance(&mut self, id: u64, now: Instant) {
        while let Some(client) = self.clients.get_mut(&id) {
            match client.step(&self.streams.ready, now) {
                Step::Wait => return self.rewatch(id),
                Step::Close => return self.drop_client(id),
                Step::Request(request, fds) => self.start_request(id, request, fds, now),
            }
        }
    }

    fn start_request(&mut self, id: u64, request: Request, fds: Vec<OwnedFd>, now: Instant) {
        let manner = request.manner;
        match stream_route(&self.streams.routes, manner.verb, &request.path) {
            Ok(None) => {}
            Ok(Some(stream)) => {
                let opened = self.open_stream(stream, &request.query);
                let status = opened.as_ref().map_or_else(|error| error.code.status(), |_| 200);
                self.counts.count(stream.name(), status);
                return self.start_stream(id, opened, manner, now);
            }
            Err(misrouted) => return self.refuse(id, &request.path, &misrouted, manner, now),
        }
        match route(self.table, manner.verb, &request.path) {
            Ok(endpoint) => {
                log::debug!("API request {}", endpoint.name());
                let board = self.boards.iter().find(|board| board.name() == endpoint.name());
                if let Some(body) = board.and_then(|board| board.look()) {
                    return self.finish(id, endpoint.name(), &Ok(body), manner, now);
                }
                let (notes, counts, name) = (self.notes.clone(), Arc::clone(&self.counts), endpoint.name());
                let slot = ReplySlot::new(move |outcome| {
                    counts.count(name, status(&outcome));
                    // The server may have ended; then nobody waits.
                    let _ = notes.send(Note::Reply { client: id, outcome });
                });
                let incoming =
                    Incoming { body: request.body, fds, unknown_fields: self.config.unknown_fields };
                if let Some(prepared) = endpoint.prepare(incoming, slot) {
                    // If the host has gone, dropping the request answers it.
                    let _ = self.requests.send(prepared);
                }
            }
            Err(misrouted) => self.refuse(id, &request.path, &misrouted, manner, now),
        }
    }

    /// Answers a request that the host was not asked.
    fn finish(&mut self, id: u64, name: &'static str, outcome: &Outcome, manner: Manner, now: Instant) {
        self.counts.count(name, status(outcome));
        if let Some(client) = self.clients.get_mut(&id) {
            client.finish(answer(outcome, manner), manner, now);
        }
    }

    fn refuse(&mut self, id: u64, path: &str, misrouted: &Misrouted, manner: Manner, now: Instant) {
        log::debug!("API request refused: {}", misrouted.error);
        let name = path.strip_prefix(ROOT).unwrap_or_default();
        let streams = self.streams.routes.iter().map(|stream| stream.name());
        let known = self.table.iter().map(Endpoint::name).chain(streams).find(|known| *known == name);
        self.counts.count(known.unwrap_or(UNKNOWN), misrouted.error.code.status());
        if let Some(client) = self.clients.get_mut(&id) {
            client.finish(refusal(&misrouted.error, manner, &misrouted.allow), manner, now);
        }
    }

    /// The head and the stream of an answer that goes on.
    fn open_stream(
        &self,
        route: &dyn StreamRoute,
        query: &str,
    ) -> Result<(Vec<u8>, Box<dyn Stream>), ApiError> {
        log::debug!("API request {}", route.name());
        let most = self.config.max_streams;
        if self.clients.values().filter(|client| client.is_streaming()).count() >= most {
            return Err(ApiError::new(Code::TooManyStreams, format!("{most} streams are open already")));
        }
        Ok((stream_head(route.media_type()), route.open(Query(query))?))
    }

    fn start_stream(
        &mut self,
        id: u64,
        opened: Result<(Vec<u8>, Box<dyn Stream>), ApiError>,
        manner: Manner,
        now: Instant,
    ) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        match opened {
            Err(error) => client.finish(refusal(&error, manner, &[]), manner, now),
            Ok((head, stream)) => {
                if !client.stream(head, stream, now) {
                    self.drop_client(id);
                }
            }
        }
    }

    /// A stream that had nothing has something; which one is not known.
    fn feed_streams(&mut self, now: Instant) {
        let _ = self.streams.ready.read();
        let streaming = self.clients.iter().filter(|(_, client)| client.is_streaming());
        let ids: Vec<u64> = streaming.map(|(id, _)| *id).collect();
        for id in ids {
            self.advance(id, now);
        }
    }

    fn read_notes(&mut self, now: Instant) {
        for note in self.inbox.take_all() {
            match note {
                Note::Reply { client, outcome } => self.reply(client, &outcome, now),
                Note::Stop => {
                    self.ends_at = Some(now.checked_add(self.config.stop_grace).unwrap_or(now));
                    self.door = None;
                    // What was told before is still sent.
                    self.feed_streams(now);
                }
            }
        }
    }

    fn reply(&mut self, id: u64, outcome: &Outcome, now: Instant) {
        // A client that has gone costs nothing but its answer.
        let Some(client) = self.clients.get_mut(&id) else { return };
        let Some(manner) = client.parked() else { return };
        client.finish(answer(outcome, manner), manner, now);
        self.advance(id, now);
    }

    /// Accepts one client: the event tells of at least one, and is told again if there are more.
    fn accept(&mut self, now: Instant) {
        if self.clients.len() >= self.config.max_connections && !self.make_room(now) {
            return;
        }
        let Some(door) = self.door.as_mut() else { return };
        match door.socket.listener().accept() {
            Ok((stream, _)) => self.admit(stream, now),
            Err(error) if is_passing(&error) => {}
            Err(error) => {
                // As often as clients come while there are no descriptors.
                static TOLD: Limiter = Limiter::for_guest();
                if let Some(admitted) = TOLD.admit(now) {
                    log::warn!("cannot accept an API connection: {error}{admitted}");
                }
                self.close_door(rest(now));
            }
        }
    }

    fn admit(&mut self, stream: std::os::unix::net::UnixStream, now: Instant) {
        let id = self.next_client;
        let watched = stream.set_nonblocking(true).and_then(|()| watch(&self.epoll, stream.as_raw_fd(), id));
        if let Err(error) = watched {
            return log::warn!("cannot watch an API connection: {error}");
        }
        self.next_client = self.next_client.saturating_add(1);
        self.clients.insert(id, Connection::new(stream, &self.config, Arc::clone(&self.counts), now));
    }

    /// All places are taken: the connection idle for longest gives way if it was idle long enough. Otherwise the door
    /// is closed until one can.
    fn make_room(&mut self, now: Instant) -> bool {
        let idle = self.clients.iter().filter_map(|(id, client)| Some((client.idle_since()?, *id)));
        let Some((since, id)) = idle.min() else {
            self.close_door(DoorState::Full { evictable: None });
            return false;
        };
        let evictable = since.checked_add(self.config.eviction_age);
        if evictable.is_some_and(|at| at <= now) {
            self.drop_client(id);
            return true;
        }
        self.close_door(DoorState::Full { evictable });
        false
    }

    fn close_door(&mut self, state: DoorState) {
        if let Some(door) = self.door.as_mut() {
            let fd = door.socket.listener().as_raw_fd();
            if self.epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default()).is_ok() {
                door.state = state;
            }
        }
    }

    /// Watches the door again when there is a reason to.
    fn reopen(&mut self, now: Instant) {
        let Some(door) = self.door.as_mut() else { return };
        let free = || self.clients.len() < self.config.max_connections;
        let due = match door.state {
            DoorState::Open => false,
            DoorState::Resting { until } => until <= now,
            DoorState::Full { evictable: Some(at) } => at <= now || free(),
            DoorState::Full { evictable: None } => {
                free() || self.clients.values().any(|client| client.idle_since().is_some())
            }
        };
        if due {
            let watched = watch(&self.epoll, door.socket.listener().as_raw_fd(), LISTENER);
            door.state = if watched.is_ok() { DoorState::Open } else { rest(now) };
        }
    }

    fn expire(&mut self, now: Instant) {
        let config = self.config;
        let due = |client: &Connection| client.deadline(&config).is_some_and(|deadline| deadline <= now);
        let expired: Vec<u64> =
            self.clients.iter().filter(|(_, client)| due(client)).map(|(id, _)| *id).collect();
        for id in expired {
            if self.clients.get_mut(&id).is_some_and(|client| client.expire(now)) {
                self.advance(id, now);
            } else {
                self.drop_client(id);
            }
        }
    }

    fn rewatch(&mut self, id: u64) {
        if let Some(client) = self.clients.get(&id) {
            self.watch_client(id, client.interest());
        }
    }

    fn watch_client(&mut self, id: u64, wanted: EventSet) {
        let Some(client) = self.clients.get_mut(&id).filter(|client| client.watched != wanted) else {
            return;
        };
        client.watched = wanted;
        let fd = client.stream.as_raw_fd();
        if self.epoll.ctl(ControlOperation::Modify, fd, EpollEvent::new(wanted, id)).is_err() {
            self.drop_client(id);
        }
    }

    /// Closing the socket takes it out of the epoll instance; nobody else has its descriptor.
    fn drop_client(&mut self, id: u64) {
        self.clients.remove(&id);
    }
}

/// Whether accepting failed only for this once.
fn is_passing(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, Interrupted, WouldBlock};
    matches!(error.kind(), ConnectionAborted | Interrupted | WouldBlock)
}

fn rest(now: Instant) -> DoorState {
    DoorState::Resting { until: now.checked_add(ACCEPT_PAUSE).unwrap_or(now) }
}

fn watch(epoll: &Epoll, fd: RawFd, token: u64) -> io::Result<()> {
    epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, token))
}

impl<H> fmt::Debug for Server<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server").field("config", &self.config).finish_non_exhaustive()
    }
}
