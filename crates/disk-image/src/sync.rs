//! The synchronous engine: does everything within `submit`.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use crate::engine::{Completion, Engine, EngineError, EngineKind, Rejected, Request, SubmitError};
use crate::job::{Job, Progress, Step};
use crate::notify::Notifier;
use crate::raw::Raw;
use crate::sys;

#[derive(Debug)]
pub(crate) struct SyncEngine {
    raw: Arc<Raw>,
    depth: usize,
    ready: Vec<Completion>,
    announces: bool,
    notifier: Notifier,
}

impl SyncEngine {
    pub(crate) fn new(raw: Arc<Raw>, depth: u16) -> Result<Self, EngineError> {
        let notifier = Notifier::new().map_err(EngineError::EventFd)?;
        let ready = Vec::with_capacity(depth.into());
        Ok(Self { raw, depth: depth.into(), ready, announces: true, notifier })
    }
}

impl Engine for SyncEngine {
    fn kind(&self) -> EngineKind {
        EngineKind::Sync
    }

    fn submit(&mut self, request: Request) -> Result<(), Rejected> {
        if self.ready.len() >= self.depth {
            return Err(Rejected { request, reason: SubmitError::Full });
        }
        if let Err(reason) = self.raw.check(&request.op) {
            return Err(Rejected { request, reason });
        }
        let mut job = Job::new(request.op, &self.raw);
        let result = run(&mut job, &self.raw);
        if self.announces && self.ready.is_empty() {
            self.notifier.set();
        }
        self.ready.push(Completion { token: request.token, result, buffers: job.into_buffers() });
        Ok(())
    }

    fn kick(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn completion_fd(&self) -> BorrowedFd<'_> {
        self.notifier.as_fd()
    }

    fn announce(&mut self, on: bool) -> bool {
        if self.announces && !on {
            self.notifier.clear();
        }
        self.announces = on;
        !self.ready.is_empty()
    }

    fn reap(&mut self, out: &mut Vec<Completion>) -> io::Result<()> {
        if self.announces {
            self.notifier.clear();
        }
        out.append(&mut self.ready);
        Ok(())
    }

    fn in_flight(&self) -> usize {
        self.ready.len()
    }
}

/// Carries a job out, from its first system call to its last.
fn run(job: &mut Job, raw: &Raw) -> io::Result<u32> {
    loop {
        let Some(step) = job.step(raw)? else { return Ok(0) };
        let answer = call(&step, raw);
        if let Progress::Finished(result) = job.answer(answer, raw) {
            return result;
        }
    }
}

/// Makes one system call and waits for it.
pub(crate) fn call(step: &Step<'_>, raw: &Raw) -> io::Result<usize> {
    let file = &raw.parts.file;
    match *step {
        Step::Read { offset, ranges } => sys::preadv(file, ranges, offset),
        Step::Write { offset, ranges } => sys::pwritev(file, ranges, offset),
        Step::Sync => file.sync_data().map(|()| 0),
        Step::Fallocate { mode, offset, len } => sys::fallocate(file, mode, offset, len).map(|()| 0),
        Step::BlockDiscard { offset, len } => sys::block_discard(file, offset, len).map(|()| 0),
    }
}
