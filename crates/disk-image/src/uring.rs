//! The io_uring engine.
//!
//! Each request in flight has a slot. The slot's number, and nothing that a guest chose, is what the kernel carries and gives
//! back; the slot owns the buffers until then. A slot has at most one operation in the kernel, and the completion queue has room
//! for one of each slot, so it cannot overflow.
#![expect(unsafe_code, reason = "submission entries carry raw addresses")]

use std::fmt;
use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use io_uring::types::{Fixed, FsyncFlags, SubmitArgs, Timespec};
use io_uring::{IoUring, Probe, opcode, squeue};

use crate::engine::{Completion, Engine, EngineError, EngineKind, Rejected, Request, SubmitError};
use crate::job::{Job, Progress, Step};
use crate::notify::Notifier;
use crate::raw::Raw;
use crate::sync;

/// Index of the image in the ring's table of files.
const IMAGE: Fixed = Fixed(0);
/// How long dropping an engine waits for the kernel before it leaves the buffers to it for good.
const SETTLE_LIMIT: Duration = Duration::from_secs(30);

pub(crate) struct UringEngine {
    ring: IoUring,
    slots: Vec<Option<Slot>>,
    free: Vec<u16>,
    /// Requests that ended without the kernel.
    ready: Vec<Completion>,
    answers: Vec<(u64, i32)>,
    announces: bool,
    notifier: Notifier,
    raw: Arc<Raw>,
}

struct Slot {
    token: u64,
    job: Job,
}

impl UringEngine {
    pub(crate) fn new(raw: Arc<Raw>, depth: u16) -> Result<Self, EngineError> {
        let notifier = Notifier::new().map_err(EngineError::EventFd)?;
        let failed = |what| move |source| EngineError::IoUring { what, source };
        let ring = build(depth.into()).map_err(failed("ring setup"))?;
        let submitter = ring.submitter();
        probe(&ring).map_err(failed("needed operations"))?;
        submitter.register_files(&[raw.parts.file.as_raw_fd()]).map_err(failed("file registration"))?;
        submitter.register_eventfd(notifier.as_raw_fd()).map_err(failed("eventfd registration"))?;
        Ok(Self {
            ring,
            slots: (0..depth).map(|_| None).collect(),
            free: (0..depth).rev().collect(),
            ready: Vec::new(),
            answers: Vec::with_capacity(depth.into()),
            announces: true,
            notifier,
            raw,
        })
    }

    /// Takes a slot's job as far as it goes without the kernel, and queues its next operation. Returns the completion if
    /// the job has ended.
    fn advance(&mut self, index: u16) -> Option<Completion> {
        loop {
            let slot = self.slots.get_mut(usize::from(index))?.as_mut()?;
            let result = match slot.job.step(&self.raw) {
                Ok(Some(step @ Step::BlockDiscard { .. })) => {
                    // An ioctl, for which the ring has no operation.
                    let answer = sync::call(&step, &self.raw);
                    match slot.job.answer(answer, &self.raw) {
                        Progress::Again => continue,
                        Progress::Finished(result) => result,
                    }
                }
                Ok(Some(step)) => match push(&mut self.ring, &entry(&step).user_data(index.into())) {
                    Ok(()) => return None,
                    Err(error) => Err(error),
                },
                Ok(None) => Ok(0),
                Err(error) => Err(error),
            };
            return self.finish(index, result);
        }
    }

    fn finish(&mut self, index: u16, result: io::Result<u32>) -> Option<Completion> {
        let slot = self.slots.get_mut(usize::from(index))?.take()?;
        self.free.push(index);
        Some(Completion { token: slot.token, result, buffers: slot.job.into_buffers() })
    }

    /// Takes the kernel's answers off the completion queue.
    fn collect(&mut self) {
        self.answers.clear();
        self.answers.extend(self.ring.completion().map(|entry| (entry.user_data(), entry.result())));
    }

    /// Hands queued operations to the kernel.
    fn enter(&mut self) -> io::Result<()> {
        while !self.ring.submission().is_empty() {
            match self.ring.submit() {
                Ok(0) => return self.enter_later(),
                Ok(_) => {}
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR) => {}
                    Some(libc::EAGAIN | libc::EBUSY | libc::ENOMEM) => return self.enter_later(),
                    _ => return Err(error),
                },
            }
        }
        Ok(())
    }

    /// The kernel is short of something: makes the owner call `reap`, which enters again.
    fn enter_later(&self) -> io::Result<()> {
        self.tell();
        Ok(())
    }

    /// There is something for `reap` that the kernel does not announce.
    fn tell(&self) {
        if self.announces {
            self.notifier.set();
        }
    }

    /// Waits until the kernel has given every slot back; what is left of the requests is dropped.
    fn settle(&mut self) -> io::Result<()> {
        let deadline = Instant::now() + SETTLE_LIMIT;
        let pause = Timespec::new().sec(1);
        loop {
            self.collect();
            for (index, _) in mem::take(&mut self.answers) {
                if let Ok(index) = u16::try_from(index) {
                    drop(self.finish(index, Ok(0)));
                }
            }
            if self.free.len() == self.slots.len() {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(io::ErrorKind::TimedOut.into());
            }
            match self.ring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&pause)) {
                Ok(_) => {}
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR | libc::ETIME | libc::EAGAIN | libc::EBUSY | libc::ENOMEM) => {}
                    _ => return Err(error),
                },
            }
        }
    }
}

impl Engine for UringEngine {
    fn kind(&self) -> EngineKind {
        EngineKind::IoUring
    }

    fn submit(&mut self, request: Request) -> Result<(), Rejected> {
        if let Err(reason) = self.raw.check(&request.op) {
            return Err(Rejected { request, reason });
        }
        let full = self.in_flight() >= self.slots.len();
        let Some(index) = self.free.pop_if(|_| !full) else {
            return Err(Rejected { request, reason: SubmitError::Full });
        };
        let Request { token, op } = request;
        if let Some(slot) = self.slots.get_mut(usize::from(index)) {
            *slot = Some(Slot { token, job: Job::new(op, &self.raw) });
        }
        if let Some(completion) = self.advance(index) {
            self.ready.push(completion);
            self.tell();
        }
        Ok(())
    }

    fn kick(&mut self) -> io::Result<()> {
        self.enter()
    }

    fn completion_fd(&self) -> BorrowedFd<'_> {
        self.notifier.as_fd()
    }

    fn announce(&mut self, on: bool) -> bool {
        if self.announces != on {
            let completion = self.ring.completion();
            if on {
                completion.enable_eventfd();
                // The kernel looks at the switch after it has posted; here it is the other way round.
                fence(Ordering::SeqCst);
            } else {
                completion.disable_eventfd();
                drop(completion);
                self.notifier.clear();
            }
            self.announces = on;
        }
        !self.ready.is_empty() || !self.ring.completion().is_empty() || !self.ring.submission().is_empty()
    }

    fn reap(&mut self, out: &mut Vec<Completion>) -> io::Result<()> {
        if self.announces {
            // Cleared first: what completes after the look at the queue sets it again.
            self.notifier.clear();
        }
        out.append(&mut self.ready);
        self.collect();
        let answers = mem::take(&mut self.answers);
        for &(index, result) in &answers {
            let answer =
                usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(result.wrapping_neg()));
            let slot = u16::try_from(index)
                .ok()
                .and_then(|index| Some((index, self.slots.get_mut(usize::from(index))?)));
            let Some((index, Some(slot))) = slot else {
                log::error!(path:? = self.raw.parts.path; "io_uring answered slot {index}, which is free");
                continue;
            };
            let completion = match slot.job.answer(answer, &self.raw) {
                Progress::Again => self.advance(index),
                Progress::Finished(result) => self.finish(index, result),
            };
            out.extend(completion);
        }
        self.answers = answers;
        self.enter()
    }

    fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len() + self.ready.len()
    }
}

impl Drop for UringEngine {
    fn drop(&mut self) {
        if let Err(error) = self.settle() {
            log::error!(
                path:? = self.raw.parts.path;
                "{error} while requests were in flight; their memory stays allocated"
            );
            mem::forget(mem::take(&mut self.slots));
            mem::forget(self.raw.clone());
        }
        // The kernel takes rings apart in the background; let go of the image at once, so that it can be unmounted.
        let _ = self.ring.submitter().unregister_files();
    }
}

impl fmt::Debug for UringEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UringEngine")
            .field("path", &self.raw.parts.path)
            .field("depth", &self.slots.len())
            .field("in_flight", &self.in_flight())
            .finish_non_exhaustive()
    }
}

/// A ring with room for `depth` operations.
fn build(depth: u32) -> io::Result<IoUring> {
    // The kernel need not interrupt a running thread, which makes a system call sooner or later: it sleeps at least.
    let ring = match IoUring::builder().dontfork().setup_coop_taskrun().build(depth) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            // Before Linux 5.19.
            IoUring::builder().dontfork().build(depth)?
        }
        ring => ring?,
    };
    // Timed waits (Linux 5.11), to end an engine with.
    if !ring.params().is_feature_ext_arg() {
        return Err(io::ErrorKind::Unsupported.into());
    }
    Ok(ring)
}

/// Whether the kernel has all the operations that jobs are made of.
fn probe(ring: &IoUring) -> io::Result<()> {
    let mut probe = Probe::new();
    ring.submitter().register_probe(&mut probe)?;
    let needed = [
        opcode::Read::CODE,
        opcode::Write::CODE,
        opcode::Readv::CODE,
        opcode::Writev::CODE,
        opcode::Fsync::CODE,
        opcode::Fallocate::CODE,
    ];
    let all = needed.into_iter().all(|code| probe.is_supported(code));
    if all { Ok(()) } else { Err(io::ErrorKind::Unsupported.into()) }
}

fn entry(step: &Step<'_>) -> squeue::Entry {
    match *step {
        // One range needs no list, which spares the kernel a copy.
        Step::Read { offset, ranges: [range] } => {
            opcode::Read::new(IMAGE, range.base, clamp(range.len)).offset(offset).build()
        }
        Step::Write { offset, ranges: [range] } => {
            opcode::Write::new(IMAGE, range.base, clamp(range.len)).offset(offset).build()
        }
        Step::Read { offset, ranges } => {
            opcode::Readv::new(IMAGE, ranges.as_ptr().cast(), clamp(ranges.len())).offset(offset).build()
        }
        Step::Write { offset, ranges } => {
            opcode::Writev::new(IMAGE, ranges.as_ptr().cast(), clamp(ranges.len())).offset(offset).build()
        }
        Step::Sync => opcode::Fsync::new(IMAGE).flags(FsyncFlags::DATASYNC).build(),
        Step::Fallocate { mode, offset, len } => {
            opcode::Fallocate::new(IMAGE, len).offset(offset).mode(mode).build()
        }
        // Never queued: `advance` makes this call itself.
        Step::BlockDiscard { .. } => opcode::Nop::new().build(),
    }
}

/// A transfer longer than the kernel's field is done in part, and then continued.
fn clamp(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

fn push(ring: &mut IoUring, entry: &squeue::Entry) -> io::Result<()> {
    // SAFETY: the addresses in the entry come from a `Step`, so they belong to a job or to the image. Both stay, unmoved, in
    // this engine until the operation has completed: the job in its slot, whose vector never grows, the image in `raw`; `drop`
    // waits for that, or leaks both.
    let pushed = unsafe { ring.submission().push(entry) };
    // There is an entry for every slot, and a slot queues one at a time.
    pushed.map_err(|_| io::Error::from(io::ErrorKind::QuotaExceeded))
}

#[cfg(test)]
mod tests {
    use std::any::Any;
    use std::fs::File;
    use std::io::Write;
    use std::os::fd::OwnedFd;
    use std::sync::atomic::AtomicBool;
    use std::thread;

    use super::*;
    use crate::buffers::Buffers;
    use crate::engine::Op;
    use crate::raw::Feature;
    use crate::raw::tests::raw_on;

    /// An engine on a pipe: reads wait until the test writes, so an operation is in the kernel for as long as the test wants.
    fn on_pipe(depth: u16) -> (UringEngine, io::PipeWriter) {
        let (reader, writer) = io::pipe().unwrap();
        let raw = raw_on(File::from(OwnedFd::from(reader)), 1 << 20, None);
        (UringEngine::new(Arc::new(raw), depth).unwrap(), writer)
    }

    fn read(token: u64, buffers: Buffers) -> Request {
        Request { token, op: Op::Read { offset: 0, buffers } }
    }

    fn reap_one(engine: &mut UringEngine) -> Completion {
        let mut done = Vec::new();
        while done.is_empty() {
            engine.ring.submit_and_wait(1).unwrap();
            engine.reap(&mut done).unwrap();
        }
        assert_eq!(done.len(), 1);
        done.remove(0)
    }

    /// Memory that notes whether the test had already let the kernel finish when it was freed.
    struct Watched {
        bytes: Vec<u8>,
        finished: Arc<AtomicBool>,
        freed_after: Arc<AtomicBool>,
    }

    impl Drop for Watched {
        fn drop(&mut self) {
            self.freed_after.store(self.finished.load(Ordering::SeqCst), Ordering::SeqCst);
        }
    }

    #[test]
    fn dropping_the_engine_frees_no_memory_that_the_kernel_still_fills() {
        let (mut engine, mut writer) = on_pipe(4);
        let finished = Arc::new(AtomicBool::new(false));
        let freed_after = Arc::new(AtomicBool::new(false));
        let mut memory =
            Watched { bytes: vec![0; 64], finished: finished.clone(), freed_after: freed_after.clone() };
        let base = memory.bytes.as_mut_ptr();
        let owner: Arc<dyn Any + Send + Sync> = Arc::new(memory);
        // SAFETY: the vector in `owner` does not change and has 64 bytes at `base`.
        let buffers = unsafe { Buffers::new(owner, [(base, 64)]) };
        engine.submit(read(1, buffers)).unwrap();
        engine.kick().unwrap();

        let kernel = thread::spawn(move || {
            thread::sleep(Duration::from_millis(50));
            finished.store(true, Ordering::SeqCst);
            writer.write_all(&[1; 64]).unwrap();
        });
        drop(engine);
        assert!(freed_after.load(Ordering::SeqCst));
        kernel.join().unwrap();
    }

    /// Whether there is an announcement within 10 s, or now.
    fn announced(engine: &UringEngine, wait: bool) -> bool {
        let mut poll = libc::pollfd { fd: engine.notifier.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        loop {
            // SAFETY: one pollfd, as said.
            match unsafe { libc::poll(&raw mut poll, 1, if wait { 10_000 } else { 0 }) } {
                // Interrupted by the kernel's own work.
                -1 => assert_eq!(io::Error::last_os_error().kind(), io::ErrorKind::Interrupted),
                ready => return ready == 1,
            }
        }
    }

    #[test]
    fn what_ends_is_announced_as_long_as_the_owner_wants_it() {
        let (mut engine, mut writer) = on_pipe(2);
        let mut done = Vec::new();
        for token in 0..3 {
            assert!(!engine.announce(false));
            engine.submit(read(token, Buffers::zeroed(8).unwrap())).unwrap();
            engine.kick().unwrap();
            assert!(!engine.announce(true), "nothing has ended yet");
            writer.write_all(&[1; 8]).unwrap();
            assert!(announced(&engine, true), "an owner that sleeps is woken");
            assert!(engine.announce(true), "it is there, too");
            engine.announce(false);
            engine.reap(&mut done).unwrap();

            engine.submit(read(token, Buffers::zeroed(8).unwrap())).unwrap();
            writer.write_all(&[1; 8]).unwrap();
            engine.kick().unwrap();
            engine.ring.submit_and_wait(1).unwrap();
            assert!(!announced(&engine, false), "an owner that is awake is not told");
            engine.reap(&mut done).unwrap();
            assert_eq!(done.drain(..).count(), 2);
        }
    }

    #[test]
    fn a_short_read_is_continued_by_reap() {
        let (mut engine, mut writer) = on_pipe(1);
        engine.submit(read(1, Buffers::zeroed(100).unwrap().chunked(7))).unwrap();
        engine.kick().unwrap();
        let mut done = Vec::new();
        writer.write_all(&[1; 40]).unwrap();
        engine.ring.submit_and_wait(1).unwrap();
        engine.reap(&mut done).unwrap();
        assert!(done.is_empty());
        assert_eq!(engine.in_flight(), 1);
        writer.write_all(&[2; 60]).unwrap();
        let completion = reap_one(&mut engine);
        assert_eq!(completion.result.unwrap(), 100);
        let bytes = completion.buffers.unwrap().as_slice().unwrap().to_vec();
        assert_eq!(bytes, [vec![1; 40], vec![2; 60]].concat());
    }

    #[test]
    fn a_discard_by_ioctl_needs_no_ring() {
        let mut raw = raw_on(tempfile::tempfile().unwrap(), 1 << 20, None);
        // No device, in truth, so the ioctl is not supported: that too is success.
        raw.block_device = true;
        raw.missing(Feature::Punch, &io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        let raw = Arc::new(raw);
        let mut engine = UringEngine::new(raw.clone(), 1).unwrap();
        engine.submit(Request { token: 8, op: Op::Discard { offset: 0, len: 4096 } }).unwrap();
        assert!(!raw.quirks.can(Feature::BlockDiscard));
        let mut done = Vec::new();
        engine.reap(&mut done).unwrap();
        assert!(matches!(done.as_slice(), [Completion { token: 8, result: Ok(0), buffers: None }]));
    }

    #[test]
    fn requests_with_one_token_keep_their_own_buffers() {
        let (mut engine, mut writer) = on_pipe(2);
        for len in [10, 20] {
            engine.submit(read(5, Buffers::zeroed(len).unwrap())).unwrap();
        }
        engine.kick().unwrap();
        let full = engine.submit(read(5, Buffers::zeroed(30).unwrap())).unwrap_err();
        assert_eq!(full.reason, SubmitError::Full);
        writer.write_all(&[3; 30]).unwrap();
        let mut done = Vec::new();
        while done.len() < 2 {
            engine.ring.submit_and_wait(1).unwrap();
            engine.reap(&mut done).unwrap();
        }
        let mut lens: Vec<_> = done
            .into_iter()
            .map(|completion| {
                assert_eq!(completion.token, 5);
                let buffers = completion.buffers.unwrap();
                assert!(buffers.as_slice().unwrap().iter().all(|&byte| byte == 3));
                assert_eq!(u64::from(completion.result.unwrap()), buffers.len());
                buffers.len()
            })
            .collect();
        lens.sort_unstable();
        assert_eq!(lens, [10, 20]);
    }
}
