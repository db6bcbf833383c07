//! The ways to a destination that lacks memory.

use std::net::Shutdown;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmm_memory_manager::pages::Pages;
use vmm_migration_protocol::{Command, Fault, Frame, Item, Join, Message, Reason};

use super::owed::Owed;
use crate::exit::chain;
use crate::migration::joining::{Session, joined};
use crate::migration::link::{ANSWER, End, Frames, Socket};

/// How long a destination may take to say all that it lacks: for tens of gibibytes in single pages that is hundreds of MiB.
const ANSWERS: Duration = Duration::from_secs(300);

/// What a destination says to a source that comes again.
pub(super) enum Again {
    /// It lacks these.
    Lacks(Pages, Box<Ways>),
    /// It lacks nothing, or has given the guest up.
    Over(Frame, Arc<Socket>),
}

/// The connections of a session.
pub(super) struct Ways {
    pub(super) main: Arc<Socket>,
    pub(super) reader: Reader,
    pub(super) wanted: Wanted,
}

/// Who reads connection 0.
pub(super) enum Reader {
    /// A thread does.
    Thread(JoinHandle<()>),
    /// Nobody yet; with what was read with the answer.
    None(Frames),
}

/// The connection on which the destination asks for memory.
pub(in crate::migration) struct Wanted {
    pub(super) socket: Arc<Socket>,
    /// What it asks for, of which some may have been read with its Ack.
    pub(super) frames: Frames,
}

impl Wanted {
    /// A connection of which nothing has been read.
    pub(in crate::migration) fn of(socket: Arc<Socket>) -> Self {
        Self { frames: Frames::of(&socket), socket }
    }
}

/// Opens the connection on which the destination asks for memory, and gets it.
///
/// # Errors
/// The destination is not to be reached, or does not take it.
pub(in crate::migration) fn wanted(session: &Session) -> Result<Wanted, Fault> {
    let opened = || -> Result<Wanted, String> {
        let failed = |error: std::io::Error| chain(&error);
        let socket = session.connect(0, Join::WANTED).map_err(failed)?;
        socket.set_timeouts(Some(ANSWER), Some(ANSWER)).map_err(failed)?;
        Ok(Wanted { frames: joined(&socket)?, socket })
    };
    opened().map_err(|text| Fault::new(Reason::Failed, &format!("the connection for wanted memory: {text}")))
}

/// Takes the session up again.
///
/// # Errors
/// The destination is not to be reached, or something else than an answer came.
pub(super) fn again(session: &Session, owed: &Owed) -> Result<Again, Fault> {
    let failed = |text: String| Fault::new(Reason::Failed, &format!("looking for the destination: {text}"));
    let io = |error: std::io::Error| failed(chain(&error));
    let main = Arc::new(session.way.connect(&mut || session.check().is_ok()).map_err(io)?);
    main.set_timeouts(Some(ANSWER), Some(ANSWER)).map_err(io)?;
    let rejoin = Message::Rejoin(session.id).encode().map_err(|error| failed(error.to_string()))?;
    main.send(&rejoin).map_err(io)?;
    let (mut frames, mut pages, until) = (Frames::of(&main), owed.pages(), Instant::now() + ANSWERS);
    loop {
        let rest = until.saturating_duration_since(Instant::now());
        let frame = match frames.first(rest.min(ANSWER)) {
            Ok(Item::Frame(frame)) => frame,
            Ok(Item::Bulk(_)) => return Err(failed("memory comes the wrong way".to_owned())),
            Err(End::Garbage(text) | End::Lost(text)) => return Err(failed(text)),
        };
        if matches!(frame.command(), Command::Whole | Command::Nack) {
            return Ok(Again::Over(frame, main));
        }
        match Message::decode(frame) {
            Ok(Message::Lacks(range)) if owed.covers(&range) => pages.insert(range.gpa()..range.end()),
            Ok(Message::Ack(Command::Rejoin)) => break,
            Ok(Message::Keepalive(_)) => {}
            Ok(other) => return Err(failed(format!("{} frame for an answer", other.command()))),
            Err(error) => return Err(failed(error.to_string())),
        }
    }
    match wanted(session) {
        Ok(wanted) => {
            let ways = Ways { main, reader: Reader::None(frames), wanted };
            Ok(Again::Lacks(pages, Box::new(ways)))
        }
        Err(fault) => {
            main.shutdown(Shutdown::Both);
            Err(fault)
        }
    }
}
