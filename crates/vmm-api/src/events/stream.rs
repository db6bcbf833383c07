//! The journal as a stream of the API.

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::Journal;
use crate::error::{ApiError, Code};
use crate::http::stream::{Pulled, Query, Stream, StreamRoute};

/// The stream's route below `/api/v1/`.
pub const EVENTS_ROUTE: &str = "vmm.events";

/// `GET vmm.events`: the events of a journal, a line each.
///
/// `from=N` begins at number N (1 without it), `from=next` with what comes next; `follow=false` ends with what is
/// there.
#[derive(Debug)]
pub struct EventRoute(pub Journal);

impl StreamRoute for EventRoute {
    fn name(&self) -> &'static str {
        EVENTS_ROUTE
    }

    fn doc(&self) -> &'static str {
        "Tells what happens, a JSON object a line, until the client leaves."
    }

    fn media_type(&self) -> &'static str {
        "application/x-ndjson"
    }

    fn open(&self, query: Query<'_>) -> Result<Box<dyn Stream>, ApiError> {
        let mut stream = EventStream { journal: self.0.clone(), next: 1, follow: true };
        for (key, value) in query.pairs() {
            match (key, value) {
                ("from", "next") => stream.next = self.0.next(),
                ("from", number) => stream.next = self.start(number)?,
                ("follow", "true") => stream.follow = true,
                ("follow", "false") => stream.follow = false,
                ("follow", _) => return Err(refuse("follow is true or false")),
                _ => return Err(refuse("it takes from and follow only")),
            }
        }
        Ok(Box::new(stream))
    }
}

impl EventRoute {
    /// A number that is not reached yet is another process's, and waiting for it would hide what happens here.
    fn start(&self, number: &str) -> Result<u64, ApiError> {
        let start = number.parse().map_err(|_| refuse("from is a number or next"))?;
        let next = self.0.next();
        if start > next { Err(refuse(&format!("the next event is number {next}"))) } else { Ok(start) }
    }
}

fn refuse(what: &str) -> ApiError {
    ApiError::new(Code::MalformedRequest, format!("the query of {EVENTS_ROUTE} cannot be used: {what}"))
}

#[derive(Debug)]
struct EventStream {
    journal: Journal,
    next: u64,
    follow: bool,
}

impl Stream for EventStream {
    fn pull(&mut self, room: usize, to: &mut Vec<u8>, waker: &Arc<EventFd>) -> Pulled {
        let mut lines = Vec::new();
        let from = self.next;
        let taken = self.journal.read(from, room, &mut lines, self.follow.then_some(waker));
        self.next = taken.next;
        if taken.lost > 0 {
            let first = from.max(1).saturating_add(taken.lost);
            to.extend_from_slice(format!("{{\"lost\":{},\"next\":{first}}}\n", taken.lost).as_bytes());
        }
        to.extend_from_slice(&lines);
        match (to.is_empty(), self.follow) {
            (false, _) => Pulled::Data,
            (true, true) => Pulled::Nothing,
            (true, false) => Pulled::End,
        }
    }
}
