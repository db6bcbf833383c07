//! What can go wrong with the loop and with a source.

use crate::SourceId;
use std::io;

/// What a handler may return. Boxed: the loop only passes it on to the error hook.
pub type HandlerError = Box<dyn std::error::Error + Send + Sync>;

/// The loop or one of its sources could not be set up or waited for.
#[derive(Debug, thiserror::Error)]
pub enum LoopError {
    /// A kernel object (epoll instance, eventfd, timerfd) could not be made.
    #[error("cannot create the {what} of the control loop")]
    Create {
        /// The object.
        what: &'static str,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// epoll refused the descriptor: `EPERM` for a plain file, `EEXIST` for one that is watched already.
    #[error("cannot watch event source {name}")]
    Watch {
        /// Name of the source.
        name: &'static str,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// There is no such source, or it is not a timer where a timer is needed.
    #[error("there is no such event source as {0:?}")]
    NoSource(SourceId),
    /// A timer could not be set.
    #[error("cannot set timer {name}")]
    Timer {
        /// Name of the source.
        name: &'static str,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// Waiting for events failed for a reason other than a signal.
    #[error("cannot wait for events")]
    Wait(#[source] io::Error),
}

/// A handler failed; handed to the error hook.
#[derive(Debug, thiserror::Error)]
#[error("handler of event source {name} failed")]
pub struct SourceError {
    /// Name of the source.
    pub name: &'static str,
    /// The source.
    pub id: SourceId,
    /// The handler's error.
    #[source]
    pub source: HandlerError,
}

/// `event-manager`'s error as the system error it stands for.
pub(crate) fn system_error(error: &event_manager::Error) -> io::Error {
    match error {
        event_manager::Error::Epoll(errno) | event_manager::Error::EventFd(errno) => {
            io::Error::from_raw_os_error(errno.errno())
        }
        event_manager::Error::FdAlreadyRegistered => io::Error::from_raw_os_error(libc::EEXIST),
        other => io::Error::other(other.to_string()),
    }
}
