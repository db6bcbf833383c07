//! Waiting: for the socket, for the VM.

use super::{Client, ClientError, RawAnswer};
use crate::command::{Command, Method, decode_json};
use crate::commands::{vm, vmm};
use crate::error::Code;
use serde::Deserialize;
use std::io;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};
use vmm_state::Phase;

/// The first and the longest pause between two looks.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(50);

impl Client {
    /// Connects to the socket at `path`, which a VMM may be about to make.
    ///
    /// # Errors
    /// Nobody listens there after `limit`, or it cannot be a socket at all.
    pub fn connect_within(path: impl AsRef<Path>, limit: Duration) -> Result<Self, ClientError> {
        let (path, mut pace) = (path.as_ref(), Pace::new(Some(limit)));
        loop {
            match Self::connect(path) {
                Err(ClientError::Connect { source, .. }) if may_come(&source) && pace.rest() => {}
                other => return other,
            }
        }
    }

    /// Waits until the VM is in `phase`; [`Phase::Empty`] is that there is no VM. A phase that it passes between two looks
    /// (each 50 ms at most) is not seen; the event stream shows all.
    ///
    /// VMMs that do not tell finer phases are taken by the contract's words, which have none for [`Phase::Booting`].
    ///
    /// # Errors
    /// [`ClientError::NotReached`] after `limit`, or `vm.info` cannot be had.
    pub fn wait_for(&mut self, phase: Phase, limit: Option<Duration>) -> Result<(), ClientError> {
        let mut pace = Pace::new(limit);
        loop {
            let found = self.phase_word(pace.left())?;
            if found == phase.name() {
                return Ok(());
            }
            if !pace.rest() {
                return Err(ClientError::NotReached {
                    wanted: phase,
                    found,
                    limit: limit.unwrap_or_default(),
                });
            }
        }
    }

    /// Waits until the VMM has ended, or closed this connection.
    ///
    /// # Errors
    /// [`ClientError::NotEnded`] after `limit`.
    pub fn wait_for_end(&mut self, limit: Option<Duration>) -> Result<(), ClientError> {
        let mut pace = Pace::new(limit);
        loop {
            match self.look(vmm::Ping::NAME, pace.left()) {
                Err(error) if error.is_gone() => return Ok(()),
                Err(error) if !error.is_timeout() && error.code().is_none() => return Err(error),
                _ if pace.rest() => {}
                _ => return Err(ClientError::NotEnded { limit: limit.unwrap_or_default() }),
            }
        }
    }

    /// Asks, to be told within `limit`.
    fn look(&mut self, name: &str, limit: Option<Duration>) -> Result<RawAnswer, ClientError> {
        let usual = self.limit;
        let io = |source| ClientError::Io { name: name.to_owned(), source };
        // A look is made even when no time is left.
        let limit = [usual, limit.map(|limit| limit.max(LONGEST_PAUSE))].into_iter().flatten().min();
        self.set_timeout(limit).map_err(io)?;
        let answer = self.call_any(name, Method::Get, b"");
        self.set_timeout(usual).map_err(io)?;
        answer
    }

    /// The VMM's word for the VM's phase, to be told within `limit`.
    fn phase_word(&mut self, limit: Option<Duration>) -> Result<String, ClientError> {
        #[derive(Deserialize)]
        struct Words {
            state: String,
            #[serde(default)]
            phase: String,
        }
        match self.look(vm::Info::NAME, limit) {
            Ok(answer) => {
                let words: Words = decode_json(&answer.body).map_err(|error| ClientError::Answer {
                    name: vm::Info::NAME.to_owned(),
                    what: error.to_string(),
                })?;
                Ok(if words.phase.is_empty() { words.state } else { words.phase })
            }
            Err(ClientError::Refused(problem))
                if problem.code == Code::NoVm.name() || problem.status == 404 =>
            {
                // A VM that is waited for is none yet.
                Ok(problem.phase.unwrap_or_else(|| Phase::Empty.name().to_owned()))
            }
            Err(error) => Err(error),
        }
    }
}

/// Whether a VMM that is just starting may be the reason.
fn may_come(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
}

/// Pauses that grow, up to a limit.
struct Pace {
    end: Option<Instant>,
    pause: Duration,
}

impl Pace {
    fn new(limit: Option<Duration>) -> Self {
        let end = limit.and_then(|limit| Instant::now().checked_add(limit));
        Self { end, pause: FIRST_PAUSE }
    }

    /// What is left of the time.
    fn left(&self) -> Option<Duration> {
        self.end.map(|end| end.saturating_duration_since(Instant::now()))
    }

    /// Makes a pause; not when the time is over.
    fn rest(&mut self) -> bool {
        let left = self.left();
        if left == Some(Duration::ZERO) {
            return false;
        }
        sleep(left.map_or(self.pause, |left| left.min(self.pause)));
        self.pause = self.pause.saturating_mul(2).min(LONGEST_PAUSE);
        true
    }
}
