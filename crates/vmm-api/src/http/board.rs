//! Answers that are ready before they are asked for.
//!
//! A question that only reads need not wait until the host has time: the host posts the answer on a [`Board`] whenever
//! it changes, and the API thread reads it there. What a client has been told is never newer than the board, for
//! [`ApiRequest::dispatch`](crate::command::ApiRequest::dispatch) lets a handler's replies go when the host has posted.

use std::fmt;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use crate::command::{Body, Command, Encode};

/// A place for the present answer of `C`, shared by the host and the server.
pub struct Board<C: Command>(Arc<Mutex<Present<C>>>);

type Present<C> = Option<Arc<Posting<<C as Command>::Reply>>>;

struct Posting<R> {
    reply: R,
    /// As a body, once somebody has asked; `None` where it has no form, and the host is asked.
    body: OnceLock<Option<Body>>,
}

impl<C: Command> Board<C> {
    /// A board with nothing on it.
    #[must_use]
    pub fn new() -> Self {
        Self(Arc::default())
    }

    /// Replaces the answer; without one the host is asked.
    pub fn post(&self, reply: Option<C::Reply>) {
        let posting = reply.map(|reply| Arc::new(Posting { reply, body: OnceLock::new() }));
        // What was there is dropped outside the lock.
        let _before = std::mem::replace(&mut *self.lock(), posting);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Present<C>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A board as the server sees it.
pub(crate) trait Posted: Send {
    /// The command that it answers.
    fn name(&self) -> &'static str;

    /// Its answer, if there is one.
    fn look(&self) -> Option<Body>;
}

impl<C: Command<Reply: Sync>> Posted for Board<C> {
    fn name(&self) -> &'static str {
        C::NAME
    }

    fn look(&self) -> Option<Body> {
        let posting = self.lock().clone()?;
        let encode = || Some(Body { media_type: C::Reply::MEDIA_TYPE, bytes: posting.reply.encode().ok()? });
        posting.body.get_or_init(encode).clone()
    }
}

impl<C: Command> Clone for Board<C> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<C: Command> Default for Board<C> {
    fn default() -> Self {
        Self::new()
    }
}

impl<C: Command> fmt::Debug for Board<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Board").field("command", &C::NAME).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::vmm::Ping;
    use crate::info::PingReply;

    #[test]
    fn the_last_answer_counts_and_none_asks_the_host() {
        let board = Board::<Ping>::new();
        let reply = |version: &str| PingReply {
            build_version: String::new(),
            version: version.to_owned(),
            pid: 1,
            features: Vec::new(),
        };
        assert_eq!(board.look(), None);
        for version in ["1", "2"] {
            board.post(Some(reply(version)));
            let text = String::from_utf8(board.clone().look().unwrap().bytes).unwrap();
            assert!(text.contains(&format!("\"version\":\"{version}\"")), "{text}");
        }
        board.post(None);
        assert_eq!(board.look(), None);
    }
}
