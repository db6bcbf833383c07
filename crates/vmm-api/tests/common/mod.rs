//! A server with a toy host behind it, and a client that speaks raw bytes.
#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code; each test file uses a part"
)]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;
use vmm_api::client::Client;
use vmm_api::command::{ApiRequest, Command, Endpoint, Handle, Host, Replier};
use vmm_api::commands::{COUNT, device, table, vm, vmm};
use vmm_api::config::{RestoreConfig, SendMigrationData, VmSnapshotConfig};
use vmm_api::error::{ApiError, Code};
use vmm_api::events::{EventRoute, Journal};
use vmm_api::http::{ApiSocket, Board, Config, Counts, Server, ServerHandle};
use vmm_api::info::{PingReply, VmInfo, VmState};
use vmm_epoll::{ControlLoop, Mailbox, Stopper, mailbox};
use vmm_state::{Phase, VmSlot};

/// A VMM without a machine. What `vm.boot` does is the guest's command line: `slow` parks `vm.boot` until [`Rig::release`],
/// `until PATH` keeps the host's thread until the file is there.
#[derive(Default)]
pub(crate) struct Toy {
    slot: VmSlot<vm::CreateRequest, ()>,
    parked: Vec<Replier<()>>,
    waiting: Vec<ApiRequest<Self>>,
    board: Board<vm::Info>,
    ends: bool,
}

impl Host for Toy {
    fn phase(&self) -> Phase {
        self.slot.phase()
    }

    /// It waits as long as a parked boot does.
    fn park(&mut self, request: ApiRequest<Self>) {
        self.waiting.push(request);
    }

    fn publish(&mut self) {
        self.board.post(self.info());
    }
}

impl Handle<vmm::Ping> for Toy {
    fn handle(&mut self, _: (), replier: Replier<PingReply>) {
        let version = "1.2.3".to_owned();
        let features = vec!["toy".to_owned()];
        replier.reply(Ok(PingReply { build_version: version.clone(), version, pid: 42, features }));
    }
}

impl Handle<vmm::Shutdown> for Toy {
    fn handle(&mut self, _: (), replier: Replier<()>) {
        replier.reply(Ok(()));
        self.ends = true;
    }
}

impl Handle<vm::Create> for Toy {
    fn handle(&mut self, request: vm::CreateRequest, replier: Replier<()>) {
        self.slot.create(request).unwrap();
        replier.reply(Ok(()));
    }
}

impl Handle<vm::Boot> for Toy {
    fn handle(&mut self, _: (), replier: Replier<()>) {
        if self.slot.phase() == Phase::Paused {
            self.slot.resume().unwrap();
            return replier.reply(Ok(()));
        }
        let payload = self.slot.config().unwrap().config.payload.as_ref();
        let command_line = payload.and_then(|payload| payload.cmdline.as_deref()).unwrap_or_default();
        if command_line == "fails" {
            return replier.reply(Err(ApiError::new(Code::BootFailed, "no kernel").context("cannot boot")));
        }
        if let Some(path) = command_line.strip_prefix("until ") {
            while !std::path::Path::new(path).exists() {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        if command_line == "slow" {
            self.slot.begin_boot().unwrap();
            return self.parked.push(replier);
        }
        if command_line == "forgets" {
            return drop(replier);
        }
        self.start();
        replier.reply(Ok(()));
    }
}

impl Toy {
    fn info(&self) -> Option<VmInfo> {
        let request = self.slot.config()?;
        Some(VmInfo {
            config: request.config.clone().into(),
            state: VmState::from_phase(self.slot.phase())?,
            memory_actual_size: request.fds.len() as u64,
            device_tree: None,
            phase: self.slot.phase().to_string(),
            boots: 1,
            last_guest_event: None,
            restored_from: None,
        })
    }

    fn start(&mut self) {
        self.slot.begin_boot().unwrap();
        self.slot.start(()).unwrap();
    }
}

/// What the toy does not do.
macro_rules! refuse {
    ($($command:ty),+) => {$(
        impl Handle<$command> for Toy {
            fn handle(&mut self, _: <$command as Command>::Request, replier: Replier<<$command as Command>::Reply>) {
                replier.reply(Err(ApiError::new(Code::Internal, "a toy does not do that")));
            }
        }
    )+};
}

refuse!(vmm::OpenApi, vmm::Metrics, vmm::LogLevel, vmm::SetLogLevel);
refuse!(vm::Cancel, vm::ReceiveMigration, vm::MigrationProgress, vm::MigrationKeep, vm::MigrationYield);

/// Nobody ever receives a toy.
impl Handle<vm::SendMigration> for Toy {
    fn handle(&mut self, _: SendMigrationData, replier: Replier<()>) {
        replier.reply(Err(ApiError::new(Code::MigrationFailed, "nobody is there")));
    }
}

refuse!(vm::Validate, vm::Counters, vm::BootTrace, vm::PowerButton, vm::Nmi);
refuse!(device::AddDevice, device::AddUserDevice, device::AddDisk, device::AddFs);
refuse!(device::AddGenericVhostUser, device::AddPmem, device::AddNet, device::AddVdpa);
refuse!(device::AddVsock, device::RemoveDevice);

/// It cannot, is cancelled, or is one too many, by the name of the folder.
impl Handle<vm::Snapshot> for Toy {
    fn handle(&mut self, request: VmSnapshotConfig, replier: Replier<()>) {
        let code = match request.destination_url.rsplit('/').next() {
            Some("cancelled") => Code::Cancelled,
            Some("crowded") => Code::TooManyRequests,
            _ => Code::SnapshotFailed,
        };
        replier.reply(Err(ApiError::new(code, "a toy has no state")));
    }
}

impl Handle<vm::Restore> for Toy {
    fn handle(&mut self, request: RestoreConfig, replier: Replier<()>) {
        let missing = request.source_url.ends_with("missing");
        let code = if missing { Code::NoSnapshot } else { Code::RestoreFailed };
        replier.reply(Err(ApiError::new(code, "a toy has no state")));
    }
}

/// It tells the number of descriptors as the size of memory.
impl Handle<vm::Info> for Toy {
    fn handle(&mut self, _: (), replier: Replier<VmInfo>) {
        replier.reply(Ok(self.info().unwrap()));
    }
}

impl Handle<vm::Shutdown> for Toy {
    fn handle(&mut self, _: (), replier: Replier<()>) {
        self.slot.stop().unwrap();
        replier.reply(Ok(()));
    }
}

impl Handle<vm::Reboot> for Toy {
    fn handle(&mut self, _: (), replier: Replier<()>) {
        self.slot.stop().unwrap();
        self.start();
        replier.reply(Ok(()));
    }
}

impl Handle<vm::Delete> for Toy {
    fn handle(&mut self, _: (), replier: Replier<()>) {
        self.slot.clear();
        replier.reply(Ok(()));
    }
}

impl Handle<vm::Pause> for Toy {
    fn handle(&mut self, _: (), replier: Replier<()>) {
        self.slot.pause().unwrap();
        replier.reply(Ok(()));
    }
}

impl Handle<vm::Resume> for Toy {
    fn handle(&mut self, _: (), replier: Replier<()>) {
        self.slot.resume().unwrap();
        replier.reply(Ok(()));
    }
}

pub(crate) static TABLE: [Endpoint<Toy>; COUNT] = table();

/// A configuration whose boot does `word`.
pub(crate) fn config(word: &str) -> String {
    format!(r#"{{"payload": {{"kernel": "/k", "cmdline": "{word}"}}}}"#)
}

/// A running server and its host.
pub(crate) struct Rig {
    pub(crate) path: PathBuf,
    folder: Option<tempfile::TempDir>,
    server: Option<ServerHandle>,
    host: Option<JoinHandle<()>>,
    stopper: Stopper,
    pub(crate) counts: Arc<Counts>,
    releases: Mailbox<()>,
    /// What `vmm.events` streams.
    pub(crate) journal: Journal,
}

impl Rig {
    pub(crate) fn new(config: Config) -> Self {
        Self::with_journal(config, Journal::default())
    }

    pub(crate) fn with_journal(config: Config, journal: Journal) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("api.sock");
        let (requests, inbox) = mailbox::<ApiRequest<Toy>>().unwrap();
        let (releases, release_inbox) = mailbox::<()>().unwrap();
        let (stoppers, stopper) = mpsc::channel();
        let board = Board::new();
        let toy = Toy { board: board.clone(), ..Toy::default() };
        let host = std::thread::spawn(move || {
            let mut control_loop = ControlLoop::new(toy).unwrap();
            control_loop.control(|_, control| {
                control
                    .add_mailbox("api", inbox, |toy: &mut Toy, control, request| {
                        request.dispatch(toy);
                        if toy.ends {
                            control.stop();
                        }
                        Ok(())
                    })
                    .unwrap();
                control
                    .add_mailbox("release", release_inbox, |toy: &mut Toy, _, ()| {
                        toy.slot.start(()).unwrap();
                        toy.publish();
                        toy.parked.drain(..).for_each(|replier| replier.reply(Ok(())));
                        std::mem::take(&mut toy.waiting)
                            .into_iter()
                            .for_each(|request| request.dispatch(toy));
                        Ok(())
                    })
                    .unwrap();
            });
            stoppers.send(control_loop.stopper()).unwrap();
            control_loop.run().unwrap();
        });
        let socket = ApiSocket::bind(&path).unwrap();
        let server = Server::new(socket, &TABLE, requests, config).unwrap();
        let server = server.with_stream(EventRoute(journal.clone())).with_board(board);
        let counts = server.counts();
        let server = server.start(|| Ok(())).unwrap();
        let stopper = stopper.recv().unwrap();
        let (folder, server, host) = (Some(folder), Some(server), Some(host));
        Self { path, folder, server, host, stopper, counts, releases, journal }
    }

    pub(crate) fn client(&self) -> Client {
        let mut client = Client::connect(&self.path).unwrap();
        client.set_timeout(Some(Duration::from_secs(20))).unwrap();
        client
    }

    pub(crate) fn wire(&self) -> Wire {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        Wire { stream, buffer: Vec::new() }
    }

    /// Ends a parked boot.
    pub(crate) fn release(&self) {
        self.releases.send(()).unwrap();
    }

    /// Waits for the host to end by itself or ends it; the server goes on.
    pub(crate) fn end_host(&mut self) {
        self.stopper.stop();
        self.join_host();
    }

    pub(crate) fn join_host(&mut self) {
        if let Some(host) = self.host.take() {
            host.join().unwrap();
        }
    }

    pub(crate) fn stop_server(&mut self) {
        self.server.take().unwrap().stop();
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.end_host();
        self.server.take();
        self.folder.take();
    }
}

/// An answer in its parts.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: String,
}

/// Raw bytes to and from the server.
pub(crate) struct Wire {
    pub(crate) stream: UnixStream,
    buffer: Vec<u8>,
}

impl Wire {
    pub(crate) fn send(&mut self, text: &str) {
        self.stream.write_all(text.as_bytes()).unwrap();
    }

    /// One request without a body, and its answer.
    pub(crate) fn ask(&mut self, method: &str, name: &str) -> Answer {
        self.send(&format!("{method} /api/v1/{name} HTTP/1.1\r\n\r\n"));
        self.answer()
    }

    pub(crate) fn ask_with(&mut self, method: &str, name: &str, body: &str) -> Answer {
        let length = body.len();
        self.send(&format!("{method} /api/v1/{name} HTTP/1.1\r\nContent-Length: {length}\r\n\r\n{body}"));
        self.answer()
    }

    /// The next answer. Its length is found as an existing client finds it: by the very spelling.
    pub(crate) fn answer(&mut self) -> Answer {
        let head_end = loop {
            match self.buffer.windows(4).position(|window| window == b"\r\n\r\n") {
                Some(at) => break at + 4,
                None => assert!(self.fill() > 0, "closed before an answer"),
            }
        };
        let head = String::from_utf8(self.buffer.drain(..head_end).collect()).unwrap();
        let length = head
            .split_once("Content-Length: ")
            .map_or(0, |(_, rest)| rest.split_once("\r\n").unwrap().0.parse().unwrap());
        while self.buffer.len() < length {
            assert!(self.fill() > 0, "closed in the middle of an answer");
        }
        let body = String::from_utf8(self.buffer.drain(..length).collect()).unwrap();
        Answer { status: head["HTTP/1.1 ".len()..][..3].parse().unwrap(), head, body }
    }

    /// The server has closed, after everything was read.
    pub(crate) fn assert_closed(&mut self) {
        assert_eq!(self.fill(), 0, "{:?}", String::from_utf8_lossy(&self.buffer));
    }

    fn fill(&mut self) -> usize {
        let mut bytes = [0; 4096];
        // A reset tells the same as an end.
        let count = match self.stream.read(&mut bytes) {
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => 0,
            other => other.unwrap(),
        };
        self.buffer.extend_from_slice(&bytes[..count]);
        count
    }
}

impl Wire {
    /// Whether another answer came; what is left of one at the end does not count.
    pub(crate) fn answer_or_end(&mut self) -> bool {
        let before = self.buffer.len();
        if self.fill() == 0 {
            return false;
        }
        assert!(self.buffer.len() > before);
        self.buffer.clear();
        true
    }
}
