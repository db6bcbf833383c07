//! One client: what it sent, what it is owed, and when it is given up.

use crate::error::{ApiError, Code};
use crate::http::counts::{Counts, UNREADABLE};
use crate::http::descriptors::{TooMany, Waiting, receive, send};
use crate::http::parser::{Manner, Parser, Progress, Request};
use crate::http::response::{CONTINUE, refusal};
use crate::http::server::Config;
use crate::http::stream::{PIECE, Pulled, Stream};
use std::io;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

/// How long a connection that ends is still read, so that the client sees the last answer rather than a reset.
const LINGER: Duration = Duration::from_secs(2);

/// One connection. Requests are taken one at a time, so pipelined ones are answered in order.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) stream: UnixStream,
    /// What epoll watches for this connection.
    pub(crate) watched: EventSet,
    parser: Parser,
    descriptors: Waiting,
    counts: Arc<Counts>,
    answer: Vec<u8>,
    /// Bytes of `answer` that are sent.
    sent: usize,
    stage: Stage,
    /// When the stage began; in `Reading`, when the first byte of the request came.
    since: Instant,
    /// The client sends no more.
    ended: bool,
}

#[derive(Debug)]
enum Stage {
    /// For a request, or for its rest.
    Reading,
    /// A request is with the host; nothing is read meanwhile.
    Parked(Manner),
    /// The answer goes on until the client leaves.
    Streaming(Box<dyn Stream>),
    /// The last answer is being sent.
    Closing,
    /// It is sent; what still comes is thrown away.
    Lingering,
}

/// What is to be done next for a connection.
#[derive(Debug)]
pub(crate) enum Step {
    /// Wait for the client, or for the host.
    Wait,
    /// Carry this out; then [`Connection::finish`].
    Request(Request, Vec<OwnedFd>),
    /// Drop it.
    Close,
}

impl Connection {
    pub(crate) fn new(stream: UnixStream, config: &Config, counts: Arc<Counts>, now: Instant) -> Self {
        Self {
            stream,
            watched: EventSet::IN,
            parser: Parser::new(config.limits),
            descriptors: Waiting::new(config.max_descriptors),
            counts,
            answer: Vec::new(),
            sent: 0,
            stage: Stage::Reading,
            since: now,
            ended: false,
        }
    }

    /// Receives once. An error means the client cannot be heard any more.
    pub(crate) fn receive(&mut self, buffer: &mut [u8], now: Instant) -> io::Result<()> {
        let (count, fds) = match receive(&self.stream, buffer) {
            Ok(received) => received,
            Err(error) if is_transient(&error) => return Ok(()),
            Err(error) => return Err(error),
        };
        if count == 0 {
            self.ended = true;
        }
        match self.stage {
            Stage::Reading => {}
            // Who sends something has no use for the stream any more.
            Stage::Streaming(_) if count > 0 => return Err(io::ErrorKind::InvalidInput.into()),
            _ => return Ok(()),
        }
        if !self.parser.started() {
            self.since = now;
        }
        self.parser.push(buffer.get(..count).unwrap_or_default());
        self.descriptors.add(fds, self.parser.received());
        Ok(())
    }

    /// Sends what is owed and takes the next request or piece of a stream, if both can be done now. A stream that has
    /// nothing will write to `waker`.
    pub(crate) fn step(&mut self, waker: &Arc<EventFd>, now: Instant) -> Step {
        loop {
            match self.flush() {
                Ok(true) => {}
                Ok(false) => return Step::Wait,
                Err(_) => return Step::Close,
            }
            match &mut self.stage {
                Stage::Parked(_) => return Step::Wait,
                Stage::Streaming(stream) => match stream.pull(PIECE, &mut self.answer, waker) {
                    Pulled::Data => continue,
                    Pulled::Nothing => return Step::Wait,
                    Pulled::End => {
                        self.enter(Stage::Closing, now);
                        continue;
                    }
                },
                Stage::Closing if !self.ended => {
                    let _ = self.stream.shutdown(Shutdown::Write);
                    self.enter(Stage::Lingering, now);
                    return Step::Wait;
                }
                Stage::Lingering if !self.ended => return Step::Wait,
                Stage::Closing | Stage::Lingering => return Step::Close,
                Stage::Reading => {}
            }
            match self.parser.poll() {
                Ok(Progress::Request(request)) => match self.descriptors.take(request.end) {
                    Ok(fds) => {
                        self.enter(Stage::Parked(request.manner), now);
                        return Step::Request(request, fds);
                    }
                    Err(TooMany) => self.refuse(&too_many(), request.manner, now),
                },
                Ok(Progress::Incomplete) if self.descriptors.is_over() => {
                    self.refuse(&too_many(), Manner::UNKNOWN, now);
                }
                Ok(Progress::Continue) => self.owe(CONTINUE.to_vec()),
                Ok(Progress::Incomplete) if self.ended => return Step::Close,
                Ok(Progress::Incomplete) => return Step::Wait,
                Err(unreadable) => self.refuse(&unreadable.error, unreadable.manner, now),
            }
        }
    }

    /// How the parked request is to be answered; `None` if there is none.
    pub(crate) const fn parked(&self) -> Option<Manner> {
        match self.stage {
            Stage::Parked(manner) => Some(manner),
            _ => None,
        }
    }

    /// Answers the parked request.
    pub(crate) fn finish(&mut self, answer: Vec<u8>, manner: Manner, now: Instant) {
        self.owe(answer);
        self.enter(if manner.keep_alive { Stage::Reading } else { Stage::Closing }, now);
    }

    /// Answers the parked request by a stream. Whether the client waits for it: one that has sent more does not.
    pub(crate) fn stream(&mut self, head: Vec<u8>, stream: Box<dyn Stream>, now: Instant) -> bool {
        self.owe(head);
        self.enter(Stage::Streaming(stream), now);
        !self.parser.started()
    }

    /// Whether the answer is a stream.
    pub(crate) const fn is_streaming(&self) -> bool {
        matches!(self.stage, Stage::Streaming(_))
    }

    /// What to wait for. While a request is parked that stays what it was, for most clients wait for their answer; the
    /// server mutes one that sends on meanwhile.
    pub(crate) fn interest(&self) -> EventSet {
        if self.is_streaming() {
            // A client that says no more may still listen; epoll tells by itself when it has gone.
            let heard = if self.ended { EventSet::empty() } else { EventSet::IN };
            return if self.owes() { heard | EventSet::OUT } else { heard };
        }
        if self.owes() {
            return EventSet::OUT;
        }
        match self.stage {
            Stage::Parked(_) | Stage::Streaming(_) => self.watched,
            Stage::Reading | Stage::Closing | Stage::Lingering => EventSet::IN,
        }
    }

    /// When this connection is given up unless something happens; never while the host has its request, or by a stream: a
    /// client that does not read holds a place and a piece of memory, and both are bounded.
    pub(crate) fn deadline(&self, config: &Config) -> Option<Instant> {
        let time = match self.stage {
            Stage::Parked(_) | Stage::Streaming(_) => return None,
            Stage::Lingering => LINGER,
            Stage::Closing => config.request_timeout,
            Stage::Reading if self.owes() || self.parser.started() => config.request_timeout,
            Stage::Reading => config.idle_timeout,
        };
        // No deadline if the clock cannot count that far.
        self.since.checked_add(time)
    }

    /// The deadline has passed. Whether the connection has something left to say.
    pub(crate) fn expire(&mut self, now: Instant) -> bool {
        let answerable = matches!(self.stage, Stage::Reading) && self.parser.started() && !self.owes();
        if answerable {
            let error = ApiError::new(Code::RequestTimeout, "the request did not arrive in time");
            self.refuse(&error, Manner::UNKNOWN, now);
        }
        answerable
    }

    /// Since when nothing is going on; `None` while something is.
    pub(crate) fn idle_since(&self) -> Option<Instant> {
        let idle = match self.stage {
            Stage::Reading => !self.parser.started() && !self.owes(),
            Stage::Lingering => true,
            Stage::Parked(_) | Stage::Streaming(_) | Stage::Closing => false,
        };
        idle.then_some(self.since)
    }

    /// Whether bytes of an answer are still to be sent.
    pub(crate) fn owes(&self) -> bool {
        self.sent < self.answer.len()
    }

    fn refuse(&mut self, error: &ApiError, manner: Manner, now: Instant) {
        self.descriptors.clear();
        self.counts.count(UNREADABLE, error.code.status());
        self.owe(refusal(error, Manner { keep_alive: false, ..manner }, &[]));
        self.enter(Stage::Closing, now);
    }

    fn enter(&mut self, stage: Stage, now: Instant) {
        self.stage = stage;
        self.since = now;
    }

    fn owe(&mut self, answer: Vec<u8>) {
        self.answer = answer;
        self.sent = 0;
    }

    /// Whether everything is sent.
    fn flush(&mut self) -> io::Result<bool> {
        while let Some(rest) = self.answer.get(self.sent..).filter(|rest| !rest.is_empty()) {
            match send(&self.stream, rest, &[]) {
                Ok(count) => self.sent = self.sent.saturating_add(count),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        self.answer = Vec::new();
        self.sent = 0;
        Ok(true)
    }
}

fn too_many() -> ApiError {
    ApiError::new(Code::TooManyDescriptors, "too many file descriptors came with the request")
}

fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}
