//! What a source is to the loop.

use crate::{Control, HandlerError};
use event_manager::EventSet;
use std::io::{self, Read};
use std::os::fd::RawFd;
use vmm_sys_util::timerfd::TimerFd;

/// Names one source of one loop; never used again after the source is removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SourceId(pub(crate) u32);

/// Why a descriptor's handler is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Readiness {
    /// A read (or accept) will not block.
    pub readable: bool,
    /// The other side has gone, or the descriptor is in error. Without `readable` this is the last call.
    pub hung_up: bool,
}

/// What a reader's handler is given.
#[derive(Debug)]
pub enum Input<'a> {
    /// Bytes, at least one.
    Data(&'a [u8]),
    /// The last call: end of file (`None`), or the read failed. The source is removed already.
    End(Option<io::Error>),
}

/// Bytes a reader takes at one time.
pub(crate) const READ_SIZE: usize = 4096;

/// What woke a source: epoll's events, and the count of an expired timer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Trigger {
    pub(crate) events: EventSet,
    pub(crate) expirations: u64,
}

impl Trigger {
    pub(crate) fn readiness(self) -> Readiness {
        Readiness {
            readable: self.events.contains(EventSet::IN),
            hung_up: self.events.intersects(EventSet::HANG_UP | EventSet::ERROR),
        }
    }
}

/// A handler with its descriptor inside, of any kind.
pub(crate) type Fire<S> = Box<dyn FnMut(&mut S, &mut Control<'_, S>, Trigger) -> Result<(), HandlerError>>;

/// A registered source.
pub(crate) struct Source<S> {
    pub(crate) name: &'static str,
    pub(crate) fd: RawFd,
    pub(crate) masked: bool,
    pub(crate) timer: Option<TimerFd>,
    /// Absent while the handler runs.
    pub(crate) fire: Option<Fire<S>>,
}

/// The outcome of one read.
pub(crate) enum Taken {
    Bytes(usize),
    Nothing,
    End(Option<io::Error>),
}

/// Reads once. A descriptor that has nothing is at its end if it is hung up, for it will stay so.
pub(crate) fn take_input(reader: &mut impl Read, buffer: &mut [u8], readiness: Readiness) -> Taken {
    match reader.read(buffer) {
        Ok(0) => Taken::End(None),
        Ok(count) => Taken::Bytes(count),
        Err(error) => match error.kind() {
            io::ErrorKind::Interrupted => Taken::Nothing,
            io::ErrorKind::WouldBlock if !readiness.hung_up => Taken::Nothing,
            io::ErrorKind::WouldBlock => Taken::End(None),
            _ => Taken::End(Some(error)),
        },
    }
}
