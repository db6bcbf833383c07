//! The server, fed with bytes and descriptors in pieces, against a model of what it must do with them.

use std::fs::File;
use std::io::Read;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vmm_api::command::{
    ApiRequest, Command, Decode, Encode, Endpoint, Handle, Host, Incoming, JSON, Method, Replier,
};
use vmm_api::commands::vmm;
use vmm_api::error::{ApiError, Code};
use vmm_api::http::parser::{Parser, Progress, Request, Verb};
use vmm_api::http::{ApiSocket, Config, Server, ServerHandle};
use vmm_api::info::PingReply;
use vmm_api::openapi::{Components, Described, Form};
use vmm_epoll::{ControlLoop, mailbox};
use vmm_state::{Action, Phase};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Most bytes of one stream.
const MOST_BYTES: usize = 32 * 1024;
/// Most descriptors of one stream: those on their way count against the sender's limit.
const MOST_DESCRIPTORS: usize = 512;
/// Sizes of pieces, and numbers of descriptors that come with one; a control byte picks of each.
const SIZES: [usize; 8] = [1, 2, 5, 16, 40, 100, 1000, 30_000];
const COUNTS: [usize; 8] = [0, 0, 0, 1, 2, 20, 45, 65];
/// How long anything may take. Only failures wait for it.
const LIMIT: Duration = Duration::from_secs(20);

/// A body and the descriptors that came with it, by the inode of their file.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Taken {
    body: Vec<u8>,
    inodes: Vec<u64>,
}

/// The command that takes descriptors.
enum Take {}

impl Command for Take {
    type Request = Taken;
    type Reply = Taken;
    const NAME: &'static str = "vm.take";
    const METHOD: Method = Method::Put;
    const ACTION: Action = Action::Ping;
    const DOC: &'static str = "Takes descriptors.";
}

impl Decode for Taken {
    fn decode(incoming: Incoming) -> Result<Self, ApiError> {
        if incoming.body.starts_with(b"!") {
            return Err(ApiError::new(Code::MalformedBody, "as was asked for"));
        }
        let inode = |fd| File::from(fd).metadata().unwrap().ino();
        Ok(Self { body: incoming.body, inodes: incoming.fds.into_iter().map(inode).collect() })
    }
}

impl Encode for Taken {
    const MEDIA_TYPE: &'static str = JSON;

    fn encode(&self) -> Result<Vec<u8>, ApiError> {
        Ok(json!(self.inodes).to_string().into_bytes())
    }
}

impl Described for Taken {
    fn form(_components: &mut Components) -> Form {
        Form::Nothing
    }
}

/// What the host was handed since it was last looked at.
static SEEN: Mutex<Vec<Taken>> = Mutex::new(Vec::new());

struct Toy;

impl Host for Toy {
    fn phase(&self) -> Phase {
        Phase::Empty
    }

    fn park(&mut self, _: ApiRequest<Self>) {}

    fn publish(&mut self) {}
}

impl Handle<Take> for Toy {
    fn handle(&mut self, request: Taken, replier: Replier<Taken>) {
        SEEN.lock().unwrap().push(request.clone());
        // One that is dropped is answered, too.
        if !request.body.starts_with(b"drop") {
            replier.reply(Ok(request));
        }
    }
}

impl Handle<vmm::Ping> for Toy {
    fn handle(&mut self, _: (), replier: Replier<PingReply>) {
        let version = "1".to_owned();
        replier.reply(Ok(PingReply {
            build_version: version.clone(),
            version,
            pid: 1,
            features: Vec::new(),
        }));
    }
}

static TABLE: [Endpoint<Toy>; 2] = [Endpoint::of::<vmm::Ping>(), Endpoint::of::<Take>()];

/// A server that serves the whole process, and files to send.
struct Rig {
    folder: tempfile::TempDir,
    files: Vec<File>,
    _server: ServerHandle,
    /// Descriptors of this process with no client.
    floor: usize,
}

static RIG: LazyLock<Mutex<Rig>> = LazyLock::new(|| {
    let folder = tempfile::tempdir().unwrap();
    let files = (0..8).map(|_| tempfile::tempfile().unwrap()).collect();
    let (requests, inbox) = mailbox::<ApiRequest<Toy>>().unwrap();
    let (ready, is_ready) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut control_loop = ControlLoop::new(Toy).unwrap();
        control_loop.control(|_, control| {
            let dispatch = |toy: &mut Toy, _: &mut vmm_epoll::Control<'_, Toy>, request: ApiRequest<Toy>| {
                request.dispatch(toy);
                Ok(())
            };
            control.add_mailbox("api", inbox, dispatch).unwrap();
        });
        ready.send(()).unwrap();
        control_loop.run().unwrap();
    });
    is_ready.recv().unwrap();
    let socket = ApiSocket::bind(&folder.path().join("socket")).unwrap();
    let server = Server::new(socket, &TABLE, requests, Config::default()).unwrap().start(|| Ok(())).unwrap();
    Mutex::new(Rig { folder, files, _server: server, floor: descriptors() })
});

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// One message: bytes, and the indices of the files whose descriptors come with them.
struct Piece<'a> {
    bytes: &'a [u8],
    files: Vec<usize>,
}

/// The input's first byte is the number of control bytes, which follow and say how the rest is sent.
fn pieces<'a>(input: &'a [u8], files: usize) -> Vec<Piece<'a>> {
    let (count, rest) = input.split_first().map_or((0, input), |(count, rest)| (usize::from(*count), rest));
    let (controls, stream) = rest.split_at(count.min(rest.len()));
    let mut stream = &stream[..stream.len().min(MOST_BYTES)];
    let (mut pieces, mut sent) = (Vec::new(), 0);
    let whole = [7];
    for control in if controls.is_empty() { whole.iter().cycle() } else { controls.iter().cycle() } {
        if stream.is_empty() {
            break;
        }
        let control = usize::from(*control);
        let (bytes, rest) = stream.split_at(SIZES[control % 8].min(stream.len()));
        let count = COUNTS[control / 8 % 8].min(MOST_DESCRIPTORS - sent);
        pieces.push(Piece { bytes, files: (sent..sent + count).map(|index| index % files).collect() });
        sent += count;
        stream = rest;
    }
    pieces
}

/// An answer as it must be.
#[derive(Debug)]
struct Expected {
    /// Any of these.
    status: &'static [u16],
    /// Its request was HEAD.
    bodiless: bool,
    /// What the host was handed for it.
    taken: Option<Taken>,
}

/// What the server must do with `pieces`: descriptors belong to the request that has the last byte they came with.
fn model(pieces: &[Piece<'_>], inodes: &[u64]) -> Vec<Expected> {
    let config = Config::default();
    let mut parser = Parser::new(config.limits);
    let mut waiting: Vec<(u64, u64)> = Vec::new();
    let mut expected = Vec::new();
    let refused = |status, bodiless| Expected { status, bodiless, taken: None };
    for piece in pieces {
        parser.push(piece.bytes);
        let received = parser.received();
        waiting.extend(piece.files.iter().map(|index| (received, inodes[*index])));
        loop {
            match parser.poll() {
                Ok(Progress::Request(request)) => {
                    let count = waiting.iter().take_while(|(at, _)| *at <= request.end).count();
                    let own: Vec<u64> = waiting.drain(..count).map(|(_, inode)| inode).collect();
                    let head = request.manner.verb == Verb::Head;
                    if own.len() > config.max_descriptors {
                        expected.push(refused(&[400], head));
                        return expected;
                    }
                    let last = !request.manner.keep_alive;
                    expected.push(expect(request, own));
                    if last {
                        return expected;
                    }
                }
                Ok(Progress::Continue) => {}
                Ok(Progress::Incomplete) if waiting.len() > config.max_descriptors => {
                    expected.push(refused(&[400], false));
                    return expected;
                }
                Ok(Progress::Incomplete) => break,
                Err(unreadable) => {
                    let any = &[400, 411, 413, 417, 431, 501, 505];
                    assert!(any.contains(&unreadable.error.code.status()));
                    expected.push(refused(any, unreadable.manner.verb == Verb::Head));
                    return expected;
                }
            }
        }
    }
    expected
}

fn expect(request: Request, inodes: Vec<u64>) -> Expected {
    let verb = request.manner.verb;
    let taken = Taken { body: request.body, inodes };
    let (status, taken): (&[u16], _) = match (request.path.as_str(), verb) {
        ("/api/v1/vm.take", Verb::Put) if taken.body.starts_with(b"!") => (&[400], None),
        ("/api/v1/vm.take", Verb::Put) if taken.body.starts_with(b"drop") => (&[500], Some(taken)),
        ("/api/v1/vm.take", Verb::Put) | ("/api/v1/vmm.ping", Verb::Get) => {
            (&[200], (verb == Verb::Put).then_some(taken))
        }
        ("/api/v1/vm.take" | "/api/v1/vmm.ping", _) => (&[405], None),
        _ => (&[404, 405, 501], None),
    };
    Expected { status, bodiless: verb == Verb::Head, taken }
}

/// Takes one answer off `stream`: its status and body. `None` at the end.
fn answer(stream: &mut &[u8], bodiless: bool) -> Option<(u16, Vec<u8>)> {
    loop {
        if stream.is_empty() {
            return None;
        }
        let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
        let end = stream.windows(4).position(|window| window == b"\r\n\r\n");
        let end = end.unwrap_or_else(|| panic!("no end of a head in {:?}", text(stream)));
        let (head, rest) = stream.split_at(end + 4);
        *stream = rest;
        let head = text(head);
        let status: u16 = head.strip_prefix("HTTP/1.1 ").unwrap()[..3].parse().unwrap();
        if status == 100 {
            continue;
        }
        let length = head.split_once("Content-Length: ").unwrap().1.split_once("\r\n").unwrap().0;
        let length = if bodiless { 0 } else { length.parse().unwrap() };
        assert!(stream.len() >= length, "{head}: a body of {} bytes", stream.len());
        let (body, rest) = stream.split_at(length);
        *stream = rest;
        return Some((status, body.to_vec()));
    }
}

/// Sends `input` to a server and compares what comes of it with the model.
pub(crate) fn serve(input: &[u8]) {
    let rig = RIG.lock().unwrap_or_else(PoisonError::into_inner);
    let pieces = pieces(input, rig.files.len());
    let inodes: Vec<u64> = rig.files.iter().map(|file| file.metadata().unwrap().ino()).collect();
    SEEN.lock().unwrap().clear();
    let client = UnixStream::connect(rig.folder.path().join("socket")).unwrap();
    client.set_read_timeout(Some(LIMIT)).unwrap();
    let mut answers = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(|| send(&client, &pieces, &rig.files));
        (&client).read_to_end(&mut answers).unwrap();
        // Whoever still sends need not.
        let _ = client.shutdown(Shutdown::Both);
    });
    drop(client);

    let expected = model(&pieces, &inodes);
    let mut stream = answers.as_slice();
    for expected in &expected {
        let Some((status, body)) = answer(&mut stream, expected.bodiless) else {
            panic!("no answer where one must be: {expected:?}")
        };
        assert!(expected.status.contains(&status), "{status} is not as expected: {expected:?}");
        let body: Option<Value> = (!expected.bodiless).then(|| serde_json::from_slice(&body).unwrap());
        if let (200, Some(taken)) = (status, &expected.taken) {
            assert_eq!(body, Some(json!(taken.inodes)), "the answer to another request");
        }
    }
    // The last may be the interim answer to a request of which the rest never came.
    let more = answer(&mut stream, false);
    assert!(more.is_none(), "more answers than requests: {more:?}");
    let handed: Vec<&Taken> = expected.iter().filter_map(|expected| expected.taken.as_ref()).collect();
    assert_eq!(SEEN.lock().unwrap().iter().collect::<Vec<_>>(), handed);
    let start = Instant::now();
    while descriptors() != rig.floor {
        assert!(start.elapsed() < LIMIT, "{} descriptors, not {}", descriptors(), rig.floor);
        std::thread::yield_now();
    }
}

fn send(client: &UnixStream, pieces: &[Piece<'_>], files: &[File]) {
    for piece in pieces {
        let fds: Vec<RawFd> = piece.files.iter().map(|index| files[*index].as_raw_fd()).collect();
        // The kernel takes a piece as a whole; it refuses when the server has closed.
        if client.send_with_fds(&[piece.bytes], &fds).is_err() {
            return;
        }
    }
    let _ = client.shutdown(Shutdown::Write);
}
